// What the fused kernels, and those of depthwise layers, ask of sizes, since they compute in 32
// bits. For C++ without CUDA's headers too.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_LIMITS_H_
#define DEFORM_CONV_CORE_CUDA_FUSED_LIMITS_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/bilinear.h"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// A packed pixel: the pixel's index in the batch, shifted left by the four bits that say which
// corners count.
constexpr int kCornerBits = 4;
constexpr int64_t kMostPackedPixels = int64_t{1} << 27;
// Positions, and other numbers that are multiplied by little.
constexpr int64_t kMostPositions = int64_t{1} << 30;

// Why the sizes, or numbers computed from them, do not fit into 32 bits; or an empty string.
inline std::string SizesMisfit(const DeformConvParams& params) {
  const auto reach = [](int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
    return (out - 1) * stride + (kernel - 1) * dilation;
  };
  const bool fit =
      params.batch * params.in_h * params.in_w + params.in_w < kMostPackedPixels &&
      params.out_positions() < kMostPositions && params.in_channels < kMostPositions / 64 &&
      params.out_channels < kMostPositions / 64 &&
      params.taps() * std::max(params.in_channels, params.deform_groups) < kMostPositions &&
      params.taps() * params.out_channels < kMostPositions && params.pad_top < kInt32Limit / 2 &&
      params.pad_left < kInt32Limit / 2 &&
      reach(params.out_h, params.stride_h, params.kernel_h, params.dilation_h) < kInt32Limit / 2 &&
      reach(params.out_w, params.stride_w, params.kernel_w, params.dilation_w) < kInt32Limit / 2;
  return fit ? "" : "the sizes do not fit into 32 bits";
}

// Why the sizes of one image do not fit into 32 bits, or an empty string.
inline std::string SizesOfImageMisfit(DeformConvParams params) {
  params.batch = 1;
  return SizesMisfit(params);
}

// The most images of a batch that a kernel may work on at a time, for SizesMisfit(); at least 1.
inline int64_t FusedImages(const DeformConvParams& params) {
  const int64_t of_input =
      (kMostPackedPixels - params.in_w - 1) / std::max<int64_t>(params.image_pixels(), 1);
  const int64_t of_output = (kMostPositions - 1) / std::max<int64_t>(params.image_positions(), 1);
  return std::max<int64_t>(std::min(of_input, of_output), 1);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_LIMITS_H_
