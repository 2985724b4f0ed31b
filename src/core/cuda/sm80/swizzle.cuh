// How operands of tensor cores lie in shared memory without bank conflicts. For .cu files only.
//
// An operand is made of slabs of 128-byte rows: 64 numbers of 16 bits, or 32 of TF32. Within each
// eight rows the vec16s are swizzled, so that neither the vec16s of a row nor those one above
// the other meet in one bank: vec16 v of row r lies where v ^ (r % 8) would. A slab begins at a
// multiple of 1024 bytes. Compute capability 9.0 calls this the 128-byte swizzle.

#ifndef DEFORM_CONV_CORE_CUDA_SM80_SWIZZLE_CUH_
#define DEFORM_CONV_CORE_CUDA_SM80_SWIZZLE_CUH_

#include <cstdint>

#include "core/cuda/types.cuh"

namespace deform_conv {
namespace cuda {

constexpr int kSlabRowBytes = 128;
constexpr int kSlabRowVec16s = kSlabRowBytes / kVec16Bytes;
constexpr int kSwizzledRows = 8;  // after which the swizzle repeats
constexpr int kSlabAlignment = kSwizzledRows * kSlabRowBytes;

// Numbers in a row of a slab.
template <typename T>
constexpr int kSlabRowSize = kSlabRowBytes / sizeof(T);

// Where a vec16 of a row lies, in bytes from the slab's beginning.
__device__ __forceinline__ uint32_t SwizzledOffset(int row, int vec16) {
  return row * kSlabRowBytes + ((vec16 ^ (row % kSwizzledRows)) * kVec16Bytes);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM80_SWIZZLE_CUH_
