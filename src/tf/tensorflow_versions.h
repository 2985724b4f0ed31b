// What differs between the versions of TensorFlow that the library is built for, from 2.17 on.

#ifndef DEFORM_CONV_TF_TENSORFLOW_VERSIONS_H_
#define DEFORM_CONV_TF_TENSORFLOW_VERSIONS_H_

#include "xla/stream_executor/stream.h"

// DEFORM_CONV_TENSORFLOW, which CMake defines, is 221 for TensorFlow 2.21. From 2.20 on, the
// headers do not tell their version.

namespace deform_conv {

#if DEFORM_CONV_TENSORFLOW >= 221
template <typename T>
using DeviceAddress = stream_executor::DeviceAddress<T>;
#else
template <typename T>
using DeviceAddress = stream_executor::DeviceMemory<T>;
#endif

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_TENSORFLOW_VERSIONS_H_
