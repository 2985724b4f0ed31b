// A GPU as TensorFlow drives it: its stream, its settings, and the BLAS that it loaded itself. For
// its own kernels and for XLA.

#ifndef DEFORM_CONV_TF_STREAM_DEVICE_H_
#define DEFORM_CONV_TF_STREAM_DEVICE_H_

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "absl/status/status.h"
#include "core/cuda_device.h"
#include "tensorflow/core/kernels/numeric_options_utils.h"
#include "tensorflow/core/util/determinism.h"
#include "tsl/platform/tensor_float_32_utils.h"
#include "xla/stream_executor/blas.h"
#include "xla/stream_executor/stream.h"
#include "xla/stream_executor/stream_executor.h"

namespace deform_conv {

template <typename T, typename Factor>
absl::Status StreamGemmOf(stream_executor::Stream* stream, GemmForm form,
                          const Matrix<const void>& a, const Matrix<const void>& b,
                          const Matrix<void>& c, bool accumulate) {
  namespace blas = stream_executor::blas;
  blas::BlasSupport* library = stream->parent()->AsBlas();
  if (library == nullptr) return absl::InternalError("TensorFlow has no BLAS here");
  const auto transpose = [form](GemmForm transposing) {
    return form == transposing ? blas::Transpose::kTranspose : blas::Transpose::kNoTranspose;
  };
  const auto address = [](const Matrix<const void>& matrix) {
    return stream_executor::DeviceAddress<T>::MakeFromByteSize(
        const_cast<void*>(matrix.data), matrix.rows * matrix.stride * sizeof(T));
  };
  auto out = address({c.data, c.rows, c.cols, c.stride});
  const int64_t depth = form == GemmForm::kTransposeA ? a.rows : a.cols;
  // BLAS is column-major: there, a row-major matrix is its transpose, and c^T = b^T a^T.
  return library->BlasGemm(
      stream, transpose(GemmForm::kTransposeB), transpose(GemmForm::kTransposeA), c.cols, c.rows,
      depth, static_cast<Factor>(1.0f), address(b), static_cast<int>(b.stride), address(a),
      static_cast<int>(a.stride), static_cast<Factor>(accumulate ? 1.0f : 0.0f), &out,
      static_cast<int>(c.stride), tensorflow::GetNumericOptions(), blas::CallContext::kNone);
}

// CudaDevice::Gemm() on `stream`. Obeys TensorFlow's settings of TF32 and determinism.
inline absl::Status StreamGemm(stream_executor::Stream* stream, ElementType type, GemmForm form,
                               const Matrix<const void>& a, const Matrix<const void>& b,
                               const Matrix<void>& c, bool accumulate) {
  switch (type) {
    case ElementType::kFloat:
      return StreamGemmOf<float, float>(stream, form, a, b, c, accumulate);
    case ElementType::kDouble:
      return StreamGemmOf<double, double>(stream, form, a, b, c, accumulate);
    case ElementType::kHalf:
      return StreamGemmOf<Eigen::half, float>(stream, form, a, b, c, accumulate);
    case ElementType::kBFloat16:
      return StreamGemmOf<Eigen::bfloat16, Eigen::bfloat16>(stream, form, a, b, c, accumulate);
  }
  return absl::InternalError("unknown element type");
}

// What the environment variable DEFORM_CONV_PATH may say.
struct NamedPath {
  const char* name;
  KernelPath path;
};
constexpr NamedPath kNamedPaths[] = {
    {"general", KernelPath::kGeneral},
    {"fused", KernelPath::kFused},
};

// What it says when first asked: the fastest path where it is unset or empty. Throws
// std::invalid_argument where it says anything else; the op and the custom calls catch that.
inline KernelPath PathOfEnvironment() {
  static const KernelPath path = [] {
    const char* value = std::getenv("DEFORM_CONV_PATH");
    const std::string name = value == nullptr ? "" : value;
    if (name.empty()) return KernelPath::kFastest;
    std::string allowed;
    for (const NamedPath& named : kNamedPaths) {
      if (name == named.name) return named.path;
      allowed += '"' + std::string(named.name) + "\", ";
    }
    throw std::invalid_argument("DEFORM_CONV_PATH must be " + allowed + "or unset; received \"" +
                                name + '"');
  }();
  return path;
}

// All of a CudaDevice but its memory.
class StreamDevice : public CudaDevice {
 public:
  explicit StreamDevice(stream_executor::Stream* stream) : stream_(stream) {}

  void* stream() override { return stream_->platform_specific_handle().stream; }

  bool deterministic() const override { return tensorflow::OpDeterminismRequired(); }

  bool allow_tf32() const override { return tsl::tensor_float_32_execution_enabled(); }

  KernelPath path() const override { return PathOfEnvironment(); }

  std::string Gemm(ElementType type, GemmForm form, const Matrix<const void>& a,
                   const Matrix<const void>& b, const Matrix<void>& c, bool accumulate) override {
    const absl::Status status = StreamGemm(stream_, type, form, a, b, c, accumulate);
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
