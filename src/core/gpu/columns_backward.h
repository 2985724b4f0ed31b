// Backward by columns, on any GPU.

#ifndef DEFORM_CONV_CORE_GPU_COLUMNS_BACKWARD_H_
#define DEFORM_CONV_CORE_GPU_COLUMNS_BACKWARD_H_

#include <string>

#include "core/gpu/implementations.h"

namespace deform_conv {

// Chooses what gives the gradients of input, offset and mask, of which one is wanted.
template <typename T>
std::string ChooseCol2Im(const BackwardCall<T>& call, const Col2ImImplementation<T>** chosen);

template <typename T>
std::string BackpropByColumns(const BackwardCall<T>& call);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_COLUMNS_BACKWARD_H_
