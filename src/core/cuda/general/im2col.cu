#include "core/cuda/general/kernels.h"
#include "core/cuda/general/samples.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {
namespace {

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock)
    Im2ColKernel(DeformConvParams params, SampledTensors<T, ComputeType<T>> tensors, int64_t begin,
                 int64_t sample_count, Lanes lanes, T* __restrict__ columns) {
  __shared__ LocatedSample<ComputeType<T>> samples[kSamplesPerBlock];
  const int count = LocateThreadBlock(params, tensors, begin, sample_count, samples);

  const int channels = static_cast<int>(params.deform_group_channels());
  for (int s = lanes.row(); s < count; s += lanes.rows()) {
    const LocatedSample<ComputeType<T>>& sample = samples[s];
    const int corner_bits = sample.corner_bits;
    // What lies outside is 0, whatever the mask.
    const ComputeType<T> mask = corner_bits != 0 ? sample.mask : ComputeType<T>(0);
    const T* pixel = tensors.input + sample.top_left * params.in_channels + sample.channel;
    for (int c = lanes.lane() * kSize; c < channels; c += lanes.count() * kSize) {
      ComputeType<T> sums[kSize] = {};
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        if (!(corner_bits >> corner & 1)) continue;
        const Vector<T, kSize> values =
            Load<T, kSize>(pixel + CornerDistance(params, corner) * params.in_channels + c);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sums[i] += sample.weights[corner] * static_cast<ComputeType<T>>(values.elements[i]);
        }
      }
      // Times the mask at last: a corner's product with it may overflow where the sample's does
      // not.
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] *= mask;
      Store(columns + ColumnOf(params, sample.column, sample.channel + c), sums);
    }
  }
}

}  // namespace

template <typename T>
std::string Im2Col(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   int64_t begin, int64_t end, T* columns, void* stream) {
  using Element = CudaType<T>;
  constexpr int kSize = kVec16Size<T>;
  const int64_t samples = (end - begin) * params.mask_channels();
  if (samples == 0) return "";
  const bool vectorize = CanVectorize<T>(params) && IsAligned(tensors.input) && IsAligned(columns);
  const auto kernel = vectorize ? Im2ColKernel<Element, kSize> : Im2ColKernel<Element, 1>;
  return LaunchKernel("Im2ColKernel", kernel, Blocks(samples, kSamplesPerBlock), kThreadsPerBlock,
                      0, stream, params, AsCuda(tensors), begin, samples,
                      LanesFor(params.deform_group_channels(), vectorize ? kSize : 1),
                      AsCuda(columns));
}

#define DEFORM_CONV_INSTANTIATE(T)                                                               \
  template std::string Im2Col<T>(const DeformConvParams&,                                        \
                                 const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, T*, \
                                 void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
