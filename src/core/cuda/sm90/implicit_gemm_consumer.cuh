// A consumer warpgroup of the implicit GEMM kernel: samples into registers, and multiplies them by
// the filters in the stages. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_CONSUMER_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_CONSUMER_CUH_

#include <cstdint>

#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/position_order.cuh"
#include "core/cuda/fused/sample_table.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/barrier.cuh"
#include "core/cuda/sm90/implicit_gemm_epilogue.cuh"
#include "core/cuda/sm90/implicit_gemm_tile.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// Locates the samples of a warp's rows: lane l has row l % 16, and every other tap of it. Returns
// that row's position index.
template <typename Shape, typename T>
__device__ __forceinline__ int32_t LocateRows(const FusedSizes& sizes, const PositionOrder& order,
                                              const SampledTensors<T, float>& tensors,
                                              const WorkTile& tile, const SampleTable<T>& table) {
  constexpr int kLanesOfRow = kWarp / Shape::kUnit;
  constexpr int kTogether = 3;  // loaded at a time
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x / kWarp * Shape::kUnit + lane % Shape::kUnit;
  const int walk_index = tile.walk_index + row;
  const int taps_of_position = static_cast<int>(sizes.by_taps_of_position.value());
  const bool counts = row < tile.units * Shape::kUnit && walk_index < sizes.positions;
  Position position;
  int32_t position_index = kNoPosition;
  if (counts) {
    position = order.At(walk_index);
    position_index = static_cast<int32_t>(sizes.IndexOf(position));
  }
  const int64_t first = int64_t{position_index} * taps_of_position;
  for (int begin = lane / Shape::kUnit; begin < taps_of_position;
       begin += kTogether * kLanesOfRow) {
    Offset offsets[kTogether];
    float masks[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int g_tap = begin + k * kLanesOfRow;
      if (g_tap >= taps_of_position || !counts) continue;
      offsets[k] = LoadOffset(tensors, first + g_tap);
      masks[k] = LoadMask(tensors, first + g_tap);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int g_tap = begin + k * kLanesOfRow;
      if (g_tap >= taps_of_position) continue;
      const int entry = g_tap * Shape::kM + row;
      if (counts) {
        table.Locate(sizes, position, Tap::Of(sizes, g_tap), offsets[k], masks[k], entry);
      } else {
        table.SetToZero(entry);
      }
    }
  }
  return position_index;
}

// A consumer's thread samples two rows of the tile, 8 apart, and of each two vec16s of a K block, 4
// apart. It takes the vec16s in one order or the other, so that eight lanes together read a whole
// row of banks.
constexpr int kRowsOfThread = 2, kVec16sOfThread = 2;

// The first of the thread's rows.
template <typename Shape>
__device__ __forceinline__ int FirstRow() {
  return threadIdx.x / kWarp * Shape::kUnit + threadIdx.x % kWarp / 4;
}
// Whether the second of its vec16s comes first.
__device__ __forceinline__ bool SecondFirst() { return threadIdx.x / 4 % 2 != 0; }

// Where the thread samples, K block by K block. With kWhole, all vec16s of a block are of the same
// tap and deformable group.
template <typename T, typename Shape, bool kWhole>
class SampleIterator {
 public:
  int entries[kVec16sOfThread];           // of the table, for the first row
  const uint8_t* first[kVec16sOfThread];  // of the input, the vec16 of the first pixel

  __device__ SampleIterator(const FusedSizes& sizes, const T* input, const WorkTile& tile)
      : input_(reinterpret_cast<const uint8_t*>(input)),
        group_channel_(tile.group * sizes.group_in_channels) {
    Set(sizes);
  }

  __device__ __forceinline__ void Advance(const FusedSizes& sizes) {
    if (kWhole && ++tap_ < sizes.taps) {
#pragma unroll
      for (int v = 0; v < kVec16sOfThread; ++v) entries[v] += Shape::kM;
    } else {
      tap_ = 0;
      k_block_ += 1;
      Set(sizes);
    }
  }

 private:
  __device__ __forceinline__ void Set(const FusedSizes& sizes) {
#pragma unroll
    for (int v = 0; v < kVec16sOfThread; ++v) {
      const int vec16 = threadIdx.x % 4 + (SecondFirst() == (v == 0) ? 4 : 0);
      int tap = 0, channel = k_block_ * kK<T>;
      if (!kWhole) {
        const TapChannel at = KOrder<T>(sizes).At(sizes, k_block_, vec16);
        tap = at.tap;
        channel = at.channel;
      }
      channel += group_channel_;
      const int g = sizes.deform_groups == 1 ? 0 : channel / sizes.deform_group_channels;
      const int after_last = static_cast<int>(sizes.by_taps_of_position.value());
      const int g_tap = tap < sizes.taps ? g * sizes.taps + tap : after_last;
      entries[v] = g_tap * Shape::kM + FirstRow<Shape>();
      if (kWhole) channel += vec16 * kVec16Size<T>;
      first[v] = input_ + channel * static_cast<int>(sizeof(T));
    }
  }

  const uint8_t* input_;
  int group_channel_;
  int tap_ = 0, k_block_ = 0;  // with kWhole the block of the channels, else that of K
};

// The thread's samples of a K block.
struct BlockSamples {
  int entries[kVec16sOfThread];  // of the table, for the first row
  int32_t packed_pixels[kVec16sOfThread][kRowsOfThread];
  uint4 corners[kVec16sOfThread][kRowsOfThread][kCorners];
};

// Begins to load the corners of a K block's samples.
template <typename T, typename Shape, bool kWhole>
__device__ __forceinline__ void LoadBlock(const SampleIterator<T, Shape, kWhole>& at,
                                          const CornerDistances& distances,
                                          const SampleTable<T>& table, BlockSamples& samples) {
#pragma unroll
  for (int v = 0; v < kVec16sOfThread; ++v) {
    samples.entries[v] = at.entries[kWhole ? 0 : v];
    const uint8_t* first = Pinned(at.first[v]);
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      int32_t& packed_pixel = samples.packed_pixels[v][r];
      packed_pixel = kWhole && v > 0 ? samples.packed_pixels[0][r]
                                     : table.packed_pixels[samples.entries[v] + 8 * r];
      LoadCorners</*kAllCount=*/true>(distances, first, 0, packed_pixel, samples.corners[v][r]);
    }
  }
}

// Begins accumulators += samples * filters for a K block, whose filters lie at `stage`.
template <typename T, typename Shape>
__device__ __forceinline__ void MultiplyBlock(
    const uint32_t (&words)[kVec16sOfThread][kRowsOfThread][4], uint32_t stage,
    float (&accumulators)[Shape::kWgmmas][Shape::kWgmmaN / 2]) {
  const uint64_t filters_of_stage = MatrixDescriptor(stage, kK<T> * kSlabRowBytes);
  WarpgroupArrive();
#pragma unroll
  for (int step = 0; step < kK<T> / kWgmmaK<T>; ++step) {
    const auto& of_vec16 = words[step / 2];
    const int word = step % 2 * 2;
    const uint64_t filters =
        AdvanceDescriptor(filters_of_stage, step * WgmmaKBytes<T, kMajorOfB<T>>());
    const uint32_t a[4] = {of_vec16[0][word], of_vec16[1][word], of_vec16[0][word + 1],
                           of_vec16[1][word + 1]};
#pragma unroll
    for (int i = 0; i < Shape::kWgmmas; ++i) {
      WgmmaRS<T, Shape::kWgmmaN, kMajorOfB<T>>::Run(
          accumulators[i], a, AdvanceDescriptor(filters, i * (Shape::kWgmmaN * kSlabRowBytes)),
          true);
    }
  }
  WarpgroupCommit();
}

// A consumer's work.
template <typename T, typename Shape, bool kWhole>
__device__ __forceinline__ void ConsumeFilters(const FusedSizes& sizes, const PositionOrder& order,
                                               int n_tiles, const SampledTensors<T, float>& tensors,
                                               const SharedMemory<Shape, T>& shared,
                                               T* __restrict__ output) {
  const int k_blocks = KOrder<T>(sizes).k_blocks;
  const CornerDistances distances = CornerDistances::Of<T>(sizes);
  TileScheduler<Shape> scheduler(sizes, n_tiles);
  WorkTile tile;
  PipelineState<Shape::kStages> state;
  while (scheduler.Next(sizes, &tile)) {
    __syncwarp();  // all lanes are through with the table
    const int32_t position_index = LocateRows<Shape>(sizes, order, tensors, tile, shared.samples);
    __syncwarp();
    SampleIterator<T, Shape, kWhole> at(sizes, tensors.input, tile);
    float accumulators[Shape::kWgmmas][Shape::kWgmmaN / 2] = {};
    uint32_t before = 0;  // the barrier of the stage whose product goes on
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
      BlockSamples samples;
      LoadBlock(at, distances, shared.samples, samples);
      // Operand A's registers are free again.
      WarpgroupWait<0>();
      if (before != 0) ArriveAsWarp(before);
      // Interpolates into operand A: [vec16][row][word of the vec16].
      uint32_t words[kVec16sOfThread][kRowsOfThread][4];
      const bool second_first = SecondFirst();
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        // Most warps have no sample at the border.
        const int32_t all = samples.packed_pixels[0][r] & samples.packed_pixels[1][r] & kAllCorners;
        if (!__all_sync(0xffffffffu, all == kAllCorners)) {
#pragma unroll
          for (int v = 0; v < kVec16sOfThread; ++v) {
            DropUncounted(samples.packed_pixels[v][r], samples.corners[v][r]);
          }
        }
        uint4 sampled[kVec16sOfThread];
#pragma unroll
        for (int v = 0; v < kVec16sOfThread; ++v) {
          sampled[v] = Interpolate<T>(samples.corners[v][r],
                                      shared.samples.weights[samples.entries[v] + 8 * r]);
        }
#pragma unroll
        for (int v = 0; v < kVec16sOfThread; ++v) {
          const uint4 &same = sampled[v], &other = sampled[1 - v];
          words[v][r][0] = second_first ? other.x : same.x;
          words[v][r][1] = second_first ? other.y : same.y;
          words[v][r][2] = second_first ? other.z : same.z;
          words[v][r][3] = second_first ? other.w : same.w;
#pragma unroll
          for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(words[v][r][i])::"memory");
        }
      }
      WaitAtBarrier(shared.Of(shared.full, state.stage), state.parity);
      MultiplyBlock<T, Shape>(words, shared.Stage(state.stage), accumulators);
      at.Advance(sizes);
      before = shared.Of(shared.empty, state.stage);
      state.Advance();
    }
    WarpgroupWait<0>();
    ArriveAsWarp(before);
#pragma unroll
    for (int i = 0; i < Shape::kWgmmas; ++i) {
      const int channel = i * Shape::kWgmmaN;
      Epilogue<T, Shape::kWgmmaN>(accumulators[i], position_index, sizes.out_channels,
                                  tile.channels - channel, output + tile.first_channel + channel);
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_CONSUMER_CUH_
