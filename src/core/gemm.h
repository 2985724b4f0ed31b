// Row-major matrices and what a GEMM takes, whatever the device.

#ifndef DEFORM_CONV_CORE_GEMM_H_
#define DEFORM_CONV_CORE_GEMM_H_

#include <cstdint>

namespace deform_conv {

// A row-major matrix within a larger one: row i begins at data + i * stride.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t stride;
};

// Which of the two factors is transposed.
enum class GemmForm { kPlain, kTransposeA, kTransposeB };

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GEMM_H_
