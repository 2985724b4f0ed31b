// Sampling an image, and the sample's derivatives: the only copy, for every device.
//
// Along each axis the rule is that of core/axis_sample.h: an image is extended with zeros, and a
// sample is 0 unless -1 < h < H and -1 < w < W. Inside, it interpolates bilinearly between the four
// pixels around (h, w). At an integer position inside, the derivative is the one towards +.
//
// Corners outside the image have no part in a sample, also beside infinite numbers, with which a
// product with 0 would be NaN. Corners inside take part even where their weight is 0.

#ifndef DEFORM_CONV_CORE_BILINEAR_H_
#define DEFORM_CONV_CORE_BILINEAR_H_

#include <cstdint>

#include "core/axis_sample.h"

namespace deform_conv {

// The four pixels around a sample, in the order in which the arrays below list them.
enum Corner { kTopLeft, kTopRight, kBottomLeft, kBottomRight, kCorners };

// The bits of a sample all of whose corners count.
constexpr int32_t kAllCorners = (1 << kCorners) - 1;

// Weight of each corner in the sample.
template <typename T>
DEFORM_CONV_INLINE void BilinearWeights(T h_fraction, T w_fraction, T weights[kCorners]) {
  weights[kTopLeft] = (1 - h_fraction) * (1 - w_fraction);
  weights[kTopRight] = (1 - h_fraction) * w_fraction;
  weights[kBottomLeft] = h_fraction * (1 - w_fraction);
  weights[kBottomRight] = h_fraction * w_fraction;
}

// A bit for each corner of a sample that lies in an image of in_h x in_w pixels; 0 if the sample is
// 0.
template <typename T, typename Int>
DEFORM_CONV_INLINE int32_t CornerBits(const AxisSample<T, Int>& h, const AxisSample<T, Int>& w,
                                      Int in_h, Int in_w) {
  const int32_t inside = h.inside & w.inside;
  const int32_t top = inside & (h.low >= 0 ? 1 : 0), bottom = inside & (h.low + 1 < in_h ? 1 : 0);
  const int32_t left = w.low >= 0 ? 1 : 0, right = w.low + 1 < in_w ? 1 : 0;
  return (top & left) << kTopLeft | (top & right) << kTopRight | (bottom & left) << kBottomLeft |
         (bottom & right) << kBottomRight;
}

// Where a sample lies in an image, and what of it counts.
template <typename T, typename Int>
struct ImageSample {
  T weights[kCorners];
  T h_fraction, w_fraction;
  int32_t corner_bits;  // as of CornerBits()
  Int h_low, w_low;     // the top left corner, which may lie outside
};

// Locates (h_base + dy, w_base + dx) in an image of in_h x in_w pixels. Where no corner
// counts, `corner_bits` alone has a meaning.
template <typename T, typename Int>
DEFORM_CONV_INLINE ImageSample<T, Int> LocateSample(Int h_base, Int w_base, T dy, T dx, Int in_h,
                                                    Int in_w) {
  const AxisSample<T, Int> h = LocateOnAxis(h_base, dy, in_h);
  const AxisSample<T, Int> w = LocateOnAxis(w_base, dx, in_w);
  ImageSample<T, Int> sample;
  sample.corner_bits = CornerBits(h, w, in_h, in_w);
  sample.h_low = h.low;
  sample.w_low = w.low;
  sample.h_fraction = h.fraction;
  sample.w_fraction = w.fraction;
  BilinearWeights(h.fraction, w.fraction, sample.weights);
  return sample;
}

// The sample's derivative along h, from the value at each corner: a number, or a vector of them.
template <typename T, typename Values>
DEFORM_CONV_INLINE Values BilinearDerivativeH(T w_fraction, const Values (&values)[kCorners]) {
  return (1 - w_fraction) * (values[kBottomLeft] - values[kTopLeft]) +
         w_fraction * (values[kBottomRight] - values[kTopRight]);
}

// The sample's derivative along w, likewise.
template <typename T, typename Values>
DEFORM_CONV_INLINE Values BilinearDerivativeW(T h_fraction, const Values (&values)[kCorners]) {
  return (1 - h_fraction) * (values[kTopRight] - values[kTopLeft]) +
         h_fraction * (values[kBottomRight] - values[kBottomLeft]);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_BILINEAR_H_
