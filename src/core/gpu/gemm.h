// The GEMMs of all convolution groups on a GPU.

#ifndef DEFORM_CONV_CORE_GPU_GEMM_H_
#define DEFORM_CONV_CORE_GPU_GEMM_H_

#include <cstdint>
#include <string>

#include "core/gpu/device.h"
#include "core/matrix.h"
#include "core/params.h"
#include "core/return_if_error.h"
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

// Whether cuBLAS is faster with one GEMM for each group, in turn. It cuts a long sum into parts for
// all multiprocessors in a GEMM, but not in a batch of them, where sums are then less exact too.
inline bool BestInTurn(ElementType type, GemmForm form, int64_t groups, int64_t terms) {
  const bool is_16_bit = type == ElementType::kHalf || type == ElementType::kBFloat16;
  const int64_t long_sum = is_16_bit ? 8192 : 1024;
  return form == GemmForm::kTransposeA && terms > long_sum * groups;
}

// device.Gemm() for the matrices of all groups, whose elements are T.
template <typename T, typename Left, typename Right>
std::string GemmOfGroups(const DeformConvParams& params, GpuDevice& device, GemmForm form,
                         const MatrixBatch<Left>& a, const MatrixBatch<Right>& b,
                         const MatrixBatch<T>& c, bool accumulate) {
  constexpr ElementType kType = ElementTypeOf<T>::value;
  const bool in_turn = BestInTurn(kType, form, params.groups, a.first.rows);
  const int64_t count = in_turn ? 1 : params.groups;
  for (int64_t group = 0; group < params.groups; group += count) {
    const auto from_group = [group](const auto& batch, auto* untyped) {
      const auto& [data, rows, cols, stride] = batch.first;
      *untyped = {{data + group * batch.distance, rows, cols, stride}, batch.distance};
    };
    MatrixBatch<const void> left, right;
    MatrixBatch<void> result;
    from_group(a, &left);
    from_group(b, &right);
    from_group(c, &result);
    DEFORM_CONV_RETURN_IF_ERROR(device.Gemm(kType, form, count, left, right, result, accumulate));
  }
  return "";
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_GEMM_H_
