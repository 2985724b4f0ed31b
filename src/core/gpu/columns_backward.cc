// Backward by columns, for each chunk of positions: GEMMs give the columns' gradient; col2im gives
// the gradients of input, offset and mask, and leaves the columns; GEMMs with the columns give the
// filters' gradient. Where only that is wanted, im2col gives the columns.

#include "core/gpu/columns_backward.h"

#include <algorithm>

#include "core/cuda/general/kernels.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/gemm.h"
#include "core/gpu/gradient_sum.h"
#include "core/gpu/implementations.h"
#include "core/gpu/some_images.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

// One call.
template <typename T>
class ColumnsBackward {
  using Gradients = DeformConvGradients<T, ComputeType<T>>;
  using Tensors = SampledTensors<T, ComputeType<T>>;

 public:
  explicit ColumnsBackward(const BackwardCall<T>& call)
      : call_(call),
        params_(call.params),
        device_(call.device),
        input_sum_(device_),
        filters_sum_(device_) {}

  std::string Run() {
    DEFORM_CONV_RETURN_IF_ERROR(ChooseImplementation());
    const ElementBytes bytes = {
        sizeof(T), call_.gradients.sampled.input == nullptr ? 0 : GradientSum<T>::kElementBytes};
    plan_ = PlanBackward(params_, bytes, device_.columns_bytes(),
                         col2im_ == nullptr ? ChunkPreference() : col2im_->chunks);
    DEFORM_CONV_RETURN_IF_ERROR(AllocateWorkspace());
    for (int64_t image = 0; image < params_.batch; image += plan_.images) {
      const SomeImages<T> some(params_, call_.tensors, image, plan_.images);
      const Gradients gradients = {some.Of(call_.gradients.sampled), call_.gradients.filters};
      DEFORM_CONV_RETURN_IF_ERROR(BackpropMicroBatch(
          some.params(), some.tensors(), call_.grad_output + some.position() * params_.out_channels,
          gradients));
    }
    return filters_sum_.Store();
  }

 private:
  std::string ChooseImplementation() {
    if (call_.gradients.sampled.any()) return ChooseCol2Im(call_, &col2im_);
    const Im2ColCall<T> call = {params_, call_.tensors, 0, params_.out_positions(),
                                nullptr, device_};
    return Choose(Im2ColImplementations<T>(), "gradient of the filters alone", call, &im2col_);
  }

  std::string AllocateWorkspace() {
    const int64_t positions = params_.out_positions();
    if (positions > 0) {
      DEFORM_CONV_RETURN_IF_ERROR(device_.Allocate(
          ColumnsBytes(params_, plan_.positions, sizeof(T)), reinterpret_cast<void**>(&columns_)));
    }
    // With one chunk, the GEMM writes the filters' gradient; with more, they are summed up.
    sum_chunks_ = plan_.positions < positions || positions == 0;
    if (call_.gradients.filters != nullptr && sum_chunks_) {
      DEFORM_CONV_RETURN_IF_ERROR(filters_sum_.Allocate(params_.filters_size()));
      DEFORM_CONV_RETURN_IF_ERROR(
          filters_sum_.Begin(call_.gradients.filters, params_.filters_size()));
    }
    if (call_.gradients.sampled.input == nullptr) return "";
    return input_sum_.Allocate(plan_.images * params_.image_size());
  }

  // --- Chunks ---

  // `params` and all tensors are those of the micro-batch.
  std::string BackpropMicroBatch(const DeformConvParams& params, const Tensors& tensors,
                                 const T* grad_output, const Gradients& gradients) {
    DEFORM_CONV_RETURN_IF_ERROR(
        input_sum_.Begin(gradients.sampled.input, params.batch * params_.image_size()));
    const SampledGradients<ComputeType<T>> sampled = {input_sum_.data(), gradients.sampled.offset,
                                                      gradients.sampled.mask};
    const int64_t positions = params.out_positions();
    for (int64_t begin = 0; begin < positions; begin += plan_.positions) {
      const int64_t end = std::min(begin + plan_.positions, positions);
      const bool want_filters = gradients.filters != nullptr;
      if (sampled.any()) {
        DEFORM_CONV_RETURN_IF_ERROR(BackpropColumns(params, grad_output, begin, end));
        DEFORM_CONV_RETURN_IF_ERROR(col2im_->run(
            {params, tensors, begin, end, columns_, want_filters, sampled, device_, workspace_}));
      } else if (want_filters) {
        DEFORM_CONV_RETURN_IF_ERROR(im2col_->run({params, tensors, begin, end, columns_, device_}));
      }
      if (want_filters) {
        DEFORM_CONV_RETURN_IF_ERROR(
            BackpropFilters(params, grad_output, begin, end, gradients.filters));
      }
    }
    return input_sum_.Store();
  }

  // Writes the columns' gradient of positions [begin, end).
  std::string BackpropColumns(const DeformConvParams& params, const T* grad_output, int64_t begin,
                              int64_t end) {
    return GemmOfGroups(
        params, device_, GemmForm::kTransposeB, OutputOfGroups(params, grad_output, begin, end),
        FiltersOfGroups(params, call_.filters), ColumnsOfGroups(params, columns_, end - begin),
        /*accumulate=*/false);
  }

  // Writes, or adds, what the columns of positions [begin, end) bring to the filters' gradient.
  std::string BackpropFilters(const DeformConvParams& params, const T* grad_output, int64_t begin,
                              int64_t end, T* grad_filters) {
    DEFORM_CONV_RETURN_IF_ERROR(GemmOfGroups(
        params, device_, GemmForm::kTransposeA, ColumnsOfGroups(params, columns_, end - begin),
        OutputOfGroups(params, grad_output, begin, end), FiltersOfGroups(params, grad_filters),
        /*accumulate=*/sum_chunks_ && !GradientSum<T>::kIsCopy));
    if constexpr (GradientSum<T>::kIsCopy) {
      if (!sum_chunks_) return "";
      return cuda::Add(params_.filters_size(), grad_filters, filters_sum_.data(), device_.stream());
    }
    return "";
  }

  const BackwardCall<T>& call_;
  const DeformConvParams& params_;  // of the whole batch
  GpuDevice& device_;
  Workspace workspace_{device_};  // of col2im
  // One of them.
  const Col2ImImplementation<T>* col2im_ = nullptr;
  const Implementation<Im2ColCall<T>>* im2col_ = nullptr;
  ChunkPlan plan_ = {};
  T* columns_ = nullptr;        // of a chunk
  GradientSum<T> input_sum_;    // of a micro-batch
  GradientSum<T> filters_sum_;  // if chunks have to be summed up
  bool sum_chunks_ = false;
};

}  // namespace

template <typename T>
std::string ChooseCol2Im(const BackwardCall<T>& call, const Col2ImImplementation<T>** chosen) {
  // A float copy of the input's gradient is aligned no less than the gradient.
  const SampledGradients<ComputeType<T>> sampled = {
      reinterpret_cast<ComputeType<T>*>(call.gradients.sampled.input),
      call.gradients.sampled.offset, call.gradients.sampled.mask};
  Workspace workspace(call.device);
  const Col2ImCall<T> col2im = {call.params, call.tensors,
                                0,           call.params.out_positions(),
                                nullptr,     call.gradients.filters != nullptr,
                                sampled,     call.device,
                                workspace};
  return Choose(Col2ImImplementations<T>(), "gradients of input, offset and mask", col2im, chosen);
}

template <typename T>
std::string BackpropByColumns(const BackwardCall<T>& call) {
  return ColumnsBackward<T>(call).Run();
}

#define DEFORM_CONV_INSTANTIATE(T)                                                               \
  template std::string ChooseCol2Im<T>(const BackwardCall<T>&, const Col2ImImplementation<T>**); \
  template std::string BackpropByColumns<T>(const BackwardCall<T>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
