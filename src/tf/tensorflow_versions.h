// What differs between the versions of TensorFlow that the library is built for, from 2.17 on.

#ifndef DEFORM_CONV_TF_TENSORFLOW_VERSIONS_H_
#define DEFORM_CONV_TF_TENSORFLOW_VERSIONS_H_

#include <cstdint>
#include <optional>

#include "tensorflow/core/platform/threadpool.h"

// DEFORM_CONV_TENSORFLOW, which CMake defines, is 221 for TensorFlow 2.21. From 2.20 on, the
// headers do not tell their version.

namespace deform_conv {

using ThreadPool = tensorflow::thread::ThreadPool;

// How ThreadPool::ParallelFor() shares work out: in blocks of so many units, or by what a unit
// costs.
#if DEFORM_CONV_TENSORFLOW >= 220
inline ThreadPool::SchedulingParams BlocksOf(int64_t units) {
  return ThreadPool::SchedulingParams::Fixed(units);
}
inline ThreadPool::SchedulingParams ByCost(int64_t cycles_per_unit) {
  return ThreadPool::SchedulingParams::Adaptive(cycles_per_unit);
}
#else
inline ThreadPool::SchedulingParams BlocksOf(int64_t units) {
  return ThreadPool::SchedulingParams(ThreadPool::SchedulingStrategy::kFixedBlockSize, std::nullopt,
                                      units);
}
inline ThreadPool::SchedulingParams ByCost(int64_t cycles_per_unit) {
  return ThreadPool::SchedulingParams(ThreadPool::SchedulingStrategy::kAdaptive, cycles_per_unit,
                                      std::nullopt);
}
#endif

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_TENSORFLOW_VERSIONS_H_
