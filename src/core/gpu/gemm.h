// The GEMMs of all convolution groups on a GPU.

#ifndef DEFORM_CONV_CORE_GPU_GEMM_H_
#define DEFORM_CONV_CORE_GPU_GEMM_H_

#include <cstdint>
#include <string>

#include "core/gpu/device.h"
#include "core/matrix.h"
#include "core/params.h"
#include "core/types.h"

namespace deform_conv {

// Each group's columns [positions, taps * group_in_channels].
template <typename T>
MatrixBatch<T> ColumnsOfGroups(const DeformConvParams& params, T* columns, int64_t positions) {
  const int64_t size = params.taps() * params.group_in_channels();
  return {{columns, positions, size, params.groups * size}, size};
}

// Each group's filters, as GroupFilters().
template <typename T>
MatrixBatch<T> FiltersOfGroups(const DeformConvParams& params, T* filters) {
  return {GroupFilters(params, 0, filters), params.group_out_channels()};
}

// Each group's output at positions [begin, end), as GroupOutput().
template <typename T>
MatrixBatch<T> OutputOfGroups(const DeformConvParams& params, T* output, int64_t begin,
                              int64_t end) {
  return {GroupOutput(params, 0, output, begin, end), params.group_out_channels()};
}

// device.Gemm() for the matrices of all groups, whose elements are T.
template <typename T, typename Left, typename Right>
std::string GemmOfGroups(const DeformConvParams& params, GpuDevice& device, GemmForm form,
                         const MatrixBatch<Left>& a, const MatrixBatch<Right>& b,
                         const MatrixBatch<T>& c, bool accumulate) {
  const auto untyped = [](const auto& batch) {
    const auto& [data, rows, cols, stride] = batch.first;
    return MatrixBatch<const void>{{data, rows, cols, stride}, batch.distance};
  };
  return device.Gemm(ElementTypeOf<T>::value, form, params.groups, untyped(a), untyped(b),
                     {{c.first.data, c.first.rows, c.first.cols, c.first.stride}, c.distance},
                     accumulate);
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_GEMM_H_
