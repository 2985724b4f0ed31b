// Divisions of sizes, for every device.

#ifndef DEFORM_CONV_CORE_INTEGER_MATH_H_
#define DEFORM_CONV_CORE_INTEGER_MATH_H_

namespace deform_conv {

// The smallest integer that is no less than a / b, for a >= 0 and b > 0.
template <typename Int>
constexpr Int CeilDiv(Int a, Int b) {
  return (a + b - 1) / b;
}
template <int b, typename Int>
constexpr Int CeilDiv(Int a) {
  return (a + b - 1) / b;
}

// The smallest multiple of `multiple` that is no less than `a`.
template <typename Int>
constexpr Int RoundUp(Int a, Int multiple) {
  return CeilDiv(a, multiple) * multiple;
}
template <int multiple, typename Int>
constexpr Int RoundUp(Int a) {
  return CeilDiv<multiple>(a) * multiple;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_INTEGER_MATH_H_
