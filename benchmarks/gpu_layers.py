"""The layers that are timed on a GPU, and chains of calls. No framework is needed here."""

import statistics
from collections.abc import Callable
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
        depth = self.taps * self.channels // self.groups
        return self.batch * out_h * out_w * depth * self.out_channels


DETECTION = (
    Layer(256, 32, 64, 28, 28),
    Layer(8, 128, 128, 100, 152),
    Layer(8, 256, 256, 50, 76),
    Layer(8, 512, 512, 25, 38),
)
# The MNIST network's.
SMALL = (
    Layer(64, 1, 32, 28, 28),
    Layer(64, 32, 64, 28, 28, stride=2),
    Layer(64, 64, 128, 14, 14),
    Layer(64, 128, 128, 14, 14, stride=2),
)

BACK_TO_BACK = 200  # calls of a small layer
TIMED_TYPES = ("float16", "bfloat16", "tf32", "float32")

# --- Chains: what a call costs between others ---

CHAINED = (*DETECTION, SMALL[2])
CHAINED_TYPES = ("float16", "bfloat16", "tf32")
LINKS = 16
# Tensors that the links of a chain take in turn: no two links have the same two.
INPUTS, FILTERS = 13, 12


def arguments_of_links(links: int) -> list[tuple[int, int]]:
    """Which input (and offset) and which filters each link of a chain takes."""
    return [(k % INPUTS, k % FILTERS) for k in range(links)]


def slope_us(seconds_of: Callable[[int], float], links: int = LINKS, rounds: int = 15) -> float:
    """Microseconds of a link: seconds_of() a chain of 3 * links less that of one of `links`.

    What a chain costs whatever its length falls out.
    """
    short, long = links, 3 * links
    times = {short: [], long: []}
    for _ in range(2):  # to warm up
        seconds_of(short), seconds_of(long)
    for _ in range(rounds):
        for length, seconds in times.items():
            seconds.append(seconds_of(length))
    medians = {length: statistics.median(seconds) for length, seconds in times.items()}
    return 1e6 * (medians[long] - medians[short]) / (long - short)
