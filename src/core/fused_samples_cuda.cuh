// How the fused kernels sample: tables of located samples in shared memory, and vectors of channels
// on their way from the input into a factor of a product. For .cu files only.

#ifndef DEFORM_CONV_CORE_FUSED_SAMPLES_CUDA_CUH_
#define DEFORM_CONV_CORE_FUSED_SAMPLES_CUDA_CUH_

#include <algorithm>

#include "core/position_order_cuda.cuh"
#include "core/samples_cuda.cuh"
#include "core/wgmma_cuda.cuh"

namespace deform_conv {
namespace cuda {

// A block of a factor is this deep: 64 numbers of 16 bits, or 32 of TF32.
template <typename T>
constexpr int kBlockDepth = kRowBytes / sizeof(T);
// What a thread samples at once: 16 bytes.
template <typename T>
constexpr int kVector = kChunkBytes / sizeof(T);

// Sizes in 32 bits, which FitsInt32() makes sure of.
struct FusedSizes {
  int32_t in_h, in_w, in_channels, out_h, out_w, out_channels;
  int32_t taps, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int32_t deform_groups, group_in_channels, group_out_channels, deform_group_channels;
  int32_t positions;
  Divisor taps_of_group, taps_of_row, taps_of_position, channels_of_group;

  explicit FusedSizes(const DeformConvParams& params)
      : in_h(static_cast<int32_t>(params.in_h)),
        in_w(static_cast<int32_t>(params.in_w)),
        in_channels(static_cast<int32_t>(params.in_channels)),
        out_h(static_cast<int32_t>(params.out_h)),
        out_w(static_cast<int32_t>(params.out_w)),
        out_channels(static_cast<int32_t>(params.out_channels)),
        taps(static_cast<int32_t>(params.taps())),
        kernel_w(static_cast<int32_t>(params.kernel_w)),
        stride_h(static_cast<int32_t>(params.stride_h)),
        stride_w(static_cast<int32_t>(params.stride_w)),
        dilation_h(static_cast<int32_t>(params.dilation_h)),
        dilation_w(static_cast<int32_t>(params.dilation_w)),
        pad_top(static_cast<int32_t>(params.pad_top)),
        pad_left(static_cast<int32_t>(params.pad_left)),
        deform_groups(static_cast<int32_t>(params.deform_groups)),
        group_in_channels(static_cast<int32_t>(params.group_in_channels())),
        group_out_channels(static_cast<int32_t>(params.group_out_channels())),
        deform_group_channels(static_cast<int32_t>(params.deform_group_channels())),
        positions(static_cast<int32_t>(params.out_positions())),
        taps_of_group(static_cast<uint32_t>(params.taps())),
        taps_of_row(static_cast<uint32_t>(params.kernel_w)),
        taps_of_position(static_cast<uint32_t>(params.mask_channels())),
        channels_of_group(static_cast<uint32_t>(params.group_in_channels())) {}

  __device__ __forceinline__ int64_t OrdinalOf(const Position& position) const {
    return (int64_t{position.n} * out_h + position.y) * out_w + position.x;
  }
};

// A pixel of the batch and the four corner bits in one number.
constexpr int kCornerBits = 4;
constexpr int64_t kMostPackedPixels = int64_t{1} << 27;

// Whether the sizes, and what kernels compute of them, fit into 32 bits.
inline bool FitsInt32(const DeformConvParams& params) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto reach = [](int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
    return (out - 1) * stride + (kernel - 1) * dilation;
  };
  return params.batch * params.in_h * params.in_w + params.in_w < kMostPackedPixels &&
         params.out_positions() < kMost && params.in_channels < kMost / 64 &&
         params.out_channels < kMost / 64 &&
         params.taps() * std::max(params.in_channels, params.deform_groups) < kMost &&
         params.taps() * params.out_channels < kMost && params.pad_top < kInt32Limit / 2 &&
         params.pad_left < kInt32Limit / 2 &&
         reach(params.out_h, params.stride_h, params.kernel_h, params.dilation_h) <
             kInt32Limit / 2 &&
         reach(params.out_w, params.stride_w, params.kernel_w, params.dilation_w) < kInt32Limit / 2;
}

// A tap of a deformable group: its number among those of a position, g * taps + tap, and where it
// samples, before the offset, for the position (0, 0).
struct Tap {
  int32_t g_tap, h_base, w_base;

  __device__ __forceinline__ static Tap Of(const FusedSizes& sizes, int g_tap) {
    const int tap = g_tap - sizes.taps_of_group.Divide(g_tap) * sizes.taps;
    const int ky = sizes.taps_of_row.Divide(tap);
    const int kx = tap - ky * sizes.kernel_w;
    return {g_tap, ky * sizes.dilation_h - sizes.pad_top, kx * sizes.dilation_w - sizes.pad_left};
  }
};

// The weights of a sample's corners as they are kept: in the type that they are multiplied in.
template <typename T>
struct alignas(kCorners * sizeof(T)) CornerWeights {
  T of[kCorners];
};

// Located samples, with the weights times the mask, and 0 where a corner does not count.
//
// All four corners of an entry are pixels of the image, so that they can be read without asking
// which of them count: where a sample lies across the border, its corners are moved inside by a
// pixel, and their weights with them. An image has at least two rows and two columns here.
template <typename T>
struct SampleTable {
  static constexpr int kEntryBytes = sizeof(CornerWeights<T>) + sizeof(int32_t);

  CornerWeights<T>* weights;  // [entries]
  int32_t* corners;           // [entries]: pixel of the top left corner, and corner bits

  // The table that begins at `memory`, which is aligned to 16 bytes.
  __device__ static SampleTable At(void* memory, int entries) {
    CornerWeights<T>* weights = static_cast<CornerWeights<T>*>(memory);
    return {weights, reinterpret_cast<int32_t*>(weights + entries)};
  }

  // Locates the sample that a tap takes at `position`.
  __device__ __forceinline__ void Locate(const FusedSizes& sizes, const Position& position,
                                         const Tap& tap, float2 offset, float mask,
                                         int entry) const {
    const auto h = LocateOnAxis<float, int32_t>(position.y * sizes.stride_h + tap.h_base, offset.x,
                                                sizes.in_h);
    const auto w = LocateOnAxis<float, int32_t>(position.x * sizes.stride_w + tap.w_base, offset.y,
                                                sizes.in_w);
    const MovedInside rows(h, sizes.in_h), columns(w, sizes.in_w);
    const bool inside = h.inside && w.inside;
    const float upper = inside ? mask * rows.weights[0] : 0.0f;
    const float lower = inside ? mask * rows.weights[1] : 0.0f;
    weights[entry] = {
        static_cast<T>(upper * columns.weights[0]), static_cast<T>(upper * columns.weights[1]),
        static_cast<T>(lower * columns.weights[0]), static_cast<T>(lower * columns.weights[1])};
    const int32_t top_left = (position.n * sizes.in_h + rows.low) * sizes.in_w + columns.low;
    const int32_t bits =
        (rows.bits & 1 ? columns.bits : 0) | (rows.bits & 2 ? columns.bits << 2 : 0);
    corners[entry] = inside ? top_left << kCornerBits | bits : 0;
  }

  // Writes an entry whose sample is 0.
  __device__ __forceinline__ void SetToZero(int entry) const {
    weights[entry] = {};
    corners[entry] = 0;
  }

 private:
  // The two pixels of one axis that a sample lies between, moved by one where either is outside.
  struct MovedInside {
    int32_t low, bits;  // a bit for each pixel that counts
    float weights[2];   // 0 where it does not

    __device__ __forceinline__ MovedInside(const AxisSample<float, int32_t>& sample, int32_t size) {
      const bool before = sample.low < 0, behind = sample.low >= size - 1;
      low = sample.low + (before ? 1 : 0) - (behind ? 1 : 0);
      bits = before ? 1 : behind ? 2 : 3;
      weights[0] = before ? sample.fraction : behind ? 0.0f : 1 - sample.fraction;
      weights[1] = before ? 0.0f : behind ? 1 - sample.fraction : sample.fraction;
    }
  };
};

// The offset and the mask of a sample, `index` among those of the batch.
template <typename T>
__device__ __forceinline__ float2 OffsetOf(const SampledTensors<T, float>& tensors, int64_t index) {
  return __ldg(reinterpret_cast<const float2*>(tensors.offset) + index);
}
template <typename T>
__device__ __forceinline__ float MaskOf(const SampledTensors<T, float>& tensors, int64_t index) {
  return tensors.mask == nullptr ? 1.0f : __ldg(tensors.mask + index);
}

// Distances of corners, in bytes.
struct CornerDistances {
  int32_t pixel;
  int64_t row;

  template <typename T>
  __device__ __forceinline__ static CornerDistances Of(const FusedSizes& sizes) {
    const int32_t pixel = sizes.in_channels * static_cast<int32_t>(sizeof(T));
    return {pixel, int64_t{sizes.in_w} * pixel};
  }
};

// Where corners are read from: their distances, and the pixel that packed corners count from.
struct CornerReader {
  CornerDistances distances;
  const uint8_t* first;  // of the input, the pixel above and left of the first

  template <typename T>
  __device__ CornerReader(const FusedSizes& sizes, const T* input)
      : distances(CornerDistances::Of<T>(sizes)),
        first(reinterpret_cast<const uint8_t*>(input) - distances.row - distances.pixel) {
    // Else the compiler adds up each corner's address from the input's on.
    asm volatile("" : "+l"(first));
  }

  // Begins to load the chunk of each corner that is `channel_bytes` into its pixel; of corners that
  // do not count it is 0. With kAllCount, all do.
  template <bool kAllCount>
  __device__ __forceinline__ void Load(int32_t corners, int32_t channel_bytes,
                                       uint4 (&chunks)[kCorners]) const {
    const uint8_t* top =
        first + channel_bytes + int64_t{corners >> kCornerBits} * int64_t{distances.pixel};
    const uint8_t* bottom = top + distances.row;
    const uint8_t* from[kCorners] = {top, top + distances.pixel, bottom, bottom + distances.pixel};
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      if (kAllCount) {
        chunks[corner] = __ldg(reinterpret_cast<const uint4*>(from[corner]));
      } else {
        uint4 chunk = make_uint4(0, 0, 0, 0);
        if (corners >> corner & 1) chunk = __ldg(reinterpret_cast<const uint4*>(from[corner]));
        chunks[corner] = chunk;
      }
    }
  }
};
constexpr int32_t kAllCorners = (1 << kCornerBits) - 1;

// The samples of a chunk of channels, with kRound rounded as the tensor cores want them. 16-bit
// types are interpolated in their own arithmetic, which is a third of the instructions that
// conversion to floats and back would take; what the samples add up to is in float.
template <typename T, bool kRound = true>
__device__ __forceinline__ uint4 Interpolate(const uint4 (&chunks)[kCorners],
                                             const CornerWeights<T>& weights) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      Pair sum;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const Pair weight{weights.of[corner], weights.of[corner]};
        const Pair numbers = reinterpret_cast<const Pair*>(&chunks[corner])[i];
        sum = corner == 0 ? __hmul2(weight, numbers) : __hfma2(weight, numbers, sum);
      }
      words[i] = reinterpret_cast<const uint32_t&>(sum);
    } else {
      float sum = 0;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        sum += weights.of[corner] * reinterpret_cast<const float*>(&chunks[corner])[i];
      }
      words[i] = __float_as_uint(kRound ? RoundToTf32(sum) : sum);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The corners of a table entry's sample, on their way from memory.
struct CornersInFlight {
  uint4 chunks[kCorners];

  // Begins to load chunks; `input` is that of the first pixel. `corners` are the entry's.
  __device__ __forceinline__ void Load(const CornerDistances& distances, const uint8_t* input,
                                       int32_t corners) {
    const uint8_t* top = input + int64_t{corners >> kCornerBits} * int64_t{distances.pixel};
    const uint8_t* bottom = top + distances.row;
    chunks[kTopLeft] = __ldg(reinterpret_cast<const uint4*>(top));
    chunks[kTopRight] = __ldg(reinterpret_cast<const uint4*>(top + distances.pixel));
    chunks[kBottomLeft] = __ldg(reinterpret_cast<const uint4*>(bottom));
    chunks[kBottomRight] = __ldg(reinterpret_cast<const uint4*>(bottom + distances.pixel));
  }

  // Sets chunks of corners that do not count to 0: what lies there may be infinite.
  __device__ __forceinline__ void DropUncounted(int32_t corners) {
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      if (!(corners >> corner & 1)) chunks[corner] = make_uint4(0, 0, 0, 0);
    }
  }
};

// Keeps the compiler from computing a pointer anew from what it was computed from.
__device__ __forceinline__ const uint8_t* Pinned(const uint8_t* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// --- Launching, on the host ---

constexpr int kMostSharedBytes = 227 << 10;  // of a block, on compute capability 9.0

// Whether channels come in whole chunks, an image has four corners, and sizes fit into 32 bits.
template <typename T>
bool ChannelsFit(const DeformConvParams& params) {
  constexpr int64_t kSize = kVectorBytes / sizeof(T);
  return CanVectorize<T>(params) && params.group_out_channels() % kSize == 0 && params.in_h > 1 &&
         params.in_w > 1 && FitsInt32(params);
}

template <typename T>
bool TensorsFit(const SampledTensors<T, ComputeType<T>>& tensors) {
  return Aligned(tensors.input) &&
         reinterpret_cast<uintptr_t>(tensors.offset) % sizeof(float2) == 0;
}

// Lets blocks of `kernel` have so much shared memory.
template <typename Kernel>
std::string AllowSharedBytes(Kernel kernel, int64_t bytes) {
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  return error == cudaSuccess
             ? ""
             : std::string("shared memory of a fused kernel: ") + cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_FUSED_SAMPLES_CUDA_CUH_
