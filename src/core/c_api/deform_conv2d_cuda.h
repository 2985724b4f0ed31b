// The CUDA half of the core behind a C interface, with memory and GEMM of the CUDA toolkit: to test
// and time kernels beside any framework that can hand over device pointers, without TensorFlow.

#ifndef DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CUDA_H_
#define DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_CUDA_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Visible in a library whose other symbols are hidden.
#define DEFORM_CONV_API __attribute__((visibility("default")))

// One deformable convolution, or aggregation, which has no filters. All shapes are NHWC's; padding
// is explicit.
typedef struct {
  int64_t input[4];
  int64_t filters[4];  // KH, KW, 0, 0 where there are none
  int64_t offset[4];
  int64_t mask[4];  // all 0 where there is none
  int64_t stride[2], dilation[2];
  int64_t padding[4];  // top, bottom, left, right
  int64_t deform_groups;
  int64_t element_type;   // 0 float, 1 double, 2 half, 3 bfloat16
  int64_t allow_tf32;     // for element_type 0
  int64_t columns_bytes;  // bound on a chunk's columns; 0 for the default
  int64_t deterministic;  // whether sums must be the same in every run
  int64_t path;           // 0 any, 1 the general implementations, 2 those with a fused kernel
} DeformConvProblem;

// Puts the work on `stream`, a cudaStream_t. Pointers are the device's; offset and mask and their
// gradients are float (double beside double). Returns null, or what went wrong, valid until the
// thread's next call.
DEFORM_CONV_API const char* deform_conv2d_forward_cuda(const DeformConvProblem* problem,
                                                       const void* input, const void* filters,
                                                       const void* offset, const void* mask,
                                                       void* output, void* stream);

// Null for a gradient that is not wanted. Filters that do not exist are null in both functions.
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
