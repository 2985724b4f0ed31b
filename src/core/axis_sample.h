// The sampling rule of one axis: the only copy, for every device and any number of axes.
//
// An axis is extended with zeros, and a sample is 0 unless -1 < coordinate < size. Inside, it lies
// between two pixels, of which one may be outside. At an integer coordinate it lies at the
// beginning of the way to the next pixel, so derivatives there are those towards +.

#ifndef DEFORM_CONV_CORE_AXIS_SAMPLE_H_
#define DEFORM_CONV_CORE_AXIS_SAMPLE_H_

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
template <typename T, typename Int>
struct AxisSample {
  int32_t inside;  // 0 or 1
  Int low;
  T fraction;
};

// Coordinates and sizes below this fit int32_t arithmetic.
constexpr int64_t kInt32Limit = int64_t{1} << 29;

// Locates coordinate `base + offset` on an axis of `size` pixels. Int is int64_t, or int32_t where
// base and size are within kInt32Limit.
//
// The whole and the fractional part of the offset are taken apart before the base is added, so the
// fraction keeps its precision however far along the axis the sample lies. There is no branch, so
// that a loop over this becomes vector code.
template <typename T, typename Int>
DEFORM_CONV_INLINE AxisSample<T, Int> LocateOnAxis(Int base, T offset, Int size) {
  // Past any image, and within Int with the base. Written so that NaN fails.
  constexpr T kFar = T(int64_t{1} << (sizeof(Int) == 8 ? 40 : 30));
  const int32_t near = (offset > -kFar ? 1 : 0) & (offset < kFar ? 1 : 0);
  const T safe_offset = offset > -kFar ? (offset < kFar ? offset : T(0)) : T(0);
  const T whole = std::floor(safe_offset);
  const T fraction = safe_offset - whole;
  const Int low = base + static_cast<Int>(whole);
  // The sample itself must be above -1, its lower pixel need not be.
  const int32_t above = (low >= 0 ? 1 : 0) | ((low == -1 ? 1 : 0) & (fraction > T(0) ? 1 : 0));
  return {near & above & (low < size ? 1 : 0), low, fraction};
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_AXIS_SAMPLE_H_
