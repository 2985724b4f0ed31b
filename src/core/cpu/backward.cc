// Backward on the CPU.
//
// Positions that lie near each other add to the same pixels of the input's gradient. So the work
// is divided by what it adds to. A worker has some positions, and owns the rows of pixels around
// them: it alone adds to those. What its samples bring to other rows, it sums up apart, in borrowed
// rows, which are added when all workers are done. Or, where those would be too many, or the
// filters' gradient large, a worker has a part of the channels of some images. No lock is needed,
// and the order of additions is fixed.

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/cpu/packed_filters.h"
#include "core/cpu/plan.h"
#include "core/cpu/position_ranges.h"
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
  static constexpr int64_t kLeastAdditions = 1 << 16;  // for a thread

  // Zeroes the i-th thread's part.
  void Zero(T* data, int64_t size, int64_t i) const {
    if (data == nullptr) return;
    std::fill(data + PartBegin(size, i, threads_.count),
              data + PartBegin(size, i + 1, threads_.count), T(0));
  }

  // Divides the images among workers, and unless the images alone keep every thread busy, their
  // positions or else the channels too.
  void PlanParts() {
    constexpr int64_t kImagesPerThread = 4;
    const int64_t threads = threads_.count, batch = params_.batch;
    const int64_t wanted =
        batch >= kImagesPerThread * threads ? 1 : threads / std::gcd(threads, batch);
    if (wanted > 1 && PositionsCostLess()) {
      ranges_ = DividePositions(params_, tensors_, gradients_.sampled.input != nullptr, threads_);
    }
    by_positions_ = !ranges_.empty();
    channel_parts_ = Cut(AllChannels(params_), by_positions_ ? 1 : wanted);
    if (by_positions_) return;
    const int64_t ranges = std::min(batch, threads / static_cast<int64_t>(channel_parts_.size()));
    for (int64_t i = 0; i < ranges; ++i) {
      ranges_.push_back({PartBegin(batch, i, ranges) * params_.image_positions(),
                         PartBegin(batch, i + 1, ranges) * params_.image_positions()});
    }
  }

  // Workers of positions each have a sum of the filters' gradient. Workers of channels each locate
  // all samples, and sum up the gradients of offset and mask. A sample costs about as much as so
  // many filters.
  bool PositionsCostLess() const {
    constexpr int64_t kFiltersPerSample = 4;
    const int64_t samples = params_.out_positions() * params_.deform_groups * params_.taps();
    return IsDirect(params_) || gradients_.filters == nullptr ||
           params_.filters_size() <= kFiltersPerSample * samples;
  }

  int64_t RowSize() const { return params_.in_w * params_.in_channels; }

  // Elements of the sum of a slice's filters' gradients, if they are wanted.
  int64_t PartialSize(const ChannelSlice& slice) const {
    if (!params_.has_filters) return 0;
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
    WorkspaceVector<T> borrowed;       // rows, those above its own first
    std::vector<T*> grad_rows;         // where those of an image begin, from row -1 on
    PositionRange range;
  };

  void RunRound(const std::vector<std::vector<ChannelSlice>>& slices) {
    const int64_t parts = static_cast<int64_t>(channel_parts_.size());
    const int64_t most_positions = ranges_[0].end;  // the first is the largest
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
    for (const PositionRange& range : ranges_) {
      for (int64_t p = 0; p < parts; ++p) {
        workers.emplace_back(params_, tensors_, tile_positions);
        workers.back().range = range;
      }
    }
    for (int64_t step = 0; step * band < most_positions; ++step) {
      RunOn(threads_, static_cast<int64_t>(workers.size()), [&](int64_t w) {
        Worker& worker = workers[w];
        const int64_t begin = std::min(worker.range.begin + step * band, worker.range.end);
        const int64_t end = std::min(begin + band, worker.range.end);
        RunBand(slices[w % parts], packed[w % parts], w % parts == 0, begin, end, tile_positions,
                worker);
      });
      if (parts > 1) AddBand(step * band, parts, workers);
    }
    AddBorrowed(workers);
    if (gradients_.filters == nullptr) return;
    for (int64_t p = 0; p < parts; ++p) AddFilters(slices[p], p, workers);
  }

  // Adds the workers' sums of a band to the gradients of offset and mask.
  void AddBand(int64_t from_begin, int64_t parts, const std::vector<Worker>& workers) {
    const auto add = [&](T* gradient, int64_t channels, std::vector<T> Worker::* sum) {
      if (gradient == nullptr) return;
      for (size_t first = 0; first < workers.size(); first += parts) {
        T* to = gradient + (workers[first].range.begin + from_begin) * channels;
        const int64_t size = static_cast<int64_t>((workers[first + 1].*sum).size());
        ForRangesOn(threads_, size, kLeastAdditions / (parts - 1), [&](int64_t begin, int64_t end) {
          for (int64_t p = 1; p < parts; ++p) {
            const T* from = (workers[first + p].*sum).data();
            for (int64_t i = begin; i < end; ++i) to[i] += from[i];
          }
        });
      }
    };
    add(gradients_.sampled.offset, params_.offset_channels(), &Worker::offset);
    add(gradients_.sampled.mask, params_.mask_channels(), &Worker::mask);
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
    const bool by_rows = by_positions_ && sampled.input != nullptr;
    if (by_rows) worker.borrowed.assign(worker.range.borrowed_rows() * RowSize(), T(0));
    int64_t image = -1;
    const int64_t panels = CeilDiv(params_.group_out_channels(), kernels_.gemm_panel);
    for (int64_t at = begin, tile_end; at < end; at = tile_end) {
      tile_end = std::min(at + tile_positions, end);
      if (by_rows) {
        tile_end = std::min(tile_end, (ImageOf(at) + 1) * params_.image_positions());
        if (ImageOf(at) != image) FindGradRows(image = ImageOf(at), worker);
      }
      worker.tile.MoveTo(at, tile_end, by_rows ? worker.grad_rows.data() + 1 : nullptr);
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

  // Where the worker adds to the rows of an image.
  void FindGradRows(int64_t image, Worker& worker) const {
    const PositionRange& range = worker.range;
    T* const gradient = gradients_.sampled.input;
    // Pointed at where no pixel counts.
    worker.grad_rows.assign(params_.in_h + 2, gradient);
    for (int64_t h = 0; h < params_.in_h; ++h) {
      const int64_t row = image * params_.in_h + h;
      T*& begin = worker.grad_rows[h + 1];
      if (row >= range.first_row && row < range.end_row) {
        begin = gradient + row * RowSize();
      } else if (row >= range.first_sampled && row < range.end_sampled) {
        const int64_t borrowed = row < range.first_row ? row - range.first_sampled
                                                       : range.rows_above() + row - range.end_row;
        begin = worker.borrowed.data() + borrowed * RowSize();
      }
    }
  }

  // Adds the workers' borrowed rows to the input's gradient.
  void AddBorrowed(const std::vector<Worker>& workers) {
    if (!by_positions_ || gradients_.sampled.input == nullptr) return;
    int64_t most_rows = 1;
    for (const Worker& worker : workers) {
      most_rows = std::max(most_rows, worker.range.borrowed_rows());
    }
    ForRangesOn(threads_, RowSize(), CeilDiv(kLeastAdditions, most_rows),
                [&](int64_t begin, int64_t end) {
                  for (const Worker& worker : workers) {
                    const PositionRange& range = worker.range;
                    const T* from = worker.borrowed.data();
                    for (int64_t row = range.first_sampled; row < range.end_sampled; ++row) {
                      if (row == range.first_row) row = range.end_row;
                      if (row >= range.end_sampled) break;
                      T* to = gradients_.sampled.input + row * RowSize();
                      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
                      from += RowSize();
                    }
                  }
                });
  }

  // Adds the workers' sums for a part's slices to the filters' gradient.
  void AddFilters(const std::vector<ChannelSlice>& slices, int64_t part,
                  const std::vector<Worker>& workers) {
    std::vector<int64_t> begins(1, 0);
    for (const ChannelSlice& slice : slices) begins.push_back(begins.back() + PartialSize(slice));
    const int64_t parts = static_cast<int64_t>(channel_parts_.size());
    const int64_t of_part = static_cast<int64_t>(workers.size()) / parts;
    ForEachFilterPart(params_, slices, of_part + 1, threads_, [&](const FilterPart& filter_part) {
      const ChannelSlice& slice = slices[filter_part.slice];
      const int64_t tap = filter_part.tap;
      const int64_t width = IsDirect(params_) ? slice.channels() : slice.width;
      const int64_t begin = begins[filter_part.slice] + (filter_part.group * params_.taps() + tap) *
                                                            width * params_.group_out_channels();
      for (size_t w = part; w < workers.size(); w += parts) {
        if (workers[w].filters.empty()) continue;
        const T* from = workers[w].filters.data() + begin;
        if (IsDirect(params_)) {
          ForEachDirectFilter(params_, slice, tap,
                              [&](int64_t index) { gradients_.filters[index] += *from++; });
          continue;
        }
        const Matrix<T> to = SliceFilters(params_, slice, slice.first_group + filter_part.group,
                                          tap, gradients_.filters);
        for (int64_t c = 0; c < to.rows; ++c, from += to.cols) {
          T* row = to.data + c * to.stride;
          for (int64_t o = 0; o < to.cols; ++o) row[o] += from[o];
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
  std::vector<PositionRange> ranges_;  // of whole images, unless:
  bool by_positions_ = false;
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
