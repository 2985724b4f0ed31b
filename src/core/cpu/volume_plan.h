// What the passes over volumes share: the order of channels, bounds, and where a tap's filters and
// columns are.

#ifndef DEFORM_CONV_CORE_CPU_VOLUME_PLAN_H_
#define DEFORM_CONV_CORE_CPU_VOLUME_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/cpu/kernels.h"
#include "core/cpu/volume_kernels.h"
#include "core/integer_math.h"
#include "core/matrix.h"
#include "core/params3d.h"

namespace deform_conv {

// What columns and samples may take for each thread, unless those of one position take more.
constexpr int64_t kVolumeTileBytes = int64_t{2} << 20;

// All channels, cut where a convolution group or a deformable group ends.
inline std::vector<ChannelRun> RunsOf(const DeformConv3DParams& params) {
  const int64_t group_width = params.group_in_channels();
  const int64_t deform_width = params.deform_group_channels();
  std::vector<ChannelRun> runs;
  for (int64_t channel = 0; channel < params.in_channels; channel += runs.back().count) {
    const int64_t group = channel / group_width, g = channel / deform_width;
    const int64_t end = std::min((group + 1) * group_width, (g + 1) * deform_width);
    const int64_t column = group * params.taps() * group_width + channel - group * group_width;
    runs.push_back({channel, end - channel, g, column, group_width, /*spread=*/1});
  }
  return runs;
}

// So many positions have columns and samples at a time, and `others` numbers each, of `bytes`.
template <typename T>
int64_t PositionsWithin(const DeformConv3DParams& params, int64_t others, int64_t bytes) {
  const int64_t of_sample = sizeof(TapSample<T>);
  const int64_t of_column = sizeof(T);
  const int64_t of_position =
      params.taps() * (params.deform_groups * of_sample + params.in_channels * of_column) +
      others * of_column;
  return std::clamp<int64_t>(bytes / of_position, 1, std::max<int64_t>(params.out_positions(), 1));
}

// Neighbouring taps of a convolution group: a part of the filters, and the columns that it meets.
struct TapRange {
  int64_t group, begin, count;

  // [count * group_in_channels, group_out_channels], within filters or a gradient of filters.
  template <typename T>
  Matrix<T> Filters(const DeformConvParams& planar, T* filters) const {
    const int64_t width = planar.group_in_channels();
    return RowsOf(GroupFilters(planar, group, filters), begin * width, count * width);
  }
  // [rows, count * group_in_channels], within columns of all groups.
  template <typename T>
  Matrix<T> Columns(const DeformConvParams& planar, const Matrix<T>& columns) const {
    const int64_t width = planar.group_in_channels();
    return {columns.data + (group * planar.taps() + begin) * width, columns.rows, count * width,
            columns.stride};
  }
};

// All taps of all groups, in ranges for threads to share out: with about `wanted` channels each.
// Narrower matrices would leave parts of a GEMM's panels unused.
inline std::vector<TapRange> TapRanges(const DeformConv3DParams& params, int64_t wanted,
                                       int64_t threads) {
  constexpr int64_t kRangesOfThread = 2;
  const int64_t taps = params.taps();
  const int64_t wide = CeilDiv(wanted, params.group_in_channels());
  const int64_t shared = params.groups * taps / (kRangesOfThread * threads);
  const int64_t most = std::clamp<int64_t>(std::min(wide, shared), 1, taps);
  std::vector<TapRange> ranges;
  for (int64_t group = 0; group < params.groups; ++group) {
    for (int64_t tap = 0; tap < taps; tap += most) {
      ranges.push_back({group, tap, std::min(most, taps - tap)});
    }
  }
  return ranges;
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_VOLUME_PLAN_H_
