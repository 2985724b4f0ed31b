// Reading the attributes and shapes of the ops over three axes: as tf/op_attributes.h, which has
// the ops' arguments, for two.

#ifndef DEFORM_CONV_TF_OP_ATTRIBUTES3D_H_
#define DEFORM_CONV_TF_OP_ATTRIBUTES3D_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/params3d.h"
#include "core/types.h"
#include "tf/op_attributes.h"

namespace deform_conv {

constexpr int kRank3D = 2 + kSpatialAxes;
using Shape3D = std::array<int64_t, kRank3D>;

// The format is that of the channels: kNhwc stands for NDHWC, kNchw for NCDHW.
struct OpAttributes3D {
  DeformConv3DAttributes conv;
  DataFormat format = DataFormat::kNhwc;
  bool has_mask = false;
};

// The gradient op's attributes that say which gradients are wanted.
constexpr const char* kWantAttributes3D[kArguments] = {"want_grad_input", "want_grad_filters",
                                                       "want_grad_offset", "want_grad_mask"};

// Where batch, depth, height, width and channels stand in a shape of `format`.
inline std::array<int, kRank3D> AxesOf3D(DataFormat format) {
  if (format == DataFormat::kNchw) return {0, 2, 3, 4, 1};
  return {0, 1, 2, 3, 4};
}

// The output's shape in `format`.
inline Shape3D OutputShapeOf(DataFormat format, const DeformConv3DParams& params) {
  const Shape3D native = {params.batch, params.axes[kDepth].out, params.axes[kHeight].out,
                          params.axes[kWidth].out, params.out_channels};
  const std::array<int, kRank3D> axes = AxesOf3D(format);
  Shape3D shape;
  for (int i = 0; i < kRank3D; ++i) shape[axes[i]] = native[i];
  return shape;
}

// Reads one number for each spatial axis: five in the order of the data format.
template <typename Context>
absl::Status ReadPerAxis(Context* context, const char* argument, DataFormat format,
                         int64_t AxisAttributes::* number, DeformConv3DAttributes* conv) {
  std::vector<int64_t> values;
  const absl::Status status = context->GetAttr(argument, &values);
  if (!status.ok()) return status;
  const std::array<int, kRank3D> axes = AxesOf3D(format);
  if (values.size() != kRank3D || values[axes[0]] != 1 || values[axes[kRank3D - 1]] != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(argument, " must be 5 numbers, 1 for batch and channels; received [",
                     absl::StrJoin(values, ", "), "]"));
  }
  for (int i = 0; i < kSpatialAxes; ++i) conv->axes[i].*number = values[axes[1 + i]];
  return absl::OkStatus();
}

// Reads padding and explicit_paddings.
template <typename Context>
absl::Status ReadPadding(Context* context, DataFormat format, DeformConv3DAttributes* conv) {
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
  const std::array<int, kRank3D> axes = AxesOf3D(format);
  const auto pad = [&](int axis, int side) { return pads[2 * axes[axis] + side]; };
  constexpr int kChannels = kRank3D - 1;
  if (pads.size() != 2 * kRank3D || pad(0, 0) != 0 || pad(0, 1) != 0 || pad(kChannels, 0) != 0 ||
      pad(kChannels, 1) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("padding must be 5 pairs of numbers, 0 for batch and channels; received [",
                     absl::StrJoin(pads, ", "), "]"));
  }
  for (int i = 0; i < kSpatialAxes; ++i) {
    conv->axes[i].pad_before = pad(1 + i, 0);
    conv->axes[i].pad_after = pad(1 + i, 1);
  }
  return absl::OkStatus();
}

// `Context` is an OpKernelConstruction or an InferenceContext.
template <typename Context>
absl::Status ReadAttributes(Context* context, OpAttributes3D* attributes) {
  std::string format;
  DeformConv3DAttributes& conv = attributes->conv;
  absl::Status status = context->GetAttr("data_format", &format);
  if (!status.ok()) return status;
  attributes->format = format == "NCDHW" ? DataFormat::kNchw : DataFormat::kNhwc;
  status = ReadPerAxis(context, "strides", attributes->format, &AxisAttributes::stride, &conv);
  if (!status.ok()) return status;
  status = ReadPerAxis(context, "dilations", attributes->format, &AxisAttributes::dilation, &conv);
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

// The sizes that follow from the attributes and the shapes of the ops' arguments. `dimensions(i)`
// is the shape of input i as a vector.
template <typename Dimensions>
absl::Status MakeParamsOf(const OpAttributes3D& attributes, const Dimensions& dimensions,
                          DeformConv3DParams* params) {
  constexpr const char* kNames[kArguments] = {"input", "filters", "offset", "mask"};
  DeformConv3DShapes shapes;
  shapes.has_mask = attributes.has_mask;
  Shape3D* const native[kArguments] = {&shapes.input, &shapes.filters, &shapes.offset,
                                       &shapes.mask};
  for (int i = 0; i < kArguments; ++i) {
    if (i == kMask && !attributes.has_mask) continue;
    const std::vector<int64_t> shape = dimensions(i);
    if (shape.size() != kRank3D) {
      return absl::InvalidArgumentError(absl::StrCat(
          kNames[i], " must have rank 5; received shape [", absl::StrJoin(shape, ", "), "]"));
    }
    const std::array<int, kRank3D> axes =
        AxesOf3D(i == kFilters ? DataFormat::kNhwc : attributes.format);
    for (int j = 0; j < kRank3D; ++j) (*native[i])[j] = shape[axes[j]];
  }
  const std::string error = MakeParams3D(attributes.conv, shapes, params);
  return error.empty() ? absl::OkStatus() : absl::InvalidArgumentError(error);
}

// Fails unless grad_output, the gradient op's last argument, has the output's shape.
inline absl::Status CheckGradOutput(DataFormat format, const DeformConv3DParams& params,
                                    const std::vector<int64_t>& grad_output) {
  const Shape3D expected = OutputShapeOf(format, params);
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

#endif  // DEFORM_CONV_TF_OP_ATTRIBUTES3D_H_
