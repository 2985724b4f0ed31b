"""Training by epochs that survives an interruption, and evaluation, for both training scripts."""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from utils.cli import UserError, number

import keras
import numpy as np
import tensorflow as tf

from utils.mnist import EASY_SHIFT, HARD_SHIFT, MNIST_FILE, Digits, scaled_test_digits
from utils.model import CHECKPOINTS, save_weights, weights_file

EVALUATION_BATCH = 500


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both training scripts have."""
    add = parser.add_argument
    add("--epochs", type=number(int, at_least=1), default=10, help="default: %(default)s")
    add("--batch-size", type=number(int, at_least=1), default=64, help="default: %(default)s")
    add(
        "--learning-rate",
        type=number(float, above=0),
        default=1e-3,
        help="Adam's first learning rate; it falls to 0 along a cosine (default: %(default)s)",
    )
    add(
        "--seed",
        type=number(int, at_least=0, at_most=2**32 - 1),
        default=1,
        help="default: %(default)s",
    )
    add("--train-digits", type=number(int, at_least=1), help="train on the first N digits only")
    add("--restart", action="store_true", help="do not resume an interrupted training")
    add_evaluation_arguments(parser)


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of everything that reads MNIST and the checkpoints."""
    add = parser.add_argument
    add(
        "--shift",
        type=number(float, at_least=0),
        default=EASY_SHIFT,
        help=f"largest shift of a scaled digit, in pixels (default: %(default)s; "
        f"{HARD_SHIFT:g} is the harder variant)",
    )
    add("--test-digits", type=number(int, at_least=1), help="test on the first N digits only")
    add("--data", type=Path, default=MNIST_FILE, help="MNIST, by default data/mnist.npz")
    add("--checkpoint-dir", type=Path, default=CHECKPOINTS, help="by default checkpoint/")


def train(
    model: keras.Model,
    epoch_digits: Callable[[np.random.Generator], Digits],
    arguments: argparse.Namespace,
) -> None:
    """Trains `model` with Adam and a cosine decay, then writes its weights file.

    After every epoch the whole state is saved in `<checkpoint-dir>/<model name>.training/`; a later
    call with the same settings goes on from there. The folder is removed at the end.

    Args:
      model: an unfitted model, named as its weights file shall be.
      epoch_digits: yields the digits of one epoch, in the order in which they are to be used. The
        generator depends on the seed and the epoch alone, so a resumed epoch sees the same digits.
      arguments: the options of `add_training_arguments`.
    """
    digits_per_epoch = len(epoch_digits(np.random.default_rng(0)).labels)
    steps_per_epoch = -(-digits_per_epoch // arguments.batch_size)
    optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(
            arguments.learning_rate, decay_steps=arguments.epochs * steps_per_epoch
        )
    )
    compile_model(model, optimizer)
    optimizer.build(model.trainable_variables)
    state = _TrainingState(model, arguments)
    for epoch in range(state.first_epoch(), arguments.epochs):
        digits = epoch_digits(np.random.default_rng([arguments.seed, epoch]))
        model.fit(
            digits.images,
            digits.labels,
            batch_size=arguments.batch_size,
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
        )
        state.save(epoch + 1)
    path = weights_file(model.name, arguments.checkpoint_dir)
    save_weights(model, path)
    state.remove()
    print(f"saved {path}")


def compile_model(model: keras.Model, optimizer: keras.Optimizer | str = "adam") -> None:
    """Gives `model` the loss and the metric of the experiment."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)


def accuracy(model: keras.Model, digits: Digits) -> float:
    """The share of `digits` that `model` names rightly, in percent."""
    logits = model.predict(digits.images, batch_size=EVALUATION_BATCH, verbose=0)
    return 100 * float(np.mean(np.argmax(logits, axis=-1) == digits.labels))


def _digest(model: keras.Model) -> str:
    """A short fingerprint of a model's weights."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(weight.tobytes())
    return digest.hexdigest()[:16]


def print_accuracies(
    models: dict[str, keras.Model],
    test_digits: Digits,
    arguments: argparse.Namespace,
    claims: dict[str, dict[str, float]] | None = None,
) -> None:
    """Prints the accuracy of each model, by its heading, on regular and on scaled digits.

    Args:
      models: the models by the heading of their column.
      test_digits: the whole test set.
      arguments: the options of `add_evaluation_arguments`.
      claims: figures of others by test set and heading, put in brackets.
    """
    test_sets = {
        "regular MNIST": test_digits,
        "scaled MNIST": scaled_test_digits(test_digits, arguments.shift),
    }
    tested = len(test_digits.take(arguments.test_digits).labels)
    print(f"test accuracy in percent on {tested} digits")
    print(" " * 14, *(f"{heading:>18}" for heading in models))
    for set_name, digits in test_sets.items():
        cells = []
        for heading, model in models.items():
            claim = (claims or {}).get(set_name, {}).get(heading)
            percent = accuracy(model, digits.take(arguments.test_digits))
            cells.append(f"{percent:.2f}" + (f" ({claim:.2f})" if claim else ""))
        print(f"{set_name:14}", *(f"{cell:>18}" for cell in cells))


class _TrainingState:
    """Model, optimizer and epoch of a run that is under way, in a folder of its own.

    `tf.train.CheckpointManager` writes each state under a new name and only then points to it, so
    a crash while saving leaves the one before.
    """

    def __init__(self, model: keras.Model, arguments: argparse.Namespace):
        self._folder = Path(arguments.checkpoint_dir) / f"{model.name}.training"
        self._epoch = tf.Variable(0, dtype=tf.int64)
        # A schedule, data set or initial model other than the one begun would give a model of
        # neither.
        settings = {
            key: value
            for key, value in sorted(vars(arguments).items())
            if key not in ("restart", "test_digits", "checkpoint_dir")
        }
        settings["initial weights"] = _digest(model)
        self._settings_text = json.dumps(settings, default=str)
        self._settings = tf.Variable(self._settings_text, dtype=tf.string)
        self._checkpoint = tf.train.Checkpoint(
            model=model, optimizer=model.optimizer, epoch=self._epoch, settings=self._settings
        )
        if arguments.restart:
            self.remove()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self._folder}: {error}") from error
        self._manager = tf.train.CheckpointManager(self._checkpoint, self._folder, max_to_keep=1)

    def first_epoch(self) -> int:
        """Restores the interrupted training, if any, and returns the epoch to begin with."""
        latest = self._manager.latest_checkpoint
        if latest is None:
            return 0
        try:
            reader = tf.train.load_checkpoint(latest)
            begun = reader.get_tensor("settings/.ATTRIBUTES/VARIABLE_VALUE").decode()
        except (tf.errors.OpError, ValueError) as error:
            raise UserError(f"{latest} cannot be read ({error}); --restart starts over") from error
        if begun != self._settings_text:
            raise UserError(
                f"{self._folder} holds a training begun with other settings, {begun}; "
                f"this one has {self._settings_text}. Use those, or --restart to start over"
            )
        self._checkpoint.restore(latest).assert_consumed()
        epoch = int(self._epoch.numpy())
        print(f"resuming after epoch {epoch}")
        return epoch

    def save(self, epoch: int) -> None:
        self._epoch.assign(epoch)
        self._manager.save(checkpoint_number=epoch)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
