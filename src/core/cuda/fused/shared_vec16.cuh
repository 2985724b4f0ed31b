// Accesses of 16 bytes to shared memory by its address. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_SHARED_VEC16_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_SHARED_VEC16_CUH_

#include <cstdint>

namespace deform_conv {
namespace cuda {

__device__ __forceinline__ void StoreVec16(uint32_t address, const uint4& vec16) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(vec16.x),
               "r"(vec16.y), "r"(vec16.z), "r"(vec16.w)
               : "memory");
}

__device__ __forceinline__ uint4 LoadVec16(uint32_t address) {
  uint4 vec16;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(vec16.x), "=r"(vec16.y), "=r"(vec16.z), "=r"(vec16.w)
               : "r"(address)
               : "memory");
  return vec16;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_SHARED_VEC16_CUH_
