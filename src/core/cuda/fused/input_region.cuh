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
  Divisor by_rows_of_image;

  // Where in a region there are two pixels of zeros, in bytes.
  __device__ __forceinline__ uint32_t zeros() const {
    return static_cast<uint32_t>(most_pixels) * pixel_bytes;
  }
};
constexpr int kZeroPixels = 2;

// A rectangle of pixels, with the pixels of zeros around an image that samples at its border reach.
// Rows are numbered across the batch: each image has a row of zeros above its own, which is also
// below the image before. So a region may have rows of several images.
struct InputRegion {
  int32_t first_row, rows, first_col, cols;

  // The region of the tile whose positions go from `first` to `last`, in columns [x, x + width).
  static __device__ __forceinline__ InputRegion Of(const FusedSizes& sizes,
                                                   const RegionLimits& limits,
                                                   const Position& first, const Position& last,
                                                   int32_t x, int32_t width) {
    const auto within = [](int32_t pixel, int32_t size) { return min(max(pixel, -1), size + 1); };
    const int32_t reach_h = (sizes.taps / sizes.kernel_w - 1) * sizes.dilation_h;
    const int32_t reach_w = (sizes.kernel_w - 1) * sizes.dilation_w;
    const int32_t top = first.y * sizes.stride_h - sizes.pad_top - limits.margin_h;
    const int32_t bottom = last.y * sizes.stride_h - sizes.pad_top + reach_h + limits.margin_h + 2;
    const int32_t left = x * sizes.stride_w - sizes.pad_left - limits.margin_w;
    const int32_t right =
        (x + width - 1) * sizes.stride_w - sizes.pad_left + reach_w + limits.margin_w + 2;
    InputRegion region;
    region.first_row = RowOf(sizes, first.n, within(top, sizes.in_h));
    region.rows = RowOf(sizes, last.n, within(bottom, sizes.in_h)) - region.first_row;
    region.first_col = within(left, sizes.in_w);
    region.cols = within(right, sizes.in_w) - region.first_col;
    if (region.cols > 0) region.rows = min(region.rows, limits.most_pixels / region.cols);
    return region;
  }

  // The row of an image's row, which may be that of zeros above or below it.
  static __device__ __forceinline__ int32_t RowOf(const FusedSizes& sizes, int32_t n, int32_t y) {
    return n * (sizes.in_h + 1) + y + 1;
  }

  // Whether the pixel and those beside and below it are in the region.
  __device__ __forceinline__ bool HoldsCorners(int32_t row, int32_t col) const {
    const auto below = [](int32_t number, int32_t end) {
      return static_cast<uint32_t>(number) < static_cast<uint32_t>(max(end, 0));
    };
    return below(row - first_row, rows - 1) && below(col - first_col, cols - 1);
  }

  // Where the pixel is, in bytes.
  __device__ __forceinline__ uint32_t PlaceOf(int32_t row, int32_t col, int32_t pixel_bytes) const {
    return ((row - first_row) * cols + col - first_col) * pixel_bytes;
  }
};

// Begins to copy some channels of the region's pixels, which in the input's first pixel begin at
// `first_pixel`. By `warps` warps, of which this is `warp`.
__device__ __forceinline__ void CopyRegion(const FusedSizes& sizes, const RegionLimits& limits,
                                           const InputRegion& region, const uint8_t* first_pixel,
                                           int64_t input_pixel_bytes, const Divisor& vec16s,
                                           uint32_t to, int warp, int warps) {
  const int lane = threadIdx.x % kWarp;
  for (int row = warp; row < region.rows; row += warps) {
    const int32_t batch_row = region.first_row + row;
    const int32_t n = limits.by_rows_of_image.Divide(batch_row);
    const int32_t y = batch_row - n * (sizes.in_h + 1) - 1;
    const uint8_t* from =
        first_pixel + (int64_t{n} * sizes.in_h + y) * sizes.in_w * input_pixel_bytes;
    const uint32_t to_row = to + row * region.cols * limits.pixel_bytes;
    for (int i = lane; i < region.cols * static_cast<int>(vec16s.value()); i += kWarp) {
      const int col = vec16s.Divide(i), vec16 = i - col * vec16s.value();
      const int x = region.first_col + col;
      CopyVec16Async(to_row + col * limits.pixel_bytes + vec16 * kVec16Bytes,
                     from + x * input_pixel_bytes + vec16 * kVec16Bytes,
                     y >= 0 && x >= 0 && x < sizes.in_w);
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_INPUT_REGION_CUH_
