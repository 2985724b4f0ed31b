// A patch's samples in shared memory, and the gradients that overwrite them. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_PATCH_SAMPLES_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_PATCH_SAMPLES_CUH_

#include <cstdint>

#include "core/bilinear.h"
#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// A sample and, once it has been worked on, its gradients.
struct alignas(16) PatchSample {
  float h, w, mask;        // fractions and mask; then the gradients of dy, dx and mask
  uint32_t packed_corner;  // see PackedCorner
};

// Writes the samples of all taps.
template <typename T>
__device__ void LocatePatch(const FusedSizes& sizes, const PatchGrid& grid,
                            const SampledTensors<T, float>& tensors, const Patch& patch,
                            PatchSample* samples) {
  const int taps_of_position = static_cast<int>(sizes.by_taps_of_position.value());
  for (int i = threadIdx.x; i < kPatchPositions * sizes.taps; i += kThreadsPerBlock) {
    const int p = static_cast<int>(sizes.by_taps.Divide(i));
    const Position position = patch.At(p);
    PatchSample sample = {};
    if (grid.Includes(sizes, position)) {
      const Tap tap = Tap::Of(sizes, patch.first_g_tap + i - p * sizes.taps);
      const int64_t index = sizes.IndexOf(position) * taps_of_position + tap.g_tap;
      const Offset offset = LoadOffset(tensors, index);
      const auto located = LocateSample<float, int32_t>(
          position.y * sizes.stride_h + tap.h_base, position.x * sizes.stride_w + tap.w_base,
          offset.dy, offset.dx, sizes.in_h, sizes.in_w);
      sample = {located.h_fraction, located.w_fraction, LoadMask(tensors, index),
                PackedCorner::Pack(located.h_low, located.w_low, located.corner_bits)};
    }
    samples[i] = sample;
  }
}

// The weights of the sample's corners, times the mask, and 0 where a corner does not count.
template <typename T>
__device__ __forceinline__ CornerWeights<T> WeightsOf(const PatchSample& sample) {
  float weights[kCorners];
  BilinearWeights(sample.h, sample.w, weights);
  CornerWeights<T> counted;
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    counted.of[corner] =
        static_cast<T>(sample.packed_corner >> corner & 1 ? sample.mask * weights[corner] : 0.0f);
  }
  return counted;
}

// The weight of one corner, without the mask, whether or not it counts.
__device__ __forceinline__ float WeightOfCorner(const PatchSample& sample, int corner) {
  float weights[kCorners], weight = 0;
  BilinearWeights(sample.h, sample.w, weights);
#pragma unroll
  for (int i = 0; i < kCorners; ++i) weight = i == corner ? weights[i] : weight;
  return weight;
}

// The gradients of a sample, to be written over it. `all_products` are those of the columns'
// gradient with each corner.
__device__ __forceinline__ PatchSample GradientsOf(const PatchSample& sample,
                                                   const float (&all_products)[kCorners]) {
  // Those with corners that do not count are 0 times the gradient, which may be infinite.
  float products[kCorners];
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    products[corner] = sample.packed_corner >> corner & 1 ? all_products[corner] : 0.0f;
  }
  // Where no corner counts every gradient is 0, also beside an infinite mask.
  PatchSample gradients = {0, 0, 0, sample.packed_corner};
  if (sample.packed_corner != 0) {
    gradients.h = sample.mask * BilinearDerivativeH(sample.w, products);
    gradients.w = sample.mask * BilinearDerivativeW(sample.h, products);
    float weights[kCorners];
    BilinearWeights(sample.h, sample.w, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      gradients.mask += weights[corner] * products[corner];
    }
  }
  return gradients;
}

// Stores the gradients that have overwritten the samples. With `add`, adds them: other slices of
// the deformable group do so too.
__device__ inline void StoreGradients(const FusedSizes& sizes, const PatchGrid& grid,
                                      const Patch& patch, const PatchSample* samples, bool add,
                                      const SampledGradients<float>& gradients) {
  const int taps_of_position = static_cast<int>(sizes.by_taps_of_position.value());
  for (int i = threadIdx.x; i < kPatchPositions * sizes.taps; i += kThreadsPerBlock) {
    const int p = static_cast<int>(sizes.by_taps.Divide(i));
    const Position position = patch.At(p);
    if (!grid.Includes(sizes, position)) continue;
    const int64_t index =
        sizes.IndexOf(position) * taps_of_position + patch.first_g_tap + (i - p * sizes.taps);
    const PatchSample sample = samples[i];
    if (gradients.offset != nullptr) {
      float2* to = reinterpret_cast<float2*>(gradients.offset) + index;
      const float2 gradient = make_float2(sample.h, sample.w);
      if (add) {
        atomicAdd(to, gradient);
      } else {
        *to = gradient;
      }
    }
    if (gradients.mask != nullptr) {
      if (add) {
        atomicAdd(gradients.mask + index, sample.mask);
      } else {
        gradients.mask[index] = sample.mask;
      }
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_PATCH_SAMPLES_CUH_
