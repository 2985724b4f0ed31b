"""`from_torch`: gives a layer the weights of one in PyTorch, without PyTorch."""

from collections.abc import Sequence

import numpy as np

from ._arguments import shown
from ._layer_arguments import height_and_width, one_of, positive_integer
from ._torch_modules import load_module
from ._torch_source import Convolution, Source, check_padding
from .layers import DeformableConv2D, DeformableConv2DV3, DeformableConv2DV4

__all__ = ["from_torch"]

# What the parts of a module are called in code for PyTorch; "" is the module itself.
_KERNELS = ("", "deform_conv", "regular_conv", "dcn", "conv")
_OFFSETS = ("conv_offset_mask", "conv_offset", "offset_conv")
_MASKS = ("mask_conv", "modulator_conv", "conv_mask")
_DEFORM_GROUPS = ("deform_groups", "deformable_groups", "offset_groups")

_WHOSE = "one deformable convolution and, perhaps, of those of its offsets and masks"

_ORDERS = ("yxyx", "xyxy", "yyxx", "xxyy")


def from_torch(
    layer: DeformableConv2D | DeformableConv2DV3 | DeformableConv2DV4,
    source,
    *,
    offset_conv=None,
    mask_conv=None,
    prefix: str = "",
    offset_order: str = "yxyx",
) -> None:
    """Sets the weights of `layer` to those of a deformable convolution in PyTorch.

    The layer is built if it is not yet. PyTorch is not imported: modules and tensors are known by
    their methods. Tensors may be of any device and floating type. If anything does not fit, the
    layer stays as it is.

    Convolutions of offsets and masks are taken from `source` where they have one of their usual
    names there: `conv_offset_mask`, `conv_offset` or `offset_conv`, and `mask_conv`,
    `modulator_conv` or `conv_mask`. One that computes both has the mask in the last third of its
    output channels, as in mmcv and DCNv2, and its mask is a sigmoid, so that the layer must have
    `mask_scale=1`. One without a bias becomes one with a bias of zeros.

    A `DeformableConv2DV3` takes InternImage's module DCNv3, or its state dict, and a
    `DeformableConv2DV4` FlashInternImage's module DCNv4. The parameters have their names in the
    published code. The channels of offsets and masks are brought into the order of
    `deform_aggregate2d`. Of the arguments below, `source` and `prefix` are for these layers too.

    Args:
      layer: a `DeformableConv2D`, `DeformableConv2DV3` or `DeformableConv2DV4`.
      source: a module, such as `torchvision.ops.DeformConv2d` or mmcv's
        `ModulatedDeformConv2dPack`, whose stride, padding, dilation and groups are compared with
        those of the layer; or a state dict of tensors or arrays; or a pair (weight, bias), with
        None for no bias. Weights are `[O, I, H, W]`. In a module that is a block, the kernel may be
        that of its `deform_conv`, `regular_conv`, `dcn` or `conv`.
      offset_conv: the convolution that computes the offsets, in one of these three forms, if it is
        not in `source`.
      mask_conv: the same of the masks.
      prefix: where in `source` the layer is: the name of a submodule, as in "layer4.0.conv2".
      offset_order: what the output channels of the offsets' convolution move: "yxyx" for (dy, dx)
        by turns, as in torchvision and mmcv; "xyxy" for (dx, dy) by turns; "yyxx" or "xxyy" for
        all dy, or all dx, of all groups and taps first.

    Raises:
      ValueError: something is missing, unexpected, or of another shape; or the module has another
        stride, padding, dilation or number of groups than the layer.

    Example:
      >>> theirs = torchvision.ops.DeformConv2d(64, 128, 3, stride=2, padding=1)
      >>> offsets = torch.nn.Conv2d(64, 2 * 9, 3, stride=2, padding=1)
      >>> layer = DeformableConv2D(128, 3, strides=2, padding=1)
      >>> from_torch(layer, theirs, offset_conv=offsets)
    """
    if not isinstance(layer, DeformableConv2D | DeformableConv2DV3 | DeformableConv2DV4):
        raise ValueError(
            "layer must be a DeformableConv2D, DeformableConv2DV3 or DeformableConv2DV4. "
            f"Received: {shown(layer)}"
        )
    offset_order = one_of(offset_order, "offset_order", _ORDERS)
    source = Source(source, "source", prefix)
    if not isinstance(layer, DeformableConv2D):
        given = {"offset_conv": offset_conv, "mask_conv": mask_conv}
        for argument, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{argument} must be None for a {type(layer).__name__}: its module has all in "
                    f"it. Received: {shown(value)}"
                )
        if offset_order != _ORDERS[0]:
            raise ValueError(
                f"offset_order must be {_ORDERS[0]!r} for a {type(layer).__name__}: its module has "
                f"an order of its own. Received: {shown(offset_order)}"
            )
        load_module(layer, source)
        return
    convolution = source.convolution(_KERNELS)
    offsets = _found_or_given(source.take(_OFFSETS), "offset_conv", offset_conv)
    masks = _found_or_given(source.take(_MASKS), "mask_conv", mask_conv)
    source.check_all_taken(_WHOSE)

    group_channels = layer.kernel.shape[2] if layer.built else convolution.weight.shape[1]
    channels = group_channels * layer.groups
    _check(convolution, layer, (layer.filters, group_channels), layer.groups)
    if layer.use_bias != (convolution.bias is not None):
        raise ValueError(
            f"use_bias must be {not layer.use_bias}, since {convolution.name} has "
            f"{'no' if layer.use_bias else 'a'} bias. Received: {layer.use_bias}"
        )
    assignments = [(layer, convolution)]
    if layer.own_offsets:
        assignments += _of_offsets(layer, channels, offsets, masks, offset_order)
    elif part := offsets or masks:
        raise ValueError(
            f"own_offsets must be True for the layer to have {part.name}; a pair (weight, bias) as "
            "source has none. Received: False"
        )

    if not layer.built:
        last = layer.data_format == "channels_last"
        layer.build((None, None, None, channels) if last else (None, channels, None, None))
    for target, part in assignments:
        target.kernel.assign(part.weight.transpose(2, 3, 1, 0))
        if target.use_bias:
            target.bias.assign(np.zeros(target.filters) if part.bias is None else part.bias)


def _found_or_given(found: Convolution | None, argument: str, given) -> Convolution | None:
    """The convolution of the source, or the given one."""
    if given is None:
        return found
    if found is not None:
        raise ValueError(
            f"{argument} must be None, since there is {found.name}. Received: {shown(given)}"
        )
    source = Source(given, argument)
    part = source.convolution(("",))
    source.check_all_taken(_WHOSE)
    return part


def _of_offsets(layer, channels: int, offsets, masks, order: str) -> list:
    """The layer's convolutions of offsets and masks, and what each becomes."""
    if offsets is None:
        raise _missing("offset_conv", _OFFSETS)
    count = layer.offset_conv.filters
    both = masks is None and 2 * len(offsets.weight) == 3 * count
    _check(offsets, layer, (3 * count // 2 if both else count, channels))
    if both or masks is not None:
        if not layer.modulated:
            name = offsets.name if both else masks.name
            raise ValueError(
                f"modulated must be True, since {name} computes masks. Received: False"
            )
    elif layer.modulated:
        raise _missing("mask_conv", _MASKS)
    if both:
        if layer.mask_scale != 1:
            raise ValueError(
                f"mask_scale must be 1, since masks of {offsets.name} are a sigmoid: construct the "
                f"layer with mask_scale=1. Received: {layer.mask_scale}"
            )
        offsets, masks = offsets.rows(slice(count)), offsets.rows(slice(count, None))
    offsets = offsets.rows(_to_yxyx(count, order))
    if masks is None:
        return [(layer.offset_conv, offsets)]
    _check(masks, layer, (count // 2, channels))
    return [(layer.offset_conv, offsets), (layer.mask_conv, masks)]


def _missing(argument: str, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{argument} must be given, since source has none of {', '.join(names)}: a module, a state "
        "dict or a pair (weight, bias); or the layer be one with own_offsets=False, which is "
        "called with offsets. Received: None"
    )


def _to_yxyx(count: int, order: str) -> np.ndarray:
    """The index, in `order`, of each of `count` channels that are in the order of the layer."""
    index = np.arange(count)
    by_turns = order in ("yxyx", "xyxy")
    pairs = index.reshape(-1, 2) if by_turns else index.reshape(2, -1).T
    return (pairs if order.startswith("y") else pairs[:, ::-1]).ravel()


def _check(part: Convolution, layer, channels: tuple[int, int], groups: int = 1) -> None:
    """Raises unless `part` has these numbers of channels, (O, I), and fits the layer else."""
    shape = (*channels, *layer.kernel_size)
    if part.weight.shape != shape or (part.bias is not None and len(part.bias) != channels[0]):
        hwio = (*layer.kernel_size, channels[1], channels[0])
        raise ValueError(
            f"{part.name} must have a weight [O, I, H, W] (OIHW) of shape {shape}, for the layer's "
            f"kernel [H, W, I, O] (HWIO) of shape {hwio}, and a bias of {channels[0]} numbers. "
            f"Received: shapes {part.weight.shape} and "
            f"{None if part.bias is None else part.bias.shape}"
        )
    for argument, names, ours, converted in (
        ("strides", ("stride",), layer.strides, height_and_width),
        ("dilation_rate", ("dilation",), layer.dilation_rate, height_and_width),
        ("groups", ("groups",), groups, positive_integer),
        ("deform_groups", _DEFORM_GROUPS, layer.deform_groups, positive_integer),
    ):
        for name in names:
            theirs = getattr(part.module, name, None)
            if theirs is not None and converted(theirs, argument) != ours:
                raise ValueError(
                    f"{argument} must be {theirs}, the {name} of {part.name}. Received: {ours}"
                )
    for name, common in (("padding_mode", "zeros"), ("transposed", False)):
        theirs = getattr(part.module, name, common)
        if theirs != common:
            raise ValueError(f"{part.name} must have {name}={common!r}. Received: {theirs!r}")
    check_padding(part.name, getattr(part.module, "padding", None), layer)
