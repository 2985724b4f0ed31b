#include "core/build_info.h"

#include <string>

#include "core/cpu/kernels.h"
#ifdef DEFORM_CONV_CUDA_TEXT
#include "core/cuda/errors.h"
#endif

const char* deform_conv_cpu_instruction_set() { return deform_conv::CpuInstructionSet(); }

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
