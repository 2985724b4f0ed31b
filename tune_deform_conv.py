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
from utils.mnist import Digits, apply_scaling, load_mnist, scaled_test_digits
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
from utils.training import (
    Lesson,
    add_training_arguments,
    logits_of,
    print_accuracies,
    train,
)
from utils.tuning import (
    copy_weights,
    draw_epoch,
    freeze_all_but_offsets,
    frozen_variables,
    share_in_epoch,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    # The recipe of the weights in checkpoint/; experiments/README.md compares it with others.
    parser.set_defaults(epochs=30, batch_size=250, learning_rate=2e-3)
    parser.add_argument("--modulated", action="store_true", help="tune version 2, with masks")
    parser.add_argument(
        "--unscaled-share",
        type=number(float, at_least=0, at_most=1),
        default=0.2,
        help="share of the training digits that stay unscaled, so that the network does not "
        "unlearn regular ones (default: %(default)s)",
    )
    parser.add_argument(
        "--unscaled-share-at-end",
        type=number(float, at_least=0, at_most=1),
        help="the share in the last epoch, to which it goes along a line (default: it stays)",
    )
    parser.add_argument(
        "--distillation",
        type=number(float, at_least=0, at_most=1),
        default=0.9,
        help="share of the loss that asks for what the regular network says to the unscaled digit, "
        "in place of its label (default: %(default)s)",
    )
    parser.add_argument(
        "--average",
        type=number(float, at_least=0, at_most=0.999999),
        default=0.999,
        help="keep an exponential moving average of the weights, with this share of the old one in "
        "each step, but over a fifth of all steps at most; 0 keeps none (default: %(default)s)",
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

    keras.utils.set_random_seed(arguments.seed)
    regular = load_model(REGULAR, arguments.regular_weights, arguments.checkpoint_dir)
    name = DEFORM_MODULATED if arguments.modulated else DEFORM
    with strategy.scope():
        model = build_model(name, arguments.dtype_policy)
        copy_weights(regular, model)
        freeze_all_but_offsets(model)

    teacher_logits = None
    if arguments.distillation:
        teacher_logits = logits_of(regular, train_digits.images)
    first, last = arguments.unscaled_share, arguments.unscaled_share_at_end
    last = first if last is None else last

    def lesson_of(rng: np.random.Generator, epoch: int) -> Lesson:
        share = share_in_epoch(first, last, epoch, arguments.epochs)
        order, scaling = draw_epoch(rng, len(train_digits.labels), share, arguments.shift)
        images = apply_scaling(train_digits.images[order], scaling)
        logits = None if teacher_logits is None else teacher_logits[order]
        return Lesson(Digits(images, train_digits.labels[order]), logits)

    if is_chief(strategy):
        print("training", *(variable.path for variable in model.trainable_variables), sep="\n  ")
    train(
        model,
        lesson_of,
        arguments,
        strategy,
        distillation=arguments.distillation,
        average=arguments.average,
    )

    if is_chief(strategy):
        tuned = load_model(name, folder=arguments.checkpoint_dir)
        check_frozen(regular, tuned)
        report_offsets(tuned, scaled_test_digits(test_digits, arguments.shift))
        models = {"regular CNN": regular, "deformable CNN": tuned}
        print_accuracies(models, test_digits, arguments)


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
