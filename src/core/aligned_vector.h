// A std::vector whose elements begin on a cache line, so that no vector access straddles two.

#ifndef DEFORM_CONV_CORE_ALIGNED_VECTOR_H_
#define DEFORM_CONV_CORE_ALIGNED_VECTOR_H_

#include <cstddef>
#include <new>
#include <vector>

namespace deform_conv {

constexpr std::size_t kCacheLineBytes = 64;

template <typename T>
struct CacheLineAllocator {
  using value_type = T;

  CacheLineAllocator() = default;
  template <typename U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kCacheLineBytes)));
  }
  void deallocate(T* memory, std::size_t) {
    ::operator delete(memory, std::align_val_t(kCacheLineBytes));
  }

  friend bool operator==(const CacheLineAllocator&, const CacheLineAllocator&) { return true; }
  friend bool operator!=(const CacheLineAllocator&, const CacheLineAllocator&) { return false; }
};

template <typename T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_ALIGNED_VECTOR_H_
