#include <algorithm>

#include "core/deform_conv2d_fused_cuda.h"
#include "core/fused_samples_cuda.cuh"

namespace deform_conv {
namespace {

using namespace cuda;  // the kernels' own names

// How the rows of a block of filters, or of what else lies in memory as rows of the depth, can be
// given to the tensor cores.
template <typename T>
constexpr RowsOf kRowsAsStored = sizeof(T) == 2 ? RowsOf::kDepth : RowsOf::kProduct;

// Begins sums += a * b, over a whole block of the depth.
template <typename T, int kCols, RowsOf kRowsOfA, RowsOf kRowsOfB>
__device__ __forceinline__ void MultiplyBlocks(float (&sums)[kCols / 2], uint32_t a, uint32_t b) {
#pragma unroll
  for (int step = 0; step < kBlockDepth<T> / kStepDepth<T>; ++step) {
    Multiply<T, kCols, kRowsOfA, kRowsOfB>::Run(
        sums, FactorDescriptor(a + step * StepBytes<T, kRowsOfA>(), 0),
        FactorDescriptor(b + step * StepBytes<T, kRowsOfB>(), kBlockDepth<T> * kRowBytes), true);
  }
}

// Goes through the depth, (tap, channel of the convolution group), block by block. If channels come
// in whole blocks, then through all taps of some channels before the next channels: the taps read
// the same pixels, which are then still in the first-level cache.
template <typename T>
struct DepthWalk {
  int first_row;     // of the filters, that the block begins at
  int tap, channel;  // of this thread's chunk in the block; past the last tap where there is none

  __device__ static bool ByChannels(const FusedSizes& sizes) {
    return sizes.group_in_channels % kBlockDepth<T> == 0;
  }

  __device__ DepthWalk(const FusedSizes& sizes, int chunk)
      : first_row(0),
        tap(chunk * kVector<T> / sizes.group_in_channels),
        channel(chunk * kVector<T> - tap * sizes.group_in_channels) {}

  __device__ __forceinline__ void Next(const FusedSizes& sizes, bool by_channels) {
    if (by_channels) {
      first_row += sizes.group_in_channels;
      if (++tap < sizes.taps) return;
      tap = 0;
      channel += kBlockDepth<T>;
      first_row += kBlockDepth<T> - sizes.taps * sizes.group_in_channels;
    } else {
      first_row += kBlockDepth<T>;
      for (channel += kBlockDepth<T>; channel >= sizes.group_in_channels; ++tap) {
        channel -= sizes.group_in_channels;
      }
    }
  }
};

// --- Forward ---

// How the forward kernel is laid out: a block of threads computes tiles of kRows positions by kCols
// output channels, one after the other. Some of its warpgroups, the producers, sample and copy
// filters into stages in shared memory; the others, the consumers, multiply what is in a stage and
// add to sums in their registers. Each producer fills every kProducers-th stage by itself, and all
// go on as far as there are free stages, so loads, arithmetic and products overlap.
template <typename T, int kColumns>
struct ForwardTile {
  static constexpr int kRows = 128, kCols = kColumns;
  // A consumer has two products of 64 rows: one below the other, or side by side in a wide tile,
  // which has two consumers.
  static constexpr bool kWide = kCols > 128;
  static constexpr int kConsumers = kWide ? 2 : 1, kProducers = 4 - kConsumers;
  static constexpr int kProducts = 2, kProductCols = kWide ? kCols / kProducts : kCols;
  static constexpr int kThreads = (kConsumers + kProducers) * kWarpgroup;
  static constexpr int kConsumerRegisters = kCols > 64 ? 160 : 128;
  static constexpr int kProducerRegisters =
      ((4 * 128 - kConsumers * kConsumerRegisters) / kProducers) & ~7;
  static constexpr bool kLoadAhead = kProducerRegisters >= 96;

  static constexpr int kSampleBytes = kRows * kRowBytes, kFilterBytes = kCols * kRowBytes;
  static constexpr int kStageBytes = kSampleBytes + kFilterBytes;
  static constexpr int kStages = kCols > 128 ? 3 : 4;
  // Producers may be ahead of the consumers by as many tiles as there are stages.
  static constexpr int kOrdinalTiles = kStages + 2;

  // Stages; a table entry for each tap and row, tap by tap, and for what comes after the last tap;
  // where the rows of some tiles are in the output; barriers, one that tells that a stage is full
  // and one that it is empty.
  static int64_t SharedBytes(int64_t taps_per_position) {
    return kStages * (kStageBytes + 2 * int64_t{sizeof(uint64_t)}) +
           kRows * ((taps_per_position + 1) * SampleTable<T>::kEntryBytes +
                    kOrdinalTiles * int64_t{sizeof(int32_t)});
  }
};

constexpr int32_t kNoPosition = -1;

// The stage that a block of the depth goes through, and the parity of how often it has been gone
// through before.
struct StageCursor {
  int stage = 0, parity = 0;

  template <int kStages>
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Where a tile lies.
struct TileOrigin {
  int position;         // its first
  int group;            // of the convolution
  int first_col, cols;  // of the output channels, and how many the group has from there on

  template <int kRows, int kCols>
  __device__ static TileOrigin Of(const FusedSizes& sizes, int tiles_across, int tile) {
    const int down = tile / tiles_across, across = tile - down * tiles_across;
    const int tiles_of_group = (sizes.group_out_channels + kCols - 1) / kCols;
    const int group = across / tiles_of_group;
    const int first_of_group = (across - group * tiles_of_group) * kCols;
    return {down * kRows, group, group * sizes.group_out_channels + first_of_group,
            sizes.group_out_channels - first_of_group};
  }
};

// Copies a tile's columns of the filters, block by block of the depth, into stages. By a warpgroup.
template <typename Tile, typename T>
class FiltersCopier {
  static constexpr bool kDepthRows = kRowsAsStored<T> == RowsOf::kDepth;
  static constexpr int kRowOfChunks = kDepthRows ? Tile::kCols / kVector<T> : kRowChunks;
  static constexpr int kRowsAtOnce = kWarpgroup / kRowOfChunks;
  static constexpr int kPasses = Tile::kFilterBytes / kChunkBytes / kWarpgroup;
  // Where fewer rows than the swizzle repeats after are copied at once, two addresses take turns.
  static constexpr int kTurns = kRowsAtOnce % kSwizzledRows == 0 ? 1 : kSwizzledRows / kRowsAtOnce;
  static_assert(kPasses % kTurns == 0);

 public:
  // `filters` is [depth, out_channels], or [out_channels, depth] where rows are the product's.
  __device__ FiltersCopier(const FusedSizes& sizes, const T* filters, const TileOrigin& origin)
      : depth_(sizes.taps * sizes.group_in_channels) {
    const int thread = threadIdx.x % kWarpgroup;
    const int row = thread / kRowOfChunks, chunk = thread % kRowOfChunks;
    if (kDepthRows) {
      pitch_ = sizes.out_channels;
      from_ = filters + int64_t{row} * pitch_ + origin.first_col + chunk * kVector<T>;
      rows_ = chunk * kVector<T> < origin.cols ? depth_ - row : 0;
    } else {
      pitch_ = depth_;
      from_ = filters + int64_t{origin.first_col + row} * pitch_ + chunk * kVector<T>;
      rows_ = origin.cols - row;
      depth_ -= chunk * kVector<T>;
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      to_[turn] = chunk / kRowChunks * (kBlockDepth<T> * kRowBytes) +
                  SwizzledOffset(row + turn * kRowsAtOnce, chunk % kRowChunks);
    }
  }

  // Begins to copy the block that begins at `first` of the depth.
  __device__ __forceinline__ void Copy(int first, uint32_t stage) const {
    const T* from = from_ + (kDepthRows ? int64_t{first} * pitch_ : first);
    const int rows = kDepthRows ? rows_ - first : first < depth_ ? rows_ : 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      CopyChunkAsync(
          stage + to_[pass % kTurns] + pass / kTurns * (kTurns * kRowsAtOnce * kRowBytes), from,
          pass * kRowsAtOnce < rows);
      from += kRowsAtOnce * pitch_;
    }
    CommitCopies();
  }

 private:
  const T* from_;
  int64_t pitch_;
  uint32_t to_[kTurns];
  int depth_, rows_;
};

// Fills the table for the tile's positions. By all producers.
template <typename Tile, typename T>
__device__ void LocateTile(const FusedSizes& sizes, const PositionOrder& order,
                           const SampledTensors<T, float>& tensors, int first,
                           const SampleTable<T>& table, int32_t* ordinals) {
  const int taps = static_cast<int>(sizes.taps_of_position.value());
  const int count = Tile::kRows * taps;
  constexpr int kThreads = Tile::kProducers * kWarpgroup;
  constexpr int kTogether = Tile::kProducerRegisters > 100 ? 3 : 2;  // loaded at a time
  for (int begin = threadIdx.x; begin < count; begin += kTogether * kThreads) {
    // Positions are found anew for locating: there are no registers to keep them in meanwhile.
    float2 offsets[kTogether];
    float masks[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = begin + k * kThreads;
      const int row = sizes.taps_of_position.Divide(i);
      if (i >= count || first + row >= sizes.positions) continue;
      const int64_t index = sizes.OrdinalOf(order.At(first + row)) * taps + (i - row * taps);
      offsets[k] = OffsetOf(tensors, index);
      masks[k] = MaskOf(tensors, index);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int i = begin + k * kThreads;
      if (i >= count) break;
      const int row = sizes.taps_of_position.Divide(i);
      const int g_tap = i - row * taps;
      const int entry = g_tap * Tile::kRows + row;
      int32_t ordinal = kNoPosition;
      if (first + row < sizes.positions) {
        const Position position = order.At(first + row);
        ordinal = static_cast<int32_t>(sizes.OrdinalOf(position));
        table.Locate(sizes, position, Tap::Of(sizes, g_tap), offsets[k], masks[k], entry);
      } else {
        table.SetToZero(entry);
      }
      if (g_tap == 0) ordinals[row] = ordinal;
    }
  }
}

// Writes a block of samples into a stage: rows are positions. By a warpgroup.
template <typename Tile, typename T>
__device__ __forceinline__ void SampleBlock(const FusedSizes& sizes, const CornerReader& reader,
                                            const SampleTable<T>& table, const DepthWalk<T>& walk,
                                            int group, uint32_t stage) {
  constexpr int kRowsAtOnce = kWarpgroup / kRowChunks;
  static_assert(kRowsAtOnce % kSwizzledRows == 0);
  const int thread = threadIdx.x % kWarpgroup;
  const int row = thread / kRowChunks;
  const int channel = group * sizes.group_in_channels + walk.channel;
  const int g = sizes.deform_groups == 1 ? 0 : channel / sizes.deform_group_channels;
  const int after_last = static_cast<int>(sizes.taps_of_position.value());
  const int g_tap = walk.tap < sizes.taps ? g * sizes.taps + walk.tap : after_last;
  const int first_entry = g_tap * Tile::kRows + row;
  const uint32_t to = stage + SwizzledOffset(row, thread % kRowChunks);
  SampleChunks<T, Tile::kRows / kRowsAtOnce, 2, Tile::kLoadAhead>(
      reader, table, [&](int i) { return first_entry + i * kRowsAtOnce; },
      [&](int) { return channel * static_cast<int>(sizeof(T)); },
      [&](int i) { return to + i * (kRowsAtOnce * kRowBytes); });
}

// Exchanges 32-bit words among the four lanes that share a row of sums: lane q comes with word q of
// four chunks, and goes with all words of chunk q.
__device__ __forceinline__ uint4 TransposeQuad(uint32_t (&words)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      // Of the pair of chunks, each lane gives away the one that is not its own.
      uint32_t& low = words[i];
      uint32_t& high = words[i + distance];
      const bool upper = q & distance;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      if (upper) {
        low = received;
      } else {
        high = received;
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T>
__device__ __forceinline__ uint32_t PackPair(float low, float high);
template <>
__device__ __forceinline__ uint32_t PackPair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t PackPair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Writes the sums of a product to the output, of which `output` is the first column of the product
// and `cols` how many there are from there on. `ordinals` are its rows'.
template <typename T, int kCols>
__device__ __forceinline__ void StoreSums(const float (&sums)[kCols / 2], const int32_t* ordinals,
                                          int64_t pitch, int cols, T* __restrict__ output) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int32_t ordinal = ordinals[warp * 16 + lane / 4 + 8 * j];
    T* row = output + int64_t{ordinal} * pitch;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kCols / 8; i += 4) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int at = 4 * (i + k) + 2 * j;
          words[k] = PackPair<T>(sums[at], sums[at + 1]);
        }
        const uint4 chunk = TransposeQuad(words);
        const int col = 8 * (i + lane % 4);
        if (ordinal != kNoPosition && col < cols) *reinterpret_cast<uint4*>(row + col) = chunk;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCols / 8; ++i) {
        const int col = 8 * i + lane % 4 * 2;
        if (ordinal != kNoPosition && col < cols) {
          *reinterpret_cast<float2*>(row + col) =
              make_float2(sums[4 * i + 2 * j], sums[4 * i + 2 * j + 1]);
        }
      }
    }
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    FusedForwardKernel(const __grid_constant__ FusedSizes sizes,
                       const __grid_constant__ PositionOrder order, int tiles_across, int tiles,
                       SampledTensors<T, float> tensors, const T* __restrict__ filters,
                       T* __restrict__ output) {  // [positions, out_channels]
  extern __shared__ __align__(kBlockAlignment) uint8_t shared[];
  const int taps = static_cast<int>(sizes.taps_of_position.value());
  const int entries = Tile::kRows * (taps + 1);
  const SampleTable<T> table =
      SampleTable<T>::At(shared + Tile::kStages * Tile::kStageBytes, entries);
  int32_t* ordinals = table.corners + entries;  // [kOrdinalTiles, kRows]
  const uint32_t stages = SharedAddress(shared);
  const uint32_t full = SharedAddress(ordinals + Tile::kOrdinalTiles * Tile::kRows);
  const uint32_t empty = full + Tile::kStages * sizeof(uint64_t);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      InitializeBarrier(full + stage * sizeof(uint64_t), kWarpgroup);
      InitializeBarrier(empty + stage * sizeof(uint64_t), Tile::kConsumers);
    }
  }
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    table.SetToZero(taps * Tile::kRows + row);
  }
  __syncthreads();

  const int depth = sizes.taps * sizes.group_in_channels;
  const int blocks = (depth + kBlockDepth<T> - 1) / kBlockDepth<T>;
  const int warpgroup = WarpgroupIndex();
  StageCursor cursor;
  int ordinal_tile = 0;
  if (warpgroup < Tile::kProducers) {
    LowerRegisters<Tile::kProducerRegisters>();
    const bool by_channels = DepthWalk<T>::ByChannels(sizes);
    const CornerReader reader(sizes, tensors.input);
    int turn = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const TileOrigin origin = TileOrigin::Of<Tile::kRows, Tile::kCols>(sizes, tiles_across, tile);
      NamedBarrier(1, Tile::kProducers * kWarpgroup);  // the table is not used any more
      LocateTile<Tile>(sizes, order, tensors, origin.position, table,
                       ordinals + ordinal_tile * Tile::kRows);
      NamedBarrier(1, Tile::kProducers * kWarpgroup);
      ordinal_tile = ordinal_tile == Tile::kOrdinalTiles - 1 ? 0 : ordinal_tile + 1;
      const FiltersCopier<Tile, T> copier(sizes, filters, origin);
      DepthWalk<T> walk(sizes, threadIdx.x % kRowChunks);
      for (int block = 0; block < blocks; ++block) {
        if (turn == warpgroup) {
          const uint32_t stage = stages + cursor.stage * Tile::kStageBytes;
          WaitAtBarrier(empty + cursor.stage * sizeof(uint64_t), cursor.parity ^ 1);
          copier.Copy(walk.first_row, stage + Tile::kSampleBytes);
          SampleBlock<Tile>(sizes, reader, table, walk, origin.group, stage);
          WaitForCopies<0>();
          FenceForTensorCores();
          ArriveAtBarrier(full + cursor.stage * sizeof(uint64_t));
        }
        turn = turn == Tile::kProducers - 1 ? 0 : turn + 1;
        walk.Next(sizes, by_channels);
        cursor.Next<Tile::kStages>();
      }
    }
  } else {
    RaiseRegisters<Tile::kConsumerRegisters>();
    // The products' places in the tile.
    const int first_row = Tile::kWide ? (warpgroup - Tile::kProducers) * kWarpgroupRows : 0;
    constexpr int kNextRow = Tile::kWide ? 0 : kWarpgroupRows;
    constexpr int kNextCol = Tile::kWide ? Tile::kProductCols : 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const TileOrigin origin = TileOrigin::Of<Tile::kRows, Tile::kCols>(sizes, tiles_across, tile);
      float sums[Tile::kProducts][Tile::kProductCols / 2] = {};
      int before = -1;  // the stage whose products go on
      for (int block = 0; block < blocks; ++block) {
        WaitAtBarrier(full + cursor.stage * sizeof(uint64_t), cursor.parity);
        const uint32_t samples = stages + cursor.stage * Tile::kStageBytes + first_row * kRowBytes;
        const uint32_t columns = stages + cursor.stage * Tile::kStageBytes + Tile::kSampleBytes;
        WarpgroupArrive();
#pragma unroll
        for (int product = 0; product < Tile::kProducts; ++product) {
          MultiplyBlocks<T, Tile::kProductCols, RowsOf::kProduct, kRowsAsStored<T>>(
              sums[product], samples + product * (kNextRow * kRowBytes),
              columns + product * (kNextCol * kRowBytes));
        }
        WarpgroupCommit();
        WarpgroupWait<1>();
        if (before >= 0 && threadIdx.x % kWarpgroup == 0) {
          ArriveAtBarrier(empty + before * sizeof(uint64_t));
        }
        before = cursor.stage;
        cursor.Next<Tile::kStages>();
      }
      WarpgroupWait<0>();
      if (threadIdx.x % kWarpgroup == 0) ArriveAtBarrier(empty + before * sizeof(uint64_t));
#pragma unroll
      for (int product = 0; product < Tile::kProducts; ++product) {
        const int row = first_row + product * kNextRow, col = product * kNextCol;
        StoreSums<T, Tile::kProductCols>(sums[product], ordinals + ordinal_tile * Tile::kRows + row,
                                         sizes.out_channels, origin.cols - col,
                                         output + origin.first_col + col);
      }
      ordinal_tile = ordinal_tile == Tile::kOrdinalTiles - 1 ? 0 : ordinal_tile + 1;
    }
  }
}

// to [cols, rows] = from [rows, cols] transposed, rounded to TF32.
constexpr int kTransposedTile = 32, kTransposedRows = 8;
__global__ void __launch_bounds__(kTransposedTile* kTransposedRows)
    TransposeToTf32Kernel(int rows, int cols, const float* __restrict__ from,
                          float* __restrict__ to) {
  __shared__ float tile[kTransposedTile][kTransposedTile + 1];  // one more, against bank conflicts
  const int tiles_across = (cols + kTransposedTile - 1) / kTransposedTile;
  const int first_row = blockIdx.x / tiles_across * kTransposedTile;
  const int first_col = blockIdx.x % tiles_across * kTransposedTile;
  for (int i = threadIdx.y; i < kTransposedTile; i += kTransposedRows) {
    const int row = first_row + i, col = first_col + threadIdx.x;
    if (row < rows && col < cols) tile[i][threadIdx.x] = from[int64_t{row} * cols + col];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTransposedTile; i += kTransposedRows) {
    const int col = first_col + i, row = first_row + threadIdx.x;
    if (row < rows && col < cols) to[int64_t{col} * rows + row] = RoundToTf32(tile[threadIdx.x][i]);
  }
}

// --- The filters' gradient ---

// What one block of threads computes: kDown blocks of the depth, that is rows of the filters, by
// kCols output channels, summed over a share of all positions. 16-bit types only: the samples of a
// block of positions are its columns as they come to lie, and TF32 cannot be transposed.
template <typename T, int kWarpgroupsDown, int kWarpgroupsAcross, int kWarpgroupCols>
struct FiltersTile {
  static constexpr int kDown = kWarpgroupsDown, kAcross = kWarpgroupsAcross;
  static constexpr int kColsEach = kWarpgroupCols, kCols = kAcross * kColsEach;
  static constexpr int kThreads = kDown * kAcross * kWarpgroup;
  static constexpr int kPositions = 64;  // whose samples are in a stage
  static constexpr int kStages = 2;
  static constexpr int kSampleBytes = kDown * kPositions * kRowBytes;
  static constexpr int kOutputBytes = kCols * kRowBytes;
  static constexpr int kStagesBytes = kStages * (kSampleBytes + kOutputBytes);
  static_assert(kThreads == kPositions * kRowChunks, "a thread has one position and one chunk");

  // How many different taps of deformable groups the rows of a tile may have. A chunk has one, so a
  // block has at most kRowChunks.
  static int64_t MostTaps(const DeformConvParams& params) {
    const int64_t group = params.group_in_channels(), deform = params.deform_group_channels();
    const int64_t width = std::min(group, deform);
    const bool nested = group % deform == 0 || deform % group == 0;
    const bool whole = group % kBlockDepth<T> == 0;  // a block is of one tap
    const bool aligned = whole && width % kBlockDepth<T> == 0;
    const int64_t per_block = std::min<int64_t>(
        nested ? (kBlockDepth<T> + width - 1) / width + (aligned ? 0 : 1) : kRowChunks, kRowChunks);
    return std::min(kDown * per_block, params.mask_channels());
  }

  // Table columns of a stage: a table column has the samples of one tap of all its positions; the
  // last one has zeros. The positions' ordinals come behind.
  static constexpr int kTableStages = 3;
  static __host__ __device__ int TableBytes(int most_taps) {
    return kPositions * ((most_taps + 1) * SampleTable<T>::kEntryBytes + int{sizeof(int32_t)});
  }

  // Stages; tables; which tap each table column is of, and which column each tap has; how many
  // columns there are.
  static int64_t SharedBytes(const DeformConvParams& params) {
    return kStagesBytes + kTableStages * TableBytes(static_cast<int>(MostTaps(params))) +
           sizeof(int32_t) * (2 * params.mask_channels() + 1);
  }
};

// Samples as LocateKernel leaves them, in the order of PositionOrder.
template <typename T>
struct LocatedSamples {
  int32_t places;             // a multiple of the positions of a step
  CornerWeights<T>* weights;  // [taps of a position, places]
  int32_t* corners;           // [taps of a position, places]
  int32_t* ordinals;          // [places], kNoPosition after the last position
};

// Locates the samples of the positions from place `first` on. A row of the grid is a tap.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    LocateKernel(const __grid_constant__ FusedSizes sizes,
                 const __grid_constant__ PositionOrder order, int first,
                 const float* __restrict__ offset, const float* __restrict__ mask,
                 LocatedSamples<T> located) {
  const int place = blockIdx.x * kThreadsPerBlock + threadIdx.x;
  if (place >= located.places) return;
  const int g_tap = blockIdx.y;
  const int64_t first_entry = int64_t{g_tap} * located.places;
  const SampleTable<T> table{located.weights + first_entry, located.corners + first_entry};
  if (first + place >= sizes.positions) {
    table.SetToZero(place);
    if (g_tap == 0) located.ordinals[place] = kNoPosition;
    return;
  }
  const SampledTensors<float, float> tensors{nullptr, offset, mask};
  const Position position = order.At(first + place);
  const int64_t ordinal = sizes.OrdinalOf(position);
  const int64_t index = ordinal * sizes.taps_of_position.value() + g_tap;
  table.Locate(sizes, position, Tap::Of(sizes, g_tap), OffsetOf(tensors, index),
               MaskOf(tensors, index), place);
  if (g_tap == 0) located.ordinals[place] = static_cast<int32_t>(ordinal);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    FusedBackpropFiltersKernel(const __grid_constant__ FusedSizes sizes, int tiles_across,
                               int tiles, int shares, int most_taps, LocatedSamples<T> located,
                               const T* __restrict__ input,  // [batch, in_h, in_w, in_channels]
                               const T* __restrict__ grad_output,  // [positions, out_channels]
                               float* __restrict__ sum) {  // [taps * channels, out_channels]
  extern __shared__ __align__(kBlockAlignment) uint8_t shared[];
  const int taps = static_cast<int>(sizes.taps_of_position.value());
  const int table_entries = Tile::kPositions * (most_taps + 1);
  const int table_bytes = Tile::TableBytes(most_taps);
  uint8_t* after_stages = shared + Tile::kStagesBytes;
  const auto table_of = [&](int stage) {
    return SampleTable<T>::At(after_stages + stage * table_bytes, table_entries);
  };
  int32_t* tap_of_column =
      reinterpret_cast<int32_t*>(after_stages + Tile::kTableStages * table_bytes);
  int32_t* column_of_tap = tap_of_column + taps;
  int32_t* column_count = column_of_tap + taps;

  const int share = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int tile_down = tile / tiles_across, tile_across = tile % tiles_across;
  const int tiles_of_group = (sizes.group_out_channels + Tile::kCols - 1) / Tile::kCols;
  const int group = tile_across / tiles_of_group;
  const int first_of_group = (tile_across - group * tiles_of_group) * Tile::kCols;
  const int first_col = group * sizes.group_out_channels + first_of_group;
  const int cols = sizes.group_out_channels - first_of_group;

  // The rows of the filters that this thread samples for, a chunk of each block.
  const bool by_channels = DepthWalk<T>::ByChannels(sizes);
  const int depth = sizes.taps * sizes.group_in_channels;
  const int chunk = threadIdx.x % kRowChunks, row = threadIdx.x / kRowChunks;
  const auto first_row_of = [&](int down) {
    const int block = tile_down * Tile::kDown + down;
    if (!by_channels) return block * kBlockDepth<T>;
    const int slice = block / sizes.taps;
    if (slice * kBlockDepth<T> >= sizes.group_in_channels) return depth;
    return (block - slice * sizes.taps) * sizes.group_in_channels + slice * kBlockDepth<T>;
  };
  int channels[Tile::kDown], g_taps[Tile::kDown];
  for (int i = threadIdx.x; i < taps; i += Tile::kThreads) column_of_tap[i] = 0;
  if (threadIdx.x < Tile::kPositions) {
    for (int stage = 0; stage < Tile::kTableStages; ++stage) {
      table_of(stage).SetToZero(most_taps * Tile::kPositions + threadIdx.x);
    }
  }
  __syncthreads();
#pragma unroll
  for (int down = 0; down < Tile::kDown; ++down) {
    const int depth_row = first_row_of(down) + chunk * kVector<T>;
    const int tap = depth_row / sizes.group_in_channels;
    channels[down] = group * sizes.group_in_channels + depth_row - tap * sizes.group_in_channels;
    g_taps[down] =
        depth_row < depth ? channels[down] / sizes.deform_group_channels * sizes.taps + tap : -1;
    if (row == 0 && g_taps[down] >= 0) column_of_tap[g_taps[down]] = 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int count = 0;
    for (int i = 0; i < taps; ++i) {
      if (column_of_tap[i] == 0) continue;
      tap_of_column[count] = i;
      column_of_tap[i] = count++;
    }
    *column_count = count;
  }
  __syncthreads();
  int entries[Tile::kDown];
#pragma unroll
  for (int down = 0; down < Tile::kDown; ++down) {
    const int column = g_taps[down] < 0 ? most_taps : column_of_tap[g_taps[down]];
    entries[down] = column * Tile::kPositions + row;
  }

  // The share's positions, a step of kPositions at a time.
  const int all_steps = located.places / Tile::kPositions;
  const int first_step = static_cast<int>(int64_t{all_steps} * share / shares);
  const int steps = static_cast<int>(int64_t{all_steps} * (share + 1) / shares) - first_step;
  const int columns = *column_count;

  // Begins to copy a step's table columns, and the ordinals behind them.
  const auto copy_table = [&](int step, int stage) {
    constexpr int kWeightsInChunk = kChunkBytes / sizeof(CornerWeights<T>);
    constexpr int kWeightChunks = Tile::kPositions / kWeightsInChunk;
    constexpr int kNumberChunks = Tile::kPositions / 4;
    constexpr int kColumnChunks = kWeightChunks + kNumberChunks;
    const SampleTable<T> table = table_of(stage);
    const int place = (first_step + step) * Tile::kPositions;
#pragma unroll 1
    for (int i = threadIdx.x; i < columns * kColumnChunks + kNumberChunks; i += Tile::kThreads) {
      const int column = i / kColumnChunks, part = i % kColumnChunks;
      const void *to, *from;
      if (column == columns) {
        to = table.corners + table_entries + 4 * part;
        from = located.ordinals + place + 4 * part;
      } else {
        const int64_t of_tap = int64_t{tap_of_column[column]} * located.places + place;
        const int of_column = column * Tile::kPositions;
        if (part < kWeightChunks) {
          to = table.weights + of_column + part * kWeightsInChunk;
          from = located.weights + of_tap + part * kWeightsInChunk;
        } else {
          to = table.corners + of_column + 4 * (part - kWeightChunks);
          from = located.corners + of_tap + 4 * (part - kWeightChunks);
        }
      }
      CopyChunkAsync(SharedAddress(to), from, true);
    }
  };

  const uint32_t sample_stages = SharedAddress(shared);
  const uint32_t output_stages = sample_stages + Tile::kStages * Tile::kSampleBytes;
  constexpr int kBlockBytes = Tile::kPositions * kRowBytes;
  constexpr int kRowOfChunks = Tile::kCols / kVector<T>;
  constexpr int kRowsAtOnce = Tile::kThreads / kRowOfChunks;
  static_assert(kRowsAtOnce % kSwizzledRows == 0);
  const int copied_row = threadIdx.x / kRowOfChunks, copied_chunk = threadIdx.x % kRowOfChunks;
  const T* copied_from = grad_output + first_col + copied_chunk * kVector<T>;
  const uint32_t copied_to = output_stages + copied_chunk / kRowChunks * kBlockBytes +
                             SwizzledOffset(copied_row, copied_chunk % kRowChunks);
  const bool copied_any = copied_chunk * kVector<T> < cols;
  const auto copy_grad_output = [&](int stage, int table_stage) {
    const uint32_t to = copied_to + stage * Tile::kOutputBytes;
    const int32_t* ordinals = table_of(table_stage).corners + table_entries + copied_row;
#pragma unroll
    for (int i = 0; i < Tile::kPositions; i += kRowsAtOnce) {
      const int32_t ordinal = ordinals[i];
      CopyChunkAsync(to + i * kRowBytes, copied_from + int64_t{ordinal} * sizes.out_channels,
                     copied_any && ordinal != kNoPosition);
    }
  };

  if (steps == 0) return;
  copy_table(0, 0);
  CommitCopies();
  WaitForCopies<0>();
  __syncthreads();
  copy_grad_output(0, 0);
  if (steps > 1) copy_table(1, 1);
  CommitCopies();

  const int warpgroup = WarpgroupIndex();
  const int my_down = warpgroup / Tile::kAcross, my_across = warpgroup % Tile::kAcross;
  const CornerReader reader(sizes, input);
  const uint32_t sampled_to = sample_stages + SwizzledOffset(row, chunk);
  float sums[Tile::kColsEach / 2] = {};
  int table_stage = 0;
  for (int step = 0; step < steps; ++step) {
    // The products of the step before go on meanwhile.
    const SampleTable<T> table = table_of(table_stage);
    const int stage = step % Tile::kStages;
    SampleChunks<T, Tile::kDown, 2, false>(
        reader, table, [&](int i) { return entries[i]; },
        [&](int i) { return channels[i] * static_cast<int>(sizeof(T)); },
        [&](int i) { return sampled_to + stage * Tile::kSampleBytes + i * kBlockBytes; });
    WaitForCopies<0>();
    FenceForTensorCores();
    WarpgroupWait<0>();
    __syncthreads();
    WarpgroupArrive();
    MultiplyBlocks<T, Tile::kColsEach, RowsOf::kDepth, RowsOf::kDepth>(
        sums, sample_stages + stage * Tile::kSampleBytes + my_down * kBlockBytes,
        output_stages + stage * Tile::kOutputBytes + my_across * (Tile::kColsEach * kRowBytes));
    WarpgroupCommit();
    table_stage = table_stage == Tile::kTableStages - 1 ? 0 : table_stage + 1;
    if (step + 1 < steps) copy_grad_output(stage ^ 1, table_stage);
    if (step + 2 < steps) {
      copy_table(step + 2, table_stage == Tile::kTableStages - 1 ? 0 : table_stage + 1);
    }
    CommitCopies();
  }
  WarpgroupWait<0>();

  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  const int first_row = first_row_of(my_down);
#pragma unroll
  for (int i = 0; i < Tile::kColsEach / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int depth_row = first_row + warp * 16 + lane / 4 + 8 * j;
      const int col = my_across * Tile::kColsEach + 8 * i + lane % 4 * 2;
      if (depth_row >= depth || col >= cols) continue;
      atomicAdd(reinterpret_cast<float2*>(sum + int64_t{depth_row} * sizes.out_channels +
                                          first_col + col),
                make_float2(sums[4 * i + 2 * j], sums[4 * i + 2 * j + 1]));
    }
  }
}

// --- Launching ---

struct Gpu {
  bool fits;
  int multiprocessors;
};

// The current one.
Gpu CurrentGpu() {
  int device, major, multiprocessors;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess) {
    cudaGetLastError();
    return {false, 0};
  }
  return {major == 9, multiprocessors};
}

// Calls run(tile) with the tile whose width fits the output channels best.
template <typename T, typename Run>
auto WithForwardTile(const DeformConvParams& params, const Run& run) {
  using Element = CudaType<T>;
  if (params.group_out_channels() <= 64) return run(ForwardTile<Element, 64>());
  if (params.group_out_channels() <= 128) return run(ForwardTile<Element, 128>());
  return run(ForwardTile<Element, 256>());
}
template <typename T, typename Run>
auto WithFiltersTile(const DeformConvParams& params, const Run& run) {
  using Element = CudaType<T>;
  if (params.group_out_channels() <= 64) return run(FiltersTile<Element, 4, 1, 64>());
  if (params.group_out_channels() <= 128) return run(FiltersTile<Element, 4, 1, 128>());
  return run(FiltersTile<Element, 2, 2, 128>());
}

// Located samples in memory take at most this, unless those of one step take more.
constexpr int64_t kMostLocatedBytes = int64_t{64} << 20;

// Into how many shares to cut the positions so that the last round of blocks is well filled.
int64_t ChooseShares(int64_t tiles, int64_t steps, int64_t multiprocessors) {
  constexpr int64_t kMostShares = 128;
  constexpr int64_t kFixedSteps = 8;  // what beginning and ending a block takes, in steps
  int64_t best = 1, best_time = INT64_MAX;
  for (int64_t shares = 1; shares <= std::min(kMostShares, steps); ++shares) {
    const int64_t rounds = (tiles * shares + multiprocessors - 1) / multiprocessors;
    const int64_t time = rounds * ((steps + shares - 1) / shares + kFixedSteps);
    if (time < best_time) {
      best = shares;
      best_time = time;
    }
  }
  return best;
}

}  // namespace

bool FusedKernelsRunHere() { return CurrentGpu().fits; }

template <typename T>
bool FusedForwardFits(const DeformConvParams& params,
                      const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                      const T* output) {
  return ChannelsFit<T>(params) && TensorsFit<T>(tensors) && Aligned(filters) && Aligned(output) &&
         WithForwardTile<T>(params, [&](auto tile) {
           return tile.SharedBytes(params.mask_channels()) <= kMostSharedBytes;
         });
}

template <typename T>
std::string FusedForwardCuda(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             CudaDevice& device, T* output) {
  if (params.out_positions() == 0) return "";
  const cudaStream_t stream = StreamOf(device.stream());
  if constexpr (kRowsAsStored<T> == RowsOf::kProduct) {
    const int rows = static_cast<int>(params.taps() * params.group_in_channels());
    const int cols = static_cast<int>(params.out_channels);
    float* transposed;
    std::string error = device.Allocate(int64_t{rows} * cols * sizeof(float),
                                        reinterpret_cast<void**>(&transposed));
    if (!error.empty()) return error;
    const unsigned blocks = Blocks(rows, kTransposedTile) * Blocks(cols, kTransposedTile);
    TransposeToTf32Kernel<<<blocks, dim3(kTransposedTile, kTransposedRows), 0, stream>>>(
        rows, cols, filters, transposed);
    error = LaunchError("TransposeToTf32Kernel");
    if (!error.empty()) return error;
    filters = transposed;
  }
  return WithForwardTile<T>(params, [&](auto tile) -> std::string {
    using Tile = decltype(tile);
    const auto kernel = FusedForwardKernel<CudaType<T>, Tile>;
    const int64_t shared_bytes = Tile::SharedBytes(params.mask_channels());
    std::string error = AllowSharedBytes(kernel, shared_bytes);
    if (!error.empty()) return error;
    const int64_t across = params.groups * Blocks(params.group_out_channels(), Tile::kCols);
    const int64_t down = Blocks(params.out_positions(), Tile::kRows);
    const int64_t tiles = across * down;
    const int64_t blocks = std::min<int64_t>(tiles, CurrentGpu().multiprocessors);
    kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, shared_bytes, stream>>>(
        FusedSizes(params), PositionOrder(params), static_cast<int>(across),
        static_cast<int>(tiles), NativeTensors<T>(tensors), Native(filters), Native(output));
    return LaunchError("FusedForwardKernel");
  });
}

template <typename T>
bool FusedBackpropFiltersFits(const DeformConvParams& params,
                              const SampledTensors<T, ComputeType<T>>& tensors,
                              const T* grad_output) {
  if constexpr (sizeof(T) != 2) {
    return false;
  } else {
    return ChannelsFit<T>(params) && TensorsFit<T>(tensors) && Aligned(grad_output) &&
           WithFiltersTile<T>(
               params, [&](auto tile) { return tile.SharedBytes(params) <= kMostSharedBytes; });
  }
}

template <typename T>
std::string FusedBackpropFiltersCuda(const DeformConvParams& params,
                                     const SampledTensors<T, ComputeType<T>>& tensors,
                                     const T* grad_output, CudaDevice& device,
                                     ComputeType<T>* sum) {
  if constexpr (sizeof(T) != 2) {
    return "no fused kernel for the filters' gradient in TF32";
  } else {
    if (params.out_positions() == 0) return "";
    return WithFiltersTile<T>(params, [&](auto tile) -> std::string {
      using Tile = decltype(tile);
      const auto kernel = FusedBackpropFiltersKernel<CudaType<T>, Tile>;
      const cudaStream_t stream = StreamOf(device.stream());
      const int64_t shared_bytes = Tile::SharedBytes(params);
      std::string error = AllowSharedBytes(kernel, shared_bytes);
      if (!error.empty()) return error;
      const int64_t across = params.groups * Blocks(params.group_out_channels(), Tile::kCols);
      const int64_t rows = params.taps() * params.group_in_channels();
      const int64_t tiles = across * Blocks(rows, Tile::kDown * kBlockDepth<T>);
      const int multiprocessors = CurrentGpu().multiprocessors;

      const int64_t taps = params.mask_channels();
      const int64_t bytes_per_step =
          Tile::kPositions * (taps * SampleTable<CudaType<T>>::kEntryBytes + 4);
      const int64_t all_steps = Blocks(params.out_positions(), Tile::kPositions);
      const int64_t most_steps = std::max<int64_t>(kMostLocatedBytes / bytes_per_step, 1);
      const int64_t step = std::min(all_steps, most_steps);
      LocatedSamples<CudaType<T>> located;
      error = device.Allocate(step * bytes_per_step, reinterpret_cast<void**>(&located.weights));
      if (!error.empty()) return error;
      for (int64_t first = 0; first < all_steps; first += step) {
        const int64_t steps = std::min(step, all_steps - first);
        located.places = static_cast<int32_t>(steps * Tile::kPositions);
        located.corners = reinterpret_cast<int32_t*>(located.weights + taps * located.places);
        located.ordinals = located.corners + taps * located.places;
        const dim3 grid(Blocks(located.places, kThreadsPerBlock), static_cast<unsigned>(taps));
        LocateKernel<CudaType<T>><<<grid, kThreadsPerBlock, 0, stream>>>(
            FusedSizes(params), PositionOrder(params), static_cast<int>(first * Tile::kPositions),
            tensors.offset, tensors.mask, located);
        error = LaunchError("LocateKernel");
        if (!error.empty()) return error;
        const int64_t shares = ChooseShares(tiles, steps, multiprocessors);
        kernel<<<static_cast<unsigned>(tiles * shares), Tile::kThreads, shared_bytes, stream>>>(
            FusedSizes(params), static_cast<int>(across), static_cast<int>(tiles),
            static_cast<int>(shares), static_cast<int>(Tile::MostTaps(params)), located,
            Native(tensors.input), Native(grad_output), sum);
        error = LaunchError("FusedBackpropFiltersKernel");
        if (!error.empty()) return error;
      }
      return "";
    });
  }
}

#define DEFORM_CONV_INSTANTIATE(T)                                                                 \
  template bool FusedForwardFits<T>(const DeformConvParams&,                                       \
                                    const SampledTensors<T, ComputeType<T>>&, const T*, const T*); \
  template std::string FusedForwardCuda<T>(const DeformConvParams&,                                \
                                           const SampledTensors<T, ComputeType<T>>&, const T*,     \
                                           CudaDevice&, T*);                                       \
  template bool FusedBackpropFiltersFits<T>(const DeformConvParams&,                               \
                                            const SampledTensors<T, ComputeType<T>>&, const T*);   \
  template std::string FusedBackpropFiltersCuda<T>(const DeformConvParams&,                        \
                                                   const SampledTensors<T, ComputeType<T>>&,       \
                                                   const T*, CudaDevice&, ComputeType<T>*);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
