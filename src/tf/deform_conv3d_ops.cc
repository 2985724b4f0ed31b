// The ops over three axes as TensorFlow sees them: signatures and documentation.

#include "tensorflow/core/framework/op.h"
#include "tf/shape_functions.h"

namespace deform_conv {

REGISTER_OP("DeformConv3D")
    .Input("input: T")
    .Input("filters: T")
    .Input("offset: Toffset")
    .Input("mask: mask_count * Toffset")
    .Output("output: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Toffset: {half, bfloat16, float, double}")
    .Attr("mask_count: int >= 0")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'}")
    .Attr("explicit_paddings: list(int) = []")
    .Attr("dilations: list(int) = [1, 1, 1, 1, 1]")
    .Attr("deform_groups: int = 1")
    .Attr("data_format: {'NDHWC', 'NCDHW'} = 'NDHWC'")
    .SetShapeFn(ForwardShape<3>)
    .Doc(R"doc(
Deformable convolution over three axes: DeformConv2D with depth before height.

input: [N, D, H, W, C], or [N, C, D, H, W] for data_format NCDHW.
filters: [KD, KH, KW, C / groups, O] in both data formats.
offset: [N, OD, OH, OW, 3 * deform_groups * KD * KH * KW], or with the channels second. Channel
  (((g * KD + kz) * KH + ky) * KW + kx) * 3 moves the sample of tap (kz, ky, kx) along the depth,
  the next one down, the one after it right.
mask: none, or one tensor [N, OD, OH, OW, deform_groups * KD * KH * KW], which scales the samples.
output: [N, OD, OH, OW, O], or with the channels second.
strides: one number per dimension of `input`.
dilations: one number per dimension of `input`.
explicit_paddings: two numbers per dimension of `input`, for padding EXPLICIT.
)doc");

REGISTER_OP("DeformConv3DGrad")
    .Input("input: T")
    .Input("filters: T")
    .Input("offset: Toffset")
    .Input("mask: mask_count * Toffset")
    .Input("grad_output: T")
    .Output("grad_input: T")
    .Output("grad_filters: T")
    .Output("grad_offset: Toffset")
    .Output("grad_mask: mask_count * Toffset")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Toffset: {half, bfloat16, float, double}")
    .Attr("mask_count: int >= 0")
    .Attr("want_grad_input: bool = true")
    .Attr("want_grad_filters: bool = true")
    .Attr("want_grad_offset: bool = true")
    .Attr("want_grad_mask: bool = true")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'}")
    .Attr("explicit_paddings: list(int) = []")
    .Attr("dilations: list(int) = [1, 1, 1, 1, 1]")
    .Attr("deform_groups: int = 1")
    .Attr("data_format: {'NDHWC', 'NCDHW'} = 'NDHWC'")
    .SetShapeFn(GradShape<3>)
    .Doc(R"doc(
Gradients of DeformConv3D with respect to its inputs.

Takes the inputs and attributes of DeformConv3D and the gradient of its output. A gradient that is
not wanted is not computed, and an empty tensor stands in its place.
)doc");

}  // namespace deform_conv
