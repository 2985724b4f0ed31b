#include <algorithm>

#include "core/deform_conv2d_fused_cuda.h"
#include "core/deform_im2col_cuda.h"
#include "core/fused_samples_cuda.cuh"

namespace deform_conv {
namespace {

using namespace cuda;  // the kernels' own names

// The gradients of input, offset and mask. A block of threads takes a patch of output positions and
// a slice of the input's channels, within one deformable and one convolution group. For each tap,
// tensor cores compute the columns' gradient
//
//   grad_columns [positions, channels] = grad_output [positions, out_channels] * filters^T,
//
// which stays in shared memory. From there it goes two ways. Its products with the samples' corners
// are the gradients of offset and mask. And nearly all that the input's gradient gets from it falls
// into a small region of the input around the patch, where it is a product too,
//
//   region [pixels, channels] += shares [pixels, positions] * grad_columns,
//
// with the mask times the weight of a corner at the pixel on which the corner of a position's
// sample lies. The region's sums stay in registers over all taps, so that memory sees one atomic
// addition for each pixel of the region, not one for each corner of each sample. Corners outside of
// the region are added one by one.

constexpr int kPatchSide = 8;
constexpr int kPatchPositions = kPatchSide * kPatchSide;
constexpr int kRegionSide = 16;
constexpr int kRegionPixels = kRegionSide * kRegionSide;
constexpr int kWarpgroups = kThreadsPerBlock / kWarpgroup;
// Blocks of 64 pixels of the region that a warpgroup sums up.
constexpr int kRegionParts = kRegionPixels / kWarpgroupRows / kWarpgroups;
constexpr int kRowsPerCopy = kThreadsPerBlock / kRowChunks;

static_assert(kPatchPositions == kWarpgroupRows);  // a product's rows are the patch's positions

// Into how many blocks of a factor the output channels of a convolution group are cut; the last may
// be filled up with zeros.
template <typename T, typename Int>
__host__ __device__ constexpr Int OutBlocks(Int group_out_channels) {
  return (group_out_channels + kBlockDepth<T> - 1) / kBlockDepth<T>;
}

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

// Where things are in a block's shared memory, in bytes. The tiles are blocks of 128-byte rows, see
// wgmma_cuda.cuh.
//
//   shares        pixels by positions; absent where the input's gradient is not wanted
//   grad_columns  positions by channels; in TF32, RowOfChannel() by positions
//   samples       [positions, taps]: PatchSample
//   grad_output   positions by output channels of the convolution group
//   filters       channels by output channels, of one tap
template <typename T, int kChannels, bool kInput>
struct SharedLayout {
  // What is at the same place whatever the sizes needs no registers.
  static constexpr int kGradColumns =
      kInput ? kRegionPixels * kPatchPositions * static_cast<int>(sizeof(T)) : 0;
  // 16-bit rows of positions are whole ones, also if the slice is narrower.
  static constexpr int kSamples =
      kGradColumns +
      kPatchPositions * (sizeof(T) == 2 ? kRowBytes : kChannels * static_cast<int>(sizeof(T)));

  // In the host's 64 bits, or a kernel's 32.
  template <typename Int>
  static __host__ __device__ constexpr Int GradOutput(Int taps) {
    return kSamples + taps * static_cast<Int>(kPatchPositions * sizeof(PatchSample));
  }
  template <typename Int>
  static __host__ __device__ constexpr Int Filters(Int taps, Int group_out_channels) {
    return GradOutput(taps) + OutBlocks<T>(group_out_channels) * Int{kPatchPositions * kRowBytes};
  }
  static int64_t Bytes(int64_t taps, int64_t group_out_channels) {
    return Filters(taps, group_out_channels) +
           OutBlocks<T>(group_out_channels) * int64_t{kChannels * kRowBytes};
  }
};

// A block's patch, slice and region.
struct Patch {
  int n, y, x;             // of the first position
  int first_pixel;         // the image's, in the batch
  int tap_of_group;        // the first of the deformable group, among those of a position
  int channel;             // the slice's first
  int filters_row;         // ... among those of its convolution group
  int out_channel;         // the convolution group's first
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

__device__ __forceinline__ bool IsInOutput(const FusedSizes& sizes, const Position& position) {
  return position.y < sizes.out_h && position.x < sizes.out_w;
}

// How the patches, and the slices of each, are numbered; and the region's place beside a patch.
struct PatchGrid {
  Divisor slices, across, down;  // slices of a patch, patches across and down an image
  int margin_h, margin_w;  // from the region's first row and column to what the first tap samples

  template <int kChannels>
  __device__ Patch At(const FusedSizes& sizes, uint32_t index) const {
    const uint32_t patch_index = slices.Divide(index);
    const int slice = static_cast<int>(index - patch_index * slices.value());
    const uint32_t row = across.Divide(patch_index);
    const uint32_t n = down.Divide(row);
    Patch patch;
    patch.n = static_cast<int>(n);
    patch.y = static_cast<int>(row - n * down.value()) * kPatchSide;
    patch.x = static_cast<int>(patch_index - row * across.value()) * kPatchSide;
    patch.first_pixel = patch.n * sizes.in_h * sizes.in_w;
    patch.channel = slice * kChannels;
    patch.tap_of_group = patch.channel / sizes.deform_group_channels * sizes.taps;
    const int group = patch.channel / sizes.group_in_channels;
    patch.filters_row = patch.channel - group * sizes.group_in_channels;
    patch.out_channel = group * sizes.group_out_channels;
    patch.region_h = patch.y * sizes.stride_h - sizes.pad_top - margin_h;
    patch.region_w = patch.x * sizes.stride_w - sizes.pad_left - margin_w;
    return patch;
  }
};

// --- Filling shared memory ---

// This thread's number, read anew: what follows from it is not kept in registers meanwhile.
__device__ __forceinline__ int ReadThread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

// Writes the samples of all taps.
template <typename T>
__device__ void LocatePatch(const FusedSizes& sizes, const SampledTensors<T, float>& tensors,
                            const Patch& patch, PatchSample* samples) {
  const int per_position = static_cast<int>(sizes.taps_of_position.value());
  for (int i = threadIdx.x; i < kPatchPositions * sizes.taps; i += kThreadsPerBlock) {
    const int p = static_cast<int>(sizes.taps_of_group.Divide(i));
    const Position position = patch.At(p);
    PatchSample sample = {};
    if (IsInOutput(sizes, position)) {
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

__device__ __forceinline__ uint4 LoadChunk(uint32_t address) {
  uint4 chunk;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "r"(address)
               : "memory");
  return chunk;
}

// Calls f(row, block, offset) for each chunk of a tile of kRows rows that is this thread's, with
// its offset in bytes.
template <int kRows, typename F>
__device__ __forceinline__ void ForMyChunks(int blocks, const F& f) {
  static_assert(kRows % kRowsPerCopy == 0 && kRowsPerCopy % kSwizzledRows == 0);
  const int thread = ReadThread();
  const int first_row = thread / kRowChunks;
  const uint32_t first_offset = SwizzledOffset(first_row, thread % kRowChunks);
#pragma unroll
  for (int row = 0; row < kRows; row += kRowsPerCopy) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      f(first_row + row, block, first_offset + (block * kRows + row) * kRowBytes);
    }
  }
}

// Begins to copy the patch's part of grad_output, [positions, output channels of the group].
template <typename T>
__device__ void CopyGradOutput(const FusedSizes& sizes, const Patch& patch,
                               const T* __restrict__ grad_output, uint32_t to) {
  const int blocks = OutBlocks<T>(sizes.group_out_channels);
  const int column = ReadThread() % kRowChunks * kVector<T>;
  ForMyChunks<kPatchPositions>(blocks, [&](int p, int block, uint32_t offset) {
    const Position position = patch.At(p);
    const int o = block * kBlockDepth<T> + column;
    const bool valid = IsInOutput(sizes, position) && o < sizes.group_out_channels;
    const int64_t at = sizes.OrdinalOf(position) * sizes.out_channels + patch.out_channel + o;
    CopyChunkAsync(to + offset, valid ? grad_output + at : grad_output, valid);
  });
}

// Begins to copy the slice's part of a tap's filters, [channels, output channels of the group].
template <typename T, int kChannels>
__device__ __forceinline__ void CopyFilters(const FusedSizes& sizes, const Patch& patch, int tap,
                                            const T* __restrict__ filters, uint32_t to) {
  const int blocks = OutBlocks<T>(sizes.group_out_channels);
  const int column = ReadThread() % kRowChunks * kVector<T>;
  const int first_row = tap * sizes.group_in_channels + patch.filters_row;
  const T* first = filters + int64_t{first_row} * sizes.out_channels + patch.out_channel + column;
  ForMyChunks<kChannels>(blocks, [&](int row, int block, uint32_t offset) {
    const int o = block * kBlockDepth<T>;
    CopyChunkAsync(to + offset, first + int64_t{row} * sizes.out_channels + o,
                   o + column < sizes.group_out_channels);
  });
}

// Rounds what this thread has copied into a tile as the tensor cores want it.
template <typename T, int kRows>
__device__ __forceinline__ void RoundMyChunks(const FusedSizes& sizes, uint32_t tile) {
  if constexpr (std::is_same_v<T, float>) {
    const int blocks = OutBlocks<T>(sizes.group_out_channels);
    ForMyChunks<kRows>(blocks, [&](int, int, uint32_t offset) {
      const uint4 chunk = LoadChunk(tile + offset);
      const auto round = [](uint32_t bits) {
        return __float_as_uint(RoundToTf32(__uint_as_float(bits)));
      };
      StoreChunk(tile + offset,
                 make_uint4(round(chunk.x), round(chunk.y), round(chunk.z), round(chunk.w)));
    });
  }
}

// --- The columns' gradient ---

// In TF32 the rows of the columns' gradient are channels in this order: lanes that hold
// neighbouring vectors of channels read rows beside each other, which the swizzle keeps in
// different banks.
template <int kChannels>
__device__ constexpr int RowOfChannel(int channel) {
  return channel % kVector<float> * (kChannels / kVector<float>)+channel / kVector<float>;
}

// Where the gradient of a channel at position p is, in TF32.
template <int kChannels, typename Byte>
__device__ __forceinline__ auto* GradColumnAt(Byte* grad_columns, int channel, int p) {
  using Element = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  constexpr int kDepth = kBlockDepth<float>, kSize = kVector<float>;
  return reinterpret_cast<Element*>(
             grad_columns + p / kDepth * (kChannels * kRowBytes) +
             SwizzledOffset(RowOfChannel<kChannels>(channel), p % kDepth / kSize)) +
         p % kSize;
}

// Keeps the compiler from moving what reads the sums to before the wait for them.
template <int kCount>
__device__ __forceinline__ void ReadAfterWait(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Begins sums [positions, channels] = grad_output * filters^T, for this warpgroup's share of the
// slice's channels.
template <typename T, int kChannels>
__device__ __forceinline__ void MultiplyFilters(const FusedSizes& sizes, int warpgroup,
                                                uint32_t grad_output, uint32_t filters,
                                                float (&sums)[kChannels / kWarpgroups / 2]) {
  constexpr int kCols = kChannels / kWarpgroups;
  constexpr uint32_t kStepBytes = StepBytes<T, RowsOf::kProduct>();
  uint32_t a = grad_output, b = filters + warpgroup * kCols * kRowBytes;
#pragma unroll 1
  for (int block = 0; block < OutBlocks<T>(sizes.group_out_channels); ++block) {
    WarpgroupArrive();
#pragma unroll
    for (int step = 0; step < kBlockDepth<T> / kStepDepth<T>; ++step) {
      Multiply<T, kCols, RowsOf::kProduct, RowsOf::kProduct>::Run(
          sums, FactorDescriptor(a + step * kStepBytes, 0),
          FactorDescriptor(b + step * kStepBytes, 0), block > 0 || step > 0);
    }
    a += kPatchPositions * kRowBytes;
    b += kChannels * kRowBytes;
  }
  WarpgroupCommit();
}

// Writes this warpgroup's share of the columns' gradient to shared memory.
template <typename T, int kChannels>
__device__ __forceinline__ void StoreGradColumns(int warpgroup,
                                                 const float (&sums)[kChannels / kWarpgroups / 2],
                                                 uint8_t* grad_columns) {
  constexpr int kCols = kChannels / kWarpgroups;
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int p = 16 * warp + lane / 4 + 8 * j;
    if constexpr (sizeof(T) == 2) {
      constexpr int kChunks = kCols / kVector<T>;
      const uint32_t first =
          SwizzledOffset(p, warpgroup * kChunks) + lane % 4 * sizeof(Vector<T, 2>);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        // As SwizzledOffset(p, warpgroup * kChunks + i), since kChunks is a power of 2.
        Store(reinterpret_cast<T*>(grad_columns + (first ^ i * kChunkBytes)),
              {sums[4 * i + 2 * j], sums[4 * i + 2 * j + 1]});
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCols / 8; ++i) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int channel = warpgroup * kCols + 8 * i + lane % 4 * 2 + k;
          *GradColumnAt<kChannels>(grad_columns, channel, p) = RoundToTf32(sums[4 * i + 2 * j + k]);
        }
      }
    }
  }
}

// Position p's gradients of the lane's vector of channels.
template <typename T, int kChannels>
__device__ __forceinline__ void LoadGradColumns(const uint8_t* grad_columns, int p, int lane,
                                                float (&grads)[kVector<T>]) {
  if constexpr (sizeof(T) == 2) {
    const auto vector =
        Load<T, kVector<T>>(reinterpret_cast<const T*>(grad_columns + SwizzledOffset(p, lane)));
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) grads[i] = static_cast<float>(vector.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      grads[i] = *GradColumnAt<kChannels>(grad_columns, lane * kVector<T> + i, p);
    }
  }
}

// --- The region ---

// The share of `pixel` in position p's sample.
template <typename T>
__device__ __forceinline__ T* ShareAt(uint8_t* shares, int pixel, int p) {
  const int block = p / kBlockDepth<T>, chunk = p % kBlockDepth<T> / kVector<T>;
  return reinterpret_cast<T*>(shares + block * (kRegionPixels * kRowBytes) +
                              SwizzledOffset(pixel, chunk)) +
         p % kVector<T>;
}

template <typename T>
__device__ __forceinline__ T RoundShare(float share) {
  if constexpr (std::is_same_v<T, float>) {
    return RoundToTf32(share);
  } else {
    return static_cast<T>(share);
  }
}

// Writes a tap's shares over those of the tap before. Each thread does a corner of a position;
// those of one position are in one warp. `samples` is [positions, taps].
template <typename T>
__device__ __forceinline__ void UpdateShares(const Patch& patch, const PatchSample* samples,
                                             int taps, int tap, uint8_t* shares) {
  static_assert(kThreadsPerBlock == kPatchPositions * kCorners);
  const int p = threadIdx.x / kCorners, corner = threadIdx.x % kCorners;
  const PatchSample* sample = samples + p * taps + tap;
  if (tap > 0) {
    const int pixel = patch.PixelInRegion(Place::Of(sample[-1].place), corner);
    if (pixel >= 0) *ShareAt<T>(shares, pixel, p) = T(0.0f);
  }
  __syncwarp();  // where one corner was, another may be now
  const int pixel = patch.PixelInRegion(Place::Of(sample->place), corner);
  if (pixel < 0) return;
  float weights[kCorners], weight = 0;
  BilinearWeights(sample->h, sample->w, weights);
#pragma unroll
  for (int i = 0; i < kCorners; ++i) weight = i == corner ? weights[i] : weight;
  *ShareAt<T>(shares, pixel, p) = RoundShare<T>(sample->mask * weight);
}

// Begins sums [pixels, channels] += shares * grad_columns, for this warpgroup's pixels.
template <typename T, int kChannels>
__device__ __forceinline__ void MultiplyShares(int warpgroup, uint32_t shares,
                                               uint32_t grad_columns,
                                               float (&sums)[kRegionParts][kChannels / 2]) {
  constexpr RowsOf kRows = sizeof(T) == 2 ? RowsOf::kDepth : RowsOf::kProduct;
  constexpr int kSteps = kBlockDepth<T> / kStepDepth<T>;
  WarpgroupArrive();
#pragma unroll
  for (int part = 0; part < kRegionParts; ++part) {
    const uint32_t pixels =
        shares + (warpgroup * kRegionParts + part) * (kWarpgroupRows * kRowBytes);
#pragma unroll
    for (int block = 0; block < kPatchPositions / kBlockDepth<T>; ++block) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t a =
            pixels + block * (kRegionPixels * kRowBytes) + step * StepBytes<T, RowsOf::kProduct>();
        const uint32_t b =
            grad_columns + block * (kChannels * kRowBytes) + step * StepBytes<T, kRows>();
        Multiply<T, kChannels, RowsOf::kProduct, kRows>::Run(sums[part], FactorDescriptor(a, 0),
                                                             FactorDescriptor(b, 0), true);
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

// --- Corners ---

// How a warp works on samples: rows of lanes, each row on one sample, its lanes side by side on
// vectors of channels.
template <typename T, int kChannels>
struct SampleLanes {
  static constexpr int kLanes = kChannels / kVector<T>;
  static constexpr int kRows = kWarp / kLanes;
  static constexpr int kPerWarp = kPatchPositions / (kThreadsPerBlock / kWarp);
  static constexpr int kPasses = kPerWarp / kRows;
  static_assert(kPasses * kRows == kPerWarp);

  // The position whose sample this thread works on.
  static __device__ __forceinline__ int Position(int pass) {
    return threadIdx.x / kWarp * kPerWarp + pass * kRows + threadIdx.x % kWarp / kLanes;
  }
  static __device__ __forceinline__ int Lane() { return ReadThread() % kLanes; }
};

// Begins to load the corners of a sample, 0 where they do not count. By whole warps.
__device__ __forceinline__ void LoadCorners(const FusedSizes& sizes, const CornerReader& reader,
                                            const Patch& patch, uint32_t packed,
                                            uint4 (&chunks)[kCorners]) {
  const Place place = Place::Of(packed);
  const int top_left = patch.first_pixel + place.h * sizes.in_w + place.w;
  const int corners = (top_left + sizes.in_w + 1) << kCornerBits | place.corners;
  // Most warps have no sample at the border.
  if (__all_sync(0xffffffffu, place.corners == kAllCorners)) {
    reader.Load<true>(corners, 0, chunks);
  } else {
    reader.Load<false>(corners, 0, chunks);
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

// Replaces a sample by its gradients, from the columns' gradient and its corners. By whole warps.
template <typename T, int kChannels>
__device__ __forceinline__ void ReplaceByGradients(const uint4 (&chunks)[kCorners],
                                                   const uint8_t* grad_columns, int p,
                                                   bool want_mask, PatchSample* slot) {
  using Rows = SampleLanes<T, kChannels>;
  const PatchSample sample = *slot;
  float grads[kVector<T>];
  LoadGradColumns<T, kChannels>(grad_columns, p, Rows::Lane(), grads);
  float products[kCorners] = {};
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    const auto& values = reinterpret_cast<const Vector<T, kVector<T>>&>(chunks[corner]);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      products[corner] += grads[i] * static_cast<float>(values.elements[i]);
    }
  }
  const float grad_h = SumOverLanes<Rows::kLanes>(BilinearDerivativeH(sample.w, products));
  const float grad_w = SumOverLanes<Rows::kLanes>(BilinearDerivativeW(sample.h, products));
  float grad_mask = 0;
  if (want_mask) {
    float weights[kCorners];
    BilinearWeights(sample.h, sample.w, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      grad_mask += weights[corner] * products[corner];
    }
    grad_mask = SumOverLanes<Rows::kLanes>(grad_mask);
  }
  __syncwarp();  // all lanes of the row have read the sample
  if (Rows::Lane() != 0) return;
  // Where no corner counts every gradient is 0, also beside an infinite mask.
  const bool counts = sample.place != 0;
  slot->h = counts ? sample.mask * grad_h : 0.0f;
  slot->w = counts ? sample.mask * grad_w : 0.0f;
  slot->mask = counts ? grad_mask : 0.0f;
}

// Adds what corners outside of the region get to grad_input.
template <typename T, int kChannels>
__device__ __forceinline__ void AddOutside(const FusedSizes& sizes, const Patch& patch,
                                           const PatchSample* sample, const uint8_t* grad_columns,
                                           int p, float* __restrict__ grad_input) {
  const Place place = Place::Of(sample->place);
  if (patch.RegionHoldsAll(place)) return;
  using Rows = SampleLanes<T, kChannels>;
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
    float grads[kVector<T>];
    LoadGradColumns<T, kChannels>(grad_columns, p, Rows::Lane(), grads);
    const int64_t pixel = top_left + (corner >= kBottomLeft ? sizes.in_w : 0) + (corner & 1);
    float* to = grad_input + pixel * sizes.in_channels + patch.channel + Rows::Lane() * kVector<T>;
#pragma unroll
    for (int i = 0; i < kVector<T>; i += 4) {
      const float values[4] = {share * grads[i], share * grads[i + 1], share * grads[i + 2],
                               share * grads[i + 3]};
      AddVector(to + i, values);
    }
  }
}

// Writes the gradients that stand in place of the samples, or adds them where other slices of the
// deformable group have a share.
__device__ void StoreGradients(const FusedSizes& sizes, const Patch& patch,
                               const PatchSample* samples, bool add,
                               const SampledGradients<float>& gradients) {
  const int per_position = static_cast<int>(sizes.taps_of_position.value());
  for (int i = threadIdx.x; i < kPatchPositions * sizes.taps; i += kThreadsPerBlock) {
    const int p = static_cast<int>(sizes.taps_of_group.Divide(i));
    const Position position = patch.At(p);
    if (!IsInOutput(sizes, position)) continue;
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

// Registers are bounded so that as many blocks run side by side as shared memory holds for common
// numbers of output channels.
template <typename T, int kChannels>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 2 || kChannels == 32 ? 2 : 1;

// kInput tells whether the input's gradient is wanted, `add` whether the samples' gradients are
// added instead of written.
template <typename T, int kChannels, bool kInput>
__global__ void __launch_bounds__(kThreadsPerBlock, (kBlocksPerMultiprocessor<T, kChannels>))
    FusedBackpropSamplesKernel(
        const __grid_constant__ FusedSizes sizes, const __grid_constant__ PatchGrid grid,
        SampledTensors<T, float> tensors,
        const T* __restrict__ filters,      // [taps, group_in_channels, out_channels]
        const T* __restrict__ grad_output,  // [positions, out_channels]
        bool add, SampledGradients<float> gradients) {
  extern __shared__ __align__(kBlockAlignment) uint8_t shares[];
  using Layout = SharedLayout<T, kChannels, kInput>;
  uint8_t* grad_columns = shares + Layout::kGradColumns;
  PatchSample* samples = reinterpret_cast<PatchSample*>(shares + Layout::kSamples);
  const uint32_t shared = SharedAddress(shares);
  const uint32_t grad_output_tile = shared + Layout::GradOutput(sizes.taps);
  const uint32_t filters_tile = shared + Layout::Filters(sizes.taps, sizes.group_out_channels);
  const Patch patch = grid.At<kChannels>(sizes, blockIdx.x);
  const int warpgroup = WarpgroupIndex();

  CopyGradOutput(sizes, patch, grad_output, grad_output_tile);
  CopyFilters<T, kChannels>(sizes, patch, 0, filters, filters_tile);
  CommitCopies();
  if (kInput) {
    for (int i = threadIdx.x * kChunkBytes; i < Layout::kGradColumns;
         i += kThreadsPerBlock * kChunkBytes) {
      StoreChunk(shared + i, make_uint4(0, 0, 0, 0));
    }
  }
  LocatePatch(sizes, tensors, patch, samples);
  WaitForCopies<0>();
  RoundMyChunks<T, kPatchPositions>(sizes, grad_output_tile);
  RoundMyChunks<T, kChannels>(sizes, filters_tile);
  FenceForTensorCores();
  __syncthreads();

  using Rows = SampleLanes<T, kChannels>;
  // Counts from this thread's channels.
  const CornerReader reader(sizes, tensors.input + patch.channel + Rows::Lane() * kVector<T>);
  const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
  const bool want_mask = gradients.mask != nullptr;
  float region[kRegionParts][kChannels / 2] = {};

#pragma unroll 1
  for (int tap = 0; tap < sizes.taps; ++tap) {
    {
      float sums[kChannels / kWarpgroups / 2];
      MultiplyFilters<T, kChannels>(sizes, warpgroup, grad_output_tile, filters_tile, sums);
      if (kInput) UpdateShares<T>(patch, samples, sizes.taps, tap, shares);
      WarpgroupWait<0>();
      ReadAfterWait(sums);
      StoreGradColumns<T, kChannels>(warpgroup, sums, grad_columns);
    }
    FenceForTensorCores();
    // The first corners are on their way while the block waits for the columns' gradient; not
    // before the fence, which would wait for them.
    uint4 chunks[kCorners];
    if (want_products) {
      LoadCorners(sizes, reader, patch, samples[Rows::Position(0) * sizes.taps + tap].place,
                  chunks);
    }
    __syncthreads();

    // The filters have been read; the next tap's come while the rest is done.
    if (tap + 1 < sizes.taps) {
      CopyFilters<T, kChannels>(sizes, patch, tap + 1, filters, filters_tile);
    }
    CommitCopies();
    if (kInput) {
      MultiplyShares<T, kChannels>(warpgroup, shared, shared + Layout::kGradColumns, region);
    }
#pragma unroll 1
    for (int pass = 0; pass < Rows::kPasses; ++pass) {
      const int p = Rows::Position(pass);
      PatchSample* sample = samples + p * sizes.taps + tap;
      if (kInput) {
        AddOutside<T, kChannels>(sizes, patch, sample, grad_columns, p, gradients.input);
        __syncwarp();
      }
      if (!want_products) continue;
      ReplaceByGradients<T, kChannels>(chunks, grad_columns, p, want_mask, sample);
      if (pass + 1 < Rows::kPasses) {
        const PatchSample* next = samples + Rows::Position(pass + 1) * sizes.taps + tap;
        LoadCorners(sizes, reader, patch, next->place, chunks);
      }
    }
    __syncwarp();

    WaitForCopies<0>();
    if (tap + 1 < sizes.taps) RoundMyChunks<T, kChannels>(sizes, filters_tile);
    FenceForTensorCores();
    if (kInput) WarpgroupWait<0>();
    __syncthreads();
  }

  if (kInput) {
#pragma unroll
    for (int part = 0; part < kRegionParts; ++part) ReadAfterWait(region[part]);
    AddRegion<T, kChannels>(sizes, patch, warpgroup, region, gradients.input);
  }
  if (want_products) StoreGradients(sizes, patch, samples, add, gradients);
}

// --- Launching ---

// How far what a patch samples without offsets spans, with the lower neighbour of the last pixel.
int64_t Span(int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
  return (std::min<int64_t>(out, kPatchSide) - 1) * stride + (kernel - 1) * dilation + 2;
}
int64_t SpanH(const DeformConvParams& params) {
  return Span(params.out_h, params.stride_h, params.kernel_h, params.dilation_h);
}
int64_t SpanW(const DeformConvParams& params) {
  return Span(params.out_w, params.stride_w, params.kernel_w, params.dilation_w);
}

int64_t PatchesAlong(int64_t out) { return (out + kPatchSide - 1) / kPatchSide; }

// Channels of a slice: the most that no group's end cuts, and that shared memory holds; 0 if there
// is no such number.
template <typename T>
int SliceChannels(const DeformConvParams& params, bool want_input) {
  using Element = CudaType<T>;
  const auto fits = [&](int64_t channels, auto bytes) {
    return params.group_in_channels() % channels == 0 &&
           params.deform_group_channels() % channels == 0 &&
           bytes(params.taps(), params.group_out_channels()) <= kMostSharedBytes;
  };
  if (fits(64, want_input ? SharedLayout<Element, 64, true>::Bytes
                          : SharedLayout<Element, 64, false>::Bytes)) {
    return 64;
  }
  if (fits(32, want_input ? SharedLayout<Element, 32, true>::Bytes
                          : SharedLayout<Element, 32, false>::Bytes)) {
    return 32;
  }
  return 0;
}

template <typename T, int kChannels, bool kInput>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   const T* filters, const T* grad_output,
                   const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  const int64_t slices = params.in_channels / kChannels;
  const int64_t across = PatchesAlong(params.out_w), down = PatchesAlong(params.out_h);
  PatchGrid grid;
  grid.slices = Divisor(static_cast<uint32_t>(slices));
  grid.across = Divisor(static_cast<uint32_t>(across));
  grid.down = Divisor(static_cast<uint32_t>(down));
  // The region reaches as far on one side as on the other: sizes are whole, offsets go both ways.
  const auto margin = [](int64_t span) {
    return static_cast<int>(kInput ? (kRegionSide - span + 1) / 2 : 0);
  };
  grid.margin_h = margin(SpanH(params));
  grid.margin_w = margin(SpanW(params));

  const bool add = params.deform_group_channels() > kChannels;
  if (add) {
    const int64_t samples = params.out_positions() * params.mask_channels();
    const int64_t bytes = samples * static_cast<int64_t>(sizeof(float));
    std::string error;
    if (gradients.offset != nullptr) error = ZeroCuda(gradients.offset, 2 * bytes, stream);
    if (error.empty() && gradients.mask != nullptr) error = ZeroCuda(gradients.mask, bytes, stream);
    if (!error.empty()) return error;
  }

  const auto kernel = FusedBackpropSamplesKernel<Element, kChannels, kInput>;
  const int bytes = static_cast<int>(
      SharedLayout<Element, kChannels, kInput>::Bytes(params.taps(), params.group_out_channels()));
  const std::string error = AllowSharedBytes(kernel, bytes);
  if (!error.empty()) return error;
  kernel<<<static_cast<unsigned>(params.batch * down * across * slices), kThreadsPerBlock, bytes,
           StreamOf(stream)>>>(FusedSizes(params), grid, NativeTensors<T>(tensors), Native(filters),
                               Native(grad_output), add, gradients);
  return LaunchError("FusedBackpropSamplesKernel");
}

}  // namespace

template <typename T>
bool FusedBackpropSamplesFits(const DeformConvParams& params,
                              const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                              const T* grad_output,
                              const SampledGradients<ComputeType<T>>& gradients) {
  constexpr int64_t kMostBlocks = INT32_MAX;
  const bool want_input = gradients.input != nullptr;
  if (!FitsInt32(params) || !CanVectorize<T>(params) ||
      params.group_out_channels() % kVector<CudaType<T>> != 0 || params.in_h > Place::kMostSize ||
      params.in_w > Place::kMostSize) {
    return false;
  }
  if (want_input && (SpanH(params) > kRegionSide || SpanW(params) > kRegionSide)) return false;
  const int channels = SliceChannels<T>(params, want_input);
  if (channels == 0) return false;
  const int64_t patches = params.batch * PatchesAlong(params.out_h) * PatchesAlong(params.out_w);
  return patches <= kMostBlocks / (params.in_channels / channels) && Aligned(tensors.input) &&
         Aligned(tensors.offset) && Aligned(filters) && Aligned(grad_output) &&
         Aligned(gradients.input) && Aligned(gradients.offset);
}

template <typename T>
std::string FusedBackpropSamplesCuda(const DeformConvParams& params,
                                     const SampledTensors<T, ComputeType<T>>& tensors,
                                     const T* filters, const T* grad_output, CudaDevice& device,
                                     const SampledGradients<ComputeType<T>>& gradients) {
  if (params.out_positions() == 0 || !gradients.any()) return "";
  const bool want_input = gradients.input != nullptr;
  const bool wide = SliceChannels<T>(params, want_input) == 64;
  const auto launch = want_input ? (wide ? Launch<T, 64, true> : Launch<T, 32, true>)
                                 : (wide ? Launch<T, 64, false> : Launch<T, 32, false>);
  return launch(params, tensors, filters, grad_output, gradients, device.stream());
}

#define DEFORM_CONV_INSTANTIATE(T)                                                              \
  template bool FusedBackpropSamplesFits<T>(const DeformConvParams&,                            \
                                            const SampledTensors<T, ComputeType<T>>&, const T*, \
                                            const T*, const SampledGradients<ComputeType<T>>&); \
  template std::string FusedBackpropSamplesCuda<T>(                                             \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*,    \
      CudaDevice&, const SampledGradients<ComputeType<T>>&);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
