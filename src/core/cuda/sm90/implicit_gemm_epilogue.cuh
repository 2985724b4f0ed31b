// What the implicit GEMM kernel does with finished accumulators: the output. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_EPILOGUE_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_EPILOGUE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/cuda/launch.cuh"

namespace deform_conv {
namespace cuda {

// The index of a row that is no position.
constexpr int32_t kNoPosition = -1;

// Transposes words among the four lanes of a row of accumulators. Before, lane q has word q of four
// vec16s; afterwards all of vec16 q.
__device__ __forceinline__ uint4 TransposeQuad(uint32_t (&words)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      // Of the pair of vec16s, each lane gives away the one that is not its own.
      uint32_t& low = words[i];
      uint32_t& high = words[i + distance];
      const bool upper = q & distance;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      if (upper) {
        low = received;
      } else {
        high = received;
      }
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename T>
__device__ __forceinline__ uint32_t PackPair(float low, float high);
template <>
__device__ __forceinline__ uint32_t PackPair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t PackPair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Writes the accumulators of a wgmma. `output` points to its first channel, and the group has
// `channels` from there on. Lanes 0 to 15 have the position indices of their warp's rows.
template <typename T, int kN>
__device__ __forceinline__ void Epilogue(const float (&accumulators)[kN / 2], int32_t index_of_lane,
                                         int64_t pitch, int channels, T* __restrict__ output) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int32_t position_index = __shfl_sync(0xffffffffu, index_of_lane, lane / 4 + 8 * j);
    T* row = output + int64_t{position_index} * pitch;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kN / 8; i += 4) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int at = 4 * (i + k) + 2 * j;
          words[k] = PackPair<T>(accumulators[at], accumulators[at + 1]);
        }
        const uint4 vec16 = TransposeQuad(words);
        const int channel = 8 * (i + lane % 4);
        if (position_index != kNoPosition && channel < channels) {
          *reinterpret_cast<uint4*>(row + channel) = vec16;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kN / 8; ++i) {
        const int channel = 8 * i + lane % 4 * 2;
        if (position_index != kNoPosition && channel < channels) {
          *reinterpret_cast<float2*>(row + channel) =
              make_float2(accumulators[4 * i + 2 * j], accumulators[4 * i + 2 * j + 1]);
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_EPILOGUE_CUH_
