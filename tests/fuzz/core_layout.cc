// Conversions from and to native form, of any part of a tensor, against the definition of the
// formats and of rounding.

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "buffer.h"
#include "core/cpu/kernels.h"
#include "core_kinds.h"
#include "driver.h"
#include "elements.h"

namespace deform_conv::fuzz {
namespace {

template <typename T>
T DrawElement(Random& random) {
  if (random.Chance(0.5)) return FromDouble<T>(random.Normal());
  // Any bits: subnormal and infinite numbers, and NaN, among them.
  const uint64_t bits = random.Next();
  T element;
  std::memcpy(&element, &bits, sizeof(T));
  return element;
}

// Numbers that a 16-bit type has, nearly has, or lie in the middle between two.
float DrawNative(Random& random) {
  if (random.Chance(0.3)) return DrawElement<float>(random);
  const double of_type = random.Chance(0.5) ? ToDouble(DrawElement<Half>(random))
                                            : ToDouble(DrawElement<BFloat16>(random));
  const double step = std::ldexp(1, -static_cast<int>(random.Between(7, 13)));
  return static_cast<float>(of_type * (1 + static_cast<double>(random.Between(-1, 1)) * step));
}
double DrawNativeDouble(Random& random) { return DrawElement<double>(random); }

template <typename T>
bool SameNumber(T a, T b) {
  return std::isnan(ToDouble(a)) ? std::isnan(ToDouble(b)) : std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename T>
void RunLayoutOf(Random& random) {
  using NativeT = ComputeType<T>;
  const TensorExtent extent = {random.Between(1, 3),
                               random.Chance(0.5) ? random.Between(1, 9) : random.Between(1, 70),
                               random.Chance(0.5) ? random.Between(1, 9) : random.Between(1, 70)};
  const DataFormat format = random.Pick({DataFormat::kNhwc, DataFormat::kNchw});
  const int64_t all = extent.batch * extent.pixels;
  const int64_t begin = random.Between(0, all), end = random.Between(begin, all);
  const bool to_native = random.Chance(0.5);
  Describe(nullptr, std::string(NameOf(ElementTypeOf<T>::value)) +
                        (to_native ? " to native" : " from native") +
                        (format == DataFormat::kNhwc ? ", NHWC [" : ", NCHW [") +
                        std::to_string(extent.batch) + ", " + std::to_string(extent.pixels) + ", " +
                        std::to_string(extent.channels) + "], pixels " + std::to_string(begin) +
                        " to " + std::to_string(end));
  Buffer<T> tensor(random, "tensor", extent.elements());
  Buffer<NativeT> native(random, "native", extent.elements());
  tensor.Poison();
  native.Poison();
  T* const elements = tensor.data();
  NativeT* const natives = native.data();
  for (int64_t i = 0; i < extent.elements(); ++i) {
    if (to_native) {
      elements[i] = DrawElement<T>(random);
    } else if constexpr (std::is_same_v<NativeT, double>) {
      natives[i] = DrawNativeDouble(random);
    } else {
      natives[i] = DrawNative(random);
    }
  }
  const CpuLayoutKernels<T>& kernels = SelectCpuLayoutKernels<T>();
  if (to_native) {
    kernels.to_native(format, extent, elements, begin, end, natives);
  } else {
    kernels.from_native(format, extent, natives, begin, end, elements);
  }
  tensor.ExpectGuardsAreWhole();
  native.ExpectGuardsAreWhole();
  for (int64_t i = 0; i < extent.elements(); ++i) {  // in the order of native form
    const int64_t pixel = i / extent.channels, channel = i % extent.channels;
    const int64_t n = pixel / extent.pixels, in_image = pixel % extent.pixels;
    const int64_t at = format == DataFormat::kNhwc
                           ? i
                           : (n * extent.channels + channel) * extent.pixels + in_image;
    bool right;
    if (pixel < begin || pixel >= end) {
      right = to_native ? native.IsPoisoned(i) : tensor.IsPoisoned(at);
    } else if (to_native) {
      right = SameNumber(natives[i], FromDouble<NativeT>(ToDouble(elements[at])));
    } else {
      right = SameNumber(elements[at], FromDouble<T>(natives[i]));
    }
    if (!right) {
      throw Finding("native element " + std::to_string(i) + ", " + std::to_string(natives[i]) +
                    ", and the tensor's " + std::to_string(ToDouble(elements[at])) + " disagree");
    }
  }
}

}  // namespace

void RunLayout(Random& random) {
  switch (random.Between(0, 3)) {
    case 0:
      return RunLayoutOf<float>(random);
    case 1:
      return RunLayoutOf<double>(random);
    case 2:
      return RunLayoutOf<Half>(random);
    default:
      return RunLayoutOf<BFloat16>(random);
  }
}

}  // namespace deform_conv::fuzz
