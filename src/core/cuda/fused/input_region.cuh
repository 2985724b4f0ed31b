// The part of the input that a tile of output positions samples, staged in shared memory. For .cu
// files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_INPUT_REGION_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_INPUT_REGION_CUH_

#include <algorithm>
#include <cstdint>

#include "core/cuda/fused/divisor.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/copy_async.cuh"
#include "core/cuda/types.cuh"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// What the host decides about regions.
struct RegionLimits {
  // How far a region reaches beyond what its tile samples without offsets, in pixels.
  int32_t margin_h, margin_w;
  int32_t most_pixels;  // 0: there are no regions
  int32_t pixel_bytes;  // of a pixel in the region
};

// A rectangle of pixels. Rows are numbered across the batch, as they lie in memory, so a region may
// have rows of several images.
struct InputRegion {
  int32_t first_row, rows, first_col, cols;

  // The region of the tile whose positions go from `first` to `last`, in columns [x, x + width).
  static __device__ __forceinline__ InputRegion Of(const FusedSizes& sizes,
                                                   const RegionLimits& limits,
                                                   const Position& first, const Position& last,
                                                   int32_t x, int32_t width) {
    const auto within = [](int32_t pixel, int32_t size) { return min(max(pixel, 0), size); };
    const int32_t reach_h = (sizes.taps / sizes.kernel_w - 1) * sizes.dilation_h;
    const int32_t reach_w = (sizes.kernel_w - 1) * sizes.dilation_w;
    const int32_t top = first.y * sizes.stride_h - sizes.pad_top - limits.margin_h;
    const int32_t bottom = last.y * sizes.stride_h - sizes.pad_top + reach_h + limits.margin_h + 2;
    const int32_t left = x * sizes.stride_w - sizes.pad_left - limits.margin_w;
    const int32_t right =
        (x + width - 1) * sizes.stride_w - sizes.pad_left + reach_w + limits.margin_w + 2;
    InputRegion region;
    region.first_row = first.n * sizes.in_h + within(top, sizes.in_h);
    region.rows = last.n * sizes.in_h + within(bottom, sizes.in_h) - region.first_row;
    region.first_col = within(left, sizes.in_w);
    region.cols = within(right, sizes.in_w) - region.first_col;
    if (region.cols > 0) region.rows = min(region.rows, limits.most_pixels / region.cols);
    // Room for the four corners of a sample.
    if (region.rows < min(sizes.in_h, 2) || region.cols < min(sizes.in_w, 2)) region = {0, 0, 0, 0};
    return region;
  }

  // Whether the pixel and those beside and below it, where the image has any, are in the region.
  __device__ __forceinline__ bool HoldsCorners(const FusedSizes& sizes, int32_t row,
                                               int32_t col) const {
    return row >= first_row && row + (sizes.in_h > 1) < first_row + rows && col >= first_col &&
           col + (sizes.in_w > 1) < first_col + cols;
  }
};

// Begins to copy some channels of the region's pixels, which in the input's first pixel begin at
// `first_pixel`. By `warps` warps, of which this is `warp`.
__device__ __forceinline__ void CopyRegion(const FusedSizes& sizes, const InputRegion& region,
                                           const uint8_t* first_pixel, int64_t input_pixel_bytes,
                                           const Divisor& vec16s, int32_t pixel_bytes, uint32_t to,
                                           int warp, int warps) {
  const int lane = threadIdx.x % kWarp;
  for (int row = warp; row < region.rows; row += warps) {
    const uint8_t* from =
        first_pixel +
        (int64_t{region.first_row + row} * sizes.in_w + region.first_col) * input_pixel_bytes;
    const uint32_t to_row = to + row * region.cols * pixel_bytes;
    for (int i = lane; i < region.cols * static_cast<int>(vec16s.value()); i += kWarp) {
      const int col = vec16s.Divide(i), vec16 = i - col * vec16s.value();
      CopyVec16Async(to_row + col * pixel_bytes + vec16 * kVec16Bytes,
                     from + col * input_pixel_bytes + vec16 * kVec16Bytes, true);
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_INPUT_REGION_CUH_
