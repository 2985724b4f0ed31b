"""Where deformable convolution samples its input, in numbers."""

from collections.abc import Sequence

import numpy as np

from ._arguments import height_and_width, integer, padding_attributes, shown
from ._reference import pad_before

__all__ = ["sampling_locations"]


def sampling_locations(
    offset,
    in_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    dilations: int | Sequence[int] = 1,
    deform_groups: int = 1,
) -> np.ndarray:
    """The places in the input where `deform_conv2d` samples, for pictures and statistics.

    Of output position (y, x), deformable group g and tap (ky, kx) it is

        h = y * stride_h - pad_top + ky * dilation_h + dy
        w = x * stride_w - pad_left + kx * dilation_w + dx

    Pixel centres are at whole numbers. A sample reads something of an input of `[H, W]` pixels
    where -1 < h < H and -1 < w < W. Source: Dai et al., arXiv:1703.06211, equation 2.

    Args:
      offset: `[..., OH, OW, 2 * deform_groups * KH * KW]`, in the order of `deform_conv2d`; in
        pixels. An array, or a tensor that has a value.
      in_size: height and width of the input: one number, or (h, w).
      kernel_size, strides, dilations: one number, or (h, w).
      padding: "SAME", "VALID", or `[[0, 0], [top, bottom], [left, right], [0, 0]]`.
      deform_groups: number of deformable groups.

    Returns:
      (h, w) in pixels, `[..., OH, OW, deform_groups, KH, KW, 2]`, float64.

    Raises:
      ValueError: an argument has the wrong form, or the offset does not have as many channels.

    Example:
      >>> sampling_locations(np.zeros([4, 4, 18]), 4, 3)[0, 0, 0, 2, 1]
      array([1., 0.])
    """
    kernel = height_and_width(kernel_size, "kernel_size")
    groups = integer(deform_groups, "deform_groups")
    shape = np.shape(offset)
    channels = 2 * groups * kernel[0] * kernel[1]
    if len(shape) < 3 or shape[-1] != channels:
        raise ValueError(
            f"offset must be [..., OH, OW, {channels}], for 2 * deform_groups * {kernel[0]} * "
            f"{kernel[1]} channels. Received: shape {shown(tuple(shape))}"
        )
    located = np.array(offset, np.float64).reshape(*shape[:-1], groups, *kernel, 2)
    starts = grid_start(in_size, kernel, strides, padding, dilations)
    strides, dilations = (
        height_and_width(value, name)
        for value, name in ((strides, "strides"), (dilations, "dilations"))
    )
    for axis, start in enumerate(starts):
        outputs, taps = np.arange(shape[axis - 3]), np.arange(kernel[axis])
        along = start + outputs[:, np.newaxis] * strides[axis] + taps * dilations[axis]
        # The last dimensions are OH, OW, groups, KH, KW.
        sizes = np.ones(5, int)
        sizes[[axis, 3 + axis]] = along.shape
        located[..., axis] += along.reshape(sizes)
    return located


def grid_start(in_size, kernel_size, strides, padding, dilations) -> list[int]:
    """Where the first tap of the first output position is without an offset: (h, w) in pixels."""
    in_size, kernel, strides, dilations = (
        height_and_width(value, name)
        for value, name in (
            (in_size, "in_size"),
            (kernel_size, "kernel_size"),
            (strides, "strides"),
            (dilations, "dilations"),
        )
    )
    attributes = padding_attributes(padding)
    if "explicit_paddings" in attributes:
        numbers = attributes["explicit_paddings"]
        padding = list(zip(numbers[::2], numbers[1::2], strict=True))
    return [
        -pad_before(padding, 1 + axis, in_size[axis], kernel[axis], strides[axis], dilations[axis])
        for axis in range(2)
    ]


def reads(locations: np.ndarray, in_size: Sequence[int]) -> np.ndarray:
    """Which samples `[..., 2]` read something of an input of (h, w) pixels. NaN reads nothing."""
    return np.all((locations > -1) & (locations < np.array(in_size)), axis=-1)


def rescaled(places: np.ndarray, from_size, to_size) -> np.ndarray:
    """Places (h, w) of one plane of pixels in another of the same extent, centres aligned."""
    return (places + 0.5) * np.divide(to_size, from_size) - 0.5
