"""MNIST, and the scaled MNIST on which a deformable network learns where to look."""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.cli import PROJECT, UserError, reading

MNIST_FILE = PROJECT / "data" / "mnist.npz"
IMAGE_SIZE = 28
CLASSES = 10

ZOOM_RANGE = (1.0, 2.5)
EASY_SHIFT = 1.0
HARD_SHIFT = 5.6  # a fifth of the image

# The scaled test digits are the same ones whatever seed a training was started with.
_TEST_SEED = 20170317


class Digits(NamedTuple):
    """Images `[N, 28, 28, 1]` uint8 (0 to 255) and their labels `[N]` uint8 (0 to 9)."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, count: int | None) -> "Digits":
        """The first `count` digits, or all of them for None."""
        return Digits(self.images[:count], self.labels[:count])


def load_mnist(path: Path | str = MNIST_FILE) -> tuple[Digits, Digits]:
    """Reads MNIST in Keras's file layout and returns its (training, test) digits.

    Raises:
      UserError: the file is missing, or is no MNIST in that layout.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"MNIST file {path} not found (the project keeps a copy as data/mnist.npz)")
    with (
        reading(f"{path} is no MNIST file with x_train, y_train, x_test, y_test"),
        np.load(path) as arrays,
    ):
        parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
        if not all(isinstance(array, np.ndarray) for part in parts for array in part):
            raise ValueError("it holds something that is no array")
    train, test = (checked_digits(images, labels, path) for images, labels in parts)
    return train, test


def checked_digits(images: np.ndarray, labels: np.ndarray, path: Path) -> Digits:
    """Digits of images `[N, 28, 28]` uint8 and labels `[N]` that `path` holds.

    Raises:
      UserError: they are none, or of other shapes or types.
    """
    if (
        labels.shape != images.shape[:1]
        or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE)
        or images.dtype != np.uint8
        or labels.dtype.kind not in "iu"
    ):
        raise UserError(
            f"{path} does not hold one 28x28 uint8 image per label, a whole number: images "
            f"{images.dtype}{list(images.shape)}, labels {labels.dtype}{list(labels.shape)}"
        )
    if not len(labels):
        raise UserError(f"{path} holds no digits for training, or none for testing")
    if not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UserError(
            f"{path} holds labels from {labels.min()} to {labels.max()}; "
            f"0 to {CLASSES - 1} expected"
        )
    return Digits(images[..., np.newaxis], labels.astype(np.uint8))


def zoom_matrix(zoom: tuple[float, float], shift: tuple[float, float] = (0.0, 0.0), angle=0.0):
    """The affine map `[2, 3]` from a pixel (x, y) of the new image to its place in the original.

    Args:
      zoom: factors (y, x) about the image's centre; above 1 shrinks what the image shows.
      shift: how far the picture then moves, in pixels (y, x) of the new image.
      angle: how far the picture turns about the centre, in degrees, counter-clockwise.
    """
    centre = np.full(2, (IMAGE_SIZE - 1) / 2)
    radians = np.deg2rad(angle)
    rotation = np.array(
        [[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]]
    )  # y points down, so this turns the picture counter-clockwise
    linear = np.diag(zoom[::-1]) @ rotation
    return np.column_stack([linear, centre - linear @ (centre + shift[::-1])])


def warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Samples `image` [28, 28] at `matrix` times each pixel: bilinear, edges repeated."""
    return cv2.warpAffine(
        image,
        matrix,
        (IMAGE_SIZE, IMAGE_SIZE),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


class Scaling(NamedTuple):
    """Of each image, zoom factors and shifts `[N, 2]` along (y, x), as `zoom_matrix` takes them."""

    zooms: np.ndarray
    shifts: np.ndarray


def draw_scaling(rng: np.random.Generator, count: int, shift: float = EASY_SHIFT) -> Scaling:
    """Draws, for `count` images, a zoom from (1.0, 2.5) and a shift of up to `shift` per axis."""
    zooms = rng.uniform(*ZOOM_RANGE, size=(count, 2))
    return Scaling(zooms, rng.uniform(-shift, shift, size=(count, 2)))


def apply_scaling(images: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Zooms and shifts each of the images `[N, 28, 28, 1]` uint8."""
    scaled = np.empty_like(images)
    for index, image in enumerate(images):
        matrix = zoom_matrix(scaling.zooms[index], scaling.shifts[index])
        scaled[index, ..., 0] = warp(image[..., 0], matrix)
    return scaled


def scale_images(
    images: np.ndarray, rng: np.random.Generator, shift: float = EASY_SHIFT
) -> np.ndarray:
    """Zooms each image by a factor drawn per axis from (1.0, 2.5) and shifts it.

    Args:
      images: `[N, 28, 28, 1]` uint8.
      rng: where the factors and shifts are drawn from.
      shift: the largest shift along each axis, in pixels.

    Returns:
      `[N, 28, 28, 1]` uint8.
    """
    return apply_scaling(images, draw_scaling(rng, len(images), shift))


def scaled_test_digits(test: Digits, shift: float = EASY_SHIFT) -> Digits:
    """The scaled test set: drawn once from a fixed seed, so that accuracies can be compared."""
    return Digits(scale_images(test.images, np.random.default_rng(_TEST_SEED), shift), test.labels)
