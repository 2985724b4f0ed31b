// im2col, col2im, layout conversion and the like on every GPU: their launchers. For C++ without
// CUDA's headers; `stream` is a cudaStream_t.
//
// Each returns an empty string, or which kernel could not be launched and why. T is float, double,
// Half or BFloat16. Work on nothing launches nothing.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_KERNELS_H_
#define DEFORM_CONV_CORE_CUDA_GENERAL_KERNELS_H_

#include <cstdint>
#include <string>

#include "core/export.h"
#include "core/gpu/embedding.h"
#include "core/gpu/workspace.h"
#include "core/params.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {
namespace cuda {

// Writes the columns [end - begin, taps * in_channels] of positions [begin, end), all channels.
template <typename T>
std::string Im2Col(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   int64_t begin, int64_t end, T* columns, void* stream);

// From the columns' gradient at positions [begin, end), in `columns`: adds to gradients.input, in
// an order that is not fixed, and writes gradients.offset and gradients.mask at these positions.
// With `replace`, also writes the columns themselves over their gradient: what the filters'
// gradient needs next is at hand here.
template <typename T>
std::string Col2ImAtomic(const DeformConvParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, bool replace, T* columns,
                         const SampledGradients<ComputeType<T>>& gradients, void* stream);

// Adds to grad_input what Col2ImAtomic adds, in an order that is not fixed either. What a patch of
// positions brings to a region of pixels is summed up in shared memory first.
template <typename T>
std::string Col2ImRegions(const DeformConvParams& params,
                          const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                          int64_t end, const T* columns, ComputeType<T>* grad_input, void* stream);
// Writes what Col2ImAtomic writes besides: gradients.offset, gradients.mask, and with `replace` the
// columns. The input's region of a patch is read from shared memory.
template <typename T>
std::string Col2ImProducts(const DeformConvParams& params,
                           const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                           int64_t end, bool replace, T* columns,
                           const SampledGradients<ComputeType<T>>& gradients, void* stream);
// Why they cannot, or an empty string.
template <typename T>
std::string Col2ImRegionsMisfit(const DeformConvParams& params);
template <typename T>
std::string Col2ImProductsMisfit(const DeformConvParams& params);

// Adds to grad_input what Col2ImAtomic adds, but in an order that is always the same: the corners
// of all samples are sorted by pixel, and each pixel gathers its own. `columns` is left as it is.
template <typename T>
std::string Col2ImSorted(const DeformConvParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, const T* columns, ComputeType<T>* grad_input,
                         Workspace& workspace, void* stream);
// Why the corners of an image cannot be sorted, or an empty string.
std::string Col2ImSortedMisfit(const DeformConvParams& params);

// A depthwise layer's output: each convolution group has one input channel, and any number of
// output channels. No columns, no GEMM. At most FusedImages() images. Where the layer has no
// filters, `filters` is null in all depthwise functions.
template <typename T>
std::string DepthwiseForward(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             T* output, void* stream);
// Why it cannot, or an empty string.
template <typename T>
std::string DepthwiseForwardMisfit(const DeformConvParams& params);

// Likewise, from regions of the input in shared memory, with one output channel to an input
// channel.
template <typename T>
std::string StagedDepthwiseForward(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors,
                                   const T* filters, T* output, void* stream);
// Why it cannot, or is no faster, or an empty string.
template <typename T>
std::string StagedDepthwiseForwardMisfit(const DeformConvParams& params,
                                         const SampledTensors<T, ComputeType<T>>& tensors,
                                         const T* filters, const T* output);

// The output of a layer without filters, by tensor cores of compute capability 8.0 and up.
template <typename T>
std::string MmaAggregateForward(const DeformConvParams& params,
                                const SampledTensors<T, ComputeType<T>>& tensors, T* output,
                                void* stream);
// Why it cannot, or is no faster, or an empty string.
template <typename T>
std::string MmaAggregateForwardMisfit(const DeformConvParams& params,
                                      const SampledTensors<T, ComputeType<T>>& tensors,
                                      const T* output);

// A depthwise layer's gradients: adds to gradients.input and grad_filters, in an order that is not
// fixed, and writes those of offset and mask; null where one is not wanted. At most FusedImages()
// images.
template <typename T>
std::string DepthwiseBackward(const DeformConvParams& params,
                              const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                              const T* grad_output,
                              const SampledGradients<ComputeType<T>>& gradients,
                              ComputeType<T>* grad_filters, void* stream);
template <typename T>
std::string DepthwiseBackwardMisfit(const DeformConvParams& params);

// Likewise of a layer without filters, by tensor cores of compute capability 8.0 and up.
template <typename T>
std::string MmaAggregateBackward(const DeformConvParams& params,
                                 const SampledTensors<T, ComputeType<T>>& tensors,
                                 const T* grad_output,
                                 const SampledGradients<ComputeType<T>>& gradients, void* stream);
// Why it cannot, or is no faster, or an empty string.
template <typename T>
std::string MmaAggregateBackwardMisfit(const DeformConvParams& params,
                                       const SampledTensors<T, ComputeType<T>>& tensors,
                                       const T* grad_output);

// Converts a tensor in `format` to native form, and back.
template <typename From, typename To>
DEFORM_CONV_EXPORT std::string ToNative(DataFormat format, const TensorExtent& extent,
                                        const From* from, To* to, void* stream);
template <typename From, typename To>
DEFORM_CONV_EXPORT std::string FromNative(DataFormat format, const TensorExtent& extent,
                                          const From* from, To* to, void* stream);

// to[i] += from[i]
template <typename From, typename To>
std::string Add(int64_t count, const From* from, To* to, void* stream);

// to [rows, padded_channels] = from [rows, channels], with zeros after them; and back. Padded
// channels are whole vec16s, and begin at a multiple of 16 bytes. T has tensor cores.
template <typename T>
std::string PadChannels(int64_t rows, int64_t channels, const T* from, int64_t padded_channels,
                        T* to, void* stream);
template <typename T>
std::string UnpadChannels(int64_t rows, int64_t padded_channels, const T* from, int64_t channels,
                          T* to, void* stream);

// Writes the filters of the larger layer, zeros too. Sizes of channels are within 32 bits.
template <typename T>
std::string EmbedFilters(const Embedding& embedding, const T* filters, T* larger, void* stream);
// Writes those of the layer, or adds to them, from those of the larger one: what EmbedFilters()
// filled with zeros is left out. From has tensor cores, and To is From or float.
template <typename From, typename To>
std::string ExtractFilters(const Embedding& embedding, const From* larger, bool add, To* filters,
                           void* stream);

// to[i] = 1
template <typename T>
std::string FillWithOnes(int64_t count, T* to, void* stream);

// Sets memory to zero bytes.
std::string Zero(void* memory, int64_t bytes, void* stream);

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_KERNELS_H_
