// Adding samples' corners to pixels in an order that is always the same: they are sorted by pixel,
// and each pixel gathers its own. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_CORNER_SORT_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_CORNER_SORT_CUH_

#include <algorithm>
#include <cstdint>
#include <cub/device/device_radix_sort.cuh>
#include <string>
#include <type_traits>

#include "core/cuda/general/kernels.h"
#include "core/cuda/general/samples.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {

// A bin is what corners of several samples add to: the channels of one deformable group in one
// pixel, of the images that the positions at hand lie in.
//
// Keys and entries are sorted together: entry 4 * sample + corner has its bin as key, or the number
// of bins if the corner does not count.

// From sorted keys, where each bin's entries begin: those of bin b are [begins[b], begins[b + 1]).
// A thread searches for one bin, however few entries there are between it and the next.
static __global__ void __launch_bounds__(kThreadsPerBlock)
    FindBinsKernel(uint32_t count, uint32_t bins, const uint32_t* __restrict__ keys,
                   uint32_t* __restrict__ begins) {  // [bins + 1]
  const int64_t bin = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (bin > bins) return;
  uint32_t low = 0, high = count;  // the first key of at least `bin` is among [low, high]
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (keys[middle] < bin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  begins[bin] = low;
}

template <int kSize, typename Number>
__device__ __forceinline__ void AddTo(Number* to, const Number (&numbers)[kSize]) {
  constexpr int kMost = kVec16Size<Number>;
  constexpr int kPart = kSize < kMost ? kSize : kMost;
#pragma unroll
  for (int i = 0; i < kSize; i += kPart) {
    Vector<Number, kPart> sums = Load<Number, kPart>(to + i);
#pragma unroll
    for (int k = 0; k < kPart; ++k) sums.elements[k] += numbers[i + k];
    *reinterpret_cast<Vector<Number, kPart>*>(to + i) = sums;
  }
}

// Adds to each bin what its entries bring, in their order. Four thread blocks of a multiprocessor:
// for more, the compiler would rather spill registers.
template <typename T, int kSize>
static __global__ void __launch_bounds__(kThreadsPerBlock, 4)
    GatherKernel(DeformConvParams params, uint32_t bins, Lanes lanes,
                 const uint32_t* __restrict__ begins, const uint32_t* __restrict__ entries,
                 const ComputeType<T>* __restrict__ weights,
                 const T* __restrict__ columns,              // of the positions at hand
                 ComputeType<T>* __restrict__ grad_input) {  // of their first image
  const uint32_t bin = blockIdx.x * lanes.rows() + lanes.row();
  if (bin >= bins) return;
  const uint32_t begin = begins[bin], end = begins[bin + 1];
  if (begin == end) return;
  const uint32_t deform_groups = static_cast<uint32_t>(params.deform_groups);
  const uint32_t taps = static_cast<uint32_t>(params.taps()), all_taps = deform_groups * taps;
  const uint32_t pixel = bin / deform_groups, g = bin - pixel * deform_groups;
  const int64_t row_size = taps * params.in_channels;
  const uint32_t tap_size = static_cast<uint32_t>(params.group_in_channels());
  const int channels = static_cast<int>(params.deform_group_channels());
  const int first_channel = static_cast<int>(g) * channels;
  ComputeType<T>* pixel_sums = grad_input + int64_t{pixel} * params.in_channels + first_channel;
  for (int c = lanes.lane() * kSize; c < channels; c += lanes.count() * kSize) {
    ComputeType<T> sums[kSize] = {};
    // Of the channel, less what g_tap counts too much: the taps of the deformable groups before.
    const int64_t column = ColumnOf(params, 0, first_channel + c) - int64_t{g} * taps * tap_size;
#pragma unroll 4
    for (uint32_t i = begin; i < end; ++i) {
      const uint32_t entry = entries[i];
      const ComputeType<T> weight = weights[entry];
      const uint32_t sample = entry / kCorners;
      const uint32_t row = sample / all_taps, g_tap = sample - row * all_taps;
      const Vector<T, kSize> grads =
          Load<T, kSize>(columns + (column + row * row_size + int64_t{g_tap} * tap_size));
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        sums[k] += weight * static_cast<ComputeType<T>>(grads.elements[k]);
      }
    }
    AddTo(pixel_sums + c, sums);
  }
}

// --- Launching ---

// The most entries that are sorted at a time.
constexpr int64_t kMostEntries = int64_t{1} << 23;

// How many positions are sorted at a time, and the most entries and bins that they have.
struct SortPlan {
  int64_t step;
  int64_t entries, bins;
  int key_bits;  // as few as bins need

  SortPlan(const DeformConvParams& params, int64_t positions) {
    const int64_t entries_of_position = kCorners * params.mask_channels();
    step = std::min(std::max<int64_t>(kMostEntries / entries_of_position, 1), positions);
    while (step > 1 && BinsOf(params, step) >= UINT32_MAX) step /= 2;
    entries = step * entries_of_position;
    bins = BinsOf(params, step);
    key_bits = 1;
    while (bins >> key_bits != 0) ++key_bits;
  }

  // The bins of the images that so many positions lie in.
  static int64_t BinsOf(const DeformConvParams& params, int64_t positions) {
    const int64_t image = params.image_positions();
    const int64_t images = std::min((positions - 2 + image) / image + 1, params.batch);
    return images * params.image_pixels() * params.deform_groups;
  }
};

// Memory for one step.
template <typename OffsetT>
struct SortMemory {
  uint32_t *keys, *sorted_keys, *entries, *sorted_entries, *begins;
  OffsetT* weights;
  char* cub_memory;
  size_t cub_bytes = 0;

  // All in one piece of the workspace.
  std::string Reserve(const SortPlan& plan, Workspace& workspace) {
    uint32_t* none = nullptr;
    DEFORM_CONV_RETURN_IF_ERROR(
        ErrorOf(cub::DeviceRadixSort::SortPairs(nullptr, cub_bytes, none, none, none, none,
                                                static_cast<int>(plan.entries), 0, plan.key_bits),
                "cub"));
    void* memory = nullptr;
    DEFORM_CONV_RETURN_IF_ERROR(workspace.Reserve(Divide(plan, nullptr), &memory));
    Divide(plan, static_cast<char*>(memory));
    return "";
  }

 private:
  // Points to parts of `memory`, if there is any. Returns how many bytes they take.
  int64_t Divide(const SortPlan& plan, char* memory) {
    int64_t bytes = 0;
    const auto take = [&](int64_t count, auto** part) {
      using Pointer = std::remove_reference_t<decltype(*part)>;
      if (memory != nullptr) *part = reinterpret_cast<Pointer>(memory + bytes);
      bytes += RoundUp<kVec16Bytes>(count * static_cast<int64_t>(sizeof(**part)));
    };
    for (uint32_t** part : {&keys, &sorted_keys, &entries, &sorted_entries}) {
      take(plan.entries, part);
    }
    take(plan.entries, &weights);
    take(plan.bins + 1, &begins);
    take(static_cast<int64_t>(cub_bytes), &cub_memory);
    return bytes;
  }
};

// --- The whole ---

// Adds to grad_input what the corners of the samples of positions [begin, end) bring, from the
// columns' gradient at these positions. Of `params`, reads nothing that tells one axis from
// another.
//
// list_corners(from, samples, first_pixel, bins, memory) launches what writes memory.keys,
// memory.entries and memory.weights [samples, corners] of `samples` samples, of positions from
// `from` on; pixels are counted from `first_pixel` on.
template <typename T, typename ListCorners>
std::string SortAndGather(const DeformConvParams& params, int64_t begin, int64_t end,
                          const T* columns, ComputeType<T>* grad_input, Workspace& workspace,
                          void* stream, const ListCorners& list_corners) {
  const int64_t image_positions = params.image_positions(), image_pixels = params.image_pixels();
  if (begin == end || image_pixels == 0) return "";
  DEFORM_CONV_RETURN_IF_ERROR(Col2ImSortedMisfit(params));
  const SortPlan plan(params, end - begin);
  SortMemory<ComputeType<T>> memory;
  DEFORM_CONV_RETURN_IF_ERROR(memory.Reserve(plan, workspace));

  constexpr int kSize = kVec16Size<T>;
  const bool vectorize = CanVectorize<T>(params) && IsAligned(columns) && IsAligned(grad_input);
  const auto gather = vectorize ? GatherKernel<CudaType<T>, kSize> : GatherKernel<CudaType<T>, 1>;
  const Lanes lanes = LanesFor(params.deform_group_channels(), vectorize ? kSize : 1);
  const int64_t bins_per_block = kThreadsPerBlock >> lanes.count_log2;
  for (int64_t from = begin; from < end; from += plan.step) {
    const int64_t to = std::min(from + plan.step, end);
    const int64_t samples = (to - from) * params.mask_channels();
    const int count = static_cast<int>(kCorners * samples);
    const int64_t first_image = from / image_positions;
    const int64_t images = (to - 1) / image_positions + 1 - first_image;
    const uint32_t bins = static_cast<uint32_t>(images * image_pixels * params.deform_groups);
    DEFORM_CONV_RETURN_IF_ERROR(
        list_corners(from, samples, first_image * image_pixels, bins, memory));
    DEFORM_CONV_RETURN_IF_ERROR(ErrorOf(
        cub::DeviceRadixSort::SortPairs(memory.cub_memory, memory.cub_bytes, memory.keys,
                                        memory.sorted_keys, memory.entries, memory.sorted_entries,
                                        count, 0, plan.key_bits, StreamOf(stream)),
        "cub"));
    DEFORM_CONV_RETURN_IF_ERROR(
        LaunchKernel("FindBinsKernel", FindBinsKernel, Blocks(int64_t{bins} + 1, kThreadsPerBlock),
                     kThreadsPerBlock, 0, stream, static_cast<uint32_t>(count), bins,
                     memory.sorted_keys, memory.begins));
    DEFORM_CONV_RETURN_IF_ERROR(LaunchKernel(
        "GatherKernel", gather, Blocks(bins, bins_per_block), kThreadsPerBlock, 0, stream, params,
        bins, lanes, memory.begins, memory.sorted_entries, memory.weights,
        AsCuda(columns + (from - begin) * params.taps() * params.in_channels),
        grad_input + first_image * image_pixels * params.in_channels));
  }
  return "";
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_CORNER_SORT_CUH_
