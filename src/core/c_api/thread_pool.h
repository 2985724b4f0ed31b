// Threads that wait for work.

#ifndef DEFORM_CONV_CORE_C_API_THREAD_POOL_H_
#define DEFORM_CONV_CORE_C_API_THREAD_POOL_H_

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace deform_conv {

class ThreadPool {
 public:
  // The one of this process. It is never destroyed, since its threads do not end. A process that
  // was forked has none of them, and gets a pool of its own.
  static ThreadPool& Instance() {
    static std::atomic<ThreadPool*> pool{nullptr};
    ThreadPool* found = pool;
    while (found == nullptr || found->process_ != getpid()) {
      ThreadPool* made = new ThreadPool;
      if (pool.compare_exchange_strong(found, made)) return *made;
      delete made;  // another thread was first
    }
    return *found;
  }

  // Starts threads until there are so many, or the system refuses; returns how many there are.
  int Grow(int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; threads_ < threads; ++threads_) std::thread([this] { Work(); }).detach();
    } catch (const std::system_error&) {
      // Fewer do the same work.
    }
    return threads_;
  }

  // Some thread will call `function`.
  void Schedule(std::function<void()> function) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(std::move(function));
    }
    has_work_.notify_one();
  }

 private:
  ThreadPool() = default;

  void Work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      has_work_.wait(lock, [this] { return !waiting_.empty(); });
      const std::function<void()> function = std::move(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      function();
    }
  }

  std::mutex mutex_;
  std::condition_variable has_work_;
  std::deque<std::function<void()>> waiting_;
  int threads_ = 0;
  const pid_t process_ = getpid();
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_C_API_THREAD_POOL_H_
