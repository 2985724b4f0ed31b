// In which order the fused kernels go over positions. For .cu files only.

#ifndef DEFORM_CONV_CORE_POSITION_ORDER_CUDA_CUH_
#define DEFORM_CONV_CORE_POSITION_ORDER_CUDA_CUH_

#include <cstdint>

#include "core/params.h"

namespace deform_conv {
namespace cuda {

// Divides numbers below 2^31 by one number, without a division (Granlund and Montgomery, Division
// by Invariant Integers using Multiplication, 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    factor_ = static_cast<uint32_t>(
        (uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor) / divisor + 1);
  }

  __device__ __forceinline__ uint32_t Divide(uint32_t number) const {
    return (__umulhi(number, factor_) + number) >> shift_;
  }
  __device__ __forceinline__ uint32_t value() const { return divisor_; }

 private:
  uint32_t divisor_ = 1, factor_ = 1, shift_ = 0;
};

struct Position {
  int32_t n, y, x;
};

// Each image is cut into vertical strips, and each strip is gone through row by row: consecutive
// positions form a compact patch, whose samples share pixels, and none is left over at the borders.
class PositionOrder {
 public:
  explicit PositionOrder(const DeformConvParams& params)
      : image_(static_cast<uint32_t>(params.out_h * params.out_w)) {
    const uint32_t out_h = static_cast<uint32_t>(params.out_h);
    const uint32_t out_w = static_cast<uint32_t>(params.out_w);
    const uint32_t width = out_w < 2 * kStripWidth ? out_w : kStripWidth;
    full_strips_ = out_w / width;
    strip_ = Divisor(width * out_h);
    width_ = Divisor(width);
    last_width_ = Divisor(out_w % width == 0 ? width : out_w % width);
  }

  // The position that comes at place `index`.
  __device__ __forceinline__ Position At(uint32_t index) const {
    Position position;
    const uint32_t n = image_.Divide(index);
    uint32_t rest = index - n * image_.value();
    const uint32_t strip = strip_.Divide(rest);
    rest -= strip * strip_.value();
    const Divisor& width = strip < full_strips_ ? width_ : last_width_;
    const uint32_t y = width.Divide(rest);
    position.n = static_cast<int32_t>(n);
    position.y = static_cast<int32_t>(y);
    position.x = static_cast<int32_t>(strip * width_.value() + rest - y * width.value());
    return position;
  }

 private:
  static constexpr uint32_t kStripWidth = 16;

  Divisor image_, strip_, width_, last_width_;
  uint32_t full_strips_;
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_POSITION_ORDER_CUDA_CUH_
