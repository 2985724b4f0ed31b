"""What the op requires of its attributes and shapes, for portable mode, where there is no op.

The rules and their messages are those of src/core/params.cc and src/tf/op_attributes.h.
"""

import tensorflow as tf

from ._arguments import MAX_EXTENT
from ._reference import sizes


def of_known_rank(argument: str, tensor: tf.Tensor) -> tf.Tensor:
    """`tensor`, whose rank is checked when the graph runs where nothing is known of it."""
    return tf.ensure_shape(tensor, [None] * 4, argument) if tensor.shape.rank is None else tensor


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
        kernel_size=None,
    ) -> list[int | None]:
        """Checks everything, and returns the shape of the output.

        `kernel_size` is (h, w) where there are no filters.
        """
        strides = self._height_and_width("strides", strides, data_format)
        dilations = self._height_and_width("dilations", dilations, data_format)
        pads = self._pads(padding, explicit_paddings, data_format)
        self._check_range("deform_groups", 1, [deform_groups], deform_groups)
        if kernel_size is not None:
            self._check_range("kernel_size", 1, kernel_size, tuple(kernel_size))
        shapes = {
            name: self._native_shape(name, tensor, "NHWC" if name == "filters" else data_format)
            for name, tensor in tensors.items()
        }
        batch, in_h, in_w, channels = shapes["input"]
        if kernel_size is None:
            kernel_argument = "filters"
            kernel_h, kernel_w, group_channels, out_channels = shapes["filters"]
            self._check_filters(kernel_h, kernel_w, group_channels, out_channels)
        else:
            kernel_argument = "kernel_size"
            (kernel_h, kernel_w), group_channels, out_channels = kernel_size, 1, channels
        self._check_channels(channels, deform_groups)
        if kernel_size is None:
            self._check_groups(channels, group_channels, out_channels)
        output = [
            batch,
            self._out_size(
                "height", in_h, kernel_h, strides[0], dilations[0], pads[0], kernel_argument
            ),
            self._out_size(
                "width", in_w, kernel_w, strides[1], dilations[1], pads[1], kernel_argument
            ),
        ]
        for name in ("offset", "mask", "weights"):
            if name in shapes:
                rule, factor = ("2 * ", 2) if name == "offset" else ("", 1)
                *place, found = shapes[name]
                self._check_place(name, place, output)
                expected = factor * deform_groups * kernel_h * kernel_w
                self._require(
                    _equal(found, expected),
                    *(name, f" {_has(name)} ", found, " channels; ", rule, "deform_groups * "),
                    *(kernel_h, " * ", kernel_w, " = ", expected, " expected"),
                )
                # What the input does not tell, the offset may.
                output = [
                    size if tf.is_tensor(other) else other
                    for size, other in zip(output, place, strict=True)
                ]
        shape = [None if tf.is_tensor(size) else size for size in (*output, out_channels)]
        return shape if data_format == "NHWC" else [shape[axis] for axis in (0, 3, 1, 2)]

    def check_depthwise(self, input, filters, data_format) -> list:
        """Checks that depthwise filters fit the input's channels; returns their sizes."""
        input, filters = of_known_rank("input", input), of_known_rank("filters", filters)
        *_, channels = self._native_shape("input", input, data_format)
        kernel_h, kernel_w, filter_channels, multiplier = self._native_shape(
            "filters", filters, "NHWC"
        )
        self._require(
            _equal(filter_channels, channels),
            *("filters have ", filter_channels, " channels in [KH, KW, C, M]; the input's "),
            *(channels, " expected"),
        )
        channels = filter_channels if tf.is_tensor(channels) else channels
        return [kernel_h, kernel_w, channels, multiplier]

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

    def _height_and_width(self, argument, values, data_format) -> tuple[int, int]:
        batch, h, w, channels = _native(values, data_format)
        self._require(
            batch == channels == 1,
            f"{argument} must be 4 numbers, 1 for batch and channels; received {values}",
        )
        self._check_range(argument, 1, (h, w), (h, w))
        return h, w

    def _pads(self, padding, explicit, data_format) -> list[tuple[int, int] | None]:
        """Padding before and after, of height and width; None for "SAME"."""
        if padding != "EXPLICIT":
            return [None if padding == "SAME" else (0, 0)] * 2
        pairs = zip(explicit[::2], explicit[1::2], strict=True)
        batch, h, w, channels = _native(list(pairs), data_format)
        self._require(
            batch == channels == (0, 0),
            f"padding must be 4 pairs of numbers, 0 for batch and channels; received {explicit}",
        )
        for number in (*h, *w):
            self._check_range("padding", 0, [number], number)
        return [h, w]

    def _native_shape(self, argument, tensor, data_format) -> list:
        self._require(
            tensor.shape.rank == 4,
            f"{argument} must have rank 4; received shape {tensor.shape.as_list()}",
        )
        return _native(sizes(tensor), data_format)

    def _check_filters(self, kernel_h, kernel_w, group_channels, out_channels) -> None:
        for size in (kernel_h, kernel_w):
            self._require(
                size > 0,
                f"filters must have a height and width from 1 to {MAX_EXTENT}; received ",
                *(kernel_h, "x", kernel_w),
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
        """The output's height or width."""
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
            True if tf.is_tensor(extent) else extent <= MAX_EXTENT, f"{name} {extent} is too large"
        )

    def _check_place(self, argument, place, output) -> None:
        """Checks the batch size, height and width of offset or mask."""
        batch, h, w = place
        expected_batch, out_h, out_w = output
        self._require(
            _equal(batch, expected_batch),
            *(argument, f" {_has(argument)} batch size ", batch, "; that of input, "),
            *(expected_batch, ", expected"),
        )
        for size, expected in ((h, out_h), (w, out_w)):
            self._require(
                _equal(size, expected),
                *(argument, f" {_has(argument)} height and width ", h, "x", w),
                *("; those of the output, ", out_h, "x", out_w, ", expected"),
            )


def _has(argument: str) -> str:
    return "have" if argument == "weights" else "has"


def _native(values, data_format) -> list:
    """Four values in the order NHWC."""
    return [values[axis] for axis in ((0, 1, 2, 3) if data_format == "NHWC" else (0, 2, 3, 1))]


def _equal(size, other):
    # In graphs of version 1, == compares tensors as objects.
    return tf.equal(size, other) if tf.is_tensor(size) or tf.is_tensor(other) else size == other
