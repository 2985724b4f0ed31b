"""The network of an arm, before its training."""

import itertools

from utils.quiet_tensorflow import keras

import numpy as np

from experiments.arms import (
    ALL,
    CONSTANT,
    CONSTANT_OFFSETS,
    MASKS,
    NORM,
    OFFSETS,
    RANDOM_OFFSETS,
    Arm,
)
from utils.mnist import CLASSES
from utils.model import (
    CONVOLUTION_NAMES,
    CONVOLUTIONS,
    DEFORM,
    KERNEL_SIZE,
    build_model,
)
from utils.tuning import copy_weights, freeze_all_but_offsets


def build(arm: Arm, regular: keras.Model | None, images: np.ndarray, seed: int) -> keras.Model:
    """Builds an arm's network, which trains what the arm says.

    Args:
      arm: which.
      regular: the trained regular network, for an arm that is pretrained.
      images: `[N, 28, 28, 1]` uint8, some that the size of random offsets is measured with.
      seed: of random offsets.
    """
    model = build_model(arm.model, convolutions=wide_convolutions() if arm.wide else CONVOLUTIONS)
    if arm.pretrained:
        copy_weights(regular, model)
    if arm.random_offsets:
        draw_offsets(model, arm, images, np.random.default_rng(seed))
    _freeze(model, arm)
    return model


def _freeze(model: keras.Model, arm: Arm) -> None:
    if arm.trained in (OFFSETS, MASKS, CONSTANT_OFFSETS):
        freeze_all_but_offsets(model, arm.layers)
    elif arm.trained != ALL:
        for layer in model.layers:
            is_norm = isinstance(layer, keras.layers.BatchNormalization)
            layer.trainable = arm.trained == NORM and is_norm
    for layer in (model.get_layer(name) for name in CONVOLUTION_NAMES):
        if arm.trained == MASKS:
            layer.offset_conv.trainable = False
        elif arm.trained == CONSTANT_OFFSETS:
            layer.offset_conv.kernel.trainable = False
        elif arm.random_offsets:
            layer.offset_trainable = False


def draw_offsets(
    model: keras.Model, arm: Arm, images: np.ndarray, rng: np.random.Generator
) -> None:
    """Gives an arm's network random offsets, with the standard deviations RANDOM_OFFSETS."""
    for name, deviation in RANDOM_OFFSETS.items():
        layer = model.get_layer(name)
        kernel, bias = layer.offset_conv.kernel, layer.offset_conv.bias
        if arm.random_offsets == CONSTANT:
            bias.assign(deviation * rng.standard_normal(bias.shape))
            continue
        kernel.assign(rng.standard_normal(kernel.shape))
        # In a network that is not trained yet, batch normalisation has no statistics.
        before = keras.Model(model.inputs[0], layer.input)(images, training=not arm.pretrained)
        kernel.assign(kernel * deviation / np.std(layer.offset(before)))


def parameters_of(convolutions) -> int:
    """Number of parameters of the regular network with these convolutions, statistics included."""
    channels = [1, *(filters for filters, _ in convolutions)]
    pairs = itertools.pairwise(channels)
    biases_and_norms = 5 * sum(channels[1:])
    kernels = sum(KERNEL_SIZE**2 * before * after for before, after in pairs)
    return kernels + biases_and_norms + (channels[-1] + 1) * CLASSES


def wide_convolutions() -> tuple[tuple[int, int], ...]:
    """Those of the regular network that has about as many parameters as the deformable one."""
    goal = build_model(DEFORM).count_params()
    candidates = [
        tuple((round(factor * filters), stride) for filters, stride in CONVOLUTIONS)
        for factor in np.arange(1, 2, 1e-3)
    ]
    return min(candidates, key=lambda convolutions: abs(parameters_of(convolutions) - goal))
