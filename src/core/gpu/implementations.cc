#include "core/gpu/implementations.h"

#include <string>
#include <type_traits>

#include "core/cuda/general/kernels.h"
#include "core/gpu/im2col_gemm.h"
#ifdef DEFORM_CONV_SM90
#include "core/cuda/sm90/kernels.h"
#endif
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

template <typename Call>
std::string AlwaysFits(const Call&) {
  return "";
}

template <int kCost, typename Call>
int Cost(const Call&) {
  return kCost;
}

// --- Tensor cores, compute capability 9.0 ---

#ifdef DEFORM_CONV_SM90

// Why kernels that multiply in 16 bits or TF32 cannot serve T.
template <typename T>
std::string PrecisionMisfit(const GpuDevice& device) {
  if (std::is_same_v<T, double>) return "it computes in 16 bits or TF32, not in float64";
  if (std::is_same_v<T, float> && !device.allow_tf32()) return "TF32 is not allowed";
  return "";
}

template <typename T>
std::string ImplicitGemmMisfit(const ForwardCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(PrecisionMisfit<T>(call.device));
  if constexpr (!std::is_same_v<T, double>) {
    return cuda::ImplicitGemmSm90Misfit<T>(call.params, call.tensors, call.filters, call.output);
  }
  return "";
}

template <typename T>
std::string ImplicitGemm(const ForwardCall<T>& call) {
  if constexpr (!std::is_same_v<T, double>) {
    return cuda::ImplicitGemmSm90<T>(call.params, call.tensors, call.filters, call.device,
                                     call.output);
  }
  return "";
}

template <typename T>
std::string RegionScatterMisfit(const Col2ImCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(PrecisionMisfit<T>(call.device));
  if (call.device.deterministic()) return "it adds with atomics, and determinism is asked for";
  if constexpr (!std::is_same_v<T, double>) {
    return cuda::RegionScatterSm90Misfit<T>(call.params, call.tensors, call.gradients);
  }
  return "";
}

template <typename T>
std::string RegionScatter(const Col2ImCall<T>& call) {
  if constexpr (!std::is_same_v<T, double>) {
    return cuda::RegionScatterSm90<T>(call.params, call.tensors, call.begin, call.end, call.replace,
                                      call.columns, call.gradients, call.device.stream());
  }
  return "";
}

#endif  // DEFORM_CONV_SM90

// --- Every GPU ---

template <typename T>
std::string AtomicMisfit(const Col2ImCall<T>& call) {
  const bool adds = call.gradients.input != nullptr;
  return adds && call.device.deterministic() ? "it adds with atomics, and determinism is asked for"
                                             : "";
}

template <typename T>
std::string Atomic(const Col2ImCall<T>& call) {
  return cuda::Col2Im<T>(call.params, call.tensors, call.begin, call.end, call.replace,
                         call.columns, call.gradients, call.device.stream());
}

template <typename T>
std::string SortedMisfit(const Col2ImCall<T>& call) {
  if (call.gradients.input == nullptr) return "the input's gradient is not wanted";
  return cuda::Col2ImSortedMisfit(call.params);
}

// Sorting is the faster way where a pixel's channels are many and the columns small, see
// benchmarks/README.md.
template <typename T>
int SortedCost(const Col2ImCall<T>& call) {
  constexpr int64_t kManyChannels = 64;
  return sizeof(T) == 2 && call.params.deform_group_channels() >= kManyChannels ? 2 : 4;
}

// The input's gradient from sorted corners, and what else there is by the kernel with atomics.
template <typename T>
std::string Sorted(const Col2ImCall<T>& call) {
  DEFORM_CONV_RETURN_IF_ERROR(cuda::Col2ImSorted<T>(call.params, call.tensors, call.begin, call.end,
                                                    call.columns, call.gradients.input,
                                                    call.device));
  Col2ImCall<T> others = call;
  others.gradients.input = nullptr;
  return others.gradients.any() || others.replace ? Atomic<T>(others) : "";
}

}  // namespace

template <typename T>
const std::vector<Implementation<ForwardCall<T>>>& ForwardImplementations() {
  static const std::vector<Implementation<ForwardCall<T>>> list = {
#ifdef DEFORM_CONV_SM90
      {"ImplicitGemmSm90", KernelPath::kFused, ImplicitGemmMisfit<T>, Cost<1>, ImplicitGemm<T>},
#endif
      {"Im2ColGemm", KernelPath::kGeneral, AlwaysFits, Cost<2>, Im2ColGemm<T>},
  };
  return list;
}

template <typename T>
const std::vector<Col2ImImplementation<T>>& Col2ImImplementations() {
  static const std::vector<Col2ImImplementation<T>> list = {
#ifdef DEFORM_CONV_SM90
      {{"RegionScatterSm90", KernelPath::kFused, RegionScatterMisfit<T>, Cost<1>, RegionScatter<T>},
       {/*rows=*/cuda::kPatchSide, /*few_images=*/true}},
#endif
      {{"Col2ImSorted", KernelPath::kGeneral, SortedMisfit<T>, SortedCost<T>, Sorted<T>}, {}},
      {{"Col2ImAtomic", KernelPath::kGeneral, AtomicMisfit<T>, Cost<3>, Atomic<T>}, {}},
  };
  return list;
}

#define DEFORM_CONV_INSTANTIATE(T)                                                         \
  template const std::vector<Implementation<ForwardCall<T>>>& ForwardImplementations<T>(); \
  template const std::vector<Col2ImImplementation<T>>& Col2ImImplementations<T>();
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(double)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
