"""The convolutions that compute the offsets and masks of a deformable layer."""

import contextvars

import keras
import tensorflow as tf

from ._arguments import LETTERS, MAX_EXTENT
from ._extended_convolution import ExtendedConv1D, ExtendedConv2D, ExtendedConvolution
from ._reference import sizes

# False while `deform_conv.onnx` traces a model: what empty inputs take is for TensorFlow alone, and
# would be most of the nodes of a file.
takes_empty = contextvars.ContextVar("takes_empty", default=True)


class OffsetConvolution(ExtendedConvolution):
    """A convolution that is part of a layer, and "channels_last".

    Keras never rounds its kernel and bias to the 16 bits of the layer around it.
    """

    keeps_weights = False  # when a file is loaded, which has none for it

    def load_own_variables(self, store):
        if not self.keeps_weights:
            super().load_own_variables(store)

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
            f"{self.name} cannot be {done} without the DeformableConv{self.rank}D that it is part "
            "of: use that layer, and its methods offset() and mask()"
        )

    def convolution_op(self, inputs, kernel):
        """Convolves, also where the input or the output is empty.

        On a CPU, TensorFlow (oneDNN) gives the convolution of an empty input the shape of that
        input, and has no gradient for an empty output. So the input is extended until there is an
        output, and what is too much of that is cut off. Where nothing is empty, this costs nothing:
        TensorFlow neither pads by 0 nor slices the whole.
        """
        strides = [1, *self.strides]  # of the batch and each axis
        spans = [1, *(min(span, MAX_EXTENT) for span in self._spans)]
        extents = [max(span, 1) for span in spans]
        static = inputs.shape[:-1]
        filled = all(
            s is not None and s >= extent for s, extent in zip(static, extents, strict=True)
        )
        if filled or not takes_empty.get():
            return self._convolve(inputs, kernel)

        names = f"N{LETTERS[self.rank]}"
        for name, size, extent, stride in zip(names, static, extents, strides, strict=True):
            if size is not None and extent - size > stride:
                padded = "" if isinstance(self.padding, str) else " less the padding"
                raise ValueError(
                    f"inputs must have {name} of at least {extent - stride} for the dilated "
                    f"kernel's {extent}{padded}. Received: {size}"
                )
        given = sizes(inputs)[:-1]
        axes = list(zip(given, extents, strides, strict=True))
        lacks = [_lack(*axis) for axis in axes]
        extended = _pad(inputs, [*([0, lack] for lack in lacks), [0, 0]])
        # Known sizes as LiteRT's converter knows them too, unlike those of set_shape.
        extended_sizes = [size + lack for size, lack in zip(given, lacks, strict=True)]
        extended = tf.reshape(extended, [*extended_sizes, inputs.shape[-1]])
        outputs = self._convolve(extended, kernel)
        out_sizes = [
            (size - span) // stride + 1
            for size, span, stride in zip(given, spans, strides, strict=True)
        ]
        outputs = tf.slice(outputs, [0] * (self.rank + 2), [*out_sizes, -1])
        known = [size if isinstance(size, int) else None for size in out_sizes]
        outputs.set_shape([*known, kernel.shape[-1]])
        return outputs

    def _convolve(self, inputs, kernel):
        padding = self.tensorflow_padding
        # tf.nn.conv2d takes numbers too, but has no gradient on a CPU where it is dilated, and
        # _pad() says what else.
        if not isinstance(padding, str):
            inputs, padding = _pad(inputs, padding), "VALID"
        dilations = self.dilation_rate
        if max(self.strides) == 1 or max(dilations) == 1:
            return tf.nn.convolution(inputs, kernel, self.strides, padding, dilations=dilations)
        # TensorFlow refuses both, so what the strides skip is computed too, and left out.
        outputs = tf.nn.convolution(inputs, kernel, 1, padding, dilations=dilations)
        first = [0] * self.rank
        if padding == "SAME":
            axes = zip(sizes(inputs)[1:-1], self.strides, self._extents, strict=True)
            first = [_first_of_same(*axis) for axis in axes]
        axes = zip(first, self.strides, strict=True)
        return outputs[(slice(None), *(slice(start, None, stride) for start, stride in axes))]


class OffsetConv1D(OffsetConvolution, ExtendedConv1D):
    def call(self, inputs):
        # Past Conv1D's own, which does not convolve by convolution_op().
        return super(keras.layers.Conv1D, self).call(inputs)


class OffsetConv2D(OffsetConvolution, ExtendedConv2D):
    pass


def _pad(inputs, paddings):
    """Pads by a value, which is 0.

    oneDNN would make one operation of padding by zeros and the convolution, which extends nothing
    that is empty, and ends the process where the padding is very large.
    """
    return tf.pad(inputs, paddings, constant_values=tf.zeros([], inputs.dtype))


def _first_of_same(size, stride: int, extent: int):
    """Which output of stride 1 is the first of `stride`, along an axis that "same" pads.

    It pads less at a larger stride, so that this one's taps start further into the image.
    """
    # No division of negative numbers, which rounds to 0 in ONNX.
    padding = (size - 1) // stride * stride + extent - size
    padding = max(padding, 0) if isinstance(size, int) else tf.maximum(padding, 0)
    return (extent - 1) // 2 - padding // 2


def _lack(size, extent: int, stride: int):
    """How many pixels or images are missing for an output along an axis.

    0 also if more than a stride is missing, for which TensorFlow has an error.
    """
    lack = extent - size
    if isinstance(size, int):
        return lack if 0 < lack <= stride else 0
    return tf.where((lack > 0) & (lack <= stride), lack, 0)
