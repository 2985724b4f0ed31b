// Which parts of a batch the fused implementations give to their kernels, and what is chosen for
// layers without filters, on no GPU: the kernels here only keep what they are called with, and
// refuse what does not fit into 32 bits. test_core.py compiles this together with
// gpu/implementations.cc.

#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

#include "core/cuda/fused/limits.h"
#include "core/cuda/general/kernels.h"
#include "core/cuda/sm90/kernels.h"
#include "core/deform_conv2d.h"
#include "core/gpu/implementations.h"

namespace deform_conv {
namespace {

struct Part {
  int64_t images, begin, end;  // positions of the part
  const void *input, *offset, *mask, *columns, *result, *grad_offset;

  bool operator==(const Part& other) const {
    return images == other.images && begin == other.begin && end == other.end &&
           input == other.input && offset == other.offset && mask == other.mask &&
           columns == other.columns && result == other.result && grad_offset == other.grad_offset;
  }
};

std::vector<Part> parts;

std::string depthwise_misfit;  // of all depthwise kernels
int64_t ones = 0;              // that were made
DeformConvParams last_call = {};
const void* last_filters = nullptr;

}  // namespace

// What FiltersOfOnes goes on with.
template <>
std::string DeformConv2DForwardGpu<Half>(const DeformConvParams& params,
                                         const SampledTensors<Half, float>&, const Half* filters,
                                         GpuDevice&, Half*) {
  last_call = params;
  last_filters = filters;
  return "";
}

template <>
std::string DeformConv2DBackwardGpu<Half>(const DeformConvParams& params,
                                          const SampledTensors<Half, float>&, const Half* filters,
                                          const Half*, GpuDevice&,
                                          const DeformConvGradients<Half, float>&) {
  last_call = params;
  last_filters = filters;
  return "";
}

namespace cuda {

template <>
std::string DepthwiseForwardMisfit<Half>(const DeformConvParams&) {
  return depthwise_misfit;
}

template <>
std::string StagedDepthwiseForwardMisfit<Half>(const DeformConvParams&,
                                               const SampledTensors<Half, float>&, const Half*,
                                               const Half*) {
  return depthwise_misfit;
}

template <>
std::string MmaAggregateForwardMisfit<Half>(const DeformConvParams&,
                                            const SampledTensors<Half, float>&, const Half*) {
  return depthwise_misfit;
}

template <>
std::string MmaAggregateBackwardMisfit<Half>(const DeformConvParams&,
                                             const SampledTensors<Half, float>&, const Half*) {
  return depthwise_misfit;
}

template <>
std::string DepthwiseBackwardMisfit<Half>(const DeformConvParams&) {
  return depthwise_misfit;
}

template <>
std::string FillWithOnes<Half>(int64_t count, Half*, void*) {
  ones = count;
  return "";
}

template <>
std::string ImplicitGemmSm90Misfit<Half>(const DeformConvParams& params,
                                         const SampledTensors<Half, float>&, const Half*,
                                         const Half*) {
  return SizesMisfit(params);
}

template <>
std::string ImplicitGemmSm90<Half>(const DeformConvParams& params,
                                   const SampledTensors<Half, float>& tensors, const Half*,
                                   GpuDevice&, Half* output) {
  parts.push_back({params.batch, 0, params.out_positions(), tensors.input, tensors.offset,
                   tensors.mask, nullptr, output, nullptr});
  return SizesMisfit(params);
}

template <>
std::string RegionScatterSm90Misfit<Half>(const DeformConvParams& params,
                                          const SampledTensors<Half, float>&,
                                          const SampledGradients<float>&) {
  return SizesMisfit(params);
}

template <>
std::string RegionScatterSm90<Half>(const DeformConvParams& params,
                                    const SampledTensors<Half, float>& tensors, int64_t begin,
                                    int64_t end, bool, Half* columns,
                                    const SampledGradients<float>& gradients, void*) {
  parts.push_back({params.batch, begin, end, tensors.input, tensors.offset, tensors.mask, columns,
                   gradients.input, gradients.offset});
  return SizesMisfit(params);
}

}  // namespace cuda

namespace {

class NoDevice : public GpuDevice {
 public:
  void* stream() override { return nullptr; }
  bool allow_tf32() const override { return true; }
  KernelPath path() const override { return path_; }
  bool deterministic() const override { return deterministic_; }
  std::string Allocate(int64_t bytes, void** memory) override {
    allocated.push_back(bytes);
    *memory = &allocated;
    return bytes < 1000 ? "" : "no memory";
  }
  std::string Gemm(ElementType, GemmForm, int64_t, const MatrixBatch<const void>&,
                   const MatrixBatch<const void>&, const MatrixBatch<void>&, bool) override {
    return "no GEMM";
  }

  std::vector<int64_t> allocated;
  KernelPath path_ = KernelPath::kFused;
  bool deterministic_ = false;
};

// An address so many elements into a tensor of which nothing is read.
template <typename T>
T* At(int tensor, int64_t elements) {
  return reinterpret_cast<T*>((int64_t{tensor} << 48) + elements * int64_t{sizeof(T)});
}

int failures = 0;

void Expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  ++failures;
}

constexpr int64_t kSide = 4096, kChannels = 32, kOutChannels = 8, kTaps = 9;

// A layer of stride 2.
DeformConvParams Layer(int64_t batch, int64_t side) {
  const int64_t out = (side + 1) / 2;
  DeformConvAttributes attributes;
  attributes.stride_h = attributes.stride_w = 2;
  DeformConvShapes shapes;
  shapes.input = {batch, side, side, kChannels};
  shapes.filters = {3, 3, kChannels, kOutChannels};
  shapes.offset = {batch, out, out, 2 * kTaps};
  shapes.mask = {batch, out, out, kTaps};
  shapes.has_mask = true;
  DeformConvParams params;
  Expect(MakeParams(attributes, shapes, &params).empty(), "the sizes are wrong");
  return params;
}

void TestForward() {
  const DeformConvParams params = Layer(17, kSide);
  NoDevice device;
  const SampledTensors<Half, float> tensors = {At<Half>(1, 0), At<float>(2, 0), At<float>(3, 0)};
  const ForwardCall<Half> call = {params, tensors, At<Half>(4, 0), At<Half>(5, 0), device};
  const Implementation<ForwardCall<Half>>* chosen;
  const std::string misfit = Choose(ForwardImplementations<Half>(), "output", call, &chosen);
  Expect(misfit.empty(), misfit.c_str());
  if (chosen == nullptr) return;
  parts.clear();
  const std::string error = chosen->run(call);
  Expect(error.empty(), error.c_str());
  // 8 images of 2^24 pixels are too many.
  const int64_t positions = params.image_positions();
  std::vector<Part> expected;
  for (const int64_t first : {0, 7, 14}) {
    const int64_t images = first == 14 ? 3 : 7, position = first * positions;
    expected.push_back({images, 0, images * positions,
                        At<Half>(1, first * kSide * kSide * kChannels),
                        At<float>(2, position * 2 * kTaps), At<float>(3, position * kTaps), nullptr,
                        At<Half>(5, position * kOutChannels), nullptr});
  }
  Expect(parts == expected, "forward: other parts");
}

// Positions from the middle of the second image to that of the tenth.
void TestCol2Im() {
  const DeformConvParams params = Layer(17, kSide);
  NoDevice device;
  Workspace workspace(device);
  const SampledTensors<Half, float> tensors = {At<Half>(1, 0), At<float>(2, 0), nullptr};
  const int64_t positions = params.image_positions();
  const int64_t begin = positions + positions / 2, end = 9 * positions + positions / 2;
  const Col2ImCall<Half> call = {params,
                                 tensors,
                                 begin,
                                 end,
                                 At<Half>(4, 0),
                                 true,
                                 {At<float>(5, 0), At<float>(6, 0), nullptr},
                                 device,
                                 workspace};
  const Col2ImImplementation<Half>* chosen;
  const std::string misfit = Choose(Col2ImImplementations<Half>(), "gradients", call, &chosen);
  Expect(misfit.empty(), misfit.c_str());
  if (chosen == nullptr) return;
  parts.clear();
  const std::string error = chosen->run(call);
  Expect(error.empty(), error.c_str());
  const int64_t second = 7 * positions;  // where the second part begins
  const std::vector<Part> expected = {
      {7, begin, second, At<Half>(1, 0), At<float>(2, 0), nullptr, At<Half>(4, 0), At<float>(5, 0),
       At<float>(6, 0)},
      {7, 0, end - second, At<Half>(1, 7 * kSide * kSide * kChannels),
       At<float>(2, second * 2 * kTaps), nullptr, At<Half>(4, (second - begin) * kTaps * kChannels),
       At<float>(5, 7 * kSide * kSide * kChannels), At<float>(6, second * 2 * kTaps)}};
  Expect(parts == expected, "col2im: other parts");
}

// The names of what is chosen for a layer without filters, forward and backward, and runs it if
// that is FiltersOfOnes.
std::string ChosenWithoutFilters(NoDevice& device, bool want_input) {
  DeformConvAttributes attributes;
  attributes.kernel_h = attributes.kernel_w = 3;
  DeformConvShapes shapes;
  shapes.has_filters = false;
  shapes.input = {2, 8, 9, 5};
  shapes.offset = {2, 8, 9, 2 * kTaps};
  shapes.mask = {2, 8, 9, kTaps};
  shapes.has_mask = true;
  DeformConvParams params;
  Expect(MakeParams(attributes, shapes, &params).empty(), "the sizes are wrong");
  const SampledTensors<Half, float> tensors = {At<Half>(1, 0), At<float>(2, 0), At<float>(3, 0)};
  const ForwardCall<Half> forward = {params, tensors, nullptr, At<Half>(5, 0), device};
  const DeformConvGradients<Half, float> gradients = {
      {want_input ? At<Half>(6, 0) : nullptr, At<float>(7, 0), nullptr}, nullptr};
  const BackwardCall<Half> backward = {params, tensors, nullptr, At<Half>(5, 0), gradients, device};
  const auto chosen = [](const auto& list, const auto& call) -> std::string {
    const typename std::decay_t<decltype(list)>::value_type* implementation;
    const std::string misfit = Choose(list, "result", call, &implementation);
    if (!misfit.empty()) return misfit;
    if (std::string(implementation->name) != "FiltersOfOnes") return implementation->name;
    ones = 0;
    Expect(implementation->run(call).empty(), "filters of ones: an error");
    Expect(ones == kTaps * 5 && last_filters != nullptr && last_call.has_filters,
           "filters of ones: none were made");
    return implementation->name;
  };
  return chosen(ForwardImplementations<Half>(), forward) + " " +
         chosen(BackwardImplementations<Half>(), backward);
}

void TestLayersWithoutFilters() {
  NoDevice device;
  Expect(ChosenWithoutFilters(device, true) == "FiltersOfOnes FiltersOfOnes",
         "without filters: the fused path");
  for (const KernelPath path : {KernelPath::kAny, KernelPath::kGeneral}) {
    device.path_ = path;
    device.deterministic_ = false;
    depthwise_misfit = "";
    Expect(ChosenWithoutFilters(device, true) == "StagedDepthwise MmaAggregate",
           "without filters: not the depthwise kernels");
    depthwise_misfit = "it is too large";
    Expect(ChosenWithoutFilters(device, true) == "FiltersOfOnes FiltersOfOnes",
           "without filters: what no depthwise kernel takes");
    depthwise_misfit = "";
    device.deterministic_ = true;
    Expect(ChosenWithoutFilters(device, true) == "StagedDepthwise FiltersOfOnes",
           "without filters: deterministic");
    Expect(ChosenWithoutFilters(device, false) == "StagedDepthwise MmaAggregate",
           "without filters: deterministic, and nothing is added");
  }
}

void TestOneImageThatIsTooLarge() {
  const DeformConvParams params = Layer(1, 4 * kSide);
  NoDevice device;
  const SampledTensors<Half, float> tensors = {At<Half>(1, 0), At<float>(2, 0), At<float>(3, 0)};
  const ForwardCall<Half> call = {params, tensors, At<Half>(4, 0), At<Half>(5, 0), device};
  const Implementation<ForwardCall<Half>>* chosen;
  const std::string misfit = Choose(ForwardImplementations<Half>(), "output", call, &chosen);
  Expect(misfit.find("the sizes do not fit into 32 bits") != std::string::npos,
         "an image of 2^28 pixels is not refused");
}

void TestFusedImages() {
  for (const int64_t side : {2, 3, 100, 4096}) {
    DeformConvParams params = Layer(1, side);
    params.batch = cuda::FusedImages(params);
    Expect(cuda::SizesMisfit(params).empty(), "FusedImages() is too many");
    params.batch += 1;
    Expect(!cuda::SizesMisfit(params).empty(), "FusedImages() is too few");
  }
}

void TestWorkspace() {
  NoDevice device;
  Workspace workspace(device);
  void* memory = nullptr;
  for (const int64_t bytes : {0, 100, 100, 40, 120, 100}) {
    Expect(workspace.Reserve(bytes, &memory).empty(), "workspace: an error");
  }
  Expect(memory == &device.allocated, "workspace: other memory");
  Expect(device.allocated == std::vector<int64_t>{100, 120}, "workspace: other allocations");
  Expect(workspace.Reserve(1000, &memory) == "no memory", "workspace: the error is lost");
  Expect(workspace.Reserve(120, &memory).empty() && memory == &device.allocated,
         "workspace: what it had is lost");
}

}  // namespace
}  // namespace deform_conv

int main() {
  deform_conv::TestWorkspace();
  deform_conv::TestForward();
  deform_conv::TestCol2Im();
  deform_conv::TestLayersWithoutFilters();
  deform_conv::TestOneImageThatIsTooLarge();
  deform_conv::TestFusedImages();
  return deform_conv::failures == 0 ? 0 : 1;
}
