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
template <typename T>
struct TileSample {
  CornerWeights<T> weights;
  // The first corner's place in the region, in bytes, if the region holds all corners; there,
  // corners that do not count are zeros, and RegionLimits::zeros() is where no corner counts.
  // Otherwise kOutside, the pixel shifted left by four, and four corner bits.
  uint32_t packed_place;

  static constexpr uint32_t kOutside = 0x80000000u;

  // Where no corner counts. What is read in their place must exist.
  __device__ __forceinline__ static TileSample Zero(const RegionLimits& limits) {
    TileSample sample = {};
    sample.packed_place = limits.most_pixels > 0 ? limits.zeros() : kOutside;
    return sample;
  }

  // As Locate(), in fewer instructions, if the region holds all corners; false otherwise.
  __device__ __forceinline__ static bool LocateWithin(
      const FusedSizes& sizes, const RegionLimits& limits, const InputRegion& region,
      const Position& position, const Tap& tap, Offset offset, float mask, TileSample* sample) {
    const float h = offset.dy - floorf(offset.dy), w = offset.dx - floorf(offset.dx);
    // Conversion of what is too large gives the largest number, or the least. With a base added,
    // which may wrap around, neither is a pixel.
    const auto pixel_of = [](int32_t base, float offset) {
      return static_cast<int32_t>(static_cast<uint32_t>(base) +
                                  static_cast<uint32_t>(__float2int_rd(offset)));
    };
    const int32_t low_h = pixel_of(position.y * sizes.stride_h + tap.h_base, offset.dy);
    const int32_t low_w = pixel_of(position.x * sizes.stride_w + tap.w_base, offset.dx);
    const int32_t row = InputRegion::RowOf(sizes, position.n, low_h);
    sample->weights = {static_cast<T>(mask * ((1 - h) * (1 - w))),
                       static_cast<T>(mask * ((1 - h) * w)), static_cast<T>(mask * (h * (1 - w))),
                       static_cast<T>(mask * (h * w))};
    sample->packed_place = region.PlaceOf(row, low_w, limits.pixel_bytes);
    const bool finite = h + w + mask * 0 >= 0;
    const auto inside = [](int32_t low, float fraction, int32_t size) {
      return static_cast<uint32_t>(low) < static_cast<uint32_t>(size) ||
             (low == -1 && fraction > 0);
    };
    return finite && inside(low_h, h, sizes.in_h) && inside(low_w, w, sizes.in_w) &&
           region.HoldsCorners(row, low_w);
  }

  // The sample that a tap takes at `position`.
  __device__ __forceinline__ static TileSample Locate(const FusedSizes& sizes,
                                                      const RegionLimits& limits,
                                                      const InputRegion& region,
                                                      const Position& position, const Tap& tap,
                                                      Offset offset, float mask) {
    const auto h = LocateOnAxis<float, int32_t>(position.y * sizes.stride_h + tap.h_base, offset.dy,
                                                sizes.in_h);
    const auto w = LocateOnAxis<float, int32_t>(position.x * sizes.stride_w + tap.w_base, offset.dx,
                                                sizes.in_w);
    if (!(h.inside && w.inside)) return Zero(limits);
    const int32_t row = InputRegion::RowOf(sizes, position.n, h.low);
    const bool within = region.HoldsCorners(row, w.low);
    const MovedInside vertical(h, sizes.in_h, within), horizontal(w, sizes.in_w, within);
    const uint32_t bits =
        (vertical.bits & 1 ? horizontal.bits : 0) | (vertical.bits & 2 ? horizontal.bits << 2 : 0);
    // Not the product of a mask that may be infinite with 0.
    const auto weight_of = [&](int corner) {
      const float weight = vertical.weights[corner / 2] * horizontal.weights[corner % 2];
      return static_cast<T>(bits >> corner & 1 ? mask * weight : 0.0f);
    };
    TileSample sample;
    sample.weights = {weight_of(kTopLeft), weight_of(kTopRight), weight_of(kBottomLeft),
                      weight_of(kBottomRight)};
    const uint32_t pixel = (position.n * sizes.in_h + vertical.low) * sizes.in_w + horizontal.low;
    sample.packed_place = within ? region.PlaceOf(row, w.low, limits.pixel_bytes)
                                 : kOutside | pixel << kCornerBits | bits;
    return sample;
  }

 private:
  // The two pixels of one axis that a sample lies between. Where either is not in the image, both
  // are moved by one, so that all can be read without asking which of them count; `stay` keeps them
  // where they are, since the region has zeros there.
  struct MovedInside {
    int32_t low;
    uint32_t bits;     // a bit for each pixel that counts
    float weights[2];  // 0 where it does not

    __device__ __forceinline__ MovedInside(const AxisSample<float, int32_t>& sample, int32_t size,
                                           bool stay) {
      const bool before = sample.low < 0, behind = sample.low >= size - 1;
      // An axis of one pixel has no other to move to.
      const bool down = before && !stay, back = behind && !stay && size > 1;
      low = sample.low + (down ? 1 : 0) - (back ? 1 : 0);
      // Before the image, the second pixel counts; behind it, the first.
      const uint32_t unmoved = (before ? 0u : 1u) | (behind && !before ? 0u : 2u);
      bits = down ? 1 : back ? 2 : unmoved;
      weights[0] = down ? sample.fraction : back ? 0.0f : 1 - sample.fraction;
      weights[1] = down ? 0.0f : back ? 1 - sample.fraction : sample.fraction;
    }
  };
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_TILE_SAMPLE_CUH_
