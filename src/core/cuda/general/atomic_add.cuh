// Additions to memory in an order that is not fixed. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_ATOMIC_ADD_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_ATOMIC_ADD_CUH_

#include <cuda_runtime.h>

#include <type_traits>

namespace deform_conv {
namespace cuda {

// Adds `kSize` neighbouring numbers to memory. The order among threads is not fixed, so sums differ
// by rounding from run to run.
template <int kSize, typename Number>
__device__ __forceinline__ void AtomicAdd(Number* to, const Number (&values)[kSize]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kFours = std::is_same_v<Number, float> && kSize % 4 == 0;
#else
  constexpr bool kFours = false;
#endif
  if constexpr (kFours) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(to + i),
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) atomicAdd(to + i, values[i]);
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_ATOMIC_ADD_CUH_
