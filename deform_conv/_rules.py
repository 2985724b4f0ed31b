"""What the op requires of its attributes and shapes, for portable mode, where there is no op.

The rules and their messages are those of src/core/params{,3d}.cc and src/tf/op_attributes{,3d}.h.
"""

import itertools
import math

import tensorflow as tf

from ._arguments import MAX_EXTENT
from ._reference import native_axes, sizes

AXIS_NAMES = {"D": "depth", "H": "height", "W": "width"}


class Rules:
    """Checks what is known. `assertions` check the rest, when the graph runs.

    Sizes that are unknown while a graph is made are tensors here.
    """

    def __init__(self):
        self.assertions = []

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
    ) -> list[int | None]:
        """Checks everything, and returns the shape of the output."""
        names = [AXIS_NAMES[axis] for axis in data_format if axis in AXIS_NAMES]
        axes = len(names)
        self._names = f"{', '.join(names[:-1])} and {names[-1]}"
        strides = self._spatial("strides", strides, data_format)
        dilations = self._spatial("dilations", dilations, data_format)
        pads = self._pads(padding, explicit_paddings, data_format)
        self._check_range("deform_groups", 1, [deform_groups], deform_groups)
        shapes = {
            name: self._native_shape(name, tensor, data_format) for name, tensor in tensors.items()
        }
        batch, *in_size, channels = shapes["input"]
        *kernel, group_channels, out_channels = shapes["filters"]
        for size in kernel:
            self._require(
                size > 0,
                f"filters must have a {self._names} from 1 to {MAX_EXTENT}; received ",
                *_joined(kernel, "x"),
            )
        self._check_channels(channels, group_channels, out_channels, deform_groups)
        output = [
            batch,
            *map(self._out_size, names, in_size, kernel, strides, dilations, pads),
        ]
        for name in ("offset", "mask"):
            if name in shapes:
                rule, factor = (f"{axes} * ", axes) if name == "offset" else ("", 1)
                *place, found = shapes[name]
                self._check_place(name, place, output)
                expected = factor * deform_groups * math.prod(kernel)
                self._require(
                    _equal(found, expected),
                    *(name, " has ", found, " channels; ", rule, "deform_groups * "),
                    *(*_joined(kernel, " * "), " = ", expected, " expected"),
                )
                # What the input does not tell, the offset may.
                output = [
                    size if tf.is_tensor(other) else other
                    for size, other in zip(output, place, strict=True)
                ]
        shape = [None if tf.is_tensor(size) else size for size in (*output, out_channels)]
        native = native_axes(data_format)
        return [shape[native.index(axis)] for axis in range(len(native))]

    def _require(self, holds, *message) -> None:
        """Raises, or has the graph raise, where a rule does not hold."""
        if tf.is_tensor(holds):
            self.assertions.append(tf.debugging.Assert(holds, list(message)))
        elif not holds:
            text = "".join("?" if tf.is_tensor(part) else str(part) for part in message)
            if tf.executing_eagerly():
                raise tf.errors.InvalidArgumentError(None, None, text)
            raise ValueError(text)

    def _check_range(self, argument, least, values, received) -> None:
        self._require(
            all(least <= value <= MAX_EXTENT for value in values),
            f"{argument} must be from {least} to {MAX_EXTENT}; received {received}",
        )

    def _spatial(self, argument, values, data_format) -> tuple[int, ...]:
        batch, *spatial, channels = _native(values, data_format)
        self._require(
            batch == channels == 1,
            f"{argument} must be {len(data_format)} numbers, 1 for batch and channels; received "
            f"{values}",
        )
        self._check_range(argument, 1, spatial, tuple(spatial))
        return tuple(spatial)

    def _pads(self, padding, explicit, data_format) -> list[tuple[int, int] | None]:
        """Padding before and after, of each spatial axis; None for "SAME"."""
        if padding != "EXPLICIT":
            return [None if padding == "SAME" else (0, 0)] * (len(data_format) - 2)
        pairs = zip(explicit[::2], explicit[1::2], strict=True)
        batch, *spatial, channels = _native(list(pairs), data_format)
        self._require(
            batch == channels == (0, 0),
            f"padding must be {len(data_format)} pairs of numbers, 0 for batch and channels; "
            f"received {explicit}",
        )
        for number in itertools.chain(*spatial):
            self._check_range("padding", 0, [number], number)
        return spatial

    def _native_shape(self, argument, tensor, data_format) -> list:
        rank = len(data_format)
        self._require(
            tensor.shape.rank == rank,
            f"{argument} must have rank {rank}; received shape {tensor.shape.as_list()}",
        )
        return sizes(tensor) if argument == "filters" else _native(sizes(tensor), data_format)

    def _check_channels(self, channels, group_channels, out_channels, deform_groups) -> None:
        for size in (group_channels, out_channels):
            self._require(
                size > 0,
                "filters must have at least 1 input and 1 output channel; received ",
                *(group_channels, " and ", out_channels),
            )
        self._require(channels > 0, "input must have at least 1 channel; received 0")
        self._require(
            _equal(channels % deform_groups, 0),
            *("deform_groups must divide the input's ", channels, " channels; received "),
            deform_groups,
        )
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

    def _out_size(self, axis, size, kernel, stride, dilation, pads):
        """The output's size along an axis."""
        extent = (kernel - 1) * dilation + 1
        self._check_extent(extent, f"filters and dilations: dilated kernel {axis}")
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
            True if tf.is_tensor(extent) else extent <= MAX_EXTENT, f"{name} {extent} is too large"
        )

    def _check_place(self, argument, place, output) -> None:
        """Checks the batch size and the spatial sizes of offset or mask."""
        batch, *found = place
        expected_batch, *out = output
        self._require(
            _equal(batch, expected_batch),
            *(argument, " has batch size ", batch, "; that of input, ", expected_batch),
            ", expected",
        )
        for size, expected in zip(found, out, strict=True):
            self._require(
                _equal(size, expected),
                *(argument, f" has {self._names} ", *_joined(found, "x")),
                *("; those of the output, ", *_joined(out, "x"), ", expected"),
            )


def _native(values, data_format) -> list:
    """Values in the order batch, spatial axes, channels."""
    return [values[axis] for axis in native_axes(data_format)]


def _joined(parts, separator) -> list:
    """`parts` with `separator` between them."""
    return [item for part in parts for item in (separator, part)][1:]


def _equal(size, other):
    # In graphs of version 1, == compares tensors as objects.
    return tf.equal(size, other) if tf.is_tensor(size) or tf.is_tensor(other) else size == other
