#include "core/params.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <vector>

#include "core/integer_math.h"

namespace deform_conv {
namespace {

// Coordinates within an image are ints, and every tensor's element count an int64_t.
constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max();

// How messages name the sizes of images, whatever the data format.
constexpr char kImages[] = "N, H, W, C";

template <typename... Parts>
std::string Message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

bool Known(int64_t size) { return size != kUnknown; }

// What the output size of one spatial axis depends on.
struct Axis {
  const char* name;             // "height" or "width"
  const char* kernel_argument;  // the one that the kernel's size comes from
  int64_t in, kernel, stride, dilation;
  int64_t pad_before, pad_after;  // read for Padding::kExplicit
};

// The output size of one axis, and the padding before it (which SAME derives).
std::string SizeAxis(const Axis& axis, Padding padding, int64_t* out, int64_t* pad_before) {
  *out = kUnknown;
  *pad_before = padding == Padding::kExplicit ? axis.pad_before
                : padding == Padding::kSame   ? kUnknown
                                              : 0;
  if (!Known(axis.in)) return "";
  if (padding == Padding::kSame) *out = CeilDiv(axis.in, axis.stride);
  if (!Known(axis.kernel)) return "";
  const int64_t extent = (axis.kernel - 1) * axis.dilation + 1;
  if (extent > kMaxExtent) {
    return Message(axis.kernel_argument, " and dilations: dilated kernel ", axis.name, " ", extent,
                   " is too large");
  }
  int64_t padded = axis.in;
  if (padding == Padding::kSame) padded = std::max((*out - 1) * axis.stride + extent, axis.in);
  if (padding == Padding::kExplicit) padded += axis.pad_before + axis.pad_after;
  if (padded > kMaxExtent) {
    return Message("padding: padded input ", axis.name, " ", padded, " is too large");
  }
  if (padding == Padding::kSame) {
    *pad_before = (padded - axis.in) / 2;
    return "";
  }
  // The size tf.nn.conv2d gives: an input short of the kernel by less than a stride gives 0.
  if (padded + axis.stride < extent) {
    return Message("input has ", axis.name, " ", padded, " with its padding; at least ",
                   extent - axis.stride, " expected for the dilated kernel's ", axis.name, ", ",
                   extent);
  }
  *out = (padded + axis.stride - extent) / axis.stride;
  return "";
}

// An attribute, of both axes or of one, and the least that each of its values may be.
struct AttributeRange {
  const char* name;
  int64_t least;
  std::vector<int64_t> values;
};

std::string CheckRange(const AttributeRange& range) {
  const auto fits = [&](int64_t value) { return value >= range.least && value <= kMaxExtent; };
  if (std::all_of(range.values.begin(), range.values.end(), fits)) return "";
  const std::string received = range.values.size() == 1
                                   ? Message(range.values[0])
                                   : Message("(", range.values[0], ", ", range.values[1], ")");
  return Message(range.name, " must be from ", range.least, " to ", kMaxExtent, "; received ",
                 received);
}

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

// The product of known sizes, or kUnknown if it is more than an int64_t holds.
int64_t Product(std::initializer_list<int64_t> sizes) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return 0;
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) return kUnknown;
  }
  return product;
}

// Checks one tensor's sizes: what it takes, in bytes too, is to fit an int64_t. An image is to fit
// it even where there is none.
std::string CheckSizes(const char* tensor, const char* dimensions,
                       const std::array<int64_t, 4>& shape) {
  const auto received = [&] {
    return Message("; received ", shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], " (",
                   dimensions, "), where ", kUnknown, " is unknown");
  };
  if (*std::min_element(shape.begin(), shape.end()) < kUnknown) {
    return Message(tensor, " must have sizes of 0 or more", received());
  }
  constexpr int64_t kBytesOfElement = sizeof(double);
  const auto known = [](int64_t size) { return Known(size) ? size : 1; };
  if (!Known(Product({std::max<int64_t>(shape[0], 1), known(shape[1]), known(shape[2]),
                      known(shape[3]), kBytesOfElement}))) {
    return Message(tensor, " must have fewer than 2^63 bytes", received());
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

// `shape` is the offset's or the mask's, and `argument_has` how a message begins.
std::string CheckPerPosition(const char* argument_has, const std::array<int64_t, 4>& shape,
                             const DeformConvParams& params, int64_t per_tap, const char* rule) {
  if (Known(shape[0]) && Known(params.batch) && shape[0] != params.batch) {
    return Message(argument_has, " batch size ", shape[0], "; that of input, ", params.batch,
                   ", expected");
  }
  const bool wrong_h = Known(shape[1]) && Known(params.out_h) && shape[1] != params.out_h;
  const bool wrong_w = Known(shape[2]) && Known(params.out_w) && shape[2] != params.out_w;
  if (wrong_h || wrong_w) {
    const auto text = [](int64_t size) { return Known(size) ? std::to_string(size) : "?"; };
    return Message(argument_has, " height and width ", text(shape[1]), "x", text(shape[2]),
                   "; those of the output, ", text(params.out_h), "x", text(params.out_w),
                   ", expected");
  }
  if (Known(shape[3]) && Known(params.kernel_h) && Known(params.kernel_w)) {
    // No shape has more channels than an int64_t holds.
    const int64_t expected =
        Product({per_tap, params.deform_groups, params.kernel_h, params.kernel_w});
    if (shape[3] != expected) {
      const std::string number = Known(expected) ? Message(expected) : "2^63 or more";
      return Message(argument_has, " ", shape[3], " channels; ", rule, params.kernel_h, " * ",
                     params.kernel_w, " = ", number, " expected");
    }
  }
  return "";
}

// Takes over what only the offset or the mask knows of the output.
void FillFrom(const std::array<int64_t, 4>& shape, DeformConvParams* params) {
  if (!Known(params->batch)) params->batch = shape[0];
  if (!Known(params->out_h)) params->out_h = shape[1];
  if (!Known(params->out_w)) params->out_w = shape[2];
}

std::string DeriveGroups(const DeformConvShapes& shapes, DeformConvParams* params) {
  const int64_t channels = shapes.input[3], group_channels = shapes.filters[2];
  const int64_t out_channels = shapes.filters[3];
  params->groups = kUnknown;
  if (shapes.has_filters && (group_channels == 0 || out_channels == 0)) {
    return Message("filters must have at least 1 input and 1 output channel; received ",
                   group_channels, " and ", out_channels);
  }
  if (channels == 0) return "input must have at least 1 channel; received 0";
  if (Known(channels) && channels % params->deform_groups != 0) {
    return Message("deform_groups must divide the input's ", channels, " channels; received ",
                   params->deform_groups);
  }
  if (!Known(channels) || !Known(group_channels)) return "";
  if (channels % group_channels != 0) {
    return Message("filters have ", group_channels, " input channels; a divisor of the input's ",
                   channels, " channels expected");
  }
  params->groups = channels / group_channels;
  if (Known(out_channels) && out_channels % params->groups != 0) {
    return Message("filters have ", out_channels, " output channels; a multiple of the ",
                   params->groups, " groups (", channels, " / ", group_channels,
                   " channels) expected");
  }
  return "";
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
  error = CheckPerPosition("offset has", shapes.offset, *params, 2, "2 * deform_groups * ");
  if (!error.empty()) return error;
  FillFrom(shapes.offset, params);
  if (shapes.has_mask) {
    error = CheckPerPosition(shapes.has_filters ? "mask has" : "weights have", shapes.mask, *params,
                             1, "deform_groups * ");
    if (!error.empty()) return error;
    FillFrom(shapes.mask, params);
  }
  return CheckSizes(shapes.has_filters ? "the output of input and filters" : "the output", kImages,
                    {params->batch, params->out_h, params->out_w, params->out_channels});
}

}  // namespace deform_conv
