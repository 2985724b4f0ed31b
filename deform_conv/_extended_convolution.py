"""Where a kernel goes, and Keras's convolutions with what they do not take of that."""

import keras
import tensorflow as tf

from ._arguments import AXES
from ._layer_arguments import padding_of_axes


class KernelPlacement:
    """The part of a layer that is about where its kernel goes.

    The layer has `kernel_size`, `strides`, `dilation_rate` and `data_format`. Its `padding` is a
    name, such as "same", or a pair of numbers for each axis: ((top, bottom), (left, right)).
    """

    rank: int  # the number of axes

    @property
    def tensorflow_padding(self) -> str | list[tuple[int, int]]:
        """The padding as `tf.nn.conv2d` and `deform_conv2d` take it."""
        return self.padding_in(self.data_format)

    def padding_in(self, data_format: str) -> str | list[tuple[int, int]]:
        """The same for inputs in another data format than the layer's."""
        if self.padding in ("valid", "same"):
            return self.padding.upper()
        none = (0, 0)
        if data_format == "channels_last":
            return [none, *self._pads, none]
        return [none, none, *self._pads]

    def output_shape(self, input_shape, channels: int | None) -> tuple:
        """The shape of the output of so many channels."""
        channel_axis, first = (-1, 1) if self.data_format == "channels_last" else (1, 2)
        shape = list(input_shape)
        shape[channel_axis] = channels
        for axis, span, stride in zip(range(self.rank), self._spans, self.strides, strict=True):
            size = shape[first + axis]
            if size is not None:
                # Without numbers, as in tf.nn.conv2d, too little by less than a stride gives 0.
                least = span - stride if isinstance(self.padding, str) else span
                if size < least:
                    spans = self._spans if self.rank > 1 else span
                    raise ValueError(
                        f"inputs must have a {' and '.join(AXES[self.rank])} of at least {spans} "
                        "for the dilated kernel less the padding. Received: shape "
                        f"{tuple(input_shape)}"
                    )
                shape[first + axis] = (size - span) // stride + 1
        return tuple(shape)

    @property
    def _pads(self) -> tuple[tuple[int, int], ...]:
        """The padding before and after, of each axis, where it does not depend on the image."""
        if self.padding == "valid":
            return ((0, 0),) * self.rank
        if self.padding == "causal":
            return tuple((extent - 1, 0) for extent in self._extents)
        return self.padding

    @property
    def _spans(self) -> tuple[int, ...]:
        """The height and width that an image must have for one output, which may be below 1.

        Along an axis there are `(size - span) // stride + 1` outputs.
        """
        if self.padding == "same":
            return (1,) * self.rank
        axes = zip(self._extents, self._pads, strict=True)
        return tuple(extent - sum(pad) for extent, pad in axes)

    @property
    def _extents(self) -> tuple[int, ...]:
        """The height and width of the dilated kernel."""
        axes = zip(self.kernel_size, self.dilation_rate, strict=True)
        return tuple((taps - 1) * dilation + 1 for taps, dilation in axes)


class ExtendedConvolution(KernelPlacement):
    """The part of a convolution that is about where its kernel goes, beside a class of Keras.

    `padding` may also be numbers, and strides and dilation may both be above 1.
    """

    def __init__(self, *args, padding, dilation_rate, **kwargs):
        padding = padding_of_axes(padding, self.rank)
        super().__init__(*args, padding=padding if isinstance(padding, str) else "valid", **kwargs)
        self.padding = padding
        self.dilation_rate = dilation_rate

    def compute_output_shape(self, input_shape):
        if isinstance(self.padding, str):
            return super().compute_output_shape(input_shape)
        return self.output_shape(input_shape, self.filters)


class ExtendedConv1D(ExtendedConvolution, keras.layers.Conv1D):
    rank = 1


class ExtendedConv2D(ExtendedConvolution, keras.layers.Conv2D):
    rank = 2


def first_of_same(size, stride: int, extent: int):
    """Which output of stride 1 is the first of `stride`, along an axis that "same" pads.

    It pads less at a larger stride, so that this one's taps start further into the image.
    """
    # No division of negative numbers, which rounds to 0 in ONNX.
    padding = (size - 1) // stride * stride + extent - size
    padding = max(padding, 0) if isinstance(size, int) else tf.maximum(padding, 0)
    return (extent - 1) // 2 - padding // 2
