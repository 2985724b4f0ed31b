// A tensor in memory of exactly its size, between zones that nobody may touch.

#ifndef DEFORM_CONV_TESTS_FUZZ_BUFFER_H_
#define DEFORM_CONV_TESTS_FUZZ_BUFFER_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "driver.h"
#include "elements.h"
#include "random.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) (static_cast<void>(begin), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) ASAN_POISON_MEMORY_REGION(begin, size)
#endif

namespace deform_conv::fuzz {

template <typename T>
class Buffer {
 public:
  // Begins at any element of a cache line. Without elements it may be null.
  Buffer(Random& random, const char* name, int64_t size) : name_(name), size_(size) {
    const int64_t shift = random.Chance(0.5) ? 0 : random.Between(0, 15);
    memory_.assign(2 * kGuard + kLine + (shift + size) * sizeof(T), kGuardByte);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    begin_ = reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine) + shift;
    is_null_ = size == 0 && random.Chance(0.5);
    PoisonGuards();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { UnpoisonGuards(); }

  T* data() { return is_null_ ? nullptr : begin_; }
  int64_t size() const { return size_; }
  const char* name() const { return name_; }

  void Fill(const std::vector<double>& values) {
    for (int64_t i = 0; i < size_; ++i) begin_[i] = FromDouble<T>(values[i]);
    filled_.assign(begin_, begin_ + size_);
  }

  // With a NaN that nothing computes: all bits are 1.
  void Poison() {
    if (size_ > 0) std::memset(static_cast<void*>(begin_), 0xff, size_ * sizeof(T));
  }

  std::vector<double> Values() const {
    std::vector<double> values(size_);
    for (int64_t i = 0; i < size_; ++i) values[i] = ToDouble(begin_[i]);
    return values;
  }

  void ExpectGuardsAreWhole() {
    UnpoisonGuards();
    for (const unsigned char* at = memory_.data(); at < Bytes(begin_); ++at) ExpectGuard(*at);
    for (const unsigned char* at = Bytes(begin_ + size_); at < End(); ++at) ExpectGuard(*at);
    PoisonGuards();
  }

  // As Fill() left it.
  void ExpectUnchanged() {
    ExpectGuardsAreWhole();
    if (size_ > 0 && std::memcmp(begin_, filled_.data(), size_ * sizeof(T)) != 0) {
      throw Finding(std::string(name_) + " was changed");
    }
  }

  bool IsPoisoned(int64_t i) const {
    for (size_t byte = 0; byte < sizeof(T); ++byte) {
      if (Bytes(begin_ + i)[byte] != 0xff) return false;
    }
    return true;
  }

  void ExpectWritten() {
    ExpectGuardsAreWhole();
    for (int64_t i = 0; i < size_; ++i) {
      if (IsPoisoned(i)) {
        throw Finding(std::string(name_) + " was not written at element " + std::to_string(i));
      }
    }
  }

  // Bit by bit.
  std::vector<T> Elements() const { return std::vector<T>(begin_, begin_ + size_); }
  bool Equals(const std::vector<T>& elements) const {
    return size_ == 0 || std::memcmp(begin_, elements.data(), size_ * sizeof(T)) == 0;
  }

 private:
  static constexpr int64_t kGuard = 64, kLine = 64;
  static constexpr unsigned char kGuardByte = 0xa5;

  static const unsigned char* Bytes(const T* at) {
    return reinterpret_cast<const unsigned char*>(at);
  }
  const unsigned char* End() const { return memory_.data() + memory_.size(); }

  void ExpectGuard(unsigned char byte) const {
    if (byte != kGuardByte) throw Finding(std::string(name_) + ": written beside it");
  }
  void PoisonGuards() {
    ASAN_POISON_MEMORY_REGION(memory_.data(), Bytes(begin_) - memory_.data());
    ASAN_POISON_MEMORY_REGION(begin_ + size_, End() - Bytes(begin_ + size_));
  }
  void UnpoisonGuards() { ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size()); }

  const char* name_;
  int64_t size_;
  bool is_null_;
  std::vector<unsigned char> memory_;
  T* begin_;
  std::vector<T> filled_;
};

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_BUFFER_H_
