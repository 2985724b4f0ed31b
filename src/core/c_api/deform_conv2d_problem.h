// What the C interface computes.

#ifndef DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_PROBLEM_H_
#define DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_PROBLEM_H_

#include <stdint.h>

// Visible in a library whose other symbols are hidden.
#define DEFORM_CONV_API __attribute__((visibility("default")))

// One deformable convolution, or aggregation, which has no filters: pointers to them are null. All
// shapes are NHWC's; padding is explicit.
typedef struct {
  int64_t input[4];
  int64_t filters[4];  // KH, KW, 0, 0 where there are none
  int64_t offset[4];
  int64_t mask[4];  // all 0 where there is none
  int64_t stride[2], dilation[2];
  int64_t padding[4];  // top, bottom, left, right
  int64_t deform_groups;
  int64_t element_type;  // 0 float, 1 double, 2 half, 3 bfloat16; the last two on a GPU alone
  // On a GPU:
  int64_t allow_tf32;     // for element_type 0
  int64_t columns_bytes;  // bound on a chunk's columns; 0 for the default
  int64_t deterministic;  // whether sums must be the same in every run
  int64_t path;           // 0 any, 1 the general implementations, 2 those with a fused kernel
} DeformConvProblem;

#endif  // DEFORM_CONV_CORE_C_API_DEFORM_CONV2D_PROBLEM_H_
