#include "core/cuda/general/aggregate.cuh"
#include "core/cuda/general/atomic_add.cuh"
#include "core/cuda/general/kernels.h"

namespace deform_conv {
namespace cuda {
namespace {

// The gradient of the region's pixels is W^T * G, where G [positions, channels] is the gradient of
// the output. The products of G with each pixel, G * X^T [positions, pixels], give the gradients of
// offset and mask: each sample picks those of its corners.

constexpr int kProductTiles = 2;  // of pixels, at a time
// Numbers from one position's products to the next: four rows of pairs in banks of their own.
constexpr int kProductsRow = kProductTiles * kTilePixels + 8;
constexpr int kMostTaps = 2 * kSamplesTogether;

template <typename T, int kLanes>
struct BackwardMemory : AggregateMemory<T, kLanes> {
  using Base = AggregateMemory<T, kLanes>;
  using typename Base::Vec16;
  static constexpr int kProducts = kPatchPositions * kProductsRow;

  Vec16* gradients;  // G: [positions][kLanes], as Place() has them
  float* products;   // [positions][kProductsRow]: of a warp's positions, or sums of pixels
  TileRange* tiles;  // [warps]

  __device__ BackwardMemory(char* shared, const AggregatePlan& plan, int taps)
      : Base(shared, plan) {
    gradients = reinterpret_cast<Vec16*>(this->far + kPatchPositions * Base::FarWords(taps));
    products = reinterpret_cast<float*>(gradients + kPatchPositions * kLanes);
    tiles = reinterpret_cast<TileRange*>(products + kProducts);
  }
  static int64_t Bytes(const AggregatePlan& plan, int64_t taps) {
    return Base::Bytes(plan, taps) + kPatchPositions * kLanes * kVec16Bytes +
           kProducts * int64_t{sizeof(float)} + kAggregateWarps * int64_t{sizeof(TileRange)};
  }
};

// Begins to copy the gradient of the output, in the channels of StagePixels().
template <typename T, int kLanes>
__device__ __forceinline__ void StageGradients(const FusedSizes& sizes, const T* grad_output,
                                               const AggregatePlan& plan,
                                               const AggregatePatch& patch, int channel,
                                               const BackwardMemory<T, kLanes>& memory) {
  const int lane = threadIdx.x % kLanes;
  const int in_group = channel + lane * kVec16Size<T>;
  for (int p = threadIdx.x / kLanes; p < kPatchPositions; p += kAggregateThreads / kLanes) {
    const Position position = patch.PositionOf(plan, p);
    const bool valid = in_group < sizes.deform_group_channels && Exists(sizes, position);
    const T* const from = grad_output +
                          int64_t{PositionIndex(sizes, position)} * sizes.out_channels +
                          patch.group * sizes.deform_group_channels + in_group;
    CopyToShared(memory.gradients + BackwardMemory<T, kLanes>::Place(p, lane),
                 valid ? from : grad_output, valid);
  }
}

// All gradients of a warp's samples that are not in the region. A position has four lanes.
template <typename T, int kLanes>
__device__ __forceinline__ void BackpropFar(const FusedSizes& sizes,
                                            const SampledTensors<T, float>& tensors, const T* image,
                                            const T* grad_output, const AggregatePlan& plan,
                                            const AggregatePatch& patch,
                                            const BackwardMemory<T, kLanes>& memory,
                                            const SampledGradients<float>& gradients) {
  using Memory = BackwardMemory<T, kLanes>;
  constexpr int kSize = kVec16Size<T>, kLanesOfPosition = kWarp / 8;
  const int lane = threadIdx.x % kWarp, words = Memory::FarWords(sizes.taps);
  const int of_position = lane % kLanesOfPosition;
  const uint32_t quad = 0xfu << (lane & ~3);
  for (int i = lane / kLanesOfPosition; i < kWarpPositions; i += 8) {
    const int p = threadIdx.x / kWarp * kWarpPositions + i;
    const Position position = patch.PositionOf(plan, p);
    for (int word = 0; word < words; ++word) {
#pragma unroll 1
      for (uint32_t bits = memory.far[p * words + word]; bits != 0;) {
        const int tap = word * 32 + __ffs(bits) - 1;
        bits &= bits - 1;
        const PatchSample<float> sample = LocateSample(sizes, tensors, plan, patch, position, tap);
        float products[kCorners] = {};
        const int first_channel = patch.group * sizes.deform_group_channels;
        const T* const gradient_of_group =
            grad_output + int64_t{PositionIndex(sizes, position)} * sizes.out_channels +
            first_channel;
        for (int begin = 0; begin < sizes.deform_group_channels;
             begin += kLanesOfPosition * kSize) {
          const int c = begin + of_position * kSize;
          if (c < sizes.deform_group_channels) {
            const Vector<T, kSize> gradient = Load<T, kSize>(gradient_of_group + c);
            Vector<T, kSize> corners[kCorners];
            LoadCorners(image + int64_t{sample.place.image_pixel(sizes)} * sizes.in_channels +
                            first_channel + c,
                        int64_t{sizes.in_w} * sizes.in_channels, int64_t{sizes.in_channels},
                        sample.place.bits(), corners);
#pragma unroll
            for (int corner = 0; corner < kCorners; ++corner) {
#pragma unroll
              for (int e = 0; e < kSize; ++e) {
                products[corner] += static_cast<float>(gradient.elements[e]) *
                                    static_cast<float>(corners[corner].elements[e]);
              }
            }
          }
          if (gradients.input == nullptr) continue;
          // The lanes' additions are neighbours: 64 bytes at a time.
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            constexpr int kHalf = kSize / 2;
            const int at = begin + (half * kLanesOfPosition + of_position) * kHalf;
            if (at >= sizes.deform_group_channels) break;
            const Vector<T, kHalf> gradient = Load<T, kHalf>(gradient_of_group + at);
            const int64_t pixel =
                ImagePixel(sizes, patch.first.n) + sample.place.image_pixel(sizes);
            ScatterFar(sizes, sample, gradient,
                       gradients.input + pixel * sizes.in_channels + first_channel + at);
          }
        }
#pragma unroll
        for (int corner = 0; corner < kCorners; ++corner) {
          products[corner] += __shfl_xor_sync(quad, products[corner], 1);
          products[corner] += __shfl_xor_sync(quad, products[corner], 2);
        }
        if (of_position == 0) {
          WriteOffsetAndMask(sample, products, SampleIndex(sizes, patch, position, tap), gradients);
        }
      }
    }
  }
}

// The sums of a tile of pixels once more, without what W and G have beyond the samples: 0 times
// infinity is NaN.
template <typename T, int kLanes>
__device__ __forceinline__ void SumSamples(const FusedSizes& sizes,
                                           const SampledTensors<T, float>& tensors,
                                           const AggregatePlan& plan, const AggregatePatch& patch,
                                           const BackwardMemory<T, kLanes>& memory, int tile,
                                           float (&sums)[kLanes][4]) {
  using Memory = BackwardMemory<T, kLanes>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kLanes * 4; ++i) sums[i / 4][i % 4] = 0;
  for (int s = 0; s < kPatchPositions * sizes.taps; ++s) {
    const int p = sizes.by_taps.Divide(s);
    const Position position = patch.PositionOf(plan, p);
    if (!Exists(sizes, position)) continue;
    const PatchSample<float> sample =
        LocateSample(sizes, tensors, plan, patch, position, s - p * sizes.taps);
    if (!sample.place.in_region()) continue;
    float weights[kCorners];
    BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      const int row = sample.place.region_pixel() + corner / 2 * plan.region.w + corner % 2 -
                      tile * kTilePixels;
      if (!(sample.place.bits() >> corner & 1) || (row & ~8) != lane / 4) continue;
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float term =
              weights[corner] *
              (sample.mask * static_cast<float>(
                                 memory.gradients[Memory::Place(p, j)].elements[lane % 4 * 2 + i]));
          if (row < 8) {
            sums[j][i] += term;
          } else {
            sums[j][2 + i] += term;
          }
        }
      }
    }
  }
}

// Adds W^T * G to the input's gradient.
template <typename T, int kLanes>
__device__ __forceinline__ void AddPixels(const FusedSizes& sizes,
                                          const SampledTensors<T, float>& tensors,
                                          const AggregatePlan& plan, const AggregatePatch& patch,
                                          const BackwardMemory<T, kLanes>& memory, int channel,
                                          float* grad_input) {
  using Memory = BackwardMemory<T, kLanes>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int eighth = lane / 8, of_eighth = lane % 8;
  const uint32_t matrix =
      SharedAddress(memory.matrix + (eighth / 2 * 8 + of_eighth) * plan.row() + eighth % 2 * 8);
  uint32_t gradients[(kLanes + 1) / 2];
#pragma unroll
  for (int j = 0; j < kLanes; j += 2) {
    gradients[j / 2] =
        SharedAddress(memory.gradients + Memory::Place(lane % 16, min(j + lane / 16, kLanes - 1)));
  }
  float* const of_warp = memory.products + warp * kWarpPositions * kProductsRow;
  static_assert(kProductsRow >= kLanes * kVec16Size<T>);
  for (int tile = warp; tile * kTilePixels < plan.pixels(); tile += kAggregateWarps) {
    float sums[kLanes][4] = {};
    bool any = false;
#pragma unroll
    for (int k = 0; k < kAggregateWarps; ++k) {
      if (tile < memory.tiles[k].begin || tile >= memory.tiles[k].end) continue;
      any = true;
      uint32_t a[4], b[4];
      LoadMatrices<true>(matrix + (k * kWarpPositions * plan.row() + tile * kTilePixels) *
                                      static_cast<int>(sizeof(T)),
                         a);
#pragma unroll
      for (int j = 0; j < kLanes; j += 2) {
        LoadMatrices<true>(gradients[j / 2] + k * kWarpPositions * kLanes * kVec16Bytes, b);
        MmaSync<T>(sums[j], a, {b[0], b[1]});
        if constexpr (kLanes > 1) MmaSync<T>(sums[j + 1], a, {b[2], b[3]});
      }
    }
    if (!any) continue;
    if (!__all_sync(kAllLanes, AllFinite(sums))) {
      SumSamples(sizes, tensors, plan, patch, memory, tile, sums);
    }
    // By way of shared memory, neighbouring lanes get neighbouring channels.
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float pair[] = {sums[j][2 * i], sums[j][2 * i + 1]};
        Store(of_warp + (lane / 4 + 8 * i) * kProductsRow + j * kVec16Size<T> + lane % 4 * 2, pair);
      }
    }
    __syncwarp();
    constexpr int kLanesOfPixel = 2 * kLanes, kPixelsTogether = kWarp / kLanesOfPixel;
    const int c = channel + lane % kLanesOfPixel * 4;
#pragma unroll
    for (int first = 0; first < kTilePixels; first += kPixelsTogether) {
      const int row = first + lane / kLanesOfPixel;
      const Vector<float, 4> sum =
          Load<float, 4>(of_warp + row * kProductsRow + lane % kLanesOfPixel * 4);
      const float (&four)[4] = sum.elements;
      const int pixel = tile * kTilePixels + row;
      const int h = plan.region.by_w.Divide(pixel);
      const int y = patch.region.top + h, x = patch.region.left + pixel - h * plan.region.w;
      const bool exists = pixel < plan.region.pixels() && y >= 0 && y < sizes.in_h && x >= 0 &&
                          x < sizes.in_w && c < sizes.deform_group_channels;
      const bool zero = four[0] == 0 && four[1] == 0 && four[2] == 0 && four[3] == 0;
      if (!exists || zero) continue;
      AtomicAdd<4>(
          grad_input +
              (int64_t{ImagePixel(sizes, patch.first.n)} + y * sizes.in_w + x) * sizes.in_channels +
              patch.group * sizes.deform_group_channels + c,
          four);
    }
  }
}

// Adds to each sample's products those of a chunk of channels.
template <typename T, int kLanes>
__device__ __forceinline__ void AddProducts(const AggregatePlan& plan,
                                            const PatchSample<float> (&samples)[kSamplesTogether],
                                            const TileRange& tiles,
                                            const BackwardMemory<T, kLanes>& memory,
                                            float (&products)[kSamplesTogether][kCorners]) {
  using Memory = BackwardMemory<T, kLanes>;
  constexpr int kSteps = (kLanes + 1) / 2;
  const int first_p = threadIdx.x / kWarp * kWarpPositions, lane = threadIdx.x % kWarp;
  const int eighth = lane / 8, of_eighth = lane % 8;
  uint32_t a[kSteps][4], pixels[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    LoadMatrices<false>(
        SharedAddress(memory.gradients +
                      Memory::Place(first_p + lane % 16, min(2 * k + lane / 16, kLanes - 1))),
        a[k]);
    if (kLanes == 1) a[k][2] = a[k][3] = 0;
    pixels[k] = SharedAddress(memory.pixels + Memory::Place(eighth / 2 * 8 + of_eighth,
                                                            min(2 * k + eighth % 2, kLanes - 1)));
  }
  float* const of_warp = memory.products + first_p * kProductsRow;
  for (int begin = tiles.begin; begin < tiles.end; begin += kProductTiles) {
    float sums[2 * kProductTiles][4] = {};
#pragma unroll
    for (int t = 0; t < kProductTiles; ++t) {
      if (begin + t >= tiles.end) break;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];
        LoadMatrices<false>(pixels[k] + (begin + t) * kTilePixels * kLanes * kVec16Bytes, b);
        if (kLanes == 1) b[1] = b[3] = 0;
        MmaSync<T>(sums[2 * t], a[k], {b[0], b[1]});
        MmaSync<T>(sums[2 * t + 1], a[k], {b[2], b[3]});
      }
    }
    __syncwarp();  // The products before have been read.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int u = 0; u < 2 * kProductTiles; ++u) {
        const float pair[] = {sums[u][2 * i], sums[u][2 * i + 1]};
        Store(of_warp + (lane / 4 + 8 * i) * kProductsRow + u * 8 + lane % 4 * 2, pair);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSamplesTogether; ++i) {
      const CornerPlace place = samples[i].place;
      if (!place.in_region()) continue;
      const int column = place.region_pixel() - begin * kTilePixels;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const int at = column + corner / 2 * plan.region.w + corner % 2;
        if (static_cast<uint32_t>(at) < kProductTiles * kTilePixels) {
          products[i][corner] += of_warp[lane / 2 * kProductsRow + at];
        }
      }
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kAggregateThreads, 4)
    MmaAggregateBackwardKernel(FusedSizes sizes, SampledTensors<T, float> tensors,
                               AggregatePlan plan, const T* __restrict__ grad_output,
                               SampledGradients<float> gradients) {
  if constexpr (kHasMma) {
    using Memory = BackwardMemory<T, kLanes>;
    extern __shared__ __align__(16) char shared[];
    const Memory memory(shared, plan, sizes.taps);
    const AggregatePatch patch(sizes, plan);
    const T* const image =
        tensors.input + int64_t{ImagePixel(sizes, patch.first.n)} * sizes.in_channels;
    const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
    StageGradients(sizes, grad_output, plan, patch, 0, memory);
    if (want_products) StagePixels(sizes, image, plan, patch, 0, memory);
    PatchSample<float> samples[kSamplesTogether] = {};
    const TileRange tiles =
        WriteMatrix(sizes, tensors, plan, patch, gradients.input != nullptr, memory,
                    [&](int i, const PatchSample<float>& sample) { samples[i] = sample; });
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0) memory.tiles[warp] = tiles;
    BackpropFar(sizes, tensors, image, grad_output, plan, patch, memory, gradients);

    float products[kSamplesTogether][kCorners] = {};
    for (int channel = 0; channel < sizes.deform_group_channels;
         channel += kLanes * kVec16Size<T>) {
      if (channel > 0) {
        __syncthreads();
        StageGradients(sizes, grad_output, plan, patch, channel, memory);
        if (want_products) StagePixels(sizes, image, plan, patch, channel, memory);
      }
      FinishCopies();
      __syncthreads();
      if (gradients.input != nullptr) {
        AddPixels(sizes, tensors, plan, patch, memory, channel, gradients.input);
      }
      if (want_products) AddProducts(plan, samples, tiles, memory, products);
    }
    if (!want_products) return;
    const Position position = patch.PositionOf(plan, threadIdx.x / 2);
    if (!Exists(sizes, position)) return;
#pragma unroll
    for (int i = 0; i < kSamplesTogether; ++i) {
      const int tap = 2 * i + lane % 2;
      // Those that are not in the region have been written.
      if (tap >= sizes.taps || (!samples[i].place.in_region() && samples[i].place.bits() != 0)) {
        continue;
      }
      WriteOffsetAndMask(samples[i], products[i], SampleIndex(sizes, patch, position, tap),
                         gradients);
    }
  }
}

constexpr int kBlocksTogether = 2;  // on a multiprocessor, at least

template <typename T>
constexpr auto kKernelOf =
    [](auto lanes) { return MmaAggregateBackwardKernel<CudaType<T>, decltype(lanes)::value>; };

}  // namespace

template <typename T>
std::string MmaAggregateBackwardMisfit(const DeformConvParams& params,
                                       const SampledTensors<T, ComputeType<T>>& tensors,
                                       const T* grad_output) {
  constexpr int64_t kMostChannels = 64;  // Measured, see benchmarks/gpu_kernels.md.
  if (params.taps() > kMostTaps) return "the kernel has many taps";
  if (params.deform_group_channels() > kMostChannels) return "a deformable group has many channels";
  return AggregateMisfit<BackwardMemory>(params, tensors, grad_output, kBlocksTogether,
                                         kKernelOf<T>);
}

template <typename T>
std::string MmaAggregateBackward(const DeformConvParams& params,
                                 const SampledTensors<T, ComputeType<T>>& tensors,
                                 const T* grad_output,
                                 const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  return LaunchAggregate<BackwardMemory>("MmaAggregateBackwardKernel", params, tensors,
                                         kBlocksTogether, stream, kKernelOf<T>, AsCuda(grad_output),
                                         gradients);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                                 \
  template std::string MmaAggregateBackwardMisfit<T>(                                              \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*);                \
  template std::string MmaAggregateBackward<T>(const DeformConvParams&,                            \
                                               const SampledTensors<T, ComputeType<T>>&, const T*, \
                                               const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
