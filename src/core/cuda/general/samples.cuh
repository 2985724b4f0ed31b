// Samples as the general kernels see them: located in shared memory, and laid out over the threads
// of a block. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_SAMPLES_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_SAMPLES_CUH_

#include "core/bilinear.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/params.h"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// Each thread of a block locates one sample; then the block's rows of lanes work through them.
constexpr int kSamplesPerBlock = kThreadsPerBlock;

// A sample as a thread block keeps it in shared memory.
template <typename OffsetT>
struct LocatedSample : ImageSample<OffsetT, int64_t> {
  OffsetT mask;
  int64_t top_left;  // pixel of the batch
  int64_t column;    // where the tap's first column of group 0 is, in elements
  int64_t index;     // (position * deform_groups + g) * taps + tap, of the whole batch
  int channel;       // the deformable group's first
};

// Locates sample `i` of those that positions [begin, ...) take.
template <typename T, typename OffsetT>
__device__ LocatedSample<OffsetT> Locate(const DeformConvParams& params,
                                         const SampledTensors<T, OffsetT>& tensors, int64_t begin,
                                         int64_t i) {
  const int64_t taps = params.taps();
  const int64_t per_position = params.mask_channels();
  const int64_t row = i / per_position;
  const int g_tap = static_cast<int>(i - row * per_position);
  const int g = g_tap / static_cast<int>(taps);
  const int tap = g_tap - g * static_cast<int>(taps);
  const int ky = tap / static_cast<int>(params.kernel_w);
  const int kx = tap - ky * static_cast<int>(params.kernel_w);
  const int64_t position = begin + row;
  const int64_t n_y = position / params.out_w;
  const int64_t x = position - n_y * params.out_w;
  const int64_t n = n_y / params.out_h;
  const int64_t y = n_y - n * params.out_h;

  LocatedSample<OffsetT> sample;
  sample.index = position * per_position + g_tap;
  sample.column = row * taps * params.in_channels + tap * params.group_in_channels();
  sample.channel = static_cast<int>(g * params.deform_group_channels());
  static_cast<ImageSample<OffsetT, int64_t>&>(sample) = LocateSample<OffsetT, int64_t>(
      y * params.stride_h - params.pad_top + ky * params.dilation_h,
      x * params.stride_w - params.pad_left + kx * params.dilation_w,
      tensors.offset[2 * sample.index], tensors.offset[2 * sample.index + 1], params.in_h,
      params.in_w);
  sample.top_left = (n * params.in_h + sample.h_low) * params.in_w + sample.w_low;
  sample.mask = tensors.mask == nullptr ? OffsetT(1) : tensors.mask[sample.index];
  return sample;
}

// Locates this block's samples of the `sample_count` that positions [begin, ...) take. Returns how
// many the block has.
template <typename T, typename OffsetT>
__device__ __forceinline__ int LocateThreadBlock(
    const DeformConvParams& params, const SampledTensors<T, OffsetT>& tensors, int64_t begin,
    int64_t sample_count, LocatedSample<OffsetT> (&samples)[kSamplesPerBlock]) {
  const int64_t first = int64_t{blockIdx.x} * kSamplesPerBlock;
  const int count = static_cast<int>(sample_count - first < kSamplesPerBlock ? sample_count - first
                                                                             : kSamplesPerBlock);
  if (threadIdx.x < count) {
    samples[threadIdx.x] = Locate(params, tensors, begin, first + threadIdx.x);
  }
  __syncthreads();
  return count;
}

// Writes a sample's gradients of offset and mask, given the products of the columns' gradient with
// each corner, summed over channels. `index` is that of its mask. With kInPairs, gradients.offset
// begins at a multiple of two numbers' bytes.
template <bool kInPairs, typename OffsetT, typename Int>
__device__ __forceinline__ void WriteGradients(const ImageSample<OffsetT, Int>& sample,
                                               OffsetT mask, int64_t index,
                                               const OffsetT (&products)[kCorners],
                                               const SampledGradients<OffsetT>& gradients) {
  // Where no corner counts every gradient is 0, also beside an infinite mask.
  OffsetT grad_dy = 0, grad_dx = 0, grad_mask = 0;
  if (sample.corner_bits != 0) {
    grad_dy = mask * BilinearDerivativeH(sample.w_fraction, products);
    grad_dx = mask * BilinearDerivativeW(sample.h_fraction, products);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      grad_mask += sample.weights[corner] * products[corner];
    }
  }
  if (gradients.offset != nullptr) {
    if constexpr (kInPairs) {
      const OffsetT pair[] = {grad_dy, grad_dx};
      Store(gradients.offset + 2 * index, pair);
    } else {
      gradients.offset[2 * index] = grad_dy;
      gradients.offset[2 * index + 1] = grad_dx;
    }
  }
  if (gradients.mask != nullptr) gradients.mask[index] = grad_mask;
}

// Where channel `channel` of a sample's tap stands among the columns.
template <typename Params>
__device__ __forceinline__ int64_t ColumnOf(const Params& params, int64_t tap_column, int channel) {
  if (params.groups == 1) return tap_column + channel;
  const int width = static_cast<int>(params.group_in_channels());
  const int group = channel / width;
  return tap_column + group * params.taps() * width + (channel - group * width);
}

// Distance of each corner from the top left one, in pixels.
__device__ __forceinline__ int64_t CornerDistance(const DeformConvParams& params, int corner) {
  return (corner >= kBottomLeft ? params.in_w : 0) + (corner & 1);
}

// Loads the corners of a sample that count; the others are 0. Elements lie `pixel` apart from one
// pixel to the next, `row` from one row.
template <typename T, int kSize>
__device__ __forceinline__ void LoadCorners(const T* top_left, int64_t row, int64_t pixel,
                                            int corner_bits,
                                            Vector<T, kSize> (&corners)[kCorners]) {
  if ((corner_bits & kAllCorners) == kAllCorners) {
    corners[kTopLeft] = Load<T, kSize>(top_left);
    corners[kTopRight] = Load<T, kSize>(top_left + pixel);
    corners[kBottomLeft] = Load<T, kSize>(top_left + row);
    corners[kBottomRight] = Load<T, kSize>(top_left + row + pixel);
    return;
  }
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    corners[corner] = {};
    if (corner_bits >> corner & 1) {
      corners[corner] = Load<T, kSize>(top_left + (corner / 2) * row + (corner % 2) * pixel);
    }
  }
}

// How a thread block is laid over samples and channels: rows of count() lanes. A row works on one
// sample, its lanes side by side on the channels. A row never leaves its warp.
struct Lanes {
  int count_log2;

  __device__ int count() const { return 1 << count_log2; }
  __device__ int lane() const { return threadIdx.x & (count() - 1); }
  __device__ int row() const { return threadIdx.x >> count_log2; }
  __device__ int rows() const { return kThreadsPerBlock >> count_log2; }
};

inline Lanes LanesFor(int64_t channels, int vector_size) {
  const int64_t vectors = CeilDiv<int64_t>(channels, vector_size);
  Lanes lanes{0};
  while ((1 << lanes.count_log2) < kWarp && (int64_t{1} << lanes.count_log2) < vectors) {
    ++lanes.count_log2;
  }
  return lanes;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_SAMPLES_CUH_
