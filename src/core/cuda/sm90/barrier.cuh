// Barriers (mbarrier), and the state of a pipeline of stages, of compute capability 9.0. For .cu
// files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_BARRIER_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_BARRIER_CUH_

#include <cstdint>

#include "core/cuda/launch.cuh"

namespace deform_conv {
namespace cuda {

// A barrier is 8 bytes in shared memory. Some threads arrive at it, others wait for them.
constexpr int kBarrierBytes = 8;

// A phase of the barrier ends with the `arrivals`th arrival. One thread initializes it before all
// others use it.
__device__ __forceinline__ void InitializeBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void ArriveAtBarrier(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// By all threads of a warp: one arrival, once all have come.
__device__ __forceinline__ void ArriveAsWarp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) ArriveAtBarrier(barrier);
}

// Arrives, and lets the phase end only when so many bytes have been copied too.
__device__ __forceinline__ void ArriveAndExpectBytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Begins to copy from memory to shared memory, whole vec16s, for a barrier that expects them.
// Tensor cores may read them once the phase has ended, without a fence.
__device__ __forceinline__ void CopyBulkAsync(uint32_t to, const void* from, uint32_t bytes,
                                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}

// Waits until the phase of this parity has ended. The first phase has parity 0. On a fresh barrier,
// parity 1 counts as ended.
__device__ __forceinline__ void WaitAtBarrier(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The stage of the current K block, and the parity of the number of its earlier uses.
template <int kStages>
struct PipelineState {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_BARRIER_CUH_
