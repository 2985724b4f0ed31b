#include "core/deform_conv2d_fused_cuda.h"
#include "core/patch_cuda.cuh"

namespace deform_conv {
namespace {

using namespace cuda;  // the kernels' own names

// The gradients of input, offset and mask from that of the columns. A block of threads takes a
// patch of output positions and a slice of the input's channels, within one deformable and one
// convolution group. Nearly all that the input's gradient gets from them falls into a small region
// of the input around the patch, and is a product there, which tensor cores sum up in registers
// over all taps:
//
//   region [pixels, channels] += shares [pixels, positions] * grad_columns [positions, channels],
//
// with the mask times the weight of a corner at the pixel on which the corner of a position's
// sample lies. So memory sees one atomic addition for each pixel of the region, not one for each
// corner of each sample. Corners outside of the region are added one by one.
//
// Four lanes have a position for all taps, and each of them every fourth chunk of its channels: of
// the columns' gradient, which nobody else reads, and of the sample's corners, whose products with
// it are the gradients of offset and mask. The columns themselves take their gradient's place.

// Blocks side by side on a multiprocessor, as many as shared memory holds of nine taps; or fewer,
// for the registers.
template <bool kInput>
constexpr int kBlocksPerMultiprocessor = kInput ? 2 : 3;
constexpr int kLanesOfPosition = 4;
constexpr int kPositionsOfWarp = kWarp / kLanesOfPosition;
static_assert(kThreadsPerBlock == kPatchPositions * kLanesOfPosition);

// What a lane works on.
template <typename T, int kChannels>
struct PatchLane {
  static constexpr int kChunks = kChannels / kVector<T> / kLanesOfPosition;
  // The position's number in the warp, and the lane's among the position's.
  static __device__ __forceinline__ int Group() { return ReadThread() % kWarp / kLanesOfPosition; }
  static __device__ __forceinline__ int Lane() { return ReadThread() % kLanesOfPosition; }

  // The lanes of every second position take their chunks in the order 1, 0, 3, 2, so that eight
  // lanes together read a whole row of banks. The lane's first chunk among those of the slice, and
  // the distance of its chunk j from it.
  static constexpr bool kSwaps = kChunks > 1;
  static __device__ __forceinline__ int First() {
    return Lane() + (kSwaps ? Group() % 2 * kLanesOfPosition : 0);
  }
  static __device__ __forceinline__ int Distance(int j) {
    if (!kSwaps || j % 2 == 0) return j * kLanesOfPosition;
    return (j - 1) * kLanesOfPosition + (Group() % 2 != 0 ? -kLanesOfPosition : kLanesOfPosition);
  }

  // The position in the patch: the order in which chunks are written to the tile without conflicts.
  // In 16 bits eight lanes write at once, two rows that must differ by 4 to fill all banks unless
  // the chunks do. In TF32, where positions lie along the rows, a warp writes four numbers of each
  // of two chunks, whose places differ by 4, to four rows.
  static __device__ __forceinline__ int Position() {
    const int warp = threadIdx.x / kWarp, group = Group();
    if constexpr (sizeof(T) == 2) {
      return warp * kPositionsOfWarp + (kSwaps ? group : group % 2 * 4 + group / 2);
    } else {
      return warp / 4 * 32 + group / 4 * 16 + warp % 4 * 4 + group % 4;
    }
  }
};

// Where things are in a block's shared memory, in bytes. The tiles are blocks of 128-byte rows, see
// wgmma_cuda.cuh.
//
//   shares   pixels by positions; absent where the input's gradient is not wanted
//   tile     TF32: the columns' gradient of a tap, RowOfChannel() by positions; likewise
//   copies   the columns' gradients of taps ahead. In 16 bits they are the tiles, positions by
//            channels; in TF32, chunk by chunk, all threads' side by side
//   samples  [positions, taps]: PatchSample
template <typename T, int kChannels, bool kInput>
struct RegionLayout {
  static constexpr bool k16Bits = sizeof(T) == 2;
  // With two buffers, a tap's shares are written while those of the tap before are multiplied.
  static constexpr int kShareBuffers = k16Bits ? 2 : 1;
  static constexpr int kShareBytes = kRegionPixels * kPatchPositions * static_cast<int>(sizeof(T));
  // In 16 bits, one is multiplied, and two are on their way.
  static constexpr int kCopies = k16Bits ? 3 : 1;
  static constexpr int kCopyBytes = k16Bits
                                        ? kPatchPositions * kRowBytes
                                        : kPatchPositions * kChannels * static_cast<int>(sizeof(T));

  static constexpr int kTile = kInput ? kShareBuffers * kShareBytes : 0;
  static constexpr int kFirstCopy = kTile + (kInput && !k16Bits ? kCopyBytes : 0);
  static constexpr int kSamples = kFirstCopy + kCopies * kCopyBytes;

  static int64_t Bytes(int64_t taps) {
    return kSamples + taps * kPatchPositions * static_cast<int64_t>(sizeof(PatchSample));
  }

  // Where the thread's first chunk lies in a copy, and the distance of chunk j from it; in 16 bits
  // to be combined by xor.
  static __device__ __forceinline__ uint32_t FirstChunk(int p) {
    return k16Bits ? SwizzledOffset(p, PatchLane<T, kChannels>::First())
                   : ReadThread() * kChunkBytes;
  }
  static __device__ __forceinline__ uint32_t ChunkAt(uint32_t first, int j) {
    return k16Bits ? first ^ j * (kLanesOfPosition * kChunkBytes)
                   : first + j * kThreadsPerBlock * kChunkBytes;
  }
};

__device__ __forceinline__ uint32_t WordOf(const uint4& chunk, int i) {
  return i == 0 ? chunk.x : i == 1 ? chunk.y : i == 2 ? chunk.z : chunk.w;
}

// Where in a TF32 tile a lane's first number is, in bytes, and where number i of its chunk j is.
template <int kChannels>
__device__ __forceinline__ uint32_t FirstTransposed(int p) {
  constexpr int kDepth = kBlockDepth<float>, kSize = kVector<float>;
  return p / kDepth * (kChannels * kRowBytes) +
         SwizzledOffset(PatchLane<float, kChannels>::First(), p % kDepth / kSize) +
         p % kSize * static_cast<int>(sizeof(float));
}
template <int kChannels>
__device__ __forceinline__ uint32_t TransposedAt(uint32_t first, int j, int i) {
  // RowOfChannel(chunk * 4 + i) is chunk + i * kRows; the swizzle of odd j's rows differs from the
  // first's in one bit, that of i's does not.
  constexpr int kRows = kChannels / kVector<float>;
  static_assert(kRows % kSwizzledRows == 0);
  return (first ^ (j % 2 * 4 * kChunkBytes)) +
         (PatchLane<float, kChannels>::Distance(j) + i * kRows) * kRowBytes;
}

// The products of a position's column gradients with the corners of its sample, summed over the
// slice's channels.
template <typename T>
class CornerProducts {
 public:
  __device__ __forceinline__ void Add(const uint4& grads, const uint4 (&corners)[kCorners]) {
    if constexpr (sizeof(T) == 2) {
      // By the tensor cores, for all positions of the warp with all corners. Rows and columns of
      // one number are of the same lanes, so their channels match, in whatever order, and the
      // diagonal is what is asked for.
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t b[2] = {WordOf(grads, i), WordOf(grads, i + 1)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 &one = corners[2 * half], &other = corners[2 * half + 1];
          const uint32_t a[4] = {WordOf(one, i), WordOf(other, i), WordOf(one, i + 1),
                                 WordOf(other, i + 1)};
          MultiplyInWarp<T>(reinterpret_cast<float (&)[4]>(sums_[4 * half]), a, b);
        }
      }
    } else {
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums_[corner] +=
              __uint_as_float(WordOf(grads, i)) * __uint_as_float(WordOf(corners[corner], i));
        }
      }
    }
  }

  // By whole warps; the products, in the one lane of each position that IsHere() names.
  __device__ __forceinline__ void Sum(float (&products)[kCorners]) const {
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      if constexpr (sizeof(T) == 2) {
        const bool odd = ReadThread() / kLanesOfPosition % 2 != 0;
        products[corner] = odd ? sums_[2 * corner + 1] : sums_[2 * corner];
      } else {
        products[corner] = SumOverLanes<kLanesOfPosition>(sums_[corner]);
      }
    }
  }
  // Where the diagonal's number is.
  static __device__ __forceinline__ bool IsHere(int group, int lane) { return lane == group / 2; }

 private:
  float sums_[sizeof(T) == 2 ? 2 * kCorners : kCorners] = {};
};

// The gradients of a sample, to be written in its place.
__device__ __forceinline__ PatchSample GradientsOf(const PatchSample& sample,
                                                   const float (&products)[kCorners]) {
  // Where no corner counts every gradient is 0, also beside an infinite mask.
  PatchSample gradients = {0, 0, 0, sample.place};
  if (sample.place != 0) {
    gradients.h = sample.mask * BilinearDerivativeH(sample.w, products);
    gradients.w = sample.mask * BilinearDerivativeW(sample.h, products);
    float weights[kCorners];
    BilinearWeights(sample.h, sample.w, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      gradients.mask += weights[corner] * products[corner];
    }
  }
  return gradients;
}

// The weights of the sample's corners, times the mask, and 0 where a corner does not count.
template <typename T>
__device__ __forceinline__ CornerWeights<T> WeightsOf(const PatchSample& sample) {
  float weights[kCorners];
  BilinearWeights(sample.h, sample.w, weights);
  CornerWeights<T> counted;
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    counted.of[corner] =
        static_cast<T>(sample.place >> corner & 1 ? sample.mask * weights[corner] : 0.0f);
  }
  return counted;
}

// Adds what corners outside of the region get to grad_input. `grads(j)` is the lane's chunk j of
// the columns' gradient.
template <typename T, int kChannels, typename Grads>
__device__ __forceinline__ void AddOutside(const FusedSizes& sizes, const Patch& patch,
                                           const PatchSample* sample, const Grads& grads,
                                           float* __restrict__ grad_input) {
  using Mine = PatchLane<T, kChannels>;
  const Place place = Place::Of(sample->place);
  if (patch.RegionHoldsAll(place)) return;
  const int top_left = patch.first_pixel + place.h * sizes.in_w + place.w;
  // Rare, so registers count more than instructions.
#pragma unroll 1
  for (int corners = place.corners & ~patch.CornersInRegion(place); corners != 0;
       corners &= corners - 1) {
    const int corner = __ffs(corners) - 1;
    float weights[kCorners], share = 0;
    BilinearWeights(sample->h, sample->w, weights);
#pragma unroll
    for (int i = 0; i < kCorners; ++i) share = i == corner ? weights[i] : share;
    share *= sample->mask;
    const int64_t pixel = top_left + (corner >= kBottomLeft ? sizes.in_w : 0) + (corner & 1);
    float* first =
        grad_input + pixel * sizes.in_channels + patch.channel + Mine::First() * kVector<T>;
#pragma unroll 1
    for (int j = 0; j < Mine::kChunks; ++j) {
      const uint4 chunk = grads(j);
      float* to = first + Mine::Distance(j) * kVector<T>;
      const auto& vector = reinterpret_cast<const Vector<T, kVector<T>>&>(chunk);
#pragma unroll
      for (int i = 0; i < kVector<T>; i += 4) {
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = share * static_cast<float>(vector.elements[i + k]);
        AddVector(to + i, values);
      }
    }
  }
}

// kInput tells whether the input's gradient is wanted, `replace` whether the columns are to replace
// their gradient, `add` whether the samples' gradients are added instead of written.
template <typename T, int kChannels, bool kInput>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerMultiprocessor<kInput>)
    Col2ImRegionKernel(const __grid_constant__ FusedSizes sizes,
                       const __grid_constant__ PatchGrid grid, SampledTensors<T, float> tensors,
                       bool replace, bool add,
                       T* __restrict__ columns,  // [positions worked on, groups, taps, channels]
                       SampledGradients<float> gradients) {
  extern __shared__ __align__(kBlockAlignment) uint8_t shares[];
  using Layout = RegionLayout<T, kChannels, kInput>;
  using Mine = PatchLane<T, kChannels>;
  constexpr bool k16Bits = Layout::k16Bits;
  PatchSample* samples = reinterpret_cast<PatchSample*>(shares + Layout::kSamples);
  const uint32_t shared = SharedAddress(shares);
  const Patch patch = grid.At<kChannels>(sizes, blockIdx.x);
  const int warpgroup = WarpgroupIndex();
  const int p = Mine::Position();

  // This lane's first chunk of the tap's columns; of a position that is not worked on, anything, to
  // be neither read nor written.
  const Position position = patch.At(p);
  const bool valid = grid.Includes(sizes, position);
  T* column = columns;
  if (valid) {
    column += (sizes.OrdinalOf(position) - grid.begin) * (sizes.taps * sizes.in_channels) +
              (patch.channel - patch.filters_row) * sizes.taps + patch.filters_row +
              Mine::First() * kVector<T>;
  }
  const uint32_t first_chunk = shared + Layout::kFirstCopy + Layout::FirstChunk(p);
  const uint32_t first_transposed = FirstTransposed<kChannels>(p);  // TF32
  // Begins to copy the columns' gradient of the tap `ahead` of this one.
  const auto copy = [&](int ahead, uint32_t to) {
#pragma unroll
    for (int j = 0; j < Mine::kChunks; ++j) {
      CopyChunkAsync(Layout::ChunkAt(first_chunk + to, j),
                     column + ahead * sizes.group_in_channels + Mine::Distance(j) * kVector<T>,
                     valid);
    }
  };

  constexpr int kAhead = k16Bits ? Layout::kCopies - 1 : Layout::kCopies;
#pragma unroll
  for (int tap = 0; tap < kAhead; ++tap) {
    if (tap < sizes.taps) copy(tap, tap * Layout::kCopyBytes);
    CommitCopies();
  }
  for (int i = threadIdx.x * kChunkBytes; i < Layout::kTile; i += kThreadsPerBlock * kChunkBytes) {
    StoreChunk(shared + i, make_uint4(0, 0, 0, 0));
  }
  LocatePatch(sizes, grid, tensors, patch, samples);
  __syncthreads();

  const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
  float region[kRegionParts][kChannels / 2];  // the first product defines it
  // Where this thread has written shares; in 16 bits, with the last tap's below the ones before.
  uint32_t written = k16Bits ? kNoShare << 16 | kNoShare : kNoShare;
  PatchSample* slot = samples + p * sizes.taps;
  // Where the copies of this tap and of the one before it are.
  uint32_t copy_now = 0, copy_before = (Layout::kCopies - 1) * Layout::kCopyBytes;

#pragma unroll 1
  for (int tap = 0; tap < sizes.taps; ++tap) {
    uint8_t* tap_shares = shares + (k16Bits ? tap % 2 * Layout::kShareBytes : 0);
    // The lane's chunk j of the columns' gradient; with a TF32 tile, as it is rounded there.
    uint4 copied[k16Bits ? 1 : Mine::kChunks] = {};
    const auto grads = [&](int j) {
      if constexpr (k16Bits) {
        return LoadChunk(Layout::ChunkAt(first_chunk + copy_now, j));
      } else if constexpr (kInput) {
        float numbers[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          numbers[i] = *reinterpret_cast<const float*>(
              shares + Layout::kTile + TransposedAt<kChannels>(first_transposed, j, i));
        }
        return reinterpret_cast<const uint4&>(numbers);
      } else {
        return copied[j];
      }
    };

    WaitForCopies<kAhead - 1>();
    if constexpr (!k16Bits) {
#pragma unroll
      for (int j = 0; j < Mine::kChunks; ++j) {
        copied[j] = LoadChunk(Layout::ChunkAt(first_chunk, j));
      }
      if constexpr (kInput) {
        // The tile and the shares have been multiplied.
        WarpgroupWait<0>();
        __syncthreads();
#pragma unroll
        for (int j = 0; j < Mine::kChunks; ++j) {
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) {
            *reinterpret_cast<float*>(shares + Layout::kTile +
                                      TransposedAt<kChannels>(first_transposed, j, i)) =
                RoundToTf32(__uint_as_float(WordOf(copied[j], i)));
          }
        }
      }
    }
    if constexpr (kInput) {
      const uint32_t old = k16Bits ? written >> 16 : written;
      const uint32_t now = UpdateShares<T>(patch, samples, sizes.taps, tap, old, tap_shares);
      written = k16Bits ? written << 16 | now : now;
      FenceForTensorCores();
      __syncwarp();
    }

    // Corners are on their way while the block waits; not before the fence, which would wait for
    // them.
    constexpr int kInFlight = Mine::kChunks < 2 ? 1 : 2;
    uint4 chunks[kInFlight][kCorners];
    // Counts from this lane's channels. Made anew each time, to keep registers free.
    const CornerReader reader(sizes, tensors.input + patch.channel + Mine::First() * kVector<T>);
    const auto corners = PlacedCorners::Of(sizes, patch, slot->place);
    if (want_products || replace) {
      corners.Load(reader, [](int j) { return Mine::Distance(j) * kChunkBytes; }, chunks);
    }
    if constexpr (kInput) {
      if constexpr (k16Bits) WarpgroupWait<0>();  // the tap before
      __syncthreads();
      MultiplyShares<T, kChannels>(
          warpgroup, shared + (k16Bits ? tap % 2 * Layout::kShareBytes : 0),
          shared + (k16Bits ? Layout::kFirstCopy + copy_now : Layout::kTile), tap > 0, region);
    }
    if (tap + kAhead < sizes.taps) copy(kAhead, k16Bits ? copy_before : 0);
    CommitCopies();

    float products[kCorners];
    if (want_products || replace) {
      const auto weights = WeightsOf<T>(*slot);
      CornerProducts<T> sums;
#pragma unroll
      for (int j = 0; j < Mine::kChunks; ++j) {
        auto& chunk = chunks[j % kInFlight];
        sums.Add(grads(j), chunk);
        if (replace && valid) {
          *reinterpret_cast<uint4*>(column + Mine::Distance(j) * kVector<T>) =
              Interpolate<T, /*kRound=*/false>(chunk, weights);
        }
        if (j + kInFlight < Mine::kChunks) {
          corners.Load(
              reader, [&](int) { return Mine::Distance(j + kInFlight) * kChunkBytes; },
              reinterpret_cast<uint4(&)[1][kCorners]>(chunk));
        }
      }
      sums.Sum(products);
    }
    if constexpr (kInput) {
      AddOutside<T, kChannels>(sizes, patch, slot, grads, gradients.input);
    }
    __syncwarp();  // all lanes of the position have read the sample
    if (want_products && CornerProducts<T>::IsHere(Mine::Group(), Mine::Lane())) {
      *slot = GradientsOf(*slot, products);
    }
    __syncwarp();

    ++slot;
    column += sizes.group_in_channels;
    copy_before = copy_now;
    copy_now = copy_now + Layout::kCopyBytes < Layout::kCopies * Layout::kCopyBytes
                   ? copy_now + Layout::kCopyBytes
                   : 0;
  }

  if constexpr (kInput) {
    WarpgroupWait<0>();
#pragma unroll
    for (int part = 0; part < kRegionParts; ++part) ReadAfterWait(region[part]);
    AddRegion<T, kChannels>(sizes, patch, warpgroup, region, gradients.input);
  }
  if (want_products) {
    __syncthreads();
    StoreGradients(sizes, grid, patch, samples, add, gradients);
  }
}

// --- Launching ---

template <typename T>
int SliceChannelsOf(const DeformConvParams& params, bool want_input) {
  using Element = CudaType<T>;
  return SliceChannels(params, [&](auto channels) {
    return (want_input ? RegionLayout<Element, channels, true>::Bytes
                       : RegionLayout<Element, channels, false>::Bytes)(params.taps());
  });
}

template <typename T, int kChannels, bool kInput>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   int64_t begin, int64_t end, bool replace, T* columns,
                   const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  unsigned blocks;
  const PatchGrid grid = GridOfPatches(params, kInput, kChannels, begin, end, &blocks);
  const bool add = params.deform_group_channels() > kChannels;
  std::string error;
  if (add) error = ZeroSampleGradients(params, begin, end, gradients, stream);
  if (!error.empty()) return error;

  const auto kernel = Col2ImRegionKernel<Element, kChannels, kInput>;
  const int bytes =
      static_cast<int>(RegionLayout<Element, kChannels, kInput>::Bytes(params.taps()));
  error = AllowSharedBytes(kernel, bytes);
  if (!error.empty()) return error;
  kernel<<<blocks, kThreadsPerBlock, bytes, StreamOf(stream)>>>(FusedSizes(params), grid,
                                                                NativeTensors<T>(tensors), replace,
                                                                add, Native(columns), gradients);
  return LaunchError("Col2ImRegionKernel");
}

}  // namespace

template <typename T>
bool DeformCol2ImRegionFits(const DeformConvParams& params,
                            const SampledTensors<T, ComputeType<T>>& tensors,
                            const SampledGradients<ComputeType<T>>& gradients) {
  const bool want_input = gradients.input != nullptr;
  return PatchesFit(params, want_input, SliceChannelsOf<T>(params, want_input)) &&
         TensorsFit<T>(tensors) && Aligned(gradients.input) &&
         reinterpret_cast<uintptr_t>(gradients.offset) % sizeof(float2) == 0;
}

template <typename T>
std::string DeformCol2ImRegionCuda(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                                   int64_t end, bool replace, T* columns,
                                   const SampledGradients<ComputeType<T>>& gradients,
                                   void* stream) {
  if (begin == end || (!gradients.any() && !replace)) return "";
  const bool want_input = gradients.input != nullptr;
  const bool wide = SliceChannelsOf<T>(params, want_input) == 64;
  const auto launch = want_input ? (wide ? Launch<T, 64, true> : Launch<T, 32, true>)
                                 : (wide ? Launch<T, 64, false> : Launch<T, 32, false>);
  return launch(params, tensors, begin, end, replace, columns, gradients, stream);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                               \
  template bool DeformCol2ImRegionFits<T>(const DeformConvParams&,                               \
                                          const SampledTensors<T, ComputeType<T>>&,              \
                                          const SampledGradients<ComputeType<T>>&);              \
  template std::string DeformCol2ImRegionCuda<T>(                                                \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, bool, \
      T*, const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
