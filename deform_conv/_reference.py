"""Deformable convolution in TensorFlow's own ops: slow and obvious, the oracle for everything else.

It follows the definition sample by sample, without a thought for speed or memory, and leaves the
gradients, of any order, to TensorFlow. It is written once for two and three spatial axes. Portable
mode computes with it too: in two dimensions, no arithmetic is on more than four axes, of which
LiteRT has no more.
"""

import functools
import itertools
import math
import operator

import tensorflow as tf


def deform_conv_reference(
    input,
    filters,
    offset,
    mask=None,
    strides=1,
    padding="SAME",
    dilations=1,
    deform_groups=1,
    data_format="NHWC",
):
    """Computes what `deform_conv2d` computes, from the same arguments but `name`.

    With data_format "NDHWC" or "NCDHW", what `deform_conv3d` computes. 16-bit inputs are computed
    in float32 and the output is rounded back.
    """
    *kernel, group_channels, out_channels = sizes(filters)

    def convolve(samples):
        positions, taps, channels = sizes(samples)
        groups = channels // group_channels
        samples = tf.reshape(samples, [positions, taps, groups, group_channels])
        of_groups = tf.reshape(
            tf.cast(filters, samples.dtype), [taps, group_channels, groups, out_channels // groups]
        )
        return tf.einsum("pklc,kclo->plo", samples, of_groups)

    attributes = (strides, padding, dilations, deform_groups, data_format)
    return _from_samples(convolve, out_channels, input, offset, mask, kernel, *attributes)


deform_conv2d_reference = deform_conv_reference


def deform_aggregate2d_reference(
    input,
    offset,
    weights,
    kernel_size,
    strides=1,
    padding="SAME",
    dilations=1,
    deform_groups=1,
    data_format="NHWC",
):
    """Computes what `deform_aggregate2d` computes, likewise."""
    kernel = _spatial(kernel_size, data_format)
    out_channels = sizes(input)[data_format.index("C")]
    attributes = (strides, padding, dilations, deform_groups, data_format)
    return _from_samples(
        lambda samples: tf.reduce_sum(samples, axis=1),
        *(out_channels, input, offset, weights, kernel, *attributes),
    )


def _from_samples(
    combine,
    out_channels,
    input,
    offset,
    mask,
    kernel,
    strides,
    padding,
    dilations,
    deform_groups,
    data_format,
):
    """The output whose positions are combine(samples), from samples [positions, taps, channels]."""
    if not data_format.endswith("C"):
        native = native_axes(data_format)
        output = _from_samples(
            combine,
            out_channels,
            tf.transpose(input, native),
            tf.transpose(offset, native),
            None if mask is None else tf.transpose(mask, native),
            kernel,
            _spatial(strides, data_format),
            padding if isinstance(padding, str) else [padding[axis] for axis in native],
            _spatial(dilations, data_format),
            deform_groups,
            "".join(data_format[axis] for axis in native),
        )
        return tf.transpose(output, [native.index(axis) for axis in range(len(native))])

    dtype = tf.convert_to_tensor(input).dtype
    compute_dtype = tf.float64 if dtype == tf.float64 else tf.float32
    input, offset = (tf.cast(t, compute_dtype) for t in (input, offset))
    batch, *out_size, _ = sizes(offset)
    _, *in_size, channels = sizes(input)
    strides, dilations = (_spatial(v, data_format) for v in (strides, dilations))
    axes = len(kernel)

    # Positions and masks [batch, *out_size, deform_groups * taps].
    taps = math.prod(kernel)
    channel = tf.range(deform_groups * taps)
    g, tap = channel // taps, channel % taps
    located = []
    for axis in reversed(range(axes)):  # the last one varies fastest
        before = pad_before(
            padding, axis + 1, in_size[axis], kernel[axis], strides[axis], dilations[axis]
        )
        at = tf.reshape(tf.range(out_size[axis]), [-1] + [1] * (axes - axis))
        base = at * strides[axis] - before + tap % kernel[axis] * dilations[axis]
        located.insert(0, _locate(base, offset[..., axis::axes], in_size[axis]))
        tap = tap // kernel[axis]
    if mask is not None:
        mask = tf.cast(mask, compute_dtype)

    # Samples, one a row: [batch * positions * deform_groups * taps, deform group's channels].
    # One pixel more on each axis, of zeros, stands for those that do not exist.
    image = tf.pad(input, [[0, 0], *[[0, 1]] * axes, [0, 0]])
    padded_size = [size + 1 for size in in_size]
    image = tf.reshape(image, [batch, *padded_size, deform_groups, channels // deform_groups])
    samples = _sample(image, g, located, mask)

    # Per position and tap, the channels of all deformable groups side by side.
    positions = batch * math.prod(out_size)
    samples = tf.reshape(samples, [positions, deform_groups, taps, channels // deform_groups])
    samples = tf.transpose(samples, [0, 2, 1, 3])
    output = combine(tf.reshape(samples, [positions, taps, channels]))
    return tf.cast(tf.reshape(output, [batch, *out_size, out_channels]), dtype)


def native_axes(data_format: str) -> list[int]:
    """The axes of `data_format` in the order batch, spatial axes, channels."""
    return [data_format.index(axis) for axis in data_format.replace("C", "") + "C"]


def sizes(tensor):
    """The size of each axis: a number where it is known, or else a tensor."""
    shape = tensor.shape.as_list()
    if None not in shape:
        return shape
    dynamic = tf.shape(tensor)
    return [dynamic[axis] if size is None else size for axis, size in enumerate(shape)]


def _locate(base, offset, size):
    """Where `base + offset` lies on an axis of `size` pixels.

    Returns:
      The pixel before it, the fraction of the way to the next pixel, and whether it is inside:
      above -1 and below `size`. The other two are 0 where it is not.
    """
    # The whole pixels are taken off before the base is added, so that the fraction stays exact.
    whole = tf.floor(offset)
    fraction = offset - whole  # NaN for infinite offsets too
    # What int64 does not hold becomes its smallest or largest number, outside in either case.
    low = tf.cast(base, tf.int64) + tf.cast(whole, tf.int64)
    from_first = (low >= 0) & (fraction >= 0)
    before_first = (low >= -1) & (fraction > 0)
    inside = (low < tf.cast(size, tf.int64)) & (from_first | before_first)
    low, fraction = (tf.where(inside, value, tf.zeros_like(value)) for value in (low, fraction))
    return tf.cast(low, tf.int32), fraction, inside


def _sample(image, g, located, mask):
    """Samples image[n, ..., g, :] where each axis is located, by linear interpolation along each.

    The last pixel of each axis is no part of the image, and zero. Scaled by the mask, if there is
    one; 0 outside, whatever the mask.
    """
    lows, fractions, insides = zip(*located, strict=True)
    axes = len(located)
    batch, *padded_size, _, _ = sizes(image)
    in_size = [size - 1 for size in padded_size]
    inside = functools.reduce(tf.logical_and, insides)
    n = tf.reshape(tf.range(batch), [-1] + [1] * (axes + 1))
    n, g = (tf.broadcast_to(index, tf.shape(inside)) for index in (n, g))
    samples = 0
    for steps in itertools.product((0, 1), repeat=axes):  # to the corners around the sample
        corner = [low + step for low, step in zip(lows, steps, strict=True)]
        exists = inside
        for index, size in zip(corner, in_size, strict=True):
            exists &= (index >= 0) & (index < size)
        weights = (
            fraction if step else 1 - fraction
            for fraction, step in zip(fractions, steps, strict=True)
        )
        corner = [
            tf.where(exists, index, size) for index, size in zip(corner, in_size, strict=True)
        ]
        pixel = tf.stack([n, *corner, g], axis=-1)
        values = tf.gather_nd(image, tf.reshape(pixel, [-1, axes + 2]))
        samples += _column(tf.where(exists, functools.reduce(operator.mul, weights), 0)) * values
    if mask is not None:
        samples *= _column(tf.where(inside, mask, 0))
    return samples


def _column(numbers):
    return tf.reshape(numbers, [-1, 1])


def _spatial(value, data_format):
    """One number for each spatial axis, of one, of these, or of all in the data format's order."""
    axes = len(data_format) - 2
    if hasattr(value, "__index__"):
        return (int(value),) * axes
    if len(value) == axes + 2:
        return tuple(value[axis] for axis in native_axes(data_format)[1:-1])
    return tuple(value) if len(value) == axes else (value[0],) * axes


def pad_before(padding, axis, size, kernel, stride, dilation):
    if padding == "VALID":
        return 0
    if padding != "SAME":
        return padding[axis][0]
    # Rounds up by a division of what is not negative: tf2onnx rounds others towards zero.
    out = (size - 1) // stride + 1
    padding = (out - 1) * stride + (kernel - 1) * dilation + 1 - size
    padding = max(padding, 0) if isinstance(size, int) else tf.maximum(padding, 0)
    return padding // 2
