// In which order a fused kernel walks over output positions. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_FUSED_STRIP_WALK_CUH_
#define DEFORM_CONV_CORE_CUDA_FUSED_STRIP_WALK_CUH_

#include <cstdint>

#include "core/cuda/fused/divisor.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/integer_math.h"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// Positions are dealt out in units: a warp has 16 rows of a wgmma's operand.
constexpr int kUnit = 16;

// Columns [x, x + width) of all images, one below the other, gone through row by row. Rows are
// numbered across the batch.
struct Strip {
  int32_t x, width;
  Divisor by_width;
};

// Some units of a strip.
struct StripTile {
  Strip strip;
  int32_t unit, units;
};

// The output is cut into vertical strips, so that consecutive positions lie close together and
// their samples share pixels. A strip is cut into tiles of nearly equal size. Its last unit may be
// longer than the strip.
class StripWalk {
 public:
  StripWalk(const DeformConvParams& params, int64_t width, int64_t most_units)
      : rows_(static_cast<int32_t>(params.batch * params.out_h)),
        full_strips_(static_cast<int32_t>(params.out_w / width)),
        units_(static_cast<int32_t>(CeilDiv<kUnit>(rows_ * width))),
        by_out_h_(static_cast<uint32_t>(params.out_h)),
        width_(static_cast<uint32_t>(width)),
        tiles_(static_cast<uint32_t>(CeilDiv<int64_t>(units_, most_units))) {
    const int64_t last = params.out_w % width;
    if (last == 0) return;
    last_width_ = Divisor(static_cast<uint32_t>(last));
    last_units_ = static_cast<int32_t>(CeilDiv<kUnit>(rows_ * last));
    last_tiles_ = static_cast<int32_t>(CeilDiv<int64_t>(last_units_, most_units));
  }

  constexpr int32_t tiles() const {
    return full_strips_ * static_cast<int32_t>(tiles_.value()) + last_tiles_;
  }

  __device__ __forceinline__ StripTile TileAt(int32_t tile) const {
    const int32_t strip = min(static_cast<int32_t>(tiles_.Divide(tile)), full_strips_);
    tile -= strip * tiles_.value();
    const bool full = strip < full_strips_;
    const Divisor& width = full ? width_ : last_width_;
    const int32_t tiles = full ? tiles_.value() : last_tiles_;
    const int64_t units = full ? units_ : last_units_;
    const int32_t first = static_cast<int32_t>(units * tile / tiles);
    const int32_t end = static_cast<int32_t>(units * (tile + 1) / tiles);
    return {
        {strip * static_cast<int32_t>(width_.value()), static_cast<int32_t>(width.value()), width},
        first,
        end - first};
  }

  // Of the batch.
  __device__ __forceinline__ int32_t rows() const { return rows_; }
  // Row `row` of the batch.
  __device__ __forceinline__ Position PositionAt(int32_t row, int32_t x) const {
    const int32_t n = by_out_h_.Divide(row);
    return {n, row - n * static_cast<int32_t>(by_out_h_.value()), x};
  }

 private:
  int32_t rows_, full_strips_, units_;
  int32_t last_units_ = 0, last_tiles_ = 0;
  Divisor by_out_h_, width_, last_width_, tiles_;
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_FUSED_STRIP_WALK_CUH_
