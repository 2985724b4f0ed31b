// GEMM on one CPU thread, by Eigen. Included only by cpu_kernels_isa.cc, which is compiled once
// per instruction set and gives Eigen a namespace of its own in each.

#ifndef DEFORM_CONV_CORE_GEMM_CPU_H_
#define DEFORM_CONV_CORE_GEMM_CPU_H_

#include "Eigen/Core"
#include "core/gemm.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

template <typename T>
using EigenMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <typename T>
auto MapConst(const Matrix<const T>& matrix) {
  return Eigen::Map<const EigenMatrix<T>, 0, Eigen::OuterStride<>>(
      matrix.data, matrix.rows, matrix.cols, Eigen::OuterStride<>(matrix.stride));
}

template <typename T>
void Gemm(GemmForm form, const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& c,
          bool accumulate) {
  const auto left = MapConst<T>(a);
  const auto right = MapConst<T>(b);
  Eigen::Map<EigenMatrix<T>, 0, Eigen::OuterStride<>> out(c.data, c.rows, c.cols,
                                                          Eigen::OuterStride<>(c.stride));
  if (!accumulate) out.setZero();
  switch (form) {
    case GemmForm::kPlain:
      out.noalias() += left * right;
      break;
    case GemmForm::kTransposeA:
      out.noalias() += left.transpose() * right;
      break;
    case GemmForm::kTransposeB:
      out.noalias() += left * right.transpose();
      break;
  }
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GEMM_CPU_H_
