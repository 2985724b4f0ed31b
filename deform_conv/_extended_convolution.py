"""Where a kernel goes on an image, and `Conv2D` with what Keras's own does not take of that."""

import keras
import tensorflow as tf

from ._layer_arguments import image_padding


class KernelPlacement:
    """The part of a layer that is about where its kernel goes.

    The layer has `kernel_size`, `strides`, `dilation_rate`, `data_format`, and as `padding`
    "valid", "same" or ((top, bottom), (left, right)).
    """

    @property
    def tensorflow_padding(self) -> str | list[tuple[int, int]]:
        """The padding as `tf.nn.conv2d` and `deform_conv2d` take it."""
        return self.padding_in(self.data_format)

    def padding_in(self, data_format: str) -> str | list[tuple[int, int]]:
        """The same for images in another data format than the layer's."""
        if isinstance(self.padding, str):
            return self.padding.upper()
        none = (0, 0)
        if data_format == "channels_last":
            return [none, *self.padding, none]
        return [none, none, *self.padding]

    def output_shape(self, input_shape, channels: int | None) -> tuple:
        """The shape of the output of so many channels."""
        channel_axis, first = (3, 1) if self.data_format == "channels_last" else (1, 2)
        shape = list(input_shape)
        shape[channel_axis] = channels
        for axis, span, stride in zip((first, first + 1), self._spans, self.strides, strict=True):
            if shape[axis] is not None:
                # Without padding, as in tf.nn.conv2d, too little by less than a stride gives 0.
                least = span - stride if isinstance(self.padding, str) else span
                if shape[axis] < least:
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


class ExtendedConv2D(KernelPlacement, keras.layers.Conv2D):
    """The part of a `Conv2D` that is about where its kernel goes.

    `padding` may also be numbers, and strides and dilation may both be above 1. The attribute
    `padding` is "valid", "same" or ((top, bottom), (left, right)).
    """

    def __init__(self, *args, padding, dilation_rate, **kwargs):
        padding = image_padding(padding)
        super().__init__(*args, padding=padding if isinstance(padding, str) else "valid", **kwargs)
        self.padding = padding
        self.dilation_rate = dilation_rate

    def compute_output_shape(self, input_shape):
        if isinstance(self.padding, str):
            return super().compute_output_shape(input_shape)
        return self.output_shape(input_shape, self.filters)


def first_of_same(size, stride: int, extent: int):
    """Which output of stride 1 is the first of `stride`, along an axis that "same" pads.

    It pads less at a larger stride, so that this one's taps start further into the image.
    """
    # No division of negative numbers, which rounds to 0 in ONNX.
    padding = (size - 1) // stride * stride + extent - size
    padding = max(padding, 0) if isinstance(size, int) else tf.maximum(padding, 0)
    return (extent - 1) // 2 - padding // 2
