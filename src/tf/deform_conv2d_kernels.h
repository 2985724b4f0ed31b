// What the ops' kernels do on every device: from TensorFlow's tensors to the core's and back. The
// device's part is a Backend:
//
//   class Backend {
//     explicit Backend(OpKernelContext* context);
//
//     // What input, filters and output are computed in.
//     template <typename Stored> using Native = ...;
//
//     // Bytes that copies in native form may take, unless those of one image take more.
//     int64_t copy_bytes() const;
//
//     template <typename Stored, typename T>
//     absl::Status ToNative(DataFormat, const TensorExtent&, const Stored* from, T* to);
//
//     template <typename Stored, typename T>
//     absl::Status FromNative(DataFormat, const TensorExtent&, const T* from, Stored* to);
//
//     template <typename T, typename Position>
//     absl::Status Forward(const DeformConvParams&, const SampledTensors<T, Position>&,
//                          const T* filters, T* output);
//
//     // With `add_filters`, adds to the filters' gradient instead of writing it.
//     template <typename T, typename Position>
//     absl::Status Backward(const DeformConvParams&, const SampledTensors<T, Position>&,
//                           const T* filters, const T* grad_output, bool add_filters,
//                           const DeformConvGradients<T, Position>&);
//   };
//
// Offset and mask are always computed in ComputeType: float, or double beside double.

#ifndef DEFORM_CONV_TF_DEFORM_CONV2D_KERNELS_H_
#define DEFORM_CONV_TF_DEFORM_CONV2D_KERNELS_H_

#include <algorithm>
#include <exception>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "core/deform_conv2d.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/op_attributes.h"

namespace deform_conv {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// TensorFlow's element types as the core names them, and back.
template <typename TfType>
struct StoredTypeOf {
  using type = TfType;
};
template <>
struct StoredTypeOf<Eigen::half> {
  using type = Half;
};
template <>
struct StoredTypeOf<Eigen::bfloat16> {
  using type = BFloat16;
};
template <typename TfType>
using StoredType = typename StoredTypeOf<TfType>::type;

// A tensor in the form that the core computes on, NHWC in type T, some images at a time: the
// tensor's own elements where they have that form, or else a converted copy. Without a tensor,
// data() is null and the rest does nothing.
template <typename Backend, typename Stored, typename T>
class NativeTensor {
 public:
  NativeTensor(OpKernelContext* context, Backend& backend, DataFormat format)
      : context_(context), backend_(backend), format_(format) {}

  // `tensor` must outlive this object.
  void Attach(const Tensor& tensor) {
    stored_ = reinterpret_cast<Stored*>(const_cast<char*>(tensor.tensor_data().data()));
    const std::array<int, 4> axes = AxesOf(format_);
    extent_ = {tensor.dim_size(axes[0]), tensor.dim_size(axes[1]) * tensor.dim_size(axes[2]),
               tensor.dim_size(axes[3])};
    native_ = std::is_same_v<Stored, T> && format_ == DataFormat::kNhwc;
  }

  int64_t images() const { return extent_.batch; }
  // What the copy of an image takes.
  int64_t copy_bytes() const {
    return stored_ == nullptr || native_ ? 0 : ImageSize() * static_cast<int64_t>(sizeof(T));
  }

  // Makes room for so many images at a time.
  absl::Status Allocate(int64_t images) {
    if (copy_bytes() == 0) return absl::OkStatus();
    return context_->allocate_temp(tensorflow::DT_INT8, TensorShape({images * copy_bytes()}),
                                   &copy_);
  }

  // Chooses images [begin, begin + count), at most as many as there is room for.
  void MoveTo(int64_t begin, int64_t count) {
    begin_ = begin;
    extent_.batch = count;
  }

  // Converts the chosen images into native form.
  absl::Status Read() {
    if (copy_bytes() == 0) return absl::OkStatus();
    return backend_.ToNative(format_, extent_, Chosen(), data());
  }

  // Converts them back.
  absl::Status Write() {
    if (copy_bytes() == 0) return absl::OkStatus();
    return backend_.FromNative(format_, extent_, data(), Chosen());
  }

  // The chosen images in native form.
  T* data() const {
    if (stored_ == nullptr) return nullptr;
    if constexpr (std::is_same_v<Stored, T>) {
      if (native_) return Chosen();
    }
    return reinterpret_cast<T*>(const_cast<char*>(copy_.tensor_data().data()));
  }

 private:
  int64_t ImageSize() const { return extent_.pixels * extent_.channels; }
  Stored* Chosen() const { return stored_ + begin_ * ImageSize(); }

  OpKernelContext* context_;
  Backend& backend_;
  DataFormat format_;
  Stored* stored_ = nullptr;
  TensorExtent extent_{0, 0, 0};  // of the chosen images
  int64_t begin_ = 0;
  bool native_ = false;
  Tensor copy_;
};

// Calls work(begin, count) for ranges of images that cover the batch, after making room for one in
// `tensors`. A range is as long as the backend grants memory to the tensors' copies, but at least
// one image.
template <typename Backend, typename Work, typename... Tensors>
absl::Status ForEachRange(const Backend& backend, int64_t images, const Work& work,
                          Tensors&... tensors) {
  const int64_t bytes = (tensors.copy_bytes() + ...);
  const int64_t granted = bytes == 0 ? images : std::min(backend.copy_bytes() / bytes, images);
  const int64_t range = std::max<int64_t>(granted, 1);
  absl::Status status;
  const auto allocate = [&](auto& tensor) {
    if (status.ok()) status = tensor.Allocate(range);
  };
  (allocate(tensors), ...);
  int64_t begin = 0;
  do {  // once for an empty batch too: it has a gradient by the filters
    if (!status.ok()) break;
    const int64_t count = std::min(range, images - begin);
    (tensors.MoveTo(begin, count), ...);
    status = work(begin, count);
    begin += range;
  } while (begin < images);
  return status;
}

// What the kernels of both ops do alike, whatever the types.
class DeformConv2DKernel : public OpKernel {
 public:
  explicit DeformConv2DKernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &attributes_));
  }

  void Compute(OpKernelContext* context) override {
    try {
      OP_REQUIRES_OK(context, ComputeStatus(context));
    } catch (const std::bad_alloc&) {
      context->SetStatus(absl::ResourceExhaustedError("out of memory for the op's workspace"));
    } catch (const std::invalid_argument& error) {
      context->SetStatus(absl::InvalidArgumentError(error.what()));
    } catch (const std::exception& error) {
      context->SetStatus(absl::InternalError(error.what()));
    }
  }

 protected:
  virtual absl::Status ComputeStatus(OpKernelContext* context) = 0;

  DataFormat format() const { return attributes_.format; }
  bool has_mask() const { return attributes_.has_mask; }

  absl::Status ReadShapes(OpKernelContext* context, DeformConvParams* params) const {
    const auto dimensions = [context](int index) {
      const auto sizes = context->input(index).shape().dim_sizes();
      return std::vector<int64_t>(sizes.begin(), sizes.end());
    };
    return MakeParamsOf(attributes_, dimensions, params);
  }

  absl::Status OutputShape(const DeformConvParams& params, TensorShape* shape) const {
    return TensorShape::BuildTensorShape(
        FromNativeShape(format(), {params.batch, params.out_h, params.out_w, params.out_channels}),
        shape);
  }

 private:
  OpAttributes attributes_;
};

// The ops' arguments in native form.
template <typename Backend, typename TfType, typename TfOffset>
class NativeArguments {
 public:
  using Stored = StoredType<TfType>;
  using StoredOffset = StoredType<TfOffset>;
  using T = typename Backend::template Native<Stored>;
  using Position = ComputeType<Stored>;
  static_assert(std::is_same_v<Position, ComputeType<StoredOffset>>);
  using DataTensor = NativeTensor<Backend, Stored, T>;
  using PositionTensor = NativeTensor<Backend, StoredOffset, Position>;

  NativeArguments(OpKernelContext* context, Backend& backend, DataFormat format)
      : input_(context, backend, format),
        filters_(context, backend, DataFormat::kNhwc),
        offset_(context, backend, format),
        mask_(context, backend, format) {}

  // Attaches the op's inputs, and reads the filters.
  absl::Status Attach(OpKernelContext* context, bool has_mask) {
    input_.Attach(context->input(0));
    filters_.Attach(context->input(1));
    offset_.Attach(context->input(2));
    if (has_mask) mask_.Attach(context->input(3));
    TF_RETURN_IF_ERROR(filters_.Allocate(filters_.images()));
    return filters_.Read();
  }

  // Reads the images that input(), offset() and mask() were moved to.
  absl::Status Read() {
    TF_RETURN_IF_ERROR(input_.Read());
    TF_RETURN_IF_ERROR(offset_.Read());
    return mask_.Read();
  }

  DataTensor& input() { return input_; }
  PositionTensor& offset() { return offset_; }
  PositionTensor& mask() { return mask_; }

  SampledTensors<T, Position> sampled() const {
    return {input_.data(), offset_.data(), mask_.data()};
  }
  const T* filters() const { return filters_.data(); }

 private:
  DataTensor input_, filters_;
  PositionTensor offset_, mask_;
};

template <typename Backend, typename TfType, typename TfOffset>
class DeformConv2DOp : public DeformConv2DKernel {
  using Arguments = NativeArguments<Backend, TfType, TfOffset>;

 public:
  using DeformConv2DKernel::DeformConv2DKernel;

 protected:
  absl::Status ComputeStatus(OpKernelContext* context) override {
    DeformConvParams params;
    TF_RETURN_IF_ERROR(ReadShapes(context, &params));
    TensorShape shape;
    TF_RETURN_IF_ERROR(OutputShape(params, &shape));
    Tensor* output;
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &output));
    if (output->NumElements() == 0) return absl::OkStatus();
    Backend backend(context);
    Arguments arguments(context, backend, format());
    TF_RETURN_IF_ERROR(arguments.Attach(context, has_mask()));
    typename Arguments::DataTensor native_output(context, backend, format());
    native_output.Attach(*output);
    const auto forward = [&](int64_t /*begin*/, int64_t count) {
      TF_RETURN_IF_ERROR(arguments.Read());
      params.batch = count;
      TF_RETURN_IF_ERROR(
          backend.Forward(params, arguments.sampled(), arguments.filters(), native_output.data()));
      return native_output.Write();
    };
    return ForEachRange(backend, params.batch, forward, arguments.input(), arguments.offset(),
                        arguments.mask(), native_output);
  }
};

template <typename Backend, typename TfType, typename TfOffset>
class DeformConv2DGradOp : public DeformConv2DKernel {
  using Arguments = NativeArguments<Backend, TfType, TfOffset>;
  using DataTensor = typename Arguments::DataTensor;
  using PositionTensor = typename Arguments::PositionTensor;

 public:
  explicit DeformConv2DGradOp(OpKernelConstruction* context) : DeformConv2DKernel(context) {
    for (int i = 0; i < 4; ++i) {
      OP_REQUIRES_OK(context, context->GetAttr(kWantAttributes[i], &wanted_[i]));
    }
  }

 protected:
  absl::Status ComputeStatus(OpKernelContext* context) override {
    DeformConvParams params;
    TF_RETURN_IF_ERROR(ReadShapes(context, &params));
    const Tensor& grad_output = context->input(context->num_inputs() - 1);
    TensorShape expected;
    TF_RETURN_IF_ERROR(OutputShape(params, &expected));
    if (grad_output.shape() != expected) {
      return absl::InvalidArgumentError(absl::StrCat("grad_output must have the output's shape ",
                                                     expected.DebugString(), "; received ",
                                                     grad_output.shape().DebugString()));
    }

    Backend backend(context);
    DataTensor grad_input(context, backend, format());
    DataTensor grad_filters(context, backend, DataFormat::kNhwc);
    PositionTensor grad_offset(context, backend, format());
    PositionTensor grad_mask(context, backend, format());
    TF_RETURN_IF_ERROR(AllocateGradient(context, 0, &grad_input));
    TF_RETURN_IF_ERROR(AllocateGradient(context, 1, &grad_filters));
    TF_RETURN_IF_ERROR(AllocateGradient(context, 2, &grad_offset));
    if (has_mask()) TF_RETURN_IF_ERROR(AllocateGradient(context, 3, &grad_mask));

    Arguments arguments(context, backend, format());
    TF_RETURN_IF_ERROR(arguments.Attach(context, has_mask()));
    DataTensor native_grad_output(context, backend, format());
    native_grad_output.Attach(grad_output);
    TF_RETURN_IF_ERROR(grad_filters.Allocate(grad_filters.images()));
    const auto backward = [&](int64_t begin, int64_t count) {
      TF_RETURN_IF_ERROR(arguments.Read());
      TF_RETURN_IF_ERROR(native_grad_output.Read());
      const DeformConvGradients<typename Arguments::T, typename Arguments::Position> gradients = {
          {grad_input.data(), grad_offset.data(), grad_mask.data()}, grad_filters.data()};
      params.batch = count;
      TF_RETURN_IF_ERROR(backend.Backward(params, arguments.sampled(), arguments.filters(),
                                          native_grad_output.data(), /*add_filters=*/begin > 0,
                                          gradients));
      TF_RETURN_IF_ERROR(grad_input.Write());
      TF_RETURN_IF_ERROR(grad_offset.Write());
      return grad_mask.Write();
    };
    TF_RETURN_IF_ERROR(ForEachRange(backend, params.batch, backward, arguments.input(),
                                    arguments.offset(), arguments.mask(), native_grad_output,
                                    grad_input, grad_offset, grad_mask));
    return grad_filters.Write();
  }

 private:
  // Allocates the gradient of input `index`: in its shape if it is wanted, else empty.
  template <typename Gradient>
  absl::Status AllocateGradient(OpKernelContext* context, int index, Gradient* gradient) const {
    Tensor* output;
    const TensorShape shape = wanted_[index] ? context->input(index).shape() : TensorShape({0});
    TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &output));
    if (wanted_[index]) gradient->Attach(*output);
    return absl::OkStatus();
  }

  bool wanted_[4];
};

}  // namespace deform_conv

// Registers both ops' kernels on `device` for one pair of types.
#define DEFORM_CONV_REGISTER_PAIR(Backend, device, TfType, TfOffset) \
  REGISTER_KERNEL_BUILDER(Name("DeformConv2D")                       \
                              .Device(device)                        \
                              .TypeConstraint<TfType>("T")           \
                              .TypeConstraint<TfOffset>("Toffset"),  \
                          DeformConv2DOp<Backend, TfType, TfOffset>) \
  REGISTER_KERNEL_BUILDER(Name("DeformConv2DGrad")                   \
                              .Device(device)                        \
                              .TypeConstraint<TfType>("T")           \
                              .TypeConstraint<TfOffset>("Toffset"),  \
                          DeformConv2DGradOp<Backend, TfType, TfOffset>)

// For every pair: offset and mask in the input's type, or in float beside a 16-bit one.
#define DEFORM_CONV_REGISTER(Backend, device)                                   \
  DEFORM_CONV_REGISTER_PAIR(Backend, device, float, float);                     \
  DEFORM_CONV_REGISTER_PAIR(Backend, device, double, double);                   \
  DEFORM_CONV_REGISTER_PAIR(Backend, device, Eigen::half, Eigen::half);         \
  DEFORM_CONV_REGISTER_PAIR(Backend, device, Eigen::half, float);               \
  DEFORM_CONV_REGISTER_PAIR(Backend, device, Eigen::bfloat16, Eigen::bfloat16); \
  DEFORM_CONV_REGISTER_PAIR(Backend, device, Eigen::bfloat16, float)

#endif  // DEFORM_CONV_TF_DEFORM_CONV2D_KERNELS_H_
