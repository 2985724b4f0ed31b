// Sizes of one deformable convolution over three axes, as core/params.h has them for two.

#ifndef DEFORM_CONV_CORE_PARAMS3D_H_
#define DEFORM_CONV_CORE_PARAMS3D_H_

#include <array>
#include <cstdint>
#include <string>

#include "core/export.h"
#include "core/params.h"

namespace deform_conv {

// The spatial axes, in the order of all tensors.
enum SpatialAxis { kDepth, kHeight, kWidth, kSpatialAxes };

// What the caller chooses for one axis. The padding is read for Padding::kExplicit only.
struct AxisAttributes {
  int64_t stride = 1, dilation = 1;
  int64_t pad_before = 0, pad_after = 0;
};

struct DeformConv3DAttributes {
  std::array<AxisAttributes, kSpatialAxes> axes;
  Padding padding = Padding::kSame;
  int64_t deform_groups = 1;
};

// Shapes of tensors in native form; any dimension may be kUnknown.
struct DeformConv3DShapes {
  std::array<int64_t, 5> input;    // N, D, H, W, C
  std::array<int64_t, 5> filters;  // KD, KH, KW, C / groups, O
  std::array<int64_t, 5> offset;   // N, OD, OH, OW, 3 * deform_groups * KD * KH * KW
  std::array<int64_t, 5> mask;     // N, OD, OH, OW, deform_groups * KD * KH * KW; read if has_mask
  bool has_mask = false;
};

// Sizes of one axis.
struct AxisSizes {
  int64_t in, out, kernel, stride, dilation, pad_before;

  // The coordinate of tap `tap` at output `at`, without offset.
  constexpr int64_t Base(int64_t at, int64_t tap) const {
    return at * stride - pad_before + tap * dilation;
  }
};

// Everything that the computation needs to know. Passed by value into kernels.
struct DeformConv3DParams {
  int64_t batch, in_channels, out_channels;
  AxisSizes axes[kSpatialAxes];
  int64_t groups, deform_groups;
  bool has_mask;

  // constexpr, so that they can be called in kernels too.
  constexpr int64_t taps() const { return axes[0].kernel * axes[1].kernel * axes[2].kernel; }
  constexpr int64_t image_voxels() const { return axes[0].in * axes[1].in * axes[2].in; }
  constexpr int64_t image_positions() const { return axes[0].out * axes[1].out * axes[2].out; }
  constexpr int64_t out_positions() const { return batch * image_positions(); }
  constexpr int64_t group_in_channels() const { return in_channels / groups; }
  constexpr int64_t group_out_channels() const { return out_channels / groups; }
  constexpr int64_t deform_group_channels() const { return in_channels / deform_groups; }
  // Numbers per output position in the offset and in the mask.
  constexpr int64_t offset_channels() const { return kSpatialAxes * mask_channels(); }
  constexpr int64_t mask_channels() const { return deform_groups * taps(); }
  // Elements of the filters and of a volume of the input.
  constexpr int64_t filters_size() const { return taps() * group_in_channels() * out_channels; }
  constexpr int64_t image_size() const { return image_voxels() * in_channels; }

  // A layer in two dimensions whose filters, columns and output are the same matrices: depth and
  // height are one axis. For what looks at matrices alone, such as GEMMs and plans of chunks.
  DeformConvParams planar() const;
};

// As MakeParams().
DEFORM_CONV_EXPORT std::string MakeParams3D(const DeformConv3DAttributes& attributes,
                                            const DeformConv3DShapes& shapes,
                                            DeformConv3DParams* params);

}  // namespace deform_conv

#endif  // DEFORM_CONV_CORE_PARAMS3D_H_
