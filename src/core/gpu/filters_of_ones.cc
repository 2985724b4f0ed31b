#include "core/gpu/filters_of_ones.h"

#include "core/cuda/general/kernels.h"
#include "core/deform_conv2d.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

// The layer with filters, which are made in `ones`.
template <typename T>
std::string MakeOnes(const DeformConvParams& params, GpuDevice& device,
                     DeformConvParams* with_filters, T** ones) {
  *with_filters = params;
  with_filters->has_filters = true;
  const int64_t size = params.filters_size();
  DEFORM_CONV_RETURN_IF_ERROR(
      device.Allocate(size * int64_t{sizeof(T)}, reinterpret_cast<void**>(ones)));
  return cuda::FillWithOnes(size, *ones, device.stream());
}

}  // namespace

template <typename T>
std::string ForwardWithOnes(const ForwardCall<T>& call) {
  DeformConvParams params;
  T* ones;
  DEFORM_CONV_RETURN_IF_ERROR(MakeOnes(call.params, call.device, &params, &ones));
  return DeformConv2DForwardGpu<T>(params, call.tensors, ones, call.device, call.output);
}

template <typename T>
std::string BackpropWithOnes(const BackwardCall<T>& call) {
  T* const grad_input = call.gradients.sampled.input;
  if (call.params.out_positions() == 0) {  // and the kernel may be of any size
    if (grad_input == nullptr) return "";
    const int64_t size = call.params.batch * call.params.image_size();
    return cuda::Zero(grad_input, size * int64_t{sizeof(T)}, call.device.stream());
  }
  DeformConvParams params;
  T* ones;
  DEFORM_CONV_RETURN_IF_ERROR(MakeOnes(call.params, call.device, &params, &ones));
  return DeformConv2DBackwardGpu<T>(params, call.tensors, ones, call.grad_output, call.device,
                                    call.gradients);
}

#define DEFORM_CONV_INSTANTIATE(T)                                \
  template std::string ForwardWithOnes<T>(const ForwardCall<T>&); \
  template std::string BackpropWithOnes<T>(const BackwardCall<T>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
