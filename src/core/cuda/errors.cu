#include <cuda_runtime.h>

#include "core/cuda/errors.h"
#include "core/cuda/launch.cuh"

namespace deform_conv {
namespace cuda {
namespace {

// As NVIDIA writes them: 13020 is 13.2.
std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Whether it is no error of the call that returned it, but of a kernel before, anybody's. The GPU
// does nothing more for this process then, and every call returns it.
bool IsOfWorkBefore(cudaError_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
      return true;
    default:
      return false;
  }
}

}  // namespace

std::string DriverMisfit() {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "there is no NVIDIA driver here";
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "the GPU kernels of deform_conv were built with CUDA " + VersionText(CUDART_VERSION) +
         ", which needs an NVIDIA driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
         ".0 or newer; this one is for CUDA " + VersionText(driver) +
         ". Update the driver, or compute on the CPU";
}

std::string ErrorText(cudaError_t error) {
  if (error == cudaErrorInsufficientDriver) {
    const std::string misfit = DriverMisfit();
    if (!misfit.empty()) return misfit;
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    const Gpu gpu = CurrentGpu();
    return "deform_conv was not built for the compute capability of this GPU, " +
           std::to_string(gpu.major) + "." + std::to_string(gpu.minor);
  }
  const std::string text = cudaGetErrorString(error);
  return IsOfWorkBefore(error) ? text + ", in work that the GPU was given before" : text;
}

}  // namespace cuda
}  // namespace deform_conv
