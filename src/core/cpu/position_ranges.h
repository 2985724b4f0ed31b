// How backward divides positions among workers, and which rows of pixels each owns.

#ifndef DEFORM_CONV_CORE_CPU_POSITION_RANGES_H_
#define DEFORM_CONV_CORE_CPU_POSITION_RANGES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/cpu/kernels.h"
#include "core/cpu/plan.h"
#include "core/cpu/threads.h"
#include "core/integer_math.h"
#include "core/params.h"
#include "core/sampling.h"

namespace deform_conv {

// The positions of a worker. Of the rows of all images, one after the other, it owns [first_row,
// end_row), and its samples lie in [first_sampled, end_sampled): the others of those it borrows.
struct PositionRange {
  int64_t begin = 0, end = 0;
  int64_t first_row = 0, end_row = 0;
  int64_t first_sampled = 0, end_sampled = 0;

  int64_t rows_above() const { return first_row - first_sampled; }
  int64_t borrowed_rows() const { return rows_above() + end_sampled - end_row; }
};

// The row, of the rows of all images, in the middle of what a position's samples read without
// offsets; the image's first for its first position.
inline int64_t FirstRowAt(const DeformConvParams& params, int64_t position) {
  const int64_t image = position / params.image_positions();
  const int64_t in_image = position - image * params.image_positions();
  const int64_t row = in_image / params.out_w * params.stride_h - params.pad_top +
                      (params.kernel_h - 1) * params.dilation_h / 2;
  return image * params.in_h + (in_image == 0 ? 0 : std::clamp<int64_t>(row, 0, params.in_h));
}

// What CpuKernels::sampled_rows wants to know of taps.
struct TapRows {
  std::vector<int32_t> rows;
  int64_t positions;

  explicit TapRows(const DeformConvParams& params) {
    constexpr int64_t kWanted = 1024;  // enough for vector code
    const int64_t offsets = params.offset_channels();
    positions = CeilDiv(kWanted, offsets);
    rows.resize(positions * offsets + kSliceAlignment);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t tap = i % offsets / 2 % params.taps();
      rows[i] = static_cast<int32_t>(tap / params.kernel_w * params.dilation_h);
    }
  }
};

// Finds what a range's samples read in its first and its last image. Those between it has for
// itself.
template <typename T>
void FindSampledRows(const DeformConvParams& params, const T* offset, const TapRows& tap_rows,
                     PositionRange& range) {
  range.first_sampled = range.first_row;
  range.end_sampled = range.end_row;
  for (const int64_t position : {range.begin, range.end - 1}) {
    const int64_t image = position / params.image_positions();
    const int64_t first = image * params.image_positions();
    const RowRange rows =
        SelectCpuKernels<T>().sampled_rows(params, offset, std::max(range.begin, first),
                                           std::min(range.end, first + params.image_positions()),
                                           tap_rows.rows.data(), tap_rows.positions);
    if (rows.begin == rows.end) continue;
    range.first_sampled = std::min(range.first_sampled, image * params.in_h + rows.begin);
    range.end_sampled = std::max(range.end_sampled, image * params.in_h + rows.end);
  }
}

// Divides the positions of the batch among the threads. None where an image has too many rows, or a
// worker would borrow too many for the input's gradient.
template <typename T>
std::vector<PositionRange> DividePositions(const DeformConvParams& params,
                                           const SampledTensors<T>& tensors, bool want_input,
                                           const CpuThreads& threads) {
  if (params.in_h > kTileBytes / static_cast<int64_t>(sizeof(T*))) return {};
  const int64_t count = std::min<int64_t>(threads.count, params.out_positions());
  std::vector<PositionRange> ranges(count);
  for (int64_t i = 0; i < count; ++i) {
    PositionRange& range = ranges[i];
    range.begin = PartBegin(params.out_positions(), i, count);
    range.end = PartBegin(params.out_positions(), i + 1, count);
    range.first_row = i == 0 ? 0 : FirstRowAt(params, range.begin);
    range.end_row = i + 1 == count ? params.batch * params.in_h : FirstRowAt(params, range.end);
  }
  if (!want_input) return ranges;
  const TapRows tap_rows(params);
  RunOn(threads, count,
        [&](int64_t i) { FindSampledRows(params, tensors.offset, tap_rows, ranges[i]); });
  const int64_t row_bytes = params.in_w * params.in_channels * static_cast<int64_t>(sizeof(T));
  for (const PositionRange& range : ranges) {
    if (range.borrowed_rows() * row_bytes > kBorrowedBytes) return {};
  }
  return ranges;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_POSITION_RANGES_H_
