#include <algorithm>
#include <type_traits>

#include "core/deform_im2col_cuda.h"
#include "core/samples_cuda.cuh"

namespace deform_conv {
namespace {

using namespace cuda;  // the kernels' own names

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock)
    Im2ColKernel(DeformConvParams params, SampledTensors<T, Accumulator<T>> tensors, int64_t begin,
                 int64_t sample_count, Lanes lanes, T* __restrict__ columns) {
  using A = Accumulator<T>;
  __shared__ LocatedSample<A> samples[kSamplesPerBlock];
  const int64_t first = int64_t{blockIdx.x} * kSamplesPerBlock;
  const int count = static_cast<int>(sample_count - first < kSamplesPerBlock ? sample_count - first
                                                                             : kSamplesPerBlock);
  if (threadIdx.x < count)
    samples[threadIdx.x] = Locate(params, tensors, begin, first + threadIdx.x);
  __syncthreads();

  const int channels = static_cast<int>(params.deform_group_channels());
  for (int s = lanes.row(); s < count; s += lanes.rows()) {
    const LocatedSample<A>& sample = samples[s];
    const int corners = sample.corners;
    const T* pixel = tensors.input + sample.top_left * params.in_channels + sample.channel;
    A weights[kCorners];
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      weights[corner] = sample.mask * sample.weights[corner];
    }
    for (int c = lanes.lane() * kSize; c < channels; c += lanes.count() * kSize) {
      A sums[kSize] = {};
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        if (!(corners >> corner & 1)) continue;
        const Vector<T, kSize> values =
            Load<T, kSize>(pixel + CornerDistance(params, corner) * params.in_channels + c);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sums[i] += weights[corner] * static_cast<A>(values.elements[i]);
        }
      }
      Store(columns + ColumnOf(params, sample.column, sample.channel + c), sums);
    }
  }
}

// Adds `kSize` neighbouring numbers to memory. The order among threads is not fixed, so sums differ
// by rounding from run to run.
template <int kSize, typename A>
__device__ __forceinline__ void AtomicAdd(A* to, const A (&values)[kSize]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kFours = std::is_same_v<A, float> && kSize % 4 == 0;
#else
  constexpr bool kFours = false;
#endif
  if constexpr (kFours) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(to + i),
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) atomicAdd(to + i, values[i]);
  }
}

// Writes a sample's gradients by offset and mask, given the products of the columns' gradient with
// each corner, summed over channels.
template <typename A>
__device__ __forceinline__ void WriteGradients(const LocatedSample<A>& sample,
                                               const A (&products)[kCorners],
                                               const SampledGradients<A>& gradients) {
  // Where no corner counts every gradient is 0, also beside an infinite mask.
  A grad_h = 0, grad_w = 0, grad_mask = 0;
  if (sample.corners != 0) {
    grad_h = sample.mask * BilinearDerivativeH(sample.w_fraction, products);
    grad_w = sample.mask * BilinearDerivativeW(sample.h_fraction, products);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      grad_mask += sample.weights[corner] * products[corner];
    }
  }
  if (gradients.offset != nullptr) {
    gradients.offset[2 * sample.index] = grad_h;
    gradients.offset[2 * sample.index + 1] = grad_w;
  }
  if (gradients.mask != nullptr) gradients.mask[sample.index] = grad_mask;
}

// With `replace`, writes each sample over the gradient of its column once that has been read.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock)
    Col2ImKernel(DeformConvParams params, SampledTensors<T, Accumulator<T>> tensors, int64_t begin,
                 int64_t sample_count, Lanes lanes, bool replace, T* __restrict__ columns,
                 SampledGradients<Accumulator<T>> gradients) {
  using A = Accumulator<T>;
  __shared__ LocatedSample<A> samples[kSamplesPerBlock];
  const int64_t first = int64_t{blockIdx.x} * kSamplesPerBlock;
  const int count = static_cast<int>(sample_count - first < kSamplesPerBlock ? sample_count - first
                                                                             : kSamplesPerBlock);
  if (threadIdx.x < count)
    samples[threadIdx.x] = Locate(params, tensors, begin, first + threadIdx.x);
  __syncthreads();

  const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
  const int channels = static_cast<int>(params.deform_group_channels());
  // Every thread makes every round, so that whole warps take part in the shuffles.
  for (int round = 0; round < count; round += lanes.rows()) {
    const int s = round + lanes.row();
    const bool active = s < count;
    const LocatedSample<A>& sample = samples[active ? s : 0];
    const int corners = sample.corners;
    const int64_t pixel = sample.top_left * params.in_channels + sample.channel;
    A products[kCorners] = {};
    const int channels_end = active && (corners != 0 || replace) ? channels : 0;
    for (int c = lanes.lane() * kSize; c < channels_end; c += lanes.count() * kSize) {
      T* column = columns + ColumnOf(params, sample.column, sample.channel + c);
      const Vector<T, kSize> grad = Load<T, kSize>(column);
      A grads[kSize], sums[kSize] = {};
#pragma unroll
      for (int i = 0; i < kSize; ++i) grads[i] = static_cast<A>(grad.elements[i]);
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        if (!(corners >> corner & 1)) continue;
        const int64_t at = pixel + CornerDistance(params, corner) * params.in_channels + c;
        const A weight = sample.mask * sample.weights[corner];
        if (want_products || replace) {
          const Vector<T, kSize> values = Load<T, kSize>(tensors.input + at);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A value = static_cast<A>(values.elements[i]);
            products[corner] += grads[i] * value;
            sums[i] += weight * value;
          }
        }
        if (gradients.input != nullptr) {
          A shares[kSize];
#pragma unroll
          for (int i = 0; i < kSize; ++i) shares[i] = weight * grads[i];
          AtomicAdd<kSize>(gradients.input + at, shares);
        }
      }
      if (replace) Store(column, sums);
    }
    if (!want_products) continue;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      for (int distance = lanes.count() / 2; distance > 0; distance /= 2) {
        products[corner] += __shfl_xor_sync(0xffffffffu, products[corner], distance);
      }
    }
    if (active && lanes.lane() == 0) WriteGradients(sample, products, gradients);
  }
}

constexpr int kTile = 32, kTileRows = 8;

// Transposes each of `batch` matrices [rows, cols], one tile a block.
template <typename From, typename To>
__global__ void __launch_bounds__(kTile* kTileRows)
    TransposeKernel(int64_t rows, int64_t cols, const From* __restrict__ from,
                    To* __restrict__ to) {
  __shared__ To tile[kTile][kTile + 1];  // one more, against bank conflicts
  const int64_t tiles_across = (cols + kTile - 1) / kTile;
  const int64_t tiles_down = (rows + kTile - 1) / kTile;
  const int64_t n = blockIdx.x / (tiles_across * tiles_down);
  const int64_t in_image = blockIdx.x - n * tiles_across * tiles_down;
  const int64_t row_begin = in_image / tiles_across * kTile;
  const int64_t col_begin = in_image % tiles_across * kTile;
  from += n * rows * cols;
  to += n * rows * cols;
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int64_t row = row_begin + i, col = col_begin + threadIdx.x;
    if (row < rows && col < cols) {
      tile[i][threadIdx.x] = static_cast<To>(static_cast<Accumulator<To>>(from[row * cols + col]));
    }
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int64_t col = col_begin + i, row = row_begin + threadIdx.x;
    if (row < rows && col < cols) to[col * rows + row] = tile[threadIdx.x][i];
  }
}

// to[i] = from[i], or to[i] += from[i], kSize numbers at a time.
template <typename From, typename To, bool kAdd, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock)
    ConvertKernel(int64_t vectors, const From* __restrict__ from, To* __restrict__ to) {
  using A = Accumulator<To>;
  const int64_t step = int64_t{gridDim.x} * kThreadsPerBlock;
  for (int64_t v = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x; v < vectors; v += step) {
    const Vector<From, kSize> numbers = Load<From, kSize>(from + v * kSize);
    A sums[kSize] = {};
    if (kAdd) {
      const Vector<To, kSize> before = Load<To, kSize>(to + v * kSize);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] = static_cast<A>(before.elements[i]);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[i] += static_cast<A>(numbers.elements[i]);
    Store(to + v * kSize, sums);
  }
}

// --- Launching ---

template <typename From, typename To>
std::string TransposeCuda(int64_t batch, int64_t rows, int64_t cols, const From* from, To* to,
                          void* stream) {
  const int64_t blocks = batch * ((rows + kTile - 1) / kTile) * ((cols + kTile - 1) / kTile);
  if (blocks == 0) return "";
  TransposeKernel<<<static_cast<unsigned>(blocks), dim3(kTile, kTileRows), 0, StreamOf(stream)>>>(
      rows, cols, Native(from), Native(to));
  return LaunchError("TransposeKernel");
}

template <bool kAdd, typename From, typename To>
std::string ConvertCuda(int64_t count, const From* from, To* to, void* stream) {
  constexpr int64_t kMostBlocks = 1 << 16;
  constexpr int kSize = kVectorBytes / std::max(sizeof(From), sizeof(To));
  if (count == 0) return "";
  const bool vectorize = count % kSize == 0 && Aligned(from) && Aligned(to);
  const int64_t vectors = vectorize ? count / kSize : count;
  const int64_t blocks = std::min<int64_t>((vectors - 1) / kThreadsPerBlock + 1, kMostBlocks);
  const auto kernel = vectorize ? ConvertKernel<CudaType<From>, CudaType<To>, kAdd, kSize>
                                : ConvertKernel<CudaType<From>, CudaType<To>, kAdd, 1>;
  kernel<<<static_cast<unsigned>(blocks), kThreadsPerBlock, 0, StreamOf(stream)>>>(
      vectors, Native(from), Native(to));
  return LaunchError("ConvertKernel");
}

}  // namespace

template <typename T>
std::string DeformIm2ColCuda(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                             int64_t end, T* columns, void* stream) {
  using Element = CudaType<T>;
  constexpr int kSize = kVectorBytes / sizeof(T);
  const int64_t samples = (end - begin) * params.mask_channels();
  if (samples == 0) return "";
  const bool vectorize = CanVectorize<T>(params) && Aligned(tensors.input) && Aligned(columns);
  const auto kernel = vectorize ? Im2ColKernel<Element, kSize> : Im2ColKernel<Element, 1>;
  kernel<<<Blocks(samples, kSamplesPerBlock), kThreadsPerBlock, 0, StreamOf(stream)>>>(
      params, NativeTensors(tensors), begin, samples,
      LanesFor(params.deform_group_channels(), vectorize ? kSize : 1), Native(columns));
  return LaunchError("Im2ColKernel");
}

template <typename T>
std::string DeformCol2ImCuda(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                             int64_t end, bool replace, T* columns,
                             const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  constexpr int kSize = kVectorBytes / sizeof(T);
  const int64_t samples = (end - begin) * params.mask_channels();
  if (samples == 0) return "";
  const bool vectorize = CanVectorize<T>(params) && Aligned(tensors.input) && Aligned(columns) &&
                         Aligned(gradients.input);
  const auto kernel = vectorize ? Col2ImKernel<Element, kSize> : Col2ImKernel<Element, 1>;
  kernel<<<Blocks(samples, kSamplesPerBlock), kThreadsPerBlock, 0, StreamOf(stream)>>>(
      params, NativeTensors(tensors), begin, samples,
      LanesFor(params.deform_group_channels(), vectorize ? kSize : 1), replace, Native(columns),
      gradients);
  return LaunchError("Col2ImKernel");
}

template <typename From, typename To>
std::string ToNhwcCuda(DataFormat format, const TensorExtent& extent, const From* from, To* to,
                       void* stream) {
  if (format == DataFormat::kNhwc) return ConvertCuda<false>(extent.elements(), from, to, stream);
  return TransposeCuda(extent.batch, extent.channels, extent.pixels, from, to, stream);
}

template <typename From, typename To>
std::string FromNhwcCuda(DataFormat format, const TensorExtent& extent, const From* from, To* to,
                         void* stream) {
  if (format == DataFormat::kNhwc) return ConvertCuda<false>(extent.elements(), from, to, stream);
  return TransposeCuda(extent.batch, extent.pixels, extent.channels, from, to, stream);
}

template <typename From, typename To>
std::string AddCuda(int64_t count, const From* from, To* to, void* stream) {
  return ConvertCuda<true>(count, from, to, stream);
}

std::string ZeroCuda(void* memory, int64_t bytes, void* stream) {
  if (bytes == 0) return "";
  const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, StreamOf(stream));
  return error == cudaSuccess ? "" : std::string("cudaMemsetAsync: ") + cudaGetErrorString(error);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                               \
  template std::string DeformIm2ColCuda<T>(const DeformConvParams&,                              \
                                           const SampledTensors<T, ComputeType<T>>&, int64_t,    \
                                           int64_t, T*, void*);                                  \
  template std::string DeformCol2ImCuda<T>(                                                      \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, bool, \
      T*, const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(double)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

#define DEFORM_CONV_INSTANTIATE(From, To)                                                        \
  template std::string ToNhwcCuda<From, To>(DataFormat, const TensorExtent&, const From*, To*,   \
                                            void*);                                              \
  template std::string FromNhwcCuda<To, From>(DataFormat, const TensorExtent&, const To*, From*, \
                                              void*);
DEFORM_CONV_INSTANTIATE(float, float)
DEFORM_CONV_INSTANTIATE(double, double)
DEFORM_CONV_INSTANTIATE(Half, Half)
DEFORM_CONV_INSTANTIATE(BFloat16, BFloat16)
DEFORM_CONV_INSTANTIATE(Half, float)
DEFORM_CONV_INSTANTIATE(BFloat16, float)
#undef DEFORM_CONV_INSTANTIATE

template std::string AddCuda<Half, float>(int64_t, const Half*, float*, void*);
template std::string AddCuda<BFloat16, float>(int64_t, const BFloat16*, float*, void*);

}  // namespace deform_conv
