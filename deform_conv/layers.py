"""Deformable convolution as Keras layers: of versions 1 and 2, and the modules of 3 and 4."""

import math

import keras
import tensorflow as tf

from ._aggregation_layers import DeformableConv2DV3, DeformableConv2DV4
from ._arguments import shown
from ._extended_convolution import ExtendedConv2D
from ._layer_arguments import (
    boolean,
    height_and_width,
    keras_object,
    positive_integer,
    positive_number,
    tensor,
)
from ._library import xla_kernels_loaded
from ._offset_convolution import OffsetConvolution
from ._plain_weights import choose_weights
from ._sampling_layer import DATA_FORMATS, SamplingLayer
from .ops import deform_conv2d

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"DeformableConv2D needs Keras on TensorFlow; its backend is {keras.backend.backend()}. "
        "Set KERAS_BACKEND=tensorflow before Keras is imported"
    )

__all__ = ["DeformableConv2D", "DeformableConv2DV3", "DeformableConv2DV4"]


@keras.saving.register_keras_serializable(package="deform_conv")
class DeformableConv2D(SamplingLayer, ExtendedConv2D):
    """2D deformable convolution layer.

    A `keras.layers.Conv2D` that samples its input where an offset (dy, dx), in pixels, moves each
    sample: one per output position, kernel tap and deformable group. With `modulated`, a mask
    scales each sample too.

    A second convolution, `offset_conv`, computes the offsets from the layer's input, and a third,
    `mask_conv`, the masks: `mask_scale * sigmoid(mask_conv(inputs))`. Both have the kernel size,
    strides, padding and dilation of the layer, and a bias. By default they start at zero, so that
    a new layer computes what a `Conv2D` with its kernel and bias would.

    With `own_offsets=False` the layer has neither, and is called with a list: `[inputs, offset]`
    or, modulated, `[inputs, offset, mask]`.

    `offset(inputs)` and `mask(inputs)` are what the layer samples with. Functional models can show
    them, and have them as calls of the layer: `layer(inputs, returns="offset")`.

    Offsets and masks are float32 in 16-bit layers too, own and given ones, since 16 bits are too
    coarse for positions.

    Setting `trainable` sets it for the whole layer, as in Keras. `offset_trainable` is the flag of
    `offset_conv` and `mask_conv` alone:

      >>> layer.trainable = False
      >>> layer.offset_trainable = True  # trains nothing but offsets and masks

    Sources: Dai et al., Deformable Convolutional Networks, arXiv:1703.06211; with `modulated`,
    Zhu et al., Deformable ConvNets v2, arXiv:1811.11168.

    Args:
      filters, kernel_size, strides, data_format, dilation_rate, groups, activation, use_bias,
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
        activity_regularizer, kernel_constraint, bias_constraint: as in `Conv2D`; activation,
        regularizers and constraints are not those of `offset_conv` and `mask_conv`. Strides and
        dilation may both be above 1.
      padding: "valid" or "same", as in `Conv2D`; or numbers of zeros, at least 0: one, or (h, w),
        for both sides as PyTorch pads, or ((top, bottom), (left, right)). At a stride above 1,
        "same" depends on the size of the image, and pads more below and on the right.
      deform_groups: number of groups of consecutive input channels with offsets and masks of their
        own; divides the number of input channels.
      modulated: whether a mask scales the samples (version 2).
      mask_scale: upper bound of the masks, a number above 0. Masks start at half of it: at 1 by
        default; with `mask_scale=1` at 0.5, as in Zhu et al.
      offset_kernel_initializer: initializer of the kernel of `offset_conv`. Its bias, and all of
        `mask_conv`, start at zero.
      offset_trainable: whether `offset_conv` and `mask_conv` are trained; None for the value of
        `trainable`, or False without offsets of its own.
      own_offsets: whether the layer computes its offsets and masks itself.
      **kwargs: what every layer takes: `name`, `dtype`, `trainable`.

    Input shape:
      inputs: `[N, H, W, C]` for "channels_last", `[N, C, H, W]` for "channels_first"; H, W and N
        may be unknown.
      offset: `[N, OH, OW, 2 * deform_groups * KH * KW]` or `[N, 2 * deform_groups * KH * KW, OH,
        OW]`, in the order of `deform_conv2d`.
      mask: `[N, OH, OW, deform_groups * KH * KW]` or `[N, deform_groups * KH * KW, OH, OW]`.

    Output shape:
      `[N, OH, OW, filters]` or `[N, filters, OH, OW]`, as `Conv2D` gives.

    Raises:
      ValueError: an argument or the shape of an input does not fit.

    Example:
      >>> layer = DeformableConv2D(16, 3, padding="same", modulated=True)
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
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        *,
        deform_groups=1,
        modulated=False,
        mask_scale=2.0,
        offset_kernel_initializer="zeros",
        offset_trainable=None,
        own_offsets=True,
        **kwargs,
    ):
        data_format = self._checked(data_format, kwargs)
        # None and numbers too, as in Conv2D: deformable() copies models that have them.
        if isinstance(use_bias, int | None):
            use_bias = bool(use_bias)
        # Keras takes much for these that it fails on later, or names no argument.
        super().__init__(
            filters=positive_integer(filters, "filters"),
            kernel_size=height_and_width(kernel_size, "kernel_size"),
            strides=height_and_width(strides, "strides"),
            padding=padding,
            data_format=data_format,
            dilation_rate=height_and_width(dilation_rate, "dilation_rate"),
            groups=positive_integer(groups, "groups"),
            activation=keras_object(activation, "activation"),
            use_bias=boolean(use_bias, "use_bias"),
            kernel_initializer=keras_object(kernel_initializer, "kernel_initializer"),
            bias_initializer=keras_object(bias_initializer, "bias_initializer"),
            kernel_regularizer=keras_object(kernel_regularizer, "kernel_regularizer"),
            bias_regularizer=keras_object(bias_regularizer, "bias_regularizer"),
            activity_regularizer=keras_object(activity_regularizer, "activity_regularizer"),
            kernel_constraint=keras_object(kernel_constraint, "kernel_constraint"),
            bias_constraint=keras_object(bias_constraint, "bias_constraint"),
            **kwargs,
        )
        self._check_compute_dtype()
        self.deform_groups = positive_integer(deform_groups, "deform_groups")
        self.modulated = boolean(modulated, "modulated")
        self.mask_scale = positive_number(mask_scale, "mask_scale")
        self.offset_kernel_initializer = keras_object(
            offset_kernel_initializer, "offset_kernel_initializer"
        )
        self.own_offsets = boolean(own_offsets, "own_offsets")
        if offset_trainable is None:
            offset_trainable = self.own_offsets and self.trainable
        self.supports_jit = xla_kernels_loaded()
        # Keras would round a given float32 offset to 16 bits; call() casts instead.
        self.autocast = False

        self._samples = self.deform_groups * math.prod(self.kernel_size)  # per output position
        self.offset_conv = self.mask_conv = None
        if self.own_offsets:
            self.offset_conv = self._convolution(
                2 * self._samples, self.offset_kernel_initializer, "offset_conv"
            )
            if self.modulated:
                self.mask_conv = self._convolution(self._samples, "zeros", "mask_conv")
        self._specify_inputs(channels=None)
        self.offset_trainable = offset_trainable

    def _convolution(self, channels: int, kernel_initializer, name: str) -> keras.layers.Conv2D:
        return OffsetConvolution(
            channels,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            # TensorFlow has no channels-first convolution on the CPU; _predict() transposes.
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
            kernel_initializer=kernel_initializer,
            dtype=self._offset_dtype,
            name=name,
        )

    @property
    def _offset_parts(self):
        return [part for part in (self.offset_conv, self.mask_conv) if part is not None]

    def _specify_inputs(self, channels: int | None) -> None:
        """Has Keras check the number of inputs and their channels in every call."""
        per_input = [channels]
        if not self.own_offsets:
            per_input += [2 * self._samples] + [self._samples] * self.modulated
        self.input_spec = [
            keras.InputSpec(ndim=4, axes={self._channel_axis: count}) for count in per_input
        ]

    def build(self, input_shape):
        image_shape = _shapes(input_shape)[0]
        channels = self._channels_of(image_shape)
        super().build(image_shape)
        self._specify_inputs(channels)
        for convolution in self._offset_parts:
            convolution.build((None, None, None, channels))

    def load_own_variables(self, store):
        """Loads the kernel and the bias, also of a `Conv2D` of the same name."""
        plain = choose_weights(store, self.name)
        for convolution in self._offset_parts:
            convolution.keeps_weights = plain
        super().load_own_variables(store)

    def offset(self, inputs):
        """The offsets that the layer computes from images, as `deform_conv2d` takes them.

        In a functional model, where `inputs` is a KerasTensor, this is a call of the layer, and is
        saved, loaded and cloned as one: the offsets stay those that the layer samples with.

        Args:
          inputs: the layer's images, `[N, H, W, C]` or `[N, C, H, W]`.

        Returns:
          `[N, OH, OW, 2 * deform_groups * KH * KW]`, or with the channels second; float32, or
          float64 in a float64 layer.

        Raises:
          ValueError: `own_offsets` is False, or `inputs` does not fit.
        """
        return self._prediction("offset", inputs)

    def mask(self, inputs):
        """The mask, from 0 to `mask_scale`, that the layer computes from images.

        In a functional model a call of the layer, as `offset` is.

        Args:
          inputs: the layer's images, `[N, H, W, C]` or `[N, C, H, W]`.

        Returns:
          `[N, OH, OW, deform_groups * KH * KW]`, or with the channels second, in the dtype of the
          offsets; None where the layer is not modulated.

        Raises:
          ValueError: the layer is modulated and `own_offsets` is False, or `inputs` does not fit.
        """
        return self._prediction("mask", inputs)

    def _tensors(self, inputs):
        """The layer's inputs as tensors of numbers, symbolic or not."""
        if self.own_offsets:
            return tensor(inputs, "inputs")
        names = ["inputs", "offset", "mask"][: 2 + self.modulated]
        given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if len(given) != len(names):
            raise ValueError(
                f"{self.name} expects {len(names)} inputs in a list, [{', '.join(names)}], and "
                f"received {len(given)} input(s). Received: {shown(inputs)}"
            )
        return [tensor(value, name) for value, name in zip(given, names, strict=True)]

    def _prediction(self, returns: str, inputs):
        """What `offset` or `mask` return."""
        if returns == "mask" and not self.modulated:
            return None
        if not self.own_offsets:
            raise ValueError(
                f"own_offsets must be True for {self.name} to compute offsets and masks. "
                f"Received: {self.own_offsets}"
            )
        return super()._prediction(returns, inputs)

    def _offset(self, inputs):
        return self._predict(self.offset_conv, inputs)

    def _mask(self, inputs):
        return self._scaled(self._predict(self.mask_conv, inputs))

    def _offset_and_mask(self, inputs):
        """What `offset` and `mask` compute, by one convolution, which takes less time than two."""
        if not self.modulated:
            return self._predict(self.offset_conv, inputs), None
        outputs = self._predict(self._offset_and_mask_conv, inputs)
        sizes = [2 * self._samples, self._samples]
        offset, mask = tf.split(outputs, sizes, axis=self._channel_axis)
        return offset, self._scaled(mask)

    def _offset_and_mask_conv(self, inputs):
        """The outputs of `offset_conv` and, as further channels, those of `mask_conv`."""
        convolutions = (self.offset_conv, self.mask_conv)
        kernel = keras.ops.concatenate([each.kernel for each in convolutions], axis=-1)
        bias = keras.ops.concatenate([each.bias for each in convolutions], axis=-1)
        return tf.nn.bias_add(self.offset_conv.convolution_op(inputs, kernel), bias)

    def _scaled(self, mask):
        return self.mask_scale * keras.ops.sigmoid(mask)

    def _predict(self, convolution, inputs):
        inputs = keras.ops.cast(inputs, self._offset_dtype)
        return self._from_channels_last(convolution(self._to_channels_last(inputs)))

    def call(self, inputs):
        if self.own_offsets:
            offset, mask = self._offset_and_mask(inputs)
        else:
            inputs, offset, *masks = inputs
            mask = keras.ops.cast(masks[0], self._offset_dtype) if masks else None
        data_format = DATA_FORMATS[self.data_format]
        outputs = deform_conv2d(
            keras.ops.cast(inputs, self.compute_dtype),
            keras.ops.cast(self.kernel, self.compute_dtype),
            keras.ops.cast(offset, self._offset_dtype),
            mask,
            strides=self.strides,
            padding=self.tensorflow_padding,
            dilations=self.dilation_rate,
            deform_groups=self.deform_groups,
            data_format=data_format,
        )
        if self.use_bias:
            # Conv2D's own addition (Keras 3.15) takes a channels-first bias for one along the
            # width wherever the output is as wide as it has channels.
            bias = keras.ops.cast(self.bias, self.compute_dtype)
            outputs = tf.nn.bias_add(outputs, bias, data_format=data_format)
        return outputs if self.activation is None else self.activation(outputs)

    def compute_output_shape(self, input_shape):
        image_shape, *given = _shapes(input_shape)
        output_shape = super().compute_output_shape(image_shape)
        axes = (0, 1, 2) if self.data_format == "channels_last" else (0, 2, 3)
        for name, shape in zip(("offset", "mask"), given, strict=False):
            pairs = [(shape[axis], output_shape[axis]) for axis in axes]
            if any(None not in pair and pair[0] != pair[1] for pair in pairs):
                raise ValueError(
                    f"{name} must have the batch size, height and width of the output, "
                    f"{tuple(pair[1] for pair in pairs)}. Received: shape {tuple(shape)}"
                )
        return output_shape

    def get_config(self):
        return {
            **super().get_config(),
            "deform_groups": self.deform_groups,
            "modulated": self.modulated,
            "mask_scale": self.mask_scale,
            "offset_kernel_initializer": keras.initializers.serialize(
                self.offset_kernel_initializer
            ),
            "offset_trainable": self.offset_trainable,
            "own_offsets": self.own_offsets,
        }


def _shapes(input_shape) -> list:
    """The shapes of all inputs, of which Keras passes one as it is and several as a list."""
    several = isinstance(input_shape[0], list | tuple | tf.TensorShape)
    return [tuple(shape) for shape in (input_shape if several else [input_shape])]
