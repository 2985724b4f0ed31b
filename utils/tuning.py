"""Tuning where a trained network looks: what is trained, and on what."""

from collections.abc import Iterable

from utils.quiet_tensorflow import keras

import numpy as np

from utils.mnist import EASY_SHIFT, Scaling, draw_scaling
from utils.model import CONVOLUTION_NAMES


def frozen_variables(regular: keras.Model, model: keras.Model):
    """Pairs of a regular model's variable and the one of the same role in a deformable model."""
    for layer in regular.layers:
        twin = model.get_layer(layer.name)
        if layer.name in CONVOLUTION_NAMES:
            yield layer.kernel, twin.kernel
            yield layer.bias, twin.bias
        else:
            yield from zip(layer.variables, twin.variables, strict=True)


def copy_weights(regular: keras.Model, model: keras.Model) -> None:
    for source, target in frozen_variables(regular, model):
        target.assign(source)


def freeze_all_but_offsets(
    model: keras.Model, convolutions: Iterable[str] = CONVOLUTION_NAMES
) -> None:
    """Leaves the offsets, and masks, of these convolutions to be trained."""
    for layer in model.layers:
        layer.trainable = False  # batch normalisation then uses its moving statistics
        if layer.name in convolutions:
            layer.offset_trainable = True


def share_in_epoch(first: float, last: float, epoch: int, epochs: int) -> float:
    """A share that goes from `first` in epoch 0 to `last` in the last one, along a line."""
    return first + (last - first) * epoch / max(epochs - 1, 1)


def draw_epoch(
    rng: np.random.Generator, count: int, unscaled_share: float, shift: float = EASY_SHIFT
) -> tuple[np.ndarray, Scaling]:
    """The order `[N]` of an epoch's digits, and how each of them is scaled.

    A share of them stays as it is, with zoom 1 and shift 0.
    """
    order = rng.permutation(count)
    unscaled = round(unscaled_share * count)
    zooms, shifts = draw_scaling(rng, count - unscaled, shift)
    zooms = np.concatenate([np.ones((unscaled, 2)), zooms])
    shifts = np.concatenate([np.zeros((unscaled, 2)), shifts])
    # The unscaled ones came first; spread them over the epoch.
    spread = rng.permutation(count)
    return order[spread], Scaling(zooms[spread], shifts[spread])
