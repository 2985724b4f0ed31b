// The rules that sizes of any number of axes must keep, one rule a function. params.cc and
// params3d.cc put them together. A function that returns a string returns an empty one, or what is
// wrong.

#ifndef DEFORM_CONV_CORE_SIZE_RULES_H_
#define DEFORM_CONV_CORE_SIZE_RULES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "core/params.h"

namespace deform_conv {

// Coordinates within an image are ints, and every tensor's element count an int64_t.
constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max();

template <typename... Parts>
std::string Message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline bool Known(int64_t size) { return size != kUnknown; }

// Numbers with a separator between them, "?" for those that are unknown.
std::string Joined(const std::vector<int64_t>& numbers, const char* separator);

// --- Attributes ---

// An attribute, of all axes or of one, and the least that each of its values may be.
struct AttributeRange {
  const char* name;
  int64_t least;
  std::vector<int64_t> values;
};

std::string CheckRange(const AttributeRange& range);

// --- One tensor ---

// What the tensor takes, in bytes too, is to fit an int64_t. An image is to fit it even where there
// is none. `dimensions` names them in messages.
std::string CheckSizes(const char* tensor, const char* dimensions,
                       const std::vector<int64_t>& shape);
template <std::size_t rank>
std::string CheckSizes(const char* tensor, const char* dimensions,
                       const std::array<int64_t, rank>& shape) {
  return CheckSizes(tensor, dimensions, std::vector<int64_t>(shape.begin(), shape.end()));
}

// --- Channels ---

std::string CheckFilterChannels(int64_t group_channels, int64_t out_channels);

// The number of convolution groups, kUnknown where the channels do not tell.
std::string CountGroups(int64_t channels, int64_t group_channels, int64_t out_channels,
                        int64_t deform_groups, int64_t* groups);

// --- Positions ---

// What the output size of one spatial axis depends on.
struct Axis {
  const char* name;             // "height" or the like
  const char* kernel_argument;  // the one that the kernel's size comes from
  int64_t in, kernel, stride, dilation;
  int64_t pad_before, pad_after;  // read for Padding::kExplicit
};

// The output size of one axis, and the padding before it (which SAME derives).
std::string SizeAxis(const Axis& axis, Padding padding, int64_t* out, int64_t* pad_before);

// What there are offsets and masks for.
struct Positions {
  const char* axes;  // "height and width" or the like
  int64_t batch;
  std::vector<int64_t> out, kernel;  // of each axis
  int64_t deform_groups;
};

// `shape` is the offset's or the mask's, and `argument_has` how a message begins. It has `per_tap`
// numbers for each tap of a deformable group. `rule` names them and the groups.
std::string CheckPerPosition(const char* argument_has, const std::vector<int64_t>& shape,
                             const Positions& positions, int64_t per_tap, const char* rule);
template <std::size_t rank>
std::string CheckPerPosition(const char* argument_has, const std::array<int64_t, rank>& shape,
                             const Positions& positions, int64_t per_tap, const char* rule) {
  return CheckPerPosition(argument_has, std::vector<int64_t>(shape.begin(), shape.end()), positions,
                          per_tap, rule);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_SIZE_RULES_H_
