#include "core/cuda/general/atomic_add.cuh"
#include "core/cuda/general/kernels.h"
#include "core/cuda/general/samples.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {
namespace {

// With `replace`, writes each sample over the gradient of its column once that has been read.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock)
    Col2ImAtomicKernel(DeformConvParams params, SampledTensors<T, ComputeType<T>> tensors,
                       int64_t begin, int64_t sample_count, Lanes lanes, bool replace,
                       T* __restrict__ columns, SampledGradients<ComputeType<T>> gradients) {
  __shared__ LocatedSample<ComputeType<T>> samples[kSamplesPerBlock];
  const int count = LocateThreadBlock(params, tensors, begin, sample_count, samples);

  const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
  const int channels = static_cast<int>(params.deform_group_channels());
  // Every thread makes every round, so that whole warps take part in the shuffles.
  for (int round = 0; round < count; round += lanes.rows()) {
    const int s = round + lanes.row();
    const bool active = s < count;
    const LocatedSample<ComputeType<T>>& sample = samples[active ? s : 0];
    const int corner_bits = sample.corner_bits;
    // What lies outside is 0, whatever the mask.
    const ComputeType<T> mask = corner_bits != 0 ? sample.mask : ComputeType<T>(0);
    const int64_t pixel = sample.top_left * params.in_channels + sample.channel;
    ComputeType<T> products[kCorners] = {};
    const int channels_end = active && (corner_bits != 0 || replace) ? channels : 0;
    for (int c = lanes.lane() * kSize; c < channels_end; c += lanes.count() * kSize) {
      T* column = columns + ColumnOf(params, sample.column, sample.channel + c);
      const Vector<T, kSize> grad = Load<T, kSize>(column);
      ComputeType<T> grads[kSize], sums[kSize] = {};
#pragma unroll
      for (int i = 0; i < kSize; ++i) grads[i] = static_cast<ComputeType<T>>(grad.elements[i]);
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        if (!(corner_bits >> corner & 1)) continue;
        const int64_t at = pixel + CornerDistance(params, corner) * params.in_channels + c;
        const ComputeType<T> weight = sample.weights[corner];
        if (want_products || replace) {
          const Vector<T, kSize> values = Load<T, kSize>(tensors.input + at);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const ComputeType<T> value = static_cast<ComputeType<T>>(values.elements[i]);
            products[corner] += grads[i] * value;
            sums[i] += weight * value;
          }
        }
        if (gradients.input != nullptr) {
          ComputeType<T> terms[kSize];
#pragma unroll
          for (int i = 0; i < kSize; ++i) terms[i] = weight * (mask * grads[i]);
          AtomicAdd<kSize>(gradients.input + at, terms);
        }
      }
      if (replace) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[i] *= mask;
        Store(column, sums);
      }
    }
    if (!want_products) continue;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      for (int distance = lanes.count() / 2; distance > 0; distance /= 2) {
        products[corner] += __shfl_xor_sync(0xffffffffu, products[corner], distance);
      }
    }
    if (active && lanes.lane() == 0) {
      WriteGradients<false>(sample, sample.mask, sample.index, products, gradients);
    }
  }
}

}  // namespace

template <typename T>
std::string Col2ImAtomic(const DeformConvParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, bool replace, T* columns,
                         const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  constexpr int kSize = kVec16Size<T>;
  const int64_t samples = (end - begin) * params.mask_channels();
  if (samples == 0) return "";
  const bool vectorize = CanVectorize<T>(params) && IsAligned(tensors.input) &&
                         IsAligned(columns) && IsAligned(gradients.input);
  const auto kernel =
      vectorize ? Col2ImAtomicKernel<Element, kSize> : Col2ImAtomicKernel<Element, 1>;
  return LaunchKernel("Col2ImAtomicKernel", kernel, Blocks(samples, kSamplesPerBlock),
                      kThreadsPerBlock, 0, stream, params, AsCuda(tensors), begin, samples,
                      LanesFor(params.deform_group_channels(), vectorize ? kSize : 1), replace,
                      AsCuda(columns), gradients);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                                 \
  template std::string Col2ImAtomic<T>(const DeformConvParams&,                                    \
                                       const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, \
                                       bool, T*, const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
