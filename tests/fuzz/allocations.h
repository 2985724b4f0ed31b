// Allocations of this program, counted, and made to fail. operator new is replaced.

#ifndef DEFORM_CONV_TESTS_FUZZ_ALLOCATIONS_H_
#define DEFORM_CONV_TESTS_FUZZ_ALLOCATIONS_H_

#include <cstdint>

namespace deform_conv::fuzz {

// What operator new has given and operator delete has not taken back.
int64_t LiveAllocations();

// While there is one of these, allocations are counted, and the `first`-th (from 1) fails; with
// `all_after`, so do all after it. 0: none fails.
class AllocationFailures {
 public:
  AllocationFailures(int64_t first, bool all_after);
  ~AllocationFailures();

  // Calls of operator new so far.
  int64_t count() const;
};

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_ALLOCATIONS_H_
