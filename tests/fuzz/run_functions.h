// Ways to run the core's work on threads.

#ifndef DEFORM_CONV_TESTS_FUZZ_RUN_FUNCTIONS_H_
#define DEFORM_CONV_TESTS_FUZZ_RUN_FUNCTIONS_H_

#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace deform_conv::fuzz {

// Threads that wait for work. Running it allocates nothing.
class Pool {
 public:
  using Work = std::function<void(int)>;

  explicit Pool(int helpers) {
    for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { Help(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Calls work(i) for each i in [0, count): work(0) here and the others on the helpers.
  void Run(int count, const Work& work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      count_ = count;
      next_ = 1;
      unfinished_ = count - 1;
    }
    for (int i = 1; i < count; ++i) wake_.notify_one();
    if (count > 0) work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return unfinished_ <= 0; });
  }

 private:
  void Help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || next_ < count_; });
      if (stop_) return;
      const int i = next_++;
      const Work& work = *work_;
      lock.unlock();
      work(i);
      lock.lock();
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const Work* work_ = nullptr;
  int count_ = 0, next_ = 0, unfinished_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// On new threads, one for each i.
inline void RunOnNewThreads(int count, const Pool::Work& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&work, i] { work(i); });
  for (std::thread& thread : threads) thread.join();
}

// One after the other, from the last to the first: no order is promised.
inline void RunBackwards(int count, const Pool::Work& work) {
  for (int i = count - 1; i >= 0; --i) work(i);
}

// As where a thread cannot be started: runs the first `started`, and throws unless that is all.
inline void RunSome(int started, int count, const Pool::Work& work) {
  for (int i = 0; i < count && i < started; ++i) work(i);
  if (started < count) {
    throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
  }
}

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_RUN_FUNCTIONS_H_
