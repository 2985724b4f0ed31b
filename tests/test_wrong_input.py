"""Wrong input: what the error says, in eager mode and while a graph is built."""

import re

import numpy as np
import pytest
import tensorflow as tf

from deform_conv import deform_conv2d

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


@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG_SHAPES, ids=IDS)
def test_wrong_shape_raises_in_eager_mode(shapes, attributes, message):
    tensors = {name: tf.zeros(shape) for name, shape in (FITTING | shapes).items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        deform_conv2d(**tensors, **attributes)


@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG_SHAPES, ids=IDS)
def test_wrong_static_shape_raises_while_the_graph_is_built(shapes, attributes, message):
    specs = [tf.TensorSpec(shape) for shape in (FITTING | shapes).values()]
    function = tf.function(lambda *tensors: deform_conv2d(*tensors, **attributes))
    with pytest.raises(ValueError, match=re.escape(message)):
        function.get_concrete_function(*specs)


@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG_SHAPES, ids=IDS)
def test_wrong_shape_that_is_known_at_run_time_only_raises_then(shapes, attributes, message):
    tensors = [tf.zeros(shape) for shape in (FITTING | shapes).values()]
    specs = [tf.TensorSpec(None) for _ in tensors]
    function = tf.function(
        lambda *tensors: deform_conv2d(*tensors, **attributes), input_signature=specs
    )
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=re.escape(message)):
        function(*tensors)


WRONG_FORMS = [
    ({"data_format": "NHCW"}, "data_format must be 'NHWC' or 'NCHW'; received 'NHCW'"),
    ({"padding": "FULL"}, "padding must be 'SAME', 'VALID' or four pairs of integers; received"),
    ({"padding": 1}, "padding must be 'SAME', 'VALID' or four pairs of integers; received 1"),
    ({"padding": ((0, 0), (1, 1))}, "padding must be 'SAME', 'VALID' or four pairs of integers"),
    ({"padding": ((0, 0), (1, 1), (1, 0.5), (0, 0))}, "padding must be an integer; received 0.5"),
    ({"strides": (1, 2, 3)}, "strides must be 1, 2 or 4 integers; received (1, 2, 3)"),
    ({"strides": 1.5}, "strides must be an integer; received 1.5"),
    ({"dilations": "2"}, "dilations must be an integer; received '2'"),
    ({"deform_groups": True}, "deform_groups must be an integer; received True"),
    ({"deform_groups": 2**70}, "deform_groups must be an integer; received 1180591620717411303424"),
]


@pytest.mark.parametrize(("attributes", "message"), WRONG_FORMS)
def test_attribute_of_the_wrong_form_raises(attributes, message):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_conv2d(**tensors, **attributes)


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
            "filters must have fewer than 2^63 bytes; received sizes 2147483647, 2147483647,",
        ),
        (
            [None, (2**29, 2**29, None, None), (None, None, None, 0)],
            64,
            "offset has 0 channels; 2 * deform_groups * 536870912 * 536870912 = more than 2^63",
        ),
        (
            [(None, 2**31 - 1, 2**31 - 1, 16), (1, 1, 16, 1), None],
            1,
            "input must have fewer than 2^63 bytes; received sizes -1, 2147483647, 2147483647, 16",
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


@pytest.mark.parametrize("strides", [np.array([2, 1]), tf.constant([2, 1]), (np.int64(2), 1)])
def test_integers_may_be_numpys_or_tensorflows(strides):
    shapes = FITTING | {"offset": (2, 3, 6, 18), "mask": (2, 3, 6, 9)}
    tensors = {name: tf.zeros(shape) for name, shape in shapes.items()}
    assert deform_conv2d(**tensors, strides=strides).shape == (2, 3, 6, 8)


def test_integers_that_are_known_at_run_time_only_are_refused():
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    function = tf.function(
        lambda strides: deform_conv2d(**tensors, strides=strides),
        input_signature=[tf.TensorSpec([2], tf.int32)],
    )
    with pytest.raises(ValueError, match="strides must be known while the graph is made"):
        function(tf.constant([1, 1]))


def test_process_goes_on_after_errors():
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(tf.errors.InvalidArgumentError):
        deform_conv2d(**(tensors | {"offset": tf.zeros((2, 5, 6, 2))}))
    assert deform_conv2d(**tensors).shape == (2, 5, 6, 8)
