// The CPU half of the core behind a C interface, with threads of its own: to test and time it
// beside any framework, without TensorFlow.

#ifndef DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CPU_H_
#define DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CPU_H_

#include "core/c_api/deform_conv2d_problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// Computes on the caller's thread and `threads` - 1 others, which sleep between calls; `threads` is
// at most 1024. All tensors are of element type 0 or 1. Returns null, or what went wrong, valid
// until the thread's next call.
DEFORM_CONV_API const char* deform_conv2d_forward_cpu(const DeformConvProblem* problem,
                                                      const void* input, const void* filters,
                                                      const void* offset, const void* mask,
                                                      void* output, int threads);

// Null for a gradient that is not wanted.
DEFORM_CONV_API const char* deform_conv2d_backward_cpu(const DeformConvProblem* problem,
                                                       const void* input, const void* filters,
                                                       const void* offset, const void* mask,
                                                       const void* grad_output, void* grad_input,
                                                       void* grad_filters, void* grad_offset,
                                                       void* grad_mask, int threads);

#ifdef __cplusplus
}
#endif

#endif  // DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CPU_H_
