// What a gradient is summed up in.

#ifndef DEFORM_CONV_CORE_GPU_GRADIENT_SUM_H_
#define DEFORM_CONV_CORE_GPU_GRADIENT_SUM_H_

#include <cstdint>
#include <string>
#include <type_traits>

#include "core/cuda/general/kernels.h"
#include "core/gpu/device.h"
#include "core/return_if_error.h"
#include "core/types.h"

namespace deform_conv {

// The gradient itself, or a float copy where its elements have 16 bits: sums in 16 bits would
// depend on how many terms they have.
template <typename T>
class GradientSum {
  using Sum = ComputeType<T>;

 public:
  static constexpr bool kIsCopy = !std::is_same_v<T, Sum>;
  // What a copy takes for each element.
  static constexpr int64_t kElementBytes = kIsCopy ? sizeof(Sum) : 0;

  explicit GradientSum(GpuDevice& device) : device_(device) {}

  // Makes room for sums of so many elements at a time.
  std::string Allocate(int64_t most_elements) {
    if (!kIsCopy) return "";
    return device_.Allocate(most_elements * kElementBytes, reinterpret_cast<void**>(&copy_));
  }

  // Begins the sums of `gradient`, with zeros. Null begins none.
  std::string Begin(T* gradient, int64_t elements) {
    gradient_ = gradient;
    elements_ = elements;
    if (gradient == nullptr) return "";
    return cuda::Zero(data(), elements * sizeof(Sum), device_.stream());
  }

  // The sums; null where there are none.
  Sum* data() const {
    if (gradient_ == nullptr) return nullptr;
    if constexpr (kIsCopy) {
      return copy_;
    } else {
      return gradient_;
    }
  }

  // Writes the gradient.
  std::string Store() const {
    if (!kIsCopy || gradient_ == nullptr) return "";
    return cuda::FromNative<Sum, T>(DataFormat::kNhwc, {1, elements_, 1}, data(), gradient_,
                                    device_.stream());
  }

 private:
  GpuDevice& device_;
  Sum* copy_ = nullptr;
  T* gradient_ = nullptr;
  int64_t elements_ = 0;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_GRADIENT_SUM_H_
