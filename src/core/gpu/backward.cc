// Backward on a GPU: for each micro-batch a GEMM gives the columns' gradient, an implementation of
// col2im takes it apart into those of input, offset and mask and leaves the columns behind, and a
// GEMM with them gives that of the filters.

#include <algorithm>
#include <type_traits>

#include "core/cuda/general/kernels.h"
#include "core/deform_conv2d.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/gemm.h"
#include "core/gpu/implementations.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

template <typename Element>
Element* Advance(Element* tensor, int64_t elements) {
  return tensor == nullptr ? nullptr : tensor + elements;
}

// One call. Sums of 16-bit gradients are made in a float copy, since sums in 16 bits would depend
// on how many terms they have.
template <typename T>
class BackwardGpu {
  using Gradients = DeformConvGradients<T, ComputeType<T>>;
  using Tensors = SampledTensors<T, ComputeType<T>>;
  static constexpr bool kSumsAreCopies = !std::is_same_v<T, ComputeType<T>>;

 public:
  BackwardGpu(const DeformConvParams& params, const T* filters, GpuDevice& device)
      : params_(params), filters_(filters), device_(device) {}

  std::string Run(const Tensors& tensors, const T* grad_output, const Gradients& gradients) {
    if (!gradients.sampled.any() && gradients.filters == nullptr) return "";
    if (gradients.sampled.any()) {
      // What is added to is the input's gradient itself, or a copy that is no less aligned.
      const SampledGradients<ComputeType<T>> sampled = {
          reinterpret_cast<ComputeType<T>*>(gradients.sampled.input), gradients.sampled.offset,
          gradients.sampled.mask};
      const Col2ImCall<T> call = {
          params_, tensors, 0, params_.out_positions(), nullptr, gradients.filters != nullptr,
          sampled, device_};
      DEFORM_CONV_RETURN_IF_ERROR(Choose(Col2ImImplementations<T>(),
                                         "gradients of input, offset and mask", call, &col2im_));
    }
    const ElementBytes bytes = {sizeof(T), kSumsAreCopies ? int64_t{sizeof(ComputeType<T>)} : 0};
    plan_ = PlanBackward(params_, bytes, device_.columns_bytes(),
                         col2im_ == nullptr ? ChunkPreference() : col2im_->chunks);
    DEFORM_CONV_RETURN_IF_ERROR(AllocateWorkspace(gradients));
    DEFORM_CONV_RETURN_IF_ERROR(BackpropBatch(tensors, grad_output, gradients));
    return StoreSum(filters_sum_, FiltersSize(), gradients.filters);
  }

 private:
  int64_t FiltersSize() const {
    return params_.taps() * params_.group_in_channels() * params_.out_channels;
  }
  int64_t ImageSize() const { return params_.in_h * params_.in_w * params_.in_channels; }

  // --- Workspace ---

  std::string AllocateWorkspace(const Gradients& gradients) {
    const int64_t positions = params_.out_positions();
    if (positions > 0) {
      DEFORM_CONV_RETURN_IF_ERROR(device_.Allocate(
          ColumnsBytes(params_, plan_.positions, sizeof(T)), reinterpret_cast<void**>(&columns_)));
    }
    // With one chunk, the GEMM writes the filters' gradient; with more, they are summed up.
    if (gradients.filters != nullptr && (plan_.positions < positions || positions == 0)) {
      DEFORM_CONV_RETURN_IF_ERROR(AllocateSum(gradients.filters, FiltersSize(), &filters_sum_));
      DEFORM_CONV_RETURN_IF_ERROR(ZeroSum(filters_sum_, FiltersSize()));
    }
    // One copy, for the micro-batch that is at work.
    if (!kSumsAreCopies) return "";
    return AllocateSum(gradients.sampled.input, plan_.images * ImageSize(), &input_sum_);
  }

  // Where to add to what is a gradient in the end: the gradient itself, or the copy.
  std::string AllocateSum(T* gradient, int64_t size, ComputeType<T>** sum) {
    if (gradient == nullptr) return "";
    if constexpr (kSumsAreCopies) {
      return device_.Allocate(size * sizeof(ComputeType<T>), reinterpret_cast<void**>(sum));
    } else {
      *sum = gradient;
      return "";
    }
  }

  std::string ZeroSum(ComputeType<T>* sum, int64_t size) {
    if (sum == nullptr) return "";
    return cuda::Zero(sum, size * sizeof(ComputeType<T>), device_.stream());
  }

  std::string StoreSum(const ComputeType<T>* sum, int64_t size, T* gradient) {
    if (sum == nullptr || !kSumsAreCopies) return "";
    return cuda::FromNhwc<ComputeType<T>, T>(DataFormat::kNhwc, {1, size, 1}, sum, gradient,
                                             device_.stream());
  }

  // --- Micro-batches and chunks ---

  std::string BackpropBatch(const Tensors& tensors, const T* grad_output,
                            const Gradients& gradients) {
    for (int64_t image = 0; image < params_.batch; image += plan_.images) {
      DeformConvParams params = params_;
      params.batch = std::min(plan_.images, params_.batch - image);
      const int64_t position = image * params.out_h * params.out_w;
      const int64_t input = image * ImageSize(), offset = position * params.offset_channels();
      const int64_t mask = position * params.mask_channels();
      const Tensors some_tensors = {Advance(tensors.input, input), Advance(tensors.offset, offset),
                                    Advance(tensors.mask, mask)};
      Gradients some_gradients = gradients;
      some_gradients.sampled = {Advance(gradients.sampled.input, input),
                                Advance(gradients.sampled.offset, offset),
                                Advance(gradients.sampled.mask, mask)};
      DEFORM_CONV_RETURN_IF_ERROR(BackpropMicroBatch(
          params, some_tensors, grad_output + position * params.out_channels, some_gradients));
    }
    return "";
  }

  // `params` and all tensors are those of the micro-batch.
  std::string BackpropMicroBatch(const DeformConvParams& params, const Tensors& tensors,
                                 const T* grad_output, const Gradients& gradients) {
    SampledGradients<ComputeType<T>> sampled = {nullptr, gradients.sampled.offset,
                                                gradients.sampled.mask};
    const int64_t input_size = params.batch * ImageSize();
    if (gradients.sampled.input != nullptr) {
      if constexpr (!kSumsAreCopies) input_sum_ = gradients.sampled.input;
      sampled.input = input_sum_;
      DEFORM_CONV_RETURN_IF_ERROR(ZeroSum(input_sum_, input_size));
    }
    const int64_t positions = params.out_positions();
    for (int64_t begin = 0; begin < positions; begin += plan_.positions) {
      const int64_t end = std::min(begin + plan_.positions, positions);
      const bool want_filters = gradients.filters != nullptr;
      if (sampled.any()) {
        DEFORM_CONV_RETURN_IF_ERROR(BackpropColumns(params, grad_output, begin, end));
        DEFORM_CONV_RETURN_IF_ERROR(
            col2im_->run({params, tensors, begin, end, columns_, want_filters, sampled, device_}));
      } else if (want_filters) {
        DEFORM_CONV_RETURN_IF_ERROR(
            cuda::Im2Col<T>(params, tensors, begin, end, columns_, device_.stream()));
      }
      if (want_filters) {
        DEFORM_CONV_RETURN_IF_ERROR(
            BackpropFilters(params, grad_output, begin, end, gradients.filters));
      }
    }
    return StoreSum(sampled.input, input_size, gradients.sampled.input);
  }

  // Writes the columns' gradient of positions [begin, end).
  std::string BackpropColumns(const DeformConvParams& params, const T* grad_output, int64_t begin,
                              int64_t end) {
    for (int64_t group = 0; group < params.groups; ++group) {
      DEFORM_CONV_RETURN_IF_ERROR(Gemm(
          device_, GemmForm::kTransposeB, GroupOutput(params, group, grad_output, begin, end),
          GroupFilters(params, group, filters_), GroupColumns(params, group, columns_, end - begin),
          /*accumulate=*/false));
    }
    return "";
  }

  // Writes, or adds, what the columns of positions [begin, end) bring to the filters' gradient.
  std::string BackpropFilters(const DeformConvParams& params, const T* grad_output, int64_t begin,
                              int64_t end, T* grad_filters) {
    for (int64_t group = 0; group < params.groups; ++group) {
      DEFORM_CONV_RETURN_IF_ERROR(Gemm(device_, GemmForm::kTransposeA,
                                       GroupColumns(params, group, columns_, end - begin),
                                       GroupOutput(params, group, grad_output, begin, end),
                                       GroupFilters(params, group, grad_filters),
                                       /*accumulate=*/filters_sum_ != nullptr && !kSumsAreCopies));
    }
    if constexpr (kSumsAreCopies) {
      if (filters_sum_ == nullptr) return "";
      return cuda::Add(FiltersSize(), grad_filters, filters_sum_, device_.stream());
    }
    return "";
  }

  const DeformConvParams& params_;  // of the whole batch
  const T* const filters_;
  GpuDevice& device_;
  const Col2ImImplementation<T>* col2im_ = nullptr;
  ChunkPlan plan_ = {};
  T* columns_ = nullptr;  // of a chunk
  // What the gradients are summed up in; null where a GEMM or nobody writes them.
  ComputeType<T>* input_sum_ = nullptr;
  ComputeType<T>* filters_sum_ = nullptr;
};

}  // namespace

template <typename T>
std::string DeformConv2DBackwardGpu(const DeformConvParams& params,
                                    const SampledTensors<T, ComputeType<T>>& tensors,
                                    const T* filters, const T* grad_output, GpuDevice& device,
                                    const DeformConvGradients<T, ComputeType<T>>& gradients) {
  return BackwardGpu<T>(params, filters, device).Run(tensors, grad_output, gradients);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                           \
  template std::string DeformConv2DBackwardGpu<T>(                                           \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*, \
      GpuDevice&, const DeformConvGradients<T, ComputeType<T>>&);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(double)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
