// The single-threaded inner loops of the CPU, compiled once per instruction set and chosen at run
// time. Everything above them (tiles, threads, workspace) is compiled once.

#ifndef DEFORM_CONV_CORE_CPU_KERNELS_H_
#define DEFORM_CONV_CORE_CPU_KERNELS_H_

#include <cstdint>

#include "core/bilinear.h"
#include "core/export.h"
#include "core/matrix.h"
#include "core/params.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {

// Neighbouring input channels that share a deformable group: what one sample reads at once. They
// share a convolution group too, and lie together in the columns; or each vector of them is a
// group.
struct ChannelRun {
  int64_t channel, count;
  int64_t deform_group;
  int64_t column;      // where the run's channels for tap 0 begin in a row of columns
  int64_t tap_stride;  // distance in the row from one tap to the next
  int64_t spread;      // the run's i-th channel is at column + spread * i, if i is a vector's first
};

// Samples as LocateSample() gives them, and their masks, 1 where there is none. Where no corner
// counts, the mask, h_low, w_low and `pixel` are 0. The mask is kept apart from the weights, since
// the product of the two may overflow where a sample times its mask does not. Sixteen samples lie
// side by side, for vector code to write them, and close together, for one pointer to reach them.
template <typename T>
struct SampleBlock {
  static constexpr int kSize = 16;
  T weights[kCorners][kSize];
  T h_fraction[kSize], w_fraction[kSize], mask[kSize];
  int64_t pixel[kSize];  // h_low * in_w + w_low
  int32_t corner_bits[kSize], h_low[kSize], w_low[kSize];
};

// Where a tile sums up the gradient of the few pixels that it samples, before it adds them to the
// input's gradient: pixels [h, h + rows) x [w, w + cols) of the tile's images. Without it, `sums`
// is null. See Tile::PlanSums().
template <typename T>
struct PixelSums {
  T* sums;  // [images, rows, cols, in_channels]
  int64_t first_image;
  int64_t h, w, rows, cols;
};

// What positions [begin, end) sample for deformable groups [first_deform_group, end_deform_group),
// numbered [position - begin][group - first_deform_group][tap].
template <typename T>
struct TileSamples {
  int64_t begin, end;
  int64_t first_deform_group, end_deform_group;
  int32_t *h_bases, *w_bases;  // coordinates without offsets; workspace of locate
  SampleBlock<T>* blocks;
  // A sample's products with each corner, summed over channels: [samples of whole blocks,
  // kCorners]. Workspace of backward, zeros before; null where neither offset nor mask has a
  // gradient.
  T* corner_products;
  PixelSums<T> pixel_sums;
  // Where the rows of the input's gradient begin, for a tile of one image: row h at grad_rows[h],
  // from -1 to in_h, which are only pointed at. Null where they lie in the gradient as a whole.
  T* const* grad_rows;
};

// Rows [begin, end) of an image.
struct RowRange {
  int64_t begin, end;
};

// The channels that im2col and col2im work on.
struct ChannelRuns {
  const ChannelRun* begin;
  const ChannelRun* end;
};

// The filters of some neighbouring whole groups, or their gradient, in the order in which vectors
// over input channels read them: [taps, group_out, channels], so that each input channel has the
// filters to all output channels of its own group.
template <typename T>
struct DirectFilters {
  T* data;  // null where there are none, and where a gradient is not wanted
  int64_t group_in, group_out;
  int64_t channels;  // of the input, in all groups
};

// Inner loops for tensors in native form.
template <typename T>
struct CpuKernels {
  // The result of a GEMM is computed in blocks of so many rows, and in panels of so many columns.
  int64_t gemm_rows, gemm_panel;

  int64_t lanes;  // elements of a vector

  // Writes the tile's samples.
  void (*locate)(const DeformConvParams& params, const SampledTensors<T>& tensors,
                 const TileSamples<T>& tile);

  // The rows of the image that positions [begin, end), all in one image, sample, or more.
  //   tap_rows  for each offset of up to `positions` positions, what its tap adds to the position's
  //             row; a vector may be read beyond
  RowRange (*sampled_rows)(const DeformConvParams& params, const T* offset, int64_t begin,
                           int64_t end, const int32_t* tap_rows, int64_t positions);

  // Writes the tile's columns for the runs' channels, a row for each position.
  //   zeros  as many as a run has channels, at least; read where a corner lies outside the image
  void (*im2col)(const DeformConvParams& params, const ChannelRuns& runs,
                 const TileSamples<T>& tile, const SampledTensors<T>& tensors, const T* zeros,
                 const Matrix<T>& columns);

  // Adds to `gradients` what the columns' gradient, in `columns`, means for the sampled tensors;
  // for the input, to the tile's `pixel_sums` instead where it has some. With `replace`, writes the
  // columns themselves over their gradient.
  //   ignored  as large as `zeros`; receives what falls outside the image
  void (*col2im)(const DeformConvParams& params, const ChannelRuns& runs,
                 const TileSamples<T>& tile, const SampledTensors<T>& tensors, const T* zeros,
                 T* ignored, bool replace, const Matrix<T>& columns,
                 const SampledGradients<T>& gradients);

  // Packs operand B of a GEMM, [k, n]: for each panel of gemm_panel columns, its rows one after the
  // other, so k * gemm_panel elements per panel, in the last one too. `pack` writes rows
  // [row_begin, row_begin + b.rows) of it from the rows of `b`, and `pack_transposed` writes
  // n in [n_begin, n_begin + b.rows) from them.
  void (*pack)(const Matrix<const T>& b, int64_t row_begin, int64_t k, T* packed);
  void (*pack_transposed)(const Matrix<const T>& b, int64_t n_begin, T* packed);

  // c = a * b, or c += a * b, with `a` transposed if `form` is kTransposeA, and b packed.
  void (*gemm)(GemmForm form, const Matrix<const T>& a, const T* packed, const Matrix<T>& c,
               bool accumulate);

  // Narrow groups, without columns and GEMMs. The runs have whole groups, and their `column` is
  // where their channels begin in the filters. Without filters, groups are 1 channel each, and
  // samples are added up as they are.
  //   row  workspace [group_out, channels of the longest run]; unused where groups are 1 channel
  //   each

  // Writes the tile's output of the runs' groups.
  void (*direct_forward)(const DeformConvParams& params, const ChannelRuns& runs,
                         const TileSamples<T>& tile, const SampledTensors<T>& tensors,
                         const T* zeros, const DirectFilters<const T>& filters, T* row, T* output);

  // Adds to `gradients`, as col2im does, and to `grad_filters`.
  void (*direct_backward)(const DeformConvParams& params, const ChannelRuns& runs,
                          const TileSamples<T>& tile, const SampledTensors<T>& tensors,
                          const T* zeros, T* ignored, const DirectFilters<const T>& filters,
                          const T* grad_output, T* row, const SampledGradients<T>& gradients,
                          const DirectFilters<T>& grad_filters);
};

// Conversion of tensors of T in either format from and to native form.
template <typename T>
struct CpuLayoutKernels {
  using NativeT = ComputeType<T>;

  // Converts pixels [begin, end), counted over the whole batch.
  void (*to_native)(DataFormat format, const TensorExtent& extent, const T* tensor, int64_t begin,
                    int64_t end, NativeT* native);
  void (*from_native)(DataFormat format, const TensorExtent& extent, const NativeT* native,
                      int64_t begin, int64_t end, T* tensor);
};

// The instruction set of the kernels for this processor. Environment variable DEFORM_CONV_CPU_ISA
// (baseline, avx2, avx512) asks for a lower one than the processor has, for tests and comparisons.
// This and what follows throw std::invalid_argument if it names another.
const char* CpuInstructionSet();

// The kernels for this processor. T is float or double; for layout also Half or BFloat16.
template <typename T>
const CpuKernels<T>& SelectCpuKernels();
template <typename T>
DEFORM_CONV_EXPORT const CpuLayoutKernels<T>& SelectCpuLayoutKernels();

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_KERNELS_H_
