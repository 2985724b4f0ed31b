// Vectors of the compiler's own, as wide as the instruction set has them. Included only by
// kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_VECTOR_H_
#define DEFORM_CONV_CORE_CPU_ISA_VECTOR_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/bilinear.h"  // DEFORM_CONV_INLINE

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// Lambdas that are handed to an inlined function must be inlined too, or their captures would go
// through memory.
#define DEFORM_CONV_INLINE_LAMBDA __attribute__((always_inline))

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

// Whether loops are compiled for sizes known to the compiler: not in double, which serves to check
// gradients, for a smaller library.
template <typename T>
constexpr bool kKnownSizes = std::is_same_v<T, float>;

template <int n, typename T>
DEFORM_CONV_INLINE Vector<T, n> Load(const T* from) {
  return *reinterpret_cast<const Vector<T, n>*>(from);
}

template <int n, typename T>
DEFORM_CONV_INLINE void Store(T* to, Vector<T, n> vector) {
  *reinterpret_cast<Vector<T, n>*>(to) = vector;
}

template <int n, typename T>
DEFORM_CONV_INLINE Vector<T, n / 2> SumOfHalves(const Vector<T, n>& vector) {
  Vector<T, n / 2> low, high;
  std::memcpy(&low, &vector, sizeof(low));
  std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(low), sizeof(high));
  return low + high;
}

// The sum of a vector's elements, by halves.
template <int n, typename T>
DEFORM_CONV_INLINE T Sum(const Vector<T, n>& vector) {
  if constexpr (n == 1) {
    return vector;
  } else {
    return Sum<n / 2, T>(SumOfHalves<n, T>(vector));
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DEFORM_CONV_HAS_SHUFFLE 1
#endif
#endif

#ifdef DEFORM_CONV_HAS_SHUFFLE
// Of each section of four elements, those from `first` on: a, b, the next of a, the next of b.
template <int first, typename V, int... i>
DEFORM_CONV_INLINE V Interleave(const V& a, const V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, (i / 4 * 4 + first + i % 4 / 2 + i % 2 * n)...);
}

// In each section of four elements, sums of two of a, of b, of the other two of a, of b.
template <int n, typename V>
DEFORM_CONV_INLINE V SumsOfTwo(const V& a, const V& b) {
  constexpr auto kIndices = std::make_integer_sequence<int, n>();
  return Interleave<0>(a, b, kIndices) + Interleave<2>(a, b, kIndices);
}
#endif

// The sum of a vector's sections of four elements.
template <int n, typename T>
DEFORM_CONV_INLINE Vector<T, 4> SumSections(const Vector<T, n>& vector) {
  if constexpr (n == 4) {
    return vector;
  } else {
    return SumSections<n / 2, T>(SumOfHalves<n, T>(vector));
  }
}

// Adds to the i-th element from `to` on the sum of the i-th vector's elements.
template <int n, typename T>
DEFORM_CONV_INLINE void AddSums(const Vector<T, n> (&vectors)[4], T* to) {
#ifdef DEFORM_CONV_HAS_SHUFFLE
  if constexpr (n >= 4) {
    const Vector<T, n> sections =
        SumsOfTwo<n>(SumsOfTwo<n>(vectors[0], vectors[2]), SumsOfTwo<n>(vectors[1], vectors[3]));
    Store<4>(to, Load<4>(to) + SumSections<n, T>(sections));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) to[i] += Sum<n, T>(vectors[i]);
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
