"""Deformable convolution in pure TensorFlow: slow and obvious, the oracle for everything else.

It follows the definition sample by sample, without a thought for speed or memory, and leaves the
gradients, of any order, to TensorFlow.
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
    if data_format == "NCHW":
        to_nhwc, to_nchw = [0, 2, 3, 1], [0, 3, 1, 2]
        output = deform_conv2d_reference(
            tf.transpose(input, to_nhwc),
            filters,
            tf.transpose(offset, to_nhwc),
            None if mask is None else tf.transpose(mask, to_nhwc),
            _height_and_width(strides, data_format),
            padding if isinstance(padding, str) else [padding[i] for i in to_nhwc],
            _height_and_width(dilations, data_format),
            deform_groups,
        )
        return tf.transpose(output, to_nchw)

    dtype = tf.convert_to_tensor(input).dtype
    compute_dtype = tf.float64 if dtype == tf.float64 else tf.float32
    input, filters, offset = (tf.cast(t, compute_dtype) for t in (input, filters, offset))
    batch, out_h, out_w, _ = tf.unstack(tf.shape(offset))
    in_h, in_w, channels = tf.unstack(tf.shape(input)[1:])
    kernel_h, kernel_w, group_channels, out_channels = tf.unstack(tf.shape(filters))
    strides, dilations = (_height_and_width(v, data_format) for v in (strides, dilations))
    pad_top, pad_left = (
        _pad_before(padding, axis, size, kernel, stride, dilation)
        for axis, size, kernel, stride, dilation in zip(
            (1, 2), (in_h, in_w), (kernel_h, kernel_w), strides, dilations, strict=True
        )
    )

    # Positions [batch, out_h, out_w, deform_groups, kernel_h, kernel_w].
    offset = tf.reshape(offset, [batch, out_h, out_w, deform_groups, kernel_h, kernel_w, 2])
    y = tf.reshape(tf.range(out_h), [1, -1, 1, 1, 1, 1])
    x = tf.reshape(tf.range(out_w), [1, 1, -1, 1, 1, 1])
    ky = tf.reshape(tf.range(kernel_h), [1, 1, 1, 1, -1, 1])
    kx = tf.reshape(tf.range(kernel_w), [1, 1, 1, 1, 1, -1])
    h = tf.cast(y * strides[0] - pad_top + ky * dilations[0], compute_dtype) + offset[..., 0]
    w = tf.cast(x * strides[1] - pad_left + kx * dilations[1], compute_dtype) + offset[..., 1]

    # Samples [batch, out_h, out_w, deform_groups, kernel_h, kernel_w, deform group's channels].
    image = tf.reshape(input, [batch, in_h, in_w, deform_groups, channels // deform_groups])
    if mask is not None:
        mask = tf.cast(mask, compute_dtype)
        mask = tf.reshape(mask, [batch, out_h, out_w, deform_groups, kernel_h, kernel_w])
    samples = _sample(image, h, w, mask)
    samples = tf.transpose(samples, [0, 1, 2, 4, 5, 3, 6])

    groups = channels // group_channels
    samples = tf.reshape(samples, [batch, out_h, out_w, kernel_h, kernel_w, groups, group_channels])
    filters = tf.reshape(
        filters, [kernel_h, kernel_w, group_channels, groups, out_channels // groups]
    )
    output = tf.einsum("nyxklgc,klcgo->nyxgo", samples, filters)
    return tf.cast(tf.reshape(output, [batch, out_h, out_w, out_channels]), dtype)


def _sample(image, h, w, mask):
    """Samples image[n, :, :, g] at (h, w)[n, ..., g, ky, kx], by bilinear interpolation.

    Scaled by the mask, if there is one; 0 outside, whatever the mask.
    """
    in_h, in_w = image.shape[1] or tf.shape(image)[1], image.shape[2] or tf.shape(image)[2]
    size_h, size_w = tf.cast(in_h, h.dtype), tf.cast(in_w, w.dtype)
    inside = (h > -1) & (h < size_h) & (w > -1) & (w < size_w)
    # Any place will do outside, as long as it is finite: neither value nor gradient is used.
    h, w = (tf.where(inside, position, tf.zeros_like(position)) for position in (h, w))
    if mask is not None:
        mask = tf.where(inside, mask, tf.zeros_like(mask))
    h_low, w_low = tf.floor(h), tf.floor(w)
    h_fraction, w_fraction = h - h_low, w - w_low
    total = 0
    for down, h_weight in ((0, 1 - h_fraction), (1, h_fraction)):
        for right, w_weight in ((0, 1 - w_fraction), (1, w_fraction)):
            pixel_h = tf.cast(h_low, tf.int32) + down
            pixel_w = tf.cast(w_low, tf.int32) + right
            value = _pixel_or_zero(image, pixel_h, pixel_w, in_h, in_w)
            total += (h_weight * w_weight)[..., tf.newaxis] * value
    if mask is not None:
        total *= mask[..., tf.newaxis]
    return tf.where(inside[..., tf.newaxis], total, tf.zeros_like(total))


def _pixel_or_zero(image, pixel_h, pixel_w, in_h, in_w):
    exists = (pixel_h >= 0) & (pixel_h < in_h) & (pixel_w >= 0) & (pixel_w < in_w)
    shape = tf.shape(pixel_h)
    n = tf.reshape(tf.range(shape[0]), [-1, 1, 1, 1, 1, 1])
    g = tf.reshape(tf.range(shape[3]), [1, 1, 1, -1, 1, 1])
    indices = tf.stack(
        [
            tf.broadcast_to(n, shape),
            tf.where(exists, pixel_h, 0),
            tf.where(exists, pixel_w, 0),
            tf.broadcast_to(g, shape),
        ],
        axis=-1,
    )
    # One pixel more, so that there is something to gather from an image without pixels.
    image = tf.pad(image, [[0, 0], [0, 1], [0, 1], [0, 0], [0, 0]])
    pixels = tf.gather_nd(image, indices)
    return tf.where(exists[..., tf.newaxis], pixels, tf.zeros_like(pixels))


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
    out = (size + stride - 1) // stride
    return tf.maximum((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0) // 2
