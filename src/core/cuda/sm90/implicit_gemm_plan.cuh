// What the host decides for the implicit GEMM kernel: the walk, regions and tables, and in how many
// parts K is summed up. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PLAN_CUH_
#define DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PLAN_CUH_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

#include "core/cuda/fused/strip_walk.cuh"
#include "core/cuda/sm90/implicit_gemm_samples.cuh"
#include "core/cuda/sm90/implicit_gemm_tile.cuh"
#include "core/cuda/sm90/limits.cuh"
#include "core/integer_math.h"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

template <typename T>
struct LaunchPlan {
  TilePlan<T> tiles;
  Locating locating;
  bool has_regions;
  unsigned blocks;
  int64_t shared_bytes;
};

constexpr int kMostSplits = 16;

// No plan has more tiles, or stages of filters.
inline int64_t MostTiles(const DeformConvParams& params) {
  const int64_t units = CeilDiv<kUnit>(params.out_positions()) + CeilDiv<kUnit>(params.out_w);
  const int64_t k_blocks = params.taps() * CeilDiv<int64_t>(params.group_in_channels(), 32);
  return std::max(kMostSplits * units, k_blocks) * params.groups *
         CeilDiv<int64_t>(params.group_out_channels(), 64);
}

// How far regions of so many pixels reach beyond what tiles sample, where strips are so wide and
// tiles have so many units; less than 0 where even a region without a margin is larger.
struct Margin {
  int h = -1, w = -1;
  int least() const { return std::min(h, w); }

  static Margin Of(const DeformConvParams& params, int64_t width, int64_t units, int64_t pixels) {
    constexpr int kMost = 3;
    const auto fits = [&](int64_t of_strip, int margin_h, int margin_w) {
      // A tile begins at a multiple of kUnit, and so within a row.
      const int64_t begins_at_most = of_strip - std::gcd(of_strip, kUnit);
      const int64_t rows = std::min((begins_at_most + units * kUnit - 1) / of_strip + 1,
                                    params.batch * params.out_h);
      const int64_t crossed = std::min(CeilDiv(rows - 1, params.out_h), params.batch - 1);
      const int64_t between =
          crossed * std::max<int64_t>(params.in_h + 1 - params.out_h * params.stride_h, 0);
      const int64_t reach_h = (params.kernel_h - 1) * params.dilation_h;
      const int64_t reach_w = (params.kernel_w - 1) * params.dilation_w;
      const int64_t in_rows = (rows - 1) * params.stride_h + between + reach_h + 2 + 2 * margin_h;
      const int64_t in_cols = (of_strip - 1) * params.stride_w + reach_w + 2 + 2 * margin_w;
      // Images have a row of zeros between them, and are within zeros.
      const int64_t most_rows = (crossed + 1) * (params.in_h + 1) + 1;
      return std::min(in_rows, most_rows) * std::min(in_cols, params.in_w + 2) <= pixels;
    };
    const int64_t last = params.out_w % width;
    for (int most = kMost; most >= 0; --most) {
      for (const auto& [h, w] : {std::pair(most, most), {most, most - 1}, {most - 1, most}}) {
        if (h >= 0 && w >= 0 && fits(width, h, w) && (last == 0 || fits(last, h, w))) {
          return {h, w};
        }
      }
    }
    return {};
  }
};

// The strips' width whose regions reach furthest. Of those that reach as far, the widest: fewer
// units are longer than their strip.
inline int64_t ChooseWidth(const DeformConvParams& params, int64_t units, int64_t pixels) {
  int64_t best = std::min<int64_t>(params.out_w, kUnit);
  int least = Margin::Of(params, best, units, pixels).least();
  for (const int64_t width : {2 * kUnit, 4 * kUnit, 8 * kUnit, 12 * kUnit, INT32_MAX}) {
    const int64_t narrower = std::min(params.out_w, width);
    const int margin = Margin::Of(params, narrower, units, pixels).least();
    if (margin >= least) {
      best = narrower;
      least = margin;
    }
  }
  return best;
}

// In how many parts K is summed up, and the most units of a tile.
struct Parts {
  int splits;
  int64_t units;
};

// By a model of the time: a K block of a tile takes as long as its samples or, where they are few,
// as its chain of steps.
template <typename T, typename Shape>
Parts ChooseParts(const DeformConvParams& params, int64_t width, int64_t n_tiles, int64_t k_blocks,
                  int64_t multiprocessors) {
  // Microseconds.
  constexpr double kLeastBlock = 0.8, kOfUnit = (Shape::kWide ? 0.1 : 0.075), kOfTile = 1.5;
  constexpr double kSum = 3, kBytesPerMicrosecond = 2.5e6;
  const int64_t sums_bytes = params.out_positions() * params.out_channels * int64_t{sizeof(float)};
  const int64_t columns_bytes =
      params.out_positions() * params.taps() * params.in_channels * int64_t{sizeof(T)};
  Parts best = {1, Shape::kUnits};
  double least = 0;
  for (const int splits : {1, 2, 3, 4, 6, 8, 12, kMostSplits}) {
    if (splits > 1 && (2 * splits > k_blocks || splits * sums_bytes > columns_bytes)) break;
    const auto rounds_of = [&](int64_t units) {
      const int64_t tiles = StripWalk(params, width, units).tiles();
      return CeilDiv(tiles * n_tiles * splits, multiprocessors);
    };
    // The smallest tiles that take no more rounds.
    const int64_t rounds = rounds_of(Shape::kUnits);
    int64_t units = Shape::kUnits;
    while (units > 1 && rounds_of(units - 1) == rounds) --units;
    const double of_block = std::max(kLeastBlock, kOfUnit * units);
    const double time = rounds * (CeilDiv<int64_t>(k_blocks, splits) * of_block + kOfTile) +
                        (splits > 1 ? kSum + 2 * splits * sums_bytes / kBytesPerMicrosecond : 0);
    if (splits == 1 || time < 0.95 * least) {
      best = {splits, units};
      least = time;
    }
  }
  return best;
}

template <typename T, typename Shape>
LaunchPlan<T> PlanImplicitGemm(const DeformConvParams& params, int64_t multiprocessors) {
  using Memory = SharedMemory<Shape, T>;
  const int taps = static_cast<int>(params.taps());
  const int64_t of_group = params.group_in_channels(), of_deform = params.deform_group_channels();
  const KOrder<T> order(taps, static_cast<int>(of_group));
  const int64_t slice = std::min<int64_t>(of_group, kK<T>);
  const bool whole = of_group % kK<T> == 0 && of_deform % kK<T> == 0;
  // The most deformable groups that a slice has channels of. Slices begin where deformable groups
  // do, if their sizes allow it and all convolution groups begin so.
  const bool aligned = slice % of_deform == 0 && (params.groups == 1 || of_group % of_deform == 0);
  const int64_t groups_of_slice = std::min(whole     ? 1
                                           : aligned ? slice / of_deform
                                                     : (slice - 1) / of_deform + 2,
                                           params.deform_groups);
  const int64_t table_samples = taps * groups_of_slice + (whole ? 0 : 1);
  const int64_t room = kMostSharedBytes - Memory::kOtherBytes;
  const int64_t pixel_bytes = slice * sizeof(T);

  int64_t width = std::min<int64_t>(params.out_w, kUnit), region_bytes = 0, region_pixels = 0,
          samples = 0;
  Margin margin;
  const auto try_regions = [&](int64_t with_samples) {
    const int64_t most =
        (room - with_samples * Memory::kTableBytes) / kRegionBuffers / kVec16Bytes * kVec16Bytes;
    const int64_t pixels = most / pixel_bytes - kZeroPixels;
    if (pixels < 4) return false;
    const int64_t with_width = ChooseWidth(params, Shape::kUnits, pixels);
    margin = Margin::Of(params, with_width, Shape::kUnits, pixels);
    if (margin.least() < 1) return false;
    width = with_width;
    region_bytes = most;
    region_pixels = pixels;
    samples = with_samples;
    return true;
  };
  // Fewer taps read no pixel often enough. A table is for samples that several threads need.
  const bool table_fits = table_samples * Memory::kTableBytes <= room;
  const bool has_regions = taps > 2 && ((groups_of_slice <= 2 && try_regions(table_samples)) ||
                                        (!(whole && table_fits) && try_regions(0)));
  if (!has_regions && table_fits) samples = table_samples;

  const int64_t n_tiles = params.groups * CeilDiv<int64_t>(params.group_out_channels(), Shape::kN);
  const Parts parts =
      ChooseParts<T, Shape>(params, width, n_tiles, order.k_blocks, multiprocessors);
  const StripWalk walk(params, width, parts.units);
  return {{order, walk, static_cast<int32_t>(n_tiles), parts.splits,
           Divisor(static_cast<uint32_t>(of_deform)), whole, static_cast<int32_t>(samples),
           RegionLimits{margin.h, margin.w, static_cast<int32_t>(region_pixels),
                        static_cast<int32_t>(pixel_bytes),
                        Divisor(static_cast<uint32_t>(params.in_h + 1))},
           static_cast<int32_t>(region_bytes)},
          samples == 0 ? Locating::kDirect
          : whole      ? Locating::kWhole
                       : Locating::kParts,
          has_regions,
          static_cast<unsigned>(
              std::min<int64_t>(walk.tiles() * n_tiles * parts.splits, multiprocessors)),
          Memory::kOtherBytes + kRegionBuffers * region_bytes + samples * Memory::kTableBytes};
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_SM90_IMPLICIT_GEMM_PLAN_CUH_
