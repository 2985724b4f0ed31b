// Fused kernels for GPUs of compute capability 9.0: their launchers. benchmarks/gpu_kernels.md
// explains them. For C++ without CUDA's headers; part of builds for that compute capability.
//
// T is Half or BFloat16, or float for products in TF32. Functions that put work on a stream return
// an empty string, or which kernel could not be launched and why. Those called Misfit return an
// empty string where the kernel can be called, or the reason why not.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_KERNELS_H_
#define DEFORM_CONV_CORE_CUDA_SM90_KERNELS_H_

#include <cstdint>
#include <string>

#include "core/gpu/device.h"
#include "core/params.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {
namespace cuda {

// As DeformConv2DForwardGpu.
template <typename T>
std::string ImplicitGemmSm90(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             GpuDevice& device, T* output);
template <typename T>
std::string ImplicitGemmSm90Misfit(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors,
                                   const T* filters, const T* output);

// Positions are worked on in square patches of this side.
constexpr int kPatchSide = 8;

// As Col2ImAtomic, but few additions to gradients.input are left to memory, and of 16-bit types,
// samples are rounded as those of ImplicitGemmSm90. `columns` is aligned to 16 bytes. The fewer
// patches [begin, end) cuts, the better.
template <typename T>
std::string RegionScatterSm90(const DeformConvParams& params,
                              const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                              int64_t end, bool replace, T* columns,
                              const SampledGradients<ComputeType<T>>& gradients, void* stream);
template <typename T>
std::string RegionScatterSm90Misfit(const DeformConvParams& params,
                                    const SampledTensors<T, ComputeType<T>>& tensors,
                                    const SampledGradients<ComputeType<T>>& gradients);

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_KERNELS_H_
