// The custom calls on the CPU, on XLA's threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "tf/xla/custom_call_handlers.h"

namespace deform_conv {
namespace {

// Work that is handed out by number. Any free thread takes the next number, and so does the caller.
// So the caller never waits for a thread that is itself waiting: XLA runs calls on the threads that
// this work is scheduled on.
class SharedWork {
 public:
  SharedWork(int count, const std::function<void(int)>& work) : count_(count), work_(work) {}

  // Works until every number is taken. `work` is not touched once all are done.
  void TakePart() {
    for (int i = next_++; i < count_; i = next_++) {
      work_(i);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (++done_ == count_) all_done_.notify_all();
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == count_; });
  }

 private:
  const int count_;
  const std::function<void(int)>& work_;
  std::atomic<int> next_{0};
  int done_ = 0;
  std::mutex mutex_;
  std::condition_variable all_done_;
};

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
  CpuThreads Threads() {
    const auto run = [this](int count, const std::function<void(int)>& work) {
      const auto shared = std::make_shared<SharedWork>(count, work);
      for (int i = 1; i < count; ++i) pool_.Schedule([shared] { shared->TakePart(); });
      shared->TakePart();
      shared->Wait();
    };
    return {static_cast<int>(std::max<int64_t>(pool_.num_threads(), 1)), run};
  }

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
