// A region of an image's pixels in shared memory, where a thread block gathers the corners of its
// samples. For .cu files only.
//
// The first-level cache looks up one line of 128 bytes a cycle. Shared memory serves eight vec16s a
// cycle, from as many pixels, if no two lie in the same banks. So they do where eight lanes have
// the channels of 128 bytes of a pixel, each those of its own sample.

#ifndef DEFORM_CONV_CORE_CUDA_GENERAL_STAGED_REGION_CUH_
#define DEFORM_CONV_CORE_CUDA_GENERAL_STAGED_REGION_CUH_

#include <algorithm>
#include <cstdint>

#include "core/cuda/fused/divisor.cuh"
#include "core/cuda/fused/sizes.cuh"
#include "core/cuda/general/atomic_add.cuh"
#include "core/cuda/general/depthwise.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/sm80/copy_async.cuh"
#include "core/cuda/types.cuh"
#include "core/params.h"

namespace deform_conv {
namespace cuda {

// The shared memory that each of `blocks` thread blocks may take that are to share a
// multiprocessor.
inline int64_t SharedBytesOfBlock(int blocks) {
  constexpr int64_t kReserved = 1 << 10;  // of each
  return CurrentGpu().multiprocessor_shared_bytes / blocks - kReserved;
}

// How many pixels the regions of all thread blocks have. None where nothing is staged.
struct RegionSize {
  int h = 0, w = 0;
  int rows_together = 0;  // of pixels, which the threads copy at a time
  Divisor by_w, by_columns;

  RegionSize() = default;
  // Around `out_h` x `out_w` positions. Offsets of up to `margin` pixels keep samples inside,
  // unless these are more than `most` pixels.
  RegionSize(const DeformConvParams& params, int64_t out_h, int64_t out_w, int64_t margin,
             int64_t most) {
    w = Side(out_w, params.stride_w, params.kernel_w, params.dilation_w, margin, params.in_w, most);
    h = Side(out_h, params.stride_h, params.kernel_h, params.dilation_h, margin, params.in_h,
             most / w);
    by_w = Divisor(static_cast<uint32_t>(w));
  }

  // Lays the threads that copy over the region: as many of a lane as can be.
  void LayOver(int threads) {
    const int columns = std::min(w, threads);
    if (columns == 0) return;
    by_columns = Divisor(static_cast<uint32_t>(columns));
    rows_together = threads / columns;
  }

  DEFORM_CONV_INLINE int pixels() const { return h * w; }

 private:
  static int Side(int64_t out, int64_t stride, int64_t kernel, int64_t dilation, int64_t margin,
                  int64_t in, int64_t most) {
    const int64_t side = (out - 1) * stride + (kernel - 1) * dilation + 1 + 2 * margin;
    // The image and the pixels beside it are enough.
    return static_cast<int>(std::min({side, in + 2, most}));
  }
};

// Where the region of a thread block lies: `first` is its first position.
struct Region {
  int top, left;      // in the image, or at most a pixel beside it
  int bottom, right;  // past the last pixel

  __device__ Region(const FusedSizes& sizes, const RegionSize& size, const Position& first,
                    int margin)
      : top(Begin(first.y * sizes.stride_h - sizes.pad_top - margin, size.h, sizes.in_h)),
        left(Begin(first.x * sizes.stride_w - sizes.pad_left - margin, size.w, sizes.in_w)),
        bottom(top + size.h),
        right(left + size.w) {}

  __device__ __forceinline__ bool HasCorners(int h_low, int w_low) const {
    return h_low >= top && h_low + 1 < bottom && w_low >= left && w_low + 1 < right;
  }
  // Where the region's pixel lies in the image.
  __device__ __forceinline__ int InImage(const FusedSizes& sizes, const RegionSize& size,
                                         int pixel) const {
    const int h = size.by_w.Divide(pixel);
    return (top + h) * sizes.in_w + left + pixel - h * size.w;
  }

 private:
  __device__ static int Begin(int begin, int side, int in) {
    return min(max(begin, -1), in + 1 - side);
  }
};

// Where the corners of a sample are, in a region or in memory, and which of them count.
class CornerPlace {
 public:
  CornerPlace() = default;  // no corner counts
  __device__ __forceinline__ static CornerPlace InRegion(const RegionSize& size,
                                                         const Region& region, int h_low, int w_low,
                                                         int bits) {
    const int pixel = (h_low - region.top) * size.w + w_low - region.left;
    return CornerPlace(kInRegion | pixel << kCornerBits | bits);
  }
  __device__ __forceinline__ static CornerPlace InImage(const FusedSizes& sizes, int h_low,
                                                        int w_low, int bits) {
    return CornerPlace(((h_low + 1) * sizes.in_w + w_low + 1) << kCornerBits | bits);
  }

  __device__ __forceinline__ bool in_region() const { return packed_ < 0; }
  __device__ __forceinline__ int bits() const { return packed_ & kAllCorners; }
  // Of the region, that of the top left corner.
  __device__ __forceinline__ int region_pixel() const {
    return (packed_ & ~kInRegion) >> kCornerBits;
  }
  // Of the image; may lie outside.
  __device__ __forceinline__ int image_pixel(const FusedSizes& sizes) const {
    return (packed_ >> kCornerBits) - sizes.in_w - 1;
  }

 private:
  static constexpr int32_t kInRegion = INT32_MIN;

  __device__ __forceinline__ explicit CornerPlace(int32_t packed) : packed_(packed) {}

  int32_t packed_ = 0;
};

// A sample of a patch of positions, located.
template <typename OffsetT>
struct alignas(16) PatchSample {
  OffsetT h_fraction, w_fraction;
  OffsetT mask;
  CornerPlace place;
};

// Writes a vector to shared memory, or zeros; it is there after FinishCopies() and a barrier.
// `from` is a tensor's memory and aligned in either case.
template <typename T, int kSize>
__device__ __forceinline__ void CopyToShared(Vector<T, kSize>* to, const T* from, bool valid) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) * kSize == kVec16Bytes) {
    CopyVec16Async(SharedAddress(to), from, valid);
    return;
  }
#endif
  Vector<T, kSize> vector = {};
  if (valid) vector = Load<T, kSize>(from);
  *to = vector;
}
__device__ __forceinline__ void FinishCopies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  CommitCopies();
  WaitForCopies<0>();
#endif
}

// Copies the region to `to`, [pixels][lanes]; what lies outside the image becomes zeros. `image`
// points to the image's first pixel, and the lane has the channels from `channel` on, or zeros
// where that is negative. `thread` is that among the threads of a lane, which LayOver() was told
// of.
template <typename T, int kSize>
__device__ __forceinline__ void StageRegion(const FusedSizes& sizes, const RegionSize& size,
                                            const Region& region, const T* image, int channel,
                                            int lane, int lanes, int thread, Vector<T, kSize>* to) {
  const int columns = static_cast<int>(size.by_columns.value());
  const int row = size.by_columns.Divide(thread);
  if (row >= size.rows_together) return;
  for (int column = thread - row * columns; column < size.w; column += columns) {
    const int w = region.left + column;
    const bool valid_w = channel >= 0 && w >= 0 && w < sizes.in_w;
    const int pixel = (region.top + row) * sizes.in_w + w;
    const T* from = image + int64_t{pixel} * sizes.in_channels + channel;
    Vector<T, kSize>* at = to + (row * size.w + column) * lanes + lane;
    for (int h = region.top + row; h < region.bottom; h += size.rows_together) {
      const bool valid = valid_w && h >= 0 && h < sizes.in_h;
      CopyToShared<T, kSize>(at, valid ? from : image, valid);
      from += int64_t{size.rows_together * sizes.in_w} * sizes.in_channels;
      at += size.rows_together * size.w * lanes;
    }
  }
}

// Reads the corners of samples from a staged region, or from memory.
template <typename T, int kSize>
struct CornerReader {
  bool staged;                     // whether what lies in the region is read there
  const Vector<T, kSize>* region;  // the lane's of the region's first pixel
  int lanes;                       // of a staged pixel
  const T* image;                  // its first pixel
  int channel;                     // the lane's first

  // Of a sample that the region has.
  __device__ __forceinline__ void LoadStaged(const RegionSize& size, CornerPlace place,
                                             Vector<T, kSize> (&corners)[kCorners]) const {
    const int pixel_bytes = lanes * static_cast<int>(sizeof(Vector<T, kSize>));
    const int row_bytes = size.w * pixel_bytes;
    const char* const top_left =
        reinterpret_cast<const char*>(region) + place.region_pixel() * pixel_bytes;
    const auto load = [](const char* from) {
      return *reinterpret_cast<const Vector<T, kSize>*>(from);
    };
    corners[kTopLeft] = load(top_left);
    corners[kTopRight] = load(top_left + pixel_bytes);
    corners[kBottomLeft] = load(top_left + row_bytes);
    corners[kBottomRight] = load(top_left + row_bytes + pixel_bytes);
  }

  __device__ __forceinline__ void Load(const FusedSizes& sizes, const RegionSize& size,
                                       const Region& where, CornerPlace place,
                                       Vector<T, kSize> (&corners)[kCorners]) const {
    if (place.in_region() && staged) {
      LoadStaged(size, place, corners);
    } else {
      int channels = sizes.in_channels;
      asm volatile("" : "+r"(channels));  // or registers would be kept for what follows from it
      const int pixel = place.in_region() ? where.InImage(sizes, size, place.region_pixel())
                                          : place.image_pixel(sizes);
      LoadCorners(image + (int64_t{pixel} * channels + channel), int64_t{sizes.in_w} * channels,
                  channels, place.bits(), corners);
    }
  }
};

// Writes a sample's gradients of offset and mask, given the products of the columns' gradient with
// each corner, summed over channels. `index` is that of its mask.
template <typename Number>
__device__ __forceinline__ void WriteOffsetAndMask(const PatchSample<Number>& sample,
                                                   Number (&products)[kCorners], int64_t index,
                                                   const SampledGradients<Number>& gradients) {
  Number weights[kCorners], grad_dy = 0, grad_dx = 0, grad_mask = 0;
  // Where no corner counts every gradient is 0, also beside an infinite mask.
  if (sample.place.bits() != 0) {
    BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      // Those with corners that do not count are 0 times the gradient, which may be infinite.
      if (!(sample.place.bits() >> corner & 1)) products[corner] = 0;
      grad_mask += weights[corner] * products[corner];
    }
    grad_dy = sample.mask * BilinearDerivativeH(sample.w_fraction, products);
    grad_dx = sample.mask * BilinearDerivativeW(sample.h_fraction, products);
  }
  if (gradients.offset != nullptr) {
    gradients.offset[2 * index] = grad_dy;
    gradients.offset[2 * index + 1] = grad_dx;
  }
  if (gradients.mask != nullptr) gradients.mask[index] = grad_mask;
}

// Adds to the input's gradient what a sample outside the region brings. `grad_input` is the top
// left corner's.
template <typename T, int kSize>
__device__ __forceinline__ void ScatterFar(const FusedSizes& sizes,
                                           const PatchSample<ComputeType<T>>& sample,
                                           const Vector<T, kSize>& gradient,
                                           ComputeType<T>* grad_input) {
  using Number = ComputeType<T>;
  Number weights[kCorners];
  BilinearWeights(sample.h_fraction, sample.w_fraction, weights);
#pragma unroll
  for (int corner = 0; corner < kCorners; ++corner) {
    if (!(sample.place.bits() >> corner & 1)) continue;
    Number terms[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      terms[i] = weights[corner] * (sample.mask * static_cast<Number>(gradient.elements[i]));
    }
    AtomicAdd<kSize>(grad_input + int64_t{corner / 2 * sizes.in_w + corner % 2} * sizes.in_channels,
                     terms);
  }
}

}  // namespace cuda
}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_CUDA_GENERAL_STAGED_REGION_CUH_
