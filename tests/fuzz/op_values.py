"""Makes what a case is called with: arrays of every kind, and objects that are none."""

import functools
import operator

import keras
import numpy as np
import tensorflow as tf
from op_cases import Numbers, Odd


def array_of(numbers: Numbers, rng) -> np.ndarray:
    """The numbers in their type: the same for the same `rng`."""
    shape, dtype = numbers.shape, tf.as_dtype(numbers.dtype)
    if not dtype.is_floating or dtype.name.startswith("float8"):
        if dtype == tf.string:
            return np.full(shape, "text", object)
        if dtype.is_quantized:
            return np.zeros(shape, np.int8)
        return np.zeros(shape, dtype.as_numpy_dtype)
    values = rng.standard_normal(shape)
    narrow = numbers.dtype == "float16"
    match numbers.fill:
        case "integers":
            values = np.round(2 * values)
        case "halves":
            values = np.round(4 * values) / 2
        case "ones":
            values = np.ones(shape)
        case "zeros":
            values = np.zeros(shape)
        case "large":
            values *= 1e3 if narrow else 1e9
        case "small":
            values *= 1e-4 if narrow else 1e-8
        case "far":
            values = np.sign(values) * 2.0 ** rng.integers(0, 70, shape)
        case "not finite":
            values[rng.random(shape) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
        case "odd":
            odd = rng.choice([np.nan, np.inf, -np.inf, -0.0, 1.0, -1.0, 1e-30], shape)
            values = np.where(rng.random(shape) < 0.1, odd, values)
    with np.errstate(all="ignore"):
        return values.astype(dtype.as_numpy_dtype)


def formed(array: np.ndarray, numbers: Numbers):
    """The array as the case passes it."""
    return _FORMS[numbers.form](array, numbers.dtype)


def _tensor(array, dtype):
    if tf.as_dtype(dtype).is_quantized:
        return tf.bitcast(tf.constant(array), dtype)
    return tf.constant(array, dtype)


def _read_only(array, dtype):
    del dtype
    array = array.copy()
    array.flags.writeable = False
    return array


_FORMS = {
    "tensor": _tensor,
    "array": lambda array, _: array,
    "list": lambda array, _: array.tolist(),
    "variable": lambda array, _: tf.Variable(array),
    "keras variable": lambda array, dtype: keras.Variable(array, dtype=dtype),
    "not contiguous": lambda array, _: np.asfortranarray(array),
    "read only": _read_only,
}


class _Index:
    def __index__(self):
        return 1


def _deep_list():
    value = 1.0
    for _ in range(100):
        value = [value]
    return value


def _dead_tensor():
    with tf.Graph().as_default():
        return tf.zeros((2, 3, 3, 4))


def _variable():
    with tf.init_scope():
        return tf.Variable(1)


# Each is made anew: some can be used once only.
ODD = {
    "none": lambda: None,
    "object": object,
    "type": lambda: int,
    "function": lambda: operator.add,
    "iterator": lambda: iter([1, 1]),
    "index": _Index,
    "bytearray": lambda: bytearray(b"\x01\x01"),
    "float array": lambda: np.array([1.0, 1.0]),
    "bool array": lambda: np.array([True, True]),
    "one array": lambda: np.array(1),
    "ones array": lambda: np.array([1, 1]),
    "object array": lambda: np.array([object(), None]),
    "string array": lambda: np.array(["a", "b"]),
    "numpy integer": lambda: np.uint8(1),
    "string tensor": lambda: tf.constant("NHWC"),
    "float tensor": lambda: tf.constant(1.0),
    "one tensor": lambda: tf.constant(1),
    "ones tensor": lambda: tf.constant([1, 1]),
    "int8 tensor": lambda: tf.constant([1, 1], tf.int8),
    "matrix tensor": lambda: tf.constant([[1, 1], [1, 1]]),
    "empty tensor": lambda: tf.constant([], tf.int32),
    "variable": _variable,
    # In a graph, what it holds is known at run time only.
    "unknown tensor": lambda: tf.cast(tf.random.uniform((2,)) < 1, tf.int32),
    "unknown number": lambda: tf.cast(tf.random.uniform(()) < 1, tf.int32),
    "keras tensor": functools.cache(lambda: keras.Input((5, 6, 4))),
    "keras variable of another shape": lambda: keras.Variable([1.0, 2.0]),
    "tensor spec": lambda: tf.TensorSpec((2, 3, 3, 4)),
    "ragged": lambda: tf.ragged.constant([[1.0], [1.0, 2.0]]),
    "ragged list": lambda: [[1.0], [1.0, 2.0]],
    "sparse": lambda: tf.sparse.from_dense([[1.0, 0.0], [0.0, 2.0]]),
    "indexed slices": lambda: tf.IndexedSlices(tf.ones((1, 3, 3, 4)), tf.constant([0])),
    "dataset": lambda: tf.data.Dataset.range(3),
    "layer": functools.cache(lambda: keras.layers.Dense(1)),
    "optional": lambda: tf.experimental.Optional.from_value(1.0),
    "tensor array": lambda: tf.TensorArray(tf.float32, 1),
    "resource": lambda: tf.Variable(1.0).handle,
    "deep list": _deep_list,
    "dead tensor": _dead_tensor,
    "padding array": lambda: np.array([[0, 0], [1, 1], [1, 1], [0, 0]]),
    "padding tensor": lambda: tf.constant([[0, 0], [1, 1], [1, 1], [0, 0]]),
    "padding iterator": lambda: iter([[0, 0], [1, 1], [1, 1], [0, 0]]),
}


def resolved(value):
    return ODD[value.name]() if isinstance(value, Odd) else value
