"""The weights of the published modules of versions 3 and 4, for the layers of this library.

Their parameters are those of OpenGVLab's InternImage (`ops_dcnv3/modules/dcnv3.py`) and DCNv4
(`DCNv4_op/DCNv4/modules/dcnv4.py`).
"""

import math

import keras
import numpy as np

from ._aggregation_layers import DeformableConv2DV3, DeformableConv2DV4
from ._arguments import shown
from ._dcnv3 import from_dcnv3_offset
from ._layer_arguments import height_and_width, positive_integer, positive_number
from ._torch_source import Source, check_padding

# Arguments of the layers, the attributes of the modules, and how these become those.
_ATTRIBUTES = (
    ("kernel_size", "kernel_size", height_and_width),
    ("strides", "stride", height_and_width),
    ("dilation_rate", "dilation", height_and_width),
    ("deform_groups", "group", positive_integer),
    ("offset_scale", "offset_scale", positive_number),
    ("remove_center", "remove_center", lambda value, _: bool(value)),
    ("dw_kernel_size", "dw_kernel_size", height_and_width),
)
_ACTIVATIONS = ("gelu", "relu", "silu")


def load_module(layer: DeformableConv2DV3 | DeformableConv2DV4, source: Source) -> None:
    """Sets the weights of `layer` to those of the published module in `source`.

    The layer is built if it is not yet. If anything does not fit, it stays as it is.

    Raises:
      ValueError: a parameter is missing, unexpected, or of another shape; or the module has other
        attributes than the layer.
    """
    _check_attributes(layer, source)
    _check_options(layer, source)
    read = _of_version_3 if isinstance(layer, DeformableConv2DV3) else _of_version_4
    channels, weights = read(layer, source)
    source.check_all_taken(f"the module of a {type(layer).__name__}")
    if not layer.built:
        last = layer.data_format == "channels_last"
        layer.build((None, None, None, channels) if last else (None, channels, None, None))
    for part, arrays in weights.items():
        for name, array in arrays.items():
            getattr(getattr(layer, part), name).assign(array)


def _check_attributes(layer, source: Source) -> None:
    """Compares the layer with the module, if it is one and not a state dict."""
    for argument, name, converted in _ATTRIBUTES:
        theirs = getattr(source.module, name, None)
        if theirs is not None and converted(theirs, argument) != getattr(layer, argument):
            raise ValueError(
                f"{argument} must be {shown(theirs)}, the {name} of {source.name}. "
                f"Received: {shown(getattr(layer, argument))}"
            )
    check_padding(source.name, getattr(source.module, "pad", None), layer)
    if isinstance(layer, DeformableConv2DV3):
        _check_activation(layer, source)


def _check_activation(layer, source: Source) -> None:
    """Compares activations that are known by their class: the third of the parts of `dw_conv`."""
    parts = list(getattr(source.module, "dw_conv", ()))
    theirs = type(parts[2]).__name__.lower() if len(parts) == 3 else None
    if theirs in _ACTIVATIONS and layer.activation is not keras.activations.get(theirs):
        raise ValueError(
            f"activation must be {theirs!r}, that of {source.name}. "
            f"Received: {shown(layer.activation)}"
        )


def _check_options(layer, source: Source) -> None:
    """Compares what the layer has with what the parameters tell."""
    options = [("center_feature_scale", "center_feature_scale_proj_weight", True)]
    if isinstance(layer, DeformableConv2DV4):
        options.append(("without_pointwise", "value_proj.weight", False))
        if not layer.without_pointwise:
            options.append(("output_bias", "output_proj.bias", True))
        has_convolution = source.has("offset_mask_dw.weight")
        if has_convolution != (layer.dw_kernel_size is not None):
            raise ValueError(
                f"dw_kernel_size must be {'a size' if has_convolution else 'None'}, since "
                f"{source.name} has {'the' if has_convolution else 'no'} key "
                f"offset_mask_dw.weight. Received: {layer.dw_kernel_size}"
            )
    elif source.has("dw_conv.1.0.running_mean"):
        raise ValueError(
            f"{source.name} must have a layer normalization, dw_conv.1.1, as the layer has. "
            "Received: a batch normalization, dw_conv.1.0"
        )
    for argument, key, means in options:
        expected = means if source.has(key) else not means
        if getattr(layer, argument) != expected:
            raise ValueError(
                f"{argument} must be {expected}, since {source.name} has "
                f"{'the' if source.has(key) else 'no'} key {key}. "
                f"Received: {getattr(layer, argument)}"
            )


def _of_version_3(layer, source: Source) -> tuple[int, dict]:
    """The number of channels, and the weights for each part of the layer."""
    offset_rows, mask_rows = _orders(layer)
    weight = source.array("offset.weight", (len(offset_rows), _channels_of(layer)))
    channels = weight.shape[1]
    bias = source.array("offset.bias", (len(offset_rows),))
    mask = _linear(source, "mask", len(mask_rows), channels)
    return channels, {
        "dw_conv": _depthwise(source, "dw_conv.0", layer.dw_kernel_size, channels),
        "dw_norm": {
            "gamma": source.array("dw_conv.1.1.weight", (channels,)),
            "beta": source.array("dw_conv.1.1.bias", (channels,)),
        },
        "offset_proj": {"kernel": weight[offset_rows].T, "bias": bias[offset_rows]},
        "mask_proj": {"kernel": mask["kernel"][:, mask_rows], "bias": mask["bias"][mask_rows]},
        "input_proj": _linear(source, "input_proj", channels, channels),
        "output_proj": _linear(source, "output_proj", channels, channels),
        **_center(layer, source, channels),
    }


def _of_version_4(layer, source: Source) -> tuple[int, dict]:
    """The number of channels, and the weights for each part of the layer.

    `offset_mask` computes all: for each group the offsets of its taps, then their weights. Rows
    that fill their number up to a multiple of 8 follow, which nothing reads.
    """
    offset_rows, mask_rows = _orders(layer)
    offset_rows, mask_rows = _packed(layer, offset_rows, mask_rows)
    rows = 8 * math.ceil((len(offset_rows) + len(mask_rows)) / 8)
    weight = source.array("offset_mask.weight", (rows, _channels_of(layer)))
    channels = weight.shape[1]
    bias = source.array("offset_mask.bias", (rows,))
    weights = {
        "offset_proj": {"kernel": weight[offset_rows].T, "bias": bias[offset_rows]},
        "mask_proj": {"kernel": weight[mask_rows].T, "bias": bias[mask_rows]},
        **_center(layer, source, channels),
    }
    if layer.dw_kernel_size is not None:
        weights["dw_conv"] = _depthwise(source, "offset_mask_dw", layer.dw_kernel_size, channels)
    if not layer.without_pointwise:
        weights["input_proj"] = _linear(source, "value_proj", channels, channels)
        weights["output_proj"] = _linear(
            source, "output_proj", channels, channels, layer.output_bias
        )
    return channels, weights


def _channels_of(layer) -> int | None:
    """The number of channels that the layer is built for; None before."""
    axis = -1 if layer.data_format == "channels_last" else 1
    return layer.input_spec[0].axes[axis]


def _orders(layer) -> tuple[np.ndarray, np.ndarray]:
    """Which of their channels each channel of the layer's offsets, and of its masks, is."""
    groups = layer.deform_groups
    count = groups * (math.prod(layer.kernel_size) - layer.remove_center)
    # From 1 on: what is put in for the missing tap is 0 or below.
    offset, mask = from_dcnv3_offset(
        *(np.arange(1.0, 1 + channels).reshape(1, 1, 1, -1) for channels in (2 * count, count)),
        layer.kernel_size,
        groups=groups,
        remove_center=layer.remove_center,
    )
    orders = (np.asarray(each).ravel() for each in (offset, mask))
    return tuple(order[order > 0].astype(int) - 1 for order in orders)


def _packed(layer, offset_rows, mask_rows) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `offset_mask` for those of separate offsets and masks."""
    taps = math.prod(layer.kernel_size) - layer.remove_center
    offset_group, offset_index = np.divmod(offset_rows, 2 * taps)
    mask_group, mask_index = np.divmod(mask_rows, taps)
    return (
        3 * taps * offset_group + offset_index,
        3 * taps * mask_group + 2 * taps + mask_index,
    )


def _linear(source: Source, key: str, units: int, channels: int, use_bias: bool = True) -> dict:
    arrays = {"kernel": source.array(f"{key}.weight", (units, channels)).T}
    return arrays | ({"bias": source.array(f"{key}.bias", (units,))} if use_bias else {})


def _depthwise(source: Source, key: str, kernel_size: tuple[int, int], channels: int) -> dict:
    kernel = source.array(f"{key}.weight", (channels, 1, *kernel_size))
    return {
        "kernel": kernel.transpose(2, 3, 1, 0),
        "bias": source.array(f"{key}.bias", (channels,)),
    }


def _center(layer, source: Source, channels: int) -> dict:
    if not layer.center_feature_scale:
        return {}
    key, groups = "center_feature_scale_proj", layer.deform_groups
    return {
        "center_proj": {
            "kernel": source.array(f"{key}_weight", (groups, channels)).T,
            "bias": source.array(f"{key}_bias", (groups,)),
        }
    }
