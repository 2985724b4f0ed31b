// Locating a tile's samples on one CPU thread. The contract is in cpu/kernels.h. Included only by
// kernels_isa.cc, which is compiled once per instruction set.

#ifndef DEFORM_CONV_CORE_CPU_ISA_LOCATE_H_
#define DEFORM_CONV_CORE_CPU_ISA_LOCATE_H_

#include "core/cpu/isa/vector.h"
#include "core/cpu/kernels.h"

namespace deform_conv {
namespace DEFORM_CONV_ISA {

// Whether coordinates and pixels may be computed in int32_t.
DEFORM_CONV_INLINE bool FitInt32(const DeformConvParams& params) {
  const int64_t h_end = params.out_h * params.stride_h + params.kernel_h * params.dilation_h;
  const int64_t w_end = params.out_w * params.stride_w + params.kernel_w * params.dilation_w;
  return params.in_h < kInt32Limit && params.in_w < kInt32Limit && params.pad_top < kInt32Limit &&
         params.pad_left < kInt32Limit && h_end < kInt32Limit && w_end < kInt32Limit &&
         params.in_h * params.in_w < int64_t{1} << 31;
}

// Calls visit(first, count, index) for ranges of a tile's samples: `count` of them, from `first` on
// in the tile and from `index` on in offset and mask.
template <typename T, typename Visit>
DEFORM_CONV_INLINE void ForEachSampleRange(const DeformConvParams& params,
                                           const TileSamples<T>& tile, const Visit& visit) {
  // With all groups, the tile's samples follow each other in the tensors too.
  const int64_t groups = tile.end_deform_group - tile.first_deform_group;
  const bool all_groups = groups == params.deform_groups;
  const int64_t rows = all_groups ? 1 : tile.end - tile.begin;
  const int64_t count = (all_groups ? tile.end - tile.begin : 1) * groups * params.taps();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t position_group =
        (tile.begin + row) * params.deform_groups + tile.first_deform_group;
    visit(row * count, count, position_group * params.taps());
  }
}

// Writes the coordinates of the tile's samples without offsets.
template <typename T>
void WriteBases(const DeformConvParams& params, const TileSamples<T>& tile) {
  const int64_t y_n = tile.begin / params.out_w;
  int64_t x = tile.begin - y_n * params.out_w;
  int64_t y = y_n % params.out_h;
  const int64_t first_y = y, first_x = x;
  const int64_t count = (tile.end_deform_group - tile.first_deform_group) * params.taps();
  int32_t *h = tile.h_bases, *w = tile.w_bases;
  for (int64_t g = tile.first_deform_group; g < tile.end_deform_group; ++g) {
    for (int64_t ky = 0; ky < params.kernel_h; ++ky) {
      for (int64_t kx = 0; kx < params.kernel_w; ++kx) {
        *h++ = static_cast<int32_t>(y * params.stride_h - params.pad_top + ky * params.dilation_h);
        *w++ = static_cast<int32_t>(x * params.stride_w - params.pad_left + kx * params.dilation_w);
      }
    }
  }
  // The other positions are the first one, moved.
  for (int64_t position = tile.begin + 1; position < tile.end; ++position, h += count, w += count) {
    if (++x == params.out_w) {
      x = 0;
      if (++y == params.out_h) y = 0;
    }
    const int32_t down = static_cast<int32_t>((y - first_y) * params.stride_h);
    const int32_t right = static_cast<int32_t>((x - first_x) * params.stride_w);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      h[i] = tile.h_bases[i] + down;
      w[i] = tile.w_bases[i] + right;
    }
  }
}

// Samples [lane, lane + count) of a block.
template <typename Int, bool has_mask, typename T>
DEFORM_CONV_INLINE void LocateInBlock(const int32_t* h_bases, const int32_t* w_bases,
                                      const T* offset, const T* mask, Int in_h, Int in_w,
                                      int64_t lane, int64_t count, SampleBlock<T>& block) {
  T *top_left = block.weights[kTopLeft] + lane, *top_right = block.weights[kTopRight] + lane;
  T* bottom_left = block.weights[kBottomLeft] + lane;
  T* bottom_right = block.weights[kBottomRight] + lane;
  T *h_fraction = block.h_fraction + lane, *w_fraction = block.w_fraction + lane;
  T* block_mask = block.mask + lane;
  int32_t* corner_bits = block.corner_bits + lane;
  int32_t *h_low = block.h_low + lane, *w_low = block.w_low + lane;
  int64_t* pixel = block.pixel + lane;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const ImageSample<T, Int> sample =
        LocateSample<T, Int>(h_bases[i], w_bases[i], offset[2 * i], offset[2 * i + 1], in_h, in_w);
    top_left[i] = sample.weights[kTopLeft];
    top_right[i] = sample.weights[kTopRight];
    bottom_left[i] = sample.weights[kBottomLeft];
    bottom_right[i] = sample.weights[kBottomRight];
    // What lies outside is 0, whatever the mask.
    block_mask[i] = sample.corner_bits != 0 ? (has_mask ? mask[i] : T(1)) : T(0);
    h_fraction[i] = sample.h_fraction;
    w_fraction[i] = sample.w_fraction;
    corner_bits[i] = sample.corner_bits;
    const Int h = sample.corner_bits != 0 ? sample.h_low : Int{0};
    const Int w = sample.corner_bits != 0 ? sample.w_low : Int{0};
    h_low[i] = static_cast<int32_t>(h);
    w_low[i] = static_cast<int32_t>(w);
    pixel[i] = h * in_w + w;
  }
}

// Samples [first, first + count) of the tile; offset and mask are those of the first.
template <typename Int, bool has_mask, typename T>
void LocateRange(const DeformConvParams& params, const T* offset, const T* mask, int64_t count,
                 const TileSamples<T>& tile, int64_t first) {
  constexpr int64_t kSize = SampleBlock<T>::kSize;
  const Int in_h = static_cast<Int>(params.in_h), in_w = static_cast<Int>(params.in_w);
  const int32_t *h_bases = tile.h_bases, *w_bases = tile.w_bases;
  for (int64_t end = first + count; first < end;) {
    SampleBlock<T>& block = tile.blocks[first / kSize];
    const int64_t lane = first % kSize;
    const int64_t lanes = kSize - lane < end - first ? kSize - lane : end - first;
    if (lanes == kSize) {  // of a length that the compiler knows
      LocateInBlock<Int, has_mask>(h_bases + first, w_bases + first, offset, mask, in_h, in_w, 0,
                                   kSize, block);
    } else {
      LocateInBlock<Int, has_mask>(h_bases + first, w_bases + first, offset, mask, in_h, in_w, lane,
                                   lanes, block);
    }
    first += lanes;
    offset += 2 * lanes;
    if (has_mask) mask += lanes;
  }
}

template <typename T>
void Locate(const DeformConvParams& params, const SampledTensors<T>& tensors,
            const TileSamples<T>& tile) {
  WriteBases(params, tile);
  const bool small = FitInt32(params);
  const auto locate =
      tensors.mask == nullptr
          ? (small ? LocateRange<int32_t, false, T> : LocateRange<int64_t, false, T>)
          : (small ? LocateRange<int32_t, true, T> : LocateRange<int64_t, true, T>);
  ForEachSampleRange(params, tile, [&](int64_t first, int64_t count, int64_t index) {
    locate(params, tensors.offset + 2 * index,
           tensors.mask == nullptr ? nullptr : tensors.mask + index, count, tile, first);
  });
}

template <typename T>
RowRange SampledRows(const DeformConvParams& params, const T* offset, int64_t begin, int64_t end,
                     const int32_t* tap_rows, int64_t positions) {
  if (!FitInt32(params)) return {0, params.in_h};
  const int64_t samples = params.deform_groups * params.taps();
  const int32_t in_h = static_cast<int32_t>(params.in_h);
  // Vectors by hand: compilers turn LocateOnAxis() into branches where its fraction is not used.
  constexpr int n = kLanes<T>;
  constexpr T kFar = T(int64_t{1} << 30);
  using Int = decltype(Vector<T>() < Vector<T>());
  typedef int32_t Rows __attribute__((vector_size(4 * n), aligned(4), may_alias));
  Int is_dy = {};
  for (int lane = 0; lane < n; lane += 2) is_dy[lane] = -1;
  Int first = Int{} + in_h, last = Int{} - 2;  // the rows of upper corners
  for (int64_t at = begin, part_end; at < end; at = part_end) {
    const int64_t row = at / params.out_w;
    part_end = (row + 1) * params.out_w;
    if (part_end > end) part_end = end;
    if (part_end > at + positions) part_end = at + positions;
    const int64_t count = 2 * (part_end - at) * samples;
    const int32_t base =
        static_cast<int32_t>(row % params.out_h * params.stride_h - params.pad_top);
    const T* const from = offset + 2 * at * samples;
    for (int64_t i = 0; i < count; i += n) {
      Vector<T> offsets;
      if (i + n <= count) {
        offsets = Load<n>(from + i);
      } else {
        T rest[n];
        for (int lane = 0; lane < n; ++lane) rest[lane] = i + lane < count ? from[i + lane] : kFar;
        offsets = Load<n>(rest);
      }
      const Int near = (offsets > -kFar) & (offsets < kFar);
      const Vector<T> safe = near ? offsets : Vector<T>{};
      Int low = __builtin_convertvector(safe, Int);
      low += __builtin_convertvector(low, Vector<T>) > safe;  // -1 where rounded up
      low += base + __builtin_convertvector(*reinterpret_cast<const Rows*>(tap_rows + i), Int);
      const Int inside = near & is_dy & (low >= -1) & (low < in_h);
      first = inside & (low < first) ? low : first;
      last = inside & (low > last) ? low : last;
    }
  }
  RowRange rows = {in_h, 0};
  for (int lane = 0; lane < n; ++lane) {
    const int64_t low = first[lane], high = last[lane];
    if (low < rows.begin) rows.begin = low < 0 ? 0 : low;
    if (high + 2 > rows.end) rows.end = high + 2 < in_h ? high + 2 : in_h;
  }
  return rows.begin < rows.end ? rows : RowRange{0, 0};
}

}  // namespace DEFORM_CONV_ISA
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CPU_ISA_LOCATE_H_
