// Sizes, positions and taps as the fused kernels compute with them: in 32 bits. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_SIZES_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_SIZES_CUH_

#include <cstdint>

#include "core/cuda/fused/divisor.cuh"
#include "core/cuda/fused/limits.h"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// An output pixel.
struct Position {
  int32_t n, y, x;
};

// Sizes in 32 bits, as SizesMisfit() makes sure of.
struct FusedSizes {
  int32_t in_h, in_w, in_channels, out_h, out_w, out_channels;
  int32_t taps, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t deform_groups, group_in_channels, group_out_channels, deform_group_channels;
  int32_t positions;
  Divisor by_taps, by_kernel_w, by_taps_of_position, by_group_in_channels;

  explicit FusedSizes(const DeformConvParams& params)
      : in_h(static_cast<int32_t>(params.in_h)),
        in_w(static_cast<int32_t>(params.in_w)),
        in_channels(static_cast<int32_t>(params.in_channels)),
        out_h(static_cast<int32_t>(params.out_h)),
        out_w(static_cast<int32_t>(params.out_w)),
        out_channels(static_cast<int32_t>(params.out_channels)),
        taps(static_cast<int32_t>(params.taps())),
        kernel_w(static_cast<int32_t>(params.kernel_w)),
        stride_h(static_cast<int32_t>(params.stride_h)),
        stride_w(static_cast<int32_t>(params.stride_w)),
        dilation_h(static_cast<int32_t>(params.dilation_h)),
        dilation_w(static_cast<int32_t>(params.dilation_w)),
        pad_top(static_cast<int32_t>(params.pad_top)),
        pad_left(static_cast<int32_t>(params.pad_left)),
        deform_groups(static_cast<int32_t>(params.deform_groups)),
        group_in_channels(static_cast<int32_t>(params.group_in_channels())),
        group_out_channels(static_cast<int32_t>(params.group_out_channels())),
        deform_group_channels(static_cast<int32_t>(params.deform_group_channels())),
        positions(static_cast<int32_t>(params.out_positions())),
        by_taps(static_cast<uint32_t>(params.taps())),
        by_kernel_w(static_cast<uint32_t>(params.kernel_w)),
        by_taps_of_position(static_cast<uint32_t>(params.mask_channels())),
        by_group_in_channels(static_cast<uint32_t>(params.group_in_channels())) {}

  __device__ __forceinline__ int64_t IndexOf(const Position& position) const {
    return (int64_t{position.n} * out_h + position.y) * out_w + position.x;
  }
};

// A tap of a deformable group: its number among those of a position, g * taps + tap, and where it
// samples, before the offset, for the position (0, 0).
struct Tap {
  int32_t g_tap, h_base, w_base;

  __device__ __forceinline__ static Tap Of(const FusedSizes& sizes, int g_tap) {
    const int tap = g_tap - sizes.by_taps.Divide(g_tap) * sizes.taps;
    const int ky = sizes.by_kernel_w.Divide(tap);
    const int kx = tap - ky * sizes.kernel_w;
    return {g_tap, ky * sizes.dilation_h - sizes.pad_top, kx * sizes.dilation_w - sizes.pad_left};
  }
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_SIZES_CUH_
