// Tensor core instructions of compute capability 9.0 (sm_90a) and what they ask of shared memory.
// For .cu files only.
//
// A warpgroup, four consecutive warps that begin at a multiple of four, multiplies tiles that lie
// in shared memory, the first perhaps in its registers, and adds to sums in its registers,
// asynchronously. See "Asynchronous Warpgroup Level Matrix Instructions" in NVIDIA's PTX manual;
// benchmarks/gpu_kernels.md tells how the kernels use them.
//
// A tile is made of blocks of 128-byte rows: 64 numbers of 16 bits, or 32 of TF32. Within each
// group of 8 rows the 16-byte chunks are swizzled, so that neither the rows nor the columns that
// are accessed together meet in one bank: chunk c of row r lies where chunk c ^ (r % 8) would. A
// block begins at a multiple of 1024 bytes.

#ifndef DEFORM_CONV_CORE_WGMMA_CUDA_CUH_
#define DEFORM_CONV_CORE_WGMMA_CUDA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace deform_conv {
namespace cuda {

constexpr int kWarpgroup = 128;     // threads
constexpr int kWarpgroupRows = 64;  // of the product that one instruction computes
constexpr int kRowBytes = 128;      // of a block
constexpr int kChunkBytes = 16;     // what is moved, and swizzled, as one
constexpr int kRowChunks = kRowBytes / kChunkBytes;
constexpr int kSwizzledRows = 8;  // after which the swizzle repeats
constexpr int kBlockAlignment = kSwizzledRows * kRowBytes;

// Where chunk `chunk` of row `row` of a block lies, in bytes from the block's beginning.
__device__ __forceinline__ uint32_t SwizzledOffset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row % kSwizzledRows)) * kChunkBytes);
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// How the rows of a block lie in a factor of the product. kDepth is the dimension that is summed
// over, and the other is that of the product's rows (or columns).
enum class RowsOf {
  kProduct,  // a row of the block is a row (column) of the product, along the depth; any type
  kDepth,    // a row of the block is a step of the depth; 16-bit types only
};

// How a factor is given whose rows are steps of the depth where it comes from: as it is, or in TF32
// transposed beforehand.
template <typename T>
constexpr RowsOf kRowsOfDepth = sizeof(T) == 2 ? RowsOf::kDepth : RowsOf::kProduct;

// Describes a factor to the tensor cores: `address` is where the first chunk of its first row lies.
// Where rows are steps of the depth and the factor is wider than a block, `next_block` is the
// distance in bytes of the block beside it; it is not used otherwise.
__device__ __forceinline__ uint64_t FactorDescriptor(uint32_t address, uint32_t next_block) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const uint64_t leading = (next_block >> 4) & 0x3fff;
  const uint64_t stride = kBlockAlignment >> 4;  // from one group of 8 rows to the next
  return kSwizzle128 | stride << 32 | leading << 16 | ((address >> 4) & 0x3fff);
}

// The same, `bytes` further on. All of shared memory has its place in the descriptor's 14 bits, so
// the lower half alone changes.
__device__ __forceinline__ uint64_t MoveDescriptor(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & ~uint64_t{UINT32_MAX}) | low;
}

// Depth of one instruction, in numbers: 32 bytes of them.
template <typename T>
constexpr int kStepDepth = 32 / sizeof(T);

// From what address on the next step of the depth is read, in bytes from this one's.
template <typename T, RowsOf kRows>
__device__ constexpr uint32_t StepBytes() {
  return kRows == RowsOf::kProduct ? kStepDepth<T> * sizeof(T) : kStepDepth<T> * kRowBytes;
}

// The thread's warpgroup in its block, in a way that tells the compiler that a warp has but one.
__device__ __forceinline__ int WarpgroupIndex() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// --- Ordering ---

// Before the first Multiply() after registers or shared memory were written by other means.
__device__ __forceinline__ void WarpgroupArrive() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// Closes the group of products begun since the last one.
__device__ __forceinline__ void WarpgroupCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most `kPending` groups are unfinished.
template <int kPending>
__device__ __forceinline__ void WarpgroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Makes this thread's writes to shared memory, copies that it has waited for among them, visible to
// the tensor cores. Before the barrier that tells the warpgroup of them.
__device__ __forceinline__ void FenceForTensorCores() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
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

// --- Barriers that some threads arrive at and others wait for, 8 bytes each in shared memory ---

// A phase of the barrier ends with the `arrivals`th arrival. By one thread, before all others use
// it.
__device__ __forceinline__ void InitializeBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void ArriveAtBarrier(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// By all threads of a warp: one arrival, once all have come.
__device__ __forceinline__ void ArriveAsWarp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ArriveAtBarrier(barrier);
}
// Waits until the phase of the given parity has ended. The first phase's is 0; before it, that of
// parity 1 counts as ended.
__device__ __forceinline__ void WaitAtBarrier(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- Copies from global to shared memory, asynchronous too ---

// Copies 16 bytes, or writes 16 zero bytes if `valid` is false; `from` is not read then.
__device__ __forceinline__ void CopyChunkAsync(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// --- Products ---

// sums [64, kCols] += a [64, depth] * b [depth, kCols], where depth is 32 bytes of numbers, or =
// with `add` false. All of a warpgroup calls it. Of a thread of it, with warp = thread / 32 % 4,
// lane = thread % 32:
//
//   sums[4 * i + 2 * j + k] is row 16 * warp + lane / 4 + 8 * j, column 8 * i + 2 * (lane % 4) + k
//
// kRowsOfA and kRowsOfB tell how the blocks lie.
template <typename T, int kCols, RowsOf kRowsOfA, RowsOf kRowsOfB>
struct Multiply;

// The same with `a` in registers, which must not change before the product is waited for. It is
// a[0] and a[1] of row lane / 4 and of the row 8 below, and a[2] and a[3] of the same rows further
// along the depth; in 16 bits a register has steps 2 * (lane % 4) and the next of the depth, or
// those 8 further along; in TF32 it has step lane % 4, or that 4 further along.
template <typename T, int kCols, RowsOf kRowsOfB>
struct MultiplyRegisters;

// The operands of one instruction.
#define DEFORM_CONV_SUMS_8(sums, i)                                                          \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define DEFORM_CONV_SUMS_16(sums, i) DEFORM_CONV_SUMS_8(sums, i), DEFORM_CONV_SUMS_8(sums, i + 8)
#define DEFORM_CONV_SUMS_32(sums, i) DEFORM_CONV_SUMS_16(sums, i), DEFORM_CONV_SUMS_16(sums, i + 16)
#define DEFORM_CONV_SUMS_64(sums, i) DEFORM_CONV_SUMS_32(sums, i), DEFORM_CONV_SUMS_32(sums, i + 32)

#define DEFORM_CONV_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"

#define DEFORM_CONV_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DEFORM_CONV_NAMES_32 \
  DEFORM_CONV_NAMES_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DEFORM_CONV_NAMES_64                                                         \
  DEFORM_CONV_NAMES_32                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `a`, `b` and `add` are the operands that follow the sums.
#define DEFORM_CONV_MULTIPLY_16_BIT(T, name, cols, count, a_name, b_name, add_name, ta_name,       \
                                    tb_name)                                                       \
  template <RowsOf kRowsOfA, RowsOf kRowsOfB>                                                      \
  struct Multiply<T, cols, kRowsOfA, kRowsOfB> {                                                   \
    static __device__ __forceinline__ void Run(float (&sums)[count], uint64_t a, uint64_t b,       \
                                               bool add) {                                         \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                                \
                   ", 0;\n"                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." name "." name              \
                   " {" DEFORM_CONV_NAMES_##count "}, " a_name ", " b_name ", add, 1, 1, " ta_name \
                                                  ", " tb_name ";\n}\n"                            \
                   : DEFORM_CONV_SUMS_##count(sums, 0)                                             \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)),                                   \
                     "n"(kRowsOfA == RowsOf::kDepth ? 1 : 0),                                      \
                     "n"(kRowsOfB == RowsOf::kDepth ? 1 : 0));                                     \
    }                                                                                              \
  };
#define DEFORM_CONV_MULTIPLY_TF32(cols, count, a_name, b_name, add_name)                     \
  template <>                                                                                \
  struct Multiply<float, cols, RowsOf::kProduct, RowsOf::kProduct> {                         \
    static __device__ __forceinline__ void Run(float (&sums)[count], uint64_t a, uint64_t b, \
                                               bool add) {                                   \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                          \
                   ", 0;\n"                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #cols                                 \
                   "k8.f32.tf32.tf32 {" DEFORM_CONV_NAMES_##count "}, " a_name ", " b_name   \
                                                                  ", add, 1, 1;\n}\n"        \
                   : DEFORM_CONV_SUMS_##count(sums, 0)                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                            \
    }                                                                                        \
  };
// Of `a` in registers: its operands, and those that follow.
#define DEFORM_CONV_MULTIPLY_REGISTERS_16_BIT(T, name, cols, count, a_names, b_name, add_name, \
                                              tb_name)                                         \
  template <RowsOf kRowsOfB>                                                                   \
  struct MultiplyRegisters<T, cols, kRowsOfB> {                                                \
    static __device__ __forceinline__ void Run(float (&sums)[count], const uint32_t (&a)[4],   \
                                               uint64_t b, bool add) {                         \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                            \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #cols "k16.f32." name "." name          \
                   " {" DEFORM_CONV_NAMES_##count "}, {" a_names "}, " b_name                  \
                                                  ", add, 1, 1, " tb_name ";\n}\n"             \
                   : DEFORM_CONV_SUMS_##count(sums, 0)                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                       \
                     "r"(static_cast<int>(add)), "n"(kRowsOfB == RowsOf::kDepth ? 1 : 0));     \
    }                                                                                          \
  };
#define DEFORM_CONV_MULTIPLY_REGISTERS_TF32(cols, count, a_names, b_name, add_name)                \
  template <>                                                                                      \
  struct MultiplyRegisters<float, cols, RowsOf::kProduct> {                                        \
    static __device__ __forceinline__ void Run(float (&sums)[count], const uint32_t (&a)[4],       \
                                               uint64_t b, bool add) {                             \
      asm volatile(                                                                                \
          "{\n.reg .pred add;\nsetp.ne.b32 add, " add_name                                         \
          ", 0;\n"                                                                                 \
          "wgmma.mma_async.sync.aligned.m64n" #cols "k8.f32.tf32.tf32 {" DEFORM_CONV_NAMES_##count \
          "}, {" a_names "}, " b_name ", add, 1, 1;\n}\n"                                          \
          : DEFORM_CONV_SUMS_##count(sums, 0)                                                      \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));       \
    }                                                                                              \
  };
#define DEFORM_CONV_MULTIPLY_REGISTERS(cols, count, a_names, n4, n5, n6)                         \
  DEFORM_CONV_MULTIPLY_REGISTERS_16_BIT(__half, "f16", cols, count, a_names, n4, n5, n6)         \
  DEFORM_CONV_MULTIPLY_REGISTERS_16_BIT(__nv_bfloat16, "bf16", cols, count, a_names, n4, n5, n6) \
  DEFORM_CONV_MULTIPLY_REGISTERS_TF32(cols, count, a_names, n4, n5)
DEFORM_CONV_MULTIPLY_REGISTERS(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38")
DEFORM_CONV_MULTIPLY_REGISTERS(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70")
#undef DEFORM_CONV_MULTIPLY_REGISTERS
#undef DEFORM_CONV_MULTIPLY_REGISTERS_16_BIT
#undef DEFORM_CONV_MULTIPLY_REGISTERS_TF32
#define DEFORM_CONV_MULTIPLY(cols, count, n0, n1, n2, n3, n4)                         \
  DEFORM_CONV_MULTIPLY_16_BIT(__half, "f16", cols, count, n0, n1, n2, n3, n4)         \
  DEFORM_CONV_MULTIPLY_16_BIT(__nv_bfloat16, "bf16", cols, count, n0, n1, n2, n3, n4) \
  DEFORM_CONV_MULTIPLY_TF32(cols, count, n0, n1, n2)
DEFORM_CONV_MULTIPLY(32, 16, "%16", "%17", "%18", "%19", "%20")
DEFORM_CONV_MULTIPLY(64, 32, "%32", "%33", "%34", "%35", "%36")
#undef DEFORM_CONV_MULTIPLY
#undef DEFORM_CONV_MULTIPLY_16_BIT
#undef DEFORM_CONV_MULTIPLY_TF32
#undef DEFORM_CONV_SUMS_8
#undef DEFORM_CONV_SUMS_16
#undef DEFORM_CONV_SUMS_32
#undef DEFORM_CONV_SUMS_64
#undef DEFORM_CONV_NAMES_8
#undef DEFORM_CONV_NAMES_16
#undef DEFORM_CONV_NAMES_32
#undef DEFORM_CONV_NAMES_64

// sums [16, 8] += a [16, 16] * b [16, 8], by a warp, from registers, at once. Of a lane, with
// row = lane / 4 and pair = 2 * (lane % 4):
//
//   sums[2 * j + k] is row `row` + 8 * j, column `pair` + k
//   a[j + 2 * i]    is row `row` + 8 * j at depths `pair` + 8 * i and the next
//   b[i]            is column `row` at depths `pair` + 8 * i and the next
template <typename T>
__device__ __forceinline__ void MultiplyInWarp(float (&sums)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
  // Volatile, or it might be moved to where not all lanes come by.
#define DEFORM_CONV_MULTIPLY_IN_WARP(name)                                         \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name              \
               ".f32 "                                                             \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) {
    DEFORM_CONV_MULTIPLY_IN_WARP("f16");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    DEFORM_CONV_MULTIPLY_IN_WARP("bf16");
  }
#undef DEFORM_CONV_MULTIPLY_IN_WARP
}

// As a float, rounded to the nearest TF32; the tensor cores would cut the bits off.
__device__ __forceinline__ float RoundToTf32(float number) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(number));
  return __uint_as_float(bits);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_WGMMA_CUDA_CUH_
