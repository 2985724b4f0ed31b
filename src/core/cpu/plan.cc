#include "core/cpu/plan.h"

#include <algorithm>
#include <numeric>

#include "core/cpu/threads.h"
#include "core/integer_math.h"
#include "core/types.h"

namespace deform_conv {
namespace {

// The most positions of a tile: enough for its GEMMs to make up for reading the packed filters from
// the last-level cache.
constexpr int64_t kMostTilePositions = 96;
// About the length of a row of columns. A tile of such rows takes 442 KB in float, within a
// second-level cache. Slices are wide enough for the work per sample to outweigh locating it.
constexpr int64_t kColumnsRowSize = 1152;

// About as many filters does a slice of the direct kernels have: with their gradient, they leave
// room in a first-level cache.
constexpr int64_t kDirectFilters = 4096;
// Groups for which the direct kernels are faster: input and output channels, and output channels of
// groups that have few input channels.
constexpr int64_t kDirectGroupIn = 16, kDirectGroupOut = 8;
constexpr int64_t kDirectFewIn = 2, kDirectOutOfFew = 16;

// Filters that one input channel meets.
int64_t ChannelFilters(const DeformConvParams& params) {
  return params.taps() * params.group_out_channels();
}

}  // namespace

bool IsDirect(const DeformConvParams& params) {
  if (!params.has_filters) return true;
  const int64_t in = params.group_in_channels(), out = params.group_out_channels();
  const bool faster = (in <= kDirectGroupIn && out <= kDirectGroupOut) ||
                      (in <= kDirectFewIn && out <= kDirectOutOfFew);
  // The kernels want whole convolution groups in each deformable group.
  return params.groups > 1 && faster && params.deform_group_channels() % in == 0;
}

ChannelSlice AllChannels(const DeformConvParams& params) {
  return {0, params.in_channels, 0, params.groups, params.group_in_channels()};
}

std::vector<ChannelSlice> Cut(const ChannelSlice& slice, int64_t count) {
  std::vector<ChannelSlice> slices;
  if (slice.groups > 1) {
    count = std::clamp<int64_t>(count, 1, slice.groups);
    // So many groups end at a multiple of the alignment.
    int64_t unit = kSliceAlignment / std::gcd(slice.width, kSliceAlignment);
    if (slice.groups / unit < count) unit = 1;
    const auto begin_of = [&](int64_t i) {
      return i == count ? slice.groups : PartBegin(slice.groups / unit, i, count) * unit;
    };
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = begin_of(i), last = begin_of(i + 1);
      slices.push_back({slice.begin + first * slice.width, slice.begin + last * slice.width,
                        slice.first_group + first, last - first, slice.width});
    }
    return slices;
  }
  const int64_t lines = std::max<int64_t>(slice.width / kSliceAlignment, 1);
  count = std::clamp<int64_t>(count, 1, lines);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = slice.begin + PartBegin(lines, i, count) * kSliceAlignment;
    const int64_t end =
        i + 1 == count ? slice.end : slice.begin + PartBegin(lines, i + 1, count) * kSliceAlignment;
    slices.push_back({begin, end, slice.first_group, 1, end - begin});
  }
  return slices;
}

template <typename T>
std::vector<ChannelSlice> CutForCache(const DeformConvParams& params, const ChannelSlice& whole) {
  const int64_t filters = ChannelFilters(params);
  const int64_t wanted =
      IsDirect(params)
          ? kDirectFilters / filters
          : std::min<int64_t>(kColumnsRowSize / params.taps(),
                              kPartialBytes / (filters * static_cast<int64_t>(sizeof(T))));
  const int64_t channels = std::max(wanted, kSliceAlignment);
  const auto cuts = [&](int64_t size) {
    return std::max<int64_t>((size + channels / 2) / channels, 1);
  };
  if (whole.width <= channels) return Cut(whole, cuts(whole.channels()));
  std::vector<ChannelSlice> slices;
  for (const ChannelSlice& group : Cut(whole, whole.groups)) {
    for (const ChannelSlice& slice : Cut(group, cuts(group.width))) slices.push_back(slice);
  }
  return slices;
}

std::vector<ChannelRun> RunsOf(const DeformConvParams& params, const ChannelSlice& whole,
                               int64_t lanes) {
  std::vector<ChannelRun> runs;
  ChannelSlice slice = whole;
  if (IsDirect(params)) {  // across groups
    slice.groups = 1;
    slice.width = slice.channels();
  }
  const int64_t deform_width = params.deform_group_channels();
  const bool vectors_are_groups =
      slice.groups > 1 && slice.width == lanes && deform_width % lanes == 0;
  const int64_t spread = vectors_are_groups ? params.taps() : 1;
  for (int64_t channel = slice.begin; channel < slice.end; channel += runs.back().count) {
    const int64_t group = (channel - slice.begin) / slice.width;
    const int64_t in_group = channel - slice.begin - group * slice.width;
    const int64_t g = channel / deform_width;
    const int64_t left = vectors_are_groups ? slice.end - channel : slice.width - in_group;
    const int64_t count = std::min((g + 1) * deform_width - channel, left);
    const int64_t column = group * params.taps() * slice.width + in_group;
    runs.push_back({channel, count, g, column, slice.width, spread});
  }
  return runs;
}

template <typename T>
int64_t TilePositions(const DeformConvParams& params, const std::vector<ChannelSlice>& slices,
                      int64_t positions, int64_t wanted) {
  constexpr int64_t kSampleBytes = sizeof(SampleBlock<T>) / SampleBlock<T>::kSize;
  const int64_t deform_width = params.deform_group_channels();
  const bool has_columns = !IsDirect(params);
  // Of what a tile holds for each position: output channels, columns, samples.
  int64_t position_bytes = params.group_out_channels() * sizeof(T);
  for (const ChannelSlice& slice : slices) {
    const int64_t deform_groups = (slice.end - 1) / deform_width - slice.begin / deform_width + 1;
    position_bytes = std::max({position_bytes,
                               has_columns * params.taps() * slice.channels() * int64_t{sizeof(T)},
                               params.taps() * deform_groups * kSampleBytes});
  }
  const int64_t most = std::clamp<int64_t>(kTileBytes / position_bytes, 1, kMostTilePositions);
  const int64_t tiles = RoundUp(CeilDiv(positions, most), wanted);
  return std::min(RoundUp(CeilDiv(positions, tiles), SelectCpuKernels<T>().gemm_rows), most);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                                 \
  template std::vector<ChannelSlice> CutForCache<T>(const DeformConvParams&, const ChannelSlice&); \
  template int64_t TilePositions<T>(const DeformConvParams&, const std::vector<ChannelSlice>&,     \
                                    int64_t, int64_t);
DEFORM_CONV_FOR_COMPUTE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
