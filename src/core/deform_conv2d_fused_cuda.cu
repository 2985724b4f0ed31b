#include <algorithm>

#include "core/deform_conv2d_fused_cuda.h"
#include "core/fused_samples_cuda.cuh"

namespace deform_conv {
namespace {

using namespace cuda;  // the kernels' own names

// The order in which the depth, (tap, channel of the convolution group), is gone through, block by
// block. If channels come in whole blocks, then through all taps of some channels before the next
// channels: the taps read the same pixels, which are then still in the first-level cache.
template <typename T>
struct DepthOrder {
  bool by_channels;
  int blocks;

  __device__ explicit DepthOrder(const FusedSizes& sizes)
      : by_channels(sizes.group_in_channels % kBlockDepth<T> == 0),
        blocks((sizes.taps * sizes.group_in_channels + kBlockDepth<T> - 1) / kBlockDepth<T>) {}

  // The row of the filters that a block begins at.
  __device__ __forceinline__ int FirstRow(const FusedSizes& sizes, int block) const {
    if (!by_channels) return block * kBlockDepth<T>;
    const int slice = sizes.taps_of_group.Divide(block);
    return (block - slice * sizes.taps) * sizes.group_in_channels + slice * kBlockDepth<T>;
  }

  // Where a chunk of a block is; past the last tap if there is no such chunk.
  struct Place {
    int tap, channel;
  };
  __device__ __forceinline__ Place At(const FusedSizes& sizes, int block, int chunk) const {
    const int in_block = chunk * kVector<T>;
    if (by_channels) {
      const int slice = sizes.taps_of_group.Divide(block);
      return {block - slice * sizes.taps, slice * kBlockDepth<T> + in_block};
    }
    const int row = block * kBlockDepth<T> + in_block;
    const int tap = sizes.channels_of_group.Divide(row);
    return {tap, row - tap * sizes.group_in_channels};
  }
};

// --- Forward ---

// How the forward kernel is laid out: a block of threads computes tiles of up to kRows positions by
// kCols output channels, one after the other. Each of its warpgroups but the last, the samplers,
// has 64 of the rows: its threads sample into registers, which are one factor of the product that
// the warpgroup then adds to its sums. The last one, the helper, copies the other factor, filters,
// into stages in shared memory.
template <typename T, int kColumns>
struct ForwardTile {
  static constexpr int kCols = kColumns;
  static constexpr bool kWide = kCols > 128;
  static constexpr int kSamplers = kWide ? 2 : 3;
  static constexpr int kThreads = (kSamplers + 1) * kWarpgroup;
  static constexpr int kRows = kSamplers * kWarpgroupRows;
  static constexpr int kUnit = 16, kUnits = kRows / kUnit;  // a warp has 16 rows of a product
  static constexpr int kProducts = kWide ? 2 : 1, kProductCols = kCols / kProducts;
  // Of a thread; before, all have the same.
  static constexpr int kSamplerRegisters = kWide ? 224 : 160;
  static constexpr int kHelperRegisters = kWide ? 56 : 32;

  static constexpr int kStages = 4;
  static constexpr int kStageBytes = kCols * kRowBytes;

  // Stages; a table with an entry for each tap and row, tap by tap, and behind it zeros for what
  // comes after the last tap; barriers, which tell that a stage is full, or empty.
  static int64_t SharedBytes(const DeformConvParams& params) {
    return kStages * int64_t{kStageBytes} +
           kRows * (params.mask_channels() + 1) * int64_t{SampleTable<T>::kEntryBytes} +
           2 * kStages * int64_t{sizeof(uint64_t)};
  }
};

constexpr int32_t kNoPosition = -1;

// The stage that a block of the depth goes through, and the parity of how often it has been gone
// through before.
template <int kStages>
struct StageCursor {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void Next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// A tile's place.
struct TileOrigin {
  int position, units;  // its first, and how many units of positions it has
  int group;            // of the convolution
  int first_col, cols;  // of the output channels, and how many the group has from there on
};

// A block's tiles. All units are dealt out evenly among the blocks, down one column of tiles and
// then down the next; what a block gets of a column it cuts into tiles of nearly the same size.
template <typename Tile>
class TileWalk {
 public:
  __device__ TileWalk(const FusedSizes& sizes, int columns)
      : units_((sizes.positions + Tile::kUnit - 1) / Tile::kUnit) {
    const int64_t all = int64_t{units_} * columns;
    at_ = static_cast<int>(all * blockIdx.x / gridDim.x);
    end_ = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x);
  }

  // Moves on to the next tile, if there is one.
  __device__ __forceinline__ bool Next(const FusedSizes& sizes, TileOrigin* tile) {
    if (at_ >= end_) return false;
    const int column = at_ / units_, unit = at_ - column * units_;
    const int left = min(end_ - at_, units_ - unit);
    const int tiles = (left + Tile::kUnits - 1) / Tile::kUnits;
    tile->position = unit * Tile::kUnit;
    tile->units = (left + tiles - 1) / tiles;
    const int columns_of_group = (sizes.group_out_channels + Tile::kCols - 1) / Tile::kCols;
    tile->group = column / columns_of_group;
    const int first_of_group = (column - tile->group * columns_of_group) * Tile::kCols;
    tile->first_col = tile->group * sizes.group_out_channels + first_of_group;
    tile->cols = sizes.group_out_channels - first_of_group;
    at_ += tile->units;
    return true;
  }

 private:
  int units_, at_, end_;
};

// A block's shared memory, see ForwardTile::SharedBytes.
template <typename Tile, typename T>
struct ForwardShared {
  uint32_t stages, full, empty;
  SampleTable<T> samples;  // [taps of a position + 1, kRows]

  __device__ ForwardShared(uint8_t* memory, int taps_of_position)
      : stages(SharedAddress(memory)),
        samples(SampleTable<T>::At(memory + Tile::kStages * Tile::kStageBytes,
                                   (taps_of_position + 1) * Tile::kRows)) {
    full = SharedAddress(samples.corners + (taps_of_position + 1) * Tile::kRows);
    empty = full + Tile::kStages * sizeof(uint64_t);
  }

  __device__ __forceinline__ uint32_t Stage(int stage) const {
    return stages + stage * Tile::kStageBytes;
  }
  static __device__ __forceinline__ uint32_t Of(uint32_t barriers, int i) {
    return barriers + i * sizeof(uint64_t);
  }
};

// Where step `d` of a block of the depth lies among those that the tensor cores multiply, which
// take it in this order: the lanes t = 0 to 3 that share a row of samples have neighbouring chunks,
// and in one instruction each has four numbers of its chunk in 16 bits, or two in TF32.
template <typename T>
__host__ __device__ constexpr int OrderOfDepth(int d) {
  constexpr int kPair = 4 / sizeof(T);  // numbers of a register
  const int j = d % kPair, i = d / kPair % 2, s = d / (2 * kPair) % 2;
  const int t = d / (4 * kPair) % 4, h = d / (16 * kPair);
  return ((h * 2 + s) * 2 + i) * (4 * kPair) + t * kPair + j;
}

// Copies a tile's columns of the filters, block by block of the depth, into stages. By a warpgroup.
template <typename Tile, typename T>
class FiltersCopier {
  static constexpr bool kDepthRows = kRowsOfDepth<T> == RowsOf::kDepth;
  static constexpr int kRowOfChunks = kDepthRows ? Tile::kCols / kVector<T> : kRowChunks;
  static constexpr int kRowsAtOnce = kWarpgroup / kRowOfChunks;
  static constexpr int kPasses = Tile::kStageBytes / kChunkBytes / kWarpgroup;

 public:
  // `filters` is [depth, out_channels]; or [out_channels, whole blocks of the depth] in
  // OrderOfDepth() where rows are the product's.
  __device__ FiltersCopier(const FusedSizes& sizes, const T* filters, const TileOrigin& origin) {
    const int thread = threadIdx.x % kWarpgroup;
    const int row = thread / kRowOfChunks, chunk = thread % kRowOfChunks;
    const int depth = sizes.taps * sizes.group_in_channels;
    if (kDepthRows) {
      pitch_ = sizes.out_channels;
      from_ = filters + int64_t{row} * pitch_ + origin.first_col + chunk * kVector<T>;
      rows_ = chunk * kVector<T> < origin.cols ? depth - row : 0;
      to_ = chunk / kRowChunks * (kBlockDepth<T> * kRowBytes) +
            SwizzledOffset(OrderOfDepth<T>(row), chunk % kRowChunks);
    } else {
      pitch_ = (depth + kBlockDepth<T> - 1) / kBlockDepth<T> * kBlockDepth<T>;
      from_ = filters + int64_t{origin.first_col + row} * pitch_ + chunk * kVector<T>;
      rows_ = origin.cols - row;
      to_ = SwizzledOffset(row, chunk);
    }
  }

  // Begins to copy the block that begins at `first` of the depth.
  __device__ __forceinline__ void Copy(int first, uint32_t stage) const {
    const T* from = from_ + (kDepthRows ? int64_t{first} * pitch_ : first);
    const int rows = kDepthRows ? rows_ - first : rows_;
    const uint32_t to = stage + to_;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      // The passes' rows and the thread's have no bit in common, and stages begin where all bits of
      // the swizzle are 0.
      const int row = pass * kRowsAtOnce;
      const int place = kDepthRows ? OrderOfDepth<T>(row) : row;
      CopyChunkAsync((to ^ place % kSwizzledRows * kChunkBytes) + place * kRowBytes, from,
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

// Locates the samples of a warp's rows: lane l has row l % 16, and every other tap of it. Returns
// that row's ordinal.
template <typename Tile, typename T>
__device__ __forceinline__ int32_t LocateRows(const FusedSizes& sizes, const PositionOrder& order,
                                              const SampledTensors<T, float>& tensors,
                                              const TileOrigin& tile, const SampleTable<T>& table) {
  constexpr int kLanesOfRow = kWarp / Tile::kUnit;
  constexpr int kTogether = 3;  // loaded at a time
  const int lane = threadIdx.x % kWarp;
  const int row = threadIdx.x / kWarp * Tile::kUnit + lane % Tile::kUnit;
  const int place = tile.position + row;
  const int taps = static_cast<int>(sizes.taps_of_position.value());
  const bool counts = row < tile.units * Tile::kUnit && place < sizes.positions;
  Position position;
  int32_t ordinal = kNoPosition;
  if (counts) {
    position = order.At(place);
    ordinal = static_cast<int32_t>(sizes.OrdinalOf(position));
  }
  const int64_t first = int64_t{ordinal} * taps;
  for (int begin = lane / Tile::kUnit; begin < taps; begin += kTogether * kLanesOfRow) {
    float2 offsets[kTogether];
    float masks[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int g_tap = begin + k * kLanesOfRow;
      if (g_tap >= taps || !counts) continue;
      offsets[k] = OffsetOf(tensors, first + g_tap);
      masks[k] = MaskOf(tensors, first + g_tap);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int g_tap = begin + k * kLanesOfRow;
      if (g_tap >= taps) continue;
      const int entry = g_tap * Tile::kRows + row;
      if (counts) {
        table.Locate(sizes, position, Tap::Of(sizes, g_tap), offsets[k], masks[k], entry);
      } else {
        table.SetToZero(entry);
      }
    }
  }
  return ordinal;
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
// and `cols` how many there are from there on. Lanes 0 to 15 have the
// ordinals of their warp's rows.
template <typename T, int kCols>
__device__ __forceinline__ void StoreSums(const float (&sums)[kCols / 2], int32_t ordinal_of_lane,
                                          int64_t pitch, int cols, T* __restrict__ output) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int32_t ordinal = __shfl_sync(0xffffffffu, ordinal_of_lane, lane / 4 + 8 * j);
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

// The helper's work.
template <typename T, typename Tile>
__device__ __forceinline__ void CopyFilters(const FusedSizes& sizes, int columns,
                                            const T* __restrict__ filters,
                                            const ForwardShared<Tile, T>& shared) {
  const DepthOrder<T> depth(sizes);
  TileWalk<Tile> tiles(sizes, columns);
  TileOrigin tile;
  StageCursor<Tile::kStages> cursor;
  uint32_t before = 0;  // the barrier of the stage whose copies go on
  while (tiles.Next(sizes, &tile)) {
    const FiltersCopier<Tile, T> copier(sizes, filters, tile);
    for (int block = 0; block < depth.blocks; ++block) {
      WaitAtBarrier(shared.Of(shared.empty, cursor.stage), cursor.parity ^ 1);
      copier.Copy(depth.FirstRow(sizes, block), shared.Stage(cursor.stage));
      CommitCopies();
      WaitForCopies<1>();
      FenceForTensorCores();
      if (before != 0) ArriveAsWarp(before);
      before = shared.Of(shared.full, cursor.stage);
      cursor.Next();
    }
  }
  WaitForCopies<0>();
  FenceForTensorCores();
  if (before != 0) ArriveAsWarp(before);
}

// Where a sampler's thread samples, block by block of the depth. It has two rows of the tile, 8
// apart, and of each two chunks of a block, 4 apart. It takes the chunks in one order or the other,
// so that eight lanes together read a whole row of banks.
//
// With kWhole, all chunks of a block are of the same tap and deformable group.
template <typename T, typename Tile, bool kWhole>
class ChunkWalk {
 public:
  static constexpr int kEach = 2;

  int entries[kEach];           // of the table, for the first row
  const uint8_t* first[kEach];  // of the input, the chunk of the first pixel

  __device__ ChunkWalk(const FusedSizes& sizes, const T* input, const TileOrigin& tile)
      : input_(reinterpret_cast<const uint8_t*>(input)),
        group_channel_(tile.group * sizes.group_in_channels) {
    Set(sizes);
  }

  static __device__ __forceinline__ int FirstRow() {
    return threadIdx.x / kWarp * Tile::kUnit + threadIdx.x % kWarp / 4;
  }
  // Whether the second of two chunks comes first.
  static __device__ __forceinline__ bool SecondFirst() { return threadIdx.x / 4 % 2 != 0; }

  __device__ __forceinline__ void Next(const FusedSizes& sizes) {
    if (kWhole && ++tap_ < sizes.taps) {
#pragma unroll
      for (int h = 0; h < kEach; ++h) entries[h] += Tile::kRows;
    } else {
      tap_ = 0;
      block_ += 1;
      Set(sizes);
    }
  }

 private:
  __device__ __forceinline__ void Set(const FusedSizes& sizes) {
#pragma unroll
    for (int h = 0; h < kEach; ++h) {
      const int chunk = threadIdx.x % 4 + (SecondFirst() == (h == 0) ? 4 : 0);
      int tap = 0, channel = block_ * kBlockDepth<T>;
      if (!kWhole) {
        const auto at = DepthOrder<T>(sizes).At(sizes, block_, chunk);
        tap = at.tap;
        channel = at.channel;
      }
      channel += group_channel_;
      const int g = sizes.deform_groups == 1 ? 0 : channel / sizes.deform_group_channels;
      const int after_last = static_cast<int>(sizes.taps_of_position.value());
      const int g_tap = tap < sizes.taps ? g * sizes.taps + tap : after_last;
      entries[h] = g_tap * Tile::kRows + FirstRow();
      if (kWhole) channel += chunk * kVector<T>;
      first[h] = input_ + channel * static_cast<int>(sizeof(T));
    }
  }

  const uint8_t* input_;
  int group_channel_;
  int tap_ = 0, block_ = 0;  // with kWhole the block of the channels, else that of the depth
};

// A sampler's work.
template <typename T, typename Tile, bool kWhole>
__device__ __forceinline__ void SampleAndMultiply(const FusedSizes& sizes,
                                                  const PositionOrder& order, int columns,
                                                  const SampledTensors<T, float>& tensors,
                                                  const ForwardShared<Tile, T>& shared,
                                                  T* __restrict__ output) {
  using Chunks = ChunkWalk<T, Tile, kWhole>;
  constexpr int kEach = Chunks::kEach;
  const bool second_first = Chunks::SecondFirst();
  const DepthOrder<T> depth(sizes);
  const CornerDistances distances = CornerDistances::Of<T>(sizes);

  TileWalk<Tile> tiles(sizes, columns);
  TileOrigin tile;
  StageCursor<Tile::kStages> cursor;
  while (tiles.Next(sizes, &tile)) {
    __syncwarp();  // all lanes are through with the table
    const int32_t ordinal = LocateRows<Tile>(sizes, order, tensors, tile, shared.samples);
    __syncwarp();
    Chunks chunks(sizes, tensors.input, tile);
    float sums[Tile::kProducts][Tile::kProductCols / 2] = {};
    uint32_t before = 0;  // the barrier of the stage whose product goes on
    for (int block = 0; block < depth.blocks; ++block) {
      CornersInFlight in_flight[kEach][kEach];
      int32_t corners[kEach][kEach];
      int entries[kEach];
#pragma unroll
      for (int h = 0; h < kEach; ++h) {
        entries[h] = chunks.entries[kWhole ? 0 : h];
        const uint8_t* first = Pinned(chunks.first[h]);
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          corners[h][r] =
              kWhole && h > 0 ? corners[0][r] : shared.samples.corners[entries[h] + 8 * r];
          in_flight[h][r].Load(distances, first, corners[h][r]);
        }
      }
      // The samples' registers are free again.
      WarpgroupWait<0>();
      if (before != 0) ArriveAsWarp(before);
      uint32_t samples[kEach][kEach][4];
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        // Most warps have no sample at the border.
        const int32_t all = corners[0][r] & corners[1][r] & kAllCorners;
        if (!__all_sync(0xffffffffu, all == kAllCorners)) {
#pragma unroll
          for (int h = 0; h < kEach; ++h) in_flight[h][r].DropUncounted(corners[h][r]);
        }
        uint4 sampled[kEach];
#pragma unroll
        for (int h = 0; h < kEach; ++h) {
          sampled[h] =
              Interpolate<T>(in_flight[h][r].chunks, shared.samples.weights[entries[h] + 8 * r]);
        }
#pragma unroll
        for (int h = 0; h < kEach; ++h) {
          const uint4 &same = sampled[h], &other = sampled[1 - h];
          samples[h][r][0] = second_first ? other.x : same.x;
          samples[h][r][1] = second_first ? other.y : same.y;
          samples[h][r][2] = second_first ? other.z : same.z;
          samples[h][r][3] = second_first ? other.w : same.w;
#pragma unroll
          for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(samples[h][r][i])::"memory");
        }
      }
      WaitAtBarrier(shared.Of(shared.full, cursor.stage), cursor.parity);
      const uint64_t filters_of_stage =
          FactorDescriptor(shared.Stage(cursor.stage), kBlockDepth<T> * kRowBytes);
      WarpgroupArrive();
#pragma unroll
      for (int step = 0; step < kBlockDepth<T> / kStepDepth<T>; ++step) {
        const auto& words = samples[step / 2];
        const int word = step % 2 * 2;
        const uint64_t filters =
            MoveDescriptor(filters_of_stage, step * StepBytes<T, kRowsOfDepth<T>>());
        const uint32_t factor[4] = {words[0][word], words[1][word], words[0][word + 1],
                                    words[1][word + 1]};
#pragma unroll
        for (int product = 0; product < Tile::kProducts; ++product) {
          MultiplyRegisters<T, Tile::kProductCols, kRowsOfDepth<T>>::Run(
              sums[product], factor,
              MoveDescriptor(filters, product * (Tile::kProductCols * kRowBytes)), true);
        }
      }
      WarpgroupCommit();
      chunks.Next(sizes);
      before = shared.Of(shared.empty, cursor.stage);
      cursor.Next();
    }
    WarpgroupWait<0>();
    ArriveAsWarp(before);
#pragma unroll
    for (int product = 0; product < Tile::kProducts; ++product) {
      const int col = product * Tile::kProductCols;
      StoreSums<T, Tile::kProductCols>(sums[product], ordinal, sizes.out_channels, tile.cols - col,
                                       output + tile.first_col + col);
    }
  }
}

template <typename T, typename Tile, bool kWhole>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    FusedForwardKernel(const __grid_constant__ FusedSizes sizes,
                       const __grid_constant__ PositionOrder order, int columns,
                       SampledTensors<T, float> tensors, const T* __restrict__ filters,
                       T* __restrict__ output) {  // [positions, out_channels]
  extern __shared__ __align__(kBlockAlignment) uint8_t memory[];
  const int taps_of_position = static_cast<int>(sizes.taps_of_position.value());
  const ForwardShared<Tile, T> shared(memory, taps_of_position);
  if (threadIdx.x == 0) {
    constexpr int kWarps = kWarpgroup / kWarp;
    for (int i = 0; i < Tile::kStages; ++i) {
      InitializeBarrier(shared.Of(shared.full, i), kWarps);
      InitializeBarrier(shared.Of(shared.empty, i), Tile::kSamplers * kWarps);
    }
  }
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    shared.samples.SetToZero(taps_of_position * Tile::kRows + row);
  }
  __syncthreads();
  if (WarpgroupIndex() < Tile::kSamplers) {
    RaiseRegisters<Tile::kSamplerRegisters>();
    SampleAndMultiply<T, Tile, kWhole>(sizes, order, columns, tensors, shared, output);
  } else {
    LowerRegisters<Tile::kHelperRegisters>();
    CopyFilters<T, Tile>(sizes, columns, filters, shared);
  }
}

// to [cols, whole blocks of rows] = from [rows, cols] transposed and rounded to TF32, each block in
// OrderOfDepth(), with zeros after the last row.
constexpr int kTransposedTile = kBlockDepth<float>, kTransposedRows = 8;
__global__ void __launch_bounds__(kTransposedTile* kTransposedRows)
    TransposeToTf32Kernel(int rows, int cols, const float* __restrict__ from,
                          float* __restrict__ to) {
  __shared__ float tile[kTransposedTile][kTransposedTile + 1];  // one more, against bank conflicts
  const int tiles_across = (cols + kTransposedTile - 1) / kTransposedTile;
  const int pitch = (rows + kTransposedTile - 1) / kTransposedTile * kTransposedTile;
  const int first_row = blockIdx.x / tiles_across * kTransposedTile;
  const int first_col = blockIdx.x % tiles_across * kTransposedTile;
  for (int i = threadIdx.y; i < kTransposedTile; i += kTransposedRows) {
    const int row = first_row + i, col = first_col + threadIdx.x;
    tile[i][threadIdx.x] = row < rows && col < cols ? from[int64_t{row} * cols + col] : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTransposedTile; i += kTransposedRows) {
    const int col = first_col + i;
    if (col >= cols) continue;
    to[int64_t{col} * pitch + first_row + OrderOfDepth<float>(threadIdx.x)] =
        RoundToTf32(tile[threadIdx.x][i]);
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
// Columns of tiles, and units of positions in each.
template <typename Tile>
int64_t Columns(const DeformConvParams& params) {
  return params.groups * Blocks(params.group_out_channels(), Tile::kCols);
}
template <typename Tile>
int64_t Units(const DeformConvParams& params) {
  return Blocks(params.out_positions(), Tile::kUnit);
}
}  // namespace

bool FusedKernelsRunHere() { return CurrentGpu().fits; }

template <typename T>
bool FusedForwardFits(const DeformConvParams& params,
                      const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                      const T* output) {
  return ChannelsFit<T>(params) && TensorsFit<T>(tensors) && Aligned(filters) && Aligned(output) &&
         WithForwardTile<T>(params, [&](auto tile) {
           using Tile = decltype(tile);
           return Tile::SharedBytes(params) <= kMostSharedBytes &&
                  Units<Tile>(params) <= INT32_MAX / Columns<Tile>(params);
         });
}

template <typename T>
std::string FusedForwardCuda(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             CudaDevice& device, T* output) {
  if (params.out_positions() == 0) return "";
  const cudaStream_t stream = StreamOf(device.stream());
  if constexpr (kRowsOfDepth<T> == RowsOf::kProduct) {
    const int rows = static_cast<int>(params.taps() * params.group_in_channels());
    const int cols = static_cast<int>(params.out_channels);
    float* transposed;
    const int64_t depth_blocks = Blocks(rows, kTransposedTile);
    std::string error = device.Allocate(depth_blocks * kTransposedTile * cols * sizeof(float),
                                        reinterpret_cast<void**>(&transposed));
    if (!error.empty()) return error;
    const unsigned blocks = static_cast<unsigned>(depth_blocks) * Blocks(cols, kTransposedTile);
    TransposeToTf32Kernel<<<blocks, dim3(kTransposedTile, kTransposedRows), 0, stream>>>(
        rows, cols, filters, transposed);
    error = LaunchError("TransposeToTf32Kernel");
    if (!error.empty()) return error;
    filters = transposed;
  }
  return WithForwardTile<T>(params, [&](auto tile) -> std::string {
    using Tile = decltype(tile);
    constexpr int64_t kDepth = kBlockDepth<CudaType<T>>;
    const bool whole =
        params.group_in_channels() % kDepth == 0 && params.deform_group_channels() % kDepth == 0;
    const auto kernel = whole ? FusedForwardKernel<CudaType<T>, Tile, true>
                              : FusedForwardKernel<CudaType<T>, Tile, false>;
    const int64_t shared_bytes = Tile::SharedBytes(params);
    std::string error = AllowSharedBytes(kernel, shared_bytes);
    if (!error.empty()) return error;
    const int64_t columns = Columns<Tile>(params);
    const int64_t blocks =
        std::min<int64_t>(columns * Units<Tile>(params), CurrentGpu().multiprocessors);
    kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, shared_bytes, stream>>>(
        FusedSizes(params), PositionOrder(params), static_cast<int>(columns),
        NativeTensors<T>(tensors), Native(filters), Native(output));
    return LaunchError("FusedForwardKernel");
  });
}

#define DEFORM_CONV_INSTANTIATE(T)                                                                 \
  template bool FusedForwardFits<T>(const DeformConvParams&,                                       \
                                    const SampledTensors<T, ComputeType<T>>&, const T*, const T*); \
  template std::string FusedForwardCuda<T>(const DeformConvParams&,                                \
                                           const SampledTensors<T, ComputeType<T>>&, const T*,     \
                                           CudaDevice&, T*);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
