#include "core/cuda/general/corner_sort.cuh"
#include "core/cuda/general/kernels.h"
#include "core/cuda/general/samples.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {
namespace {

// Writes the corners of samples, as SortAndGather() wants them.
template <typename T, typename OffsetT>
__global__ void __launch_bounds__(kThreadsPerBlock)
    ListCornersKernel(DeformConvParams params, SampledTensors<T, OffsetT> tensors, int64_t begin,
                      int64_t sample_count, int64_t first_pixel, uint32_t bins,
                      uint32_t* __restrict__ keys,      // [samples, corners]
                      uint32_t* __restrict__ entries,   // [samples, corners]
                      OffsetT* __restrict__ weights) {  // [samples, corners]
  const int64_t i = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (i >= sample_count) return;
  const LocatedSample<OffsetT> sample = Locate(params, tensors, begin, i);
  const int64_t g = sample.channel / params.deform_group_channels();
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    const int64_t pixel = sample.top_left + CornerDistance(params, corner) - first_pixel;
    const bool counts = sample.corner_bits >> corner & 1;
    keys[kCorners * i + corner] =
        counts ? static_cast<uint32_t>(pixel * params.deform_groups + g) : bins;
    entries[kCorners * i + corner] = static_cast<uint32_t>(kCorners * i + corner);
    weights[kCorners * i + corner] = sample.mask * sample.weights[corner];
  }
}

}  // namespace

std::string Col2ImSortedMisfit(const DeformConvParams& params) {
  const bool bins_fit = params.image_pixels() * params.deform_groups < UINT32_MAX;
  if (bins_fit && kCorners * params.mask_channels() < INT32_MAX) return "";
  return "images of " + std::to_string(params.image_pixels()) + " pixels with " +
         std::to_string(params.deform_groups) + " deformable groups are too large to be sorted";
}

template <typename T>
std::string Col2ImSorted(const DeformConvParams& params,
                         const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                         int64_t end, const T* columns, ComputeType<T>* grad_input,
                         Workspace& workspace, void* stream) {
  const auto list_corners = [&](int64_t from, int64_t samples, int64_t first_pixel, uint32_t bins,
                                const SortMemory<ComputeType<T>>& memory) {
    return LaunchKernel("ListCornersKernel", ListCornersKernel<CudaType<T>, ComputeType<T>>,
                        Blocks(samples, kThreadsPerBlock), kThreadsPerBlock, 0, stream, params,
                        AsCuda(tensors), from, samples, first_pixel, bins, memory.keys,
                        memory.entries, memory.weights);
  };
  return SortAndGather(params, begin, end, columns, grad_input, workspace, stream, list_corners);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                                 \
  template std::string Col2ImSorted<T>(const DeformConvParams&,                                    \
                                       const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, \
                                       const T*, ComputeType<T>*, Workspace&, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
