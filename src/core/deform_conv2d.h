// Deformable convolution, forward and backward, on tensors in native form: the core's interface.

#ifndef DEFORM_CONV_CORE_DEFORM_CONV2D_H_
#define DEFORM_CONV_CORE_DEFORM_CONV2D_H_

#include <string>

#include "core/cpu/threads.h"
#include "core/export.h"
#include "core/gpu/device.h"
#include "core/params.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {

// Where params.has_filters is false, filters and their gradient are null in all functions.

// What a backward pass is to write; null where a gradient is not wanted.
template <typename T, typename OffsetT = T>
struct DeformConvGradients {
  SampledGradients<T, OffsetT> sampled;
  T* filters;
};

// --- CPU ---

// Both functions allocate workspace and throw std::bad_alloc where there is none left. T is float
// or double.

// output [batch, out_h, out_w, out_channels] = deformable convolution of the tensors with
// filters [kernel_h, kernel_w, in_channels / groups, out_channels].
template <typename T>
DEFORM_CONV_EXPORT void DeformConv2DForwardCpu(const DeformConvParams& params,
                                               const SampledTensors<T>& tensors, const T* filters,
                                               const CpuThreads& threads, T* output);

// Writes each wanted gradient, given that of the output; with `add_filters`, adds that of the
// filters to what is there. For one number of threads the result is the same in every run; for
// different ones it differs by rounding.
template <typename T>
DEFORM_CONV_EXPORT void DeformConv2DBackwardCpu(const DeformConvParams& params,
                                                const SampledTensors<T>& tensors, const T* filters,
                                                const T* grad_output, const CpuThreads& threads,
                                                bool add_filters,
                                                const DeformConvGradients<T>& gradients);

// --- GPU ---

// Both functions put all work on device.stream() and return an empty string, or what went wrong.
// They pass on what `device` throws.
// T is float, double, Half or BFloat16, and all pointers are the device's.

// As DeformConv2DForwardCpu.
template <typename T>
DEFORM_CONV_EXPORT std::string DeformConv2DForwardGpu(
    const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
    const T* filters, GpuDevice& device, T* output);

// As DeformConv2DBackwardCpu, but unless device.deterministic(), the input's gradient is summed in
// an order that is not fixed, and differs by rounding from run to run.
template <typename T>
DEFORM_CONV_EXPORT std::string DeformConv2DBackwardGpu(
    const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
    const T* filters, const T* grad_output, GpuDevice& device,
    const DeformConvGradients<T, ComputeType<T>>& gradients);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_DEFORM_CONV2D_H_
