// How the implicit GEMM kernel is laid out: the shape of tiles, who computes which, the order of K,
// shared memory. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_TILE_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_TILE_CUH_

#include <cstdint>

#include "core/cuda/fused/sample_table.cuh"
#include "core/cuda/fused/sizes.cuh"
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
// memory.
template <typename T, int kTileN>
struct TileShape {
  static constexpr int kN = kTileN;
  static constexpr bool kWide = kN > 128;
  static constexpr int kConsumers = kWide ? 2 : 3;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kM = kConsumers * kWgmmaM;
  // Positions are dealt out in units: a warp has 16 of a wgmma's rows.
  static constexpr int kUnit = 16, kUnits = kM / kUnit;
  // Wgmmas side by side that make up kN.
  static constexpr int kWgmmas = kWide ? 2 : 1, kWgmmaN = kN / kWgmmas;
  // Registers of a thread after setmaxnreg.
  static constexpr int kConsumerRegisters = kWide ? 224 : 160;
  static constexpr int kProducerRegisters = kWide ? 56 : 32;

  static constexpr int kStages = 4;
  static constexpr int kStageBytes = kN * kSlabRowBytes;

  // See SharedMemory.
  static int64_t SharedBytes(const DeformConvParams& params) {
    return kStages * int64_t{kStageBytes} +
           kM * (params.mask_channels() + 1) * int64_t{SampleTable<T>::kEntryBytes} +
           2 * kStages * int64_t{kBarrierBytes};
  }
};

// A thread block's shared memory: the stages; the sample table, tap by tap, and one more tap of
// zeros; two barriers for each stage. `full` signals that a stage can be read, `empty` that it can
// be written.
template <typename Shape, typename T>
struct SharedMemory {
  uint32_t stages, full, empty;
  SampleTable<T> samples;  // [taps of a position + 1, kM]

  __device__ SharedMemory(uint8_t* memory, int taps_of_position)
      : stages(SharedAddress(memory)),
        samples(SampleTable<T>::At(memory + Shape::kStages * Shape::kStageBytes,
                                   (taps_of_position + 1) * Shape::kM)) {
    full = SharedAddress(samples.packed_pixels + (taps_of_position + 1) * Shape::kM);
    empty = full + Shape::kStages * kBarrierBytes;
  }

  __device__ __forceinline__ uint32_t Stage(int stage) const {
    return stages + stage * Shape::kStageBytes;
  }
  // Barrier `stage` of `full` or `empty`.
  static __device__ __forceinline__ uint32_t Of(uint32_t barriers, int stage) {
    return barriers + stage * kBarrierBytes;
  }
};

// --- The order of K ---

// A tap, and a channel of the convolution group: what one k stands for.
struct TapChannel {
  int tap, channel;
};

// The order in which K blocks are gone through. K is (tap, channel of the convolution group). Where
// channels come in whole K blocks, all taps of some channels come before the next channels: the
// taps read the same pixels, which are then still in the first-level cache.
template <typename T>
struct KOrder {
  bool by_channels;
  int k_blocks;

  __device__ explicit KOrder(const FusedSizes& sizes)
      : by_channels(sizes.group_in_channels % kK<T> == 0),
        k_blocks(CeilDiv<kK<T>>(sizes.taps * sizes.group_in_channels)) {}

  // The row of the filters that a K block begins at.
  __device__ __forceinline__ int FirstRow(const FusedSizes& sizes, int k_block) const {
    if (!by_channels) return k_block * kK<T>;
    const int slice = sizes.by_taps.Divide(k_block);
    return (k_block - slice * sizes.taps) * sizes.group_in_channels + slice * kK<T>;
  }

  // What a vec16 of a K block stands for; past the last tap if there is no such vec16.
  __device__ __forceinline__ TapChannel At(const FusedSizes& sizes, int k_block, int vec16) const {
    const int in_block = vec16 * kVec16Size<T>;
    if (by_channels) {
      const int slice = sizes.by_taps.Divide(k_block);
      return {k_block - slice * sizes.taps, slice * kK<T> + in_block};
    }
    const int row = k_block * kK<T> + in_block;
    const int tap = sizes.by_group_in_channels.Divide(row);
    return {tap, row - tap * sizes.group_in_channels};
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
  int walk_index, units;  // the first position in PositionOrder, and how many units of positions
  int group;              // of the convolution
  int first_channel, channels;  // of the output: the first, and the group's from there on
};

// The tiles of a thread block. All units, first those of the first kN output channels, are divided
// evenly among the thread blocks. A thread block cuts its units of one kN into tiles of nearly
// equal size.
template <typename Shape>
class TileScheduler {
 public:
  __device__ TileScheduler(const FusedSizes& sizes, int n_tiles)
      : units_(CeilDiv<Shape::kUnit>(sizes.positions)) {
    const int64_t all = int64_t{units_} * n_tiles;
    at_ = static_cast<int>(all * blockIdx.x / gridDim.x);
    end_ = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  }

  // Moves on to the next tile, if there is one.
  __device__ __forceinline__ bool Next(const FusedSizes& sizes, WorkTile* tile) {
    if (at_ >= end_) return false;
    const int n_tile = at_ / units_, unit = at_ - n_tile * units_;
    const int left = min(end_ - at_, units_ - unit);
    const int tiles = CeilDiv<Shape::kUnits>(left);
    tile->walk_index = unit * Shape::kUnit;
    tile->units = CeilDiv(left, tiles);
    const int n_tiles_of_group = CeilDiv<Shape::kN>(sizes.group_out_channels);
    tile->group = n_tile / n_tiles_of_group;
    const int first_of_group = (n_tile - tile->group * n_tiles_of_group) * Shape::kN;
    tile->first_channel = tile->group * sizes.group_out_channels + first_of_group;
    tile->channels = sizes.group_out_channels - first_of_group;
    at_ += tile->units;
    return true;
  }

 private:
  int units_, at_, end_;
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_TILE_CUH_
