// Forward on a GPU, by the implementation of lowest cost that fits.

#include "core/deform_conv2d.h"
#include "core/gpu/implementations.h"
#include "core/return_if_error.h"

namespace deform_conv {

template <typename T>
std::string DeformConv2DForwardGpu(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors,
                                   const T* filters, GpuDevice& device, T* output) {
  const ForwardCall<T> call = {params, tensors, filters, output, device};
  const Implementation<ForwardCall<T>>* implementation;
  DEFORM_CONV_RETURN_IF_ERROR(Choose(ForwardImplementations<T>(), "output", call, &implementation));
  return implementation->run(call);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                         \
  template std::string DeformConv2DForwardGpu<T>(const DeformConvParams&,                  \
                                                 const SampledTensors<T, ComputeType<T>>&, \
                                                 const T*, GpuDevice&, T*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
