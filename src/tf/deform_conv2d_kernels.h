// What the ops' kernels do on every device: from TensorFlow's tensors to the core's and back. The
// device's part is a Backend:
//
//   class Backend {
//     explicit Backend(OpKernelContext* context);
//     template <typename Stored> using Native = ...;   // what input, filters, output are computed
//     in template <typename Stored, typename T> absl::Status ToNative(DataFormat, const
//     TensorExtent&, const Stored* from, T* to); template <typename Stored, typename T>
//     absl::Status FromNative(DataFormat, const TensorExtent&, const T* from, Stored* to);
//     template <typename T, typename Position>
//     absl::Status Forward(const DeformConvParams&, const SampledTensors<T, Position>&,
//                          const T* filters, T* output);
//     template <typename T, typename Position>
//     absl::Status Backward(const DeformConvParams&, const SampledTensors<T, Position>&,
//                           const T* filters, const T* grad_output,
//                           const DeformConvGradients<T, Position>&);
//   };
//
// Offset and mask are always computed in ComputeType: float, or double beside double.

#ifndef DEFORM_CONV_TF_DEFORM_CONV2D_KERNELS_H_
#define DEFORM_CONV_TF_DEFORM_CONV2D_KERNELS_H_

#include <exception>
#include <new>
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

// A tensor in the form that the core computes on, NHWC in type T: the tensor's own elements where
// they have that form, or else a converted copy.
template <typename Backend, typename Stored, typename T>
class NativeTensor {
 public:
  NativeTensor(OpKernelContext* context, Backend& backend, DataFormat format)
      : context_(context), backend_(backend), format_(format) {}

  // Converts `tensor`, which must outlive this object.
  absl::Status Read(const Tensor& tensor) {
    TF_RETURN_IF_ERROR(Prepare(tensor));
    if (IsNative()) return absl::OkStatus();
    return backend_.ToNative(format_, extent_, stored_, native_);
  }

  // Makes room for what Write() will convert back into `tensor`, which must outlive this object.
  absl::Status Prepare(const Tensor& tensor) {
    stored_ = reinterpret_cast<Stored*>(const_cast<char*>(tensor.tensor_data().data()));
    const std::array<int, 4> axes = AxesOf(format_);
    extent_ = {tensor.dim_size(axes[0]), tensor.dim_size(axes[1]) * tensor.dim_size(axes[2]),
               tensor.dim_size(axes[3])};
    if constexpr (std::is_same_v<Stored, T>) {
      if (format_ == DataFormat::kNhwc) native_ = stored_;
    }
    if (IsNative()) return absl::OkStatus();
    const int64_t bytes = extent_.elements() * sizeof(T);
    TF_RETURN_IF_ERROR(context_->allocate_temp(tensorflow::DT_INT8, TensorShape({bytes}), &copy_));
    native_ = reinterpret_cast<T*>(const_cast<char*>(copy_.tensor_data().data()));
    return absl::OkStatus();
  }

  // Does nothing before Prepare().
  absl::Status Write() {
    if (stored_ == nullptr || IsNative()) return absl::OkStatus();
    return backend_.FromNative(format_, extent_, native_, stored_);
  }

  // The elements in native form; null before Read() or Prepare().
  T* data() const { return native_; }

 private:
  bool IsNative() const { return static_cast<const void*>(native_) == stored_; }

  OpKernelContext* context_;
  Backend& backend_;
  DataFormat format_;
  TensorExtent extent_{0, 0, 0};
  Stored* stored_ = nullptr;
  T* native_ = nullptr;
  Tensor copy_;
};

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
    } catch (const std::exception& error) {
      context->SetStatus(absl::InternalError(error.what()));
    }
  }

 protected:
  virtual absl::Status ComputeStatus(OpKernelContext* context) = 0;

  DataFormat format() const { return attributes_.format; }
  bool has_mask() const { return attributes_.has_mask; }

  absl::Status MakeParamsOf(OpKernelContext* context, DeformConvParams* params) const {
    const auto dimensions = [context](int index) {
      const auto sizes = context->input(index).shape().dim_sizes();
      return std::vector<int64_t>(sizes.begin(), sizes.end());
    };
    std::vector<int64_t> mask;
    if (has_mask()) mask = dimensions(3);
    DeformConvShapes shapes;
    TF_RETURN_IF_ERROR(ToNativeShapes(format(), dimensions(0), dimensions(1), dimensions(2),
                                      has_mask() ? &mask : nullptr, &shapes));
    const std::string error = MakeParams(attributes_.conv, shapes, params);
    return error.empty() ? absl::OkStatus() : absl::InvalidArgumentError(error);
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

  absl::Status Read(OpKernelContext* context, bool has_mask) {
    TF_RETURN_IF_ERROR(input_.Read(context->input(0)));
    TF_RETURN_IF_ERROR(filters_.Read(context->input(1)));
    TF_RETURN_IF_ERROR(offset_.Read(context->input(2)));
    return has_mask ? mask_.Read(context->input(3)) : absl::OkStatus();
  }

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
    TF_RETURN_IF_ERROR(MakeParamsOf(context, &params));
    TensorShape shape;
    TF_RETURN_IF_ERROR(OutputShape(params, &shape));
    Tensor* output;
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &output));
    if (output->NumElements() == 0) return absl::OkStatus();
    Backend backend(context);
    Arguments arguments(context, backend, format());
    TF_RETURN_IF_ERROR(arguments.Read(context, has_mask()));
    typename Arguments::DataTensor native_output(context, backend, format());
    TF_RETURN_IF_ERROR(native_output.Prepare(*output));
    TF_RETURN_IF_ERROR(
        backend.Forward(params, arguments.sampled(), arguments.filters(), native_output.data()));
    return native_output.Write();
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
    TF_RETURN_IF_ERROR(MakeParamsOf(context, &params));
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
    TF_RETURN_IF_ERROR(PrepareGradient(context, 0, &grad_input));
    TF_RETURN_IF_ERROR(PrepareGradient(context, 1, &grad_filters));
    TF_RETURN_IF_ERROR(PrepareGradient(context, 2, &grad_offset));
    if (has_mask()) TF_RETURN_IF_ERROR(PrepareGradient(context, 3, &grad_mask));

    Arguments arguments(context, backend, format());
    TF_RETURN_IF_ERROR(arguments.Read(context, has_mask()));
    DataTensor native_grad_output(context, backend, format());
    TF_RETURN_IF_ERROR(native_grad_output.Read(grad_output));
    const DeformConvGradients<typename Arguments::T, typename Arguments::Position> gradients = {
        {grad_input.data(), grad_offset.data(), grad_mask.data()}, grad_filters.data()};
    TF_RETURN_IF_ERROR(backend.Backward(params, arguments.sampled(), arguments.filters(),
                                        native_grad_output.data(), gradients));
    TF_RETURN_IF_ERROR(grad_input.Write());
    TF_RETURN_IF_ERROR(grad_filters.Write());
    TF_RETURN_IF_ERROR(grad_offset.Write());
    return grad_mask.Write();
  }

 private:
  // Allocates the gradient of input `index`: in its shape if it is wanted, else empty.
  template <typename Gradient>
  absl::Status PrepareGradient(OpKernelContext* context, int index, Gradient* gradient) const {
    Tensor* output;
    const TensorShape shape = wanted_[index] ? context->input(index).shape() : TensorShape({0});
    TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &output));
    return wanted_[index] ? gradient->Prepare(*output) : absl::OkStatus();
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
