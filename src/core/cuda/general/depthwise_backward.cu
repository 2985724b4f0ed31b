#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "core/cuda/general/atomic_add.cuh"
#include "core/cuda/general/depthwise.cuh"
#include "core/cuda/general/kernels.h"
#include "core/cuda/sm80/mma.cuh"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

// A thread block has a patch of an image's positions, and one deformable group. Nearly all that the
// input's gradient gets from it falls into a region of pixels around the patch.
struct PatchPlan {
  int height_log2, width_log2;       // of a patch
  int patches_h, patches_w;          // of an image
  int region_h, region_w;            // in pixels, at most
  int lanes_log2;                    // side by side on the channels of a position
  Divisor by_patches, by_patches_w;  // patches of an image, of a row of them
  bool want_offset_or_mask, want_scatter;

  DEFORM_CONV_INLINE int positions() const { return 1 << (height_log2 + width_log2); }
  DEFORM_CONV_INLINE int pixels() const { return region_h * region_w; }
};

constexpr int kPositionBits = 6, kTapBits = 11, kPixelBits = 12;  // of an entry
constexpr int kMostSamples = 640;  // of a patch with more than one position
constexpr int kMostTaps = 1 << kTapBits;
constexpr int kMostPixels = 1 << kPixelBits;  // of a region
constexpr int kMargin = 4;                    // of the region, in pixels

// A sample of the patch, located.
template <typename OffsetT>
struct PatchSample {
  OffsetT h_fraction, w_fraction;
  OffsetT mask;
  int32_t corner_bits;   // of all corners; above them, of those outside the region
  int32_t pixel;         // of the batch, where the top left corner lies
  int32_t region_pixel;  // the same, of the region
};

// What a sample's corner brings to a pixel of the region.
template <typename OffsetT>
struct Entry {
  OffsetT weight;  // times the mask
  uint32_t packed;

  static DEFORM_CONV_INLINE uint32_t Pack(int position, int tap, int pixel) {
    return static_cast<uint32_t>(pixel << (kPositionBits + kTapBits) | tap << kPositionBits |
                                 position);
  }
  DEFORM_CONV_INLINE int position() const { return packed & ((1 << kPositionBits) - 1); }
  DEFORM_CONV_INLINE int tap() const { return packed >> kPositionBits & ((1 << kTapBits) - 1); }
  DEFORM_CONV_INLINE int pixel() const { return packed >> (kPositionBits + kTapBits); }
};

// A thread block's shared memory.
template <typename OffsetT>
struct PatchMemory {
  using Products = Vector<OffsetT, kCorners>;

  Products* products;             // [positions][taps]: of the columns' gradient with each corner
  PatchSample<OffsetT>* samples;  // [positions][taps]
  Entry<OffsetT>* entries;        // [positions * taps * corners], sorted by pixel
  int* ends;                      // [pixels]: where each pixel's entries end

  static DEFORM_CONV_INLINE int64_t Bytes(int samples, int pixels) {
    return samples * int64_t{sizeof(Products) + sizeof(PatchSample<OffsetT>) +
                             kCorners * sizeof(Entry<OffsetT>)} +
           pixels * int64_t{sizeof(int)};
  }
  __device__ PatchMemory(char* shared, int count) {
    products = reinterpret_cast<Products*>(shared);
    samples = reinterpret_cast<PatchSample<OffsetT>*>(products + count);
    entries = reinterpret_cast<Entry<OffsetT>*>(samples + count);
    ends = reinterpret_cast<int*>(entries + kCorners * count);
  }
};

// Where the patch of a thread block lies.
struct Patch {
  Position first;
  int group;          // deformable
  int top, left;      // the region's first pixel, in the image
  int bottom, right;  // past the region's last pixel

  __device__ Patch(const FusedSizes& sizes, const PatchPlan& plan) {
    group = blockIdx.y;
    first.n = plan.by_patches.Divide(blockIdx.x);
    const int patch = blockIdx.x - first.n * plan.patches_h * plan.patches_w;
    const int row = plan.by_patches_w.Divide(patch);
    first.y = row << plan.height_log2;
    first.x = (patch - row * plan.patches_w) << plan.width_log2;
    const int h = first.y * sizes.stride_h - sizes.pad_top - kMargin;
    const int w = first.x * sizes.stride_w - sizes.pad_left - kMargin;
    top = min(max(h, 0), sizes.in_h);
    left = min(max(w, 0), sizes.in_w);
    bottom = min(max(h + plan.region_h, 0), sizes.in_h);
    right = min(max(w + plan.region_w, 0), sizes.in_w);
  }

  __device__ __forceinline__ int region_w() const { return right - left; }
  __device__ __forceinline__ int pixels() const { return (bottom - top) * region_w(); }
  __device__ __forceinline__ Position PositionOf(const PatchPlan& plan, int p) const {
    const int row = p >> plan.width_log2;
    return {first.n, first.y + row, first.x + p - (row << plan.width_log2)};
  }
};

__device__ __forceinline__ bool Exists(const FusedSizes& sizes, const Position& position) {
  return position.y < sizes.out_h && position.x < sizes.out_w;
}

// Locates the patch's samples, and counts the corners of each of the region's pixels.
template <typename T, typename OffsetT>
__device__ void LocatePatch(const FusedSizes& sizes, const SampledTensors<T, OffsetT>& tensors,
                            const PatchPlan& plan, const Patch& patch,
                            const PatchMemory<OffsetT>& memory) {
  const int positions = plan.positions();
  for (int s = threadIdx.x; s < positions * sizes.taps; s += kThreadsPerBlock) {
    const int p = sizes.by_taps.Divide(s);
    const int tap = s - p * sizes.taps;
    PatchSample<OffsetT>& sample = memory.samples[s];
    sample.corner_bits = 0;
    memory.products[s] = {};
    const Position position = patch.PositionOf(plan, p);
    if (!Exists(sizes, position)) continue;
    const int g_tap = patch.group * sizes.taps + tap;
    const int64_t index = sizes.IndexOf(position) * (sizes.deform_groups * sizes.taps) + g_tap;
    const auto located = LocateTap(sizes, tensors.offset, position, g_tap, index);
    if (located.corner_bits == 0) continue;
    sample.h_fraction = located.h_fraction;
    sample.w_fraction = located.w_fraction;
    sample.mask = tensors.mask == nullptr ? OffsetT(1) : tensors.mask[index];
    sample.pixel = (position.n * sizes.in_h + located.h_low) * sizes.in_w + located.w_low;
    sample.region_pixel =
        (located.h_low - patch.top) * patch.region_w() + located.w_low - patch.left;
    int far_bits = 0;
    if (plan.want_scatter) {
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        if (!(located.corner_bits >> corner & 1)) continue;
        const int h = located.h_low + corner / 2, w = located.w_low + corner % 2;
        if (h >= patch.top && h < patch.bottom && w >= patch.left && w < patch.right) {
          atomicAdd(memory.ends + (h - patch.top) * patch.region_w() + w - patch.left, 1);
        } else {
          far_bits |= 1 << corner;
        }
      }
    }
    sample.corner_bits = located.corner_bits | far_bits << kCorners;
  }
}

// From counts, where each pixel's entries begin.
__device__ __forceinline__ void BeginEntries(int pixels, int* counts) {
  using Scan = cub::BlockScan<int, kThreadsPerBlock>;
  __shared__ typename Scan::TempStorage storage;
  const int each = CeilDiv(pixels, kThreadsPerBlock);
  const int first = min(static_cast<int>(threadIdx.x) * each, pixels);
  const int last = min(first + each, pixels);
  int sum = 0;
  for (int i = first; i < last; ++i) sum += counts[i];
  int begin;
  Scan(storage).ExclusiveSum(sum, begin);
  for (int i = first; i < last; ++i) {
    const int count = counts[i];
    counts[i] = begin;
    begin += count;
  }
}

// Writes the entries of each pixel, in an order that is not fixed. Afterwards `ends` are ends.
template <typename OffsetT>
__device__ void SortEntries(const FusedSizes& sizes, int positions, const Patch& patch,
                            const PatchMemory<OffsetT>& memory) {
  for (int s = threadIdx.x; s < positions * sizes.taps; s += kThreadsPerBlock) {
    const PatchSample<OffsetT>& sample = memory.samples[s];
    const int near_bits = sample.corner_bits & ~(sample.corner_bits >> kCorners) & kAllCorners;
    if (near_bits == 0) continue;
    const int p = sizes.by_taps.Divide(s);
    const int tap = s - p * sizes.taps;
    OffsetT weights[kCorners];
    BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      if (!(near_bits >> corner & 1)) continue;
      const int pixel = sample.region_pixel + corner / 2 * patch.region_w() + corner % 2;
      memory.entries[atomicAdd(memory.ends + pixel, 1)] = {sample.mask * weights[corner],
                                                           Entry<OffsetT>::Pack(p, tap, pixel)};
    }
  }
}

// What a thread block reads and writes besides the sampled tensors.
template <typename T>
struct DepthwiseGradients {
  const T* filters;
  const T* grad_output;
  SampledGradients<ComputeType<T>> sampled;
  ComputeType<T>* grad_filters;  // added to
};

// The columns' gradient of `kSize` channels at a position and a tap: the sum over the outputs of a
// channel of the gradient times the filter.
template <typename T, int kSize, bool kOneOutput>
__device__ __forceinline__ Vector<T, kSize> ColumnsGradient(const T* grad, const T* filter,
                                                            int multiplier) {
  if constexpr (kOneOutput) {
    return Multiply(Load<T, kSize>(grad), Load<T, kSize>(filter));
  } else {
    Vector<T, kSize> gradient;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      ComputeType<T> sum = 0;
      for (int m = 0; m < multiplier; ++m) {
        sum += static_cast<ComputeType<T>>(grad[i * multiplier + m]) *
               static_cast<ComputeType<T>>(filter[i * multiplier + m]);
      }
      gradient.elements[i] = static_cast<T>(sum);
    }
    return gradient;
  }
}

// Adds up what the rows of a warp have, for the lanes of the first, and adds it to memory.
template <int kSize, bool kOneOutput, typename Number>
__device__ __forceinline__ void AddRows(int lanes_log2, Number (&values)[kSize], bool adds,
                                        int multiplier, Number* to) {
  for (int distance = 1 << lanes_log2; distance < kWarp; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
  }
  if (adds) {
    if constexpr (kOneOutput) {
      AtomicAdd<kSize>(to, values);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) atomicAdd(to + i * multiplier, values[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) values[i] = 0;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kHasMma = true;
#else
constexpr bool kHasMma = false;
#endif

// Lanes of a position where the tensor cores multiply.
constexpr int kMmaLanesLog2 = 2;

// The products of the columns' gradient with each corner, summed over the channels of a position's
// lanes. Called by whole warps. Returns whether this lane of the position has them.
//
// Tensor cores multiply two corners of the warp's 8 positions (16 rows) with the gradient of the
// same 8 (8 columns). Row and column of a position are of the same lanes, so that channels match,
// in whatever order. What is wanted is the diagonal.
template <typename T, int kSize>
__device__ __forceinline__ bool CornerProducts(const Vector<T, kSize> (&corners)[kCorners],
                                               const Vector<T, kSize>& gradient, int lanes_log2,
                                               ComputeType<T> (&products)[kCorners]) {
  const int lane = threadIdx.x & ((1 << lanes_log2) - 1);
  if constexpr (kHasMma && sizeof(T) == 2 && kSize == 8) {
    const auto word = [](const Vector<T, kSize>& vector, int i) {
      return reinterpret_cast<const uint32_t*>(vector.elements)[i];
    };
    const int row = (threadIdx.x % kWarp) >> kMmaLanesLog2;
#pragma unroll
    for (int corner = 0; corner < kCorners; corner += 2) {
      float sums[4] = {};
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        MmaSync<T>(sums,
                   {word(corners[corner], k), word(corners[corner + 1], k),
                    word(corners[corner], k + 1), word(corners[corner + 1], k + 1)},
                   {word(gradient, k), word(gradient, k + 1)});
      }
      products[corner] = row & 1 ? sums[1] : sums[0];
      products[corner + 1] = row & 1 ? sums[3] : sums[2];
    }
    return lane == row / 2;
  } else {
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      products[corner] = 0;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        products[corner] += static_cast<ComputeType<T>>(gradient.elements[i]) *
                            static_cast<ComputeType<T>>(corners[corner].elements[i]);
      }
      for (int distance = 1 << lanes_log2 >> 1; distance > 0; distance /= 2) {
        products[corner] += __shfl_xor_sync(0xffffffffu, products[corner], distance);
      }
    }
    return lane == 0;
  }
}

// Adds to the input's gradient what falls outside the region.
template <typename T, int kSize>
__device__ __forceinline__ void ScatterFar(const FusedSizes& sizes,
                                           const PatchSample<ComputeType<T>>& sample,
                                           const Vector<T, kSize>& gradient,
                                           ComputeType<T>* grad_input) {
  using Number = ComputeType<T>;
  Number weights[kCorners];
  BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    if (!(sample.corner_bits >> (kCorners + corner) & 1)) continue;
    Number terms[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      terms[i] = weights[corner] * (sample.mask * static_cast<Number>(gradient.elements[i]));
    }
    AtomicAdd<kSize>(grad_input + int64_t{corner / 2 * sizes.in_w + corner % 2} * sizes.in_channels,
                     terms);
  }
}

// Adds a sample to `column`.
template <typename T, int kSize>
__device__ __forceinline__ void AddColumn(const PatchSample<ComputeType<T>>& sample,
                                          const Vector<T, kSize> (&corners)[kCorners],
                                          ComputeType<T> (&column)[kSize]) {
  ComputeType<T> weights[kCorners];
  Weights<T, kInPairs<T, kSize>> rounded;
  BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) rounded.Set(corner, weights[corner]);
  AddProduct(sample.mask, Interpolate<T, kSize>(rounded, corners), column);
}

// Adds what a sample and the output's gradient at its position bring to the filters' gradient.
template <typename T, int kSize, bool kOneOutput>
__device__ __forceinline__ void AddToFilters(const T* grad, int multiplier,
                                             const ComputeType<T> (&column)[kSize],
                                             ComputeType<T> (&sums)[kSize]) {
  const Vector<T, kSize> values = LoadOutputs<kSize, kOneOutput>(grad, multiplier);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sums[i] += static_cast<ComputeType<T>>(values.elements[i]) * column[i];
  }
}

// The products of the columns' gradient with the corners, which are left in shared memory, and the
// filters' gradient. Adds to the input's what falls outside the region.
//
// A warp has rows of lanes. A row takes one sample at a time, its lanes the channels. The warps
// have equal parts of the samples, in the order of their taps.
template <typename T, int kSize, bool kOneOutput>
__device__ void MultiplySamples(const FusedSizes& sizes,
                                const SampledTensors<T, ComputeType<T>>& tensors,
                                const DepthwiseGradients<T>& gradients, const PatchPlan& plan,
                                const Patch& patch, const PatchMemory<ComputeType<T>>& memory) {
  using Number = ComputeType<T>;
  constexpr int kWarps = kThreadsPerBlock / kWarp;
  const int positions = plan.positions();
  const int lane = threadIdx.x & ((1 << plan.lanes_log2) - 1);
  const int row = (threadIdx.x % kWarp) >> plan.lanes_log2;
  const int rows = kWarp >> plan.lanes_log2;
  const int parts = CeilDiv(positions, rows);
  const int warp = threadIdx.x / kWarp;
  const int first = sizes.taps * parts * warp / kWarps;
  const int last = sizes.taps * parts * (warp + 1) / kWarps;
  const bool want_filters = gradients.grad_filters != nullptr;
  const int multiplier = kOneOutput ? 1 : sizes.group_out_channels;

  const int64_t pixel = sizes.in_channels, in_row = int64_t{sizes.in_w} * pixel;
  const int64_t first_position = sizes.IndexOf(patch.first);

  for (int c = lane * kSize; c - lane * kSize < sizes.deform_group_channels;
       c += kSize << plan.lanes_log2) {
    const int channel = patch.group * sizes.deform_group_channels + c;
    const bool in_group = c < sizes.deform_group_channels;
    const T* grad_output =
        gradients.grad_output + first_position * sizes.out_channels + channel * multiplier;
    const T* image = tensors.input + channel;
    asm("" : "+l"(grad_output), "+l"(image));  // as in AddEntries()
    Number filter_sums[kSize] = {};
    int tap = first / parts, part = first - tap * parts;
    for (int unit = first; unit < last; ++unit) {
      const int p = part * rows + row;
      const int s = p * sizes.taps + tap;
      const int y = p >> plan.width_log2, x = p - (y << plan.width_log2);
      const T* const grad = grad_output + (y * sizes.out_w + x) * sizes.out_channels;
      const int outputs = tap * sizes.out_channels + channel * multiplier;
      PatchSample<Number> sample;
      sample.corner_bits = 0;
      if (p < positions) sample = memory.samples[s];
      const bool counts = sample.corner_bits != 0 && in_group;
      // A sample that is 0 has a part in the filters' gradient where that of the output is
      // infinite.
      const bool exists = p < positions && in_group &&
                          Exists(sizes, {patch.first.n, patch.first.y + y, patch.first.x + x});
      Vector<T, kSize> corners[kCorners] = {}, gradient = {};
      Number column[kSize] = {};
      if (counts) {
        const int64_t top_left = sample.pixel * pixel;
        LoadCorners(image + top_left, in_row, pixel, sample.corner_bits, corners);
        gradient =
            ColumnsGradient<T, kSize, kOneOutput>(grad, gradients.filters + outputs, multiplier);
        if (sample.corner_bits >> kCorners) {
          ScatterFar(sizes, sample, gradient, gradients.sampled.input + top_left + channel);
        }
      }
      if (plan.want_offset_or_mask) {
        Number products[kCorners];
        if (CornerProducts(corners, gradient, plan.lanes_log2, products) && p < positions) {
          auto& sums = memory.products[s].elements;
#pragma unroll
          for (int corner = 0; corner < kCorners; ++corner) sums[corner] += products[corner];
        }
      }
      if (want_filters) {
        if (counts) AddColumn(sample, corners, column);
        const bool last_of_tap = unit + 1 == last || part + 1 == parts;
        for (int m = 0; m < multiplier; ++m) {
          if (exists) AddToFilters<T, kSize, kOneOutput>(grad + m, multiplier, column, filter_sums);
          // With one output a channel, once for all samples of the tap.
          if (!kOneOutput || last_of_tap) {
            AddRows<kSize, kOneOutput>(plan.lanes_log2, filter_sums, row == 0 && in_group,
                                       multiplier, gradients.grad_filters + outputs + m);
          }
        }
      }
      if (++part == parts) part = 0, ++tap;
    }
  }
}

// Adds to the input's gradient what the entries bring. Rows of lanes have equal parts of them, so a
// pixel's may be in the parts of several.
template <typename T, int kSize, bool kOneOutput>
__device__ void AddEntries(const FusedSizes& sizes, const DepthwiseGradients<T>& gradients,
                           const PatchPlan& plan, const Patch& patch,
                           const PatchMemory<ComputeType<T>>& memory) {
  using Number = ComputeType<T>;
  const int count = patch.pixels() == 0 ? 0 : memory.ends[patch.pixels() - 1];
  const int rows = kThreadsPerBlock >> plan.lanes_log2;
  const int row = threadIdx.x >> plan.lanes_log2;
  const int begin = count * row / rows, end = count * (row + 1) / rows;
  const int multiplier = kOneOutput ? 1 : sizes.group_out_channels;
  const int64_t first_position = sizes.IndexOf(patch.first);
  const float by_region_w = 1.0f / patch.region_w();
  const int first_pixel = (patch.first.n * sizes.in_h + patch.top) * sizes.in_w + patch.left;

  for (int c = (threadIdx.x & ((1 << plan.lanes_log2) - 1)) * kSize;
       c < sizes.deform_group_channels; c += kSize << plan.lanes_log2) {
    const int channel = patch.group * sizes.deform_group_channels + c;
    const T* grad =
        gradients.grad_output + first_position * sizes.out_channels + channel * multiplier;
    const T* filter = gradients.filters + channel * multiplier;
    Number* const grad_input = gradients.sampled.input + channel;
    // Or the compiler would compute them from the arguments in every round.
    asm("" : "+l"(grad), "+l"(filter));
    Number sums[kSize] = {};
    Entry<Number> entry = {}, next = {};
    if (begin < end) entry = memory.entries[begin];
    for (int e = begin; e < end; ++e, entry = next) {
      const int y = entry.position() >> plan.width_log2;
      const int position = y * sizes.out_w + entry.position() - (y << plan.width_log2);
      const auto gradient = ColumnsGradient<T, kSize, kOneOutput>(
          grad + int64_t{position} * sizes.out_channels, filter + entry.tap() * sizes.out_channels,
          multiplier);
      AddProduct(entry.weight, gradient, sums);
      const int pixel = entry.pixel();
      if (e + 1 < end) {
        next = memory.entries[e + 1];
        if (next.pixel() == pixel) continue;
      }
      const int h = static_cast<int>((pixel + 0.5f) * by_region_w);
      const int at = first_pixel + h * sizes.in_w + pixel - h * patch.region_w();
      AtomicAdd<kSize>(grad_input + int64_t{at} * sizes.in_channels, sums);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[i] = 0;
    }
  }
}

template <typename Number>
__device__ void WriteOffsetAndMask(const FusedSizes& sizes, const PatchPlan& plan,
                                   const Patch& patch, const PatchMemory<Number>& memory,
                                   const SampledGradients<Number>& gradients) {
  for (int s = threadIdx.x; s < plan.positions() * sizes.taps; s += kThreadsPerBlock) {
    const int p = sizes.by_taps.Divide(s);
    const Position position = patch.PositionOf(plan, p);
    if (!Exists(sizes, position)) continue;
    const int64_t index = sizes.IndexOf(position) * (sizes.deform_groups * sizes.taps) +
                          patch.group * sizes.taps + s - p * sizes.taps;
    const PatchSample<Number> sample = memory.samples[s];
    auto products = memory.products[s];
    Number weights[kCorners], grad_dy = 0, grad_dx = 0, grad_mask = 0;
    // Where no corner counts every gradient is 0, also beside an infinite mask.
    if (sample.corner_bits != 0) {
      BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        // Those with corners that do not count are 0 times the gradient, which may be infinite.
        if (!(sample.corner_bits >> corner & 1)) products.elements[corner] = 0;
        grad_mask += weights[corner] * products.elements[corner];
      }
      grad_dy = sample.mask * BilinearDerivativeH(sample.w_fraction, products.elements);
      grad_dx = sample.mask * BilinearDerivativeW(sample.h_fraction, products.elements);
    }
    if (gradients.offset != nullptr) {
      gradients.offset[2 * index] = grad_dy;
      gradients.offset[2 * index + 1] = grad_dx;
    }
    if (gradients.mask != nullptr) gradients.mask[index] = grad_mask;
  }
}

template <typename T, int kSize, bool kOneOutput>
__global__ void __launch_bounds__(kThreadsPerBlock)
    DepthwiseBackwardKernel(FusedSizes sizes, SampledTensors<T, ComputeType<T>> tensors,
                            DepthwiseGradients<T> gradients, PatchPlan plan) {
  extern __shared__ __align__(16) char shared[];
  const Patch patch(sizes, plan);
  const PatchMemory<ComputeType<T>> memory(shared, sizes.taps * plan.positions());
  const int pixels = plan.want_scatter ? patch.pixels() : 0;
  for (int i = threadIdx.x; i < pixels; i += kThreadsPerBlock) memory.ends[i] = 0;
  __syncthreads();
  LocatePatch(sizes, tensors, plan, patch, memory);
  __syncthreads();
  if (plan.want_scatter) {
    BeginEntries(pixels, memory.ends);
    __syncthreads();
    SortEntries(sizes, plan.positions(), patch, memory);
    __syncthreads();
    AddEntries<T, kSize, kOneOutput>(sizes, gradients, plan, patch, memory);
  }
  MultiplySamples<T, kSize, kOneOutput>(sizes, tensors, gradients, plan, patch, memory);
  if (!plan.want_offset_or_mask) return;
  __syncthreads();
  WriteOffsetAndMask(sizes, plan, patch, memory, gradients.sampled);
}

// The side of a patch along one axis, or that of a region.
int64_t RegionSide(int64_t patch, int64_t stride, int64_t kernel, int64_t dilation) {
  return (patch - 1) * stride + (kernel - 1) * dilation + 1 + 2 * kMargin;
}

int LanesLog2(const DeformConvParams& params, int vector_size, int element_bytes) {
  if (element_bytes == 2 && vector_size > 1) return kMmaLanesLog2;
  // As many as leave at most one in eight without channels.
  const int64_t vectors = CeilDiv<int64_t>(params.deform_group_channels(), vector_size);
  int lanes_log2 = 0;
  for (int log2 = 1; 1 << log2 <= kWarp; ++log2) {
    if ((CeilDiv<int64_t>(vectors, 1 << log2) << log2) * 8 <= vectors * 9) lanes_log2 = log2;
  }
  return lanes_log2;
}

PatchPlan PlanPatches(const DeformConvParams& params, int vector_size, int element_bytes) {
  PatchPlan plan = {};
  plan.height_log2 = plan.width_log2 = 3;
  while (plan.height_log2 > 0 && int64_t{1} << (plan.height_log2 - 1) >= params.out_h) {
    --plan.height_log2, ++plan.width_log2;
  }
  while (plan.width_log2 > 0 && int64_t{1} << (plan.width_log2 - 1) >= params.out_w) {
    --plan.width_log2;
  }
  while (plan.positions() > 1 && plan.positions() * params.taps() > kMostSamples) {
    --(plan.height_log2 > plan.width_log2 ? plan.height_log2 : plan.width_log2);
  }
  const int64_t height = int64_t{1} << plan.height_log2, width = int64_t{1} << plan.width_log2;
  plan.patches_h = static_cast<int>(CeilDiv(params.out_h, height));
  plan.patches_w = static_cast<int>(CeilDiv(params.out_w, width));
  const int64_t region_w =
      std::min({RegionSide(width, params.stride_w, params.kernel_w, params.dilation_w), params.in_w,
                int64_t{kMostPixels}});
  const int64_t region_h =
      std::min({RegionSide(height, params.stride_h, params.kernel_h, params.dilation_h),
                params.in_h, kMostPixels / std::max<int64_t>(region_w, 1)});
  plan.by_patches = Divisor(plan.patches_h * plan.patches_w);
  plan.by_patches_w = Divisor(plan.patches_w);
  plan.region_w = static_cast<int>(region_w);
  plan.region_h = static_cast<int>(region_h);
  plan.lanes_log2 = LanesLog2(params, vector_size, element_bytes);
  return plan;
}

template <typename T, int kSize, bool kOneOutput>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   const DepthwiseGradients<CudaType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  PatchPlan plan = PlanPatches(params, kSize, sizeof(T));
  plan.want_scatter = gradients.sampled.input != nullptr;
  plan.want_offset_or_mask =
      gradients.sampled.offset != nullptr || gradients.sampled.mask != nullptr;
  const int64_t bytes = PatchMemory<ComputeType<T>>::Bytes(
      static_cast<int>(plan.positions() * params.taps()), plan.pixels());
  const auto kernel = DepthwiseBackwardKernel<Element, kSize, kOneOutput>;
  DEFORM_CONV_RETURN_IF_ERROR(AllowSharedBytes("DepthwiseBackwardKernel", kernel, bytes));
  const dim3 blocks(static_cast<unsigned>(params.batch * plan.patches_h * plan.patches_w),
                    static_cast<unsigned>(params.deform_groups));
  kernel<<<blocks, kThreadsPerBlock, bytes, StreamOf(stream)>>>(FusedSizes(params), AsCuda(tensors),
                                                                gradients, plan);
  return LaunchError("DepthwiseBackwardKernel");
}

}  // namespace

template <typename T>
std::string DepthwiseBackwardMisfit(const DeformConvParams& params) {
  DEFORM_CONV_RETURN_IF_ERROR(SizesOfImageMisfit(params));
  if (params.taps() > kMostTaps) return "the kernel has too many taps";
  if (params.deform_groups > 65535) return "there are too many deformable groups";
  if ((params.out_w + 1) * params.out_channels >= int64_t{1} << 31 >> kPositionBits) {
    return "a row of the output has too many numbers";
  }
  return "";
}

template <typename T>
std::string DepthwiseBackward(const DeformConvParams& params,
                              const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                              const T* grad_output,
                              const SampledGradients<ComputeType<T>>& gradients,
                              ComputeType<T>* grad_filters, void* stream) {
  constexpr int kSize = kVec16Size<T>;
  if (params.out_positions() * params.in_channels == 0) return "";
  const bool vectorize = params.deform_group_channels() % kSize == 0 && IsAligned(tensors.input) &&
                         IsAligned(filters) && IsAligned(grad_output) &&
                         IsAligned(gradients.input) && IsAligned(grad_filters);
  const bool one_output = params.group_out_channels() == 1;
  const auto launch = vectorize ? (one_output ? Launch<T, kSize, true> : Launch<T, kSize, false>)
                                : (one_output ? Launch<T, 1, true> : Launch<T, 1, false>);
  return launch(params, tensors, {AsCuda(filters), AsCuda(grad_output), gradients, grad_filters},
                stream);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                           \
  template std::string DepthwiseBackwardMisfit<T>(const DeformConvParams&);                  \
  template std::string DepthwiseBackward<T>(                                                 \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*, \
      const SampledGradients<ComputeType<T>>&, ComputeType<T>*, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
