"""The convolutions that compute the offsets and masks of a deformable layer."""

import contextvars
import math

import keras
import tensorflow as tf

from ._arguments import LETTERS, MAX_EXTENT
from ._extended_convolution import (
    ExtendedConv1D,
    ExtendedConv2D,
    ExtendedConvolution,
    first_of_same,
)
from ._parts import Part
from ._reference import sizes

# False while `deform_conv.onnx` traces a model: what empty inputs take is for TensorFlow alone, and
# would be most of the nodes of a file.
takes_empty = contextvars.ContextVar("takes_empty", default=True)


class OffsetConvolution(Part, ExtendedConvolution):
    """A convolution that is part of a layer, and "channels_last"."""

    keeps_weights = False  # when a file is loaded, which has none for it

    def load_own_variables(self, store):
        if not self.keeps_weights:
            super().load_own_variables(store)

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
        strides, dilations = self.strides, self.dilation_rate
        first = [0] * self.rank
        if max(self.kernel_size) == 1:
            # What the strides skip is left out first. With a stride along one axis only, oneDNN
            # writes beyond its memory in the gradient of a 1x1 kernel, with AVX-512.
            inputs = _every(strides, inputs, first)
            strides = dilations = (1,) * self.rank
        if max(strides) == 1 or max(dilations) == 1:
            return tf.nn.convolution(inputs, kernel, strides, padding, dilations=dilations)
        # TensorFlow refuses both, so what the strides skip is computed too, and left out.
        outputs = tf.nn.convolution(inputs, kernel, 1, padding, dilations=dilations)
        if padding == "SAME":
            axes = zip(sizes(inputs)[1:-1], strides, self._extents, strict=True)
            first = [first_of_same(*axis) for axis in axes]
        return _every(strides, outputs, first)


class OffsetConv1D(OffsetConvolution, ExtendedConv1D):
    owner = "DeformableConv1D"

    def call(self, inputs):
        # Past Conv1D's own, which does not convolve by convolution_op().
        return super(keras.layers.Conv1D, self).call(inputs)


class OffsetConv2D(OffsetConvolution, ExtendedConv2D):
    owner = "DeformableConv2D"


class DepthwiseConvolution(OffsetConv2D):
    """A convolution of each channel by itself, at every pixel, that is part of a layer.

    The kernel is [KH, KW, 1, C]. It and the bias start as those of a convolution in PyTorch do.
    """

    def __init__(self, kernel_size, **kwargs):
        limit = 1 / math.sqrt(math.prod(kernel_size))
        super().__init__(
            1,  # until build() knows the channels
            kernel_size,
            padding="same",
            dilation_rate=(1, 1),
            data_format="channels_last",
            kernel_initializer=keras.initializers.RandomUniform(-limit, limit),
            bias_initializer=keras.initializers.RandomUniform(-limit, limit),
            **kwargs,
        )

    def build(self, input_shape):
        self.filters = self.groups = input_shape[-1]
        super().build(input_shape)

    def _convolve(self, inputs, kernel):
        # TensorFlow has no gradient of a grouped convolution on a CPU.
        kernel = tf.reshape(kernel, [*self.kernel_size, self.filters, 1])
        return tf.nn.depthwise_conv2d(inputs, kernel, [1] * 4, "SAME")


def _pad(inputs, paddings):
    """Pads by a value, which is 0.

    oneDNN would make one operation of padding by zeros and the convolution, which extends nothing
    that is empty, and ends the process where the padding is very large.
    """
    return tf.pad(inputs, paddings, constant_values=tf.zeros([], inputs.dtype))


def _every(strides, tensor, first):
    """What lies a stride apart along each axis, from `first` on."""
    if max(strides) == 1:
        return tensor
    axes = zip(first, strides, strict=True)
    return tensor[(slice(None), *(slice(start, None, stride) for start, stride in axes))]


def _lack(size, extent: int, stride: int):
    """How many pixels or images are missing for an output along an axis.

    0 also if more than a stride is missing, for which TensorFlow has an error.
    """
    lack = extent - size
    if isinstance(size, int):
        return lack if 0 < lack <= stride else 0
    return tf.where((lack > 0) & (lack <= stride), lack, 0)
