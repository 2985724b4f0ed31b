// How tensors are stored, and the native form that the core computes in: NHWC, float or double.

#ifndef DEFORM_CONV_CORE_LAYOUT_H_
#define DEFORM_CONV_CORE_LAYOUT_H_

#include <cstdint>

namespace deform_conv {

enum class DataFormat { kNhwc, kNchw };

// Stored forms of 16-bit numbers; arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that a stored type is computed in.
template <typename Stored>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <typename Stored>
using ComputeType = typename ComputeTypeOf<Stored>::type;

// The extent of a tensor in either format: [batch, pixels, channels] or [batch, channels, pixels].
struct TensorExtent {
  int64_t batch, pixels, channels;
  int64_t elements() const { return batch * pixels * channels; }
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_LAYOUT_H_
