#include <algorithm>

#include "core/cuda/general/kernels.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/integer_math.h"

namespace deform_conv {
namespace cuda {
namespace {

constexpr int kSquareSide = 32, kSquareRows = 8;

// Transposes each of `batch` matrices [rows, cols]. A thread block takes a square, kSquareRows rows
// at a time.
template <typename From, typename To>
__global__ void __launch_bounds__(kSquareSide* kSquareRows)
    TransposeKernel(int64_t rows, int64_t cols, const From* __restrict__ from,
                    To* __restrict__ to) {
  __shared__ To square[kSquareSide][kSquareSide + 1];  // one more, against bank conflicts
  // Not more than there are thread blocks, so 32 bits hold them.
  const uint32_t squares_across = static_cast<uint32_t>(CeilDiv<int64_t>(cols, kSquareSide));
  const uint32_t squares_down = static_cast<uint32_t>(CeilDiv<int64_t>(rows, kSquareSide));
  const uint32_t n = blockIdx.x / (squares_across * squares_down);
  const uint32_t in_image = blockIdx.x - n * squares_across * squares_down;
  const int64_t row_begin = int64_t{in_image / squares_across} * kSquareSide;
  const int64_t col_begin = int64_t{in_image % squares_across} * kSquareSide;
  from += n * rows * cols;
  to += n * rows * cols;
  for (int i = threadIdx.y; i < kSquareSide; i += kSquareRows) {
    const int64_t row = row_begin + i, col = col_begin + threadIdx.x;
    if (row < rows && col < cols) {
      square[i][threadIdx.x] =
          static_cast<To>(static_cast<ComputeType<To>>(from[row * cols + col]));
    }
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kSquareSide; i += kSquareRows) {
    const int64_t col = col_begin + i, row = row_begin + threadIdx.x;
    if (row < rows && col < cols) to[col * rows + row] = square[threadIdx.x][i];
  }
}

// to[i] = from[i], or to[i] += from[i], kSize numbers at a time.
template <typename From, typename To, bool kAdd, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock)
    ConvertKernel(int64_t vectors, const From* __restrict__ from, To* __restrict__ to) {
  const int64_t step = int64_t{gridDim.x} * kThreadsPerBlock;
  for (int64_t v = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x; v < vectors; v += step) {
    const Vector<From, kSize> numbers = Load<From, kSize>(from + v * kSize);
    ComputeType<To> sums[kSize] = {};
    if (kAdd) {
      const Vector<To, kSize> before = Load<To, kSize>(to + v * kSize);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] = static_cast<ComputeType<To>>(before.elements[i]);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[i] += static_cast<ComputeType<To>>(numbers.elements[i]);
    Store(to + v * kSize, sums);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock) OnesKernel(int64_t count, T* __restrict__ to) {
  const int64_t i = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (i < count) to[i] = static_cast<T>(ComputeType<T>(1));
}

template <typename From, typename To>
std::string Transpose(int64_t batch, int64_t rows, int64_t cols, const From* from, To* to,
                      void* stream) {
  const int64_t blocks =
      batch * CeilDiv<int64_t>(rows, kSquareSide) * CeilDiv<int64_t>(cols, kSquareSide);
  if (blocks == 0) return "";
  return LaunchKernel("TransposeKernel", TransposeKernel<CudaType<From>, CudaType<To>>,
                      static_cast<unsigned>(blocks), dim3(kSquareSide, kSquareRows), 0, stream,
                      rows, cols, AsCuda(from), AsCuda(to));
}

template <bool kAdd, typename From, typename To>
std::string Convert(int64_t count, const From* from, To* to, void* stream) {
  constexpr int64_t kMostBlocks = 1 << 16;
  constexpr int kSize = kVec16Bytes / std::max(sizeof(From), sizeof(To));
  if (count == 0) return "";
  const bool vectorize = count % kSize == 0 && IsAligned(from) && IsAligned(to);
  const int64_t vectors = vectorize ? count / kSize : count;
  const int64_t blocks =
      std::min<int64_t>(CeilDiv<int64_t>(vectors, kThreadsPerBlock), kMostBlocks);
  const auto kernel = vectorize ? ConvertKernel<CudaType<From>, CudaType<To>, kAdd, kSize>
                                : ConvertKernel<CudaType<From>, CudaType<To>, kAdd, 1>;
  return LaunchKernel("ConvertKernel", kernel, static_cast<unsigned>(blocks), kThreadsPerBlock, 0,
                      stream, vectors, AsCuda(from), AsCuda(to));
}

}  // namespace

template <typename From, typename To>
std::string ToNative(DataFormat format, const TensorExtent& extent, const From* from, To* to,
                     void* stream) {
  if (format == DataFormat::kNhwc) return Convert<false>(extent.elements(), from, to, stream);
  return Transpose(extent.batch, extent.channels, extent.pixels, from, to, stream);
}

template <typename From, typename To>
std::string FromNative(DataFormat format, const TensorExtent& extent, const From* from, To* to,
                       void* stream) {
  if (format == DataFormat::kNhwc) return Convert<false>(extent.elements(), from, to, stream);
  return Transpose(extent.batch, extent.pixels, extent.channels, from, to, stream);
}

template <typename From, typename To>
std::string Add(int64_t count, const From* from, To* to, void* stream) {
  return Convert<true>(count, from, to, stream);
}

template <typename T>
std::string FillWithOnes(int64_t count, T* to, void* stream) {
  if (count == 0) return "";
  return LaunchKernel("OnesKernel", OnesKernel<CudaType<T>>, Blocks(count, kThreadsPerBlock),
                      kThreadsPerBlock, 0, stream, count, AsCuda(to));
}

std::string Zero(void* memory, int64_t bytes, void* stream) {
  if (bytes == 0) return "";
  return ErrorOf(cudaMemsetAsync(memory, 0, bytes, StreamOf(stream)), "cudaMemsetAsync");
}

#define DEFORM_CONV_INSTANTIATE(From, To)                                                      \
  template std::string ToNative<From, To>(DataFormat, const TensorExtent&, const From*, To*,   \
                                          void*);                                              \
  template std::string FromNative<To, From>(DataFormat, const TensorExtent&, const To*, From*, \
                                            void*);
DEFORM_CONV_INSTANTIATE(float, float)
DEFORM_CONV_INSTANTIATE(double, double)
DEFORM_CONV_INSTANTIATE(Half, Half)
DEFORM_CONV_INSTANTIATE(BFloat16, BFloat16)
DEFORM_CONV_INSTANTIATE(Half, float)
DEFORM_CONV_INSTANTIATE(BFloat16, float)
#undef DEFORM_CONV_INSTANTIATE

template std::string Add<Half, float>(int64_t, const Half*, float*, void*);
template std::string Add<BFloat16, float>(int64_t, const BFloat16*, float*, void*);

#define DEFORM_CONV_INSTANTIATE(T) template std::string FillWithOnes<T>(int64_t, T*, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
