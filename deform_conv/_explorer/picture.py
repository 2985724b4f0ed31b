"""The image as eyes see it."""

import numpy as np
import tensorflow as tf

from .._arguments import shown
from .record import Recording, real_numbers

# The longest side, in pixels, and the bytes from which on a PNG becomes a JPEG.
LONGEST, LARGEST_PNG = 1024, 1_000_000


def picture_of(recording: Recording, picture=None) -> np.ndarray:
    """What is shown of the image, or `picture` in its place: `[h, w, 1 or 3]`, uint8."""
    if picture is None:
        picture = recording.image
        if picture.shape[-1] not in (1, 3):
            picture = np.mean(picture, axis=-1, keepdims=True)
        return _as_bytes(picture)
    array = real_numbers(picture, "picture")
    if array.ndim == 2:
        array = array[..., np.newaxis]
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or array.size == 0:
        raise ValueError(
            "picture must be [h, w], [h, w, 1] or [h, w, 3]. Received: shape "
            f"{shown(np.shape(picture))}"
        )
    return _as_bytes(array)


def _as_bytes(picture: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 255 as they are, from 0 to 1 as shares, others from least to greatest."""
    if picture.dtype == np.uint8:
        return picture
    finite = np.where(np.isfinite(picture), picture, 0).astype(np.float64)
    least, greatest = finite.min(), finite.max()
    if least >= 0 and greatest <= 255:
        finite *= 255 if greatest <= 1 else 1
    else:
        finite = (finite - least) * (255 / ((greatest - least) or 1))
    return np.rint(finite).astype(np.uint8)


def encoded(picture: np.ndarray) -> tuple[str, bytes]:
    """The media type and the bytes of a file of the picture."""
    scale = LONGEST / max(picture.shape[:2])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.shape[:2]]
        resized = tf.image.resize(picture, size, "area")
        picture = np.rint(resized).astype(np.uint8)
    png = tf.io.encode_png(picture).numpy()
    if len(png) <= LARGEST_PNG:
        return "image/png", png
    return "image/jpeg", tf.io.encode_jpeg(picture, quality=90).numpy()
