// Element types as numbers in double, converted here and not by the core.

#ifndef DEFORM_CONV_TESTS_FUZZ_ELEMENTS_H_
#define DEFORM_CONV_TESTS_FUZZ_ELEMENTS_H_

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/types.h"

namespace deform_conv::fuzz {

template <typename T>
constexpr int kMantissaBits = std::is_same_v<T, double>  ? 52
                              : std::is_same_v<T, float> ? 23
                              : std::is_same_v<T, Half>  ? 10
                                                         : 7;

// Of a 16-bit type with its sign in the highest bit and `mantissa` bits in the lowest.
inline double FromBits(uint16_t bits, int mantissa) {
  const int exponent_mask = (1 << (15 - mantissa)) - 1;
  const int exponent = bits >> mantissa & exponent_mask;
  const int fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == exponent_mask) return fraction != 0 ? NAN : sign * INFINITY;
  const int bias = exponent_mask >> 1;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa);
}

// Rounds to nearest, and to even between two.
inline uint16_t ToBits(double value, int mantissa) {
  const int exponent_mask = (1 << (15 - mantissa)) - 1, bias = exponent_mask >> 1;
  const int infinity = exponent_mask << mantissa;
  const int sign = std::signbit(value) ? 1 << 15 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | infinity | 1 << (mantissa - 1));
  const double size = std::fabs(value);
  if (size >= std::ldexp(1, bias + 1)) return static_cast<uint16_t>(sign | infinity);
  const int exponent = size < std::ldexp(1, 1 - bias) ? 1 - bias : std::ilogb(size);
  const int scaled = static_cast<int>(std::nearbyint(std::ldexp(size, mantissa - exponent)));
  // A subnormal number has no leading one. Where rounding gives one more, it goes to the exponent.
  return static_cast<uint16_t>(sign | (((exponent + bias - 1) << mantissa) + scaled));
}

template <typename T>
double ToDouble(T element) {
  if constexpr (std::is_floating_point_v<T>) {
    return element;
  } else {
    return FromBits(element.bits, kMantissaBits<T>);
  }
}

template <typename T>
T FromDouble(double value) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(value);
  } else {
    return T{ToBits(value, kMantissaBits<T>)};
  }
}

// Calls call(T()) for the element type T.
template <typename Call>
auto ForType(ElementType type, const Call& call) {
  switch (type) {
    case ElementType::kFloat:
      return call(float());
    case ElementType::kDouble:
      return call(double());
    case ElementType::kHalf:
      return call(Half());
    default:
      return call(BFloat16());
  }
}

// The nearest number of the type.
inline double Rounded(ElementType type, double value) {
  return ForType(type,
                 [value](auto element) { return ToDouble(FromDouble<decltype(element)>(value)); });
}

// The type of offset and mask beside elements of type `type`.
inline ElementType OffsetTypeOf(ElementType type) {
  return type == ElementType::kDouble ? type : ElementType::kFloat;
}

inline const char* NameOf(ElementType type) {
  const char* const names[] = {"float", "double", "half", "bfloat16"};
  return names[static_cast<int>(type)];
}

// The largest and the smallest positive number, and the largest relative error of rounding.
struct Range {
  double largest, smallest, unit;
};
inline Range RangeOf(ElementType type) {
  return ForType(type, [](auto element) -> Range {
    using T = decltype(element);
    const double unit = std::ldexp(1, -kMantissaBits<T> - 1);
    if constexpr (std::is_same_v<T, double>) return {DBL_MAX, DBL_TRUE_MIN, unit};
    if constexpr (std::is_same_v<T, float>) return {FLT_MAX, FLT_TRUE_MIN, unit};
    if constexpr (std::is_same_v<T, Half>) return {65504, 0x1p-24, unit};
    return {FromBits(0x7f7f, 7), FromBits(1, 7), unit};
  });
}

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_ELEMENTS_H_
