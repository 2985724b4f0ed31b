#include "core/c_api/deform_conv2d_cpu.h"

#include <algorithm>
#include <new>
#include <string>

#include "core/c_api/params_of.h"
#include "core/c_api/thread_pool.h"
#include "core/cpu/shared_work.h"
#include "core/deform_conv2d.h"

namespace deform_conv {
namespace {

constexpr int kMostThreads = 1024;

CpuThreads SomeThreads(int count) {
  ThreadPool& pool = ThreadPool::Instance();
  return ThreadsOf(&pool, 1 + std::min(pool.Grow(count - 1), count - 1));
}

// Runs `run(params, threads, T())` and keeps its error for the caller to read.
template <typename Run>
const char* Call(const DeformConvProblem& problem, int threads, const Run& run) {
  static thread_local std::string error;
  DeformConvParams params;
  error = ParamsOf(problem, &params);
  if (error.empty() && (threads < 1 || threads > kMostThreads)) {
    error = "threads must be from 1 to " + std::to_string(kMostThreads) + "; received " +
            std::to_string(threads);
  }
  if (!error.empty()) return error.c_str();
  try {
    switch (problem.element_type) {
      case 0:
        run(params, SomeThreads(threads), float());
        return nullptr;
      case 1:
        run(params, SomeThreads(threads), double());
        return nullptr;
    }
    error = "element_type must be 0 or 1; received " + std::to_string(problem.element_type);
  } catch (const std::bad_alloc&) {
    error = "out of memory";
  }
  return error.c_str();
}

template <typename T>
SampledTensors<T> Tensors(const void* input, const void* offset, const void* mask) {
  return {static_cast<const T*>(input), static_cast<const T*>(offset), static_cast<const T*>(mask)};
}

}  // namespace
}  // namespace deform_conv

const char* deform_conv2d_forward_cpu(const DeformConvProblem* problem, const void* input,
                                      const void* filters, const void* offset, const void* mask,
                                      void* output, int threads) {
  return deform_conv::Call(
      *problem, threads, [&](const auto& params, const auto& cpu_threads, auto element) {
        using T = decltype(element);
        deform_conv::DeformConv2DForwardCpu<T>(params, deform_conv::Tensors<T>(input, offset, mask),
                                               static_cast<const T*>(filters), cpu_threads,
                                               static_cast<T*>(output));
      });
}

const char* deform_conv2d_backward_cpu(const DeformConvProblem* problem, const void* input,
                                       const void* filters, const void* offset, const void* mask,
                                       const void* grad_output, void* grad_input,
                                       void* grad_filters, void* grad_offset, void* grad_mask,
                                       int threads) {
  return deform_conv::Call(
      *problem, threads, [&](const auto& params, const auto& cpu_threads, auto element) {
        using T = decltype(element);
        deform_conv::DeformConv2DBackwardCpu<T>(
            params, deform_conv::Tensors<T>(input, offset, mask), static_cast<const T*>(filters),
            static_cast<const T*>(grad_output), cpu_threads, /*add_filters=*/false,
            {{static_cast<T*>(grad_input), static_cast<T*>(grad_offset),
              static_cast<T*>(grad_mask)},
             static_cast<T*>(grad_filters)});
      });
}
