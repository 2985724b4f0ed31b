// A consumer warpgroup of the implicit GEMM kernel: samples into registers, and multiplies them by
// the filters in the stages. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_CONSUMER_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_CONSUMER_CUH_

#include <cstdint>

#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/input_region.cuh"
#include "core/cuda/fused/shared_vec16.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/fused/tile_sample.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/barrier.cuh"
#include "core/cuda/sm90/implicit_gemm_epilogue.cuh"
#include "core/cuda/sm90/implicit_gemm_samples.cuh"
#include "core/cuda/sm90/implicit_gemm_tile.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// Where the corners of a sample are from its first.
struct CornerSteps {
  int32_t right;
  int64_t below;
};

// The slice's channels of the input and, if the tile has one, of its region.
struct SliceOfInput {
  const uint8_t* input;  // of the first pixel
  const uint8_t* region;
  int32_t pixel_bytes;  // of the input
  CornerSteps of_input, of_region;
  uint32_t zeros;  // of RegionLimits
};

// The corners of a sample from the region.
__device__ __forceinline__ void LoadFromRegion(const SliceOfInput& slice, uint32_t region,
                                               uint32_t place, uint32_t channel_bytes,
                                               uint4 (&corners)[kCorners]) {
  const uint32_t below = place == slice.zeros ? 0 : static_cast<uint32_t>(slice.of_region.below);
  const uint32_t top = region + place + channel_bytes, bottom = top + below;
  corners[kTopLeft] = LoadVec16(top);
  corners[kTopRight] = LoadVec16(top + slice.of_region.right);
  corners[kBottomLeft] = LoadVec16(bottom);
  corners[kBottomRight] = LoadVec16(bottom + slice.of_region.right);
}

// The corners of a sample from memory.
__device__ __forceinline__ void LoadFromMemory(const SliceOfInput& slice, uint32_t packed_place,
                                               uint32_t channel_bytes, uint4 (&corners)[kCorners]) {
  const int64_t pixel = packed_place >> kCornerBits & (kMostPackedPixels - 1);
  const uint8_t* top = slice.input + channel_bytes + pixel * slice.pixel_bytes;
  const uint8_t* bottom = top + slice.of_input.below;
  corners[kTopLeft] = __ldg(reinterpret_cast<const uint4*>(top));
  corners[kTopRight] = __ldg(reinterpret_cast<const uint4*>(top + slice.of_input.right));
  corners[kBottomLeft] = __ldg(reinterpret_cast<const uint4*>(bottom));
  corners[kBottomRight] = __ldg(reinterpret_cast<const uint4*>(bottom + slice.of_input.right));
}

// The corners of a sample from the region or from memory.
template <typename T>
__device__ __forceinline__ void LoadFromAnywhere(const SliceOfInput& slice, uint32_t packed_place,
                                                 uint32_t channel_bytes,
                                                 uint4 (&corners)[kCorners]) {
  const bool outside = packed_place & TileSample<T>::kOutside;
  const int64_t pixel = packed_place >> kCornerBits & (kMostPackedPixels - 1);
  const uint8_t* top = channel_bytes + (outside ? slice.input + pixel * slice.pixel_bytes
                                                : slice.region + packed_place);
  const int32_t right = outside ? slice.of_input.right : slice.of_region.right;
  const int64_t below = outside                       ? slice.of_input.below
                        : packed_place == slice.zeros ? 0
                                                      : slice.of_region.below;
  const uint8_t* bottom = top + below;
  corners[kTopLeft] = *reinterpret_cast<const uint4*>(top);
  corners[kTopRight] = *reinterpret_cast<const uint4*>(top + right);
  corners[kBottomLeft] = *reinterpret_cast<const uint4*>(bottom);
  corners[kBottomRight] = *reinterpret_cast<const uint4*>(bottom + right);
  DropUncounted(outside ? packed_place : kAllCorners, corners);
}

// Interpolates the thread's vec16s of a K block, of which kInFlight are loaded at a time.
template <int kInFlight, typename T, typename LoadCornersOf>
__device__ __forceinline__ void InterpolateBlock(
    const TileSample<T> (&samples)[kVec16sOfThread][kRowsOfThread],
    const uint32_t (&channel_bytes)[kVec16sOfThread], const LoadCornersOf& load,
    uint4 (&sampled)[kVec16sOfThread][kRowsOfThread]) {
  constexpr int kCount = kVec16sOfThread * kRowsOfThread;
  uint4 corners[kInFlight][kCorners];
  const auto load_one = [&](int i) {
    const int v = i % kVec16sOfThread, r = i / kVec16sOfThread;
    load(samples[v][r].packed_place, channel_bytes[v], corners[i % kInFlight]);
  };
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) load_one(i);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int v = i % kVec16sOfThread, r = i / kVec16sOfThread;
    sampled[v][r] = Interpolate<T>(corners[i % kInFlight], samples[v][r].weights);
    if (i + kInFlight < kCount) load_one(i + kInFlight);
  }
}

// Samples a K block: from the region at `region`, unless a sample of the warp is outside of it; or,
// without regions, from memory. From memory, more is loaded at a time, if registers allow it.
template <typename T, bool kRegions, bool kFewInFlight>
__device__ __forceinline__ void SampleBlock(
    const SliceOfInput& slice, uint32_t region,
    const TileSample<T> (&samples)[kVec16sOfThread][kRowsOfThread],
    const uint32_t (&channel_bytes)[kVec16sOfThread],
    uint4 (&sampled)[kVec16sOfThread][kRowsOfThread]) {
  uint32_t any = 0, all = ~0u;
#pragma unroll
  for (int v = 0; v < kVec16sOfThread; ++v) {
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      any |= samples[v][r].packed_place;
      all &= samples[v][r].packed_place;
    }
  }
  if constexpr (!kRegions) {
    // Most warps have no sample at the border.
    const bool all_count = __all_sync(0xffffffffu, (all & kAllCorners) == kAllCorners);
    InterpolateBlock<kFewInFlight ? 1 : 3>(
        samples, channel_bytes,
        [&](uint32_t packed_place, uint32_t bytes, uint4(&corners)[kCorners]) {
          LoadFromMemory(slice, packed_place, bytes, corners);
          if (!all_count) DropUncounted(packed_place, corners);
        },
        sampled);
  } else if (!__any_sync(0xffffffffu, any & TileSample<T>::kOutside)) {
    InterpolateBlock<kFewInFlight ? 2 : 3>(
        samples, channel_bytes,
        [&](uint32_t place, uint32_t bytes, uint4(&corners)[kCorners]) {
          LoadFromRegion(slice, region, place, bytes, corners);
        },
        sampled);
  } else {
    InterpolateBlock<1>(
        samples, channel_bytes,
        [&](uint32_t packed_place, uint32_t bytes, uint4(&corners)[kCorners]) {
          LoadFromAnywhere<T>(slice, packed_place, bytes, corners);
        },
        sampled);
  }
}

// Begins accumulators += samples * filters for a K block, whose filters lie at `stage`.
template <typename T, typename Shape>
__device__ __forceinline__ void MultiplyBlock(
    const uint32_t (&words)[kVec16sOfThread][kRowsOfThread][4], uint32_t stage,
    float (&accumulators)[Shape::kWgmmas][Shape::kWgmmaN / 2]) {
  const uint64_t filters_of_stage = MatrixDescriptor(stage, kK<T> * kSlabRowBytes);
  WarpgroupArrive();
#pragma unroll
  for (int step = 0; step < kK<T> / kWgmmaK<T>; ++step) {
    const auto& of_vec16 = words[step / 2];
    const int word = step % 2 * 2;
    const uint64_t filters =
        AdvanceDescriptor(filters_of_stage, step * WgmmaKBytes<T, kMajorOfB<T>>());
    const uint32_t a[4] = {of_vec16[0][word], of_vec16[1][word], of_vec16[0][word + 1],
                           of_vec16[1][word + 1]};
#pragma unroll
    for (int i = 0; i < Shape::kWgmmas; ++i) {
      WgmmaRS<T, Shape::kWgmmaN, kMajorOfB<T>>::Run(
          accumulators[i], a, AdvanceDescriptor(filters, i * (Shape::kWgmmaN * kSlabRowBytes)),
          true);
    }
  }
  WarpgroupCommit();
}

// A consumer's work.
template <typename T, typename Shape, Locating kLocating, bool kRegions>
__device__ __forceinline__ void ConsumeFilters(const FusedSizes& sizes, const TilePlan<T>& plan,
                                               const SampledTensors<T, float>& tensors,
                                               const SharedMemory<Shape, T>& shared,
                                               const uint8_t* memory, T* __restrict__ output,
                                               float* __restrict__ partial_sums) {
  const KOrder<T>& order = plan.order;
  TileScheduler<T, Shape> scheduler(plan);
  WorkTile tile;
  PipelineState<Shape::kStages> state;
  PipelineState<kRegionBuffers> region_state;
  while (scheduler.Next(sizes, plan, &tile)) {
    const InputRegion region = kRegions ? tile.RegionOf(sizes, plan) : InputRegion{0, 0, 0, 0};
    TileSamples<T, Shape, kLocating> tile_samples(sizes, plan, tensors, tile, region, shared);
    SliceOfInput of_input;
    of_input.pixel_bytes = sizes.in_channels * static_cast<int32_t>(sizeof(T));
    // In an image of one row or column, two corners are the same pixel.
    of_input.of_input = {sizes.in_w > 1 ? of_input.pixel_bytes : 0,
                         sizes.in_h > 1 ? int64_t{sizes.in_w} * of_input.pixel_bytes : 0};
    of_input.of_region = {plan.region.pixel_bytes, int64_t{region.cols} * plan.region.pixel_bytes};
    of_input.zeros = plan.region.zeros();
    float accumulators[Shape::kWgmmas][Shape::kWgmmaN / 2] = {};
    uint32_t before = 0;  // the barrier of the stage whose product goes on
    int k_block = tile.k_begin;
    for (int slice = order.SliceOf(k_block); k_block < tile.k_end; ++slice) {
      const int first = slice * order.taps, end = min(order.EndOf(slice), tile.k_end);
      tile_samples.BeginSlice(slice, k_block - first);
      of_input.input =
          reinterpret_cast<const uint8_t*>(tensors.input + tile_samples.FirstChannel());
      const uint32_t region_at = shared.regions + region_state.stage * plan.region_bytes;
      of_input.region = memory + (region_at - shared.stages);
      if (kRegions) {
        WaitAtBarrier(shared.Of(shared.region_full, region_state.stage), region_state.parity);
      }
      for (; k_block < end; ++k_block) {
        TileSample<T> samples[kVec16sOfThread][kRowsOfThread];
        uint32_t channel_bytes[kVec16sOfThread];
        tile_samples.Take(k_block - first, k_block + 1 < end ? k_block + 1 - first : -1, samples,
                          channel_bytes);
        uint4 sampled[kVec16sOfThread][kRowsOfThread];
        SampleBlock<T, kRegions, kLocating == Locating::kDirect>(of_input, region_at, samples,
                                                                 channel_bytes, sampled);
        // Operand A's registers are free again.
        WarpgroupWait<0>();
        if (before != 0) ArriveAsWarp(before);
        uint32_t words[kVec16sOfThread][kRowsOfThread][4];
        const bool second_first = SecondFirst();
#pragma unroll
        for (int v = 0; v < kVec16sOfThread; ++v) {
#pragma unroll
          for (int r = 0; r < kRowsOfThread; ++r) {
            const uint4 &same = sampled[v][r], &other = sampled[1 - v][r];
            words[v][r][0] = second_first ? other.x : same.x;
            words[v][r][1] = second_first ? other.y : same.y;
            words[v][r][2] = second_first ? other.z : same.z;
            words[v][r][3] = second_first ? other.w : same.w;
#pragma unroll
            for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(words[v][r][i])::"memory");
          }
        }
        WaitAtBarrier(shared.Of(shared.full, state.stage), state.parity);
        MultiplyBlock<T, Shape>(words, shared.Stage(state.stage), accumulators);
        before = shared.Of(shared.empty, state.stage);
        state.Advance();
      }
      if (kRegions) {
        ArriveAsWarp(shared.Of(shared.region_empty, region_state.stage));
        region_state.Advance();
      }
    }
    WarpgroupWait<0>();
    ArriveAsWarp(before);
    const int lane = threadIdx.x % kWarp;
    const int row = threadIdx.x / kWarp * kUnit + lane % kUnit;
    const int32_t position_index = RowPosition::Of(sizes, plan, tile, row).index;
#pragma unroll
    for (int i = 0; i < Shape::kWgmmas; ++i) {
#pragma unroll
      for (int k = 0; k < Shape::kWgmmaN / 2; ++k) {
        asm volatile("" : "+f"(accumulators[i][k])::"memory");
      }
      const int channel = i * Shape::kWgmmaN;
      if (plan.splits == 1) {
        Epilogue<T, Shape::kWgmmaN>(accumulators[i], position_index, sizes.out_channels,
                                    tile.channels - channel, output + tile.first_channel + channel);
      } else {
        Epilogue<float, Shape::kWgmmaN>(
            accumulators[i], position_index, sizes.out_channels, tile.channels - channel,
            partial_sums + (int64_t{tile.split} * sizes.positions * sizes.out_channels +
                            tile.first_channel + channel));
      }
    }
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_CONSUMER_CUH_
