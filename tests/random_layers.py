"""Random arguments of `DeformableConv2D`, for comparisons with other libraries."""

from collections.abc import Iterator

import numpy as np


def random_layers(count: int, seed: int) -> Iterator[tuple[dict, tuple[int, int, int, int]]]:
    """Arguments that PyTorch and ONNX have too, and the shape `[N, H, W, C]` of images that fit.

    Both versions come by turns, and so do paddings by a number, by (h, w) and by "same", which
    stands only where it pads both sides equally. Stride and dilation may be above 1 together.
    """
    rng = np.random.default_rng(seed)

    def integer(least: int, most: int) -> int:
        return int(rng.integers(least, most + 1))

    def pair(least: int, most: int) -> tuple[int, int]:
        return integer(least, most), integer(least, most)

    for index in range(count):
        groups, deform_groups = integer(1, 3), integer(1, 3)
        channels = int(np.lcm(groups, deform_groups)) * integer(1, 2)
        padding = (integer(0, 3), pair(0, 3), "same")[index % 3]
        kernel_size, strides, dilation_rate = pair(1, 7), pair(1, 3), pair(1, 3)
        if padding == "same":
            kernel_size = tuple(2 * (taps // 2) + 1 for taps in kernel_size)
            strides = (1, 1)
        arguments = {
            "filters": groups * integer(1, 3),
            "kernel_size": kernel_size,
            "strides": strides,
            "padding": padding,
            "dilation_rate": dilation_rate,
            "groups": groups,
            "use_bias": bool(integer(0, 1)),
            "deform_groups": deform_groups,
            "modulated": index % 2 == 1,
            "mask_scale": 1,  # a sigmoid alone, as elsewhere
        }
        extents = [
            (taps - 1) * dilation + 1
            for taps, dilation in zip(kernel_size, dilation_rate, strict=True)
        ]
        size = [max(extent, 3) + integer(0, 5) for extent in extents]
        yield arguments, (integer(1, 3), *size, channels)
