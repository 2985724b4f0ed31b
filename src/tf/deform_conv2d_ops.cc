// The ops as TensorFlow sees them: signatures and documentation.

#include "tensorflow/core/framework/op.h"
#include "tf/shape_functions.h"

namespace deform_conv {

REGISTER_OP("DeformConv2D")
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
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("deform_groups: int = 1")
    .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")
    .SetShapeFn(ForwardShape<2>)
    .Doc(R"doc(
Deformable convolution, version 1 (https://arxiv.org/abs/1703.06211), or version 2 with a mask
(https://arxiv.org/abs/1811.11168).

input: [N, H, W, C], or [N, C, H, W] for data_format NCHW.
filters: [KH, KW, C / groups, O] in both data formats.
offset: [N, OH, OW, 2 * deform_groups * KH * KW], or with the channels second. Channel
  ((g * KH + ky) * KW + kx) * 2 moves the sample of tap (ky, kx) down, the next one right.
mask: none, or one tensor [N, OH, OW, deform_groups * KH * KW], which scales the samples.
output: [N, OH, OW, O], or with the channels second.
strides: one number per dimension of `input`.
dilations: one number per dimension of `input`.
explicit_paddings: two numbers per dimension of `input`, for padding EXPLICIT.
)doc");

REGISTER_OP("DeformConv2DGrad")
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
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("deform_groups: int = 1")
    .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")
    .SetShapeFn(GradShape<2>)
    .Doc(R"doc(
Gradients of DeformConv2D with respect to its inputs.

Takes the inputs and attributes of DeformConv2D and the gradient of its output. A gradient that is
not wanted is not computed, and an empty tensor stands in its place.
)doc");

REGISTER_OP("DeformAggregate2D")
    .Input("input: T")
    .Input("offset: Toffset")
    .Input("weights: Toffset")
    .Output("output: T")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Toffset: {half, bfloat16, float, double}")
    .Attr("kernel_size: list(int)")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'}")
    .Attr("explicit_paddings: list(int) = []")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("deform_groups: int = 1")
    .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")
    .SetShapeFn(ForwardShape<2, Operation::kAggregate>)
    .Doc(R"doc(
The sum of deformable samples, each times a weight: the operation of deformable convolution,
versions 3 (https://arxiv.org/abs/2211.05778) and 4 (https://arxiv.org/abs/2401.06197).

input: [N, H, W, C], or [N, C, H, W] for data_format NCHW.
offset: as that of DeformConv2D.
weights: [N, OH, OW, deform_groups * KH * KW], or with the channels second: as the mask of
  DeformConv2D.
output: [N, OH, OW, C], or with the channels second.
kernel_size: KH and KW.
strides: one number per dimension of `input`.
dilations: one number per dimension of `input`.
explicit_paddings: two numbers per dimension of `input`, for padding EXPLICIT.
)doc");

REGISTER_OP("DeformAggregate2DGrad")
    .Input("input: T")
    .Input("offset: Toffset")
    .Input("weights: Toffset")
    .Input("grad_output: T")
    .Output("grad_input: T")
    .Output("grad_offset: Toffset")
    .Output("grad_weights: Toffset")
    .Attr("T: {half, bfloat16, float, double}")
    .Attr("Toffset: {half, bfloat16, float, double}")
    .Attr("want_grad_input: bool = true")
    .Attr("want_grad_offset: bool = true")
    .Attr("want_grad_weights: bool = true")
    .Attr("kernel_size: list(int)")
    .Attr("strides: list(int)")
    .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'}")
    .Attr("explicit_paddings: list(int) = []")
    .Attr("dilations: list(int) = [1, 1, 1, 1]")
    .Attr("deform_groups: int = 1")
    .Attr("data_format: {'NHWC', 'NCHW'} = 'NHWC'")
    .SetShapeFn(GradShape<2, Operation::kAggregate>)
    .Doc(R"doc(
Gradients of DeformAggregate2D with respect to its inputs, as those of DeformConv2DGrad.
)doc");

}  // namespace deform_conv
