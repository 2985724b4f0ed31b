// The pairs of types that the ops take: offset and mask are of the input's type, or float beside a
// 16-bit one.

#ifndef DEFORM_CONV_TF_TYPE_PAIRS_H_
#define DEFORM_CONV_TF_TYPE_PAIRS_H_

#include "tensorflow/core/framework/types.h"

// Calls a macro with each pair, T and Toffset, and further arguments.
#define DEFORM_CONV_FOR_TYPE_PAIRS(macro, ...)          \
  macro(float, float, __VA_ARGS__);                     \
  macro(double, double, __VA_ARGS__);                   \
  macro(Eigen::half, Eigen::half, __VA_ARGS__);         \
  macro(Eigen::half, float, __VA_ARGS__);               \
  macro(Eigen::bfloat16, Eigen::bfloat16, __VA_ARGS__); \
  macro(Eigen::bfloat16, float, __VA_ARGS__)

// What an op's kernel for one pair is registered with.
#define DEFORM_CONV_KERNEL_OF(TfT, TfOffsetT, device, name) \
  Name(name).Device(device).TypeConstraint<TfT>("T").TypeConstraint<TfOffsetT>("Toffset")

#endif  // DEFORM_CONV_TF_TYPE_PAIRS_H_
