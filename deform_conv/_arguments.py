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

# The axes of images of each rank. The number of offsets for a sample is the rank too.
AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
LETTERS = {1: "L", 2: "HW", 3: "DHW"}
DATA_FORMATS = {1: ("NWC", "NCW"), 2: ("NHWC", "NCHW"), 3: ("NDHWC", "NCDHW")}
_COUNTS = {3: "three", 4: "four", 5: "five"}

# Positions and sums are in float32 for 16-bit types, so these may have float32 offsets and masks.
_OFFSET_DTYPES = {
    tf.float32: (tf.float32,),
    tf.float64: (tf.float64,),
    tf.float16: (tf.float16, tf.float32),
    tf.bfloat16: (tf.bfloat16, tf.float32),
}

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


def to_tensor(
    value,
    argument: str,
    dtypes: Sequence[tf.DType],
    hint: tf.DType | None = None,
    *,
    rank: int = 2,
):
    """Converts `value` to a tensor of one of `dtypes`; Python numbers become `hint`, if given.

    `rank` is that of the operation whose argument it is, for the advice in an error.
    """
    *others, last = (dtype.name for dtype in dtypes)
    expected = f"{', '.join(others)} or {last}" if others else last
    if hint is not None:
        expected += " here"
    with converting(
        lambda: (
            f"{argument} must be a tensor of {expected}; received {shown(value)}"
            f"{_advice(value, rank)}"
        )
    ):
        hint = None if hasattr(value, "dtype") else hint
        tensor = tf.convert_to_tensor(value, dtype_hint=hint, name=argument)
        if tf.executing_eagerly() and tf.is_symbolic_tensor(tensor):
            raise TypeError("a tensor of a graph has no value outside of it")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{argument} must be {expected}; received {tensor.dtype.name}")
    return tensor


def to_tensors(rank: int = 2, **tensors) -> list[tf.Tensor]:
    """The tensors that an operation takes, by their names, without those that are None.

    They are input, filters if there are some, offset, and mask or weights.
    """
    converted = {}
    for name, value in tensors.items():
        if name == "input":
            dtypes, hint = tuple(_OFFSET_DTYPES), None
        elif name == "filters":
            hint = converted["input"].dtype
            dtypes = (hint,)
        elif name == "offset":
            hint = converted["input"].dtype
            dtypes = _OFFSET_DTYPES[hint]
        else:
            hint = converted["offset"].dtype
            dtypes = (hint,)
        if value is not None or name in ("input", "filters", "offset", "weights"):
            converted[name] = to_tensor(value, name, dtypes, hint, rank=rank)
    return list(converted.values())


def check_texts(data_format, name, rank: int = 2) -> None:
    """Raises unless `data_format` is one for images of `rank` axes, and `name` a string or None."""
    if not isinstance(data_format, str) or data_format not in DATA_FORMATS[rank]:
        expected = " or ".join(map(repr, DATA_FORMATS[rank]))
        raise ValueError(f"data_format must be {expected}; received {shown(data_format)}")
    if not isinstance(name, str | None):
        raise ValueError(f"name must be a string or None; received {shown(name)}")


def _advice(value, rank: int) -> str:
    # By name: this module works without Keras.
    if any(cls.__name__ == "KerasTensor" for cls in type(value).__mro__):
        layer = f"use DeformableConv{rank}D, or " if rank < 3 else ""
        return (
            f", which stands for a tensor in a Keras model: {layer}call deform_conv{rank}d in the "
            "call() of a layer"
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


def rank_of(data_format: str) -> int:
    """The number of axes of the images that a data format is for."""
    return len(data_format) - 2


def _integers(value, argument: str) -> list[int]:
    """One number or several."""
    sequence = items(value, argument)
    return [integer(item, argument) for item in ([value] if sequence is None else sequence)]


def height_and_width(value, argument: str) -> list[int]:
    """One number or (h, w), as two."""
    numbers = _integers(value, argument)
    if len(numbers) not in (1, 2):
        raise ValueError(f"{argument} must be 1 or 2 integers; received {shown(value)}")
    return [numbers[0], numbers[-1]]


def per_dimension(value, argument: str, data_format: str) -> list[int]:
    """One number, one for each axis, or one for each dimension, as the last of these.

    The dimensions are in the order of `data_format`.
    """
    rank = rank_of(data_format)
    numbers = _integers(value, argument)
    if len(numbers) == rank + 2:
        return numbers
    if len(numbers) not in (1, rank):
        counts = ", ".join(map(str, sorted({1, rank})))
        raise ValueError(
            f"{argument} must be {counts} or {rank + 2} integers; received {shown(value)}"
        )
    axes = numbers * rank if len(numbers) == 1 else numbers
    return [1, *axes, 1] if data_format.endswith("C") else [1, 1, *axes]


def padding_attributes(padding, dimensions: int = 4) -> dict:
    """The op's attributes for "SAME", "VALID" or as many pairs as tensors have dimensions."""
    if isinstance(padding, str) and padding in ("SAME", "VALID"):
        return {"padding": padding}
    pairs = [items(pair, "padding") for pair in items(padding, "padding") or ()]
    if len(pairs) != dimensions or any(pair is None or len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"padding must be 'SAME', 'VALID' or {_COUNTS[dimensions]} pairs of integers; received "
            f"{shown(padding)}"
        )
    explicit = [integer(number, "padding", least=0) for pair in pairs for number in pair]
    return {"padding": "EXPLICIT", "explicit_paddings": explicit}


def check_filters_order(input, filters, offset, deform_groups: int, data_format: str) -> None:
    """Raises if the filters fit as [O, C / groups, KH, KW] alone, the order of other libraries."""
    rank = rank_of(data_format)
    shapes = [tensor.shape for tensor in (input, filters, offset)]
    if any(shape.rank != rank + 2 for shape in shapes):
        return
    axis = -1 if data_format.endswith("C") else 1
    channels, offset_channels = shapes[0][axis], shapes[2][axis]
    sizes = shapes[1].as_list()
    if None in (channels, offset_channels, *sizes):
        return

    def fit(*kernel, group_channels):
        taps = deform_groups * math.prod(kernel)
        return group_channels and channels % group_channels == 0 and offset_channels == rank * taps

    if not fit(*sizes[:rank], group_channels=sizes[rank]) and fit(
        *sizes[2:], group_channels=sizes[1]
    ):
        kernel, letters = {1: ("K", "W"), 2: ("KH, KW", "HW"), 3: ("KD, KH, KW", "DHW")}[rank]
        raise ValueError(
            f"filters must be [{kernel}, C / groups, O] ({letters}IO); received {sizes}, which "
            f"fits as [O, C / groups, {kernel}] (OI{letters}): pass "
            f"tf.transpose(filters, {[*range(2, rank + 2), 1, 0]})"
        )
