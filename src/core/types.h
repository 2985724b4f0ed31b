// Element types, the type computed in beside each, and data formats.

#ifndef DEFORM_CONV_CORE_TYPES_H_
#define DEFORM_CONV_CORE_TYPES_H_

#include <cstdint>

#include "core/export.h"

namespace deform_conv {

// --- Element types ---

// 16-bit numbers as they are stored; arithmetic is in float.
struct DEFORM_CONV_EXPORT Half {
  uint16_t bits;
};
struct DEFORM_CONV_EXPORT BFloat16 {
  uint16_t bits;
};

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

template <typename T>
struct ElementTypeOf;
template <>
struct ElementTypeOf<float> {
  static constexpr ElementType value = ElementType::kFloat;
};
template <>
struct ElementTypeOf<double> {
  static constexpr ElementType value = ElementType::kDouble;
};
template <>
struct ElementTypeOf<Half> {
  static constexpr ElementType value = ElementType::kHalf;
};
template <>
struct ElementTypeOf<BFloat16> {
  static constexpr ElementType value = ElementType::kBFloat16;
};

// The type of coordinates and sums beside elements of type T: double for double, else float.
template <typename T>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <typename T>
using ComputeType = typename ComputeTypeOf<T>::type;

// Calls a macro with each of the types that templates are instantiated for: those that tensors are
// stored in, those that the CPU computes in, and those whose products tensor cores compute, with
// float as TF32.
#define DEFORM_CONV_FOR_ELEMENT_TYPES(macro) macro(float) macro(double) macro(Half) macro(BFloat16)
#define DEFORM_CONV_FOR_COMPUTE_TYPES(macro) macro(float) macro(double)
#define DEFORM_CONV_FOR_TENSOR_CORE_TYPES(macro) macro(float) macro(Half) macro(BFloat16)

// --- Data formats ---

enum class DataFormat { kNhwc, kNchw };

// The extent of a tensor in either format: [batch, pixels, channels] or [batch, channels, pixels].
struct TensorExtent {
  int64_t batch, pixels, channels;
  int64_t elements() const { return batch * pixels * channels; }
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_TYPES_H_
