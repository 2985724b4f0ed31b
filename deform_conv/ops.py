"""Deformable convolution and its kin as TensorFlow ops, with their gradients."""

from collections.abc import Sequence

import tensorflow as tf
import wrapt

from ._arguments import (
    check_filters_order,
    check_texts,
    height_and_width,
    integer,
    padding_attributes,
    per_dimension,
    to_tensors,
)
from ._gradients import attributes_of, gradient_of, second_order, wanted_gradients
from ._library import check_xla, record
from ._portable import (
    deform_aggregate2d_portable,
    deform_conv2d_portable,
    in_portable_mode,
    reference_of_aggregate_op,
    reference_of_op,
)
from ._rules import Rules

__all__ = ["deform_aggregate2d", "deform_conv2d", "deform_depthwise_conv2d"]

_ops = getattr(record, "ops", None)  # None in a process that is in portable mode


def deform_conv2d(
    input,
    filters,
    offset,
    mask=None,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    dilations: int | Sequence[int] = 1,
    deform_groups: int = 1,
    data_format: str = "NHWC",
    name: str | None = None,
) -> tf.Tensor:
    """Convolves `input` with `filters`, taking each sample where `offset` moves it.

    Version 1 of Dai et al., Deformable Convolutional Networks, arXiv:1703.06211; with `mask`
    version 2 of Zhu et al., Deformable ConvNets v2, arXiv:1811.11168. With an offset of zeros and
    no mask it is `tf.nn.conv2d`, where the input is finite.

    The input, extended with zeros, is sampled bilinearly; a sample at (h, w) counts if
    -1 < h < H and -1 < w < W, and is 0 otherwise (also for NaN and infinite offsets), as are the
    gradients through it. At integer positions where a sample counts, the gradient with respect to
    the offset is the one towards +; at exactly -1 it is 0. A sample reads all four pixels around
    it, and is NaN where one that has the weight 0 is NaN or infinite.

    There are `C / filters.shape[2]` convolution groups, as in `tf.nn.conv2d`, and `deform_groups`
    groups of consecutive input channels, each with offsets and a mask of its own.

    Gradients with respect to input, filters, offset and mask are registered; only those that are
    asked for are computed. Second-order gradients work too, in pure TensorFlow, so slowly. Within
    `deform_conv.portable()`, TensorFlow's own ops compute everything.

    Args:
      input: `[N, H, W, C]`, or `[N, C, H, W]` for data_format "NCHW"; float32, float64, float16 or
        bfloat16.
      filters: `[KH, KW, C / groups, O]` in both data formats; dtype of `input`.
      offset: `[N, OH, OW, 2 * deform_groups * KH * KW]`, or `[N, 2 * deform_groups * KH * KW, OH,
        OW]`; in pixels. Channel `((g * KH + ky) * KW + kx) * 2` moves the sample of tap (ky, kx)
        in group g down, the channel after it right. Dtype of `input`, or float32 beside a 16-bit
        input (a float16 cannot tell an offset of 128.0 from one of 128.05).
      mask: `[N, OH, OW, deform_groups * KH * KW]`, or `[N, deform_groups * KH * KW, OH, OW]`;
        channel `(g * KH + ky) * KW + kx` scales the sample of that tap. Dtype of `offset`. None
        for version 1.
      strides: one number, (h, w), or four numbers in the order of `data_format`.
      padding: "SAME", "VALID", or four pairs in the order of `data_format`, as `tf.nn.conv2d`
        takes them: `[[0, 0], [top, bottom], [left, right], [0, 0]]` for "NHWC".
      dilations: as `strides`.
      deform_groups: number of deformable groups; divides C.
      data_format: "NHWC" or "NCHW".
      name: a name for the operation.

    Returns:
      `[N, OH, OW, O]`, or `[N, O, OH, OW]`; dtype of `input`. OH and OW are those of
      `tf.nn.conv2d`.

    Raises:
      ValueError: an argument has the wrong form or dtype, or a static shape does not fit.
      tf.errors.InvalidArgumentError: a shape that is known at run time only does not fit. Either
        names the argument, what is expected and what was received.
      RuntimeError: called under `jit_compile=True`, and the library of XLA kernels is missing.

    Example:
      >>> images = tf.random.normal([8, 28, 28, 3])
      >>> filters = tf.random.normal([3, 3, 3, 16])
      >>> offset = tf.random.normal([8, 28, 28, 2 * 3 * 3])
      >>> deform_conv2d(images, filters, offset).shape
      TensorShape([8, 28, 28, 16])
    """
    compute = _begin(data_format, name, "deform_conv2d", deform_conv2d_portable)
    with tf.name_scope(name or "DeformConv2D"):
        input, filters, offset, *masks = to_tensors(
            input=input, filters=filters, offset=offset, mask=mask
        )
        deform_groups = integer(deform_groups, "deform_groups")
        check_filters_order(input, filters, offset, deform_groups, data_format)
        return compute(
            input=input,
            filters=filters,
            offset=offset,
            mask=masks,
            **_op_attributes(strides, padding, dilations, deform_groups, data_format),
        )


def deform_depthwise_conv2d(
    input,
    filters,
    offset,
    mask=None,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    dilations: int | Sequence[int] = 1,
    deform_groups: int = 1,
    data_format: str = "NHWC",
    name: str | None = None,
) -> tf.Tensor:
    """Convolves each channel with filters of its own, taking each sample where `offset` moves it.

    `deform_conv2d` with as many groups as channels: the depthwise convolution of
    `tf.nn.depthwise_conv2d`, which it is with an offset of zeros and no mask. Its rules, types and
    gradients are those of `deform_conv2d`, and so are its kernels, which go without columns.

    Args:
      input: `[N, H, W, C]`, or `[N, C, H, W]` for data_format "NCHW"; float32, float64, float16 or
        bfloat16.
      filters: `[KH, KW, C, M]` in both data formats, M filters for each channel; dtype of `input`.
      offset: as in `deform_conv2d`.
      mask: as in `deform_conv2d`.
      strides: one number, (h, w), or four numbers in the order of `data_format`. The two may
        differ, other than in `tf.nn.depthwise_conv2d`.
      padding: as in `deform_conv2d`.
      dilations: as `strides`.
      deform_groups: number of deformable groups; divides C.
      data_format: "NHWC" or "NCHW".
      name: a name for the operation.

    Returns:
      `[N, OH, OW, C * M]`, or `[N, C * M, OH, OW]`; dtype of `input`. Channel `c * M + m` is what
      filter m makes of channel c.

    Raises:
      ValueError, tf.errors.InvalidArgumentError, RuntimeError: as `deform_conv2d` does.

    Example:
      >>> images = tf.random.normal([8, 28, 28, 16])
      >>> filters = tf.random.normal([3, 3, 16, 2])
      >>> offset = tf.random.normal([8, 28, 28, 2 * 3 * 3])
      >>> deform_depthwise_conv2d(images, filters, offset).shape
      TensorShape([8, 28, 28, 32])
    """
    check_texts(data_format, name)
    with tf.name_scope(name or "DeformDepthwiseConv2D"):
        input, filters = to_tensors(input=input, filters=filters)
        return deform_conv2d(
            input,
            _as_groups(input, filters, data_format),
            *(offset, mask, strides, padding, dilations, deform_groups, data_format),
        )


def _as_groups(input, filters, data_format):
    """Filters [KH, KW, C, M] as those of C groups, [KH, KW, 1, C * M]."""
    rules = Rules(rank=2)
    input, filters = rules.ranked("input", input), rules.ranked("filters", filters)
    kernel_h, kernel_w, channels, multiplier = rules.check_depthwise(input, filters, data_format)
    with tf.control_dependencies(rules.assertions):
        return tf.reshape(filters, [kernel_h, kernel_w, 1, channels * multiplier])


def deform_aggregate2d(
    input,
    offset,
    weights,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    dilations: int | Sequence[int] = 1,
    deform_groups: int = 1,
    data_format: str = "NHWC",
    name: str | None = None,
) -> tf.Tensor:
    """Sums up samples of `input`, taken where `offset` moves them, each times its weight.

    The operation of deformable convolution version 3 (DCNv3) of Wang et al., InternImage,
    arXiv:2211.05778, and of version 4 (DCNv4) of Xiong et al., FlashInternImage, arXiv:2401.06197.
    There are no filters: channel c of the output comes from channel c of the input alone,

        output[n, y, x, c] = sum over taps k of weights[n, y, x, g, k] * sample(n, y, x, g, k)[c]

    where g is the deformable group of c. What is sampled, and the gradients through it, are as in
    `deform_conv2d`: the output is that of `deform_depthwise_conv2d` with filters of ones, and
    `weights` as the mask. Version 3 has weights that a softmax makes add up to 1 over the taps;
    version 4 has them as they come.

    Gradients with respect to input, offset and weights are registered; only those that are asked
    for are computed. Second-order gradients work too, in pure TensorFlow, so slowly. Within
    `deform_conv.portable()`, TensorFlow's own ops compute everything.

    Args:
      input: `[N, H, W, C]`, or `[N, C, H, W]` for data_format "NCHW"; float32, float64, float16 or
        bfloat16.
      offset: `[N, OH, OW, 2 * deform_groups * KH * KW]`, or `[N, 2 * deform_groups * KH * KW, OH,
        OW]`; in pixels. Channel `((g * KH + ky) * KW + kx) * 2` moves the sample of tap (ky, kx)
        in group g down, the channel after it right. Dtype of `input`, or float32 beside a 16-bit
        input.
      weights: `[N, OH, OW, deform_groups * KH * KW]`, or `[N, deform_groups * KH * KW, OH, OW]`;
        channel `(g * KH + ky) * KW + kx` is the weight of that tap's sample. Dtype of `offset`.
      kernel_size: KH and KW: one number, or (h, w).
      strides: one number, (h, w), or four numbers in the order of `data_format`.
      padding: "SAME", "VALID", or four pairs in the order of `data_format`, as `tf.nn.conv2d`
        takes them: `[[0, 0], [top, bottom], [left, right], [0, 0]]` for "NHWC".
      dilations: as `strides`.
      deform_groups: number of deformable groups, of consecutive channels; divides C.
      data_format: "NHWC" or "NCHW".
      name: a name for the operation.

    Returns:
      `[N, OH, OW, C]`, or `[N, C, OH, OW]`; dtype of `input`. OH and OW are those of
      `tf.nn.conv2d`.

    Raises:
      ValueError, tf.errors.InvalidArgumentError, RuntimeError: as `deform_conv2d` does.

    Example:
      >>> images = tf.random.normal([8, 28, 28, 64])
      >>> offset = tf.random.normal([8, 28, 28, 4 * 2 * 3 * 3])
      >>> weights = tf.random.normal([8, 28, 28, 4 * 3 * 3])
      >>> deform_aggregate2d(images, offset, weights, 3, deform_groups=4).shape
      TensorShape([8, 28, 28, 64])
    """
    compute = _begin(data_format, name, "deform_aggregate2d", deform_aggregate2d_portable)
    with tf.name_scope(name or "DeformAggregate2D"):
        input, offset, weights = to_tensors(input=input, offset=offset, weights=weights)
        deform_groups = integer(deform_groups, "deform_groups")
        return compute(
            input=input,
            offset=offset,
            weights=weights,
            kernel_size=height_and_width(kernel_size, "kernel_size"),
            **_op_attributes(strides, padding, dilations, deform_groups, data_format),
        )


# --- What the functions do alike ---


def _begin(data_format, name, op: str, portable):
    """Checks what names no tensor, and returns what is to compute: the op, or `portable`."""
    check_texts(data_format, name)
    if in_portable_mode():
        return portable
    check_xla()
    return getattr(_ops, op)


def _op_attributes(strides, padding, dilations, deform_groups: int, data_format: str) -> dict:
    return {
        "strides": per_dimension(strides, "strides", data_format),
        "dilations": per_dimension(dilations, "dilations", data_format),
        "deform_groups": deform_groups,
        "data_format": data_format,
        **padding_attributes(padding),
    }


# --- Gradients ---

_CONVOLVED = ("input", "filters", "offset", "mask")
_AGGREGATED = ("input", "offset", "weights")


@gradient_of("DeformConv2D")
def _deform_conv2d_grad(op, grad_output):
    """Gradients of the op's inputs: input, filters, offset and, if there is one, mask."""
    input, filters, offset, *mask = op.inputs

    def compute(**wants):
        return _ops.deform_conv2d_grad(
            input=input,
            filters=filters,
            offset=offset,
            mask=mask,
            grad_output=grad_output,
            **wants,
            **attributes_of(op),
        )

    # Filters apart, so that a frozen layer does not pay for them.
    return wanted_gradients(op, _CONVOLVED, compute, apart="filters")


@gradient_of("DeformConv2DGrad")
def _deform_conv2d_grad_grad(op, *grad_gradients):
    def reference(input, filters, offset, *mask):
        return reference_of_op(input, filters, offset, mask, **attributes_of(op))

    return second_order(op, grad_gradients, _CONVOLVED, reference)


@gradient_of("DeformAggregate2D")
def _deform_aggregate2d_grad(op, grad_output):
    """Gradients of the op's inputs: input, offset and weights."""
    input, offset, weights = op.inputs

    def compute(**wants):
        return _ops.deform_aggregate2d_grad(
            input=input,
            offset=offset,
            weights=weights,
            grad_output=grad_output,
            **wants,
            **attributes_of(op, "kernel_size"),
        )

    return wanted_gradients(op, _AGGREGATED, compute)


@gradient_of("DeformAggregate2DGrad")
def _deform_aggregate2d_grad_grad(op, *grad_gradients):
    def reference(input, offset, weights):
        attributes = attributes_of(op, "kernel_size")
        return reference_of_aggregate_op(input, offset, weights, **attributes)

    return second_order(op, grad_gradients, _AGGREGATED, reference)


# --- ONNX ---


@wrapt.when_imported("tf2onnx")
def _teach_tf2onnx(_):
    """Gives tf2onnx the op, whoever imports it: Keras does so after it has traced a model."""
    from . import _onnx_op  # noqa: F401
