// Narrow groups on one CPU thread, vectorised over input channels: what is sampled is multiplied at
// once, and no columns exist. The contracts are in cpu/kernels.h. Included only by kernels_isa.cc,
// which is compiled once per instruction set.
//
// With the filters as DirectFilters has them, each input channel has a sum of its own for each
// output channel of its group, and only at last are those of a group's channels added up, once for
// all taps. Backward goes the same way in reverse: the output's gradient is spread over the group's
// channels, once for all taps. Without filters, nothing stands between sample and sum.

#ifndef DEFORM_CONV_CORE_CPU_ISA_DIRECT_H_
#define DEFORM_CONV_CORE_CPU_ISA_DIRECT_H_

#include <type_traits>

#include "core/cpu/isa/col2im.h"
#include "core/cpu/isa/im2col.h"
#include "core/cpu/isa/vector.h"
#include "core/cpu/kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// The most sums that forward keeps in registers.
constexpr int kBlockVectors = 8;

// Calls body(i, lanes, vectors), the last two a std::integral_constant<int, ...>, so that the
// ranges [i, i + lanes * vectors) cover [0, count): as many full vectors at a time as may be, and
// then narrower ones.
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

  // Calls visit(tap, v, sample) with the masked sample of channels [i + v * n, i + (v + 1) * n),
  // for each v in [0, vectors).
  template <int n, int vectors, bool has_mask, typename Visit>
  DEFORM_CONV_INLINE void ForEach(int64_t i, const Visit& visit) const {
    const T* const first_channel = input + i;
    const T* const outside = zeros;
    const int64_t right = channels, down = in_w * channels;
    ForEachTap(blocks, first, taps, image, channels,
               [&](int64_t tap, const TileSample<T>& sample, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
                 const SampleBlock<T>& block = sample.block;
                 const uint64_t lane = sample.lane;
                 const T top_left = block.weights[kTopLeft][lane];
                 const T top_right = block.weights[kTopRight][lane];
                 const T bottom_left = block.weights[kBottomLeft][lane];
                 const T bottom_right = block.weights[kBottomRight][lane];
                 const T mask = block.mask[lane];
                 const Corners<const T> from(first_channel + at, first_channel + at + down, right,
                                             block.corner_bits[lane], outside);
                 Unrolled<vectors>([&](int v) DEFORM_CONV_INLINE_LAMBDA {
                   const Vector<T, n> sum = top_left * Load<n>(from.at[kTopLeft] + v * n) +
                                            top_right * Load<n>(from.at[kTopRight] + v * n) +
                                            bottom_left * Load<n>(from.at[kBottomLeft] + v * n) +
                                            bottom_right * Load<n>(from.at[kBottomRight] + v * n);
                   visit(tap, v, has_mask ? mask * sum : sum);
                 });
               });
  }
};

// The sizes of a group: known to the compiler, or else 0 and only in the filters, if there are any.
template <int in, int out, bool has_filters = true>
struct GroupSizes {
  static constexpr int kIn = in, kOut = out;
  static constexpr bool kHasFilters = has_filters;

  template <typename Filters>
  static DEFORM_CONV_INLINE int64_t In(const Filters& filters) {
    return in > 0 ? in : filters.group_in;
  }
  template <typename Filters>
  static DEFORM_CONV_INLINE int64_t Out(const Filters& filters) {
    return out > 0 ? out : filters.group_out;
  }
};

using WithoutFilters = GroupSizes<1, 1, false>;

// Calls run(GroupSizes) for those of a layer that forward is compiled for. Backward has the first
// two and the last: it gains little by others.
template <typename T, typename Run>
DEFORM_CONV_INLINE void WithGroupSizes(const DirectFilters<const T>& filters, const Run& run) {
  if (filters.data == nullptr) return run(WithoutFilters());
  const int64_t size = filters.group_in == filters.group_out ? filters.group_in : 0;
  if (size == 1) return run(GroupSizes<1, 1>());
  if constexpr (kKnownSizes<T>) {
    if (size == 2) return run(GroupSizes<2, 2>());
    if (size == 4) return run(GroupSizes<4, 4>());
    if (size == 8) return run(GroupSizes<8, 8>());
  }
  run(GroupSizes<0, 0>());
}

// Sums over the taps for `lanes * vectors` input channels and each output channel of their groups,
// in registers. They are written `sums_stride` apart.
template <int n, int vectors, typename Sizes, bool has_mask, typename T>
DEFORM_CONV_INLINE void SumInRegisters(const PositionSamples<T>& samples, int64_t i,
                                       const DirectFilters<const T>& filters, const T* filter,
                                       T* to, int64_t sums_stride) {
  constexpr int group_out = Sizes::kOut;
  alignas(kVectorBytes) Vector<T, n> sums[vectors][group_out] = {};
  const int64_t out_stride = filters.channels, tap_stride = group_out * filters.channels;
  samples.template ForEach<n, vectors, has_mask>(
      i, [&](int64_t tap, int v, const Vector<T, n>& sample) DEFORM_CONV_INLINE_LAMBDA {
        if constexpr (!Sizes::kHasFilters) {
          sums[v][0] += sample;
          return;
        }
        const T* from = filter + tap * tap_stride + v * n;
        Unrolled<group_out>([&](int k) DEFORM_CONV_INLINE_LAMBDA {
          sums[v][k] += sample * Load<n>(from + k * out_stride);
        });
      });
  Unrolled<vectors>([&](int v) DEFORM_CONV_INLINE_LAMBDA {
    Unrolled<group_out>([&](int k) DEFORM_CONV_INLINE_LAMBDA {
      Store<n>(to + k * sums_stride + v * n, sums[v][k]);
    });
  });
}

// The same in memory, for `lanes` input channels and any number of output channels.
template <int n, bool has_mask, typename T>
DEFORM_CONV_INLINE void SumInMemory(const PositionSamples<T>& samples, int64_t i,
                                    const DirectFilters<const T>& filters, const T* filter, T* to,
                                    int64_t sums_stride) {
  const int64_t group_out = filters.group_out, out_stride = filters.channels;
  for (int64_t k = 0; k < group_out; ++k) Store<n>(to + k * sums_stride, Vector<T, n>{});
  samples.template ForEach<n, 1, has_mask>(
      i, [&](int64_t tap, int /*v*/, const Vector<T, n>& sample) DEFORM_CONV_INLINE_LAMBDA {
        const T* from = filter + tap * group_out * out_stride;
        T* sum = to;
        for (int64_t k = 0; k < group_out; ++k, sum += sums_stride, from += out_stride) {
          Store<n>(sum, Load<n>(sum) + sample * Load<n>(from));
        }
      });
}

// output [channels of the groups] = the sums [group_out, count], added up over each group's
// channels.
template <typename Sizes, typename T>
DEFORM_CONV_INLINE void AddUpGroups(const DirectFilters<const T>& filters, const T* sums,
                                    int64_t count, T* output) {
  const int64_t group_in = Sizes::In(filters), group_out = Sizes::Out(filters);
  for (int64_t c = 0; c < count; c += group_in) {
    for (int64_t k = 0; k < group_out; ++k) {
      const T* from = sums + k * count + c;
      if constexpr (Sizes::kIn > 0) {
        if constexpr (Sizes::kIn <= kLanes<T>) {
          *output++ = Sum<Sizes::kIn, T>(Load<Sizes::kIn>(from));
          continue;
        }
      }
      T sum = from[0];
      for (int64_t i = 1; i < group_in; ++i) sum += from[i];
      *output++ = sum;
    }
  }
}

// The reverse: grads [group_out, count], each output channel's gradient for each channel of its
// group.
template <typename Sizes, typename T>
DEFORM_CONV_INLINE void SpreadOverGroups(const DirectFilters<const T>& filters,
                                         const T* grad_output, int64_t count, T* grads) {
  const int64_t group_in = Sizes::In(filters), group_out = Sizes::Out(filters);
  for (int64_t c = 0; c < count; c += group_in) {
    for (int64_t k = 0; k < group_out; ++k) {
      T* to = grads + k * count + c;
      const T grad = *grad_output++;
      for (int64_t i = 0; i < group_in; ++i) to[i] = grad;
    }
  }
}

template <bool has_mask, typename Sizes, typename T>
void DirectForwardFor(const DeformConvParams& params, const ChannelRuns& runs,
                      const TileSamples<T>& tile_samples, const SampledTensors<T>& tensors,
                      const T* zeros, const DirectFilters<const T>& slice_filters, T* sums,
                      T* output) {
  // Copies: nothing that is written through a pointer can change them.
  const TileSamples<T> tile = tile_samples;
  const DirectFilters<const T> filters = slice_filters;
  const T* const input = tensors.input;
  const int64_t taps = params.taps(), in_w = params.in_w, channels = params.in_channels;
  const int64_t out_channels = params.out_channels;
  ForEachRunAtPosition(
      params, runs, tile, {tensors, {}},
      [=](const ChannelRun& run, int64_t row, int64_t /*n*/, int64_t image, uint64_t first_sample)
          DEFORM_CONV_INLINE_LAMBDA {
            const PositionSamples<T> samples = {tile.blocks, first_sample, input, zeros,
                                                image,       taps,         in_w,  channels};
            T* result = output + (tile.begin + row) * out_channels +
                        run.channel / Sizes::In(filters) * Sizes::Out(filters);
            T* to = Sizes::kOut == 1 ? result : sums;
            const T* const filter = Sizes::kHasFilters ? filters.data + run.column : nullptr;
            if constexpr (Sizes::kOut > 0) {
              ForEachBlock<T, kLanes<T>, kBlockVectors / Sizes::kOut>(
                  run.count, [&](int64_t i, auto lanes, auto vectors) DEFORM_CONV_INLINE_LAMBDA {
                    SumInRegisters<lanes(), vectors(), Sizes, has_mask>(
                        samples, i, filters, filter + i, to + i, run.count);
                  });
            } else {
              ForEachVector<T>(run.count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                SumInMemory<lanes(), has_mask>(samples, i, filters, filter + i, to + i, run.count);
              });
            }
            if (Sizes::kOut != 1) AddUpGroups<Sizes>(filters, sums, run.count, result);
          });
}

template <typename T>
void DirectForward(const DeformConvParams& params, const ChannelRuns& runs,
                   const TileSamples<T>& tile, const SampledTensors<T>& tensors, const T* zeros,
                   const DirectFilters<const T>& filters, T* row, T* output) {
  WithGroupSizes(filters, [&](auto sizes) {
    auto* forward = DirectForwardFor<true, decltype(sizes), T>;
    // Elsewhere, multiplying by masks of 1 takes a small part of the time.
    if constexpr (sizes.kOut == 1 && sizes.kHasFilters) {
      if (tensors.mask == nullptr) forward = DirectForwardFor<false, decltype(sizes), T>;
    }
    forward(params, runs, tile, tensors, zeros, filters, row, output);
  });
}

template <bool want_input, bool want_offset_or_mask, bool want_filters, typename Sizes, typename T>
void DirectBackwardFor(const DeformConvParams& params, const ChannelRuns& runs,
                       const TileSamples<T>& tile_samples, const SampleBackprop<T>& backprop,
                       const DirectFilters<const T>& slice_filters, const T* grad_output,
                       T* grad_row, const DirectFilters<T>& slice_grad_filters) {
  const TileSamples<T> tile = tile_samples;
  const SampleBackprop<T> copy = backprop;
  const DirectFilters<const T> filters = slice_filters;
  const DirectFilters<T> grad_filters = slice_grad_filters;
  const int64_t taps = params.taps(), channels = params.in_channels;
  const int64_t out_channels = params.out_channels;
  ForEachRunAtPosition(
      params, runs, tile, backprop.tensors,
      [=](const ChannelRun& run, int64_t row, int64_t n, int64_t image,
          uint64_t first_sample) DEFORM_CONV_INLINE_LAMBDA {
        const int64_t group_out = Sizes::Out(filters), count = run.count;
        const T* grads = grad_output + (tile.begin + row) * out_channels +
                         run.channel / Sizes::In(filters) * group_out;
        if (Sizes::kOut != 1) {
          SpreadOverGroups<Sizes>(filters, grads, count, grad_row);
          grads = grad_row;
        }
        ForEachTap(
            tile.blocks, first_sample, taps, image, channels,
            [&](int64_t tap, const TileSample<T>& sample, int64_t at) DEFORM_CONV_INLINE_LAMBDA {
              const int64_t out_stride = filters.channels;
              const int64_t first = tap * group_out * out_stride + run.column;
              const T* filter = Sizes::kHasFilters ? filters.data + first : nullptr;
              T* grad_filter = want_filters ? grad_filters.data + first : nullptr;
              BackpropSample<want_input, want_offset_or_mask, want_filters>(
                  copy, run, run.count, sample, n, at,
                  [=](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                    constexpr int n = lanes();
                    Vector<T, n> grad = Load<n>(grads + i);
                    if constexpr (Sizes::kHasFilters) {
                      grad *= Load<n>(filter + i);
                      for (int64_t k = 1; k < group_out; ++k) {
                        grad +=
                            Load<n>(grads + k * count + i) * Load<n>(filter + k * out_stride + i);
                      }
                    }
                    return grad;
                  },
                  [=](int64_t i, auto lanes, const auto& sample) DEFORM_CONV_INLINE_LAMBDA {
                    constexpr int n = lanes();
                    for (int64_t k = 0; k < group_out; ++k) {
                      T* to = grad_filter + k * out_stride + i;
                      Store<n>(to, Load<n>(to) + Load<n>(grads + k * count + i) * sample);
                    }
                  });
            });
      });
}

template <typename T>
void DirectBackward(const DeformConvParams& params, const ChannelRuns& runs,
                    const TileSamples<T>& tile, const SampledTensors<T>& tensors, const T* zeros,
                    T* ignored, const DirectFilters<const T>& filters, const T* grad_output, T* row,
                    const SampledGradients<T>& gradients, const DirectFilters<T>& grad_filters) {
  const SampleBackprop<T> backprop(params, tile, tensors, zeros, ignored, gradients);
  WithWanted(
      gradients, grad_filters.data != nullptr,
      [&](auto want_input, auto want_offset_or_mask, auto want_filters) {
        const bool depthwise = filters.group_in == 1 && filters.group_out == 1;
        auto* backward = depthwise ? DirectBackwardFor<want_input(), want_offset_or_mask(),
                                                       want_filters(), GroupSizes<1, 1>, T>
                                   : DirectBackwardFor<want_input(), want_offset_or_mask(),
                                                       want_filters(), GroupSizes<0, 0>, T>;
        if constexpr (!want_filters()) {
          if (filters.data == nullptr) {
            backward =
                DirectBackwardFor<want_input(), want_offset_or_mask(), false, WithoutFilters, T>;
          }
        }
        backward(params, runs, tile, backprop, filters, grad_output, row, grad_filters);
      });
  AddOffsetAndMaskGradients(params, tile, gradients);
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_DIRECT_H_
