// The sampling rule and its derivatives: the only copy, for every device.
//
// An image is extended with zeros, and a sample is 0 unless -1 < h < H and -1 < w < W. Inside, it
// interpolates bilinearly between the four pixels around (h, w). At an integer position the
// derivative is the one towards +.

#ifndef DEFORM_CONV_CORE_BILINEAR_H_
#define DEFORM_CONV_CORE_BILINEAR_H_

#include <cmath>
#include <cstdint>

// Always inlined: sources that include this are compiled for several instruction sets, and an
// out-of-line copy of one could be linked into the code of another.
#if defined(__CUDACC__)
#define DEFORM_CONV_INLINE __host__ __device__ __forceinline__
#else
#define DEFORM_CONV_INLINE inline __attribute__((always_inline))
#endif

namespace deform_conv {

// Where a sample lies on one axis: between pixel `low` (-1 to size - 1) and the next, `fraction`
// (0 to 1) of the way. Only `inside` has a meaning where that is false.
template <typename T>
struct AxisSample {
  bool inside;
  int64_t low;
  T fraction;
};

// Locates position `base + offset` on an axis of `size` pixels.
//
// The whole and the fractional part of the offset are taken apart before the base is added, so the
// fraction keeps its precision however far along the axis the sample lies.
template <typename T>
DEFORM_CONV_INLINE AxisSample<T> LocateOnAxis(int64_t base, T offset, int64_t size) {
  // Past any image, and within int64_t. Written so that NaN fails.
  constexpr T kFar = T(int64_t{1} << 40);
  if (!(offset > -kFar && offset < kFar)) return {false, 0, T(0)};
  const T whole = std::floor(offset);
  const T fraction = offset - whole;
  const int64_t low = base + static_cast<int64_t>(whole);
  // The sample itself must be above -1, its lower pixel need not be.
  const bool inside = low < size && (low >= 0 || (low == -1 && fraction > T(0)));
  return {inside, low, fraction};
}

// The four pixels around a sample, in the order in which the arrays below list them.
enum Corner { kTopLeft, kTopRight, kBottomLeft, kBottomRight, kCorners };

// Weight of each corner in the sample.
template <typename T>
DEFORM_CONV_INLINE void BilinearWeights(T h_fraction, T w_fraction, T weights[kCorners]) {
  weights[kTopLeft] = (1 - h_fraction) * (1 - w_fraction);
  weights[kTopRight] = (1 - h_fraction) * w_fraction;
  weights[kBottomLeft] = h_fraction * (1 - w_fraction);
  weights[kBottomRight] = h_fraction * w_fraction;
}

// The sample's derivative along h, from the value at each corner.
template <typename T>
DEFORM_CONV_INLINE T BilinearDerivativeH(T w_fraction, const T values[kCorners]) {
  return (1 - w_fraction) * (values[kBottomLeft] - values[kTopLeft]) +
         w_fraction * (values[kBottomRight] - values[kTopRight]);
}

// The sample's derivative along w, from the value at each corner.
template <typename T>
DEFORM_CONV_INLINE T BilinearDerivativeW(T h_fraction, const T values[kCorners]) {
  return (1 - h_fraction) * (values[kTopRight] - values[kTopLeft]) +
         h_fraction * (values[kBottomRight] - values[kBottomLeft]);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_BILINEAR_H_
