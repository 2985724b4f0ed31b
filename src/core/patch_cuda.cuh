// What the region kernel is made of: patches of output positions and their regions of the input,
// samples and shares in shared memory, the region's sums. For .cu files only.

#ifndef DEFORM_CONV_CORE_PATCH_CUDA_CUH_
#define DEFORM_CONV_CORE_PATCH_CUDA_CUH_

#include <algorithm>

#include "core/deform_conv2d_fused_cuda.h"
#include "core/deform_im2col_cuda.h"
#include "core/fused_samples_cuda.cuh"

namespace deform_conv {
namespace cuda {

constexpr int kPatchPositions = kPatchSide * kPatchSide;
constexpr int kRegionSide = 16;
constexpr int kRegionPixels = kRegionSide * kRegionSide;
constexpr int kWarpgroups = kThreadsPerBlock / kWarpgroup;
// Blocks of 64 pixels of the region that a warpgroup sums up.
constexpr int kRegionParts = kRegionPixels / kWarpgroupRows / kWarpgroups;

// A sample and, once it has been worked on, its gradients.
struct alignas(16) PatchSample {
  float h, w, mask;  // fractions and mask; then the gradients of offset h, w and mask
  uint32_t place;    // see Place
};

// What PatchSample::place packs: the top left corner, either coordinate of which may be -1, and the
// corner bits. All bits are 0 where no corner counts.
struct Place {
  static constexpr int kCoordinateBits = 14;
  static constexpr int64_t kMostSize = (1 << kCoordinateBits) - 1;

  int h, w, corners;

  static __device__ __forceinline__ uint32_t Pack(int h, int w, int corners) {
    return corners == 0
               ? 0u
               : static_cast<uint32_t>(h + 1) << (kCornerBits + kCoordinateBits) |
                     static_cast<uint32_t>(w + 1) << kCornerBits | static_cast<uint32_t>(corners);
  }
  static __device__ __forceinline__ Place Of(uint32_t packed) {
    return {static_cast<int>(packed >> (kCornerBits + kCoordinateBits)) - 1,
            static_cast<int>(packed >> kCornerBits & kMostSize) - 1,
            static_cast<int>(packed & kAllCorners)};
  }
};

// A block's patch, slice and region.
struct Patch {
  int n, y, x;             // of the first position
  int first_pixel;         // the image's, in the batch
  int tap_of_group;        // the first of the deformable group, among those of a position
  int channel;             // the slice's first
  int filters_row;         // ... among those of its convolution group
  int region_h, region_w;  // the region's first pixel, which may lie outside of the image

  // Which of a sample's corners count and lie in the region.
  __device__ __forceinline__ int CornersInRegion(const Place& place) const {
    const unsigned h = place.h - region_h, w = place.w - region_w;
    const int top = h < kRegionSide, bottom = h + 1 < kRegionSide;
    const int left = w < kRegionSide, right = w + 1 < kRegionSide;
    return place.corners & ((top & left) << kTopLeft | (top & right) << kTopRight |
                            (bottom & left) << kBottomLeft | (bottom & right) << kBottomRight);
  }

  // Where in the region a corner is, or -1 if it does not count or is not there.
  __device__ __forceinline__ int PixelInRegion(const Place& place, int corner) const {
    const unsigned h = place.h - region_h + (corner >= kBottomLeft ? 1 : 0);
    const unsigned w = place.w - region_w + (corner & 1);
    const bool there = (place.corners >> corner & 1) && h < kRegionSide && w < kRegionSide;
    return there ? static_cast<int>(h * kRegionSide + w) : -1;
  }

  // Whether all corners of a sample lie in the region, those that do not count among them.
  __device__ __forceinline__ bool RegionHoldsAll(const Place& place) const {
    const unsigned h = place.h - region_h, w = place.w - region_w;
    return h < kRegionSide - 1 && w < kRegionSide - 1;
  }

  // Position p's place in the patch is row p / kPatchSide, column p % kPatchSide.
  __device__ __forceinline__ Position At(int p) const {
    return {n, y + p / kPatchSide, x + p % kPatchSide};
  }
};

// How the patches, and the slices of each, are numbered; and the region's place beside a patch.
struct PatchGrid {
  Divisor slices, across, down;  // slices of a patch, patches across and down an image
  int first_row;                 // of patches; those of all images are counted on
  int begin, end;                // the positions that are worked on, ordinals
  int margin_h, margin_w;  // from the region's first row and column to what the first tap samples

  template <int kChannels>
  __device__ Patch At(const FusedSizes& sizes, uint32_t index) const {
    const uint32_t patch_index = slices.Divide(index);
    const int slice = static_cast<int>(index - patch_index * slices.value());
    const uint32_t row_index = across.Divide(patch_index);
    const uint32_t row = first_row + row_index;
    const uint32_t n = down.Divide(row);
    Patch patch;
    patch.n = static_cast<int>(n);
    patch.y = static_cast<int>(row - n * down.value()) * kPatchSide;
    patch.x = static_cast<int>(patch_index - row_index * across.value()) * kPatchSide;
    patch.first_pixel = patch.n * sizes.in_h * sizes.in_w;
    patch.channel = slice * kChannels;
    patch.tap_of_group = patch.channel / sizes.deform_group_channels * sizes.taps;
    const int group = patch.channel / sizes.group_in_channels;
    patch.filters_row = patch.channel - group * sizes.group_in_channels;
    patch.region_h = patch.y * sizes.stride_h - sizes.pad_top - margin_h;
    patch.region_w = patch.x * sizes.stride_w - sizes.pad_left - margin_w;
    return patch;
  }

  // Whether a patch's position exists and is worked on.
  __device__ __forceinline__ bool Includes(const FusedSizes& sizes,
                                           const Position& position) const {
    const int64_t ordinal = sizes.OrdinalOf(position);
    return position.y < sizes.out_h && position.x < sizes.out_w && ordinal >= begin &&
           ordinal < end;
  }
};

// This thread's number, read anew: what follows from it is not kept in registers meanwhile.
__device__ __forceinline__ int ReadThread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  __builtin_assume(thread >= 0);  // spares divisions their care for the sign
  return thread;
}

// --- Samples ---

// Writes the samples of all taps.
template <typename T>
__device__ void LocatePatch(const FusedSizes& sizes, const PatchGrid& grid,
                            const SampledTensors<T, float>& tensors, const Patch& patch,
                            PatchSample* samples) {
  const int per_position = static_cast<int>(sizes.taps_of_position.value());
  for (int i = threadIdx.x; i < kPatchPositions * sizes.taps; i += kThreadsPerBlock) {
    const int p = static_cast<int>(sizes.taps_of_group.Divide(i));
    const Position position = patch.At(p);
    PatchSample sample = {};
    if (grid.Includes(sizes, position)) {
      const Tap tap = Tap::Of(sizes, patch.tap_of_group + i - p * sizes.taps);
      const int64_t index = sizes.OrdinalOf(position) * per_position + tap.g_tap;
      const float2 offset = OffsetOf(tensors, index);
      const auto located = LocateSample<float, int32_t>(position.y * sizes.stride_h + tap.h_base,
                                                        position.x * sizes.stride_w + tap.w_base,
                                                        offset.x, offset.y, sizes.in_h, sizes.in_w);
      sample = {located.h_fraction, located.w_fraction, MaskOf(tensors, index),
                Place::Pack(located.h_low, located.w_low, located.corners)};
    }
    samples[i] = sample;
  }
}

// Writes the gradients that stand in place of the samples, or adds them where other slices of the
// deformable group have a share.
__device__ inline void StoreGradients(const FusedSizes& sizes, const PatchGrid& grid,
                                      const Patch& patch, const PatchSample* samples, bool add,
                                      const SampledGradients<float>& gradients) {
  const int per_position = static_cast<int>(sizes.taps_of_position.value());
  for (int i = threadIdx.x; i < kPatchPositions * sizes.taps; i += kThreadsPerBlock) {
    const int p = static_cast<int>(sizes.taps_of_group.Divide(i));
    const Position position = patch.At(p);
    if (!grid.Includes(sizes, position)) continue;
    const int64_t index =
        sizes.OrdinalOf(position) * per_position + patch.tap_of_group + (i - p * sizes.taps);
    const PatchSample sample = samples[i];
    if (gradients.offset != nullptr) {
      float2* to = reinterpret_cast<float2*>(gradients.offset) + index;
      const float2 gradient = make_float2(sample.h, sample.w);
      if (add) {
        atomicAdd(to, gradient);
      } else {
        *to = gradient;
      }
    }
    if (gradients.mask != nullptr) {
      if (add) {
        atomicAdd(gradients.mask + index, sample.mask);
      } else {
        gradients.mask[index] = sample.mask;
      }
    }
  }
}

// Sums up over the lanes of a row.
template <int kLanes>
__device__ __forceinline__ float SumOverLanes(float number) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(0xffffffffu, number, distance);
  }
  return number;
}

// Where in the input a sample's corners are.
struct PlacedCorners {
  int corners;     // as CornerReader wants it
  bool all_count;  // whether those of all the warp's samples do, as of most warps

  // By whole warps.
  __device__ __forceinline__ static PlacedCorners Of(const FusedSizes& sizes, const Patch& patch,
                                                     uint32_t packed) {
    const Place place = Place::Of(packed);
    const int top_left = patch.first_pixel + place.h * sizes.in_w + place.w;
    return {(top_left + sizes.in_w + 1) << kCornerBits | place.corners,
            __all_sync(0xffffffffu, place.corners == kAllCorners) != 0};
  }

  // Begins to load chunks j of each, `channel_bytes(j)` into their pixels; 0 where they do not
  // count.
  template <int kChunks, typename ChannelBytes>
  __device__ __forceinline__ void Load(const CornerReader& reader,
                                       const ChannelBytes& channel_bytes,
                                       uint4 (&chunks)[kChunks][kCorners]) const {
    if (all_count) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        reader.Load<true>(corners, channel_bytes(j), chunks[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        reader.Load<false>(corners, channel_bytes(j), chunks[j]);
      }
    }
  }
};

// --- Tiles ---

__device__ __forceinline__ void StoreChunk(uint32_t address, const uint4& chunk) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(chunk.x),
               "r"(chunk.y), "r"(chunk.z), "r"(chunk.w)
               : "memory");
}

__device__ __forceinline__ uint4 LoadChunk(uint32_t address) {
  uint4 chunk;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(address)
               : "memory");
  return chunk;
}

// In TF32 the rows of the columns' gradient are channels in this order: lanes that hold
// neighbouring vectors of channels read rows beside each other, which the swizzle keeps in
// different banks.
template <int kChannels>
__device__ constexpr int RowOfChannel(int channel) {
  return channel % kVector<float> * (kChannels / kVector<float>)+channel / kVector<float>;
}

// Keeps the compiler from moving what reads the sums to before the wait for them.
template <int kCount>
__device__ __forceinline__ void ReadAfterWait(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// --- The region ---

// Where the share of `pixel` in position p's sample is, in bytes.
template <typename T>
__device__ __forceinline__ uint32_t OffsetOfShare(int pixel, int p) {
  const int block = p / kBlockDepth<T>, chunk = p % kBlockDepth<T> / kVector<T>;
  return block * (kRegionPixels * kRowBytes) + SwizzledOffset(pixel, chunk) +
         p % kVector<T> * sizeof(T);
}

template <typename T>
__device__ __forceinline__ T RoundShare(float share) {
  if constexpr (std::is_same_v<T, float>) {
    return RoundToTf32(share);
  } else {
    return static_cast<T>(share);
  }
}

// Writes a tap's shares over those that this thread wrote last to the same buffer, at `old`;
// returns where they are: offsets in the buffer, kNoShare if there is none. Each thread does a
// corner of a position; those of one position are in one warp.
constexpr uint32_t kNoShare = 0xffff;
template <typename T>
__device__ __forceinline__ uint32_t UpdateShares(const Patch& patch, const PatchSample* samples,
                                                 int taps, int tap, uint32_t old, uint8_t* shares) {
  static_assert(kThreadsPerBlock == kPatchPositions * kCorners);
  static_assert(kRegionPixels * kPatchPositions * sizeof(T) <= kNoShare + 1);
  const int thread = ReadThread(), p = thread / kCorners, corner = thread % kCorners;
  const PatchSample* sample = samples + p * taps + tap;
  if (old != kNoShare) *reinterpret_cast<T*>(shares + old) = T(0.0f);
  __syncwarp();  // where one corner was, another may be now
  const int pixel = patch.PixelInRegion(Place::Of(sample->place), corner);
  if (pixel < 0) return kNoShare;
  float weights[kCorners], weight = 0;
  BilinearWeights(sample->h, sample->w, weights);
#pragma unroll
  for (int i = 0; i < kCorners; ++i) weight = i == corner ? weights[i] : weight;
  const uint32_t offset = OffsetOfShare<T>(pixel, p);
  *reinterpret_cast<T*>(shares + offset) = RoundShare<T>(sample->mask * weight);
  return offset;
}

// Begins sums [pixels, channels] += shares * grad_columns, or = with `add` false, for this
// warpgroup's pixels.
template <typename T, int kChannels>
__device__ __forceinline__ void MultiplyShares(int warpgroup, uint32_t shares,
                                               uint32_t grad_columns, bool add,
                                               float (&sums)[kRegionParts][kChannels / 2]) {
  constexpr RowsOf kRows = kRowsOfDepth<T>;
  constexpr int kSteps = kBlockDepth<T> / kStepDepth<T>;
  constexpr uint32_t kPartBytes = kWarpgroupRows * kRowBytes;
  const uint64_t a = FactorDescriptor(shares + warpgroup * kRegionParts * kPartBytes, 0);
  const uint64_t b = FactorDescriptor(grad_columns, 0);
  WarpgroupArrive();
#pragma unroll
  for (int part = 0; part < kRegionParts; ++part) {
#pragma unroll
    for (int block = 0; block < kPatchPositions / kBlockDepth<T>; ++block) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t a_bytes = part * kPartBytes + block * (kRegionPixels * kRowBytes) +
                                 step * StepBytes<T, RowsOf::kProduct>();
        const uint32_t b_bytes = block * (kChannels * kRowBytes) + step * StepBytes<T, kRows>();
        Multiply<T, kChannels, RowsOf::kProduct, kRows>::Run(sums[part], MoveDescriptor(a, a_bytes),
                                                             MoveDescriptor(b, b_bytes),
                                                             add || block > 0 || step > 0);
      }
    }
  }
  WarpgroupCommit();
}

__device__ __forceinline__ void AddVector(float* to, const float (&values)[4]) {
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
}

// Adds four neighbouring channels of the region to the gradient, unless nothing has been added to
// them, as is so at many pixels at the region's border.
__device__ __forceinline__ void AddUnlessZero(float* to, bool valid, const float (&values)[4]) {
  const bool zero = values[0] == 0 && values[1] == 0 && values[2] == 0 && values[3] == 0;
  if (valid && !zero) AddVector(to, values);
}

// Adds this warpgroup's pixels of the region to grad_input.
template <typename T, int kChannels>
__device__ void AddRegion(const FusedSizes& sizes, const Patch& patch, int warpgroup,
                          const float (&sums)[kRegionParts][kChannels / 2],
                          float* __restrict__ grad_input) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp, q = lane % 4;
#pragma unroll
  for (int part = 0; part < kRegionParts; ++part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int pixel =
          (warpgroup * kRegionParts + part) * kWarpgroupRows + 16 * warp + lane / 4 + 8 * j;
      const int h = patch.region_h + pixel / kRegionSide, w = patch.region_w + pixel % kRegionSide;
      const bool valid = h >= 0 && h < sizes.in_h && w >= 0 && w < sizes.in_w;
      float* to = grad_input +
                  ((int64_t{patch.n} * sizes.in_h + h) * sizes.in_w + w) * sizes.in_channels +
                  patch.channel;
      const auto& all = sums[part];
      if constexpr (sizeof(T) == 2) {
        // Lanes with even and odd q exchange halves of two vectors of 8 channels, so that either
        // has 4 channels side by side.
#pragma unroll
        for (int i = 0; i < kChannels / 8; i += 2) {
          const float* even = &all[4 * i + 2 * j];
          const float* odd = &all[4 * (i + 1) + 2 * j];
          const bool is_odd = q % 2 != 0;
          float received[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            received[k] = __shfl_xor_sync(0xffffffffu, is_odd ? even[k] : odd[k], 1);
          }
          const float values[4] = {is_odd ? received[0] : even[0], is_odd ? received[1] : even[1],
                                   is_odd ? odd[0] : received[0], is_odd ? odd[1] : received[1]};
          AddUnlessZero(to + 8 * (i + q % 2) + q / 2 * 4, valid, values);
        }
      } else {
        // By RowOfChannel(), a thread has 4 channels side by side.
        constexpr int kStride = kChannels / kVector<float> / 8;
#pragma unroll
        for (int i = 0; i < kStride; ++i) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float values[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) values[c] = all[4 * (i + c * kStride) + 2 * j + k];
            AddUnlessZero(to + (8 * i + 2 * q + k) * 4, valid, values);
          }
        }
      }
    }
  }
}

// --- Launching, on the host ---

// How far what a patch samples without offsets spans, with the lower neighbour of the last pixel.
inline int64_t SpanOfPatch(int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
  return (std::min<int64_t>(out, kPatchSide) - 1) * stride + (kernel - 1) * dilation + 2;
}
inline int64_t SpanH(const DeformConvParams& params) {
  return SpanOfPatch(params.out_h, params.stride_h, params.kernel_h, params.dilation_h);
}
inline int64_t SpanW(const DeformConvParams& params) {
  return SpanOfPatch(params.out_w, params.stride_w, params.kernel_w, params.dilation_w);
}

inline int64_t PatchesAlong(int64_t out) { return (out + kPatchSide - 1) / kPatchSide; }

// Channels of a slice: the most that no group's end cuts, and for which `bytes(number)` of shared
// memory exist; 0 if there is no such number.
template <typename Bytes>
int SliceChannels(const DeformConvParams& params, const Bytes& bytes) {
  const auto fits = [&](auto channels) {
    return params.group_in_channels() % channels == 0 &&
           params.deform_group_channels() % channels == 0 && bytes(channels) <= kMostSharedBytes;
  };
  if (fits(std::integral_constant<int, 64>())) return 64;
  if (fits(std::integral_constant<int, 32>())) return 32;
  return 0;
}

// Whether a kernel can go through the patches, in slices of so many channels.
inline bool PatchesFit(const DeformConvParams& params, bool want_input, int channels) {
  constexpr int64_t kMostBlocks = INT32_MAX;
  if (channels == 0 || !FitsInt32(params) || params.in_h > Place::kMostSize ||
      params.in_w > Place::kMostSize) {
    return false;
  }
  if (want_input && (SpanH(params) > kRegionSide || SpanW(params) > kRegionSide)) return false;
  const int64_t patches = params.batch * PatchesAlong(params.out_h) * PatchesAlong(params.out_w);
  return patches <= kMostBlocks / (params.in_channels / channels);
}

// The patches that positions [begin, end), of which there are some, lie in, and how many blocks
// they are.
inline PatchGrid GridOfPatches(const DeformConvParams& params, bool want_input, int channels,
                               int64_t begin, int64_t end, unsigned* blocks) {
  const int64_t slices = params.in_channels / channels;
  const int64_t across = PatchesAlong(params.out_w), down = PatchesAlong(params.out_h);
  const auto row_of = [&](int64_t position) {
    const int64_t n_y = position / params.out_w, n = n_y / params.out_h;
    return n * down + (n_y - n * params.out_h) / kPatchSide;
  };
  // The region reaches as far on one side as on the other: sizes are whole, offsets go both ways.
  const auto margin = [&](int64_t span) {
    return static_cast<int>(want_input ? (kRegionSide - span + 1) / 2 : 0);
  };
  PatchGrid grid;
  grid.slices = Divisor(static_cast<uint32_t>(slices));
  grid.across = Divisor(static_cast<uint32_t>(across));
  grid.down = Divisor(static_cast<uint32_t>(down));
  grid.first_row = static_cast<int>(row_of(begin));
  grid.begin = static_cast<int>(begin);
  grid.end = static_cast<int>(end);
  grid.margin_h = margin(SpanH(params));
  grid.margin_w = margin(SpanW(params));
  *blocks = static_cast<unsigned>((row_of(end - 1) - grid.first_row + 1) * across * slices);
  return grid;
}

// Zeroes the gradients of offset and mask at positions [begin, end), where they are wanted.
inline std::string ZeroSampleGradients(const DeformConvParams& params, int64_t begin, int64_t end,
                                       const SampledGradients<float>& gradients, void* stream) {
  const int64_t first = begin * params.mask_channels();
  const int64_t bytes = (end - begin) * params.mask_channels() * int64_t{sizeof(float)};
  std::string error;
  if (gradients.offset != nullptr) {
    error = ZeroCuda(gradients.offset + 2 * first, 2 * bytes, stream);
  }
  if (error.empty() && gradients.mask != nullptr) {
    error = ZeroCuda(gradients.mask + first, bytes, stream);
  }
  return error;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_PATCH_CUDA_CUH_
