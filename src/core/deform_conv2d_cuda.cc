// Forward and backward on a GPU, and which kernels do what. The general way: chunks of output
// positions, and for each im2col and GEMM; a chunk is as large as the bound on its columns allows,
// whatever the batch is. Backward, a chunk is a group of whole images or a part of one image, so
// that the float sums of the input's gradient are needed for one group at a time. The fused kernels
// take the place of the whole forward pass, and backward that of what is between the two GEMMs.

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
        "output", [&] { return FusedForwardFits<T>(params_, tensors_, filters_, output); }, &fuse));
    if constexpr (kMayFuse) {
      if (fuse) return FusedForwardCuda<T>(params_, tensors_, filters_, device_, output);
    }
    const int64_t positions = params_.out_positions();
    chunk_ = PartOf(positions, MostPositions());
    DEFORM_CONV_RETURN_IF_ERROR(AllocateColumns());
    for (int64_t begin = 0; begin < positions; begin += chunk_) {
      const int64_t end = std::min(begin + chunk_, positions);
      DEFORM_CONV_RETURN_IF_ERROR(Im2Col(begin, end));
      for (int64_t j = 0; j < params_.groups; ++j) {
        DEFORM_CONV_RETURN_IF_ERROR(Gemm(GemmForm::kPlain, Columns(j, begin, end), Filters(j),
                                         Output(j, output, begin, end), /*accumulate=*/false));
      }
    }
    return "";
  }

  std::string Backward(const T* grad_output, const DeformConvGradients<T, A>& gradients) {
    if (gradients.sampled.any()) {
      // What kernels add to is the input's gradient itself, or a copy that is no less aligned.
      const SampledGradients<A> sampled{reinterpret_cast<A*>(gradients.sampled.input),
                                        gradients.sampled.offset, gradients.sampled.mask};
      DEFORM_CONV_RETURN_IF_ERROR(Choose(
          "gradients of input, offset and mask",
          [&] {
            return !device_.deterministic() &&
                   DeformCol2ImRegionFits<T>(params_, tensors_, sampled);
          },
          &by_regions_));
    }
    if (!gradients.sampled.any() && gradients.filters == nullptr) return "";
    const int64_t filters_size =
        params_.taps() * params_.group_in_channels() * params_.out_channels;
    A* filters_sum = nullptr;
    DEFORM_CONV_RETURN_IF_ERROR(BackpropGroups(grad_output, gradients, filters_size, &filters_sum));
    return StoreSum(filters_sum, filters_size, gradients.filters);
  }

 private:
  // Whether there may be fused kernels for T: as TF32 for floats.
  static constexpr bool kMayFuse = kFusedKernelsCompiled && !std::is_same_v<T, double>;

  // The one place that decides whether fused kernels do a pass: where they can, `fits`, unless the
  // caller of the core says otherwise.
  template <typename Fits>
  std::string Choose(const char* what, const Fits& fits, bool* fuse) const {
    const KernelPath path = device_.path();
    *fuse = false;
    if constexpr (kMayFuse) {
      *fuse = path != KernelPath::kGeneral && (!std::is_same_v<T, float> || device_.allow_tf32()) &&
              FusedKernelsRunHere() && fits();
    }
    if (path != KernelPath::kFused || *fuse) return "";
    return std::string("no fused kernel for the ") + what + " of these sizes and types on this GPU";
  }

  // --- Backward ---

  // Goes over groups of images. Without a filters_sum, GEMM writes the filters' gradient.
  std::string BackpropGroups(const T* grad_output, const DeformConvGradients<T, A>& gradients,
                             int64_t filters_size, A** filters_sum) {
    const int64_t images = ChooseGroup();
    DEFORM_CONV_RETURN_IF_ERROR(AllocateColumns());
    // With one chunk, the GEMM writes the filters' gradient; with more, they are summed up.
    const int64_t positions = params_.out_positions();
    if (gradients.filters != nullptr && (chunk_ < positions || positions == 0)) {
      DEFORM_CONV_RETURN_IF_ERROR(AllocateSum(gradients.filters, filters_size, filters_sum));
      DEFORM_CONV_RETURN_IF_ERROR(ZeroSum(*filters_sum, filters_size));
    }
    // For the 16-bit types, one copy for the group that is at work.
    A* input_sum = nullptr;
    const int64_t image_size = params_.in_h * params_.in_w * params_.in_channels;
    if constexpr (!std::is_same_v<T, A>) {
      DEFORM_CONV_RETURN_IF_ERROR(
          AllocateSum(gradients.sampled.input, images * image_size, &input_sum));
    }
    for (int64_t first = 0; first < params_.batch; first += images) {
      CudaCall group = *this;
      group.params_.batch = std::min(images, params_.batch - first);
      const int64_t begin = first * params_.out_h * params_.out_w;
      const auto from = [](auto* tensor, int64_t element) {
        return tensor == nullptr ? nullptr : tensor + element;
      };
      group.tensors_ = {from(tensors_.input, first * image_size),
                        from(tensors_.offset, begin * params_.offset_channels()),
                        from(tensors_.mask, begin * params_.mask_channels())};
      DeformConvGradients<T, A> part = gradients;
      part.sampled = {from(gradients.sampled.input, first * image_size),
                      from(gradients.sampled.offset, begin * params_.offset_channels()),
                      from(gradients.sampled.mask, begin * params_.mask_channels())};
      DEFORM_CONV_RETURN_IF_ERROR(group.BackpropGroup(grad_output + begin * params_.out_channels,
                                                      part, input_sum, filters_size, *filters_sum));
    }
    return "";
  }

  // Goes over the chunks of this group, a call of its own. Where sums are not the gradients
  // themselves, the input's are made in `input_sum`, and the filters' added to `filters_sum`, if
  // there is one.
  std::string BackpropGroup(const T* grad_output, const DeformConvGradients<T, A>& gradients,
                            A* input_sum, int64_t filters_size, A* filters_sum) {
    SampledGradients<A> sampled{nullptr, gradients.sampled.offset, gradients.sampled.mask};
    if (gradients.sampled.input != nullptr) {
      if constexpr (std::is_same_v<T, A>) input_sum = gradients.sampled.input;
      sampled.input = input_sum;
      DEFORM_CONV_RETURN_IF_ERROR(ZeroSum(input_sum, InputSize()));
    }
    const int64_t positions = params_.out_positions();
    for (int64_t begin = 0; begin < positions; begin += chunk_) {
      const int64_t end = std::min(begin + chunk_, positions);
      if (sampled.any()) {
        DEFORM_CONV_RETURN_IF_ERROR(
            BackpropSamples(grad_output, begin, end, gradients.filters != nullptr, sampled));
      } else if (gradients.filters != nullptr) {
        DEFORM_CONV_RETURN_IF_ERROR(Im2Col(begin, end));
      }
      if (gradients.filters == nullptr) continue;
      const bool accumulate = filters_sum != nullptr && std::is_same_v<T, A>;
      DEFORM_CONV_RETURN_IF_ERROR(
          BackpropFilters(grad_output, begin, end, accumulate, gradients.filters));
      if constexpr (!std::is_same_v<T, A>) {
        if (filters_sum == nullptr) continue;
        DEFORM_CONV_RETURN_IF_ERROR(
            AddCuda(filters_size, gradients.filters, filters_sum, device_.stream()));
      }
    }
    return StoreSum(sampled.input, InputSize(), gradients.sampled.input);
  }

  // --- Chunks and memory ---

  static int64_t DivideUp(int64_t number, int64_t divisor) {
    return (number + divisor - 1) / divisor;
  }
  // The size of parts, nearly equal ones, of at most `most`, into which `number` is cut.
  static int64_t PartOf(int64_t number, int64_t most) {
    return number == 0 ? 1 : DivideUp(number, DivideUp(number, most));
  }

  int64_t RowBytes() const { return params_.taps() * params_.in_channels * sizeof(T); }
  int64_t MostPositions() const {
    return std::max<int64_t>(device_.columns_bytes() / RowBytes(), 1);
  }

  // How many images are worked on at once where a few are enough to occupy the GPU: so few that
  // their columns, and the float sums beside them, are smaller than the columns of all; but all
  // where they are small anyway, since every group costs launches.
  int64_t MostImages() const {
    constexpr int64_t kFew = 64, kSmallBytes = int64_t{32} << 20;
    const int64_t columns = params_.out_h * params_.out_w * RowBytes();
    const int64_t sums = std::is_same_v<T, A> ? 0
                                              : params_.in_h * params_.in_w * params_.in_channels *
                                                    static_cast<int64_t>(sizeof(A));
    if (params_.batch * (columns + sums) <= kSmallBytes) return params_.batch;
    return std::clamp<int64_t>(params_.batch * columns / (columns + sums), 1, kFew);
  }

  // Chooses chunk_, and returns how many images make a group: as many as are one chunk; or one, if
  // that is several chunks.
  int64_t ChooseGroup() {
    const int64_t image = params_.out_h * params_.out_w, most = MostPositions();
    if (image <= most) {
      int64_t most_images = image == 0 ? params_.batch : most / image;
      if (by_regions_) most_images = std::min(most_images, MostImages());
      const int64_t images = PartOf(params_.batch, most_images);
      chunk_ = std::max<int64_t>(images * image, 1);
      return images;
    }
    const int64_t band = kPatchSide * params_.out_w;
    const int64_t unit = by_regions_ && band <= most ? band : 1;
    chunk_ = PartOf(DivideUp(image, unit), most / unit) * unit;
    return 1;
  }

  // For chunk_ positions.
  std::string AllocateColumns() {
    if (params_.out_positions() == 0) return "";
    return device_.Allocate(chunk_ * RowBytes(), reinterpret_cast<void**>(&columns_));
  }

  // Where to add to what is a gradient in the end: the gradient itself, or for the 16-bit types a
  // float copy, since sums in 16 bits would depend on how many terms they have.
  std::string AllocateSum(T* gradient, int64_t size, A** sum) {
    if (gradient == nullptr) return "";
    if constexpr (std::is_same_v<T, A>) {
      *sum = gradient;
      return "";
    } else {
      return device_.Allocate(size * sizeof(A), reinterpret_cast<void**>(sum));
    }
  }

  std::string ZeroSum(A* sum, int64_t size) {
    return sum == nullptr ? "" : ZeroCuda(sum, size * sizeof(A), device_.stream());
  }

  std::string StoreSum(const A* sum, int64_t size, T* gradient) {
    if (sum == nullptr || std::is_same_v<T, A>) return "";
    return FromNhwcCuda<A, T>(DataFormat::kNhwc, {1, size, 1}, sum, gradient, device_.stream());
  }

  int64_t InputSize() const {
    return params_.batch * params_.in_h * params_.in_w * params_.in_channels;
  }

  // --- The steps of the general way ---

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
    if constexpr (kMayFuse) {
      if (by_regions_) {
        return DeformCol2ImRegionCuda<T>(params_, tensors_, begin, end, want_columns, columns_,
                                         sampled, device_.stream());
      }
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

  DeformConvParams params_;
  SampledTensors<T, A> tensors_;
  const T* filters_;
  CudaDevice& device_;
  bool by_regions_ = false;  // how the input's gradient is summed up
  int64_t chunk_ = 1;        // positions whose columns are made at a time
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
