// The scatter matrix of a tap, and its product with the columns' gradient. For .cu files only.
//
// Its element [pixel of the region, position of the patch] is the weight, times the mask, of the
// corner that the position's sample has at the pixel. Most elements are 0.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_SCATTER_MATRIX_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_SCATTER_MATRIX_CUH_

#include <cstdint>
#include <type_traits>

#include "core/bilinear.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/cuda/sm90/patch_lane.cuh"
#include "core/cuda/sm90/patch_samples.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {

// Parts of the region, 64 pixels each, that a warpgroup sums up.
constexpr int kRegionParts = kRegionPixels / kWgmmaM / (kThreadsPerBlock / kWarpgroup);

// Where the element of `pixel` and position p is, in bytes.
template <typename T>
__device__ __forceinline__ uint32_t ScatterOffset(int pixel, int p) {
  const int slab = p / kSlabRowSize<T>, vec16 = p % kSlabRowSize<T> / kVec16Size<T>;
  return slab * (kRegionPixels * kSlabRowBytes) + SwizzledOffset(pixel, vec16) +
         p % kVec16Size<T> * sizeof(T);
}

template <typename T>
__device__ __forceinline__ T RoundWeight(float weight) {
  if constexpr (std::is_same_v<T, float>) {
    return RoundToTf32(weight);
  } else {
    return static_cast<T>(weight);
  }
}

// In place of an offset where a thread has written no element.
constexpr uint32_t kNoElement = 0xffff;

// Writes this thread's element of a tap's matrix, and zero over the one that it wrote last to the
// same buffer, at offset `old`. Returns the element's offset in the buffer. Each thread does a
// corner of a position; those of one position are in one warp.
template <typename T>
__device__ __forceinline__ uint32_t UpdateScatterMatrix(const Patch& patch,
                                                        const PatchSample* samples, int taps,
                                                        int tap, uint32_t old, uint8_t* matrix) {
  static_assert(kThreadsPerBlock == kPatchPositions * kCorners);
  static_assert(kRegionPixels * kPatchPositions * sizeof(T) <= kNoElement + 1);
  const int thread = ReadThread(), p = thread / kCorners, corner = thread % kCorners;
  const PatchSample* sample = samples + p * taps + tap;
  if (old != kNoElement) *reinterpret_cast<T*>(matrix + old) = T(0.0f);
  __syncwarp();  // where one corner was, another may be now
  const int pixel = patch.PixelInRegion(PackedCorner::Unpack(sample->packed_corner), corner);
  if (pixel < 0) return kNoElement;
  const float weight = WeightOfCorner(*sample, corner);
  const uint32_t offset = ScatterOffset<T>(pixel, p);
  *reinterpret_cast<T*>(matrix + offset) = RoundWeight<T>(sample->mask * weight);
  return offset;
}

// Begins region [pixels, channels] += matrix * grad_columns, or = with `add` false, for this
// warpgroup's pixels.
template <typename T, int kChannels>
__device__ __forceinline__ void MultiplyScatterMatrix(
    int warpgroup, uint32_t matrix, uint32_t grad_columns, bool add,
    float (&region)[kRegionParts][kChannels / 2]) {
  constexpr int kSteps = kSlabRowSize<T> / kWgmmaK<T>;
  constexpr uint32_t kPartBytes = kWgmmaM * kSlabRowBytes;
  const uint64_t a = MatrixDescriptor(matrix + warpgroup * kRegionParts * kPartBytes, 0);
  const uint64_t b = MatrixDescriptor(grad_columns, 0);
  WarpgroupArrive();
#pragma unroll
  for (int part = 0; part < kRegionParts; ++part) {
#pragma unroll
    for (int slab = 0; slab < kPatchPositions / kSlabRowSize<T>; ++slab) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t a_bytes = part * kPartBytes + slab * (kRegionPixels * kSlabRowBytes) +
                                 step * WgmmaKBytes<T, Major::kK>();
        const uint32_t b_bytes =
            slab * (kChannels * kSlabRowBytes) + step * WgmmaKBytes<T, kMajorOfB<T>>();
        WgmmaSS<T, kChannels, Major::kK, kMajorOfB<T>>::Run(
            region[part], AdvanceDescriptor(a, a_bytes), AdvanceDescriptor(b, b_bytes),
            add || slab > 0 || step > 0);
      }
    }
  }
  WarpgroupCommit();
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_SCATTER_MATRIX_CUH_
