"""Arguments in the form that the op takes, or a ValueError that says why they have none."""

import contextlib
import math
import operator
import reprlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

# The largest stride, dilation, padding and number of groups that the op takes.
MAX_EXTENT = 2**31 - 1

_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 120


def shown(value) -> str:
    """`value` as error messages show it: on one line, and the middle left out of what is long."""
    try:
        text = _short.repr(value)
    except Exception:  # Python does not print an integer of very many digits
        text = f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:97]} ... {text[-97:]}"


@contextlib.contextmanager
def converting(failure: Callable[[], str]) -> Iterator[None]:
    """A context that converts an argument to a tensor; any failure becomes a ValueError.

    TensorFlow and what it converts raise whatever they like, and name no argument. A lack of memory
    stays what it is.
    """
    try:
        yield
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except Exception as error:
        raise ValueError(failure()) from error


def to_tensor(value, argument: str, dtypes: Sequence[tf.DType], hint: tf.DType | None = None):
    """Converts `value` to a tensor of one of `dtypes`; Python numbers become `hint`, if given."""
    *others, last = (dtype.name for dtype in dtypes)
    expected = f"{', '.join(others)} or {last}" if others else last
    if hint is not None:
        expected += " here"
    with converting(
        lambda: (
            f"{argument} must be a tensor of {expected}; received {shown(value)}{_advice(value)}"
        )
    ):
        hint = None if hasattr(value, "dtype") else hint
        tensor = tf.convert_to_tensor(value, dtype_hint=hint, name=argument)
        if tf.executing_eagerly() and tf.is_symbolic_tensor(tensor):
            raise TypeError("a tensor of a graph has no value outside of it")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{argument} must be {expected}; received {tensor.dtype.name}")
    return tensor


def _advice(value) -> str:
    # By name: this module works without Keras.
    if any(cls.__name__ == "KerasTensor" for cls in type(value).__mro__):
        return (
            ", which stands for a tensor in a Keras model: use DeformableConv2D, or call "
            "deform_conv2d in the call() of a layer"
        )
    return ""


def plain(value, argument: str):
    """A small tensor, variable or array as Python numbers or lists of them; all else as it is."""
    array = value
    if not isinstance(value, np.ndarray | np.generic):
        try:
            if not hasattr(value, "dtype"):
                return value
            array = tf.get_static_value(tf.convert_to_tensor(value))
        except Exception:
            return value
        if array is None:
            raise ValueError(
                f"{argument} must be known while the graph is made; received {shown(value)}"
            )
    array = np.asarray(array)
    # Five pairs are the most that an attribute holds. A batch of images would be a very long list.
    return array.tolist() if array.size <= 10 else value


def items(value, argument: str) -> list | None:
    """The items of a sequence, also of a tensor or an array; None of anything else."""
    value = plain(value, argument)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        try:
            return list(value)
        except Exception:  # of a class of somebody's own
            return None
    return None


def integer_or_none(value, argument: str) -> int | None:
    """`value` as an int; None if it is none."""
    value = plain(value, argument)
    if isinstance(value, bool):  # an int to Python, but not one anybody means here
        return None
    try:
        return operator.index(value)
    except Exception:
        return None


def integer(value, argument: str, least: int = 1) -> int:
    """An integer that the op's attributes can hold; the op itself checks that it is in range."""
    number = integer_or_none(value, argument)
    if number is None:
        raise ValueError(f"{argument} must be an integer; received {shown(value)}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(
            f"{argument} must be from {least} to {MAX_EXTENT}; received {shown(number)}"
        )
    return number


def per_dimension(value, argument: str, data_format: str) -> list[int]:
    """One number, or one for each spatial axis, as one for each letter of `data_format`."""
    rank = len(data_format)
    axes = rank - 2
    sequence = items(value, argument)
    numbers = [integer(item, argument) for item in ([value] if sequence is None else sequence)]
    if len(numbers) == rank:
        return numbers
    if len(numbers) not in (1, axes):
        raise ValueError(
            f"{argument} must be 1, {axes} or {rank} integers; received {shown(value)}"
        )
    spatial = numbers * axes if len(numbers) == 1 else numbers
    return [1, *spatial, 1] if data_format.endswith("C") else [1, 1, *spatial]


def padding_attributes(padding, data_format: str = "NHWC") -> dict:
    """The op's attributes for "SAME", "VALID" or a pair for each letter of `data_format`."""
    rank = len(data_format)
    if isinstance(padding, str) and padding in ("SAME", "VALID"):
        return {"padding": padding}
    pairs = [items(pair, "padding") for pair in items(padding, "padding") or ()]
    if len(pairs) != rank or any(pair is None or len(pair) != 2 for pair in pairs):
        number = {4: "four", 5: "five"}[rank]
        raise ValueError(
            f"padding must be 'SAME', 'VALID' or {number} pairs of integers; received "
            f"{shown(padding)}"
        )
    explicit = [integer(number, "padding", least=0) for pair in pairs for number in pair]
    return {"padding": "EXPLICIT", "explicit_paddings": explicit}


def check_filters_order(input, filters, offset, deform_groups: int, data_format: str) -> None:
    """Raises if the filters fit as [O, C / groups, KH, KW] alone, the order of other libraries."""
    rank = len(data_format)
    shapes = [tensor.shape for tensor in (input, filters, offset)]
    if any(shape.rank != rank for shape in shapes):
        return
    channels, offset_channels = (shapes[i][data_format.index("C")] for i in (0, 2))
    sizes = shapes[1].as_list()
    if None in (channels, offset_channels, *sizes):
        return
    axes = rank - 2

    def fit(kernel, group_channels):
        taps = deform_groups * math.prod(kernel)
        return group_channels and channels % group_channels == 0 and offset_channels == axes * taps

    if not fit(sizes[:axes], sizes[axes]) and fit(sizes[2:], sizes[1]):
        spatial = data_format.replace("N", "").replace("C", "")
        kernel = ", ".join(f"K{axis}" for axis in spatial)
        order = [*range(2, rank), 1, 0]
        raise ValueError(
            f"filters must be [{kernel}, C / groups, O] ({spatial}IO); received "
            f"{sizes}, which fits as [O, C / groups, {kernel}] (OI{spatial}): pass "
            f"tf.transpose(filters, {order})"
        )
