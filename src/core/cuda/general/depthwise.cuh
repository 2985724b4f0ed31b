// What the depthwise kernels share: sizes, and vectors of channels. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_DEPTHWISE_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_DEPTHWISE_CUH_

#include <type_traits>

#include "core/bilinear.h"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/general/samples.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/params.h"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// Locates the sample of a tap of a deformable group; `index` is that of its mask.
template <typename OffsetT>
__device__ __forceinline__ ImageSample<OffsetT, int32_t> LocateTap(const FusedSizes& sizes,
                                                                   const OffsetT* offset,
                                                                   const Position& position,
                                                                   int g_tap, int64_t index) {
  const Tap tap = Tap::Of(sizes, g_tap);
  return LocateSample<OffsetT, int32_t>(position.y * sizes.stride_h + tap.h_base,
                                        position.x * sizes.stride_w + tap.w_base, offset[2 * index],
                                        offset[2 * index + 1], sizes.in_h, sizes.in_w);
}

// The filters or outputs of `kSize` input channels: neighbours where a channel has one output
// (kOneOutput), `multiplier` apart elsewhere.
template <int kSize, bool kOneOutput, typename T>
__device__ __forceinline__ Vector<T, kSize> LoadOutputs(const T* from, int multiplier) {
  if constexpr (kOneOutput) {
    return Load<T, kSize>(from);
  } else {
    Vector<T, kSize> vector;
#pragma unroll
    for (int i = 0; i < kSize; ++i) vector.elements[i] = from[i * multiplier];
    return vector;
  }
}

// Pairs of 16-bit numbers, for arithmetic on two at a time.
template <typename T>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
  static __device__ __forceinline__ type Both(float value) { return __float2half2_rn(value); }
  static __device__ __forceinline__ type Multiply(type a, type b) { return __hmul2(a, b); }
  static __device__ __forceinline__ type MultiplyAdd(type a, type b, type c) {
    return __hfma2(a, b, c);
  }
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ type Both(float value) { return __float2bfloat162_rn(value); }
  static __device__ __forceinline__ type Multiply(type a, type b) {
#if __CUDA_ARCH__ >= 800
    return __hmul2(a, b);
#else  // which have no instruction for it
    return MultiplyAdd(a, b, Both(0.0f));
#endif
  }
  static __device__ __forceinline__ type MultiplyAdd(type a, type b, type c) {
#if __CUDA_ARCH__ >= 800
    return __hfma2(a, b, c);
#else
    return __floats2bfloat162_rn(__low2float(a) * __low2float(b) + __low2float(c),
                                 __high2float(a) * __high2float(b) + __high2float(c));
#endif
  }
};

template <typename T, int kSize>
constexpr bool kInPairs = sizeof(T) == 2 && kSize % 2 == 0;

// a[i] * b[i]
template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Multiply(const Vector<T, kSize>& a,
                                                     const Vector<T, kSize>& b) {
  Vector<T, kSize> products;
  if constexpr (kInPairs<T, kSize>) {
    using Pair = typename PairOf<T>::type;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      reinterpret_cast<Pair*>(products.elements)[i] =
          PairOf<T>::Multiply(reinterpret_cast<const Pair*>(a.elements)[i],
                              reinterpret_cast<const Pair*>(b.elements)[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      products.elements[i] = static_cast<T>(static_cast<ComputeType<T>>(a.elements[i]) *
                                            static_cast<ComputeType<T>>(b.elements[i]));
    }
  }
  return products;
}

// sums[i] += factor * a[i]
template <typename T, int kSize>
__device__ __forceinline__ void AddProduct(ComputeType<T> factor, const Vector<T, kSize>& a,
                                           ComputeType<T> (&sums)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) sums[i] += factor * static_cast<ComputeType<T>>(a.elements[i]);
}

// The weights of a sample's corners, in the type that they are multiplied in.
template <typename T, bool kPairs>
struct alignas(16) Weights {
  ComputeType<T> of[kCorners];
  __device__ __forceinline__ void Set(int corner, ComputeType<T> weight) { of[corner] = weight; }
};
template <typename T>
struct alignas(16) Weights<T, true> {
  typename PairOf<T>::type of[kCorners];
  __device__ __forceinline__ void Set(int corner, float weight) {
    of[corner] = PairOf<T>::Both(weight);
  }
};

// The sum over corners of weight times value, in 16 bits where T has as many.
template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Interpolate(
    const Weights<T, kInPairs<T, kSize>>& weights, const Vector<T, kSize> (&corners)[kCorners]) {
  Vector<T, kSize> sums;
  if constexpr (kInPairs<T, kSize>) {
    using Pair = typename PairOf<T>::type;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const auto value = [&](int corner) {
        return reinterpret_cast<const Pair*>(corners[corner].elements)[i];
      };
      Pair sum = PairOf<T>::Multiply(weights.of[0], value(0));
#pragma unroll
      for (int corner = 1; corner < kCorners; ++corner) {
        sum = PairOf<T>::MultiplyAdd(weights.of[corner], value(corner), sum);
      }
      reinterpret_cast<Pair*>(sums.elements)[i] = sum;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      ComputeType<T> sum = 0;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        sum += weights.of[corner] * static_cast<ComputeType<T>>(corners[corner].elements[i]);
      }
      sums.elements[i] = static_cast<T>(sum);
    }
  }
  return sums;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_DEPTHWISE_CUH_
