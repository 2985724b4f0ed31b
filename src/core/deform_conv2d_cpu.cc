// Forward and backward on the CPU: threads, tiles of output positions, and for each tile im2col
// and GEMM. A tile's columns stay in cache between the two; no larger column buffer exists.

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#include "core/cpu_kernels.h"
#include "core/deform_conv2d.h"

namespace deform_conv {
namespace {

// Size that a tile's columns aim at: within the last-level cache of one core, with room for the
// filters; and the number of positions for which a GEMM is efficient.
constexpr int64_t kTileBytes = int64_t{1} << 20;
constexpr int64_t kMinTilePositions = 64, kMaxTilePositions = 512;

// Fewer channels than this leave the vector units idle, so slices are no narrower.
constexpr int64_t kMinSliceChannels = 16;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The i-th of `parts` nearly equal parts of [0, total) begins here.
constexpr int64_t PartBegin(int64_t total, int64_t i, int64_t parts) {
  return total / parts * i + std::min(total % parts, i);
}

template <typename T>
int64_t TilePositions(int64_t column_row_size) {
  const int64_t fitting = kTileBytes / static_cast<int64_t>(column_row_size * sizeof(T));
  return std::clamp(fitting, kMinTilePositions, kMaxTilePositions);
}

// Calls work(i) for each i in [0, count). An exception (workspace is allocated by the worker that
// uses it) must not leave a pool's thread, so it is carried over to the caller's.
void RunOn(const CpuThreads& threads, int count, const std::function<void(int)>& work) {
  if (count <= 1) {
    if (count == 1) work(0);
    return;
  }
  std::vector<std::exception_ptr> exceptions(count);
  threads.run(count, [&](int i) {
    try {
      work(i);
    } catch (...) {
      exceptions[i] = std::current_exception();
    }
  });
  for (const std::exception_ptr& exception : exceptions) {
    if (exception) std::rethrow_exception(exception);
  }
}

// The columns [positions, taps * width] of the slice's i-th group, within a tile of them.
template <typename T>
Matrix<T> GroupColumns(const DeformConvParams& params, const ChannelSlice& slice, int64_t i,
                       T* columns, int64_t positions) {
  const int64_t group_size = params.taps() * slice.width;
  return {columns + i * group_size, positions, group_size, slice.groups * group_size};
}

// The output channels [positions, group_out_channels] of group j.
template <typename T>
Matrix<T> GroupOutput(const DeformConvParams& params, int64_t j, T* output, int64_t begin,
                      int64_t end) {
  const int64_t channels = params.group_out_channels();
  return {output + begin * params.out_channels + j * channels, end - begin, channels,
          params.out_channels};
}

template <typename T>
Matrix<const T> AsConst(const Matrix<T>& matrix) {
  return {matrix.data, matrix.rows, matrix.cols, matrix.stride};
}

template <typename T>
void ForwardTile(const DeformConvParams& params, const SampledTensors<T>& tensors, const T* filters,
                 int64_t begin, int64_t end, const T* zero_pixel, T* columns, T* output) {
  const CpuKernels<T>& kernels = SelectCpuKernels<T>();
  const ChannelSlice slice = ChannelSlice::All(params);
  kernels.im2col(params, slice, tensors, begin, end, zero_pixel, columns);
  for (int64_t j = 0; j < params.groups; ++j) {
    const Matrix<const T> group_filters = {filters + j * params.group_out_channels(),
                                           params.taps() * slice.width, params.group_out_channels(),
                                           params.out_channels};
    kernels.gemm(GemmForm::kPlain, AsConst(GroupColumns(params, slice, j, columns, end - begin)),
                 group_filters, GroupOutput(params, j, output, begin, end), /*accumulate=*/false);
  }
}

// --- Backward ---
//
// Positions that lie near each other add to the same pixels of the input's gradient. So the work
// is divided by what it adds to: each part is a slice of the channels of some images, and one
// thread alone writes to it. No lock is needed, and the order of additions is fixed.

// Channel slices, images, and the workers over both.
struct BackwardPlan {
  std::vector<ChannelSlice> slices;
  int workers;
};

std::vector<ChannelSlice> SliceChannels(const DeformConvParams& params, int64_t wanted) {
  const int64_t width = params.group_in_channels();
  std::vector<ChannelSlice> slices;
  if (params.groups > 1) {  // whole groups, enough of them for the vector units
    const int64_t min_groups = CeilDiv(kMinSliceChannels, width);
    const int64_t count = std::clamp<int64_t>(params.groups / min_groups, 1, wanted);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = PartBegin(params.groups, i, count);
      const int64_t last = PartBegin(params.groups, i + 1, count);
      slices.push_back({first * width, last * width, first, last - first, width});
    }
    return slices;
  }
  const int64_t blocks = std::max<int64_t>(width / kMinSliceChannels, 1);
  const int64_t count = std::clamp<int64_t>(blocks, 1, wanted);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = PartBegin(blocks, i, count) * kMinSliceChannels;
    const int64_t end =
        i + 1 == count ? width : PartBegin(blocks, i + 1, count) * kMinSliceChannels;
    slices.push_back({begin, end, 0, 1, end - begin});
  }
  return slices;
}

BackwardPlan PlanBackward(const DeformConvParams& params, int threads) {
  // A slice repeats the location of samples and needs sums of its own, so there are only as many as
  // give each thread a few parts.
  constexpr int64_t kPartsPerThread = 4;
  const int64_t wanted = CeilDiv(kPartsPerThread * threads, std::max<int64_t>(params.batch, 1));
  BackwardPlan plan;
  plan.slices = SliceChannels(params, std::min<int64_t>(wanted, threads));
  const int64_t parts = static_cast<int64_t>(plan.slices.size()) * params.batch;
  plan.workers = static_cast<int>(std::min<int64_t>(threads, parts));
  return plan;
}

// The filters of a channel slice as one matrix [taps * width, out_channels]; with all channels of
// a group in the slice, the filters themselves.
template <typename T>
class SliceFilters {
 public:
  SliceFilters(const DeformConvParams& params, const ChannelSlice& slice, const T* filters)
      : rows_(params.taps() * slice.width), stride_(params.out_channels), data_(filters) {
    if (slice.width == params.group_in_channels()) return;
    packed_.reserve(rows_ * stride_);
    for (int64_t tap = 0; tap < params.taps(); ++tap) {
      const T* first = filters + (tap * params.group_in_channels() + slice.begin) * stride_;
      packed_.insert(packed_.end(), first, first + slice.width * stride_);
    }
    data_ = packed_.data();
  }

  Matrix<const T> Group(const DeformConvParams& params, int64_t j) const {
    return {data_ + j * params.group_out_channels(), rows_, params.group_out_channels(), stride_};
  }

 private:
  int64_t rows_, stride_;
  const T* data_;
  std::vector<T> packed_;
};

// One worker's sum of the filters' gradient over some images, for one slice:
// [taps * width, out_channels], of which the slice's groups are in use.
template <typename T>
struct FiltersPartial {
  ChannelSlice slice;
  std::vector<T> sum;

  Matrix<T> Group(const DeformConvParams& params, int64_t j) {
    return {sum.data() + j * params.group_out_channels(), params.taps() * slice.width,
            params.group_out_channels(), params.out_channels};
  }

  // Adds the sum's taps [tap_begin, tap_end) to the gradient.
  void AddTo(const DeformConvParams& params, int64_t tap_begin, int64_t tap_end, T* grad_filters) {
    const int64_t channels = params.out_channels;
    const int64_t first = slice.first_group * params.group_out_channels();
    const int64_t count = slice.groups * params.group_out_channels();
    // Where a group is sliced, its first channel in the slice; otherwise 0.
    const int64_t offset = slice.begin - slice.first_group * params.group_in_channels();
    for (int64_t tap = tap_begin; tap < tap_end; ++tap) {
      for (int64_t c = 0; c < slice.width; ++c) {
        const T* from = sum.data() + (tap * slice.width + c) * channels + first;
        T* to = grad_filters + (tap * params.group_in_channels() + offset + c) * channels + first;
        for (int64_t i = 0; i < count; ++i) to[i] += from[i];
      }
    }
  }
};

// One worker's buffers.
template <typename T>
struct BackwardWorkspace {
  std::vector<T> columns, zero_pixel, ignored_pixel;
  std::vector<FiltersPartial<T>> filters_partials;
};

template <typename T>
class Backward {
 public:
  Backward(const DeformConvParams& params, const SampledTensors<T>& tensors, const T* filters,
           const T* grad_output, const DeformConvGradients<T>& gradients, int threads)
      : params_(params),
        tensors_(tensors),
        filters_(filters),
        grad_output_(grad_output),
        gradients_(gradients),
        plan_(PlanBackward(params, threads)),
        workspaces_(plan_.workers) {}

  void Run(const CpuThreads& threads) {
    const int64_t slices = static_cast<int64_t>(plan_.slices.size());
    const int64_t offset_size = params_.out_positions() * params_.offset_channels();
    const int64_t mask_size = params_.out_positions() * params_.mask_channels();
    const SampledGradients<T>& sampled = gradients_.sampled;
    Zero(sampled.input, params_.batch * params_.in_h * params_.in_w * params_.in_channels);
    Zero(sampled.offset, offset_size);
    Zero(sampled.mask, mask_size);
    Zero(gradients_.filters, params_.taps() * params_.group_in_channels() * params_.out_channels);
    // The first slice adds to the gradients of offset and mask, each other one to its own sum.
    if (sampled.offset != nullptr) offset_partials_.assign((slices - 1) * offset_size, T(0));
    if (sampled.mask != nullptr) mask_partials_.assign((slices - 1) * mask_size, T(0));

    RunOn(threads, plan_.workers, [this](int worker) { Work(worker); });

    RunOn(threads, threads.count, [&](int i) {
      AddPartials(offset_partials_, offset_size, i, threads.count, sampled.offset);
      AddPartials(mask_partials_, mask_size, i, threads.count, sampled.mask);
    });
    for (BackwardWorkspace<T>& workspace : workspaces_) {
      for (FiltersPartial<T>& partial : workspace.filters_partials) {
        RunOn(threads, threads.count, [&](int i) {
          partial.AddTo(params_, PartBegin(params_.taps(), i, threads.count),
                        PartBegin(params_.taps(), i + 1, threads.count), gradients_.filters);
        });
      }
    }
  }

 private:
  static void Zero(T* data, int64_t size) {
    if (data != nullptr) std::fill_n(data, size, T(0));
  }

  // Adds the i-th of `parts` parts of the slices' sums, in their order.
  static void AddPartials(const std::vector<T>& partials, int64_t size, int64_t i, int64_t parts,
                          T* to) {
    const int64_t begin = PartBegin(size, i, parts), end = PartBegin(size, i + 1, parts);
    for (size_t from = 0; from < partials.size(); from += size) {
      for (int64_t at = begin; at < end; ++at) to[at] += partials[from + at];
    }
  }

  // Parts are numbered slice by slice, so that a worker's run of them has few slices.
  void Work(int worker) {
    const int64_t batch = params_.batch;
    const int64_t parts = static_cast<int64_t>(plan_.slices.size()) * batch;
    int64_t part = PartBegin(parts, worker, plan_.workers);
    const int64_t end = PartBegin(parts, worker + 1, plan_.workers);
    while (part < end) {
      const int64_t slice = part / batch;
      const int64_t slice_end = std::min(end, (slice + 1) * batch);
      WorkOnImages(slice, part - slice * batch, slice_end - slice * batch, workspaces_[worker]);
      part = slice_end;
    }
  }

  void WorkOnImages(int64_t slice_index, int64_t n_begin, int64_t n_end,
                    BackwardWorkspace<T>& workspace) {
    const ChannelSlice& slice = plan_.slices[slice_index];
    const int64_t row_size = params_.taps() * slice.channels();
    const int64_t image_positions = params_.out_h * params_.out_w;
    const int64_t tile = std::min(TilePositions<T>(row_size), (n_end - n_begin) * image_positions);
    workspace.columns.resize(tile * row_size);
    workspace.zero_pixel.assign(params_.in_channels, T(0));
    workspace.ignored_pixel.assign(params_.in_channels, T(0));
    if (gradients_.filters != nullptr) {
      workspace.filters_partials.push_back(
          {slice, std::vector<T>(params_.taps() * slice.width * params_.out_channels, T(0))});
    }
    const SliceFilters<T> slice_filters(params_, slice, filters_);
    const SampledGradients<T> sampled = SliceGradients(slice_index);
    const int64_t end = n_end * image_positions;
    for (int64_t begin = n_begin * image_positions; begin < end; begin += tile) {
      const int64_t tile_end = std::min(begin + tile, end);
      if (sampled.any()) BackpropSamples(slice, slice_filters, begin, tile_end, workspace, sampled);
      if (gradients_.filters != nullptr) BackpropFilters(slice, begin, tile_end, workspace);
    }
  }

  // Where a slice adds its share of the gradients of what is sampled.
  SampledGradients<T> SliceGradients(int64_t slice_index) {
    SampledGradients<T> sampled = gradients_.sampled;
    if (slice_index == 0) return sampled;
    const int64_t before = (slice_index - 1) * params_.out_positions();
    if (sampled.offset != nullptr) {
      sampled.offset = offset_partials_.data() + before * params_.offset_channels();
    }
    if (sampled.mask != nullptr) {
      sampled.mask = mask_partials_.data() + before * params_.mask_channels();
    }
    return sampled;
  }

  void BackpropSamples(const ChannelSlice& slice, const SliceFilters<T>& slice_filters,
                       int64_t begin, int64_t end, BackwardWorkspace<T>& workspace,
                       const SampledGradients<T>& sampled) {
    T* grad_columns = workspace.columns.data();
    for (int64_t i = 0; i < slice.groups; ++i) {
      const int64_t j = slice.first_group + i;
      kernels_.gemm(GemmForm::kTransposeB, GroupOutput(params_, j, grad_output_, begin, end),
                    slice_filters.Group(params_, j),
                    GroupColumns(params_, slice, i, grad_columns, end - begin),
                    /*accumulate=*/false);
    }
    kernels_.col2im(params_, slice, tensors_, begin, end, grad_columns, workspace.zero_pixel.data(),
                    workspace.ignored_pixel.data(), sampled);
  }

  void BackpropFilters(const ChannelSlice& slice, int64_t begin, int64_t end,
                       BackwardWorkspace<T>& workspace) {
    T* columns = workspace.columns.data();
    kernels_.im2col(params_, slice, tensors_, begin, end, workspace.zero_pixel.data(), columns);
    FiltersPartial<T>& partial = workspace.filters_partials.back();
    for (int64_t i = 0; i < slice.groups; ++i) {
      const int64_t j = slice.first_group + i;
      kernels_.gemm(GemmForm::kTransposeA,
                    AsConst(GroupColumns(params_, slice, i, columns, end - begin)),
                    GroupOutput(params_, j, grad_output_, begin, end), partial.Group(params_, j),
                    /*accumulate=*/true);
    }
  }

  const CpuKernels<T>& kernels_ = SelectCpuKernels<T>();
  const DeformConvParams& params_;
  const SampledTensors<T>& tensors_;
  const T* filters_;
  const T* grad_output_;
  const DeformConvGradients<T>& gradients_;
  const BackwardPlan plan_;
  std::vector<BackwardWorkspace<T>> workspaces_;
  std::vector<T> offset_partials_, mask_partials_;  // [slices - 1] gradients
};

}  // namespace

template <typename T>
void DeformConv2DForwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                            const T* filters, const CpuThreads& threads, T* output) {
  const int64_t positions = params.out_positions();
  const int64_t row_size = params.taps() * params.in_channels;
  // Small inputs are cut finer, so that every thread has a share.
  const int64_t tile =
      std::clamp<int64_t>(CeilDiv(positions, threads.count), 1, TilePositions<T>(row_size));
  const int64_t tiles = CeilDiv(positions, tile);
  const std::vector<T> zero_pixel(params.in_channels, T(0));
  std::atomic<int64_t> next_tile{0};
  RunOn(threads, static_cast<int>(std::min<int64_t>(threads.count, tiles)), [&](int) {
    std::vector<T> columns(tile * row_size);
    for (int64_t i = next_tile++; i < tiles; i = next_tile++) {
      ForwardTile(params, tensors, filters, i * tile, std::min((i + 1) * tile, positions),
                  zero_pixel.data(), columns.data(), output);
    }
  });
}

template <typename T>
void DeformConv2DBackwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                             const T* filters, const T* grad_output, const CpuThreads& threads,
                             const DeformConvGradients<T>& gradients) {
  Backward<T>(params, tensors, filters, grad_output, gradients, threads.count).Run(threads);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                            \
  template void DeformConv2DForwardCpu<T>(const DeformConvParams&, const SampledTensors<T>&,  \
                                          const T*, const CpuThreads&, T*);                   \
  template void DeformConv2DBackwardCpu<T>(const DeformConvParams&, const SampledTensors<T>&, \
                                           const T*, const T*, const CpuThreads&,             \
                                           const DeformConvGradients<T>&);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(double)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
