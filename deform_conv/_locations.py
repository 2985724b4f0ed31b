"""Where deformable convolution samples its input, in numbers."""

import math
from collections.abc import Sequence

import numpy as np

from ._arguments import converting, height_and_width, integer, padding_attributes, shown
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
    kernel, strides, dilations = (
        _positive(height_and_width(value, name), name)
        for value, name in (
            (kernel_size, "kernel_size"),
            (strides, "strides"),
            (dilations, "dilations"),
        )
    )
    (groups,) = _positive([integer(deform_groups, "deform_groups")], "deform_groups")
    with converting(lambda: f"offset must be an array of real numbers. Received: {shown(offset)}"):
        located = np.array(offset, np.float64)
    *outer, received = located.shape or (0,)
    channels = 2 * groups * math.prod(kernel)
    if len(outer) < 2 or received != channels:
        raise ValueError(
            f"offset must be [..., OH, OW, {channels}], for 2 * deform_groups * {kernel[0]} * "
            f"{kernel[1]} channels. Received: shape {located.shape}"
        )
    located = located.reshape(*outer, groups, *kernel, 2)
    starts = grid_start(in_size, kernel, strides, padding, dilations)
    for axis, start in enumerate(starts):
        outputs, taps = np.arange(outer[axis - 2]), np.arange(kernel[axis])
        along = start + outputs[:, np.newaxis] * strides[axis] + taps * dilations[axis]
        # The last dimensions are OH, OW, groups, KH, KW.
        sizes = np.ones(5, int)
        sizes[[axis, 3 + axis]] = along.shape
        located[..., axis] += along.reshape(sizes)
    return located


def _positive(numbers: list[int], argument: str) -> list[int]:
    if min(numbers) < 1:
        raise ValueError(f"{argument} must be at least 1. Received: {shown(numbers)}")
    return numbers


def grid_start(in_size, kernel_size, strides, padding, dilations) -> list[int]:
    """Where the first tap of the first output position is without an offset: (h, w) in pixels.

    `kernel_size`, `strides` and `dilations` are (h, w), the others as in `sampling_locations`.
    """
    in_size = _positive(height_and_width(in_size, "in_size"), "in_size")
    attributes = padding_attributes(padding)
    if "explicit_paddings" in attributes:
        numbers = attributes["explicit_paddings"]
        if min(numbers) < 0 or any(numbers[:2] + numbers[-2:]):
            raise ValueError(
                "padding must be four pairs of numbers of 0 or more, 0 for batch and channels. "
                f"Received: {shown(padding)}"
            )
        padding = list(zip(numbers[::2], numbers[1::2], strict=True))
    return [
        -pad_before(padding, 1 + axis, size, taps, stride, dilation)
        for axis, (size, taps, stride, dilation) in enumerate(
            zip(in_size, kernel_size, strides, dilations, strict=True)
        )
    ]


def reads(locations: np.ndarray, in_size: Sequence[int]) -> np.ndarray:
    """Which samples `[..., 2]` read something of an input of (h, w) pixels. NaN reads nothing."""
    return np.all((locations > -1) & (locations < np.array(in_size)), axis=-1)


def rescaled(places: np.ndarray, from_size, to_size) -> np.ndarray:
    """Places (h, w) of one plane of pixels in another of the same extent, centres aligned."""
    return (places + 0.5) * np.divide(to_size, from_size) - 0.5
