"""Deformable convolution as Keras layers: of versions 1 and 2, and the modules of 3 and 4."""

import keras

from ._aggregation_layers import DeformableConv2DV3, DeformableConv2DV4
from ._deformable_layer import DeformableConvolution
from ._extended_convolution import ExtendedConv1D, ExtendedConv2D

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"deform_conv.layers needs Keras on TensorFlow; its backend is {keras.backend.backend()}. "
        "Set KERAS_BACKEND=tensorflow before Keras is imported"
    )

__all__ = ["DeformableConv1D", "DeformableConv2D", "DeformableConv2DV3", "DeformableConv2DV4"]


@keras.saving.register_keras_serializable(package="deform_conv")
class DeformableConv2D(DeformableConvolution, ExtendedConv2D):
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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    # The defaults that Conv2D shows.
    __init__.__signature__ = DeformableConvolution.signature_with(
        strides=(1, 1), dilation_rate=(1, 1)
    )


@keras.saving.register_keras_serializable(package="deform_conv")
class DeformableConv1D(DeformableConvolution, ExtendedConv1D):
    """1D deformable convolution layer.

    A `keras.layers.Conv1D` that samples its input where an offset, in steps, moves each sample
    along the length: one number per output step, kernel tap and deformable group. It is
    `DeformableConv2D` in one dimension, and has all that is written there: `offset_conv`, which
    starts at zero, `modulated` and `mask_conv`, `own_offsets=False` with `[inputs, offset]` or
    `[inputs, offset, mask]`, `offset(inputs)` and `mask(inputs)`, `offset_trainable`, and offsets
    and masks in float32 at least.

    With padding "causal", an output depends on the inputs up to its own step alone, as in
    `Conv1D`: an offset that would move a sample past that step, given or the layer's own, is held
    there, and has no gradient while it is. `offset(inputs)` returns what is held.

    Args:
      filters, kernel_size, strides, data_format, dilation_rate, groups, activation, use_bias,
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer,
        activity_regularizer, kernel_constraint, bias_constraint: as in `Conv1D`; activation,
        regularizers and constraints are not those of `offset_conv` and `mask_conv`. Strides and
        dilation may both be above 1.
      padding: "valid", "same" or "causal", as in `Conv1D`; or numbers of zeros, at least 0: one for
        both sides, or (left, right).
      deform_groups, modulated, mask_scale, offset_kernel_initializer, offset_trainable,
        own_offsets: as in `DeformableConv2D`.
      **kwargs: what every layer takes: `name`, `dtype`, `trainable`.

    Input shape:
      inputs: `[N, L, C]` for "channels_last", `[N, C, L]` for "channels_first"; L and N may be
        unknown.
      offset: `[N, OL, deform_groups * K]` or `[N, deform_groups * K, OL]`, in the order of
        `deform_conv1d`.
      mask: as offset.

    Output shape:
      `[N, OL, filters]` or `[N, filters, OL]`, as `Conv1D` gives.

    Raises:
      ValueError: an argument or the shape of an input does not fit.

    Example:
      >>> layer = DeformableConv1D(16, 5, padding="causal")
      >>> layer(keras.random.normal([8, 100, 3])).shape
      TensorShape([8, 100, 16])
    """

    __init__ = DeformableConvolution.__init__  # or Python 3.10 would not show its arguments
