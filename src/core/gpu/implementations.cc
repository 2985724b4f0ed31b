#include "core/gpu/implementations.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/cuda/fused/limits.h"
#include "core/cuda/general/kernels.h"
#include "core/gpu/columns_backward.h"
#include "core/gpu/depthwise.h"
#include "core/gpu/embedded.h"
#include "core/gpu/filters_of_ones.h"
#include "core/gpu/im2col_gemm.h"
#include "core/gpu/some_images.h"
#include "core/return_if_error.h"
#ifdef DEFORM_CONV_SM90
#include "core/cuda/sm90/kernels.h"
#endif

namespace deform_conv {
namespace {

constexpr char kAddsWithAtomics[] = "it adds with atomics, and determinism is asked for";

template <typename Call>
std::string AlwaysFits(const Call&) {
  return "";
}

// Why GEMMs and tensor cores, which multiply by filters, cannot serve the layer, or an empty
// string.
template <typename Call>
std::string NoFiltersMisfit(const Call& call) {
  return call.params.has_filters ? "" : "there are no filters";
}

template <int kCost, typename Call>
int Cost(const Call&) {
  return kCost;
}

// --- Tensor cores, compute capability 9.0 ---

#ifdef DEFORM_CONV_SM90

constexpr char kNoDouble[] = "it computes in 16 bits or TF32, not in float64";

// Why kernels that multiply in 16 bits or TF32 cannot serve T.
template <typename T>
std::string PrecisionMisfit(const GpuDevice& device) {
  if (std::is_same_v<T, double>) return kNoDouble;
  if (std::is_same_v<T, float> && !device.allow_tf32()) return "TF32 is not allowed";
  return "";
}

// The images that a fused kernel works on at a time: the first of them. The others fit no less.
template <template <typename> class Call, typename T>
SomeImages<T> FirstFusedImages(const Call<T>& call) {
  return {call.params, call.tensors, 0, cuda::FusedImages(call.params)};
}

template <typename T>
std::string ImplicitGemmMisfit(const ForwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(NoFiltersMisfit(call));
  DEFORM_CONV_RETURN_IF_ERROR(PrecisionMisfit<T>(call.device));
  if constexpr (!std::is_same_v<T, double>) {
    const SomeImages<T> some = FirstFusedImages(call);
    return cuda::ImplicitGemmSm90Misfit<T>(some.params(), some.tensors(), call.filters,
                                           call.output);
  }
  return "";
}

// Where several deformable groups share 64 bytes of channels, each thread locates its own samples.
// That is too slow beside the accumulators of many output channels.
template <typename T>
int ImplicitGemmCost(const ForwardCall<T>& call) {
  const int64_t bytes = call.params.deform_group_channels() * int64_t{sizeof(T)};
  const int64_t outputs = call.params.group_out_channels();
  return outputs > 64 && bytes < (outputs > 128 ? 64 : 32) ? 5 : 3;
}

template <typename T>
std::string RunImplicitGemm(const ForwardCall<T>& call) {
  if constexpr (!std::is_same_v<T, double>) {
    return ForParts<T>(call.params, call.tensors, cuda::FusedImages(call.params),
                       [&](const SomeImages<T>& some) {
                         return cuda::ImplicitGemmSm90<T>(
                             some.params(), some.tensors(), call.filters, call.device,
                             call.output + some.position() * call.params.out_channels);
                       });
  }
  return kNoDouble;
}

template <typename T>
std::string RegionScatterMisfit(const Col2ImCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(PrecisionMisfit<T>(call.device));
  if (call.device.deterministic()) return kAddsWithAtomics;
  if constexpr (!std::is_same_v<T, double>) {
    const SomeImages<T> some = FirstFusedImages(call);
    return cuda::RegionScatterSm90Misfit<T>(some.params(), some.tensors(), call.gradients);
  }
  return "";
}

// Its patches are squares, of which an image of few rows or columns leaves the most empty.
template <typename T>
int RegionScatterCost(const Col2ImCall<T>& call) {
  const auto of_patch = [](int64_t size) { return std::min<int64_t>(size, cuda::kPatchSide); };
  const int64_t positions = of_patch(call.params.out_h) * of_patch(call.params.out_w);
  return 2 * positions < cuda::kPatchSide * cuda::kPatchSide ? 5 : 1;
}

template <typename T>
std::string RunRegionScatter(const Col2ImCall<T>& call) {
  if constexpr (!std::is_same_v<T, double>) {
    const DeformConvParams& params = call.params;
    return ForParts<T>(
        params, call.tensors, cuda::FusedImages(params),
        [&](const SomeImages<T>& some) -> std::string {
          const int64_t first = some.position();
          const int64_t begin = std::max(call.begin, first);
          const int64_t end = std::min(call.end, first + some.params().out_positions());
          if (begin >= end) return "";
          T* const columns =
              call.columns + (begin - call.begin) * params.taps() * params.in_channels;
          return cuda::RegionScatterSm90<T>(some.params(), some.tensors(), begin - first,
                                            end - first, call.replace, columns,
                                            some.Of(call.gradients), call.device.stream());
        });
  }
  return kNoDouble;
}

#endif  // DEFORM_CONV_SM90

// --- Every GPU ---

template <typename T>
std::string RunIm2Col(const Im2ColCall<T>& call) {
  return cuda::Im2Col<T>(call.params, call.tensors, call.begin, call.end, call.columns,
                         call.device.stream());
}

template <typename T>
std::string AtomicMisfit(const Col2ImCall<T>& call) {
  const bool adds = call.gradients.input != nullptr;
  return adds && call.device.deterministic() ? kAddsWithAtomics : "";
}

template <typename T>
std::string RunAtomic(const Col2ImCall<T>& call) {
  return cuda::Col2ImAtomic<T>(call.params, call.tensors, call.begin, call.end, call.replace,
                               call.columns, call.gradients, call.device.stream());
}

constexpr char kNoInputGradient[] = "the input's gradient is not wanted";

// What remains of a call once the input's gradient has been added to.
template <typename T>
std::string RunOthers(const Col2ImCall<T>& call) {
  Col2ImCall<T> others = call;
  others.gradients.input = nullptr;
  if (!others.gradients.any() && !others.replace) return "";
  const Col2ImImplementation<T>* chosen;
  DEFORM_CONV_RETURN_IF_ERROR(
      Choose(Col2ImImplementations<T>(), "gradients of offset and mask", others, &chosen));
  return chosen->run(others);
}

template <typename T>
std::string RegionsMisfit(const Col2ImCall<T>& call) {
  if (call.gradients.input == nullptr) return kNoInputGradient;
  if (call.device.deterministic()) return kAddsWithAtomics;
  return cuda::Col2ImRegionsMisfit<T>(call.params);
}

// In 16 bits, regions in shared memory are faster than the region scatter's tensor cores where
// deformable groups have few channels, and than sorting and atomics; in TF32, than these with
// strides and many channels. See benchmarks/gpu_kernels.md.
template <typename T>
int RegionsCost(const Col2ImCall<T>& call) {
  constexpr int64_t kFewChannels = 16, kLeastChannels = 32, kManyChannels = 64;
  const DeformConvParams& params = call.params;
  const int64_t channels = params.deform_group_channels();
  if (channels % 4 != 0 || params.in_channels < kLeastChannels) return 6;
  if (sizeof(T) == 2) return channels <= kFewChannels ? 0 : 2;
  const bool multiplies_in_tf32 = std::is_same_v<T, float> && call.device.allow_tf32();
  const bool strided = params.stride_h * params.stride_w > 1;
  return multiplies_in_tf32 && strided && channels >= kManyChannels ? 2 : 6;
}

template <typename T>
std::string RunRegions(const Col2ImCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(cuda::Col2ImRegions<T>(call.params, call.tensors, call.begin,
                                                     call.end, call.columns, call.gradients.input,
                                                     call.device.stream()));
  return RunOthers(call);
}

template <typename T>
std::string ProductsMisfit(const Col2ImCall<T>& call) {
  if (call.gradients.input != nullptr) return "the input's gradient is wanted";
  return cuda::Col2ImProductsMisfit<T>(call.params);
}

template <typename T>
std::string RunProducts(const Col2ImCall<T>& call) {
  return cuda::Col2ImProducts<T>(call.params, call.tensors, call.begin, call.end, call.replace,
                                 call.columns, call.gradients, call.device.stream());
}

template <typename T>
std::string SortedMisfit(const Col2ImCall<T>& call) {
  if (call.gradients.input == nullptr) return kNoInputGradient;
  return cuda::Col2ImSortedMisfit(call.params);
}

// Sorting is faster in 16 bits where a deformable group has many channels, see
// benchmarks/README.md.
template <typename T>
int SortedCost(const Col2ImCall<T>& call) {
  constexpr int64_t kManyChannels = 64;
  return sizeof(T) == 2 && call.params.deform_group_channels() >= kManyChannels ? 3 : 5;
}

template <typename T>
std::string RunSorted(const Col2ImCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(cuda::Col2ImSorted<T>(call.params, call.tensors, call.begin, call.end,
                                                    call.columns, call.gradients.input,
                                                    call.workspace, call.device.stream()));
  return RunOthers(call);
}

// --- Depthwise layers, and those without filters ---

template <typename Call>
std::string DepthwiseMisfit(const Call& call) {
  const DeformConvParams& params = call.params;
  if (params.has_filters && (params.groups == 1 || params.groups != params.in_channels)) {
    return "the layer is not depthwise";
  }
  if (call.params.out_positions() == 0) return "the output is empty";
  return "";
}

template <typename T>
std::string DepthwiseForwardMisfit(const ForwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(DepthwiseMisfit(call));
  return cuda::DepthwiseForwardMisfit<T>(call.params);
}

template <typename T>
std::string StagedDepthwiseForwardMisfit(const ForwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(DepthwiseMisfit(call));
  return cuda::StagedDepthwiseForwardMisfit<T>(call.params, call.tensors, call.filters,
                                               call.output);
}

template <typename T>
std::string MmaAggregateForwardMisfit(const ForwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(DepthwiseMisfit(call));
  return cuda::MmaAggregateForwardMisfit<T>(call.params, call.tensors, call.output);
}

template <typename T>
std::string DepthwiseBackwardMisfit(const BackwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(DepthwiseMisfit(call));
  const bool adds = call.gradients.sampled.input != nullptr || call.gradients.filters != nullptr;
  if (adds && call.device.deterministic()) return kAddsWithAtomics;
  return cuda::DepthwiseBackwardMisfit<T>(call.params);
}

template <typename T>
std::string MmaAggregateBackwardMisfit(const BackwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(DepthwiseMisfit(call));
  const bool adds = call.gradients.sampled.input != nullptr;
  if (adds && call.device.deterministic()) return kAddsWithAtomics;
  return cuda::MmaAggregateBackwardMisfit<T>(call.params, call.tensors, call.grad_output);
}

// Where no depthwise kernel fits a layer without filters: its sizes are beyond their limits, or its
// gradient is to be deterministic.
template <typename Call>
std::string FiltersOfOnesMisfit(const Call& call) {
  return call.params.has_filters ? "there are filters" : "";
}

// --- GEMMs ---

template <typename T>
std::string EmbeddedMisfit(const ForwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(NoFiltersMisfit(call));
  return EmbeddedForwardMisfit(call);
}

template <typename T>
std::string EmbeddedMisfit(const BackwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(NoFiltersMisfit(call));
  return EmbeddedBackwardMisfit(call);
}

}  // namespace

template <typename T>
const std::vector<Implementation<ForwardCall<T>>>& ForwardImplementations() {
  static const std::vector<Implementation<ForwardCall<T>>> list = {
#ifdef DEFORM_CONV_SM90
      {"ImplicitGemmSm90", KernelPath::kFused, ImplicitGemmMisfit<T>, ImplicitGemmCost<T>,
       RunImplicitGemm<T>},
#endif
      {"StagedDepthwise", KernelPath::kGeneral, StagedDepthwiseForwardMisfit<T>, Cost<-1>,
       ForwardStagedDepthwise<T>},
      {"MmaAggregate", KernelPath::kGeneral, MmaAggregateForwardMisfit<T>, Cost<0>,
       ForwardMmaAggregate<T>},
      {"Depthwise", KernelPath::kGeneral, DepthwiseForwardMisfit<T>, Cost<1>, ForwardDepthwise<T>},
      {"Embedded", KernelPath::kAny, EmbeddedMisfit<T>, Cost<2>, ForwardEmbedded<T>},
      {"Im2ColGemm", KernelPath::kGeneral, NoFiltersMisfit, Cost<4>, Im2ColGemm<T>},
      {"FiltersOfOnes", KernelPath::kAny, FiltersOfOnesMisfit, Cost<6>, ForwardWithOnes<T>},
  };
  return list;
}

template <typename T>
const std::vector<Implementation<BackwardCall<T>>>& BackwardImplementations() {
  static const std::vector<Implementation<BackwardCall<T>>> list = {
      {"MmaAggregate", KernelPath::kGeneral, MmaAggregateBackwardMisfit<T>, Cost<-1>,
       BackpropMmaAggregate<T>},
      {"Depthwise", KernelPath::kGeneral, DepthwiseBackwardMisfit<T>, Cost<0>,
       BackpropDepthwise<T>},
      {"Embedded", KernelPath::kAny, EmbeddedMisfit<T>, Cost<1>, BackpropEmbedded<T>},
      {"Columns", KernelPath::kAny, NoFiltersMisfit, Cost<2>, BackpropByColumns<T>},
      {"FiltersOfOnes", KernelPath::kAny, FiltersOfOnesMisfit, Cost<3>, BackpropWithOnes<T>},
  };
  return list;
}

template <typename T>
const std::vector<Implementation<Im2ColCall<T>>>& Im2ColImplementations() {
  static const std::vector<Implementation<Im2ColCall<T>>> list = {
      {"Im2Col", KernelPath::kGeneral, AlwaysFits, Cost<0>, RunIm2Col<T>},
  };
  return list;
}

template <typename T>
const std::vector<Col2ImImplementation<T>>& Col2ImImplementations() {
  static const std::vector<Col2ImImplementation<T>> list = {
#ifdef DEFORM_CONV_SM90
      {{"RegionScatterSm90", KernelPath::kFused, RegionScatterMisfit<T>, RegionScatterCost<T>,
        RunRegionScatter<T>},
       {/*rows=*/cuda::kPatchSide, /*few_images=*/true}},
#endif
      {{"Col2ImRegions", KernelPath::kGeneral, RegionsMisfit<T>, RegionsCost<T>, RunRegions<T>},
       {/*rows=*/8, /*few_images=*/false}},
      {{"Col2ImProducts", KernelPath::kGeneral, ProductsMisfit<T>, RegionsCost<T>, RunProducts<T>},
       {/*rows=*/8, /*few_images=*/false}},
      {{"Col2ImSorted", KernelPath::kGeneral, SortedMisfit<T>, SortedCost<T>, RunSorted<T>}, {}},
      {{"Col2ImAtomic", KernelPath::kGeneral, AtomicMisfit<T>, Cost<4>, RunAtomic<T>}, {}},
  };
  return list;
}

#define DEFORM_CONV_INSTANTIATE(T)                                                           \
  template const std::vector<Implementation<ForwardCall<T>>>& ForwardImplementations<T>();   \
  template const std::vector<Implementation<BackwardCall<T>>>& BackwardImplementations<T>(); \
  template const std::vector<Implementation<Im2ColCall<T>>>& Im2ColImplementations<T>();     \
  template const std::vector<Col2ImImplementation<T>>& Col2ImImplementations<T>();
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
