// Reading the ops' attributes and shapes: the same for shape inference and for the kernels.

#ifndef DEFORM_CONV_TF_OP_ATTRIBUTES_H_
#define DEFORM_CONV_TF_OP_ATTRIBUTES_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/params.h"
#include "core/types.h"

namespace deform_conv {

struct OpAttributes {
  DeformConvAttributes conv;
  DataFormat format = DataFormat::kNhwc;
  bool has_mask = false;
};

// The ops' arguments by the index of the input. A mask may be missing, and the gradient op has
// grad_output last.
enum Argument { kInput, kFilters, kOffset, kMask, kArguments };

// What errors call input `index` of the ops.
inline const char* ArgumentName(int index, bool has_mask) {
  constexpr const char* kNames[] = {"input", "filters", "offset", "mask", "grad_output"};
  return kNames[index < kMask || (index == kMask && has_mask) ? index : kArguments];
}

// The gradient op's attributes that say which gradients are wanted.
constexpr const char* kWantAttributes[kArguments] = {"want_grad_input", "want_grad_filters",
                                                     "want_grad_offset", "want_grad_mask"};

template <typename Context>
absl::Status ReadWanted(Context* context, bool (&wanted)[kArguments]) {
  for (int i = 0; i < kArguments; ++i) {
    const absl::Status status = context->GetAttr(kWantAttributes[i], &wanted[i]);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

// Where batch, height, width and channels stand in a shape of `format`.
inline std::array<int, 4> AxesOf(DataFormat format) {
  if (format == DataFormat::kNchw) return {0, 2, 3, 1};
  return {0, 1, 2, 3};
}

// Reorders a native (NHWC) shape for `format`.
inline std::array<int64_t, 4> FromNativeShape(DataFormat format,
                                              const std::array<int64_t, 4>& native) {
  std::array<int64_t, 4> shape;
  const std::array<int, 4> axes = AxesOf(format);
  for (int i = 0; i < 4; ++i) shape[axes[i]] = native[i];
  return shape;
}

// Reorders a shape in `format` into the native one; fails unless its rank is 4.
inline absl::Status ToNativeShape(const char* argument, DataFormat format,
                                  const std::vector<int64_t>& shape,
                                  std::array<int64_t, 4>* native) {
  if (shape.size() != 4) {
    return absl::InvalidArgumentError(absl::StrCat(argument, " must have rank 4; received shape [",
                                                   absl::StrJoin(shape, ", "), "]"));
  }
  const std::array<int, 4> axes = AxesOf(format);
  for (int i = 0; i < 4; ++i) (*native)[i] = shape[axes[i]];
  return absl::OkStatus();
}

// Reads a stride or dilation per axis: four numbers in the order of the data format.
template <typename Context>
absl::Status ReadPerAxis(Context* context, const char* argument, DataFormat format, int64_t* h,
                         int64_t* w) {
  std::vector<int64_t> values;
  absl::Status status = context->GetAttr(argument, &values);
  if (!status.ok()) return status;
  const std::array<int, 4> axes = AxesOf(format);
  if (values.size() != 4 || values[axes[0]] != 1 || values[axes[3]] != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(argument, " must be 4 numbers, 1 for batch and channels; received [",
                     absl::StrJoin(values, ", "), "]"));
  }
  *h = values[axes[1]];
  *w = values[axes[2]];
  return absl::OkStatus();
}

// Reads padding and explicit_paddings.
template <typename Context>
absl::Status ReadPadding(Context* context, DataFormat format, DeformConvAttributes* conv) {
  std::string padding;
  absl::Status status = context->GetAttr("padding", &padding);
  if (!status.ok()) return status;
  conv->padding = padding == "SAME"    ? Padding::kSame
                  : padding == "VALID" ? Padding::kValid
                                       : Padding::kExplicit;
  std::vector<int64_t> pads;
  status = context->GetAttr("explicit_paddings", &pads);
  if (!status.ok()) return status;
  if (conv->padding != Padding::kExplicit) {
    if (pads.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("explicit_paddings go with padding EXPLICIT only; received ", padding));
  }
  const std::array<int, 4> axes = AxesOf(format);
  const auto pad = [&](int axis, int side) { return pads[2 * axes[axis] + side]; };
  if (pads.size() != 8 || pad(0, 0) != 0 || pad(0, 1) != 0 || pad(3, 0) != 0 || pad(3, 1) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("padding must be 4 pairs of numbers, 0 for batch and channels; received [",
                     absl::StrJoin(pads, ", "), "]"));
  }
  conv->pad_top = pad(1, 0);
  conv->pad_bottom = pad(1, 1);
  conv->pad_left = pad(2, 0);
  conv->pad_right = pad(2, 1);
  return absl::OkStatus();
}

// `Context` is an OpKernelConstruction or an InferenceContext.
template <typename Context>
absl::Status ReadAttributes(Context* context, OpAttributes* attributes) {
  std::string format;
  DeformConvAttributes& conv = attributes->conv;
  absl::Status status = context->GetAttr("data_format", &format);
  if (!status.ok()) return status;
  attributes->format = format == "NCHW" ? DataFormat::kNchw : DataFormat::kNhwc;
  status = ReadPerAxis(context, "strides", attributes->format, &conv.stride_h, &conv.stride_w);
  if (!status.ok()) return status;
  status =
      ReadPerAxis(context, "dilations", attributes->format, &conv.dilation_h, &conv.dilation_w);
  if (!status.ok()) return status;
  status = ReadPadding(context, attributes->format, &conv);
  if (!status.ok()) return status;
  status = context->GetAttr("deform_groups", &conv.deform_groups);
  if (!status.ok()) return status;
  int mask_count;  // an op has no optional inputs, but lists of them
  status = context->GetAttr("mask_count", &mask_count);
  if (!status.ok()) return status;
  if (mask_count > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("mask must be one tensor or none; received ", mask_count));
  }
  attributes->has_mask = mask_count == 1;
  return absl::OkStatus();
}

// The shapes of the ops' arguments as MakeParams takes them. `mask` is null where none is given.
inline absl::Status ToNativeShapes(DataFormat format, const std::vector<int64_t>& input,
                                   const std::vector<int64_t>& filters,
                                   const std::vector<int64_t>& offset,
                                   const std::vector<int64_t>* mask, DeformConvShapes* shapes) {
  absl::Status status = ToNativeShape("input", format, input, &shapes->input);
  if (!status.ok()) return status;
  status = ToNativeShape("filters", DataFormat::kNhwc, filters, &shapes->filters);
  if (!status.ok()) return status;
  status = ToNativeShape("offset", format, offset, &shapes->offset);
  if (!status.ok()) return status;
  shapes->has_mask = mask != nullptr;
  return mask == nullptr ? absl::OkStatus() : ToNativeShape("mask", format, *mask, &shapes->mask);
}

// The sizes that follow from the attributes and the shapes of the ops' arguments. `dimensions(i)`
// is the shape of input i as a vector.
template <typename Dimensions>
absl::Status MakeParamsOf(const OpAttributes& attributes, const Dimensions& dimensions,
                          DeformConvParams* params) {
  std::vector<int64_t> mask;
  if (attributes.has_mask) mask = dimensions(kMask);
  DeformConvShapes shapes;
  const absl::Status status =
      ToNativeShapes(attributes.format, dimensions(kInput), dimensions(kFilters),
                     dimensions(kOffset), attributes.has_mask ? &mask : nullptr, &shapes);
  if (!status.ok()) return status;
  const std::string error = MakeParams(attributes.conv, shapes, params);
  return error.empty() ? absl::OkStatus() : absl::InvalidArgumentError(error);
}

// Fails unless grad_output, the gradient op's last argument, has the output's shape.
inline absl::Status CheckGradOutput(DataFormat format, const DeformConvParams& params,
                                    const std::vector<int64_t>& grad_output) {
  const std::array<int64_t, 4> expected =
      FromNativeShape(format, {params.batch, params.out_h, params.out_w, params.out_channels});
  const auto fits = [](int64_t size, int64_t expected_size) {
    return size == expected_size || size == kUnknown || expected_size == kUnknown;
  };
  if (std::equal(grad_output.begin(), grad_output.end(), expected.begin(), expected.end(), fits)) {
    return absl::OkStatus();
  }
  const auto text = [](const auto& sizes) {
    return absl::StrJoin(sizes, ", ", [](std::string* to, int64_t size) {
      absl::StrAppend(to, size == kUnknown ? "?" : absl::StrCat(size));
    });
  };
  return absl::InvalidArgumentError(absl::StrCat("grad_output must have the output's shape [",
                                                 text(expected), "]; received [", text(grad_output),
                                                 "]"));
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_OP_ATTRIBUTES_H_
