// Backward by columns, on any GPU.

#ifndef DEFORM_CONV_CORE_GPU_COLUMNS_BACKWARD_H_
#define DEFORM_CONV_CORE_GPU_COLUMNS_BACKWARD_H_

#include <string>

#include "core/gpu/implementations.h"

namespace deform_conv {

template <typename T>
std::string BackpropByColumns(const BackwardCall<T>& call);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_COLUMNS_BACKWARD_H_
