// What the depthwise kernels share: sizes, and vectors of channels. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_DEPTHWISE_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_DEPTHWISE_CUH_

#include <string>
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

// The index of a position, or of an image's first pixel: within 32 bits, as SizesMisfit() makes
// sure.
__device__ __forceinline__ int32_t PositionIndex(const FusedSizes& sizes,
                                                 const Position& position) {
  return (position.n * sizes.out_h + position.y) * sizes.out_w + position.x;
}
__device__ __forceinline__ int32_t ImagePixel(const FusedSizes& sizes, int n) {
  return n * sizes.in_h * sizes.in_w;
}

__device__ __forceinline__ bool Exists(const FusedSizes& sizes, const Position& position) {
  return position.y < sizes.out_h && position.x < sizes.out_w;
}

// Where a sample lies on the axes.
template <typename OffsetT>
struct TapSample {
  AxisSample<OffsetT, int32_t> h, w;

  __device__ TapSample(const FusedSizes& sizes, const Position& position, const Tap& tap,
                       OffsetT dy, OffsetT dx)
      : h(LocateOnAxis<OffsetT, int32_t>(position.y * sizes.stride_h + tap.h_base, dy, sizes.in_h)),
        w(LocateOnAxis<OffsetT, int32_t>(position.x * sizes.stride_w + tap.w_base, dx,
                                         sizes.in_w)) {}

  __device__ __forceinline__ bool inside() const { return h.inside & w.inside; }
};

// The largest mask by which weights are multiplied: 16-bit numbers have room for their products.
constexpr int kMostMask = 256;

// What each input channel meets: filters to several outputs or to one, or none, as if they were 1.
enum class Filters { kToSeveral, kToOne, kNone };

// Whether a channel has one output.
constexpr bool HasOneOutput(Filters filters) { return filters != Filters::kToSeveral; }

inline Filters FiltersOf(const DeformConvParams& params) {
  if (!params.has_filters) return Filters::kNone;
  return params.group_out_channels() == 1 ? Filters::kToOne : Filters::kToSeveral;
}

// Calls run(std::integral_constant<Filters, ...>) with those of a layer.
template <typename Run>
std::string WithFilters(const DeformConvParams& params, const Run& run) {
  switch (FiltersOf(params)) {
    case Filters::kNone:
      return run(std::integral_constant<Filters, Filters::kNone>());
    case Filters::kToOne:
      return run(std::integral_constant<Filters, Filters::kToOne>());
    case Filters::kToSeveral:
      break;
  }
  return run(std::integral_constant<Filters, Filters::kToSeveral>());
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
template <typename T, int kSize>
struct CornerFactors {
  using Number = std::conditional_t<kInPairs<T, kSize>, T, ComputeType<T>>;
  Number of[kCorners];
};

// The sum over corners of weight times value, in 16 bits where T has as many.
template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Interpolate(
    const CornerFactors<T, kSize>& weights, const Vector<T, kSize> (&corners)[kCorners]) {
  Vector<T, kSize> sums;
  if constexpr (kInPairs<T, kSize>) {
    using Pair = typename PairOf<T>::type;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const auto weight = [&](int corner) { return Pair{weights.of[corner], weights.of[corner]}; };
      const auto value = [&](int corner) {
        return reinterpret_cast<const Pair*>(corners[corner].elements)[i];
      };
      Pair sum = PairOf<T>::Multiply(weight(0), value(0));
#pragma unroll
      for (int corner = 1; corner < kCorners; ++corner) {
        sum = PairOf<T>::MultiplyAdd(weight(corner), value(corner), sum);
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
