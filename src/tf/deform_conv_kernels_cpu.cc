// The ops' kernels on the CPU.

#include <algorithm>
#include <functional>

#include "core/cpu/kernels.h"
#include "core/cpu/shared_work.h"
#include "core/cpu/threads.h"
#include "tensorflow/core/platform/threadpool.h"
#include "tf/deform_conv_kernels.h"

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

  template <typename T>
  absl::Status Forward(const DeformConv3DParams& params, const SampledTensors<T>& tensors,
                       const T* filters, T* output) {
    DeformConv3DForwardCpu(params, tensors, filters, Threads(), output);
    return absl::OkStatus();
  }

  template <typename T>
  absl::Status Backward(const DeformConv3DParams& params, const SampledTensors<T>& tensors,
                        const T* filters, const T* grad_output, bool add_filters,
                        const DeformConvGradients<T>& gradients) {
    DeformConv3DBackwardCpu(params, tensors, filters, grad_output, Threads(), add_filters,
                            gradients);
    return absl::OkStatus();
  }

 private:
  CpuThreads Threads() const { return ThreadsOf(workers_, workers_->NumThreads()); }

  // Calls convert(begin, end) for parts of the tensor's pixels, side by side where they are worth
  // it.
  void ForEachPixelRange(const TensorExtent& extent,
                         const std::function<void(int64_t, int64_t)>& convert) const {
    constexpr int64_t kElementsOfPart = 1 << 13;
    const CpuThreads threads = Threads();
    const int64_t pixels = extent.batch * extent.pixels;
    const int64_t parts =
        std::clamp<int64_t>(extent.elements() / kElementsOfPart, 1, threads.count);
    if (parts == 1) return convert(0, pixels);
    threads.run(static_cast<int>(parts), [&](int i) {
      convert(PartBegin(pixels, i, parts), PartBegin(pixels, i + 1, parts));
    });
  }

  tensorflow::thread::ThreadPool* workers_;
};

DEFORM_CONV_REGISTER(CpuBackend, tensorflow::DEVICE_CPU);

}  // namespace
}  // namespace deform_conv
