// Layers whose channels tensor cores do not take, computed as part of larger ones.

#ifndef DEFORM_CONV_CORE_GPU_EMBEDDED_H_
#define DEFORM_CONV_CORE_GPU_EMBEDDED_H_

#include <string>

#include "core/gpu/implementations.h"

namespace deform_conv {

template <typename T>
std::string ForwardEmbedded(const ForwardCall<T>& call);
template <typename T>
std::string EmbeddedForwardMisfit(const ForwardCall<T>& call);

template <typename T>
std::string BackpropEmbedded(const BackwardCall<T>& call);
template <typename T>
std::string EmbeddedBackwardMisfit(const BackwardCall<T>& call);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_EMBEDDED_H_
