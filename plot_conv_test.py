#!/usr/bin/env python3
"""Shows where the deformable CNN looks, as an animation.

Feeds scaled and rotated versions of img/test_img.png to the trained network and draws, for its
first two deformable layers, the actual sampling locations on the enlarged input image, only those
that an offset moved by more than a threshold. Beside them are the nine samples of one output
position of the third, which moves, joined to the places of the regular grid. Writes
img/offset_viz.gif, and its middle frame as a .png beside it; with --html, also a page to explore
the offsets in that frame's image.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.quiet_tensorflow import keras

import cv2
import numpy as np

from utils.cli import PROJECT, UserError, number, reading, run
from utils.files import check_writable, refuse_overwriting, write_file
from utils.mnist import IMAGE_SIZE, warp, zoom_matrix
from utils.model import (
    CHECKPOINTS,
    CONVOLUTION_NAMES,
    CONVOLUTIONS,
    DEFORM,
    KERNEL_SIZE,
    load_model,
    offsets_of,
)
from utils.visualization import Panel, Samples, draw_frame, gif, png, samples_of

LAYERS = 2
LARGEST_ZOOM = 2.0
LARGEST_ANGLE = 30.0
FRAME_MILLISECONDS = 100
# The output position goes round the middle, on a circle of this radius in positions.
CIRCLE = 2.8
# Offsets beyond this have the colour of this one.
FARTHEST = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--image", type=Path, default=PROJECT / "img" / "test_img.png", help="28x28 by default")
    add("--output", type=Path, default=PROJECT / "img" / "offset_viz.gif", help="a .gif")
    add(
        "--threshold",
        type=number(float, at_least=0),
        nargs="+",
        default=[0.3, 1.0],
        metavar="PIXELS",
        help="draw samples moved by more than so many pixels: one number, or one for each of the "
        "two layers (default: %(default)s)",
    )
    add(
        "--frames",
        type=number(int, at_least=2, at_most=1000),
        default=60,
        help="default: %(default)s",
    )
    add("--html", type=Path, metavar="FILE", help="also a page to explore the offsets, a .html")
    add("--checkpoint-dir", type=Path, default=CHECKPOINTS, help="by default checkpoint/")
    arguments = parser.parse_args()
    thresholds = arguments.threshold * (LAYERS if len(arguments.threshold) == 1 else 1)
    if len(thresholds) != LAYERS:
        parser.error(f"--threshold takes 1 or {LAYERS} numbers, got {len(thresholds)}")
    if arguments.output.suffix != ".gif":
        parser.error(f"--output must end in .gif, got {arguments.output}")
    if arguments.html and arguments.html.suffix != ".html":
        parser.error(f"--html must end in .html, got {arguments.html}")
    still = arguments.output.with_suffix(".png")
    outputs = {"--output": arguments.output, "the picture": still, "--html": arguments.html}
    for name, output in outputs.items():
        if output is None:
            continue
        try:
            refuse_overwriting(name, output, {"--image": arguments.image})
            refuse_overwriting("--image", arguments.image, {name: output})
        except UserError as error:
            parser.error(str(error))
        check_writable(output)

    digit = read_image(arguments.image)
    model = load_model(DEFORM, folder=arguments.checkpoint_dir)
    images = np.stack([warp(digit, matrix) for matrix in transformations(arguments.frames)])
    offsets = [
        offsets_of(model, name, images[..., np.newaxis]) for name in CONVOLUTION_NAMES[: LAYERS + 1]
    ]
    frames = []
    progress = keras.utils.Progbar(len(images), unit_name="frame")
    for index, image in enumerate(images):
        panels = panels_of(
            [of_layer[index] for of_layer in offsets], thresholds, index / len(images)
        )
        frames.append(draw_frame(image, panels, FARTHEST))
        progress.add(1)

    middle = len(frames) // 2
    write_file(arguments.output, gif(frames, FRAME_MILLISECONDS))
    write_file(still, png(frames[middle]))
    written = f"{arguments.output} and {still}"
    if arguments.html:
        from deform_conv import explore  # needs the compiled library, as the model did

        explore(model, images[middle, ..., np.newaxis], arguments.html)
        written = f"{arguments.output}, {still} and {arguments.html}"
    print(f"wrote {written}")


def panels_of(offsets: list[np.ndarray], thresholds: list[float], time: float) -> list[Panel]:
    """The panels of one frame, from the offsets of each layer, at a time from 0 to 1."""
    panels = []
    for layer, threshold in enumerate(thresholds):
        samples = samples_of_layer(offsets, layer).beyond(threshold)
        title = f"deformable layer {layer + 1}: offsets above {threshold:g} px"
        panels.append(Panel(title, samples))
    angle, middle = 2 * np.pi * time, (len(offsets[LAYERS]) - 1) / 2
    around = middle + CIRCLE * np.array([-np.cos(angle), np.sin(angle)])
    one = samples_of_layer(offsets, LAYERS, position=tuple(np.rint(around).astype(int)))
    return [*panels, Panel(f"deformable layer {LAYERS + 1}: one position", one, with_grid=True)]


def samples_of_layer(offsets: list[np.ndarray], layer: int, position=None) -> Samples:
    in_size = len(offsets[layer - 1]) if layer else IMAGE_SIZE
    stride = CONVOLUTIONS[layer][1]
    return samples_of(offsets[layer], in_size, KERNEL_SIZE, stride, IMAGE_SIZE, position)


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """Drops what C libraries write to stderr meanwhile."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def read_image(path: Path) -> np.ndarray:
    """Reads an image file of any size as `[28, 28]` uint8, bright on dark like MNIST."""
    if not path.is_file():
        raise UserError(f"image {path} not found")
    # It may be far too large. Of a damaged one, libraries write warnings of their own.
    with reading(f"image {path} cannot be read"), without_stderr():
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise UserError(f"{path} is no image that OpenCV can read")
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE):
        height, width = image.shape
        print(f"{path} is {height}x{width}; resizing to {IMAGE_SIZE}x{IMAGE_SIZE}")
        image = cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    return image


def transformations(count: int) -> list[np.ndarray]:
    """Affine maps that shrink the image and let it grow back while it turns to and fro, once."""
    phases = 2 * np.pi * np.arange(count) / count
    zooms = 1 + (LARGEST_ZOOM - 1) * (1 - np.cos(phases)) / 2
    angles = LARGEST_ANGLE * np.sin(phases)
    return [
        zoom_matrix((zoom, zoom), angle=angle) for zoom, angle in zip(zooms, angles, strict=True)
    ]


if __name__ == "__main__":
    run(main)
