// The passes over volumes on every GPU, by columns, chunk by chunk of positions.

#include "core/cuda/general/volume.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/cuda/general/kernels.h"
#include "core/deform_conv3d.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/gemm.h"
#include "core/gpu/gradient_sum.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

// Memory for the columns of a chunk of positions.
template <typename T>
std::string AllocateColumns(const DeformConvParams& planar, GpuDevice& device, int64_t* chunk,
                            T** columns) {
  if (device.path() == KernelPath::kFused) return "no fused kernel takes three dimensions";
  // The kernels count a position's samples, and a sample's channels, in int.
  if (std::max(planar.mask_channels(), planar.deform_group_channels()) > INT32_MAX) {
    return "on a GPU, deform_groups * taps, and the channels of a deformable group, must be fewer "
           "than 2^31; received " +
           std::to_string(planar.mask_channels()) + " and " +
           std::to_string(planar.deform_group_channels());
  }
  *chunk = PositionsOfChunk(planar, sizeof(T), device.columns_bytes());
  return device.Allocate(ColumnsBytes(planar, *chunk, sizeof(T)),
                         reinterpret_cast<void**>(columns));
}

// One call of backward. For each chunk, GEMMs give the columns' gradient; col2im gives the
// gradients of input, offset and mask, and leaves the columns; GEMMs with the columns give the
// filters' gradient. Where only that is wanted, im2col gives the columns.
template <typename T>
class VolumeBackward {
 public:
  VolumeBackward(const DeformConv3DParams& params, const SampledTensors<T, ComputeType<T>>& tensors,
                 const T* filters, const T* grad_output, GpuDevice& device,
                 const DeformConvGradients<T, ComputeType<T>>& gradients)
      : params_(params),
        planar_(params.planar()),
        tensors_(tensors),
        filters_(filters),
        grad_output_(grad_output),
        device_(device),
        gradients_(gradients),
        input_sum_(device),
        filters_sum_(device) {}

  std::string Run() {
    DEFORM_CONV_RETURN_IF_ERROR(
        BeginSum(gradients_.sampled.input, params_.batch * params_.image_size(), &input_sum_));
    DEFORM_CONV_RETURN_IF_ERROR(
        BeginSum(gradients_.filters, params_.filters_size(), &filters_sum_));
    const int64_t positions = params_.out_positions();
    if (positions > 0) {
      int64_t chunk;
      DEFORM_CONV_RETURN_IF_ERROR(AllocateColumns(planar_, device_, &chunk, &columns_));
      for (int64_t begin = 0; begin < positions; begin += chunk) {
        DEFORM_CONV_RETURN_IF_ERROR(BackpropChunk(begin, std::min(begin + chunk, positions)));
      }
    }
    DEFORM_CONV_RETURN_IF_ERROR(input_sum_.Store());
    return filters_sum_.Store();
  }

 private:
  static std::string BeginSum(T* gradient, int64_t elements, GradientSum<T>* sum) {
    if (gradient == nullptr) return "";
    DEFORM_CONV_RETURN_IF_ERROR(sum->Allocate(elements));
    return sum->Begin(gradient, elements);
  }

  std::string BackpropChunk(int64_t begin, int64_t end) {
    SampledGradients<ComputeType<T>> sampled = {input_sum_.data(), gradients_.sampled.offset,
                                                gradients_.sampled.mask};
    const bool want_filters = gradients_.filters != nullptr;
    const auto output = OutputOfGroups(planar_, grad_output_, begin, end);
    const auto columns = ColumnsOfGroups(planar_, columns_, end - begin);
    if (sampled.any()) {
      DEFORM_CONV_RETURN_IF_ERROR(GemmOfGroups(planar_, device_, GemmForm::kTransposeB, output,
                                               FiltersOfGroups(planar_, filters_), columns,
                                               /*accumulate=*/false));
      if (device_.deterministic() && sampled.input != nullptr) {
        DEFORM_CONV_RETURN_IF_ERROR(cuda::VolumeCol2ImSorted<T>(
            params_, tensors_, begin, end, columns_, sampled.input, workspace_, device_.stream()));
        sampled.input = nullptr;
      }
      if (sampled.any() || want_filters) {
        DEFORM_CONV_RETURN_IF_ERROR(cuda::VolumeCol2Im<T>(
            params_, tensors_, begin, end, want_filters, columns_, sampled, device_.stream()));
      }
    } else if (want_filters) {
      DEFORM_CONV_RETURN_IF_ERROR(
          cuda::VolumeIm2Col<T>(params_, tensors_, begin, end, columns_, device_.stream()));
    }
    if (!want_filters) return "";
    DEFORM_CONV_RETURN_IF_ERROR(GemmOfGroups(planar_, device_, GemmForm::kTransposeA, columns,
                                             output, FiltersOfGroups(planar_, gradients_.filters),
                                             /*accumulate=*/!GradientSum<T>::kIsCopy));
    if constexpr (GradientSum<T>::kIsCopy) {
      return cuda::Add(params_.filters_size(), gradients_.filters, filters_sum_.data(),
                       device_.stream());
    }
    return "";
  }

  const DeformConv3DParams& params_;
  const DeformConvParams planar_;
  const SampledTensors<T, ComputeType<T>>& tensors_;
  const T* filters_;
  const T* grad_output_;
  GpuDevice& device_;
  const DeformConvGradients<T, ComputeType<T>>& gradients_;
  Workspace workspace_{device_};  // of sorting
  GradientSum<T> input_sum_, filters_sum_;
  T* columns_ = nullptr;  // of a chunk
};

}  // namespace

template <typename T>
std::string DeformConv3DForwardGpu(const DeformConv3DParams& params,
                                   const SampledTensors<T, ComputeType<T>>& tensors,
                                   const T* filters, GpuDevice& device, T* output) {
  const int64_t positions = params.out_positions();
  if (positions == 0) return "";
  const DeformConvParams planar = params.planar();
  int64_t chunk;
  T* columns;
  DEFORM_CONV_RETURN_IF_ERROR(AllocateColumns(planar, device, &chunk, &columns));
  for (int64_t begin = 0; begin < positions; begin += chunk) {
    const int64_t end = std::min(begin + chunk, positions);
    DEFORM_CONV_RETURN_IF_ERROR(
        cuda::VolumeIm2Col<T>(params, tensors, begin, end, columns, device.stream()));
    DEFORM_CONV_RETURN_IF_ERROR(GemmOfGroups(
        planar, device, GemmForm::kPlain, ColumnsOfGroups(planar, columns, end - begin),
        FiltersOfGroups(planar, filters), OutputOfGroups(planar, output, begin, end),
        /*accumulate=*/false));
  }
  return "";
}

template <typename T>
std::string DeformConv3DBackwardGpu(const DeformConv3DParams& params,
                                    const SampledTensors<T, ComputeType<T>>& tensors,
                                    const T* filters, const T* grad_output, GpuDevice& device,
                                    const DeformConvGradients<T, ComputeType<T>>& gradients) {
  return VolumeBackward<T>(params, tensors, filters, grad_output, device, gradients).Run();
}

#define DEFORM_CONV_INSTANTIATE(T)                                                             \
  template std::string DeformConv3DForwardGpu<T>(const DeformConv3DParams&,                    \
                                                 const SampledTensors<T, ComputeType<T>>&,     \
                                                 const T*, GpuDevice&, T*);                    \
  template std::string DeformConv3DBackwardGpu<T>(                                             \
      const DeformConv3DParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*, \
      GpuDevice&, const DeformConvGradients<T, ComputeType<T>>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
