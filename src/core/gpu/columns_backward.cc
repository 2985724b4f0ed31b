// Backward by columns, for each chunk of positions: GEMMs give the columns' gradient; col2im gives
// the gradients of input, offset and mask, and leaves the columns; GEMMs with the columns give the
// filters' gradient. Where only that is wanted, im2col gives the columns.

#include "core/gpu/columns_backward.h"

#include <algorithm>
#include <type_traits>

#include "core/cuda/general/kernels.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/gemm.h"
#include "core/gpu/implementations.h"
#include "core/gpu/some_images.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

// One call. Sums of 16-bit gradients are made in a float copy, since sums in 16 bits would depend
// on how many terms they have.
template <typename T>
class ColumnsBackward {
  using Gradients = DeformConvGradients<T, ComputeType<T>>;
  using Tensors = SampledTensors<T, ComputeType<T>>;
  static constexpr bool kSumsAreCopies = !std::is_same_v<T, ComputeType<T>>;

 public:
  ColumnsBackward(const DeformConvParams& params, const T* filters, GpuDevice& device)
      : params_(params), filters_(filters), device_(device) {}

  std::string Run(const Tensors& tensors, const T* grad_output, const Gradients& gradients) {
    if (gradients.sampled.any()) {
      // Misfits look only at whether pointers are null and aligned. A float copy is aligned no less
      // than the gradient.
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
    return StoreSum(filters_sum_, params_.filters_size(), gradients.filters);
  }

 private:
  // --- Workspace ---

  std::string AllocateWorkspace(const Gradients& gradients) {
    const int64_t positions = params_.out_positions();
    if (positions > 0) {
      DEFORM_CONV_RETURN_IF_ERROR(device_.Allocate(
          ColumnsBytes(params_, plan_.positions, sizeof(T)), reinterpret_cast<void**>(&columns_)));
    }
    // With one chunk, the GEMM writes the filters' gradient; with more, they are summed up.
    sum_chunks_ = plan_.positions < positions || positions == 0;
    if (gradients.filters != nullptr && sum_chunks_) {
      DEFORM_CONV_RETURN_IF_ERROR(
          AllocateSum(gradients.filters, params_.filters_size(), &filters_sum_));
      DEFORM_CONV_RETURN_IF_ERROR(ZeroSum(filters_sum_, params_.filters_size()));
    }
    // One copy, for the micro-batch that is at work.
    if (!kSumsAreCopies) return "";
    return AllocateSum(gradients.sampled.input, plan_.images * params_.image_size(), &input_copy_);
  }

  // Gives the memory to sum a gradient up in: the gradient itself, or a float copy.
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
    return cuda::FromNative<ComputeType<T>, T>(DataFormat::kNhwc, {1, size, 1}, sum, gradient,
                                               device_.stream());
  }

  // --- Micro-batches and chunks ---

  std::string BackpropBatch(const Tensors& tensors, const T* grad_output,
                            const Gradients& gradients) {
    for (int64_t image = 0; image < params_.batch; image += plan_.images) {
      const SomeImages<T> some(params_, tensors, image, plan_.images);
      Gradients some_gradients = gradients;
      some_gradients.sampled = some.Of(gradients.sampled);
      DEFORM_CONV_RETURN_IF_ERROR(
          BackpropMicroBatch(some.params(), some.tensors(),
                             grad_output + some.position() * params_.out_channels, some_gradients));
    }
    return "";
  }

  // `params` and all tensors are those of the micro-batch.
  std::string BackpropMicroBatch(const DeformConvParams& params, const Tensors& tensors,
                                 const T* grad_output, const Gradients& gradients) {
    ComputeType<T>* input_sum = input_copy_;
    if constexpr (!kSumsAreCopies) input_sum = gradients.sampled.input;
    const SampledGradients<ComputeType<T>> sampled = {input_sum, gradients.sampled.offset,
                                                      gradients.sampled.mask};
    const int64_t input_size = params.batch * params_.image_size();
    DEFORM_CONV_RETURN_IF_ERROR(ZeroSum(input_sum, input_size));
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
    return StoreSum(input_sum, input_size, gradients.sampled.input);
  }

  // Writes the columns' gradient of positions [begin, end).
  std::string BackpropColumns(const DeformConvParams& params, const T* grad_output, int64_t begin,
                              int64_t end) {
    return GemmOfGroups(
        params, device_, GemmForm::kTransposeB, OutputOfGroups(params, grad_output, begin, end),
        FiltersOfGroups(params, filters_), ColumnsOfGroups(params, columns_, end - begin),
        /*accumulate=*/false);
  }

  // Writes, or adds, what the columns of positions [begin, end) bring to the filters' gradient.
  std::string BackpropFilters(const DeformConvParams& params, const T* grad_output, int64_t begin,
                              int64_t end, T* grad_filters) {
    DEFORM_CONV_RETURN_IF_ERROR(GemmOfGroups(
        params, device_, GemmForm::kTransposeA, ColumnsOfGroups(params, columns_, end - begin),
        OutputOfGroups(params, grad_output, begin, end), FiltersOfGroups(params, grad_filters),
        /*accumulate=*/sum_chunks_ && !kSumsAreCopies));
    if constexpr (kSumsAreCopies) {
      if (!sum_chunks_) return "";
      return cuda::Add(params_.filters_size(), grad_filters, filters_sum_, device_.stream());
    }
    return "";
  }

  const DeformConvParams& params_;  // of the whole batch
  const T* const filters_;
  GpuDevice& device_;
  const Col2ImImplementation<T>* col2im_ = nullptr;
  ChunkPlan plan_ = {};
  T* columns_ = nullptr;                  // of a chunk
  ComputeType<T>* input_copy_ = nullptr;  // of a micro-batch
  // What the filters' gradient is summed up in, if chunks have to be.
  ComputeType<T>* filters_sum_ = nullptr;
  bool sum_chunks_ = false;
};

}  // namespace

template <typename T>
std::string BackpropByColumns(const BackwardCall<T>& call) {
  return ColumnsBackward<T>(call.params, call.filters, call.device)
      .Run(call.tensors, call.grad_output, call.gradients);
}

#define DEFORM_CONV_INSTANTIATE(T) \
  template std::string BackpropByColumns<T>(const BackwardCall<T>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
