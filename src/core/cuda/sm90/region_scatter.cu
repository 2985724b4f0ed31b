// The gradients of input, offset and mask from that of the columns, on compute capability 9.0.
//
// A thread block takes a patch of output positions and a slice of input channels within one
// deformable and one convolution group. Nearly all of their gradient of the input lies in a small
// region around the patch. There it is a product, which the tensor cores sum in registers over all
// taps:
//
//   region [pixels, channels] += scatter matrix [pixels, positions] * grad_columns [positions,
//   channels]
//
// So memory sees one atomic addition for each pixel of the region, not one for each corner of each
// sample. Corners outside of the region are added one by one. The products of grad_columns with the
// corners are the gradients of offset and mask. The columns overwrite their gradient.

#include <type_traits>

#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/general/kernels.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/copy_async.cuh"
#include "core/cuda/sm80/swizzle.cuh"
#include "core/cuda/sm90/kernels.h"
#include "core/cuda/sm90/limits.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/cuda/sm90/patch_lane.cuh"
#include "core/cuda/sm90/patch_samples.cuh"
#include "core/cuda/sm90/region_scatter_layout.cuh"
#include "core/cuda/sm90/region_scatter_steps.cuh"
#include "core/cuda/sm90/scatter_matrix.cuh"
#include "core/cuda/sm90/wgmma.cuh"
#include "core/cuda/types.cuh"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

// Thread blocks of a multiprocessor. Shared memory for nine taps and the registers bound them.
template <bool kWantInput>
constexpr int kBlocksPerMultiprocessor = kWantInput ? 2 : 3;

// With `replace`, the columns overwrite their gradient. With `add`, the gradients of offset and
// mask are added instead of written.
template <typename T, int kChannels, bool kWantInput>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerMultiprocessor<kWantInput>)
    RegionScatterKernel(const __grid_constant__ FusedSizes sizes,
                        const __grid_constant__ PatchGrid grid, SampledTensors<T, float> tensors,
                        bool replace, bool add,
                        T* __restrict__ columns,  // [positions worked on, groups, taps, channels]
                        SampledGradients<float> gradients) {
  extern __shared__ __align__(kSlabAlignment) uint8_t memory[];
  using Layout = RegionLayout<T, kChannels, kWantInput>;
  using Mine = PatchLane<T, kChannels>;
  constexpr bool k16Bits = Layout::k16Bits;
  PatchSample* samples = reinterpret_cast<PatchSample*>(memory + Layout::kSamplesOffset);
  const uint32_t shared = SharedAddress(memory);
  const Patch patch = grid.At<kChannels>(sizes, blockIdx.x);
  const int warpgroup = WarpgroupIndex();
  const int p = Mine::PositionInPatch();
  const bool valid = grid.Includes(sizes, patch.At(p));
  T* column = FirstColumn<T, kChannels>(sizes, grid, patch, p, valid, columns);
  const uint32_t first_vec16 = shared + Layout::kStagesOffset + Layout::FirstVec16(p);
  const uint32_t first_transposed = FirstTransposed<kChannels>(p);  // TF32

  BeginPatch<Layout, Mine>(sizes, grid, tensors, patch, column, valid, shared, first_vec16,
                           samples);

  const bool want_products = gradients.offset != nullptr || gradients.mask != nullptr;
  float region[kRegionParts][kChannels / 2];  // the first product defines it
  uint32_t written = kNothingWritten<T>;
  PatchSample* slot = samples + p * sizes.taps;
  StagesOfTaps<Layout> stages;

#pragma unroll 1
  for (int tap = 0; tap < sizes.taps; ++tap) {
    const int matrix = k16Bits ? tap % 2 * Layout::kMatrixBytes : 0;
    uint4 taken[k16Bits ? 1 : Mine::kVec16s] = {};
    const auto grads = [&](int j) {
      return GradColumn<T, kChannels, kWantInput>(j, first_vec16 + stages.now, first_transposed,
                                                  memory, taken);
    };
    WaitForCopies<Layout::kAhead - 1>();
    if constexpr (!k16Bits) {
      TakeGradColumns<Layout, kChannels, kWantInput>(first_vec16, first_transposed, memory, taken);
    }
    if constexpr (kWantInput) {
      WriteOperandA<T>(sizes, patch, samples, tap, memory + matrix, written);
    }

    // The loads of corners overlap the wait at the barrier. They come after the fence, which would
    // wait for them.
    uint4 corners[Mine::kInFlight][kCorners];
    // Its addresses begin at this lane's channels. Made anew for each tap, to free registers.
    const PatchCornerLoader loader(sizes,
                                   tensors.input + patch.channel + Mine::First() * kVec16Size<T>);
    const auto at = PatchCorners::Of(sizes, patch, slot->packed_corner);
    if (want_products || replace) {
      loader.Load(at, [](int j) { return Mine::Distance(j) * kVec16Bytes; }, corners);
    }
    if constexpr (kWantInput) {
      const int operand_b =
          k16Bits ? Layout::kStagesOffset + stages.now : Layout::kTransposedOffset;
      BeginProduct<T, kChannels>(warpgroup, shared + matrix, shared + operand_b, tap, region);
    }
    CopyGradColumns<Layout, Mine>(sizes, column, valid, tap, Layout::kAhead,
                                  first_vec16 + (k16Bits ? stages.before : 0));

    float products[kCorners];
    if (want_products || replace) {
      MultiplyCorners<T, Mine>(*slot, at, loader, grads, replace, valid, column, corners, products);
    }
    FinishTap<T, kChannels, kWantInput>(sizes, patch, grads, want_products, products, slot,
                                        gradients.input);
    ++slot;
    column += sizes.group_in_channels;
    stages.Advance();
  }

  FinishPatch<T, kChannels, kWantInput>(sizes, grid, patch, warpgroup, samples, want_products, add,
                                        gradients, region);
}

// --- Launching ---

// The channels of a slice: 64 or 32, the most that divide the groups and fit shared memory; 0 if
// neither does.
template <typename T>
int SliceChannels(const DeformConvParams& params, bool want_input) {
  using Element = CudaType<T>;
  const auto fits = [&](auto channels) {
    const int64_t bytes =
        (want_input ? RegionLayout<Element, channels, true>::Bytes
                    : RegionLayout<Element, channels, false>::Bytes)(params.taps());
    return params.group_in_channels() % channels == 0 &&
           params.deform_group_channels() % channels == 0 && bytes <= kMostSharedBytes;
  };
  if (fits(std::integral_constant<int, 64>())) return 64;
  if (fits(std::integral_constant<int, 32>())) return 32;
  return 0;
}

// Zeroes the gradients of offset and mask at positions [begin, end), where they are wanted.
std::string ZeroSampleGradients(const DeformConvParams& params, int64_t begin, int64_t end,
                                const SampledGradients<float>& gradients, void* stream) {
  const int64_t first = begin * params.mask_channels();
  const int64_t bytes = (end - begin) * params.mask_channels() * int64_t{sizeof(float)};
  if (gradients.offset != nullptr) {
    DEFORM_CONV_RETURN_IF_ERROR(Zero(gradients.offset + 2 * first, 2 * bytes, stream));
  }
  return gradients.mask == nullptr ? "" : Zero(gradients.mask + first, bytes, stream);
}

template <typename T, int kChannels, bool kWantInput>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   int64_t begin, int64_t end, bool replace, T* columns,
                   const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  unsigned blocks;
  const PatchGrid grid = GridOfPatches(params, kWantInput, kChannels, begin, end, &blocks);
  const bool add = params.deform_group_channels() > kChannels;
  if (add) {
    DEFORM_CONV_RETURN_IF_ERROR(ZeroSampleGradients(params, begin, end, gradients, stream));
  }

  const auto kernel = RegionScatterKernel<Element, kChannels, kWantInput>;
  const int bytes =
      static_cast<int>(RegionLayout<Element, kChannels, kWantInput>::Bytes(params.taps()));
  DEFORM_CONV_RETURN_IF_ERROR(AllowSharedBytes("RegionScatterKernel", kernel, bytes));
  return LaunchKernel("RegionScatterKernel", kernel, blocks, kThreadsPerBlock, bytes, stream,
                      FusedSizes(params), grid, AsCuda<T>(tensors), replace, add, AsCuda(columns),
                      gradients);
}

}  // namespace

template <typename T>
std::string RegionScatterSm90Misfit(const DeformConvParams& params,
                                    const SampledTensors<T, ComputeType<T>>& tensors,
                                    const SampledGradients<ComputeType<T>>& gradients) {
  DEFORM_CONV_RETURN_IF_ERROR(Sm90Misfit());
  DEFORM_CONV_RETURN_IF_ERROR(SizesMisfit(params));
  DEFORM_CONV_RETURN_IF_ERROR(TensorsMisfit<T>(tensors));
  const bool want_input = gradients.input != nullptr;
  if (params.group_in_channels() % 32 != 0 || params.deform_group_channels() % 32 != 0) {
    return "the input channels of the groups are not multiples of 32";
  }
  const int channels = SliceChannels<T>(params, want_input);
  if (channels == 0) return kTooManyTaps;
  constexpr int64_t kMost = PackedCorner::kMostSize;
  if (params.in_h > kMost || params.in_w > kMost) {
    return "the input is more than " + std::to_string(kMost) + " pixels high or wide";
  }
  if (want_input && (SpanH(params) > kRegionSide || SpanW(params) > kRegionSide)) {
    return "what " + std::to_string(kPatchSide) + "x" + std::to_string(kPatchSide) +
           " positions sample without offsets, " + std::to_string(SpanH(params)) + "x" +
           std::to_string(SpanW(params)) + " pixels, is larger than " +
           std::to_string(kRegionSide) + "x" + std::to_string(kRegionSide);
  }
  const int64_t patches = params.batch * PatchesAlong(params.out_h) * PatchesAlong(params.out_w);
  if (patches > INT32_MAX / (params.in_channels / channels)) return "there are too many patches";
  if (!IsAligned(gradients.input) ||
      reinterpret_cast<uintptr_t>(gradients.offset) % sizeof(float2) != 0) {
    return "the input's gradient is not aligned to 16 bytes or the offset's is not aligned to 8";
  }
  return "";
}

template <typename T>
std::string RegionScatterSm90(const DeformConvParams& params,
                              const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                              int64_t end, bool replace, T* columns,
                              const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  if (begin == end || (!gradients.any() && !replace)) return "";
  const bool want_input = gradients.input != nullptr;
  const bool wide = SliceChannels<T>(params, want_input) == 64;
  const auto launch = want_input ? (wide ? Launch<T, 64, true> : Launch<T, 32, true>)
                                 : (wide ? Launch<T, 64, false> : Launch<T, 32, false>);
  return launch(params, tensors, begin, end, replace, columns, gradients, stream);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                               \
  template std::string RegionScatterSm90Misfit<T>(const DeformConvParams&,                       \
                                                  const SampledTensors<T, ComputeType<T>>&,      \
                                                  const SampledGradients<ComputeType<T>>&);      \
  template std::string RegionScatterSm90<T>(                                                     \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, bool, \
      T*, const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_FOR_TENSOR_CORE_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
