// Reading the attributes and shapes of the ops over three axes: as tf/op_attributes.h, which has
// the ops' arguments, for two.

#ifndef DEFORM_CONV_TF_OP_ATTRIBUTES3D_H_
#define DEFORM_CONV_TF_OP_ATTRIBUTES3D_H_

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

// `Context` is an OpKernelConstruction or an InferenceContext.
template <typename Context>
absl::Status ReadAttributes(Context* context, OpAttributes3D* attributes) {
  std::string format;
  DeformConv3DAttributes& conv = attributes->conv;
  absl::Status status = context->GetAttr("data_format", &format);
  if (!status.ok()) return status;
  attributes->format = format == "NCDHW" ? DataFormat::kNchw : DataFormat::kNhwc;
  const std::array<int, kRank3D> axes = AxesOf3D(attributes->format);
  std::array<int64_t, kSpatialAxes> strides, dilations;
  std::array<PadsOfAxis, kSpatialAxes> pads;
  status = ReadPerAxis(context, "strides", axes, &strides);
  if (!status.ok()) return status;
  status = ReadPerAxis(context, "dilations", axes, &dilations);
  if (!status.ok()) return status;
  status = ReadPadding(context, axes, &conv.padding, &pads);
  if (!status.ok()) return status;
  for (int i = 0; i < kSpatialAxes; ++i) {
    conv.axes[i].stride = strides[i];
    conv.axes[i].dilation = dilations[i];
    conv.axes[i].pad_before = pads[i].before;
    conv.axes[i].pad_after = pads[i].after;
  }
  status = context->GetAttr("deform_groups", &conv.deform_groups);
  if (!status.ok()) return status;
  return ReadMaskCount(context, &attributes->has_mask);
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
  return CheckGradOutput(OutputShapeOf(format, params), grad_output);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_OP_ATTRIBUTES3D_H_
