"""How far the deformable layers of a network move their samples."""

from utils.quiet_tensorflow import keras, tf

import numpy as np

from deform_conv import sampling_locations
from utils.model import CONVOLUTION_NAMES

BATCH = 100


class OffsetStatistics:
    """Measures the offsets of a network's deformable layers."""

    def __init__(self, model: keras.Model):
        layers = [model.get_layer(name) for name in CONVOLUTION_NAMES]
        self._layers = [layer for layer in layers if hasattr(layer, "offset")]
        if self._layers:
            offsets = [layer.offset(layer.input) for layer in self._layers]
            self._offsets = keras.Model(model.inputs, offsets)
            self._measured = tf.function(self._measure, reduce_retracing=True)

    def __call__(self, images: np.ndarray) -> dict[str, dict[str, float]]:
        """Of each layer, by its name, over all images `[N, 28, 28, 1]` uint8.

        Returns:
          `mean`: the mean size of dy and dx, in pixels of the layer's input. `largest`: the
          largest. `outside`: the share of samples that are outside of the image, in percent; with
          offsets of zero, those are the padding's.
        """
        if not self._layers:
            return {}
        parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        weights = [len(part) / len(images) for part in parts]
        measured = np.stack([self._measured(part).numpy() for part in parts])  # [part, layer, 3]
        means, largest = np.einsum("p,pls->ls", weights, measured), measured.max(axis=0)
        return {
            layer.name: {
                "mean": float(means[index, 0]),
                "largest": float(largest[index, 1]),
                "outside": 100 * float(means[index, 2]),
            }
            for index, layer in enumerate(self._layers)
        }

    def padding(self) -> dict[str, float]:
        """The share of samples that would be outside with offsets of zero, in percent."""
        return {layer.name: 100 * float(np.mean(_outside(*_grid(layer)))) for layer in self._layers}

    def _measure(self, images) -> tf.Tensor:
        """Mean, largest, and share outside, `[layers, 3]`."""
        offsets = self._offsets(images)
        offsets = offsets if isinstance(offsets, list) else [offsets]
        return tf.stack(
            [_measures(layer, offset) for layer, offset in zip(self._layers, offsets, strict=True)]
        )


def _measures(layer: keras.layers.Layer, offset: tf.Tensor) -> tf.Tensor:
    positions, size = _grid(layer)  # [OH * OW, taps, 2]
    offset = tf.reshape(offset, [-1, positions.shape[0], layer.deform_groups, *positions.shape[1:]])
    outside = _outside(positions[:, np.newaxis] + offset, size)
    distances = tf.abs(offset)
    share = tf.reduce_mean(tf.cast(outside, tf.float32))
    return tf.stack([tf.reduce_mean(distances), tf.reduce_max(distances), share])


def _grid(layer: keras.layers.Layer) -> tuple[np.ndarray, int]:
    """Where a layer samples without offsets, `[OH * OW, taps, 2]`, and the size of its input."""
    size, kernel_size, stride = layer.input.shape[1], layer.kernel_size[0], layer.strides[0]
    out_size, taps = -(-size // stride), kernel_size**2
    none = np.zeros((out_size, out_size, 2 * taps), np.float32)
    positions = sampling_locations(none, size, kernel_size, stride)
    return positions.reshape(-1, taps, 2).astype(np.float32), size


def _outside(positions, size: int):
    """Which positions `[..., 2]` are in none of the image's pixels, which are squares."""
    outside = (positions < -0.5) | (positions > size - 0.5)
    return outside[..., 0] | outside[..., 1]
