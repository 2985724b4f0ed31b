"""Deformable convolution in TensorFlow's own ops: slow and obvious, the oracle for everything else.

It follows the definition sample by sample, without a thought for speed or memory, and leaves the
gradients, of any order, to TensorFlow. Portable mode computes with it too: no arithmetic is on
more than four axes, of which LiteRT has no more.
"""

import tensorflow as tf


def deform_conv2d_reference(
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

    16-bit inputs are computed in float32 and the output is rounded back.
    """
    kernel_h, kernel_w, group_channels, out_channels = sizes(filters)

    def convolve(samples):
        positions, taps, channels = sizes(samples)
        groups = channels // group_channels
        samples = tf.reshape(samples, [positions, taps, groups, group_channels])
        of_groups = tf.reshape(
            tf.cast(filters, samples.dtype), [taps, group_channels, groups, out_channels // groups]
        )
        return tf.einsum("pklc,kclo->plo", samples, of_groups)

    attributes = (strides, padding, dilations, deform_groups, data_format)
    return _from_samples(
        convolve, out_channels, input, offset, mask, (kernel_h, kernel_w), *attributes
    )


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
    kernel_size = _height_and_width(kernel_size, data_format)
    out_channels = sizes(input)[data_format.index("C")]
    attributes = (strides, padding, dilations, deform_groups, data_format)
    return _from_samples(
        lambda samples: tf.reduce_sum(samples, axis=1),
        *(out_channels, input, offset, weights, kernel_size, *attributes),
    )


def _from_samples(
    combine,
    out_channels,
    input,
    offset,
    mask,
    kernel_size,
    strides,
    padding,
    dilations,
    deform_groups,
    data_format,
):
    """The output whose positions are combine(samples), from samples [positions, taps, channels]."""
    if data_format == "NCHW":
        to_nhwc, to_nchw = [0, 2, 3, 1], [0, 3, 1, 2]
        output = _from_samples(
            combine,
            out_channels,
            tf.transpose(input, to_nhwc),
            tf.transpose(offset, to_nhwc),
            None if mask is None else tf.transpose(mask, to_nhwc),
            kernel_size,
            _height_and_width(strides, data_format),
            padding if isinstance(padding, str) else [padding[i] for i in to_nhwc],
            _height_and_width(dilations, data_format),
            deform_groups,
            "NHWC",
        )
        return tf.transpose(output, to_nchw)

    dtype = tf.convert_to_tensor(input).dtype
    compute_dtype = tf.float64 if dtype == tf.float64 else tf.float32
    input, offset = (tf.cast(t, compute_dtype) for t in (input, offset))
    batch, out_h, out_w, _ = sizes(offset)
    _, in_h, in_w, channels = sizes(input)
    kernel_h, kernel_w = kernel_size
    strides, dilations = (_height_and_width(v, data_format) for v in (strides, dilations))
    pad_top, pad_left = (
        _pad_before(padding, axis, size, kernel, stride, dilation)
        for axis, size, kernel, stride, dilation in zip(
            (1, 2), (in_h, in_w), (kernel_h, kernel_w), strides, dilations, strict=True
        )
    )

    # Positions and masks [batch, out_h, out_w, deform_groups * taps].
    taps = kernel_h * kernel_w
    channel = tf.range(deform_groups * taps)
    g, ky, kx = channel // taps, channel % taps // kernel_w, channel % kernel_w
    y, x = tf.range(out_h)[:, tf.newaxis, tf.newaxis], tf.range(out_w)[:, tf.newaxis]
    h = _locate(y * strides[0] - pad_top + ky * dilations[0], offset[..., 0::2], in_h)
    w = _locate(x * strides[1] - pad_left + kx * dilations[1], offset[..., 1::2], in_w)
    if mask is not None:
        mask = tf.cast(mask, compute_dtype)

    # Samples, one a row: [batch * out_h * out_w * deform_groups * taps, deform group's channels].
    image = tf.reshape(input, [batch, in_h, in_w, deform_groups, channels // deform_groups])
    samples = _sample(image, g, h, w, mask)

    # Per position and tap, the channels of all deformable groups side by side.
    positions = batch * out_h * out_w
    samples = tf.reshape(samples, [positions, deform_groups, taps, channels // deform_groups])
    samples = tf.transpose(samples, [0, 2, 1, 3])
    output = combine(tf.reshape(samples, [positions, taps, channels]))
    return tf.cast(tf.reshape(output, [batch, out_h, out_w, out_channels]), dtype)


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


def _sample(image, g, h, w, mask):
    """Samples image[n, :, :, g] at (h, w)[n, ...], by bilinear interpolation.

    Scaled by the mask, if there is one; 0 outside, whatever the mask.
    """
    (h_low, h_fraction, h_inside), (w_low, w_fraction, w_inside) = h, w
    batch, in_h, in_w, *_ = sizes(image)
    inside = h_inside & w_inside
    n = tf.reshape(tf.range(batch), [-1, 1, 1, 1])
    n, g = (tf.broadcast_to(index, tf.shape(inside)) for index in (n, g))
    # One pixel more, of zeros, in place of those that do not exist.
    image = tf.pad(image, [[0, 0], [0, 1], [0, 1], [0, 0], [0, 0]])
    samples = 0
    for down, h_weight in ((0, 1 - h_fraction), (1, h_fraction)):
        for right, w_weight in ((0, 1 - w_fraction), (1, w_fraction)):
            y, x = h_low + down, w_low + right
            exists = inside & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
            pixel = tf.stack([n, tf.where(exists, y, in_h), tf.where(exists, x, in_w), g], axis=-1)
            values = tf.gather_nd(image, tf.reshape(pixel, [-1, 4]))
            samples += _column(tf.where(exists, h_weight * w_weight, 0)) * values
    if mask is not None:
        samples *= _column(tf.where(inside, mask, 0))
    return samples


def _column(numbers):
    return tf.reshape(numbers, [-1, 1])


def _height_and_width(value, data_format):
    """(h, w) of one number, two, or four in the order of the data format."""
    if hasattr(value, "__index__"):
        return int(value), int(value)
    if len(value) == 4:
        first = data_format.index("H")
        return tuple(value[first : first + 2])
    return tuple(value) if len(value) == 2 else (value[0], value[0])


def _pad_before(padding, axis, size, kernel, stride, dilation):
    if padding == "VALID":
        return 0
    if padding != "SAME":
        return padding[axis][0]
    # Rounds up by a division of what is not negative: tf2onnx rounds others towards zero.
    out = (size - 1) // stride + 1
    return tf.maximum((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0) // 2
