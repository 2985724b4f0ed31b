// Forward as an implicit GEMM on the tensor cores of compute capability 9.0:
//
//   output [positions, out_channels] = samples [positions, K] * filters [K, out_channels]
//
// without columns in memory: consumer warpgroups sample into registers, from where the tensor cores
// take the samples; a producer warpgroup copies filters. benchmarks/gpu_kernels.md explains it.

#include <algorithm>

#include "core/cuda/fused/input_region.cuh"
#include "core/cuda/fused/shared_vec16.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/fused/strip_walk.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/barrier.cuh"
#include "core/cuda/sm90/implicit_gemm_consumer.cuh"
#include "core/cuda/sm90/implicit_gemm_plan.cuh"
#include "core/cuda/sm90/implicit_gemm_producer.cuh"
#include "core/cuda/sm90/implicit_gemm_samples.cuh"
#include "core/cuda/sm90/implicit_gemm_tile.cuh"
#include "core/cuda/sm90/kernels.h"
#include "core/cuda/sm90/limits.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/integer_math.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

// Writes the output or, where K is in parts, the sums of each part.
template <typename T, typename Shape, Locating kLocating, bool kRegions>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    ImplicitGemmKernel(const __grid_constant__ FusedSizes sizes,
                       const __grid_constant__ TilePlan<T> plan, SampledTensors<T, float> tensors,
                       const uint8_t* __restrict__ filters,  // [n_tiles, k_blocks] stages
                       T* __restrict__ output,               // [positions, out_channels]
                       float* __restrict__ partial_sums) {   // [splits, positions, out_channels]
  extern __shared__ __align__(kSlabAlignment) uint8_t memory[];
  const SharedMemory<Shape, T> shared(memory, plan);
  if (kRegions && threadIdx.x < kRegionBuffers * kZeroPixels * kSlabRowVec16s) {
    const int vec16 = threadIdx.x / kRegionBuffers, buffer = threadIdx.x % kRegionBuffers;
    if (vec16 * kVec16Bytes < kZeroPixels * plan.region.pixel_bytes) {
      StoreVec16(
          shared.regions + buffer * plan.region_bytes + plan.region.zeros() + vec16 * kVec16Bytes,
          make_uint4(0, 0, 0, 0));
    }
  }
  if (threadIdx.x == 0) {
    constexpr int kWarps = kWarpgroup / kWarp;
    for (int i = 0; i < Shape::kStages; ++i) {
      InitializeBarrier(shared.Of(shared.full, i), 1);
      InitializeBarrier(shared.Of(shared.empty, i), Shape::kConsumers * kWarps);
    }
    for (int i = 0; i < kRegionBuffers; ++i) {
      InitializeBarrier(shared.Of(shared.region_full, i), kRegionWarps);
      InitializeBarrier(shared.Of(shared.region_empty, i), Shape::kConsumers * kWarps);
    }
  }
  __syncthreads();
  if (WarpgroupIndex() < Shape::kConsumers) {
    RaiseRegisters<Shape::template kConsumerRegisters<kRegions>>();
    ConsumeFilters<T, Shape, kLocating, kRegions>(sizes, plan, tensors, shared, memory, output,
                                                  partial_sums);
  } else {
    LowerRegisters<Shape::template kProducerRegisters<kRegions>>();
    if (threadIdx.x % kWarpgroup < kWarp) {
      if (threadIdx.x % kWarp == 0) ProduceFilters<T, Shape>(sizes, plan, filters, shared);
    } else if (kRegions) {
      ProduceRegions<T, Shape>(sizes, plan, tensors.input, shared);
    }
  }
}

// Adds up the parts of K, in their order.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    SumPartsKernel(int64_t vectors, int splits, const float* __restrict__ partial_sums,
                   T* __restrict__ output) {
  constexpr int kSize = 4;
  const int64_t i = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (i >= vectors) return;
  Vector<float, kSize> sum = Load<float, kSize>(partial_sums + i * kSize);
  for (int split = 1; split < splits; ++split) {
    const Vector<float, kSize> part =
        Load<float, kSize>(partial_sums + (int64_t{split} * vectors + i) * kSize);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum.elements[k] += part.elements[k];
  }
  Store(output + i * kSize, sum.elements);
}

// Packs filters [K, out_channels] as the kernel's stages hold them: for each tile of output
// channels and each K block, operand B, with zeros where there is no such channel or row. TF32 is
// rounded, and transposed. A thread block packs a K block by 32 output channels.
constexpr int kPackedChannels = 32, kPackingRows = 8;
template <typename T, typename Shape>
__global__ void __launch_bounds__(kPackedChannels* kPackingRows)
    PackFiltersKernel(const __grid_constant__ KOrder<T> order, int out_channels,
                      int group_out_channels, const T* __restrict__ filters,
                      uint8_t* __restrict__ packed) {  // [n_tiles, k_blocks] stages
  LetNextKernelBegin();
  __shared__ T block[kK<T>][kPackedChannels + 4 / sizeof(T)];  // more: fewer bank conflicts
  const int n_tile = blockIdx.x / order.k_blocks, k_block = blockIdx.x - n_tile * order.k_blocks;
  const int slice = order.SliceOf(k_block);
  const int n_tiles_of_group = CeilDiv<Shape::kN>(group_out_channels);
  const int group = n_tile / n_tiles_of_group;
  const int in_tile = blockIdx.y * kPackedChannels;
  const int in_group = (n_tile - group * n_tiles_of_group) * Shape::kN + in_tile;
  for (int k = threadIdx.y; k < kK<T>; k += kPackingRows) {
    const int row = order.RowOf(slice, k_block - slice * order.taps, k);
    const int channel = in_group + threadIdx.x;
    T number = T(0.0f);
    if (row < order.taps * order.group_in_channels && channel < group_out_channels) {
      number = filters[int64_t{row} * out_channels + group * group_out_channels + channel];
    }
    if constexpr (sizeof(T) == 4) number = RoundToTf32(number);
    block[PermutedK<T>(k)][threadIdx.x] = number;
  }
  __syncthreads();
  uint8_t* stage = packed + int64_t{blockIdx.x} * Shape::kStageBytes;
  const int thread = threadIdx.y * kPackedChannels + threadIdx.x;
  Vector<T, kVec16Size<T>> vec16;
  uint32_t to;
  if constexpr (kMajorOfB<T> == Major::kMN) {
    constexpr int kVec16s = kPackedChannels / kVec16Size<T>;
    const int row = thread / kVec16s, first = thread % kVec16s * kVec16Size<T>;
#pragma unroll
    for (int i = 0; i < kVec16Size<T>; ++i) vec16.elements[i] = block[row][first + i];
    to = (in_tile + first) / kSlabRowSize<T> * (kK<T> * kSlabRowBytes) +
         SwizzledOffset(row, (in_tile + first) % kSlabRowSize<T> / kVec16Size<T>);
  } else {
    const int row = thread / kSlabRowVec16s, first = thread % kSlabRowVec16s * kVec16Size<T>;
#pragma unroll
    for (int i = 0; i < kVec16Size<T>; ++i) vec16.elements[i] = block[first + i][row];
    to = SwizzledOffset(in_tile + row, thread % kSlabRowVec16s);
  }
  *reinterpret_cast<Vector<T, kVec16Size<T>>*>(stage + to) = vec16;
}

// --- Launching ---

// Calls run(shape) with the narrowest shape that holds a group's output channels, or the widest.
template <typename T, typename Run>
auto WithTileShape(const DeformConvParams& params, const Run& run) {
  using Element = CudaType<T>;
  if (params.group_out_channels() <= 64) return run(TileShape<Element, 64>());
  if (params.group_out_channels() <= 128) return run(TileShape<Element, 128>());
  return run(TileShape<Element, 256>());
}

template <typename T, typename Shape>
std::string PackFilters(const DeformConvParams& params, const TilePlan<T>& plan, const T* filters,
                        GpuDevice& device, uint8_t** packed) {
  static_assert(kK<T> * kPackedChannels * sizeof(T) ==
                kPackedChannels * kPackingRows * kVec16Bytes);
  const int64_t stages = int64_t{plan.n_tiles} * plan.order.k_blocks;
  DEFORM_CONV_RETURN_IF_ERROR(
      device.Allocate(stages * Shape::kStageBytes, reinterpret_cast<void**>(packed)));
  const dim3 blocks(static_cast<unsigned>(stages), Shape::kN / kPackedChannels);
  return LaunchKernel("PackFiltersKernel", PackFiltersKernel<T, Shape>, blocks,
                      dim3(kPackedChannels, kPackingRows), 0, device.stream(), plan.order,
                      static_cast<int>(params.out_channels),
                      static_cast<int>(params.group_out_channels()), filters, *packed);
}

template <typename T>
std::string SumParts(int64_t vectors, int splits, const float* partial_sums, T* output,
                     void* stream) {
  return LaunchKernel("SumPartsKernel", SumPartsKernel<T>, Blocks(vectors, kThreadsPerBlock),
                      kThreadsPerBlock, 0, stream, vectors, splits, partial_sums, output);
}

// Calls run() with the plan's kernel.
template <typename T, typename Shape, Locating kLocating, typename Run>
std::string WithRegions(bool has_regions, const Run& run) {
  return has_regions ? run(ImplicitGemmKernel<T, Shape, kLocating, true>)
                     : run(ImplicitGemmKernel<T, Shape, kLocating, false>);
}
template <typename T, typename Shape, typename Run>
std::string WithKernel(const LaunchPlan<T>& plan, const Run& run) {
  switch (plan.locating) {
    case Locating::kWhole:
      return WithRegions<T, Shape, Locating::kWhole>(plan.has_regions, run);
    case Locating::kParts:
      return WithRegions<T, Shape, Locating::kParts>(plan.has_regions, run);
    default:
      return WithRegions<T, Shape, Locating::kDirect>(plan.has_regions, run);
  }
}

}  // namespace

template <typename T>
std::string ImplicitGemmSm90Misfit(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors,
                                   const T* filters, const T* output) {
  DEFORM_CONV_RETURN_IF_ERROR(Sm90Misfit());
  DEFORM_CONV_RETURN_IF_ERROR(SizesMisfit(params));
  DEFORM_CONV_RETURN_IF_ERROR(TensorsMisfit<T>(tensors));
  constexpr int64_t kSize = kVec16Size<T>;
  if (!CanVectorize<T>(params) || params.group_out_channels() % kSize != 0) {
    return "the channels of its convolution and deformable groups, in and out, are no multiples "
           "of " +
           std::to_string(kSize);
  }
  if (!IsAligned(filters) || !IsAligned(output))
    return "the filters or the output are not aligned to 16 bytes";
  if (params.image_pixels() == 0) return "the input is empty";
  if (MostTiles(params) > INT32_MAX) return "there are too many tiles";
  return "";
}

template <typename T>
std::string ImplicitGemmSm90(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             GpuDevice& device, T* output) {
  if (params.out_positions() == 0) return "";
  return WithTileShape<T>(params, [&](auto shape) -> std::string {
    using Shape = decltype(shape);
    using Element = CudaType<T>;
    const LaunchPlan<Element> plan =
        PlanImplicitGemm<Element, Shape>(params, CurrentGpu().multiprocessors);
    uint8_t* packed;
    DEFORM_CONV_RETURN_IF_ERROR(
        (PackFilters<Element, Shape>(params, plan.tiles, AsCuda(filters), device, &packed)));
    float* partial_sums = nullptr;
    const int64_t size = params.out_positions() * params.out_channels;
    const int splits = plan.tiles.splits;
    if (splits > 1) {
      DEFORM_CONV_RETURN_IF_ERROR(device.Allocate(splits * size * int64_t{sizeof(float)},
                                                  reinterpret_cast<void**>(&partial_sums)));
    }
    DEFORM_CONV_RETURN_IF_ERROR((WithKernel<Element, Shape>(plan, [&](auto kernel) -> std::string {
      DEFORM_CONV_RETURN_IF_ERROR(
          AllowSharedBytes("ImplicitGemmKernel", kernel, plan.shared_bytes));
      return LaunchEarly("ImplicitGemmKernel", kernel, plan.blocks, Shape::kThreads,
                         plan.shared_bytes, device.stream(), FusedSizes(params), plan.tiles,
                         AsCuda<T>(tensors), packed, AsCuda(output), partial_sums);
    })));
    if (splits == 1) return "";
    const int64_t vectors = size / 4;
    return SumParts(vectors, splits, partial_sums, AsCuda(output), device.stream());
  });
}

#define DEFORM_CONV_INSTANTIATE(T)                                                             \
  template std::string ImplicitGemmSm90Misfit<T>(                                              \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*);  \
  template std::string ImplicitGemmSm90<T>(const DeformConvParams&,                            \
                                           const SampledTensors<T, ComputeType<T>>&, const T*, \
                                           GpuDevice&, T*);
DEFORM_CONV_FOR_TENSOR_CORE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
