#include "core/cuda/general/col2im_regions_plan.cuh"
#include "core/cuda/general/col2im_regions_products.cuh"
#include "core/cuda/general/col2im_regions_scatter.cuh"
#include "core/cuda/general/kernels.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

constexpr int64_t kMostBlocksInY = 65535;
// Below, a pixel's sum has so few terms that it may as well be made in memory.
constexpr int64_t kFewestCornersPerPixel = 2;

// What a launch works on besides the sampled tensors.
template <typename T>
struct ColumnsAtHand {
  int64_t begin, rows;  // positions
  T* columns;
  bool replace;
};

// Moves the pointers to the patch's first position. It may lie before the positions at hand.
template <typename T>
__device__ __forceinline__ void MoveToPatch(const FusedSizes& sizes, const RegionPatch& patch,
                                            SampledTensors<T, float>* tensors, ColumnsAtHand<T>* at,
                                            SampledGradients<float>* gradients) {
  const int64_t index = (at->begin + patch.first_row) * sizes.taps * sizes.deform_groups;
  at->columns += patch.first_row * sizes.taps * sizes.in_channels;
  tensors->offset += 2 * index;
  if (tensors->mask != nullptr) tensors->mask += index;
  if (gradients->offset != nullptr) gradients->offset += 2 * index;
  if (gradients->mask != nullptr) gradients->mask += index;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    RegionSumsKernel(FusedSizes sizes, SampledTensors<T, float> tensors, ColumnsAtHand<T> at,
                     SampledGradients<float> gradients, RegionPlan plan) {
  extern __shared__ __align__(16) char shared[];
  const RegionPatch patch(sizes, plan, at.begin);
  const RegionMemory<T> memory(shared, plan, sizes.taps);
  WriteRowParts(sizes, plan, patch, at.rows, memory.positions, memory.taps);
  MoveToPatch(sizes, patch, &tensors, &at, &gradients);
  ScatterPatch<T, kSize>(sizes, tensors, plan, patch, memory, at.columns, gradients.input);
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock, 2)
    RegionProductsKernel(FusedSizes sizes, SampledTensors<T, float> tensors, ColumnsAtHand<T> at,
                         SampledGradients<float> gradients, RegionPlan plan) {
  extern __shared__ __align__(16) char shared[];
  const RegionPatch patch(sizes, plan, at.begin);
  const RegionMemory<T> memory(shared, plan, sizes.taps);
  WriteRowParts(sizes, plan, patch, at.rows, memory.positions, memory.taps);
  MoveToPatch(sizes, patch, &tensors, &at, &gradients);
  LoadRegion<T, kSize>(sizes, plan, patch, tensors.input, memory.input());
  __syncthreads();
  SampleMultiplier<T, kSize>(sizes, tensors, plan, patch, memory, at.replace, at.columns, gradients)
      .Run();
}

// The patches that have positions [begin, end).
void PlanGrid(const DeformConvParams& params, int64_t begin, int64_t end, RegionPlan* plan,
              dim3* blocks) {
  const int64_t image = params.image_positions();
  const int64_t first_image = begin / image, images = CeilDiv(end, image) - first_image;
  int64_t first_y = 0, end_y = params.out_h;
  if (images == 1) {
    first_y = (begin - first_image * image) / params.out_w;
    end_y = CeilDiv(end - first_image * image, params.out_w);
  }
  plan->first_y = static_cast<int>(first_y);
  const int64_t patches_h = CeilDiv(end_y - first_y, int64_t{1} << plan->height_log2);
  const int64_t patches_w = CeilDiv(params.out_w, int64_t{1} << plan->width_log2);
  plan->by_patches = Divisor(static_cast<uint32_t>(patches_h * patches_w));
  plan->by_patches_w = Divisor(static_cast<uint32_t>(patches_w));
  *blocks = dim3(static_cast<unsigned>(images * patches_h * patches_w),
                 static_cast<unsigned>(CeilDiv<int64_t>(params.deform_groups, plan->groups) *
                                       plan->group_slices));
}

void PlanDivisions(const DeformConvParams& params, int vector_size, RegionPlan* plan) {
  const int64_t channels = plan->groups * params.deform_group_channels();
  plan->by_region_w = Divisor(plan->region_w);
  plan->by_slots = Divisor(plan->slots());
  plan->by_groups = Divisor(plan->groups);
  plan->by_group_slots = Divisor(plan->group_slots);
  plan->by_group_slices = Divisor(plan->group_slices);
  plan->by_vectors = Divisor(static_cast<uint32_t>(channels / vector_size));
  plan->lanes_log2 = LanesFor(params.deform_group_channels(), vector_size).count_log2;
}

template <typename T, int kSize>
std::string Launch(const DeformConvParams& params, const SampledTensors<T, float>& tensors,
                   const ColumnsAtHand<CudaType<T>>& at, const SampledGradients<float>& gradients,
                   void* stream) {
  const Gpu gpu = CurrentGpu();
  RegionPlan plan = {};
  const int64_t bytes = PlanRegions<CudaType<T>>(params, gpu, &plan);
  plan.multiprocessors = gpu.multiprocessors;
  dim3 blocks;
  PlanGrid(params, at.begin, at.begin + at.rows, &plan, &blocks);
  PlanDivisions(params, kSize, &plan);
  const FusedSizes sizes(params);
  const auto launch = [&](const char* name, auto kernel, int64_t shared_bytes) {
    const std::string error = AllowSharedBytes(name, kernel, shared_bytes);
    if (!error.empty()) return error;
    kernel<<<blocks, kThreadsPerBlock, shared_bytes, StreamOf(stream)>>>(sizes, AsCuda(tensors), at,
                                                                         gradients, plan);
    return LaunchError(name);
  };
  DEFORM_CONV_RETURN_IF_ERROR(
      launch("RegionSumsKernel", RegionSumsKernel<CudaType<T>, kSize>, bytes));
  if (!at.replace && gradients.offset == nullptr && gradients.mask == nullptr) return "";
  if (plan.group_slices == 1) {
    return launch("RegionProductsKernel", RegionProductsKernel<CudaType<T>, kSize>,
                  RegionMemory<CudaType<T>>::InputBytes(plan, params));
  }
  return Col2ImAtomic<T>(params, tensors, at.begin, at.begin + at.rows, at.replace,
                         reinterpret_cast<T*>(at.columns),
                         {nullptr, gradients.offset, gradients.mask}, stream);
}

template <typename T, int kSize>
bool CanMove(const DeformConvParams& params) {
  return params.deform_group_channels() % kSize == 0 && params.group_in_channels() % kSize == 0;
}

}  // namespace

template <typename T>
std::string Col2ImRegionsMisfit(const DeformConvParams& params) {
  DEFORM_CONV_RETURN_IF_ERROR(SizesOfImageMisfit(params));
  RegionPlan plan = {};
  if (PlanRegions<CudaType<T>>(params, CurrentGpu(), &plan) == 0) {
    return "a region does not fit into shared memory";
  }
  const int64_t last_row = ((int64_t{1} << plan.height_log2) - 1) * params.out_w + params.out_w;
  if (last_row * params.taps() * std::max(params.in_channels, params.deform_groups) >= int64_t{1}
                                                                                           << 31) {
    return "a row of the output has too many columns";
  }
  const int64_t corners = plan.positions() * params.taps() * kCorners;
  if (corners < kFewestCornersPerPixel * plan.pixels()) return "few samples share a pixel";
  if (CeilDiv<int64_t>(params.deform_groups, plan.groups) * plan.group_slices > kMostBlocksInY) {
    return "there are too many channels";
  }
  return std::is_same_v<T, double> ? "it adds up in float32" : "";
}

template <typename T>
std::string Col2ImRegions(const DeformConvParams& params,
                          const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                          int64_t end, bool replace, T* columns,
                          const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  if constexpr (std::is_same_v<T, double>) {
    return "Col2ImRegions() adds up in float32";
  } else {
    if ((end - begin) * params.image_size() == 0) return "";
    constexpr int kVec16 = kVec16Size<T>;
    const ColumnsAtHand<CudaType<T>> at = {begin, end - begin, AsCuda(columns), replace};
    const bool aligned = IsAligned(tensors.input) && IsAligned(columns) &&
                         IsAligned(gradients.input) && IsAligned(tensors.offset) &&
                         IsAligned(gradients.offset);
    const auto launch = aligned && CanMove<T, kVec16>(params) ? Launch<T, kVec16>
                        : aligned && CanMove<T, 4>(params)    ? Launch<T, 4>
                                                              : Launch<T, 1>;
    return launch(params, tensors, at, gradients, stream);
  }
}

#define DEFORM_CONV_INSTANTIATE(T)                                                               \
  template std::string Col2ImRegionsMisfit<T>(const DeformConvParams&);                          \
  template std::string Col2ImRegions<T>(                                                         \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, bool, \
      T*, const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
