// Sampling a volume, and the sample's derivatives: bilinear.h with one more axis, depth.
//
// A sample lies between two planes of the volume, the front and the back one, and interpolates
// linearly between what core/bilinear.h samples of each. So it is 0 unless -1 < d < D, -1 < h < H
// and -1 < w < W; corners outside the volume have no part in it, and at integer positions inside
// the derivative is the one towards +.

#ifndef DEFORM_CONV_CORE_TRILINEAR_H_
#define DEFORM_CONV_CORE_TRILINEAR_H_

#include <cstdint>

#include "core/axis_sample.h"
#include "core/bilinear.h"
#include "core/params3d.h"

namespace deform_conv {

// The planes of corners around a sample, each with four corners in the order of Corner.
enum CornerPlane { kFront, kBack, kCornerPlanes };

constexpr int kVolumeCorners = kCornerPlanes * kCorners;

// The bits of a sample all of whose corners count.
constexpr int32_t kAllVolumeCorners = (1 << kVolumeCorners) - 1;

// Where a sample lies in a volume, and what of it counts.
template <typename T>
struct VolumeSample {
  T weights[kCornerPlanes][kCorners];
  T fractions[kSpatialAxes];
  int32_t corner_bits;        // that of corner c of plane p is 1 << (p * kCorners + c)
  int64_t low[kSpatialAxes];  // the top left corner of the front plane, which may lie outside
};

// Locates (base + offset) of the three axes in a volume. Where no corner counts, `corner_bits`
// alone has a meaning.
template <typename T>
DEFORM_CONV_INLINE VolumeSample<T> LocateInVolume(const int64_t (&base)[kSpatialAxes],
                                                  const T* offset,
                                                  const AxisSizes (&axes)[kSpatialAxes]) {
  const int64_t in_d = axes[kDepth].in, in_h = axes[kHeight].in, in_w = axes[kWidth].in;
  const AxisSample<T, int64_t> d = LocateOnAxis(base[kDepth], offset[kDepth], in_d);
  const AxisSample<T, int64_t> h = LocateOnAxis(base[kHeight], offset[kHeight], in_h);
  const AxisSample<T, int64_t> w = LocateOnAxis(base[kWidth], offset[kWidth], in_w);
  VolumeSample<T> sample = {{}, {d.fraction, h.fraction, w.fraction}, 0, {d.low, h.low, w.low}};
  const int32_t in_plane = CornerBits(h, w, in_h, in_w);
  const int32_t front = d.inside & (d.low >= 0 ? 1 : 0);
  const int32_t back = d.inside & (d.low + 1 < in_d ? 1 : 0);
  sample.corner_bits = in_plane * front | (in_plane * back) << kCorners;
  T weights[kCorners];
  BilinearWeights(h.fraction, w.fraction, weights);
  for (int corner = 0; corner < kCorners; ++corner) {
    sample.weights[kFront][corner] = (1 - d.fraction) * weights[corner];
    sample.weights[kBack][corner] = d.fraction * weights[corner];
  }
  return sample;
}

// The sample's derivatives along depth, height and width, from the value at each corner; 0 stands
// for what a corner that does not count has.
template <typename T>
DEFORM_CONV_INLINE void TrilinearDerivatives(const T (&fractions)[kSpatialAxes],
                                             const T (&values)[kCornerPlanes][kCorners],
                                             T derivatives[kSpatialAxes]) {
  const T back = fractions[kDepth], front = 1 - back;
  const T h_fraction = fractions[kHeight], w_fraction = fractions[kWidth];
  T weights[kCorners];
  BilinearWeights(h_fraction, w_fraction, weights);
  derivatives[kDepth] = 0;
  for (int corner = 0; corner < kCorners; ++corner) {
    derivatives[kDepth] += weights[corner] * (values[kBack][corner] - values[kFront][corner]);
  }
  derivatives[kHeight] = front * BilinearDerivativeH(w_fraction, values[kFront]) +
                         back * BilinearDerivativeH(w_fraction, values[kBack]);
  derivatives[kWidth] = front * BilinearDerivativeW(h_fraction, values[kFront]) +
                        back * BilinearDerivativeW(h_fraction, values[kBack]);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_TRILINEAR_H_
