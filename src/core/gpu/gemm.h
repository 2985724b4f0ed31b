// The GEMMs of all convolution groups on a GPU.

#ifndef DEFORM_CONV_CORE_GPU_GEMM_H_
#define DEFORM_CONV_CORE_GPU_GEMM_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/gpu/chunk_plan.h"
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

// How many rows of the left factor a GEMM of a batch takes at most, where a sum is over these:
// where float has all its precision, the errors of many additions one after the other would show.
inline int64_t MostTerms(ElementType type, GemmForm form, const GpuDevice& device, int64_t rows) {
  constexpr int64_t kMost = 2048;
  const bool is_precise = type == ElementType::kFloat && !device.allow_tf32();
  if (!is_precise || form != GemmForm::kTransposeA || rows <= kMost) return rows;
  return PartOf(rows, kMost);
}

// The matrices of a batch from number `first` on, and of each the rows from `row` on, at most
// `rows` of them.
template <typename Void, typename T>
MatrixBatch<Void> SomeOf(const MatrixBatch<T>& batch, int64_t first, int64_t row, int64_t rows) {
  const Matrix<T>& matrix = batch.first;
  return {{matrix.data + first * batch.distance + row * matrix.stride,
           std::min(rows, matrix.rows - row), matrix.cols, matrix.stride},
          batch.distance};
}

// device.Gemm() for the matrices of all groups, whose elements are T.
template <typename T, typename Left, typename Right>
std::string GemmOfGroups(const DeformConvParams& params, GpuDevice& device, GemmForm form,
                         const MatrixBatch<Left>& a, const MatrixBatch<Right>& b,
                         const MatrixBatch<T>& c, bool accumulate) {
  constexpr ElementType kType = ElementTypeOf<T>::value;
  const bool is_sum_of_rows = form == GemmForm::kTransposeA;
  const bool in_turn = BestInTurn(kType, form, params.groups, a.first.rows);
  const int64_t count = in_turn ? 1 : params.groups;
  const int64_t rows = count == 1 ? a.first.rows : MostTerms(kType, form, device, a.first.rows);
  for (int64_t group = 0; group < params.groups; group += count) {
    int64_t row = 0;
    do {
      DEFORM_CONV_RETURN_IF_ERROR(
          device.Gemm(kType, form, count, SomeOf<const void>(a, group, row, rows),
                      SomeOf<const void>(b, group, row, is_sum_of_rows ? rows : b.first.rows),
                      SomeOf<void>(c, group, 0, c.first.rows), accumulate || row > 0));
      row += rows;
    } while (row < a.first.rows);
  }
  return "";
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_GEMM_H_
