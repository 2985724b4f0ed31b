#include "core/cuda/general/corner_sort.cuh"
#include "core/cuda/general/volume.h"
#include "core/cuda/general/volume_samples.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/return_if_error.h"

namespace deform_conv {
namespace cuda {
namespace {

// Writes the corners that samples have in one of their two planes, as SortAndGather() wants them.
template <typename T, typename OffsetT>
__global__ void __launch_bounds__(kThreadsPerBlock)
    ListPlaneCornersKernel(DeformConv3DParams params, SampledTensors<T, OffsetT> tensors,
                           int64_t begin, int64_t sample_count, int plane, int64_t first_voxel,
                           uint32_t bins,
                           uint32_t* __restrict__ keys,      // [samples, corners]
                           uint32_t* __restrict__ entries,   // [samples, corners]
                           OffsetT* __restrict__ weights) {  // [samples, corners]
  const int64_t i = int64_t{blockIdx.x} * kThreadsPerBlock + threadIdx.x;
  if (i >= sample_count) return;
  const LocatedVolumeSample<OffsetT> sample = LocateTap(params, tensors, begin, i);
  const int64_t g = sample.channel / params.deform_group_channels();
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    const int64_t voxel = VoxelOf(params, sample, plane, corner) - first_voxel;
    keys[kCorners * i + corner] = Counts(sample.corner_bits, plane, corner)
                                      ? static_cast<uint32_t>(voxel * params.deform_groups + g)
                                      : bins;
    entries[kCorners * i + corner] = static_cast<uint32_t>(kCorners * i + corner);
    const OffsetT weight =
        plane == kFront ? sample.weights[kFront][corner] : sample.weights[kBack][corner];
    weights[kCorners * i + corner] = sample.mask * weight;
  }
}

}  // namespace

template <typename T>
std::string VolumeCol2ImSorted(const DeformConv3DParams& params,
                               const SampledTensors<T, ComputeType<T>>& tensors, int64_t begin,
                               int64_t end, const T* columns, ComputeType<T>* grad_input,
                               Workspace& workspace, void* stream) {
  for (int plane = kFront; plane < kCornerPlanes; ++plane) {
    const auto list_corners = [&](int64_t from, int64_t samples, int64_t first_voxel, uint32_t bins,
                                  const SortMemory<ComputeType<T>>& memory) {
      return LaunchKernel(
          "ListPlaneCornersKernel", ListPlaneCornersKernel<CudaType<T>, ComputeType<T>>,
          Blocks(samples, kThreadsPerBlock), kThreadsPerBlock, 0, stream, params, AsCuda(tensors),
          from, samples, plane, first_voxel, bins, memory.keys, memory.entries, memory.weights);
    };
    DEFORM_CONV_RETURN_IF_ERROR(SortAndGather(params.planar(), begin, end, columns, grad_input,
                                              workspace, stream, list_corners));
  }
  return "";
}

#define DEFORM_CONV_INSTANTIATE(T)                                                           \
  template std::string VolumeCol2ImSorted<T>(                                                \
      const DeformConv3DParams&, const SampledTensors<T, ComputeType<T>>&, int64_t, int64_t, \
      const T*, ComputeType<T>*, Workspace&, void*);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace cuda
}  // namespace deform_conv
