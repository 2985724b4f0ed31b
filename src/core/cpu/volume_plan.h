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

// So many positions have columns and samples at a time, of `bytes`.
template <typename T>
int64_t PositionsWithin(const DeformConv3DParams& params, int64_t bytes) {
  const int64_t of_sample = sizeof(TapSample<T>);
  const int64_t of_column = sizeof(T);
  const int64_t of_position =
      params.taps() * (params.deform_groups * of_sample + params.in_channels * of_column);
  return std::clamp<int64_t>(bytes / of_position, 1, std::max<int64_t>(params.out_positions(), 1));
}

// A tap of a convolution group: the part of the filters and columns that is one small matrix.
struct GroupTap {
  int64_t group, tap;

  static int64_t Count(const DeformConv3DParams& params) { return params.groups * params.taps(); }
  static GroupTap At(const DeformConv3DParams& params, int64_t i) {
    return {i / params.taps(), i % params.taps()};
  }

  // [group_in_channels, group_out_channels], within filters or a gradient of filters.
  template <typename T>
  Matrix<T> Filters(const DeformConvParams& planar, T* filters) const {
    const int64_t width = planar.group_in_channels();
    return RowsOf(GroupFilters(planar, group, filters), tap * width, width);
  }
  // [rows, group_in_channels], within columns of all groups.
  template <typename T>
  Matrix<T> Columns(const DeformConvParams& planar, const Matrix<T>& columns) const {
    const int64_t width = planar.group_in_channels();
    return {columns.data + (group * planar.taps() + tap) * width, columns.rows, width,
            columns.stride};
  }
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_VOLUME_PLAN_H_
