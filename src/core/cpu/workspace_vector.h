// A std::vector for workspace: its elements begin on a cache line, so that no vector access
// straddles two, and resize() leaves new ones as they are in memory.

#ifndef DEFORM_CONV_CORE_CPU_WORKSPACE_VECTOR_H_
#define DEFORM_CONV_CORE_CPU_WORKSPACE_VECTOR_H_

#include <cstddef>
#include <new>
#include <utility>
#include <vector>

namespace deform_conv {

constexpr std::size_t kCacheLineBytes = 64;

template <typename T>
struct WorkspaceAllocator {
  using value_type = T;

  WorkspaceAllocator() = default;
  template <typename U>
  WorkspaceAllocator(const WorkspaceAllocator<U>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(kCacheLineBytes)));
  }
  void deallocate(T* memory, std::size_t) {
    ::operator delete(memory, std::align_val_t(kCacheLineBytes));
  }

  template <typename U>
  void construct(U* element) {
    ::new (static_cast<void*>(element)) U;
  }
  template <typename U, typename... Arguments>
  void construct(U* element, Arguments&&... arguments) {
    ::new (static_cast<void*>(element)) U(std::forward<Arguments>(arguments)...);
  }

  friend bool operator==(const WorkspaceAllocator&, const WorkspaceAllocator&) { return true; }
  friend bool operator!=(const WorkspaceAllocator&, const WorkspaceAllocator&) { return false; }
};

template <typename T>
using WorkspaceVector = std::vector<T, WorkspaceAllocator<T>>;

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_WORKSPACE_VECTOR_H_
