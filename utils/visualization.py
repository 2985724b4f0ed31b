"""Where a deformable layer looks: sampling locations, and pictures of them."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no window, no display

from matplotlib import pyplot as plt
from PIL import Image


class Samples(NamedTuple):
    """Samples of one layer in one image: positions (h, w) `[S, 2]` in pixels of the layer's input,
    and how far `[S]` the offsets moved them there."""

    positions: np.ndarray
    distances: np.ndarray

    def beyond(self, threshold: float) -> "Samples":
        """Those that were moved by more than `threshold` pixels."""
        chosen = self.distances > threshold
        return Samples(self.positions[chosen], self.distances[chosen])


def sampling_locations(offset: np.ndarray, in_size: int, kernel_size: int, stride: int) -> Samples:
    """The places where a SAME convolution with one deformable group samples a square input.

    Args:
      offset: `[OH, OW, 2 * kernel_size**2]`, one image's.
      in_size: height and width of the layer's input, in pixels.
      kernel_size: height and width of the kernel.
      stride: along both axes.
    """
    out_size = offset.shape[0]
    offset = offset.reshape(out_size, out_size, kernel_size, kernel_size, 2)
    pad_before = max((out_size - 1) * stride + kernel_size - in_size, 0) // 2
    starts, taps = np.arange(out_size) * stride - pad_before, np.arange(kernel_size)
    along = starts[:, np.newaxis] + taps  # [out, tap]
    grid = np.stack(
        np.broadcast_arrays(along[:, np.newaxis, :, np.newaxis], along[np.newaxis, :, np.newaxis]),
        axis=-1,
    )  # [y, x, ky, kx, {h, w}]
    return Samples((grid + offset).reshape(-1, 2), np.linalg.norm(offset, axis=-1).reshape(-1))


class Panel(NamedTuple):
    """One of the pictures that stand side by side in a frame."""

    title: str
    samples: Samples


def draw_frame(image: np.ndarray, panels: Sequence[Panel], farthest: float) -> Image.Image:
    """Draws each panel's samples as dots on `image` [H, W], enlarged.

    The colour tells how far a sample was moved, up to `farthest` pixels.
    """
    height, width = image.shape
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels) + 0.9, 4.5), dpi=100, layout="constrained"
    )
    for axis, (title, samples) in zip(np.atleast_1d(axes), panels, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        dots = axis.scatter(
            samples.positions[:, 1],
            samples.positions[:, 0],
            c=samples.distances,
            s=9,
            linewidths=0,
            alpha=0.85,
            cmap="plasma",
            vmin=0,
            vmax=farthest,
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
