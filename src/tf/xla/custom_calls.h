// What the ops compile to under XLA: two custom calls, known by name to both sides.
//
//   deform_conv2d_forward(input, filters, offset[, mask]) -> output
//   deform_conv2d_backward(input, filters, offset, grad_output[, mask]) -> the wanted ones of
//       grad_input, grad_filters, grad_offset, grad_mask
//
// All tensors are row-major in NHWC. Offset and mask are float, or double beside double. On the CPU
// the others are too; on a GPU they may be of the 16-bit types.

#ifndef DEFORM_CONV_TF_XLA_CUSTOM_CALLS_H_
#define DEFORM_CONV_TF_XLA_CUSTOM_CALLS_H_

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/params.h"

namespace deform_conv {

constexpr char kForwardCall[] = "deform_conv2d_forward";
constexpr char kBackwardCall[] = "deform_conv2d_backward";

// Attributes of the calls: the sizes, as words, and backward a bit for each gradient that is
// wanted.
constexpr char kParamsAttribute[] = "params";
constexpr char kWantedAttribute[] = "wanted";

// Sizes as an attribute holds them.
using ParamsWords = std::array<int64_t, sizeof(DeformConvParams) / sizeof(int64_t)>;
static_assert(std::is_trivially_copyable_v<DeformConvParams> &&
              sizeof(ParamsWords) == sizeof(DeformConvParams));

inline ParamsWords ToWords(const DeformConvParams& params) {
  ParamsWords words;
  std::memcpy(words.data(), &params, sizeof params);
  return words;
}

// `words` are those of ToWords().
inline DeformConvParams FromWords(const int64_t* words) {
  DeformConvParams params;
  std::memcpy(&params, words, sizeof params);
  return params;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_XLA_CUSTOM_CALLS_H_
