"""Offsets and weights as InternImage's modules have them, in the order of `deform_aggregate2d`.

DCNv3 of Wang et al., InternImage, arXiv:2211.05778; DCNv4 of Xiong et al., arXiv:2401.06197, has
the same order. Tap (kx, ky) of theirs samples, on each axis, at

    base + (k - 1) * dilation // 2 + offset_scale * (tap * dilation - (k - 1) * dilation // 2 + o)

where `base` is stride * position - padding, k the kernel's size and o their offset. Ours samples
at base + tap * dilation + offset. So an offset of ours is

    offset_scale * o + (offset_scale - 1) * (tap * dilation - (k - 1) * dilation // 2)
"""

import math

import numpy as np
import tensorflow as tf

from ._reference import sizes


def from_dcnv3_offset(
    offset,
    weights,
    kernel_size: tuple[int, int],
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Reorders offsets and weights of InternImage's modules for `deform_aggregate2d`.

    Theirs have the taps x-major (the kernel's columns one after the other), and of each tap first
    x and then y. With `remove_center`, the tap in the middle is missing there. Here it gets the
    weight 0, and an offset far outside every image, so that it samples nothing.

    Differentiable TensorFlow ops, of any order.

    Args:
      offset: `[N, OH, OW, 2 * groups * taps]`, taps being KH * KW, or one less with
        `remove_center`; channel `((g * KW + kx) * KH + ky) * 2` moves a tap right, the channel
        after it down.
      weights: `[N, OH, OW, groups * taps]`; channel `(g * KW + kx) * KH + ky`.
      kernel_size: (KH, KW), both odd with `remove_center`.
      dilations: (h, w).
      groups: the deformable groups.
      offset_scale: scales the offsets, and the grid of taps about its centre.
      remove_center: whether the tap in the middle is missing.

    Returns:
      `offset` and `weights` as `deform_aggregate2d` takes them, `[N, OH, OW, 2 * groups * KH * KW]`
      and `[N, OH, OW, groups * KH * KW]`, in the dtypes given.

    Raises:
      ValueError: `remove_center`, and a size of the kernel is even.
    """
    kernel_h, kernel_w = kernel_size
    if remove_center and kernel_h * kernel_w % 2 == 0:
        raise ValueError(
            f"remove_center needs a kernel of odd height and width; received {kernel_h}x{kernel_w}"
        )
    offset, weights = (tf.convert_to_tensor(tensor) for tensor in (offset, weights))
    grid = centered_grid(kernel_size, dilations).reshape(-1)
    shift = tf.constant(np.tile((offset_scale - 1) * grid, groups), offset.dtype)
    scaled = tf.cast(offset_scale, offset.dtype) * offset
    outside = offset.dtype.min  # finite, for those who look for infinities
    moved = _reordered(scaled, kernel_size, groups, 2, outside if remove_center else None)
    return moved + shift, _reordered(weights, kernel_size, groups, 1, 0 if remove_center else None)


def centered_grid(kernel_size, dilations) -> np.ndarray:
    """(dy, dx) of each tap from the centre, `[KH, KW, 2]`."""
    h, w = (
        np.arange(size) * dilation - (size - 1) * dilation // 2
        for size, dilation in zip(kernel_size, dilations, strict=True)
    )
    return np.stack(np.meshgrid(h, w, indexing="ij"), axis=-1)


def _reordered(tensor, kernel_size, groups, per_tap, middle):
    """Channels with the taps y-major, and the numbers of each tap reversed.

    `middle` is for the tap in the middle, where `tensor` lacks it; None where it does not.
    """
    kernel_h, kernel_w = kernel_size
    taps = kernel_h * kernel_w
    *place, channels = sizes(tensor)
    rows = math.prod(place) * groups
    tensor = tf.reshape(tensor, [rows, channels // groups // per_tap, per_tap])
    if middle is not None:
        before, after = tf.split(tensor, [taps // 2, taps // 2], axis=1)
        missing = tf.fill([rows, 1, per_tap], tf.constant(middle, tensor.dtype))
        tensor = tf.concat([before, missing, after], axis=1)
    tensor = tf.reshape(tensor, [rows, kernel_w, kernel_h, per_tap])
    tensor = tf.reverse(tf.transpose(tensor, [0, 2, 1, 3]), [3])
    return tf.reshape(tensor, [*place, groups * taps * per_tap])
