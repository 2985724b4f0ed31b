// Layers without filters, computed as layers with filters of ones.

#ifndef DEFORM_CONV_CORE_GPU_FILTERS_OF_ONES_H_
#define DEFORM_CONV_CORE_GPU_FILTERS_OF_ONES_H_

#include <string>

#include "core/gpu/implementations.h"

namespace deform_conv {

template <typename T>
std::string ForwardWithOnes(const ForwardCall<T>& call);
template <typename T>
std::string BackpropWithOnes(const BackwardCall<T>& call);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_FILTERS_OF_ONES_H_
