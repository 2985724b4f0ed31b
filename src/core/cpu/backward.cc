// Backward on the CPU.
//
// Positions that lie near each other add to the same pixels of the input's gradient. So the work
// is divided by what it adds to: a worker has a part of the channels of some images, and no other
// adds to those. Or, for the direct kernels and small images, a worker has some positions, and sums
// of its own for the image that it shares with the worker before. No lock is needed, and the order
// of additions is fixed.

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/cpu/packed_filters.h"
#include "core/cpu/plan.h"
#include "core/cpu/threads.h"
#include "core/cpu/tile.h"
#include "core/cpu/workspace_vector.h"
#include "core/deform_conv2d.h"
#include "core/integer_math.h"
#include "core/matrix.h"

namespace deform_conv {
namespace {

template <typename T>
class Backward {
 public:
  Backward(const DeformConvParams& params, const SampledTensors<T>& tensors, const T* filters,
           const T* grad_output, const DeformConvGradients<T>& gradients, const CpuThreads& threads)
      : params_(params),
        tensors_(tensors),
        filters_(filters),
        grad_output_(grad_output),
        gradients_(gradients),
        threads_(threads) {}

  void Run(bool add_filters) {
    const SampledGradients<T>& sampled = gradients_.sampled;
    RunOn(threads_, threads_.count, [&](int64_t i) {
      Zero(sampled.input, params_.batch * params_.image_size(), i);
      Zero(sampled.offset, params_.out_positions() * params_.offset_channels(), i);
      Zero(sampled.mask, params_.out_positions() * params_.mask_channels(), i);
      if (add_filters) return;
      Zero(gradients_.filters, params_.filters_size(), i);
    });
    if (params_.out_positions() == 0) return;
    PlanParts();
    // Each part of the channels goes through rounds of its own; all parts have their r-th at once.
    const PackedFilters<T> packed(params_, GemmForm::kTransposeB);  // for its sizes
    std::vector<std::vector<std::vector<ChannelSlice>>> rounds;
    size_t most_rounds = 0;
    for (const ChannelSlice& part : channel_parts_) {
      rounds.push_back(
          Rounds(CutForCache<T>(params_, part), kPartialBytes, [&](const ChannelSlice& slice) {
            return std::max<int64_t>(PartialSize(slice) * sizeof(T), packed.BytesOf(slice));
          }));
      most_rounds = std::max(most_rounds, rounds.back().size());
    }
    for (size_t r = 0; r < most_rounds; ++r) {
      std::vector<std::vector<ChannelSlice>> slices;
      for (const auto& of_part : rounds) {
        slices.push_back(r < of_part.size() ? of_part[r] : std::vector<ChannelSlice>());
      }
      RunRound(slices);
    }
  }

 private:
  // Zeroes the i-th thread's part.
  void Zero(T* data, int64_t size, int64_t i) const {
    if (data == nullptr) return;
    std::fill(data + PartBegin(size, i, threads_.count),
              data + PartBegin(size, i + 1, threads_.count), T(0));
  }

  // Divides the images among workers, and the channels too unless the images alone keep every
  // thread busy: channels cost sums of the positions' gradients, and samples located repeatedly.
  void PlanParts() {
    constexpr int64_t kImagesPerThread = 4;
    const int64_t threads = threads_.count, batch = params_.batch;
    int64_t wanted = batch >= kImagesPerThread * threads ? 1 : threads / std::gcd(threads, batch);
    const int64_t image_bytes = params_.image_size() * static_cast<int64_t>(sizeof(T));
    by_positions_ = IsDirect(params_) && wanted > 1 &&
                    (gradients_.sampled.input == nullptr || image_bytes <= kImageBytes);
    if (by_positions_) wanted = 1;
    channel_parts_ = Cut(AllChannels(params_), wanted);
    image_ranges_ = std::min(batch, threads / static_cast<int64_t>(channel_parts_.size()));
  }

  // Elements of the sum of a slice's filters' gradients.
  int64_t PartialSize(const ChannelSlice& slice) const {
    return slice.groups * params_.taps() * slice.width * params_.group_out_channels();
  }

  // What a worker keeps for a round.
  struct Worker {
    Worker(const DeformConvParams& params, const SampledTensors<T>& tensors, int64_t positions)
        : tile(params, tensors, positions) {}
    Tile<T> tile;
    WorkspaceVector<T> packed_output;  // the tile's, of one group
    WorkspaceVector<T> filters;        // sums, slice after slice, group after group
    std::vector<T> offset, mask;       // sums of a band, unless the worker has the first part
    WorkspaceVector<T> image;          // sums of the image that it shares with the worker before
    int64_t begin = 0, end = 0;        // positions of its images
  };

  void RunRound(const std::vector<std::vector<ChannelSlice>>& slices) {
    const int64_t parts = static_cast<int64_t>(channel_parts_.size());
    const int64_t image_positions = params_.image_positions();
    const int64_t ranges =
        by_positions_ ? std::min<int64_t>(threads_.count, params_.out_positions()) : image_ranges_;
    const auto range_begin = [&](int64_t i) {
      return by_positions_ ? PartBegin(params_.out_positions(), i, ranges)
                           : PartBegin(params_.batch, i, ranges) * image_positions;
    };
    const int64_t most_positions = range_begin(1);  // the first is the largest
    std::vector<ChannelSlice> all;
    for (const auto& of_part : slices) all.insert(all.end(), of_part.begin(), of_part.end());
    int64_t tile_positions = TilePositions<T>(params_, all, most_positions, 1);
    int64_t band = most_positions;
    if (parts > 1) {
      // Their gradients of offset and mask are summed up band by band, of whole tiles.
      const int64_t bytes = (params_.offset_channels() + params_.mask_channels()) * sizeof(T);
      const int64_t most = std::max<int64_t>(kTileBytes / bytes, 1);
      tile_positions = std::min(tile_positions, most);
      band = most / tile_positions * tile_positions;
    }

    std::vector<PackedFilters<T>> packed(parts, PackedFilters<T>(params_, GemmForm::kTransposeB));
    if (gradients_.sampled.any() || IsDirect(params_)) {
      for (int64_t p = 0; p < parts; ++p) packed[p].Pack(slices[p], filters_, threads_);
    }
    std::vector<Worker> workers;
    for (int64_t w = 0; w < parts * ranges; ++w) {
      workers.emplace_back(params_, tensors_, tile_positions);
      workers.back().begin = range_begin(w / parts);
      workers.back().end = range_begin(w / parts + 1);
    }
    for (int64_t step = 0; step * band < most_positions; ++step) {
      RunOn(threads_, static_cast<int64_t>(workers.size()), [&](int64_t w) {
        Worker& worker = workers[w];
        const int64_t begin = std::min(worker.begin + step * band, worker.end);
        const int64_t end = std::min(begin + band, worker.end);
        RunBand(slices[w % parts], packed[w % parts], w % parts == 0, begin, end, tile_positions,
                worker);
      });
      if (parts == 1) continue;
      for (int64_t w = 0; w < static_cast<int64_t>(workers.size()); ++w) {
        if (w % parts == 0) continue;
        const int64_t begin = workers[w].begin + step * band;
        AddTo(gradients_.sampled.offset, begin * params_.offset_channels(), workers[w].offset);
        AddTo(gradients_.sampled.mask, begin * params_.mask_channels(), workers[w].mask);
      }
    }
    AddImages(workers);
    if (gradients_.filters == nullptr) return;
    for (int64_t p = 0; p < parts; ++p) AddFilters(slices[p], p, workers);
  }

  static void AddTo(T* gradient, int64_t begin, const std::vector<T>& sum) {
    for (size_t i = 0; i < sum.size(); ++i) gradient[begin + i] += sum[i];
  }

  // One worker's gradients for `slices` at positions [begin, end), tile by tile.
  void RunBand(const std::vector<ChannelSlice>& slices, const PackedFilters<T>& packed,
               bool first_part, int64_t begin, int64_t end, int64_t tile_positions,
               Worker& worker) {
    SampledGradients<T> sampled = gradients_.sampled;
    if (!first_part) {
      // Sums of its own, addressed as the whole gradients are.
      worker.offset.assign(sampled.offset ? (end - begin) * params_.offset_channels() : 0, T(0));
      worker.mask.assign(sampled.mask ? (end - begin) * params_.mask_channels() : 0, T(0));
      if (sampled.offset) sampled.offset = worker.offset.data() - begin * params_.offset_channels();
      if (sampled.mask) sampled.mask = worker.mask.data() - begin * params_.mask_channels();
    }
    if (gradients_.filters != nullptr && worker.filters.empty()) {
      int64_t size = 0;
      for (const ChannelSlice& slice : slices) size += PartialSize(slice);
      worker.filters.assign(size, T(0));
    }
    // The image that is shared ends there.
    int64_t shared_end = begin;
    if (by_positions_ && sampled.input && begin < end) {
      shared_end = std::min(RoundUp(begin, params_.image_positions()), end);
    }
    if (begin < shared_end) {
      worker.image.assign(params_.image_size(), T(0));
      // Addressed as the whole gradient is.
      sampled.input = worker.image.data() - ImageOf(begin) * params_.image_size();
    }
    const int64_t panels = CeilDiv(params_.group_out_channels(), kernels_.gemm_panel);
    for (int64_t at = begin, tile_end; at < end; at = tile_end) {
      if (at == shared_end) sampled.input = gradients_.sampled.input;
      tile_end = std::min(at + tile_positions, at < shared_end ? shared_end : end);
      worker.tile.MoveTo(at, tile_end);
      int64_t packed_group = -1;
      T* sum = worker.filters.data();
      for (size_t i = 0; i < slices.size(); ++i) {
        const ChannelSlice& slice = slices[i];
        worker.tile.Take(slice);
        if (IsDirect(params_)) {
          T* grad_filters = gradients_.filters == nullptr ? nullptr : sum;
          worker.tile.DirectBackward(packed.Direct(i), grad_output_, sampled, grad_filters);
          sum += PartialSize(slice);
          continue;
        }
        if (sampled.any()) BackpropSamples(slice, i, packed, sampled, worker.tile);
        if (gradients_.filters == nullptr) continue;
        if (!sampled.any()) worker.tile.Im2Col();
        for (int64_t j = 0; j < slice.groups; ++j) {
          const int64_t group = slice.first_group + j;
          const auto grad_output =
              GroupOutput(params_, group, grad_output_, worker.tile.begin(), worker.tile.end());
          if (group != packed_group) {
            worker.packed_output.resize(panels * kernels_.gemm_panel * tile_positions);
            kernels_.pack(grad_output, 0, grad_output.rows, worker.packed_output.data());
            packed_group = group;
          }
          const Matrix<T> columns = worker.tile.GroupColumns(j);
          kernels_.gemm(GemmForm::kTransposeA, AsConst(columns), worker.packed_output.data(),
                        {sum, columns.cols, grad_output.cols, grad_output.cols},
                        /*accumulate=*/true);
          sum += columns.cols * grad_output.cols;
        }
      }
    }
  }

  // Leaves the columns themselves in the tile, if the filters' gradient needs them.
  void BackpropSamples(const ChannelSlice& slice, int64_t i, const PackedFilters<T>& packed,
                       const SampledGradients<T>& sampled, Tile<T>& tile) {
    for (int64_t j = 0; j < slice.groups; ++j) {
      kernels_.gemm(
          GemmForm::kPlain,
          GroupOutput(params_, slice.first_group + j, grad_output_, tile.begin(), tile.end()),
          packed.Group(slice, i, j), tile.GroupColumns(j), /*accumulate=*/false);
    }
    tile.Col2Im(/*replace=*/gradients_.filters != nullptr, sampled);
  }

  int64_t ImageOf(int64_t position) const { return position / params_.image_positions(); }

  // Adds the workers' sums of images to the input's gradient.
  void AddImages(const std::vector<Worker>& workers) {
    if (!by_positions_ || gradients_.sampled.input == nullptr) return;
    RunOn(threads_, threads_.count, [&](int64_t i) {
      const int64_t begin = PartBegin(params_.image_size(), i, threads_.count);
      const int64_t end = PartBegin(params_.image_size(), i + 1, threads_.count);
      for (const Worker& worker : workers) {
        if (worker.image.empty()) continue;
        T* gradient = gradients_.sampled.input + ImageOf(worker.begin) * params_.image_size();
        for (int64_t j = begin; j < end; ++j) gradient[j] += worker.image[j];
      }
    });
  }

  // Adds the workers' sums for a part's slices to the filters' gradient.
  void AddFilters(const std::vector<ChannelSlice>& slices, int64_t part,
                  const std::vector<Worker>& workers) {
    std::vector<int64_t> begins(1, 0);
    for (const ChannelSlice& slice : slices) begins.push_back(begins.back() + PartialSize(slice));
    const int64_t parts = static_cast<int64_t>(channel_parts_.size());
    ForEachOn(threads_, static_cast<int64_t>(slices.size()), [&](int64_t i) {
      for (int64_t w = part; w < static_cast<int64_t>(workers.size()); w += parts) {
        if (workers[w].filters.empty()) continue;
        const T* from = workers[w].filters.data() + begins[i];
        if (IsDirect(params_)) {
          ForEachDirectFilter(params_, slices[i],
                              [&](int64_t index) { gradients_.filters[index] += *from++; });
          continue;
        }
        for (int64_t j = 0; j < slices[i].groups; ++j) {
          const int64_t group = slices[i].first_group + j;
          for (int64_t tap = 0; tap < params_.taps(); ++tap) {
            const Matrix<T> to = SliceFilters(params_, slices[i], group, tap, gradients_.filters);
            for (int64_t c = 0; c < to.rows; ++c, from += to.cols) {
              T* row = to.data + c * to.stride;
              for (int64_t o = 0; o < to.cols; ++o) row[o] += from[o];
            }
          }
        }
      }
    });
  }

  const CpuKernels<T>& kernels_ = SelectCpuKernels<T>();
  const DeformConvParams& params_;
  const SampledTensors<T>& tensors_;
  const T* filters_;
  const T* grad_output_;
  const DeformConvGradients<T>& gradients_;
  const CpuThreads& threads_;
  std::vector<ChannelSlice> channel_parts_;
  int64_t image_ranges_ = 1;
  bool by_positions_ = false;  // whether workers have ranges of positions, rather than of images
};

}  // namespace

template <typename T>
void DeformConv2DBackwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                             const T* filters, const T* grad_output, const CpuThreads& threads,
                             bool add_filters, const DeformConvGradients<T>& gradients) {
  Backward<T>(params, tensors, filters, grad_output, gradients, threads).Run(add_filters);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                            \
  template void DeformConv2DBackwardCpu<T>(const DeformConvParams&, const SampledTensors<T>&, \
                                           const T*, const T*, const CpuThreads&, bool,       \
                                           const DeformConvGradients<T>&);
DEFORM_CONV_FOR_COMPUTE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
