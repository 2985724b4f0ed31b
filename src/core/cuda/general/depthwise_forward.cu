#include <algorithm>

#include "core/cuda/general/depthwise.cuh"
#include "core/cuda/general/kernels.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

// How thread blocks are laid over positions and channels. A thread block has a slice of the
// channels: some whole deformable groups, or a part of one.
struct DepthwisePlan {
  int lanes;            // of a position, side by side on the slice's channels
  int positions;        // of a thread block
  int stride;           // of the table's taps, odd, so that no two meet in a bank
  int groups;           // deformable groups of a slice
  int slices_of_group;  // where a slice is a part of a group; otherwise 1
  int slices;
  Divisor by_lanes, by_samples, by_slices_of_group, by_group_channels, by_out_w, by_out_h;
};

template <typename OffsetT>
struct alignas(2 * sizeof(OffsetT)) PixelAndMask {
  OffsetT mask;
  int32_t packed_pixel;  // of the top left corner, as in FusedSizes; may lie outside
};

// A thread block's located samples: [groups][taps][stride], a position each.
template <typename T, int kSize>
struct DepthwiseTable {
  using SampleWeights = CornerFactors<T, kSize>;
  using Pixel = PixelAndMask<ComputeType<T>>;
  static constexpr int kEntryBytes = sizeof(SampleWeights) + sizeof(Pixel);

  SampleWeights* weights;
  Pixel* pixels;

  __device__ DepthwiseTable(char* shared, int entries)
      : weights(reinterpret_cast<SampleWeights*>(shared)),
        pixels(reinterpret_cast<Pixel*>(weights + entries)) {}

  __device__ __forceinline__ void Locate(const FusedSizes& sizes,
                                         const SampledTensors<T, ComputeType<T>>& tensors,
                                         const Position& position, int g_tap, int entry) const {
    const int64_t index = sizes.IndexOf(position) * (sizes.deform_groups * sizes.taps) + g_tap;
    const TapSample<ComputeType<T>> sample(sizes, position, Tap::Of(sizes, g_tap),
                                           tensors.offset[2 * index],
                                           tensors.offset[2 * index + 1]);
    const bool counts = sample.inside();
    ComputeType<T> of_corners[kCorners];
    BilinearWeights(sample.h.fraction, sample.w.fraction, of_corners);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      weights[entry].of[corner] = counts ? of_corners[corner] : ComputeType<T>(0);
    }
    // What lies outside is 0, whatever the mask.
    const ComputeType<T> mask = !counts                   ? ComputeType<T>(0)
                                : tensors.mask == nullptr ? ComputeType<T>(1)
                                                          : tensors.mask[index];
    const int32_t pixel = (position.n * sizes.in_h + sample.h.low) * sizes.in_w + sample.w.low;
    const int32_t bits = CornerBits(sample.h, sample.w, sizes.in_h, sizes.in_w);
    pixels[entry] = {mask, counts ? pixel * (1 << kCornerBits) + bits : 0};
  }
};

template <typename T, int kSize, Filters kFilters>
__global__ void __launch_bounds__(kThreadsPerBlock)
    DepthwiseForwardKernel(FusedSizes sizes, SampledTensors<T, ComputeType<T>> tensors,
                           const T* __restrict__ filters, DepthwisePlan plan,
                           T* __restrict__ output) {
  using Number = ComputeType<T>;
  constexpr bool kOneOutput = HasOneOutput(kFilters);
  extern __shared__ __align__(16) char shared[];
  const int samples = plan.groups * sizes.taps;
  const DepthwiseTable<T, kSize> table(shared, samples * plan.stride);
  const int group_of_slice = plan.by_slices_of_group.Divide(blockIdx.y);
  const int slice_of_group = blockIdx.y - group_of_slice * plan.slices_of_group;
  const int first_group = group_of_slice * plan.groups;
  const int first_position = blockIdx.x * plan.positions;
  const int positions = min(plan.positions, sizes.positions - first_position);

  for (int i = threadIdx.x; i < positions * samples; i += kThreadsPerBlock) {
    const int p = plan.by_samples.Divide(i);
    const int g_tap = i - p * samples;
    if (first_group * sizes.taps + g_tap >= sizes.deform_groups * sizes.taps) continue;
    const int n_y = plan.by_out_w.Divide(first_position + p);
    const int n = plan.by_out_h.Divide(n_y);
    const Position position = {n, n_y - n * sizes.out_h, first_position + p - n_y * sizes.out_w};
    table.Locate(sizes, tensors, position, first_group * sizes.taps + g_tap,
                 g_tap * plan.stride + p);
  }
  __syncthreads();

  const int p = plan.by_lanes.Divide(threadIdx.x);
  const int in_slice = (threadIdx.x - p * plan.lanes + slice_of_group * plan.lanes) * kSize;
  const int c = first_group * sizes.deform_group_channels + in_slice;
  const int limit =
      plan.slices_of_group > 1 ? sizes.deform_group_channels : sizes.in_channels - c + in_slice;
  if (p >= positions || in_slice >= limit) return;
  const int group = plan.slices_of_group > 1 ? 0 : plan.by_group_channels.Divide(in_slice);
  const int multiplier = kOneOutput ? 1 : sizes.group_out_channels;
  const int64_t pixel = sizes.in_channels, row = int64_t{sizes.in_w} * pixel;
  T* const out = output + int64_t{first_position + p} * sizes.out_channels + c * multiplier;
  const T* const image = tensors.input + c;
  for (int m = 0; m < multiplier; ++m) {
    Number sums[kSize] = {};
    const T* filter = kFilters == Filters::kNone ? nullptr : filters + c * multiplier + m;
    int entry = group * sizes.taps * plan.stride + p;
#pragma unroll(kOneOutput ? 3 : 1)
    for (int tap = 0; tap < sizes.taps; ++tap) {
      const PixelAndMask<Number> sample = table.pixels[entry];
      const T* const top_left = image + (sample.packed_pixel >> kCornerBits) * pixel;
      Vector<T, kSize> corners[kCorners];
      LoadCorners(top_left, row, pixel, sample.packed_pixel, corners);
      const auto values = Interpolate<T, kSize>(table.weights[entry], corners);
      if constexpr (kFilters == Filters::kNone) {
        AddProduct(sample.mask, values, sums);
      } else {
        const auto factors = LoadOutputs<kSize, kOneOutput>(filter, multiplier);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sums[i] += sample.mask * static_cast<Number>(values.elements[i]) *
                     static_cast<Number>(factors.elements[i]);
        }
        filter += sizes.out_channels;
      }
      entry += plan.stride;
    }
    if constexpr (kOneOutput) {
      Store(out, sums);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) out[i * multiplier + m] = static_cast<T>(sums[i]);
    }
  }
}

constexpr int64_t kMostSharedBytes = 48 << 10;  // that need not be asked for
constexpr int64_t kMostLanes = 32;

template <typename T, int kSize>
DepthwisePlan PlanForward(const DeformConvParams& params) {
  const int64_t vectors = params.deform_group_channels() / kSize;
  DepthwisePlan plan;
  plan.slices_of_group = static_cast<int>(CeilDiv(vectors, kMostLanes));
  plan.groups = static_cast<int>(
      std::clamp<int64_t>(kMostLanes / std::max<int64_t>(vectors, 1), 1, params.deform_groups));
  plan.lanes = static_cast<int>(CeilDiv<int64_t>(plan.groups * vectors, plan.slices_of_group));
  plan.slices =
      static_cast<int>(CeilDiv<int64_t>(params.deform_groups, plan.groups)) * plan.slices_of_group;
  const int64_t entry_bytes = DepthwiseTable<CudaType<T>, kSize>::kEntryBytes;
  const int samples = plan.groups * static_cast<int>(params.taps());
  plan.positions = static_cast<int>(std::clamp<int64_t>(
      kMostSharedBytes / (samples * entry_bytes) - 1, 1, kThreadsPerBlock / plan.lanes));
  plan.stride = plan.positions | 1;
  plan.by_lanes = Divisor(plan.lanes);
  plan.by_samples = Divisor(samples);
  plan.by_slices_of_group = Divisor(plan.slices_of_group);
  plan.by_group_channels = Divisor(static_cast<uint32_t>(params.deform_group_channels()));
  plan.by_out_w = Divisor(static_cast<uint32_t>(params.out_w));
  plan.by_out_h = Divisor(static_cast<uint32_t>(params.out_h));
  return plan;
}

template <typename T, int kSize, Filters kFilters>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   const T* filters, T* output, void* stream) {
  using Element = CudaType<T>;
  const DepthwisePlan plan = PlanForward<T, kSize>(params);
  const int64_t bytes = int64_t{DepthwiseTable<Element, kSize>::kEntryBytes} * plan.stride *
                        plan.groups * params.taps();
  const dim3 blocks(Blocks(params.out_positions(), plan.positions), plan.slices);
  return LaunchKernel("DepthwiseForwardKernel", DepthwiseForwardKernel<Element, kSize, kFilters>,
                      blocks, kThreadsPerBlock, bytes, stream, FusedSizes(params), AsCuda(tensors),
                      AsCuda(filters), plan, AsCuda(output));
}

}  // namespace

template <typename T>
std::string DepthwiseForwardMisfit(const DeformConvParams& params) {
  DEFORM_CONV_RETURN_IF_ERROR(SizesOfImageMisfit(params));
  const DepthwisePlan plan = PlanForward<T, 1>(params);
  const int64_t bytes =
      int64_t{DepthwiseTable<CudaType<T>, 1>::kEntryBytes} * plan.groups * params.taps();
  if (bytes > kMostSharedBytes) return "a position has too many samples for shared memory";
  if (plan.slices > 65535) return "there are too many channels";
  return "";
}

template <typename T>
std::string DepthwiseForward(const DeformConvParams& params,
                             const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                             T* output, void* stream) {
  constexpr int kSize = kVec16Size<T>;
  if (params.out_positions() * params.in_channels == 0) return "";
  const bool vectorize = params.deform_group_channels() % kSize == 0 && IsAligned(tensors.input) &&
                         IsAligned(filters) && IsAligned(output);
  return WithFilters(params, [&](auto kind) {
    const auto launch = vectorize ? Launch<T, kSize, kind()> : Launch<T, 1, kind()>;
    return launch(params, tensors, filters, output, stream);
  });
}

#define DEFORM_CONV_INSTANTIATE(T)                                         \
  template std::string DepthwiseForwardMisfit<T>(const DeformConvParams&); \
  template std::string DepthwiseForward<T>(                                \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, T*, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
