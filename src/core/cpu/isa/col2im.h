// col2im on one CPU thread, vectorised over channels. The contract is in cpu/kernels.h. Included
// only by kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_COL2IM_H_
#define DEFORM_CONV_CORE_CPU_ISA_COL2IM_H_

#include <type_traits>

#include "core/cpu/isa/im2col.h"
#include "core/cpu/isa/vector.h"
#include "core/cpu/kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// Products of a sample's gradient with each corner, summed over channels. The gradients of offset
// and mask are combinations of those four sums, and so of four vectors that are summed up later.
template <typename T>
struct CornerProducts {
  // A template argument loses the type's own alignment.
  alignas(kVectorBytes) Vector<T> vectors[kCorners] = {};
  T numbers[kCorners] = {};  // what did not fill a vector

  // Corners outside the image have no part in a sample, but 0 times an infinite gradient is NaN.
  DEFORM_CONV_INLINE void DropUncounted(int32_t corner_bits) {
    for (int corner = 0; corner < kCorners; ++corner) {
      if (corner_bits >> corner & 1) continue;
      vectors[corner] = Vector<T>{};
      numbers[corner] = 0;
    }
  }

  template <int n>
  DEFORM_CONV_INLINE void Add(int corner, const Vector<T, n>& product) {
    if constexpr (n == kLanes<T>) {
      vectors[corner] += product;
    } else {
      numbers[corner] += Sum<n, T>(product);
    }
  }
};

// Adds what a sample brings to the gradients of its offset and mask. `has_vectors` tells whether
// there are any in `products`; `index` numbers the samples of the batch.
template <typename T>
DEFORM_CONV_INLINE void AddOffsetAndMaskGradients(const CornerProducts<T>& products,
                                                  bool has_vectors, T h_fraction, T w_fraction,
                                                  T mask, int64_t index,
                                                  const SampledGradients<T>& gradients) {
  constexpr int n = kLanes<T>;
  if (gradients.offset != nullptr) {
    T h = BilinearDerivativeH(w_fraction, products.numbers);
    T w = BilinearDerivativeW(h_fraction, products.numbers);
    if (has_vectors) {
      h += Sum<n, T>(BilinearDerivativeH(w_fraction, products.vectors));
      w += Sum<n, T>(BilinearDerivativeW(h_fraction, products.vectors));
    }
    gradients.offset[2 * index] += mask * h;
    gradients.offset[2 * index + 1] += mask * w;
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

// What backpropagation of a tile's samples reads and writes beside the gradient of what was
// sampled. Copies: nothing that is written through a pointer can change them.
template <typename T>
struct SampleBackprop {
  const T* input;
  const T* zeros;
  T* ignored;
  SampledGradients<T> gradients;
  PixelSums<T> pixel_sums;
  int64_t right, down;  // from a pixel to its neighbours, in elements
  int64_t begin, taps, deform_groups;

  SampleBackprop(const DeformConvParams& params, const TileSamples<T>& tile,
                 const SampledTensors<T>& tensors, const T* zeros, T* ignored,
                 const SampledGradients<T>& gradients)
      : input(tensors.input),
        zeros(zeros),
        ignored(ignored),
        gradients(gradients),
        pixel_sums(tile.pixel_sums),
        right(params.in_channels),
        down(params.in_w * params.in_channels),
        begin(tile.begin),
        taps(params.taps()),
        deform_groups(params.deform_groups) {}
};

// Backpropagates a run's channels of one sample, whose top left corner is at `at`. grad(i, lanes)
// is the gradient of `lanes` channels from the i-th on, and take_sample(i, lanes, sample), with
// `want_samples`, receives the channels themselves.
template <bool want_input, bool want_offset_or_mask, bool want_samples, typename T, typename Grad,
          typename TakeSample>
DEFORM_CONV_INLINE void BackpropSample(const SampleBackprop<T>& backprop, const ChannelRun& run,
                                       int64_t row, int64_t tap, const SampleBlock<T>& block,
                                       uint64_t lane, int64_t n, int64_t at, const Grad& grad,
                                       const TakeSample& take_sample) {
  const int32_t corner_bits = block.corner_bits[lane];
  if (corner_bits == 0) {
    if (want_samples) {
      ForEachVector<T>(run.count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
        take_sample(i, lanes, Vector<T, lanes()>{});
      });
    }
    return;
  }
  T weights[kCorners];
  for (int corner = 0; corner < kCorners; ++corner) weights[corner] = block.weights[corner][lane];
  const T mask = block.mask[lane];
  const int64_t right = backprop.right, down = backprop.down;
  const Corners<const T> from(backprop.input + at, right, down, corner_bits, backprop.zeros);
  // Corners are different pixels, or the one whose content is ignored.
  T* to_first = want_input ? backprop.gradients.input + at : backprop.ignored;
  int64_t to_down = down;
  const PixelSums<T>& pixel_sums = backprop.pixel_sums;
  if (want_input && pixel_sums.sums != nullptr) {
    const int64_t h =
        (n - pixel_sums.first_image) * pixel_sums.rows + block.h_low[lane] - pixel_sums.h;
    const int64_t w = block.w_low[lane] - pixel_sums.w;
    to_first = pixel_sums.sums + (h * pixel_sums.cols + w) * right + run.channel;
    to_down = pixel_sums.cols * right;
  }
  const Corners<T> to(to_first, right, to_down, corner_bits, backprop.ignored);
  CornerProducts<T> products;
  ForEachVector<T>(run.count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
    constexpr int n = lanes();
    const Vector<T, n> sample_grad = grad(i, lanes);
    const Vector<T, n> masked_grad = mask * sample_grad;
    Vector<T, n> sum = {};
#pragma GCC unroll 4
    for (int corner = 0; corner < kCorners; ++corner) {
      if (want_offset_or_mask || want_samples) {
        const Vector<T, n> pixel = Load<n>(from.at[corner] + i);
        if (want_offset_or_mask) products.template Add<n>(corner, sample_grad * pixel);
        if (want_samples) sum += weights[corner] * pixel;
      }
      if (want_input) {
        T* pixel = to.at[corner] + i;
        Store<n>(pixel, Load<n>(pixel) + weights[corner] * masked_grad);
      }
    }
    if (want_samples) take_sample(i, lanes, mask * sum);
  });
  if (!want_offset_or_mask) return;
  if (corner_bits != kAllCorners) products.DropUncounted(corner_bits);
  const int64_t position = backprop.begin + row;
  AddOffsetAndMaskGradients(
      products, run.count >= kLanes<T>, block.h_fraction[lane], block.w_fraction[lane], mask,
      (position * backprop.deform_groups + run.deform_group) * backprop.taps + tap,
      backprop.gradients);
}

template <bool want_input, bool want_offset_or_mask, bool replace, typename T>
void Col2ImFor(const DeformConvParams& params, const ChannelRuns& runs, const TileSamples<T>& tile,
               const SampleBackprop<T>& backprop, const Matrix<T>& columns_matrix) {
  const Matrix<T> columns = columns_matrix;
  const SampleBackprop<T> copy = backprop;
  ForEachRead(params, runs, tile, backprop.input,
              [=](const ChannelRun& run, int64_t row, int64_t tap, const SampleBlock<T>& block,
                  uint64_t lane, int64_t n, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                T* column = columns.data + row * columns.stride + run.column + tap * run.tap_stride;
                BackpropSample<want_input, want_offset_or_mask, replace>(
                    copy, run, row, tap, block, lane, n, at,
                    [=](int64_t i, auto lanes)
                        DEFORM_CONV_INLINE_LAMBDA { return Load<lanes()>(column + i); },
                    [=](int64_t i, auto lanes, const auto& sample)
                        DEFORM_CONV_INLINE_LAMBDA { Store<lanes()>(column + i, sample); });
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
    Col2ImFor<want_input(), want_offset_or_mask(), want_samples()>(params, runs, tile, backprop,
                                                                   columns);
  });
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_COL2IM_H_
