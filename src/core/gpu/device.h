// What the core asks of its caller on a GPU: a stream, memory, a GEMM, and settings. TensorFlow
// gives its own; the C interface gives those of the CUDA toolkit.

#ifndef DEFORM_CONV_CORE_GPU_DEVICE_H_
#define DEFORM_CONV_CORE_GPU_DEVICE_H_

#include <cstdint>
#include <string>

#include "core/matrix.h"
#include "core/types.h"

namespace deform_conv {

// See benchmarks/README.md for how this was chosen.
constexpr int64_t kDefaultColumnsBytes = int64_t{512} << 20;

// Which implementations may be chosen. A fused kernel samples and multiplies on tensor cores.
enum class KernelPath {
  kAny,
  kGeneral,  // those for every GPU
  kFused,    // those with a fused kernel, or an error where none fits
};

// Functions return an empty string, or what went wrong. path() and Allocate() may also throw; the
// core lets exceptions pass. All work is put on stream().
class GpuDevice {
 public:
  virtual ~GpuDevice() = default;

  // The cudaStream_t.
  virtual void* stream() = 0;

  // The most bytes that the columns of one chunk of positions may take.
  virtual int64_t columns_bytes() const { return kDefaultColumnsBytes; }

  // Whether sums must be the same, bit by bit, in every run.
  virtual bool deterministic() const { return false; }

  // Whether products of floats may be rounded to TF32.
  virtual bool allow_tf32() const = 0;

  virtual KernelPath path() const { return KernelPath::kAny; }

  // Memory that lasts until the work now put on the stream has used it. Aligned to 16 bytes.
  virtual std::string Allocate(int64_t bytes, void** memory) = 0;

  // c = a * b, with one operand transposed as `form` says, or c += a * b, for each of `count`
  // matrices; no element of c is part of two. Sums are in float for the 16-bit types; products of
  // floats are rounded to TF32 if allow_tf32().
  virtual std::string Gemm(ElementType type, GemmForm form, int64_t count,
                           const MatrixBatch<const void>& a, const MatrixBatch<const void>& b,
                           const MatrixBatch<void>& c, bool accumulate) = 0;
};

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_DEVICE_H_
