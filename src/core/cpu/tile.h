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

// What a worker needs for a tile: its samples, and the columns of one slice, unless that goes
// through the direct kernels.
template <typename T>
class Tile {
 public:
  Tile(const DeformConvParams& params, const SampledTensors<T>& tensors, int64_t positions)
      : params_(params), tensors_(tensors), positions_(positions) {}

  // Moves to positions [begin, end), at most as many as the constructor was given. With
  // `grad_rows`, see TileSamples, they are of one image.
  void MoveTo(int64_t begin, int64_t end, T* const* grad_rows = nullptr) {
    located_ = {};
    located_.begin = begin;
    located_.end = end;
    located_.grad_rows = grad_rows;
  }

  // Makes room for what `slice` needs, and locates what it samples.
  void Take(const ChannelSlice& slice) {
    slice_ = slice;
    runs_ = RunsOf(params_, slice, kernels_.lanes);
    int64_t longest = 0;
    for (const ChannelRun& run : runs_) longest = std::max(longest, run.count);
    if (static_cast<int64_t>(zeros_.size()) < longest) {
      zeros_.assign(longest, T(0));
      ignored_.assign(longest, T(0));
    }
    direct_ ? MakeRoomForRow(longest) : MakeRoomForColumns();
    const int64_t first = runs_.front().deform_group, end = runs_.back().deform_group + 1;
    if (located_.first_deform_group == first && located_.end_deform_group == end) return;
    MakeRoomForSamples(first, end);
    kernels_.locate(params_, tensors_, located_);
  }

  void Im2Col() { kernels_.im2col(params_, Runs(), located_, tensors_, zeros_.data(), Columns()); }

  void Col2Im(bool replace, const SampledGradients<T>& gradients) {
    PrepareFor(gradients);
    kernels_.col2im(params_, Runs(), located_, tensors_, zeros_.data(), ignored_.data(), replace,
                    Columns(), gradients);
    AddSumsTo(gradients.input);
  }

  // Writes the output of the slice, with the direct kernels.
  void DirectForward(const T* filters, T* output) {
    kernels_.direct_forward(params_, Runs(), located_, tensors_, zeros_.data(), Direct(filters),
                            row_.data(), output);
  }

  // Adds to the gradients, with the direct kernels; that of the slice's filters to `grad_filters`,
  // in the form of DirectFilters, if that is not null.
  void DirectBackward(const T* filters, const T* grad_output, const SampledGradients<T>& gradients,
                      T* grad_filters) {
    PrepareFor(gradients);
    // The tile's sum first, so that no sum has very many terms, whose rounding errors would add up.
    const int64_t size = grad_filters == nullptr ? 0 : FiltersSize();
    filter_sums_.assign(size, T(0));
    kernels_.direct_backward(params_, Runs(), located_, tensors_, zeros_.data(), ignored_.data(),
                             Direct(filters), grad_output, row_.data(), gradients,
                             Direct(size > 0 ? filter_sums_.data() : nullptr));
    for (int64_t i = 0; i < size; ++i) grad_filters[i] += filter_sums_[i];
    AddSumsTo(gradients.input);
  }

  int64_t begin() const { return located_.begin; }
  int64_t end() const { return located_.end; }

  // The columns of the slice's j-th group.
  Matrix<T> GroupColumns(int64_t j) {
    const int64_t size = params_.taps() * slice_.width;
    return {columns_.data() + j * size, end() - begin(), size, stride_};
  }

 private:
  void PrepareFor(const SampledGradients<T>& gradients) {
    located_.pixel_sums = {};
    if (gradients.input != nullptr) PlanSums();
    located_.corner_products = nullptr;
    if (gradients.offset == nullptr && gradients.mask == nullptr) return;
    corner_products_.assign(
        CeilDiv<SampleBlock<T>::kSize>(Samples()) * SampleBlock<T>::kSize * kCorners, T(0));
    located_.corner_products = corner_products_.data();
  }

  int64_t Samples() const {
    return (located_.end - located_.begin) * params_.taps() *
           (located_.end_deform_group - located_.first_deform_group);
  }

  // Where many samples share few pixels, each pixel's gradient is the sum of many terms. One after
  // the other, the rounding errors of so many additions add up. So a tile sums up its own terms
  // first. Where samples lie apart, as they nearly always do, the loop ends soon.
  void PlanSums() {
    constexpr int64_t kManySamples = 64;  // for each pixel and channel
    const int64_t first_image = located_.begin / params_.image_positions();
    const int64_t images = (located_.end - 1) / params_.image_positions() + 1 - first_image;
    const int64_t samples = Samples();
    // A deformable group adds to its own channels only.
    const int64_t most_pixels =
        (located_.end - located_.begin) * params_.taps() / (kManySamples * images);
    int64_t top = params_.in_h, bottom = -1, left = params_.in_w, right = -1;
    for (int64_t i = 0; i < samples; ++i) {
      const SampleBlock<T>& block = blocks_[i / SampleBlock<T>::kSize];
      const int64_t lane = i % SampleBlock<T>::kSize;
      if (block.corner_bits[lane] == 0) continue;
      top = std::min<int64_t>(top, block.h_low[lane]);
      bottom = std::max<int64_t>(bottom, block.h_low[lane] + 1);
      left = std::min<int64_t>(left, block.w_low[lane]);
      right = std::max<int64_t>(right, block.w_low[lane] + 1);
      if ((bottom + 1 - top) * (right + 1 - left) > most_pixels) return;
    }
    if (bottom < top) return;  // no sample lies in an image
    const int64_t rows = bottom + 1 - top, cols = right + 1 - left;
    pixel_sums_.assign(images * rows * cols * params_.in_channels, T(0));
    located_.pixel_sums = {pixel_sums_.data(), first_image, top, left, rows, cols};
  }

  void AddSumsTo(T* grad_input) const {
    const PixelSums<T>& from = located_.pixel_sums;
    if (from.sums == nullptr) return;
    const int64_t channels = params_.in_channels;
    const T* sums = from.sums;
    for (int64_t row = 0; sums < pixel_sums_.data() + pixel_sums_.size(); ++row) {
      const int64_t n = from.first_image + row / from.rows, h = from.h + row % from.rows;
      for (int64_t w = from.w; w < from.w + from.cols; ++w, sums += channels) {
        if (h < 0 || h >= params_.in_h || w < 0 || w >= params_.in_w) continue;
        T* pixel_row = located_.grad_rows == nullptr
                           ? grad_input + (n * params_.in_h + h) * params_.in_w * channels
                           : located_.grad_rows[h];
        T* pixel = pixel_row + w * channels;
        for (const ChannelRun& run : runs_) {
          for (int64_t c = run.channel; c < run.channel + run.count; ++c) pixel[c] += sums[c];
        }
      }
    }
  }

  Matrix<T> Columns() {
    return {columns_.data(), end() - begin(), params_.taps() * slice_.channels(), stride_};
  }

  int64_t FiltersSize() const {
    return params_.taps() * params_.group_out_channels() * slice_.channels();
  }
  template <typename Element>
  DirectFilters<Element> Direct(Element* filters) const {
    return {filters, params_.group_in_channels(), params_.group_out_channels(), slice_.channels()};
  }

  void MakeRoomForColumns() {
    // Rows an odd number of cache lines apart use all sets of the cache.
    stride_ = RoundUp(params_.taps() * slice_.channels(), kSliceAlignment);
    if (stride_ / kSliceAlignment % 2 == 0) stride_ += kSliceAlignment;
    if (static_cast<int64_t>(columns_.size()) < positions_ * stride_) {
      columns_.resize(positions_ * stride_);
    }
  }
  void MakeRoomForRow(int64_t longest_run) {
    const int64_t size = params_.group_out_channels() * longest_run;
    if (static_cast<int64_t>(row_.size()) < size) row_.resize(size);
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
  const bool direct_ = IsDirect(params_);
  TileSamples<T> located_{};
  ChannelSlice slice_{};
  int64_t stride_ = 0;
  std::vector<ChannelRun> runs_;
  WorkspaceVector<int32_t> bases_;
  WorkspaceVector<SampleBlock<T>> blocks_;
  WorkspaceVector<T> columns_, row_, filter_sums_, zeros_, ignored_, corner_products_, pixel_sums_;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_TILE_H_
