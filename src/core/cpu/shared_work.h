// Work that the threads of a pool and their caller share: of TensorFlow, XLA or the C interface.

#ifndef DEFORM_CONV_CORE_CPU_SHARED_WORK_H_
#define DEFORM_CONV_CORE_CPU_SHARED_WORK_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "core/cpu/threads.h"

namespace deform_conv {

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

// CpuThreads on a pool that has `threads` threads and the method Schedule(function).
template <typename Pool>
CpuThreads ThreadsOf(Pool* pool, int64_t threads) {
  const auto run = [pool](int count, const std::function<void(int)>& work) {
    const auto shared = std::make_shared<SharedWork>(count, work);
    try {
      for (int i = 1; i < count; ++i) pool->Schedule([shared] { shared->TakePart(); });
    } catch (...) {
      // Out of memory. Those that were scheduled refer to `work`, so this must not return before
      // all is done, and the caller can do it alone.
    }
    shared->TakePart();
    shared->Wait();
  };
  return {static_cast<int>(std::max<int64_t>(threads, 1)), run};
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_SHARED_WORK_H_
