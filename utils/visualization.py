"""Where a deformable layer looks: sampling locations, and pictures of them."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no window, no display

from matplotlib import pyplot as plt
from PIL import Image

PANEL_INCHES = 3.6
GRID_COLOUR = "tab:cyan"  # seen on black and on white


class Samples(NamedTuple):
    """Samples of one layer in one image.

    Attributes:
      positions: (h, w) in pixels of the image, `[S, 2]`.
      regular: the places of the regular grid that the offsets moved them from, likewise.
      distances: how far they did, `[S]` in pixels of the layer's input.
    """

    positions: np.ndarray
    regular: np.ndarray
    distances: np.ndarray

    def beyond(self, threshold: float) -> "Samples":
        """Those that were moved by more than `threshold` pixels."""
        chosen = self.distances > threshold
        return Samples(*(values[chosen] for values in self))


def samples_of(
    offset: np.ndarray,
    in_size: int,
    kernel_size: int,
    stride: int,
    image_size: int,
    position: tuple[int, int] | None = None,
) -> Samples:
    """The samples that a SAME convolution with one deformable group takes of a square input.

    Args:
      offset: `[OH, OW, 2 * kernel_size**2]`, one image's.
      in_size: height and width of the layer's input, in pixels.
      kernel_size: height and width of the kernel.
      stride: along both axes.
      image_size: height and width of the image, in pixels.
      position: (y, x) of the one output position whose samples these are; None for all.
    """
    # Needs the compiled library, and a script tells in one line where there is none.
    from deform_conv import sampling_locations
    from deform_conv._locations import rescaled

    chosen = ... if position is None else position
    moved, regular = (
        sampling_locations(each, in_size, kernel_size, stride)[chosen].reshape(-1, 2)
        for each in (offset, np.zeros_like(offset))
    )
    sizes = [in_size] * 2, [image_size] * 2
    return Samples(
        rescaled(moved, *sizes),
        rescaled(regular, *sizes),
        np.linalg.norm(moved - regular, axis=-1),
    )


class Panel(NamedTuple):
    """One of the pictures that stand side by side in a frame."""

    title: str
    samples: Samples
    with_grid: bool = False  # and lines from its places to the samples


def draw_frame(image: np.ndarray, panels: Sequence[Panel], farthest: float) -> Image.Image:
    """Draws each panel's samples as dots on `image` [H, W], enlarged.

    The colour tells how far a sample was moved, up to `farthest` pixels.
    """
    height, width = image.shape
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(PANEL_INCHES * len(panels) + 0.9, PANEL_INCHES + 0.1),
        dpi=100,
        layout="constrained",
    )
    for axis, (title, samples, with_grid) in zip(np.atleast_1d(axes), panels, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if with_grid:
            _draw_grid(axis, samples)
        dots = axis.scatter(
            *samples.positions.T[::-1],
            c=samples.distances,
            s=40 if with_grid else 9,
            linewidths=0,
            alpha=1 if with_grid else 0.85,
            cmap="plasma",
            vmin=0,
            vmax=farthest,
            zorder=3,
        )
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(title, fontsize=10)
    figure.colorbar(dots, ax=axes, label="offset in pixels", fraction=0.04)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


def _draw_grid(axis, samples: Samples) -> None:
    """The places of the regular grid, and lines to the samples."""
    ends = np.stack([samples.regular, samples.positions])  # [2, S, 2]
    style = {"color": GRID_COLOUR, "zorder": 2}
    axis.plot(ends[..., 1], ends[..., 0], linewidth=1.6, **style)
    axis.plot(*samples.regular.T[::-1], "s", markersize=5, fillstyle="none", **style)


def gif(frames: Sequence[Image.Image], milliseconds: int) -> bytes:
    """An endless GIF of `frames`, with one palette for all, so that no colour flickers."""
    palette = frames[0].quantize(128)
    quantized = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    quantized[0].save(
        buffer,
        format="gif",
        save_all=True,
        append_images=quantized[1:],
        duration=milliseconds,
        loop=0,
    )
    return buffer.getvalue()


def png(frame: Image.Image) -> bytes:
    buffer = io.BytesIO()
    frame.save(buffer, format="png")
    return buffer.getvalue()
