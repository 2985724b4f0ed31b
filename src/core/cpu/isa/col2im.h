// col2im on one CPU thread, vectorised over channels. The contract is in cpu/kernels.h. Included
// only by kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_COL2IM_H_
#define DEFORM_CONV_CORE_CPU_ISA_COL2IM_H_

#include <type_traits>

#include "core/cpu/isa/im2col.h"
#include "core/cpu/isa/locate.h"
#include "core/cpu/isa/vector.h"
#include "core/cpu/kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// Products of a sample's gradient with each corner, which are summed over channels in `totals`
// [kCorners]. The gradients of offset and mask are combinations of those sums.
template <typename T>
struct CornerProducts {
  // A template argument loses the type's own alignment.
  alignas(kVectorBytes) Vector<T> vectors[kCorners] = {};
  T* totals;

  template <int n>
  DEFORM_CONV_INLINE void Add(const Vector<T, n> (&products)[kCorners]) {
    if constexpr (n == kLanes<T>) {
      for (int corner = 0; corner < kCorners; ++corner) vectors[corner] += products[corner];
    } else {
      AddSums<n, T>(products, totals);
    }
  }

  // `has_vectors` tells whether any was full.
  DEFORM_CONV_INLINE void Finish(bool has_vectors) const {
    if (has_vectors) AddSums<kLanes<T>, T>(vectors, totals);
  }
};

// Adds to the gradients of offset and mask what samples [first, first + count) of a tile bring,
// whose products are complete; the first is the index-th of the batch.
template <typename T>
void AddOffsetAndMaskGradients(const TileSamples<T>& tile, int64_t first, int64_t count,
                               int64_t index, const SampledGradients<T>& gradients) {
  constexpr int64_t kSize = SampleBlock<T>::kSize;
  const int64_t end = first + count;
  while (first < end) {
    const SampleBlock<T>& block = tile.blocks[first / kSize];
    const int64_t begin_lane = first % kSize;
    const int64_t lanes = kSize - begin_lane < end - first ? kSize - begin_lane : end - first;
    const T* const of_block = tile.corner_products + (first - begin_lane) * kCorners;
    T values[kCorners][kSize];
    for (int corner = 0; corner < kCorners; ++corner) {
      for (int64_t lane = 0; lane < kSize; ++lane) {
        // Corners outside have no part in a sample, but 0 times an infinite gradient is NaN.
        const bool counts = block.corner_bits[lane] >> corner & 1;
        const T product = of_block[lane * kCorners + corner];
        values[corner][lane] = counts ? product : T(0);
      }
    }
    T h[kSize], w[kSize], sample[kSize];
#pragma omp simd
    for (int64_t lane = 0; lane < kSize; ++lane) {
      const T of_lane[kCorners] = {values[0][lane], values[1][lane], values[2][lane],
                                   values[3][lane]};
      const T mask = block.mask[lane];
      h[lane] = mask * BilinearDerivativeH(block.w_fraction[lane], of_lane);
      w[lane] = mask * BilinearDerivativeW(block.h_fraction[lane], of_lane);
      sample[lane] = block.weights[0][lane] * of_lane[0] + block.weights[1][lane] * of_lane[1] +
                     block.weights[2][lane] * of_lane[2] + block.weights[3][lane] * of_lane[3];
    }
    for (int64_t i = 0; i < lanes && gradients.offset != nullptr; ++i) {
      gradients.offset[2 * (index + i)] += h[begin_lane + i];
      gradients.offset[2 * (index + i) + 1] += w[begin_lane + i];
    }
    for (int64_t i = 0; i < lanes && gradients.mask != nullptr; ++i) {
      gradients.mask[index + i] += sample[begin_lane + i];
    }
    first += lanes;
    index += lanes;
  }
}

// The same for all samples of a tile.
template <typename T>
void AddOffsetAndMaskGradients(const DeformConvParams& params, const TileSamples<T>& tile,
                               const SampledGradients<T>& gradients) {
  if (tile.corner_products == nullptr) return;
  ForEachSampleRange(params, tile, [&](int64_t first, int64_t count, int64_t index) {
    AddOffsetAndMaskGradients(tile, first, count, index, gradients);
  });
}

// What backpropagation of a tile's samples reads and writes beside the gradient of what was
// sampled. Copies: nothing that is written through a pointer can change them.
template <typename T>
struct SampleBackprop {
  TileTensors<T> tensors;
  const T* zeros;
  T* ignored;
  T* corner_products;
  PixelSums<T> pixel_sums;
  T* const* grad_rows;
  int64_t right, down;  // from a pixel to its neighbours, in elements

  SampleBackprop(const DeformConvParams& params, const TileSamples<T>& tile,
                 const SampledTensors<T>& tensors, const T* zeros, T* ignored,
                 const SampledGradients<T>& gradients)
      : tensors{tensors, gradients},
        zeros(zeros),
        ignored(ignored),
        corner_products(tile.corner_products),
        pixel_sums(tile.pixel_sums),
        grad_rows(tile.grad_rows),
        right(params.in_channels),
        down(params.in_w * params.in_channels) {}
};

// Backpropagates a run's channels of one sample, whose top left corner is at `at`. grad(i, lanes)
// is the gradient of `lanes` channels from the i-th on, and take_sample(i, lanes, sample), with
// `want_samples`, receives the channels themselves.
template <bool want_input, bool want_offset_or_mask, bool want_samples, typename T, typename Grad,
          typename TakeSample>
DEFORM_CONV_INLINE void BackpropSample(const SampleBackprop<T>& backprop, const ChannelRun& run,
                                       int64_t count, const TileSample<T>& tile_sample, int64_t n,
                                       int64_t at, const Grad& grad,
                                       const TakeSample& take_sample) {
  const SampleBlock<T>& block = tile_sample.block;
  const uint64_t lane = tile_sample.lane;
  const int32_t corner_bits = block.corner_bits[lane];
  if (corner_bits == 0) {
    if (want_samples) {
      ForEachVector<T>(count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
        take_sample(i, lanes, Vector<T, lanes()>{});
      });
    }
    return;
  }
  T weights[kCorners];
  for (int corner = 0; corner < kCorners; ++corner) weights[corner] = block.weights[corner][lane];
  const T mask = block.mask[lane];
  const int64_t right = backprop.right, down = backprop.down;
  const T* const from_top = backprop.tensors.sampled.input + at;
  const Corners<const T> from(from_top, from_top + down, right, corner_bits, backprop.zeros);
  // Corners are different pixels, or the one whose content is ignored.
  T* to_top = want_input ? backprop.tensors.gradients.input + at : backprop.ignored;
  T* to_bottom = to_top + down;
  if (want_input && backprop.pixel_sums.sums != nullptr) {
    const PixelSums<T>& pixel_sums = backprop.pixel_sums;
    const int64_t h =
        (n - pixel_sums.first_image) * pixel_sums.rows + block.h_low[lane] - pixel_sums.h;
    const int64_t w = block.w_low[lane] - pixel_sums.w;
    to_top = pixel_sums.sums + (h * pixel_sums.cols + w) * right + run.channel;
    to_bottom = to_top + pixel_sums.cols * right;
  } else if (want_input && backprop.grad_rows != nullptr) {
    T* const* const rows = backprop.grad_rows + block.h_low[lane];
    const int64_t in_row = block.w_low[lane] * right + run.channel;
    to_top = rows[0] + in_row;
    to_bottom = rows[1] + in_row;
  }
  const Corners<T> to(to_top, to_bottom, right, corner_bits, backprop.ignored);
  CornerProducts<T> products;
  if (want_offset_or_mask) {
    products.totals = backprop.corner_products + tile_sample.index * kCorners;
  }
  ForEachVector<T>(count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
    constexpr int n = lanes();
    const Vector<T, n> sample_grad = grad(i, lanes);
    const Vector<T, n> masked_grad = mask * sample_grad;
    Vector<T, n> sum = {};
    alignas(kVectorBytes) Vector<T, n> corner_products[kCorners];
#pragma GCC unroll 4
    for (int corner = 0; corner < kCorners; ++corner) {
      if (want_offset_or_mask || want_samples) {
        const Vector<T, n> pixel = Load<n>(from.at[corner] + i);
        if (want_offset_or_mask) corner_products[corner] = sample_grad * pixel;
        if (want_samples) sum += weights[corner] * pixel;
      }
      if (want_input) {
        T* pixel = to.at[corner] + i;
        Store<n>(pixel, Load<n>(pixel) + weights[corner] * masked_grad);
      }
    }
    if (want_offset_or_mask) products.template Add<n>(corner_products);
    if (want_samples) take_sample(i, lanes, mask * sum);
  });
  if (!want_offset_or_mask) return;
  products.Finish(count >= kLanes<T>);
}

template <int channels, bool want_input, bool want_offset_or_mask, bool replace, typename T>
void Col2ImFor(const DeformConvParams& params, const ChannelRuns& runs, const TileSamples<T>& tile,
               const SampleBackprop<T>& backprop, const Matrix<T>& columns_matrix) {
  const Matrix<T> columns = columns_matrix;
  const SampleBackprop<T> copy = backprop;
  ForEachRead(params, runs, tile, backprop.tensors,
              [=](const ChannelRun& run, int64_t row, int64_t tap, const TileSample<T>& sample,
                  int64_t n, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                const int64_t spread = channels > 0 ? 1 : run.spread;
                T* column = columns.data + row * columns.stride + run.column + tap * run.tap_stride;
                BackpropSample<want_input, want_offset_or_mask, replace>(
                    copy, run, channels > 0 ? channels : run.count, sample, n, at,
                    [=](int64_t i, auto lanes)
                        DEFORM_CONV_INLINE_LAMBDA { return Load<lanes()>(column + i * spread); },
                    [=](int64_t i, auto lanes, const auto& sample)
                        DEFORM_CONV_INLINE_LAMBDA { Store<lanes()>(column + i * spread, sample); });
              });
}

// Calls run(want_input, want_offset_or_mask, want_samples), each a std::bool_constant.
template <typename T, typename Run>
DEFORM_CONV_INLINE void WithWanted(const SampledGradients<T>& gradients, bool want_samples,
                                   const Run& run) {
  const bool offset_or_mask = gradients.offset != nullptr || gradients.mask != nullptr;
  const auto run_with = [&](auto want_input, auto want_offset_or_mask) {
    want_samples ? run(want_input, want_offset_or_mask, std::true_type())
                 : run(want_input, want_offset_or_mask, std::false_type());
  };
  if (gradients.input == nullptr) {
    offset_or_mask ? run_with(std::false_type(), std::true_type())
                   : run_with(std::false_type(), std::false_type());
  } else if (offset_or_mask) {
    run_with(std::true_type(), std::true_type());
  } else {
    run_with(std::true_type(), std::false_type());
  }
}

template <typename T>
void Col2Im(const DeformConvParams& params, const ChannelRuns& runs, const TileSamples<T>& tile,
            const SampledTensors<T>& tensors, const T* zeros, T* ignored, bool replace,
            const Matrix<T>& columns, const SampledGradients<T>& gradients) {
  const SampleBackprop<T> backprop(params, tile, tensors, zeros, ignored, gradients);
  WithWanted(gradients, replace, [&](auto want_input, auto want_offset_or_mask, auto want_samples) {
    const auto run = [&](auto channels) {
      Col2ImFor<channels(), want_input(), want_offset_or_mask(), want_samples()>(params, runs, tile,
                                                                                 backprop, columns);
    };
    // Training as usual; others do without.
    if constexpr (want_input() && want_offset_or_mask() && want_samples()) {
      WithChannels<T>(runs, run);
    } else {
      run(Channels<0>());
    }
  });
  AddOffsetAndMaskGradients(params, tile, gradients);
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_COL2IM_H_
