// Forward and backward on a GPU, and which kernels do what. The general way: chunks of output
// positions, and for each im2col and GEMM; a chunk is as large as the bound on its columns allows,
// whatever the batch is. The fused kernels take passes that they can do as a whole.

#include <algorithm>
#include <type_traits>

#include "core/deform_conv2d.h"
#include "core/deform_conv2d_fused_cuda.h"
#include "core/deform_im2col_cuda.h"

#define DEFORM_CONV_RETURN_IF_ERROR(expression)                         \
  do {                                                                  \
    if (std::string error = (expression); !error.empty()) return error; \
  } while (false)

namespace deform_conv {
namespace {

// One call's tensors and chunks. T is the type that tensors are stored in.
template <typename T>
class CudaCall {
 public:
  using A = ComputeType<T>;

  CudaCall(const DeformConvParams& params, const SampledTensors<T, A>& tensors, const T* filters,
           CudaDevice& device)
      : params_(params), tensors_(tensors), filters_(filters), device_(device) {}

  std::string Forward(T* output) {
    bool fuse = false;
    DEFORM_CONV_RETURN_IF_ERROR(Choose(
        "output", /*fast=*/true,
        [&] { return FusedForwardFits<T>(params_, tensors_, filters_, output); }, &fuse));
    if constexpr (kMayFuse) {
      if (fuse) return FusedForwardCuda<T>(params_, tensors_, filters_, device_, output);
    }
    DEFORM_CONV_RETURN_IF_ERROR(AllocateColumns());
    for (int64_t begin = 0; begin < positions_; begin += chunk_) {
      const int64_t end = std::min(begin + chunk_, positions_);
      DEFORM_CONV_RETURN_IF_ERROR(Im2Col(begin, end));
      for (int64_t j = 0; j < params_.groups; ++j) {
        DEFORM_CONV_RETURN_IF_ERROR(Gemm(GemmForm::kPlain, Columns(j, begin, end), Filters(j),
                                         Output(j, output, begin, end), /*accumulate=*/false));
      }
    }
    return "";
  }

  std::string Backward(const T* grad_output, const DeformConvGradients<T, A>& gradients) {
    const int64_t input_size = params_.batch * params_.in_h * params_.in_w * params_.in_channels;
    const int64_t filters_size =
        params_.taps() * params_.group_in_channels() * params_.out_channels;
    SampledGradients<A> sampled{nullptr, gradients.sampled.offset, gradients.sampled.mask};
    A* filters_sum = nullptr;
    DEFORM_CONV_RETURN_IF_ERROR(PrepareSum(gradients.sampled.input, input_size, &sampled.input));

    SampledGradients<A> general = sampled;
    T* general_filters = gradients.filters;
    bool fuse = false;
    if (sampled.any()) {
      DEFORM_CONV_RETURN_IF_ERROR(Choose(
          "gradients of input, offset and mask", FusedBackwardIsFast(),
          [&] {
            return !device_.deterministic() &&
                   FusedBackpropSamplesFits<T>(params_, tensors_, filters_, grad_output, sampled);
          },
          &fuse));
      if constexpr (kMayFuse) {
        if (fuse) {
          DEFORM_CONV_RETURN_IF_ERROR(FusedBackpropSamplesCuda<T>(params_, tensors_, filters_,
                                                                  grad_output, device_, sampled));
          general = {};
        }
      }
    }
    if (gradients.filters != nullptr) {
      DEFORM_CONV_RETURN_IF_ERROR(Choose(
          "gradient of the filters", FusedBackwardIsFast(),
          [&] {
            return !device_.deterministic() &&
                   FusedBackpropFiltersFits<T>(params_, tensors_, grad_output);
          },
          &fuse));
      // The general kernel for the samples leaves columns, with which the rest is soon done.
      if (general.any() && device_.path() == KernelPath::kFastest) fuse = false;
      if constexpr (kMayFuse) {
        if (fuse) {
          DEFORM_CONV_RETURN_IF_ERROR(PrepareSum(gradients.filters, filters_size, &filters_sum));
          DEFORM_CONV_RETURN_IF_ERROR(
              FusedBackpropFiltersCuda<T>(params_, tensors_, grad_output, device_, filters_sum));
          general_filters = nullptr;
        }
      }
    }
    if (general.any() || general_filters != nullptr) {
      DEFORM_CONV_RETURN_IF_ERROR(
          BackpropChunks(grad_output, general, filters_size, general_filters, &filters_sum));
    }
    DEFORM_CONV_RETURN_IF_ERROR(StoreSum(sampled.input, input_size, gradients.sampled.input));
    return StoreSum(filters_sum, filters_size, gradients.filters);
  }

 private:
  // Whether there may be fused kernels for T: as TF32 for floats.
  static constexpr bool kMayFuse = kFusedKernelsCompiled && !std::is_same_v<T, double>;

  // Whether fused kernels backward are faster than the general ones where both can do it. They read
  // grad_output and the filters again and again, the more the more output channels there are; and
  // in TF32, all tiles are twice as large. See benchmarks/gpu_kernels.md.
  bool FusedBackwardIsFast() const {
    constexpr int64_t kManyChannels = 256;
    return sizeof(T) == 2 && params_.group_out_channels() <= kManyChannels;
  }

  // The one place that decides whether the fused kernels do a pass: where they can, `fits`, and are
  // `fast`, unless the caller of the core says otherwise.
  template <typename Fits>
  std::string Choose(const char* what, bool fast, const Fits& fits, bool* fuse) const {
    const KernelPath path = device_.path();
    *fuse = false;
    if constexpr (kMayFuse) {
      const bool wanted = path == KernelPath::kFused || (path == KernelPath::kFastest && fast);
      *fuse = wanted && (!std::is_same_v<T, float> || device_.allow_tf32()) &&
              FusedKernelsRunHere() && fits();
    }
    if (path != KernelPath::kFused || *fuse) return "";
    return std::string("no fused kernel for the ") + what + " of these sizes and types on this GPU";
  }

  // The general way backward. Without a filters_sum, GEMM writes the filters' gradient.
  std::string BackpropChunks(const T* grad_output, const SampledGradients<A>& sampled,
                             int64_t filters_size, T* grad_filters, A** filters_sum) {
    DEFORM_CONV_RETURN_IF_ERROR(AllocateColumns());
    // With one chunk, the GEMM writes the filters' gradient; with more, they are summed up.
    const bool sum_filters = grad_filters != nullptr && (chunk_ < positions_ || positions_ == 0);
    if (sum_filters) {
      DEFORM_CONV_RETURN_IF_ERROR(PrepareSum(grad_filters, filters_size, filters_sum));
    }
    for (int64_t begin = 0; begin < positions_; begin += chunk_) {
      const int64_t end = std::min(begin + chunk_, positions_);
      if (sampled.any()) {
        DEFORM_CONV_RETURN_IF_ERROR(
            BackpropSamples(grad_output, begin, end, grad_filters != nullptr, sampled));
      } else if (grad_filters != nullptr) {
        DEFORM_CONV_RETURN_IF_ERROR(Im2Col(begin, end));
      }
      if (grad_filters == nullptr) continue;
      const bool accumulate = sum_filters && std::is_same_v<T, A>;
      DEFORM_CONV_RETURN_IF_ERROR(
          BackpropFilters(grad_output, begin, end, accumulate, grad_filters));
      if constexpr (!std::is_same_v<T, A>) {
        if (!sum_filters) continue;
        DEFORM_CONV_RETURN_IF_ERROR(
            AddCuda(filters_size, grad_filters, *filters_sum, device_.stream()));
      }
    }
    return "";
  }

  std::string AllocateColumns() {
    positions_ = params_.out_positions();
    if (positions_ == 0) return "";
    const int64_t row_bytes = params_.taps() * params_.in_channels * sizeof(T);
    const int64_t most = std::max<int64_t>(device_.columns_bytes() / row_bytes, 1);
    const int64_t chunks = (positions_ + most - 1) / most;
    chunk_ = (positions_ + chunks - 1) / chunks;  // nearly equal ones
    return device_.Allocate(chunk_ * row_bytes, reinterpret_cast<void**>(&columns_));
  }

  // Zeroes what is added to in the end: the gradient itself, or for the 16-bit types a float copy,
  // since sums in 16 bits would depend on how many terms they have.
  std::string PrepareSum(T* gradient, int64_t size, A** sum) {
    if (gradient == nullptr) return "";
    if constexpr (std::is_same_v<T, A>) {
      *sum = gradient;
    } else {
      DEFORM_CONV_RETURN_IF_ERROR(
          device_.Allocate(size * sizeof(A), reinterpret_cast<void**>(sum)));
    }
    return ZeroCuda(*sum, size * sizeof(A), device_.stream());
  }

  std::string StoreSum(const A* sum, int64_t size, T* gradient) {
    if (sum == nullptr || std::is_same_v<T, A>) return "";
    return FromNhwcCuda<A, T>(DataFormat::kNhwc, {1, size, 1}, sum, gradient, device_.stream());
  }

  std::string Im2Col(int64_t begin, int64_t end) {
    return DeformIm2ColCuda<T>(params_, tensors_, begin, end, columns_, device_.stream());
  }

  // Whether the input's gradient is gathered from sorted corners instead of added with atomics.
  // That is faster too where a pixel's channels are many and the columns small, see
  // benchmarks/README.md.
  bool SortsCorners() const {
    constexpr int64_t kManyChannels = 64;
    return device_.deterministic() ||
           (sizeof(T) == 2 && params_.deform_group_channels() >= kManyChannels);
  }

  // Leaves the columns themselves in place of their gradient if they are wanted.
  std::string BackpropSamples(const T* grad_output, int64_t begin, int64_t end, bool want_columns,
                              const SampledGradients<A>& sampled) {
    for (int64_t j = 0; j < params_.groups; ++j) {
      DEFORM_CONV_RETURN_IF_ERROR(Gemm(GemmForm::kTransposeB, Output(j, grad_output, begin, end),
                                       Filters(j), Columns(j, begin, end),
                                       /*accumulate=*/false));
    }
    SampledGradients<A> unsorted = sampled;
    if (sampled.input != nullptr && SortsCorners()) {
      DEFORM_CONV_RETURN_IF_ERROR(DeformCol2ImSortedCuda<T>(params_, tensors_, begin, end, columns_,
                                                            sampled.input, device_));
      unsorted.input = nullptr;
      if (!unsorted.any() && !want_columns) return "";
    }
    return DeformCol2ImCuda<T>(params_, tensors_, begin, end, want_columns, columns_, unsorted,
                               device_.stream());
  }

  std::string BackpropFilters(const T* grad_output, int64_t begin, int64_t end, bool accumulate,
                              T* grad_filters) {
    for (int64_t j = 0; j < params_.groups; ++j) {
      DEFORM_CONV_RETURN_IF_ERROR(Gemm(GemmForm::kTransposeA, Columns(j, begin, end),
                                       Output(j, grad_output, begin, end),
                                       GroupFilters(j, grad_filters), accumulate));
    }
    return "";
  }

  // --- Group j's part of each matrix ---

  Matrix<T> Columns(int64_t j, int64_t begin, int64_t end) const {
    const int64_t size = params_.taps() * params_.group_in_channels();
    return {columns_ + j * size, end - begin, size, params_.groups * size};
  }

  template <typename Element>
  Matrix<Element> GroupFilters(int64_t j, Element* filters) const {
    return {filters + j * params_.group_out_channels(),
            params_.taps() * params_.group_in_channels(), params_.group_out_channels(),
            params_.out_channels};
  }
  Matrix<const T> Filters(int64_t j) const { return GroupFilters(j, filters_); }

  template <typename Element>
  Matrix<Element> Output(int64_t j, Element* output, int64_t begin, int64_t end) const {
    return {output + begin * params_.out_channels + j * params_.group_out_channels(), end - begin,
            params_.group_out_channels(), params_.out_channels};
  }

  template <typename Left, typename Right>
  std::string Gemm(GemmForm form, const Matrix<Left>& a, const Matrix<Right>& b, const Matrix<T>& c,
                   bool accumulate) {
    return device_.Gemm(ElementTypeOf<T>::value, form, {a.data, a.rows, a.cols, a.stride},
                        {b.data, b.rows, b.cols, b.stride}, {c.data, c.rows, c.cols, c.stride},
                        accumulate);
  }

  const DeformConvParams& params_;
  const SampledTensors<T, A>& tensors_;
  const T* filters_;
  CudaDevice& device_;
  int64_t positions_ = 0, chunk_ = 1;
  T* columns_ = nullptr;
};

}  // namespace

template <typename T>
std::string DeformConv2DForwardCuda(const DeformConvParams& params,
                                    const SampledTensors<T, ComputeType<T>>& tensors,
                                    const T* filters, CudaDevice& device, T* output) {
  return CudaCall<T>(params, tensors, filters, device).Forward(output);
}

template <typename T>
std::string DeformConv2DBackwardCuda(const DeformConvParams& params,
                                     const SampledTensors<T, ComputeType<T>>& tensors,
                                     const T* filters, const T* grad_output, CudaDevice& device,
                                     const DeformConvGradients<T, ComputeType<T>>& gradients) {
  return CudaCall<T>(params, tensors, filters, device).Backward(grad_output, gradients);
}

#define DEFORM_CONV_INSTANTIATE(T)                                                           \
  template std::string DeformConv2DForwardCuda<T>(const DeformConvParams&,                   \
                                                  const SampledTensors<T, ComputeType<T>>&,  \
                                                  const T*, CudaDevice&, T*);                \
  template std::string DeformConv2DBackwardCuda<T>(                                          \
      const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&, const T*, const T*, \
      CudaDevice&, const DeformConvGradients<T, ComputeType<T>>&);
DEFORM_CONV_INSTANTIATE(float)
DEFORM_CONV_INSTANTIATE(double)
DEFORM_CONV_INSTANTIATE(Half)
DEFORM_CONV_INSTANTIATE(BFloat16)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
