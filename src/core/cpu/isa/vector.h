// Vectors of the compiler's own, as wide as the instruction set has them. Included only by
// kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_VECTOR_H_
#define DEFORM_CONV_CORE_CPU_ISA_VECTOR_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/bilinear.h"  // DEFORM_CONV_INLINE

namespace deform_conv {
namespace DEFORM_CONV_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Elements of a full vector.
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// `n` elements; one element is the element itself. Need not be aligned beyond it.
template <typename T, int n>
struct VectorOf;
template <int n>
struct VectorOf<float, n> {
  typedef float type __attribute__((vector_size(4 * n), aligned(4), may_alias));
};
template <int n>
struct VectorOf<double, n> {
  typedef double type __attribute__((vector_size(8 * n), aligned(8), may_alias));
};
template <>
struct VectorOf<float, 1> {
  using type = float;
};
template <>
struct VectorOf<double, 1> {
  using type = double;
};
template <typename T, int n = kLanes<T>>
using Vector = typename VectorOf<T, n>::type;

template <int n, typename T>
DEFORM_CONV_INLINE Vector<T, n> Load(const T* from) {
  return *reinterpret_cast<const Vector<T, n>*>(from);
}

template <int n, typename T>
DEFORM_CONV_INLINE void Store(T* to, Vector<T, n> vector) {
  *reinterpret_cast<Vector<T, n>*>(to) = vector;
}

// The sum of a vector's elements, by halves.
template <int n, typename T>
DEFORM_CONV_INLINE T Sum(const Vector<T, n>& vector) {
  if constexpr (n == 1) {
    return vector;
  } else {
    Vector<T, n / 2> low, high;
    std::memcpy(&low, &vector, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(low), sizeof(high));
    return Sum<n / 2, T>(low + high);
  }
}

// Calls body(i, std::integral_constant<int, n>()) so that the ranges [i, i + n) cover [0, count):
// full vectors, then halves of them and so on for what is left.
template <typename T, int n = kLanes<T>, typename Body>
DEFORM_CONV_INLINE void ForEachVector(int64_t count, const Body& body, int64_t i = 0) {
  for (; i + n <= count; i += n) body(i, std::integral_constant<int, n>());
  if constexpr (n > 1) {
    if (i < count) ForEachVector<T, n / 2>(count, body, i);
  }
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_VECTOR_H_
