// The producer warpgroup of the implicit GEMM kernel: filters into stages, and regions of the
// input. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PRODUCER_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PRODUCER_CUH_

#include <cstdint>

#include "core/cuda/fused/input_region.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/copy_async.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/barrier.cuh"
#include "core/cuda/sm90/implicit_gemm_tile.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/integer_math.h"

namespace deform_conv {
namespace cuda {

// One warp of the producer copies filters, the others regions.
constexpr int kRegionWarps = kWarpgroup / kWarp - 1;

// Keeps as many stages full as there are. By one thread. `filters` is as PackFiltersKernel writes
// it: [n_tiles, k_blocks] stages.
template <typename T, typename Shape>
__device__ __forceinline__ void ProduceFilters(const FusedSizes& sizes, const TilePlan<T>& plan,
                                               const uint8_t* __restrict__ filters,
                                               const SharedMemory<Shape, T>& shared) {
  WaitForKernelBefore();
  TileScheduler<T, Shape> scheduler(plan);
  WorkTile tile;
  PipelineState<Shape::kStages> state;
  while (scheduler.Next(sizes, plan, &tile)) {
    const uint8_t* from =
        filters + (int64_t{tile.n_tile} * plan.order.k_blocks + tile.k_begin) * Shape::kStageBytes;
    for (int k_block = tile.k_begin; k_block < tile.k_end; ++k_block) {
      const uint32_t full = shared.Of(shared.full, state.stage);
      WaitAtBarrier(shared.Of(shared.empty, state.stage), state.parity ^ 1);
      ArriveAndExpectBytes(full, Shape::kStageBytes);
      CopyBulkAsync(shared.Stage(state.stage), from, Shape::kStageBytes, full);
      from += Shape::kStageBytes;
      state.Advance();
    }
  }
}

// Copies the region of each slice that a tile reads. By the other warps of the producer.
template <typename T, typename Shape>
__device__ __forceinline__ void ProduceRegions(const FusedSizes& sizes, const TilePlan<T>& plan,
                                               const T* __restrict__ input,
                                               const SharedMemory<Shape, T>& shared) {
  const int warp = threadIdx.x % kWarpgroup / kWarp - 1;
  const KOrder<T>& order = plan.order;
  TileScheduler<T, Shape> scheduler(plan);
  WorkTile tile;
  PipelineState<kRegionBuffers> state;
  while (scheduler.Next(sizes, plan, &tile)) {
    const InputRegion region = tile.RegionOf(sizes, plan);
    const int last_slice = order.SliceOf(tile.k_end - 1);
    for (int slice = order.SliceOf(tile.k_begin); slice <= last_slice; ++slice) {
      const T* from = input + tile.group * sizes.group_in_channels + slice * kK<T>;
      WaitAtBarrier(shared.Of(shared.region_empty, state.stage), state.parity ^ 1);
      CopyRegion(sizes, plan.region, region, reinterpret_cast<const uint8_t*>(from),
                 sizes.in_channels * int64_t{sizeof(T)}, order.Vec16sOf(slice),
                 shared.regions + state.stage * plan.region_bytes, warp, kRegionWarps);
      CommitCopies();
      WaitForCopies<0>();
      ArriveAsWarp(shared.Of(shared.region_full, state.stage));
      state.Advance();
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PRODUCER_CUH_
