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

template <typename T>
DEFORM_CONV_INLINE void FillZero(T* to, int64_t count) {
  ForEachVector<T>(count, [=](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
    Store<lanes()>(to + i, Vector<T, lanes()>{});
  });
}

// Products of the columns' gradient with each corner, summed over channels. The gradients of offset
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

template <bool want_input, bool want_offset_or_mask, bool replace, typename T>
void Col2ImFor(const DeformConvParams& params, const ChannelRuns& runs,
               const TileSamples<T>& tile_samples, const SampledTensors<T>& tensors, const T* zeros,
               T* ignored, const Matrix<T>& columns_matrix,
               const SampledGradients<T>& sampled_gradients) {
  // Copies: nothing that is written through a pointer can change them.
  const TileSamples<T> tile = tile_samples;
  const Matrix<T> columns = columns_matrix;
  const SampledGradients<T> gradients = sampled_gradients;
  const PixelSums<T> pixel_sums = tile_samples.pixel_sums;
  const T* input = tensors.input;
  const int64_t right = params.in_channels, down = params.in_w * params.in_channels;
  const int64_t taps = params.taps(), deform_groups = params.deform_groups;
  ForEachRead(params, runs, tile, input,
              [=](const ChannelRun& run, int64_t row, int64_t tap, const SampleBlock<T>& block,
                  uint64_t lane, int64_t n, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                T* column = columns.data + row * columns.stride + run.column + tap * run.tap_stride;
                const int32_t corner_bits = block.corner_bits[lane];
                if (corner_bits == 0) {
                  if (replace) FillZero(column, run.count);
                  return;
                }
                T weights[kCorners];
                for (int corner = 0; corner < kCorners; ++corner) {
                  weights[corner] = block.weights[corner][lane];
                }
                const T mask = block.mask[lane];
                const Corners<const T> from(input + at, right, down, corner_bits, zeros);
                // Corners are different pixels, or the one whose content is ignored.
                T* to_first = want_input ? gradients.input + at : ignored;
                int64_t to_down = down;
                if (want_input && pixel_sums.sums != nullptr) {
                  const int64_t h = (n - pixel_sums.first_image) * pixel_sums.rows +
                                    block.h_low[lane] - pixel_sums.h;
                  const int64_t w = block.w_low[lane] - pixel_sums.w;
                  to_first = pixel_sums.sums + (h * pixel_sums.cols + w) * right + run.channel;
                  to_down = pixel_sums.cols * right;
                }
                const Corners<T> to(to_first, right, to_down, corner_bits, ignored);
                CornerProducts<T> products;
                ForEachVector<T>(run.count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                  constexpr int n = lanes();
                  const Vector<T, n> grad = Load<n>(column + i);
                  const Vector<T, n> masked_grad = mask * grad;
                  Vector<T, n> sum = {};
#pragma GCC unroll 4
                  for (int corner = 0; corner < kCorners; ++corner) {
                    if (want_offset_or_mask || replace) {
                      const Vector<T, n> pixel = Load<n>(from.at[corner] + i);
                      if (want_offset_or_mask) products.template Add<n>(corner, grad * pixel);
                      if (replace) sum += weights[corner] * pixel;
                    }
                    if (want_input) {
                      T* pixel = to.at[corner] + i;
                      Store<n>(pixel, Load<n>(pixel) + weights[corner] * masked_grad);
                    }
                  }
                  if (replace) Store<n>(column + i, mask * sum);
                });
                if (!want_offset_or_mask) return;
                if (corner_bits != kAllCorners) products.DropUncounted(corner_bits);
                const int64_t position = tile.begin + row;
                AddOffsetAndMaskGradients(
                    products, run.count >= kLanes<T>, block.h_fraction[lane],
                    block.w_fraction[lane], mask,
                    (position * deform_groups + run.deform_group) * taps + tap, gradients);
              });
}

template <typename T>
void Col2Im(const DeformConvParams& params, const ChannelRuns& runs, const TileSamples<T>& tile,
            const SampledTensors<T>& tensors, const T* zeros, T* ignored, bool replace,
            const Matrix<T>& columns, const SampledGradients<T>& gradients) {
  const bool offset_or_mask = gradients.offset != nullptr || gradients.mask != nullptr;
  const auto run = [&](auto want_input, auto want_offset_or_mask, auto want_columns) {
    Col2ImFor<want_input(), want_offset_or_mask(), want_columns()>(
        params, runs, tile, tensors, zeros, ignored, columns, gradients);
  };
  const auto run_with = [&](auto want_input, auto want_offset_or_mask) {
    replace ? run(want_input, want_offset_or_mask, std::true_type())
            : run(want_input, want_offset_or_mask, std::false_type());
  };
  if (gradients.input == nullptr) {
    run_with(std::false_type(), std::true_type());
  } else if (offset_or_mask) {
    run_with(std::true_type(), std::true_type());
  } else {
    run_with(std::true_type(), std::false_type());
  }
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_COL2IM_H_
