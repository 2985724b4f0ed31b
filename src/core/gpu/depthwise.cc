#include "core/gpu/depthwise.h"

#include <algorithm>

#include "core/cuda/fused/limits.h"
#include "core/cuda/general/kernels.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/gradient_sum.h"
#include "core/gpu/some_images.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

// The most that the float copy of the input's gradient takes, unless an image takes more.
constexpr int64_t kCopyBytes = int64_t{64} << 20;

// By as many images at a time as `forward` takes.
template <typename T, typename Forward>
std::string ForwardBy(const Forward& forward, const ForwardCall<T>& call) {
  return ForParts<T>(call.params, call.tensors, cuda::FusedImages(call.params),
                     [&](const SomeImages<T>& some) {
                       return forward(some.params(), some.tensors(), call.filters,
                                      call.output + some.position() * call.params.out_channels,
                                      call.device.stream());
                     });
}

// By as many images at a time as `backward` takes, and float sums of gradients.
template <typename T, typename Backward>
std::string BackpropBy(const Backward& backward, const BackwardCall<T>& call) {
  const DeformConvParams& params = call.params;
  const DeformConvGradients<T, ComputeType<T>>& gradients = call.gradients;
  GradientSum<T> filters_sum(call.device), input_sum(call.device);
  int64_t images = std::min(cuda::FusedImages(params), std::max<int64_t>(params.batch, 1));
  const int64_t image_bytes = params.image_size() * GradientSum<T>::kElementBytes;
  if (gradients.sampled.input != nullptr && image_bytes > 0) {
    images = PartOf(params.batch, std::clamp<int64_t>(kCopyBytes / image_bytes, 1, images));
    DEFORM_CONV_RETURN_IF_ERROR(input_sum.Allocate(images * params.image_size()));
  }
  if (gradients.filters != nullptr) {
    DEFORM_CONV_RETURN_IF_ERROR(filters_sum.Allocate(params.filters_size()));
    DEFORM_CONV_RETURN_IF_ERROR(filters_sum.Begin(gradients.filters, params.filters_size()));
  }
  for (int64_t first = 0; first < params.batch; first += images) {
    const SomeImages<T> some(params, call.tensors, first, images);
    const SampledGradients<T, ComputeType<T>> wanted = some.Of(gradients.sampled);
    DEFORM_CONV_RETURN_IF_ERROR(
        input_sum.Begin(wanted.input, some.params().batch * params.image_size()));
    DEFORM_CONV_RETURN_IF_ERROR(backward(some.params(), some.tensors(), call.filters,
                                         call.grad_output + some.position() * params.out_channels,
                                         {input_sum.data(), wanted.offset, wanted.mask},
                                         filters_sum.data(), call.device.stream()));
    DEFORM_CONV_RETURN_IF_ERROR(input_sum.Store());
  }
  return filters_sum.Store();
}

}  // namespace

template <typename T>
std::string ForwardDepthwise(const ForwardCall<T>& call) {
  return ForwardBy(cuda::DepthwiseForward<T>, call);
}

template <typename T>
std::string ForwardStagedDepthwise(const ForwardCall<T>& call) {
  return ForwardBy(cuda::StagedDepthwiseForward<T>, call);
}

template <typename T>
std::string ForwardMmaAggregate(const ForwardCall<T>& call) {
  const auto forward = [](const DeformConvParams& params,
                          const SampledTensors<T, ComputeType<T>>& tensors, const T*, T* output,
                          void* stream) {
    return cuda::MmaAggregateForward<T>(params, tensors, output, stream);
  };
  return ForwardBy(forward, call);
}

template <typename T>
std::string BackpropDepthwise(const BackwardCall<T>& call) {
  return BackpropBy(cuda::DepthwiseBackward<T>, call);
}

template <typename T>
std::string BackpropMmaAggregate(const BackwardCall<T>& call) {
  const auto backward = [](const DeformConvParams& params,
                           const SampledTensors<T, ComputeType<T>>& tensors, const T*,
                           const T* grad_output, const SampledGradients<ComputeType<T>>& gradients,
                           ComputeType<T>*, void* stream) {
    return cuda::MmaAggregateBackward<T>(params, tensors, grad_output, gradients, stream);
  };
  return BackpropBy(backward, call);
}

#define DEFORM_CONV_INSTANTIATE(T)                                       \
  template std::string ForwardDepthwise<T>(const ForwardCall<T>&);       \
  template std::string ForwardStagedDepthwise<T>(const ForwardCall<T>&); \
  template std::string ForwardMmaAggregate<T>(const ForwardCall<T>&);    \
  template std::string BackpropMmaAggregate<T>(const BackwardCall<T>&);  \
  template std::string BackpropDepthwise<T>(const BackwardCall<T>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
