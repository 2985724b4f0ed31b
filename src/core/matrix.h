// Row-major matrices, what a GEMM takes, and where a convolution group lies within tensors.

#ifndef DEFORM_CONV_CORE_MATRIX_H_
#define DEFORM_CONV_CORE_MATRIX_H_

#include <cstdint>

#include "core/params.h"

namespace deform_conv {

// A row-major matrix within a larger one: row i begins at data + i * stride.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, cols;
  int64_t stride;
};

template <typename T>
Matrix<const T> AsConst(const Matrix<T>& matrix) {
  return {matrix.data, matrix.rows, matrix.cols, matrix.stride};
}

// Rows [begin, begin + count) of `matrix`.
template <typename T>
Matrix<T> RowsOf(const Matrix<T>& matrix, int64_t begin, int64_t count) {
  return {matrix.data + begin * matrix.stride, count, matrix.cols, matrix.stride};
}

// Matrices of one size, each of which begins `distance` elements after the one before.
template <typename T>
struct MatrixBatch {
  Matrix<T> first;
  int64_t distance;
};

// Which operand is transposed.
enum class GemmForm { kPlain, kTransposeA, kTransposeB };

// --- Convolution groups ---

// The group's filters [taps * group_in_channels, group_out_channels], within filters or a gradient
// of filters.
template <typename T>
Matrix<T> GroupFilters(const DeformConvParams& params, int64_t group, T* filters) {
  return {filters + group * params.group_out_channels(), params.taps() * params.group_in_channels(),
          params.group_out_channels(), params.out_channels};
}

// The group's output channels at positions [begin, end), within an output or its gradient.
template <typename T>
Matrix<T> GroupOutput(const DeformConvParams& params, int64_t group, T* output, int64_t begin,
                      int64_t end) {
  const int64_t channels = params.group_out_channels();
  return {output + begin * params.out_channels + group * channels, end - begin, channels,
          params.out_channels};
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_MATRIX_H_
