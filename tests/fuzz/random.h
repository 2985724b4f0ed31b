// Random numbers that are the same on every machine: a case is its seed and its number.

#ifndef DEFORM_CONV_TESTS_FUZZ_RANDOM_H_
#define DEFORM_CONV_TESTS_FUZZ_RANDOM_H_

#include <cstdint>
#include <initializer_list>

namespace deform_conv::fuzz {

class Random {
 public:
  Random(uint64_t seed, uint64_t number) : state_(seed) {
    state_ = Next() ^ (number * 0x9e3779b97f4a7c15u);
    Next();
  }

  // SplitMix64.
  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // An integer from `low` to `high`.
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Next() % static_cast<uint64_t>(high - low + 1));
  }

  // From 0 to 1, without 1.
  double Unit() { return static_cast<double>(Next() >> 11) * 0x1p-53; }

  bool Chance(double probability) { return Unit() < probability; }

  // About normal, with variance 1.
  double Normal() {
    double sum = -2;
    const uint64_t bits = Next();
    for (const int shift : {0, 16, 32, 48}) {
      sum += static_cast<double>(bits >> shift & 0xffff) * 0x1p-16;
    }
    return sum * 1.7320508;
  }

  template <typename T>
  T Pick(std::initializer_list<T> values) {
    return values.begin()[Next() % values.size()];
  }

 private:
  uint64_t state_;
};

}  // namespace deform_conv::fuzz

#endif  // DEFORM_CONV_TESTS_FUZZ_RANDOM_H_
