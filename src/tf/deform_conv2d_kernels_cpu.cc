// The ops' kernels on the CPU.

#include <functional>

#include "core/cpu/kernels.h"
#include "tf/deform_conv2d_kernels.h"
#include "tf/tensorflow_versions.h"

namespace deform_conv {
namespace {

// On TensorFlow's own threads. 16-bit tensors are converted to float.
class CpuBackend {
 public:
  template <typename T>
  using NativeType = ComputeType<T>;

  explicit CpuBackend(OpKernelContext* context)
      : workers_(context->device()->tensorflow_cpu_worker_threads()->workers) {}

  // What copies in native form may take: more than the tensors in cache, little beside the batch.
  int64_t copy_bytes() const { return (int64_t{8} << 20) * workers_->NumThreads(); }

  template <typename T, typename NativeT>
  absl::Status ToNative(DataFormat format, const TensorExtent& extent, const T* from, NativeT* to) {
    const auto& kernels = SelectCpuLayoutKernels<T>();
    ForEachPixelRange(extent, [&](int64_t begin, int64_t end) {
      kernels.to_native(format, extent, from, begin, end, to);
    });
    return absl::OkStatus();
  }

  template <typename T, typename NativeT>
  absl::Status FromNative(DataFormat format, const TensorExtent& extent, const NativeT* from,
                          T* to) {
    const auto& kernels = SelectCpuLayoutKernels<T>();
    ForEachPixelRange(extent, [&](int64_t begin, int64_t end) {
      kernels.from_native(format, extent, from, begin, end, to);
    });
    return absl::OkStatus();
  }

  template <typename T>
  absl::Status Forward(const DeformConvParams& params, const SampledTensors<T>& tensors,
                       const T* filters, T* output) {
    DeformConv2DForwardCpu(params, tensors, filters, Threads(), output);
    return absl::OkStatus();
  }

  template <typename T>
  absl::Status Backward(const DeformConvParams& params, const SampledTensors<T>& tensors,
                        const T* filters, const T* grad_output, bool add_filters,
                        const DeformConvGradients<T>& gradients) {
    DeformConv2DBackwardCpu(params, tensors, filters, grad_output, Threads(), add_filters,
                            gradients);
    return absl::OkStatus();
  }

 private:
  CpuThreads Threads() const {
    const auto run = [workers = workers_](int count, const std::function<void(int)>& work) {
      workers->ParallelFor(count, BlocksOf(1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) work(static_cast<int>(i));
      });
    };
    return {workers_->NumThreads(), run};
  }

  void ForEachPixelRange(const TensorExtent& extent,
                         const std::function<void(int64_t, int64_t)>& convert) {
    constexpr int64_t kCyclesPerElement = 2;
    workers_->ParallelFor(extent.batch * extent.pixels, ByCost(kCyclesPerElement * extent.channels),
                          convert);
  }

  ThreadPool* workers_;
};

DEFORM_CONV_REGISTER(CpuBackend, tensorflow::DEVICE_CPU);

}  // namespace
}  // namespace deform_conv
