// Deformable convolution, forward and backward, on tensors in native form.

#ifndef DEFORM_CONV_CORE_DEFORM_CONV2D_H_
#define DEFORM_CONV_CORE_DEFORM_CONV2D_H_

#include <cstdint>
#include <functional>

#include "core/deform_im2col.h"
#include "core/params.h"

namespace deform_conv {

// The threads to compute on.
struct CpuThreads {
  int count = 1;
  // Calls work(i) for each i in [0, count), side by side, and returns when all are done. Unused if
  // `count` is 1.
  std::function<void(int count, const std::function<void(int)>& work)> run;
};

// Both functions allocate workspace and throw std::bad_alloc where there is none left.

// output [batch, out_h, out_w, out_channels] = deformable convolution of the tensors with
// filters [kernel_h, kernel_w, in_channels / groups, out_channels]. T is float or double.
template <typename T>
void DeformConv2DForwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                            const T* filters, const CpuThreads& threads, T* output);

// What a backward pass is to write; null where a gradient is not wanted.
template <typename T>
struct DeformConvGradients {
  SampledGradients<T> sampled;
  T* filters;
};

// Writes each wanted gradient, given that of the output. For one number of threads the result is
// the same in every run; for different ones it differs by rounding.
template <typename T>
void DeformConv2DBackwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                             const T* filters, const T* grad_output, const CpuThreads& threads,
                             const DeformConvGradients<T>& gradients);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_DEFORM_CONV2D_H_
