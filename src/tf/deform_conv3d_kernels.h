// What the kernels of the ops over three axes do on every device: as tf/deform_conv2d_kernels.h,
// with the same Backends, which have Forward() and Backward() for DeformConv3DParams too.

#ifndef DEFORM_CONV_TF_DEFORM_CONV3D_KERNELS_H_
#define DEFORM_CONV_TF_DEFORM_CONV3D_KERNELS_H_

#include <type_traits>
#include <vector>

#include "core/deform_conv3d.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tf/exception_to_status.h"
#include "tf/native_tensor.h"
#include "tf/op_attributes3d.h"
#include "tf/type_pairs.h"

namespace deform_conv {

// What the kernels of both ops do alike.
template <typename Backend, typename T, typename OffsetT>
class DeformConv3DKernel : public tensorflow::OpKernel {
 public:
  explicit DeformConv3DKernel(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &attributes_));
  }

  void Compute(tensorflow::OpKernelContext* context) final {
    OP_REQUIRES_OK(
        context, ExceptionToStatus([&]() -> absl::Status {
          DeformConv3DParams params;
          TF_RETURN_IF_ERROR(MakeParamsOf(
              attributes_, [&](int index) { return Dimensions(context, index); }, &params));
          return ComputeStatus(context, params);
        }));
  }

 protected:
  using NativeT = typename Backend::template NativeType<T>;
  static_assert(std::is_same_v<ComputeType<T>, ComputeType<OffsetT>>);
  using DataTensor = NativeTensor<Backend, T, NativeT>;
  using OffsetTensor = NativeTensor<Backend, OffsetT, ComputeType<T>>;

  // The ops' arguments in native form.
  struct Arguments {
    Arguments(tensorflow::OpKernelContext* context, Backend& backend, DataFormat format)
        : input(context, backend, format),
          filters(context, backend, DataFormat::kNhwc),
          offset(context, backend, format),
          mask(context, backend, format) {}

    // Attaches the op's inputs, and reads the filters.
    absl::Status Attach(tensorflow::OpKernelContext* context, bool has_mask) {
      input.Attach(context->input(kInput));
      filters.Attach(context->input(kFilters));
      offset.Attach(context->input(kOffset));
      if (has_mask) mask.Attach(context->input(kMask));
      TF_RETURN_IF_ERROR(filters.Allocate(filters.images()));
      return filters.Read();
    }

    // Reads the volumes that input, offset and mask were moved to.
    absl::Status Read() {
      TF_RETURN_IF_ERROR(input.Read());
      TF_RETURN_IF_ERROR(offset.Read());
      return mask.Read();
    }

    SampledTensors<NativeT, ComputeType<T>> sampled() const {
      return {input.data(), offset.data(), mask.data()};
    }

    DataTensor input, filters;
    OffsetTensor offset, mask;
  };

  virtual absl::Status ComputeStatus(tensorflow::OpKernelContext* context,
                                     DeformConv3DParams params) = 0;

  DataFormat format() const { return attributes_.format; }
  bool has_mask() const { return attributes_.has_mask; }

  static std::vector<int64_t> Dimensions(tensorflow::OpKernelContext* context, int index) {
    const auto sizes = context->input(index).shape().dim_sizes();
    return std::vector<int64_t>(sizes.begin(), sizes.end());
  }

 private:
  OpAttributes3D attributes_;
};

template <typename Backend, typename T, typename OffsetT>
class DeformConv3DOp : public DeformConv3DKernel<Backend, T, OffsetT> {
  using Kernel = DeformConv3DKernel<Backend, T, OffsetT>;

 public:
  using Kernel::Kernel;

 protected:
  absl::Status ComputeStatus(tensorflow::OpKernelContext* context,
                             DeformConv3DParams params) override {
    tensorflow::TensorShape shape;
    TF_RETURN_IF_ERROR(
        tensorflow::TensorShape::BuildTensorShape(OutputShapeOf(this->format(), params), &shape));
    tensorflow::Tensor* output;
    TF_RETURN_IF_ERROR(context->allocate_output(0, shape, &output));
    if (output->NumElements() == 0) return absl::OkStatus();
    Backend backend(context);
    typename Kernel::Arguments arguments(context, backend, this->format());
    TF_RETURN_IF_ERROR(arguments.Attach(context, this->has_mask()));
    typename Kernel::DataTensor native_output(context, backend, this->format());
    native_output.Attach(*output);
    const auto forward = [&](int64_t /*begin*/, int64_t count) {
      TF_RETURN_IF_ERROR(arguments.Read());
      params.batch = count;
      TF_RETURN_IF_ERROR(backend.Forward(params, arguments.sampled(), arguments.filters.data(),
                                         native_output.data()));
      return native_output.Write();
    };
    return ForEachRange(backend, params.batch, forward, arguments.input, arguments.offset,
                        arguments.mask, native_output);
  }
};

template <typename Backend, typename T, typename OffsetT>
class DeformConv3DGradOp : public DeformConv3DKernel<Backend, T, OffsetT> {
  using Kernel = DeformConv3DKernel<Backend, T, OffsetT>;

 public:
  explicit DeformConv3DGradOp(tensorflow::OpKernelConstruction* context) : Kernel(context) {
    for (int i = 0; i < kArguments; ++i) {
      OP_REQUIRES_OK(context, context->GetAttr(kWantAttributes3D[i], &wanted_[i]));
    }
  }

 protected:
  absl::Status ComputeStatus(tensorflow::OpKernelContext* context,
                             DeformConv3DParams params) override {
    const DataFormat format = this->format();
    const int grad_output_index = context->num_inputs() - 1;
    TF_RETURN_IF_ERROR(
        CheckGradOutput(format, params, this->Dimensions(context, grad_output_index)));

    Backend backend(context);
    typename Kernel::DataTensor grad_input(context, backend, format);
    typename Kernel::DataTensor grad_filters(context, backend, DataFormat::kNhwc);
    typename Kernel::OffsetTensor grad_offset(context, backend, format);
    typename Kernel::OffsetTensor grad_mask(context, backend, format);
    TF_RETURN_IF_ERROR(AllocateGradient(context, kInput, &grad_input));
    TF_RETURN_IF_ERROR(AllocateGradient(context, kFilters, &grad_filters));
    TF_RETURN_IF_ERROR(AllocateGradient(context, kOffset, &grad_offset));
    if (this->has_mask()) TF_RETURN_IF_ERROR(AllocateGradient(context, kMask, &grad_mask));

    typename Kernel::Arguments arguments(context, backend, format);
    TF_RETURN_IF_ERROR(arguments.Attach(context, this->has_mask()));
    typename Kernel::DataTensor grad_output(context, backend, format);
    grad_output.Attach(context->input(grad_output_index));
    TF_RETURN_IF_ERROR(grad_filters.Allocate(grad_filters.images()));
    const auto backward = [&](int64_t begin, int64_t count) {
      TF_RETURN_IF_ERROR(arguments.Read());
      TF_RETURN_IF_ERROR(grad_output.Read());
      const DeformConvGradients<typename Kernel::NativeT, ComputeType<T>> gradients = {
          {grad_input.data(), grad_offset.data(), grad_mask.data()}, grad_filters.data()};
      params.batch = count;
      TF_RETURN_IF_ERROR(backend.Backward(params, arguments.sampled(), arguments.filters.data(),
                                          grad_output.data(), /*add_filters=*/begin > 0,
                                          gradients));
      TF_RETURN_IF_ERROR(grad_input.Write());
      TF_RETURN_IF_ERROR(grad_offset.Write());
      return grad_mask.Write();
    };
    TF_RETURN_IF_ERROR(ForEachRange(backend, params.batch, backward, arguments.input,
                                    arguments.offset, arguments.mask, grad_output, grad_input,
                                    grad_offset, grad_mask));
    return grad_filters.Write();
  }

 private:
  // Allocates the gradient of argument `index`: in its shape if it is wanted, else empty.
  template <typename Gradient>
  absl::Status AllocateGradient(tensorflow::OpKernelContext* context, int index,
                                Gradient* gradient) const {
    tensorflow::Tensor* output;
    const tensorflow::TensorShape shape =
        wanted_[index] ? context->input(index).shape() : tensorflow::TensorShape({0});
    TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &output));
    if (wanted_[index]) gradient->Attach(*output);
    return absl::OkStatus();
  }

  bool wanted_[kArguments];
};

}  // namespace deform_conv

// Registers both ops' kernels on `device` for one pair of TensorFlow's types.
#define DEFORM_CONV_REGISTER_PAIR_3D(TfT, TfOffsetT, Backend, device)                        \
  REGISTER_KERNEL_BUILDER(DEFORM_CONV_KERNEL_OF(TfT, TfOffsetT, device, "DeformConv3D"),     \
                          DeformConv3DOp<Backend, CoreType<TfT>, CoreType<TfOffsetT>>);      \
  REGISTER_KERNEL_BUILDER(DEFORM_CONV_KERNEL_OF(TfT, TfOffsetT, device, "DeformConv3DGrad"), \
                          DeformConv3DGradOp<Backend, CoreType<TfT>, CoreType<TfOffsetT>>)

#define DEFORM_CONV_REGISTER_3D(Backend, device) \
  DEFORM_CONV_FOR_TYPE_PAIRS(DEFORM_CONV_REGISTER_PAIR_3D, Backend, device)

#endif  // DEFORM_CONV_TF_DEFORM_CONV3D_KERNELS_H_
