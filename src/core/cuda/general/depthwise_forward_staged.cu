#include <algorithm>

#include "core/cuda/general/depthwise.cuh"
#include "core/cuda/general/kernels.h"
#include "core/cuda/general/staged_region.cuh"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

// How thread blocks are laid over positions and channels. A thread block has a tile of an image's
// positions and a slice of the channels: some whole deformable groups, or a part of one.
struct ForwardPlan {
  int lanes, rows;      // a thread block's threads: vectors of the slice, positions
  int tile_h, tile_w;   // in positions
  int tiles;            // of an image
  int groups;           // deformable groups of a slice
  int slices_of_group;  // where a slice is a part of a group; otherwise 1
  int slices;
  int table_positions;            // of a tile, and those beyond it that threads take
  int stride;                     // of the table's taps
  int step;                       // of the table, from one position of a thread to the next
  int locate_lanes, locate_rows;  // the threads once more: samples of a position, positions
  RegionSize region;
  Divisor by_lanes, by_tile_w, by_tiles, by_tiles_w, by_slices, by_slices_of_group,
      by_group_channels, by_locate_lanes;

  DEFORM_CONV_INLINE int positions() const { return tile_h * tile_w; }
};

constexpr int kLoadsTogether = 2;  // of a thread that locates samples
constexpr int kTogether = 2;       // positions of a thread at a time, which share the filters
constexpr int kMargin = 2;         // of the region, in pixels

// A located sample. Where the region has it, the weights are times the mask; elsewhere they are
// not.
template <typename T, int kSize>
struct alignas(16) ForwardSample {
  CornerFactors<T, kSize> weights;
  ComputeType<T> mask;
  CornerPlace place;
};

template <typename T, int kSize>
__device__ __forceinline__ ForwardSample<T, kSize> Locate(const FusedSizes& sizes,
                                                          const RegionSize& size,
                                                          const Region& region,
                                                          const TapSample<ComputeType<T>>& located,
                                                          ComputeType<T> mask) {
  ForwardSample<T, kSize> sample = {};
  // What lies outside is 0, whatever the mask.
  if (!located.inside()) return sample;
  ComputeType<T> weights[kCorners];
  BilinearWeights(located.h.fraction, located.w.fraction, weights);
  // NaN fails.
  const bool staged = region.HasCorners(located.h.low, located.w.low) &&
                      mask <= ComputeType<T>(kMostMask) && mask >= ComputeType<T>(-kMostMask);
  const ComputeType<T> factor = staged ? mask : ComputeType<T>(1);
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    sample.weights.of[corner] = factor * weights[corner];
  }
  sample.mask = mask;
  // In the region zeros stand for corners that do not count.
  sample.place =
      staged ? CornerPlace::InRegion(size, region, located.h.low, located.w.low, kAllCorners)
             : CornerPlace::InImage(sizes, located.h.low, located.w.low,
                                    CornerBits(located.h, located.w, sizes.in_h, sizes.in_w));
  return sample;
}

// Reads it in vec16s.
template <typename T, int kSize>
__device__ __forceinline__ ForwardSample<T, kSize> LoadSample(const ForwardSample<T, kSize>* from) {
  using Sample = ForwardSample<T, kSize>;
  constexpr int kVec16s = sizeof(Sample) / kVec16Bytes;
  uint4 vec16s[kVec16s];
#pragma unroll
  for (int i = 0; i < kVec16s; ++i) vec16s[i] = reinterpret_cast<const uint4*>(from)[i];
  Sample sample;
  memcpy(&sample, vec16s, sizeof(sample));
  return sample;
}

// Thread blocks of a multiprocessor that there are registers for: as many as spill none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kBlocksOfPairs = 4;
#else
constexpr int kBlocksOfPairs = 3;
#endif
template <typename T>
constexpr int kBlocksOfRegisters = sizeof(T) == 8   ? 3
                                   : sizeof(T) == 2 ? kBlocksOfPairs
                                                    : 4;

template <typename T, int kSize, bool kHasFilters>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksOfRegisters<T>)
    StagedDepthwiseForwardKernel(FusedSizes sizes, SampledTensors<T, ComputeType<T>> tensors,
                                 const T* __restrict__ filters, ForwardPlan plan,
                                 T* __restrict__ output) {
  using Number = ComputeType<T>;
  using Sample = ForwardSample<T, kSize>;
  extern __shared__ __align__(16) char shared[];
  Sample* const table =
      reinterpret_cast<Sample*>(shared);  // [taps][stride], of [positions][groups]
  auto* const pixels = reinterpret_cast<Vector<T, kSize>*>(table + sizes.taps * plan.stride);

  const int tile_of_batch = plan.by_slices.Divide(blockIdx.x);
  const int slice = blockIdx.x - tile_of_batch * plan.slices;
  const int group_of_slice = plan.by_slices_of_group.Divide(slice);
  const int first_group = group_of_slice * plan.groups;
  const int n = plan.by_tiles.Divide(tile_of_batch);
  const int tile = tile_of_batch - n * plan.tiles;
  const int tile_row = plan.by_tiles_w.Divide(tile);
  const Position first = {
      n, tile_row * plan.tile_h,
      (tile - tile_row * static_cast<int>(plan.by_tiles_w.value())) * plan.tile_w};
  const Region region(sizes, plan.region, first, kMargin);

  const int row = plan.by_lanes.Divide(threadIdx.x);
  const int lane = threadIdx.x - row * plan.lanes;
  const int in_slice =
      (lane + (slice - group_of_slice * plan.slices_of_group) * plan.lanes) * kSize;
  const int c = first_group * sizes.deform_group_channels + in_slice;
  const int limit =
      plan.slices_of_group > 1 ? sizes.deform_group_channels : sizes.in_channels - c + in_slice;
  const bool has_channels = in_slice < limit;
  const T* const image = tensors.input + int64_t{ImagePixel(sizes, n)} * sizes.in_channels;
  if (row < plan.rows) {
    StageRegion(sizes, plan.region, region, image, has_channels ? c : -1, lane, plan.lanes, row,
                pixels);
  }

  const int locate_row = plan.by_locate_lanes.Divide(threadIdx.x);
  const int samples =
      min(plan.groups, sizes.deform_groups - first_group) * sizes.taps;  // of a position
  for (int s = threadIdx.x - locate_row * plan.locate_lanes;
       s < samples && locate_row < plan.locate_rows; s += plan.locate_lanes) {
    const int group = sizes.by_taps.Divide(s);
    const Tap tap = Tap::Of(sizes, first_group * sizes.taps + s);
    Sample* const of_tap = table + (s - group * sizes.taps) * plan.stride + group;
    const int samples_of_all = sizes.deform_groups * sizes.taps;
    const int64_t first_index =
        int64_t{PositionIndex(sizes, {n, 0, 0})} * samples_of_all + tap.g_tap;
    for (int first_p = locate_row; first_p < plan.table_positions;
         first_p += kLoadsTogether * plan.locate_rows) {
      Position positions[kLoadsTogether];
      Number dy[kLoadsTogether], dx[kLoadsTogether], mask[kLoadsTogether];
#pragma unroll
      for (int i = 0; i < kLoadsTogether; ++i) {
        const int p = first_p + i * plan.locate_rows;
        const int y = plan.by_tile_w.Divide(p);
        positions[i] = {n, first.y + y, first.x + p - y * plan.tile_w};
        // Others get a sample too, which is not read.
        const int in_image = min(positions[i].y, sizes.out_h - 1) * sizes.out_w +
                             min(positions[i].x, sizes.out_w - 1);
        const int64_t index = first_index + int64_t{in_image} * samples_of_all;
        dy[i] = __ldg(tensors.offset + 2 * index);
        dx[i] = __ldg(tensors.offset + 2 * index + 1);
        mask[i] = tensors.mask == nullptr ? Number(1) : __ldg(tensors.mask + index);
      }
#pragma unroll
      for (int i = 0; i < kLoadsTogether; ++i) {
        const int p = first_p + i * plan.locate_rows;
        if (p >= plan.table_positions) break;
        of_tap[p * plan.groups] =
            Locate<T, kSize>(sizes, plan.region, region,
                             TapSample<Number>(sizes, positions[i], tap, dy[i], dx[i]), mask[i]);
      }
    }
  }
  FinishCopies();
  __syncthreads();

  if (row >= plan.rows || row >= plan.positions() || !has_channels) return;
  const int group = plan.slices_of_group > 1 ? 0 : plan.by_group_channels.Divide(in_slice);
  const CornerReader<T, kSize> reader = {true, pixels + lane, plan.lanes, image, c};
  Number sums[kTogether][kSize] = {};
  const T* filter = kHasFilters ? filters + c : nullptr;
  const Sample* of_tap = table + row * plan.groups + group;
  for (int tap = 0; tap < sizes.taps; ++tap) {
    Vector<T, kSize> factors;
    if constexpr (kHasFilters) factors = LoadOutputs<kSize, true>(filter, 1);
    Sample samples[kTogether];
    bool all_staged = true;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      samples[j] = LoadSample(of_tap + j * plan.step);
      all_staged = all_staged && samples[j].place.in_region();
    }
    const auto add = [&](int j, const Vector<T, kSize>(&corners)[kCorners], Number mask) {
      const auto values = Interpolate<T, kSize>(samples[j].weights, corners);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Number value = static_cast<Number>(values.elements[i]);
        // Written out, or the compiler would share the additions of both cases below.
        if constexpr (kHasFilters) {
          sums[j][i] = fma(mask * value, static_cast<Number>(factors.elements[i]), sums[j][i]);
        } else {
          sums[j][i] = fma(mask, value, sums[j][i]);
        }
      }
    };
    if (all_staged) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        Vector<T, kSize> corners[kCorners];
        reader.LoadStaged(plan.region, samples[j].place, corners);
        add(j, corners, 1);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        Vector<T, kSize> corners[kCorners];
        reader.Load(sizes, plan.region, region, samples[j].place, corners);
        add(j, corners, samples[j].place.in_region() ? Number(1) : samples[j].mask);
      }
    }
    if constexpr (kHasFilters) filter += sizes.out_channels;
    of_tap += plan.stride;
  }
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    const int p = row + j * plan.rows;
    const int y = plan.by_tile_w.Divide(p);
    const Position position = {n, first.y + y, first.x + p - y * plan.tile_w};
    if (y >= plan.tile_h || position.y >= sizes.out_h || position.x >= sizes.out_w) continue;
    T* const out = output + int64_t{PositionIndex(sizes, position)} * sizes.out_channels + c;
    Store(out, sums[j]);
  }
}

// What a thread block may have on every GPU, and how many are to share a multiprocessor.
constexpr int64_t kMostTableBytes = 64 << 10;
constexpr int kBlocksTogether = 3;
constexpr int64_t kMostPixels = 1 << 16;  // of a region, so that they are counted in 32 bits

// What of the plan does not depend on the tile.
template <typename T, int kSize>
ForwardPlan PlanSlices(const DeformConvParams& params) {
  constexpr int64_t kLanes = 8;  // have 128 bytes of channels
  constexpr int64_t kEntryBytes = sizeof(ForwardSample<CudaType<T>, kSize>);
  const int64_t vectors = params.deform_group_channels() / kSize;
  const int64_t most_groups = kMostTableBytes / (params.taps() * kEntryBytes) - 1;  // in the table
  ForwardPlan plan;
  plan.slices_of_group = static_cast<int>(CeilDiv<int64_t>(vectors, 2 * kLanes));
  plan.groups = static_cast<int>(
      std::max<int64_t>(std::min({kLanes / vectors, params.deform_groups, most_groups}), 1));
  plan.lanes = static_cast<int>(CeilDiv<int64_t>(plan.groups * vectors, plan.slices_of_group));
  plan.rows = kThreadsPerBlock / plan.lanes;
  plan.slices =
      static_cast<int>(CeilDiv<int64_t>(params.deform_groups, plan.groups)) * plan.slices_of_group;
  return plan;
}

// Of a tile of so many positions: all that the threads take. No tile has more.
int TablePositions(const ForwardPlan& plan, int64_t positions) {
  return static_cast<int>(positions > plan.rows ? kTogether * plan.rows : positions);
}
// The bytes of a table of `positions`.
template <typename T, int kSize>
int64_t TableBytes(const DeformConvParams& params, const ForwardPlan& plan, int64_t positions) {
  return int64_t{sizeof(ForwardSample<CudaType<T>, kSize>)} * params.taps() *
         ((TablePositions(plan, positions) * plan.groups) | 1);
}
template <typename T, int kSize>
int64_t RegionBytes(const ForwardPlan& plan, const RegionSize& region) {
  return int64_t{sizeof(T) * kSize} * region.pixels() * plan.lanes;
}

// Chooses the tile by which the work is least. False where no region fits.
template <typename T, int kSize>
bool PlanTiles(const DeformConvParams& params, ForwardPlan* plan) {
  // Of a lane: to stage a pixel, to take a sample.
  constexpr int64_t kStage = 1, kSample = 4;
  const int64_t budget = SharedBytesOfBlock(kBlocksTogether);
  int64_t least = INT64_MAX;
  for (int passes = kTogether; passes > 0; --passes) {
    const int64_t samples = passes * plan->rows * params.taps();
    int64_t most = passes * plan->rows;
    while (most > 1 &&
           TableBytes<T, kSize>(params, *plan, most) > std::min(budget, kMostTableBytes)) {
      --most;
    }
    for (int64_t w = 1; w <= std::min(params.out_w, most); ++w) {
      const int64_t h = std::min(params.out_h, most / w);
      const RegionSize region(params, h, w, kMargin, kMostPixels);
      if (RegionBytes<T, kSize>(*plan, region) + TableBytes<T, kSize>(params, *plan, h * w) >
          budget) {
        continue;
      }
      const int64_t work = (samples * kSample + region.pixels() * kStage) *
                           CeilDiv(params.out_h, h) * CeilDiv(params.out_w, w);
      if (work >= least) continue;
      least = work;
      plan->tile_h = static_cast<int>(h);
      plan->tile_w = static_cast<int>(w);
      plan->region = region;
    }
  }
  return least < INT64_MAX;
}

template <typename T, int kSize>
ForwardPlan PlanForward(const DeformConvParams& params) {
  ForwardPlan plan = PlanSlices<T, kSize>(params);
  PlanTiles<T, kSize>(params, &plan);
  const int tiles_w = static_cast<int>(CeilDiv<int64_t>(params.out_w, plan.tile_w));
  const int samples = plan.groups * static_cast<int>(params.taps());
  plan.tiles = tiles_w * static_cast<int>(CeilDiv<int64_t>(params.out_h, plan.tile_h));
  plan.region.LayOver(plan.rows);
  plan.table_positions = TablePositions(plan, plan.positions());
  plan.stride = (plan.table_positions * plan.groups) | 1;
  plan.step = plan.positions() > plan.rows ? plan.rows * plan.groups : 0;
  plan.locate_lanes = std::min(samples, kThreadsPerBlock);
  plan.locate_rows = kThreadsPerBlock / plan.locate_lanes;
  plan.by_lanes = Divisor(plan.lanes);
  plan.by_tile_w = Divisor(plan.tile_w);
  plan.by_tiles = Divisor(plan.tiles);
  plan.by_tiles_w = Divisor(tiles_w);
  plan.by_slices = Divisor(plan.slices);
  plan.by_slices_of_group = Divisor(plan.slices_of_group);
  plan.by_group_channels = Divisor(static_cast<uint32_t>(params.deform_group_channels()));
  plan.by_locate_lanes = Divisor(plan.locate_lanes);
  return plan;
}

}  // namespace

template <typename T>
std::string StagedDepthwiseForwardMisfit(const DeformConvParams& params,
                                         const SampledTensors<T, ComputeType<T>>& tensors,
                                         const T* filters, const T* output) {
  // Measured, see benchmarks/gpu_kernels.md.
  constexpr int64_t kMostTaps = 9, kFewestPositions = 400;
  constexpr int kSize = kVec16Size<T>;
  DEFORM_CONV_RETURN_IF_ERROR(SizesOfImageMisfit(params));
  if (params.group_out_channels() != 1) return "a channel has several outputs";
  if (params.deform_group_channels() % kSize != 0 || !IsAligned(tensors.input) ||
      !IsAligned(filters) || !IsAligned(output)) {
    return "the channels of a deformable group are no vectors of 16 bytes";
  }
  if (params.taps() > kMostTaps) return "the kernel has many taps";
  if (params.image_positions() < kFewestPositions) return "an image has few positions";
  ForwardPlan plan = PlanSlices<T, kSize>(params);
  if (!PlanTiles<T, kSize>(params, &plan)) return "no region fits into shared memory";
  if (std::min(params.batch, FusedImages(params)) * params.image_positions() * plan.slices >
      INT32_MAX) {
    return "there are too many positions and channels";
  }
  return "";
}

template <typename T>
std::string StagedDepthwiseForward(const DeformConvParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors,
                                   const T* filters, T* output, void* stream) {
  if (params.out_positions() * params.in_channels == 0) return "";
  constexpr int kSize = kVec16Size<T>;
  using Element = CudaType<T>;
  const ForwardPlan plan = PlanForward<T, kSize>(params);
  const int64_t bytes = TableBytes<T, kSize>(params, plan, plan.positions()) +
                        RegionBytes<T, kSize>(plan, plan.region);
  const auto kernel = params.has_filters ? StagedDepthwiseForwardKernel<Element, kSize, true>
                                         : StagedDepthwiseForwardKernel<Element, kSize, false>;
  DEFORM_CONV_RETURN_IF_ERROR(AllowSharedBytes("StagedDepthwiseForwardKernel", kernel, bytes));
  const int64_t blocks = params.batch * plan.tiles * plan.slices;
  return LaunchKernel("StagedDepthwiseForwardKernel", kernel, static_cast<unsigned>(blocks),
                      kThreadsPerBlock, bytes, stream, FusedSizes(params), AsCuda(tensors),
                      AsCuda(filters), plan, AsCuda(output));
}

#define DEFORM_CONV_INSTANTIATE(T)                                                            \
  template std::string StagedDepthwiseForwardMisfit<T>(                                       \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*); \
  template std::string StagedDepthwiseForward<T>(                                             \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, T*, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
