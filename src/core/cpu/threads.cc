#include "core/cpu/threads.h"

#include <atomic>
#include <exception>
#include <vector>

namespace deform_conv {

// Workspace is allocated by the worker that uses it, so it may throw. An exception must not leave a
// pool's thread: it is carried over to the caller's.
void RunOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work) {
  if (count <= 1) {
    if (count == 1) work(0);
    return;
  }
  std::vector<std::exception_ptr> exceptions(count);
  threads.run(static_cast<int>(count), [&](int i) {
    try {
      work(i);
    } catch (...) {
      exceptions[i] = std::current_exception();
    }
  });
  for (const std::exception_ptr& exception : exceptions) {
    if (exception) std::rethrow_exception(exception);
  }
}

void ForEachOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  RunOn(threads, std::min<int64_t>(threads.count, count), [&](int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

}  // namespace deform_conv
