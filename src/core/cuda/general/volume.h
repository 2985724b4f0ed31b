// im2col and col2im over volumes on every GPU: their launchers, as in cuda/general/kernels.h.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_VOLUME_H_
#define DEFORM_CONV_CORE_CUDA_GENERAL_VOLUME_H_

#include <cstdint>
#include <string>

#include "core/gpu/workspace.h"
#include "core/params3d.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {
namespace cuda {

// Writes the columns [end - begin, taps * in_channels] of positions [begin, end), all channels.
template <typename T>
std::string VolumeIm2Col(const DeformConv3DParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, T* columns, void* stream);

// From the columns' gradient at positions [begin, end), in `columns`: adds to gradients.input, in
// an order that is not fixed, and writes gradients.offset and gradients.mask at these positions.
// With `replace`, also writes the columns themselves over their gradient.
template <typename T>
std::string VolumeCol2Im(const DeformConv3DParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, bool replace, T* columns,
                         const SampledGradients<ComputeType<T>>& gradients, void* stream);

// Adds to grad_input what VolumeCol2Im adds, but in an order that is always the same, as
// Col2ImSorted does. `columns` is left as it is.
template <typename T>
std::string VolumeCol2ImSorted(const DeformConv3DParams& params,
                               const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                               int64_t end, const T* columns, ComputeType<T>* grad_input,
                               Workspace& workspace, void* stream);

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_VOLUME_H_
