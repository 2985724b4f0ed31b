#include "core/deform_conv2d_fused_cuda.h"
#include "core/patch_cuda.cuh"

namespace deform_conv {
namespace {

using namespace cuda;  // the kernels' own names

// The gradients of input, offset and mask. A block of threads takes a patch of output positions and
// a slice of the input's channels, within one deformable and one convolution group. For each tap,
// tensor cores compute the columns' gradient
//
//   grad_columns [positions, channels] = grad_output [positions, out_channels] * filters^T,
//
// which stays in shared memory. From there it goes two ways. Its products with the samples' corners
// are the gradients of offset and mask. And nearly all that the input's gradient gets from it falls
// into a small region of the input around the patch, where it is a product too,
//
//   region [pixels, channels] += shares [pixels, positions] * grad_columns,
//
// with the mask times the weight of a corner at the pixel on which the corner of a position's
// sample lies. The region's sums stay in registers over all taps, so that memory sees one atomic
// addition for each pixel of the region, not one for each corner of each sample. Corners outside of
// the region are added one by one.

constexpr int kRowsPerCopy = kThreadsPerBlock / kRowChunks;

// Into how many blocks of a factor the output channels of a convolution group are cut; the last may
// be filled up with zeros.
template <typename T, typename Int>
__host__ __device__ constexpr Int OutBlocks(Int group_out_channels) {
  return (group_out_channels + kBlockDepth<T> - 1) / kBlockDepth<T>;
}

// Where things are in a block's shared memory, in bytes. The tiles are blocks of 128-byte rows, see
// wgmma_cuda.cuh.
//
//   shares        pixels by positions; absent where the input's gradient is not wanted
//   grad_columns  positions by channels; in TF32, RowOfChannel() by positions
//   samples       [positions, taps]: PatchSample
//   grad_output   positions by output channels of the convolution group
//   filters       channels by output channels, of one tap
template <typename T, int kChannels, bool kInput>
struct SharedLayout {
  // What is at the same place whatever the sizes needs no registers.
  static constexpr int kGradColumns =
      kInput ? kRegionPixels * kPatchPositions * static_cast<int>(sizeof(T)) : 0;
  // 16-bit rows of positions are whole ones, also if the slice is narrower.
  static constexpr int kSamples =
      kGradColumns +
      kPatchPositions * (sizeof(T) == 2 ? kRowBytes : kChannels * static_cast<int>(sizeof(T)));

  // In the host's 64 bits, or a kernel's 32.
  template <typename Int>
  static __host__ __device__ constexpr Int GradOutput(Int taps) {
    return kSamples + taps * static_cast<Int>(kPatchPositions * sizeof(PatchSample));
  }
  template <typename Int>
  static __host__ __device__ constexpr Int Filters(Int taps, Int group_out_channels) {
    return GradOutput(taps) + OutBlocks<T>(group_out_channels) * Int{kPatchPositions * kRowBytes};
  }
  static int64_t Bytes(int64_t taps, int64_t group_out_channels) {
    return Filters(taps, group_out_channels) +
           OutBlocks<T>(group_out_channels) * int64_t{kChannels * kRowBytes};
  }
};

// --- Filling shared memory ---

// Calls f(row, block, offset) for each chunk of a tile of kRows rows that is this thread's, with
// its offset in bytes.
template <int kRows, typename F>
__device__ __forceinline__ void ForMyChunks(int blocks, const F& f) {
  static_assert(kRows % kRowsPerCopy == 0 && kRowsPerCopy % kSwizzledRows == 0);
  const int thread = ReadThread();
  const int first_row = thread / kRowChunks;
  const uint32_t first_offset = SwizzledOffset(first_row, thread % kRowChunks);
#pragma unroll
  for (int row = 0; row < kRows; row += kRowsPerCopy) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      f(first_row + row, block, first_offset + (block * kRows + row) * kRowBytes);
    }
  }
}

// Begins to copy the patch's part of grad_output, [positions, output channels of the group].
template <typename T>
__device__ void CopyGradOutput(const FusedSizes& sizes, const PatchGrid& grid, const Patch& patch,
                               const T* __restrict__ grad_output, uint32_t to) {
  const int blocks = OutBlocks<T>(sizes.group_out_channels);
  const int column = ReadThread() % kRowChunks * kVector<T>;
  ForMyChunks<kPatchPositions>(blocks, [&](int p, int block, uint32_t offset) {
    const Position position = patch.At(p);
    const int o = block * kBlockDepth<T> + column;
    const bool valid = grid.Includes(sizes, position) && o < sizes.group_out_channels;
    const int64_t at = sizes.OrdinalOf(position) * sizes.out_channels + patch.out_channel + o;
    CopyChunkAsync(to + offset, valid ? grad_output + at : grad_output, valid);
  });
}

// Begins to copy the slice's part of a tap's filters, [channels, output channels of the group].
template <typename T, int kChannels>
__device__ __forceinline__ void CopyFilters(const FusedSizes& sizes, const Patch& patch, int tap,
                                            const T* __restrict__ filters, uint32_t to) {
  const int blocks = OutBlocks<T>(sizes.group_out_channels);
  const int column = ReadThread() % kRowChunks * kVector<T>;
  const int first_row = tap * sizes.group_in_channels + patch.filters_row;
  const T* first = filters + int64_t{first_row} * sizes.out_channels + patch.out_channel + column;
  ForMyChunks<kChannels>(blocks, [&](int row, int block, uint32_t offset) {
    const int o = block * kBlockDepth<T>;
    CopyChunkAsync(to + offset, first + int64_t{row} * sizes.out_channels + o,
                   o + column < sizes.group_out_channels);
  });
}

// Rounds what this thread has copied into a tile as the tensor cores want it.
template <typename T, int kRows>
__device__ __forceinline__ void RoundMyChunks(const FusedSizes& sizes, uint32_t tile) {
  if constexpr (std::is_same_v<T, float>) {
    const int blocks = OutBlocks<T>(sizes.group_out_channels);
    ForMyChunks<kRows>(blocks, [&](int, int, uint32_t offset) {
      const uint4 chunk = LoadChunk(tile + offset);
      const auto round = [](uint32_t bits) {
        return __float_as_uint(RoundToTf32(__uint_as_float(bits)));
      };
      StoreChunk(tile + offset,
                 make_uint4(round(chunk.x), round(chunk.y), round(chunk.z), round(chunk.w)));
    });
  }
}

// --- The columns' gradient ---

// Where the gradient of a channel at position p is, in TF32.
template <int kChannels, typename Byte>
__device__ __forceinline__ auto* GradColumnAt(Byte* grad_columns, int channel, int p) {
  using Element = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  constexpr int kDepth = kBlockDepth<float>, kSize = kVector<float>;
  return reinterpret_cast<Element*>(
             grad_columns + p / kDepth * (kChannels * kRowBytes) +
             SwizzledOffset(RowOfChannel<kChannels>(channel), p % kDepth / kSize)) +
         p % kSize;
}

// Begins sums [positions, channels] = grad_output * filters^T, for this warpgroup's share of the
// slice's channels.
template <typename T, int kChannels>
__device__ __forceinline__ void MultiplyFilters(const FusedSizes& sizes, int warpgroup,
                                                uint32_t grad_output, uint32_t filters,
                                                float (&sums)[kChannels / kWarpgroups / 2]) {
  constexpr int kCols = kChannels / kWarpgroups;
  constexpr uint32_t kStepBytes = StepBytes<T, RowsOf::kProduct>();
  uint32_t a = grad_output, b = filters + warpgroup * kCols * kRowBytes;
#pragma unroll 1
  for (int block = 0; block < OutBlocks<T>(sizes.group_out_channels); ++block) {
    WarpgroupArrive();
#pragma unroll
    for (int step = 0; step < kBlockDepth<T> / kStepDepth<T>; ++step) {
      Multiply<T, kCols, RowsOf::kProduct, RowsOf::kProduct>::Run(
          sums, FactorDescriptor(a + step * kStepBytes, 0),
          FactorDescriptor(b + step * kStepBytes, 0), block > 0 || step > 0);
    }
    a += kPatchPositions * kRowBytes;
    b += kChannels * kRowBytes;
  }
  WarpgroupCommit();
}

// Writes this warpgroup's share of the columns' gradient to shared memory.
template <typename T, int kChannels>
__device__ __forceinline__ void StoreGradColumns(int warpgroup,
                                                 const float (&sums)[kChannels / kWarpgroups / 2],
                                                 uint8_t* grad_columns) {
  constexpr int kCols = kChannels / kWarpgroups;
  const int warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int p = 16 * warp + lane / 4 + 8 * j;
    if constexpr (sizeof(T) == 2) {
      constexpr int kChunks = kCols / kVector<T>;
      const uint32_t first =
          SwizzledOffset(p, warpgroup * kChunks) + lane % 4 * sizeof(Vector<T, 2>);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        // As SwizzledOffset(p, warpgroup * kChunks + i), since kChunks is a power of 2.
        Store(reinterpret_cast<T*>(grad_columns + (first ^ i * kChunkBytes)),
              {sums[4 * i + 2 * j], sums[4 * i + 2 * j + 1]});
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCols / 8; ++i) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int channel = warpgroup * kCols + 8 * i + lane % 4 * 2 + k;
          *GradColumnAt<kChannels>(grad_columns, channel, p) = RoundToTf32(sums[4 * i + 2 * j + k]);
        }
      }
    }
  }
}

// Position p's gradients of the lane's vector of channels.
template <typename T, int kChannels>
__device__ __forceinline__ void LoadGradColumns(const uint8_t* grad_columns, int p, int lane,
                                                float (&grads)[kVector<T>]) {
  if constexpr (sizeof(T) == 2) {
    const auto vector =
        Load<T, kVector<T>>(reinterpret_cast<const T*>(grad_columns + SwizzledOffset(p, lane)));
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) grads[i] = static_cast<float>(vector.elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      grads[i] = *GradColumnAt<kChannels>(grad_columns, lane * kVector<T> + i, p);
    }
  }
}

// --- Corners ---

// How a warp works on samples: rows of lanes, each row on one sample, its lanes side by side on
// vectors of channels.
template <typename T, int kChannels>
struct SampleLanes {
  static constexpr int kLanes = kChannels / kVector<T>;
  static constexpr int kRows = kWarp / kLanes;
  static constexpr int kPerWarp = kPatchPositions / (kThreadsPerBlock / kWarp);
  static constexpr int kPasses = kPerWarp / kRows;
  static_assert(kPasses * kRows == kPerWarp);

  // The position whose sample this thread works on.
  static __device__ __forceinline__ int Position(int pass) {
    return threadIdx.x / kWarp * kPerWarp + pass * kRows + threadIdx.x % kWarp / kLanes;
  }
  static __device__ __forceinline__ int Lane() { return ReadThread() % kLanes; }
};

// Replaces a sample by its gradients, from the columns' gradient and its corners. By whole warps.
template <typename T, int kChannels>
__device__ __forceinline__ void ReplaceByGradients(const uint4 (&chunks)[kCorners],
                                                   const uint8_t* grad_columns, int p,
                                                   bool want_mask, PatchSample* slot) {
  using Rows = SampleLanes<T, kChannels>;
  const PatchSample sample = *slot;
  float grads[kVector<T>];
  LoadGradColumns<T, kChannels>(grad_columns, p, Rows::Lane(), grads);
  float products[kCorners] = {};
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    const auto& values = reinterpret_cast<const Vector<T, kVector<T>>&>(chunks[corner]);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      products[corner] += grads[i] * static_cast<float>(values.elements[i]);
    }
  }
  const float grad_h = SumOverLanes<Rows::kLanes>(BilinearDerivativeH(sample.w, products));
  const float grad_w = SumOverLanes<Rows::kLanes>(BilinearDerivativeW(sample.h, products));
  float grad_mask = 0;
  if (want_mask) {
    float weights[kCorners];
    BilinearWeights(sample.h, sample.w, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      grad_mask += weights[corner] * products[corner];
    }
    grad_mask = SumOverLanes<Rows::kLanes>(grad_mask);
  }
  __syncwarp();  // all lanes of the row have read the sample
  if (Rows::Lane() != 0) return;
  // Where no corner counts every gradient is 0, also beside an infinite mask.
  const bool counts = sample.place != 0;
  slot->h = counts ? sample.mask * grad_h : 0.0f;
  slot->w = counts ? sample.mask * grad_w : 0.0f;
  slot->mask = counts ? grad_mask : 0.0f;
}

// Adds what corners outside of the region get to grad_input.
template <typename T, int kChannels>
__device__ __forceinline__ void AddOutside(const FusedSizes& sizes, const Patch& patch,
                                           const PatchSample* sample, const uint8_t* grad_columns,
                                           int p, float* __restrict__ grad_input) {
  const Place place = Place::Of(sample->place);
  if (patch.RegionHoldsAll(place)) return;
  using Rows = SampleLanes<T, kChannels>;
  const int top_left = patch.first_pixel + place.h * sizes.in_w + place.w;
  // Rare, so registers count more than instructions.
#pragma unroll 1
  for (int corners = place.corners & ~patch.CornersInRegion(place); corners != 0;
       corners &= corners - 1) {
    const int corner = __ffs(corners) - 1;
    float weights[kCorners], share = 0;
    BilinearWeights(sample->h, sample->w, weights);
#pragma unroll
    for (int i = 0; i < kCorners; ++i) share = i == corner ? weights[i] : share;
    share *= sample->mask;
    float grads[kVector<T>];
    LoadGradColumns<T, kChannels>(grad_columns, p, Rows::Lane(), grads);
    const int64_t pixel = top_left + (corner >= kBottomLeft ? sizes.in_w : 0) + (corner & 1);
    float* to = grad_input + pixel * sizes.in_channels + patch.channel + Rows::Lane() * kVector<T>;
#pragma unroll
    for (int i = 0; i < kVector<T>; i += 4) {
      const float values[4] = {share * grads[i], share * grads[i + 1], share * grads[i + 2],
                               share * grads[i + 3]};
      AddVector(to + i, values);
    }
  }
}

// Registers are bounded so that as many blocks run side by side as shared memory holds for common
// numbers of output channels.
template <typename T, int kChannels>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 2 || kChannels == 32 ? 2 : 1;

// kInput tells whether the input's gradient is wanted, `add` whether the samples' gradients are
// added instead of written.
template <typename T, int kChannels, bool kInput>
__global__ void __launch_bounds__(kThreadsPerBlock, (kBlocksPerMultiprocessor<T, kChannels>))
    FusedBackpropSamplesKernel(
        const __grid_constant__ FusedSizes sizes, const __grid_constant__ PatchGrid grid,
        SampledTensors<T, float> tensors,
        const T* __restrict__ filters,      // [taps, group_in_channels, out_channels]
        const T* __restrict__ grad_output,  // [positions, out_channels]
        bool add, SampledGradients<float> gradients) {
  extern __shared__ __align__(kBlockAlignment) uint8_t shares[];
  using Layout = SharedLayout<T, kChannels, kInput>;
  uint8_t* grad_columns = shares + Layout::kGradColumns;
  PatchSample* samples = reinterpret_cast<PatchSample*>(shares + Layout::kSamples);
  const uint32_t shared = SharedAddress(shares);
  const uint32_t grad_output_tile = shared + Layout::GradOutput(sizes.taps);
  const uint32_t filters_tile = shared + Layout::Filters(sizes.taps, sizes.group_out_channels);
  const Patch patch = grid.At<kChannels>(sizes, blockIdx.x);
  const int warpgroup = WarpgroupIndex();

  CopyGradOutput(sizes, grid, patch, grad_output, grad_output_tile);
  CopyFilters<T, kChannels>(sizes, patch, 0, filters, filters_tile);
  CommitCopies();
  if (kInput) {
    for (int i = threadIdx.x * kChunkBytes; i < Layout::kGradColumns;
         i += kThreadsPerBlock * kChunkBytes) {
      StoreChunk(shared + i, make_uint4(0, 0, 0, 0));
    }
  }
  LocatePatch(sizes, grid, tensors, patch, samples);
  WaitForCopies<0>();
  RoundMyChunks<T, kPatchPositions>(sizes, grad_output_tile);
  RoundMyChunks<T, kChannels>(sizes, filters_tile);
  FenceForTensorCores();
  __syncthreads();

  using Rows = SampleLanes<T, kChannels>;
  // Counts from this thread's channels.
  const CornerReader reader(sizes, tensors.input + patch.channel + Rows::Lane() * kVector<T>);
  const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
  const bool want_mask = gradients.mask != nullptr;
  float region[kRegionParts][kChannels / 2] = {};
  uint32_t share = kNoShare;

#pragma unroll 1
  for (int tap = 0; tap < sizes.taps; ++tap) {
    {
      float sums[kChannels / kWarpgroups / 2];
      MultiplyFilters<T, kChannels>(sizes, warpgroup, grad_output_tile, filters_tile, sums);
      if (kInput) share = UpdateShares<T>(patch, samples, sizes.taps, tap, share, shares);
      WarpgroupWait<0>();
      ReadAfterWait(sums);
      StoreGradColumns<T, kChannels>(warpgroup, sums, grad_columns);
    }
    FenceForTensorCores();
    // The first corners are on their way while the block waits for the columns' gradient; not
    // before the fence, which would wait for them.
    uint4 chunks[1][kCorners];
    if (want_products) {
      PlacedCorners::Of(sizes, patch, samples[Rows::Position(0) * sizes.taps + tap].place)
          .Load(reader, 0, 0, chunks);
    }
    __syncthreads();

    // The filters have been read; the next tap's come while the rest is done.
    if (tap + 1 < sizes.taps) {
      CopyFilters<T, kChannels>(sizes, patch, tap + 1, filters, filters_tile);
    }
    CommitCopies();
    if (kInput) {
      MultiplyShares<T, kChannels>(warpgroup, shared, shared + Layout::kGradColumns, true, region);
    }
#pragma unroll 1
    for (int pass = 0; pass < Rows::kPasses; ++pass) {
      const int p = Rows::Position(pass);
      PatchSample* sample = samples + p * sizes.taps + tap;
      if (kInput) {
        AddOutside<T, kChannels>(sizes, patch, sample, grad_columns, p, gradients.input);
        __syncwarp();
      }
      if (!want_products) continue;
      ReplaceByGradients<T, kChannels>(chunks[0], grad_columns, p, want_mask, sample);
      if (pass + 1 < Rows::kPasses) {
        const PatchSample* next = samples + Rows::Position(pass + 1) * sizes.taps + tap;
        PlacedCorners::Of(sizes, patch, next->place).Load(reader, 0, 0, chunks);
      }
    }
    __syncwarp();

    WaitForCopies<0>();
    if (tap + 1 < sizes.taps) RoundMyChunks<T, kChannels>(sizes, filters_tile);
    FenceForTensorCores();
    if (kInput) WarpgroupWait<0>();
    __syncthreads();
  }

  if (kInput) {
#pragma unroll
    for (int part = 0; part < kRegionParts; ++part) ReadAfterWait(region[part]);
    AddRegion<T, kChannels>(sizes, patch, warpgroup, region, gradients.input);
  }
  if (want_products) StoreGradients(sizes, grid, patch, samples, add, gradients);
}

// --- Launching ---

template <typename T>
int SliceChannelsOf(const DeformConvParams& params, bool want_input) {
  using Element = CudaType<T>;
  return SliceChannels(params, [&](auto channels) {
    return (want_input ? SharedLayout<Element, channels, true>::Bytes
                       : SharedLayout<Element, channels, false>::Bytes)(
        params.taps(), params.group_out_channels());
  });
}

template <typename T, int kChannels, bool kInput>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   const T* filters, const T* grad_output,
                   const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  const int64_t positions = params.out_positions();
  unsigned blocks;
  const PatchGrid grid = GridOfPatches(params, kInput, kChannels, 0, positions, &blocks);
  const bool add = params.deform_group_channels() > kChannels;
  std::string error;
  if (add) error = ZeroSampleGradients(params, 0, positions, gradients, stream);
  if (!error.empty()) return error;

  const auto kernel = FusedBackpropSamplesKernel<Element, kChannels, kInput>;
  const int bytes = static_cast<int>(
      SharedLayout<Element, kChannels, kInput>::Bytes(params.taps(), params.group_out_channels()));
  error = AllowSharedBytes(kernel, bytes);
  if (!error.empty()) return error;
  kernel<<<blocks, kThreadsPerBlock, bytes, StreamOf(stream)>>>(
      FusedSizes(params), grid, NativeTensors<T>(tensors), Native(filters), Native(grad_output),
      add, gradients);
  return LaunchError("FusedBackpropSamplesKernel");
}

}  // namespace

template <typename T>
bool FusedBackpropSamplesFits(const DeformConvParams& params,
                              const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                              const T* grad_output,
                              const SampledGradients<ComputeType<T>>& gradients) {
  const bool want_input = gradients.input != nullptr;
  return CanVectorize<T>(params) && params.group_out_channels() % kVector<CudaType<T>> == 0 &&
         PatchesFit(params, want_input, SliceChannelsOf<T>(params, want_input)) &&
         Aligned(tensors.input) && Aligned(tensors.offset) && Aligned(filters) &&
         Aligned(grad_output) && Aligned(gradients.input) && Aligned(gradients.offset);
}

template <typename T>
std::string FusedBackpropSamplesCuda(const DeformConvParams& params,
                                     const SampledTensors<T, ComputeType<T>>& tensors,
                                     const T* filters, const T* grad_output, CudaDevice& device,
                                     const SampledGradients<ComputeType<T>>& gradients) {
  if (params.out_positions() == 0 || !gradients.any()) return "";
  const bool want_input = gradients.input != nullptr;
  const bool wide = SliceChannelsOf<T>(params, want_input) == 64;
  const auto launch = want_input ? (wide ? Launch<T, 64, true> : Launch<T, 32, true>)
                                 : (wide ? Launch<T, 64, false> : Launch<T, 32, false>);
  return launch(params, tensors, filters, grad_output, gradients, device.stream());
}

#define DEFORM_CONV_INSTANTIATE(T)                                                              \
  template bool FusedBackpropSamplesFits<T>(const DeformConvParams&,                            \
                                            const SampledTensors<T, ComputeType<T>>&, const T*, \
                                            const T*, const SampledGradients<ComputeType<T>>&); \
  template std::string FusedBackpropSamplesCuda<T>(                                             \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*,    \
      CudaDevice&, const SampledGradients<ComputeType<T>>&);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
