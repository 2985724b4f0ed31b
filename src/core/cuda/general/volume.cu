#include "core/cuda/general/atomic_add.cuh"
#include "core/cuda/general/samples.cuh"
#include "core/cuda/general/volume.h"
#include "core/cuda/general/volume_samples.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {
namespace {

// At least so many thread blocks: with more, some kernels would keep registers in memory.
constexpr int kBlocksPerMultiprocessor = 4;

// Locates this block's samples of the `sample_count` that positions [begin, ...) take. Returns how
// many the block has.
template <typename T, typename OffsetT>
__device__ __forceinline__ int LocateTaps(
    const DeformConv3DParams& params, const SampledTensors<T, OffsetT>& tensors, int64_t begin,
    int64_t sample_count, LocatedVolumeSample<OffsetT> (&samples)[kSamplesPerBlock]) {
  const int64_t first = int64_t{blockIdx.x} * kSamplesPerBlock;
  const int count = static_cast<int>(sample_count - first < kSamplesPerBlock ? sample_count - first
                                                                             : kSamplesPerBlock);
  if (threadIdx.x < count) {
    samples[threadIdx.x] = LocateTap(params, tensors, begin, first + threadIdx.x);
  }
  __syncthreads();
  return count;
}

// Where a corner's channel `channel` is in the input, in elements.
template <typename OffsetT>
__device__ __forceinline__ int64_t CornerAt(const DeformConv3DParams& params,
                                            const LocatedVolumeSample<OffsetT>& sample, int plane,
                                            int corner, int channel) {
  return VoxelOf(params, sample, plane, corner) * params.in_channels + sample.channel + channel;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerMultiprocessor)
    VolumeIm2ColKernel(DeformConv3DParams params, SampledTensors<T, ComputeType<T>> tensors,
                       int64_t begin, int64_t sample_count, Lanes lanes, T* __restrict__ columns) {
  __shared__ LocatedVolumeSample<ComputeType<T>> samples[kSamplesPerBlock];
  const int count = LocateTaps(params, tensors, begin, sample_count, samples);

  const int channels = static_cast<int>(params.deform_group_channels());
  for (int s = lanes.row(); s < count; s += lanes.rows()) {
    const LocatedVolumeSample<ComputeType<T>>& sample = samples[s];
    for (int c = lanes.lane() * kSize; c < channels; c += lanes.count() * kSize) {
      ComputeType<T> sums[kSize] = {};
#pragma unroll
      for (int plane = 0; plane < kCornerPlanes; ++plane) {
#pragma unroll
        for (int corner = 0; corner < kCorners; ++corner) {
          if (!Counts(sample.corner_bits, plane, corner)) continue;
          const Vector<T, kSize> values =
              Load<T, kSize>(tensors.input + CornerAt(params, sample, plane, corner, c));
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            sums[i] +=
                sample.weights[plane][corner] * static_cast<ComputeType<T>>(values.elements[i]);
          }
        }
      }
      // Times the mask at last: a corner's product with it may overflow where the sample's does
      // not.
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] *= sample.mask;
      Store(columns + ColumnOf(params, sample.column, sample.channel + c), sums);
    }
  }
}

// Writes a sample's gradients of offset and mask, given the products of the columns' gradient with
// each corner, summed over channels.
template <typename OffsetT>
__device__ __forceinline__ void WriteVolumeGradients(
    const LocatedVolumeSample<OffsetT>& sample, const OffsetT (&products)[kCornerPlanes][kCorners],
    const SampledGradients<OffsetT>& gradients) {
  if (gradients.offset != nullptr) {
    OffsetT derivatives[kSpatialAxes];
    TrilinearDerivatives(sample.fractions, products, derivatives);
#pragma unroll
    for (int axis = 0; axis < kSpatialAxes; ++axis) {
      gradients.offset[kSpatialAxes * sample.index + axis] = sample.mask * derivatives[axis];
    }
  }
  if (gradients.mask != nullptr) {
    OffsetT sum = 0;
#pragma unroll
    for (int plane = 0; plane < kCornerPlanes; ++plane) {
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        sum += sample.weights[plane][corner] * products[plane][corner];
      }
    }
    gradients.mask[sample.index] = sum;
  }
}

// With `replace`, writes each sample over the gradient of its column once that has been read.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerMultiprocessor)
    VolumeCol2ImKernel(DeformConv3DParams params, SampledTensors<T, ComputeType<T>> tensors,
                       int64_t begin, int64_t sample_count, Lanes lanes, bool replace,
                       T* __restrict__ columns, SampledGradients<ComputeType<T>> gradients) {
  __shared__ LocatedVolumeSample<ComputeType<T>> samples[kSamplesPerBlock];
  const int count = LocateTaps(params, tensors, begin, sample_count, samples);

  const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
  const int channels = static_cast<int>(params.deform_group_channels());
  // Every thread makes every round, so that whole warps take part in the shuffles.
  for (int round = 0; round < count; round += lanes.rows()) {
    const int s = round + lanes.row();
    const bool active = s < count;
    const LocatedVolumeSample<ComputeType<T>>& sample = samples[active ? s : 0];
    const int corner_bits = sample.corner_bits;
    ComputeType<T> products[kCornerPlanes][kCorners] = {};
    const int channels_end = active && (corner_bits != 0 || replace) ? channels : 0;
    for (int c = lanes.lane() * kSize; c < channels_end; c += lanes.count() * kSize) {
      T* column = columns + ColumnOf(params, sample.column, sample.channel + c);
      const Vector<T, kSize> grad = Load<T, kSize>(column);
      ComputeType<T> grads[kSize], sums[kSize] = {};
#pragma unroll
      for (int i = 0; i < kSize; ++i) grads[i] = static_cast<ComputeType<T>>(grad.elements[i]);
#pragma unroll
      for (int plane = 0; plane < kCornerPlanes; ++plane) {
#pragma unroll
        for (int corner = 0; corner < kCorners; ++corner) {
          if (!Counts(corner_bits, plane, corner)) continue;
          const int64_t at = CornerAt(params, sample, plane, corner, c);
          const ComputeType<T> weight = sample.weights[plane][corner];
          if (want_products || replace) {
            const Vector<T, kSize> values = Load<T, kSize>(tensors.input + at);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
              const ComputeType<T> value = static_cast<ComputeType<T>>(values.elements[i]);
              products[plane][corner] += grads[i] * value;
              sums[i] += weight * value;
            }
          }
          if (gradients.input != nullptr) {
            ComputeType<T> terms[kSize];
#pragma unroll
            for (int i = 0; i < kSize; ++i) terms[i] = weight * (sample.mask * grads[i]);
            AtomicAdd<kSize>(gradients.input + at, terms);
          }
        }
      }
      if (replace) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[i] *= sample.mask;
        Store(column, sums);
      }
    }
    if (!want_products) continue;
#pragma unroll
    for (int plane = 0; plane < kCornerPlanes; ++plane) {
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        for (int distance = lanes.count() / 2; distance > 0; distance /= 2) {
          products[plane][corner] +=
              __shfl_xor_sync(0xffffffffu, products[plane][corner], distance);
        }
      }
    }
    if (active && lanes.lane() == 0) WriteVolumeGradients(sample, products, gradients);
  }
}

}  // namespace

template <typename T>
std::string VolumeIm2Col(const DeformConv3DParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, T* columns, void* stream) {
  using Element = CudaType<T>;
  constexpr int kSize = kVec16Size<T>;
  const int64_t samples = (end - begin) * params.mask_channels();
  if (samples == 0) return "";
  const bool vectorize =
      CanVectorize<T>(params.planar()) && IsAligned(tensors.input) && IsAligned(columns);
  const auto kernel =
      vectorize ? VolumeIm2ColKernel<Element, kSize> : VolumeIm2ColKernel<Element, 1>;
  return LaunchKernel("VolumeIm2ColKernel", kernel, Blocks(samples, kSamplesPerBlock),
                      kThreadsPerBlock, 0, stream, params, AsCuda(tensors), begin, samples,
                      LanesFor(params.deform_group_channels(), vectorize ? kSize : 1),
                      AsCuda(columns));
}

template <typename T>
std::string VolumeCol2Im(const DeformConv3DParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, bool replace, T* columns,
                         const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  constexpr int kSize = kVec16Size<T>;
  const int64_t samples = (end - begin) * params.mask_channels();
  if (samples == 0) return "";
  const bool vectorize = CanVectorize<T>(params.planar()) && IsAligned(tensors.input) &&
                         IsAligned(columns) && IsAligned(gradients.input);
  const auto kernel =
      vectorize ? VolumeCol2ImKernel<Element, kSize> : VolumeCol2ImKernel<Element, 1>;
  return LaunchKernel("VolumeCol2ImKernel", kernel, Blocks(samples, kSamplesPerBlock),
                      kThreadsPerBlock, 0, stream, params, AsCuda(tensors), begin, samples,
                      LanesFor(params.deform_group_channels(), vectorize ? kSize : 1), replace,
                      AsCuda(columns), gradients);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                                 \
  template std::string VolumeIm2Col<T>(const DeformConv3DParams&,                                  \
                                       const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, \
                                       T*, void*);                                                 \
  template std::string VolumeCol2Im<T>(const DeformConv3DParams&,                                  \
                                       const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, \
                                       bool, T*, const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
