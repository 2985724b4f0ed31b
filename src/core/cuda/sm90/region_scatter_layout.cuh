// Shared memory of the region scatter kernel. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_REGION_SCATTER_LAYOUT_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_REGION_SCATTER_LAYOUT_CUH_

#include <cstdint>

#include "core/cuda/fused/shared_vec16.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/cuda/sm90/patch_lane.cuh"
#include "core/cuda/sm90/patch_samples.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {

// Where things are in a thread block's shared memory, in bytes.
//
//   scatter matrix  pixels by positions, operand A; absent where the input's gradient is not wanted
//   transposed      TF32: the columns' gradient of a tap, channels by positions, operand B;
//                   likewise absent
//   stages          the columns' gradients of taps ahead. In 16 bits they are operand B, positions
//                   by channels; in TF32, vec16 by vec16, all threads' side by side
//   samples         [positions, taps]: PatchSample
template <typename T, int kChannels, bool kWantInput>
struct RegionLayout {
  static constexpr bool k16Bits = sizeof(T) == 2;
  // With two buffers, a tap's matrix is written while that of the tap before is multiplied.
  static constexpr int kMatrices = k16Bits ? 2 : 1;
  static constexpr int kMatrixBytes = kRegionPixels * kPatchPositions * static_cast<int>(sizeof(T));
  // In 16 bits, one is multiplied, and two are on their way.
  static constexpr int kStages = k16Bits ? 3 : 1;
  // How many taps ahead the columns' gradient is copied.
  static constexpr int kAhead = k16Bits ? kStages - 1 : kStages;
  static constexpr int kStageBytes =
      k16Bits ? kPatchPositions * kSlabRowBytes
              : kPatchPositions * kChannels * static_cast<int>(sizeof(T));

  static constexpr int kTransposedOffset = kWantInput ? kMatrices * kMatrixBytes : 0;
  static constexpr int kStagesOffset =
      kTransposedOffset + (kWantInput && !k16Bits ? kStageBytes : 0);
  static constexpr int kSamplesOffset = kStagesOffset + kStages * kStageBytes;

  static int64_t Bytes(int64_t taps) {
    return kSamplesOffset + taps * kPatchPositions * static_cast<int64_t>(sizeof(PatchSample));
  }

  // Where the thread's first vec16 lies in a stage, and its vec16 j; in 16 bits to be combined by
  // xor.
  static __device__ __forceinline__ uint32_t FirstVec16(int p) {
    return k16Bits ? SwizzledOffset(p, PatchLane<T, kChannels>::First())
                   : ReadThread() * kVec16Bytes;
  }
  static __device__ __forceinline__ uint32_t Vec16At(uint32_t first, int j) {
    return k16Bits ? first ^ j * (kLanesOfPosition * kVec16Bytes)
                   : first + j * kThreadsPerBlock * kVec16Bytes;
  }
};

// TF32: the row of channel c in the transposed operand is c % 4 * (kChannels / 4) + c / 4. So lanes
// with neighbouring vec16s write neighbouring rows, which the swizzle keeps in different banks.
//
// Where in it a lane's first number is, in bytes, and where number i of its vec16 j is.
template <int kChannels>
__device__ __forceinline__ uint32_t FirstTransposed(int p) {
  constexpr int kRow = kSlabRowSize<float>, kSize = kVec16Size<float>;
  return p / kRow * (kChannels * kSlabRowBytes) +
         SwizzledOffset(PatchLane<float, kChannels>::First(), p % kRow / kSize) +
         p % kSize * static_cast<int>(sizeof(float));
}
template <int kChannels>
__device__ __forceinline__ uint32_t TransposedAt(uint32_t first, int j, int i) {
  // Channel vec16 * 4 + i is in row vec16 + i * kRows; the swizzle of odd j's rows differs from the
  // first's in one bit, that of i's does not.
  constexpr int kRows = kChannels / kVec16Size<float>;
  static_assert(kRows % kSwizzledRows == 0);
  return (first ^ (j % 2 * 4 * kVec16Bytes)) +
         (PatchLane<float, kChannels>::Distance(j) + i * kRows) * kSlabRowBytes;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_REGION_SCATTER_LAYOUT_CUH_
