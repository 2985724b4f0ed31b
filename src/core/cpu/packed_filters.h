// The filters that a slice of channels meets, and their packed form for the GEMM.

#ifndef DEFORM_CONV_CORE_CPU_PACKED_FILTERS_H_
#define DEFORM_CONV_CORE_CPU_PACKED_FILTERS_H_

#include <cstdint>
#include <vector>

#include "core/cpu/kernels.h"
#include "core/cpu/plan.h"
#include "core/cpu/threads.h"
#include "core/cpu/workspace_vector.h"
#include "core/integer_math.h"
#include "core/matrix.h"
#include "core/params.h"

namespace deform_conv {

// The rows for one tap, [slice.width, group_out_channels], of what a slice's channels meet in
// convolution group `group`: within filters or a gradient of filters.
template <typename T>
Matrix<T> SliceFilters(const DeformConvParams& params, const ChannelSlice& slice, int64_t group,
                       int64_t tap, T* filters) {
  // Where the slice's channels begin within the group's.
  const int64_t first_channel =
      slice.begin + (group - slice.first_group) * slice.width - group * params.group_in_channels();
  return RowsOf(GroupFilters(params, group, filters),
                tap * params.group_in_channels() + first_channel, slice.width);
}

// Calls visit(index) with where each of a slice's filters for one tap lies within all filters, in
// the order of DirectFilters.
template <typename Visit>
void ForEachDirectFilter(const DeformConvParams& params, const ChannelSlice& slice, int64_t tap,
                         const Visit& visit) {
  const int64_t group_in = params.group_in_channels(), group_out = params.group_out_channels();
  for (int64_t k = 0; k < group_out; ++k) {
    int64_t out_channel = slice.first_group * group_out + k;
    for (int64_t j = 0; j < slice.groups; ++j, out_channel += group_out) {
      for (int64_t i = 0; i < group_in; ++i) {
        visit((tap * group_in + i) * params.out_channels + out_channel);
      }
    }
  }
}

// The filters of one tap, in a group of a slice; for the direct kernels, in all of its groups.
struct FilterPart {
  int64_t slice, group, tap;
};

// Calls work(part) for each part of the filters of `slices`, which threads share out. For each
// filter, so many numbers are read or written.
template <typename Work>
void ForEachFilterPart(const DeformConvParams& params, const std::vector<ChannelSlice>& slices,
                       int64_t numbers, const CpuThreads& threads, const Work& work) {
  constexpr int64_t kLeastNumbers = 1 << 14;  // for a thread
  std::vector<FilterPart> parts;
  int64_t size = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    const int64_t groups = IsDirect(params) ? 1 : slices[i].groups;
    for (int64_t j = 0; j < groups; ++j) {
      for (int64_t tap = 0; tap < params.taps(); ++tap) {
        parts.push_back({static_cast<int64_t>(i), j, tap});
      }
    }
    size += params.taps() * slices[i].channels() * params.group_out_channels();
  }
  const int64_t count = static_cast<int64_t>(parts.size());
  if (count == 0) return;
  const int64_t least = CeilDiv(kLeastNumbers * count, std::max<int64_t>(size * numbers, 1));
  ForRangesOn(threads, count, least, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(parts[i]);
  });
}

// Slices that are worked on together, and their filters, packed for a GEMM as they are or, to give
// the columns' gradient, transposed; or in the order of DirectFilters.
template <typename T>
class PackedFilters {
 public:
  PackedFilters(const DeformConvParams& params, GemmForm form) : params_(params), form_(form) {}

  // Bytes that one slice takes.
  int64_t BytesOf(const ChannelSlice& slice) const {
    return slice.groups * GroupSize(slice) * static_cast<int64_t>(sizeof(T));
  }

  // Packs the filters of `slices`.
  void Pack(const std::vector<ChannelSlice>& slices, const T* filters, const CpuThreads& threads) {
    if (!params_.has_filters) return;
    begins_.assign(1, 0);
    for (const ChannelSlice& slice : slices) {
      begins_.push_back(begins_.back() + slice.groups * GroupSize(slice));
    }
    packed_.resize(begins_.back());
    ForEachFilterPart(params_, slices, 2, threads, [&](const FilterPart& part) {
      const ChannelSlice& slice = slices[part.slice];
      T* packed = packed_.data() + begins_[part.slice];
      if (direct_) {
        packed += part.tap * slice.channels() * params_.group_out_channels();
        ForEachDirectFilter(params_, slice, part.tap,
                            [&](int64_t index) { *packed++ = filters[index]; });
      } else {
        PackTap(slice, part, filters, packed + part.group * GroupSize(slice));
      }
    });
  }

  // The packed filters of the i-th slice, in the order of DirectFilters; null where there are none.
  const T* Direct(int64_t i) const {
    return params_.has_filters ? packed_.data() + begins_[i] : nullptr;
  }

  // The packed filters of the i-th slice's j-th group.
  const T* Group(const ChannelSlice& slice, int64_t i, int64_t j) const {
    return packed_.data() + begins_[i] + j * GroupSize(slice);
  }

 private:
  int64_t GroupSize(const ChannelSlice& slice) const {
    if (!params_.has_filters) return 0;
    const int64_t rows = params_.taps() * slice.width, cols = params_.group_out_channels();
    if (direct_) return rows * cols;
    return form_ == GemmForm::kTransposeB ? RoundUp(rows, kernels_.gemm_panel) * cols
                                          : rows * RoundUp(cols, kernels_.gemm_panel);
  }

  void PackTap(const ChannelSlice& slice, const FilterPart& part, const T* filters,
               T* packed) const {
    const Matrix<const T> rows =
        SliceFilters(params_, slice, slice.first_group + part.group, part.tap, filters);
    const int64_t row = part.tap * slice.width;
    if (form_ == GemmForm::kTransposeB) {
      kernels_.pack_transposed(rows, row, packed);
    } else {
      kernels_.pack(rows, row, params_.taps() * slice.width, packed);
    }
  }

  const CpuKernels<T>& kernels_ = SelectCpuKernels<T>();
  const DeformConvParams& params_;
  const GemmForm form_;
  const bool direct_ = IsDirect(params_);
  WorkspaceVector<T> packed_;
  std::vector<int64_t> begins_;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_PACKED_FILTERS_H_
