// The CPU threads that a caller grants, and how work is shared among them.

#ifndef DEFORM_CONV_CORE_CPU_THREADS_H_
#define DEFORM_CONV_CORE_CPU_THREADS_H_

#include <algorithm>
#include <cstdint>
#include <functional>

namespace deform_conv {

// The threads to compute on.
struct CpuThreads {
  int count = 1;
  // Calls work(i) for each i in [0, count), side by side. Returns, or throws, only when no call
  // goes on or is still to come. Unused if `count` is 1.
  std::function<void(int count, const std::function<void(int)>& work)> run;
};

// The i-th of `parts` nearly equal parts of [0, total) begins here.
constexpr int64_t PartBegin(int64_t total, int64_t i, int64_t parts) {
  return total / parts * i + std::min(total % parts, i);
}

// Calls work(i) for each i in [0, count), side by side. `work` may throw std::bad_alloc and nothing
// else; this then does too, once all are done.
void RunOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work);

// Calls work(i) for each i in [0, count). Whichever thread is free takes the next.
void ForEachOn(const CpuThreads& threads, int64_t count, const std::function<void(int64_t)>& work);

// Calls work(begin, end) for ranges that cover [0, size), side by side, and for no more than lets
// each have `least`: waking a thread takes some microseconds.
void ForRangesOn(const CpuThreads& threads, int64_t size, int64_t least,
                 const std::function<void(int64_t, int64_t)>& work);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_THREADS_H_
