"""A training loop with few pauses for a GPU, where images stay, are scaled, and are learned from.

It trains on what `utils.tuning.draw_epoch` draws, with the loss and the optimizer of
`utils.training`. A whole epoch is one call of TensorFlow.
"""

from collections.abc import Callable
from typing import NamedTuple

from utils.quiet_tensorflow import keras, tf

import numpy as np

from experiments.arms import Recipe
from utils.mnist import IMAGE_SIZE, Digits, Scaling
from utils.training import EVALUATION_BATCH, losses_of, make_optimizer
from utils.tuning import draw_epoch, share_in_epoch

# OpenCV rounds the places that it samples at to such parts of a pixel.
_PARTS = 32

# What XLA can compile. TensorFlow's Adam is many small operations for each variable.
NOTHING, OPTIMIZER, STEP = JIT_CHOICES = ("nothing", "optimizer", "step")


class DeviceDigits(NamedTuple):
    """Digits on the device: images `[N, 28, 28, 1]` float32, of whole numbers, and labels `[N]`."""

    images: tf.Tensor
    labels: tf.Tensor

    @classmethod
    def of(cls, digits: Digits) -> "DeviceDigits":
        # TensorFlow keeps integers of 32 bits, and indices, in the host's memory.
        return cls(
            tf.constant(digits.images.astype(np.float32)),
            tf.constant(digits.labels.astype(np.int64)),
        )


def scaled(images: tf.Tensor, zooms: tf.Tensor, shifts: tf.Tensor) -> tf.Tensor:
    """As `utils.mnist.apply_scaling`, on the device.

    Args:
      images: `[N, 28, 28, 1]` float32, whole numbers.
      zooms, shifts: `[N, 2]` float32, along (y, x).

    Returns:
      `[N, 28, 28, 1]` uint8. A few pixels in a thousand differ from those of `apply_scaling` by
      more than 1, where OpenCV rounds the place of a sample to the other side.
    """
    for axis in (1, 2):
        images = _scaled_along(axis, images, zooms[:, axis - 1], shifts[:, axis - 1])
    return tf.cast(tf.round(images), tf.uint8)


def _scaled_along(axis: int, images, zooms, shifts):
    centre = (IMAGE_SIZE - 1) / 2
    pixels = tf.range(IMAGE_SIZE, dtype=tf.float32)
    places = zooms[:, tf.newaxis] * (pixels - centre - shifts[:, tf.newaxis]) + centre
    places = tf.floor(places * _PARTS + 0.5) / _PARTS
    below = tf.floor(places)
    weights = tf.reshape(places - below, [-1, *(IMAGE_SIZE if a == axis else 1 for a in (1, 2, 3))])

    def pixels_at(indices):
        indices = tf.cast(tf.clip_by_value(indices, 0, IMAGE_SIZE - 1), tf.int64)
        return tf.gather(images, indices, axis=axis, batch_dims=1)

    return (1 - weights) * pixels_at(below) + weights * pixels_at(below + 1)


def train(
    model: keras.Model,
    digits: DeviceDigits,
    recipe: Recipe,
    *,
    epochs: int,
    batch_size: int,
    shift: float,
    seed: int,
    teacher_logits: tf.Tensor | None = None,
    jit_compile: str = NOTHING,
    after_epoch: Callable[[dict], None] = lambda _: None,
) -> None:
    """Trains what is trainable in `model` with Adam and a cosine decay.

    Args:
      model: built, on the device.
      digits: the training digits, unscaled.
      recipe: the rest of how to train.
      epochs: how many; `recipe.times_epochs` is not looked at.
      batch_size: digits in a step. What is left of an epoch is left out.
      shift: the largest shift of a scaled digit, in pixels.
      seed: what is drawn depends on it, and on the epoch.
      teacher_logits: `[N, 10]`, of the regular network for the unscaled digits, for distillation.
      jit_compile: what XLA compiles: NOTHING, the OPTIMIZER's part of a step, or the whole STEP.
      after_epoch: is given each epoch's number, mean loss, and share of right answers in percent.

    Raises:
      FloatingPointError: an epoch's loss is NaN or infinite.
    """
    count = len(digits.labels)
    batch_size = min(batch_size, count)
    steps = count // batch_size
    optimizer = make_optimizer(recipe.learning_rate, epochs * steps, "float32", recipe.average)
    optimizer.build(model.trainable_variables)
    train_epoch = _epoch_function(model, optimizer, digits, teacher_logits, recipe, jit_compile)
    for epoch in range(epochs):
        share = share_in_epoch(*recipe.unscaled_share, epoch, epochs)
        order, scaling = draw_epoch(np.random.default_rng([seed, epoch]), count, share, shift)
        loss, right = train_epoch(
            *_by_step(steps, batch_size, order.astype(np.int64), scaling)
        ).numpy() / (steps * batch_size)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss of epoch {epoch + 1} is {loss}")
        after_epoch({"epoch": epoch + 1, "loss": float(loss), "accuracy": 100 * float(right)})
    if recipe.average:
        optimizer.finalize_variable_values(model.trainable_variables)


def _by_step(steps: int, batch_size: int, order: np.ndarray, scaling: Scaling) -> list[tf.Tensor]:
    arrays = (order, *(of.astype(np.float32) for of in scaling))
    used = steps * batch_size
    return [
        tf.constant(array[:used].reshape(steps, batch_size, *array.shape[1:])) for array in arrays
    ]


def _epoch_function(model, optimizer, digits, teacher_logits, recipe, jit_compile) -> Callable:
    """A function of an epoch's indices and scalings by step, `[steps, batch, ...]`.

    It returns the sums of losses and of right answers, `[2]`.
    """

    variables = model.trainable_variables

    def apply(gradients):
        optimizer.apply(gradients, variables)

    if jit_compile == OPTIMIZER:
        apply = tf.function(apply, jit_compile=True)

    def step(images, labels, teacher):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            losses = losses_of(labels, logits, teacher, recipe.distillation)
            loss = tf.reduce_mean(losses)
        apply(tape.gradient(loss, variables))
        right = tf.argmax(logits, axis=-1) == labels
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(tf.cast(right, tf.float32))])

    if jit_compile == STEP:
        step = tf.function(step, jit_compile=True)

    @tf.function
    def epoch(order, zooms, shifts):
        sums = tf.zeros(2)
        for index in tf.range(tf.shape(order)[0]):
            chosen = order[index]
            images = scaled(tf.gather(digits.images, chosen), zooms[index], shifts[index])
            teacher = None if teacher_logits is None else tf.gather(teacher_logits, chosen)
            sums += step(images, tf.gather(digits.labels, chosen), teacher)
        return sums

    return epoch


def reestimate_statistics(
    model: keras.Model, digits: DeviceDigits, *, batch_size: int, share: float, shift: float,
    seed: int, steps: int = 50,
) -> None:  # fmt: skip
    """Sets batch normalisation's statistics to their means over some batches of scaled digits.

    Batch normalisation is frozen before, and after.
    """
    count = len(digits.labels)
    batch_size = min(batch_size, count)
    order, scaling = draw_epoch(np.random.default_rng([seed, 0]), count, share, shift)
    steps = min(steps, count // batch_size)
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    batches = _by_step(steps, batch_size, order.astype(np.int64), scaling)
    for index, (chosen, zooms, shifts) in enumerate(zip(*batches, strict=True)):
        for layer in layers:
            layer.trainable = True  # or its statistics would stay
            layer.momentum = index / (index + 1)
        model(scaled(tf.gather(digits.images, chosen), zooms, shifts), training=True)
    for layer in layers:
        layer.trainable = False


class Predictor:
    """A network's logits for digits on the device."""

    def __init__(self, model: keras.Model):
        self._logits = tf.function(
            lambda images, zooms, shifts: model(scaled(images, zooms, shifts), training=False),
            reduce_retracing=True,
        )

    def logits(self, digits: DeviceDigits, zoom: float = 1.0) -> tf.Tensor:
        """Logits `[N, 10]` for digits that are zoomed along both axes."""
        parts = [
            digits.images[start : start + EVALUATION_BATCH]
            for start in range(0, len(digits.labels), EVALUATION_BATCH)
        ]
        return tf.concat(
            [
                self._logits(part, tf.fill([len(part), 2], zoom), tf.zeros([len(part), 2]))
                for part in parts
            ],
            axis=0,
        )

    def accuracy(self, digits: DeviceDigits, zoom: float = 1.0) -> float:
        """The share of right answers, in percent."""
        right = tf.argmax(self.logits(digits, zoom), axis=-1) == digits.labels
        return 100 * float(tf.reduce_mean(tf.cast(right, tf.float64)))
