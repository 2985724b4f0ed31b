// Forward as an implicit GEMM on the tensor cores of compute capability 9.0:
//
//   output [positions, out_channels] = samples [positions, K] * filters [K, out_channels]
//
// without columns in memory: consumer warpgroups sample into registers, from where the tensor cores
// take the samples; a producer warpgroup copies filters. benchmarks/gpu_kernels.md explains it.

#include <algorithm>

#include "core/cuda/fused/position_order.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/barrier.cuh"
#include "core/cuda/sm90/implicit_gemm_consumer.cuh"
#include "core/cuda/sm90/implicit_gemm_producer.cuh"
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

template <typename T, typename Shape, bool kWhole>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    ImplicitGemmKernel(const __grid_constant__ FusedSizes sizes,
                       const __grid_constant__ PositionOrder order, int n_tiles,
                       SampledTensors<T, float> tensors, const T* __restrict__ filters,
                       T* __restrict__ output) {  // [positions, out_channels]
  extern __shared__ __align__(kSlabAlignment) uint8_t memory[];
  const int taps_of_position = static_cast<int>(sizes.by_taps_of_position.value());
  const SharedMemory<Shape, T> shared(memory, taps_of_position);
  if (threadIdx.x == 0) {
    constexpr int kWarps = kWarpgroup / kWarp;
    for (int i = 0; i < Shape::kStages; ++i) {
      InitializeBarrier(shared.Of(shared.full, i), kWarps);
      InitializeBarrier(shared.Of(shared.empty, i), Shape::kConsumers * kWarps);
    }
  }
  for (int row = threadIdx.x; row < Shape::kM; row += Shape::kThreads) {
    shared.samples.SetToZero(taps_of_position * Shape::kM + row);
  }
  __syncthreads();
  if (WarpgroupIndex() < Shape::kConsumers) {
    RaiseRegisters<Shape::kConsumerRegisters>();
    ConsumeFilters<T, Shape, kWhole>(sizes, order, n_tiles, tensors, shared, output);
  } else {
    LowerRegisters<Shape::kProducerRegisters>();
    ProduceFilters<T, Shape>(sizes, n_tiles, filters, shared);
  }
}

// to [cols, whole blocks of rows] = from [rows, cols] transposed and rounded to TF32, each block in
// the order of PermutedK(), with zeros after the last row.
constexpr int kTransposedSide = kK<float>, kTransposedRows = 8;
__global__ void __launch_bounds__(kTransposedSide* kTransposedRows)
    TransposeToTf32Kernel(int rows, int cols, const float* __restrict__ from,
                          float* __restrict__ to) {
  __shared__ float square[kTransposedSide][kTransposedSide + 1];  // one more: no bank conflicts
  const int squares_across = CeilDiv(cols, kTransposedSide);
  const int pitch = RoundUp(rows, kTransposedSide);
  const int first_row = blockIdx.x / squares_across * kTransposedSide;
  const int first_col = blockIdx.x % squares_across * kTransposedSide;
  for (int i = threadIdx.y; i < kTransposedSide; i += kTransposedRows) {
    const int row = first_row + i, col = first_col + threadIdx.x;
    square[i][threadIdx.x] = row < rows && col < cols ? from[int64_t{row} * cols + col] : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTransposedSide; i += kTransposedRows) {
    const int col = first_col + i;
    if (col >= cols) continue;
    to[int64_t{col} * pitch + first_row + PermutedK<float>(threadIdx.x)] =
        RoundToTf32(square[threadIdx.x][i]);
  }
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

// Tiles along N, and units of positions along M.
template <typename Shape>
int64_t NTiles(const DeformConvParams& params) {
  return params.groups * CeilDiv<int64_t>(params.group_out_channels(), Shape::kN);
}
template <typename Shape>
int64_t Units(const DeformConvParams& params) {
  return CeilDiv<int64_t>(params.out_positions(), Shape::kUnit);
}

// Transposes the filters and rounds them to TF32, as FilterLoader reads them.
std::string TransposeToTf32(const DeformConvParams& params, const float* filters, GpuDevice& device,
                            const float** result) {
  const int rows = static_cast<int>(params.taps() * params.group_in_channels());
  const int cols = static_cast<int>(params.out_channels);
  const int64_t k_blocks = CeilDiv(rows, kTransposedSide);
  float* transposed;
  DEFORM_CONV_RETURN_IF_ERROR(device.Allocate(k_blocks * kTransposedSide * cols * sizeof(float),
                                              reinterpret_cast<void**>(&transposed)));
  const unsigned blocks = static_cast<unsigned>(k_blocks) * Blocks(cols, kTransposedSide);
  TransposeToTf32Kernel<<<blocks, dim3(kTransposedSide, kTransposedRows), 0,
                          StreamOf(device.stream())>>>(rows, cols, filters, transposed);
  *result = transposed;
  return LaunchError("TransposeToTf32Kernel");
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
  if (params.in_h < 2 || params.in_w < 2)
    return "the input has fewer than 2 pixels in height or width";
  if (!IsAligned(filters) || !IsAligned(output))
    return "the filters or the output are not aligned to 16 bytes";
  return WithTileShape<T>(params, [&](auto shape) -> std::string {
    using Shape = decltype(shape);
    if (Shape::SharedBytes(params) > kMostSharedBytes) return kTooManyTaps;
    if (Units<Shape>(params) > INT32_MAX / NTiles<Shape>(params)) return "there are too many tiles";
    return "";
  });
}

template <typename T>
std::string ImplicitGemmSm90(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             GpuDevice& device, T* output) {
  if (params.out_positions() == 0) return "";
  if constexpr (kMajorOfB<T> == Major::kK) {
    DEFORM_CONV_RETURN_IF_ERROR(TransposeToTf32(params, filters, device, &filters));
  }
  return WithTileShape<T>(params, [&](auto shape) -> std::string {
    using Shape = decltype(shape);
    constexpr int64_t kBlock = kK<CudaType<T>>;
    const bool whole =
        params.group_in_channels() % kBlock == 0 && params.deform_group_channels() % kBlock == 0;
    const auto kernel = whole ? ImplicitGemmKernel<CudaType<T>, Shape, true>
                              : ImplicitGemmKernel<CudaType<T>, Shape, false>;
    const int64_t shared_bytes = Shape::SharedBytes(params);
    DEFORM_CONV_RETURN_IF_ERROR(AllowSharedBytes("ImplicitGemmKernel", kernel, shared_bytes));
    const int64_t n_tiles = NTiles<Shape>(params);
    const int64_t blocks =
        std::min<int64_t>(n_tiles * Units<Shape>(params), CurrentGpu().multiprocessors);
    kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, shared_bytes,
             StreamOf(device.stream())>>>(FusedSizes(params), PositionOrder(params),
                                          static_cast<int>(n_tiles), AsCuda<T>(tensors),
                                          AsCuda(filters), AsCuda(output));
    return LaunchError("ImplicitGemmKernel");
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
