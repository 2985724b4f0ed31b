// The ops' CPU kernels: from TensorFlow's tensors and threads to the core's.

#include <new>
#include <type_traits>

#include "core/cpu_kernels.h"
#include "core/deform_conv2d.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/threadpool.h"
#include "tf/op_attributes.h"

namespace deform_conv {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::thread::ThreadPool;

// TensorFlow's element types as the core names them.
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

ThreadPool* WorkersOf(OpKernelContext* context) {
  return context->device()->tensorflow_cpu_worker_threads()->workers;
}

CpuThreads ThreadsOf(OpKernelContext* context) {
  ThreadPool* workers = WorkersOf(context);
  const auto run = [workers](int count, const std::function<void(int)>& work) {
    const auto one_each = ThreadPool::SchedulingParams::Fixed(/*block_size=*/1);
    workers->ParallelFor(count, one_each, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(static_cast<int>(i));
    });
  };
  return {workers->NumThreads(), run};
}

// A tensor in native form: its own elements where they have that form, or else a converted copy.
template <typename TfType>
class NativeTensor {
 public:
  using Stored = StoredType<TfType>;
  using T = ComputeType<Stored>;

  NativeTensor(OpKernelContext* context, DataFormat format) : context_(context), format_(format) {}

  // Converts `tensor`; it must outlive this object.
  absl::Status Read(const Tensor& tensor) {
    TF_RETURN_IF_ERROR(Prepare(tensor));
    if (IsNative()) return absl::OkStatus();
    ForEachPixelRange([this](int64_t begin, int64_t end) {
      kernels_.to_native(format_, extent_, stored_, begin, end, native_);
    });
    return absl::OkStatus();
  }

  // Makes room for what Write() will convert back into `tensor`, which must outlive this object.
  absl::Status Prepare(const Tensor& tensor) {
    stored_ = reinterpret_cast<Stored*>(const_cast<char*>(tensor.tensor_data().data()));
    extent_ = ExtentOf(tensor.shape());
    if constexpr (std::is_same_v<Stored, T>) {
      if (format_ == DataFormat::kNhwc) native_ = stored_;
    }
    if (IsNative()) return absl::OkStatus();
    TF_RETURN_IF_ERROR(context_->allocate_temp(tensorflow::DataTypeToEnum<T>::value,
                                               TensorShape({extent_.elements()}), &copy_));
    native_ = copy_.flat<T>().data();
    return absl::OkStatus();
  }

  void Write() {
    if (stored_ == nullptr || IsNative()) return;
    ForEachPixelRange([this](int64_t begin, int64_t end) {
      kernels_.from_native(format_, extent_, native_, begin, end, stored_);
    });
  }

  // The elements in native form; null before Read() or Prepare().
  T* data() const { return native_; }

 private:
  bool IsNative() const { return static_cast<const void*>(native_) == stored_; }

  TensorExtent ExtentOf(const TensorShape& shape) const {
    const std::array<int, 4> axes = AxesOf(format_);
    return {shape.dim_size(axes[0]), shape.dim_size(axes[1]) * shape.dim_size(axes[2]),
            shape.dim_size(axes[3])};
  }

  void ForEachPixelRange(const std::function<void(int64_t, int64_t)>& convert) {
    constexpr int64_t kCyclesPerElement = 2;
    WorkersOf(context_)->ParallelFor(
        extent_.batch * extent_.pixels,
        ThreadPool::SchedulingParams::Adaptive(kCyclesPerElement * extent_.channels), convert);
  }

  OpKernelContext* context_;
  DataFormat format_;
  const CpuLayoutKernels<Stored>& kernels_ = SelectCpuLayoutKernels<Stored>();
  TensorExtent extent_{0, 0, 0};
  Stored* stored_ = nullptr;
  T* native_ = nullptr;
  Tensor copy_;
};

std::vector<int64_t> DimensionsOf(const Tensor& tensor) {
  const auto sizes = tensor.shape().dim_sizes();
  return {sizes.begin(), sizes.end()};
}

TensorShape ShapeOf(DataFormat format, const std::array<int64_t, 4>& native) {
  const std::array<int64_t, 4> sizes = FromNativeShape(format, native);
  return TensorShape({sizes[0], sizes[1], sizes[2], sizes[3]});
}

// What the kernels of both ops do alike.
template <typename TfType, typename TfOffset>
class DeformConv2DKernel : public OpKernel {
 public:
  using T = ComputeType<StoredType<TfType>>;
  static_assert(std::is_same_v<T, ComputeType<StoredType<TfOffset>>>);

  explicit DeformConv2DKernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, ReadAttributes(context, &attributes_));
    OP_REQUIRES_OK(context, context->GetAttr("mask_count", &mask_count_));
    OP_REQUIRES(context, mask_count_ <= 1,
                absl::InvalidArgumentError(
                    absl::StrCat("mask must be one tensor or none; received ", mask_count_)));
  }

  void Compute(OpKernelContext* context) override {
    try {
      OP_REQUIRES_OK(context, ComputeStatus(context));
    } catch (const std::bad_alloc&) {
      context->SetStatus(absl::ResourceExhaustedError("out of memory for the op's workspace"));
    }
  }

 protected:
  virtual absl::Status ComputeStatus(OpKernelContext* context) = 0;

  DataFormat format() const { return attributes_.format; }
  bool has_mask() const { return mask_count_ == 1; }

  absl::Status MakeParamsOf(OpKernelContext* context, DeformConvParams* params) const {
    std::vector<int64_t> mask;
    if (has_mask()) mask = DimensionsOf(context->input(3));
    DeformConvShapes shapes;
    TF_RETURN_IF_ERROR(
        ToNativeShapes(format(), DimensionsOf(context->input(0)), DimensionsOf(context->input(1)),
                       DimensionsOf(context->input(2)), has_mask() ? &mask : nullptr, &shapes));
    const std::string error = MakeParams(attributes_.conv, shapes, params);
    return error.empty() ? absl::OkStatus() : absl::InvalidArgumentError(error);
  }

  // The op's arguments in native form.
  struct Arguments {
    Arguments(OpKernelContext* context, DataFormat format)
        : input(context, format),
          filters(context, DataFormat::kNhwc),
          offset(context, format),
          mask(context, format) {}

    SampledTensors<T> sampled() const { return {input.data(), offset.data(), mask.data()}; }

    NativeTensor<TfType> input, filters;
    NativeTensor<TfOffset> offset, mask;
  };

  absl::Status ReadArguments(OpKernelContext* context, Arguments* arguments) const {
    TF_RETURN_IF_ERROR(arguments->input.Read(context->input(0)));
    TF_RETURN_IF_ERROR(arguments->filters.Read(context->input(1)));
    TF_RETURN_IF_ERROR(arguments->offset.Read(context->input(2)));
    return has_mask() ? arguments->mask.Read(context->input(3)) : absl::OkStatus();
  }

 private:
  OpAttributes attributes_;
  int mask_count_;
};

template <typename TfType, typename TfOffset>
class DeformConv2DOp : public DeformConv2DKernel<TfType, TfOffset> {
  using Base = DeformConv2DKernel<TfType, TfOffset>;

 public:
  using Base::Base;

 protected:
  absl::Status ComputeStatus(OpKernelContext* context) override {
    DeformConvParams params;
    TF_RETURN_IF_ERROR(this->MakeParamsOf(context, &params));
    Tensor* output;
    TF_RETURN_IF_ERROR(context->allocate_output(
        0, ShapeOf(this->format(), {params.batch, params.out_h, params.out_w, params.out_channels}),
        &output));
    if (output->NumElements() == 0) return absl::OkStatus();
    typename Base::Arguments arguments(context, this->format());
    TF_RETURN_IF_ERROR(this->ReadArguments(context, &arguments));
    NativeTensor<TfType> native_output(context, this->format());
    TF_RETURN_IF_ERROR(native_output.Prepare(*output));
    DeformConv2DForwardCpu(params, arguments.sampled(), arguments.filters.data(),
                           ThreadsOf(context), native_output.data());
    native_output.Write();
    return absl::OkStatus();
  }
};

template <typename TfType, typename TfOffset>
class DeformConv2DGradOp : public DeformConv2DKernel<TfType, TfOffset> {
  using Base = DeformConv2DKernel<TfType, TfOffset>;

 public:
  explicit DeformConv2DGradOp(OpKernelConstruction* context) : Base(context) {
    constexpr const char* kWanted[] = {"want_grad_input", "want_grad_filters", "want_grad_offset",
                                       "want_grad_mask"};
    for (int i = 0; i < 4; ++i) OP_REQUIRES_OK(context, context->GetAttr(kWanted[i], &wanted_[i]));
  }

 protected:
  absl::Status ComputeStatus(OpKernelContext* context) override {
    DeformConvParams params;
    TF_RETURN_IF_ERROR(this->MakeParamsOf(context, &params));
    const Tensor& grad_output = context->input(context->num_inputs() - 1);
    const TensorShape expected =
        ShapeOf(this->format(), {params.batch, params.out_h, params.out_w, params.out_channels});
    if (grad_output.shape() != expected) {
      return absl::InvalidArgumentError(absl::StrCat("grad_output must have the output's shape ",
                                                     expected.DebugString(), "; received ",
                                                     grad_output.shape().DebugString()));
    }

    const DataFormat format = this->format();
    NativeTensor<TfType> grad_input(context, format), grad_filters(context, DataFormat::kNhwc);
    NativeTensor<TfOffset> grad_offset(context, format), grad_mask(context, format);
    TF_RETURN_IF_ERROR(PrepareGradient(context, 0, &grad_input));
    TF_RETURN_IF_ERROR(PrepareGradient(context, 1, &grad_filters));
    TF_RETURN_IF_ERROR(PrepareGradient(context, 2, &grad_offset));
    if (this->has_mask()) TF_RETURN_IF_ERROR(PrepareGradient(context, 3, &grad_mask));

    typename Base::Arguments arguments(context, format);
    TF_RETURN_IF_ERROR(this->ReadArguments(context, &arguments));
    NativeTensor<TfType> native_grad_output(context, format);
    TF_RETURN_IF_ERROR(native_grad_output.Read(grad_output));
    const DeformConvGradients<typename Base::T> gradients = {
        {grad_input.data(), grad_offset.data(), grad_mask.data()}, grad_filters.data()};
    DeformConv2DBackwardCpu(params, arguments.sampled(), arguments.filters.data(),
                            native_grad_output.data(), ThreadsOf(context), gradients);
    grad_input.Write();
    grad_filters.Write();
    grad_offset.Write();
    grad_mask.Write();
    return absl::OkStatus();
  }

 private:
  // Allocates the gradient of input `index`: in its shape if it is wanted, else empty.
  template <typename TfElement>
  absl::Status PrepareGradient(OpKernelContext* context, int index,
                               NativeTensor<TfElement>* gradient) const {
    Tensor* output;
    const TensorShape shape = wanted_[index] ? context->input(index).shape() : TensorShape({0});
    TF_RETURN_IF_ERROR(context->allocate_output(index, shape, &output));
    return wanted_[index] ? gradient->Prepare(*output) : absl::OkStatus();
  }

  bool wanted_[4];
};

#define DEFORM_CONV_REGISTER(TfType, TfOffset)                      \
  REGISTER_KERNEL_BUILDER(Name("DeformConv2D")                      \
                              .Device(tensorflow::DEVICE_CPU)       \
                              .TypeConstraint<TfType>("T")          \
                              .TypeConstraint<TfOffset>("Toffset"), \
                          DeformConv2DOp<TfType, TfOffset>)         \
  REGISTER_KERNEL_BUILDER(Name("DeformConv2DGrad")                  \
                              .Device(tensorflow::DEVICE_CPU)       \
                              .TypeConstraint<TfType>("T")          \
                              .TypeConstraint<TfOffset>("Toffset"), \
                          DeformConv2DGradOp<TfType, TfOffset>)

DEFORM_CONV_REGISTER(float, float);
DEFORM_CONV_REGISTER(double, double);
DEFORM_CONV_REGISTER(Eigen::half, Eigen::half);
DEFORM_CONV_REGISTER(Eigen::half, float);
DEFORM_CONV_REGISTER(Eigen::bfloat16, Eigen::bfloat16);
DEFORM_CONV_REGISTER(Eigen::bfloat16, float);
#undef DEFORM_CONV_REGISTER

}  // namespace
}  // namespace deform_conv
