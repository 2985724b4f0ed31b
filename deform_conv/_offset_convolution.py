"""The convolutions that compute the offsets and masks of a `DeformableConv2D`."""

import keras
import tensorflow as tf


class OffsetConvolution(keras.layers.Conv2D):
    """A `Conv2D` that is part of a layer, and "channels_last".

    Keras never rounds its kernel and bias to the 16 bits of the layer around it.
    """

    def add_weight(self, *args, **kwargs):
        return super().add_weight(*args, autocast=False, **kwargs)

    def __call__(self, *args, **kwargs):
        # A model that is loaded or cloned would have one without the layer around it.
        if any(isinstance(x, keras.KerasTensor) for x in keras.tree.flatten((args, kwargs))):
            raise ValueError(self._is_a_part("called in a functional model"))
        return super().__call__(*args, **kwargs)

    def get_config(self):
        raise ValueError(self._is_a_part("saved or copied"))

    def _is_a_part(self, done: str) -> str:
        return (
            f"{self.name} cannot be {done} without the DeformableConv2D that it is part of: use "
            "that layer, and its methods offset() and mask()"
        )

    def convolution_op(self, inputs, kernel):
        """Convolves, also where the input or the output is empty.

        On a CPU, TensorFlow (oneDNN) gives the convolution of an empty input the shape of that
        input, and has no gradient for an empty output. So the input is extended until there is an
        output, and what is too much of that is cut off. Where nothing is empty, this costs nothing:
        TensorFlow neither pads by 0 nor slices the whole.
        """
        extents = [
            (taps - 1) * dilation + 1
            for taps, dilation in zip(self.kernel_size, self.dilation_rate, strict=True)
        ]
        valid = self.padding == "valid"
        least = [1, *extents] if valid else [1, 1, 1]
        static = inputs.shape[:3]
        if all(size is not None and size >= low for size, low in zip(static, least, strict=True)):
            return super().convolution_op(inputs, kernel)

        dynamic = tf.shape(inputs)
        sizes = [dynamic[axis] if size is None else size for axis, size in enumerate(static)]
        missing = [_at_least(0, low - size) for size, low in zip(sizes, least, strict=True)]
        # With a value to pad with, since oneDNN would make one operation of padding by zeros and
        # the convolution, in which nothing is extended.
        zero = tf.zeros([], inputs.dtype)
        extended = tf.pad(inputs, [*([0, more] for more in missing), [0, 0]], constant_values=zero)
        extended.set_shape([None, None, None, inputs.shape[3]])
        outputs = super().convolution_op(extended, kernel)

        # The sizes that deform_conv2d expects, or 0 where it has an error for the images' size.
        out_sizes = [sizes[0]]
        for size, extent, stride in zip(sizes[1:], extents, self.strides, strict=True):
            out_sizes.append(_at_least(0, (size - (extent if valid else 1)) // stride + 1))
        outputs = tf.slice(outputs, [0, 0, 0, 0], [*out_sizes, -1])
        known = [size if isinstance(size, int) else None for size in out_sizes]
        outputs.set_shape([*known, kernel.shape[-1]])
        return outputs


def _at_least(low: int, size):
    return max(low, size) if isinstance(size, int) else tf.maximum(low, size)
