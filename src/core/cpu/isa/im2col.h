// im2col on one CPU thread, vectorised over channels, and what col2im shares with it: the order in
// which samples are read. The contract is in cpu/kernels.h. Included only by kernels_isa.cc, which
// is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_IM2COL_H_
#define DEFORM_CONV_CORE_CPU_ISA_IM2COL_H_

#include <type_traits>

#include "core/cpu/isa/vector.h"
#include "core/cpu/kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// The tensors that the kernels of a tile read, and those that they add to: none in forward.
template <typename T>
struct TileTensors {
  SampledTensors<T> sampled;
  SampledGradients<T> gradients;
};

// Prefetches what hardware prefetchers miss, which see no pattern in samples and are late for the
// rest: the pixels that coming positions will be the first to sample, if offsets are small, and
// their gradients; the offsets and masks of the tile that comes next; and the gradients of this
// tile's. Of tensors that a second-level cache holds, only the input.
template <typename T>
class Prefetcher {
 public:
  Prefetcher(const DeformConvParams& params, const ChannelRuns& runs, const TileSamples<T>& tile,
             const TileTensors<T>& tensors)
      : from_(tensors),
        channels_(params.in_channels),
        pixels_(params.batch * params.in_h * params.in_w),
        step_(params.stride_h * params.stride_w),
        wanted_(step_ < params.taps() ? step_ : params.taps()),
        samples_(params.deform_groups * params.taps()),
        tile_samples_((tile.end_deform_group - tile.first_deform_group) * params.taps()),
        sample_(tile.begin * samples_ + tile.first_deform_group * params.taps()),
        tile_size_((tile.end - tile.begin) * samples_),
        end_(params.out_positions() * samples_) {
    // The lowest pixel without offsets, and so many below it.
    constexpr int64_t kRowsAhead = 5;
    const int64_t rows = (params.kernel_h - 1) * params.dilation_h - params.pad_top + kRowsAhead;
    const int64_t y_n = tile.begin / params.out_w, x = tile.begin - y_n * params.out_w;
    const int64_t n = y_n / params.out_h, y = y_n - n * params.out_h;
    pixel_ = (n * params.in_h + y * params.stride_h + rows) * params.in_w + x * params.stride_w;
    if (pixel_ < 0) pixel_ = 0;
    const ChannelRun& last = runs.end[-1];
    channel_ = runs.begin->channel;
    size_ = last.channel + last.count - channel_;

    constexpr int64_t kCacheBytes = 1 << 20;
    if (pixels_ * channels_ * int64_t{sizeof(T)} <= kCacheBytes) from_.gradients.input = nullptr;
    // Later slices of a deformable group have the same samples.
    has_samples_ = 2 * end_ * int64_t{sizeof(T)} > kCacheBytes &&
                   channel_ % params.deform_group_channels() == 0;
  }

  // To be called for each position of the tile in turn. Not inlined: the loops over samples need
  // the registers.
  __attribute__((noinline)) void Next() {
    for (int64_t i = 0; i < wanted_ && pixel_ + i < pixels_; ++i) {
      const int64_t at = (pixel_ + i) * channels_ + channel_;
      Prefetch<kToRead>(from_.sampled.input, at, size_);
      Prefetch<kToWrite>(from_.gradients.input, at, size_);
    }
    pixel_ += step_;
    if (!has_samples_) return;
    const int64_t next = sample_ + tile_size_;
    if (next < end_) {
      Prefetch<kToRead>(from_.sampled.offset, 2 * next, 2 * tile_samples_);
      Prefetch<kToRead>(from_.sampled.mask, next, tile_samples_);
    }
    Prefetch<kToWrite>(from_.gradients.offset, 2 * sample_, 2 * tile_samples_);
    Prefetch<kToWrite>(from_.gradients.mask, sample_, tile_samples_);
    sample_ += samples_;
  }

 private:
  enum Intent { kToRead, kToWrite };

  template <Intent intent>
  static DEFORM_CONV_INLINE void Prefetch(const T* tensor, int64_t begin, int64_t size) {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (tensor == nullptr) return;
    for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(tensor + begin + i, intent, 2);
  }

  TileTensors<T> from_;
  int64_t channels_, pixels_, step_, wanted_, pixel_, channel_, size_;
  // Samples of a position; those of the tile's deformable groups; the coming position's first one;
  // from it to that of the next tile; all.
  int64_t samples_, tile_samples_, sample_, tile_size_, end_;
  bool has_samples_;
};

// Calls visit(run, row, n, image, first_sample) for each run at each position of a tile: `row` is
// the position's, counted from the tile's first; `n` is the image, and `image` where the run's
// channels of its first pixel are in the input, in elements; and from `first_sample` on lie the
// samples of the position's taps.
template <typename T, typename Visit>
DEFORM_CONV_INLINE void ForEachRunAtPosition(const DeformConvParams& params,
                                             const ChannelRuns& runs, const TileSamples<T>& tile,
                                             const TileTensors<T>& tensors, const Visit& visit) {
  Prefetcher<T> prefetcher(params, runs, tile, tensors);
  const int64_t taps = params.taps(), image_size = params.in_h * params.in_w * params.in_channels;
  const int64_t image_positions = params.out_h * params.out_w;
  const int64_t groups = tile.end_deform_group - tile.first_deform_group;
  const int64_t rows = tile.end - tile.begin;
  int64_t n = tile.begin / image_positions;
  int64_t rows_begin = 0;
  while (rows_begin < rows) {  // image by image
    const int64_t image_end = (n + 1) * image_positions - tile.begin;
    const int64_t rows_end = image_end < rows ? image_end : rows;
    for (const ChannelRun* next = runs.begin; next < runs.end; ++next) {
      const ChannelRun run = *next;
      const int64_t image = n * image_size + run.channel;
      for (int64_t row = rows_begin; row < rows_end; ++row) {
        if (next == runs.begin) prefetcher.Next();
        visit(run, row, n, image,
              static_cast<uint64_t>((row * groups + run.deform_group - tile.first_deform_group) *
                                    taps));
      }
    }
    rows_begin = rows_end;
    ++n;
  }
}

// A tile's index-th sample: the lane of a block.
template <typename T>
struct TileSample {
  uint64_t index;
  const SampleBlock<T>& block;
  uint64_t lane;

  DEFORM_CONV_INLINE TileSample(const SampleBlock<T>* blocks, uint64_t index)
      : index(index),
        block(blocks[index / SampleBlock<T>::kSize]),
        lane(index % SampleBlock<T>::kSize) {}
};

// Calls visit(tap, sample, top_left) for the samples of a position's taps: `top_left` is where the
// sample's top left corner is, from `image` on, in elements.
template <typename T, typename Visit>
DEFORM_CONV_INLINE void ForEachTap(const SampleBlock<T>* blocks, uint64_t first_sample,
                                   int64_t taps, int64_t image, int64_t channels,
                                   const Visit& visit) {
  for (int64_t tap = 0; tap < taps; ++tap) {
    const TileSample<T> sample(blocks, first_sample + tap);
    visit(tap, sample, image + sample.block.pixel[sample.lane] * channels);
  }
}

// Calls visit(run, row, tap, sample, n, top_left) for all that a tile reads.
template <typename T, typename Visit>
DEFORM_CONV_INLINE void ForEachRead(const DeformConvParams& params, const ChannelRuns& runs,
                                    const TileSamples<T>& tile, const TileTensors<T>& tensors,
                                    const Visit& visit) {
  const SampleBlock<T>* const blocks = tile.blocks;
  const int64_t taps = params.taps(), channels = params.in_channels;
  ForEachRunAtPosition(
      params, runs, tile, tensors,
      [=](const ChannelRun& run, int64_t row, int64_t n, int64_t image, uint64_t first_sample)
          DEFORM_CONV_INLINE_LAMBDA {
            ForEachTap(blocks, first_sample, taps, image, channels,
                       [&](int64_t tap, const TileSample<T>& sample, int64_t at)
                           DEFORM_CONV_INLINE_LAMBDA { visit(run, row, tap, sample, n, at); });
          });
}

// Pointers to each corner of a sample, `outside` for those that lie outside the image.
template <typename Element>
struct Corners {
  Element* at[kCorners];

  DEFORM_CONV_INLINE Corners(Element* top_left, Element* bottom_left, int64_t right,
                             int32_t corner_bits, Element* outside)
      : at{top_left, top_left + right, bottom_left, bottom_left + right} {
    if (__builtin_expect(corner_bits == kAllCorners, 1)) return;
    for (int corner = 0; corner < kCorners; ++corner) {
      at[corner] = corner_bits >> corner & 1 ? at[corner] : outside;
    }
  }
};

template <int count>
using Channels = std::integral_constant<int, count>;

// Calls run(channels), some Channels<...>: the number of channels that every run
// has, for the compiler to know it, if images or the deformable groups of usual layers have so
// many, and otherwise 0: also where they are spread.
template <typename T, typename Run>
DEFORM_CONV_INLINE void WithChannels(const ChannelRuns& runs, const Run& run) {
  int64_t count = kKnownSizes<T> ? runs.begin->count : 0;
  for (const ChannelRun* other = runs.begin; other < runs.end; ++other) {
    if (other->count != count || other->spread != 1) count = 0;
  }
  const auto run_if_any = [&](auto... channels) {
    return ((count == channels && (run(channels), true)) || ...);
  };
  bool known = false;
  if constexpr (kKnownSizes<T>) {
    known = run_if_any(Channels<1>(), Channels<3>(), Channels<4>(), Channels<8>(), Channels<16>(),
                       Channels<32>(), Channels<64>(), Channels<128>());
  }
  if (!known) run(Channels<0>());
}

// With `channels` > 0, every run has that many.
template <int channels, bool has_mask, typename T>
void Im2ColFor(const DeformConvParams& params, const ChannelRuns& runs,
               const TileSamples<T>& tile_samples, const SampledTensors<T>& tensors, const T* zeros,
               const Matrix<T>& columns_matrix) {
  // Copies: nothing that is written through a pointer can change them.
  const TileSamples<T> tile = tile_samples;
  const Matrix<T> columns = columns_matrix;
  const T* const input = tensors.input;
  const int64_t right = params.in_channels, down = params.in_w * params.in_channels;
  ForEachRead(params, runs, tile, {tensors, {}},
              [=](const ChannelRun& run, int64_t row, int64_t tap, const TileSample<T>& from_tile,
                  int64_t /*n*/, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                const SampleBlock<T>& block = from_tile.block;
                const uint64_t lane = from_tile.lane;
                T* to = columns.data + row * columns.stride + run.column + tap * run.tap_stride;
                const int32_t corner_bits = block.corner_bits[lane];
                const T top_left = block.weights[kTopLeft][lane];
                const T top_right = block.weights[kTopRight][lane];
                const T bottom_left = block.weights[kBottomLeft][lane];
                const T bottom_right = block.weights[kBottomRight][lane];
                const T mask = block.mask[lane];
                const Corners<const T> from(input + at, input + at + down, right, corner_bits,
                                            zeros);
                const int64_t count = channels > 0 ? channels : run.count;
                const int64_t spread = channels > 0 ? 1 : run.spread;
                ForEachVector<T>(count, [=](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                  constexpr int n = lanes();
                  const Vector<T, n> sample = top_left * Load<n>(from.at[kTopLeft] + i) +
                                              top_right * Load<n>(from.at[kTopRight] + i) +
                                              bottom_left * Load<n>(from.at[kBottomLeft] + i) +
                                              bottom_right * Load<n>(from.at[kBottomRight] + i);
                  Store<n>(to + i * spread, has_mask ? mask * sample : sample);
                });
              });
}

template <typename T>
void Im2Col(const DeformConvParams& params, const ChannelRuns& runs, const TileSamples<T>& tile,
            const SampledTensors<T>& tensors, const T* zeros, const Matrix<T>& columns) {
  const auto run = [&](auto channels) {
    const auto im2col =
        tensors.mask == nullptr ? Im2ColFor<channels(), false, T> : Im2ColFor<channels(), true, T>;
    im2col(params, runs, tile, tensors, zeros, columns);
  };
  WithChannels<T>(runs, run);
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_IM2COL_H_
