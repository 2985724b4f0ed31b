// The ops' kernels on a GPU: on the stream, the memory and the BLAS that TensorFlow uses itself.
// Compiled without CUDA's headers, which would be another version than TensorFlow's.

#include <limits>
#include <utility>
#include <vector>

#include "core/cuda/general/kernels.h"
#include "tf/deform_conv_kernels.h"
#include "tf/stream_device.h"

namespace deform_conv {
namespace {

class TensorFlowDevice : public StreamDevice {
 public:
  explicit TensorFlowDevice(OpKernelContext* context)
      : StreamDevice(context->op_device_context()->stream()), context_(context) {}

  std::string Allocate(int64_t bytes, void** memory) override {
    Tensor buffer;
    const absl::Status status =
        context_->allocate_temp(tensorflow::DT_INT8, TensorShape({bytes}), &buffer);
    if (!status.ok()) return Remember(status);
    *memory = const_cast<char*>(buffer.tensor_data().data());
    buffers_.push_back(std::move(buffer));
    return "";
  }

 private:
  OpKernelContext* context_;
  std::vector<Tensor> buffers_;  // the allocator reuses memory in the stream's order
};

class CudaBackend {
 public:
  template <typename T>
  using NativeType = T;

  explicit CudaBackend(OpKernelContext* context) : device_(context) {}

  // A GPU is kept busy by whole batches only.
  int64_t copy_bytes() const { return std::numeric_limits<int64_t>::max(); }

  template <typename T, typename NativeT>
  absl::Status ToNative(DataFormat format, const TensorExtent& extent, const T* from, NativeT* to) {
    return device_.StatusOf(cuda::ToNative(format, extent, from, to, device_.stream()));
  }

  template <typename T, typename NativeT>
  absl::Status FromNative(DataFormat format, const TensorExtent& extent, const NativeT* from,
                          T* to) {
    return device_.StatusOf(cuda::FromNative(format, extent, from, to, device_.stream()));
  }

  template <typename T>
  absl::Status Forward(const DeformConvParams& params,
                       const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                       T* output) {
    return device_.StatusOf(DeformConv2DForwardGpu<T>(params, tensors, filters, device_, output));
  }

  template <typename T>
  absl::Status Backward(const DeformConvParams& params,
                        const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                        const T* grad_output, bool /*add_filters*/,  // batches come whole
                        const DeformConvGradients<T, ComputeType<T>>& gradients) {
    return device_.StatusOf(
        DeformConv2DBackwardGpu<T>(params, tensors, filters, grad_output, device_, gradients));
  }

  template <typename T>
  absl::Status Forward(const DeformConv3DParams& params,
                       const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                       T* output) {
    return device_.StatusOf(DeformConv3DForwardGpu<T>(params, tensors, filters, device_, output));
  }

  template <typename T>
  absl::Status Backward(const DeformConv3DParams& params,
                        const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                        const T* grad_output, bool /*add_filters*/,
                        const DeformConvGradients<T, ComputeType<T>>& gradients) {
    return device_.StatusOf(
        DeformConv3DBackwardGpu<T>(params, tensors, filters, grad_output, device_, gradients));
  }

 private:
  TensorFlowDevice device_;
};

DEFORM_CONV_REGISTER(CudaBackend, tensorflow::DEVICE_GPU);

}  // namespace
}  // namespace deform_conv
