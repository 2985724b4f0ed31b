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

// Loads a number and the one behind it.
template <bool kAligned>
__device__ __forceinline__ Vector<float, 2> LoadTwo(const float* from) {
  if constexpr (kAligned) return Load<float, 2>(from);
  return {from[0], from[1]};
}

// A thread that locates samples, one of each step, and copies the columns' gradient. It loads what
// it needs a step ahead, and describes rows two steps ahead.
template <typename T, int kSize>
class StepWriter {
  using Memory = RegionMemory<T>;
  using Grads = typename Memory::Grads;
  // A copy is that of several slots where these are one vector.
  static constexpr int kCopySlots = kSize > kSlotChannels ? kSize / kSlotChannels : 1;
  static constexpr int kCopies =
      CeilDiv<int>(kMostStepBytes / (kCopySlots * sizeof(Grads)), kFewestThreadsThatLocate);
  using Copied = Vector<uint32_t, kCopySlots * sizeof(Grads) / sizeof(uint32_t)>;

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
        thread_(thread) {
    sample_row_ = plan.by_groups.Divide(thread);
    const int g = thread - sample_row_ * plan.groups;
    first_index_ = (patch.first_group + g) * sizes.taps;
    weights_at_ = ((sample_row_ >> 1) * plan.groups + g) * 2 + (sample_row_ & 1);
    locates_ = sample_row_ < plan.step_rows;
    group_exists_ = patch.first_group + g < sizes.deform_groups;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      // Threads that do not locate come first.
      const int i = (threads * (k + 1) - 1 - thread) * kCopySlots;
      const int row = plan.by_slots.Divide(i);
      const int slot = i - row * plan.slots();
      const SlotChannels channels(sizes, plan, patch, slot);
      copy_row_[k] = row < plan.step_rows && channels.count > 0 ? row : kNone;
      copy_to_[k] = ((row >> 1) * plan.slots() + slot) * 2 + (row & 1);
      copy_from_[k] = kSize > 1 ? ChannelInRow(sizes, channels.first) : channels.first;
      copy_count_[k] = channels.count;
    }
  }

  __device__ __forceinline__ void Describe(int step) const {
    if (thread_ >= plan_.step_rows) return;
    const int row = step * plan_.step_rows + thread_;
    const int p = sizes_.by_taps.Divide(row);
    RowPart described = {0, 0, 0, RowPart::kNone};
    if (p < plan_.positions()) {
      const RowPart position = memory_.positions[p], tap = memory_.taps[row - p * sizes_.taps];
      described = {position.h + tap.h, position.w + tap.w, position.column + tap.column,
                   position.index == RowPart::kNone ? RowPart::kNone : position.index + tap.index};
    }
    memory_.RowsOf(step, plan_.step_rows)[thread_] = described;
  }

  __device__ __forceinline__ void Fetch(int step) {
    const RowPart* const rows = memory_.RowsOf(step, plan_.step_rows);
    if (locates_) {
      row_ = rows[sample_row_];
      if (!group_exists_) row_.index = RowPart::kNone;
      if (row_.index != RowPart::kNone) {
        const int64_t index = row_.index + first_index_;
        offset_ = LoadTwo<(kSize > 1)>(tensors_.offset + 2 * index);
        if (tensors_.mask != nullptr) mask_ = tensors_.mask[index];
      }
    }
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      if (copy_row_[k] == kNone) continue;
      const RowPart& row = rows[copy_row_[k]];
      if (row.index != RowPart::kNone) Copy(columns_ + row.column, k);
    }
  }

  __device__ __forceinline__ void Write(const typename Memory::Step& to) const {
    if (locates_) WriteSample(to.weights + weights_at_);
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      if (copy_row_[k] == kNone) continue;
#pragma unroll
      for (int i = 0; i < kCopySlots; ++i) {
        to.grads[copy_to_[k] + 2 * i] = reinterpret_cast<const Grads*>(&copied_[k])[i];
      }
    }
  }

 private:
  static constexpr int kNone = -1;

  __device__ __forceinline__ void Copy(const T* row, int k) {
    if constexpr (kSize > 1) {
      copied_[k] = *reinterpret_cast<const Copied*>(row + copy_from_[k]);
    } else {
      T* const elements = reinterpret_cast<T*>(copied_[k].elements);
#pragma unroll
      for (int c = 0; c < kSlotChannels; ++c) {
        if (c < copy_count_[k]) elements[c] = row[ChannelInRow(sizes_, copy_from_[k] + c)];
      }
    }
  }

  // Writes the weights of the sample's four pixels. Of four pixels around a sample, each is of
  // another kind: its row is even or odd, and its column.
  __device__ __forceinline__ void WriteSample(PixelWeight* to) const {
    ImageSample<float, int32_t> sample = LocateSample<float, int32_t>(
        row_.h, row_.w, offset_.elements[0], offset_.elements[1], sizes_.in_h, sizes_.in_w);
    if (row_.index == RowPart::kNone) sample.corner_bits = 0;
    const int kind_of_first = (sample.h_low & 1) << 1 | (sample.w_low & 1);
    const int down = sample.h_low - patch_.top, right = sample.w_low - patch_.left;
    const int near = (down * plan_.region_w + right) * plan_.slots();
    const int far = PixelWeight::kNone - 1 - (sample.h_low * sizes_.in_w + sample.w_low);
    const int kinds_apart = plan_.step_rows * plan_.groups;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      const int below = corner / 2, beside = corner % 2;
      const bool inside =
          static_cast<unsigned>(down + below) < static_cast<unsigned>(plan_.region_h) &&
          static_cast<unsigned>(right + beside) < static_cast<unsigned>(plan_.region_w);
      const int at = inside ? near + (below * plan_.region_w + beside) * plan_.slots()
                            : far - (below * sizes_.in_w + beside);
      const bool counts = sample.corner_bits >> corner & 1;
      to[(corner ^ kind_of_first) * kinds_apart] = {mask_ * sample.weights[corner],
                                                    counts ? at : PixelWeight::kNone};
    }
  }

  const FusedSizes& sizes_;
  const SampledTensors<T, float>& tensors_;
  const RegionPlan& plan_;
  const RegionPatch& patch_;
  const Memory& memory_;
  const T* const columns_;
  const int thread_;
  // The sample of each step.
  int sample_row_, first_index_, weights_at_;
  bool locates_, group_exists_;
  // The copies of each step: a row, where to, and the first channel, or where it stands in a row.
  int copy_row_[kCopies], copy_to_[kCopies], copy_from_[kCopies], copy_count_[kCopies];
  // Of the next step.
  RowPart row_ = {0, 0, 0, RowPart::kNone};
  Vector<float, 2> offset_ = {};
  float mask_ = 1;
  Copied copied_[kCopies];
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
    const typename Memory::Grads* grads = step.grads + slot_ * 2;
    Pair next = Load(weights, grads);
    for (int pair = 0; pair < pairs; ++pair) {
      const Pair now = next;
      weights += 2 * plan_.groups;
      grads += 2 * plan_.slots();
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

  __device__ __forceinline__ static Pair Load(const PixelWeight* weights,
                                              const typename Memory::Grads* grads) {
    return {cuda::Load<PixelWeight, 2>(weights), {grads[0], grads[1]}};
  }

  __device__ __forceinline__ static float Element(const typename Memory::Grads& grads, int i) {
    return static_cast<float>(reinterpret_cast<const T*>(grads.elements)[i]);
  }

  // Both rows' sums are read before either's are written, so that one does not wait for the other.
  __device__ __forceinline__ void AddPair(const Pair& pair) const {
    const PixelWeight &first = pair.weights.elements[0], &second = pair.weights.elements[1];
    SlotSums sums[2];
    if (first.at >= 0) sums[0] = sums_[first.at];
    if (second.at >= 0) sums[1] = sums_[second.at];
#pragma unroll
    for (int i = 0; i < kSlotChannels; ++i) {
      sums[0].elements[i] += first.weight * Element(pair.grads[0], i);
      if (first.at == second.at) sums[1].elements[i] = sums[0].elements[i];
      sums[1].elements[i] += second.weight * Element(pair.grads[1], i);
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
      terms[i] = weight.weight * Element(grads, i);
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
    for (int i = 0; i < 4; ++i) MeetAtStep();
    for (int step = 0; step < steps; ++step) {
      owner.Add(memory.StepAt(step));
      MeetAtStep();
    }
  } else {
    StepWriter<T, kSize> writer(sizes, tensors, plan, patch, memory, columns,
                                (warp - warps_that_add) * kWarp + threadIdx.x % kWarp,
                                (kWarps - warps_that_add) * kWarp);
    MeetAtStep();
    writer.Describe(0);
    writer.Describe(1);
    MeetAtStep();
    writer.Fetch(0);
    MeetAtStep();
    for (int step = 0; step < steps; ++step) {
      writer.Write(memory.StepAt(step));
      writer.Fetch(step + 1);
      writer.Describe(step + 2);
      MeetAtStep();
    }
    MeetAtStep();
  }
  AddRegion<T, kSize>(sizes, plan, patch, memory, grad_input);
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_SCATTER_CUH_
