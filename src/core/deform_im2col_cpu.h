// im2col and col2im on one CPU thread, vectorised over channels. The contracts are in
// cpu_kernels.h. Included only by cpu_kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_DEFORM_IM2COL_CPU_H_
#define DEFORM_CONV_CORE_DEFORM_IM2COL_CPU_H_

#include "core/cpu_kernels.h"
#include "core/vector_cpu.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// Lambdas that are handed to an inlined function must be inlined too, or their captures would go
// through memory.
#define DEFORM_CONV_INLINE_LAMBDA __attribute__((always_inline))

// Whether LocateSample() may compute in int32_t.
DEFORM_CONV_INLINE bool FitsInt32(const DeformConvParams& params) {
  const int64_t h_end = params.out_h * params.stride_h + params.kernel_h * params.dilation_h;
  const int64_t w_end = params.out_w * params.stride_w + params.kernel_w * params.dilation_w;
  return params.in_h < kInt32Limit && params.in_w < kInt32Limit && params.pad_top < kInt32Limit &&
         params.pad_left < kInt32Limit && h_end < kInt32Limit && w_end < kInt32Limit;
}

// Writes the positions of the tile's samples without offsets.
template <typename T>
void WriteBases(const DeformConvParams& params, const TileSamples<T>& tile) {
  const int64_t y_n = tile.begin / params.out_w;
  int64_t x = tile.begin - y_n * params.out_w;
  int64_t y = y_n % params.out_h;
  const int64_t first_y = y, first_x = x;
  const int64_t count = (tile.end_group - tile.first_group) * params.taps();
  int32_t *h = tile.h_bases, *w = tile.w_bases;
  for (int64_t g = tile.first_group; g < tile.end_group; ++g) {
    for (int64_t ky = 0; ky < params.kernel_h; ++ky) {
      for (int64_t kx = 0; kx < params.kernel_w; ++kx) {
        *h++ = static_cast<int32_t>(y * params.stride_h - params.pad_top + ky * params.dilation_h);
        *w++ = static_cast<int32_t>(x * params.stride_w - params.pad_left + kx * params.dilation_w);
      }
    }
  }
  // The other positions are the first one, moved.
  for (int64_t position = tile.begin + 1; position < tile.end; ++position, h += count, w += count) {
    if (++x == params.out_w) {
      x = 0;
      if (++y == params.out_h) y = 0;
    }
    const int32_t down = static_cast<int32_t>((y - first_y) * params.stride_h);
    const int32_t right = static_cast<int32_t>((x - first_x) * params.stride_w);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      h[i] = tile.h_bases[i] + down;
      w[i] = tile.w_bases[i] + right;
    }
  }
}

// Samples [lane, lane + count) of a block.
template <typename Int, bool has_mask, typename T>
DEFORM_CONV_INLINE void LocateInBlock(const int32_t* h_bases, const int32_t* w_bases,
                                      const T* offset, const T* mask, Int in_h, Int in_w,
                                      int64_t lane, int64_t count, SampleBlock<T>& block) {
  T *top_left = block.weights[kTopLeft] + lane, *top_right = block.weights[kTopRight] + lane;
  T* bottom_left = block.weights[kBottomLeft] + lane;
  T* bottom_right = block.weights[kBottomRight] + lane;
  T *h_fraction = block.h_fraction + lane, *w_fraction = block.w_fraction + lane;
  int32_t* corners = block.corners + lane;
  int32_t *h_low = block.h_low + lane, *w_low = block.w_low + lane;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const ImageSample<T, Int> sample =
        LocateSample<T, Int>(h_bases[i], w_bases[i], offset[2 * i], offset[2 * i + 1], in_h, in_w);
    // What lies outside weighs nothing, whatever the mask.
    const T factor = sample.corners != 0 ? (has_mask ? mask[i] : T(1)) : T(0);
    top_left[i] = factor * sample.weights[kTopLeft];
    top_right[i] = factor * sample.weights[kTopRight];
    bottom_left[i] = factor * sample.weights[kBottomLeft];
    bottom_right[i] = factor * sample.weights[kBottomRight];
    h_fraction[i] = sample.h_fraction;
    w_fraction[i] = sample.w_fraction;
    corners[i] = sample.corners;
    h_low[i] = sample.corners != 0 ? static_cast<int32_t>(sample.h_low) : 0;
    w_low[i] = sample.corners != 0 ? static_cast<int32_t>(sample.w_low) : 0;
  }
}

// Samples [first, first + count) of the tile; offset and mask are those of the first.
template <typename Int, bool has_mask, typename T>
void LocateRange(const DeformConvParams& params, const T* offset, const T* mask, int64_t count,
                 const TileSamples<T>& tile, int64_t first) {
  constexpr int64_t kSize = SampleBlock<T>::kSize;
  const Int in_h = static_cast<Int>(params.in_h), in_w = static_cast<Int>(params.in_w);
  const int32_t *h_bases = tile.h_bases, *w_bases = tile.w_bases;
  for (int64_t end = first + count; first < end;) {
    SampleBlock<T>& block = tile.blocks[first / kSize];
    const int64_t lane = first % kSize;
    const int64_t lanes = kSize - lane < end - first ? kSize - lane : end - first;
    if (lanes == kSize) {  // of a length that the compiler knows
      LocateInBlock<Int, has_mask>(h_bases + first, w_bases + first, offset, mask, in_h, in_w, 0,
                                   kSize, block);
    } else {
      LocateInBlock<Int, has_mask>(h_bases + first, w_bases + first, offset, mask, in_h, in_w, lane,
                                   lanes, block);
    }
    first += lanes;
    offset += 2 * lanes;
    if (has_mask) mask += lanes;
  }
}

template <typename T>
void Locate(const DeformConvParams& params, const SampledTensors<T>& tensors,
            const TileSamples<T>& tile) {
  WriteBases(params, tile);
  const bool small = FitsInt32(params);
  const auto locate =
      tensors.mask == nullptr
          ? (small ? LocateRange<int32_t, false, T> : LocateRange<int64_t, false, T>)
          : (small ? LocateRange<int32_t, true, T> : LocateRange<int64_t, true, T>);
  // With all groups, the tile's samples follow each other in the tensors too.
  const int64_t groups = tile.end_group - tile.first_group;
  const bool all_groups = groups == params.deform_groups;
  const int64_t rows = all_groups ? 1 : tile.end - tile.begin;
  const int64_t count = (all_groups ? tile.end - tile.begin : 1) * groups * params.taps();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first =
        ((tile.begin + row) * params.deform_groups + tile.first_group) * params.taps();
    locate(params, tensors.offset + 2 * first,
           tensors.mask == nullptr ? nullptr : tensors.mask + first, count, tile, row * count);
  }
}

template <typename T>
DEFORM_CONV_INLINE void FillZero(T* to, int64_t count) {
  ForEachVector<T>(count, [=](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
    Store<lanes()>(to + i, Vector<T, lanes()>{});
  });
}

// Asks for the pixels that positions soon to come will be the first to sample, if their offsets are
// small: hardware prefetchers see no pattern in samples.
template <typename T>
class InputPrefetcher {
 public:
  InputPrefetcher(const DeformConvParams& params, const ChannelRuns& runs,
                  const TileSamples<T>& tile, const T* input)
      : channels_(params.in_channels),
        pixels_(params.batch * params.in_h * params.in_w),
        step_(params.stride_h * params.stride_w),
        wanted_(step_ < params.taps() ? step_ : params.taps()) {
    // The lowest pixel without offsets, and so many below it.
    constexpr int64_t kRowsAhead = 5;
    const int64_t rows = (params.kernel_h - 1) * params.dilation_h - params.pad_top + kRowsAhead;
    pixel_ = tile.begin * (params.in_h * params.in_w) / (params.out_h * params.out_w) +
             rows * params.in_w;
    if (pixel_ < 0) pixel_ = 0;
    const ChannelRun& last = runs.end[-1];
    from_ = input + runs.begin->channel;
    size_ = last.channel + last.count - runs.begin->channel;
  }

  // To be called for each position of the tile in turn.
  DEFORM_CONV_INLINE void Next() {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < wanted_ && pixel_ + i < pixels_; ++i) {
      const T* pixel = from_ + (pixel_ + i) * channels_;
      for (int64_t c = 0; c < size_; c += kLine) __builtin_prefetch(pixel + c, 0, 2);
    }
    pixel_ += step_;
  }

 private:
  const T* from_;
  int64_t channels_, pixels_, step_, wanted_, pixel_, size_;
};

// Calls visit(run, row, tap, block, lane, top_left) for all that a tile reads: `row` is the
// position's, counted from the tile's first; the sample is the block's lane; and `top_left` is
// where the run's channels at its top left corner are in the input, in elements.
template <typename T, typename Visit>
DEFORM_CONV_INLINE void ForEachRead(const DeformConvParams& params, const ChannelRuns& runs,
                                    const TileSamples<T>& tile, const T* input,
                                    const Visit& visit) {
  InputPrefetcher<T> prefetcher(params, runs, tile, input);
  constexpr uint64_t kSize = SampleBlock<T>::kSize;
  const int64_t taps = params.taps(), channels = params.in_channels, in_w = params.in_w;
  const int64_t image_positions = params.out_h * params.out_w;
  const int64_t groups = tile.end_group - tile.first_group;
  const int64_t rows = tile.end - tile.begin;
  const SampleBlock<T>* const blocks = tile.blocks;
  int64_t n = tile.begin / image_positions;
  int64_t rows_begin = 0;
  while (rows_begin < rows) {  // image by image
    const int64_t image_end = (n + 1) * image_positions - tile.begin;
    const int64_t rows_end = image_end < rows ? image_end : rows;
    for (const ChannelRun* next = runs.begin; next < runs.end; ++next) {
      const ChannelRun run = *next;
      const int64_t image = n * params.in_h * in_w * channels + run.channel;
      for (int64_t row = rows_begin; row < rows_end; ++row) {
        if (next == runs.begin) prefetcher.Next();
        uint64_t sample = (row * groups + run.deform_group - tile.first_group) * taps;
        for (int64_t tap = 0; tap < taps; ++tap, ++sample) {
          const SampleBlock<T>& block = blocks[sample / kSize];
          const uint64_t lane = sample % kSize;
          const int64_t pixel = block.h_low[lane] * in_w + block.w_low[lane];
          visit(run, row, tap, block, lane, image + pixel * channels);
        }
      }
    }
    rows_begin = rows_end;
    ++n;
  }
}

// Pointers to each corner of a sample, `outside` for those that lie outside the image.
template <typename Element>
struct Corners {
  Element* at[kCorners];

  DEFORM_CONV_INLINE Corners(Element* top_left, int64_t right, int64_t down, int32_t corners,
                             Element* outside)
      : at{top_left, top_left + right, top_left + down, top_left + down + right} {
    for (int corner = 0; corner < kCorners; ++corner) {
      at[corner] = corners >> corner & 1 ? at[corner] : outside;
    }
  }
};

// With `channels`, that many in each run; 0 if the compiler is not to know.
template <int channels, typename T>
void DeformIm2ColFor(const DeformConvParams& params, const ChannelRuns& runs,
                     const TileSamples<T>& tile_samples, const T* input, const T* zeros,
                     const Matrix<T>& columns_matrix) {
  // Copies: nothing that is written through a pointer can change them.
  const TileSamples<T> tile = tile_samples;
  const Matrix<T> columns = columns_matrix;
  const int64_t right = params.in_channels, down = params.in_w * params.in_channels;
  ForEachRead(params, runs, tile, input,
              [=](const ChannelRun& run, int64_t row, int64_t tap, const SampleBlock<T>& block,
                  uint64_t lane, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                T* to = columns.data + row * columns.stride + run.column + tap * run.tap_stride;
                const int32_t corners = block.corners[lane];
                const T top_left = block.weights[kTopLeft][lane];
                const T top_right = block.weights[kTopRight][lane];
                const T bottom_left = block.weights[kBottomLeft][lane];
                const T bottom_right = block.weights[kBottomRight][lane];
                const Corners<const T> from(input + at, right, down, corners, zeros);
                const int64_t count = channels > 0 ? channels : run.count;
                ForEachVector<T>(count, [=](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                  constexpr int n = lanes();
                  Store<n>(to + i, top_left * Load<n>(from.at[kTopLeft] + i) +
                                       top_right * Load<n>(from.at[kTopRight] + i) +
                                       bottom_left * Load<n>(from.at[kBottomLeft] + i) +
                                       bottom_right * Load<n>(from.at[kBottomRight] + i));
                });
              });
}

template <typename T>
void DeformIm2Col(const DeformConvParams& params, const ChannelRuns& runs,
                  const TileSamples<T>& tile, const T* input, const T* zeros,
                  const Matrix<T>& columns) {
  // Grey and colour images: too few channels for the general loops to pay.
  const int64_t count = runs.end - runs.begin == 1 ? runs.begin->count : 0;
  const auto im2col = count == 1   ? DeformIm2ColFor<1, T>
                      : count == 3 ? DeformIm2ColFor<3, T>
                                   : DeformIm2ColFor<0, T>;
  im2col(params, runs, tile, input, zeros, columns);
}

// Products of a column's gradient with each corner, summed over channels. The gradients by offset
// and mask are combinations of those four sums, and so of four vectors that are summed up later.
template <typename T>
struct CornerProducts {
  // Templates forget the type's own alignment, and take that of a whole vector.
  alignas(kVectorBytes) Vector<T> vectors[kCorners] = {};
  T numbers[kCorners] = {};  // what did not fill a vector

  template <int n>
  DEFORM_CONV_INLINE void Add(int corner, const Vector<T, n>& product) {
    if constexpr (n == kLanes<T>) {
      vectors[corner] += product;
    } else {
      numbers[corner] += Sum<n, T>(product);
    }
  }
};

// Adds a sample's share of the gradients by its offset and mask. `has_vectors` tells whether there
// are any in `products`; `index` numbers the samples of the batch.
template <typename T>
DEFORM_CONV_INLINE void AddPositionGradients(const CornerProducts<T>& products, bool has_vectors,
                                             T h_fraction, T w_fraction, const T* mask,
                                             int64_t index, const SampledGradients<T>& gradients) {
  constexpr int n = kLanes<T>;
  if (gradients.offset != nullptr) {
    const T factor = mask == nullptr ? T(1) : mask[index];
    T h = BilinearDerivativeH(w_fraction, products.numbers);
    T w = BilinearDerivativeW(h_fraction, products.numbers);
    if (has_vectors) {
      h += Sum<n, T>(BilinearDerivativeH(w_fraction, products.vectors));
      w += Sum<n, T>(BilinearDerivativeW(h_fraction, products.vectors));
    }
    gradients.offset[2 * index] += factor * h;
    gradients.offset[2 * index + 1] += factor * w;
  }
  if (gradients.mask != nullptr) {
    T weights[kCorners];
    BilinearWeights(h_fraction, w_fraction, weights);
    Vector<T> vector = {};
    T sum = 0;
    for (int corner = 0; corner < kCorners; ++corner) {
      vector += weights[corner] * products.vectors[corner];
      sum += weights[corner] * products.numbers[corner];
    }
    gradients.mask[index] += has_vectors ? sum + Sum<n, T>(vector) : sum;
  }
}

template <bool want_input, bool want_positions, bool replace, typename T>
void DeformCol2ImFor(const DeformConvParams& params, const ChannelRuns& runs,
                     const TileSamples<T>& tile_samples, const SampledTensors<T>& tensors,
                     const T* zeros, T* ignored, const Matrix<T>& columns_matrix,
                     const SampledGradients<T>& sampled_gradients) {
  // Copies: nothing that is written through a pointer can change them.
  const TileSamples<T> tile = tile_samples;
  const Matrix<T> columns = columns_matrix;
  const SampledGradients<T> gradients = sampled_gradients;
  const T *input = tensors.input, *mask = tensors.mask;
  const int64_t right = params.in_channels, down = params.in_w * params.in_channels;
  const int64_t taps = params.taps(), deform_groups = params.deform_groups;
  ForEachRead(params, runs, tile, input,
              [=](const ChannelRun& run, int64_t row, int64_t tap, const SampleBlock<T>& block,
                  uint64_t lane, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                T* column = columns.data + row * columns.stride + run.column + tap * run.tap_stride;
                const int32_t corners = block.corners[lane];
                if (corners == 0) {
                  if (replace) FillZero(column, run.count);
                  return;
                }
                T weights[kCorners];
                for (int corner = 0; corner < kCorners; ++corner) {
                  weights[corner] = block.weights[corner][lane];
                }
                const Corners<const T> from(input + at, right, down, corners, zeros);
                // Corners are different pixels, or the one whose content is ignored.
                const Corners<T> to(want_input ? gradients.input + at : ignored, right, down,
                                    corners, ignored);
                CornerProducts<T> products;
                ForEachVector<T>(run.count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                  constexpr int n = lanes();
                  const Vector<T, n> grad = Load<n>(column + i);
                  Vector<T, n> sum = {};
#pragma GCC unroll 4
                  for (int corner = 0; corner < kCorners; ++corner) {
                    if (want_positions || replace) {
                      const Vector<T, n> pixel = Load<n>(from.at[corner] + i);
                      if (want_positions) products.template Add<n>(corner, grad * pixel);
                      if (replace) sum += weights[corner] * pixel;
                    }
                    if (want_input) {
                      T* pixel = to.at[corner] + i;
                      Store<n>(pixel, Load<n>(pixel) + weights[corner] * grad);
                    }
                  }
                  if (replace) Store<n>(column + i, sum);
                });
                if (!want_positions) return;
                const int64_t position = tile.begin + row;
                AddPositionGradients(products, run.count >= kLanes<T>, block.h_fraction[lane],
                                     block.w_fraction[lane], mask,
                                     (position * deform_groups + run.deform_group) * taps + tap,
                                     gradients);
              });
}

template <typename T>
void DeformCol2Im(const DeformConvParams& params, const ChannelRuns& runs,
                  const TileSamples<T>& tile, const SampledTensors<T>& tensors, const T* zeros,
                  T* ignored, bool replace, const Matrix<T>& columns,
                  const SampledGradients<T>& gradients) {
  const bool positions = gradients.offset != nullptr || gradients.mask != nullptr;
  const auto run = [&](auto want_input, auto want_positions, auto want_columns) {
    DeformCol2ImFor<want_input(), want_positions(), want_columns()>(
        params, runs, tile, tensors, zeros, ignored, columns, gradients);
  };
  const auto run_with = [&](auto want_input, auto want_positions) {
    replace ? run(want_input, want_positions, std::true_type())
            : run(want_input, want_positions, std::false_type());
  };
  if (gradients.input == nullptr) {
    run_with(std::false_type(), std::true_type());
  } else if (positions) {
    run_with(std::true_type(), std::true_type());
  } else {
    run_with(std::true_type(), std::false_type());
  }
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_DEFORM_IM2COL_CPU_H_
