// The ops' shape functions, for any number of spatial axes.

#ifndef DEFORM_CONV_TF_SHAPE_FUNCTIONS_H_
#define DEFORM_CONV_TF_SHAPE_FUNCTIONS_H_

#include <cstddef>
#include <vector>

#include "tensorflow/core/framework/shape_inference.h"
#include "tf/op_attributes.h"

namespace deform_conv {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// The dimensions of input `index`, kUnknown where they are; `rank` of them where that is unknown.
inline std::vector<int64_t> Dimensions(InferenceContext* context, int index, std::size_t rank) {
  const ShapeHandle shape = context->input(index);
  if (!context->RankKnown(shape)) return std::vector<int64_t>(rank, kUnknown);
  std::vector<int64_t> dimensions;
  for (int i = 0; i < context->Rank(shape); ++i) {
    dimensions.push_back(context->Value(context->Dim(shape, i)));
  }
  return dimensions;
}

template <std::size_t axes>
absl::Status InferParams(InferenceContext* context, Operation operation,
                         OpAttributes<axes>* attributes, ParamsOf<axes>* params) {
  TF_RETURN_IF_ERROR(ReadAttributes(context, operation, attributes));
  const auto dimensions = [context](int index) { return Dimensions(context, index, axes + 2); };
  return MakeParamsOf(*attributes, dimensions, params);
}

template <std::size_t axes, Operation kOperation = Operation::kConvolve>
absl::Status ForwardShape(InferenceContext* context) {
  OpAttributes<axes> attributes;
  ParamsOf<axes> params;
  TF_RETURN_IF_ERROR(InferParams(context, kOperation, &attributes, &params));
  std::vector<DimensionHandle> dimensions;
  for (const int64_t size : OutputShapeOf<axes>(attributes.format, params)) {
    dimensions.push_back(context->MakeDim(size));
  }
  context->set_output(0, context->MakeShape(dimensions));
  return absl::OkStatus();
}

// Each gradient has its argument's shape, or is empty where it is not wanted.
template <std::size_t axes, Operation kOperation = Operation::kConvolve>
absl::Status GradShape(InferenceContext* context) {
  OpAttributes<axes> attributes;
  ParamsOf<axes> params;
  TF_RETURN_IF_ERROR(InferParams(context, kOperation, &attributes, &params));
  const auto grad_output = Dimensions(context, context->num_inputs() - 1, axes + 2);
  TF_RETURN_IF_ERROR(CheckGradOutput<axes>(attributes.format, params, grad_output));
  bool wanted[kArguments];
  TF_RETURN_IF_ERROR(ReadWanted(context, attributes, wanted));
  for (int i = 0; i < context->num_outputs(); ++i) {
    const bool is_wanted = wanted[attributes.ArgumentAt(i)];
    context->set_output(i, is_wanted ? context->input(i) : context->Vector(0));
  }
  return absl::OkStatus();
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_SHAPE_FUNCTIONS_H_
