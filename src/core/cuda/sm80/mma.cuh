// Tensor core instructions of compute capability 8.0 for one warp (mma.sync). For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM80_MMA_CUH_
#define DEFORM_CONV_CORE_CUDA_SM80_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace deform_conv {
namespace cuda {

// Whether what is compiled for has them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kHasMma = true;
#else
constexpr bool kHasMma = false;
#endif

// accumulators [16, 8] += a [16, 16] * b [16, 8], from registers. Of a lane, with row = lane / 4
// and pair = 2 * (lane % 4):
//
//   accumulators[2 * j + e] is m = row + 8 * j, n = pair + e
//   a[j + 2 * i]            is m = row + 8 * j at k = pair + 8 * i and the next
//   b[i]                    is n = row at k = pair + 8 * i and the next
template <typename T>
__device__ __forceinline__ void MmaSync(float (&accumulators)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  // Volatile, or it might be moved to where not all lanes come by.
#define DEFORM_CONV_MMA_SYNC(name)                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                 \
               ".f32 "                                                                \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"    \
               : "+f"(accumulators[0]), "+f"(accumulators[1]), "+f"(accumulators[2]), \
                 "+f"(accumulators[3])                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) {
    DEFORM_CONV_MMA_SYNC("f16");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    DEFORM_CONV_MMA_SYNC("bf16");
  }
#undef DEFORM_CONV_MMA_SYNC
}

// Loads four matrices of 8 x 8 numbers of 16 bits from shared memory. Lane 8 * i + r gives the
// address of row r of matrix i, and gets of matrix i the numbers 2 * (lane % 4) and the next of row
// lane / 4; with kTransposed, of that column.
template <bool kTransposed>
__device__ __forceinline__ void LoadMatrices(uint32_t address, uint32_t (&matrices)[4]) {
#define DEFORM_CONV_LOAD_MATRICES(transposed)                                                     \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0, %1, %2, %3}, [%4];\n" \
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])       \
               : "r"(address)                                                                     \
               : "memory")
  if constexpr (kTransposed) {
    DEFORM_CONV_LOAD_MATRICES(".trans");
  } else {
    DEFORM_CONV_LOAD_MATRICES("");
  }
#undef DEFORM_CONV_LOAD_MATRICES
}

// As a float, rounded to the nearest TF32; the tensor cores would cut the bits off.
__device__ __forceinline__ float RoundToTf32(float number) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(number));
  return __uint_as_float(bits);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM80_MMA_CUH_
