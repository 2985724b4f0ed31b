#include <algorithm>
#include <cub/device/device_radix_sort.cuh>

#include "core/deform_im2col_cuda.h"
#include "core/samples_cuda.cuh"

namespace deform_conv {
namespace {

using namespace cuda;  // the kernels' own names

// A corner that some samples share becomes one place to add to. Places are the channels of one
// deformable group in one pixel, of the images that the positions at hand lie in.
//
// `keys` and `entries` are to be sorted together: entry 4 * sample + corner has its place as key,
// or `places` if the corner does not count.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreadsPerBlock)
    ListCornersKernel(DeformConvParams params, SampledTensors<T, A> tensors, int64_t begin,
                      int64_t sample_count, int64_t first_pixel, uint32_t places,
                      uint32_t* __restrict__ keys,     // [samples, corners]
                      uint32_t* __restrict__ entries,  // [samples, corners]
                      A* __restrict__ weights) {       // [samples, corners]
  const int64_t i = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (i >= sample_count) return;
  const LocatedSample<A> sample = Locate(params, tensors, begin, i);
  const int64_t g = sample.channel / params.deform_group_channels();
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    const int64_t pixel = sample.top_left + CornerDistance(params, corner) - first_pixel;
    const bool counts = sample.corners >> corner & 1;
    keys[kCorners * i + corner] =
        counts ? static_cast<uint32_t>(pixel * params.deform_groups + g) : places;
    entries[kCorners * i + corner] = static_cast<uint32_t>(kCorners * i + corner);
    weights[kCorners * i + corner] = sample.mask * sample.weights[corner];
  }
}

// From sorted keys, where each place's entries begin: those of place p are [begins[p],
// begins[p + 1]).
__global__ void __launch_bounds__(kThreadsPerBlock)
    FindPlacesKernel(uint32_t count, uint32_t places, const uint32_t* __restrict__ keys,
                     uint32_t* __restrict__ begins) {  // [places + 1]
  const uint32_t i = blockIdx.x * kThreadsPerBlock + threadIdx.x;
  if (i > count) return;
  const uint32_t first = i == 0 ? 0 : keys[i - 1] + 1;
  const uint32_t last = i == count ? places : keys[i];
  for (uint32_t place = first; place <= last && place <= places; ++place) begins[place] = i;
}

template <int kSize, typename A>
__device__ __forceinline__ void AddTo(A* to, const A (&numbers)[kSize]) {
  constexpr int kMost = kVectorBytes / sizeof(A);
  constexpr int kPart = kSize < kMost ? kSize : kMost;
#pragma unroll
  for (int i = 0; i < kSize; i += kPart) {
    Vector<A, kPart> sums = Load<A, kPart>(to + i);
#pragma unroll
    for (int k = 0; k < kPart; ++k) sums.elements[k] += numbers[i + k];
    *reinterpret_cast<Vector<A, kPart>*>(to + i) = sums;
  }
}

// Adds to each place what its entries bring, in their order.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock)
    GatherKernel(DeformConvParams params, uint32_t places, Lanes lanes,
                 const uint32_t* __restrict__ begins, const uint32_t* __restrict__ entries,
                 const Accumulator<T>* __restrict__ weights,
                 const T* __restrict__ columns,              // of the positions at hand
                 Accumulator<T>* __restrict__ grad_input) {  // of their first image
  using A = Accumulator<T>;
  const uint32_t place = blockIdx.x * lanes.rows() + lanes.row();
  if (place >= places) return;
  const uint32_t begin = begins[place], end = begins[place + 1];
  if (begin == end) return;
  const uint32_t deform_groups = static_cast<uint32_t>(params.deform_groups);
  const uint32_t taps = static_cast<uint32_t>(params.taps());
  const uint32_t pixel = place / deform_groups, g = place - pixel * deform_groups;
  const int channels = static_cast<int>(params.deform_group_channels());
  const int first_channel = static_cast<int>(g) * channels;
  A* pixel_sums = grad_input + int64_t{pixel} * params.in_channels + first_channel;
  for (int c = lanes.lane() * kSize; c < channels; c += lanes.count() * kSize) {
    A sums[kSize] = {};
#pragma unroll 4
    for (uint32_t i = begin; i < end; ++i) {
      const uint32_t entry = entries[i];
      const A weight = weights[entry];
      const uint32_t sample = entry / kCorners;
      const uint32_t row = sample / (deform_groups * taps);
      const uint32_t tap = sample - (row * deform_groups + g) * taps;
      const int64_t tap_column =
          int64_t{row} * taps * params.in_channels + tap * params.group_in_channels();
      const Vector<T, kSize> grads =
          Load<T, kSize>(columns + ColumnOf(params, tap_column, first_channel + c));
#pragma unroll
      for (int k = 0; k < kSize; ++k) sums[k] += weight * static_cast<A>(grads.elements[k]);
    }
    AddTo(pixel_sums + c, sums);
  }
}

// Positions are worked on so many at a time that this many entries exist.
constexpr int64_t kMostEntries = int64_t{1} << 23;

}  // namespace

template <typename T>
std::string DeformCol2ImSortedCuda(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                                   int64_t end, const T* columns, ComputeType<T>* grad_input,
                                   CudaDevice& device) {
  using A = ComputeType<T>;
  using Element = CudaType<T>;
  if (begin == end) return "";
  const cudaStream_t stream = StreamOf(device.stream());
  const int64_t image_positions = params.out_h * params.out_w;
  const int64_t image_pixels = params.in_h * params.in_w;
  const int64_t per_position = kCorners * params.mask_channels();
  const int64_t step = std::min(std::max<int64_t>(kMostEntries / per_position, 1), end - begin);
  const int64_t most_images = std::min((step - 1) / image_positions + 2, params.batch);
  const int64_t most_places = most_images * image_pixels * params.deform_groups;
  if (most_places >= UINT32_MAX || step * per_position >= INT32_MAX) {
    return "images of " + std::to_string(image_pixels) + " pixels with " +
           std::to_string(params.deform_groups) +
           " deformable groups are too large for deterministic gradients";
  }

  // What keys are sorted by: as few bits as places need.
  int bits = 1;
  while (most_places >> bits != 0) ++bits;
  size_t sort_bytes = 0;
  uint32_t* none = nullptr;
  cudaError_t error =
      cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, none, none, none, none,
                                      static_cast<int>(step * per_position), 0, bits, stream);
  if (error != cudaSuccess) return std::string("cub: ") + cudaGetErrorString(error);
  uint32_t *keys, *entries, *begins;
  A* weights;
  void* sort_memory;
  const auto allocate = [&](int64_t bytes, auto** memory) {
    return device.Allocate(bytes, reinterpret_cast<void**>(memory));
  };
  // Unsorted ones first, sorted ones second.
  const int64_t most_entries = step * per_position;
  std::string message = allocate(2 * most_entries * sizeof(uint32_t), &keys);
  if (message.empty()) message = allocate(2 * most_entries * sizeof(uint32_t), &entries);
  if (message.empty()) message = allocate(most_entries * sizeof(A), &weights);
  if (message.empty()) message = allocate((most_places + 1) * sizeof(uint32_t), &begins);
  if (message.empty()) message = allocate(sort_bytes, &sort_memory);
  if (!message.empty()) return message;

  constexpr int kSize = kVectorBytes / sizeof(T);
  const bool vectorize = CanVectorize<T>(params) && Aligned(columns) && Aligned(grad_input);
  const auto gather = vectorize ? GatherKernel<Element, kSize> : GatherKernel<Element, 1>;
  const Lanes lanes = LanesFor(params.deform_group_channels(), vectorize ? kSize : 1);
  const int64_t places_per_block = kThreadsPerBlock >> lanes.count_log2;
  for (int64_t from = begin; from < end; from += step) {
    const int64_t to = std::min(from + step, end);
    const int64_t samples = (to - from) * params.mask_channels();
    const int count = static_cast<int>(kCorners * samples);
    const int64_t first_image = from / image_positions;
    const int64_t images = (to - 1) / image_positions + 1 - first_image;
    const uint32_t places = static_cast<uint32_t>(images * image_pixels * params.deform_groups);
    ListCornersKernel<<<Blocks(samples, kThreadsPerBlock), kThreadsPerBlock, 0, stream>>>(
        params, NativeTensors(tensors), from, samples, first_image * image_pixels, places, keys,
        entries, weights);
    error =
        cub::DeviceRadixSort::SortPairs(sort_memory, sort_bytes, keys, keys + most_entries, entries,
                                        entries + most_entries, count, 0, bits, stream);
    if (error != cudaSuccess) return std::string("cub: ") + cudaGetErrorString(error);
    FindPlacesKernel<<<Blocks(int64_t{count} + 1, kThreadsPerBlock), kThreadsPerBlock, 0, stream>>>(
        static_cast<uint32_t>(count), places, keys + most_entries, begins);
    gather<<<Blocks(places, places_per_block), kThreadsPerBlock, 0, stream>>>(
        params, places, lanes, begins, entries + most_entries, weights,
        Native(columns + (from - begin) * params.taps() * params.in_channels),
        grad_input + first_image * image_pixels * params.in_channels);
    message = LaunchError("GatherKernel");
    if (!message.empty()) return message;
  }
  return "";
}

#define DEFORM_CONV_INSTANTIATE(T)                                                         \
  template std::string DeformCol2ImSortedCuda<T>(                                          \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, \
      const T*, ComputeType<T>*, CudaDevice&);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(double)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
