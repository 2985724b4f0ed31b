// Forward on the CPU: threads take tiles of positions, and for each slice of channels im2col and
// GEMM, or the direct kernel.

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/cpu/packed_filters.h"
#include "core/cpu/plan.h"
#include "core/cpu/threads.h"
#include "core/cpu/tile.h"
#include "core/deform_conv2d.h"
#include "core/integer_math.h"
#include "core/matrix.h"

namespace deform_conv {
namespace {

// Writes the tile's output of each group's first slice, and adds that of the others.
template <typename T>
void ForwardTile(const DeformConvParams& params, const CpuKernels<T>& kernels,
                 const std::vector<ChannelSlice>& slices, const PackedFilters<T>& packed,
                 Tile<T>& tile, T* output) {
  for (size_t i = 0; i < slices.size(); ++i) {
    const ChannelSlice& slice = slices[i];
    tile.Take(slice);
    if (IsDirect(params)) {
      tile.DirectForward(packed.Direct(i), output);
      continue;
    }
    tile.Im2Col();
    for (int64_t j = 0; j < slice.groups; ++j) {
      const int64_t group = slice.first_group + j;
      const bool first = slice.begin <= group * params.group_in_channels();
      kernels.gemm(GemmForm::kPlain, AsConst(tile.GroupColumns(j)), packed.Group(slice, i, j),
                   GroupOutput(params, group, output, tile.begin(), tile.end()),
                   /*accumulate=*/!first);
    }
  }
}

template <typename T>
void Forward(const DeformConvParams& params, const SampledTensors<T>& tensors, const T* filters,
             const CpuThreads& threads, T* output) {
  const CpuKernels<T>& kernels = SelectCpuKernels<T>();
  const int64_t positions = params.out_positions();
  const std::vector<ChannelSlice> all = CutForCache<T>(params, AllChannels(params));
  const int64_t tile_positions = TilePositions<T>(params, all, positions, threads.count);
  const int64_t tiles = CeilDiv(positions, tile_positions);
  PackedFilters<T> packed(params, GemmForm::kPlain);
  for (const std::vector<ChannelSlice>& slices :
       Rounds(all, kPackedBytes * threads.count,
              [&](const ChannelSlice& slice) { return packed.BytesOf(slice); })) {
    packed.Pack(slices, filters, threads);
    std::atomic<int64_t> next_tile{0};
    RunOn(threads, std::min<int64_t>(threads.count, tiles), [&](int64_t) {
      Tile<T> tile(params, tensors, tile_positions);
      for (int64_t t = next_tile++; t < tiles; t = next_tile++) {
        tile.MoveTo(t * tile_positions, std::min((t + 1) * tile_positions, positions));
        ForwardTile(params, kernels, slices, packed, tile, output);
      }
    });
  }
}

}  // namespace

template <typename T>
void DeformConv2DForwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                            const T* filters, const CpuThreads& threads, T* output) {
  if (params.out_positions() > 0) Forward(params, tensors, filters, threads, output);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                           \
  template void DeformConv2DForwardCpu<T>(const DeformConvParams&, const SampledTensors<T>&, \
                                          const T*, const CpuThreads&, T*);
DEFORM_CONV_FOR_COMPUTE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
