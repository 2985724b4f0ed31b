// Reading the ops' attributes and shapes: the same for shape inference and for the kernels, and for
// any number of spatial axes.

#ifndef DEFORM_CONV_TF_OP_ATTRIBUTES_H_
#define DEFORM_CONV_TF_OP_ATTRIBUTES_H_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "core/params.h"
#include "core/params3d.h"
#include "core/types.h"
#include "tensorflow/core/platform/errors.h"

namespace deform_conv {

// What the ops compute, each with an op for its gradients: DeformConv2D and DeformConv3D, which
// have filters, or DeformAggregate2D, which has none.
enum class Operation { kConvolve, kAggregate };

inline Operation OperationOf(absl::string_view op_type) {
  return op_type.find("Aggregate") == op_type.npos ? Operation::kConvolve : Operation::kAggregate;
}

// What the ops' arguments are for. Those of an op are its inputs, in this order, and the gradient
// op has grad_output after them.
enum Argument { kInput, kFilters, kOffset, kMask, kArguments };

// Which arguments an op has.
struct OpArguments {
  Operation operation = Operation::kConvolve;
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

// The shape of a tensor that has so many spatial axes.
template <std::size_t axes>
using Shape = std::array<int64_t, axes + 2>;

// What the core has for layers over 2 or 3 spatial axes.
template <std::size_t axes>
struct AxesTraits;

template <>
struct AxesTraits<2> {
  using Attributes = DeformConvAttributes;
  using Shapes = DeformConvShapes;
  using Params = DeformConvParams;
  static constexpr auto kMakeParams = &MakeParams;

  static void SetAxes(const std::array<AxisAttributes, 2>& axes, Attributes* attributes) {
    const auto& [h, w] = axes;
    attributes->stride_h = h.stride;
    attributes->stride_w = w.stride;
    attributes->dilation_h = h.dilation;
    attributes->dilation_w = w.dilation;
    attributes->pad_top = h.pad_before;
    attributes->pad_bottom = h.pad_after;
    attributes->pad_left = w.pad_before;
    attributes->pad_right = w.pad_after;
  }

  static Shape<2> NativeOutputShape(const Params& params) {
    return {params.batch, params.out_h, params.out_w, params.out_channels};
  }
};

template <>
struct AxesTraits<3> {
  using Attributes = DeformConv3DAttributes;
  using Shapes = DeformConv3DShapes;
  using Params = DeformConv3DParams;
  static constexpr auto kMakeParams = &MakeParams3D;

  static void SetAxes(const std::array<AxisAttributes, 3>& axes, Attributes* attributes) {
    attributes->axes = axes;
  }

  static Shape<3> NativeOutputShape(const Params& params) {
    return {params.batch, params.axes[kDepth].out, params.axes[kHeight].out,
            params.axes[kWidth].out, params.out_channels};
  }
};

template <std::size_t axes>
using ParamsOf = typename AxesTraits<axes>::Params;

// The format is that of the channels: kNhwc stands for NDHWC too, kNchw for NCDHW.
template <std::size_t axes>
struct OpAttributes : OpArguments {
  typename AxesTraits<axes>::Attributes conv;
  DataFormat format = DataFormat::kNhwc;
};

// Reads the gradient op's attributes that say which gradients are wanted. There are none of what
// the op does not have.
template <typename Context>
absl::Status ReadWanted(Context* context, const OpArguments& arguments,
                        bool (&wanted)[kArguments]) {
  for (int i = 0; i < kArguments; ++i) {
    wanted[i] = false;
    if (i == kFilters && !arguments.has_filters()) continue;
    TF_RETURN_IF_ERROR(
        context->GetAttr(absl::StrCat("want_grad_", arguments.NameOf(i)), &wanted[i]));
    wanted[i] = wanted[i] && arguments.Has(i);
  }
  return absl::OkStatus();
}

// Where batch, spatial axes and channels, in this order, stand in a shape of `format`.
template <std::size_t axes>
std::array<std::size_t, axes + 2> DimensionsIn(DataFormat format) {
  std::array<std::size_t, axes + 2> dimensions;
  std::iota(dimensions.begin(), dimensions.end(), 0);
  if (format == DataFormat::kNchw) {  // 0, 2, 3, 1
    std::rotate(dimensions.begin() + 1, dimensions.begin() + 2, dimensions.end());
  }
  return dimensions;
}

// Reorders a shape in `format` into the native one; fails unless its rank fits.
template <std::size_t axes>
absl::Status ToNativeShape(const char* argument, DataFormat format,
                           const std::vector<int64_t>& shape, Shape<axes>* native) {
  constexpr std::size_t kRank = axes + 2;
  if (shape.size() != kRank) {
    return absl::InvalidArgumentError(absl::StrCat(argument, " must have rank ", kRank,
                                                   "; received shape [", absl::StrJoin(shape, ", "),
                                                   "]"));
  }
  const auto order = DimensionsIn<axes>(format);
  for (std::size_t i = 0; i < kRank; ++i) (*native)[i] = shape[order[i]];
  return absl::OkStatus();
}

// Reads a number for each spatial axis into its `field`: one for each of a tensor's dimensions,
// which are in `format`.
template <typename Context, std::size_t axes>
absl::Status ReadPerAxis(Context* context, const char* argument, DataFormat format,
                         int64_t AxisAttributes::* field,
                         std::array<AxisAttributes, axes>* attributes) {
  std::vector<int64_t> values;
  TF_RETURN_IF_ERROR(context->GetAttr(argument, &values));
  const auto order = DimensionsIn<axes>(format);
  if (values.size() != order.size() || values[order.front()] != 1 || values[order.back()] != 1) {
    return absl::InvalidArgumentError(absl::StrCat(argument, " must be ", order.size(),
                                                   " numbers, 1 for batch and channels; received [",
                                                   absl::StrJoin(values, ", "), "]"));
  }
  for (std::size_t i = 0; i < axes; ++i) (*attributes)[i].*field = values[order[i + 1]];
  return absl::OkStatus();
}

// Reads padding and explicit_paddings; the pads of the axes only where that is explicit.
template <typename Context, std::size_t axes>
absl::Status ReadPadding(Context* context, DataFormat format, Padding* padding,
                         std::array<AxisAttributes, axes>* attributes) {
  std::string name;
  TF_RETURN_IF_ERROR(context->GetAttr("padding", &name));
  *padding = name == "SAME"    ? Padding::kSame
             : name == "VALID" ? Padding::kValid
                               : Padding::kExplicit;
  std::vector<int64_t> values;
  TF_RETURN_IF_ERROR(context->GetAttr("explicit_paddings", &values));
  if (*padding != Padding::kExplicit) {
    if (values.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("explicit_paddings go with padding EXPLICIT only; received ", name));
  }
  const auto order = DimensionsIn<axes>(format);
  const auto is_padded = [&](std::size_t dimension) {
    return values[2 * dimension] != 0 || values[2 * dimension + 1] != 0;
  };
  if (values.size() != 2 * order.size() || is_padded(order.front()) || is_padded(order.back())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "padding must be ", order.size(), " pairs of numbers, 0 for batch and channels; received [",
        absl::StrJoin(values, ", "), "]"));
  }
  for (std::size_t i = 0; i < axes; ++i) {
    (*attributes)[i].pad_before = values[2 * order[i + 1]];
    (*attributes)[i].pad_after = values[2 * order[i + 1] + 1];
  }
  return absl::OkStatus();
}

// Reads whether there is a mask. An op has no optional inputs, but lists of them.
template <typename Context>
absl::Status ReadMaskCount(Context* context, bool* has_mask) {
  int count;
  TF_RETURN_IF_ERROR(context->GetAttr("mask_count", &count));
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
  TF_RETURN_IF_ERROR(context->GetAttr("kernel_size", &sizes));
  if (sizes.size() != 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("kernel_size must be 2 numbers; received [", absl::StrJoin(sizes, ", "), "]"));
  }
  conv->kernel_h = sizes[0];
  conv->kernel_w = sizes[1];
  return absl::OkStatus();
}

// `Context` is an OpKernelConstruction or an InferenceContext.
template <typename Context, std::size_t axes>
absl::Status ReadAttributes(Context* context, Operation operation, OpAttributes<axes>* attributes) {
  auto& conv = attributes->conv;
  DataFormat& format = attributes->format;
  std::string data_format;
  TF_RETURN_IF_ERROR(context->GetAttr("data_format", &data_format));
  format = data_format[1] == 'C' ? DataFormat::kNchw : DataFormat::kNhwc;
  std::array<AxisAttributes, axes> of_axes;
  TF_RETURN_IF_ERROR(ReadPerAxis(context, "strides", format, &AxisAttributes::stride, &of_axes));
  TF_RETURN_IF_ERROR(
      ReadPerAxis(context, "dilations", format, &AxisAttributes::dilation, &of_axes));
  TF_RETURN_IF_ERROR(ReadPadding(context, format, &conv.padding, &of_axes));
  AxesTraits<axes>::SetAxes(of_axes, &conv);
  TF_RETURN_IF_ERROR(context->GetAttr("deform_groups", &conv.deform_groups));
  attributes->operation = operation;
  if constexpr (axes == 2) {  // volumes are not aggregated
    if (operation == Operation::kAggregate) {
      attributes->has_mask = true;
      return ReadKernelSize(context, &conv);
    }
  }
  return ReadMaskCount(context, &attributes->has_mask);
}

// The sizes that follow from the attributes and the shapes of the ops' arguments. `dimensions(i)`
// is the shape of input i as a vector.
template <std::size_t axes, typename Dimensions>
absl::Status MakeParamsOf(const OpAttributes<axes>& attributes, const Dimensions& dimensions,
                          ParamsOf<axes>* params) {
  typename AxesTraits<axes>::Shapes shapes;
  shapes.has_mask = attributes.has_mask;
  if constexpr (axes == 2) shapes.has_filters = attributes.has_filters();
  Shape<axes>* const native[] = {&shapes.input, &shapes.filters, &shapes.offset, &shapes.mask};
  for (int i = 0; i < kArguments; ++i) {
    if (!attributes.Has(i)) continue;
    const DataFormat format = i == kFilters ? DataFormat::kNhwc : attributes.format;
    TF_RETURN_IF_ERROR(ToNativeShape<axes>(attributes.NameOf(i), format,
                                           dimensions(attributes.IndexOf(i)), native[i]));
  }
  const std::string error = AxesTraits<axes>::kMakeParams(attributes.conv, shapes, params);
  return error.empty() ? absl::OkStatus() : absl::InvalidArgumentError(error);
}

// The output's shape in `format`.
template <std::size_t axes>
Shape<axes> OutputShapeOf(DataFormat format, const ParamsOf<axes>& params) {
  const Shape<axes> native = AxesTraits<axes>::NativeOutputShape(params);
  const auto order = DimensionsIn<axes>(format);
  Shape<axes> shape;
  for (std::size_t i = 0; i < native.size(); ++i) shape[order[i]] = native[i];
  return shape;
}

// Fails unless grad_output, the gradient op's last argument, has the output's shape.
template <std::size_t axes>
absl::Status CheckGradOutput(DataFormat format, const ParamsOf<axes>& params,
                             const std::vector<int64_t>& grad_output) {
  const Shape<axes> expected = OutputShapeOf<axes>(format, params);
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
