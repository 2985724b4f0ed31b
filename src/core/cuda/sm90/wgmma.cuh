// Tensor core instructions of compute capability 9.0 (wgmma, sm_90a). For .cu files only.
//
// A warpgroup, four consecutive warps that begin at a multiple of four, multiplies operand A, in
// shared memory or in its registers, by operand B in shared memory, and adds to accumulators in its
// registers, asynchronously. See "Asynchronous Warpgroup Level Matrix Instructions" in NVIDIA's PTX
// manual. Operands in shared memory lie as sm80/swizzle.cuh says.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_WGMMA_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_WGMMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/cuda/sm80/swizzle.cuh"

namespace deform_conv {
namespace cuda {

// --- Warpgroups ---

constexpr int kWarpgroup = 128;  // threads

// The thread's warpgroup in its block, in a way that tells the compiler that a warp has but one.
__device__ __forceinline__ int WarpgroupIndex() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// Changes how many registers each thread of the warpgroup may use; those of a block's warpgroups
// must not add up to more than it was launched with.
template <int kRegisters>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// --- Operands ---

// One instruction computes accumulators [kWgmmaM, n] from so many numbers of K: 32 bytes of them.
constexpr int kWgmmaM = 64;
template <typename T>
constexpr int kWgmmaK = 32 / sizeof(T);

// Which dimension of an operand lies along the rows of its slabs.
enum class Major {
  kK,   // a row of a slab is one m of A or one n of B; any type
  kMN,  // a row of a slab is one k; 16-bit types only
};

// The major dimension of a B that is [K, N] in memory. 16-bit types are used as they lie. TF32 must
// be K-major, so it is transposed beforehand.
template <typename T>
constexpr Major kMajorOfB = sizeof(T) == 2 ? Major::kMN : Major::kK;

// Describes an operand that begins at `address`. `next_slab` is the distance of the slab beside it,
// in bytes; only an MN-major operand wider than a slab uses it.
__device__ __forceinline__ uint64_t MatrixDescriptor(uint32_t address, uint32_t next_slab) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const uint64_t leading = (next_slab >> 4) & 0x3fff;
  const uint64_t stride = kSlabAlignment >> 4;  // from eight rows to the next eight
  return kSwizzle128 | stride << 32 | leading << 16 | ((address >> 4) & 0x3fff);
}

// The same, `bytes` further on. Every address of shared memory fits the descriptor's 14 bits, so
// the lower half alone changes.
__device__ __forceinline__ uint64_t AdvanceDescriptor(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & ~uint64_t{UINT32_MAX}) | low;
}

// Distance of the next instruction's part of an operand, in bytes.
template <typename T, Major kMajor>
__device__ constexpr uint32_t WgmmaKBytes() {
  return kMajor == Major::kK ? kWgmmaK<T> * sizeof(T) : kWgmmaK<T> * kSlabRowBytes;
}

// --- Ordering ---

// Before the first wgmma after registers or shared memory were written by other means.
__device__ __forceinline__ void WarpgroupArrive() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// Closes the commit group of the wgmmas begun since the last one.
__device__ __forceinline__ void WarpgroupCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most `kPending` commit groups are unfinished.
template <int kPending>
__device__ __forceinline__ void WarpgroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Makes this thread's writes to shared memory visible to the tensor cores, among them copies that
// it has waited for. Called before the barrier that signals the warpgroup.
__device__ __forceinline__ void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// Keeps the compiler from moving reads of the accumulators before the wait.
template <int kCount>
__device__ __forceinline__ void ReadAfterWait(float (&accumulators)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

// --- Products ---

// accumulators [64, kN] += a [64, k] * b [k, kN], with k = kWgmmaK; or = with `add` false. All of a
// warpgroup calls it. Of a thread of it, with warp = thread / 32 % 4, lane = thread % 32:
//
//   accumulators[4 * i + 2 * j + e] is m = 16 * warp + lane / 4 + 8 * j,
//                                      n = 8 * i + 2 * (lane % 4) + e
template <typename T, int kN, Major kMajorA, Major kMajorB>
struct WgmmaSS;

// The same with `a` in registers, which must not change before the product is waited for. It is
// a[0] and a[1] of row lane / 4 and of the row 8 below, and a[2] and a[3] of the same rows further
// along K; in 16 bits a register has k = 2 * (lane % 4) and the next, or those 8 further along; in
// TF32 it has k = lane % 4, or that 4 further along.
template <typename T, int kN, Major kMajorB>
struct WgmmaRS;

// The assembler arguments of one instruction.
#define DEFORM_CONV_ACCUMULATORS_8(accumulators, i)                                    \
  "+f"(accumulators[i]), "+f"(accumulators[i + 1]), "+f"(accumulators[i + 2]),         \
      "+f"(accumulators[i + 3]), "+f"(accumulators[i + 4]), "+f"(accumulators[i + 5]), \
      "+f"(accumulators[i + 6]), "+f"(accumulators[i + 7])
#define DEFORM_CONV_ACCUMULATORS_16(accumulators, i) \
  DEFORM_CONV_ACCUMULATORS_8(accumulators, i), DEFORM_CONV_ACCUMULATORS_8(accumulators, i + 8)
#define DEFORM_CONV_ACCUMULATORS_32(accumulators, i) \
  DEFORM_CONV_ACCUMULATORS_16(accumulators, i), DEFORM_CONV_ACCUMULATORS_16(accumulators, i + 16)
#define DEFORM_CONV_ACCUMULATORS_64(accumulators, i) \
  DEFORM_CONV_ACCUMULATORS_32(accumulators, i), DEFORM_CONV_ACCUMULATORS_32(accumulators, i + 32)

#define DEFORM_CONV_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DEFORM_CONV_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DEFORM_CONV_NAMES_32 \
  DEFORM_CONV_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DEFORM_CONV_NAMES_64                                                         \
  DEFORM_CONV_NAMES_32                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `a`, `b` and `add` are the assembler arguments that follow the accumulators.
#define DEFORM_CONV_WGMMA_SS_16_BIT(T, name, n, count, a_name, b_name, add_name, ta_name, tb_name) \
  template <Major kMajorA, Major kMajorB>                                                          \
  struct WgmmaSS<T, n, kMajorA, kMajorB> {                                                         \
    static __device__ __forceinline__ void Run(float (&accumulators)[count], uint64_t a,           \
                                               uint64_t b, bool add) {                             \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                                \
                   ", 0;\n"                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name                 \
                   " {" DEFORM_CONV_NAMES_##count "}, " a_name ", " b_name ", add, 1, 1, " ta_name \
                                                  ", " tb_name ";\n}\n"                            \
                   : DEFORM_CONV_ACCUMULATORS_##count(accumulators, 0)                             \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)),                                   \
                     "n"(kMajorA == Major::kMN ? 1 : 0), "n"(kMajorB == Major::kMN ? 1 : 0));      \
    }                                                                                              \
  };
#define DEFORM_CONV_WGMMA_SS_TF32(n, count, a_name, b_name, add_name)                      \
  template <>                                                                              \
  struct WgmmaSS<float, n, Major::kK, Major::kK> {                                         \
    static __device__ __forceinline__ void Run(float (&accumulators)[count], uint64_t a,   \
                                               uint64_t b, bool add) {                     \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                        \
                   ", 0;\n"                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #n                                  \
                   "k8.f32.tf32.tf32 {" DEFORM_CONV_NAMES_##count "}, " a_name ", " b_name \
                                                                  ", add, 1, 1;\n}\n"      \
                   : DEFORM_CONV_ACCUMULATORS_##count(accumulators, 0)                     \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                          \
    }                                                                                      \
  };
// A in registers: its four names come before those of B and `add`.
#define DEFORM_CONV_WGMMA_RS_16_BIT(T, name, n, count, a_names, b_name, add_name, tb_name)     \
  template <Major kMajorB>                                                                     \
  struct WgmmaRS<T, n, kMajorB> {                                                              \
    static __device__ __forceinline__ void Run(float (&accumulators)[count],                   \
                                               const uint32_t (&a)[4], uint64_t b, bool add) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                            \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name             \
                   " {" DEFORM_CONV_NAMES_##count "}, {" a_names "}, " b_name                  \
                                                  ", add, 1, 1, " tb_name ";\n}\n"             \
                   : DEFORM_CONV_ACCUMULATORS_##count(accumulators, 0)                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                       \
                     "r"(static_cast<int>(add)), "n"(kMajorB == Major::kMN ? 1 : 0));          \
    }                                                                                          \
  };
#define DEFORM_CONV_WGMMA_RS_TF32(n, count, a_names, b_name, add_name)                          \
  template <>                                                                                   \
  struct WgmmaRS<float, n, Major::kK> {                                                         \
    static __device__ __forceinline__ void Run(float (&accumulators)[count],                    \
                                               const uint32_t (&a)[4], uint64_t b, bool add) {  \
      asm volatile(                                                                             \
          "{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                                      \
          ", 0;\n"                                                                              \
          "wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" DEFORM_CONV_NAMES_##count \
          "}, {" a_names "}, " b_name ", add, 1, 1;\n}\n"                                       \
          : DEFORM_CONV_ACCUMULATORS_##count(accumulators, 0)                                   \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));    \
    }                                                                                           \
  };
#define DEFORM_CONV_WGMMA_RS(n, count, a_names, n4, n5, n6)                         \
  DEFORM_CONV_WGMMA_RS_16_BIT(__half, "f16", n, count, a_names, n4, n5, n6)         \
  DEFORM_CONV_WGMMA_RS_16_BIT(__nv_bfloat16, "bf16", n, count, a_names, n4, n5, n6) \
  DEFORM_CONV_WGMMA_RS_TF32(n, count, a_names, n4, n5)
DEFORM_CONV_WGMMA_RS(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38")
DEFORM_CONV_WGMMA_RS(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70")
#undef DEFORM_CONV_WGMMA_RS
#undef DEFORM_CONV_WGMMA_RS_16_BIT
#undef DEFORM_CONV_WGMMA_RS_TF32
#define DEFORM_CONV_WGMMA_SS(n, count, n0, n1, n2, n3, n4)                         \
  DEFORM_CONV_WGMMA_SS_16_BIT(__half, "f16", n, count, n0, n1, n2, n3, n4)         \
  DEFORM_CONV_WGMMA_SS_16_BIT(__nv_bfloat16, "bf16", n, count, n0, n1, n2, n3, n4) \
  DEFORM_CONV_WGMMA_SS_TF32(n, count, n0, n1, n2)
DEFORM_CONV_WGMMA_SS(32, 16, "%16", "%17", "%18", "%19", "%20")
DEFORM_CONV_WGMMA_SS(64, 32, "%32", "%33", "%34", "%35", "%36")
#undef DEFORM_CONV_WGMMA_SS
#undef DEFORM_CONV_WGMMA_SS_16_BIT
#undef DEFORM_CONV_WGMMA_SS_TF32
#undef DEFORM_CONV_ACCUMULATORS_8
#undef DEFORM_CONV_ACCUMULATORS_16
#undef DEFORM_CONV_ACCUMULATORS_32
#undef DEFORM_CONV_ACCUMULATORS_64
#undef DEFORM_CONV_NAMES_8
#undef DEFORM_CONV_NAMES_16
#undef DEFORM_CONV_NAMES_32
#undef DEFORM_CONV_NAMES_64

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_WGMMA_CUH_
