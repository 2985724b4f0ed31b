"""Layers, for the benchmarks on the CPU and on a GPU alike. No framework is needed here."""

from typing import NamedTuple

import report

MEASUREMENTS = ("forward", "forward+backward")


class Layer(NamedTuple):
    """A deformable convolution's sizes, and what its random tensors are like."""

    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    deform_groups: int = 1
    masked: bool = False
    scale: float = 1.0  # standard deviation of the offsets, in pixels
    holes: bool = False  # whether some offsets are NaN or infinite

    def __str__(self) -> str:
        kernel = "×".join(map(str, self.kernel))
        parts = [
            report.shape_name(self[:5]),
            f"kernel {kernel}" * (self.kernel != (3, 3)),
            f"stride {self.stride}" * (self.stride != 1),
            f"dilation {self.dilation}" * (self.dilation != 1),
            f"groups {self.groups}" * (self.groups != 1),
            f"deform_groups {self.deform_groups}" * (self.deform_groups != 1),
            "mask" * self.masked,
            f"offsets × {self.scale:g}" * (self.scale > 2),
            "NaN and inf" * self.holes,
        ]
        return ", ".join(filter(None, parts))

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def depthwise(self) -> bool:
        return self.groups == self.channels > 1

    @property
    def pad(self) -> tuple[int, int]:
        """At each end of rows and columns."""
        return tuple(self.dilation * (size - 1) // 2 for size in self.kernel)

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple(
            (size + 2 * pad - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, pad, kernel in zip(
                (self.height, self.width), self.pad, self.kernel, strict=True
            )
        )

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        """What torchvision calls the attributes, and the core too."""
        return {"stride": (self.stride,) * 2, "pad": self.pad, "dilation": (self.dilation,) * 2}

    @property
    def multiply_adds(self) -> int:
        """Of the product of columns and filters."""
        out_h, out_w = self.out_size
        k = self.taps * self.channels // self.groups
        return self.batch * out_h * out_w * k * self.out_channels


# The MNIST network's.
EXPERIMENT = (
    Layer(64, 1, 32, 28, 28),
    Layer(64, 32, 64, 28, 28, stride=2),
    Layer(64, 64, 128, 14, 14),
    Layer(64, 128, 128, 14, 14, stride=2),
)
