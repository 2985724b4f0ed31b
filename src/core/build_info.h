// What was built, and what of it this machine can run, for people to read.

#ifndef DEFORM_CONV_CORE_BUILD_INFO_H_
#define DEFORM_CONV_CORE_BUILD_INFO_H_

#include "core/export.h"

// C functions, which Python calls with ctypes. The texts live as long as the library.
extern "C" {

// The instruction set that the CPU's inner loops use here: "baseline", "avx2" or "avx512"; or the
// error, if DEFORM_CONV_CPU_ISA names no instruction set.
DEFORM_CONV_EXPORT const char* deform_conv_cpu_instruction_set();

// What the GPU kernels are for, such as "CUDA 13.0 for 75 80"; empty where there are none.
DEFORM_CONV_EXPORT const char* deform_conv_cuda();

// Why this machine's NVIDIA driver cannot run them, or an empty text.
DEFORM_CONV_EXPORT const char* deform_conv_driver_misfit();
}

#endif  // DEFORM_CONV_CORE_BUILD_INFO_H_
