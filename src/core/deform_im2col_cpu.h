// im2col and col2im on one CPU thread, vectorised over channels. The contracts are in
// cpu_kernels.h. Included only by cpu_kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_DEFORM_IM2COL_CPU_H_
#define DEFORM_CONV_CORE_DEFORM_IM2COL_CPU_H_

#include "core/bilinear.h"
#include "core/deform_im2col.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// One tap's sample at one position: the corners as indices into an image, -1 outside it.
template <typename T>
struct TapSample {
  bool inside;
  T h_fraction, w_fraction;
  int64_t pixels[kCorners];
};

template <typename T>
DEFORM_CONV_INLINE TapSample<T> LocateTap(const DeformConvParams& params, int64_t h_base,
                                          int64_t w_base, const T* offset) {
  const AxisSample<T> h = LocateOnAxis(h_base, offset[0], params.in_h);
  const AxisSample<T> w = LocateOnAxis(w_base, offset[1], params.in_w);
  TapSample<T> sample;
  sample.inside = h.inside && w.inside;
  if (!sample.inside) return sample;
  sample.h_fraction = h.fraction;
  sample.w_fraction = w.fraction;
  const bool top = h.low >= 0, bottom = h.low + 1 < params.in_h;
  const bool left = w.low >= 0, right = w.low + 1 < params.in_w;
  const int64_t top_left = h.low * params.in_w + w.low;
  sample.pixels[kTopLeft] = top && left ? top_left : -1;
  sample.pixels[kTopRight] = top && right ? top_left + 1 : -1;
  sample.pixels[kBottomLeft] = bottom && left ? top_left + params.in_w : -1;
  sample.pixels[kBottomRight] = bottom && right ? top_left + params.in_w + 1 : -1;
  return sample;
}

// Calls visit(position, n, g, tap, sample) for every sample that positions [begin, end) take for
// the deformable groups of `slice`; n is the image, g the deformable group.
template <typename T, typename Visit>
DEFORM_CONV_INLINE void ForEachSample(const DeformConvParams& params, const ChannelSlice& slice,
                                      const T* offset, int64_t begin, int64_t end,
                                      const Visit& visit) {
  const int64_t taps = params.taps();
  const int64_t first_g = slice.begin / params.deform_group_channels();
  const int64_t last_g = (slice.end - 1) / params.deform_group_channels();
  for (int64_t position = begin; position < end; ++position) {
    const int64_t x = position % params.out_w;
    const int64_t y = position / params.out_w % params.out_h;
    const int64_t n = position / params.out_w / params.out_h;
    const int64_t h_origin = y * params.stride_h - params.pad_top;
    const int64_t w_origin = x * params.stride_w - params.pad_left;
    const T* position_offset = offset + position * params.offset_channels();
    for (int64_t g = first_g; g <= last_g; ++g) {
      for (int64_t ky = 0, tap = 0; ky < params.kernel_h; ++ky) {
        for (int64_t kx = 0; kx < params.kernel_w; ++kx, ++tap) {
          const TapSample<T> sample =
              LocateTap(params, h_origin + ky * params.dilation_h,
                        w_origin + kx * params.dilation_w, position_offset + 2 * (g * taps + tap));
          visit(position, n, g, tap, sample);
        }
      }
    }
  }
}

// Calls visit(channel, column, count) for every run of channels of deformable group `g` that lies
// together in one tap of a row of columns, `column` elements from the row's begin.
template <typename Visit>
DEFORM_CONV_INLINE void ForEachRun(const DeformConvParams& params, const ChannelSlice& slice,
                                   int64_t g, int64_t tap, const Visit& visit) {
  const int64_t g_begin = g * params.deform_group_channels();
  const int64_t g_end = g_begin + params.deform_group_channels();
  const int64_t end = g_end < slice.end ? g_end : slice.end;
  int64_t channel = g_begin > slice.begin ? g_begin : slice.begin;
  while (channel < end) {
    const int64_t group = (channel - slice.begin) / slice.width;
    const int64_t group_begin = slice.begin + group * slice.width;
    const int64_t group_end = group_begin + slice.width;
    const int64_t run_end = group_end < end ? group_end : end;
    visit(channel, (group * params.taps() + tap) * slice.width + (channel - group_begin),
          run_end - channel);
    channel = run_end;
  }
}

template <typename T>
void DeformIm2Col(const DeformConvParams& params, const ChannelSlice& slice,
                  const SampledTensors<T>& tensors, int64_t begin, int64_t end, const T* zero_pixel,
                  T* columns) {
  const int64_t image_size = params.in_h * params.in_w * params.in_channels;
  const int64_t row_size = params.taps() * slice.channels();
  ForEachSample(
      params, slice, tensors.offset, begin, end,
      [&](int64_t position, int64_t n, int64_t g, int64_t tap, const TapSample<T>& sample) {
        T* row = columns + (position - begin) * row_size;
        if (!sample.inside) {
          ForEachRun(params, slice, g, tap, [&](int64_t, int64_t column, int64_t count) {
            for (int64_t i = 0; i < count; ++i) row[column + i] = T(0);
          });
          return;
        }
        T weights[kCorners];
        BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
        if (tensors.mask != nullptr) {
          const T mask = tensors.mask[position * params.mask_channels() + g * params.taps() + tap];
          for (T& weight : weights) weight *= mask;
        }
        const T* image = tensors.input + n * image_size;
        const T* pixels[kCorners];
        for (int corner = 0; corner < kCorners; ++corner) {
          const int64_t pixel = sample.pixels[corner];
          pixels[corner] = pixel < 0 ? zero_pixel : image + pixel * params.in_channels;
        }
        ForEachRun(params, slice, g, tap, [&](int64_t channel, int64_t column, int64_t count) {
          const T* top_left = pixels[kTopLeft] + channel;
          const T* top_right = pixels[kTopRight] + channel;
          const T* bottom_left = pixels[kBottomLeft] + channel;
          const T* bottom_right = pixels[kBottomRight] + channel;
          T* out = row + column;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) {
            out[i] = weights[kTopLeft] * top_left[i] + weights[kTopRight] * top_right[i] +
                     weights[kBottomLeft] * bottom_left[i] +
                     weights[kBottomRight] * bottom_right[i];
          }
        });
      });
}

// What one run of channels adds to the gradients: to the corners' pixels in place, and to
// `products`, the products of the columns' gradient with each corner, summed over channels. The
// derivatives by offset and mask are combinations of those four sums.
template <bool kInput, bool kProducts, typename T>
DEFORM_CONV_INLINE void BackpropRun(const T* grad, int64_t count, const T* const pixels[kCorners],
                                    const T weights[kCorners], T* const grad_pixels[kCorners],
                                    T products[kCorners]) {
  T top_left = 0, top_right = 0, bottom_left = 0, bottom_right = 0;
  // Corners are different pixels, or the one whose content is ignored.
#pragma omp simd reduction(+ : top_left, top_right, bottom_left, bottom_right)
  for (int64_t i = 0; i < count; ++i) {
    if (kProducts) {
      top_left += grad[i] * pixels[kTopLeft][i];
      top_right += grad[i] * pixels[kTopRight][i];
      bottom_left += grad[i] * pixels[kBottomLeft][i];
      bottom_right += grad[i] * pixels[kBottomRight][i];
    }
    if (kInput) {
      grad_pixels[kTopLeft][i] += weights[kTopLeft] * grad[i];
      grad_pixels[kTopRight][i] += weights[kTopRight] * grad[i];
      grad_pixels[kBottomLeft][i] += weights[kBottomLeft] * grad[i];
      grad_pixels[kBottomRight][i] += weights[kBottomRight] * grad[i];
    }
  }
  products[kTopLeft] += top_left;
  products[kTopRight] += top_right;
  products[kBottomLeft] += bottom_left;
  products[kBottomRight] += bottom_right;
}

template <bool kInput, bool kProducts, typename T>
void DeformCol2ImFor(const DeformConvParams& params, const ChannelSlice& slice,
                     const SampledTensors<T>& tensors, int64_t begin, int64_t end,
                     const T* grad_columns, const T* zero_pixel, T* ignored_pixel,
                     const SampledGradients<T>& gradients) {
  const int64_t image_size = params.in_h * params.in_w * params.in_channels;
  const int64_t row_size = params.taps() * slice.channels();
  ForEachSample(
      params, slice, tensors.offset, begin, end,
      [&](int64_t position, int64_t n, int64_t g, int64_t tap, const TapSample<T>& sample) {
        if (!sample.inside) return;
        const int64_t mask_index = position * params.mask_channels() + g * params.taps() + tap;
        const T mask = tensors.mask == nullptr ? T(1) : tensors.mask[mask_index];
        T weights[kCorners], masked_weights[kCorners];
        BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
        for (int corner = 0; corner < kCorners; ++corner) {
          masked_weights[corner] = mask * weights[corner];
        }
        const T* row = grad_columns + (position - begin) * row_size;
        T products[kCorners] = {0, 0, 0, 0};
        ForEachRun(params, slice, g, tap, [&](int64_t channel, int64_t column, int64_t count) {
          const T* pixels[kCorners];
          T* grad_pixels[kCorners];
          for (int corner = 0; corner < kCorners; ++corner) {
            const bool exists = sample.pixels[corner] >= 0;
            const int64_t at =
                n * image_size + sample.pixels[corner] * params.in_channels + channel;
            pixels[corner] = exists ? tensors.input + at : zero_pixel;
            grad_pixels[corner] = kInput && exists ? gradients.input + at : ignored_pixel;
          }
          BackpropRun<kInput, kProducts>(row + column, count, pixels, masked_weights, grad_pixels,
                                         products);
        });
        if (!kProducts) return;
        if (gradients.offset != nullptr) {
          gradients.offset[2 * mask_index] +=
              mask * BilinearDerivativeH(sample.w_fraction, products);
          gradients.offset[2 * mask_index + 1] +=
              mask * BilinearDerivativeW(sample.h_fraction, products);
        }
        if (gradients.mask != nullptr) {
          T sum = 0;
          for (int corner = 0; corner < kCorners; ++corner) {
            sum += weights[corner] * products[corner];
          }
          gradients.mask[mask_index] += sum;
        }
      });
}

template <typename T>
void DeformCol2Im(const DeformConvParams& params, const ChannelSlice& slice,
                  const SampledTensors<T>& tensors, int64_t begin, int64_t end,
                  const T* grad_columns, const T* zero_pixel, T* ignored_pixel,
                  const SampledGradients<T>& gradients) {
  const bool products = gradients.offset != nullptr || gradients.mask != nullptr;
  const auto run = gradients.input == nullptr ? DeformCol2ImFor<false, true, T>
                   : products                 ? DeformCol2ImFor<true, true, T>
                                              : DeformCol2ImFor<true, false, T>;
  run(params, slice, tensors, begin, end, grad_columns, zero_pixel, ignored_pixel, gradients);
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_DEFORM_IM2COL_CPU_H_
