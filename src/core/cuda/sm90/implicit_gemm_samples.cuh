// The samples that a consumer of the implicit GEMM kernel needs for a K block. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_SAMPLES_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_SAMPLES_CUH_

#include <cstdint>

#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/input_region.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/fused/tile_sample.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm90/implicit_gemm_epilogue.cuh"
#include "core/cuda/sm90/implicit_gemm_tile.cuh"
#include "core/cuda/types.cuh"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// How a thread comes by its samples.
enum class Locating {
  // From a table that the warp makes for a deformable group; a slice is within one.
  kWhole,
  // From a table for all deformable groups of a slice.
  kParts,
  // Each thread locates its own. No table, so any number of taps and deformable groups.
  kDirect,
};

// A consumer's thread samples two rows of the tile, 8 apart, and of each two vec16s of a K block, 4
// apart. It takes the vec16s in one order or the other, so that eight lanes together read a whole
// row of banks.
constexpr int kRowsOfThread = 2, kVec16sOfThread = 2;

// The first of the thread's rows.
__device__ __forceinline__ int FirstRow() {
  return threadIdx.x / kWarp * kUnit + threadIdx.x % kWarp / 4;
}
// Whether the second of its vec16s comes first.
__device__ __forceinline__ bool SecondFirst() { return threadIdx.x / 4 % 2 != 0; }
// Its vec16 `v` of a K block.
__device__ __forceinline__ int Vec16Of(int v) {
  return threadIdx.x % 4 + (SecondFirst() == (v == 0) ? 4 : 0);
}

// The position of a tile's row; its index is kNoPosition where there is none.
struct RowPosition {
  Position position;
  int32_t index;

  template <typename T>
  static __device__ __forceinline__ RowPosition Of(const FusedSizes& sizes, const TilePlan<T>& plan,
                                                   const WorkTile& tile, int row) {
    const int walk_index = tile.walk_index + row;
    const int batch_row = tile.strip.by_width.Divide(walk_index);
    const int x = tile.strip.x + walk_index - batch_row * tile.strip.width;
    const bool counts = row < tile.units * kUnit && batch_row < plan.walk.rows();
    return {plan.walk.PositionAt(batch_row, x), counts ? batch_row * sizes.out_w + x : kNoPosition};
  }
};

// The samples of a thread, K block by K block, and where their channels are.
template <typename T, typename Shape, Locating kLocating>
class TileSamples {
 public:
  __device__ TileSamples(const FusedSizes& sizes, const TilePlan<T>& plan,
                         const SampledTensors<T, float>& tensors, const WorkTile& tile,
                         const InputRegion& region, const SharedMemory<Shape, T>& shared)
      : sizes_(sizes),
        plan_(plan),
        tensors_(tensors),
        tile_(tile),
        region_(region),
        shared_(shared) {
    if constexpr (kLocating == Locating::kDirect) {
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        rows_[r] = RowPosition::Of(sizes, plan, tile, FirstRow() + 8 * r);
        first_[r] =
            int64_t{max(rows_[r].index, 0)} * static_cast<int>(sizes.by_taps_of_position.value());
      }
    }
  }

  // By whole warps, before the first K block of a slice. `block` is that one's number in the slice.
  __device__ __forceinline__ void BeginSlice(int slice, int block) {
    slice_ = slice;
    const int first = FirstChannel();
    if constexpr (kLocating == Locating::kDirect) {
#pragma unroll
      for (int v = 0; v < kVec16sOfThread; ++v) {
        groups_of_whole_[v] =
            plan_.by_deform_group_channels.Divide(first + Vec16Of(v) * kVec16Size<T>);
      }
      Prefetch(block);
    } else {
      const int last = min(first + kK<T>, (tile_.group + 1) * sizes_.group_in_channels) - 1;
      const int g = plan_.by_deform_group_channels.Divide(first);
      const int count = plan_.by_deform_group_channels.Divide(last) - g + 1;
      if (g != first_group_ || count != groups_) {
        first_group_ = g;
        groups_ = count;
        MakeTable();
      }
    }
  }

  // The samples of block `block` of the slice: [vec16][row]. `channel_bytes` is where the vec16s
  // are in the slice.
  __device__ __forceinline__ void Take(int block, int next_block,
                                       TileSample<T> (&samples)[kVec16sOfThread][kRowsOfThread],
                                       uint32_t (&channel_bytes)[kVec16sOfThread]) {
    if constexpr (kLocating == Locating::kDirect) {
#pragma unroll
      for (int v = 0; v < kVec16sOfThread; ++v) {
        channel_bytes[v] = places_[v].channel * static_cast<int>(sizeof(T));
        if (v > 0 && plan_.slice_is_within) {
#pragma unroll
          for (int r = 0; r < kRowsOfThread; ++r) samples[v][r] = samples[0][r];
          continue;
        }
        const Tap tap = Tap::Of(sizes_, places_[v].tap);
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
          const bool counts = !places_[v].past_last && rows_[r].index != kNoPosition;
          const bool within =
              TileSample<T>::LocateWithin(sizes_, plan_.region, region_, rows_[r].position, tap,
                                          offsets_[v][r], masks_[v][r], &samples[v][r]);
          if (__all_sync(0xffffffffu, within && counts)) continue;
          samples[v][r] =
              counts ? TileSample<T>::Locate(sizes_, plan_.region, region_, rows_[r].position, tap,
                                             offsets_[v][r], masks_[v][r])
                     : TileSample<T>::Zero(plan_.region);
        }
      }
      if (next_block >= 0) Prefetch(next_block);
    } else {
#pragma unroll
      for (int v = 0; v < kVec16sOfThread; ++v) {
        int entry = block * Shape::kM;
        channel_bytes[v] = Vec16Of(v) * kVec16Bytes;
        if constexpr (kLocating == Locating::kParts) {
          const Place place = PlaceOf(block, v);
          channel_bytes[v] = place.channel * static_cast<int>(sizeof(T));
          const int after_last = plan_.table_samples - 1;
          entry =
              (place.past_last ? after_last : (place.g - first_group_) * sizes_.taps + place.tap) *
              Shape::kM;
        }
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
          const int at = entry + FirstRow() + 8 * r;
          const bool same = kLocating == Locating::kWhole && v > 0;
          samples[v][r].weights = same ? samples[0][r].weights : shared_.weights[at];
          samples[v][r].packed_place =
              same ? samples[0][r].packed_place : shared_.packed_places[at];
        }
      }
    }
  }

  // The slice's first channel.
  __device__ __forceinline__ int FirstChannel() const {
    return tile_.group * sizes_.group_in_channels + slice_ * kK<T>;
  }

 private:
  // What a vec16 of a K block stands for.
  struct Place {
    int g, tap, channel;  // the channel in the slice
    bool past_last;       // there is no such vec16
  };

  __device__ __forceinline__ Place PlaceOf(int block, int v) const {
    if (kLocating == Locating::kDirect && slice_ < plan_.order.whole_slices) {
      return {groups_of_whole_[v], block, Vec16Of(v) * kVec16Size<T>, false};
    }
    const TapChannel at = plan_.order.At(slice_, block, Vec16Of(v) * kVec16Size<T>);
    const bool past_last = at.tap >= sizes_.taps;
    const int tap = past_last ? 0 : at.tap, channel = past_last ? 0 : at.channel;
    const int g = plan_.by_deform_group_channels.Divide(FirstChannel() + channel);
    return {g, tap, channel, past_last};
  }

  // Begins to load the offsets and masks of a K block.
  __device__ __forceinline__ void Prefetch(int block) {
#pragma unroll
    for (int v = 0; v < kVec16sOfThread; ++v) {
      places_[v] = PlaceOf(block, v);
      if (v > 0 && plan_.slice_is_within) continue;
      const int g_tap = places_[v].g * sizes_.taps + places_[v].tap;
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        const int64_t index = first_[r] + g_tap;
        offsets_[v][r] = LoadOffset(tensors_, index);
        masks_[v][r] = LoadMask(tensors_, index);
      }
    }
  }

  // Locates the samples of the warp's rows: lane l has row l % 16, and every other sample of it.
  __device__ __forceinline__ void MakeTable() const {
    constexpr int kLanesOfRow = kWarp / kUnit;
    constexpr int kTogether = 3;  // loaded at a time
    const int lane = threadIdx.x % kWarp;
    const int row = threadIdx.x / kWarp * kUnit + lane % kUnit;
    const RowPosition at = RowPosition::Of(sizes_, plan_, tile_, row);
    const bool counts = at.index != kNoPosition;
    const int count = groups_ * sizes_.taps, first_g_tap = first_group_ * sizes_.taps;
    const int64_t first =
        int64_t{at.index} * static_cast<int>(sizes_.by_taps_of_position.value()) + first_g_tap;
    __syncwarp();  // all lanes are through with the table
    for (int begin = lane / kUnit; begin < count; begin += kTogether * kLanesOfRow) {
      Offset offsets[kTogether];
      float masks[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int i = begin + k * kLanesOfRow;
        if (i >= count || !counts) continue;
        offsets[k] = LoadOffset(tensors_, first + i);
        masks[k] = LoadMask(tensors_, first + i);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int i = begin + k * kLanesOfRow;
        if (i >= count) continue;
        Store(i * Shape::kM + row,
              counts ? TileSample<T>::Locate(sizes_, plan_.region, region_, at.position,
                                             Tap::Of(sizes_, first_g_tap + i), offsets[k], masks[k])
                     : TileSample<T>::Zero(plan_.region));
      }
    }
    // What lies past the last tap.
    if (kLocating == Locating::kParts && lane < kUnit) {
      Store((plan_.table_samples - 1) * Shape::kM + row, TileSample<T>::Zero(plan_.region));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void Store(int at, const TileSample<T>& sample) const {
    shared_.weights[at] = sample.weights;
    shared_.packed_places[at] = sample.packed_place;
  }

  const FusedSizes& sizes_;
  const TilePlan<T>& plan_;
  const SampledTensors<T, float>& tensors_;
  const WorkTile& tile_;
  const InputRegion& region_;
  const SharedMemory<Shape, T>& shared_;
  int slice_ = 0;
  // Tables: the deformable groups that are in it.
  int first_group_ = -1, groups_ = 0;
  // kDirect: the thread's rows, and what has been loaded for the next K block.
  RowPosition rows_[kRowsOfThread];
  int64_t first_[kRowsOfThread];          // of their samples, in the batch
  int groups_of_whole_[kVec16sOfThread];  // in a whole slice, the vec16s' deformable groups
  Place places_[kVec16sOfThread];
  Offset offsets_[kVec16sOfThread][kRowsOfThread];
  float masks_[kVec16sOfThread][kRowsOfThread];
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_SAMPLES_CUH_
