// Patches of output positions, and the region of the input around each. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_PATCH_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_PATCH_CUH_

#include <algorithm>
#include <cstdint>

#include "core/bilinear.h"
#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/divisor.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/sm90/kernels.h"
#include "core/integer_math.h"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

constexpr int kPatchPositions = kPatchSide * kPatchSide;
constexpr int kRegionSide = 16;
constexpr int kRegionPixels = kRegionSide * kRegionSide;

// The top left corner of a sample, either coordinate of which may be -1, and the bits of the
// corners that count; packed into 32 bits, which are all 0 where no corner counts.
struct PackedCorner {
  static constexpr int kCoordinateBits = 14;
  static constexpr int64_t kMostSize = (1 << kCoordinateBits) - 1;

  int h, w, corner_bits;

  static __device__ __forceinline__ uint32_t Pack(int h, int w, int corner_bits) {
    return corner_bits == 0 ? 0u
                            : static_cast<uint32_t>(h + 1) << (kCornerBits + kCoordinateBits) |
                                  static_cast<uint32_t>(w + 1) << kCornerBits |
                                  static_cast<uint32_t>(corner_bits);
  }
  static __device__ __forceinline__ PackedCorner Unpack(uint32_t packed) {
    return {static_cast<int>(packed >> (kCornerBits + kCoordinateBits)) - 1,
            static_cast<int>(packed >> kCornerBits & kMostSize) - 1,
            static_cast<int>(packed & kAllCorners)};
  }
};

// A thread block's patch, slice of channels, and region.
struct Patch {
  int n, y, x;             // of the first position
  int first_pixel;         // the image's, in the batch
  int first_g_tap;         // of the deformable group, among the taps of a position
  int channel;             // the slice's first
  int channel_in_group;    // the slice's first, in its convolution group
  int region_h, region_w;  // the region's first pixel, which may lie outside of the image

  // Which of a sample's corners count and lie in the region.
  __device__ __forceinline__ int CornersInRegion(const PackedCorner& corner) const {
    const unsigned h = corner.h - region_h, w = corner.w - region_w;
    const int top = h < kRegionSide, bottom = h + 1 < kRegionSide;
    const int left = w < kRegionSide, right = w + 1 < kRegionSide;
    return corner.corner_bits & ((top & left) << kTopLeft | (top & right) << kTopRight |
                                 (bottom & left) << kBottomLeft | (bottom & right) << kBottomRight);
  }

  // Where in the region corner `index` of a sample is, or -1 if it does not count or is not there.
  __device__ __forceinline__ int PixelInRegion(const PackedCorner& corner, int index) const {
    const unsigned h = corner.h - region_h + (index >= kBottomLeft ? 1 : 0);
    const unsigned w = corner.w - region_w + (index & 1);
    const bool there = (corner.corner_bits >> index & 1) && h < kRegionSide && w < kRegionSide;
    return there ? static_cast<int>(h * kRegionSide + w) : -1;
  }

  // Whether all corners of a sample lie in the region, those that do not count among them.
  __device__ __forceinline__ bool RegionHoldsAll(const PackedCorner& corner) const {
    const unsigned h = corner.h - region_h, w = corner.w - region_w;
    return h < kRegionSide - 1 && w < kRegionSide - 1;
  }

  // Position p of the patch lies p / kPatchSide down and p % kPatchSide across.
  __device__ __forceinline__ Position At(int p) const {
    return {n, y + p / kPatchSide, x + p % kPatchSide};
  }
};

// Numbers the patches and their slices, and sets the region off from a patch.
struct PatchGrid {
  Divisor slices, across, down;  // slices of a patch, patches across and down an image
  int first_row;                 // of patches, numbered across all images
  int begin, end;                // the positions that are worked on
  int margin_h, margin_w;        // from the region's top and left to what the first tap samples

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
    patch.first_g_tap = patch.channel / sizes.deform_group_channels * sizes.taps;
    const int group = patch.channel / sizes.group_in_channels;
    patch.channel_in_group = patch.channel - group * sizes.group_in_channels;
    patch.region_h = patch.y * sizes.stride_h - sizes.pad_top - margin_h;
    patch.region_w = patch.x * sizes.stride_w - sizes.pad_left - margin_w;
    return patch;
  }

  // Whether a patch's position exists and is worked on.
  __device__ __forceinline__ bool Includes(const FusedSizes& sizes,
                                           const Position& position) const {
    const int64_t position_index = sizes.IndexOf(position);
    return position.y < sizes.out_h && position.x < sizes.out_w && position_index >= begin &&
           position_index < end;
  }
};

// --- On the host ---

// The pixels that a patch spans on one axis without offsets, with the pixel after the last.
inline int64_t SpanOfPatch(int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
  return (std::min<int64_t>(out, kPatchSide) - 1) * stride + (kernel - 1) * dilation + 2;
}
inline int64_t SpanH(const DeformConvParams& params) {
  return SpanOfPatch(params.out_h, params.stride_h, params.kernel_h, params.dilation_h);
}
inline int64_t SpanW(const DeformConvParams& params) {
  return SpanOfPatch(params.out_w, params.stride_w, params.kernel_w, params.dilation_w);
}

inline int64_t PatchesAlong(int64_t out) { return CeilDiv<int64_t>(out, kPatchSide); }

// The grid of the patches that hold positions [begin, end), which are not empty, and its number of
// thread blocks. With `want_input`, the region lies around what a patch samples.
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
    return static_cast<int>(want_input ? CeilDiv<int64_t>(kRegionSide - span, 2) : 0);
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

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_PATCH_CUH_
