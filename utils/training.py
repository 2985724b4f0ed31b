"""Training by epochs that survives an interruption, and evaluation, for both training scripts."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from utils.quiet_tensorflow import keras, tf

import numpy as np

from utils.cli import UserError, number
from utils.files import check_writable, refuse_overwriting
from utils.loss_scale import LossScaleOptimizer
from utils.mnist import (
    EASY_SHIFT,
    HARD_SHIFT,
    IMAGE_SIZE,
    MNIST_FILE,
    Digits,
    scaled_test_digits,
)
from utils.model import CHECKPOINTS, not_finite, save_weights, weights_file
from utils.strategy import add_strategy_arguments, is_chief
from utils.training_state import TrainingState, check_history, state_folder, write_history

EVALUATION_BATCH = 500

# What a teacher's and a student's logits are divided by before they are compared.
TEMPERATURE = 2.0

# A training is at least so many times as long as what its weights are averaged over.
LEAST_AVERAGES = 5


class Lesson(NamedTuple):
    """What an epoch trains on, in the order in which it is to be used.

    `teacher_logits` `[N, 10]` float32 are needed for distillation only.
    """

    digits: Digits
    teacher_logits: np.ndarray | None = None

    def part(self, part: slice) -> list[tf.Tensor]:
        """Some of it, as the training step takes it."""
        images, labels = self.digits.images[part], self.digits.labels[part].astype(np.int32)
        teacher_logits = [] if self.teacher_logits is None else [self.teacher_logits[part]]
        return [tf.constant(array) for array in (images, labels, *teacher_logits)]


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both training scripts have."""
    add = parser.add_argument
    add("--epochs", type=number(int, at_least=1), default=10, help="default: %(default)s")
    add("--batch-size", type=number(int, at_least=1), default=64, help="default: %(default)s")
    add(
        "--learning-rate",
        type=number(float, above=0, at_most=float(np.finfo(np.float32).max)),
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
    add("--history", type=Path, help="write each epoch's loss and accuracy to FILE as JSON lines")
    add(
        "--dtype-policy",
        choices=("float32", "mixed_float16", "mixed_bfloat16"),
        default="float32",
        help="a mixed one computes in 16 bits; weights, offsets and logits stay float32 "
        "(default: %(default)s)",
    )
    add_strategy_arguments(parser)
    add_evaluation_arguments(parser)


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of everything that reads MNIST and the checkpoints."""
    add = parser.add_argument
    add(
        "--shift",
        type=number(float, at_least=0, at_most=IMAGE_SIZE),
        default=EASY_SHIFT,
        help=f"largest shift of a scaled digit, in pixels (default: %(default)s; "
        f"{HARD_SHIFT:g} is the harder variant)",
    )
    add("--test-digits", type=number(int, at_least=1), help="test on the first N digits only")
    add("--data", type=Path, default=MNIST_FILE, help="MNIST, by default data/mnist.npz")
    add("--checkpoint-dir", type=Path, default=CHECKPOINTS, help="by default checkpoint/")


def train(
    model: keras.Model,
    lesson_of: Callable[[np.random.Generator, int], Lesson],
    arguments: argparse.Namespace,
    strategy: tf.distribute.Strategy,
    *,
    distillation: float = 0.0,
    average: float = 0.0,
) -> None:
    """Trains `model` with Adam and a cosine decay, then writes its weights file.

    After every epoch the whole state is saved in `<checkpoint-dir>/<model name>.training/`; a later
    call with the same settings goes on from there, on any number of replicas. The folder is removed
    at the end. Of several workers, the chief alone writes files and prints. What cannot be written
    is found out before the first epoch.

    Args:
      model: an unfitted model, named as its weights file shall be, built in the strategy's scope.
      lesson_of: yields what an epoch trains on, of a generator and the epoch's index. The
        generator depends on the seed and the epoch alone, so a resumed epoch sees the same digits,
        and so does every worker. All epochs have as many digits.
      arguments: the options of `add_training_arguments`.
      strategy: what `open_strategy` yields for them.
      distillation: as `losses_of` takes it.
      average: as `make_optimizer` takes it. The weights that are written are the averages.
    """
    digits_per_epoch = len(lesson_of(np.random.default_rng(0), 0).digits.labels)
    steps_per_epoch = -(-digits_per_epoch // arguments.batch_size)
    last_batch = digits_per_epoch - (steps_per_epoch - 1) * arguments.batch_size
    # TensorFlow 2.21 gives an empty part of a batch wrong shapes on the CPU, in a convolution
    # fused with its bias.
    if (smallest := min(arguments.batch_size, last_batch)) < strategy.num_replicas_in_sync:
        raise UserError(
            f"--batch-size {arguments.batch_size} makes batches of {smallest} that "
            f"{strategy.num_replicas_in_sync} replicas cannot share"
        )
    with strategy.scope():
        optimizer = make_optimizer(
            arguments.learning_rate,
            arguments.epochs * steps_per_epoch,
            arguments.dtype_policy,
            average,
        )
        optimizer.build(model.trainable_variables)
    step = _training_step(model, optimizer, strategy, distillation)
    state = TrainingState(model, optimizer, arguments, strategy)
    path = weights_file(model.name, arguments.checkpoint_dir)
    history = arguments.history if is_chief(strategy) else None
    if is_chief(strategy):
        kept = {"--data": arguments.data}
        if getattr(arguments, "regular_weights", None):
            kept["--regular-weights"] = arguments.regular_weights
        refuse_overwriting("the weights file", path, kept)
        check_writable(path, model.count_params() * 4)
    if history:
        kept["the weights file"] = path
        kept["the training's state"] = state_folder(model.name, arguments.checkpoint_dir)
        refuse_overwriting("--history", history, kept)
        check_history(history)
    with state.held():
        state.begin()
        # Killed, it may have saved a state and not yet written its history.
        if history and state.epochs_done:
            write_history(history, state.history)
        for epoch in range(state.epochs_done, arguments.epochs):
            if is_chief(strategy):
                print(f"Epoch {epoch + 1}/{arguments.epochs}")
            lesson = lesson_of(np.random.default_rng([arguments.seed, epoch]), epoch)
            loss, right = _train_epoch(step, lesson, arguments.batch_size, strategy)
            if not math.isfinite(loss) or not_finite(model.variables):
                raise UserError(
                    f"epoch {epoch + 1} ended with NaN or infinite numbers, and is not kept. Try "
                    "a smaller --learning-rate, with --restart to start over"
                )
            state.save(loss, right)
            if history:
                write_history(history, state.history)
        if average:
            optimizer.finalize_variable_values(model.trainable_variables)
        if is_chief(strategy):
            save_weights(model, path)
            state.remove()
            print(f"saved {path}")


def make_optimizer(
    learning_rate: float, steps: int, dtype_policy: str, average: float = 0.0
) -> keras.Optimizer:
    """Adam; for float16 with a loss scale, without which small gradients would become zeros.

    Args:
      learning_rate: the first one; it falls to 0 along a cosine.
      steps: how many there will be.
      dtype_policy: what the model computes in.
      average: above 0, it keeps an exponential moving average of what it trains, with that share of
        the old average in each step, but no slower than over a fifth of the steps.
        `finalize_variable_values` takes it over.
    """
    decay = keras.optimizers.schedules.CosineDecay(learning_rate, decay_steps=steps)
    average = min(average, max(0.0, 1 - LEAST_AVERAGES / steps))
    adam = keras.optimizers.Adam(decay, use_ema=average > 0, ema_momentum=average)
    return LossScaleOptimizer(adam) if dtype_policy == "mixed_float16" else adam


def losses_of(labels, logits, teacher_logits=None, distillation: float = 0.0) -> tf.Tensor:
    """The loss of each digit: cross entropy, and in part that with what a teacher says.

    Args:
      labels: `[N]`, integers.
      logits: `[N, 10]`.
      teacher_logits: `[N, 10]`, of another network, for distillation above 0.
      distillation: the share of the teacher's part, from 0 to 1: the cross entropy of both
        networks' distributions, softened by TEMPERATURE and times its square (Hinton et al. 2015,
        Distilling the Knowledge in a Neural Network, arXiv:1503.02531).

    Returns:
      `[N]`.
    """
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    if not distillation:
        return losses
    softened = tf.nn.softmax_cross_entropy_with_logits(
        tf.nn.softmax(teacher_logits / TEMPERATURE), logits / TEMPERATURE
    )
    return (1 - distillation) * losses + distillation * TEMPERATURE**2 * softened


def _training_step(
    model: keras.Model,
    optimizer: keras.Optimizer,
    strategy: tf.distribute.Strategy,
    distillation: float,
) -> Callable:
    """A function that trains on one batch; returns its [summed loss, number of right answers].

    Instead of Keras's `fit`, which in 3.15 does not run on several workers, and averages replicas'
    losses as if each had as many digits as the others.
    """

    def replica_step(lesson, batch_size):
        images, labels, *teacher_logits = lesson
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = losses_of(labels, logits, *teacher_logits, distillation=distillation)
            # The optimizer adds up the replicas' gradients: the whole batch is what to divide by.
            loss = optimizer.scale_loss(tf.reduce_sum(losses) / batch_size)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        right = tf.argmax(logits, axis=-1, output_type=labels.dtype) == labels
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(tf.cast(right, losses.dtype))])

    @tf.function(reduce_retracing=True)
    def step(lesson, batch_size):
        sums = strategy.run(replica_step, (lesson, batch_size))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    return step


def _train_epoch(
    step: Callable, lesson: Lesson, batch_size: int, strategy: tf.distribute.Strategy
) -> tuple[float, float]:
    """Trains on `lesson` batch by batch; returns its mean loss and the share of right answers."""
    count = len(lesson.digits.labels)
    replicas = strategy.num_replicas_in_sync
    progress = keras.utils.Progbar(
        -(-count // batch_size),
        verbose=int(is_chief(strategy)),
        stateful_metrics=["loss", "accuracy"],
    )
    sums = tf.zeros(2, tf.float64)
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)

        def share(context, start=start, stop=stop):
            return lesson.part(slice(start + context.replica_id_in_sync_group, stop, replicas))

        parts = strategy.experimental_distribute_values_from_function(share)
        sums += tf.cast(step(parts, tf.constant(stop - start, tf.float32)), tf.float64)
        loss, accuracy = tf.unstack(sums / stop)
        progress.update(start // batch_size + 1, [("loss", loss), ("accuracy", accuracy)])
    return float(loss), float(accuracy)


def logits_of(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return model.predict(images, batch_size=EVALUATION_BATCH, verbose=0)


def accuracy(model: keras.Model, digits: Digits) -> float:
    """The share of `digits` that `model` names rightly, in percent."""
    logits = logits_of(model, digits.images)
    return 100 * float(np.mean(np.argmax(logits, axis=-1) == digits.labels))


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
