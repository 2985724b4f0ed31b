// Threads, and launching kernels. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_LAUNCH_CUH_
#define DEFORM_CONV_CORE_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "core/integer_math.h"

namespace deform_conv {
namespace cuda {

constexpr int kWarp = 32;
// Threads of a block, unless a kernel says otherwise.
constexpr int kThreadsPerBlock = 256;

inline cudaStream_t StreamOf(void* stream) { return static_cast<cudaStream_t>(stream); }

// Thread blocks for `work` pieces, `per_block` each.
inline unsigned Blocks(int64_t work, int64_t per_block) {
  return static_cast<unsigned>(CeilDiv(work, per_block));
}

// The runtime's text of an error, or a better one.
std::string ErrorText(cudaError_t error);

// What went wrong with the last launch, or an empty string.
inline std::string LaunchError(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string("CUDA kernel ") + kernel + ": " + ErrorText(error);
}

// Lets blocks of `kernel` have so much dynamic shared memory.
template <typename Kernel>
std::string AllowSharedBytes(const char* name, Kernel kernel, int64_t bytes) {
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) return "";
  return std::string("shared memory of CUDA kernel ") + name + ": " + ErrorText(error);
}

// The current GPU. All zeros where there is none.
struct Gpu {
  int major, minor;  // compute capability
  int multiprocessors;
  int multiprocessor_shared_bytes;  // for all thread blocks
  int block_shared_bytes;           // for one, at most
};

inline Gpu CurrentGpu() {
  Gpu gpu;
  int device;
  const auto get = [&](cudaDeviceAttr attribute, int* value) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  if (cudaGetDevice(&device) == cudaSuccess && get(cudaDevAttrComputeCapabilityMajor, &gpu.major) &&
      get(cudaDevAttrComputeCapabilityMinor, &gpu.minor) &&
      get(cudaDevAttrMultiProcessorCount, &gpu.multiprocessors) &&
      get(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &gpu.multiprocessor_shared_bytes) &&
      get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &gpu.block_shared_bytes)) {
    return gpu;
  }
  cudaGetLastError();  // forgets the error
  return {};
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_LAUNCH_CUH_
