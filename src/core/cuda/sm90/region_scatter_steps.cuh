// The steps of the region scatter kernel, by a thread. For .cu files only.
//
// `valid` tells whether the thread's position is worked on. Where it is not, `column` may be
// anything, and is neither read nor written.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_REGION_SCATTER_STEPS_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_REGION_SCATTER_STEPS_CUH_

#include <cstdint>

#include "core/cuda/fused/corners.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/copy_async.cuh"
#include "core/cuda/sm80/mma.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/cuda/sm90/patch_lane.cuh"
#include "core/cuda/sm90/patch_samples.cuh"
#include "core/cuda/sm90/region_scatter_layout.cuh"
#include "core/cuda/sm90/region_sums.cuh"
#include "core/cuda/sm90/scatter_matrix.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/sampling.h"

namespace deform_conv {
namespace cuda {

// The lane's first vec16 of the columns of the first tap.
template <typename T, int kChannels>
__device__ __forceinline__ T* FirstColumn(const FusedSizes& sizes, const PatchGrid& grid,
                                          const Patch& patch, int p, bool valid, T* columns) {
  if (valid) {
    columns += (sizes.IndexOf(patch.At(p)) - grid.begin) * (sizes.taps * sizes.in_channels) +
               (patch.channel - patch.channel_in_group) * sizes.taps + patch.channel_in_group +
               PatchLane<T, kChannels>::First() * kVec16Size<T>;
  }
  return columns;
}

// Begins to copy the lane's part of the columns' gradient of tap `tap + ahead` to a stage, if there
// is such a tap. `column` is that of `tap`.
template <typename Layout, typename Mine, typename T>
__device__ __forceinline__ void CopyGradColumns(const FusedSizes& sizes, const T* column,
                                                bool valid, int tap, int ahead, uint32_t stage) {
  if (tap + ahead < sizes.taps) {
    column += ahead * sizes.group_in_channels;
#pragma unroll
    for (int j = 0; j < Mine::kVec16s; ++j) {
      CopyVec16Async(Layout::Vec16At(stage, j), column + Mine::Distance(j) * kVec16Size<T>, valid);
    }
  }
  CommitCopies();
}

// The stages of this tap and of the one before it, in bytes from the first.
template <typename Layout>
struct StagesOfTaps {
  uint32_t now = 0, before = (Layout::kStages - 1) * Layout::kStageBytes;

  __device__ __forceinline__ void Advance() {
    before = now;
    now = now + Layout::kStageBytes < Layout::kStages * Layout::kStageBytes
              ? now + Layout::kStageBytes
              : 0;
  }
};

// Begins to copy the columns' gradient of the first taps, zeroes the scatter matrices, and locates
// the patch's samples.
template <typename Layout, typename Mine, typename T>
__device__ __forceinline__ void BeginPatch(const FusedSizes& sizes, const PatchGrid& grid,
                                           const SampledTensors<T, float>& tensors,
                                           const Patch& patch, const T* column, bool valid,
                                           uint32_t shared, uint32_t first_stage,
                                           PatchSample* samples) {
#pragma unroll
  for (int tap = 0; tap < Layout::kAhead; ++tap) {
    CopyGradColumns<Layout, Mine>(sizes, column, valid, 0, tap,
                                  first_stage + tap * Layout::kStageBytes);
  }
  for (int i = threadIdx.x * kVec16Bytes; i < Layout::kTransposedOffset;
       i += kThreadsPerBlock * kVec16Bytes) {
    StoreVec16(shared + i, make_uint4(0, 0, 0, 0));
  }
  LocatePatch(sizes, grid, tensors, patch, samples);
  __syncthreads();
}

// TF32: takes the columns' gradient out of its stage and, with kWantInput, transposes it into
// operand B.
template <typename Layout, int kChannels, bool kWantInput, int kCount>
__device__ __forceinline__ void TakeGradColumns(uint32_t stage, uint32_t first_transposed,
                                                uint8_t* memory, uint4 (&grads)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) grads[j] = LoadVec16(Layout::Vec16At(stage, j));
  if constexpr (kWantInput) {
    // Both operands have been multiplied.
    WarpgroupWait<0>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < kVec16Size<float>; ++i) {
        *reinterpret_cast<float*>(memory + Layout::kTransposedOffset +
                                  TransposedAt<kChannels>(first_transposed, j, i)) =
            RoundToTf32(__uint_as_float(WordOf(grads[j], i)));
      }
    }
  }
}

// The lane's vec16 j of the columns' gradient. In 16 bits it is in the stage. In TF32 with operand
// B it is there, rounded. Otherwise TakeGradColumns() has left it in `taken`.
template <typename T, int kChannels, bool kWantInput, int kCount>
__device__ __forceinline__ uint4 GradColumn(int j, uint32_t stage, uint32_t first_transposed,
                                            const uint8_t* memory, const uint4 (&taken)[kCount]) {
  using Layout = RegionLayout<T, kChannels, kWantInput>;
  if constexpr (Layout::k16Bits) {
    return LoadVec16(Layout::Vec16At(stage, j));
  } else if constexpr (kWantInput) {
    float numbers[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[i] = *reinterpret_cast<const float*>(memory + Layout::kTransposedOffset +
                                                   TransposedAt<kChannels>(first_transposed, j, i));
    }
    return reinterpret_cast<const uint4&>(numbers);
  } else {
    return taken[j];
  }
}

// Writes operand A, the tap's scatter matrix, to `matrix`. `written` holds the offsets of this
// thread's elements: in 16 bits, those of the previous tap in its lower half and those of the tap
// before in its upper half.
template <typename T>
__device__ __forceinline__ void WriteOperandA(const FusedSizes& sizes, const Patch& patch,
                                              const PatchSample* samples, int tap, uint8_t* matrix,
                                              uint32_t& written) {
  constexpr bool kHalves = sizeof(T) == 2;
  const uint32_t old = kHalves ? written >> 16 : written;
  const uint32_t now = UpdateScatterMatrix<T>(patch, samples, sizes.taps, tap, old, matrix);
  written = kHalves ? written << 16 | now : now;
  FenceProxyAsync();
  __syncwarp();
}
template <typename T>
constexpr uint32_t kNothingWritten = sizeof(T) == 2 ? kNoElement << 16 | kNoElement : kNoElement;

// Begins to add the tap's product to the region, once all threads have written the operands.
template <typename T, int kChannels>
__device__ __forceinline__ void BeginProduct(int warpgroup, uint32_t matrix, uint32_t operand_b,
                                             int tap,
                                             float (&region)[kRegionParts][kChannels / 2]) {
  if constexpr (sizeof(T) == 2) WarpgroupWait<0>();  // the tap before
  __syncthreads();
  MultiplyScatterMatrix<T, kChannels>(warpgroup, matrix, operand_b, tap > 0, region);
}

// Multiplies the columns' gradient, `grads(j)`, with the corners of the position's sample, the
// first of which are on their way; with `replace`, writes the columns.
template <typename T, typename Mine, int kInFlight, typename Grads>
__device__ __forceinline__ void MultiplyCorners(const PatchSample& sample, const PatchCorners& at,
                                                const PatchCornerLoader& loader, const Grads& grads,
                                                bool replace, bool valid, T* column,
                                                uint4 (&corners)[kInFlight][kCorners],
                                                float (&products)[kCorners]) {
  const auto weights = WeightsOf<T>(sample);
  CornerProducts<T> sums;
#pragma unroll
  for (int j = 0; j < Mine::kVec16s; ++j) {
    auto& vec16 = corners[j % kInFlight];
    sums.Add(grads(j), vec16);
    if (replace && valid) {
      *reinterpret_cast<uint4*>(column + Mine::Distance(j) * kVec16Size<T>) =
          Interpolate<T, /*kRound=*/false>(vec16, weights);
    }
    if (j + kInFlight < Mine::kVec16s) {
      loader.Load(
          at, [&](int) { return Mine::Distance(j + kInFlight) * kVec16Bytes; },
          reinterpret_cast<uint4(&)[1][kCorners]>(vec16));
    }
  }
  sums.Sum(products);
}

// Adds what corners outside of the region get, and overwrites the sample in `slot` with its
// gradients.
template <typename T, int kChannels, bool kWantInput, typename Grads>
__device__ __forceinline__ void FinishTap(const FusedSizes& sizes, const Patch& patch,
                                          const Grads& grads, bool want_products,
                                          const float (&products)[kCorners], PatchSample* slot,
                                          float* grad_input) {
  using Mine = PatchLane<T, kChannels>;
  if constexpr (kWantInput) AddOutside<T, kChannels>(sizes, patch, slot, grads, grad_input);
  __syncwarp();  // all lanes of the position have read the sample
  if (want_products && CornerProducts<T>::IsHere(Mine::PositionInWarp(), Mine::Lane())) {
    *slot = GradientsOf(*slot, products);
  }
  __syncwarp();
}

// Adds the region to the input's gradient, and stores those of offset and mask.
template <typename T, int kChannels, bool kWantInput>
__device__ __forceinline__ void FinishPatch(const FusedSizes& sizes, const PatchGrid& grid,
                                            const Patch& patch, int warpgroup,
                                            const PatchSample* samples, bool want_products,
                                            bool add, const SampledGradients<float>& gradients,
                                            float (&region)[kRegionParts][kChannels / 2]) {
  if constexpr (kWantInput) {
    WarpgroupWait<0>();
#pragma unroll
    for (int part = 0; part < kRegionParts; ++part) ReadAfterWait(region[part]);
    AddRegion<T, kChannels>(sizes, patch, warpgroup, region, gradients.input);
  }
  if (want_products) {
    __syncthreads();
    StoreGradients(sizes, grid, patch, samples, add, gradients);
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_REGION_SCATTER_STEPS_CUH_
