"""deform_depthwise_conv2d: against tf.nn.depthwise_conv2d, the reference, and the rules."""

import re

import numpy as np
import pytest
import tensorflow as tf
from checks import (
    KNOWN,
    TYPES,
    assert_function_takes,
    assert_gradient_is_numerical,
    assert_portable_mode_gives_the_same,
    assert_precise,
    assert_wrong_shape_raises,
    for_types,
    needs_xla,
)
from conftest import assert_close, random_case, run

from deform_conv import deform_conv2d, deform_depthwise_conv2d
from deform_conv._reference import deform_conv2d_reference

pytestmark = pytest.mark.usefixtures("device")

FORMATS = ("NHWC", "NCHW")


def depthwise_case(rng, channels, multiplier, **configuration):
    """Filters [KH, KW, C, M] of normal numbers."""
    case = random_case(rng, channels=channels, out_channels=channels * multiplier, groups=channels,
                       **configuration)  # fmt: skip
    filters = case.arrays["filters"]
    case.arrays["filters"] = filters.reshape(*filters.shape[:2], channels, multiplier)
    return case


def channel_by_channel(input, filters, offset, mask=None, deform_groups=1, **attributes):
    """Each channel as a layer of its own, in NHWC."""
    channels = input.shape[-1]
    taps = filters.shape[0] * filters.shape[1]
    outputs = []
    for c in range(channels):
        g = c * deform_groups // channels
        outputs.append(
            deform_conv2d_reference(
                input[..., c : c + 1],
                filters[:, :, c : c + 1],
                offset[..., 2 * taps * g : 2 * taps * (g + 1)],
                None if mask is None else mask[..., taps * g : taps * (g + 1)],
                **attributes,
            )
        )
    return tf.concat(outputs, axis=-1)


# --- Zero offsets: tf.nn.depthwise_conv2d ---


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": 2},
        {"padding": "VALID", "dilations": 2},
        {"padding": ((0, 0), (2, 1), (0, 3), (0, 0))},
    ],
    ids=str,
)
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("channels", [1, 4, 17])
def test_zero_offsets_give_depthwise_conv2d(channels, multiplier, attributes, dtype, rng):
    attributes = {"strides": 1, "padding": "SAME", "dilations": 1} | attributes
    image = tf.constant(rng.standard_normal((2, 9, 10, channels)), dtype)
    filters = tf.constant(rng.standard_normal((3, 2, channels, multiplier)), dtype)

    def plain(input, filters, strides, padding, dilations):
        return tf.nn.depthwise_conv2d(
            input, filters, [1, strides, strides, 1], padding, dilations=[dilations] * 2
        )

    tensors = {"input": image, "filters": filters}
    expected = run(tensors, attributes, function=plain)
    offset = tf.zeros((*expected["output"].shape[:3], 2 * 3 * 2), dtype)
    actual = run(tensors, attributes | {"offset": offset}, function=deform_depthwise_conv2d)
    assert_close(actual, expected, 1e-6 if dtype == tf.float32 else 1e-14)


# --- Other offsets: the reference ---


@for_types(TYPES)
@pytest.mark.parametrize(
    "configuration",
    [
        {"channels": 8, "multiplier": 1},
        {"channels": 8, "multiplier": 3, "deform_groups": 2, "mask": False},
        {"channels": 1, "multiplier": 3},
        {"channels": 1, "multiplier": 1},
        {"channels": 6, "multiplier": 2, "deform_groups": 6, "strides": (2, 1)},
        {"channels": 5, "multiplier": 1, "kernel": (1, 4), "dilations": (1, 2), "padding": "VALID"},
        {"channels": 3, "multiplier": 2, "batch": 0},
        {"channels": 3, "multiplier": 2, "size": (0, 5)},
    ],
    ids=str,
)
def test_equals_the_reference_channel_by_channel(
    configuration, dtype, offset_dtype, tolerance, rng
):
    case = depthwise_case(rng, **{"size": (9, 11)} | configuration)
    assert_precise(
        deform_depthwise_conv2d, channel_by_channel, case, dtype, offset_dtype, tolerance, FORMATS
    )


def test_is_deform_conv2d_with_as_many_groups_as_channels(rng):
    case = depthwise_case(rng, 12, 2, deform_groups=3)
    tensors = case.tensors(tf.float32)
    ours = deform_depthwise_conv2d(**tensors, **case.attributes)
    tensors["filters"] = tf.reshape(tensors["filters"], (3, 3, 1, 24))
    np.testing.assert_array_equal(ours, deform_conv2d(**tensors, **case.attributes))


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("argument", ["input", "filters", "offset", "mask"])
def test_gradient_is_the_numerical_one(argument, data_format, rng):
    case = depthwise_case(rng, 2, 2, size=(4, 3), kernel=(2, 2))
    assert_gradient_is_numerical(deform_depthwise_conv2d, case, argument, data_format, rng)


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=needs_xla)], ids=["plain", "jit"]
)
def test_one_function_takes_any_shape(jit_compile, rng):
    assert_function_takes(
        [depthwise_case(rng, channels, 2) for channels in (6, 5)],
        deform_depthwise_conv2d,
        channel_by_channel,
        1e-12,
        shape="each" if jit_compile else None,
        jit_compile=jit_compile,
    )


def test_portable_mode_gives_what_the_op_gives(rng):
    case = depthwise_case(rng, 4, 3, deform_groups=2)
    assert_portable_mode_gives_the_same(deform_depthwise_conv2d, *case.arguments())


# --- Wrong input ---

FITTING = {
    "input": (2, 5, 6, 4),
    "filters": (3, 3, 4, 2),
    "offset": (2, 5, 6, 18),
    "mask": (2, 5, 6, 9),
}
WRONG = [
    ({"filters": (3, 3, 2, 2)}, {}, "filters have 2 channels in [KH, KW, C, M]; the input's 4 exp"),
    ({"filters": (8, 1, 3, 3)}, {}, "filters have 3 channels in [KH, KW, C, M]; the input's 4 exp"),
    ({"filters": (3, 3, 4)}, {}, "filters must have rank 4; received shape [3, 3, 4]"),
    ({"input": (5, 6, 4)}, {}, "input must have rank 4; received shape [5, 6, 4]"),
    ({"filters": (3, 3, 4, 0)}, {}, "filters must have at least 1 input and 1 output channel"),
    ({"offset": (2, 5, 6, 36)}, {}, "offset has 36 channels; 2 * deform_groups * 3 * 3 = 18 exp"),
    ({"mask": (2, 5, 6, 18)}, {}, "mask has 18 channels; deform_groups * 3 * 3 = 9 expected"),
    ({}, {"deform_groups": 3}, "deform_groups must divide the input's 4 channels; received 3"),
]


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(
    ("shapes", "attributes", "message"), WRONG, ids=[m[:30] for *_, m in WRONG]
)
def test_wrong_shape_raises(shapes, attributes, message, known):
    assert_wrong_shape_raises(
        deform_depthwise_conv2d, FITTING | shapes, message, known, **attributes
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": None}, "filters must be a tensor of float32 here; received None"),
        ({"filters": tf.zeros((3, 3, 4, 2), tf.float64)}, "filters must be float32 here; received"),
        (
            {"input": "no image"},
            "input must be float32, float64, float16 or bfloat16; received str",
        ),
        ({"data_format": "NWHC"}, "data_format must be 'NHWC' or 'NCHW'; received 'NWHC'"),
        ({"strides": "2"}, "strides must be an integer; received '2'"),
        ({"name": 3}, "name must be a string or None; received 3"),
    ],
    ids=str,
)
def test_wrong_form_or_type_names_the_argument(arguments, message):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_depthwise_conv2d(**tensors | arguments)
