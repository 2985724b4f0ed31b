#include "core/params3d.h"

#include "core/return_if_error.h"
#include "core/size_rules.h"

namespace deform_conv {
namespace {

// How messages name sizes, whatever the data format.
constexpr char kVolumes[] = "N, D, H, W, C";
constexpr char kAxes[] = "depth, height and width";
constexpr const char* kAxisNames[kSpatialAxes] = {"depth", "height", "width"};

// The middle three sizes of a tensor, or those of filters from `begin` = 0 on.
std::vector<int64_t> SpatialSizes(const std::array<int64_t, 5>& shape, int begin = 1) {
  return {shape.begin() + begin, shape.begin() + begin + kSpatialAxes};
}

// One number of each axis.
template <typename Axes, typename Number>
std::vector<int64_t> OfAxes(const Axes& axes, const Number& number) {
  return {number(axes[kDepth]), number(axes[kHeight]), number(axes[kWidth])};
}

std::string CheckAttributes(const DeformConv3DAttributes& attributes) {
  const auto of_axes = [&](int64_t AxisAttributes::* number) {
    return OfAxes(attributes.axes, [number](const AxisAttributes& axis) { return axis.*number; });
  };
  DEFORM_CONV_RETURN_IF_ERROR(CheckRange({"strides", 1, of_axes(&AxisAttributes::stride)}));
  DEFORM_CONV_RETURN_IF_ERROR(CheckRange({"dilations", 1, of_axes(&AxisAttributes::dilation)}));
  for (const AxisAttributes& axis : attributes.axes) {
    DEFORM_CONV_RETURN_IF_ERROR(CheckRange({"padding", 0, {axis.pad_before}}));
    DEFORM_CONV_RETURN_IF_ERROR(CheckRange({"padding", 0, {axis.pad_after}}));
  }
  return CheckRange({"deform_groups", 1, {attributes.deform_groups}});
}

std::string CheckAllSizes(const DeformConv3DShapes& shapes) {
  DEFORM_CONV_RETURN_IF_ERROR(CheckSizes("input", kVolumes, shapes.input));
  DEFORM_CONV_RETURN_IF_ERROR(CheckSizes("filters", "KD, KH, KW, C / groups, O", shapes.filters));
  DEFORM_CONV_RETURN_IF_ERROR(CheckSizes("offset", kVolumes, shapes.offset));
  return shapes.has_mask ? CheckSizes("mask", kVolumes, shapes.mask) : "";
}

std::string CheckExtents(const DeformConv3DShapes& shapes) {
  const std::vector<int64_t> in = SpatialSizes(shapes.input);
  const std::vector<int64_t> kernel = SpatialSizes(shapes.filters, 0);
  for (int i = 0; i < kSpatialAxes; ++i) {
    if (in[i] > kMaxExtent) {
      return Message("input must have a ", kAxes, " of at most ", kMaxExtent, "; received ",
                     Joined(in, "x"));
    }
    if (kernel[i] == 0 || kernel[i] > kMaxExtent) {
      return Message("filters must have a ", kAxes, " from 1 to ", kMaxExtent, "; received ",
                     Joined(kernel, "x"));
    }
  }
  return "";
}

// The sizes of all axes, where strides, dilations and padding are in range.
std::string SizeAxes(const DeformConv3DAttributes& attributes, const DeformConv3DShapes& shapes,
                     DeformConv3DParams* params) {
  for (int i = 0; i < kSpatialAxes; ++i) {
    const AxisAttributes& given = attributes.axes[i];
    AxisSizes& sizes = params->axes[i];
    sizes = {shapes.input[1 + i], kUnknown, shapes.filters[i], given.stride, given.dilation, 0};
    const Axis axis = {kAxisNames[i], "filters",      sizes.in,         sizes.kernel,
                       sizes.stride,  sizes.dilation, given.pad_before, given.pad_after};
    DEFORM_CONV_RETURN_IF_ERROR(SizeAxis(axis, attributes.padding, &sizes.out, &sizes.pad_before));
  }
  return "";
}

std::string CheckPerPosition3D(const char* argument_has, const std::array<int64_t, 5>& shape,
                               int64_t per_tap, const char* rule, DeformConv3DParams* params) {
  const Positions positions = {
      kAxes, params->batch, OfAxes(params->axes, [](const AxisSizes& axis) { return axis.out; }),
      OfAxes(params->axes, [](const AxisSizes& axis) { return axis.kernel; }),
      params->deform_groups};
  DEFORM_CONV_RETURN_IF_ERROR(CheckPerPosition(argument_has, shape, positions, per_tap, rule));
  // Takes over what only this tensor knows of the output.
  if (!Known(params->batch)) params->batch = shape[0];
  for (int i = 0; i < kSpatialAxes; ++i) {
    if (!Known(params->axes[i].out)) params->axes[i].out = shape[1 + i];
  }
  return "";
}

}  // namespace

DeformConvParams DeformConv3DParams::planar() const {
  DeformConvParams params = {};
  params.batch = batch;
  params.in_h = axes[kDepth].in * axes[kHeight].in;
  params.in_w = axes[kWidth].in;
  params.in_channels = in_channels;
  params.out_h = axes[kDepth].out * axes[kHeight].out;
  params.out_w = axes[kWidth].out;
  params.out_channels = out_channels;
  params.kernel_h = axes[kDepth].kernel * axes[kHeight].kernel;
  params.kernel_w = axes[kWidth].kernel;
  params.stride_h = params.stride_w = params.dilation_h = params.dilation_w = 1;
  params.groups = groups;
  params.deform_groups = deform_groups;
  params.has_mask = has_mask;
  params.has_filters = true;
  return params;
}

std::string MakeParams3D(const DeformConv3DAttributes& attributes, const DeformConv3DShapes& shapes,
                         DeformConv3DParams* params) {
  DEFORM_CONV_RETURN_IF_ERROR(CheckAttributes(attributes));
  DEFORM_CONV_RETURN_IF_ERROR(CheckAllSizes(shapes));
  DEFORM_CONV_RETURN_IF_ERROR(CheckExtents(shapes));
  *params = {};
  params->batch = shapes.input[0];
  params->in_channels = shapes.input[4];
  params->out_channels = shapes.filters[4];
  params->deform_groups = attributes.deform_groups;
  params->has_mask = shapes.has_mask;
  DEFORM_CONV_RETURN_IF_ERROR(CheckFilterChannels(shapes.filters[3], shapes.filters[4]));
  DEFORM_CONV_RETURN_IF_ERROR(CountGroups(params->in_channels, shapes.filters[3],
                                          params->out_channels, params->deform_groups,
                                          &params->groups));
  DEFORM_CONV_RETURN_IF_ERROR(SizeAxes(attributes, shapes, params));
  DEFORM_CONV_RETURN_IF_ERROR(
      CheckPerPosition3D("offset has", shapes.offset, kSpatialAxes, "3 * deform_groups", params));
  if (shapes.has_mask) {
    DEFORM_CONV_RETURN_IF_ERROR(
        CheckPerPosition3D("mask has", shapes.mask, 1, "deform_groups", params));
  }
  return CheckSizes(
      "the output of input and filters", kVolumes,
      std::array<int64_t, 5>{params->batch, params->axes[kDepth].out, params->axes[kHeight].out,
                             params->axes[kWidth].out, params->out_channels});
}

}  // namespace deform_conv
