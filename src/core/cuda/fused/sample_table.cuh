// Located samples in shared memory, as the implicit GEMM kernels keep them. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_SAMPLE_TABLE_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_SAMPLE_TABLE_CUH_

#include <cstdint>

#include "core/bilinear.h"
#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/sizes.cuh"

namespace deform_conv {
namespace cuda {

// Located samples, with the weights times the mask, and 0 where a corner does not count.
//
// All four corners of an entry are pixels of the image, so that they can be read without asking
// which of them count: where a sample lies across the border, its corners are moved inside by a
// pixel, and their weights with them. An image is at least 2 pixels high and wide here.
template <typename T>
struct SampleTable {
  static constexpr int kEntryBytes = sizeof(CornerWeights<T>) + sizeof(int32_t);

  CornerWeights<T>* weights;  // [entries]
  int32_t* packed_pixels;     // [entries], of the top left corner

  // The table that begins at `memory`, which is aligned to 16 bytes.
  __device__ static SampleTable At(void* memory, int entries) {
    CornerWeights<T>* weights = static_cast<CornerWeights<T>*>(memory);
    return {weights, reinterpret_cast<int32_t*>(weights + entries)};
  }

  // Locates the sample that a tap takes at `position`.
  __device__ __forceinline__ void Locate(const FusedSizes& sizes, const Position& position,
                                         const Tap& tap, Offset offset, float mask,
                                         int entry) const {
    const auto h = LocateOnAxis<float, int32_t>(position.y * sizes.stride_h + tap.h_base, offset.dy,
                                                sizes.in_h);
    const auto w = LocateOnAxis<float, int32_t>(position.x * sizes.stride_w + tap.w_base, offset.dx,
                                                sizes.in_w);
    const MovedInside vertical(h, sizes.in_h), horizontal(w, sizes.in_w);
    const bool inside = h.inside && w.inside;
    const int32_t bits = !inside ? 0
                                 : (vertical.bits & 1 ? horizontal.bits : 0) |
                                       (vertical.bits & 2 ? horizontal.bits << 2 : 0);
    // Not the product of a mask that may be infinite with 0.
    const auto weight_of = [&](int corner) {
      const float weight = vertical.weights[corner / 2] * horizontal.weights[corner % 2];
      return static_cast<T>(bits >> corner & 1 ? mask * weight : 0.0f);
    };
    weights[entry] = {weight_of(kTopLeft), weight_of(kTopRight), weight_of(kBottomLeft),
                      weight_of(kBottomRight)};
    const int32_t top_left = (position.n * sizes.in_h + vertical.low) * sizes.in_w + horizontal.low;
    packed_pixels[entry] = inside ? top_left << kCornerBits | bits : 0;
  }

  // Writes an entry whose sample is 0.
  __device__ __forceinline__ void SetToZero(int entry) const {
    weights[entry] = {};
    packed_pixels[entry] = 0;
  }

 private:
  // The two pixels of one axis that a sample lies between, moved by one where either is outside.
  struct MovedInside {
    int32_t low, bits;  // a bit for each pixel that counts
    float weights[2];   // 0 where it does not

    __device__ __forceinline__ MovedInside(const AxisSample<float, int32_t>& sample, int32_t size) {
      const bool before = sample.low < 0, behind = sample.low >= size - 1;
      low = sample.low + (before ? 1 : 0) - (behind ? 1 : 0);
      bits = before ? 1 : behind ? 2 : 3;
      weights[0] = before ? sample.fraction : behind ? 0.0f : 1 - sample.fraction;
      weights[1] = before ? 0.0f : behind ? 1 - sample.fraction : sample.fraction;
    }
  };
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_SAMPLE_TABLE_CUH_
