// Threads, and launching kernels. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_LAUNCH_CUH_
#define DEFORM_CONV_CORE_CUDA_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "core/integer_math.h"
#include "core/return_if_error.h"

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

constexpr char kCudaKernel[] = "CUDA kernel ";

// What went wrong with `what` and `name`, by what a call of the runtime returned, or an empty
// string. The runtime forgets an error then. It keeps the last one of a host thread for whoever
// asks next.
inline std::string ErrorOf(cudaError_t error, const char* what, const char* name = "") {
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(what) + name + ": " + ErrorText(error);
}

template <typename T>
struct NotDeduced {
  using type = T;
};

// Launches a kernel. Returns an empty string, or what went wrong with this launch.
template <typename... Parameters>
std::string LaunchKernel(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
                         int64_t shared_bytes, void* stream,
                         typename NotDeduced<Parameters>::type... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return ErrorOf(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, threads, pointers,
                                  static_cast<size_t>(shared_bytes), StreamOf(stream)),
                 kCudaKernel, name);
}

// As LaunchKernel(), but the kernel may begin before the one before it on the stream has ended,
// once all thread blocks of that have called LetNextKernelBegin(). What depends on that one comes
// after WaitForKernelBefore(). For compute capability 9.0 and up.
template <typename... Parameters>
std::string LaunchEarly(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
                        int64_t shared_bytes, void* stream,
                        typename NotDeduced<Parameters>::type... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = StreamOf(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  return ErrorOf(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers),
                 kCudaKernel, name);
}
__device__ __forceinline__ void LetNextKernelBegin() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}
__device__ __forceinline__ void WaitForKernelBefore() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

// Lets blocks of `kernel` have so much dynamic shared memory. Sets the most that the GPU has,
// whatever is asked for: threads of the host that need different sizes would undo each other's.
template <typename Kernel>
std::string AllowSharedBytes(const char* name, Kernel kernel, int64_t bytes) {
  const auto error_of = [name](cudaError_t error) {
    return ErrorOf(error, "shared memory of CUDA kernel ", name);
  };
  cudaFuncAttributes attributes;
  DEFORM_CONV_RETURN_IF_ERROR(error_of(cudaFuncGetAttributes(&attributes, kernel)));
  if (bytes <= attributes.maxDynamicSharedSizeBytes) return "";
  int device, most;
  DEFORM_CONV_RETURN_IF_ERROR(error_of(cudaGetDevice(&device)));
  DEFORM_CONV_RETURN_IF_ERROR(
      error_of(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
  most -= static_cast<int>(attributes.sharedSizeBytes);
  if (bytes > most) return error_of(cudaErrorInvalidValue);
  return error_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
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
