// Why a kernel for compute capability 9.0 cannot serve a call, as far as all of them agree. For .cu
// files only.
//
// Each function returns an empty string, or a clause such as "the GPU is ...".

#ifndef DEFORM_CONV_CORE_CUDA_SM90_LIMITS_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_LIMITS_CUH_

#include <cstdint>
#include <string>

#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

constexpr int kMostSharedBytes = 227 << 10;  // of a thread block
constexpr char kTooManyTaps[] = "the taps need more shared memory than a thread block has";

inline std::string Sm90Misfit() {
  const Gpu gpu = CurrentGpu();
  if (gpu.major == 9) return "";
  return "the GPU has compute capability " + std::to_string(gpu.major) + "." +
         std::to_string(gpu.minor) + ", not 9.0";
}

template <typename T>
std::string TensorsMisfit(const SampledTensors<T, ComputeType<T>>& tensors) {
  const bool aligned =
      IsAligned(tensors.input) && reinterpret_cast<uintptr_t>(tensors.offset) % sizeof(float2) == 0;
  return aligned ? "" : "the input is not aligned to 16 bytes or the offset is not aligned to 8";
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_LIMITS_CUH_
