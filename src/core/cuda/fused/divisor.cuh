// Division by a number that is known at launch. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_DIVISOR_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_DIVISOR_CUH_

#include <cstdint>

namespace deform_conv {
namespace cuda {

// Divides numbers below 2^31 by one number, without a division (Granlund and Montgomery, Division
// by Invariant Integers using Multiplication, 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(
        (uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor) / divisor + 1);
  }

  __device__ __forceinline__ uint32_t Divide(uint32_t number) const {
    return (__umulhi(number, multiplier_) + number) >> shift_;
  }
  constexpr uint32_t value() const { return divisor_; }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_DIVISOR_CUH_
