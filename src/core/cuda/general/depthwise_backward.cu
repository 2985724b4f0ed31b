#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "core/cuda/general/atomic_add.cuh"
#include "core/cuda/general/depthwise.cuh"
#include "core/cuda/general/kernels.h"
#include "core/cuda/general/staged_region.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

// A thread block has a patch of an image's positions, and one deformable group, whose channels it
// goes over in chunks. Nearly all samples lie in a region of pixels around the patch.
struct PatchPlan {
  int height_log2, width_log2;  // of a patch
  int patches_h, patches_w;     // of an image
  int lanes_log2;               // side by side on the channels of a position
  RegionSize region;
  Divisor by_patches, by_patches_w;  // patches of an image, of a row of them
  bool stages_region, stages_operands;
  bool keeps_entries;  // while products are added up, for the next chunk
  bool want_offset_or_mask, want_scatter;

  DEFORM_CONV_INLINE int positions() const { return 1 << (height_log2 + width_log2); }
};

// Whether the tensor cores multiply, where the GPU has them; a position has four lanes then.
template <typename T, int kSize>
constexpr bool kForMma = sizeof(T) == 2 && kSize == 8;
constexpr int kMmaLanesLog2 = 2;

// Of the plan, or known when compiled.
template <typename T, int kSize>
DEFORM_CONV_INLINE int LanesLog2(const PatchPlan& plan) {
  return kForMma<T, kSize> ? kMmaLanesLog2 : plan.lanes_log2;
}
// Of the copies of an operand that fill 128 bytes.
template <typename T, int kSize>
DEFORM_CONV_INLINE int CopiesLog2(const PatchPlan& plan) {
  constexpr int kLineLog2 = sizeof(T) * kSize == kVec16Bytes ? 3 : 0;
  const int lanes_log2 = LanesLog2<T, kSize>(plan);
  return lanes_log2 < kLineLog2 ? kLineLog2 - lanes_log2 : 0;
}

constexpr int kPositionBits = 6, kTapBits = 11, kPixelBits = 12;  // of an entry
constexpr int kMostSamples = 640;  // of a patch with more than one position
constexpr int kMostTaps = 1 << kTapBits;
constexpr int kMostPixels = 1 << kPixelBits;  // of a region
constexpr int kMargin = 3;                    // of the region, in pixels

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
template <typename T, int kSize>
struct PatchMemory {
  using OffsetT = ComputeType<T>;
  using Products = Vector<OffsetT, kCorners>;

  PatchSample<OffsetT>* samples;  // [positions][taps]
  int* ends;                      // [pixels]: where each pixel's entries end
  // Of a chunk of channels. Rows of lanes that read at once read copies of the operands in banks of
  // their own.
  // [positions + taps][copies][lanes]: grad_output, then filters, where there are some
  Vector<T, kSize>* operands;
  Vector<T, kSize>* pixels;  // [pixels][lanes]
  Entry<OffsetT>* entries;   // [positions * taps * corners], sorted by pixel
  Products* products;        // [positions][taps]: of the columns' gradient with each corner

  static int64_t Bytes(const PatchPlan& plan, int64_t taps) {
    const int64_t samples = plan.positions() * taps;
    const int64_t entries = samples * kCorners * sizeof(Entry<OffsetT>);
    return std::max<int64_t>(EntriesBegin(plan, taps) + entries,
                             ProductsBegin(plan, taps) + samples * sizeof(Products));
  }
  __device__ PatchMemory(char* shared, const PatchPlan& plan, int taps) {
    samples = reinterpret_cast<PatchSample<OffsetT>*>(shared);
    ends = reinterpret_cast<int*>(samples + plan.positions() * taps);
    operands = reinterpret_cast<Vector<T, kSize>*>(ends + (plan.region.pixels() + 3) / 4 * 4);
    pixels = operands + Operands(plan, taps);
    entries = reinterpret_cast<Entry<OffsetT>*>(shared + EntriesBegin(plan, taps));
    products = reinterpret_cast<Products*>(shared + ProductsBegin(plan, taps));
  }

 private:
  template <typename Int>
  static DEFORM_CONV_INLINE Int Operands(const PatchPlan& plan, Int taps) {
    const Int operands = plan.stages_operands ? plan.positions() + taps : 0;
    return operands << (CopiesLog2<T, kSize>(plan) + LanesLog2<T, kSize>(plan));
  }
  template <typename Int>
  static DEFORM_CONV_INLINE Int EntriesBegin(const PatchPlan& plan, Int taps) {
    const Int pixels = plan.stages_region ? plan.region.pixels() : 0;
    const Int vectors = Operands(plan, taps) + (pixels << LanesLog2<T, kSize>(plan));
    const Int bytes = plan.positions() * taps * Int{sizeof(PatchSample<OffsetT>)} +
                      (plan.region.pixels() + 3) / 4 * 4 * Int{sizeof(int)} +
                      vectors * Int{sizeof(Vector<T, kSize>)};
    return (bytes + kVec16Bytes - 1) / kVec16Bytes * kVec16Bytes;
  }
  // After the entries, or in their place.
  template <typename Int>
  static DEFORM_CONV_INLINE Int ProductsBegin(const PatchPlan& plan, Int taps) {
    const Int entries = plan.positions() * taps * kCorners * Int{sizeof(Entry<OffsetT>)};
    return EntriesBegin(plan, taps) + (plan.keeps_entries ? entries : 0);
  }
};

// Where the patch of a thread block lies.
struct Patch {
  Position first;
  int group;  // deformable
  Region region;

  __device__ Patch(const FusedSizes& sizes, const PatchPlan& plan)
      : first(First(plan)), group(blockIdx.y), region(sizes, plan.region, first, kMargin) {}

  __device__ __forceinline__ Position PositionOf(const PatchPlan& plan, int p) const {
    const int row = p >> plan.width_log2;
    return {first.n, first.y + row, first.x + p - (row << plan.width_log2)};
  }

 private:
  __device__ static Position First(const PatchPlan& plan) {
    const int n = plan.by_patches.Divide(blockIdx.x);
    const int patch = blockIdx.x - n * plan.patches_h * plan.patches_w;
    const int row = plan.by_patches_w.Divide(patch);
    return {n, row << plan.height_log2, (patch - row * plan.patches_w) << plan.width_log2};
  }
};

// Locates the patch's samples, and counts the corners of each of the region's pixels.
template <typename T, int kSize, typename OffsetT>
__device__ void LocatePatch(const FusedSizes& sizes, const SampledTensors<T, OffsetT>& tensors,
                            const PatchPlan& plan, const Patch& patch,
                            const PatchMemory<T, kSize>& memory) {
  const int positions = plan.positions();
  for (int s = threadIdx.x; s < positions * sizes.taps; s += kThreadsPerBlock) {
    const int p = sizes.by_taps.Divide(s);
    const int tap = s - p * sizes.taps;
    PatchSample<OffsetT> sample = {};
    const Position position = patch.PositionOf(plan, p);
    if (Exists(sizes, position)) {
      const int g_tap = patch.group * sizes.taps + tap;
      const int64_t index =
          int64_t{PositionIndex(sizes, position)} * (sizes.deform_groups * sizes.taps) + g_tap;
      const TapSample<OffsetT> located(sizes, position, Tap::Of(sizes, g_tap),
                                       __ldg(tensors.offset + 2 * index),
                                       __ldg(tensors.offset + 2 * index + 1));
      if (located.inside()) {
        const int h_low = located.h.low, w_low = located.w.low;
        const int bits = CornerBits(located.h, located.w, sizes.in_h, sizes.in_w);
        sample = {located.h.fraction, located.w.fraction,
                  tensors.mask == nullptr ? OffsetT(1) : __ldg(tensors.mask + index),
                  patch.region.HasCorners(h_low, w_low)
                      ? CornerPlace::InRegion(plan.region, patch.region, h_low, w_low, bits)
                      : CornerPlace::InImage(sizes, h_low, w_low, bits)};
      }
    }
    memory.samples[s] = sample;
    if (!plan.want_scatter || !sample.place.in_region()) continue;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      if (!(sample.place.bits() >> corner & 1)) continue;
      const int pixel = sample.place.region_pixel();
      atomicAdd(memory.ends + pixel + corner / 2 * plan.region.w + corner % 2, 1);
    }
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
template <typename T, int kSize>
__device__ void SortEntries(const FusedSizes& sizes, const PatchPlan& plan,
                            const PatchMemory<T, kSize>& memory) {
  using OffsetT = ComputeType<T>;
  for (int s = threadIdx.x; s < plan.positions() * sizes.taps; s += kThreadsPerBlock) {
    const PatchSample<OffsetT> sample = memory.samples[s];
    if (!sample.place.in_region()) continue;
    const int p = sizes.by_taps.Divide(s);
    const int tap = s - p * sizes.taps;
    OffsetT weights[kCorners];
    BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      if (!(sample.place.bits() >> corner & 1)) continue;
      const int pixel = sample.place.region_pixel() + corner / 2 * plan.region.w + corner % 2;
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

// A thread's lane: its place in a row of lanes, and its channels in the chunk.
template <typename T, int kSize>
struct Lane {
  int lane, row, rows;
  int channel;
  bool in_group;  // whether it has channels

  __device__ __forceinline__ Lane(const FusedSizes& sizes, const PatchPlan& plan,
                                  const Patch& patch, int chunk) {
    const int lanes_log2 = LanesLog2<T, kSize>(plan);
    lane = threadIdx.x & ((1 << lanes_log2) - 1);
    row = threadIdx.x >> lanes_log2;
    rows = kThreadsPerBlock >> lanes_log2;
    const int c = ((chunk << lanes_log2) + lane) * kSize;
    channel = patch.group * sizes.deform_group_channels + c;
    in_group = c < sizes.deform_group_channels;
  }
};

// Reads the gradient of the output and the filters, if there are any, for the channels of a lane:
// from shared memory where a channel has one output.
template <typename T, int kSize, Filters kFilters>
struct OperandReader {
  const Vector<T, kSize>* gradients;  // the lane's of the patch's first position
  const Vector<T, kSize>* filters;    // the lane's of the first tap
  int staged_log2;                    // vectors from one operand to the next

  __device__ OperandReader(const FusedSizes&, const DepthwiseGradients<T>&, const PatchPlan& plan,
                           const Patch&, const PatchMemory<T, kSize>& memory,
                           const Lane<T, kSize>& lane)
      : staged_log2(CopiesLog2<T, kSize>(plan) + LanesLog2<T, kSize>(plan)) {
    const int copy = lane.row & ((1 << CopiesLog2<T, kSize>(plan)) - 1);
    gradients = memory.operands + (copy << LanesLog2<T, kSize>(plan)) + lane.lane;
    filters = gradients + (plan.positions() << staged_log2);
  }

  __device__ __forceinline__ Vector<T, kSize> Gradient(int p) const {
    return gradients[p << staged_log2];
  }
  // The columns' gradient.
  __device__ __forceinline__ Vector<T, kSize> Columns(int p, int tap) const {
    if constexpr (kFilters == Filters::kNone) {
      return Gradient(p);
    } else {
      return Multiply(Gradient(p), filters[tap << staged_log2]);
    }
  }
};

template <typename T, int kSize>
struct OperandReader<T, kSize, Filters::kToSeveral> {
  const FusedSizes& sizes;
  const PatchPlan& plan;
  const T* gradients;  // at the patch's first position
  const T* filters;

  __device__ OperandReader(const FusedSizes& sizes, const DepthwiseGradients<T>& gradients,
                           const PatchPlan& plan, const Patch& patch, const PatchMemory<T, kSize>&,
                           const Lane<T, kSize>& lane)
      : sizes(sizes), plan(plan) {
    const int first = lane.channel * sizes.group_out_channels;
    this->gradients = gradients.grad_output +
                      int64_t{PositionIndex(sizes, patch.first)} * sizes.out_channels + first;
    filters = gradients.filters + first;
  }

  // Of the first output of each channel; the others follow.
  __device__ __forceinline__ const T* AtPosition(int p) const {
    const int y = p >> plan.width_log2;
    const int64_t position = y * sizes.out_w + p - (y << plan.width_log2);
    return gradients + position * sizes.out_channels;
  }
  __device__ __forceinline__ Vector<T, kSize> Gradient(int p, int m) const {
    return LoadOutputs<kSize, false>(AtPosition(p) + m, sizes.group_out_channels);
  }
  // The columns' gradient: the sum over the outputs of a channel of the gradient times the filter.
  __device__ __forceinline__ Vector<T, kSize> Columns(int p, int tap) const {
    const T* const gradient = AtPosition(p);
    const T* const filter = filters + tap * sizes.out_channels;
    Vector<T, kSize> columns;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      ComputeType<T> sum = 0;
      for (int m = 0; m < sizes.group_out_channels; ++m) {
        const int output = i * sizes.group_out_channels + m;
        sum += static_cast<ComputeType<T>>(gradient[output]) *
               static_cast<ComputeType<T>>(filter[output]);
      }
      columns.elements[i] = static_cast<T>(sum);
    }
    return columns;
  }
};

// Begins to copy what the plan says of a chunk of channels: the region's pixels, the operands.
template <typename T, int kSize, Filters kFilters>
__device__ void StageChunk(const FusedSizes& sizes,
                           const SampledTensors<T, ComputeType<T>>& tensors,
                           const DepthwiseGradients<T>& gradients, const PatchPlan& plan,
                           const Patch& patch, const PatchMemory<T, kSize>& memory, int chunk) {
  const Lane<T, kSize> lane(sizes, plan, patch, chunk);
  if (plan.stages_region) {
    const T* const image =
        tensors.input + int64_t{ImagePixel(sizes, patch.first.n)} * sizes.in_channels;
    StageRegion(sizes, plan.region, patch.region, image, lane.in_group ? lane.channel : -1,
                lane.lane, 1 << LanesLog2<T, kSize>(plan), lane.row, memory.pixels);
  }
  if (!HasOneOutput(kFilters)) return;
  constexpr bool kHasFilters = kFilters != Filters::kNone;
  const int positions = plan.positions(), copies_log2 = CopiesLog2<T, kSize>(plan);
  const int operands = positions + (kHasFilters ? sizes.taps : 0);
#pragma unroll 1  // or registers would spill
  for (int i = lane.row; i < operands << copies_log2; i += lane.rows) {
    const int operand = i >> copies_log2;
    bool valid = lane.in_group;
    const T* from = gradients.filters + (operand - positions) * sizes.out_channels;
    if (!kHasFilters || operand < positions) {
      const Position position = patch.PositionOf(plan, operand);
      valid = valid && Exists(sizes, position);
      from = gradients.grad_output + int64_t{PositionIndex(sizes, position)} * sizes.out_channels;
    }
    CopyToShared(memory.operands + (i << LanesLog2<T, kSize>(plan)) + lane.lane,
                 valid         ? from + lane.channel
                 : kHasFilters ? gradients.filters
                               : gradients.grad_output,
                 valid);
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
  if constexpr (kHasMma && kForMma<T, kSize>) {
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

// A sample, times its mask.
template <typename T, int kSize>
__device__ __forceinline__ void SampleColumn(const PatchSample<ComputeType<T>>& sample,
                                             const Vector<T, kSize> (&corners)[kCorners],
                                             ComputeType<T> (&column)[kSize]) {
  ComputeType<T> weights[kCorners];
  CornerFactors<T, kSize> rounded;
  BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) rounded.of[corner] = weights[corner];
  const auto values = Interpolate<T, kSize>(rounded, corners);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    column[i] = sample.mask * static_cast<ComputeType<T>>(values.elements[i]);
  }
}

// The products of the columns' gradient with the corners, which are left in shared memory, and the
// filters' gradient. Adds to the input's what samples outside the region bring.
//
// A warp has rows of lanes. A row takes one sample at a time, its lanes the channels. The warps
// have equal parts of the samples, in the order of their taps.
template <typename T, int kSize, Filters kFilters>
__device__ void MultiplySamples(const FusedSizes& sizes,
                                const SampledTensors<T, ComputeType<T>>& tensors,
                                const DepthwiseGradients<T>& gradients, const PatchPlan& plan,
                                const Patch& patch, const PatchMemory<T, kSize>& memory,
                                int chunk) {
  using Number = ComputeType<T>;
  constexpr int kWarps = kThreadsPerBlock / kWarp;
  const Lane<T, kSize> lane(sizes, plan, patch, chunk);
  const int positions = plan.positions();
  const int lanes_log2 = LanesLog2<T, kSize>(plan);
  const int row = (threadIdx.x % kWarp) >> lanes_log2;
  const int rows = kWarp >> lanes_log2;
  const int parts = CeilDiv(positions, rows);
  const int warp = threadIdx.x / kWarp;
  const int first = sizes.taps * parts * warp / kWarps;
  const int last = sizes.taps * parts * (warp + 1) / kWarps;
  constexpr bool kOneOutput = HasOneOutput(kFilters);
  const bool want_filters = kFilters != Filters::kNone && gradients.grad_filters != nullptr;
  const int multiplier = kOneOutput ? 1 : sizes.group_out_channels;

  const OperandReader<T, kSize, kFilters> operands(sizes, gradients, plan, patch, memory, lane);
  const int64_t before = int64_t{ImagePixel(sizes, patch.first.n)} * sizes.in_channels;
  const CornerReader<T, kSize> corner_reader = {plan.stages_region, memory.pixels + lane.lane,
                                                1 << lanes_log2, tensors.input + before,
                                                lane.channel};

  Number filter_sums[kSize] = {};
  int tap = first / parts, part = first - tap * parts;
  for (int unit = first; unit < last; ++unit) {
    const int p = part * rows + row;
    const int s = p * sizes.taps + tap;
    // Zeros stand for what does not exist. Staged operands have them already.
    const bool exists =
        p < positions && lane.in_group && (kOneOutput || Exists(sizes, patch.PositionOf(plan, p)));
    PatchSample<Number> sample = {};
    if (exists) sample = memory.samples[s];
    Vector<T, kSize> corners[kCorners], gradient = {};
    corner_reader.Load(sizes, plan.region, patch.region, sample.place, corners);
    if (exists) {
      gradient = operands.Columns(p, tap);
    }
    if (plan.want_scatter && sample.place.bits() != 0 && !sample.place.in_region()) {
      ScatterFar(sizes, sample, gradient,
                 gradients.sampled.input + before + lane.channel +
                     int64_t{sample.place.image_pixel(sizes)} * sizes.in_channels);
    }
    if (plan.want_offset_or_mask) {
      Number products[kCorners];
      if (CornerProducts(corners, gradient, lanes_log2, products) && p < positions) {
        typename PatchMemory<T, kSize>::Products sums = {};
        if (chunk > 0) sums = memory.products[s];
#pragma unroll
        for (int corner = 0; corner < kCorners; ++corner) sums.elements[corner] += products[corner];
        memory.products[s] = sums;
      }
    }
    if (want_filters) {
      Number column[kSize];
      SampleColumn(sample, corners, column);
      const bool last_of_tap = unit + 1 == last || part + 1 == parts;
      for (int m = 0; m < multiplier; ++m) {
        if (exists) {
          Vector<T, kSize> outputs;
          if constexpr (kOneOutput) {
            outputs = operands.Gradient(p);
          } else {
            outputs = operands.Gradient(p, m);
          }
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            filter_sums[i] += static_cast<Number>(outputs.elements[i]) * column[i];
          }
        }
        // With one output a channel, once for all samples of the tap.
        if (!kOneOutput || last_of_tap) {
          AddRows<kSize, kOneOutput>(
              lanes_log2, filter_sums, row == 0 && lane.in_group, multiplier,
              gradients.grad_filters + tap * sizes.out_channels + lane.channel * multiplier + m);
        }
      }
    }
    if (++part == parts) part = 0, ++tap;
  }
}

// Adds to the input's gradient what the entries bring. Rows of lanes have equal parts of them, so a
// pixel's may be in the parts of several.
template <typename T, int kSize, Filters kFilters>
__device__ void AddEntries(const FusedSizes& sizes, const DepthwiseGradients<T>& gradients,
                           const PatchPlan& plan, const Patch& patch,
                           const PatchMemory<T, kSize>& memory, int chunk) {
  using Number = ComputeType<T>;
  const Lane<T, kSize> lane(sizes, plan, patch, chunk);
  if (!lane.in_group) return;
  const int count = memory.ends[plan.region.pixels() - 1];
  const int begin = count * lane.row / lane.rows, end = count * (lane.row + 1) / lane.rows;
  if (begin == end) return;
  const OperandReader<T, kSize, kFilters> operands(sizes, gradients, plan, patch, memory, lane);
  Number* const grad_input = gradients.sampled.input +
                             int64_t{ImagePixel(sizes, patch.first.n)} * sizes.in_channels +
                             lane.channel;

  Number sums[kSize] = {};
  Entry<Number> entry = memory.entries[begin];
  for (int e = begin; e < end;) {
    AddProduct(entry.weight, operands.Columns(entry.position(), entry.tap()), sums);
    const int pixel = entry.pixel();
    Entry<Number> next = {Number(0), ~0u};  // of no pixel
    if (++e < end) next = memory.entries[e];
    entry = next;
    if (entry.pixel() == pixel) continue;
    const int in_image = patch.region.InImage(sizes, plan.region, pixel);
    AtomicAdd<kSize>(grad_input + int64_t{in_image} * sizes.in_channels, sums);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[i] = 0;
  }
}

template <typename T, int kSize, typename Number>
__device__ void WriteOffsetsAndMasks(const FusedSizes& sizes, const PatchPlan& plan,
                                     const Patch& patch, const PatchMemory<T, kSize>& memory,
                                     const SampledGradients<Number>& gradients) {
  for (int s = threadIdx.x; s < plan.positions() * sizes.taps; s += kThreadsPerBlock) {
    const int p = sizes.by_taps.Divide(s);
    const Position position = patch.PositionOf(plan, p);
    if (!Exists(sizes, position)) continue;
    const int64_t index =
        int64_t{PositionIndex(sizes, position)} * (sizes.deform_groups * sizes.taps) +
        patch.group * sizes.taps + s - p * sizes.taps;
    auto products = memory.products[s];
    WriteOffsetAndMask(memory.samples[s], products.elements, index, gradients);
  }
}

// Thread blocks of a multiprocessor that there are registers for: as many as spill none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kBlocksOfSeveralOutputs = 4;
#else
constexpr int kBlocksOfSeveralOutputs = 2;
#endif
template <typename T, int kSize, Filters kFilters>
constexpr int kBlocksOfRegisters = sizeof(T) == 8           ? 3
                                   : !kForMma<T, kSize>     ? 4
                                   : HasOneOutput(kFilters) ? 3
                                                            : kBlocksOfSeveralOutputs;

template <typename T, int kSize, Filters kFilters>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksOfRegisters<T, kSize, kFilters>)
    DepthwiseBackwardKernel(FusedSizes sizes, SampledTensors<T, ComputeType<T>> tensors,
                            DepthwiseGradients<T> gradients, PatchPlan plan) {
  extern __shared__ __align__(16) char shared[];
  const Patch patch(sizes, plan);
  const PatchMemory<T, kSize> memory(shared, plan, sizes.taps);
  const int pixels = plan.region.pixels();
  StageChunk<T, kSize, kFilters>(sizes, tensors, gradients, plan, patch, memory, 0);
  for (int i = threadIdx.x; i < pixels; i += kThreadsPerBlock) memory.ends[i] = 0;
  __syncthreads();
  LocatePatch(sizes, tensors, plan, patch, memory);
  __syncthreads();
  if (plan.want_scatter) {
    BeginEntries(pixels, memory.ends);
    __syncthreads();
    SortEntries(sizes, plan, memory);
  }
  const int chunk_channels = kSize << LanesLog2<T, kSize>(plan);
  for (int chunk = 0; chunk * chunk_channels < sizes.deform_group_channels; ++chunk) {
    if (chunk > 0) {
      __syncthreads();
      StageChunk<T, kSize, kFilters>(sizes, tensors, gradients, plan, patch, memory, chunk);
    }
    FinishCopies();
    __syncthreads();
    if (plan.want_scatter) {
      AddEntries<T, kSize, kFilters>(sizes, gradients, plan, patch, memory, chunk);
    }
    __syncthreads();
    MultiplySamples<T, kSize, kFilters>(sizes, tensors, gradients, plan, patch, memory, chunk);
  }
  if (!plan.want_offset_or_mask) return;
  __syncthreads();
  WriteOffsetsAndMasks(sizes, plan, patch, memory, gradients.sampled);
}

// Of a position, where the tensor cores do not multiply: as many as leave at most one in eight
// without channels.
int ChooseLanesLog2(int64_t vectors) {
  int lanes_log2 = 0;
  for (int log2 = 1; 1 << log2 <= kWarp; ++log2) {
    if ((CeilDiv<int64_t>(vectors, 1 << log2) << log2) * 8 <= vectors * 9) lanes_log2 = log2;
  }
  return lanes_log2;
}

constexpr int kBlocksTogether = 4;  // on a multiprocessor

template <typename T, int kSize>
int64_t SharedBytes(const DeformConvParams& params, const PatchPlan& plan) {
  return PatchMemory<CudaType<T>, kSize>::Bytes(plan, params.taps());
}

PatchPlan PlanPatches(const DeformConvParams& params) {
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
  plan.by_patches = Divisor(plan.patches_h * plan.patches_w);
  plan.by_patches_w = Divisor(plan.patches_w);
  plan.region = RegionSize(params, height, width, kMargin, kMostPixels);
  return plan;
}

// Lays the lanes over the channels, and chooses what is staged.
template <typename T, int kSize, Filters kFilters>
PatchPlan PlanBackward(const DeformConvParams& params) {
  PatchPlan plan = PlanPatches(params);
  const int64_t vectors = CeilDiv<int64_t>(params.deform_group_channels(), kSize);
  plan.lanes_log2 = ChooseLanesLog2(vectors);
  const int lanes_log2 = LanesLog2<T, kSize>(plan);
  plan.keeps_entries = vectors > 1 << lanes_log2;
  plan.stages_operands = HasOneOutput(kFilters);
  plan.region.LayOver(kThreadsPerBlock >> lanes_log2);
  // Four pixels are read for each sample.
  plan.stages_region = plan.region.pixels() <= 2 * plan.positions() * params.taps();
  if (SharedBytes<T, kSize>(params, plan) > SharedBytesOfBlock(kBlocksTogether)) {
    plan.stages_region = false;
  }
  return plan;
}

template <typename T, int kSize, Filters kFilters>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   const DepthwiseGradients<CudaType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  PatchPlan plan = PlanBackward<T, kSize, kFilters>(params);
  plan.want_scatter = gradients.sampled.input != nullptr;
  plan.want_offset_or_mask =
      gradients.sampled.offset != nullptr || gradients.sampled.mask != nullptr;
  const int64_t bytes = PatchMemory<Element, kSize>::Bytes(plan, static_cast<int>(params.taps()));
  const auto kernel = DepthwiseBackwardKernel<Element, kSize, kFilters>;
  DEFORM_CONV_RETURN_IF_ERROR(AllowSharedBytes("DepthwiseBackwardKernel", kernel, bytes));
  const dim3 blocks(static_cast<unsigned>(params.batch * plan.patches_h * plan.patches_w),
                    static_cast<unsigned>(params.deform_groups));
  return LaunchKernel("DepthwiseBackwardKernel", kernel, blocks, kThreadsPerBlock, bytes, stream,
                      FusedSizes(params), AsCuda(tensors), gradients, plan);
}

}  // namespace

template <typename T>
std::string DepthwiseBackwardMisfit(const DeformConvParams& params) {
  DEFORM_CONV_RETURN_IF_ERROR(SizesOfImageMisfit(params));
  if (params.out_positions() * params.in_channels == 0) return "";
  const int64_t bytes =
      std::max(SharedBytes<T, kVec16Size<T>>(
                   params, PlanBackward<T, kVec16Size<T>, Filters::kToOne>(params)),
               SharedBytes<T, 1>(params, PlanBackward<T, 1, Filters::kToOne>(params)));
  if (params.taps() > kMostTaps || bytes > CurrentGpu().block_shared_bytes) {
    return "the kernel has too many taps";
  }
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
  return WithFilters(params, [&](auto kind) {
    const auto launch = vectorize ? Launch<T, kSize, kind()> : Launch<T, 1, kind()>;
    return launch(params, tensors, {AsCuda(filters), AsCuda(grad_output), gradients, grad_filters},
                  stream);
  });
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
