// What fused kernels do with a sample: its offset and mask, its corners on their way from memory,
// and interpolation. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_CORNERS_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_CORNERS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/bilinear.h"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// --- Offset and mask ---

// How far an offset moves a sample, in pixels.
struct Offset {
  float dy, dx;
};

// The offset and the mask of a sample, `index` among those of the batch.
template <typename T>
__device__ __forceinline__ Offset LoadOffset(const SampledTensors<T, float>& tensors,
                                             int64_t index) {
  const float2 pair = __ldg(reinterpret_cast<const float2*>(tensors.offset) + index);
  return {pair.x, pair.y};
}
template <typename T>
__device__ __forceinline__ float LoadMask(const SampledTensors<T, float>& tensors, int64_t index) {
  return tensors.mask == nullptr ? 1.0f : __ldg(tensors.mask + index);
}

// --- Corners ---

// The weights of a sample's corners as they are kept: in the type that they are multiplied in.
template <typename T>
struct alignas(kCorners * sizeof(T)) CornerWeights {
  T of[kCorners];
};

// Distances of corners, in bytes.
struct CornerDistances {
  int32_t pixel;
  int64_t row;

  template <typename T>
  __device__ __forceinline__ static CornerDistances Of(const FusedSizes& sizes) {
    const int32_t pixel = sizes.in_channels * static_cast<int32_t>(sizeof(T));
    return {pixel, int64_t{sizes.in_w} * pixel};
  }
};

// Begins to load a vec16 of each corner, `channel_bytes` into its pixel. `first_pixel` is pixel 0.
// Corners that do not count become 0. With kAllCount all are loaded: the caller knows that they
// count, or drops them later.
template <bool kAllCount>
__device__ __forceinline__ void LoadCorners(const CornerDistances& distances,
                                            const uint8_t* first_pixel, int32_t channel_bytes,
                                            int32_t packed_pixel, uint4 (&corners)[kCorners]) {
  const uint8_t* top =
      first_pixel + channel_bytes + int64_t{packed_pixel >> kCornerBits} * int64_t{distances.pixel};
  const uint8_t* bottom = top + distances.row;
  const uint8_t* from[kCorners] = {top, top + distances.pixel, bottom, bottom + distances.pixel};
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    uint4 vec16 = make_uint4(0, 0, 0, 0);
    if (kAllCount || packed_pixel >> corner & 1) {
      vec16 = __ldg(reinterpret_cast<const uint4*>(from[corner]));
    }
    corners[corner] = vec16;
  }
}

// Sets corners that do not count to 0: what was loaded for them may be infinite.
__device__ __forceinline__ void DropUncounted(int32_t packed_pixel, uint4 (&corners)[kCorners]) {
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    if (!(packed_pixel >> corner & 1)) corners[corner] = make_uint4(0, 0, 0, 0);
  }
}

// Keeps the compiler from recomputing a pointer from its parts.
__device__ __forceinline__ const uint8_t* Pinned(const uint8_t* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// The samples of a vec16 of channels, with kRound rounded as the tensor cores want them. 16-bit
// types are interpolated in their own arithmetic, which is a third of the instructions that
// conversion to floats and back would take; what the samples add up to is in float.
template <typename T, bool kRound = true>
__device__ __forceinline__ uint4 Interpolate(const uint4 (&corners)[kCorners],
                                             const CornerWeights<T>& weights) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      Pair sum;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const Pair weight{weights.of[corner], weights.of[corner]};
        const Pair numbers = reinterpret_cast<const Pair*>(&corners[corner])[i];
        sum = corner == 0 ? __hmul2(weight, numbers) : __hfma2(weight, numbers, sum);
      }
      words[i] = reinterpret_cast<const uint32_t&>(sum);
    } else {
      float sum = 0;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        sum += weights.of[corner] * reinterpret_cast<const float*>(&corners[corner])[i];
      }
      words[i] = __float_as_uint(kRound ? RoundToTf32(sum) : sum);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_CORNERS_CUH_
