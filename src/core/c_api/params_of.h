// Reading the C interface's arguments.

#ifndef DEFORM_CONV_CORE_C_API_PARAMS_OF_H_
#define DEFORM_CONV_CORE_C_API_PARAMS_OF_H_

#include <algorithm>
#include <string>

#include "core/c_api/deform_conv2d_problem.h"
#include "core/params.h"

namespace deform_conv {

// Returns an empty string, or what is wrong.
inline std::string ParamsOf(const DeformConvProblem& problem, DeformConvParams* params) {
  DeformConvAttributes attributes;
  attributes.stride_h = problem.stride[0];
  attributes.stride_w = problem.stride[1];
  attributes.dilation_h = problem.dilation[0];
  attributes.dilation_w = problem.dilation[1];
  attributes.padding = Padding::kExplicit;
  attributes.pad_top = problem.padding[0];
  attributes.pad_bottom = problem.padding[1];
  attributes.pad_left = problem.padding[2];
  attributes.pad_right = problem.padding[3];
  attributes.deform_groups = problem.deform_groups;
  attributes.kernel_h = problem.filters[0];
  attributes.kernel_w = problem.filters[1];
  DeformConvShapes shapes;
  std::copy_n(problem.input, 4, shapes.input.begin());
  std::copy_n(problem.filters, 4, shapes.filters.begin());
  std::copy_n(problem.offset, 4, shapes.offset.begin());
  std::copy_n(problem.mask, 4, shapes.mask.begin());
  shapes.has_mask = std::any_of(problem.mask, problem.mask + 4, [](int64_t n) { return n != 0; });
  shapes.has_filters = problem.filters[2] != 0 || problem.filters[3] != 0;
  for (const auto* shape : {&shapes.input, &shapes.filters, &shapes.offset, &shapes.mask}) {
    if (*std::min_element(shape->begin(), shape->end()) < 0) return "a size is negative";
  }
  return MakeParams(attributes, shapes, params);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_C_API_PARAMS_OF_H_
