// In which order a fused kernel walks over output positions. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_POSITION_ORDER_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_POSITION_ORDER_CUH_

#include <cstdint>

#include "core/cuda/fused/divisor.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// Each image is cut into vertical strips, and each strip is gone through row by row. So consecutive
// positions lie close together, and their samples share pixels.
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

  // The position that comes at `index` of the walk.
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

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_POSITION_ORDER_CUH_
