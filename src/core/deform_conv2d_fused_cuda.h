// Kernels for GPUs of compute capability 9.0 in which samples and tensor cores meet: forward,
// without columns in memory; backward, from the columns' gradient to those of input, offset and
// mask. benchmarks/gpu_kernels.md explains them. For C++ without CUDA's headers.
//
// T is Half or BFloat16, or float for products in TF32. Functions that put work on a stream
// return an empty string, or which kernel could not be launched and why.

#ifndef DEFORM_CONV_CORE_DEFORM_CONV2D_FUSED_CUDA_H_
#define DEFORM_CONV_CORE_DEFORM_CONV2D_FUSED_CUDA_H_

#include <string>

#include "core/cuda_device.h"
#include "core/deform_im2col.h"
#include "core/params.h"

namespace deform_conv {

// Whether these kernels are part of this build, as they are where it is for compute capability 9.0.
// Nothing below may be called otherwise.
#ifdef DEFORM_CONV_FUSED_KERNELS
constexpr bool kFusedKernelsCompiled = true;
#else
constexpr bool kFusedKernelsCompiled = false;
#endif

// Whether the current GPU can run them.
bool FusedKernelsRunHere();

// Whether FusedForwardCuda can be called.
template <typename T>
bool FusedForwardFits(const DeformConvParams& params,
                      const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                      const T* output);

// As DeformConv2DForwardCuda.
template <typename T>
std::string FusedForwardCuda(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             CudaDevice& device, T* output);

// Whether DeformCol2ImRegionCuda can be called, with columns aligned to 16 bytes.
template <typename T>
bool DeformCol2ImRegionFits(const DeformConvParams& params,
                            const SampledTensors<T, ComputeType<T>>& tensors,
                            const SampledGradients<ComputeType<T>>& gradients);

// Positions are worked on in patches of so many rows and columns.
constexpr int kPatchSide = 8;

// As DeformCol2ImCuda; but few additions to gradients.input are left to memory, and of 16-bit
// types, samples are rounded as those of FusedForwardCuda. The fewer patches [begin, end) cut, the
// better.
template <typename T>
std::string DeformCol2ImRegionCuda(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                                   int64_t end, bool replace, T* columns,
                                   const SampledGradients<ComputeType<T>>& gradients, void* stream);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_DEFORM_CONV2D_FUSED_CUDA_H_
