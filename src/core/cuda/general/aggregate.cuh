// Layers without filters as a product of matrices, for tensor cores. For .cu files only.
//
// A thread block has a patch of positions and one deformable group. Nearly all of its samples lie
// in a region of pixels around the patch. There the output [positions, channels] is
// W [positions, pixels] * X [pixels, channels]: X are the region's pixels, and a row of W has the
// weights that a position's samples give to each pixel, times their masks. Samples elsewhere are
// taken from memory one by one.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_AGGREGATE_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_AGGREGATE_CUH_

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/cuda/fused/corners.cuh"
#include "core/cuda/general/depthwise.cuh"
#include "core/cuda/general/staged_region.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {

constexpr int kPatchPositions = 64;
// Of a warp, whose rows of W no other warp writes: as many as a product has rows.
constexpr int kWarpPositions = 16;
constexpr int kAggregateWarps = kPatchPositions / kWarpPositions;
constexpr int kAggregateThreads = kAggregateWarps * kWarp;
constexpr int kTilePixels = 16;      // of a product
constexpr int kAggregateMargin = 2;  // of the region, in pixels
constexpr uint32_t kAllLanes = 0xffffffffu;

// How thread blocks are laid over the output.
struct AggregatePlan {
  int height_log2, width_log2;  // of a patch
  int patches_w, patches;       // of an image: in a row, in all
  RegionSize region;
  Divisor by_groups, by_patches, by_patches_w;

  // Of the region, up to whole tiles.
  DEFORM_CONV_INLINE int pixels() const {
    return (region.pixels() + kTilePixels - 1) / kTilePixels * kTilePixels;
  }
  // Numbers from one row of W to the next: vec16s of eight rows lie in banks of their own.
  DEFORM_CONV_INLINE int row() const { return pixels() + 8; }
};

// A thread block's shared memory. A pixel has kLanes vec16s of channels.
template <typename T, int kLanes>
struct AggregateMemory {
  using Vec16 = Vector<T, kVec16Size<T>>;
  T* matrix;      // W: [positions][row()]
  Vec16* pixels;  // X: [pixels()][kLanes], as Place() has them
  uint32_t* far;  // [positions][FarWords()]: a bit for each tap whose sample is not in the region

  __device__ AggregateMemory(char* shared, const AggregatePlan& plan) {
    matrix = reinterpret_cast<T*>(shared);
    pixels = reinterpret_cast<Vec16*>(matrix + kPatchPositions * plan.row());
    far = reinterpret_cast<uint32_t*>(pixels + plan.pixels() * kLanes);
  }
  static int64_t Bytes(const AggregatePlan& plan, int64_t taps) {
    return int64_t{kPatchPositions} * plan.row() * int64_t{sizeof(T)} +
           int64_t{plan.pixels()} * kLanes * kVec16Bytes +
           kPatchPositions * FarWords(taps) * int64_t{sizeof(uint32_t)};
  }

  // Where a vec16 of a pixel lies, or of a position. Those of eight neighbours, whose numbers begin
  // at a multiple of eight, lie in banks of their own.
  static __device__ __forceinline__ int Place(int pixel, int vec16) {
    return pixel * kLanes + (vec16 ^ (pixel * kLanes / 8 % kLanes));
  }

  template <typename Int>
  static DEFORM_CONV_INLINE Int FarWords(Int taps) {
    return (taps + 31) / 32;
  }
};

// Where the patch of a thread block lies.
struct AggregatePatch {
  Position first;
  int group;  // deformable
  Region region;

  __device__ AggregatePatch(const FusedSizes& sizes, const AggregatePlan& plan)
      : first(First(sizes, plan)),
        group(blockIdx.x - plan.by_groups.Divide(blockIdx.x) * sizes.deform_groups),
        region(sizes, plan.region, first, kAggregateMargin) {}

  __device__ __forceinline__ Position PositionOf(const AggregatePlan& plan, int p) const {
    const int row = p >> plan.width_log2;
    return {first.n, first.y + row, first.x + p - (row << plan.width_log2)};
  }

 private:
  __device__ static Position First(const FusedSizes& sizes, const AggregatePlan& plan) {
    const int patch_of_batch = plan.by_groups.Divide(blockIdx.x);
    const int n = plan.by_patches.Divide(patch_of_batch);
    const int patch = patch_of_batch - n * plan.patches;
    const int row = plan.by_patches_w.Divide(patch);
    return {n, row << plan.height_log2, (patch - row * plan.patches_w) << plan.width_log2};
  }
};

// Tiles of pixels that a warp's samples reach.
struct TileRange {
  int begin, end;
};

// Begins to copy `kLanes` vec16s of channels of the region, of which the first is `channel` in the
// group.
template <typename T, int kLanes>
__device__ __forceinline__ void StagePixels(const FusedSizes& sizes, const T* image,
                                            const AggregatePlan& plan, const AggregatePatch& patch,
                                            int channel, const AggregateMemory<T, kLanes>& memory) {
  const int lane = threadIdx.x % kLanes;
  const int in_group = channel + lane * kVec16Size<T>;
  const T* const channels = image + patch.group * sizes.deform_group_channels + in_group;
  for (int pixel = threadIdx.x / kLanes; pixel < plan.region.pixels();
       pixel += kAggregateThreads / kLanes) {
    const int h = plan.region.by_w.Divide(pixel);
    const int y = patch.region.top + h, x = patch.region.left + pixel - h * plan.region.w;
    const bool valid = in_group < sizes.deform_group_channels && y >= 0 && y < sizes.in_h &&
                       x >= 0 && x < sizes.in_w;
    CopyToShared(memory.pixels + AggregateMemory<T, kLanes>::Place(pixel, lane),
                 valid ? channels + int64_t{y * sizes.in_w + x} * sizes.in_channels : image, valid);
  }
}

// The index of a sample's mask.
__device__ __forceinline__ int64_t SampleIndex(const FusedSizes& sizes, const AggregatePatch& patch,
                                               const Position& position, int tap) {
  return int64_t{PositionIndex(sizes, position)} * (sizes.deform_groups * sizes.taps) +
         patch.group * sizes.taps + tap;
}

// Locates a sample.
__device__ __forceinline__ PatchSample<float> LocateSample(const FusedSizes& sizes,
                                                           const AggregatePlan& plan,
                                                           const AggregatePatch& patch,
                                                           const Position& position, int tap,
                                                           const Offset& offset, float mask) {
  const TapSample<float> located(sizes, position, Tap::Of(sizes, tap), offset.dy, offset.dx);
  if (!located.inside()) return {};
  const int h_low = located.h.low, w_low = located.w.low;
  const int bits = CornerBits(located.h, located.w, sizes.in_h, sizes.in_w);
  const bool staged = patch.region.HasCorners(h_low, w_low) &&
                      fabsf(mask) <= static_cast<float>(kMostMask);  // NaN fails
  return {located.h.fraction, located.w.fraction, mask,
          staged ? CornerPlace::InRegion(plan.region, patch.region, h_low, w_low, bits)
                 : CornerPlace::InImage(sizes, h_low, w_low, bits)};
}
template <typename T>
__device__ __forceinline__ PatchSample<float> LocateSample(const FusedSizes& sizes,
                                                           const SampledTensors<T, float>& tensors,
                                                           const AggregatePlan& plan,
                                                           const AggregatePatch& patch,
                                                           const Position& position, int tap) {
  const int64_t index = SampleIndex(sizes, patch, position, tap);
  return LocateSample(sizes, plan, patch, position, tap, LoadOffset(tensors, index),
                      LoadMask(tensors, index));
}

// Adds to W what a sample gives to two neighbouring pixels.
template <typename T>
__device__ __forceinline__ void AddWeights(float weight, float w_fraction, T* pixels) {
  const float left = static_cast<float>(pixels[0]) + weight * (1 - w_fraction);
  const float right = static_cast<float>(pixels[1]) + weight * w_fraction;
  pixels[0] = static_cast<T>(left);
  pixels[1] = static_cast<T>(right);
}

// Top left corners of samples of which all corners are in the region and in the image.
struct InnerRegion {
  int top, left;
  uint32_t h, w;

  __device__ InnerRegion(const FusedSizes& sizes, const Region& region)
      : top(max(region.top, 0)),
        left(max(region.left, 0)),
        h(max(min(region.bottom, sizes.in_h) - 1 - top, 0)),
        w(max(min(region.right, sizes.in_w) - 1 - left, 0)) {}
};

constexpr int kSamplesTogether = 5;  // of a lane: 3x3 taps at once

// Locates the samples of a warp's positions, and writes its rows of W if that is wanted. A position
// has two lanes. Each locates every other tap, and calls keep(i, sample) with the i-th at once. One
// writes the even rows of the region's pixels and one the odd ones, so that none waits for the
// other.
template <typename T, int kLanes, typename Keep>
__device__ __forceinline__ TileRange WriteMatrix(const FusedSizes& sizes,
                                                 const SampledTensors<T, float>& tensors,
                                                 const AggregatePlan& plan,
                                                 const AggregatePatch& patch, bool want_matrix,
                                                 const AggregateMemory<T, kLanes>& memory,
                                                 const Keep& keep) {
  const int lane = threadIdx.x % kWarp, parity = lane % 2;
  const int p = threadIdx.x / 2;
  T* const row = memory.matrix + p * plan.row();
  if (want_matrix) {
    for (int i = parity; i * kVec16Size<T> < plan.pixels(); i += 2) {
      reinterpret_cast<Vector<T, kVec16Size<T>>*>(row)[i] = {};
    }
  }
  const int words = AggregateMemory<T, kLanes>::FarWords(sizes.taps);
  uint32_t* const far = memory.far + p * words;
  for (int i = parity; i < words; i += 2) far[i] = 0;
  __syncwarp();

  const Position position = patch.PositionOf(plan, p);
  const bool exists = Exists(sizes, position);
  const int64_t first_index = SampleIndex(
      sizes, patch,
      {position.n, min(position.y, sizes.out_h - 1), min(position.x, sizes.out_w - 1)}, 0);
  const InnerRegion inner_region(sizes, patch.region);
  const uint32_t h_base = position.y * sizes.stride_h - sizes.pad_top - inner_region.top;
  const uint32_t w_base = position.x * sizes.stride_w - sizes.pad_left - inner_region.left;
  int first = INT32_MAX, last = -1;  // top left corners
  for (int begin = 0; begin < sizes.taps; begin += 2 * kSamplesTogether) {
    Offset offsets[kSamplesTogether];
    float masks[kSamplesTogether];
#pragma unroll
    for (int i = 0; i < kSamplesTogether; ++i) {
      const int tap = min(begin + 2 * i + parity, sizes.taps - 1);
      offsets[i] = LoadOffset(tensors, first_index + tap);
      masks[i] = LoadMask(tensors, first_index + tap);
    }
#pragma unroll
    for (int i = 0; i < kSamplesTogether; ++i) {
      if (begin + 2 * i >= sizes.taps) break;
      const int tap = begin + 2 * i + parity;
      const int ky = sizes.by_kernel_w.Divide(tap), kx = tap - ky * sizes.kernel_w;
      const float dy = offsets[i].dy, dx = offsets[i].dx;
      const float h_fraction = dy - floorf(dy), w_fraction = dx - floorf(dx);
      // Nearly all are here. Without a sign, what overflows is beyond any region; NaN fails.
      const uint32_t h = h_base + ky * sizes.dilation_h + static_cast<uint32_t>(__float2int_rd(dy));
      const uint32_t w = w_base + kx * sizes.dilation_w + static_cast<uint32_t>(__float2int_rd(dx));
      const bool inner = h < inner_region.h && w < inner_region.w && h_fraction >= 0 &&
                         w_fraction >= 0 && fabsf(masks[i]) <= static_cast<float>(kMostMask);
      PatchSample<float> sample = {};
      int row_of_region = 0;
      if (exists && tap < sizes.taps) {
        if (inner) {
          const int h_low = inner_region.top + h, w_low = inner_region.left + w;
          sample = {h_fraction, w_fraction, masks[i],
                    CornerPlace::InRegion(plan.region, patch.region, h_low, w_low, kAllCorners)};
          row_of_region = h_low - patch.region.top;
        } else {
          sample = LocateSample(sizes, plan, patch, position, tap, offsets[i], masks[i]);
          if (sample.place.in_region()) {
            row_of_region = plan.region.by_w.Divide(sample.place.region_pixel());
          }
        }
      }
      keep(i, sample);
      const bool staged = sample.place.in_region();
      const int pixel = sample.place.region_pixel();
      if (staged) {
        first = min(first, pixel);
        last = max(last, pixel);
      } else if (sample.place.bits() != 0) {
        atomicOr(far + tap / 32, 1u << tap % 32);
      }
      if (!want_matrix) continue;
      // The lane's own pair of corners, and the pair that it hands to the other lane.
      const bool upper = (row_of_region & 1) == parity;
      const float of_lower = sample.mask * sample.h_fraction;
      const float of_upper = sample.mask * (1 - sample.h_fraction);
      const int lower_pixel = pixel + plan.region.w;
      const int own = upper ? pixel : lower_pixel;
      const int given = staged ? (upper ? lower_pixel : pixel) : -1;
      const float own_weight = upper ? of_upper : of_lower;
      const int got = __shfl_xor_sync(kAllLanes, given, 1);
      const float got_weight = __shfl_xor_sync(kAllLanes, upper ? of_lower : of_upper, 1);
      const float got_fraction = __shfl_xor_sync(kAllLanes, sample.w_fraction, 1);
      if (staged) AddWeights(own_weight, sample.w_fraction, row + own);
      if (got >= 0) AddWeights(got_weight, got_fraction, row + got);
    }
  }
  __syncwarp();
  first = __reduce_min_sync(kAllLanes, first);
  last = __reduce_max_sync(kAllLanes, last);
  if (last < 0) return {0, 0};
  return {first / kTilePixels, (last + plan.region.w + 1) / kTilePixels + 1};
}

// Whether all of a lane's sums are finite. One infinite factor or NaN makes all sums of its product
// NaN, since 0 times infinity is NaN.
template <int kCount>
__device__ __forceinline__ bool AllFinite(const float (&sums)[kCount][4]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kCount * 4; ++i) zero += 0 * sums[i / 4][i % 4];
  return zero == 0;
}

// Chooses the patch by which the work is least. False where no region fits into shared memory.
template <typename Memory>
bool PlanAggregate(const DeformConvParams& params, int64_t budget, AggregatePlan* plan) {
  constexpr int kPositionsLog2 = 6;
  static_assert(1 << kPositionsLog2 == kPatchPositions);
  constexpr int64_t kMostPixels = 1 << 12, kWorkOfSamples = 200;  // as of so many pixels
  int64_t least = INT64_MAX;
  for (int width_log2 = 0; width_log2 <= kPositionsLog2; ++width_log2) {
    AggregatePlan other;
    other.width_log2 = width_log2;
    other.height_log2 = kPositionsLog2 - width_log2;
    const int64_t h = int64_t{1} << other.height_log2, w = int64_t{1} << width_log2;
    const int64_t patches_h = CeilDiv(params.out_h, h), patches_w = CeilDiv(params.out_w, w);
    other.region = RegionSize(params, h, w, kAggregateMargin, kMostPixels);
    const int64_t work = patches_h * patches_w * (other.region.pixels() + kWorkOfSamples);
    if (work >= least || Memory::Bytes(other, params.taps()) > budget) continue;
    least = work;
    other.patches_w = static_cast<int>(patches_w);
    other.patches = static_cast<int>(patches_h * patches_w);
    *plan = other;
  }
  return least < INT64_MAX;
}

// Calls run(std::integral_constant<int, lanes>) with the vec16s of channels that are multiplied at
// a time.
template <typename Run>
std::string WithAggregateLanes(const DeformConvParams& params, const Run& run) {
  const int64_t vec16s = params.deform_group_channels() / kVec16Size<Half>;
  if (vec16s <= 1) return run(std::integral_constant<int, 1>());
  if (vec16s == 2) return run(std::integral_constant<int, 2>());
  return run(std::integral_constant<int, 4>());
}

constexpr char kNot16Bits[] = "it multiplies in 16 bits";

// Why kernels of which `blocks` thread blocks are to share a multiprocessor cannot do a call, or
// are no faster; or an empty string. `output` may be its gradient, and kernel_of(lanes) is a
// kernel.
template <template <typename, int> class Memory, typename T, typename KernelOf>
std::string AggregateMisfit(const DeformConvParams& params,
                            const SampledTensors<T, ComputeType<T>>& tensors, const T* output,
                            int blocks, const KernelOf& kernel_of) {
  if (params.has_filters) return "there are filters";
  if constexpr (sizeof(T) == 2) {
    constexpr int64_t kFewestChannels = 16;
    DEFORM_CONV_RETURN_IF_ERROR(SizesOfImageMisfit(params));
    if (params.deform_group_channels() % kVec16Size<T> != 0 || !IsAligned(tensors.input) ||
        !IsAligned(output) || reinterpret_cast<uintptr_t>(tensors.offset) % sizeof(float2) != 0) {
      return "the channels of a deformable group are no vectors of 16 bytes";
    }
    if (params.deform_group_channels() < kFewestChannels) {
      return "a deformable group has few channels";
    }
    return WithAggregateLanes(params, [&](auto lanes) -> std::string {
      cudaFuncAttributes attributes;
      DEFORM_CONV_RETURN_IF_ERROR(ErrorOf(
          cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel_of(lanes))),
          "attributes of a CUDA kernel"));
      // A later GPU may run what was built for an earlier one.
      if (attributes.ptxVersion < 80) return "it is for compute capability 8.0 and up";
      AggregatePlan plan;
      if (!PlanAggregate<Memory<CudaType<T>, lanes>>(params, SharedBytesOfBlock(blocks), &plan)) {
        return "no region fits into shared memory";
      }
      if (std::min(params.batch, FusedImages(params)) * plan.patches * params.deform_groups >
          INT32_MAX) {
        return "there are too many positions and channels";
      }
      return "";
    });
  }
  return kNot16Bits;
}

// Launches such a kernel, whose parameters are sizes, tensors, the plan, and `others`.
template <template <typename, int> class Memory, typename T, typename KernelOf, typename... Others>
std::string LaunchAggregate(const char* name, const DeformConvParams& params,
                            const SampledTensors<T, ComputeType<T>>& tensors, int blocks,
                            void* stream, const KernelOf& kernel_of, const Others&... others) {
  if (params.out_positions() * params.in_channels == 0) return "";
  if constexpr (sizeof(T) == 2) {
    return WithAggregateLanes(params, [&](auto lanes) -> std::string {
      using MemoryOfKernel = Memory<CudaType<T>, lanes>;
      const auto kernel = kernel_of(lanes);
      AggregatePlan plan;
      PlanAggregate<MemoryOfKernel>(params, SharedBytesOfBlock(blocks), &plan);
      plan.by_groups = Divisor(static_cast<uint32_t>(params.deform_groups));
      plan.by_patches = Divisor(static_cast<uint32_t>(plan.patches));
      plan.by_patches_w = Divisor(static_cast<uint32_t>(plan.patches_w));
      const int64_t bytes = MemoryOfKernel::Bytes(plan, params.taps());
      DEFORM_CONV_RETURN_IF_ERROR(AllowSharedBytes(name, kernel, bytes));
      const int64_t work = params.batch * plan.patches * params.deform_groups;
      return LaunchKernel(name, kernel, static_cast<unsigned>(work), kAggregateThreads, bytes,
                          stream, FusedSizes(params), AsCuda(tensors), plan, others...);
    });
  }
  return kNot16Bits;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_AGGREGATE_CUH_
