#!/usr/bin/env python3
"""Trains the regular CNN on unscaled MNIST and tests it on regular and scaled digits.

Writes checkpoint/regular_model.weights.h5, from which tune_deform_conv.py starts. An interrupted
training goes on after its last whole epoch when it is started again with the same options.
"""

import argparse

from utils.quiet_tensorflow import keras, tf

import numpy as np

from utils.cli import run
from utils.mnist import Digits, load_mnist
from utils.model import REGULAR, build_model, load_model
from utils.strategy import is_chief, open_strategy
from utils.training import Lesson, add_training_arguments, print_accuracies, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    arguments = parser.parse_args()
    with open_strategy(arguments) as strategy:
        train_and_test(arguments, strategy)


def train_and_test(arguments: argparse.Namespace, strategy: tf.distribute.Strategy) -> None:
    train_digits, test_digits = load_mnist(arguments.data)
    train_digits = train_digits.take(arguments.train_digits)

    def lesson_of(rng: np.random.Generator, _: int) -> Lesson:
        order = rng.permutation(len(train_digits.labels))
        return Lesson(Digits(train_digits.images[order], train_digits.labels[order]))

    keras.utils.set_random_seed(arguments.seed)
    with strategy.scope():
        model = build_model(REGULAR, arguments.dtype_policy)
    train(model, lesson_of, arguments, strategy)

    if is_chief(strategy):
        trained = load_model(REGULAR, folder=arguments.checkpoint_dir)
        print_accuracies({"regular CNN": trained}, test_digits, arguments)


if __name__ == "__main__":
    run(main)
