#include "core/cpu/threads.h"

#include <atomic>
#include <new>

namespace deform_conv {

// Workspace is allocated by the worker that uses it, so it may throw. An exception must not leave a
// pool's thread: the caller throws it instead. Nothing in a worker throws another kind, since
// the kernels have been selected before, so no std::exception_ptr is
// needed, which would ask for the C++ library of GCC 11.
void RunOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work) {
  if (count <= 1) {
    if (count == 1) work(0);
    return;
  }
  std::atomic<bool> out_of_memory{false};
  threads.run(static_cast<int>(count), [&](int i) {
    try {
      work(i);
    } catch (...) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

void ForEachOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  RunOn(threads, std::min<int64_t>(threads.count, count), [&](int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

void ForRangesOn(const CpuThreads& threads, int64_t size, int64_t least,
                 const std::function<void(int64_t, int64_t)>& work) {
  const int64_t parts = std::clamp<int64_t>(size / least, 1, threads.count);
  RunOn(threads, parts,
        [&](int64_t i) { work(PartBegin(size, i, parts), PartBegin(size, i + 1, parts)); });
}

}  // namespace deform_conv
