// Backward on a GPU, by the implementation of lowest cost that fits.

#include "core/deform_conv2d.h"
#include "core/gpu/implementations.h"
#include "core/return_if_error.h"

namespace deform_conv {

template <typename T>
std::string DeformConv2DBackwardGpu(const DeformConvParams& params,
                                    const SampledTensors<T, ComputeType<T>>& tensors,
                                    const T* filters, const T* grad_output, GpuDevice& device,
                                    const DeformConvGradients<T, ComputeType<T>>& gradients) {
  DeformConvGradients<T, ComputeType<T>> wanted = gradients;
  // An empty gradient is done. What sums it up would have no memory, as if it were not wanted.
  if (params.batch * params.image_size() == 0) wanted.sampled.input = nullptr;
  if (!wanted.sampled.any() && wanted.filters == nullptr) return "";
  const BackwardCall<T> call = {params, tensors, filters, grad_output, wanted, device};
  const Implementation<BackwardCall<T>>* implementation;
  DEFORM_CONV_RETURN_IF_ERROR(
      Choose(BackwardImplementations<T>(), "gradients", call, &implementation));
  return implementation->run(call);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                           \
  template std::string DeformConv2DBackwardGpu<T>(                                           \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*, \
      GpuDevice&, const DeformConvGradients<T, ComputeType<T>>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
