// How the CPU cuts a convolution: channels into slices, slices into rounds, positions into tiles.
//
// The columns of a tile's slice stay in cache between im2col and GEMM; no more columns exist.
// Packed filters and partial sums are bounded too: where the filters are large, the tensors are
// gone over in several rounds.

#ifndef DEFORM_CONV_CORE_CPU_PLAN_H_
#define DEFORM_CONV_CORE_CPU_PLAN_H_

#include <cstdint>
#include <vector>

#include "core/cpu/kernels.h"
#include "core/params.h"

namespace deform_conv {

// Bounds on what a thread allocates: packed filters, sums of the filters' gradient, rows of an
// image that others own, and each buffer of a tile or band. A single slice or position that needs
// more exceeds them.
constexpr int64_t kPackedBytes = int64_t{3} << 20;
constexpr int64_t kPartialBytes = int64_t{3} << 20;
constexpr int64_t kBorrowedBytes = int64_t{3} << 20;
constexpr int64_t kTileBytes = int64_t{1} << 19;

// --- The choice between two ways ---

// Whether a layer goes through the direct kernels, for narrow groups or no filters, rather than
// through columns and GEMMs: whether they can, and are faster.
bool IsDirect(const DeformConvParams& params);

// --- Channels ---

// Channels are cut into slices at multiples of so many: a cache line.
constexpr int64_t kSliceAlignment = 16;

// A range of input channels to work on: whole convolution groups, or a part of one group.
struct ChannelSlice {
  int64_t begin, end;
  int64_t first_group, groups;
  int64_t width;  // channels of each group that are in the slice

  int64_t channels() const { return end - begin; }
};

ChannelSlice AllChannels(const DeformConvParams& params);

// Cuts a slice into `count` nearly equal ones if it has enough groups, or enough aligned channels
// within its one group; otherwise into fewer. Cuts between groups are aligned too, if there are
// enough such places.
std::vector<ChannelSlice> Cut(const ChannelSlice& slice, int64_t count);

// Cuts a slice so that a tile's columns fit the second-level cache, or the filters of the direct
// kernels the first-level one. Large filters give narrower slices. Cuts between groups if the
// groups are narrow, within them otherwise. T is the type of the columns.
template <typename T>
std::vector<ChannelSlice> CutForCache(const DeformConvParams& params, const ChannelSlice& whole);

// The runs that im2col, col2im and the direct kernels read for a slice, with vectors of `lanes`
// elements.
std::vector<ChannelRun> RunsOf(const DeformConvParams& params, const ChannelSlice& slice,
                               int64_t lanes);

// Puts `slices` into rounds, in order, so that `bytes_of` adds up to at most `bound` in each that
// has more than one slice.
template <typename BytesOf>
std::vector<std::vector<ChannelSlice>> Rounds(const std::vector<ChannelSlice>& slices,
                                              int64_t bound, const BytesOf& bytes_of) {
  std::vector<std::vector<ChannelSlice>> rounds;
  int64_t bytes = bound + 1;
  for (const ChannelSlice& slice : slices) {
    bytes += bytes_of(slice);
    if (bytes > bound) {
      rounds.emplace_back();
      bytes = bytes_of(slice);
    }
    rounds.back().push_back(slice);
  }
  return rounds;
}

// --- Positions ---

// The positions of a tile. There are at least `wanted` tiles if there are enough positions. Tiles
// have whole blocks of GEMM rows.
template <typename T>
int64_t TilePositions(const DeformConvParams& params, const std::vector<ChannelSlice>& slices,
                      int64_t positions, int64_t wanted);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_PLAN_H_
