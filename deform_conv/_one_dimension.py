"""`deform_conv1d`: deformable convolution along one axis, as that of images of one row."""

from collections.abc import Sequence

import tensorflow as tf

from ._arguments import (
    check_filters_order,
    check_texts,
    integer,
    padding_attributes,
    per_dimension,
    to_tensors,
)
from ._reference import sizes
from ._rules import checked
from .ops import deform_conv2d

__all__ = ["deform_conv1d"]


def deform_conv1d(
    input,
    filters,
    offset,
    mask=None,
    stride: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    dilations: int | Sequence[int] = 1,
    deform_groups: int = 1,
    data_format: str = "NWC",
    name: str | None = None,
) -> tf.Tensor:
    """Convolves `input` with `filters`, taking each sample where `offset` moves it along L.

    Deformable convolution of Dai et al., arXiv:1703.06211, in one dimension; with `mask` version 2
    of Zhu et al., arXiv:1811.11168. Of output step t, output channel o and tap k:

        output[n, t, o] = sum over c and k of filters[k, c, o] * mask[n, t, g, k] * S(n, c, w)
        w = t * stride - pad_left + k * dilation + offset[n, t, g, k]

    S interpolates linearly between the two steps around w, where the input is extended with zeros,
    and is 0 unless -1 < w < L. With an offset of zeros and no mask it is `tf.nn.conv1d`, where the
    input is finite.

    It is `deform_conv2d` of images of one row, with vertical offsets of zero: to the bit, with the
    same gradients and the same rules where samples lie at the ends or on a step, or are not finite.
    The zeros are a tensor too: while it computes, it holds offsets (and, in training, their
    gradient) that are twice as large as `offset`.

    Args:
      input: `[N, L, C]`, or `[N, C, L]` for data_format "NCW"; float32, float64, float16 or
        bfloat16.
      filters: `[K, C / groups, O]` in both data formats; dtype of `input`.
      offset: `[N, OL, deform_groups * K]`, or `[N, deform_groups * K, OL]`; in steps. Channel
        `g * K + k` moves the sample of tap k in group g towards the end. Dtype of `input`, or
        float32 beside a 16-bit input.
      mask: shape and dtype of `offset`; scales the sample of that tap. None for version 1.
      stride: one number, or three in the order of `data_format`.
      padding: "SAME", "VALID", or three pairs in the order of `data_format`:
        `[[0, 0], [left, right], [0, 0]]` for "NWC".
      dilations: as `stride`.
      deform_groups: number of deformable groups; divides C.
      data_format: "NWC" or "NCW".
      name: a name for the operation.

    Returns:
      `[N, OL, O]`, or `[N, O, OL]`; dtype of `input`. OL is that of `tf.nn.conv1d`.

    Raises:
      ValueError: an argument has the wrong form or dtype, or a static shape does not fit.
      tf.errors.InvalidArgumentError: a shape that is known at run time only does not fit. Either
        names the argument, what is expected and what was received.
      RuntimeError: called under `jit_compile=True`, and the library of XLA kernels is missing.

    Example:
      >>> signals = tf.random.normal([8, 100, 3])
      >>> filters = tf.random.normal([5, 3, 16])
      >>> offset = tf.random.normal([8, 100, 5])
      >>> deform_conv1d(signals, filters, offset).shape
      TensorShape([8, 100, 16])
    """
    check_texts(data_format, name, rank=1)
    with tf.name_scope(name or "DeformConv1D"):
        tensors = to_tensors(rank=1, input=input, filters=filters, offset=offset, mask=mask)
        deform_groups = integer(deform_groups, "deform_groups")
        check_filters_order(*tensors[:3], deform_groups, data_format)
        attributes = {
            "strides": per_dimension(stride, "stride", data_format),
            "dilations": per_dimension(dilations, "dilations", data_format),
            "deform_groups": deform_groups,
            "data_format": data_format,
            **padding_attributes(padding, dimensions=3),
        }
        # deform_conv2d would name axes and numbers that the caller does not have.
        names = ("input", "filters", "offset", "mask")
        tensors, output_shape = checked(dict(zip(names, tensors, strict=False)), **attributes)
        output = _convolve_rows(*tensors, **attributes)
        output.set_shape(output_shape)
        return output


def _convolve_rows(
    input,
    filters,
    offset,
    mask=None,
    *,
    strides,
    padding,
    dilations,
    deform_groups,
    data_format,
    explicit_paddings=(),
) -> tf.Tensor:
    """The output, from what `checked` took."""
    row = 1 if data_format == "NWC" else 2  # the axis of height, in images of one row
    if padding == "EXPLICIT":
        pairs = zip(explicit_paddings[::2], explicit_paddings[1::2], strict=True)
        padding = _with_height(list(pairs), row, (0, 0))
    output = deform_conv2d(
        tf.expand_dims(input, row),
        tf.expand_dims(filters, 0),
        _with_vertical_zeros(offset, data_format),
        None if mask is None else tf.expand_dims(mask, row),
        strides=_with_height(strides, row, 1),
        padding=padding,
        dilations=_with_height(dilations, row, 1),
        deform_groups=deform_groups,
        data_format="NHWC" if data_format == "NWC" else "NCHW",
    )
    # LiteRT's converter (2.21) fails on tf.squeeze where the length is unknown.
    out_sizes = sizes(output)
    return tf.reshape(output, [*out_sizes[:row], *out_sizes[row + 1 :]])


def _with_height(values, row: int, of_height) -> list:
    """The values of all dimensions of an image of one row."""
    return [*values[:row], of_height, *values[row:]]


def _with_vertical_zeros(offset, data_format: str) -> tf.Tensor:
    """The offsets (0, dx) of images of one row, as `deform_conv2d` takes them."""
    # Padding, unlike stacking, has a gradient that reads nothing of what is for the zeros.
    if data_format == "NWC":
        batch, length, channels = sizes(offset)
        pairs = tf.pad(tf.expand_dims(offset, 3), [[0, 0], [0, 0], [0, 0], [1, 0]])
        return tf.reshape(pairs, [batch, 1, length, 2 * channels])
    batch, channels, length = sizes(offset)
    pairs = tf.pad(tf.expand_dims(offset, 2), [[0, 0], [0, 0], [1, 0], [0, 0]])
    return tf.reshape(pairs, [batch, 2 * channels, 1, length])
