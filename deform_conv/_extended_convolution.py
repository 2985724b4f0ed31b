"""`Conv2D` with what Keras's own does not take: padding by numbers, and strides with dilation."""

import keras

from ._layer_arguments import image_padding


class ExtendedConv2D(keras.layers.Conv2D):
    """The part of a `Conv2D` that is about where its kernel goes.

    `padding` may also be numbers, and strides and dilation may both be above 1. The attribute
    `padding` is "valid", "same" or ((top, bottom), (left, right)).
    """

    def __init__(self, *args, padding, dilation_rate, **kwargs):
        padding = image_padding(padding)
        super().__init__(*args, padding=padding if isinstance(padding, str) else "valid", **kwargs)
        self.padding = padding
        self.dilation_rate = dilation_rate

    @property
    def tensorflow_padding(self) -> str | list[tuple[int, int]]:
        """The padding as `tf.nn.conv2d` and `deform_conv2d` take it."""
        if isinstance(self.padding, str):
            return self.padding.upper()
        none = (0, 0)
        if self.data_format == "channels_last":
            return [none, *self.padding, none]
        return [none, none, *self.padding]

    def compute_output_shape(self, input_shape):
        if isinstance(self.padding, str):
            return super().compute_output_shape(input_shape)
        channel_axis, first = (3, 1) if self.data_format == "channels_last" else (1, 2)
        shape = list(input_shape)
        shape[channel_axis] = self.filters
        for axis, span, stride in zip((first, first + 1), self._spans, self.strides, strict=True):
            if shape[axis] is not None:
                if shape[axis] < span:
                    raise ValueError(
                        f"inputs must have a height and width of at least {self._spans} for the "
                        f"dilated kernel less the padding. Received: shape {tuple(input_shape)}"
                    )
                shape[axis] = (shape[axis] - span) // stride + 1
        return tuple(shape)

    @property
    def _spans(self) -> tuple[int, int]:
        """The height and width that an image must have for one output, which may be below 1.

        Along an axis there are `(size - span) // stride + 1` outputs.
        """
        if self.padding == "same":
            return 1, 1
        pads = [(0, 0)] * 2 if self.padding == "valid" else self.padding
        axes = zip(self._extents, pads, strict=True)
        return tuple(extent - sum(pad) for extent, pad in axes)

    @property
    def _extents(self) -> tuple[int, int]:
        """The height and width of the dilated kernel."""
        axes = zip(self.kernel_size, self.dilation_rate, strict=True)
        return tuple((taps - 1) * dilation + 1 for taps, dilation in axes)
