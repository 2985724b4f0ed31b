# The core's sources, by what compiles them. CMakeLists.txt and benchmarks/gpu_core.py read this
# file: one path a line, relative to this folder.

set(CORE_SOURCES
  params.cc
  params3d.cc
  size_rules.cc
)

set(CORE_CPU_SOURCES
  build_info.cc
  cpu/backward.cc
  cpu/forward.cc
  cpu/kernels.cc
  cpu/plan.cc
  cpu/threads.cc
  cpu/volume_backward.cc
  cpu/volume_forward.cc
)

# Compiled once per instruction set.
set(CORE_CPU_ISA_SOURCES
  cpu/isa/kernels_isa.cc
  cpu/isa/volume_isa.cc
)

# C++ without CUDA's headers.
set(CORE_GPU_SOURCES
  gpu/backward.cc
  gpu/chunk_plan.cc
  gpu/columns_backward.cc
  gpu/depthwise.cc
  gpu/embedded.cc
  gpu/embedding.cc
  gpu/filters_of_ones.cc
  gpu/forward.cc
  gpu/im2col_gemm.cc
  gpu/implementations.cc
  gpu/volume.cc
)

# For every GPU.
set(CORE_CUDA_SOURCES
  cuda/errors.cu
  cuda/general/aggregate_backward.cu
  cuda/general/aggregate_forward.cu
  cuda/general/col2im.cu
  cuda/general/col2im_regions.cu
  cuda/general/col2im_sorted.cu
  cuda/general/depthwise_backward.cu
  cuda/general/depthwise_forward.cu
  cuda/general/depthwise_forward_staged.cu
  cuda/general/embedding.cu
  cuda/general/im2col.cu
  cuda/general/layout.cu
  cuda/general/volume.cu
  cuda/general/volume_sorted.cu
)

# In the instructions of compute capability 9.0 alone.
set(CORE_CUDA_SM90_SOURCES
  cuda/sm90/implicit_gemm.cu
  cuda/sm90/region_scatter.cu
)

# The halves behind a C interface.
set(CORE_CPU_C_API_SOURCES
  c_api/deform_conv2d_cpu.cc
)

set(CORE_C_API_SOURCES
  c_api/deform_conv2d_cuda.cc
)
