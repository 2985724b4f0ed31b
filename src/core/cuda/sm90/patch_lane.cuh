// What a thread of the region scatter kernel works on: its position of the patch, its vec16s of the
// slice's channels, and the dot products of those with a sample's corners. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_PATCH_LANE_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_PATCH_LANE_CUH_

#include <cstdint>

#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {

constexpr int kLanesOfPosition = 4;
constexpr int kPositionsOfWarp = kWarp / kLanesOfPosition;
static_assert(kThreadsPerBlock == kPatchPositions * kLanesOfPosition);

// This thread's number, read anew: what follows from it is not kept in registers meanwhile.
__device__ __forceinline__ int ReadThread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  __builtin_assume(thread >= 0);  // spares divisions their care for the sign
  return thread;
}

// Four lanes have a position for all taps, and each of them every fourth vec16 of its channels.
template <typename T, int kChannels>
struct PatchLane {
  static constexpr int kVec16s = kChannels / kVec16Size<T> / kLanesOfPosition;
  // Vec16s of each corner that are on their way at a time.
  static constexpr int kInFlight = kVec16s < 2 ? 1 : 2;
  // The position's number in the warp, and the lane's among the position's.
  static __device__ __forceinline__ int PositionInWarp() {
    return ReadThread() % kWarp / kLanesOfPosition;
  }
  static __device__ __forceinline__ int Lane() { return ReadThread() % kLanesOfPosition; }

  // The lanes of every second position take their vec16s in the order 1, 0, 3, 2, so that eight
  // lanes together read a whole row of banks. The lane's first vec16 among those of the slice, and
  // the distance of its vec16 j from it.
  static constexpr bool kSwaps = kVec16s > 1;
  static __device__ __forceinline__ int First() {
    return Lane() + (kSwaps ? PositionInWarp() % 2 * kLanesOfPosition : 0);
  }
  static __device__ __forceinline__ int Distance(int j) {
    if (!kSwaps || j % 2 == 0) return j * kLanesOfPosition;
    return (j - 1) * kLanesOfPosition +
           (PositionInWarp() % 2 != 0 ? -kLanesOfPosition : kLanesOfPosition);
  }

  // The position in the patch, numbered so that vec16s are written to operand B without bank
  // conflicts. In 16 bits, eight lanes write two rows at a time. If the lanes do not swap vec16s,
  // the rows must differ by 4. In TF32, positions lie along the rows: a warp writes four numbers of
  // two vec16s to four rows.
  static __device__ __forceinline__ int PositionInPatch() {
    const int warp = threadIdx.x / kWarp, in_warp = PositionInWarp();
    if constexpr (sizeof(T) == 2) {
      return warp * kPositionsOfWarp + (kSwaps ? in_warp : in_warp % 2 * 4 + in_warp / 2);
    } else {
      return warp / 4 * 32 + in_warp / 4 * 16 + warp % 4 * 4 + in_warp % 4;
    }
  }
};

__device__ __forceinline__ uint32_t WordOf(const uint4& vec16, int i) {
  return i == 0 ? vec16.x : i == 1 ? vec16.y : i == 2 ? vec16.z : vec16.w;
}

// Where in the input a sample's corners are.
struct PatchCorners {
  int packed_pixel;
  bool all_count;  // whether all corners of all the warp's samples count

  // By whole warps.
  __device__ __forceinline__ static PatchCorners Of(const FusedSizes& sizes, const Patch& patch,
                                                    uint32_t packed_corner) {
    const PackedCorner corner = PackedCorner::Unpack(packed_corner);
    const int top_left = patch.first_pixel + corner.h * sizes.in_w + corner.w;
    return {(top_left + sizes.in_w + 1) << kCornerBits | corner.corner_bits,
            __all_sync(0xffffffffu, corner.corner_bits == kAllCorners) != 0};
  }
};

// Loads corners of PatchCorners.
struct PatchCornerLoader {
  CornerDistances distances;
  const uint8_t* first;  // of the input, the pixel above and left of the first

  template <typename T>
  __device__ PatchCornerLoader(const FusedSizes& sizes, const T* input)
      : distances(CornerDistances::Of<T>(sizes)),
        first(reinterpret_cast<const uint8_t*>(input) - distances.row - distances.pixel) {
    // Keeps the compiler from adding up each corner's address from `input`.
    asm volatile("" : "+l"(first));
  }

  // Begins to load vec16s j of each corner, `channel_bytes(j)` into their pixels; 0 where they do
  // not count.
  template <int kCount, typename ChannelBytes>
  __device__ __forceinline__ void Load(const PatchCorners& at, const ChannelBytes& channel_bytes,
                                       uint4 (&corners)[kCount][kCorners]) const {
    if (at.all_count) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        LoadCorners<true>(distances, first, channel_bytes(j), at.packed_pixel, corners[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        LoadCorners<false>(distances, first, channel_bytes(j), at.packed_pixel, corners[j]);
      }
    }
  }
};

// Sums up over the lanes of a position.
__device__ __forceinline__ float SumOverLanes(float number) {
#pragma unroll
  for (int distance = kLanesOfPosition / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(0xffffffffu, number, distance);
  }
  return number;
}

// The products of a position's part of the columns' gradient with the corners of its sample, summed
// over the slice's channels.
template <typename T>
class CornerProducts {
 public:
  __device__ __forceinline__ void Add(const uint4& grads, const uint4 (&corners)[kCorners]) {
    if constexpr (sizeof(T) == 2) {
      // By the tensor cores, for all positions of the warp with all corners. The m's and n's of one
      // number are of the same lanes, so their channels match, in whatever order. The diagonal is
      // what is asked for.
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t b[2] = {WordOf(grads, i), WordOf(grads, i + 1)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 &one = corners[2 * half], &other = corners[2 * half + 1];
          const uint32_t a[4] = {WordOf(one, i), WordOf(other, i), WordOf(one, i + 1),
                                 WordOf(other, i + 1)};
          MmaSync<T>(reinterpret_cast<float (&)[4]>(sums_[4 * half]), a, b);
        }
      }
    } else {
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums_[corner] +=
              __uint_as_float(WordOf(grads, i)) * __uint_as_float(WordOf(corners[corner], i));
        }
      }
    }
  }

  // By whole warps; the products, in the one lane of each position that IsHere() names.
  __device__ __forceinline__ void Sum(float (&products)[kCorners]) const {
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      if constexpr (sizeof(T) == 2) {
        const bool odd = ReadThread() / kLanesOfPosition % 2 != 0;
        products[corner] = odd ? sums_[2 * corner + 1] : sums_[2 * corner];
      } else {
        products[corner] = SumOverLanes(sums_[corner]);
      }
    }
  }
  // Where the diagonal's number is.
  static __device__ __forceinline__ bool IsHere(int position_in_warp, int lane) {
    return lane == position_in_warp / 2;
  }

 private:
  float sums_[sizeof(T) == 2 ? 2 * kCorners : kCorners] = {};
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_PATCH_LANE_CUH_
