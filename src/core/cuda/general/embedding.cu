// Tensors of a layer that is embedded in a larger one: padded, and back.

#include <algorithm>

#include "core/cuda/general/kernels.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/gpu/embedding.h"
#include "core/integer_math.h"

namespace deform_conv {
namespace cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 16;  // more work is done in turn

unsigned BlocksFor(int64_t work) {
  return static_cast<unsigned>(
      std::min<int64_t>(CeilDiv<int64_t>(work, kThreadsPerBlock), kMostBlocks));
}

// --- Channels ---

// A vec16 of padded channels for each thread.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    PadChannelsKernel(int64_t vectors, int vectors_of_row, int channels, const T* __restrict__ from,
                      T* __restrict__ to) {
  constexpr int kSize = kVec16Size<T>;
  const int64_t step = int64_t{gridDim.x} * kThreadsPerBlock;
  for (int64_t v = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x; v < vectors; v += step) {
    const int64_t row = v / vectors_of_row;
    const int begin = static_cast<int>(v - row * vectors_of_row) * kSize;
    T elements[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      elements[i] = begin + i < channels ? from[row * channels + begin + i] : T(0.0f);
    }
    Store(to + v * kSize, elements);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    UnpadChannelsKernel(int64_t vectors, int vectors_of_row, int channels,
                        const T* __restrict__ from, T* __restrict__ to) {
  constexpr int kSize = kVec16Size<T>;
  const int64_t step = int64_t{gridDim.x} * kThreadsPerBlock;
  for (int64_t v = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x; v < vectors; v += step) {
    const int64_t row = v / vectors_of_row;
    const int begin = static_cast<int>(v - row * vectors_of_row) * kSize;
    if (begin >= channels) continue;
    const Vector<T, kSize> vector = Load<T, kSize>(from + v * kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (begin + i < channels) to[row * channels + begin + i] = vector.elements[i];
    }
  }
}

// --- Filters ---

// Where an element of the layer's filters lies in those of the larger layer. Channels are counted
// over all groups.
class FiltersMap {
 public:
  explicit FiltersMap(const Embedding& embedding)
      : group_in_(Narrow(embedding.layer.group_in_channels())),
        group_out_(Narrow(embedding.layer.group_out_channels())),
        out_channels_(Narrow(embedding.layer.out_channels)),
        larger_group_in_(Narrow(embedding.larger.group_in_channels())),
        larger_out_channels_(Narrow(embedding.larger.out_channels)),
        run_(Narrow(embedding.layer.in_channels / embedding.in_runs)),
        padded_run_(Narrow(embedding.larger.in_channels / embedding.in_runs)),
        merged_out_(Narrow(embedding.layer.out_channels / embedding.larger.groups)),
        padded_merged_out_(Narrow(embedding.larger.group_out_channels())) {}

  // The place of the layer's element `index`.
  __device__ __forceinline__ int64_t LargerIndex(int64_t index) const {
    const int64_t row = index / out_channels_;
    const int out = static_cast<int>(index - row * out_channels_);
    const int64_t tap = row / group_in_;
    const int in = static_cast<int>(row - tap * group_in_) + out / group_out_ * group_in_;
    const int merged = out / merged_out_;
    const int larger_in = in / run_ * padded_run_ + in % run_ - merged * larger_group_in_;
    const int larger_out = merged * padded_merged_out_ + out % merged_out_;
    return (tap * larger_group_in_ + larger_in) * larger_out_channels_ + larger_out;
  }

  // The layer's element at the larger layer's `larger_index`; -1 where that is 0.
  __device__ __forceinline__ int64_t Index(int64_t larger_index) const {
    const int64_t row = larger_index / larger_out_channels_;
    const int larger_out = static_cast<int>(larger_index - row * larger_out_channels_);
    const int64_t tap = row / larger_group_in_;
    const int merged = larger_out / padded_merged_out_;
    const int larger_in =
        static_cast<int>(row - tap * larger_group_in_) + merged * larger_group_in_;
    const int out_of_merged = larger_out % padded_merged_out_, in_of_run = larger_in % padded_run_;
    if (out_of_merged >= merged_out_ || in_of_run >= run_) return -1;
    const int out = merged * merged_out_ + out_of_merged;
    const int in = larger_in / padded_run_ * run_ + in_of_run - out / group_out_ * group_in_;
    if (in < 0 || in >= group_in_) return -1;
    return (tap * group_in_ + in) * out_channels_ + out;
  }

 private:
  // Channels are within 32 bits.
  static int Narrow(int64_t channels) { return static_cast<int>(channels); }

  int group_in_, group_out_, out_channels_;
  int larger_group_in_, larger_out_channels_;
  int run_, padded_run_;
  int merged_out_, padded_merged_out_;  // output channels of a merged group
};

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    EmbedFiltersKernel(FiltersMap map, int64_t larger_size, const T* __restrict__ from,
                       T* __restrict__ to) {
  const int64_t step = int64_t{gridDim.x} * kThreadsPerBlock;
  for (int64_t i = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x; i < larger_size;
       i += step) {
    const int64_t index = map.Index(i);
    to[i] = index >= 0 ? from[index] : T(0.0f);
  }
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreadsPerBlock)
    ExtractFiltersKernel(FiltersMap map, int64_t size, bool add, const From* __restrict__ from,
                         To* __restrict__ to) {
  const int64_t step = int64_t{gridDim.x} * kThreadsPerBlock;
  for (int64_t i = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x; i < size; i += step) {
    const float number = static_cast<float>(from[map.LargerIndex(i)]);
    to[i] = static_cast<To>(add ? static_cast<float>(to[i]) + number : number);
  }
}

}  // namespace

template <typename T>
std::string PadChannels(int64_t rows, int64_t channels, const T* from, int64_t padded_channels,
                        T* to, void* stream) {
  const int64_t vectors_of_row = padded_channels / kVec16Size<T>;
  const int64_t vectors = rows * vectors_of_row;
  if (vectors == 0) return "";
  return LaunchKernel("PadChannelsKernel", PadChannelsKernel<CudaType<T>>, BlocksFor(vectors),
                      kThreadsPerBlock, 0, stream, vectors, static_cast<int>(vectors_of_row),
                      static_cast<int>(channels), AsCuda(from), AsCuda(to));
}

template <typename T>
std::string UnpadChannels(int64_t rows, int64_t padded_channels, const T* from, int64_t channels,
                          T* to, void* stream) {
  const int64_t vectors_of_row = padded_channels / kVec16Size<T>;
  const int64_t vectors = rows * vectors_of_row;
  if (vectors == 0) return "";
  return LaunchKernel("UnpadChannelsKernel", UnpadChannelsKernel<CudaType<T>>, BlocksFor(vectors),
                      kThreadsPerBlock, 0, stream, vectors, static_cast<int>(vectors_of_row),
                      static_cast<int>(channels), AsCuda(from), AsCuda(to));
}

template <typename T>
std::string EmbedFilters(const Embedding& embedding, const T* filters, T* larger, void* stream) {
  const int64_t size = embedding.larger.filters_size();
  return LaunchKernel("EmbedFiltersKernel", EmbedFiltersKernel<CudaType<T>>, BlocksFor(size),
                      kThreadsPerBlock, 0, stream, FiltersMap(embedding), size, AsCuda(filters),
                      AsCuda(larger));
}

template <typename From, typename To>
std::string ExtractFilters(const Embedding& embedding, const From* larger, bool add, To* filters,
                           void* stream) {
  const int64_t size = embedding.layer.filters_size();
  return LaunchKernel("ExtractFiltersKernel", ExtractFiltersKernel<CudaType<From>, CudaType<To>>,
                      BlocksFor(size), kThreadsPerBlock, 0, stream, FiltersMap(embedding), size,
                      add, AsCuda(larger), AsCuda(filters));
}

#define DEFORM_CONV_INSTANTIATE(T)                                                       \
  template std::string PadChannels<T>(int64_t, int64_t, const T*, int64_t, T*, void*);   \
  template std::string UnpadChannels<T>(int64_t, int64_t, const T*, int64_t, T*, void*); \
  template std::string EmbedFilters<T>(const Embedding&, const T*, T*, void*);           \
  template std::string ExtractFilters<T, T>(const Embedding&, const T*, bool, T*, void*);
DEFORM_CONV_FOR_TENSOR_CORE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

template std::string ExtractFilters<Half, float>(const Embedding&, const Half*, bool, float*,
                                                 void*);
template std::string ExtractFilters<BFloat16, float>(const Embedding&, const BFloat16*, bool,
                                                     float*, void*);

}  // namespace cuda
}  // namespace deform_conv
