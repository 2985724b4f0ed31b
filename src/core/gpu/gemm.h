// GEMMs of a convolution group's matrices on a GPU.

#ifndef DEFORM_CONV_CORE_GPU_GEMM_H_
#define DEFORM_CONV_CORE_GPU_GEMM_H_

#include <cstdint>
#include <string>

#include "core/gpu/device.h"
#include "core/matrix.h"
#include "core/params.h"
#include "core/types.h"

namespace deform_conv {

// The group's columns [positions, taps * group_in_channels], within the columns of all groups.
template <typename T>
Matrix<T> GroupColumns(const DeformConvParams& params, int64_t group, T* columns,
                       int64_t positions) {
  const int64_t size = params.taps() * params.group_in_channels();
  return {columns + group * size, positions, size, params.groups * size};
}

// device.Gemm() for matrices whose elements are T.
template <typename T, typename Left, typename Right>
std::string Gemm(GpuDevice& device, GemmForm form, const Matrix<Left>& a, const Matrix<Right>& b,
                 const Matrix<T>& c, bool accumulate) {
  return device.Gemm(ElementTypeOf<T>::value, form, {a.data, a.rows, a.cols, a.stride},
                     {b.data, b.rows, b.cols, b.stride}, {c.data, c.rows, c.cols, c.stride},
                     accumulate);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_GEMM_H_
