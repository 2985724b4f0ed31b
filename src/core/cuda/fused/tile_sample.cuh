// Samples as the implicit GEMM kernels keep them. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_TILE_SAMPLE_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_TILE_SAMPLE_CUH_

#include <cstdint>

#include "core/bilinear.h"
#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/input_region.cuh"
#include "core/cuda/fused/sizes.cuh"

namespace deform_conv {
namespace cuda {

// A sample of a tile: the weights of its corners, times the mask, and 0 where a corner does not
// count; and where its top left corner is.
//
// All four corners are pixels of the image, so that they can be read without asking which of them
// count: where a sample lies across the border, its corners are moved inside by a pixel, and their
// weights with them. In an image of one row or column, two corners are the same pixel.
template <typename T>
struct TileSample {
  CornerWeights<T> weights;
  // Four corner bits and, if the region holds the corners, the first one's place in it in bytes;
  // otherwise kOutside and the pixel, shifted left by four.
  uint32_t packed_place;

  static constexpr uint32_t kOutside = 0x80000000u;

  __device__ __forceinline__ static TileSample Zero(const InputRegion& region) {
    TileSample sample = {};
    sample.packed_place = NowhereIn(region);
    return sample;
  }

  // As Locate(), in fewer instructions, if all corners count and the region holds them; false
  // otherwise.
  __device__ __forceinline__ static bool LocateWithin(const FusedSizes& sizes,
                                                      const InputRegion& region,
                                                      int32_t pixel_bytes, const Position& position,
                                                      const Tap& tap, Offset offset, float mask,
                                                      TileSample* sample) {
    const float whole_h = floorf(offset.dy), whole_w = floorf(offset.dx);
    const float h = offset.dy - whole_h, w = offset.dx - whole_w;
    // Conversion of what is too large gives the largest number, or the least. With a base added,
    // which may wrap around, neither is a pixel.
    const auto pixel_of = [](int32_t base, float offset) {
      return static_cast<uint32_t>(base) + static_cast<uint32_t>(__float2int_rd(offset));
    };
    const uint32_t row = pixel_of(position.y * sizes.stride_h + tap.h_base, offset.dy);
    const uint32_t col = pixel_of(position.x * sizes.stride_w + tap.w_base, offset.dx);
    const uint32_t region_row = row + (position.n * sizes.in_h - region.first_row);
    const uint32_t region_col = col - region.first_col;
    const auto below = [](uint32_t number, int32_t end) {
      return number < static_cast<uint32_t>(max(end, 0));
    };
    sample->weights = {static_cast<T>(mask * ((1 - h) * (1 - w))),
                       static_cast<T>(mask * ((1 - h) * w)), static_cast<T>(mask * (h * (1 - w))),
                       static_cast<T>(mask * (h * w))};
    sample->packed_place = (region_row * region.cols + region_col) * pixel_bytes | kAllCorners;
    const bool number = h + w >= 0;  // not NaN
    return number && below(row, sizes.in_h - 1) && below(col, sizes.in_w - 1) &&
           below(region_row, region.rows - 1) && below(region_col, region.cols - 1);
  }

  // The sample that a tap takes at `position`.
  __device__ __forceinline__ static TileSample Locate(const FusedSizes& sizes,
                                                      const InputRegion& region,
                                                      int32_t pixel_bytes, const Position& position,
                                                      const Tap& tap, Offset offset, float mask) {
    const auto h = LocateOnAxis<float, int32_t>(position.y * sizes.stride_h + tap.h_base, offset.dy,
                                                sizes.in_h);
    const auto w = LocateOnAxis<float, int32_t>(position.x * sizes.stride_w + tap.w_base, offset.dx,
                                                sizes.in_w);
    const MovedInside vertical(h, sizes.in_h), horizontal(w, sizes.in_w);
    const bool inside = h.inside && w.inside;
    const uint32_t bits = !inside ? 0
                                  : (vertical.bits & 1 ? horizontal.bits : 0) |
                                        (vertical.bits & 2 ? horizontal.bits << 2 : 0);
    // Not the product of a mask that may be infinite with 0.
    const auto weight_of = [&](int corner) {
      const float weight = vertical.weights[corner / 2] * horizontal.weights[corner % 2];
      return static_cast<T>(bits >> corner & 1 ? mask * weight : 0.0f);
    };
    TileSample sample;
    sample.weights = {weight_of(kTopLeft), weight_of(kTopRight), weight_of(kBottomLeft),
                      weight_of(kBottomRight)};
    const int32_t row = position.n * sizes.in_h + vertical.low, col = horizontal.low;
    const uint32_t pixel = row * sizes.in_w + col;
    const uint32_t place =
        ((row - region.first_row) * region.cols + col - region.first_col) * pixel_bytes;
    sample.packed_place =
        (region.HoldsCorners(sizes, row, col) ? place : kOutside | pixel << kCornerBits) | bits;
    if (!inside) sample.packed_place = NowhereIn(region);
    return sample;
  }

 private:
  // No corner counts, but what is read in their place must exist.
  __device__ __forceinline__ static uint32_t NowhereIn(const InputRegion& region) {
    return region.rows > 0 ? 0 : kOutside;
  }

  // The two pixels of one axis that a sample lies between, moved by one where either is outside.
  struct MovedInside {
    int32_t low;
    uint32_t bits;     // a bit for each pixel that counts
    float weights[2];  // 0 where it does not

    __device__ __forceinline__ MovedInside(const AxisSample<float, int32_t>& sample, int32_t size) {
      const bool before = sample.low < 0, behind = sample.low >= size - 1;
      // An axis of one pixel has no other to move to.
      const bool move_back = behind && size > 1;
      low = sample.low + (before ? 1 : 0) - (move_back ? 1 : 0);
      bits = before || (behind && !move_back) ? 1 : behind ? 2 : 3;
      weights[0] = before ? sample.fraction : move_back ? 0.0f : 1 - sample.fraction;
      weights[1] = before ? 0.0f : behind ? 1 - sample.fraction : sample.fraction;
    }
  };
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_TILE_SAMPLE_CUH_
