// The second half of Col2ImRegions(): the gradients of offset and mask, and the columns. For .cu
// files only.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_PRODUCTS_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_PRODUCTS_CUH_

#include "core/cuda/general/col2im_regions_plan.cuh"
#include "core/cuda/general/col2im_regions_scatter.cuh"
#include "core/cuda/general/samples.cuh"

namespace deform_conv {
namespace cuda {

// Copies the region's pixels of the slice, whole deformable groups, to shared memory.
template <typename T, int kSize>
__device__ __forceinline__ void LoadRegion(const FusedSizes& sizes, const RegionPlan& plan,
                                           const RegionPatch& patch, const T* input, T* region) {
  const int groups = min(plan.groups, sizes.deform_groups - patch.first_group);
  const int channels = plan.groups * sizes.deform_group_channels;
  const int vectors = channels / kSize, existing = groups * sizes.deform_group_channels;
  const T* from = input + patch.FirstPixel(sizes) * sizes.in_channels +
                  patch.first_group * sizes.deform_group_channels;
  for (int i = threadIdx.x; i < plan.pixels() * vectors; i += kThreadsPerBlock) {
    const int pixel = plan.by_vectors.Divide(i);
    const int c = (i - pixel * vectors) * kSize;
    if (c >= existing) continue;
    const int h = plan.by_region_w.Divide(pixel);
    const int at = (patch.top + h) * sizes.in_w + patch.left + pixel - h * plan.region_w;
    *reinterpret_cast<Vector<T, kSize>*>(region + i * kSize) =
        Load<T, kSize>(from + int64_t{at} * sizes.in_channels + c);
  }
}

// The products of the columns' gradient with the corners, and the columns. A warp locates 32
// samples at a time, one a lane. Then each team of lanes takes one of them after the other, its
// lanes the channels.
template <typename T, int kSize>
class SampleMultiplier {
 public:
  // `tensors`, `columns` and `gradients` begin with the patch's first position.
  __device__ SampleMultiplier(const FusedSizes& sizes, const SampledTensors<T, float>& tensors,
                              const RegionPlan& plan, const RegionPatch& patch,
                              const RegionMemory<T>& memory, bool replace, T* columns,
                              const SampledGradients<float>& gradients)
      : sizes_(sizes),
        tensors_(tensors),
        plan_(plan),
        patch_(patch),
        memory_(memory),
        replace_(replace),
        columns_(columns),
        gradients_(gradients),
        region_(memory.input()),
        image_(tensors.input + patch.FirstPixel(sizes) * sizes.in_channels) {}

  __device__ __forceinline__ void Run() const {
    if (plan_.lanes_log2 == 0) {
      MultiplyAll<true>();
    } else {
      MultiplyAll<false>();
    }
  }

 private:
  struct Sample {
    static constexpr int kExists = 1 << kCorners, kFar = 2 << kCorners;
    int bits;  // of the corners that count, and those above
    float h_fraction, w_fraction, mask;
    int pixel;    // of the region, or where it is far of the image
    int column;   // of the deformable group's first channel
    int channel;  // the deformable group's first, in the slice
    int index;
  };

  // With kOneLane, a team is one lane.
  template <bool kOneLane>
  __device__ __forceinline__ void MultiplyAll() const {
    const int samples = plan_.positions() * sizes_.taps * plan_.groups;
    const int lane = threadIdx.x % kWarp;
    // Whole warps go round, for the shuffles.
    for (int s = threadIdx.x; s - lane < samples; s += kThreadsPerBlock) {
      const Sample own = Locate(s, samples);
      float products[kCorners] = {};
      if constexpr (kOneLane) {
        Multiply<true>(own, 0, products);
      } else {
        MultiplyInTeams(own, lane, products);
      }
      Write(own, products);
    }
  }

  // The teams take the warp's samples, and each lane gets the products of its own.
  __device__ __forceinline__ void MultiplyInTeams(const Sample& own, int lane,
                                                  float (&own_products)[kCorners]) const {
    const int teams = kWarp >> plan_.lanes_log2;
    for (int first = 0; first < kWarp; first += teams) {
      float products[kCorners] = {};
      Multiply<false>(Of(own, first + (lane >> plan_.lanes_log2)),
                      lane & ((1 << plan_.lanes_log2) - 1), products);
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        for (int distance = 1 << plan_.lanes_log2 >> 1; distance > 0; distance /= 2) {
          products[corner] += __shfl_xor_sync(0xffffffffu, products[corner], distance);
        }
        products[corner] =
            __shfl_sync(0xffffffffu, products[corner], (lane - first) << plan_.lanes_log2);
        if (lane >= first && lane < first + teams) own_products[corner] = products[corner];
      }
    }
  }

  // In the order of positions, taps and groups.
  __device__ __forceinline__ Sample Locate(int s, int samples) const {
    Sample sample = {};
    if (s >= samples) return sample;
    const int row = plan_.by_groups.Divide(s), g = s - row * plan_.groups;
    const int p = sizes_.by_taps.Divide(row);
    const RowPart position = memory_.positions[p], tap = memory_.taps[row - p * sizes_.taps];
    const int group = patch_.first_group + g;
    if (position.index == RowPart::kNone || group >= sizes_.deform_groups) return sample;
    sample.index = position.index + group * sizes_.taps + tap.index;
    const auto offset = LoadTwo<(kSize > 1)>(tensors_.offset + 2 * int64_t{sample.index});
    const auto located =
        LocateSample<float, int32_t>(position.h + tap.h, position.w + tap.w, offset.elements[0],
                                     offset.elements[1], sizes_.in_h, sizes_.in_w);
    sample.column = position.column + tap.column;
    sample.channel = g * sizes_.deform_group_channels;
    sample.h_fraction = located.h_fraction;
    sample.w_fraction = located.w_fraction;
    sample.mask = tensors_.mask == nullptr ? 1.0f : tensors_.mask[sample.index];
    const int down = located.h_low - patch_.top, right = located.w_low - patch_.left;
    // A corner outside the region is one that does not count where the region ends with the image.
    const bool inside = down >= (patch_.top == 0 ? -1 : 0) &&
                        right >= (patch_.left == 0 ? -1 : 0) &&
                        down < plan_.region_h - (patch_.top + plan_.region_h < sizes_.in_h) &&
                        right < plan_.region_w - (patch_.left + plan_.region_w < sizes_.in_w);
    sample.pixel =
        inside ? down * plan_.region_w + right : located.h_low * sizes_.in_w + located.w_low;
    sample.bits = located.corner_bits | Sample::kExists | (inside ? 0 : Sample::kFar);
    return sample;
  }

  // The sample of another lane.
  __device__ __forceinline__ static Sample Of(const Sample& own, int lane) {
    constexpr unsigned kAll = 0xffffffffu;
    return {__shfl_sync(kAll, own.bits, lane),       __shfl_sync(kAll, own.h_fraction, lane),
            __shfl_sync(kAll, own.w_fraction, lane), __shfl_sync(kAll, own.mask, lane),
            __shfl_sync(kAll, own.pixel, lane),      __shfl_sync(kAll, own.column, lane),
            __shfl_sync(kAll, own.channel, lane),    own.index};
  }

  __device__ __forceinline__ void LoadSample(const Sample& sample, int c,
                                             Vector<T, kSize> (&corners)[kCorners]) const {
    if (!(sample.bits & Sample::kFar)) {
      const int pixel = plan_.groups * sizes_.deform_group_channels;
      LoadCorners(region_ + sample.pixel * pixel + sample.channel + c, plan_.region_w * pixel,
                  pixel, sample.bits, corners);
    } else {
      LoadCorners(image_ + int64_t{sample.pixel} * sizes_.in_channels +
                      patch_.first_group * sizes_.deform_group_channels + sample.channel + c,
                  int64_t{sizes_.in_w} * sizes_.in_channels, sizes_.in_channels, sample.bits,
                  corners);
    }
  }

  template <bool kOneLane>
  __device__ __forceinline__ void Multiply(const Sample& sample, int lane,
                                           float (&products)[kCorners]) const {
    const bool any = sample.bits & kAllCorners;
    if (!any && !(replace_ && (sample.bits & Sample::kExists))) return;
    // What lies outside is 0, whatever the mask.
    const float mask = any ? sample.mask : 0.0f;
    float weights[kCorners];
    BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
    const int step = kOneLane ? kSize : kSize << plan_.lanes_log2;
    const int channels = kOneLane ? kSize : sizes_.deform_group_channels;
    for (int c = lane * kSize; c < channels; c += step) {
      T* const column =
          columns_ +
          (sample.column + ChannelInRow(sizes_, patch_.first_group * sizes_.deform_group_channels +
                                                    sample.channel + c));
      const Vector<T, kSize> grads = Load<T, kSize>(column);
      float sums[kSize] = {};
      if (any) {
        Vector<T, kSize> corners[kCorners];
        LoadSample(sample, c, corners);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float grad = static_cast<float>(grads.elements[i]);
#pragma unroll
          for (int corner = 0; corner < kCorners; ++corner) {
            const float value = static_cast<float>(corners[corner].elements[i]);
            products[corner] += grad * value;
            sums[i] += weights[corner] * value;
          }
        }
      }
      if (replace_) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[i] *= mask;
        Store(column, sums);
      }
    }
  }

  __device__ __forceinline__ void Write(const Sample& sample, float (&products)[kCorners]) const {
    if (!(sample.bits & Sample::kExists)) return;
    ImageSample<float, int32_t> located;
    located.corner_bits = sample.bits & kAllCorners;
    located.h_fraction = sample.h_fraction;
    located.w_fraction = sample.w_fraction;
    BilinearWeights(sample.h_fraction, sample.w_fraction, located.weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      // A corner that does not count is 0 times the gradient, which may be infinite.
      if (!(sample.bits >> corner & 1)) products[corner] = 0;
    }
    WriteGradients<(kSize > 1)>(located, sample.mask, int64_t{sample.index}, products, gradients_);
  }

  const FusedSizes& sizes_;
  const SampledTensors<T, float>& tensors_;
  const RegionPlan& plan_;
  const RegionPatch& patch_;
  const RegionMemory<T>& memory_;
  const bool replace_;
  T* const columns_;
  const SampledGradients<float>& gradients_;
  const T* const region_;  // [pixels][channels of the slice], in shared memory
  const T* const image_;
};

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_COL2IM_REGIONS_PRODUCTS_CUH_
