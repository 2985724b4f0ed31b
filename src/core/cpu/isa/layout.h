// Conversion from and to native form on one CPU thread. The contracts are in cpu/kernels.h.
// Included only by kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_LAYOUT_H_
#define DEFORM_CONV_CORE_CPU_ISA_LAYOUT_H_

#include "Eigen/Core"
#include "core/types.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// float -> float and double -> double.
template <typename T>
inline T Convert(T value, const T*) {
  return value;
}
inline float Convert(Half value, const float*) {
  return Eigen::half_impl::half_to_float(Eigen::numext::bit_cast<Eigen::half>(value));
}
inline Half Convert(float value, const Half*) {
  return Eigen::numext::bit_cast<Half>(Eigen::half(value));
}
inline float Convert(BFloat16 value, const float*) {
  return Eigen::numext::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline BFloat16 Convert(float value, const BFloat16*) {
  return Eigen::numext::bit_cast<BFloat16>(Eigen::bfloat16(value));
}

// Transposes a [rows, cols] part of a matrix into a [cols, rows] part of another, converting, in
// blocks that fit the first-level cache both ways.
template <typename From, typename To>
void TransposeConvert(const From* from, int64_t from_stride, int64_t rows, int64_t cols, To* to,
                      int64_t to_stride) {
  constexpr int64_t kBlock = 16;
  for (int64_t row_block = 0; row_block < rows; row_block += kBlock) {
    const int64_t row_end = row_block + kBlock < rows ? row_block + kBlock : rows;
    for (int64_t col_block = 0; col_block < cols; col_block += kBlock) {
      const int64_t col_end = col_block + kBlock < cols ? col_block + kBlock : cols;
      for (int64_t col = col_block; col < col_end; ++col) {
        for (int64_t row = row_block; row < row_end; ++row) {
          to[col * to_stride + row] = Convert(from[row * from_stride + col], to);
        }
      }
    }
  }
}

// Calls part(n, first, count) for each image's pixels among [begin, end) of the batch.
template <typename Part>
void ForEachImagePart(const TensorExtent& extent, int64_t begin, int64_t end, const Part& part) {
  while (begin < end) {
    const int64_t n = begin / extent.pixels;
    const int64_t first = begin - n * extent.pixels;
    const int64_t left = extent.pixels - first;
    const int64_t count = left < end - begin ? left : end - begin;
    part(n, first, count);
    begin += count;
  }
}

template <typename From, typename To>
void ConvertPixels(const TensorExtent& extent, const From* from, int64_t begin, int64_t end,
                   To* to) {
  for (int64_t i = begin * extent.channels; i < end * extent.channels; ++i) {
    to[i] = Convert(from[i], to);
  }
}

template <typename T, typename NativeT>
void ToNative(DataFormat format, const TensorExtent& extent, const T* tensor, int64_t begin,
              int64_t end, NativeT* native) {
  if (format == DataFormat::kNhwc) return ConvertPixels(extent, tensor, begin, end, native);
  ForEachImagePart(extent, begin, end, [&](int64_t n, int64_t first, int64_t count) {
    const int64_t image = n * extent.pixels * extent.channels;
    TransposeConvert(tensor + image + first, extent.pixels, extent.channels, count,
                     native + image + first * extent.channels, extent.channels);
  });
}

template <typename T, typename NativeT>
void FromNative(DataFormat format, const TensorExtent& extent, const NativeT* native, int64_t begin,
                int64_t end, T* tensor) {
  if (format == DataFormat::kNhwc) return ConvertPixels(extent, native, begin, end, tensor);
  ForEachImagePart(extent, begin, end, [&](int64_t n, int64_t first, int64_t count) {
    const int64_t image = n * extent.pixels * extent.channels;
    TransposeConvert(native + image + first * extent.channels, extent.channels, count,
                     extent.channels, tensor + image + first, extent.pixels);
  });
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_LAYOUT_H_
