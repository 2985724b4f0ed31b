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

// The positions at hand.
struct PositionRange {
  int64_t begin, count;
};

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    Col2ImRegionsKernel(FusedSizes sizes, SampledTensors<T, float> tensors, PositionRange range,
                        RegionPlan plan, const T* columns, float* grad_input) {
  extern __shared__ __align__(16) char shared[];
  const RegionPatch patch(sizes, plan, range.begin);
  const RegionMemory<T> memory(shared, plan, sizes.taps);
  WriteRowParts(sizes, plan, patch, range.count, memory.positions, memory.taps);
  const int64_t index = (range.begin + patch.first_row) * sizes.taps * sizes.deform_groups;
  tensors.offset += 2 * index;
  if (tensors.mask != nullptr) tensors.mask += index;
  columns += patch.first_row * sizes.taps * sizes.in_channels;
  ScatterPatch<T, kSize>(sizes, tensors, plan, patch, memory, columns, grad_input);
}

// Thread blocks of a multiprocessor. A fourth hides more latency than it costs in spilled
// registers.
template <typename T, int kSize>
constexpr int kProductsBlocks = sizeof(T) == 2 && kSize > 4 ? 4 : 2;

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreadsPerBlock, kProductsBlocks<T, kSize>)
    Col2ImProductsKernel(FusedSizes sizes, SampledTensors<T, float> tensors, PositionRange range,
                         RegionPlan plan, bool replace, T* columns,
                         SampledGradients<float> gradients) {
  extern __shared__ __align__(16) char shared[];
  const RegionPatch patch(sizes, plan, range.begin);
  const RegionMemory<T> memory(shared, plan, sizes.taps);
  WriteRowParts(sizes, plan, patch, range.count, memory.positions, memory.taps);
  LoadRegion<T, kSize>(sizes, plan, patch, tensors.input, memory.input());
  const int64_t index = (range.begin + patch.first_row) * sizes.taps * sizes.deform_groups;
  tensors.offset += 2 * index;
  if (tensors.mask != nullptr) tensors.mask += index;
  if (gradients.offset != nullptr) gradients.offset += 2 * index;
  if (gradients.mask != nullptr) gradients.mask += index;
  columns += patch.first_row * sizes.taps * sizes.in_channels;
  __syncthreads();
  SampleMultiplier<T, kSize>(sizes, tensors, plan, patch, memory, replace, columns, gradients)
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

// A launch: sizes, and how large.
template <typename T>
struct RegionLaunch {
  RegionPlan plan = {};
  PositionRange range;
  dim3 blocks;
  int64_t shared_bytes;

  RegionLaunch(const DeformConvParams& params, int64_t begin, int64_t end, int vector_size)
      : range{begin, end - begin} {
    const Gpu gpu = CurrentGpu();
    shared_bytes = PlanRegions<CudaType<T>>(params, gpu, &plan);
    plan.multiprocessors = gpu.multiprocessors;
    PlanGrid(params, begin, end, &plan, &blocks);
    PlanDivisions(params, vector_size, &plan);
  }

  template <typename Kernel, typename... Arguments>
  std::string Run(const char* name, Kernel kernel, void* stream, Arguments... arguments) const {
    DEFORM_CONV_RETURN_IF_ERROR(AllowSharedBytes(name, kernel, shared_bytes));
    return LaunchKernel(name, kernel, blocks, kThreadsPerBlock, shared_bytes, stream, arguments...);
  }
};

template <typename T, int kSize>
std::string LaunchSums(const DeformConvParams& params, const SampledTensors<T, float>& tensors,
                       int64_t begin, int64_t end, const T* columns, float* grad_input,
                       void* stream) {
  const RegionLaunch<T> launch(params, begin, end, kSize);
  return launch.Run("Col2ImRegionsKernel", Col2ImRegionsKernel<CudaType<T>, kSize>, stream,
                    FusedSizes(params), AsCuda(tensors), launch.range, launch.plan, AsCuda(columns),
                    grad_input);
}

template <typename T, int kSize>
std::string LaunchProducts(const DeformConvParams& params, const SampledTensors<T, float>& tensors,
                           int64_t begin, int64_t end, bool replace, T* columns,
                           const SampledGradients<float>& gradients, void* stream) {
  RegionLaunch<T> launch(params, begin, end, kSize);
  launch.shared_bytes = RegionMemory<CudaType<T>>::InputBytes(launch.plan, params);
  return launch.Run("Col2ImProductsKernel", Col2ImProductsKernel<CudaType<T>, kSize>, stream,
                    FusedSizes(params), AsCuda(tensors), launch.range, launch.plan, replace,
                    AsCuda(columns), gradients);
}

// The most channels, a vec16, four or one, that can be moved at a time where pointers allow.
template <typename T>
int ChannelsMoved(const DeformConvParams& params, bool aligned) {
  for (const int size : {kVec16Size<T>, 4}) {
    if (aligned && params.deform_group_channels() % size == 0 &&
        params.group_in_channels() % size == 0) {
      return size;
    }
  }
  return 1;
}

// Of kernels whose misfits refuse double.
constexpr char kNoDouble[] = "it adds up in float32";

// Plans a patch, or says why not.
template <typename T>
std::string PlanMisfit(const DeformConvParams& params, RegionPlan* plan) {
  DEFORM_CONV_RETURN_IF_ERROR(SizesOfImageMisfit(params));
  if (std::is_same_v<T, double>) return kNoDouble;
  if (params.image_size() == 0 || params.image_positions() == 0 || params.taps() == 0) {
    return "a tensor is empty";
  }
  if (PlanRegions<CudaType<T>>(params, CurrentGpu(), plan) == 0) {
    return "a region does not fit into shared memory";
  }
  const int64_t positions = (int64_t{1} << plan->height_log2) * params.out_w;
  if (positions * params.taps() * std::max(params.in_channels, params.deform_groups) >= int64_t{1}
                                                                                            << 31) {
    return "the columns of some rows of the output do not fit into 32 bits";
  }
  if (CeilDiv<int64_t>(params.deform_groups, plan->groups) * plan->group_slices > kMostBlocksInY) {
    return "there are too many channels";
  }
  return "";
}

}  // namespace

template <typename T>
std::string Col2ImRegionsMisfit(const DeformConvParams& params) {
  RegionPlan plan = {};
  DEFORM_CONV_RETURN_IF_ERROR(PlanMisfit<T>(params, &plan));
  const int64_t corners = plan.positions() * params.taps() * kCorners;
  return corners < kFewestCornersPerPixel * plan.pixels() ? "few samples share a pixel" : "";
}

template <typename T>
std::string Col2ImProductsMisfit(const DeformConvParams& params) {
  RegionPlan plan = {};
  DEFORM_CONV_RETURN_IF_ERROR(PlanMisfit<T>(params, &plan));
  return plan.group_slices > 1 ? "a deformable group has too many channels" : "";
}

template <typename T>
std::string Col2ImRegions(const DeformConvParams& params,
                          const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                          int64_t end, const T* columns, ComputeType<T>* grad_input, void* stream) {
  if constexpr (std::is_same_v<T, double>) {
    return kNoDouble;
  } else {
    if ((end - begin) * params.image_size() == 0) return "";
    const int size = ChannelsMoved<T>(
        params, IsAligned(tensors.offset) && IsAligned(columns) && IsAligned(grad_input));
    const auto launch = size == kVec16Size<T> ? LaunchSums<T, kVec16Size<T>>
                        : size == 4           ? LaunchSums<T, 4>
                                              : LaunchSums<T, 1>;
    return launch(params, tensors, begin, end, columns, grad_input, stream);
  }
}

template <typename T>
std::string Col2ImProducts(const DeformConvParams& params,
                           const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                           int64_t end, bool replace, T* columns,
                           const SampledGradients<ComputeType<T>>& gradients, void* stream) {
  if constexpr (std::is_same_v<T, double>) {
    return kNoDouble;
  } else {
    if ((end - begin) * params.image_size() == 0) return "";
    const int size =
        ChannelsMoved<T>(params, IsAligned(tensors.input) && IsAligned(tensors.offset) &&
                                     IsAligned(columns) && IsAligned(gradients.offset));
    const auto launch = size == kVec16Size<T> ? LaunchProducts<T, kVec16Size<T>>
                        : size == 4           ? LaunchProducts<T, 4>
                                              : LaunchProducts<T, 1>;
    return launch(params, tensors, begin, end, replace, columns, gradients, stream);
  }
}

#define DEFORM_CONV_INSTANTIATE(T)                                                               \
  template std::string Col2ImRegionsMisfit<T>(const DeformConvParams&);                          \
  template std::string Col2ImProductsMisfit<T>(const DeformConvParams&);                         \
  template std::string Col2ImRegions<T>(const DeformConvParams&,                                 \
                                        const SampledTensors<T, ComputeType<T>>&, int64_t,       \
                                        int64_t, const T*, ComputeType<T>*, void*);              \
  template std::string Col2ImProducts<T>(                                                        \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, bool, \
      T*, const SampledGradients<ComputeType<T>>&, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
