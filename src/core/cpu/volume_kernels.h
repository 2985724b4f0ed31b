// The single-threaded inner loops of deformable convolution over three axes, compiled once per
// instruction set as those of cpu/kernels.h.

#ifndef DEFORM_CONV_CORE_CPU_VOLUME_KERNELS_H_
#define DEFORM_CONV_CORE_CPU_VOLUME_KERNELS_H_

#include <cstdint>

#include "core/cpu/kernels.h"
#include "core/matrix.h"
#include "core/params3d.h"
#include "core/sampling.h"
#include "core/trilinear.h"

namespace deform_conv {

// What a tap samples at one position for a deformable group. Where no corner counts, all but the
// weights and fractions is 0: also the mask, which is 1 where there is none.
template <typename T>
struct TapSample : VolumeSample<T> {
  T mask;
  int64_t row;  // of the batch's rows of voxels, (n * in_d + low d) * in_h + low h
};

// The samples of positions [begin, end), [position - begin][deform group][tap].
template <typename T>
struct VolumeTile {
  int64_t begin, end;
  TapSample<T>* samples;

  int64_t positions() const { return end - begin; }
};

// Of `count` workers, each owns the rows of voxels whose number is its index, modulo `count`.
struct RowOwner {
  int64_t index, count;
};

// Columns, or their gradient, have a row for each position of the tile. `runs` are all channels,
// none of them spread.
template <typename T>
struct CpuVolumeKernels {
  // Writes the tile's samples.
  void (*locate)(const DeformConv3DParams& params, const SampledTensors<T>& tensors,
                 const VolumeTile<T>& tile);

  // Writes the tile's columns.
  void (*im2col)(const DeformConv3DParams& params, const ChannelRuns& runs,
                 const VolumeTile<T>& tile, const T* input, const Matrix<T>& columns);

  // From the columns' gradient, writes the gradients of offset and mask at the tile's positions;
  // null where one is not wanted.
  //   products  workspace, kVolumeCorners for each sample of a position
  void (*backprop_sampling)(const DeformConv3DParams& params, const ChannelRuns& runs,
                            const VolumeTile<T>& tile, const T* input,
                            const Matrix<const T>& grad_columns, T* products, T* grad_offset,
                            T* grad_mask);

  // From the columns' gradient, adds to the owner's rows of the input's gradient.
  void (*scatter)(const DeformConv3DParams& params, const ChannelRuns& runs,
                  const VolumeTile<T>& tile, const Matrix<const T>& grad_columns,
                  const RowOwner& owner, T* grad_input);
};

// The kernels for this processor. T is float or double.
template <typename T>
const CpuVolumeKernels<T>& SelectCpuVolumeKernels();

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_VOLUME_KERNELS_H_
