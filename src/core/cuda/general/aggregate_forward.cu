#include "core/cuda/general/aggregate.cuh"
#include "core/cuda/general/kernels.h"

namespace deform_conv {
namespace cuda {
namespace {

// Adds samples from memory to a lane's sums, which lie as MmaSync() has them: those that are not in
// the region, or all.
template <typename T, int kLanes>
__device__ __forceinline__ void AddFromMemory(const FusedSizes& sizes,
                                              const SampledTensors<T, float>& tensors,
                                              const T* image, const AggregatePlan& plan,
                                              const AggregatePatch& patch,
                                              const AggregateMemory<T, kLanes>& memory, bool all,
                                              int channel, float (&sums)[kLanes][4]) {
  using Memory = AggregateMemory<T, kLanes>;
  const int lane = threadIdx.x % kWarp, words = Memory::FarWords(sizes.taps);
  const T* const first_channel =
      image + patch.group * sizes.deform_group_channels + channel + lane % 4 * 2;
  const int channels = sizes.deform_group_channels - channel - lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int p = threadIdx.x / kWarp * kWarpPositions + half * 8 + lane / 4;
    const Position position = patch.PositionOf(plan, p);
    if (!Exists(sizes, position)) continue;
    for (int word = 0; word < words; ++word) {
      const int taps = min(sizes.taps - word * 32, 32);
      uint32_t bits = all ? kAllLanes >> (32 - taps) : memory.far[p * words + word];
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1) {
        const PatchSample<float> sample =
            LocateSample(sizes, tensors, plan, patch, position, word * 32 + __ffs(bits) - 1);
        // What lies outside is 0, whatever the mask.
        if (sample.place.bits() == 0) continue;
        float weights[kCorners];
        BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
        const int pixel =
            sample.place.in_region()
                ? patch.region.InImage(sizes, plan.region, sample.place.region_pixel())
                : sample.place.image_pixel(sizes);
        const T* const top_left = first_channel + int64_t{pixel} * sizes.in_channels;
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const int c = j * kVec16Size<T>;
          if (c >= channels) break;
          Vector<T, 2> corners[kCorners];
          LoadCorners(top_left + c, int64_t{sizes.in_w} * sizes.in_channels,
                      int64_t{sizes.in_channels}, sample.place.bits(), corners);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float value = 0;
#pragma unroll
            for (int corner = 0; corner < kCorners; ++corner) {
              value += weights[corner] * static_cast<float>(corners[corner].elements[i]);
            }
            sums[j][2 * half + i] += sample.mask * value;
          }
        }
      }
    }
  }
}

// sums = W * X, of a warp's positions.
template <typename T, int kLanes>
__device__ __forceinline__ void Multiply(const AggregatePlan& plan, const TileRange& tiles,
                                         const AggregateMemory<T, kLanes>& memory,
                                         float (&sums)[kLanes][4]) {
  using Memory = AggregateMemory<T, kLanes>;
  const int lane = threadIdx.x % kWarp, of_tile = lane % 16, half = lane / 16;
  const int p = threadIdx.x / kWarp * kWarpPositions + of_tile;
  const uint32_t rows = SharedAddress(memory.matrix + p * plan.row() + half * kVec16Size<T>);
  uint32_t pixels[(kLanes + 1) / 2];
#pragma unroll
  for (int j = 0; j < kLanes; j += 2) {
    pixels[j / 2] =
        SharedAddress(memory.pixels + Memory::Place(of_tile, min(j + half, kLanes - 1)));
  }
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    uint32_t a[4], b[4];
    LoadMatrices<false>(rows + tile * kTilePixels * static_cast<int>(sizeof(T)), a);
#pragma unroll
    for (int j = 0; j < kLanes; j += 2) {
      LoadMatrices<true>(pixels[j / 2] + tile * kTilePixels * kLanes * kVec16Bytes, b);
      MmaSync<T>(sums[j], a, {b[0], b[1]});
      if constexpr (kLanes > 1) MmaSync<T>(sums[j + 1], a, {b[2], b[3]});
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kAggregateThreads, 5)
    MmaAggregateForwardKernel(FusedSizes sizes, SampledTensors<T, float> tensors,
                              AggregatePlan plan, T* __restrict__ output) {
  if constexpr (kHasMma) {
    using Memory = AggregateMemory<T, kLanes>;
    constexpr int kChannels = kLanes * kVec16Size<T>;
    extern __shared__ __align__(16) char shared[];
    const Memory memory(shared, plan);
    const AggregatePatch patch(sizes, plan);
    const T* const image =
        tensors.input + int64_t{ImagePixel(sizes, patch.first.n)} * sizes.in_channels;
    StagePixels(sizes, image, plan, patch, 0, memory);
    // Pixels that fill up the last tile: with weights of 0, but NaN times 0 is NaN.
    for (int i = plan.region.pixels() * kLanes + threadIdx.x; i < plan.pixels() * kLanes;
         i += kAggregateThreads) {
      memory.pixels[i] = {};
    }
    const TileRange tiles = WriteMatrix(sizes, tensors, plan, patch, true, memory,
                                        [](int, const PatchSample<float>&) {});

    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int channel = 0; channel < sizes.deform_group_channels; channel += kChannels) {
      if (channel > 0) {
        __syncthreads();
        StagePixels(sizes, image, plan, patch, channel, memory);
      }
      FinishCopies();
      __syncthreads();
      float sums[kLanes][4] = {};
      Multiply(plan, tiles, memory, sums);
      // With an infinite pixel or NaN the warp takes all of its samples from memory.
      const bool finite = __all_sync(kAllLanes, AllFinite(sums));
      if (!finite) {
#pragma unroll
        for (int i = 0; i < kLanes * 4; ++i) sums[i / 4][i % 4] = 0;
      }
      AddFromMemory(sizes, tensors, image, plan, patch, memory, !finite, channel, sums);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Position position = patch.PositionOf(plan, warp * kWarpPositions + lane / 4 + i * 8);
        if (!Exists(sizes, position)) continue;
        T* const to = output + int64_t{PositionIndex(sizes, position)} * sizes.out_channels +
                      patch.group * sizes.deform_group_channels;
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const int c = channel + j * kVec16Size<T> + lane % 4 * 2;
          const float pair[] = {sums[j][2 * i], sums[j][2 * i + 1]};
          if (c < sizes.deform_group_channels) Store(to + c, pair);
        }
      }
    }
  }
}

constexpr int kBlocksTogether = 3;  // on a multiprocessor, at least

template <typename T>
constexpr auto kKernelOf =
    [](auto lanes) { return MmaAggregateForwardKernel<CudaType<T>, decltype(lanes)::value>; };

}  // namespace

template <typename T>
std::string MmaAggregateForwardMisfit(const DeformConvParams& params,
                                      const SampledTensors<T, ComputeType<T>>& tensors,
                                      const T* output) {
  return AggregateMisfit<AggregateMemory>(params, tensors, output, kBlocksTogether, kKernelOf<T>);
}

template <typename T>
std::string MmaAggregateForward(const DeformConvParams& params,
                                const SampledTensors<T, ComputeType<T>>& tensors, T* output,
                                void* stream) {
  return LaunchAggregate<AggregateMemory>("MmaAggregateForwardKernel", params, tensors,
                                          kBlocksTogether, stream, kKernelOf<T>, AsCuda(output));
}

#define DEFORM_CONV_INSTANTIATE(T)                                                  \
  template std::string MmaAggregateForwardMisfit<T>(                                \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*); \
  template std::string MmaAggregateForward<T>(                                      \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, T*, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
