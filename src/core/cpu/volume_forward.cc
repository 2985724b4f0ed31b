// Forward over volumes on the CPU: threads take tiles of positions, and each tile goes through
// im2col and one GEMM for each convolution group.

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/cpu/threads.h"
#include "core/cpu/volume_plan.h"
#include "core/cpu/workspace_vector.h"
#include "core/deform_conv3d.h"

namespace deform_conv {
namespace {

// The filters as the GEMM takes them, group after group.
template <typename T>
class PackedVolumeFilters {
 public:
  PackedVolumeFilters(const DeformConv3DParams& params, const T* filters, const CpuThreads& threads)
      : depth_(params.taps() * params.group_in_channels()) {
    const CpuKernels<T>& kernels = SelectCpuKernels<T>();
    const DeformConvParams planar = params.planar();
    group_size_ = depth_ * RoundUp(params.group_out_channels(), kernels.gemm_panel);
    packed_.resize(params.groups * group_size_);
    const std::vector<TapRange> ranges = TapRanges(params, kernels.gemm_panel, threads.count);
    ForEachOn(threads, static_cast<int64_t>(ranges.size()), [&](int64_t i) {
      const TapRange& range = ranges[i];
      kernels.pack(range.Filters(planar, filters), range.begin * params.group_in_channels(), depth_,
                   packed_.data() + range.group * group_size_);
    });
  }

  const T* Group(int64_t group) const { return packed_.data() + group * group_size_; }

 private:
  int64_t depth_, group_size_;
  WorkspaceVector<T> packed_;
};

}  // namespace

template <typename T>
void DeformConv3DForwardCpu(const DeformConv3DParams& params, const SampledTensors<T>& tensors,
                            const T* filters, const CpuThreads& threads, T* output) {
  const int64_t positions = params.out_positions();
  if (positions == 0) return;
  const CpuKernels<T>& kernels = SelectCpuKernels<T>();
  const CpuVolumeKernels<T>& volume = SelectCpuVolumeKernels<T>();
  const DeformConvParams planar = params.planar();
  const std::vector<ChannelRun> all_runs = RunsOf(params);
  const ChannelRuns runs = {all_runs.data(), all_runs.data() + all_runs.size()};
  const PackedVolumeFilters<T> packed(params, filters, threads);
  // Small enough for every thread to have one.
  const int64_t tile_positions = std::min(PositionsWithin<T>(params, 0, kVolumeTileBytes),
                                          CeilDiv<int64_t>(positions, threads.count));
  const int64_t tiles = CeilDiv(positions, tile_positions);
  const int64_t width = params.taps() * params.in_channels;
  std::atomic<int64_t> next_tile{0};
  RunOn(threads, std::min<int64_t>(threads.count, tiles), [&](int64_t) {
    WorkspaceVector<TapSample<T>> samples(tile_positions * params.mask_channels());
    WorkspaceVector<T> memory(tile_positions * width);
    for (int64_t t = next_tile++; t < tiles; t = next_tile++) {
      const int64_t begin = t * tile_positions, end = std::min(begin + tile_positions, positions);
      const VolumeTile<T> tile = {begin, end, samples.data()};
      const Matrix<T> columns = {memory.data(), tile.positions(), width, width};
      volume.locate(params, tensors, tile);
      volume.im2col(params, runs, tile, tensors.input, columns);
      for (int64_t group = 0; group < params.groups; ++group) {
        const int64_t depth = width / params.groups;
        kernels.gemm(GemmForm::kPlain,
                     {columns.data + group * depth, columns.rows, depth, columns.stride},
                     packed.Group(group), GroupOutput(planar, group, output, begin, end),
                     /*accumulate=*/false);
      }
    }
  });
}

#define DEFORM_CONV_INSTANTIATE(T)                                                             \
  template void DeformConv3DForwardCpu<T>(const DeformConv3DParams&, const SampledTensors<T>&, \
                                          const T*, const CpuThreads&, T*);
DEFORM_CONV_FOR_COMPUTE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
