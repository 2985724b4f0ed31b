#include "core/params.h"

#include <vector>

#include "core/size_rules.h"

namespace deform_conv {
namespace {

// How messages name the sizes of images, whatever the data format.
constexpr char kImages[] = "N, H, W, C";

std::string CheckAttributes(const DeformConvAttributes& attributes, bool has_filters) {
  std::vector<AttributeRange> ranges = {
      {"strides", 1, {attributes.stride_h, attributes.stride_w}},
      {"dilations", 1, {attributes.dilation_h, attributes.dilation_w}},
      {"padding", 0, {attributes.pad_top}},
      {"padding", 0, {attributes.pad_bottom}},
      {"padding", 0, {attributes.pad_left}},
      {"padding", 0, {attributes.pad_right}},
      {"deform_groups", 1, {attributes.deform_groups}},
  };
  if (!has_filters) {
    ranges.push_back({"kernel_size", 1, {attributes.kernel_h, attributes.kernel_w}});
  }
  for (const AttributeRange& range : ranges) {
    if (std::string error = CheckRange(range); !error.empty()) return error;
  }
  return "";
}

// What the caller knows the mask as.
const char* MaskName(bool has_filters) { return has_filters ? "mask" : "weights"; }

std::string CheckAllSizes(const DeformConvShapes& shapes) {
  std::string error = CheckSizes("input", kImages, shapes.input);
  if (error.empty() && shapes.has_filters) {
    error = CheckSizes("filters", "KH, KW, C / groups, O", shapes.filters);
  }
  if (error.empty()) error = CheckSizes("offset", kImages, shapes.offset);
  if (error.empty() && shapes.has_mask) {
    error = CheckSizes(MaskName(shapes.has_filters), kImages, shapes.mask);
  }
  return error;
}

std::string CheckExtents(const DeformConvShapes& shapes) {
  const int64_t in_h = shapes.input[1], in_w = shapes.input[2];
  const int64_t kernel_h = shapes.filters[0], kernel_w = shapes.filters[1];
  if (in_h > kMaxExtent || in_w > kMaxExtent) {
    return Message("input must be at most ", kMaxExtent, " high and wide; received ", in_h, "x",
                   in_w);
  }
  if (kernel_h == 0 || kernel_w == 0 || kernel_h > kMaxExtent || kernel_w > kMaxExtent) {
    return Message("filters must have a height and width from 1 to ", kMaxExtent, "; received ",
                   kernel_h, "x", kernel_w);
  }
  return "";
}

// All sizes but those that follow from others.
DeformConvParams GivenSizes(const DeformConvAttributes& attributes,
                            const DeformConvShapes& shapes) {
  DeformConvParams params = {};
  params.batch = shapes.input[0];
  params.in_h = shapes.input[1];
  params.in_w = shapes.input[2];
  params.in_channels = shapes.input[3];
  params.kernel_h = shapes.filters[0];
  params.kernel_w = shapes.filters[1];
  params.out_channels = shapes.filters[3];
  params.stride_h = attributes.stride_h;
  params.stride_w = attributes.stride_w;
  params.dilation_h = attributes.dilation_h;
  params.dilation_w = attributes.dilation_w;
  params.deform_groups = attributes.deform_groups;
  params.has_mask = shapes.has_mask;
  params.has_filters = shapes.has_filters;
  return params;
}

std::string SizeOutput(const DeformConvAttributes& attributes, DeformConvParams* params) {
  const char* kernel_argument = params->has_filters ? "filters" : "kernel_size";
  const Axis height = {"height",           kernel_argument,      params->in_h,
                       params->kernel_h,   params->stride_h,     params->dilation_h,
                       attributes.pad_top, attributes.pad_bottom};
  const Axis width = {
      "width",          kernel_argument,    params->in_w,        params->kernel_w,
      params->stride_w, params->dilation_w, attributes.pad_left, attributes.pad_right};
  std::string error = SizeAxis(height, attributes.padding, &params->out_h, &params->pad_top);
  if (!error.empty()) return error;
  return SizeAxis(width, attributes.padding, &params->out_w, &params->pad_left);
}

// What the offset and the mask must fit.
Positions PositionsOf(const DeformConvParams& params) {
  return {"height and width",
          params.batch,
          {params.out_h, params.out_w},
          {params.kernel_h, params.kernel_w},
          params.deform_groups};
}

// Takes over what only the offset or the mask knows of the output.
void FillFrom(const std::array<int64_t, 4>& shape, DeformConvParams* params) {
  if (!Known(params->batch)) params->batch = shape[0];
  if (!Known(params->out_h)) params->out_h = shape[1];
  if (!Known(params->out_w)) params->out_w = shape[2];
}

std::string DeriveGroups(const DeformConvShapes& shapes, DeformConvParams* params) {
  const int64_t group_channels = shapes.filters[2], out_channels = shapes.filters[3];
  if (shapes.has_filters) {
    const std::string error = CheckFilterChannels(group_channels, out_channels);
    if (!error.empty()) return error;
  }
  return CountGroups(shapes.input[3], group_channels, out_channels, params->deform_groups,
                     &params->groups);
}

}  // namespace

std::string MakeParams(const DeformConvAttributes& attributes, const DeformConvShapes& given_shapes,
                       DeformConvParams* params) {
  DeformConvShapes shapes = given_shapes;
  if (!shapes.has_filters) {
    shapes.filters = {attributes.kernel_h, attributes.kernel_w, 1, shapes.input[3]};
  }
  std::string error = CheckAttributes(attributes, shapes.has_filters);
  if (!error.empty()) return error;
  error = CheckAllSizes(shapes);
  if (!error.empty()) return error;
  error = CheckExtents(shapes);
  if (!error.empty()) return error;
  *params = GivenSizes(attributes, shapes);
  error = DeriveGroups(shapes, params);
  if (!error.empty()) return error;
  error = SizeOutput(attributes, params);
  if (!error.empty()) return error;
  error =
      CheckPerPosition("offset has", shapes.offset, PositionsOf(*params), 2, "2 * deform_groups");
  if (!error.empty()) return error;
  FillFrom(shapes.offset, params);
  if (shapes.has_mask) {
    error = CheckPerPosition(shapes.has_filters ? "mask has" : "weights have", shapes.mask,
                             PositionsOf(*params), 1, "deform_groups");
    if (!error.empty()) return error;
    FillFrom(shapes.mask, params);
  }
  const char* output =
      shapes.has_filters ? "the output of input and filters" : "the output of input and offset";
  return CheckSizes(output, kImages,
                    {params->batch, params->out_h, params->out_w, params->out_channels});
}

}  // namespace deform_conv
