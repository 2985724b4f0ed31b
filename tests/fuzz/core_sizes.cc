// Sizes and attributes of any kind. MakeParams() derives what follows from them, or says in an
// error text what is wrong. It never overflows, whatever is known.

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

#include "core/params.h"
#include "core_kinds.h"
#include "driver.h"
#include "problem.h"

namespace deform_conv::fuzz {
namespace {

constexpr int64_t kMaxExtent = std::numeric_limits<int32_t>::max();

using Shape = std::array<int64_t, 4>;

int64_t DrawLarge(Random& random) {
  return random.Pick<int64_t>({kMaxExtent, kMaxExtent + 1, int64_t{1} << 32, 3037000500,
                               int64_t{1} << 40, int64_t{1} << 62, INT64_MAX / 2, INT64_MAX - 1,
                               INT64_MAX});
}

int64_t DrawSmall(Random& random) { return random.Pick<int64_t>({0, 1, 1, 2, 2, 3, 4, 8}); }

int64_t DrawNegative(Random& random) {
  return random.Pick<int64_t>(
      {-1, -2, -kMaxExtent - 1, -kMaxExtent - 2, INT64_MIN / 2, INT64_MIN + 1, INT64_MIN});
}

std::string TextOf(const DeformConvAttributes& attributes, const DeformConvShapes& shapes) {
  std::ostringstream text;
  const auto print = [&text](const char* name, const Shape& shape) {
    text << name << " [" << shape[0] << ", " << shape[1] << ", " << shape[2] << ", " << shape[3]
         << "] ";
  };
  print("input", shapes.input);
  if (shapes.has_filters) {
    print("filters", shapes.filters);
  } else {
    text << "kernel_size " << attributes.kernel_h << ", " << attributes.kernel_w << " ";
  }
  print("offset", shapes.offset);
  if (shapes.has_mask) print("mask", shapes.mask);
  const char* const paddings[] = {"SAME", "VALID", "EXPLICIT"};
  text << "strides " << attributes.stride_h << ", " << attributes.stride_w << " dilations "
       << attributes.dilation_h << ", " << attributes.dilation_w << " padding "
       << paddings[static_cast<int>(attributes.padding)] << " ";
  print("of",
        {attributes.pad_top, attributes.pad_bottom, attributes.pad_left, attributes.pad_right});
  text << "deform_groups " << attributes.deform_groups;
  return text.str();
}

std::string Make(const DeformConvAttributes& attributes, const DeformConvShapes& shapes,
                 DeformConvParams* params) {
  Describe(nullptr, TextOf(attributes, shapes));
  const std::string error = MakeParams(attributes, shapes, params);
  if (!error.empty()) ExpectErrorText(error);
  return error;
}

// Makes each dimension unknown with this probability.
void Forget(Random& random, double probability, DeformConvShapes& shapes) {
  for (Shape* shape : {&shapes.input, &shapes.filters, &shapes.offset, &shapes.mask}) {
    for (int64_t& size : *shape) {
      if (random.Chance(probability)) size = kUnknown;
    }
  }
}

// --- Valid sizes, of which some are unknown ---

void ExpectUnlessUnknown(const char* name, int64_t actual, int64_t expected, bool is_known) {
  if (actual == expected || (!is_known && actual == kUnknown)) return;
  throw Finding(std::string("params.") + name + " is " + std::to_string(actual) + "; " +
                std::to_string(expected) + " expected");
}

void RunPartlyKnown(Random& random) {
  const Problem problem = DrawSizes(random, kShaping);
  DeformConvShapes shapes = problem.shapes;
  Forget(random, random.Pick({0.1, 0.4, 0.8}), shapes);
  DeformConvParams params;
  const std::string error = Make(problem.attributes, shapes, &params);
  if (!error.empty()) throw Finding("valid sizes are refused: " + error);

  const auto known = [](int64_t size) { return size != kUnknown; };
  const auto any_knows = [&](int axis) {
    return known(shapes.offset[axis]) || (shapes.has_mask && known(shapes.mask[axis]));
  };
  const bool is_same = problem.attributes.padding == Padding::kSame;
  const bool has_filters = shapes.has_filters;
  const auto filters_know = [&](int axis) { return !has_filters || known(shapes.filters[axis]); };
  const auto out_is_known = [&](int axis) {
    return any_knows(axis) || (known(shapes.input[axis]) && (is_same || filters_know(axis - 1)));
  };
  const DeformConvParams& expected = problem.params;
  ExpectUnlessUnknown("batch", params.batch, expected.batch,
                      known(shapes.input[0]) || any_knows(0));
  ExpectUnlessUnknown("out_h", params.out_h, expected.out_h, out_is_known(1));
  ExpectUnlessUnknown("out_w", params.out_w, expected.out_w, out_is_known(2));
  ExpectUnlessUnknown("in_h", params.in_h, expected.in_h, known(shapes.input[1]));
  ExpectUnlessUnknown("in_w", params.in_w, expected.in_w, known(shapes.input[2]));
  ExpectUnlessUnknown("in_channels", params.in_channels, expected.in_channels,
                      known(shapes.input[3]));
  ExpectUnlessUnknown("out_channels", params.out_channels, expected.out_channels,
                      known(has_filters ? shapes.filters[3] : shapes.input[3]));
  ExpectUnlessUnknown("groups", params.groups, expected.groups,
                      known(shapes.input[3]) && filters_know(2));
}

// --- Valid sizes but for one ---

// Makes one thing wrong, and returns the argument that the error has to name; an empty text where
// this problem has no such thing.
std::string MakeWrong(Random& random, Problem& problem) {
  DeformConvAttributes& attributes = problem.attributes;
  DeformConvShapes& shapes = problem.shapes;
  const int64_t out_of_range = random.Chance(0.5)   ? kMaxExtent + random.Between(1, 3)
                               : random.Chance(0.5) ? DrawNegative(random)
                                                    : INT64_MAX;
  // Another size of a tensor.
  const auto change = [&random](int64_t& size) {
    const int64_t before = size;
    while (size == before) size = random.Chance(0.5) ? DrawSmall(random) : DrawLarge(random);
  };
  switch (random.Between(0, 11)) {
    case 0:
      (random.Chance(0.5) ? attributes.stride_h : attributes.stride_w) =
          random.Chance(0.3) ? 0 : out_of_range;
      return "strides";
    case 1:
      (random.Chance(0.5) ? attributes.dilation_h : attributes.dilation_w) =
          random.Chance(0.3) ? 0 : out_of_range;
      return "dilations";
    case 2: {
      attributes.padding = Padding::kExplicit;
      int64_t* const pads[] = {&attributes.pad_top, &attributes.pad_bottom, &attributes.pad_left,
                               &attributes.pad_right};
      *pads[random.Between(0, 3)] = out_of_range;
      return "padding";
    }
    case 3:
      attributes.deform_groups = random.Chance(0.3) ? 0 : out_of_range;
      return "deform_groups";
    case 4:
      attributes.deform_groups = problem.params.in_channels + random.Between(1, 5);
      return "deform_groups";
    case 5:
      if (!shapes.has_filters) {
        (random.Chance(0.5) ? attributes.kernel_h : attributes.kernel_w) =
            random.Chance(0.3) ? 0 : out_of_range;
        return "kernel_size";
      }
      shapes.filters[random.Between(0, 3)] = 0;
      return "filters";
    case 6:
      if (!shapes.has_filters) return "";
      shapes.filters[2] = problem.params.in_channels + random.Between(1, 5);
      return "filters";
    case 7:
      if (!shapes.has_filters || problem.params.groups == 1) return "";
      shapes.filters[3] += random.Between(1, problem.params.groups - 1);
      return "filters";
    case 8:
      change(shapes.offset[random.Between(0, 3)]);
      return "offset";
    case 9:
      if (!shapes.has_mask) return "";
      change(shapes.mask[random.Between(0, 3)]);
      return shapes.has_filters ? "mask" : "weights";
    case 10:
      shapes.input[3] = 0;
      return "input";
    default:
      shapes.input[random.Between(1, 2)] = kMaxExtent + random.Between(1, 3);
      return "input";
  }
}

void RunWrong(Random& random) {
  Problem problem = DrawSizes(random, kShaping);
  const std::string argument = MakeWrong(random, problem);
  if (argument.empty()) return;
  DeformConvParams params;
  const std::string error = Make(problem.attributes, problem.shapes, &params);
  if (error.find(argument) == std::string::npos) {
    throw Finding("an error that names " + argument + " expected; it is: " + error);
  }
}

// --- Any numbers ---

void RunAnything(Random& random) {
  DeformConvAttributes attributes;
  // A single wrong attribute ends it, so most are right.
  const double share_odd = random.Pick({0.0, 0.02, 0.2});
  const auto draw_attribute = [&random, share_odd] {
    return !random.Chance(share_odd) ? random.Pick<int64_t>({1, 1, 2, 3})
           : random.Chance(0.6)      ? random.Between(1, kMaxExtent)
           : random.Chance(0.5)      ? DrawLarge(random)
                                     : DrawNegative(random);
  };
  attributes.padding = random.Pick({Padding::kSame, Padding::kValid, Padding::kExplicit});
  for (int64_t* number :
       {&attributes.stride_h, &attributes.stride_w, &attributes.dilation_h, &attributes.dilation_w,
        &attributes.pad_top, &attributes.pad_bottom, &attributes.pad_left, &attributes.pad_right,
        &attributes.deform_groups, &attributes.kernel_h, &attributes.kernel_w}) {
    *number = draw_attribute();
  }
  DeformConvShapes shapes;
  shapes.has_filters = !random.Chance(kShaping.without_filters);
  shapes.has_mask = !shapes.has_filters || random.Chance(0.5);
  const double share_large = random.Pick({0.03, 0.1, 0.4}),
               share_unknown = random.Pick({0.0, 0.3, 0.7});
  for (Shape* shape : {&shapes.input, &shapes.filters, &shapes.offset, &shapes.mask}) {
    for (int64_t& size : *shape) {
      size = random.Chance(share_unknown) ? kUnknown
             : random.Chance(share_large) ? DrawLarge(random)
                                          : DrawSmall(random);
    }
  }
  DeformConvParams params;
  if (!Make(attributes, shapes, &params).empty()) return;
  // A size of 0, the output's too, makes room for others that are too large together.
  bool any_zero = params.out_h == 0 || params.out_w == 0;
  for (const Shape& shape : {shapes.input, shapes.filters, shapes.offset, shapes.mask}) {
    any_zero = any_zero || std::count(shape.begin(), shape.end(), 0) > 0;
  }
  if (any_zero) return;
  // What is right is right too where less is known.
  Forget(random, 0.3, shapes);
  const std::string error = Make(attributes, shapes, &params);
  if (!error.empty()) {
    throw Finding("refused, but accepted where more is known: " + error);
  }
}

// No tensor has such sizes, but a caller of the C interface may.
void RunNegative(Random& random) {
  Problem problem = DrawSizes(random, kShaping);
  Shape* const shapes[] = {&problem.shapes.input, &problem.shapes.filters, &problem.shapes.offset,
                           &problem.shapes.mask};
  int64_t tensor = random.Between(0, problem.shapes.has_mask ? 3 : 2);
  if (tensor == 1 && !problem.shapes.has_filters) tensor = 0;
  int64_t& size = (*shapes[tensor])[random.Between(0, 3)];
  do {
    size = DrawNegative(random);
  } while (size == kUnknown);
  DeformConvParams params;
  if (Make(problem.attributes, problem.shapes, &params).empty()) {
    throw Finding("a negative size is accepted");
  }
}

}  // namespace

void RunSizes(Random& random) {
  const double kind = random.Unit();
  if (kind < 0.35) return RunPartlyKnown(random);
  if (kind < 0.65) return RunWrong(random);
  if (kind < 0.97) return RunAnything(random);
  RunNegative(random);
}

}  // namespace deform_conv::fuzz
