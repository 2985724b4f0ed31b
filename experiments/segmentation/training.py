"""Training and testing of one network."""

import math
from collections.abc import Callable

from utils.quiet_tensorflow import keras, tf

import numpy as np

from experiments.segmentation import network, scenes
from experiments.segmentation.settings import MEASURED, Settings

TEST_BATCH = 50
WARM_UP_SHARE = 0.05  # of the steps, in which the learning rate rises to its full value


def train(
    model: keras.Model, train_scenes: scenes.Scenes, settings: Settings, seed: int
) -> list[float]:
    """Trains with Adam, cosine decay and flips along both axes. Returns mean losses, by epoch.

    The scenes stay on the device, and the steps of an epoch are one call.
    """
    groups = _groups(model, settings)
    # On a GPU, TensorFlow gathers no uint8. Whole numbers up to 256 are exact in bfloat16.
    images, labels = (tf.cast(tf.constant(array), tf.bfloat16) for array in train_scenes)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, settings.batch_size], tf.int64),
            tf.TensorSpec([None, settings.batch_size, 2], tf.bool),
        ]
    )
    def epoch(batches, flips):
        """Trains on the scenes of these numbers, a row for each step. Returns the mean loss."""
        total = 0.0
        for step in tf.range(tf.shape(batches)[0]):
            chosen, flip = batches[step], flips[step]
            total += train_step(
                flipped(tf.gather(images, chosen), flip), flipped(tf.gather(labels, chosen), flip)
            )
        return total / tf.cast(tf.shape(batches)[0], tf.float32)

    def train_step(some_images, some_labels):
        with tf.GradientTape() as tape:
            logits = model(tf.cast(some_images, tf.float32), training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(
                    tf.cast(some_labels, tf.int32), logits
                )
            )
        gradients = tape.gradient(loss, [variables for _, variables in groups])
        for (optimizer, variables), group_gradients in zip(groups, gradients, strict=True):
            optimizer.apply(group_gradients, variables)
        return loss

    losses = []
    count = len(train_scenes.labels)
    per_epoch = max(1, count // settings.batch_size)
    for first in range(0, settings.steps, per_epoch):
        rng = np.random.default_rng([seed, first])
        steps = min(per_epoch, settings.steps - first)
        batches = _batches(rng, count, steps, settings.batch_size)
        losses.append(float(epoch(batches, rng.random((*batches.shape, 2)) < 0.5)))
    return losses


def _batches(rng: np.random.Generator, count: int, steps: int, batch_size: int) -> np.ndarray:
    """Numbers below `count`, `[steps, batch_size]`: one permutation, or several in small sets."""
    needed = steps * batch_size
    orders = [rng.permutation(count) for _ in range(math.ceil(needed / count))]
    return np.concatenate(orders)[:needed].reshape(steps, batch_size)


def flipped(batch: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
    """Turns images or labels `[N, H, W, ...]` over, along the axes that `flip [N, 2]` says."""
    for axis in (1, 2):
        condition = tf.reshape(flip[:, axis - 1], [-1] + [1] * (len(batch.shape) - 1))
        batch = tf.where(condition, tf.reverse(batch, [axis]), batch)
    return batch


def _groups(
    model: keras.Model, settings: Settings
) -> list[tuple[keras.Optimizer, list[keras.Variable]]]:
    """Optimizers with what each trains: offsets and masks have a learning rate of their own."""
    slower = {"offset_conv", "mask_conv"}
    both = [], []
    for variable in model.trainable_variables:
        both[bool(slower & set(variable.path.split("/")))].append(variable)
    groups = []
    for variables, factor in zip(both, (1.0, settings.offset_rate), strict=True):
        warm_up = max(1, round(settings.steps * WARM_UP_SHARE))
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0,
            decay_steps=max(1, settings.steps - warm_up),
            warmup_target=settings.learning_rate * factor,
            warmup_steps=warm_up,
        )
        if variables:
            optimizer = keras.optimizers.Adam(schedule)
            optimizer.build(variables)
            groups.append((optimizer, variables))
    return groups


def predictor(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images to the labels that the model predicts, uint8 `[N, H, W]`."""

    @tf.function(input_signature=[tf.TensorSpec([None, scenes.SIZE, scenes.SIZE, 3])])
    def labels(images):
        return tf.argmax(model(images), axis=-1, output_type=tf.int32)

    def predict(images):
        firsts = range(0, len(images), TEST_BATCH)
        batches = [images[first : first + TEST_BATCH].astype(np.float32) for first in firsts]
        return np.concatenate([labels(batch).numpy().astype(np.uint8) for batch in batches])

    return predict


def offset_meter(model: keras.Model) -> Callable[[np.ndarray], dict[str, float]]:
    """A function from images to the mean length of each deformable layer's offsets.

    The length is in pixels of the layer's input. Only the first `MEASURED` images count.
    """
    layers = network.deformable_layers(model)
    if not layers:
        return lambda images: {}
    probe = keras.Model(model.input, [layer.offset(layer.input) for layer in layers])

    def mean_offsets(images):
        offsets = probe.predict(images[:MEASURED].astype(np.float32), verbose=0)
        return {
            layer.name: float(np.linalg.norm(np.reshape(offset, [-1, 2]), axis=-1).mean())
            for layer, offset in zip(layers, offsets, strict=True)
        }

    return mean_offsets
