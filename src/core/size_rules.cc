#include "core/size_rules.h"

#include <algorithm>

#include "core/integer_math.h"

namespace deform_conv {
namespace {

// The product of known sizes, or kUnknown if it is more than an int64_t holds.
int64_t Product(const std::vector<int64_t>& sizes) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return 0;
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) return kUnknown;
  }
  return product;
}

}  // namespace

std::string Joined(const std::vector<int64_t>& numbers, const char* separator) {
  std::string text;
  for (const int64_t number : numbers) {
    if (!text.empty()) text += separator;
    text += Known(number) ? std::to_string(number) : "?";
  }
  return text;
}

std::string CheckRange(const AttributeRange& range) {
  const auto fits = [&](int64_t value) { return value >= range.least && value <= kMaxExtent; };
  if (std::all_of(range.values.begin(), range.values.end(), fits)) return "";
  std::string received;
  for (const int64_t value : range.values) {
    received += Message(received.empty() ? "" : ", ", value);
  }
  if (range.values.size() > 1) received = "(" + received + ")";
  return Message(range.name, " must be from ", range.least, " to ", kMaxExtent, "; received ",
                 received);
}

std::string CheckSizes(const char* tensor, const char* dimensions,
                       const std::vector<int64_t>& shape) {
  const auto received = [&] {
    std::string sizes;
    for (const int64_t size : shape) sizes += Message(sizes.empty() ? "" : ", ", size);
    return Message("; received ", sizes, " (", dimensions, "), where ", kUnknown, " is unknown");
  };
  if (*std::min_element(shape.begin(), shape.end()) < kUnknown) {
    return Message(tensor, " must have sizes of 0 or more", received());
  }
  std::vector<int64_t> factors = {static_cast<int64_t>(sizeof(double)),
                                  std::max<int64_t>(shape[0], 1)};
  for (size_t i = 1; i < shape.size(); ++i) factors.push_back(Known(shape[i]) ? shape[i] : 1);
  if (!Known(Product(factors))) {
    return Message(tensor, " must have fewer than 2^63 bytes", received());
  }
  return "";
}

std::string CheckFilterChannels(int64_t group_channels, int64_t out_channels) {
  if (group_channels != 0 && out_channels != 0) return "";
  return Message("filters must have at least 1 input and 1 output channel; received ",
                 group_channels, " and ", out_channels);
}

std::string CountGroups(int64_t channels, int64_t group_channels, int64_t out_channels,
                        int64_t deform_groups, int64_t* groups) {
  *groups = kUnknown;
  if (channels == 0) return "input must have at least 1 channel; received 0";
  if (Known(channels) && channels % deform_groups != 0) {
    return Message("deform_groups must divide the input's ", channels, " channels; received ",
                   deform_groups);
  }
  if (!Known(channels) || !Known(group_channels)) return "";
  if (channels % group_channels != 0) {
    return Message("filters have ", group_channels, " input channels; a divisor of the input's ",
                   channels, " channels expected");
  }
  *groups = channels / group_channels;
  if (Known(out_channels) && out_channels % *groups != 0) {
    return Message("filters have ", out_channels, " output channels; a multiple of the ", *groups,
                   " groups (", channels, " / ", group_channels, " channels) expected");
  }
  return "";
}

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

std::string CheckPerPosition(const char* argument_has, const std::vector<int64_t>& shape,
                             const Positions& positions, int64_t per_tap, const char* rule) {
  const auto differ = [](int64_t a, int64_t b) { return Known(a) && Known(b) && a != b; };
  if (differ(shape[0], positions.batch)) {
    return Message(argument_has, " batch size ", shape[0], "; that of input, ", positions.batch,
                   ", expected");
  }
  const std::vector<int64_t> found(shape.begin() + 1, shape.end() - 1);
  for (size_t i = 0; i < found.size(); ++i) {
    if (!differ(found[i], positions.out[i])) continue;
    return Message(argument_has, " ", positions.axes, " ", Joined(found, "x"),
                   "; those of the output, ", Joined(positions.out, "x"), ", expected");
  }
  const bool kernel_known = std::all_of(positions.kernel.begin(), positions.kernel.end(),
                                        [](int64_t k) { return Known(k); });
  if (Known(shape.back()) && kernel_known) {
    // No shape has more channels than an int64_t holds.
    std::vector<int64_t> factors = {per_tap, positions.deform_groups};
    factors.insert(factors.end(), positions.kernel.begin(), positions.kernel.end());
    const int64_t expected = Product(factors);
    if (shape.back() != expected) {
      const std::string number = Known(expected) ? Message(expected) : "2^63 or more";
      return Message(argument_has, " ", shape.back(), " channels; ", rule, " * ",
                     Joined(positions.kernel, " * "), " = ", number, " expected");
    }
  }
  return "";
}

}  // namespace deform_conv
