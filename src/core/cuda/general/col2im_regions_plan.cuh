// What a thread block of Col2ImRegions() works on, and what it keeps in shared memory. For .cu
// files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_PLAN_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_PLAN_CUH_

#include <algorithm>

#include "core/bilinear.h"
#include "core/cuda/fused/limits.h"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/types.cuh"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// A thread block has a patch of an image's positions, and a slice of the channels: whole
// deformable groups, or a part of one. Nearly all that the input's gradient gets from it falls
// into a region of pixels around the patch.
//
// A *slot* is up to four neighbouring channels of a deformable group. A *row* is one tap of one
// position, a *step* the rows that are located at a time.
constexpr int kSlotChannels = 4;

struct RegionPlan {
  int height_log2, width_log2;  // of a patch, in positions
  int first_y;                  // of the first patches
  int region_h, region_w;       // in pixels, within the image
  int margin_h, margin_w;       // from the region's first pixel to what the first tap samples
  int groups;                   // deformable groups of a slice
  int group_slots;              // of each of them, in a slice
  int group_slices;             // that a deformable group is cut into
  int step_rows;                // even
  int lanes_log2;               // for the channels of a sample, in the products
  int multiprocessors;
  Divisor by_patches, by_patches_w;  // patches of an image, of a row of them
  Divisor by_region_w, by_slots, by_groups, by_group_slots, by_group_slices;
  Divisor by_vectors;  // of a pixel of the slice

  DEFORM_CONV_INLINE int positions() const { return 1 << (height_log2 + width_log2); }
  DEFORM_CONV_INLINE int pixels() const { return region_h * region_w; }
  DEFORM_CONV_INLINE int slots() const { return groups * group_slots; }
};

constexpr int kMostSlots = 16;    // of a slice
constexpr int kSlotsPerWarp = 8;  // beside the four kinds of pixels, see SumsOwner
constexpr int kMostWarpsThatAdd = kMostSlots / kSlotsPerWarp;
constexpr int kFewestThreadsThatLocate = kThreadsPerBlock - kWarp * kMostWarpsThatAdd;
// The most of a step: rows, samples, and bytes of the columns' gradient.
constexpr int kMostStepRows = 64;
constexpr int kMostStepSamples = 128;
constexpr int kMostStepBytes = 4096;
static_assert(kMostStepSamples <= kFewestThreadsThatLocate);

using SlotSums = Vector<float, kSlotChannels>;

// What a sample brings to a pixel of the region.
struct PixelWeight {
  static constexpr int kNone = -1;
  float weight;  // times the mask
  // The pixel's first slot in the region; or kNone; or, below that, kNone - 1 - the image's
  // pixel.
  int32_t at;
};

// A position of the patch, a tap, or both, a row: how far what belongs to it lies from what
// belongs to the first.
struct alignas(16) RowPart {
  static constexpr int kNone = -1;
  int32_t h, w;    // where it samples without offsets
  int32_t column;  // in the columns
  int32_t index;   // in the mask; kNone for a position that is none of those at hand
};

// Shared memory: what rows are made of, and the region's sums and two steps, or its input.
template <typename T>
struct RegionMemory {
  // Elements of T, as words: pairs that were taken apart would be waited for as soon as loaded.
  using Grads = Vector<uint32_t, kSlotChannels * sizeof(T) / sizeof(uint32_t)>;
  struct Step {
    PixelWeight* weights;  // [kCorners kinds of pixels][rows / 2][groups][2]
    Grads* grads;          // [rows / 2][slots][2]
  };

  RowPart* positions;  // [positions]
  RowPart* taps;       // [taps]
  RowPart* rows;       // [2 steps][rows]
  SlotSums* sums;      // [pixels][slots]
  char* steps;
  int step_weights, step_bytes;

  static DEFORM_CONV_INLINE int WeightsOfStep(const RegionPlan& plan) {
    return kCorners * plan.step_rows * plan.groups;
  }
  static DEFORM_CONV_INLINE int BytesOfStep(const RegionPlan& plan) {
    return WeightsOfStep(plan) * static_cast<int>(sizeof(PixelWeight)) +
           plan.step_rows * plan.slots() * static_cast<int>(sizeof(Grads));
  }
  static int64_t Bytes(const RegionPlan& plan, int64_t taps) {
    return (plan.positions() + taps + 2 * plan.step_rows) * sizeof(RowPart) +
           int64_t{plan.region_h} * plan.region_w * plan.slots() * sizeof(SlotSums) +
           2 * BytesOfStep(plan);
  }
  // Of the products, which need no sums.
  static int64_t InputBytes(const RegionPlan& plan, const DeformConvParams& params) {
    return (plan.positions() + params.taps()) * sizeof(RowPart) +
           int64_t{plan.region_h} * plan.region_w * plan.groups * params.deform_group_channels() *
               sizeof(T);
  }
  // [pixels][channels of the slice]
  __device__ __forceinline__ T* input() const { return reinterpret_cast<T*>(rows); }
  __device__ RegionMemory(char* shared, const RegionPlan& plan, int tap_count)
      : positions(reinterpret_cast<RowPart*>(shared)),
        taps(positions + plan.positions()),
        rows(taps + tap_count),
        sums(reinterpret_cast<SlotSums*>(rows + 2 * plan.step_rows)),
        steps(reinterpret_cast<char*>(sums + plan.pixels() * plan.slots())),
        step_weights(WeightsOfStep(plan)),
        step_bytes(BytesOfStep(plan)) {}
  // Steps take turns with two places.
  __device__ __forceinline__ RowPart* RowsOf(int step, int step_rows) const {
    return rows + (step & 1) * step_rows;
  }
  __device__ __forceinline__ Step StepAt(int step) const {
    PixelWeight* const weights = reinterpret_cast<PixelWeight*>(steps + (step & 1) * step_bytes);
    return {weights, reinterpret_cast<Grads*>(weights + step_weights)};
  }
};

// Where the patch and the slice of a thread block lie.
struct RegionPatch {
  int64_t first_row;  // of the columns at hand: the first position's. May lie before them.
  int n, y, x;        // the first position
  int top, left;      // the region's first pixel
  int first_group;    // deformable
  int first_channel;  // of each deformable group

  __device__ RegionPatch(const FusedSizes& sizes, const RegionPlan& plan, int64_t begin) {
    const int64_t image_positions = int64_t{sizes.out_h} * sizes.out_w;
    const int image = plan.by_patches.Divide(blockIdx.x);
    const int patch = blockIdx.x - image * plan.by_patches.value();
    const int patch_y = plan.by_patches_w.Divide(patch);
    n = static_cast<int>(begin / image_positions) + image;
    y = plan.first_y + (patch_y << plan.height_log2);
    x = (patch - patch_y * plan.by_patches_w.value()) << plan.width_log2;
    first_row = n * image_positions + int64_t{y} * sizes.out_w + x - begin;
    const int h = y * sizes.stride_h - sizes.pad_top - plan.margin_h;
    const int w = x * sizes.stride_w - sizes.pad_left - plan.margin_w;
    top = max(min(h, sizes.in_h - plan.region_h), 0);
    left = max(min(w, sizes.in_w - plan.region_w), 0);
    const int slice = plan.by_group_slices.Divide(blockIdx.y);
    first_group = slice * plan.groups;
    first_channel =
        (blockIdx.y - slice * plan.by_group_slices.value()) * plan.group_slots * kSlotChannels;
  }

  __device__ __forceinline__ int64_t FirstPixel(const FusedSizes& sizes) const {
    return int64_t{n} * sizes.in_h * sizes.in_w;
  }
};

// Writes the positions and the taps of a patch; `rows` positions are at hand.
__device__ __forceinline__ void WriteRowParts(const FusedSizes& sizes, const RegionPlan& plan,
                                              const RegionPatch& patch, int64_t rows,
                                              RowPart* positions, RowPart* taps) {
  for (int p = threadIdx.x; p < plan.positions(); p += kThreadsPerBlock) {
    const int down = p >> plan.width_log2, right = p - (down << plan.width_log2);
    const int y = patch.y + down, x = patch.x + right;
    const int row = down * sizes.out_w + right;
    const bool exists = y < sizes.out_h && x < sizes.out_w && patch.first_row + row >= 0 &&
                        patch.first_row + row < rows;
    positions[p] = {y * sizes.stride_h, x * sizes.stride_w, row * sizes.taps * sizes.in_channels,
                    exists ? row * sizes.taps * sizes.deform_groups : RowPart::kNone};
  }
  for (int t = threadIdx.x; t < sizes.taps; t += kThreadsPerBlock) {
    const Tap tap = Tap::Of(sizes, t);
    taps[t] = {tap.h_base, tap.w_base, t * sizes.group_in_channels, t};
  }
}

// Where channel `channel` of the first tap stands in a row of the columns.
__device__ __forceinline__ int ChannelInRow(const FusedSizes& sizes, int channel) {
  const int group = sizes.by_group_in_channels.Divide(channel);
  return channel + group * (sizes.taps - 1) * sizes.group_in_channels;
}

// --- Planning ---

// The side of the region along an axis: what a patch samples without offsets, and the margin on
// both sides together.
inline int64_t RegionSide(int64_t patch, int64_t stride, int64_t kernel, int64_t dilation,
                          int64_t margin, int64_t size) {
  return std::min((patch - 1) * stride + (kernel - 1) * dilation + 1 + margin, size);
}

// Cuts the deformable groups into slices of at most so many slots.
inline void PlanSlices(const DeformConvParams& params, int most_slots, int element_bytes,
                       RegionPlan* plan) {
  const int64_t slots = CeilDiv<int64_t>(params.deform_group_channels(), kSlotChannels);
  const int64_t slices = CeilDiv<int64_t>(slots, most_slots);
  // Even where it is a part, since two slots may be copied as one vector.
  plan->group_slots = static_cast<int>(slices == 1 ? slots : RoundUp<2>(CeilDiv(slots, slices)));
  plan->group_slices = static_cast<int>(slices);
  plan->groups = 1;
  if (slices == 1) {
    const int64_t groups = std::min<int64_t>(most_slots / slots, params.deform_groups);
    plan->groups =
        static_cast<int>(CeilDiv(params.deform_groups, CeilDiv(params.deform_groups, groups)));
  }
  plan->step_rows = kMostStepRows;
  while (plan->step_rows * plan->groups > kMostStepSamples ||
         plan->step_rows * plan->slots() * kSlotChannels * element_bytes > kMostStepBytes) {
    plan->step_rows /= 2;
  }
}

// The largest patch of at most so many positions, as square as the output allows.
inline void PlanPatch(const DeformConvParams& params, int positions_log2, RegionPlan* plan) {
  plan->height_log2 = positions_log2 / 2;
  plan->width_log2 = positions_log2 - plan->height_log2;
  while (plan->height_log2 > 0 && int64_t{1} << (plan->height_log2 - 1) >= params.out_h) {
    --plan->height_log2, ++plan->width_log2;
  }
  while (plan->width_log2 > 0 && int64_t{1} << (plan->width_log2 - 1) >= params.out_w) {
    --plan->width_log2;
  }
}

// Sizes a patch, its region and its slice such that several thread blocks have room on a
// multiprocessor. Returns the bytes of shared memory, or 0 if nothing fits.
template <typename T>
int64_t PlanRegions(const DeformConvParams& params, const Gpu& gpu, RegionPlan* plan) {
  constexpr int kReservedBytes = 1024;  // of each thread block
  for (int positions_log2 = 6; positions_log2 >= 4; --positions_log2) {
    PlanPatch(params, positions_log2, plan);
    for (int blocks = 3; blocks >= 2; --blocks) {
      const int64_t limit = std::min<int64_t>(
          gpu.multiprocessor_shared_bytes / blocks - kReservedBytes, gpu.block_shared_bytes);
      for (int most_slots = kMostSlots; most_slots >= kSlotsPerWarp; most_slots /= 2) {
        PlanSlices(params, most_slots, sizeof(T), plan);
        for (int margin = 6; margin >= 2; --margin) {
          const int64_t region_h =
              RegionSide(int64_t{1} << plan->height_log2, params.stride_h, params.kernel_h,
                         params.dilation_h, margin, params.in_h);
          const int64_t region_w =
              RegionSide(int64_t{1} << plan->width_log2, params.stride_w, params.kernel_w,
                         params.dilation_w, margin, params.in_w);
          if (region_h * region_w > limit) continue;
          plan->region_h = static_cast<int>(region_h);
          plan->region_w = static_cast<int>(region_w);
          plan->margin_h = plan->margin_w = margin / 2;
          const int64_t bytes = RegionMemory<T>::Bytes(*plan, params.taps());
          if (bytes <= limit) return bytes;
        }
      }
    }
  }
  return 0;
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_PLAN_CUH_
