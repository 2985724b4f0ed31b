"""What the Keras layers have in common, whatever the number of axes of their inputs."""

import inspect
import math

import keras
import numpy as np
import tensorflow as tf

from ._arguments import AXES, shown
from ._extended_convolution import ExtendedConvolution
from ._layer_arguments import (
    boolean,
    keras_object,
    per_axis,
    positive_integer,
    positive_number,
    tensor,
)
from ._library import xla_kernels_loaded
from ._offset_convolution import OffsetConv1D, OffsetConv2D
from ._one_dimension import deform_conv1d
from ._plain_weights import choose_weights
from ._sampling_layer import SamplingLayer
from .ops import deform_conv2d

_OPERATIONS = {1: deform_conv1d, 2: deform_conv2d}
_OFFSET_CONVOLUTIONS = {1: OffsetConv1D, 2: OffsetConv2D}


class DeformableConvolution(SamplingLayer, ExtendedConvolution):
    """A deformable layer, beside a class of Keras. `rank` is the number of its inputs' axes.

    Its arguments are in the docstrings of `DeformableConv1D` and `DeformableConv2D`.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
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
        # None and numbers too, as in Keras: deformable() copies models that have them.
        if isinstance(use_bias, int | None):
            use_bias = bool(use_bias)
        # Keras takes much for these that it fails on later, or names no argument.
        super().__init__(
            filters=positive_integer(filters, "filters"),
            kernel_size=per_axis(kernel_size, "kernel_size", self.rank),
            strides=per_axis(strides, "strides", self.rank),
            padding=padding,
            data_format=data_format,
            dilation_rate=per_axis(dilation_rate, "dilation_rate", self.rank),
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
                self.rank * self._samples, self.offset_kernel_initializer, "offset_conv"
            )
            if self.modulated:
                self.mask_conv = self._convolution(self._samples, "zeros", "mask_conv")
        self._specify_inputs(channels=None)
        self.offset_trainable = offset_trainable

    @classmethod
    def signature_with(cls, **defaults) -> inspect.Signature:
        """The arguments of the constructor, some with another default."""
        signature = inspect.signature(cls.__init__)
        parameters = [
            each.replace(default=defaults.get(name, each.default))
            for name, each in signature.parameters.items()
        ]
        return signature.replace(parameters=parameters)

    def _convolution(self, channels: int, kernel_initializer, name: str) -> keras.layers.Layer:
        return _OFFSET_CONVOLUTIONS[self.rank](
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
            per_input += [self.rank * self._samples] + [self._samples] * self.modulated
        self.input_spec = [
            keras.InputSpec(ndim=self.rank + 2, axes={self._channel_axis: count})
            for count in per_input
        ]

    def build(self, input_shape):
        image_shape = _shapes(input_shape)[0]
        channels = self._channels_of(image_shape)
        super().build(image_shape)
        self._specify_inputs(channels)
        for convolution in self._offset_parts:
            convolution.build((None,) * (self.rank + 1) + (channels,))

    def load_own_variables(self, store):
        """Loads the kernel and the bias, also of a plain layer of the same name."""
        plain = choose_weights(store, self.name, f"Conv{self.rank}D")
        for convolution in self._offset_parts:
            convolution.keeps_weights = plain
        super().load_own_variables(store)

    def offset(self, inputs):
        """The offsets that the layer computes from its inputs, as the operation takes them.

        In a functional model, where `inputs` is a KerasTensor, this is a call of the layer, and is
        saved, loaded and cloned as one: the offsets stay those that the layer samples with.

        Args:
          inputs: the layer's images, `[N, H, W, C]` or `[N, C, H, W]`; in one dimension
            `[N, L, C]` or `[N, C, L]`.

        Returns:
          `[N, OH, OW, 2 * deform_groups * KH * KW]`, in one dimension `[N, OL, deform_groups * K]`,
          or with the channels second; float32, or float64 in a float64 layer.

        Raises:
          ValueError: `own_offsets` is False, or `inputs` does not fit.
        """
        return self._prediction("offset", inputs)

    def mask(self, inputs):
        """The mask, from 0 to `mask_scale`, that the layer computes from its inputs.

        In a functional model a call of the layer, as `offset` is.

        Args:
          inputs: as `offset` takes them.

        Returns:
          `[N, OH, OW, deform_groups * KH * KW]`, in one dimension `[N, OL, deform_groups * K]`, or
          with the channels second, in the dtype of the offsets; None where the layer is not
          modulated.

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
        return self._held(self._predict(self.offset_conv, inputs))

    def _mask(self, inputs):
        return self._scaled(self._predict(self.mask_conv, inputs))

    def _offset_and_mask(self, inputs):
        """Offsets and masks, by one convolution, which takes less time than two."""
        if not self.modulated:
            return self._predict(self.offset_conv, inputs), None
        outputs = self._predict(self._offset_and_mask_conv, inputs)
        sizes = [self.rank * self._samples, self._samples]
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

    def _held(self, offset):
        """The offsets that the layer samples with.

        In a "causal" layer, no sample is later than the step of its output: a larger offset is held
        at the largest one, and has no gradient. The largest is a little below the whole number of
        steps, so that the sample there lies between the output's step and the one before it. The
        step after it, which would have a weight of 0, then has no part in the derivative either.
        """
        if self.padding != "causal":
            return offset
        ((taps,), (dilation,)) = self.kernel_size, self.dilation_rate
        dtype = np.dtype(self._offset_dtype)
        largest = np.tile(dilation * np.arange(taps)[::-1], self.deform_groups).astype(dtype)
        # Not the number next to 0: processors may take numbers so small for 0.
        below = np.where(largest > 0, np.nextafter(largest, -1, dtype=dtype), -np.finfo(dtype).tiny)
        if self.data_format == "channels_first":
            largest, below = largest[:, np.newaxis], below[:, np.newaxis]
        offset = tf.where(offset > largest, largest, offset)
        return offset + tf.stop_gradient(tf.where(offset > below, below - offset, 0))

    def call(self, inputs):
        if self.own_offsets:
            offset, mask = self._offset_and_mask(inputs)
        else:
            inputs, offset, *masks = inputs
            mask = keras.ops.cast(masks[0], self._offset_dtype) if masks else None
        outputs = _OPERATIONS[self.rank](
            keras.ops.cast(inputs, self.compute_dtype),
            keras.ops.cast(self.kernel, self.compute_dtype),
            self._held(keras.ops.cast(offset, self._offset_dtype)),
            mask,
            self.strides,
            self.tensorflow_padding,
            self.dilation_rate,
            deform_groups=self.deform_groups,
            data_format=self._tensorflow_format,
        )
        if self.use_bias:
            outputs = self._with_bias(outputs)
        return outputs if self.activation is None else self.activation(outputs)

    def _with_bias(self, outputs):
        # Keras's own addition (3.15) takes a channels-first bias for one along the width wherever
        # the output is as wide as it has channels.
        bias = keras.ops.cast(self.bias, self.compute_dtype)
        if self._tensorflow_format == "NCW":
            # LiteRT's converter would take the sequences of a BiasAdd for images.
            return outputs + bias[:, tf.newaxis]
        return tf.nn.bias_add(outputs, bias, data_format=self._tensorflow_format)

    def compute_output_shape(self, input_shape):
        image_shape, *given = _shapes(input_shape)
        output_shape = super().compute_output_shape(image_shape)
        first = 1 if self.data_format == "channels_last" else 2
        axes = (0, *range(first, first + self.rank))
        for name, shape in zip(("offset", "mask"), given, strict=False):
            pairs = [(shape[axis], output_shape[axis]) for axis in axes]
            if any(None not in pair and pair[0] != pair[1] for pair in pairs):
                *sizes, last = "batch size", *AXES[self.rank]
                raise ValueError(
                    f"{name} must have the {', '.join(sizes)} and {last} of the output, "
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
