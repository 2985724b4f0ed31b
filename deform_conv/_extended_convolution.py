"""Keras's convolutions with what they do not take: padding by numbers, strides with dilation."""

import keras

from ._arguments import AXES
from ._layer_arguments import padding_of_axes


class ExtendedConvolution:
    """The part of a convolution that is about where its kernel goes, beside a class of Keras.

    `padding` may also be numbers, and strides and dilation may both be above 1. The attribute
    `padding` is a name, such as "same", or a pair of numbers for each axis: ((top, bottom), (left,
    right)).
    """

    rank: int  # the number of axes

    def __init__(self, *args, padding, dilation_rate, **kwargs):
        padding = padding_of_axes(padding, self.rank)
        super().__init__(*args, padding=padding if isinstance(padding, str) else "valid", **kwargs)
        self.padding = padding
        self.dilation_rate = dilation_rate

    @property
    def tensorflow_padding(self) -> str | list[tuple[int, int]]:
        """The padding as `tf.nn.conv2d` and `deform_conv2d` take it."""
        if self.padding in ("valid", "same"):
            return self.padding.upper()
        none = (0, 0)
        if self.data_format == "channels_last":
            return [none, *self._pads, none]
        return [none, none, *self._pads]

    def compute_output_shape(self, input_shape):
        if isinstance(self.padding, str):
            return super().compute_output_shape(input_shape)
        channel_axis, first = (-1, 1) if self.data_format == "channels_last" else (1, 2)
        shape = list(input_shape)
        shape[channel_axis] = self.filters
        for axis, span, stride in zip(range(self.rank), self._spans, self.strides, strict=True):
            size = shape[first + axis]
            if size is not None:
                if size < span:
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


class ExtendedConv1D(ExtendedConvolution, keras.layers.Conv1D):
    rank = 1


class ExtendedConv2D(ExtendedConvolution, keras.layers.Conv2D):
    rank = 2
