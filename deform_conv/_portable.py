"""Portable mode: the ops in TensorFlow's own ops, for where the compiled ones cannot be."""

import contextlib
import contextvars
from collections.abc import Iterator

import tensorflow as tf

from ._library import PORTABLE
from ._reference import deform_aggregate2d_reference, deform_conv2d_reference
from ._rules import checked

# Of a thread, in which it also traces functions: calls in other threads do not become slow.
_within = contextvars.ContextVar("deform_conv_portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """A context in which `deform_conv2d` and its kin, and so the layers, compute by TensorFlow's
    own ops.

    It is for programs that cannot have the compiled op, such as LiteRT (TensorFlow Lite). Results
    and gradients of any order are the same but for rounding, and take more time and memory.

    It holds for what this thread calls and traces. A function or a model that was traced before
    keeps what it was traced with, as does one that was traced in here. `DEFORM_CONV_PORTABLE=1` in
    the environment does the same for a whole process, which then needs no compiled library.

    Example:
      >>> converter = tf.lite.TFLiteConverter.from_keras_model(model)
      >>> with deform_conv.portable():
      ...     program = converter.convert()
    """
    token = _within.set(True)
    try:
        yield
    finally:
        _within.reset(token)


def in_portable_mode() -> bool:
    return PORTABLE or _within.get()


def deform_conv2d_portable(input, filters, offset, mask, **attributes) -> tf.Tensor:
    """What the op computes, from the same inputs and attributes, with its checks."""
    tensors = {"input": input, "filters": filters, "offset": offset}
    if mask:
        (tensors["mask"],) = mask
    (input, filters, offset, *mask), output_shape = checked(tensors, **attributes)
    output = reference_of_op(input, filters, offset, mask, **attributes)
    output.set_shape(output_shape)
    return output


def deform_aggregate2d_portable(input, offset, weights, **attributes) -> tf.Tensor:
    """What the op without filters computes, likewise."""
    tensors = {"input": input, "offset": offset, "weights": weights}
    tensors, output_shape = checked(tensors, **attributes)
    output = reference_of_aggregate_op(*tensors, **attributes)
    output.set_shape(output_shape)
    return output


def reference_of_op(input, filters, offset, mask, **attributes) -> tf.Tensor:
    """The reference, from the inputs and attributes that the op takes."""
    return deform_conv2d_reference(
        input, filters, offset, *mask, **_reference_attributes(**attributes)
    )


def reference_of_aggregate_op(input, offset, weights, **attributes) -> tf.Tensor:
    """That of the op without filters."""
    return deform_aggregate2d_reference(
        input, offset, weights, **_reference_attributes(**attributes)
    )


def _reference_attributes(*, padding, explicit_paddings=(), **attributes) -> dict:
    if padding == "EXPLICIT":
        padding = [explicit_paddings[index : index + 2] for index in range(0, 8, 2)]
    return {"padding": padding, **attributes}
