#include "allocations.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace deform_conv::fuzz {
namespace {

std::atomic<int64_t> live{0}, counted{0}, first_failure{0};
std::atomic<bool> counting{false}, all_fail_after{false};

bool Fails() {
  if (!counting) return false;
  const int64_t number = ++counted, first = first_failure;
  return first != 0 && (number == first || (all_fail_after && number > first));
}

}  // namespace

int64_t LiveAllocations() { return live; }

AllocationFailures::AllocationFailures(int64_t first, bool all_after) {
  counted = 0;
  first_failure = first;
  all_fail_after = all_after;
  counting = true;
}

AllocationFailures::~AllocationFailures() { counting = false; }

int64_t AllocationFailures::count() const { return counted; }

// From the C library, which a sanitizer sees; not a byte more than asked for. Null where the
// allocation fails.
static void* Allocate(std::size_t size, std::size_t alignment) noexcept {
  if (Fails()) return nullptr;
  void* memory = nullptr;
  if (alignment == 0) {
    memory = std::malloc(size);
  } else if (posix_memalign(&memory, alignment, size) != 0) {
    return nullptr;
  }
  if (memory != nullptr) ++live;
  return memory;
}

static void* AllocateOrThrow(std::size_t size, std::size_t alignment) {
  void* const memory = Allocate(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

static void Free(void* memory) noexcept {
  if (memory != nullptr) --live;
  std::free(memory);
}

}  // namespace deform_conv::fuzz

using deform_conv::fuzz::Allocate;
using deform_conv::fuzz::AllocateOrThrow;
using deform_conv::fuzz::Free;
using std::align_val_t;
using std::nothrow_t;
using std::size_t;

// All forms: those that are left out would come from a sanitizer's library.
void* operator new(size_t size) { return AllocateOrThrow(size, 0); }
void* operator new[](size_t size) { return AllocateOrThrow(size, 0); }
void* operator new(size_t size, const nothrow_t&) noexcept { return Allocate(size, 0); }
void* operator new[](size_t size, const nothrow_t&) noexcept { return Allocate(size, 0); }
void* operator new(size_t size, align_val_t to) { return AllocateOrThrow(size, size_t(to)); }
void* operator new[](size_t size, align_val_t to) { return AllocateOrThrow(size, size_t(to)); }
void operator delete(void* memory) noexcept { Free(memory); }
void operator delete[](void* memory) noexcept { Free(memory); }
void operator delete(void* memory, const nothrow_t&) noexcept { Free(memory); }
void operator delete[](void* memory, const nothrow_t&) noexcept { Free(memory); }
void operator delete(void* memory, size_t) noexcept { Free(memory); }
void operator delete[](void* memory, size_t) noexcept { Free(memory); }
void operator delete(void* memory, align_val_t) noexcept { Free(memory); }
void operator delete[](void* memory, align_val_t) noexcept { Free(memory); }
void operator delete(void* memory, size_t, align_val_t) noexcept { Free(memory); }
void operator delete[](void* memory, size_t, align_val_t) noexcept { Free(memory); }
