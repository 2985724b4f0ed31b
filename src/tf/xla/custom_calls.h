// What the ops compile to under XLA: custom calls, known by name to both sides.
//
//   deform_conv2d_forward(input, filters, offset[, mask]) -> output
//   deform_conv2d_backward(input, filters, offset, grad_output[, mask]) -> the wanted ones of
//       grad_input, grad_filters, grad_offset, grad_mask
//   deform_aggregate2d_forward(input, offset, weights) -> output
//   deform_aggregate2d_backward(input, offset, grad_output, weights) -> the wanted ones of
//       grad_input, grad_offset, grad_weights
//
// All tensors are row-major in NHWC. Offset and mask are float, or double beside double. On the CPU
// the others are too; on a GPU they may be of the 16-bit types.

#ifndef DEFORM_CONV_TF_XLA_CUSTOM_CALLS_H_
#define DEFORM_CONV_TF_XLA_CUSTOM_CALLS_H_

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "core/params.h"
#include "tf/op_attributes.h"

namespace deform_conv {

struct CustomCalls {
  const char* function;  // in Python
  const char* forward;
  const char* backward;
};

constexpr CustomCalls CallsOf(Operation operation) {
  if (operation == Operation::kConvolve) {
    return {"deform_conv2d", "deform_conv2d_forward", "deform_conv2d_backward"};
  }
  return {"deform_aggregate2d", "deform_aggregate2d_forward", "deform_aggregate2d_backward"};
}

// Attributes of the calls: the ops' attributes, as words, and backward a bit for each gradient that
// is wanted, by Argument. Sizes come from the tensors, and where there are no filters, the kernel's
// from an attribute.
constexpr char kAttributesAttribute[] = "attributes";
constexpr char kKernelSizeAttribute[] = "kernel_size";
constexpr char kWantedAttribute[] = "wanted";

// A compiled module may outlive the library that made it. This changes with what the words mean.
constexpr int64_t kWordsVersion = 1;

// The words, after the version and the padding.
constexpr int64_t DeformConvAttributes::* kWordFields[] = {
    &DeformConvAttributes::stride_h,     &DeformConvAttributes::stride_w,
    &DeformConvAttributes::dilation_h,   &DeformConvAttributes::dilation_w,
    &DeformConvAttributes::pad_top,      &DeformConvAttributes::pad_bottom,
    &DeformConvAttributes::pad_left,     &DeformConvAttributes::pad_right,
    &DeformConvAttributes::deform_groups};

inline std::vector<int64_t> ToWords(const DeformConvAttributes& attributes) {
  std::vector<int64_t> words = {kWordsVersion, static_cast<int64_t>(attributes.padding)};
  for (const auto field : kWordFields) words.push_back(attributes.*field);
  return words;
}

// Returns false if these are not words of ToWords() in this version.
inline bool FromWords(const int64_t* words, size_t count, DeformConvAttributes* attributes) {
  if (count != 2 + std::size(kWordFields) || words[0] != kWordsVersion) return false;
  if (words[1] < 0 || words[1] > static_cast<int64_t>(Padding::kExplicit)) return false;
  attributes->padding = static_cast<Padding>(words[1]);
  for (size_t i = 0; i < std::size(kWordFields); ++i) attributes->*kWordFields[i] = words[2 + i];
  return true;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_XLA_CUSTOM_CALLS_H_
