// What the CUDA kernels share: types, samples, how threads are laid over them, launching. For .cu
// files only.

#ifndef DEFORM_CONV_CORE_SAMPLES_CUDA_CUH_
#define DEFORM_CONV_CORE_SAMPLES_CUDA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <type_traits>

#include "core/bilinear.h"
#include "core/deform_im2col.h"
#include "core/layout.h"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

constexpr int kThreadsPerBlock = 256;
// Each thread of a block locates one sample; then the block's rows of lanes work through them.
constexpr int kSamplesPerBlock = kThreadsPerBlock;
constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

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
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// `kSize` neighbouring elements, moved in one access.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T elements[kSize];
};

template <typename T, int kSize>
__device__ __forceinline__ Vector<T, kSize> Load(const T* from) {
  return *reinterpret_cast<const Vector<T, kSize>*>(from);
}

template <typename T, typename A, int kSize>
__device__ __forceinline__ void Store(T* to, const A (&numbers)[kSize]) {
  Vector<T, kSize> vector;
#pragma unroll
  for (int i = 0; i < kSize; ++i) vector.elements[i] = static_cast<T>(numbers[i]);
  *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
}

// A sample as a block keeps it in shared memory.
template <typename A>
struct LocatedSample : ImageSample<A, int64_t> {
  A mask;
  int64_t top_left;  // pixel of the batch
  int64_t column;    // where the tap's first column of group 0 is, in elements
  int64_t index;     // (position * deform_groups + g) * taps + tap, of the whole batch
  int channel;       // the deformable group's first
};

// Locates sample `i` of those that positions [begin, ...) take.
template <typename T, typename A>
__device__ LocatedSample<A> Locate(const DeformConvParams& params,
                                   const SampledTensors<T, A>& tensors, int64_t begin, int64_t i) {
  const int64_t taps = params.taps();
  const int64_t per_position = params.mask_channels();
  const int64_t row = i / per_position;
  const int g_tap = static_cast<int>(i - row * per_position);
  const int g = g_tap / static_cast<int>(taps);
  const int tap = g_tap - g * static_cast<int>(taps);
  const int ky = tap / static_cast<int>(params.kernel_w);
  const int kx = tap - ky * static_cast<int>(params.kernel_w);
  const int64_t position = begin + row;
  const int64_t n_y = position / params.out_w;
  const int64_t x = position - n_y * params.out_w;
  const int64_t n = n_y / params.out_h;
  const int64_t y = n_y - n * params.out_h;

  LocatedSample<A> sample;
  sample.index = position * per_position + g_tap;
  sample.column = row * taps * params.in_channels + tap * params.group_in_channels();
  sample.channel = static_cast<int>(g * params.deform_group_channels());
  static_cast<ImageSample<A, int64_t>&>(sample) =
      LocateSample<A, int64_t>(y * params.stride_h - params.pad_top + ky * params.dilation_h,
                               x * params.stride_w - params.pad_left + kx * params.dilation_w,
                               tensors.offset[2 * sample.index],
                               tensors.offset[2 * sample.index + 1], params.in_h, params.in_w);
  sample.top_left = (n * params.in_h + sample.h_low) * params.in_w + sample.w_low;
  sample.mask = tensors.mask == nullptr ? A(1) : tensors.mask[sample.index];
  return sample;
}

// How a block's threads are laid over samples and channels: rows of `lanes` threads, each row on a
// sample, its lanes side by side on the channels. A row never leaves its warp.
struct Lanes {
  int count_log2;

  __device__ int count() const { return 1 << count_log2; }
  __device__ int lane() const { return threadIdx.x & (count() - 1); }
  __device__ int row() const { return threadIdx.x >> count_log2; }
  __device__ int rows() const { return kThreadsPerBlock >> count_log2; }
};

// Where channel `channel` of a sample's tap stands among the columns.
__device__ __forceinline__ int64_t ColumnOf(const DeformConvParams& params, int64_t tap_column,
                                            int channel) {
  if (params.groups == 1) return tap_column + channel;
  const int width = static_cast<int>(params.group_in_channels());
  const int group = channel / width;
  return tap_column + group * params.taps() * width + (channel - group * width);
}

// Distance of each corner from the top left one, in pixels.
__device__ __forceinline__ int64_t CornerDistance(const DeformConvParams& params, int corner) {
  return (corner >= kBottomLeft ? params.in_w : 0) + (corner & 1);
}

// --- Launching, on the host ---

inline std::string LaunchError(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return "";
  return std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(error);
}

inline cudaStream_t StreamOf(void* stream) { return static_cast<cudaStream_t>(stream); }

inline unsigned Blocks(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

template <typename T>
const CudaType<T>* Native(const T* pointer) {
  return reinterpret_cast<const CudaType<T>*>(pointer);
}
template <typename T>
CudaType<T>* Native(T* pointer) {
  return reinterpret_cast<CudaType<T>*>(pointer);
}

inline bool Aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Whether runs of channels can be moved 16 bytes at a time: every run begins on such a boundary.
template <typename T>
bool CanVectorize(const DeformConvParams& params) {
  constexpr int64_t kSize = kVectorBytes / sizeof(T);
  return params.deform_group_channels() % kSize == 0 && params.group_in_channels() % kSize == 0;
}

inline Lanes LanesFor(int64_t channels, int vector_size) {
  const int64_t vectors = (channels + vector_size - 1) / vector_size;
  Lanes lanes{0};
  while ((1 << lanes.count_log2) < kWarp && (int64_t{1} << lanes.count_log2) < vectors) {
    ++lanes.count_log2;
  }
  return lanes;
}

template <typename T>
SampledTensors<CudaType<T>, ComputeType<T>> NativeTensors(
    const SampledTensors<T, ComputeType<T>>& tensors) {
  return {Native(tensors.input), tensors.offset, tensors.mask};
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_SAMPLES_CUDA_CUH_
