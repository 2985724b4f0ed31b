// The single-threaded inner loops of the CPU, compiled once per instruction set and chosen at run
// time. Everything above them (tiles, threads, workspace) is compiled once.

#ifndef DEFORM_CONV_CORE_CPU_KERNELS_H_
#define DEFORM_CONV_CORE_CPU_KERNELS_H_

#include <cstdint>

#include "core/deform_im2col.h"
#include "core/gemm.h"
#include "core/layout.h"
#include "core/params.h"

namespace deform_conv {

// Inner loops for tensors in native form.
template <typename T>
struct CpuKernels {
  // Writes the columns of positions [begin, end).
  //   zero_pixel  [in_channels]  zeros, read where a corner lies outside the image
  //   columns     [end - begin, taps * slice.channels()]  written whole
  void (*im2col)(const DeformConvParams& params, const ChannelSlice& slice,
                 const SampledTensors<T>& tensors, int64_t begin, int64_t end, const T* zero_pixel,
                 T* columns);

  // Adds to `gradients` what the columns' gradient at positions [begin, end) means for the sampled
  // tensors. Gradients of offset and mask get the share of the slice's channels.
  //   grad_columns   [end - begin, taps * slice.channels()]
  //   zero_pixel     [in_channels]  as above
  //   ignored_pixel  [in_channels]  receives what falls outside the image
  void (*col2im)(const DeformConvParams& params, const ChannelSlice& slice,
                 const SampledTensors<T>& tensors, int64_t begin, int64_t end,
                 const T* grad_columns, const T* zero_pixel, T* ignored_pixel,
                 const SampledGradients<T>& gradients);

  // c = a * b, with one factor transposed as `form` says, or c += a * b.
  void (*gemm)(GemmForm form, const Matrix<const T>& a, const Matrix<const T>& b,
               const Matrix<T>& c, bool accumulate);
};

// Conversion of `Stored` tensors in either format from and to native form.
template <typename Stored>
struct CpuLayoutKernels {
  using T = ComputeType<Stored>;

  // Converts pixels [begin, end), counted over the whole batch.
  void (*to_native)(DataFormat format, const TensorExtent& extent, const Stored* tensor,
                    int64_t begin, int64_t end, T* native);
  void (*from_native)(DataFormat format, const TensorExtent& extent, const T* native, int64_t begin,
                      int64_t end, Stored* tensor);
};

// The kernels for this processor. T is float or double; Stored one of these, Half or BFloat16.
// Environment variable DEFORM_CONV_CPU_ISA (baseline, avx2, avx512) asks for a lower set than the
// processor has, for tests and comparisons.
template <typename T>
const CpuKernels<T>& SelectCpuKernels();
template <typename Stored>
const CpuLayoutKernels<Stored>& SelectCpuLayoutKernels();

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_KERNELS_H_
