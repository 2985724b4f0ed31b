// GEMM on one CPU thread. The contracts are in cpu/kernels.h. Included only by kernels_isa.cc,
// which is compiled once per instruction set.
//
// The innermost loop keeps a block of the result, kRows by a panel's width, in registers: for each
// k it loads a row of the panel and adds to each row of the block its product with one element of
// `a`. The panel is packed, so that its rows follow each other; `a` is read where it lies, since
// the loop touches only kRows of its rows (or, transposed, kRows neighbours) at a time.

#ifndef DEFORM_CONV_CORE_CPU_ISA_GEMM_H_
#define DEFORM_CONV_CORE_CPU_ISA_GEMM_H_

#include "core/cpu/isa/vector.h"
#include "core/matrix.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// Two vectors wide, and as high as the registers allow: of 16, 12 for the block, 2 for the panel's
// row, and one for the element of `a`.
constexpr int kPanelVectors = 2;
constexpr int kRows = kVectorBytes == 64 ? 12 : 6;
template <typename T>
constexpr int kPanel = kPanelVectors * kLanes<T>;

// c [rows, width] (+)= a [rows, k] * the first columns of panel [k, kPanel], `vectors` of them
// wide.
template <int rows, int vectors, bool transpose_a, typename T>
DEFORM_CONV_INLINE void GemmBlock(int64_t k, const T* a, int64_t a_stride, const T* panel, T* c,
                                  int64_t c_stride, bool accumulate) {
  constexpr int kWidth = kLanes<T>;
  Vector<T> sums[rows][vectors] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vector<T> b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b[v] = Load<kWidth>(panel + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const T element = transpose_a ? a[r] : a[r * a_stride];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += element * b[v];
    }
    panel += kPanel<T>;
    a += transpose_a ? a_stride : 1;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* to = c + r * c_stride + v * kWidth;
      Store<kWidth>(to, accumulate ? Load<kWidth>(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// The same for a number of rows that is known at run time only, 1 to `rows`.
template <int rows, int vectors, bool transpose_a, typename T>
void GemmRows(int64_t count, int64_t k, const T* a, int64_t a_stride, const T* panel, T* c,
              int64_t c_stride, bool accumulate) {
  if (count == rows) {
    GemmBlock<rows, vectors, transpose_a>(k, a, a_stride, panel, c, c_stride, accumulate);
  } else if constexpr (rows > 1) {
    GemmRows<rows - 1, vectors, transpose_a>(count, k, a, a_stride, panel, c, c_stride, accumulate);
  }
}

template <bool transpose_a, typename T>
void GemmFor(const Matrix<const T>& a, const T* packed, const Matrix<T>& c, bool accumulate) {
  // So long that a part of a panel stays in the first-level cache for all rows of `a`.
  constexpr int64_t kMostK = 384;
  const int64_t k = transpose_a ? a.rows : a.cols;
  for (int64_t p = 0; p < k; p += kMostK) {
    const int64_t k_part = k - p < kMostK ? k - p : kMostK;
    const bool add = accumulate || p > 0;
    const T* panel = packed + p * kPanel<T>;
    const T* a_part = a.data + (transpose_a ? p * a.stride : p);
    for (int64_t j = 0; j < c.cols; j += kPanel<T>, panel += k * kPanel<T>) {
      const int64_t width = c.cols - j < kPanel<T> ? c.cols - j : kPanel<T>;
      for (int64_t i = 0; i < c.rows; i += kRows) {
        const int64_t rows = c.rows - i < kRows ? c.rows - i : kRows;
        const T* a_block = a_part + (transpose_a ? i : i * a.stride);
        T* to = c.data + i * c.stride + j;
        if (width == kPanel<T>) {
          GemmRows<kRows, kPanelVectors, transpose_a>(rows, k_part, a_block, a.stride, panel, to,
                                                      c.stride, add);
          continue;
        }
        const auto narrow = width > kLanes<T> ? GemmRows<kRows, kPanelVectors, transpose_a, T>
                                              : GemmRows<kRows, 1, transpose_a, T>;
        if (width == kLanes<T>) {
          narrow(rows, k_part, a_block, a.stride, panel, to, c.stride, add);
          continue;
        }
        T block[kRows * kPanel<T>];
        narrow(rows, k_part, a_block, a.stride, panel, block, kPanel<T>, false);
        for (int64_t r = 0; r < rows; ++r) {
          const T* from = block + r * kPanel<T>;
          T* row = to + r * c.stride;
          ForEachVector<T>(width, [=](int64_t q, auto lanes) DEFORM_CONV_INLINE_LAMBDA {
            constexpr int n = lanes();
            Store<n>(row + q, add ? Load<n>(row + q) + Load<n>(from + q) : Load<n>(from + q));
          });
        }
      }
    }
  }
}

template <typename T>
void Gemm(GemmForm form, const Matrix<const T>& a, const T* packed, const Matrix<T>& c,
          bool accumulate) {
  if (form == GemmForm::kTransposeA) {
    GemmFor<true>(a, packed, c, accumulate);
  } else {
    GemmFor<false>(a, packed, c, accumulate);
  }
}

template <typename T>
void Pack(const Matrix<const T>& b, int64_t row_begin, int64_t k, T* packed) {
  for (int64_t p = 0; p < b.rows; ++p) {
    const T* from = b.data + p * b.stride;
    T* row = packed + (row_begin + p) * kPanel<T>;
    int64_t left = b.cols;
    for (; left >= kPanel<T>; left -= kPanel<T>, from += kPanel<T>, row += k * kPanel<T>) {
      std::memcpy(row, from, kPanel<T> * sizeof(T));
    }
    if (left == 0) continue;
    for (int64_t q = 0; q < kPanel<T>; ++q) row[q] = q < left ? from[q] : T(0);
  }
}

template <typename T>
void PackTransposed(const Matrix<const T>& b, int64_t n_begin, T* packed) {
  // Blocks that stay in the first-level cache both ways.
  constexpr int64_t kBlock = 16;
  const int64_t k = b.cols;
  for (int64_t p_block = 0; p_block < k; p_block += kBlock) {
    const int64_t p_end = p_block + kBlock < k ? p_block + kBlock : k;
    for (int64_t i = 0; i < b.rows; ++i) {
      const int64_t n = n_begin + i;
      const int64_t panel = n / kPanel<T>;
      T* to = packed + panel * k * kPanel<T> + (n - panel * kPanel<T>);
      const T* from = b.data + i * b.stride;
      for (int64_t p = p_block; p < p_end; ++p) to[p * kPanel<T>] = from[p];
    }
  }
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_GEMM_H_
