"""`deform_conv3d`: deformable convolution of volumes as a TensorFlow op, with its gradients."""

from collections.abc import Sequence

import tensorflow as tf

from ._arguments import check_filters_order, check_texts, integer, to_tensors
from ._gradients import gradient_of
from ._library import in_xla_context, record
from ._portable import deform_conv_portable, in_portable_mode
from .ops import convolution_gradients, convolution_second_order, op_attributes

__all__ = ["deform_conv3d"]

_ops = getattr(record, "ops", None)  # None in a process that is in portable mode


def deform_conv3d(
    input,
    filters,
    offset,
    mask=None,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    dilations: int | Sequence[int] = 1,
    deform_groups: int = 1,
    data_format: str = "NDHWC",
    name: str | None = None,
) -> tf.Tensor:
    """Convolves the volumes `input` with `filters`, taking each sample where `offset` moves it.

    `deform_conv2d` with one more axis, depth, which comes first: the formula of Dai et al.,
    Deformable Convolutional Networks, arXiv:1703.06211, and with `mask` that of Zhu et al.,
    Deformable ConvNets v2, arXiv:1811.11168, over three axes. With an offset of zeros and no mask
    it is `tf.nn.conv3d`, where the input is finite.

    The input, extended with zeros, is sampled trilinearly; a sample at (d, h, w) counts if
    -1 < d < D, -1 < h < H and -1 < w < W, and is 0 otherwise (also for NaN and infinite offsets),
    as are the gradients through it. At integer positions where a sample counts, the gradient with
    respect to the offset is the one towards +; at exactly -1 it is 0. A sample reads all eight
    voxels around it that exist, and is NaN where one that has the weight 0 is NaN or infinite.

    There are `C / filters.shape[3]` convolution groups, as in `tf.nn.conv3d`, and `deform_groups`
    groups of consecutive input channels, each with offsets and a mask of its own.

    Gradients with respect to input, filters, offset and mask are registered; only those that are
    asked for are computed. Second-order gradients work too, in pure TensorFlow, so slowly. Within
    `deform_conv.portable()`, and under `jit_compile=True`, TensorFlow's own ops compute everything.
    A `tf.function` keeps what it was traced with.

    Args:
      input: `[N, D, H, W, C]`, or `[N, C, D, H, W]` for data_format "NCDHW"; float32, float64,
        float16 or bfloat16.
      filters: `[KD, KH, KW, C / groups, O]` in both data formats; dtype of `input`.
      offset: `[N, OD, OH, OW, 3 * deform_groups * KD * KH * KW]`, or with the channels second; in
        voxels. Channel `(((g * KD + kz) * KH + ky) * KW + kx) * 3` moves the sample of tap
        (kz, ky, kx) in group g along the depth, the next one down, the one after it right. Dtype of
        `input`, or float32 beside a 16-bit input.
      mask: `[N, OD, OH, OW, deform_groups * KD * KH * KW]`, or with the channels second; channel
        `((g * KD + kz) * KH + ky) * KW + kx` scales the sample of that tap. Dtype of `offset`. None
        for version 1.
      strides: one number, (d, h, w), or five numbers in the order of `data_format`.
      padding: "SAME", "VALID", or five pairs in the order of `data_format`: `[[0, 0], [front,
        back], [top, bottom], [left, right], [0, 0]]` for "NDHWC".
      dilations: as `strides`.
      deform_groups: number of deformable groups; divides C.
      data_format: "NDHWC" or "NCDHW".
      name: a name for the operation.

    Returns:
      `[N, OD, OH, OW, O]`, or `[N, O, OD, OH, OW]`; dtype of `input`. OD, OH and OW are those of
      `tf.nn.conv3d`.

    Raises:
      ValueError: an argument has the wrong form or dtype, or a static shape does not fit.
      tf.errors.InvalidArgumentError: a shape that is known at run time only does not fit. Either
        names the argument, what is expected and what was received.

    Example:
      >>> volumes = tf.random.normal([2, 8, 28, 28, 3])
      >>> filters = tf.random.normal([3, 3, 3, 3, 16])
      >>> offset = tf.random.normal([2, 8, 28, 28, 3 * 3 * 3 * 3])
      >>> deform_conv3d(volumes, filters, offset).shape
      TensorShape([2, 8, 28, 28, 16])
    """
    check_texts(data_format, name, rank=3)
    # XLA has no kernels of this op.
    portable = in_portable_mode() or in_xla_context()
    compute = deform_conv_portable if portable else _ops.deform_conv3d
    with tf.name_scope(name or "DeformConv3D"):
        input, filters, offset, *masks = to_tensors(
            rank=3, input=input, filters=filters, offset=offset, mask=mask
        )
        deform_groups = integer(deform_groups, "deform_groups")
        check_filters_order(input, filters, offset, deform_groups, data_format)
        return compute(
            input=input,
            filters=filters,
            offset=offset,
            mask=masks,
            **op_attributes(strides, padding, dilations, deform_groups, data_format),
        )


@gradient_of("DeformConv3D")
def _deform_conv3d_grad(op, grad_output):
    return convolution_gradients(op, grad_output, _ops.deform_conv3d_grad)


@gradient_of("DeformConv3DGrad")
def _deform_conv3d_grad_grad(op, *grad_gradients):
    return convolution_second_order(op, grad_gradients)
