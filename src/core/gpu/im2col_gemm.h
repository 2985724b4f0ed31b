// Forward by im2col and GEMM, on every GPU: chunk by chunk of positions.

#ifndef DEFORM_CONV_CORE_GPU_IM2COL_GEMM_H_
#define DEFORM_CONV_CORE_GPU_IM2COL_GEMM_H_

#include <string>

#include "core/gpu/implementations.h"

namespace deform_conv {

template <typename T>
std::string Im2ColGemm(const ForwardCall<T>& call);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_IM2COL_GEMM_H_
