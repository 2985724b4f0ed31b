// Sizes of one deformable convolution, or aggregation, which has no filters: the attributes that a
// caller chooses, and everything that follows from them and the shapes of the tensors.

#ifndef DEFORM_CONV_CORE_PARAMS_H_
#define DEFORM_CONV_CORE_PARAMS_H_

#include <array>
#include <cstdint>
#include <string>

#include "core/export.h"

namespace deform_conv {

// A dimension that is not known yet, in shape inference.
constexpr int64_t kUnknown = -1;

enum class Padding { kSame, kValid, kExplicit };

// What the caller chooses. Height comes before width, whatever the data format.
struct DeformConvAttributes {
  int64_t stride_h = 1, stride_w = 1;
  int64_t dilation_h = 1, dilation_w = 1;
  Padding padding = Padding::kSame;
  // Read for Padding::kExplicit only.
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t deform_groups = 1;
  // Read where there are no filters only.
  int64_t kernel_h = 0, kernel_w = 0;
};

// Shapes of tensors in native form; any dimension may be kUnknown.
struct DeformConvShapes {
  std::array<int64_t, 4> input;    // N, H, W, C
  std::array<int64_t, 4> filters;  // KH, KW, C / groups, O; read if has_filters
  std::array<int64_t, 4> offset;   // N, OH, OW, 2 * deform_groups * KH * KW
  std::array<int64_t, 4> mask;     // N, OH, OW, deform_groups * KH * KW; read if has_mask
  bool has_mask = false;
  bool has_filters = true;
};

// Everything that the computation needs to know. Passed by value into kernels.
//
// Without filters, it aggregates: each channel is a group of its own, and its output the sum of its
// masked samples, as with filters of ones. Errors then call the mask `weights`.
struct DeformConvParams {
  int64_t batch, in_h, in_w, in_channels;
  int64_t out_h, out_w, out_channels;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t dilation_h, dilation_w;
  int64_t pad_top, pad_left;
  int64_t groups, deform_groups;
  bool has_mask, has_filters;

  // constexpr, so that they can be called in kernels too.
  constexpr int64_t taps() const { return kernel_h * kernel_w; }
  constexpr int64_t image_pixels() const { return in_h * in_w; }
  constexpr int64_t image_positions() const { return out_h * out_w; }
  constexpr int64_t out_positions() const { return batch * image_positions(); }
  constexpr int64_t group_in_channels() const { return in_channels / groups; }
  constexpr int64_t group_out_channels() const { return out_channels / groups; }
  constexpr int64_t deform_group_channels() const { return in_channels / deform_groups; }
  // Numbers per output position in the offset and in the mask.
  constexpr int64_t offset_channels() const { return 2 * deform_groups * taps(); }
  constexpr int64_t mask_channels() const { return deform_groups * taps(); }
  // Elements of the filters, if there are any, and of an image of the input.
  constexpr int64_t filters_size() const { return taps() * group_in_channels() * out_channels; }
  constexpr int64_t image_size() const { return image_pixels() * in_channels; }
};

// Checks the attributes and shapes and derives `params` from them. Both are done here only.
//
// Returns an empty string, or what is wrong, naming the argument, the rule and what was received.
// Unknown dimensions pass every check that they are part of, and leave kUnknown wherever `params`
// depends on them and no other argument tells; with all dimensions known, `params` is safe to
// compute with. Where something is wrong, `params` is unspecified.
DEFORM_CONV_EXPORT std::string MakeParams(const DeformConvAttributes& attributes,
                                          const DeformConvShapes& shapes, DeformConvParams* params);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_PARAMS_H_
