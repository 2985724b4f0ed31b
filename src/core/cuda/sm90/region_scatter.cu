// The gradients of input, offset and mask from that of the columns, on compute capability 9.0.
//
// A thread block takes a patch of output positions and a slice of the input's channels, within one
// deformable and one convolution group. Nearly all that the input's gradient gets from them falls
// into a small region of the input around the patch, and is a product there, which tensor cores sum
// up in registers over all taps:
//
//   region [pixels, channels] += scatter matrix [pixels, positions] * grad_columns [positions,
//   channels]
//
// So memory sees one atomic addition for each pixel of the region, not one for each corner of each
// sample. Corners outside of the region are added one by one.
//
// Four lanes have a position for all taps, and each of them every fourth vec16 of its channels: of
// the columns' gradient, which nobody else reads, and of the sample's corners, whose products with
// it are the gradients of offset and mask. The columns themselves take their gradient's place.

#include <algorithm>

#include "core/cuda/general/kernels.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm90/kernels.h"
#include "core/cuda/sm90/limits.cuh"
#include "core/cuda/sm90/patch.cuh"
#include "core/cuda/sm90/patch_lane.cuh"
#include "core/cuda/sm90/patch_samples.cuh"
#include "core/cuda/sm90/region_scatter_layout.cuh"
#include "core/cuda/sm90/region_scatter_steps.cuh"
#include "core/cuda/sm90/scatter_matrix.cuh"
#include "core/cuda/sm90/wgmma.cuh"

namespace deform_conv {
namespace cuda {
namespace {

// Thread blocks side by side on a multiprocessor: as many as shared memory holds of nine taps; or
// fewer, for the registers.
template <bool kInput>
constexpr int kBlocksPerMultiprocessor = kInput ? 2 : 3;

// kInput tells whether the input's gradient is wanted, `replace` whether the columns are to replace
// their gradient, `add` whether the samples' gradients are added instead of written.
template <typename T, int kChannels, bool kInput>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerMultiprocessor<kInput>)
    RegionScatterKernel(const __grid_constant__ FusedSizes sizes,
                        const __grid_constant__ PatchGrid grid, SampledTensors<T, float> tensors,
                        bool replace, bool add,
                        T* __restrict__ columns,  // [positions worked on, groups, taps, channels]
                        SampledGradients<float> gradients) {
  extern __shared__ __align__(kSlabAlignment) uint8_t memory[];
  using Layout = RegionLayout<T, kChannels, kInput>;
  using Mine = PatchLane<T, kChannels>;
  constexpr bool k16Bits = Layout::k16Bits;
  PatchSample* samples = reinterpret_cast<PatchSample*>(memory + Layout::kSamples);
  const uint32_t shared = SharedAddress(memory);
  const Patch patch = grid.At<kChannels>(sizes, blockIdx.x);
  const int warpgroup = WarpgroupIndex();
  const int p = Mine::PositionInPatch();
  const bool valid = grid.Includes(sizes, patch.At(p));
  T* column = FirstColumn<T, kChannels>(sizes, grid, patch, p, valid, columns);
  const uint32_t first_vec16 = shared + Layout::kFirstStage + Layout::FirstVec16(p);
  const uint32_t first_transposed = FirstTransposed<kChannels>(p);  // TF32

  // Taps whose columns' gradient is on its way.
  constexpr int kAhead = k16Bits ? Layout::kStages - 1 : Layout::kStages;
#pragma unroll
  for (int tap = 0; tap < kAhead; ++tap) {
    CopyGradColumns<Layout, Mine>(sizes, column, valid, 0, tap,
                                  first_vec16 + tap * Layout::kStageBytes);
  }
  BeginPatch<Layout>(sizes, grid, tensors, patch, shared, samples);

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
      return GradColumn<T, kChannels, kInput>(j, first_vec16 + stages.now, first_transposed, memory,
                                              taken);
    };
    WaitForCopies<kAhead - 1>();
    if constexpr (!k16Bits) {
      TakeGradColumns<Layout, kChannels, kInput>(first_vec16, first_transposed, memory, taken);
    }
    if constexpr (kInput) {
      WriteOperandA<T>(sizes, patch, samples, tap, memory + matrix, written);
    }

    // Corners are on their way while the block waits; not before the fence, which would wait for
    // them.
    constexpr int kInFlight = Mine::kVec16s < 2 ? 1 : 2;
    uint4 corners[kInFlight][kCorners];
    // Counts from this lane's channels. Made anew each time, to keep registers free.
    const PatchCornerLoader loader(sizes,
                                   tensors.input + patch.channel + Mine::First() * kVec16Size<T>);
    const auto at = PatchCorners::Of(sizes, patch, slot->packed_corner);
    if (want_products || replace) {
      loader.Load(at, [](int j) { return Mine::Distance(j) * kVec16Bytes; }, corners);
    }
    if constexpr (kInput) {
      const int operand_b = k16Bits ? Layout::kFirstStage + stages.now : Layout::kTransposed;
      BeginProduct<T, kChannels>(warpgroup, shared + matrix, shared + operand_b, tap, region);
    }
    CopyGradColumns<Layout, Mine>(sizes, column, valid, tap, kAhead,
                                  first_vec16 + (k16Bits ? stages.before : 0));

    float products[kCorners];
    if (want_products || replace) {
      MultiplyCorners<T, Mine>(*slot, at, loader, grads, replace, valid, column, corners, products);
    }
    FinishTap<T, kChannels, kInput>(sizes, patch, grads, want_products, products, slot,
                                    gradients.input);
    ++slot;
    column += sizes.group_in_channels;
    stages.Advance();
  }

  FinishPatch<T, kChannels, kInput>(sizes, grid, patch, warpgroup, samples, want_products, add,
                                    gradients, region);
}

// --- Launching ---

// Channels of a slice: the most that no group's end cuts, and for which shared memory suffices; 0
// if there is no such number.
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
  std::string error;
  if (gradients.offset != nullptr) error = Zero(gradients.offset + 2 * first, 2 * bytes, stream);
  if (error.empty() && gradients.mask != nullptr) {
    error = Zero(gradients.mask + first, bytes, stream);
  }
  return error;
}

template <typename T, int kChannels, bool kInput>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                   int64_t begin, int64_t end, bool replace, T* columns,
                   const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  using Element = CudaType<T>;
  unsigned blocks;
  const PatchGrid grid = GridOfPatches(params, kInput, kChannels, begin, end, &blocks);
  const bool add = params.deform_group_channels() > kChannels;
  std::string error;
  if (add) error = ZeroSampleGradients(params, begin, end, gradients, stream);
  if (!error.empty()) return error;

  const auto kernel = RegionScatterKernel<Element, kChannels, kInput>;
  const int bytes =
      static_cast<int>(RegionLayout<Element, kChannels, kInput>::Bytes(params.taps()));
  error = AllowSharedBytes("RegionScatterKernel", kernel, bytes);
  if (!error.empty()) return error;
  kernel<<<blocks, kThreadsPerBlock, bytes, StreamOf(stream)>>>(
      FusedSizes(params), grid, AsCuda<T>(tensors), replace, add, AsCuda(columns), gradients);
  return LaunchError("RegionScatterKernel");
}

}  // namespace

template <typename T>
std::string RegionScatterSm90Misfit(const DeformConvParams& params,
                                    const SampledTensors<T, ComputeType<T>>& tensors,
                                    const SampledGradients<ComputeType<T>>& gradients) {
  std::string misfit = Sm90Misfit();
  if (misfit.empty()) misfit = SizesMisfit(params);
  if (misfit.empty()) misfit = TensorsMisfit<T>(tensors);
  if (!misfit.empty()) return misfit;
  const bool want_input = gradients.input != nullptr;
  if (params.group_in_channels() % 32 != 0 || params.deform_group_channels() % 32 != 0) {
    return "the input channels of its convolution and deformable groups are no multiples of 32";
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
  if (patches > INT32_MAX / (params.in_channels / channels)) return "it has too many patches";
  if (!IsAligned(gradients.input) ||
      reinterpret_cast<uintptr_t>(gradients.offset) % sizeof(float2) != 0) {
    return "the input's gradient is not aligned to 16 bytes, or the offset's to 8";
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
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
