// Depthwise layers on one CPU thread, vectorised over channels: what is sampled is multiplied at once,
// and no columns exist. The contracts are in cpu/kernels.h. Included only by kernels_isa.cc, which is
// compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_DEPTHWISE_H_
#define DEFORM_CONV_CORE_CPU_ISA_DEPTHWISE_H_

#include <type_traits>

#include "core/cpu/isa/col2im.h"
#include "core/cpu/isa/im2col.h"
#include "core/cpu/isa/vector.h"
#include "core/cpu/kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// The most sums that forward keeps in registers.
constexpr int kBlockVectors = 8;

// Calls body(i, lanes, vectors), the last two a std::integral_constant<int, ...>, so that the ranges
// [i, i + lanes * vectors) cover [0, count): as many full vectors at a time as may be, and then
// narrower ones.
template <typename T, int n = kLanes<T>, int vectors = kBlockVectors, typename Body>
DEFORM_CONV_INLINE void ForEachBlock(int64_t count, const Body& body, int64_t i = 0) {
  constexpr int kSize = n * vectors;
  for (; i + kSize <= count; i += kSize) {
    body(i, std::integral_constant<int, n>(), std::integral_constant<int, vectors>());
  }
  if (i == count) return;
  if constexpr (vectors > 1) {
    ForEachBlock<T, n, vectors - 1>(count, body, i);
  } else if constexpr (n > 1) {
    ForEachBlock<T, n / 2, 1>(count, body, i);
  }
}

// Calls visit(v) for v in [0, vectors).
template <int vectors, typename Visit>
DEFORM_CONV_INLINE void Unrolled(const Visit& visit) {
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) visit(v);
}

// Samples that a position's taps read, for vectors over some channels.
template <typename T>
struct PositionSamples {
  const SampleBlock<T>* blocks;
  uint64_t first;
  const T* input;
  const T* zeros;
  int64_t image, taps, in_w, channels;

  // Calls visit(tap, v, sample) with the masked sample of channels [i + v * n, i + (v + 1) * n), for
  // each v in [0, vectors).
  template <int n, int vectors, bool has_mask, typename Visit>
  DEFORM_CONV_INLINE void ForEach(int64_t i, const Visit& visit) const {
    const T* const first_channel = input + i;
    const T* const outside = zeros;
    const int64_t right = channels, down = in_w * channels;
    ForEachTap(blocks, first, taps, image, in_w, channels,
               [&](int64_t tap, const SampleBlock<T>& block, uint64_t lane,
                   int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                 const T top_left = block.weights[kTopLeft][lane];
                 const T top_right = block.weights[kTopRight][lane];
                 const T bottom_left = block.weights[kBottomLeft][lane];
                 const T bottom_right = block.weights[kBottomRight][lane];
                 const T mask = block.mask[lane];
                 const Corners<const T> from(first_channel + at, right, down,
                                             block.corner_bits[lane], outside);
                 Unrolled<vectors>([&](int v) DEFORM_CONV_INLINE_LAMBDA {
                   const Vector<T, n> sample =
                       top_left * Load<n>(from.at[kTopLeft] + v * n) +
                       top_right * Load<n>(from.at[kTopRight] + v * n) +
                       bottom_left * Load<n>(from.at[kBottomLeft] + v * n) +
                       bottom_right * Load<n>(from.at[kBottomRight] + v * n);
                   visit(tap, v, has_mask ? mask * sample : sample);
                 });
               });
  }
};

// One output channel for each input channel: sums in registers.
template <int n, int vectors, bool has_mask, typename T>
DEFORM_CONV_INLINE void DepthwiseBlock(const PositionSamples<T>& samples, int64_t i,
                                       const T* filters, int64_t tap_stride, T* output) {
  alignas(kVectorBytes) Vector<T, n> sums[vectors] = {};
  samples.template ForEach<n, vectors, has_mask>(
      i, [&](int64_t tap, int v, const Vector<T, n>& sample) DEFORM_CONV_INLINE_LAMBDA {
        sums[v] += sample * Load<n>(filters + tap * tap_stride + v * n);
      });
  Unrolled<vectors>(
      [&](int v) DEFORM_CONV_INLINE_LAMBDA { Store<n>(output + v * n, sums[v]); });
}

// Several: sums in `sums` [multiplier, run.count].
template <bool has_mask, typename T>
DEFORM_CONV_INLINE void DepthwiseMultiplied(const PositionSamples<T>& samples, int64_t count,
                                            const DepthwiseFilters<const T>& filters,
                                            int64_t channel, T* sums, T* output) {
  const int64_t multiplier = filters.multiplier;
  for (int64_t j = 0; j < multiplier * count; ++j) sums[j] = 0;
  ForEachBlock<T>(count, [&](int64_t i, auto lanes, auto vectors) DEFORM_CONV_INLINE_LAMBDA {
    constexpr int n = lanes();
    samples.template ForEach<n, vectors(), has_mask>(
        i, [&](int64_t tap, int v, const Vector<T, n>& sample) DEFORM_CONV_INLINE_LAMBDA {
          T* sum = sums + i + v * n;
          const T* filter = filters.At(tap, channel) + i + v * n;
          for (int64_t m = 0; m < multiplier; ++m, sum += count, filter += filters.channels) {
            Store<n>(sum, Load<n>(sum) + sample * Load<n>(filter));
          }
        });
  });
  for (int64_t m = 0; m < multiplier; ++m) {
    for (int64_t c = 0; c < count; ++c) output[c * multiplier + m] = sums[m * count + c];
  }
}

template <bool has_mask, bool multiplied, typename T>
void DepthwiseForwardFor(const DeformConvParams& params, const ChannelRuns& runs,
                         const TileSamples<T>& tile_samples, const SampledTensors<T>& tensors,
                         const T* zeros, const DepthwiseFilters<const T>& slice_filters, T* sums,
                         T* output) {
  // Copies: nothing that is written through a pointer can change them.
  const TileSamples<T> tile = tile_samples;
  const DepthwiseFilters<const T> filters = slice_filters;
  const T* const input = tensors.input;
  const int64_t taps = params.taps(), in_w = params.in_w, channels = params.in_channels;
  const int64_t out_channels = params.out_channels;
  ForEachRunAtPosition(
      params, runs, tile, input,
      [=](const ChannelRun& run, int64_t row, int64_t /*n*/, int64_t image, uint64_t first_sample)
          DEFORM_CONV_INLINE_LAMBDA {
            const PositionSamples<T> samples = {tile.blocks, first_sample, input, zeros,
                                                image,       taps,         in_w,  channels};
            T* to = output + (tile.begin + row) * out_channels + run.channel * filters.multiplier;
            if constexpr (multiplied) {
              DepthwiseMultiplied<has_mask>(samples, run.count, filters, run.column, sums, to);
            } else {
              ForEachBlock<T>(
                  run.count, [&](int64_t i, auto lanes, auto vectors) DEFORM_CONV_INLINE_LAMBDA {
                    DepthwiseBlock<lanes(), vectors(), has_mask>(
                        samples, i, filters.data + run.column + i, filters.channels, to + i);
                  });
            }
          });
}

template <typename T>
void DepthwiseForward(const DeformConvParams& params, const ChannelRuns& runs,
                      const TileSamples<T>& tile, const SampledTensors<T>& tensors, const T* zeros,
                      const DepthwiseFilters<const T>& filters, T* row, T* output) {
  const auto run = [&](auto has_mask) {
    const auto forward = filters.multiplier == 1 ? DepthwiseForwardFor<has_mask(), false, T>
                                                 : DepthwiseForwardFor<has_mask(), true, T>;
    forward(params, runs, tile, tensors, zeros, filters, row, output);
  };
  tensors.mask == nullptr ? run(std::false_type()) : run(std::true_type());
}

template <bool want_input, bool want_offset_or_mask, bool want_filters, bool multiplied, typename T>
void DepthwiseBackwardFor(const DeformConvParams& params, const ChannelRuns& runs,
                          const TileSamples<T>& tile_samples, const SampleBackprop<T>& backprop,
                          const DepthwiseFilters<const T>& slice_filters, const T* grad_output,
                          T* grad_row, const DepthwiseFilters<T>& slice_grad_filters) {
  const TileSamples<T> tile = tile_samples;
  const SampleBackprop<T> copy = backprop;
  const DepthwiseFilters<const T> filters = slice_filters;
  const DepthwiseFilters<T> grad_filters = slice_grad_filters;
  const int64_t taps = params.taps(), in_w = params.in_w, channels = params.in_channels;
  const int64_t out_channels = params.out_channels;
  ForEachRunAtPosition(
      params, runs, tile, backprop.input,
      [=](const ChannelRun& run, int64_t row, int64_t n, int64_t image, uint64_t first_sample)
          DEFORM_CONV_INLINE_LAMBDA {
            const int64_t multiplier = multiplied ? filters.multiplier : 1;
            const int64_t count = run.count;
            const T* grads = grad_output + (tile.begin + row) * out_channels +
                             run.channel * multiplier;
            if (multiplied) {
              for (int64_t m = 0; m < multiplier; ++m) {
                for (int64_t c = 0; c < count; ++c) {
                  grad_row[m * count + c] = grads[c * multiplier + m];
                }
              }
              grads = grad_row;
            }
            ForEachTap(
                tile.blocks, first_sample, taps, image, in_w, channels,
                [&](int64_t tap, const SampleBlock<T>& block, uint64_t lane,
                    int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                  const T* filter = filters.At(tap, run.column);
                  T* grad_filter =
                      want_filters ? grad_filters.At(tap, run.column) : nullptr;
                  BackpropSample<want_input, want_offset_or_mask, want_filters>(
                      copy, run, row, tap, block, lane, n, at,
                      [=](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                        constexpr int n = lanes();
                        Vector<T, n> grad = Load<n>(grads + i) * Load<n>(filter + i);
                        for (int64_t m = 1; m < multiplier; ++m) {
                          grad += Load<n>(grads + m * count + i) *
                                  Load<n>(filter + m * filters.channels + i);
                        }
                        return grad;
                      },
                      [=](int64_t i, auto lanes, const auto& sample)
                          DEFORM_CONV_INLINE_LAMBDA {
                            constexpr int n = lanes();
                            for (int64_t m = 0; m < multiplier; ++m) {
                              T* to = grad_filter + m * grad_filters.channels + i;
                              Store<n>(to, Load<n>(to) + Load<n>(grads + m * count + i) * sample);
                            }
                          });
                });
          });
}

template <typename T>
void DepthwiseBackward(const DeformConvParams& params, const ChannelRuns& runs,
                       const TileSamples<T>& tile, const SampledTensors<T>& tensors, const T* zeros,
                       T* ignored, const DepthwiseFilters<const T>& filters, const T* grad_output,
                       T* row, const SampledGradients<T>& gradients,
                       const DepthwiseFilters<T>& grad_filters) {
  const SampleBackprop<T> backprop(params, tile, tensors, zeros, ignored, gradients);
  WithWanted(gradients, grad_filters.data != nullptr,
             [&](auto want_input, auto want_offset_or_mask, auto want_filters) {
               const auto backward =
                   filters.multiplier == 1
                       ? DepthwiseBackwardFor<want_input(), want_offset_or_mask(), want_filters(),
                                              false, T>
                       : DepthwiseBackwardFor<want_input(), want_offset_or_mask(), want_filters(),
                                              true, T>;
               backward(params, runs, tile, backprop, filters, grad_output, row, grad_filters);
             });
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_DEPTHWISE_H_
