// The custom calls on the CPU, on XLA's threads.

#include <utility>

#include "core/cpu/shared_work.h"
#include "tf/xla/custom_call_handlers.h"

namespace deform_conv {
namespace {

class CpuBackend {
 public:
  static constexpr bool kHas16Bit = false;

  explicit CpuBackend(ffi::ThreadPool pool) : pool_(std::move(pool)) {}

  template <typename T>
  std::string Forward(const DeformConvParams& params, const SampledTensors<T>& tensors,
                      const T* filters, T* output) {
    DeformConv2DForwardCpu(params, tensors, filters, Threads(), output);
    return "";
  }

  template <typename T>
  std::string Backward(const DeformConvParams& params, const SampledTensors<T>& tensors,
                       const T* filters, const T* grad_output,
                       const DeformConvGradients<T>& gradients) {
    DeformConv2DBackwardCpu(params, tensors, filters, grad_output, Threads(),
                            /*add_filters=*/false, gradients);
    return "";
  }

 private:
  CpuThreads Threads() { return ThreadsOf(&pool_, pool_.num_threads()); }

  ffi::ThreadPool pool_;
};

template <Operation kOperation>
ffi::Error Forward(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  CpuBackend backend(std::move(pool));
  return HandleForward(backend, CustomCall(kOperation, attributes, operands, results));
}

template <Operation kOperation>
ffi::Error Backward(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  CpuBackend backend(std::move(pool));
  return HandleBackward(backend, CustomCall(kOperation, attributes, operands, results));
}

auto BindDevice() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

DEFORM_CONV_REGISTER_CALLS(Convolve, "Host", BindDevice());
DEFORM_CONV_REGISTER_CALLS(Aggregate, "Host", BindDevice());

}  // namespace
}  // namespace deform_conv
