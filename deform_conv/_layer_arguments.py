"""The layer's arguments and inputs in the form that it takes, or a ValueError in Keras's style."""

import math
import numbers

import keras
import numpy as np
import tensorflow as tf

from ._arguments import MAX_EXTENT, converting, integer_or_none, items, shown


def tensor(value, argument: str):
    """A tensor of numbers, or a KerasTensor that stands for one."""
    with converting(
        lambda: f"{argument} must be a dense tensor of real numbers. Received: {shown(value)}"
    ):
        converted = value if isinstance(value, keras.KerasTensor) else tf.convert_to_tensor(value)
        dtype = tf.as_dtype(converted.dtype)
        if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            raise TypeError(f"{dtype.name} is no type of real numbers")
        # KerasTensors that are `sparse` may be dense: Keras 3.15 takes every multiple of one by a
        # number for sparse. A tensor that is sparse is refused when the model is called.
        if getattr(converted, "ragged", False):
            raise TypeError("TensorFlow does not convert ragged tensors to dense ones")
    if tf.TensorShape(converted.shape).rank is None:
        raise ValueError(f"{argument} must have a known rank. Received: {shown(value)}")
    return converted


def positive_integer(value, argument: str) -> int:
    number = integer_or_none(value, argument)
    if number is None or number < 1:
        raise ValueError(f"{argument} must be an integer above 0. Received: {shown(value)}")
    if number > MAX_EXTENT:
        raise ValueError(f"{argument} must be at most {MAX_EXTENT}. Received: {shown(number)}")
    return number


def height_and_width(value, argument: str) -> tuple[int, int]:
    return per_axis(value, argument, 2)


def per_axis(value, argument: str, rank: int) -> tuple[int, ...]:
    """An integer above 0 for each of `rank` axes."""
    sequence = items(value, argument)
    numbers = [value] * rank if sequence is None else sequence
    if len(numbers) != rank:
        counts = ("one integer", "one or two integers")[rank - 1]
        raise ValueError(f"{argument} must be {counts}. Received: {shown(value)}")
    return tuple(positive_integer(number, argument) for number in numbers)


def image_padding(value) -> str | tuple[tuple[int, int], tuple[int, int]]:
    """ "valid", "same" or ((top, bottom), (left, right))."""
    return padding_of_axes(value, 2)


_PADDINGS = {1: ("valid", "same", "causal"), 2: ("valid", "same")}
_PADDING_FORMS = {
    1: "one or (left, right)",
    2: "one, (h, w) or ((top, bottom), (left, right))",
}


def padding_of_axes(value, rank: int) -> str | tuple[tuple[int, int], ...]:
    """The name of a padding, or the padding before and after, of each of `rank` axes."""
    if isinstance(value, str) and value.lower() in _PADDINGS[rank]:
        return value.lower()
    sequence = items(value, "padding")
    axes = [value] * rank if sequence is None else sequence
    if rank == 1 and len(axes) == 2:
        axes = [axes]  # (left, right), as keras.layers.ZeroPadding1D takes it
    pairs = [[axis, axis] if (pair := items(axis, "padding")) is None else pair for axis in axes]
    numbers = [integer_or_none(number, "padding") for pair in pairs for number in pair]
    if [len(pair) for pair in pairs] != [2] * rank or any(n is None or n < 0 for n in numbers):
        *names, last = map(repr, _PADDINGS[rank])
        raise ValueError(
            f"padding must be {', '.join(names)} or {last}, or integers of at least 0: "
            f"{_PADDING_FORMS[rank]}. Received: {shown(value)}"
        )
    if max(numbers) > MAX_EXTENT:
        raise ValueError(f"padding must be at most {MAX_EXTENT}. Received: {shown(value)}")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def one_of(value, argument: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value.lower() not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{argument} must be {expected}. Received: {shown(value)}")
    return value.lower()


def keras_object(value, argument: str):
    """The initializer or the like that `value` is, names or describes; `argument` ends in which."""
    module = argument.rpartition("_")[2] + "s"
    try:
        return getattr(keras, module).get(value)
    except Exception as error:
        raise ValueError(
            f"{argument} must be one of keras.{module}. Received: {shown(value)}"
        ) from error


def dtype_policy(value):
    """The policy that `value` is, names or describes."""
    try:
        policy = keras.dtype_policies.get(value)
    except Exception:
        policy = None
    if not isinstance(policy, keras.DTypePolicy):
        raise ValueError(f"dtype must be a type or a policy of Keras. Received: {shown(value)}")
    return policy


def positive_number(value, argument: str) -> float:
    """A number that is above 0 and finite in float32."""
    try:
        fits = not isinstance(value, bool) and isinstance(value, numbers.Real)
        number = float(value) if fits else 0.0
    except OverflowError:
        number = math.inf
    with np.errstate(all="ignore"):
        in_float32 = float(np.float32(number))
    if not 0 < in_float32 < math.inf:
        raise ValueError(f"{argument} must be a finite number above 0. Received: {shown(value)}")
    return number


def boolean(value, argument: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{argument} must be True or False. Received: {shown(value)}")
    return bool(value)
