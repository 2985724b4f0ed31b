// The first half of Col2ImRegions(): the input's gradient. For .cu files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_SCATTER_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_SCATTER_CUH_

#include "core/cuda/general/atomic_add.cuh"
#include "core/cuda/general/col2im_regions_plan.cuh"

namespace deform_conv {
namespace cuda {

// Adds what a slot has to memory; `channels` of it exist.
template <int kSize>
__device__ __forceinline__ void AddSlot(float* to, const float (&terms)[kSlotChannels],
                                        int channels) {
  if constexpr (kSize >= kSlotChannels) {
    AtomicAdd<kSlotChannels>(to, terms);
  } else {
#pragma unroll
    for (int i = 0; i < kSlotChannels; ++i) {
      if (i < channels) atomicAdd(to + i, terms[i]);
    }
  }
}

// The channels of a slot: the first, and how many there are.
struct SlotChannels {
  int first, count;

  __device__ SlotChannels(const FusedSizes& sizes, const RegionPlan& plan, const RegionPatch& patch,
                          int slot) {
    const int g = plan.by_group_slots.Divide(slot);
    const int c = patch.first_channel + (slot - g * plan.group_slots) * kSlotChannels;
    const bool exists = slot < plan.slots() && patch.first_group + g < sizes.deform_groups;
    first = (patch.first_group + g) * sizes.deform_group_channels + c;
    count = exists ? max(min(sizes.deform_group_channels - c, kSlotChannels), 0) : 0;
  }
};

// A thread that locates samples: one of each step. It loads what it needs a step ahead.
template <typename T, int kSize>
class StepWriter {
  using Memory = RegionMemory<T>;
  using Grads = typename Memory::Grads;
  static constexpr int kLoads =
      CeilDiv<int>(kMostStepBytes / sizeof(Grads), kFewestThreadsThatLocate);

 public:
  // `tensors` and `columns` begin with the patch's first position.
  __device__ StepWriter(const FusedSizes& sizes, const SampledTensors<T, float>& tensors,
                        const RegionPlan& plan, const RegionPatch& patch, const Memory& memory,
                        const T* columns, int thread, int threads)
      : sizes_(sizes),
        tensors_(tensors),
        plan_(plan),
        patch_(patch),
        memory_(memory),
        columns_(columns),
        thread_(thread),
        threads_(threads) {
    sample_row_ = plan.by_groups.Divide(thread);
    sample_group_ = thread - sample_row_ * plan.groups;
    first_index_ = (patch.first_group + sample_group_) * sizes.taps;
    locates_ = sample_row_ < plan.step_rows;
    group_exists_ = patch.first_group + sample_group_ < sizes.deform_groups;
  }

  __device__ __forceinline__ void Fetch(int step) {
    if (locates_) FetchSample(step * plan_.step_rows + sample_row_);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = thread_ + k * threads_;
      if (i < plan_.step_rows * plan_.slots()) FetchGrads(step * plan_.step_rows, i, &grads_[k]);
    }
  }

  __device__ __forceinline__ void Write(const typename Memory::Step& to) {
    if (locates_) WriteSample(to);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int i = thread_ + k * threads_;
      if (i >= plan_.step_rows * plan_.slots()) break;
      const int row = plan_.by_slots.Divide(i);
      const int slot = i - row * plan_.slots();
      to.grads[((row >> 1) * plan_.slots() + slot) * 2 + (row & 1)] = grads_[k];
    }
  }

 private:
  // Finds the position and the tap of a row of the patch.
  __device__ __forceinline__ bool FindRow(int row, RowPart* position, RowPart* tap) const {
    const int p = sizes_.by_taps.Divide(row);
    if (p >= plan_.positions()) return false;
    *position = memory_.positions[p];
    *tap = memory_.taps[row - p * sizes_.taps];
    return position->index != RowPart::kNone;
  }

  __device__ __forceinline__ void FetchSample(int row) {
    RowPart position, tap;
    exists_ = group_exists_ && FindRow(row, &position, &tap);
    if (!exists_) return;
    const int index = position.index + first_index_ + tap.index;
    dy_ = tensors_.offset[2 * int64_t{index}];
    dx_ = tensors_.offset[2 * int64_t{index} + 1];
    if (tensors_.mask != nullptr) mask_ = tensors_.mask[index];
    h_base_ = position.h + tap.h;
    w_base_ = position.w + tap.w;
  }

  __device__ __forceinline__ void FetchGrads(int first_row, int i, Grads* grads) {
    const int row = plan_.by_slots.Divide(i);
    const SlotChannels channels(sizes_, plan_, patch_, i - row * plan_.slots());
    RowPart position, tap;
    if (channels.count == 0 || !FindRow(first_row + row, &position, &tap)) return;
    const T* const from = columns_ + (position.column + tap.column);
    if constexpr (kSize >= kSlotChannels) {
      *grads = Load<T, kSlotChannels>(from + ChannelInRow(sizes_, channels.first));
    } else {
#pragma unroll
      for (int c = 0; c < kSlotChannels; ++c) {
        if (c < channels.count) {
          grads->elements[c] = from[ChannelInRow(sizes_, channels.first + c)];
        }
      }
    }
  }

  // Writes the weights of the sample's four pixels. Of four pixels around a sample, each is of
  // another kind: its row is even or odd, and its column.
  __device__ __forceinline__ void WriteSample(const typename Memory::Step& to) const {
    ImageSample<float, int32_t> sample;
    sample.corner_bits = 0;
    sample.h_low = sample.w_low = 0;
    if (exists_) {
      sample = LocateSample<float, int32_t>(h_base_, w_base_, dy_, dx_, sizes_.in_h, sizes_.in_w);
    }
    const int kind_of_first = (sample.h_low & 1) << 1 | (sample.w_low & 1);
    const int down = sample.h_low - patch_.top, right = sample.w_low - patch_.left;
    PixelWeight* const weights =
        to.weights + ((sample_row_ >> 1) * plan_.groups + sample_group_) * 2 + (sample_row_ & 1);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      const int h = down + corner / 2, w = right + corner % 2;
      const bool inside = static_cast<unsigned>(h) < static_cast<unsigned>(plan_.region_h) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(plan_.region_w);
      PixelWeight weight = {0.0f, PixelWeight::kNone};
      if (sample.corner_bits >> corner & 1) {
        weight.weight = mask_ * sample.weights[corner];
        weight.at =
            inside ? (h * plan_.region_w + w) * plan_.slots()
                   : PixelWeight::kNone - 1 -
                         ((sample.h_low + corner / 2) * sizes_.in_w + sample.w_low + corner % 2);
      }
      weights[(corner ^ kind_of_first) * (plan_.step_rows * plan_.groups)] = weight;
    }
  }

  const FusedSizes& sizes_;
  const SampledTensors<T, float>& tensors_;
  const RegionPlan& plan_;
  const RegionPatch& patch_;
  const Memory& memory_;
  const T* const columns_;
  const int thread_, threads_;
  int sample_row_, sample_group_, first_index_;
  bool locates_, group_exists_;
  // Of the next step.
  bool exists_ = false;
  float dy_ = 0, dx_ = 0, mask_ = 1;
  int h_base_ = 0, w_base_ = 0;
  Grads grads_[kLoads];
};

// A lane that adds to the region's sums. It owns a slot of all pixels of one kind, so no other lane
// reads or writes its sums, and no two corners of a sample meet in it.
template <typename T, int kSize>
class SumsOwner {
  using Memory = RegionMemory<T>;

 public:
  __device__ SumsOwner(const FusedSizes& sizes, const RegionPlan& plan, const RegionPatch& patch,
                       const Memory& memory, float* grad_input, int warp)
      : plan_(plan) {
    const int lane = threadIdx.x % kWarp;
    slot_ = warp * kSlotsPerWarp + lane % kSlotsPerWarp;
    kind_ = lane / kSlotsPerWarp;
    group_ = plan.by_group_slots.Divide(slot_);
    const SlotChannels channels(sizes, plan, patch, slot_);
    count_ = channels.count;
    sums_ = memory.sums + slot_;
    pixel_size_ = sizes.in_channels;
    grad_input_ = grad_input + patch.FirstPixel(sizes) * sizes.in_channels + channels.first;
  }

  __device__ __forceinline__ void Add(const typename Memory::Step& step) const {
    if (count_ == 0) return;
    const int pairs = plan_.step_rows / 2;
    const PixelWeight* weights = step.weights + (kind_ * pairs * plan_.groups + group_) * 2;
    const T* grads = step.grads[slot_ * 2].elements;
    Pair next = Load(weights, grads);
    for (int pair = 0; pair < pairs; ++pair) {
      const Pair now = next;
      weights += 2 * plan_.groups;
      grads += 2 * kSlotChannels * plan_.slots();
      if (pair + 1 < pairs) next = Load(weights, grads);
      AddPair(now);
    }
  }

 private:
  // Of two rows.
  struct Pair {
    Vector<PixelWeight, 2> weights;
    typename Memory::Grads grads[2];
  };

  __device__ __forceinline__ static Pair Load(const PixelWeight* weights, const T* grads) {
    return {
        cuda::Load<PixelWeight, 2>(weights),
        {cuda::Load<T, kSlotChannels>(grads), cuda::Load<T, kSlotChannels>(grads + kSlotChannels)}};
  }

  // Both rows' sums are read before either's are written, so that one does not wait for the other.
  __device__ __forceinline__ void AddPair(const Pair& pair) const {
    const PixelWeight &first = pair.weights.elements[0], &second = pair.weights.elements[1];
    SlotSums sums[2];
    if (first.at >= 0) sums[0] = sums_[first.at];
    if (second.at >= 0) sums[1] = sums_[second.at];
#pragma unroll
    for (int i = 0; i < kSlotChannels; ++i) {
      sums[0].elements[i] += first.weight * static_cast<float>(pair.grads[0].elements[i]);
      if (first.at == second.at) sums[1].elements[i] = sums[0].elements[i];
      sums[1].elements[i] += second.weight * static_cast<float>(pair.grads[1].elements[i]);
    }
    if (first.at >= 0) sums_[first.at] = sums[0];
    if (second.at >= 0) sums_[second.at] = sums[1];
    if (min(first.at, second.at) < PixelWeight::kNone) {
      AddFar(first, pair.grads[0]);
      AddFar(second, pair.grads[1]);
    }
  }

  __device__ __forceinline__ void AddFar(const PixelWeight& weight,
                                         const typename Memory::Grads& grads) const {
    if (weight.at >= PixelWeight::kNone) return;
    float terms[kSlotChannels];
#pragma unroll
    for (int i = 0; i < kSlotChannels; ++i) {
      terms[i] = weight.weight * static_cast<float>(grads.elements[i]);
    }
    AddSlot<kSize>(grad_input_ + int64_t{PixelWeight::kNone - 1 - weight.at} * pixel_size_, terms,
                   count_);
  }

  const RegionPlan& plan_;
  int slot_, kind_, group_;
  int count_;  // channels
  int pixel_size_;
  SlotSums* sums_;
  float* grad_input_;
};

// Adds the region's sums to memory. Pixels that nothing was added to are skipped.
template <typename T, int kSize>
__device__ __forceinline__ void AddRegion(const FusedSizes& sizes, const RegionPlan& plan,
                                          const RegionPatch& patch, const RegionMemory<T>& memory,
                                          float* grad_input) {
  float* const image = grad_input + patch.FirstPixel(sizes) * sizes.in_channels;
  for (int i = threadIdx.x; i < plan.pixels() * plan.slots(); i += kThreadsPerBlock) {
    const SlotSums sums = memory.sums[i];
    bool any = false;
#pragma unroll
    for (int c = 0; c < kSlotChannels; ++c) any |= sums.elements[c] != 0.0f;
    if (!any) continue;
    const int pixel = plan.by_slots.Divide(i);
    const int h = plan.by_region_w.Divide(pixel);
    const SlotChannels channels(sizes, plan, patch, i - pixel * plan.slots());
    const int at = (patch.top + h) * sizes.in_w + patch.left + pixel - h * plan.region_w;
    AddSlot<kSize>(image + int64_t{at} * sizes.in_channels + channels.first, sums.elements,
                   channels.count);
  }
}

// Waits for all warps of the thread block, which come from different places of the program.
__device__ __forceinline__ void MeetAtStep() {
  asm volatile("barrier.sync 1, %0;" ::"n"(kThreadsPerBlock) : "memory");
}

// Adds to the input's gradient what the patch and the slice bring. Some warps add to the region's
// sums, while the others locate the samples of the next step, and load those of the one after.
// `tensors` and `columns` begin with the patch's first position.
template <typename T, int kSize>
__device__ void ScatterPatch(const FusedSizes& sizes, const SampledTensors<T, float>& tensors,
                             const RegionPlan& plan, const RegionPatch& patch,
                             const RegionMemory<T>& memory, const T* columns, float* grad_input) {
  constexpr int kWarps = kThreadsPerBlock / kWarp;
  for (int i = threadIdx.x; i < plan.pixels() * plan.slots(); i += kThreadsPerBlock) {
    memory.sums[i] = {};
  }
  const int warps_that_add = CeilDiv(plan.slots(), kSlotsPerWarp);
  // Other warps in other thread blocks, so that these do not share one scheduler.
  const int turn = (blockIdx.x + gridDim.x * blockIdx.y) / plan.multiprocessors * warps_that_add;
  const int warp = (threadIdx.x / kWarp + turn) % kWarps;
  const int steps = CeilDiv(plan.positions() * sizes.taps, plan.step_rows);
  if (warp < warps_that_add) {
    const SumsOwner<T, kSize> owner(sizes, plan, patch, memory, grad_input, warp);
    MeetAtStep();
    for (int step = 0; step < steps; ++step) {
      owner.Add(memory.StepAt(step));
      MeetAtStep();
    }
  } else {
    StepWriter<T, kSize> writer(sizes, tensors, plan, patch, memory, columns,
                                (warp - warps_that_add) * kWarp + threadIdx.x % kWarp,
                                (kWarps - warps_that_add) * kWarp);
    writer.Fetch(0);
    for (int step = 0; step < steps; ++step) {
      writer.Write(memory.StepAt(step));
      writer.Fetch(step + 1);
      MeetAtStep();
    }
    MeetAtStep();
  }
  AddRegion<T, kSize>(sizes, plan, patch, memory, grad_input);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_SCATTER_CUH_
