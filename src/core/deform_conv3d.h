// Deformable convolution of volumes, forward and backward, on tensors in native form: as
// core/deform_conv2d.h with one more axis. There is one path: im2col, GEMM, col2im.

#ifndef DEFORM_CONV_CORE_DEFORM_CONV3D_H_
#define DEFORM_CONV_CORE_DEFORM_CONV3D_H_

#include <string>

#include "core/cpu/threads.h"
#include "core/deform_conv2d.h"
#include "core/export.h"
#include "core/gpu/device.h"
#include "core/params3d.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {

// Shapes of the tensors here:
//   input    [batch, in_d, in_h, in_w, in_channels]
//   filters  [kernel_d, kernel_h, kernel_w, in_channels / groups, out_channels]
//   offset   [batch, out_d, out_h, out_w, deform_groups, taps, {dz, dy, dx}]
//   mask     [batch, out_d, out_h, out_w, deform_groups, taps] or null
//   output   [batch, out_d, out_h, out_w, out_channels]

// --- CPU ---

// As DeformConv2DForwardCpu() and DeformConv2DBackwardCpu(). T is float or double.

template <typename T>
DEFORM_CONV_EXPORT void DeformConv3DForwardCpu(const DeformConv3DParams& params,
                                               const SampledTensors<T>& tensors, const T* filters,
                                               const CpuThreads& threads, T* output);

template <typename T>
DEFORM_CONV_EXPORT void DeformConv3DBackwardCpu(const DeformConv3DParams& params,
                                                const SampledTensors<T>& tensors, const T* filters,
                                                const T* grad_output, const CpuThreads& threads,
                                                bool add_filters,
                                                const DeformConvGradients<T>& gradients);

// --- GPU ---

// As DeformConv2DForwardGpu() and DeformConv2DBackwardGpu(). T is float, double, Half or BFloat16.

template <typename T>
DEFORM_CONV_EXPORT std::string DeformConv3DForwardGpu(
    const DeformConv3DParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
    const T* filters, GpuDevice& device, T* output);

template <typename T>
DEFORM_CONV_EXPORT std::string DeformConv3DBackwardGpu(
    const DeformConv3DParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
    const T* filters, const T* grad_output, GpuDevice& device,
    const DeformConvGradients<T, ComputeType<T>>& gradients);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_DEFORM_CONV3D_H_
