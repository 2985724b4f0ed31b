"""Wrong input: what the error says, in eager mode and while a graph is built."""

import fractions
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from checks import KNOWN, assert_wrong_shape_raises

from deform_conv import deform_aggregate2d, deform_conv2d

pytestmark = pytest.mark.usefixtures("device")

# Arguments that fit, for a 3x3 kernel on 2 images of 5x6 with 4 channels.
FITTING = {
    "input": (2, 5, 6, 4),
    "filters": (3, 3, 4, 8),
    "offset": (2, 5, 6, 18),
    "mask": (2, 5, 6, 9),
}

WRONG_SHAPES = [
    ({"offset": (2, 5, 6, 36)}, {}, "offset has 36 channels; 2 * deform_groups * 3 * 3 = 18 exp"),
    ({}, {"deform_groups": 2}, "offset has 18 channels; 2 * deform_groups * 3 * 3 = 36 expected"),
    ({"mask": (2, 5, 6, 18)}, {}, "mask has 18 channels; deform_groups * 3 * 3 = 9 expected"),
    ({"offset": (2, 4, 6, 18)}, {}, "offset has height and width 4x6; those of the output, 5x6"),
    ({}, {"strides": 2}, "offset has height and width 5x6; those of the output, 3x3, expected"),
    ({}, {"padding": "VALID"}, "offset has height and width 5x6; those of the output, 3x4"),
    ({"mask": (2, 5, 5, 9)}, {}, "mask has height and width 5x5; those of the output, 5x6"),
    ({"offset": (3, 5, 6, 18)}, {}, "offset has batch size 3; that of input, 2, expected"),
    ({"mask": (1, 5, 6, 9)}, {}, "mask has batch size 1; that of input, 2, expected"),
    ({"filters": (3, 3, 3, 8)}, {}, "filters have 3 input channels; a divisor of the input's 4"),
    ({"filters": (3, 3, 2, 7)}, {}, "filters have 7 output channels; a multiple of the 2 groups"),
    ({"filters": (3, 3, 0, 8)}, {}, "filters must have at least 1 input and 1 output channel"),
    ({"filters": (3, 3, 4, 0)}, {}, "filters must have at least 1 input and 1 output channel"),
    ({"filters": (0, 3, 4, 8)}, {}, "filters must have a height and width from 1 to"),
    ({"input": (2, 5, 6, 0)}, {}, "input must have at least 1 channel; received 0"),
    ({"input": (5, 6, 4)}, {}, "input must have rank 4; received shape [5, 6, 4]"),
    ({"filters": (3, 3, 4)}, {}, "filters must have rank 4; received shape [3, 3, 4]"),
    ({"offset": (2, 5, 6, 9, 2)}, {}, "offset must have rank 4; received shape [2, 5, 6, 9, 2]"),
    ({"mask": ()}, {}, "mask must have rank 4; received shape []"),
    ({}, {"deform_groups": 3}, "deform_groups must divide the input's 4 channels; received 3"),
    ({}, {"deform_groups": 0}, "deform_groups must be from 1 to 2147483647; received 0"),
    ({}, {"strides": 0}, "strides must be from 1 to 2147483647; received (0, 0)"),
    ({}, {"dilations": (1, -2)}, "dilations must be from 1 to 2147483647; received (1, -2)"),
    (
        {},
        {"strides": (2, 1, 1, 1)},
        "strides must be 4 numbers, 1 for batch and channels; received",
    ),
    ({}, {"padding": ((0, 0), (1, -1), (1, 1), (0, 0))}, "padding must be from 0 to 2147483647"),
    (
        {},
        {"padding": ((1, 1), (1, 1), (1, 1), (0, 0))},
        "padding must be 4 pairs of numbers, 0 for",
    ),
    (
        {"filters": (9, 3, 4, 8)},
        {"padding": "VALID"},
        "input has height 5 with its padding; at least 8 expected for the dilated kernel's height",
    ),
]
IDS = [message[:50] for *_, message in WRONG_SHAPES]


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG_SHAPES, ids=IDS)
def test_wrong_shape_raises(shapes, attributes, message, known):
    assert_wrong_shape_raises(deform_conv2d, FITTING | shapes, message, known, **attributes)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize(
    ("channels", "filters", "deform_groups"),
    [
        (4, (8, 4, 3, 3), 1),
        (4, (8, 2, 3, 3), 2),
        (3, (16, 3, 3, 3), 1),  # its channels fit as HWIO too
        (3, (16, 3, 1, 1), 1),
    ],
)
def test_filters_in_the_order_of_other_libraries_are_named(
    channels, filters, deform_groups, graph, data_format
):
    taps = deform_groups * filters[2] * filters[3]
    shapes = [(2, 5, 6, channels), filters, (2, 5, 6, 2 * taps), (2, 5, 6, taps)]
    tensors = [tf.zeros(shape) for shape in shapes]
    if data_format == "NCHW":
        for index in (0, 2, 3):
            tensors[index] = tf.transpose(tensors[index], [0, 3, 1, 2])

    def convolve(*tensors):
        return deform_conv2d(*tensors, deform_groups=deform_groups, data_format=data_format)

    message = (
        f"filters must be [KH, KW, C / groups, O] (HWIO); received {[*filters]}, which fits as "
        "[O, C / groups, KH, KW] (OIHW): pass tf.transpose(filters, [2, 3, 1, 0])"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        (tf.function(convolve) if graph else convolve)(*tensors)
    tensors[1] = tf.transpose(tensors[1], [2, 3, 1, 0])
    assert tf.size(convolve(*tensors)) == 2 * 5 * 6 * filters[0]


# --- Attributes of the wrong form ---

PADDING = "padding must be 'SAME', 'VALID' or four pairs of integers; received "

WRONG_FORMS = [
    ({"data_format": "NHCW"}, "data_format must be 'NHWC' or 'NCHW'; received 'NHCW'"),
    ({"data_format": None}, "data_format must be 'NHWC' or 'NCHW'; received None"),
    ({"data_format": b"NHWC"}, "data_format must be 'NHWC' or 'NCHW'; received b'NHWC'"),
    ({"data_format": np.array(["NHWC", "NCHW"])}, "data_format must be 'NHWC' or 'NCHW'; received"),
    ({"name": 1}, "name must be a string or None; received 1"),
    ({"name": np.array(["a", "b"])}, "name must be a string or None; received array(['a', 'b']"),
    ({"padding": "FULL"}, PADDING + "'FULL'"),
    ({"padding": "same"}, PADDING + "'same'"),
    ({"padding": 1}, PADDING + "1"),
    ({"padding": None}, PADDING + "None"),
    ({"padding": b"SAME"}, PADDING + "b'SAME'"),
    ({"padding": ((0, 0), (1, 1))}, PADDING + "((0, 0), (1, 1))"),
    ({"padding": ((0, 0), (1, 1), 1, (0, 0))}, PADDING + "((0, 0), (1, 1), 1, (0, 0))"),
    ({"padding": ((0, 0), (1, 1), None, (0, 0))}, PADDING + "((0, 0), (1, 1), None, (0, 0))"),
    ({"padding": ["ab"] * 4}, PADDING + "['ab', 'ab', 'ab', 'ab']"),
    ({"padding": [b"\1\1"] * 4}, PADDING + "[b'"),
    ({"padding": {"ab": 1, "cd": 2, "ef": 3, "gh": 4}}, PADDING + "{'ab': 1, "),
    ({"padding": ((0, 0), (1, 1), (1, 0.5), (0, 0))}, "padding must be an integer; received 0.5"),
    ({"padding": ((0, 0), (1, 1), (1, None), (0, 0))}, "padding must be an integer; received None"),
    ({"padding": np.ones((4, 2))}, "padding must be an integer; received 1.0"),
    (
        {"padding": ((0, 0), (2**63, 1), (1, 1), (0, 0))},
        "padding must be from 0 to 2147483647; received 9223372036854775808",
    ),
    ({"strides": (1, 2, 3)}, "strides must be 1, 2 or 4 integers; received (1, 2, 3)"),
    ({"strides": []}, "strides must be 1, 2 or 4 integers; received []"),
    ({"strides": 1.5}, "strides must be an integer; received 1.5"),
    ({"strides": b"\1\1"}, "strides must be an integer; received b'"),
    ({"strides": bytearray(b"\1\1")}, "strides must be an integer; received bytearray(b'"),
    ({"strides": memoryview(b"\1\1")}, "strides must be an integer; received <memory"),
    ({"strides": (1, None)}, "strides must be an integer; received None"),
    ({"strides": [[1, 1]]}, "strides must be an integer; received [1, 1]"),
    ({"strides": {1: 1, 2: 2}}, "strides must be an integer; received {1: 1, 2: 2}"),
    ({"strides": np.array([True, True])}, "strides must be an integer; received True"),
    ({"strides": np.array([1, None])}, "strides must be an integer; received None"),
    ({"dilations": "2"}, "dilations must be an integer; received '2'"),
    ({"dilations": float("nan")}, "dilations must be an integer; received nan"),
    ({"dilations": fractions.Fraction(1)}, "dilations must be an integer; received Fraction(1, 1)"),
    ({"deform_groups": True}, "deform_groups must be an integer; received True"),
    ({"deform_groups": [1]}, "deform_groups must be an integer; received [1]"),
    ({"deform_groups": 1j}, "deform_groups must be an integer; received 1j"),
    ({"deform_groups": float("inf")}, "deform_groups must be an integer; received inf"),
    ({"deform_groups": 2**63}, "deform_groups must be from 1 to 2147483647; received 922337203685"),
    (
        {"deform_groups": np.uint64(2**63)},
        "deform_groups must be from 1 to 2147483647; received 92",
    ),
    ({"deform_groups": 2**70}, "deform_groups must be from 1 to 2147483647; received 11805916207"),
    ({"deform_groups": -(2**63)}, "deform_groups must be from 1 to 2147483647; received -92233720"),
    # Python itself refuses to print it.
    ({"deform_groups": 10**5000}, "deform_groups must be from 1 to 2147483647; received <int>"),
]


@pytest.mark.parametrize(
    ("attributes", "message"), WRONG_FORMS, ids=[m[:60] for _, m in WRONG_FORMS]
)
def test_attribute_of_the_wrong_form_raises(attributes, message):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=re.escape(message)):
        deform_conv2d(**tensors, **attributes)


# What TensorFlow has besides tensors of numbers, by functions that make it.
NO_ATTRIBUTES = {
    "float tensor": lambda: tf.constant(1.0),
    "bool tensor": lambda: tf.constant(True),
    "string tensor": lambda: tf.constant("x"),
    "resource": lambda: tf.Variable(1).handle,
    "ragged tensor": lambda: tf.ragged.constant([[1], [1, 2]]),
    "sparse tensor": lambda: tf.sparse.from_dense([1, 1]),
    "TensorArray": lambda: tf.TensorArray(tf.int32, 2),
    "KerasTensor": lambda: keras.KerasTensor((2,)),
    "list with a float tensor": lambda: [tf.constant(1.0), 1],
    "DType": lambda: tf.int32,
}


@pytest.mark.parametrize("value", NO_ATTRIBUTES)
@pytest.mark.parametrize("attribute", ["strides", "padding", "dilations", "deform_groups"])
def test_what_holds_no_integers_is_refused_as_an_attribute(attribute, value):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=rf"^{attribute} must be .*; received \S"):
        deform_conv2d(**tensors, **{attribute: NO_ATTRIBUTES[value]()})


@pytest.mark.parametrize("attribute", ["data_format", "name"])
@pytest.mark.parametrize("symbolic", [False, True])
def test_string_that_is_a_tensor_is_refused(symbolic, attribute):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    function = tf.function(lambda text: deform_conv2d(**tensors, **{attribute: text}))
    call = function if symbolic else function.python_function
    with pytest.raises(ValueError, match=rf"{attribute} must be .*; received <tf.Tensor"):
        call(tf.constant("NHWC"))


@pytest.mark.parametrize(
    ("attributes", "received"),
    [
        ({"strides": [1.0] * 10**6}, r"1\.0"),
        # A million numbers, of which none becomes one of Python.
        ({"strides": np.ones((1000, 1000))}, r"array\(\[\[1\., 1\., .*\)"),
        ({"deform_groups": np.ones((1000, 1000), int)}, r"array\(\[\[1, 1, .*\)"),
        ({"padding": [[0] * 1000] * 1000}, r"\[\[0, 0, .*\.\.\.\]"),
        ({"data_format": "x" * 10**6}, r"'x+\.\.\.x+'"),
    ],
    ids=["list", "array", "array of integers", "lists", "text"],
)
def test_error_is_one_short_line_whatever_was_received(attributes, received):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=rf"received {received}$") as error:
        deform_conv2d(**tensors, **attributes)
    assert len(str(error.value)) < 300


WRONG_DTYPES = [
    ({"input": tf.int32}, "input must be float32, float64, float16 or bfloat16; received int32"),
    ({"filters": tf.float64}, "filters must be float32 here; received float64"),
    ({"offset": tf.float16}, "offset must be float32 here; received float16"),
    ({"mask": tf.float64}, "mask must be float32 here; received float64"),
    (
        {"input": tf.float16, "filters": tf.float16, "offset": tf.float64},
        "offset must be float16 or float32 here; received float64",
    ),
    (
        {"input": tf.float16, "filters": tf.float16, "offset": tf.float16},
        "mask must be float16 here; received float32",
    ),
]


@pytest.mark.parametrize(("dtypes", "message"), WRONG_DTYPES)
def test_wrong_dtype_raises(dtypes, message):
    tensors = {
        name: tf.zeros(shape, dtypes.get(name, tf.float32)) for name, shape in FITTING.items()
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_conv2d(**tensors)


def test_python_numbers_and_arrays_are_converted():
    arrays = {name: np.zeros(shape, np.float32) for name, shape in FITTING.items()}
    assert deform_conv2d(**arrays).dtype == tf.float32
    nested = {name: array.tolist() for name, array in arrays.items() if name != "input"}
    assert deform_conv2d(arrays["input"], **nested).dtype == tf.float32


class Unconvertible:
    dtype = np.dtype("float32")

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")


def tensor_of_a_graph():
    with tf.Graph().as_default():
        return tf.zeros((2, 5, 6, 4))


NO_TENSORS = {
    "None": lambda: None,
    "ragged tensor": lambda: tf.ragged.constant([[1.0, 2.0], [3.0]]),
    "sparse tensor": lambda: tf.sparse.from_dense(tf.ones((2, 5, 6, 4))),
    "IndexedSlices": lambda: tf.IndexedSlices(tf.zeros((2, 3)), tf.constant([0, 1])),
    "TensorArray": lambda: tf.TensorArray(tf.float32, 2),
    "TensorSpec": lambda: tf.TensorSpec((2, 5, 6, 4)),
    "Dataset": lambda: tf.data.Dataset.range(3),
    "tensor of a graph": tensor_of_a_graph,
    "DType": lambda: tf.float32,
    "array of objects": lambda: np.array([None, {}]),
    "array of times": lambda: np.array(["2020-01-01"], "datetime64[D]"),
    "dict": lambda: {"a": 1.0},
    "set": lambda: {1.0},
    "lists of unequal lengths": lambda: [[1.0, 2.0], [3.0]],
    "list with None": lambda: [1.0, None],
    "number that is too large": lambda: 10**5000,
    "function": lambda: len,
    "what fails to convert itself": Unconvertible,
}


@pytest.mark.parametrize("value", NO_TENSORS)
@pytest.mark.parametrize("argument", FITTING)
def test_what_is_no_tensor_is_refused_by_name(argument, value):
    if (argument, value) == ("mask", "None"):
        return  # no mask
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    expected = rf"^{argument} must be a tensor of float32.*; received \S"
    with pytest.raises(ValueError, match=expected) as error:
        deform_conv2d(**(tensors | {argument: NO_TENSORS[value]()}))
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("abc", "string"),
        (np.array(["a"]), "string"),
        (np.ones((2, 5, 6, 4), bool), "bool"),
        (np.ones((2, 5, 6, 4), np.complex64), "complex64"),
        (np.ones((2, 5, 6, 4), np.int8), "int8"),
    ],
    ids=["text", "array of text", "bool", "complex64", "int8"],
)
@pytest.mark.parametrize("argument", FITTING)
def test_tensor_of_another_type_is_refused_by_name(argument, value, dtype):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=rf"^{argument} must be float32.*; received {dtype}$"):
        deform_conv2d(**(tensors | {argument: value}))


def test_quantized_tensor_is_refused_by_name():
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    tensors["offset"] = tf.cast(tensors["offset"], tf.qint32)
    with pytest.raises(ValueError, match=r"^offset must be float32 here; received qint32$"):
        deform_conv2d(**tensors)


@pytest.mark.parametrize("argument", FITTING)
def test_keras_tensor_is_refused_with_what_to_do_instead(argument):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    tensors[argument] = keras.Input(FITTING[argument][1:])
    message = rf"^{argument} must be .*; received <KerasTensor .*: use DeformableConv2D, or call"
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**tensors)


def test_variables_and_indexed_slices_are_tensors():
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    expected = deform_conv2d(**tensors)
    tensors["filters"] = tf.Variable(tensors["filters"])
    tensors["offset"] = keras.Variable(tensors["offset"])
    tensors["input"] = tf.IndexedSlices(tensors["input"], tf.range(2), tf.constant([2, 5, 6, 4]))
    np.testing.assert_array_equal(deform_conv2d(**tensors), expected)


def test_gradient_op_checks_its_own_input():
    """Nobody calls it by hand, but it must not read out of bounds if somebody does."""
    from deform_conv.ops import _ops

    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    tensors["mask"] = [tensors["mask"]]
    with pytest.raises(tf.errors.InvalidArgumentError, match="grad_output must have the output's"):
        _ops.deform_conv2d_grad(
            **tensors, grad_output=tf.zeros((2, 5, 6, 7)), strides=[1, 1, 1, 1], padding="SAME"
        )
    with pytest.raises(tf.errors.InvalidArgumentError, match="mask must be one tensor or none"):
        _ops.deform_conv2d(
            **(tensors | {"mask": tensors["mask"] * 2}), strides=[1, 1, 1, 1], padding="SAME"
        )


def test_gradient_op_with_two_masks_is_refused_while_the_graph_is_built():
    from deform_conv.ops import _ops

    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    tensors["mask"] = [tensors["mask"]] * 2
    grad_output = tf.zeros((2, 5, 6, 8))
    attributes = {"strides": [1, 1, 1, 1], "padding": "SAME"}
    function = tf.function(
        lambda: _ops.deform_conv2d_grad(**tensors, grad_output=grad_output, **attributes)
    )
    with pytest.raises(ValueError, match="mask must be one tensor or none; received 2"):
        function()


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_output_of_more_than_2_to_the_63_elements_raises(data_format):
    """No memory is needed to ask for it: the tensors are empty, as would be the output."""
    images, width = 2**39, 2**22
    shapes = [(images, 1, width, 0), (1, 1, 1, 16), (images, 2, width, 0)]
    if data_format == "NHWC":
        shapes = [(images, width, 0, 1), (1, 1, 1, 16), (images, width, 0, 2)]
    image, filters, offset = (tf.zeros(shape) for shape in shapes)
    if data_format == "NHWC":
        assert deform_conv2d(image, filters, offset).shape == (images, width, 0, 16)
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match="overflow"):
        deform_conv2d(image, filters, offset, data_format=data_format)


# Sizes that no tensor has can stand in a graph beside sizes that are unknown. Products of them are
# more than 64 bits hold.
@pytest.mark.parametrize(
    ("shapes", "deform_groups", "message"),
    [
        (
            [None, (2**31 - 1, 2**31 - 1, None, None), (None, None, None, 18)],
            2**31 - 1,
            "filters must have fewer than 2^63 bytes; received 2147483647, 2147483647, -1, -1 (KH,",
        ),
        (
            [None, (2**29, 2**29, None, None), (None, None, None, 0)],
            64,
            "offset has 0 channels; 2 * deform_groups * 536870912 * 536870912 = 2^63 or more",
        ),
        (
            [(None, 2**31 - 1, 2**31 - 1, 16), (1, 1, 16, 1), None],
            1,
            "input must have fewer than 2^63 bytes; received -1, 2147483647, 2147483647, 16 (N,",
        ),
        (
            [(2**19, 2**20, 2**20, 1), (1, 1, 1, 2**10), None],
            1,
            "the output of input and filters must have fewer than 2^63 bytes",
        ),
    ],
)
def test_sizes_whose_product_overflows_are_refused_while_the_graph_is_built(
    shapes, deform_groups, message
):
    with tf.Graph().as_default(), pytest.raises(ValueError, match=re.escape(message)):
        tensors = [tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes]
        deform_conv2d(*tensors, deform_groups=deform_groups)


def test_output_without_filters_whose_size_overflows_is_refused_while_the_graph_is_built():
    shapes = [(3, None, None, 2**31 - 1), (None, None, 2**40, None), None]
    message = "the output of input and offset must have fewer than 2^63 bytes; received 3, -1, "
    with tf.Graph().as_default(), pytest.raises(ValueError, match=re.escape(message)):
        tensors = [tf.compat.v1.placeholder(tf.float32, shape) for shape in shapes]
        deform_aggregate2d(*tensors, kernel_size=(1, 2))


INTEGERS = {
    "array": lambda: np.array([2, 1]),
    "tensor": lambda: tf.constant([2, 1]),
    "tf.Variable": lambda: tf.Variable([2, 1]),
    "keras.Variable": lambda: keras.Variable([2, 1], dtype="int32"),
    "number of NumPy": lambda: (np.int64(2), 1),
    "tensors": lambda: [tf.constant(2), tf.constant(1, tf.uint8)],
    "array of objects": lambda: np.array([2, 1], object),
    "range": lambda: range(2, 0, -1),
}


@pytest.mark.parametrize("strides", INTEGERS)
def test_integers_may_be_numpys_or_tensorflows(strides):
    shapes = FITTING | {"offset": (2, 3, 6, 18), "mask": (2, 3, 6, 9)}
    tensors = {name: tf.zeros(shape) for name, shape in shapes.items()}
    assert deform_conv2d(**tensors, strides=INTEGERS[strides]()).shape == (2, 3, 6, 8)


@pytest.mark.parametrize(
    "make",
    [np.array, tf.constant, tf.Variable, lambda pairs: [tf.constant(pair) for pair in pairs]],
)
def test_padding_may_be_numpys_or_tensorflows(make):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    padding = make([[0, 0], [1, 1], [1, 1], [0, 0]])
    assert deform_conv2d(**tensors, padding=padding).shape == (2, 5, 6, 8)


@pytest.mark.parametrize(
    ("attribute", "value", "form"),
    [
        ("strides", [1, 1], lambda tensor: tensor),
        ("strides", 1, lambda tensor: [tensor, tensor]),
        ("dilations", 1, lambda tensor: tensor),
        ("deform_groups", 1, lambda tensor: tensor),
        ("padding", [[0, 0], [1, 1], [1, 1], [0, 0]], lambda tensor: tensor),
        ("padding", 1, lambda tensor: [[0, 0], [tensor, 1], [1, 1], [0, 0]]),
    ],
)
def test_integers_that_are_known_at_run_time_only_are_refused(attribute, value, form):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    function = tf.function(lambda tensor: deform_conv2d(**tensors, **{attribute: form(tensor)}))
    with pytest.raises(ValueError, match=f"{attribute} must be known while the graph is made"):
        function(tf.constant(value))


def test_variable_is_not_known_while_the_graph_is_made():
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    strides = tf.Variable([1, 1])
    with pytest.raises(ValueError, match=r"strides must be known while .*; received <tf.Variable"):
        tf.function(lambda: deform_conv2d(**tensors, strides=strides))()


def test_process_goes_on_after_errors():
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(tf.errors.InvalidArgumentError):
        deform_conv2d(**(tensors | {"offset": tf.zeros((2, 5, 6, 2))}))
    assert deform_conv2d(**tensors).shape == (2, 5, 6, 8)
