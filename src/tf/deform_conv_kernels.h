// What the ops' kernels do on every device: from TensorFlow's tensors to the core's and back. The
// device's part is a Backend:
//
//   class Backend {
//     explicit Backend(OpKernelContext* context);
//
//     // What input, filters and output of type T are computed in.
//     template <typename T> using NativeType = ...;
//
//     // Bytes that copies in native form may take, unless those of one image take more.
//     int64_t copy_bytes() const;
//
//     template <typename T, typename NativeT>
//     absl::Status ToNative(DataFormat, const TensorExtent&, const T* from, NativeT* to);
//
//     template <typename T, typename NativeT>
//     absl::Status FromNative(DataFormat, const TensorExtent&, const NativeT* from, T* to);
//
//     // Both for DeformConvParams and for DeformConv3DParams.
//     template <typename T>
//     absl::Status Forward(const Params&, const SampledTensors<T, ComputeType<T>>&,
//                          const T* filters, T* output);
//
//     // With `add_filters`, adds to the filters' gradient instead of writing it.
//     template <typename T>
//     absl::Status Backward(const Params&, const SampledTensors<T, ComputeType<T>>&,
//                           const T* filters, const T* grad_output, bool add_filters,
//                           const DeformConvGradients<T, ComputeType<T>>&);
//   };
//
// Offset and mask are always computed in ComputeType: float, or double beside double.

#ifndef DEFORM_CONV_TF_DEFORM_CONV_KERNELS_H_
#define DEFORM_CONV_TF_DEFORM_CONV_KERNELS_H_

#include <cstddef>
#include <type_traits>
#include <vector>

#include "core/deform_conv2d.h"
#include "core/deform_conv3d.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/exception_to_status.h"
#include "tf/native_tensor.h"
#include "tf/op_attributes.h"
#include "tf/type_pairs.h"

namespace deform_conv {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// What the kernels of all ops over so many spatial axes do alike, whatever the types.
template <std::size_t axes>
class DeformConvKernel : public OpKernel {
 public:
  explicit DeformConvKernel(OpKernelConstruction* context) : OpKernel(context) {
    const Operation operation = OperationOf(context->def().op());
    OP_REQUIRES_OK(context, ReadAttributes(context, operation, &attributes_));
  }

  void Compute(OpKernelContext* context) override {
    const auto compute = [&]() -> absl::Status {
      const auto dimensions = [context](int index) { return Dimensions(context, index); };
      ParamsOf<axes> params;
      TF_RETURN_IF_ERROR(MakeParamsOf(attributes_, dimensions, &params));
      return ComputeStatus(context, params);
    };
    OP_REQUIRES_OK(context, ExceptionToStatus(compute));
  }

 protected:
  virtual absl::Status ComputeStatus(OpKernelContext* context, ParamsOf<axes> params) = 0;

  const OpAttributes<axes>& attributes() const { return attributes_; }
  DataFormat format() const { return attributes_.format; }

  static std::vector<int64_t> Dimensions(OpKernelContext* context, int index) {
    const auto sizes = context->input(index).shape().dim_sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
  }

 private:
  OpAttributes<axes> attributes_;
};

// The ops' arguments in native form. What an op does not have is null.
template <typename Backend, typename T, typename OffsetT>
class NativeArguments {
 public:
  using NativeT = typename Backend::template NativeType<T>;
  static_assert(std::is_same_v<ComputeType<T>, ComputeType<OffsetT>>);
  using DataTensor = NativeTensor<Backend, T, NativeT>;
  using OffsetTensor = NativeTensor<Backend, OffsetT, ComputeType<T>>;

  NativeArguments(OpKernelContext* context, Backend& backend, DataFormat format)
      : input_(context, backend, format),
        filters_(context, backend, DataFormat::kNhwc),
        offset_(context, backend, format),
        mask_(context, backend, format) {}

  // Attaches the op's inputs, and reads the filters.
  absl::Status Attach(OpKernelContext* context, const OpArguments& arguments) {
    const auto attach = [&](int argument, auto& tensor) {
      if (arguments.Has(argument)) tensor.Attach(context->input(arguments.IndexOf(argument)));
    };
    attach(kInput, input_);
    attach(kFilters, filters_);
    attach(kOffset, offset_);
    attach(kMask, mask_);
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
  OffsetTensor& offset() { return offset_; }
  OffsetTensor& mask() { return mask_; }

  SampledTensors<NativeT, ComputeType<T>> sampled() const {
    return {input_.data(), offset_.data(), mask_.data()};
  }
  const NativeT* filters() const { return filters_.data(); }

 private:
  DataTensor input_, filters_;
  OffsetTensor offset_, mask_;
};

template <std::size_t axes, typename Backend, typename T, typename OffsetT>
class DeformConvOp : public DeformConvKernel<axes> {
  using Kernel = DeformConvKernel<axes>;
  using Kernel::attributes, Kernel::format;
  using Arguments = NativeArguments<Backend, T, OffsetT>;

 public:
  using Kernel::Kernel;

 protected:
  absl::Status ComputeStatus(OpKernelContext* context, ParamsOf<axes> params) override {
    TensorShape shape;
    TF_RETURN_IF_ERROR(
        TensorShape::BuildTensorShape(OutputShapeOf<axes>(format(), params), &shape));
    Tensor* output;
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &output));
    if (output->NumElements() == 0) return absl::OkStatus();
    Backend backend(context);
    Arguments arguments(context, backend, format());
    TF_RETURN_IF_ERROR(arguments.Attach(context, attributes()));
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

template <std::size_t axes, typename Backend, typename T, typename OffsetT>
class DeformConvGradOp : public DeformConvKernel<axes> {
  using Kernel = DeformConvKernel<axes>;
  using Kernel::attributes, Kernel::format;
  using Arguments = NativeArguments<Backend, T, OffsetT>;
  using DataTensor = typename Arguments::DataTensor;
  using OffsetTensor = typename Arguments::OffsetTensor;

 public:
  explicit DeformConvGradOp(OpKernelConstruction* context) : Kernel(context) {
    OP_REQUIRES_OK(context, ReadWanted(context, attributes(), wanted_));
  }

 protected:
  absl::Status ComputeStatus(OpKernelContext* context, ParamsOf<axes> params) override {
    const int grad_output_index = context->num_inputs() - 1;
    const Tensor& grad_output = context->input(grad_output_index);
    TF_RETURN_IF_ERROR(
        CheckGradOutput<axes>(format(), params, Kernel::Dimensions(context, grad_output_index)));

    Backend backend(context);
    DataTensor grad_input(context, backend, format());
    DataTensor grad_filters(context, backend, DataFormat::kNhwc);
    OffsetTensor grad_offset(context, backend, format());
    OffsetTensor grad_mask(context, backend, format());
    TF_RETURN_IF_ERROR(AllocateGradient(context, kInput, &grad_input));
    TF_RETURN_IF_ERROR(AllocateGradient(context, kFilters, &grad_filters));
    TF_RETURN_IF_ERROR(AllocateGradient(context, kOffset, &grad_offset));
    TF_RETURN_IF_ERROR(AllocateGradient(context, kMask, &grad_mask));

    Arguments arguments(context, backend, format());
    TF_RETURN_IF_ERROR(arguments.Attach(context, attributes()));
    DataTensor native_grad_output(context, backend, format());
    native_grad_output.Attach(grad_output);
    TF_RETURN_IF_ERROR(grad_filters.Allocate(grad_filters.images()));
    const auto backward = [&](int64_t begin, int64_t count) {
      TF_RETURN_IF_ERROR(arguments.Read());
      TF_RETURN_IF_ERROR(native_grad_output.Read());
      const DeformConvGradients<typename Arguments::NativeT, ComputeType<T>> gradients = {
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
  // Allocates the gradient of `argument`, if the op has it: in its shape if it is wanted, else
  // empty.
  template <typename Gradient>
  absl::Status AllocateGradient(OpKernelContext* context, int argument, Gradient* gradient) const {
    if (!attributes().Has(argument)) return absl::OkStatus();
    const int index = attributes().IndexOf(argument);
    const bool wanted = wanted_[argument];
    Tensor* output;
    const TensorShape shape = wanted ? context->input(index).shape() : TensorShape({0});
    TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &output));
    if (wanted) gradient->Attach(*output);
    return absl::OkStatus();
  }

  bool wanted_[kArguments];
};

}  // namespace deform_conv

// Registers all ops' kernels on `device` for one pair of TensorFlow's types.
#define DEFORM_CONV_REGISTER_OP(name, Op, axes, TfT, TfOffsetT, Backend, device) \
  REGISTER_KERNEL_BUILDER(DEFORM_CONV_KERNEL_OF(TfT, TfOffsetT, device, name),   \
                          Op<axes, Backend, CoreType<TfT>, CoreType<TfOffsetT>>)
#define DEFORM_CONV_REGISTER_PAIR(...)                                                \
  DEFORM_CONV_REGISTER_OP("DeformConv2D", DeformConvOp, 2, __VA_ARGS__);              \
  DEFORM_CONV_REGISTER_OP("DeformConv2DGrad", DeformConvGradOp, 2, __VA_ARGS__);      \
  DEFORM_CONV_REGISTER_OP("DeformAggregate2D", DeformConvOp, 2, __VA_ARGS__);         \
  DEFORM_CONV_REGISTER_OP("DeformAggregate2DGrad", DeformConvGradOp, 2, __VA_ARGS__); \
  DEFORM_CONV_REGISTER_OP("DeformConv3D", DeformConvOp, 3, __VA_ARGS__);              \
  DEFORM_CONV_REGISTER_OP("DeformConv3DGrad", DeformConvGradOp, 3, __VA_ARGS__)

#define DEFORM_CONV_REGISTER(Backend, device) \
  DEFORM_CONV_FOR_TYPE_PAIRS(DEFORM_CONV_REGISTER_PAIR, Backend, device)

#endif  // DEFORM_CONV_TF_DEFORM_CONV_KERNELS_H_
