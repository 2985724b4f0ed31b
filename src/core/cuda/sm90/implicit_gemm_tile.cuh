// How the implicit GEMM kernel is laid out: the shape of tiles, who computes which, the order of K,
// shared memory. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_TILE_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_TILE_CUH_

#include <algorithm>
#include <cstdint>

#include "core/cuda/fused/input_region.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/fused/strip_walk.cuh"
#include "core/cuda/fused/tile_sample.cuh"
#include "core/cuda/sm80/copy_async.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/barrier.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/integer_math.h"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// A K block: 64 numbers of 16 bits, or 32 of TF32.
template <typename T>
constexpr int kK = kSlabRowSize<T>;

// A thread block computes tiles of up to kM positions by kN output channels, one after the other.
// Each of its warpgroups but the last, the consumers, has 64 of the positions: its threads sample
// into registers, which are operand A of the product that the warpgroup then adds to its
// accumulators. The last one, the producer, copies operand B, filters, into stages in shared
// memory, and regions of the input.
template <typename T, int kTileN>
struct TileShape {
  static constexpr int kN = kTileN;
  static constexpr bool kWide = kN > 128;
  static constexpr int kConsumers = kWide ? 2 : 3;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kM = kConsumers * kWgmmaM;
  static constexpr int kUnits = kM / kUnit;
  // Wgmmas side by side that make up kN.
  static constexpr int kWgmmas = kWide ? 2 : 1, kWgmmaN = kN / kWgmmas;
  // Registers of a thread after setmaxnreg. Copying regions takes more.
  template <bool kRegions>
  static constexpr int kProducerRegisters = kWide || kRegions ? 56 : 32;
  template <bool kRegions>
  static constexpr int kConsumerRegisters = kWide      ? 224
                                            : kRegions ? 152
                                                       : 160;

  static constexpr int kStages = kWide ? 3 : 4;
  static constexpr int kStageBytes = kN * kSlabRowBytes;
};

// Two regions: one is read, one is on its way.
constexpr int kRegionBuffers = 2;

// --- The order of K ---

// A tap, and a channel of the slice: what one k stands for.
struct TapChannel {
  int tap, channel;
};

// The order in which K blocks are gone through. K is (tap, channel of the convolution group). The
// channels are cut into slices of a K block's size, the last of which may be narrower. All taps of
// a slice come before the next slice: they read the same region. Of a whole slice, a K block is a
// tap. Of a narrower one, the taps' channels lie one behind the other, and the last block ends in
// zeros.
template <typename T>
struct KOrder {
  int taps, group_in_channels;
  int whole_slices, last_channels;  // of the narrower slice; 0 if there is none
  int k_blocks;
  Divisor by_taps, by_last_channels, by_vec16s, by_last_vec16s;

  KOrder(int taps, int group_in_channels)
      : taps(taps),
        group_in_channels(group_in_channels),
        whole_slices(group_in_channels / kK<T>),
        last_channels(group_in_channels % kK<T>),
        k_blocks(whole_slices * taps + CeilDiv<kK<T>>(taps * last_channels)),
        by_taps(static_cast<uint32_t>(taps)),
        by_last_channels(static_cast<uint32_t>(std::max(last_channels, 1))),
        by_vec16s(kSlabRowVec16s),
        by_last_vec16s(static_cast<uint32_t>(std::max(last_channels / kVec16Size<T>, 1))) {}

  __device__ __forceinline__ int SliceOf(int k_block) const {
    return min(static_cast<int>(by_taps.Divide(k_block)), whole_slices);
  }
  // The K block after the slice's last.
  __device__ __forceinline__ int EndOf(int slice) const {
    return slice < whole_slices ? (slice + 1) * taps : k_blocks;
  }
  // The vec16s of a pixel's channels.
  __device__ __forceinline__ const Divisor& Vec16sOf(int slice) const {
    return slice < whole_slices ? by_vec16s : by_last_vec16s;
  }

  // What k `k` of block `block` of a slice stands for; past the last tap if there is no such k.
  __device__ __forceinline__ TapChannel At(int slice, int block, int k) const {
    if (slice < whole_slices) return {block, k};
    const int i = block * kK<T> + k;
    const int tap = by_last_channels.Divide(i);
    return {tap, i - tap * last_channels};
  }

  // The row of the filters, or no less than taps * group_in_channels.
  __device__ __forceinline__ int RowOf(int slice, int block, int k) const {
    const TapChannel at = At(slice, block, k);
    return at.tap * group_in_channels + slice * kK<T> + at.channel;
  }
};

// What the host decides, beside the sizes.
template <typename T>
struct TilePlan {
  KOrder<T> order;
  StripWalk walk;
  int32_t n_tiles;  // tiles along N, of all groups
  int32_t splits;   // parts of K, which are summed up afterwards
  Divisor by_deform_group_channels;
  bool slice_is_within;  // whether every slice is within one deformable group, and all are whole
  // The samples that the table has room for at each position; 0 where there is no table.
  int32_t table_samples;
  RegionLimits region;
  int32_t region_bytes;  // of each
};

// A thread block's shared memory: the stages; the regions; the sample table, sample by sample;
// barriers. `full` signals that a stage or region can be read, `empty` that it can be written.
template <typename Shape, typename T>
struct SharedMemory {
  uint32_t stages, regions, full, empty, region_full, region_empty;
  CornerWeights<T>* weights;  // [table samples, kM]
  uint32_t* packed_places;    // [table samples, kM]

  __device__ SharedMemory(uint8_t* memory, const TilePlan<T>& plan)
      : stages(SharedAddress(memory)),
        regions(stages + Shape::kStages * Shape::kStageBytes),
        weights(reinterpret_cast<CornerWeights<T>*>(memory + Shape::kStages * Shape::kStageBytes +
                                                    kRegionBuffers * plan.region_bytes)),
        packed_places(reinterpret_cast<uint32_t*>(weights + plan.table_samples * Shape::kM)) {
    full = SharedAddress(packed_places + plan.table_samples * Shape::kM);
    empty = full + Shape::kStages * kBarrierBytes;
    region_full = empty + Shape::kStages * kBarrierBytes;
    region_empty = region_full + kRegionBuffers * kBarrierBytes;
  }

  static constexpr int64_t kTableBytes = Shape::kM * (sizeof(CornerWeights<T>) + sizeof(uint32_t));
  static constexpr int64_t kOtherBytes = Shape::kStages * int64_t{Shape::kStageBytes} +
                                         2 * (Shape::kStages + kRegionBuffers) * kBarrierBytes;

  __device__ __forceinline__ uint32_t Stage(int stage) const {
    return stages + stage * Shape::kStageBytes;
  }
  // Barrier `stage` of `full` or `empty`, or of those of regions.
  static __device__ __forceinline__ uint32_t Of(uint32_t barriers, int stage) {
    return barriers + stage * kBarrierBytes;
  }
};

// The row of operand B that k of a K block goes to. The lanes t = 0 to 3 of a row of samples hold
// neighbouring vec16s. One wgmma takes four 16-bit numbers, or two of TF32, of each lane's vec16.
template <typename T>
__host__ __device__ constexpr int PermutedK(int k) {
  constexpr int kPair = 4 / sizeof(T);  // numbers of a register
  const int j = k % kPair, i = k / kPair % 2, s = k / (2 * kPair) % 2;
  const int t = k / (4 * kPair) % 4, h = k / (16 * kPair);
  return ((h * 2 + s) * 2 + i) * (4 * kPair) + t * kPair + j;
}

// --- Who computes which tile ---

struct WorkTile {
  Strip strip;
  int walk_index, units;        // the first position in its strip, and how many units of positions
  int n_tile, group;            // along N; of the convolution
  int first_channel, channels;  // of the output: the first, and the group's from there on
  int split, k_begin, k_end;    // K blocks

  // The region of the input around the tile's samples.
  template <typename T>
  __device__ __forceinline__ InputRegion RegionOf(const FusedSizes& sizes,
                                                  const TilePlan<T>& plan) const {
    const int last = min(walk_index + units * kUnit, plan.walk.rows() * strip.width) - 1;
    return InputRegion::Of(
        sizes, plan.region, plan.walk.PositionAt(strip.by_width.Divide(walk_index), strip.x),
        plan.walk.PositionAt(strip.by_width.Divide(last), strip.x), strip.x, strip.width);
  }
};

// The tiles of a thread block: first come those of the first part of K and the first kN output
// channels.
template <typename T, typename Shape>
class TileScheduler {
 public:
  explicit __device__ TileScheduler(const TilePlan<T>& plan) : tiles_(plan.walk.tiles()) {
    const int64_t all = int64_t{tiles_} * plan.n_tiles * plan.splits;
    at_ = static_cast<int>(all * blockIdx.x / gridDim.x);
    end_ = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  }

  // Moves on to the next tile, if there is one.
  __device__ __forceinline__ bool Next(const FusedSizes& sizes, const TilePlan<T>& plan,
                                       WorkTile* tile) {
    if (at_ >= end_) return false;
    const int tile_of_split = at_ / tiles_;
    const StripTile in_strip = plan.walk.TileAt(at_ - tile_of_split * tiles_);
    tile->strip = in_strip.strip;
    tile->walk_index = in_strip.unit * kUnit;
    tile->units = in_strip.units;
    tile->split = tile_of_split / plan.n_tiles;
    tile->n_tile = tile_of_split - tile->split * plan.n_tiles;
    const int n_tiles_of_group = CeilDiv<Shape::kN>(sizes.group_out_channels);
    tile->group = tile->n_tile / n_tiles_of_group;
    const int first_of_group = (tile->n_tile - tile->group * n_tiles_of_group) * Shape::kN;
    tile->first_channel = tile->group * sizes.group_out_channels + first_of_group;
    tile->channels = sizes.group_out_channels - first_of_group;
    tile->k_begin = plan.order.k_blocks * tile->split / plan.splits;
    tile->k_end = plan.order.k_blocks * (tile->split + 1) / plan.splits;
    ++at_;
    return true;
  }

 private:
  int tiles_, at_, end_;
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_TILE_CUH_
