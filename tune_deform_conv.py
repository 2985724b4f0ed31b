#!/usr/bin/env python3
"""Teaches the regular CNN where to look: makes its convolutions deformable and tunes the offsets.

Loads checkpoint/regular_model.weights.h5 into the same network with deformable convolutions,
freezes everything but the convolutions that yield the offsets (and masks), trains those on scaled
MNIST, and tests on regular and scaled digits. Writes checkpoint/deform_model.weights.h5, or
checkpoint/deform_modulated_model.weights.h5 with --modulated. An interrupted training goes on after
its last whole epoch when it is started again with the same options.
"""

import argparse
from pathlib import Path

from utils.quiet_tensorflow import keras, tf

import numpy as np

from utils.cli import number, run
from utils.mnist import Digits, load_mnist, scale_images, scaled_test_digits
from utils.model import (
    CONVOLUTION_NAMES,
    DEFORM,
    DEFORM_MODULATED,
    REGULAR,
    build_model,
    load_model,
    offsets_of,
)
from utils.strategy import is_chief, open_strategy
from utils.training import add_training_arguments, print_accuracies, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    parser.add_argument("--modulated", action="store_true", help="tune version 2, with masks")
    parser.add_argument(
        "--unscaled-share",
        type=number(float, at_least=0, at_most=1),
        default=0.15,
        help="share of the training digits that stay unscaled, so that the network does not "
        "unlearn regular ones (default: %(default)s)",
    )
    parser.add_argument(
        "--regular-weights",
        type=Path,
        help="the regular model's weights, by default regular_model.weights.h5 in the checkpoint "
        "directory",
    )
    arguments = parser.parse_args()
    with open_strategy(arguments) as strategy:
        tune_and_test(arguments, strategy)


def tune_and_test(arguments: argparse.Namespace, strategy: tf.distribute.Strategy) -> None:
    train_digits, test_digits = load_mnist(arguments.data)
    train_digits = train_digits.take(arguments.train_digits)

    def epoch_digits(rng: np.random.Generator) -> Digits:
        order = rng.permutation(len(train_digits.labels))
        images, labels = train_digits.images[order], train_digits.labels[order]
        unscaled = round(arguments.unscaled_share * len(labels))
        scaled = scale_images(images[unscaled:], rng, arguments.shift)
        # The unscaled ones came first; spread them over the epoch.
        order = rng.permutation(len(labels))
        return Digits(np.concatenate([images[:unscaled], scaled])[order], labels[order])

    keras.utils.set_random_seed(arguments.seed)
    regular = load_model(REGULAR, arguments.regular_weights, arguments.checkpoint_dir)
    name = DEFORM_MODULATED if arguments.modulated else DEFORM
    with strategy.scope():
        model = build_model(name, arguments.dtype_policy)
        copy_weights(regular, model)
        freeze_all_but_offsets(model)
    if is_chief(strategy):
        print("training", *(variable.path for variable in model.trainable_variables), sep="\n  ")
    train(model, epoch_digits, arguments, strategy)

    if is_chief(strategy):
        tuned = load_model(name, folder=arguments.checkpoint_dir)
        check_frozen(regular, tuned)
        report_offsets(tuned, scaled_test_digits(test_digits, arguments.shift))
        models = {"regular CNN": regular, "deformable CNN": tuned}
        print_accuracies(models, test_digits, arguments)


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


def freeze_all_but_offsets(model: keras.Model) -> None:
    for layer in model.layers:
        layer.trainable = False  # batch normalisation then uses its moving statistics
        if layer.name in CONVOLUTION_NAMES:
            layer.offset_trainable = True


def check_frozen(regular: keras.Model, model: keras.Model) -> None:
    pairs = list(frozen_variables(regular, model))
    for source, target in pairs:
        if not np.array_equal(source.numpy(), target.numpy()):
            raise AssertionError(f"{target.path} was frozen, but differs from the regular model's")
    print(f"all {len(pairs)} other variables are bit-identical to the regular model's")


def report_offsets(model: keras.Model, digits: Digits, count: int = 500) -> None:
    """Prints how far the offsets are from the zeros that they started at."""
    images = digits.take(count).images
    print(f"offsets on {len(images)} scaled test digits, in pixels of the layer's input")
    for name in CONVOLUTION_NAMES:
        offset = np.abs(offsets_of(model, name, images).astype(np.float64))
        print(f"  {name}: mean |offset| {offset.mean():.3f}, largest {offset.max():.2f}")


if __name__ == "__main__":
    run(main)
