// Depthwise layers, without columns.

#ifndef DEFORM_CONV_CORE_GPU_DEPTHWISE_H_
#define DEFORM_CONV_CORE_GPU_DEPTHWISE_H_

#include <string>

#include "core/gpu/implementations.h"

namespace deform_conv {

template <typename T>
std::string ForwardDepthwise(const ForwardCall<T>& call);
template <typename T>
std::string ForwardStagedDepthwise(const ForwardCall<T>& call);
template <typename T>
std::string ForwardMmaAggregate(const ForwardCall<T>& call);
template <typename T>
std::string BackpropDepthwise(const BackwardCall<T>& call);
template <typename T>
std::string BackpropMmaAggregate(const BackwardCall<T>& call);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_DEPTHWISE_H_
