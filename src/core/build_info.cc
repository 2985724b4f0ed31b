#include "core/build_info.h"

#include <stdexcept>
#include <string>

#include "core/cpu/kernels.h"
#ifdef DEFORM_CONV_CUDA_TEXT
#include "core/cuda/errors.h"
#endif

const char* deform_conv_cpu_instruction_set() {
  static const std::string text = [] {
    try {
      return std::string(deform_conv::CpuInstructionSet());
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
  }();
  return text.c_str();
}

#ifdef DEFORM_CONV_CUDA_TEXT

const char* deform_conv_cuda() { return DEFORM_CONV_CUDA_TEXT; }

const char* deform_conv_driver_misfit() {
  static const std::string misfit = deform_conv::cuda::DriverMisfit();
  return misfit.c_str();
}

#else

const char* deform_conv_cuda() { return ""; }

const char* deform_conv_driver_misfit() { return ""; }

#endif
