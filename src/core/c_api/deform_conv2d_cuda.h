// The CUDA half of the core behind a C interface, with memory and GEMM of the CUDA toolkit: to test
// and time kernels beside any framework that can hand over device pointers, without TensorFlow.

#ifndef DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CUDA_H_
#define DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CUDA_H_

#include "core/c_api/deform_conv2d_problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// Puts the work on `stream`, a cudaStream_t. Pointers are the device's; offset and mask and their
// gradients are float (double beside double). Returns null, or what went wrong, valid until the
// thread's next call.
DEFORM_CONV_API const char* deform_conv2d_forward_cuda(const DeformConvProblem* problem,
                                                       const void* input, const void* filters,
                                                       const void* offset, const void* mask,
                                                       void* output, void* stream);

// Null for a gradient that is not wanted.
DEFORM_CONV_API const char* deform_conv2d_backward_cuda(const DeformConvProblem* problem,
                                                        const void* input, const void* filters,
                                                        const void* offset, const void* mask,
                                                        const void* grad_output, void* grad_input,
                                                        void* grad_filters, void* grad_offset,
                                                        void* grad_mask, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CUDA_H_
