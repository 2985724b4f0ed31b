// What keeps the kernels from running on this machine.

#ifndef DEFORM_CONV_CORE_CUDA_ERRORS_H_
#define DEFORM_CONV_CORE_CUDA_ERRORS_H_

#include <string>

namespace deform_conv {
namespace cuda {

// Why the machine's driver cannot run the kernels, or an empty string.
std::string DriverMisfit();

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_ERRORS_H_
