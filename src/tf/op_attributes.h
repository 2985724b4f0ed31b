// Reading the ops' attributes and shapes: the same for shape inference and for the kernels.

#ifndef DEFORM_CONV_TF_OP_ATTRIBUTES_H_
#define DEFORM_CONV_TF_OP_ATTRIBUTES_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "core/params.h"
#include "core/types.h"

namespace deform_conv {

// What the ops compute, each with an op for its gradients: DeformConv2D, which has filters, or
// DeformAggregate2D, which has none.
enum class Operation { kConvolve, kAggregate };

inline Operation OperationOf(absl::string_view op_type) {
  return op_type.find("Aggregate") == op_type.npos ? Operation::kConvolve : Operation::kAggregate;
}

// What the ops' arguments are for. Those of an op are its inputs, in this order, and the gradient
// op has grad_output after them.
enum Argument { kInput, kFilters, kOffset, kMask, kArguments };

struct OpAttributes {
  Operation operation = Operation::kConvolve;
  DeformConvAttributes conv;
  DataFormat format = DataFormat::kNhwc;
  bool has_mask = false;

  bool has_filters() const { return operation == Operation::kConvolve; }
  bool Has(int argument) const {
    return argument == kFilters ? has_filters() : argument == kMask ? has_mask : true;
  }
  int arguments() const { return kArguments - !has_filters() - !has_mask; }

  // The input that is `argument`, which the op has; also the gradient op's output.
  int IndexOf(int argument) const { return argument - (argument > kFilters && !has_filters()); }
  // What input `index` is; kArguments for grad_output.
  int ArgumentAt(int index) const {
    if (index >= arguments()) return kArguments;
    return index + (index >= kFilters && !has_filters());
  }

  // What errors and attributes call `argument`.
  const char* NameOf(int argument) const {
    constexpr const char* kNames[] = {"input", "filters", "offset", "mask", "grad_output"};
    return argument == kMask && !has_filters() ? "weights" : kNames[argument];
  }
};

// Reads the gradient op's attributes that say which gradients are wanted. There are none of what
// the op does not have.
template <typename Context>
absl::Status ReadWanted(Context* context, const OpAttributes& attributes,
                        bool (&wanted)[kArguments]) {
  for (int i = 0; i < kArguments; ++i) {
    wanted[i] = false;
    if (i == kFilters && !attributes.has_filters()) continue;
    const absl::Status status =
        context->GetAttr(absl::StrCat("want_grad_", attributes.NameOf(i)), &wanted[i]);
    if (!status.ok()) return status;
    wanted[i] = wanted[i] && attributes.Has(i);
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

// Reads a number for each spatial axis: one for each of a tensor's dimensions, which stand where
// `axes` says.
template <typename Context, std::size_t rank>
absl::Status ReadPerAxis(Context* context, const char* argument, const std::array<int, rank>& axes,
                         std::array<int64_t, rank - 2>* numbers) {
  std::vector<int64_t> values;
  const absl::Status status = context->GetAttr(argument, &values);
  if (!status.ok()) return status;
  if (values.size() != rank || values[axes.front()] != 1 || values[axes.back()] != 1) {
    return absl::InvalidArgumentError(absl::StrCat(argument, " must be ", rank,
                                                   " numbers, 1 for batch and channels; received [",
                                                   absl::StrJoin(values, ", "), "]"));
  }
  for (std::size_t i = 0; i + 2 < rank; ++i) (*numbers)[i] = values[axes[i + 1]];
  return absl::OkStatus();
}

// Padding before and after a spatial axis.
struct PadsOfAxis {
  int64_t before = 0, after = 0;
};

// Reads padding and explicit_paddings; `pads` only where that is explicit.
template <typename Context, std::size_t rank>
absl::Status ReadPadding(Context* context, const std::array<int, rank>& axes, Padding* padding,
                         std::array<PadsOfAxis, rank - 2>* pads) {
  std::string name;
  absl::Status status = context->GetAttr("padding", &name);
  if (!status.ok()) return status;
  *padding = name == "SAME"    ? Padding::kSame
             : name == "VALID" ? Padding::kValid
                               : Padding::kExplicit;
  std::vector<int64_t> values;
  status = context->GetAttr("explicit_paddings", &values);
  if (!status.ok()) return status;
  if (*padding != Padding::kExplicit) {
    if (values.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("explicit_paddings go with padding EXPLICIT only; received ", name));
  }
  const auto of_axis = [&](int axis) { return PadsOfAxis{values[2 * axis], values[2 * axis + 1]}; };
  const auto is_padded = [&](int axis) {
    const PadsOfAxis of = of_axis(axis);
    return of.before != 0 || of.after != 0;
  };
  if (values.size() != 2 * rank || is_padded(axes.front()) || is_padded(axes.back())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "padding must be ", rank, " pairs of numbers, 0 for batch and channels; received [",
        absl::StrJoin(values, ", "), "]"));
  }
  for (std::size_t i = 0; i + 2 < rank; ++i) (*pads)[i] = of_axis(axes[i + 1]);
  return absl::OkStatus();
}

// Reads whether there is a mask. An op has no optional inputs, but lists of them.
template <typename Context>
absl::Status ReadMaskCount(Context* context, bool* has_mask) {
  int count;
  const absl::Status status = context->GetAttr("mask_count", &count);
  if (!status.ok()) return status;
  if (count > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("mask must be one tensor or none; received ", count));
  }
  *has_mask = count == 1;
  return absl::OkStatus();
}

template <typename Context>
absl::Status ReadKernelSize(Context* context, DeformConvAttributes* conv) {
  std::vector<int64_t> sizes;
  const absl::Status status = context->GetAttr("kernel_size", &sizes);
  if (!status.ok()) return status;
  if (sizes.size() != 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("kernel_size must be 2 numbers; received [", absl::StrJoin(sizes, ", "), "]"));
  }
  conv->kernel_h = sizes[0];
  conv->kernel_w = sizes[1];
  return absl::OkStatus();
}

// `Context` is an OpKernelConstruction or an InferenceContext.
template <typename Context>
absl::Status ReadAttributes(Context* context, Operation operation, OpAttributes* attributes) {
  attributes->operation = operation;
  std::string format;
  DeformConvAttributes& conv = attributes->conv;
  absl::Status status = context->GetAttr("data_format", &format);
  if (!status.ok()) return status;
  attributes->format = format == "NCHW" ? DataFormat::kNchw : DataFormat::kNhwc;
  const std::array<int, 4> axes = AxesOf(attributes->format);
  std::array<int64_t, 2> strides, dilations;
  std::array<PadsOfAxis, 2> pads;
  status = ReadPerAxis(context, "strides", axes, &strides);
  if (!status.ok()) return status;
  status = ReadPerAxis(context, "dilations", axes, &dilations);
  if (!status.ok()) return status;
  status = ReadPadding(context, axes, &conv.padding, &pads);
  if (!status.ok()) return status;
  conv.stride_h = strides[0];
  conv.stride_w = strides[1];
  conv.dilation_h = dilations[0];
  conv.dilation_w = dilations[1];
  conv.pad_top = pads[0].before;
  conv.pad_bottom = pads[0].after;
  conv.pad_left = pads[1].before;
  conv.pad_right = pads[1].after;
  status = context->GetAttr("deform_groups", &conv.deform_groups);
  if (!status.ok()) return status;
  if (operation == Operation::kConvolve) return ReadMaskCount(context, &attributes->has_mask);
  attributes->has_mask = true;
  return ReadKernelSize(context, &conv);
}

// The sizes that follow from the attributes and the shapes of the ops' arguments. `dimensions(i)`
// is the shape of input i as a vector.
template <typename Dimensions>
absl::Status MakeParamsOf(const OpAttributes& attributes, const Dimensions& dimensions,
                          DeformConvParams* params) {
  DeformConvShapes shapes;
  shapes.has_filters = attributes.has_filters();
  shapes.has_mask = attributes.has_mask;
  std::array<int64_t, 4>* const native[] = {&shapes.input, &shapes.filters, &shapes.offset,
                                            &shapes.mask};
  for (int i = 0; i < kArguments; ++i) {
    if (!attributes.Has(i)) continue;
    const DataFormat format = i == kFilters ? DataFormat::kNhwc : attributes.format;
    const absl::Status status =
        ToNativeShape(attributes.NameOf(i), format, dimensions(attributes.IndexOf(i)), native[i]);
    if (!status.ok()) return status;
  }
  const std::string error = MakeParams(attributes.conv, shapes, params);
  return error.empty() ? absl::OkStatus() : absl::InvalidArgumentError(error);
}

// Fails unless grad_output, the gradient op's last argument, has the output's shape.
template <std::size_t rank>
absl::Status CheckGradOutput(const std::array<int64_t, rank>& expected,
                             const std::vector<int64_t>& grad_output) {
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
inline absl::Status CheckGradOutput(DataFormat format, const DeformConvParams& params,
                                    const std::vector<int64_t>& grad_output) {
  return CheckGradOutput(
      FromNativeShape(format, {params.batch, params.out_h, params.out_w, params.out_channels}),
      grad_output);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_OP_ATTRIBUTES_H_
