// CUDA's element types, and vectors of elements that are moved in one access. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_TYPES_CUH_
#define DEFORM_CONV_CORE_CUDA_TYPES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/params.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {
namespace cuda {

// --- Element types ---

// CUDA's own types, which have the arithmetic.
template <typename T>
struct CudaTypeOf {
  using type = T;
};
template <>
struct CudaTypeOf<Half> {
  using type = __half;
};
template <>
struct CudaTypeOf<BFloat16> {
  using type = __nv_bfloat16;
};
template <typename T>
using CudaType = typename CudaTypeOf<T>::type;

template <typename T>
const CudaType<T>* AsCuda(const T* pointer) {
  return reinterpret_cast<const CudaType<T>*>(pointer);
}
template <typename T>
CudaType<T>* AsCuda(T* pointer) {
  return reinterpret_cast<CudaType<T>*>(pointer);
}
template <typename T>
SampledTensors<CudaType<T>, ComputeType<T>> AsCuda(
    const SampledTensors<T, ComputeType<T>>& tensors) {
  return {AsCuda(tensors.input), tensors.offset, tensors.mask};
}

// --- Vectors ---

// 16 bytes, a "vec16", are the most that a thread moves in one access.
constexpr int kVec16Bytes = 16;
// Elements of a vec16.
template <typename T>
constexpr int kVec16Size = kVec16Bytes / sizeof(T);

inline bool IsAligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVec16Bytes == 0;
}

// Whether runs of channels can be moved 16 bytes at a time: every run begins on such a boundary.
template <typename T>
bool CanVectorize(const DeformConvParams& params) {
  return params.deform_group_channels() % kVec16Size<T> == 0 &&
         params.group_in_channels() % kVec16Size<T> == 0;
}

// `kSize` neighbouring elements, moved in one access.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T elements[kSize];
};

template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Load(const T* from) {
  return *reinterpret_cast<const Vector<T, kSize>*>(from);
}

template <typename T, typename Number, int kSize>
__device__ __forceinline__ void Store(T* to, const Number (&numbers)[kSize]) {
  Vector<T, kSize> vector;
#pragma unroll
  for (int i = 0; i < kSize; ++i) vector.elements[i] = static_cast<T>(numbers[i]);
  *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_TYPES_CUH_
