// What im2col and col2im work on, whatever the device.
//
// All tensors are in native form: NHWC, in float or double on a CPU, in any element type on a
// GPU. A "position" numbers the output pixels of the whole batch, (n * out_h + y) * out_w + x; a
// "tap" numbers those of the kernel, ky * kernel_w + kx.
//
// Columns are a row-major matrix with one row per position. A row holds, for each convolution
// group (of those that are worked on at a time), for each tap, the samples of the group's channels:
//
//   columns[position][group][tap][channel] = mask * sample of the input
//
// so a group's columns times its filters [tap * channel, out_channel] are its output.

#ifndef DEFORM_CONV_CORE_SAMPLING_H_
#define DEFORM_CONV_CORE_SAMPLING_H_

#include <cstdint>

#include "core/params.h"

namespace deform_conv {

// The tensors that decide what is sampled. On a GPU the input may be of a 16-bit type beside
// offset and mask in float.
template <typename T, typename OffsetT = T>
struct SampledTensors {
  const T* input;         // [batch, in_h, in_w, in_channels]
  const OffsetT* offset;  // [batch, out_h, out_w, deform_groups, kernel_h, kernel_w, {dy, dx}]
  const OffsetT* mask;    // [batch, out_h, out_w, deform_groups, kernel_h, kernel_w] or null
};

// Their gradients, in the same shapes; null where a gradient is not wanted.
template <typename T, typename OffsetT = T>
struct SampledGradients {
  T* input;
  OffsetT* offset;
  OffsetT* mask;

  bool any() const { return input != nullptr || offset != nullptr || mask != nullptr; }
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_SAMPLING_H_
