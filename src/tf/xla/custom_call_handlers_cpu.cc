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

ffi::Error Forward(ffi::ThreadPool pool, ffi::Span<const int64_t> words, ffi::AnyBuffer input,
                   ffi::AnyBuffer filters, ffi::AnyBuffer offset, ffi::RemainingArgs masks,
                   ffi::Result<ffi::AnyBuffer> output) {
  CpuBackend backend(std::move(pool));
  return HandleForward(backend, words, input, filters, offset, masks, *output);
}

ffi::Error Backward(ffi::ThreadPool pool, ffi::Span<const int64_t> words, int64_t wanted,
                    ffi::AnyBuffer input, ffi::AnyBuffer filters, ffi::AnyBuffer offset,
                    ffi::AnyBuffer grad_output, ffi::RemainingArgs masks,
                    ffi::RemainingRets results) {
  CpuBackend backend(std::move(pool));
  return HandleBackward(backend, words, wanted, input, filters, offset, grad_output, masks,
                        results);
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward, BindForward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(kBackward, Backward, BindBackward(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kForwardCall, "Host", kForward);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kBackwardCall, "Host", kBackward);

}  // namespace
}  // namespace deform_conv
