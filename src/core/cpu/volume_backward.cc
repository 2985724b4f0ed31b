// Backward over volumes on the CPU, by bands of positions. Threads share out each step of a band by
// what it writes: positions, taps of the filters, or rows of the input's gradient, which each have
// one owner. So there are no locks, and sums have one order.

#include <algorithm>
#include <vector>

#include "core/cpu/threads.h"
#include "core/cpu/volume_plan.h"
#include "core/cpu/workspace_vector.h"
#include "core/deform_conv3d.h"

namespace deform_conv {
namespace {

template <typename T>
class VolumeBackward {
 public:
  VolumeBackward(const DeformConv3DParams& params, const SampledTensors<T>& tensors,
                 const T* filters, const T* grad_output, const CpuThreads& threads,
                 const DeformConvGradients<T>& gradients)
      : params_(params),
        planar_(params.planar()),
        tensors_(tensors),
        grad_output_(grad_output),
        threads_(threads),
        gradients_(gradients),
        all_runs_(RunsOf(params)),
        runs_{all_runs_.data(), all_runs_.data() + all_runs_.size()},
        width_(params.taps() * params.in_channels),
        packed_width_(RoundUp(params.group_out_channels(), kernels_.gemm_panel)),
        ranges_(TapRanges(params, kernels_.gemm_panel, threads.count)) {
    if (gradients.sampled.any() && params.out_positions() > 0) PackFilters(filters);
  }

  void Run(bool add_filters) {
    Zero(gradients_.sampled.input, params_.batch * params_.image_size());
    if (!add_filters) Zero(gradients_.filters, params_.filters_size());
    const int64_t positions = params_.out_positions();
    const int64_t band = PositionsWithin<T>(params_, params_.groups * packed_width_,
                                            kVolumeTileBytes * threads_.count);
    samples_.resize(band * params_.mask_channels());
    columns_.resize(band * width_);
    for (int64_t begin = 0; begin < positions; begin += band) {
      RunBand({begin, std::min(begin + band, positions), samples_.data()});
    }
  }

 private:
  static constexpr int64_t kLeastElements = 1 << 14;  // for a thread

  void Zero(T* data, int64_t size) const {
    if (data == nullptr) return;
    ForRangesOn(threads_, size, kLeastElements,
                [&](int64_t begin, int64_t end) { std::fill(data + begin, data + end, T(0)); });
  }

  // The filters as the columns' gradient needs them: for each range of taps, transposed.
  void PackFilters(const T* filters) {
    int64_t size = 0;
    for (const TapRange& range : ranges_) {
      range_begins_.push_back(size);
      size += params_.group_out_channels() *
              RoundUp(range.count * params_.group_in_channels(), kernels_.gemm_panel);
    }
    filters_.assign(size, T(0));
    ForEachTapRange([&](int64_t i, const TapRange& range) {
      kernels_.pack_transposed(range.Filters(planar_, filters), 0,
                               filters_.data() + range_begins_[i]);
    });
  }

  void RunBand(const VolumeTile<T>& band) {
    const SampledGradients<T>& sampled = gradients_.sampled;
    const Matrix<T> columns = {columns_.data(), band.positions(), width_, width_};
    ForTiles(band, [&](const VolumeTile<T>& tile) { volume_.locate(params_, tensors_, tile); });
    if (sampled.any()) BackpropColumns(band, columns);
    if (sampled.offset != nullptr || sampled.mask != nullptr) BackpropSampling(band, columns);
    if (sampled.input != nullptr) Scatter(band, columns);
    if (gradients_.filters == nullptr) return;
    ForTiles(band, [&](const VolumeTile<T>& tile) {
      volume_.im2col(params_, runs_, tile, tensors_.input, RowsOfTile(columns, band, tile));
    });
    BackpropFilters(band, columns);
  }

  // Writes the columns' gradient.
  void BackpropColumns(const VolumeTile<T>& band, const Matrix<T>& columns) const {
    ForEachTapRange([&](int64_t i, const TapRange& range) {
      kernels_.gemm(GemmForm::kPlain,
                    GroupOutput(planar_, range.group, grad_output_, band.begin, band.end),
                    filters_.data() + range_begins_[i], range.Columns(planar_, columns),
                    /*accumulate=*/false);
    });
  }

  // Writes the gradients of offset and mask.
  void BackpropSampling(const VolumeTile<T>& band, const Matrix<T>& columns) const {
    ForTiles(band, [&](const VolumeTile<T>& tile) {
      WorkspaceVector<T> products(params_.mask_channels() * kVolumeCorners);
      volume_.backprop_sampling(params_, runs_, tile, tensors_.input,
                                AsConst(RowsOfTile(columns, band, tile)), products.data(),
                                gradients_.sampled.offset, gradients_.sampled.mask);
    });
  }

  // Adds to the input's gradient.
  void Scatter(const VolumeTile<T>& band, const Matrix<T>& columns) const {
    const int64_t owners =
        std::clamp<int64_t>(band.positions() * width_ / kLeastElements, 1, threads_.count);
    RunOn(threads_, owners, [&](int64_t i) {
      volume_.scatter(params_, runs_, band, AsConst(columns), {i, owners},
                      gradients_.sampled.input);
    });
  }

  // Adds what the columns bring to the filters' gradient.
  void BackpropFilters(const VolumeTile<T>& band, const Matrix<T>& columns) {
    const int64_t group_size = band.positions() * packed_width_;
    packed_output_.resize(params_.groups * group_size);
    ForEachOn(threads_, params_.groups, [&](int64_t group) {
      kernels_.pack(GroupOutput(planar_, group, grad_output_, band.begin, band.end), 0,
                    band.positions(), packed_output_.data() + group * group_size);
    });
    ForEachTapRange([&](int64_t /*i*/, const TapRange& range) {
      kernels_.gemm(GemmForm::kTransposeA, AsConst(range.Columns(planar_, columns)),
                    packed_output_.data() + range.group * group_size,
                    range.Filters(planar_, gradients_.filters), /*accumulate=*/true);
    });
  }

  template <typename Work>
  void ForEachTapRange(const Work& work) const {
    ForEachOn(threads_, static_cast<int64_t>(ranges_.size()),
              [&](int64_t i) { work(i, ranges_[i]); });
  }

  // Calls work(tile) for tiles that cover the band, side by side.
  template <typename Work>
  void ForTiles(const VolumeTile<T>& band, const Work& work) const {
    ForRangesOn(threads_, band.positions(), CeilDiv(kLeastElements, width_),
                [&](int64_t begin, int64_t end) {
                  work(VolumeTile<T>{band.begin + begin, band.begin + end,
                                     band.samples + begin * params_.mask_channels()});
                });
  }

  static Matrix<T> RowsOfTile(const Matrix<T>& columns, const VolumeTile<T>& band,
                              const VolumeTile<T>& tile) {
    return RowsOf(columns, tile.begin - band.begin, tile.positions());
  }

  const CpuKernels<T>& kernels_ = SelectCpuKernels<T>();
  const CpuVolumeKernels<T>& volume_ = SelectCpuVolumeKernels<T>();
  const DeformConv3DParams& params_;
  const DeformConvParams planar_;
  const SampledTensors<T>& tensors_;
  const T* grad_output_;
  const CpuThreads& threads_;
  const DeformConvGradients<T>& gradients_;
  const std::vector<ChannelRun> all_runs_;
  const ChannelRuns runs_;
  const int64_t width_;         // of a row of columns
  const int64_t packed_width_;  // of a row of a group's packed output
  const std::vector<TapRange> ranges_;
  std::vector<int64_t> range_begins_;      // within the packed filters
  WorkspaceVector<T> filters_;             // packed
  WorkspaceVector<TapSample<T>> samples_;  // of a band
  WorkspaceVector<T> columns_;             // of a band, or their gradient
  WorkspaceVector<T> packed_output_;       // its gradient, of a band
};

}  // namespace

template <typename T>
void DeformConv3DBackwardCpu(const DeformConv3DParams& params, const SampledTensors<T>& tensors,
                             const T* filters, const T* grad_output, const CpuThreads& threads,
                             bool add_filters, const DeformConvGradients<T>& gradients) {
  VolumeBackward<T>(params, tensors, filters, grad_output, threads, gradients).Run(add_filters);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                              \
  template void DeformConv3DBackwardCpu<T>(const DeformConv3DParams&, const SampledTensors<T>&, \
                                           const T*, const T*, const CpuThreads&, bool,         \
                                           const DeformConvGradients<T>&);
DEFORM_CONV_FOR_COMPUTE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
