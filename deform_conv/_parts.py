"""Layers that are parts of other layers, and cannot stand alone."""

import keras
import tensorflow as tf


class Part:
    """What makes a layer of Keras a part of another: it stands before Keras's class.

    Keras never rounds its weights to the 16 bits of the layer around it.
    """

    owner = None  # the class of the layer that it is part of, for messages

    def add_weight(self, *args, **kwargs):
        return super().add_weight(*args, **(kwargs | {"autocast": False}))

    def __call__(self, *args, **kwargs):
        # A model that is loaded or cloned would have one without the layer around it.
        if any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten((args, kwargs))):
            raise ValueError(self._is_a_part("called in a functional model"))
        return super().__call__(*args, **kwargs)

    def get_config(self):
        raise ValueError(self._is_a_part("saved or copied"))

    def _is_a_part(self, done: str) -> str:
        return (
            f"{self.name} cannot be {done} without the {self.owner} that it is part of: use that "
            "layer, and its methods offset() and mask()"
        )


class Projection(Part, keras.layers.Layer):
    """A linear map of the channels, which come last: `inputs @ kernel + bias`.

    Args:
      units: the number of channels that come out; None for as many as go in.
      use_bias: whether there is a bias, which starts at zero.
      kernel_initializer: initializer of the kernel, [C, units].
    """

    def __init__(self, units=None, use_bias=True, kernel_initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel = self.bias = None

    def build(self, input_shape):
        channels = input_shape[-1]
        self.units = channels if self.units is None else self.units
        self.kernel = self.add_weight(
            name="kernel", shape=(channels, self.units), initializer=self.kernel_initializer
        )
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.units,), initializer="zeros")
        self.built = True

    def call(self, inputs):
        return linear(inputs, self.kernel, self.bias)


class Normalization(Part, keras.layers.LayerNormalization):
    """A layer normalization of the channels, which come last."""


def linear(inputs, kernel, bias=None):
    """`inputs @ kernel + bias` of the last axis, in the dtype of `inputs`."""
    outputs = tf.tensordot(inputs, tf.cast(kernel, inputs.dtype), 1)
    return outputs if bias is None else tf.nn.bias_add(outputs, tf.cast(bias, inputs.dtype))
