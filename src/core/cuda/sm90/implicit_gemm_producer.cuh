// The producer warpgroup of the implicit GEMM kernel: filters into stages. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PRODUCER_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PRODUCER_CUH_

#include <cstdint>

#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/sm80/copy_async.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/barrier.cuh"
#include "core/cuda/sm90/implicit_gemm_tile.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/integer_math.h"

namespace deform_conv {
namespace cuda {

// Copies the filters of a tile's output channels, K block by K block, into stages. By a warpgroup.
template <typename Shape, typename T>
class FilterLoader {
  static constexpr bool kRowsAreK = kMajorOfB<T> == Major::kMN;
  static constexpr int kVec16sOfRow = kRowsAreK ? Shape::kN / kVec16Size<T> : kSlabRowVec16s;
  static constexpr int kRowsAtOnce = kWarpgroup / kVec16sOfRow;
  static constexpr int kPasses = Shape::kStageBytes / kVec16Bytes / kWarpgroup;

 public:
  // `filters` is [K, out_channels] where rows are one k each; else [out_channels, whole blocks of
  // K], each block in the order of PermutedK().
  __device__ FilterLoader(const FusedSizes& sizes, const T* filters, const WorkTile& tile) {
    const int thread = threadIdx.x % kWarpgroup;
    const int row = thread / kVec16sOfRow, vec16 = thread % kVec16sOfRow;
    const int k = sizes.taps * sizes.group_in_channels;
    if (kRowsAreK) {
      pitch_ = sizes.out_channels;
      from_ = filters + int64_t{row} * pitch_ + tile.first_channel + vec16 * kVec16Size<T>;
      rows_ = vec16 * kVec16Size<T> < tile.channels ? k - row : 0;
      to_ = vec16 / kSlabRowVec16s * (kK<T> * kSlabRowBytes) +
            SwizzledOffset(PermutedK<T>(row), vec16 % kSlabRowVec16s);
    } else {
      pitch_ = RoundUp<kK<T>>(k);
      from_ = filters + int64_t{tile.first_channel + row} * pitch_ + vec16 * kVec16Size<T>;
      rows_ = tile.channels - row;
      to_ = SwizzledOffset(row, vec16);
    }
  }

  // Begins to copy the K block that begins at k = `first`.
  __device__ __forceinline__ void Copy(int first, uint32_t stage) const {
    const T* from = from_ + (kRowsAreK ? int64_t{first} * pitch_ : first);
    const int rows = kRowsAreK ? rows_ - first : rows_;
    const uint32_t to = stage + to_;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      // The passes' rows and the thread's have no bit in common, and stages begin where all bits of
      // the swizzle are 0.
      const int row = pass * kRowsAtOnce;
      const int to_row = kRowsAreK ? PermutedK<T>(row) : row;
      CopyVec16Async((to ^ to_row % kSwizzledRows * kVec16Bytes) + to_row * kSlabRowBytes, from,
                     row < rows);
      from += kRowsAtOnce * pitch_;
    }
  }

 private:
  const T* from_;
  int64_t pitch_;
  uint32_t to_;
  int rows_;
};

// The producer's work: keeps as many stages full as there are.
template <typename T, typename Shape>
__device__ __forceinline__ void ProduceFilters(const FusedSizes& sizes, int n_tiles,
                                               const T* __restrict__ filters,
                                               const SharedMemory<Shape, T>& shared) {
  const KOrder<T> order(sizes);
  TileScheduler<Shape> scheduler(sizes, n_tiles);
  WorkTile tile;
  PipelineState<Shape::kStages> state;
  uint32_t before = 0;  // the barrier of the stage whose copies go on
  while (scheduler.Next(sizes, &tile)) {
    const FilterLoader<Shape, T> loader(sizes, filters, tile);
    for (int k_block = 0; k_block < order.k_blocks; ++k_block) {
      WaitAtBarrier(shared.Of(shared.empty, state.stage), state.parity ^ 1);
      loader.Copy(order.FirstRow(sizes, k_block), shared.Stage(state.stage));
      CommitCopies();
      WaitForCopies<1>();
      FenceProxyAsync();
      if (before != 0) ArriveAsWarp(before);
      before = shared.Of(shared.full, state.stage);
      state.Advance();
    }
  }
  WaitForCopies<0>();
  FenceProxyAsync();
  if (before != 0) ArriveAsWarp(before);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PRODUCER_CUH_
