// A tile: the output positions whose columns are in cache at a time.

#ifndef DEFORM_CONV_CORE_CPU_TILE_H_
#define DEFORM_CONV_CORE_CPU_TILE_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/cpu/kernels.h"
#include "core/cpu/plan.h"
#include "core/cpu/workspace_vector.h"
#include "core/integer_math.h"
#include "core/matrix.h"
#include "core/params.h"
#include "core/sampling.h"

namespace deform_conv {

// What a worker needs for a tile: its samples, and the columns of one slice.
template <typename T>
class Tile {
 public:
  Tile(const DeformConvParams& params, const SampledTensors<T>& tensors, int64_t positions)
      : params_(params), tensors_(tensors), positions_(positions) {}

  // Moves to positions [begin, end), at most as many as the constructor was given.
  void MoveTo(int64_t begin, int64_t end) {
    located_ = {};
    located_.begin = begin;
    located_.end = end;
  }

  // Makes room for the columns of `slice`, and locates what it samples.
  void Take(const ChannelSlice& slice) {
    slice_ = slice;
    runs_ = RunsOf(params_, slice);
    int64_t longest = 0;
    for (const ChannelRun& run : runs_) longest = std::max(longest, run.count);
    if (static_cast<int64_t>(zeros_.size()) < longest) {
      zeros_.assign(longest, T(0));
      ignored_.assign(longest, T(0));
    }
    // Rows an odd number of cache lines apart use all sets of the cache.
    stride_ = RoundUp(params_.taps() * slice.channels(), kSliceAlignment);
    if (stride_ / kSliceAlignment % 2 == 0) stride_ += kSliceAlignment;
    if (static_cast<int64_t>(columns_.size()) < positions_ * stride_) {
      columns_.resize(positions_ * stride_);
    }
    const int64_t first = runs_.front().deform_group, end = runs_.back().deform_group + 1;
    if (located_.first_deform_group == first && located_.end_deform_group == end) return;
    MakeRoomForSamples(first, end);
    kernels_.locate(params_, tensors_, located_);
  }

  void Im2Col() { kernels_.im2col(params_, Runs(), located_, tensors_, zeros_.data(), Columns()); }

  void Col2Im(bool replace, const SampledGradients<T>& gradients) {
    kernels_.col2im(params_, Runs(), located_, tensors_, zeros_.data(), ignored_.data(), replace,
                    Columns(), gradients);
  }

  int64_t begin() const { return located_.begin; }
  int64_t end() const { return located_.end; }

  // The columns of the slice's j-th group.
  Matrix<T> GroupColumns(int64_t j) {
    const int64_t size = params_.taps() * slice_.width;
    return {columns_.data() + j * size, end() - begin(), size, stride_};
  }

 private:
  Matrix<T> Columns() {
    return {columns_.data(), end() - begin(), params_.taps() * slice_.channels(), stride_};
  }
  void MakeRoomForSamples(int64_t first_deform_group, int64_t end_deform_group) {
    const int64_t count = positions_ * (end_deform_group - first_deform_group) * params_.taps();
    if (static_cast<int64_t>(bases_.size()) < 2 * count) {
      bases_.resize(2 * count);
      blocks_.resize(CeilDiv<SampleBlock<T>::kSize>(count));
    }
    located_.first_deform_group = first_deform_group;
    located_.end_deform_group = end_deform_group;
    located_.h_bases = bases_.data();
    located_.w_bases = bases_.data() + count;
    located_.blocks = blocks_.data();
  }

  ChannelRuns Runs() const { return {runs_.data(), runs_.data() + runs_.size()}; }

  const CpuKernels<T>& kernels_ = SelectCpuKernels<T>();
  const DeformConvParams& params_;
  const SampledTensors<T>& tensors_;
  const int64_t positions_;
  TileSamples<T> located_{};
  ChannelSlice slice_{};
  int64_t stride_ = 0;
  std::vector<ChannelRun> runs_;
  WorkspaceVector<int32_t> bases_;
  WorkspaceVector<SampleBlock<T>> blocks_;
  WorkspaceVector<T> columns_, zeros_, ignored_;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_TILE_H_
