// Samples of volumes, located. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_VOLUME_SAMPLES_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_VOLUME_SAMPLES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "core/params3d.h"
#include "core/sampling.h"
#include "core/trilinear.h"

namespace deform_conv {
namespace cuda {

// A sample as a thread block keeps it in shared memory. Where no corner counts, the mask is 0.
template <typename OffsetT>
struct LocatedVolumeSample {
  OffsetT weights[kCornerPlanes][kCorners];
  OffsetT fractions[kSpatialAxes];
  OffsetT mask;
  int32_t corner_bits;
  int channel;          // the deformable group's first
  int64_t first_voxel;  // of the batch: that of the front plane's top left corner
  int64_t column;       // where the tap's first column of group 0 is, in elements
  int64_t index;        // (position * deform_groups + g) * taps + tap, of the whole batch
};

// Locates sample `i` of those that positions [begin, ...) take.
template <typename T, typename OffsetT>
__device__ LocatedVolumeSample<OffsetT> LocateTap(const DeformConv3DParams& params,
                                                  const SampledTensors<T, OffsetT>& tensors,
                                                  int64_t begin, int64_t i) {
  const AxisSizes &depth = params.axes[kDepth], &height = params.axes[kHeight],
                  &width = params.axes[kWidth];
  const int64_t per_position = params.mask_channels();
  const int64_t row = i / per_position;
  const int taps = static_cast<int>(params.taps());
  const int g_tap = static_cast<int>(i - row * per_position);
  const int g = g_tap / taps, tap = g_tap - g * taps;
  const int kernel_h = static_cast<int>(height.kernel), kernel_w = static_cast<int>(width.kernel);
  const int ky_kz = tap / kernel_w, kx = tap - ky_kz * kernel_w;
  const int kz = ky_kz / kernel_h, ky = ky_kz - kz * kernel_h;
  const int64_t position = begin + row;
  const int64_t y_z_n = position / width.out, x = position - y_z_n * width.out;
  const int64_t z_n = y_z_n / height.out, y = y_z_n - z_n * height.out;
  const int64_t n = z_n / depth.out, z = z_n - n * depth.out;

  LocatedVolumeSample<OffsetT> sample;
  sample.index = position * per_position + g_tap;
  sample.column = row * taps * params.in_channels + tap * params.group_in_channels();
  sample.channel = static_cast<int>(g * params.deform_group_channels());
  const int64_t base[] = {depth.Base(z, kz), height.Base(y, ky), width.Base(x, kx)};
  const VolumeSample<OffsetT> located =
      LocateInVolume(base, tensors.offset + kSpatialAxes * sample.index, params.axes);
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    sample.weights[kFront][corner] = located.weights[kFront][corner];
    sample.weights[kBack][corner] = located.weights[kBack][corner];
  }
#pragma unroll
  for (int axis = 0; axis < kSpatialAxes; ++axis) sample.fractions[axis] = located.fractions[axis];
  sample.corner_bits = located.corner_bits;
  sample.first_voxel =
      ((n * depth.in + located.low[kDepth]) * height.in + located.low[kHeight]) * width.in +
      located.low[kWidth];
  // What lies outside is 0, whatever the mask.
  sample.mask = located.corner_bits == 0  ? OffsetT(0)
                : tensors.mask == nullptr ? OffsetT(1)
                                          : tensors.mask[sample.index];
  return sample;
}

// The voxel of the batch that a corner is.
template <typename OffsetT>
__device__ __forceinline__ int64_t VoxelOf(const DeformConv3DParams& params,
                                           const LocatedVolumeSample<OffsetT>& sample, int plane,
                                           int corner) {
  const int64_t row = plane * params.axes[kHeight].in + (corner >= kBottomLeft ? 1 : 0);
  return sample.first_voxel + row * params.axes[kWidth].in + (corner & 1);
}

__device__ __forceinline__ bool Counts(int32_t corner_bits, int plane, int corner) {
  return corner_bits >> (plane * kCorners + corner) & 1;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_VOLUME_SAMPLES_CUH_
