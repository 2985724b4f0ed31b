// Forward and backward on the CPU: threads, tiles of output positions, slices of channels, and for
// each im2col and GEMM. The columns of a tile's slice stay in cache between the two; no larger
// column buffer exists. Packed filters and partial sums are bounded too, by going over the tensors
// in several rounds where the filters are large.

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>
#include <vector>

#include "core/cpu_kernels.h"
#include "core/deform_conv2d.h"
#include "core/workspace_vector.h"

namespace deform_conv {
namespace {

// A tile's positions, about: enough for its GEMMs to make up for reading the packed filters from
// the last-level cache.
constexpr int64_t kTilePositions = 96;
// The length of a row of columns, about: a tile of them takes 330 KB, within a second-level cache,
// and slices are wide enough for the work per sample to outweigh finding it.
constexpr int64_t kRowSize = 1152;
// Channels are cut into slices at multiples of so many: a cache line.
constexpr int64_t kSliceUnit = 16;
// Bounds on what a thread allocates: packed filters, sums of their gradients, and for each thing of
// a tile or band, such as its columns. A slice or a position that takes more alone exceeds them.
constexpr int64_t kPackedBytes = int64_t{3} << 20;
constexpr int64_t kPartialBytes = int64_t{3} << 20;
constexpr int64_t kTileBytes = int64_t{1} << 19;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t multiple) { return CeilDiv(a, multiple) * multiple; }

// The i-th of `parts` nearly equal parts of [0, total) begins here.
constexpr int64_t PartBegin(int64_t total, int64_t i, int64_t parts) {
  return total / parts * i + std::min(total % parts, i);
}

// Calls work(i) for each i in [0, count). An exception (workspace is allocated by the worker that
// uses it) must not leave a pool's thread, so it is carried over to the caller's.
void RunOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work) {
  if (count <= 1) {
    if (count == 1) work(0);
    return;
  }
  std::vector<std::exception_ptr> exceptions(count);
  threads.run(static_cast<int>(count), [&](int i) {
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

// Calls work(i) for each i in [0, count), whichever thread is free taking the next.
void ForEachOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  RunOn(threads, std::min<int64_t>(threads.count, count), [&](int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

// --- Channels ---

// A range of input channels to work on: whole convolution groups, or a part of one group.
struct ChannelSlice {
  int64_t begin, end;
  int64_t first_group, groups;
  int64_t width;  // channels of each group that are in the slice

  int64_t channels() const { return end - begin; }
};

// Cuts a slice into `count` nearly equal ones if it has enough groups, or enough units of channels
// within its one group; otherwise into fewer.
std::vector<ChannelSlice> Cut(const ChannelSlice& slice, int64_t count) {
  std::vector<ChannelSlice> slices;
  if (slice.groups > 1) {
    count = std::clamp<int64_t>(count, 1, slice.groups);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = PartBegin(slice.groups, i, count);
      const int64_t last = PartBegin(slice.groups, i + 1, count);
      slices.push_back({slice.begin + first * slice.width, slice.begin + last * slice.width,
                        slice.first_group + first, last - first, slice.width});
    }
    return slices;
  }
  const int64_t units = std::max<int64_t>(slice.width / kSliceUnit, 1);
  count = std::clamp<int64_t>(count, 1, units);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = slice.begin + PartBegin(units, i, count) * kSliceUnit;
    const int64_t end =
        i + 1 == count ? slice.end : slice.begin + PartBegin(units, i + 1, count) * kSliceUnit;
    slices.push_back({begin, end, slice.first_group, 1, end - begin});
  }
  return slices;
}

// Cuts a slice so that a row of columns has about kRowSize elements, and fewer if the filters are
// large: between groups if they are narrower than that, within them otherwise.
template <typename T>
std::vector<ChannelSlice> CutForColumns(const DeformConvParams& params, const ChannelSlice& whole) {
  const int64_t filter_bytes = params.taps() * params.group_out_channels() * sizeof(T);
  const int64_t channels =
      std::max(std::min(kRowSize / params.taps(), kPartialBytes / filter_bytes), kSliceUnit);
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

ChannelSlice AllChannels(const DeformConvParams& params) {
  return {0, params.in_channels, 0, params.groups, params.group_in_channels()};
}

std::vector<ChannelRun> RunsOf(const DeformConvParams& params, const ChannelSlice& slice) {
  std::vector<ChannelRun> runs;
  const int64_t deform_width = params.deform_group_channels();
  for (int64_t channel = slice.begin; channel < slice.end; channel += runs.back().count) {
    const int64_t group = (channel - slice.begin) / slice.width;
    const int64_t in_group = channel - slice.begin - group * slice.width;
    const int64_t g = channel / deform_width;
    const int64_t count = std::min((g + 1) * deform_width - channel, slice.width - in_group);
    const int64_t column = group * params.taps() * slice.width + in_group;
    runs.push_back({channel, count, g, column, slice.width});
  }
  return runs;
}

// The filters that a slice of channels meets in one of its groups.
template <typename T>
struct GroupFilters {
  const DeformConvParams& params;
  const ChannelSlice& slice;
  int64_t group;  // of the convolution

  int64_t rows() const { return params.taps() * slice.width; }
  int64_t cols() const { return params.group_out_channels(); }
  // Where the slice's channels begin within the group's.
  int64_t first_channel() const {
    return slice.begin + (group - slice.first_group) * slice.width -
           group * params.group_in_channels();
  }

  // The rows for one tap, [width, cols], within filters or a gradient of filters.
  template <typename Element>
  Matrix<Element> Tap(Element* filters, int64_t tap) const {
    const int64_t row = tap * params.group_in_channels() + first_channel();
    return {filters + row * params.out_channels + group * cols(), slice.width, cols(),
            params.out_channels};
  }
};

// The output channels of one group at positions [begin, end), within an output.
template <typename Element>
Matrix<Element> GroupOutput(const DeformConvParams& params, int64_t group, Element* output,
                            int64_t begin, int64_t end) {
  const int64_t channels = params.group_out_channels();
  return {output + begin * params.out_channels + group * channels, end - begin, channels,
          params.out_channels};
}

template <typename T>
Matrix<const T> AsConst(const Matrix<T>& matrix) {
  return {matrix.data, matrix.rows, matrix.cols, matrix.stride};
}

// Slices that are worked on together, and their filters, packed for a GEMM as they are or, to give
// the columns' gradient, transposed.
template <typename T>
class PackedFilters {
 public:
  PackedFilters(const DeformConvParams& params, GemmForm form) : params_(params), form_(form) {}

  // Bytes that one slice takes.
  int64_t BytesOf(const ChannelSlice& slice) const {
    return slice.groups * GroupSize(slice) * static_cast<int64_t>(sizeof(T));
  }

  // Packs the filters of `slices`, which must outlive this.
  void Pack(const std::vector<ChannelSlice>& slices, const T* filters, const CpuThreads& threads) {
    begins_.assign(1, 0);
    for (const ChannelSlice& slice : slices) {
      begins_.push_back(begins_.back() + slice.groups * GroupSize(slice));
    }
    packed_.resize(begins_.back());
    ForEachOn(threads, static_cast<int64_t>(slices.size()), [&](int64_t i) {
      for (int64_t j = 0; j < slices[i].groups; ++j) PackGroup(slices[i], i, j, filters);
    });
  }

  // The packed filters of the i-th slice's j-th group.
  const T* Group(const ChannelSlice& slice, int64_t i, int64_t j) const {
    return packed_.data() + begins_[i] + j * GroupSize(slice);
  }

 private:
  int64_t GroupSize(const ChannelSlice& slice) const {
    const int64_t rows = params_.taps() * slice.width, cols = params_.group_out_channels();
    return form_ == GemmForm::kTransposeB ? RoundUp(rows, kernels_.gemm_panel) * cols
                                          : rows * RoundUp(cols, kernels_.gemm_panel);
  }

  void PackGroup(const ChannelSlice& slice, int64_t i, int64_t j, const T* filters) {
    const GroupFilters<T> group{params_, slice, slice.first_group + j};
    T* packed = packed_.data() + begins_[i] + j * GroupSize(slice);
    for (int64_t tap = 0; tap < params_.taps(); ++tap) {
      const int64_t row = tap * slice.width;
      if (form_ == GemmForm::kTransposeB) {
        kernels_.pack_transposed(group.Tap(filters, tap), row, packed);
      } else {
        kernels_.pack(group.Tap(filters, tap), row, group.rows(), packed);
      }
    }
  }

  const CpuKernels<T>& kernels_ = SelectCpuKernels<T>();
  const DeformConvParams& params_;
  const GemmForm form_;
  WorkspaceVector<T> packed_;
  std::vector<int64_t> begins_;
};

// Groups `slices` into rounds, in order, so that `bytes_of` adds up to at most `bound` in each that
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

// --- Tiles ---

// The positions of a tile. At least `wanted` tiles come of it where there are enough positions, and
// their GEMMs have whole blocks of rows.
template <typename T>
int64_t TilePositions(const DeformConvParams& params, const std::vector<ChannelSlice>& slices,
                      int64_t positions, int64_t wanted) {
  constexpr int64_t kSampleBytes = sizeof(SampleBlock<T>) / SampleBlock<T>::kSize;
  const int64_t deform_width = params.deform_group_channels();
  // Of what a tile holds for each position: output channels, columns, samples.
  int64_t position_bytes = params.group_out_channels() * sizeof(T);
  for (const ChannelSlice& slice : slices) {
    const int64_t deform_groups = (slice.end - 1) / deform_width - slice.begin / deform_width + 1;
    position_bytes =
        std::max({position_bytes, params.taps() * slice.channels() * int64_t{sizeof(T)},
                  params.taps() * deform_groups * kSampleBytes});
  }
  const int64_t most = std::clamp<int64_t>(kTileBytes / position_bytes, 1, kTilePositions);
  const int64_t tiles = RoundUp(CeilDiv(positions, most), wanted);
  return std::min(RoundUp(CeilDiv(positions, tiles), SelectCpuKernels<T>().gemm_rows), most);
}

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
    stride_ = RoundUp(params_.taps() * slice.channels(), kSliceUnit);
    if (stride_ / kSliceUnit % 2 == 0) stride_ += kSliceUnit;
    if (static_cast<int64_t>(columns_.size()) < positions_ * stride_) {
      columns_.resize(positions_ * stride_);
    }
    const int64_t first = runs_.front().deform_group, end = runs_.back().deform_group + 1;
    if (located_.first_group == first && located_.end_group == end) return;
    MakeRoomForSamples(first, end);
    kernels_.locate(params_, tensors_, located_);
  }

  void Im2Col() {
    kernels_.im2col(params_, Runs(), located_, tensors_.input, zeros_.data(), Columns());
  }

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
  void MakeRoomForSamples(int64_t first_group, int64_t end_group) {
    const int64_t count = positions_ * (end_group - first_group) * params_.taps();
    if (static_cast<int64_t>(bases_.size()) < 2 * count) {
      bases_.resize(2 * count);
      blocks_.resize(CeilDiv(count, SampleBlock<T>::kSize));
    }
    located_.first_group = first_group;
    located_.end_group = end_group;
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

// --- Forward ---

template <typename T>
void Forward(const DeformConvParams& params, const SampledTensors<T>& tensors, const T* filters,
             const CpuThreads& threads, T* output) {
  const CpuKernels<T>& kernels = SelectCpuKernels<T>();
  const int64_t positions = params.out_positions();
  const std::vector<ChannelSlice> all = CutForColumns<T>(params, AllChannels(params));
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
        for (size_t i = 0; i < slices.size(); ++i) {
          const ChannelSlice& slice = slices[i];
          tile.Take(slice);
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
    });
  }
}

// --- Backward ---
//
// Positions that lie near each other add to the same pixels of the input's gradient. So the work
// is divided by what it adds to: a worker has a part of the channels of some images, and no other
// adds to those. No lock is needed, and the order of additions is fixed.

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
      Zero(sampled.input, params_.batch * params_.in_h * params_.in_w * params_.in_channels, i);
      Zero(sampled.offset, params_.out_positions() * params_.offset_channels(), i);
      Zero(sampled.mask, params_.out_positions() * params_.mask_channels(), i);
      if (add_filters) return;
      Zero(gradients_.filters, params_.taps() * params_.group_in_channels() * params_.out_channels,
           i);
    });
    if (params_.out_positions() == 0) return;
    PlanParts();
    // Each part of the channels goes through rounds of its own; all parts have their r-th at once.
    const PackedFilters<T> packed(params_, GemmForm::kTransposeB);  // for its sizes
    std::vector<std::vector<std::vector<ChannelSlice>>> rounds;
    size_t most_rounds = 0;
    for (const ChannelSlice& part : parts_) {
      rounds.push_back(
          Rounds(CutForColumns<T>(params_, part), kPartialBytes, [&](const ChannelSlice& slice) {
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
  // Zeroes the i-th thread's share.
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
    const int64_t wanted =
        batch >= kImagesPerThread * threads ? 1 : threads / std::gcd(threads, batch);
    parts_ = Cut(AllChannels(params_), wanted);
    image_groups_ = std::min(batch, threads / static_cast<int64_t>(parts_.size()));
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
    int64_t begin = 0, end = 0;        // positions of its images
  };

  void RunRound(const std::vector<std::vector<ChannelSlice>>& slices) {
    const int64_t parts = static_cast<int64_t>(parts_.size());
    const int64_t image_positions = params_.out_h * params_.out_w;
    const int64_t most_positions = CeilDiv(params_.batch, image_groups_) * image_positions;
    std::vector<ChannelSlice> all;
    for (const auto& of_part : slices) all.insert(all.end(), of_part.begin(), of_part.end());
    int64_t tile_positions = TilePositions<T>(params_, all, most_positions, 1);
    int64_t band = most_positions;
    if (parts > 1) {
      // Their gradients by offset and mask are summed up band by band, of whole tiles.
      const int64_t bytes = (params_.offset_channels() + params_.mask_channels()) * sizeof(T);
      const int64_t most = std::max<int64_t>(kTileBytes / bytes, 1);
      tile_positions = std::min(tile_positions, most);
      band = most / tile_positions * tile_positions;
    }

    std::vector<PackedFilters<T>> packed(parts, PackedFilters<T>(params_, GemmForm::kTransposeB));
    if (gradients_.sampled.any()) {
      for (int64_t p = 0; p < parts; ++p) packed[p].Pack(slices[p], filters_, threads_);
    }
    std::vector<Worker> workers;
    for (int64_t w = 0; w < parts * image_groups_; ++w) {
      workers.emplace_back(params_, tensors_, tile_positions);
      const int64_t i = w / parts;
      workers.back().begin = PartBegin(params_.batch, i, image_groups_) * image_positions;
      workers.back().end = PartBegin(params_.batch, i + 1, image_groups_) * image_positions;
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
    if (gradients_.filters == nullptr) return;
    for (int64_t p = 0; p < parts; ++p) AddFilters(slices[p], p, workers);
  }

  static void AddTo(T* gradient, int64_t begin, const std::vector<T>& sum) {
    for (size_t i = 0; i < sum.size(); ++i) gradient[begin + i] += sum[i];
  }

  // One worker's share of positions [begin, end): the tiles' gradients for `slices`.
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
    const int64_t panels = CeilDiv(params_.group_out_channels(), kernels_.gemm_panel);
    for (int64_t at = begin; at < end; at += tile_positions) {
      worker.tile.MoveTo(at, std::min(at + tile_positions, end));
      int64_t packed_group = -1;
      T* sum = worker.filters.data();
      for (size_t i = 0; i < slices.size(); ++i) {
        const ChannelSlice& slice = slices[i];
        worker.tile.Take(slice);
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

  // Adds the workers' sums for a part's slices to the filters' gradient.
  void AddFilters(const std::vector<ChannelSlice>& slices, int64_t part,
                  const std::vector<Worker>& workers) {
    std::vector<int64_t> begins(1, 0);
    for (const ChannelSlice& slice : slices) begins.push_back(begins.back() + PartialSize(slice));
    const int64_t parts = static_cast<int64_t>(parts_.size());
    ForEachOn(threads_, static_cast<int64_t>(slices.size()), [&](int64_t i) {
      for (int64_t w = part; w < static_cast<int64_t>(workers.size()); w += parts) {
        if (workers[w].filters.empty()) continue;
        const T* from = workers[w].filters.data() + begins[i];
        for (int64_t j = 0; j < slices[i].groups; ++j) {
          const GroupFilters<T> group{params_, slices[i], slices[i].first_group + j};
          for (int64_t tap = 0; tap < params_.taps(); ++tap) {
            const Matrix<T> to = group.Tap(gradients_.filters, tap);
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
  std::vector<ChannelSlice> parts_;
  int64_t image_groups_ = 1;
};

}  // namespace

template <typename T>
void DeformConv2DForwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                            const T* filters, const CpuThreads& threads, T* output) {
  if (params.out_positions() > 0) Forward(params, tensors, filters, threads, output);
}

template <typename T>
void DeformConv2DBackwardCpu(const DeformConvParams& params, const SampledTensors<T>& tensors,
                             const T* filters, const T* grad_output, const CpuThreads& threads,
                             bool add_filters, const DeformConvGradients<T>& gradients) {
  Backward<T>(params, tensors, filters, grad_output, gradients, threads).Run(add_filters);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                            \
  template void DeformConv2DForwardCpu<T>(const DeformConvParams&, const SampledTensors<T>&,  \
                                          const T*, const CpuThreads&, T*);                   \
  template void DeformConv2DBackwardCpu<T>(const DeformConvParams&, const SampledTensors<T>&, \
                                           const T*, const T*, const CpuThreads&, bool,       \
                                           const DeformConvGradients<T>&);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(double)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
