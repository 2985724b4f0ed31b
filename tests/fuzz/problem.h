// A random problem: sizes and the values of all tensors.

#ifndef DEFORM_CONV_TESTS_FUZZ_PROBLEM_H_
#define DEFORM_CONV_TESTS_FUZZ_PROBLEM_H_

#include <string>
#include <vector>

#include "core/params.h"
#include "core/types.h"
#include "random.h"

namespace deform_conv::fuzz {

struct Problem {
  ElementType type;
  DeformConvAttributes attributes;
  DeformConvShapes shapes;
  DeformConvParams params;  // from formulas of its own, not the core's
  // Numbers of the element type; those of offset and mask are float's (double's beside double).
  // Where a layer has no filters, these are the filters of ones that it computes the same with.
  std::vector<double> input, filters, offset, mask, grad_output;
  std::vector<double> filters_before;  // what the filters' gradient may be added to
  std::string values;                  // how they were drawn
};

struct Shaping {
  double work = 1;      // how large problems are
  bool eights = false;  // whether a group's channels are multiples of 8
  // The share of layers without filters; none are of eights.
  double without_filters = 0;
};

// Sizes and attributes alone, valid.
Problem DrawSizes(Random& random, const Shaping& shaping = {});

// Draws the values too.
Problem DrawProblem(Random& random, ElementType type, const Shaping& shaping = {});

// Sizes, attributes and how the values were drawn; with `numbers`, the values too.
std::string Describe(const Problem& problem, bool numbers);

// The coordinate on one axis without an offset.
inline int64_t BaseOf(int64_t position, int64_t stride, int64_t pad, int64_t tap,
                      int64_t dilation) {
  return position * stride - pad + tap * dilation;
}

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_PROBLEM_H_
