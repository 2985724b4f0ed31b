// Some images of a batch, for passes that go over it in parts.

#ifndef DEFORM_CONV_CORE_GPU_SOME_IMAGES_H_
#define DEFORM_CONV_CORE_GPU_SOME_IMAGES_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/params.h"
#include "core/return_if_error.h"
#include "core/sampling.h"
#include "core/types.h"

namespace deform_conv {

template <typename T>
class SomeImages {
  using OffsetT = ComputeType<T>;

 public:
  // Images [first, first + images), or as many of them as there are.
  SomeImages(const DeformConvParams& all, const SampledTensors<T, OffsetT>& tensors, int64_t first,
             int64_t images)
      : params_(all),
        position_(first * all.image_positions()),
        input_(first * all.image_size()),
        offset_(position_ * all.offset_channels()),
        mask_(position_ * all.mask_channels()) {
    params_.batch = std::min(images, all.batch - first);
    tensors_ = {Advance(tensors.input, input_), Advance(tensors.offset, offset_),
                Advance(tensors.mask, mask_)};
  }

  const DeformConvParams& params() const { return params_; }
  const SampledTensors<T, OffsetT>& tensors() const { return tensors_; }
  // The first, of the whole batch.
  int64_t position() const { return position_; }
  // Their part of the whole batch's gradients.
  template <typename Input>
  SampledGradients<Input, OffsetT> Of(const SampledGradients<Input, OffsetT>& gradients) const {
    return {Advance(gradients.input, input_), Advance(gradients.offset, offset_),
            Advance(gradients.mask, mask_)};
  }

 private:
  template <typename Element>
  static Element* Advance(Element* tensor, int64_t elements) {
    return tensor == nullptr ? nullptr : tensor + elements;
  }

  DeformConvParams params_;
  SampledTensors<T, OffsetT> tensors_;
  int64_t position_, input_, offset_, mask_;  // where they begin, in elements
};

// Calls run(some) for each part of the batch: `images` images, or what is left of them. Returns an
// empty string, or what went wrong.
template <typename T, typename Run>
std::string ForParts(const DeformConvParams& params,
                     const SampledTensors<T, ComputeType<T>>& tensors, int64_t images,
                     const Run& run) {
  for (int64_t first = 0; first < params.batch; first += images) {
    DEFORM_CONV_RETURN_IF_ERROR(run(SomeImages<T>(params, tensors, first, images)));
  }
  return "";
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_GPU_SOME_IMAGES_H_
