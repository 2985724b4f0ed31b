// What the region scatter kernel adds to the input's gradient in memory. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_REGION_SUMS_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_REGION_SUMS_CUH_

#include <cstdint>

#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/cuda/sm90/patch_lane.cuh"
#include "core/cuda/sm90/patch_samples.cuh"
#include "core/cuda/sm90/scatter_matrix.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {

__device__ __forceinline__ void AddVector(float* to, const float (&values)[4]) {
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
}

// Adds four neighbouring channels of the region to the gradient, unless nothing has been added to
// them, as is so at many pixels at the region's border.
__device__ __forceinline__ void AddUnlessZero(float* to, bool valid, const float (&values)[4]) {
  const bool zero = values[0] == 0 && values[1] == 0 && values[2] == 0 && values[3] == 0;
  if (valid && !zero) AddVector(to, values);
}

// Adds this warpgroup's pixels of the region to grad_input.
template <typename T, int kChannels>
__device__ void AddRegion(const FusedSizes& sizes, const Patch& patch, int warpgroup,
                          const float (&region)[kRegionParts][kChannels / 2],
                          float* __restrict__ grad_input) {
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp, q = lane % 4;
#pragma unroll
  for (int part = 0; part < kRegionParts; ++part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int pixel = (warpgroup * kRegionParts + part) * kWgmmaM + 16 * warp + lane / 4 + 8 * j;
      const int h = patch.region_h + pixel / kRegionSide, w = patch.region_w + pixel % kRegionSide;
      const bool valid = h >= 0 && h < sizes.in_h && w >= 0 && w < sizes.in_w;
      float* to = grad_input +
                  ((int64_t{patch.n} * sizes.in_h + h) * sizes.in_w + w) * sizes.in_channels +
                  patch.channel;
      const auto& sums = region[part];
      if constexpr (sizeof(T) == 2) {
        // Lanes with even and odd q exchange halves of two vectors of 8 channels, so that each
        // has 4 channels side by side.
#pragma unroll
        for (int i = 0; i < kChannels / 8; i += 2) {
          const float* even = &sums[4 * i + 2 * j];
          const float* odd = &sums[4 * (i + 1) + 2 * j];
          const bool is_odd = q % 2 != 0;
          float received[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            received[k] = __shfl_xor_sync(0xffffffffu, is_odd ? even[k] : odd[k], 1);
          }
          const float values[4] = {is_odd ? received[0] : even[0], is_odd ? received[1] : even[1],
                                   is_odd ? odd[0] : received[0], is_odd ? odd[1] : received[1]};
          AddUnlessZero(to + 8 * (i + q % 2) + q / 2 * 4, valid, values);
        }
      } else {
        // By the order of rows in operand B, a thread has 4 channels side by side.
        constexpr int kStride = kChannels / kVec16Size<float> / 8;
#pragma unroll
        for (int i = 0; i < kStride; ++i) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            float values[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) values[c] = sums[4 * (i + c * kStride) + 2 * j + k];
            AddUnlessZero(to + (8 * i + 2 * q + k) * 4, valid, values);
          }
        }
      }
    }
  }
}

// Adds what corners outside of the region get to grad_input. `grads(j)` is the lane's vec16 j of
// the columns' gradient.
template <typename T, int kChannels, typename Grads>
__device__ __forceinline__ void AddOutside(const FusedSizes& sizes, const Patch& patch,
                                           const PatchSample* sample, const Grads& grads,
                                           float* __restrict__ grad_input) {
  using Mine = PatchLane<T, kChannels>;
  const PackedCorner top_left = PackedCorner::Unpack(sample->packed_corner);
  if (patch.RegionHoldsAll(top_left)) return;
  const int top_left_pixel = patch.first_pixel + top_left.h * sizes.in_w + top_left.w;
  // Rare, so registers count more than instructions.
#pragma unroll 1
  for (int corner_bits = top_left.corner_bits & ~patch.CornersInRegion(top_left); corner_bits != 0;
       corner_bits &= corner_bits - 1) {
    const int corner = __ffs(corner_bits) - 1;
    const float weight = WeightOfCorner(*sample, corner) * sample->mask;
    const int64_t pixel = top_left_pixel + (corner >= kBottomLeft ? sizes.in_w : 0) + (corner & 1);
    float* first =
        grad_input + pixel * sizes.in_channels + patch.channel + Mine::First() * kVec16Size<T>;
#pragma unroll 1
    for (int j = 0; j < Mine::kVec16s; ++j) {
      const uint4 vec16 = grads(j);
      float* to = first + Mine::Distance(j) * kVec16Size<T>;
      const auto& vector = reinterpret_cast<const Vector<T, kVec16Size<T>>&>(vec16);
#pragma unroll
      for (int i = 0; i < kVec16Size<T>; i += 4) {
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = weight * static_cast<float>(vector.elements[i + k]);
        AddVector(to + i, values);
      }
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_REGION_SUMS_CUH_
