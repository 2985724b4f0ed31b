// A GPU as TensorFlow drives it: its stream, its settings, and the BLAS that it loaded itself. For
// its own kernels and for XLA.

#ifndef DEFORM_CONV_TF_STREAM_DEVICE_H_
#define DEFORM_CONV_TF_STREAM_DEVICE_H_

#include <stdexcept>
#include <string>

#include "absl/status/status.h"
#include "core/gpu/device.h"
#include "core/matrix.h"
#include "tensorflow/core/kernels/numeric_options_utils.h"
#include "tensorflow/core/util/determinism.h"
#include "tf/kernel_path.h"
#include "tf/tensorflow_versions.h"
#include "tsl/platform/tensor_float_32_utils.h"
#include "xla/stream_executor/blas.h"
#include "xla/stream_executor/stream.h"
#include "xla/stream_executor/stream_executor.h"

namespace deform_conv {

template <typename T, typename Scalar>
absl::Status StreamGemmOf(stream_executor::Stream* stream, GemmForm form, int64_t count,
                          const MatrixBatch<const void>& a, const MatrixBatch<const void>& b,
                          const MatrixBatch<void>& c, bool accumulate) {
  namespace blas = stream_executor::blas;
  blas::BlasSupport* library = stream->parent()->AsBlas();
  if (library == nullptr) return absl::InternalError("TensorFlow has no BLAS here");
  const auto transpose = [form](GemmForm transposing) {
    return form == transposing ? blas::Transpose::kTranspose : blas::Transpose::kNoTranspose;
  };
  const auto address = [count](const auto& batch) {
    const int64_t elements = (count - 1) * batch.distance + batch.first.rows * batch.first.stride;
    return DeviceAddress<T>::MakeFromByteSize(const_cast<void*>(batch.first.data),
                                              elements * sizeof(T));
  };
  auto out = address(c);
  const int64_t k = form == GemmForm::kTransposeA ? a.first.rows : a.first.cols;
  // BLAS is column-major: there, a row-major matrix is its transpose, and c^T = b^T a^T.
  if (count == 1) {
    return library->BlasGemm(
        stream, transpose(GemmForm::kTransposeB), transpose(GemmForm::kTransposeA), c.first.cols,
        c.first.rows, k, static_cast<Scalar>(1.0f), address(b), static_cast<int>(b.first.stride),
        address(a), static_cast<int>(a.first.stride), static_cast<Scalar>(accumulate ? 1.0f : 0.0f),
        &out, static_cast<int>(c.first.stride), tensorflow::GetNumericOptions(),
        blas::CallContext::kNone);
  }
  return library->BlasGemmStridedBatched(
      stream, transpose(GemmForm::kTransposeB), transpose(GemmForm::kTransposeA), c.first.cols,
      c.first.rows, k, static_cast<Scalar>(1.0f), address(b), static_cast<int>(b.first.stride),
      b.distance, address(a), static_cast<int>(a.first.stride), a.distance,
      static_cast<Scalar>(accumulate ? 1.0f : 0.0f), &out, static_cast<int>(c.first.stride),
      c.distance, static_cast<int>(count), tensorflow::GetNumericOptions(),
      blas::CallContext::kNone);
}

// GpuDevice::Gemm() on `stream`. Obeys TensorFlow's settings of TF32 and determinism.
inline absl::Status StreamGemm(stream_executor::Stream* stream, ElementType type, GemmForm form,
                               int64_t count, const MatrixBatch<const void>& a,
                               const MatrixBatch<const void>& b, const MatrixBatch<void>& c,
                               bool accumulate) {
  switch (type) {
    case ElementType::kFloat:
      return StreamGemmOf<float, float>(stream, form, count, a, b, c, accumulate);
    case ElementType::kDouble:
      return StreamGemmOf<double, double>(stream, form, count, a, b, c, accumulate);
    case ElementType::kHalf:
      return StreamGemmOf<Eigen::half, float>(stream, form, count, a, b, c, accumulate);
    case ElementType::kBFloat16:
      return StreamGemmOf<Eigen::bfloat16, Eigen::bfloat16>(stream, form, count, a, b, c,
                                                            accumulate);
  }
  return absl::InternalError("unknown element type");
}

// All of a GpuDevice but its memory.
class StreamDevice : public GpuDevice {
 public:
  explicit StreamDevice(stream_executor::Stream* stream) : stream_(stream) {}

  void* stream() override { return stream_->platform_specific_handle().stream; }

  bool deterministic() const override { return tensorflow::OpDeterminismRequired(); }

  bool allow_tf32() const override { return tsl::tensor_float_32_execution_enabled(); }

  // Throws std::invalid_argument, which the ops and the custom calls catch.
  KernelPath path() const override {
    const auto& path = PathOfEnvironment();
    if (!path.ok()) throw std::invalid_argument(std::string(path.status().message()));
    return *path;
  }

  std::string Gemm(ElementType type, GemmForm form, int64_t count, const MatrixBatch<const void>& a,
                   const MatrixBatch<const void>& b, const MatrixBatch<void>& c,
                   bool accumulate) override {
    const absl::Status status = StreamGemm(stream_, type, form, count, a, b, c, accumulate);
    return status.ok() ? "" : Remember(status);
  }

  // The status that an error of the core means: TensorFlow's own where it was TensorFlow's.
  absl::Status StatusOf(const std::string& error) const {
    if (error.empty()) return absl::OkStatus();
    return status_.ok() ? absl::InternalError(error) : status_;
  }

 protected:
  std::string Remember(const absl::Status& status) {
    status_ = status;
    return std::string(status.message());
  }

 private:
  stream_executor::Stream* stream_;
  absl::Status status_;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_STREAM_DEVICE_H_
