// Sampling volumes on one CPU thread, vectorised over channels. The contracts are in
// cpu/volume_kernels.h. Included only by volume_isa.cc, which is compiled once per instruction
// set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_VOLUME_H_
#define DEFORM_CONV_CORE_CPU_ISA_VOLUME_H_

#include <type_traits>

#include "core/cpu/isa/vector.h"
#include "core/cpu/volume_kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

template <typename T>
void LocateVolume(const DeformConv3DParams& params, const SampledTensors<T>& tensors,
                  const VolumeTile<T>& tile) {
  const AxisSizes &depth = params.axes[kDepth], &height = params.axes[kHeight],
                  &width = params.axes[kWidth];
  TapSample<T>* sample = tile.samples;
  int64_t index = tile.begin * params.mask_channels();
  for (int64_t position = tile.begin; position < tile.end; ++position) {
    const int64_t y_z_n = position / width.out, x = position - y_z_n * width.out;
    const int64_t z_n = y_z_n / height.out, y = y_z_n - z_n * height.out;
    const int64_t n = z_n / depth.out, z = z_n - n * depth.out;
    for (int64_t g = 0; g < params.deform_groups; ++g) {
      for (int64_t kz = 0; kz < depth.kernel; ++kz) {
        for (int64_t ky = 0; ky < height.kernel; ++ky) {
          for (int64_t kx = 0; kx < width.kernel; ++kx, ++sample, ++index) {
            const int64_t base[] = {depth.Base(z, kz), height.Base(y, ky), width.Base(x, kx)};
            static_cast<VolumeSample<T>&>(*sample) =
                LocateInVolume(base, tensors.offset + kSpatialAxes * index, params.axes);
            if (sample->corner_bits == 0) {
              // What lies outside is 0, whatever the mask.
              sample->mask = 0;
              sample->row = 0;
              for (int64_t& low : sample->low) low = 0;
              continue;
            }
            sample->mask = tensors.mask == nullptr ? T(1) : tensors.mask[index];
            sample->row = (n * depth.in + sample->low[kDepth]) * height.in + sample->low[kHeight];
          }
        }
      }
    }
  }
}

// Where each corner lies from the first on, in elements.
struct CornerDistances {
  int64_t of[kVolumeCorners];

  DEFORM_CONV_INLINE explicit CornerDistances(const DeformConv3DParams& params) {
    const int64_t in_h = params.axes[kHeight].in, in_w = params.axes[kWidth].in;
    for (int corner = 0; corner < kVolumeCorners; ++corner) {
      const int64_t rows = (corner >> 2 & 1) * in_h + (corner >> 1 & 1);
      of[corner] = (rows * in_w + (corner & 1)) * params.in_channels;
    }
  }
};

// Calls visit(run, row, sample, column, first) for each run and tap at each position of the tile:
// `row` is the position's, counted from the tile's first; `column` is where the run's channels for
// the tap are in the row; and `first` where they are in the input, at the sample's first corner.
template <typename T, typename Visit>
DEFORM_CONV_INLINE void ForEachTapOfRuns(const DeformConv3DParams& params, const ChannelRuns& runs,
                                         const VolumeTile<T>& tile, const Visit& visit) {
  const int64_t taps = params.taps(), per_position = params.mask_channels();
  const int64_t in_w = params.axes[kWidth].in, channels = params.in_channels;
  for (int64_t row = 0; row < tile.end - tile.begin; ++row) {
    for (const ChannelRun* run = runs.begin; run < runs.end; ++run) {
      const TapSample<T>* sample = tile.samples + row * per_position + run->deform_group * taps;
      for (int64_t tap = 0; tap < taps; ++tap, ++sample) {
        visit(*run, row, *sample, run->column + tap * run->tap_stride,
              (sample->row * in_w + sample->low[kWidth]) * channels + run->channel);
      }
    }
  }
}

// The weights of all corners, plane after plane.
template <typename T>
DEFORM_CONV_INLINE const T* WeightsOf(const TapSample<T>& sample) {
  return reinterpret_cast<const T*>(sample.weights);
}

// Calls body(all), a std::bool_constant: whether every corner of the sample counts, for the
// compiler to know it.
template <typename T, typename Body>
DEFORM_CONV_INLINE void WithCorners(const TapSample<T>& sample, const Body& body) {
  if (sample.corner_bits == kAllVolumeCorners) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

template <typename T>
void VolumeIm2Col(const DeformConv3DParams& params, const ChannelRuns& runs,
                  const VolumeTile<T>& tile, const T* input, const Matrix<T>& columns) {
  const CornerDistances distances(params);
  ForEachTapOfRuns(params, runs, tile,
                   [&](const ChannelRun& run, int64_t row, const TapSample<T>& sample,
                       int64_t column, int64_t first) DEFORM_CONV_INLINE_LAMBDA {
                     T* const to = columns.data + row * columns.stride + column;
                     const T* const from = input + first;
                     const T* const weights = WeightsOf(sample);
                     const int32_t bits = sample.corner_bits;
                     WithCorners(sample, [&](auto all) DEFORM_CONV_INLINE_LAMBDA {
                       ForEachVector<T>(
                           run.count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
                             constexpr int n = lanes();
                             Vector<T, n> sum = {};
#pragma GCC unroll 8
                             for (int corner = 0; corner < kVolumeCorners; ++corner) {
                               if (!all() && !(bits >> corner & 1)) continue;
                               sum += weights[corner] * Load<n>(from + distances.of[corner] + i);
                             }
                             // Times the mask at last: a corner's product with it may overflow
                             // where the sample's does not.
                             Store<n>(to + i, sum * sample.mask);
                           });
                     });
                   });
}

// Adds to `products` those of the columns' gradient with each corner that counts, summed over a
// run's channels.
template <bool all, typename T>
DEFORM_CONV_INLINE void AddCornerProducts(const CornerDistances& distances, int32_t bits,
                                          int64_t count, const T* grad, const T* from,
                                          T* products) {
  constexpr int kFull = kLanes<T>;
  alignas(kVectorBytes) Vector<T> sums[kVolumeCorners] = {};
  ForEachVector<T>(count, [&](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
    constexpr int n = lanes();
    const Vector<T, n> grads = Load<n>(grad + i);
#pragma GCC unroll 8
    for (int corner = 0; corner < kVolumeCorners; ++corner) {
      if (!all && !(bits >> corner & 1)) continue;
      const Vector<T, n> terms = grads * Load<n>(from + distances.of[corner] + i);
      if constexpr (n == kFull) {
        sums[corner] += terms;
      } else {
        products[corner] += Sum<n, T>(terms);
      }
    }
  });
  if (count < kFull) return;
#pragma GCC unroll 8
  for (int corner = 0; corner < kVolumeCorners; ++corner) {
    products[corner] += Sum<kFull, T>(sums[corner]);
  }
}

// Writes a sample's gradients of offset and mask, from its products with each corner.
template <typename T>
DEFORM_CONV_INLINE void WriteSamplingGradients(const TapSample<T>& sample,
                                               const T (&products)[kCornerPlanes][kCorners],
                                               T* grad_offset, T* grad_mask) {
  if (grad_offset != nullptr) {
    T derivatives[kSpatialAxes];
    TrilinearDerivatives(sample.fractions, products, derivatives);
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      // Where no corner counts the mask is 0, and so are the products.
      grad_offset[axis] = sample.mask * derivatives[axis];
    }
  }
  if (grad_mask != nullptr) {
    T sum = 0;
    for (int plane = 0; plane < kCornerPlanes; ++plane) {
      for (int corner = 0; corner < kCorners; ++corner) {
        sum += sample.weights[plane][corner] * products[plane][corner];
      }
    }
    *grad_mask = sum;
  }
}

template <typename T>
void BackpropSampling(const DeformConv3DParams& params, const ChannelRuns& runs,
                      const VolumeTile<T>& tile, const T* input,
                      const Matrix<const T>& grad_columns, T* products, T* grad_offset,
                      T* grad_mask) {
  const CornerDistances distances(params);
  const int64_t per_position = params.mask_channels();
  for (int64_t position = tile.begin; position < tile.end; ++position) {
    const int64_t row = position - tile.begin;
    TapSample<T>* const samples = tile.samples + row * per_position;
    std::memset(products, 0, per_position * kVolumeCorners * sizeof(T));
    ForEachTapOfRuns(params, runs, VolumeTile<T>{position, position + 1, samples},
                     [&](const ChannelRun& run, int64_t /*row*/, const TapSample<T>& sample,
                         int64_t column, int64_t first) DEFORM_CONV_INLINE_LAMBDA {
                       const T* const grad = grad_columns.data + row * grad_columns.stride + column;
                       T* const own = products + (&sample - samples) * kVolumeCorners;
                       WithCorners(sample, [&](auto all) DEFORM_CONV_INLINE_LAMBDA {
                         AddCornerProducts<all()>(distances, sample.corner_bits, run.count, grad,
                                                  input + first, own);
                       });
                     });
    for (int64_t i = 0; i < per_position; ++i) {
      T of_sample[kCornerPlanes][kCorners];
      std::memcpy(of_sample, products + i * kVolumeCorners, sizeof(of_sample));
      const int64_t index = position * per_position + i;
      WriteSamplingGradients(samples[i], of_sample,
                             grad_offset == nullptr ? nullptr : grad_offset + kSpatialAxes * index,
                             grad_mask == nullptr ? nullptr : grad_mask + index);
    }
  }
}

// Adds to two neighbouring voxels of a row, as far as they count, what a run's channels bring.
template <typename T>
DEFORM_CONV_INLINE void AddToRow(int32_t bits, const T* weights, T mask, int64_t count,
                                 const T* grad, int64_t right, T* to) {
  for (int side = 0; side < 2; ++side, to += right) {
    if (!(bits >> side & 1)) continue;
    const T weight = weights[side];
    ForEachVector<T>(count, [=](int64_t i, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
      constexpr int n = lanes();
      Store<n>(to + i, Load<n>(to + i) + weight * (mask * Load<n>(grad + i)));
    });
  }
}

template <typename T>
void VolumeScatter(const DeformConv3DParams& params, const ChannelRuns& runs,
                   const VolumeTile<T>& tile, const Matrix<const T>& grad_columns,
                   const RowOwner& owner, T* grad_input) {
  constexpr int kRowPairs = kVolumeCorners / 2;  // corners lie in four rows, two in each
  const CornerDistances distances(params);
  const int64_t in_h = params.axes[kHeight].in, count = owner.count;
  const int64_t next_plane = in_h % count, next_row = 1 % count;
  const int64_t steps[kRowPairs] = {0, next_row, next_plane, (next_plane + next_row) % count};
  ForEachTapOfRuns(params, runs, tile,
                   [&](const ChannelRun& run, int64_t row, const TapSample<T>& sample,
                       int64_t column, int64_t first) DEFORM_CONV_INLINE_LAMBDA {
                     if (sample.corner_bits == 0) return;
                     const T* const grad = grad_columns.data + row * grad_columns.stride + column;
                     // The first row may lie a plane and a row before the batch.
                     const int64_t first_owner = count == 1 ? 0 : (sample.row + in_h + 1) % count;
                     for (int pair = 0; pair < kRowPairs; ++pair) {
                       int64_t owner_of_pair = first_owner + steps[pair];
                       if (owner_of_pair >= count) owner_of_pair -= count;
                       if (owner_of_pair != owner.index) continue;
                       AddToRow(sample.corner_bits >> 2 * pair, WeightsOf(sample) + 2 * pair,
                                sample.mask, run.count, grad, params.in_channels,
                                grad_input + first + distances.of[2 * pair]);
                     }
                   });
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_VOLUME_H_
