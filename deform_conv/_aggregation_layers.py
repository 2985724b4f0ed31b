"""The modules of InternImage and FlashInternImage as Keras layers: versions 3 and 4."""

import math

import keras
import numpy as np
import tensorflow as tf

from ._arguments import shown
from ._dcnv3 import centered_grid
from ._extended_convolution import KernelPlacement, first_of_same
from ._layer_arguments import (
    boolean,
    height_and_width,
    image_padding,
    keras_object,
    positive_integer,
    positive_number,
)
from ._library import xla_kernels_loaded
from ._offset_convolution import DepthwiseConvolution
from ._parts import Normalization, Projection, linear
from ._reference import sizes
from ._sampling_layer import SamplingLayer
from .ops import deform_aggregate2d

__all__ = ["DeformableConv2DV3", "DeformableConv2DV4"]


class _AggregationLayer(SamplingLayer, KernelPlacement, keras.layers.Layer):
    """What both modules have: projections around `deform_aggregate2d`.

    A layer computes, from its images, features for each output position (`_features`), and from
    these with one linear map the offsets and masks of its samples. The missing tap of
    `remove_center` gets an offset far outside of every image, and a mask of 0.
    """

    rank = 2

    def __init__(
        self,
        kernel_size=3,
        strides=1,
        padding="same",
        data_format=None,
        dilation_rate=1,
        *,
        deform_groups=4,
        offset_scale=1.0,
        dw_kernel_size=None,
        center_feature_scale=False,
        remove_center=False,
        offset_trainable=None,
        **kwargs,
    ):
        data_format = self._checked(data_format, kwargs)
        super().__init__(**kwargs)
        self._check_compute_dtype()
        self.data_format = data_format or keras.config.image_data_format()
        self.kernel_size = height_and_width(kernel_size, "kernel_size")
        self.strides = height_and_width(strides, "strides")
        self.dilation_rate = height_and_width(dilation_rate, "dilation_rate")
        self.padding = image_padding(padding)
        self.deform_groups = positive_integer(deform_groups, "deform_groups")
        self.offset_scale = positive_number(offset_scale, "offset_scale")
        if dw_kernel_size is not None:
            dw_kernel_size = height_and_width(dw_kernel_size, "dw_kernel_size")
        self.dw_kernel_size = dw_kernel_size
        self.center_feature_scale = boolean(center_feature_scale, "center_feature_scale")
        self.remove_center = boolean(remove_center, "remove_center")
        self._check_center()
        self.supports_jit = xla_kernels_loaded()
        # Keras would round float32 images to 16 bits, of which offsets come; call() casts instead.
        self.autocast = False
        self._samples = self.deform_groups * math.prod(self.kernel_size)  # per output position
        self._specify_inputs(channels=None)

        count = self._samples - self.deform_groups * self.remove_center
        self.dw_conv = None
        if dw_kernel_size is not None:
            self.dw_conv = self._part(
                DepthwiseConvolution, "dw_conv", self._offset_dtype, dw_kernel_size
            )
        self.offset_proj = self._part(Projection, "offset_proj", self._offset_dtype, 2 * count)
        self.mask_proj = self._part(Projection, "mask_proj", self._offset_dtype, count)
        self.center_proj = None
        if self.center_feature_scale:
            self.center_proj = self._part(
                Projection, "center_proj", self._offset_dtype, self.deform_groups
            )
        self.input_proj = self.output_proj = None
        self._add_parts()
        for part in self._parts:  # since this layer's flag was set, they have come
            part.trainable = self.trainable
        self.offset_trainable = self.trainable if offset_trainable is None else offset_trainable

    def _add_parts(self) -> None:
        """Makes the projections around the aggregation, and what else a version has."""
        raise NotImplementedError

    def _part(self, kind: type, name: str, dtype, *args, **kwargs) -> keras.layers.Layer:
        part = kind(*args, name=name, dtype=dtype, **kwargs)
        part.owner = type(self).__name__
        return part

    def _projection(self, name: str, use_bias: bool = True) -> Projection:
        return self._part(
            Projection,
            *(name, self.dtype_policy),
            use_bias=use_bias,
            kernel_initializer="glorot_uniform",
        )

    @property
    def _offset_parts(self):
        parts = (self.offset_proj, self.mask_proj, self.dw_conv)
        return [part for part in parts if part is not None]

    @property
    def _parts(self) -> list[keras.layers.Layer]:
        parts = (self.input_proj, *self._offset_parts, self.center_proj, self.output_proj)
        return [part for part in parts if part is not None]

    def _check_center(self) -> None:
        if self.remove_center and math.prod(self.kernel_size) == 1:
            raise ValueError(
                "kernel_size must be above 1 for remove_center, which leaves no tap of it. "
                f"Received: {self.kernel_size}"
            )
        if self.remove_center and math.prod(self.kernel_size) % 2 == 0:
            raise ValueError(
                "kernel_size must be odd, in height and width, for remove_center to leave out the "
                f"tap in the middle. Received: {self.kernel_size}"
            )
        if isinstance(self.padding, str):
            return
        for pads, extent in zip(self.padding, self._extents, strict=True):
            if pads[0] > (extent - 1) // 2 or pads[1] > extent // 2:
                raise ValueError(
                    "padding must be at most half of the dilated kernel, so that the middle of "
                    "each window is a pixel: the offsets are computed there. Received: "
                    f"{shown(self.padding)}"
                )

    def _specify_inputs(self, channels: int | None) -> None:
        self.input_spec = [keras.InputSpec(ndim=4, axes={self._channel_axis: channels})]

    def build(self, input_shape):
        channels = self._channels_of(tuple(input_shape))
        self._specify_inputs(channels)
        for part in self._parts:
            part.build((None, None, None, channels))
        self.built = True

    def compute_output_shape(self, input_shape):
        return self.output_shape(input_shape, input_shape[self._channel_axis])

    def offset(self, inputs):
        """The offsets that the layer computes from images, as `deform_aggregate2d` takes them.

        They are in pixels: the `offset_scale` is in them, and what it moves the taps away from
        the middle. In a functional model a call of the layer, as in `DeformableConv2D`.

        Args:
          inputs: the layer's images, `[N, H, W, C]` or `[N, C, H, W]`.

        Returns:
          `[N, OH, OW, 2 * deform_groups * KH * KW]`, or with the channels second; float32, or
          float64 in a float64 layer. With `remove_center`, the tap in the middle lies far outside
          of the image.

        Raises:
          ValueError: `inputs` does not fit.
        """
        return self._prediction("offset", inputs)

    def mask(self, inputs):
        """The weights of the samples that the layer computes from images.

        In a functional model a call of the layer, as in `DeformableConv2D`.

        Args:
          inputs: the layer's images, `[N, H, W, C]` or `[N, C, H, W]`.

        Returns:
          `[N, OH, OW, deform_groups * KH * KW]`, or with the channels second, in the dtype of the
          offsets. With `remove_center`, the tap in the middle has the weight 0.

        Raises:
          ValueError: `inputs` does not fit.
        """
        return self._prediction("mask", inputs)

    def _offset(self, inputs):
        return self._from_channels_last(self._sampling(inputs)[0])

    def _mask(self, inputs):
        return self._from_channels_last(self._sampling(inputs)[1])

    def _sampling(self, inputs):
        """Offsets and masks, channels last, of images in the order of `data_format`."""
        return self._offset_and_mask(self._features(self._to_channels_last(inputs)))

    def _features(self, images):
        """What offsets and masks are computed from: `[N, OH, OW, C]` in their dtype."""
        features = tf.cast(images, self._offset_dtype)
        if self.dw_conv is not None:
            features = self.dw_conv(features)
        return self._at_centers(features)

    def _at_centers(self, images):
        """The pixels in the middle of the windows, `[N, OH, OW, C]` of `[N, H, W, C]`."""
        slices = [slice(None)]
        for axis, (extent, stride) in enumerate(zip(self._extents, self.strides, strict=True)):
            if self.padding == "same":
                first, last = first_of_same(sizes(images)[axis + 1], stride, extent), None
                if stride == 1:
                    first = 0
            else:
                before, after = self._pads[axis]
                first = (extent - 1) // 2 - before
                last = after - extent // 2 or None
            slices.append(slice(first, last, stride))
        return images[tuple(slices)]

    def _offset_and_mask(self, features):
        """The offsets and masks, by one linear map, which takes less time than two."""
        dtype = features.dtype
        shift = (self.offset_scale - 1) * centered_grid(self.kernel_size, self.dilation_rate)
        shift = shift.reshape(-1, 2)
        mask_shift = np.zeros(len(shift))
        if self.remove_center:
            # Finite, for those who look for infinities.
            shift[len(shift) // 2] = dtype.min
            mask_shift[len(shift) // 2] = self._missing_mask(dtype)
        shift, mask_shift = (
            tf.constant(np.tile(each.ravel(), self.deform_groups), dtype)
            for each in (shift, mask_shift)
        )
        offset_kernel, offset_bias = self._of_all_taps(self.offset_proj, 2)
        mask_kernel, mask_bias = self._of_all_taps(self.mask_proj, 1)
        scale = tf.constant(self.offset_scale, dtype)
        kernel = tf.concat([scale * offset_kernel, mask_kernel], axis=-1)
        bias = tf.concat([scale * offset_bias + shift, mask_bias + mask_shift], axis=-1)
        outputs = linear(features, kernel, bias)
        offset, mask = tf.split(outputs, [2 * self._samples, self._samples], axis=-1)
        return offset, self._weights(mask)

    def _of_all_taps(self, projection: Projection, per_tap: int):
        """Kernel and bias of a projection, with zeros for the tap that `remove_center` lacks."""
        arrays = (tf.convert_to_tensor(projection.kernel), tf.convert_to_tensor(projection.bias))
        if not self.remove_center:
            return arrays
        return tuple(self._with_middle(array, per_tap) for array in arrays)

    def _with_middle(self, array, per_tap: int):
        others = math.prod(self.kernel_size) - 1
        *rows, _ = array.shape
        taps = tf.reshape(array, [*rows, self.deform_groups, others, per_tap])
        before, after = tf.split(taps, 2, axis=-2)
        middle = tf.zeros([*rows, self.deform_groups, 1, per_tap], array.dtype)
        whole = tf.concat([before, middle, after], axis=-2)
        return tf.reshape(whole, [*rows, self._samples * per_tap])

    def _missing_mask(self, dtype: tf.DType) -> float:
        """What `_weights` makes a 0 of."""
        return 0.0

    def _weights(self, mask):
        """The weights of the samples, of what `mask_proj` computes."""
        return mask

    def call(self, inputs):
        self.compute_output_shape(tuple(inputs.shape))  # refuses images that are too small
        images = self._to_channels_last(inputs)
        values = tf.cast(images, self.compute_dtype)
        if self.input_proj is not None:
            values = self.input_proj(values)
        features = self._features(images)
        offset, mask = self._offset_and_mask(features)
        outputs = deform_aggregate2d(
            values,
            offset,
            mask,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding_in("channels_last"),
            dilations=self.dilation_rate,
            deform_groups=self.deform_groups,
        )
        if self.center_proj is not None:
            share = self._center_share(features, outputs)
            outputs = outputs * (1 - share) + self._at_centers(values) * share
        if self.output_proj is not None:
            outputs = self.output_proj(outputs)
        return self._from_channels_last(outputs)

    def _center_share(self, features, outputs):
        """How much of each channel comes from the pixel in the middle, from 0 to 1."""
        query = tf.cast(self._center_query(features, outputs), self._offset_dtype)
        share = tf.cast(tf.sigmoid(self.center_proj(query)), outputs.dtype)
        return tf.repeat(share, outputs.shape[-1] // self.deform_groups, axis=-1)

    def _center_query(self, features, outputs):
        raise NotImplementedError

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
            "deform_groups": self.deform_groups,
            "offset_scale": self.offset_scale,
            "dw_kernel_size": self.dw_kernel_size,
            "center_feature_scale": self.center_feature_scale,
            "remove_center": self.remove_center,
            "offset_trainable": self.offset_trainable,
        }


@keras.saving.register_keras_serializable(package="deform_conv")
class DeformableConv2DV3(_AggregationLayer):
    """Deformable convolution version 3: the module DCNv3 of InternImage.

    No filters: each output channel is a weighted sum of samples of one channel. A depthwise
    convolution, a layer normalization and an activation make features of the images. From these,
    linear maps compute, for each output position, deformable group and tap, an offset and a
    weight; a softmax over the taps of a group makes the weights add up to 1. Linear maps of the
    channels, `input_proj` and `output_proj`, come before and after:

        outputs = output_proj(deform_aggregate2d(input_proj(inputs), offset, mask))

    Offsets and masks start at zero, so that a new layer takes the mean of its window. They are
    computed in float32 in 16-bit layers too. `offset(inputs)` and `mask(inputs)` are what the layer
    samples with. Channels out are as many as channels in.

    Setting `trainable` sets it for the whole layer. `offset_trainable` is the flag of what computes
    offsets and masks alone: `dw_conv`, `dw_norm`, `offset_proj` and `mask_proj`.

    The offsets are computed at the pixel in the middle of each output position's window. At
    stride 1 with "same", that is every pixel, as in the published module.

    Source: Wang et al., InternImage, arXiv:2211.05778. `deform_conv.from_torch` takes the weights
    of the published module.

    Args:
      kernel_size: one number, or (h, w).
      strides: one number, or (h, w).
      padding: "same", "valid", or numbers of zeros as in `DeformableConv2D`; at most half of the
        dilated kernel.
      data_format: "channels_last" or "channels_first"; None for that of Keras's configuration.
      dilation_rate: one number, or (h, w).
      deform_groups: number of groups of consecutive channels with offsets and weights of their
        own; divides the number of channels.
      offset_scale: a number above 0. Scales the offsets, and the distances of the taps from the
        middle of the window.
      dw_kernel_size: the kernel size of the depthwise convolution, one number or (h, w); None for
        `kernel_size`.
      activation: what follows the layer normalization.
      center_feature_scale: whether the pixel in the middle of the window is mixed in, by a share
        that a sigmoid of a linear map of the features, `center_proj`, gives each group.
      remove_center: whether the tap in the middle of the kernel is left out; both numbers of
        `kernel_size` are odd then.
      offset_trainable: whether what computes offsets and masks is trained; None for the value of
        `trainable`.
      **kwargs: what every layer takes: `name`, `dtype`, `trainable`, `activity_regularizer`.

    Input shape:
      `[N, H, W, C]` for "channels_last", `[N, C, H, W]` for "channels_first"; H, W and N may be
      unknown.

    Output shape:
      `[N, OH, OW, C]` or `[N, C, OH, OW]`.

    Raises:
      ValueError: an argument or the shape of an input does not fit.

    Example:
      >>> layer = DeformableConv2DV3(deform_groups=4)
      >>> layer(keras.random.normal([8, 28, 28, 64])).shape
      TensorShape([8, 28, 28, 64])
    """

    def __init__(
        self,
        kernel_size=3,
        strides=1,
        padding="same",
        data_format=None,
        dilation_rate=1,
        *,
        dw_kernel_size=None,
        activation="gelu",
        **kwargs,
    ):
        self.activation = keras_object(activation, "activation")
        super().__init__(
            *(kernel_size, strides, padding, data_format, dilation_rate),
            dw_kernel_size=kernel_size if dw_kernel_size is None else dw_kernel_size,
            **kwargs,
        )

    def _add_parts(self):
        self.dw_norm = self._part(Normalization, "dw_norm", self._offset_dtype, epsilon=1e-6)
        self.input_proj = self._projection("input_proj")
        self.output_proj = self._projection("output_proj")

    @property
    def _offset_parts(self):
        return [*super()._offset_parts, self.dw_norm]

    def _features(self, images):
        features = self.dw_norm(super()._features(images))
        # The one of TensorFlow has a constant of float32 in float64 too.
        activation = _gelu if self.activation is keras.activations.gelu else self.activation
        return features if activation is None else activation(features)

    def _missing_mask(self, dtype):
        return dtype.min

    def _weights(self, mask):
        taps = tf.reshape(mask, [-1, math.prod(self.kernel_size)])
        return tf.reshape(tf.nn.softmax(taps), sizes(mask))

    def _center_query(self, features, outputs):
        return features

    def get_config(self):
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
        }


def _gelu(x):
    return 0.5 * x * (1 + tf.math.erf(tf.constant(math.sqrt(0.5), x.dtype) * x))


@keras.saving.register_keras_serializable(package="deform_conv")
class DeformableConv2DV4(_AggregationLayer):
    """Deformable convolution version 4: the module DCNv4 of FlashInternImage.

    As version 3, but the weights of the samples are what a linear map gives, without bounds: there
    is no softmax. Offsets and weights are computed from the images themselves, or, with
    `dw_kernel_size`, from a depthwise convolution of them:

        outputs = output_proj(deform_aggregate2d(input_proj(inputs), offset, mask))

    Offsets and weights start at zero, so a new layer computes the bias of `output_proj` alone.
    Weights get gradients in the first step, offsets from the second on. Offsets and weights are
    computed in float32 in 16-bit layers too. `offset(inputs)` and `mask(inputs)` are what the layer
    samples with. Channels out are as many as channels in.

    Setting `trainable` sets it for the whole layer. `offset_trainable` is the flag of what computes
    offsets and weights alone: `offset_proj`, `mask_proj` and `dw_conv`.

    Source: Xiong et al., Efficient Deformable ConvNets, arXiv:2401.06197. `deform_conv.from_torch`
    takes the weights of the published module.

    Args:
      kernel_size, strides, padding, data_format, dilation_rate, deform_groups, offset_scale,
        remove_center, offset_trainable: as in `DeformableConv2DV3`.
      dw_kernel_size: the kernel size of a depthwise convolution before the offsets, one number or
        (h, w); None for no convolution.
      center_feature_scale: whether the pixel in the middle of the window is mixed in, by a share
        that a sigmoid of a linear map of the aggregated values, `center_proj`, gives each group.
      output_bias: whether `output_proj` has a bias.
      without_pointwise: whether `input_proj` and `output_proj` are left out.
      **kwargs: what every layer takes: `name`, `dtype`, `trainable`, `activity_regularizer`.

    Input shape:
      `[N, H, W, C]` for "channels_last", `[N, C, H, W]` for "channels_first"; H, W and N may be
      unknown.

    Output shape:
      `[N, OH, OW, C]` or `[N, C, OH, OW]`.

    Raises:
      ValueError: an argument or the shape of an input does not fit.

    Example:
      >>> layer = DeformableConv2DV4(deform_groups=4)
      >>> layer(keras.random.normal([8, 28, 28, 64])).shape
      TensorShape([8, 28, 28, 64])
    """

    def __init__(
        self,
        kernel_size=3,
        strides=1,
        padding="same",
        data_format=None,
        dilation_rate=1,
        *,
        output_bias=True,
        without_pointwise=False,
        **kwargs,
    ):
        self.output_bias = boolean(output_bias, "output_bias")
        self.without_pointwise = boolean(without_pointwise, "without_pointwise")
        super().__init__(kernel_size, strides, padding, data_format, dilation_rate, **kwargs)

    def _add_parts(self):
        if not self.without_pointwise:
            self.input_proj = self._projection("input_proj")
            self.output_proj = self._projection("output_proj", self.output_bias)

    def _center_query(self, features, outputs):
        return outputs

    def get_config(self):
        return {
            **super().get_config(),
            "output_bias": self.output_bias,
            "without_pointwise": self.without_pointwise,
        }
