// Asynchronous copies from global to shared memory, of compute capability 8.0 (cp.async). For .cu
// files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM80_COPY_ASYNC_CUH_
#define DEFORM_CONV_CORE_CUDA_SM80_COPY_ASYNC_CUH_

#include <cstdint>

namespace deform_conv {
namespace cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies a vec16, or writes 16 zero bytes if `valid` is false; `from` is not read then.
__device__ __forceinline__ void CopyVec16Async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the commit group of the copies begun since the last one.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `kPending` commit groups are unfinished.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM80_COPY_ASYNC_CUH_
