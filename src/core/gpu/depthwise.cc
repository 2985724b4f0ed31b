#include "core/gpu/depthwise.h"

#include <algorithm>
#include <type_traits>

#include "core/cuda/fused/limits.h"
#include "core/cuda/general/kernels.h"
#include "core/gpu/some_images.h"
#include "core/integer_math.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

// The most that the float copy of the input's gradient takes, unless an image takes more.
constexpr int64_t kCopyBytes = int64_t{64} << 20;

}  // namespace

template <typename T>
std::string ForwardDepthwise(const ForwardCall<T>& call) {
  return ForParts<T>(
      call.params, call.tensors, cuda::FusedImages(call.params), [&](const SomeImages<T>& some) {
        return cuda::DepthwiseForward<T>(some.params(), some.tensors(), call.filters,
                                         call.output + some.position() * call.params.out_channels,
                                         call.device.stream());
      });
}

template <typename T>
std::string BackpropDepthwise(const BackwardCall<T>& call) {
  using Sum = ComputeType<T>;
  constexpr bool kSumsAreCopies = !std::is_same_v<T, Sum>;
  void* const stream = call.device.stream();
  const DeformConvParams& params = call.params;
  const DeformConvGradients<T, Sum>& gradients = call.gradients;
  const int64_t image_bytes = params.image_size() * sizeof(Sum);
  int64_t images = std::min(cuda::FusedImages(params), std::max<int64_t>(params.batch, 1));
  Sum *filters_sum = nullptr, *input_sum = nullptr;
  if (kSumsAreCopies && gradients.sampled.input != nullptr && image_bytes > 0) {
    images = std::clamp<int64_t>(kCopyBytes / image_bytes, 1, images);
    images = CeilDiv(params.batch, CeilDiv(params.batch, images));  // nearly equal parts
    DEFORM_CONV_RETURN_IF_ERROR(
        call.device.Allocate(images * image_bytes, reinterpret_cast<void**>(&input_sum)));
  }
  const int64_t filters_bytes = params.filters_size() * sizeof(Sum);
  if (gradients.filters != nullptr) {
    if constexpr (kSumsAreCopies) {
      DEFORM_CONV_RETURN_IF_ERROR(
          call.device.Allocate(filters_bytes, reinterpret_cast<void**>(&filters_sum)));
    } else {
      filters_sum = gradients.filters;
    }
    DEFORM_CONV_RETURN_IF_ERROR(cuda::Zero(filters_sum, filters_bytes, stream));
  }
  for (int64_t first = 0; first < params.batch; first += images) {
    const SomeImages<T> some(params, call.tensors, first, images);
    const SampledGradients<T, Sum> wanted = some.Of(gradients.sampled);
    if constexpr (!kSumsAreCopies) input_sum = wanted.input;
    const SampledGradients<Sum> sampled = {input_sum, wanted.offset, wanted.mask};
    const int64_t input_size = some.params().batch * params.image_size();
    if (input_sum != nullptr) {
      DEFORM_CONV_RETURN_IF_ERROR(cuda::Zero(input_sum, input_size * sizeof(Sum), stream));
    }
    DEFORM_CONV_RETURN_IF_ERROR(cuda::DepthwiseBackward<T>(
        some.params(), some.tensors(), call.filters,
        call.grad_output + some.position() * params.out_channels, sampled, filters_sum, stream));
    if constexpr (kSumsAreCopies) {
      if (wanted.input == nullptr) continue;
      DEFORM_CONV_RETURN_IF_ERROR((cuda::FromNative<Sum, T>(DataFormat::kNhwc, {1, input_size, 1},
                                                            input_sum, wanted.input, stream)));
    }
  }
  if constexpr (kSumsAreCopies) {
    if (filters_sum != nullptr) {
      return cuda::FromNative<Sum, T>(DataFormat::kNhwc, {1, params.filters_size(), 1}, filters_sum,
                                      gradients.filters, stream);
    }
  }
  return "";
}

#define DEFORM_CONV_INSTANTIATE(T)                                 \
  template std::string ForwardDepthwise<T>(const ForwardCall<T>&); \
  template std::string BackpropDepthwise<T>(const BackwardCall<T>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
