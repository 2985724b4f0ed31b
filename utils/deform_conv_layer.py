"""`DeformConv2D`: deformable convolution as a Keras layer that learns its own offsets."""

import keras
import tensorflow as tf

from utils.deform_conv_wrapper import deform_conv2d

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"DeformConv2D needs Keras on TensorFlow; its backend is {keras.backend.backend()}. "
        "Set KERAS_BACKEND=tensorflow before Keras is imported"
    )

_DATA_FORMATS = {"channels_last": "NHWC", "channels_first": "NCHW"}


@keras.saving.register_keras_serializable(package="deform_conv")
class DeformConv2D(keras.layers.Conv2D):
    """2D deformable convolution layer.

    A `keras.layers.Conv2D` that samples its input where a second convolution, `offset_conv`, tells
    it to: one offset (dy, dx) in pixels per output position, kernel tap and deformable group.
    With `modulated`, a third, `mask_conv`, yields a factor `2 * sigmoid(.)` for each sample.
    Both have the kernel size, strides, padding and dilation of the layer and start at zero, so
    that a new layer computes what a `Conv2D` with its kernel and bias would.

    Sources: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211; with `modulated`,
    Zhu et al., Deformable ConvNets v2, arXiv:1811.11168.

    Offsets and masks are computed in the layer's variable dtype, so in float32 under a mixed
    precision policy, since float16 is too coarse for positions.

    Args:
      filters, kernel_size, strides, padding, data_format, dilation_rate, groups: as in `Conv2D`.
      deform_groups: number of groups of input channels with offsets of their own.
      modulated: whether samples are scaled by a learned mask (version 2).
      **kwargs: every other argument of `Conv2D`.

    Input shape:
      `[N, H, W, C]` for "channels_last", `[N, C, H, W]` for "channels_first".

    Output shape:
      `[N, OH, OW, filters]` or `[N, filters, OH, OW]`, as `Conv2D` gives.

    Raises:
      ValueError: `deform_groups` does not divide the number of input channels.

    Example:
      >>> layer = DeformConv2D(16, 3, padding="same", modulated=True)
      >>> layer(keras.random.normal([8, 28, 28, 3])).shape
      TensorShape([8, 28, 28, 16])
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=(1, 1),
        padding="valid",
        data_format=None,
        dilation_rate=(1, 1),
        groups=1,
        deform_groups=1,
        modulated=False,
        **kwargs,
    ):
        super().__init__(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            groups=groups,
            **kwargs,
        )
        if (
            isinstance(deform_groups, bool)
            or not hasattr(deform_groups, "__index__")
            or deform_groups < 1
        ):
            raise ValueError(f"deform_groups must be an integer above 0. Received: {deform_groups}")
        self.deform_groups = int(deform_groups)
        self.modulated = modulated
        # XLA knows no kernel for the op; without this, fit() on a GPU would try to compile it.
        self.supports_jit = False
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.offset_conv = self._zero_convolution(2 * deform_groups * taps, "offset_conv")
        self.mask_conv = None
        if modulated:
            self.mask_conv = self._zero_convolution(deform_groups * taps, "mask_conv")

    def _zero_convolution(self, channels: int, name: str) -> keras.layers.Conv2D:
        return keras.layers.Conv2D(
            channels,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            # TensorFlow has no channels-first convolution on the CPU; _predict() transposes.
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
            kernel_initializer="zeros",
            dtype=self.variable_dtype,
            name=name,
        )

    def build(self, input_shape):
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        if channels is not None and channels % self.deform_groups != 0:
            raise ValueError(
                f"deform_groups must divide the number of input channels, {channels}. "
                f"Received: {self.deform_groups}"
            )
        super().build(input_shape)
        self.offset_conv.build((None, None, None, channels))
        if self.modulated:
            self.mask_conv.build((None, None, None, channels))

    def offset(self, inputs):
        """The offsets for `inputs`, in pixels: the `offset` argument of `deform_conv2d`."""
        return self._predict(self.offset_conv, inputs)

    def mask(self, inputs):
        """The mask for `inputs`, from 0 to 2, or None where the layer is not modulated."""
        if not self.modulated:
            return None
        return 2 * keras.ops.sigmoid(self._predict(self.mask_conv, inputs))

    def _predict(self, convolution, inputs):
        if self.data_format == "channels_last":
            return convolution(inputs)
        outputs = convolution(keras.ops.transpose(inputs, (0, 2, 3, 1)))
        return keras.ops.transpose(outputs, (0, 3, 1, 2))

    def convolution_op(self, inputs, kernel):
        return deform_conv2d(
            inputs,
            kernel,
            self.offset(inputs),
            self.mask(inputs),
            strides=self.strides,
            padding=self.padding.upper(),
            dilations=self.dilation_rate,
            deform_groups=self.deform_groups,
            data_format=_DATA_FORMATS[self.data_format],
        )

    def call(self, inputs):
        outputs = self.convolution_op(inputs, self.kernel)
        if self.use_bias:
            # Conv2D's own addition (Keras 3.15) takes a channels-first bias for one along the
            # width wherever the output is as wide as it has channels.
            data_format = _DATA_FORMATS[self.data_format]
            outputs = tf.nn.bias_add(outputs, self.bias, data_format=data_format)
        return outputs if self.activation is None else self.activation(outputs)

    def get_config(self):
        return {
            **super().get_config(),
            "deform_groups": self.deform_groups,
            "modulated": self.modulated,
        }
