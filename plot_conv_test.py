#!/usr/bin/env python3
"""Shows where the deformable CNN looks, as an animation.

Feeds scaled and rotated versions of img/test_img.png to the trained network and draws, for its
first two deformable layers, the actual sampling locations on the enlarged input image, only those
that an offset moved by more than a threshold. Writes img/offset_viz.gif, and its middle frame as
a .png beside it.
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
from utils.visualization import Panel, draw_frame, gif, png, sampling_locations

LAYERS = 2
LARGEST_ZOOM = 2.0
LARGEST_ANGLE = 30.0
FRAME_MILLISECONDS = 100
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
        default=[0.25, 1.0],
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
    add("--checkpoint-dir", type=Path, default=CHECKPOINTS, help="by default checkpoint/")
    arguments = parser.parse_args()
    thresholds = arguments.threshold * (LAYERS if len(arguments.threshold) == 1 else 1)
    if len(thresholds) != LAYERS:
        parser.error(f"--threshold takes 1 or {LAYERS} numbers, got {len(thresholds)}")
    if arguments.output.suffix != ".gif":
        parser.error(f"--output must end in .gif, got {arguments.output}")
    still = arguments.output.with_suffix(".png")
    for output in (arguments.output, still):
        try:
            refuse_overwriting("--output", output, {"--image": arguments.image})
            refuse_overwriting("--image", arguments.image, {"--output": output})
        except UserError as error:
            parser.error(str(error))
        check_writable(output)

    digit = read_image(arguments.image)
    model = load_model(DEFORM, folder=arguments.checkpoint_dir)
    images = np.stack([warp(digit, matrix) for matrix in transformations(arguments.frames)])
    offsets = [
        offsets_of(model, name, images[..., np.newaxis]) for name in CONVOLUTION_NAMES[:LAYERS]
    ]
    frames = []
    progress = keras.utils.Progbar(len(images), unit_name="frame")
    for index in range(len(images)):
        panels = []
        for layer in range(LAYERS):
            # Both layers see a 28x28 input, so their pixels are those of the image.
            samples = sampling_locations(
                offsets[layer][index], IMAGE_SIZE, KERNEL_SIZE, CONVOLUTIONS[layer][1]
            )
            threshold = thresholds[layer]
            title = f"deformable layer {layer + 1}: offsets above {threshold:g} px"
            panels.append(Panel(title, samples.beyond(threshold)))
        frames.append(draw_frame(images[index], panels, FARTHEST))
        progress.add(1)

    write_file(arguments.output, gif(frames, FRAME_MILLISECONDS))
    write_file(still, png(frames[len(frames) // 2]))
    print(f"wrote {arguments.output} and {still}")


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
