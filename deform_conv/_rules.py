"""What the op requires of its attributes and shapes, where the op itself does not say it.

That is in portable mode, where there is no op, in one dimension, where the op is called with
images of one row, and of depthwise filters. The rules and their messages are those of
src/core/params{,3d}.cc and src/tf/op_attributes.h.
"""

import math

import tensorflow as tf

from ._arguments import AXES, MAX_EXTENT, rank_of
from ._reference import sizes


def checked(tensors: dict[str, tf.Tensor], **attributes):
    """Checks tensors and attributes as the op does.

    Sizes that are known at run time only are checked then, but not in LiteRT, which has no
    assertions.

    Args:
      tensors: input, filters, offset and, if there is one, mask, by these names; or input, offset
        and weights.
      **attributes: the op's attributes, for images of any rank that `data_format` has.

    Returns:
      A list of the tensors, of known ranks, and the shape of the output.
    """
    rank = rank_of(attributes["data_format"])
    rules = Rules(rank)
    tensors = {name: rules.ranked(name, tensor) for name, tensor in tensors.items()}
    output_shape = rules.check(tensors, **attributes)
    with tf.control_dependencies(rules.assertions):
        return [tf.identity(tensor) for tensor in tensors.values()], output_shape


class Rules:
    """Checks what is known. `assertions` check the rest, when the graph runs.

    Sizes that are unknown while a graph is made are tensors here.
    """

    def __init__(self, rank: int):
        self.assertions = []
        self._rank = rank
        self._axes = AXES[rank]
        *others, last = self._axes
        self._extent = f"{', '.join(others)} and {last}" if others else last

    def ranked(self, argument: str, tensor: tf.Tensor) -> tf.Tensor:
        """`tensor`; one of unknown rank as one whose rank is checked when the graph runs."""
        if tensor.shape.rank is not None:
            return tensor
        # Not an assertion: TensorFlow reads sizes of what is behind it without waiting for it.
        return tf.ensure_shape(tensor, [None] * (self._rank + 2), argument)

    def check(
        self,
        tensors: dict[str, tf.Tensor],
        *,
        strides,
        padding,
        dilations,
        deform_groups,
        data_format,
        explicit_paddings=(),
        kernel_size=None,
    ) -> list[int | None]:
        """Checks everything, and returns the shape of the output.

        `kernel_size` has the kernel's sizes where there are no filters.
        """
        # tf.nn.conv1d has a stride where tf.nn.conv2d has strides.
        strides = self._per_axis("stride" if self._rank == 1 else "strides", strides, data_format)
        dilations = self._per_axis("dilations", dilations, data_format)
        pads = self._pads(padding, explicit_paddings, data_format)
        self._check_range("deform_groups", 1, [deform_groups], deform_groups)
        if kernel_size is not None:
            self._check_range("kernel_size", 1, kernel_size, tuple(kernel_size))
        shapes = {
            name: self._native_shape(name, tensor, "C" if name == "filters" else data_format)
            for name, tensor in tensors.items()
        }
        batch, *in_sizes, channels = shapes["input"]
        if kernel_size is None:
            kernel_argument = "filters"
            *kernel, group_channels, out_channels = shapes["filters"]
            self._check_filters(kernel, group_channels, out_channels)
        else:
            kernel_argument, kernel, out_channels = "kernel_size", kernel_size, channels
        self._check_channels(channels, deform_groups)
        if kernel_size is None:
            self._check_groups(channels, group_channels, out_channels)
        axes = zip(self._axes, in_sizes, kernel, strides, dilations, pads, strict=True)
        output = [batch, *(self._out_size(*axis, kernel_argument) for axis in axes)]
        for name in ("offset", "mask", "weights"):
            if name in shapes:
                factor = self._rank if name == "offset" else 1
                *place, found = shapes[name]
                self._check_place(name, place, output)
                expected = factor * deform_groups * math.prod(kernel)
                self._require(
                    _equal(found, expected),
                    *(name, f" {_has(name)} ", found, " channels; "),
                    f"{factor} * deform_groups * " if factor > 1 else "deform_groups * ",
                    *(*_between(" * ", kernel), " = ", expected, " expected"),
                )
                # What the input does not tell, the offset may.
                output = [
                    size if _is_tensor(other) else other
                    for size, other in zip(output, place, strict=True)
                ]
        batch, *out_sizes, out_channels = (
            None if _is_tensor(size) else size for size in (*output, out_channels)
        )
        if data_format.endswith("C"):
            return [batch, *out_sizes, out_channels]
        return [batch, out_channels, *out_sizes]

    def check_depthwise(self, input, filters, data_format) -> list:
        """Checks that depthwise filters fit the input's channels; returns their sizes."""
        *_, channels = self._native_shape("input", input, data_format)
        *kernel, filter_channels, multiplier = self._native_shape("filters", filters, "C")
        self._require(
            _equal(filter_channels, channels),
            *("filters have ", filter_channels, " channels in [KH, KW, C, M]; the input's "),
            *(channels, " expected"),
        )
        channels = filter_channels if _is_tensor(channels) else channels
        return [*kernel, channels, multiplier]

    def _require(self, holds, *message) -> None:
        """Raises, or has the graph raise, where a rule does not hold."""
        if _is_tensor(holds):
            self.assertions.append(tf.debugging.Assert(holds, list(message)))
        elif not holds:
            text = "".join("?" if _is_tensor(part) else str(part) for part in message)
            if tf.executing_eagerly():
                raise tf.errors.InvalidArgumentError(None, None, text)
            raise ValueError(text)

    def _check_range(self, argument, least, values, received) -> None:
        self._require(
            all(least <= value <= MAX_EXTENT for value in values),
            f"{argument} must be from {least} to {MAX_EXTENT}; received {received}",
        )

    def _per_axis(self, argument, values, data_format) -> list[int]:
        batch, *axes, channels = _native(values, data_format)
        self._require(
            batch == channels == 1,
            f"{argument} must be {self._rank + 2} numbers, 1 for batch and channels; received "
            f"{values}",
        )
        self._check_range(argument, 1, axes, tuple(axes) if len(axes) > 1 else axes[0])
        return axes

    def _pads(self, padding, explicit, data_format) -> list[tuple[int, int] | None]:
        """Padding before and after, of each axis; None for "SAME"."""
        if padding != "EXPLICIT":
            return [None if padding == "SAME" else (0, 0)] * self._rank
        pairs = zip(explicit[::2], explicit[1::2], strict=True)
        batch, *axes, channels = _native(list(pairs), data_format)
        self._require(
            batch == channels == (0, 0),
            f"padding must be {self._rank + 2} pairs of numbers, 0 for batch and channels; "
            f"received {explicit}",
        )
        for number in (number for pair in axes for number in pair):
            self._check_range("padding", 0, [number], number)
        return axes

    def _native_shape(self, argument, tensor, data_format) -> list:
        expected = self._rank + 2
        self._require(
            tensor.shape.rank == expected,
            f"{argument} must have rank {expected}; received shape {tensor.shape.as_list()}",
        )
        return _native(sizes(tensor), data_format)

    def _check_filters(self, kernel, group_channels, out_channels) -> None:
        for size in kernel:
            self._require(
                size > 0,
                f"filters must have a {self._extent} from 1 to {MAX_EXTENT}; received ",
                *_between("x", kernel),
            )
        for size in (group_channels, out_channels):
            self._require(
                size > 0,
                "filters must have at least 1 input and 1 output channel; received ",
                *(group_channels, " and ", out_channels),
            )

    def _check_channels(self, channels, deform_groups) -> None:
        self._require(channels > 0, "input must have at least 1 channel; received 0")
        self._require(
            _equal(channels % deform_groups, 0),
            *("deform_groups must divide the input's ", channels, " channels; received "),
            deform_groups,
        )

    def _check_groups(self, channels, group_channels, out_channels) -> None:
        # A division by 0 would have a message of its own.
        with tf.control_dependencies(self.assertions):
            self._require(
                _equal(channels % group_channels, 0),
                *("filters have ", group_channels, " input channels; a divisor of the input's "),
                *(channels, " channels expected"),
            )
        with tf.control_dependencies(self.assertions):
            groups = channels // group_channels
            self._require(
                _equal(out_channels % groups, 0),
                *("filters have ", out_channels, " output channels; a multiple of the ", groups),
                *(" groups (", channels, " / ", group_channels, " channels) expected"),
            )

    def _out_size(self, axis, size, kernel, stride, dilation, pads, kernel_argument):
        """The output's size along an axis."""
        extent = (kernel - 1) * dilation + 1
        self._check_extent(extent, f"{kernel_argument} and dilations: dilated kernel {axis}")
        if pads is None:
            out = -(-size // stride)
            self._check_extent((out - 1) * stride + extent, f"padding: padded input {axis}")
            return out
        padded = size + sum(pads)
        self._check_extent(padded, f"padding: padded input {axis}")
        # As in tf.nn.conv2d, an input short of the kernel by less than a stride gives 0.
        self._require(
            padded + stride >= extent,
            *("input has ", axis, " ", padded, " with its padding; at least ", extent - stride),
            *(" expected for the dilated kernel's ", axis, ", ", extent),
        )
        return (padded + stride - extent) // stride

    def _check_extent(self, extent, name) -> None:
        # A tensor of 32 bits is no more.
        self._require(
            True if _is_tensor(extent) else extent <= MAX_EXTENT, f"{name} {extent} is too large"
        )

    def _check_place(self, argument, place, output) -> None:
        """Checks the batch size and the sizes along the axes of offset or mask."""
        batch, *found = place
        expected_batch, *out = output
        those = "those" if self._rank > 1 else "that"
        self._require(
            _equal(batch, expected_batch),
            *(argument, f" {_has(argument)} batch size ", batch, "; that of input, "),
            *(expected_batch, ", expected"),
        )
        for size, expected in zip(found, out, strict=True):
            self._require(
                _equal(size, expected),
                *(argument, f" {_has(argument)} {self._extent} ", *_between("x", found)),
                *(f"; {those} of the output, ", *_between("x", out), ", expected"),
            )


def _has(argument: str) -> str:
    return "have" if argument == "weights" else "has"


def _is_tensor(size) -> bool:
    return isinstance(size, tf.Tensor)  # tf.is_tensor takes as long as an op


def _native(values, data_format) -> list:
    """Values of all dimensions, with that of the channels last."""
    if data_format.endswith("C"):
        return list(values)
    batch, channels, *axes = values
    return [batch, *axes, channels]


def _between(separator: str, values) -> list:
    """The values, and separators between them."""
    first, *others = values
    return [first, *(part for value in others for part in (separator, value))]


def _equal(size, other):
    # In graphs of version 1, == compares tensors as objects.
    return tf.equal(size, other) if _is_tensor(size) or _is_tensor(other) else size == other
