// What the CUDA half of the core asks of its caller: memory, a stream and a GEMM. TensorFlow gives
// its own; the C interface gives those of the CUDA toolkit.

#ifndef DEFORM_CONV_CORE_CUDA_DEVICE_H_
#define DEFORM_CONV_CORE_CUDA_DEVICE_H_

#include <cstdint>
#include <string>

#include "core/gemm.h"
#include "core/layout.h"

namespace deform_conv {

enum class ElementType { kFloat, kDouble, kHalf, kBFloat16 };

template <typename T>
struct ElementTypeOf;
template <>
struct ElementTypeOf<float> {
  static constexpr ElementType value = ElementType::kFloat;
};
template <>
struct ElementTypeOf<double> {
  static constexpr ElementType value = ElementType::kDouble;
};
template <>
struct ElementTypeOf<Half> {
  static constexpr ElementType value = ElementType::kHalf;
};
template <>
struct ElementTypeOf<BFloat16> {
  static constexpr ElementType value = ElementType::kBFloat16;
};

// See benchmarks/README.md for how this was chosen.
constexpr int64_t kDefaultColumnsBytes = int64_t{512} << 20;

// Which kernels a pass is done by.
enum class KernelPath {
  kFastest,  // of those that can do it
  kGeneral,  // columns in memory and GEMM: can do everything
  kFused,    // the fused kernels, or an error where they cannot do what there are kernels for
};

// Functions return an empty string, or what went wrong. All work is put on stream().
class CudaDevice {
 public:
  virtual ~CudaDevice() = default;

  // The cudaStream_t.
  virtual void* stream() = 0;

  // The most bytes that the columns of one chunk of positions may take.
  virtual int64_t columns_bytes() const { return kDefaultColumnsBytes; }

  // Whether sums must be the same, bit by bit, in every run.
  virtual bool deterministic() const { return false; }

  // Whether products of floats may be rounded to TF32.
  virtual bool allow_tf32() const = 0;

  virtual KernelPath path() const { return KernelPath::kFastest; }

  // Memory that lasts until the work now put on the stream has used it. Aligned to 16 bytes.
  virtual std::string Allocate(int64_t bytes, void** memory) = 0;

  // c = a * b, with one factor transposed as `form` says, or c += a * b. Sums are in float for the
  // 16-bit types; products of floats are rounded to TF32 if allow_tf32().
  virtual std::string Gemm(ElementType type, GemmForm form, const Matrix<const void>& a,
                           const Matrix<const void>& b, const Matrix<void>& c, bool accumulate) = 0;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_DEVICE_H_
