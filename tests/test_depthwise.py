"""deform_depthwise_conv2d: against tf.nn.depthwise_conv2d, the reference, and the rules."""

import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import in_format, random_case, relative_error, run

from deform_conv import deform_conv2d, deform_depthwise_conv2d, portable, xla_kernels_loaded
from deform_conv._reference import deform_conv2d_reference

pytestmark = pytest.mark.usefixtures("device")

FORMATS = ("NHWC", "NCHW")
NAMES = ("input", "filters", "offset", "mask")


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
    for key, value in actual.items():
        assert relative_error(value, expected[key]) <= (1e-6 if dtype == tf.float32 else 1e-14), key


# --- Other offsets: the reference ---

TYPES = [
    # dtype of input and filters, of offset and mask, tolerance
    (tf.float64, tf.float64, 1e-12),
    (tf.float32, tf.float32, 1e-6),
    (tf.float16, tf.float32, 5e-3),
    (tf.float16, tf.float16, 5e-3),
    (tf.bfloat16, tf.float32, 2e-2),
    (tf.bfloat16, tf.bfloat16, 2e-2),
]


@pytest.mark.parametrize(
    ("dtype", "offset_dtype", "tolerance"), TYPES, ids=lambda value: getattr(value, "name", None)
)
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
    case = case.rounded_to(dtype, offset_dtype)
    expected = run(case.tensors(), case.attributes, function=channel_by_channel)
    for data_format in FORMATS:
        actual = run(
            case.tensors(dtype, offset_dtype, data_format),
            case.attributes_in(data_format),
            function=deform_depthwise_conv2d,
        )
        for key, value in actual.items():
            error = relative_error(
                tf.cast(value, tf.float64), in_format(expected[key].numpy(), key, data_format)
            )
            assert error <= tolerance, key


def test_is_deform_conv2d_with_as_many_groups_as_channels(rng):
    case = depthwise_case(rng, 12, 2, deform_groups=3)
    tensors = case.tensors(tf.float32)
    ours = deform_depthwise_conv2d(**tensors, **case.attributes)
    tensors["filters"] = tf.reshape(tensors["filters"], (3, 3, 1, 24))
    np.testing.assert_array_equal(ours, deform_conv2d(**tensors, **case.attributes))


def test_gradients_equal_finite_differences(rng):
    case = depthwise_case(rng, 2, 2, batch=1, size=(4, 3), kernel=(2, 2), offset_scale=0.7)
    theoretical, numerical = tf.test.compute_gradient(
        lambda *values: deform_depthwise_conv2d(*values, **case.attributes),
        [case.arrays[name] for name in NAMES],
        delta=1e-5,
    )
    for ours, differences in zip(theoretical, numerical, strict=True):
        np.testing.assert_allclose(ours, differences, atol=1e-7)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "jit"])
def test_one_function_takes_any_shape(jit_compile, rng):
    if jit_compile and not xla_kernels_loaded():
        pytest.skip("no XLA kernels")
    specs = {name: tf.TensorSpec(None, tf.float64) for name in NAMES}
    function = tf.function(
        lambda tensors: run(tensors, {}, function=deform_depthwise_conv2d),
        input_signature=None if jit_compile else [specs],
        jit_compile=jit_compile,
    )
    for channels in (6, 5):
        case = depthwise_case(rng, channels, 2)
        expected = run(case.tensors(), {}, function=channel_by_channel)
        for key, value in function(case.tensors()).items():
            assert relative_error(value, expected[key]) <= 1e-12


def test_portable_mode_gives_what_the_op_gives(rng):
    case = depthwise_case(rng, 4, 3, deform_groups=2)
    expected = run(case.tensors(), case.attributes, function=deform_depthwise_conv2d)
    with portable():
        actual = run(case.tensors(), case.attributes, function=deform_depthwise_conv2d)
    for key, value in actual.items():
        assert relative_error(value, expected[key]) <= 1e-12, key


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


@pytest.mark.parametrize("known", ["eager", "static"])
@pytest.mark.parametrize(
    ("shapes", "attributes", "message"), WRONG, ids=[m[:30] for *_, m in WRONG]
)
def test_wrong_shape_raises(shapes, attributes, message, known):
    tensors = {name: tf.zeros(shape) for name, shape in (FITTING | shapes).items()}
    function = deform_depthwise_conv2d if known == "eager" else tf.function(deform_depthwise_conv2d)
    expected = tf.errors.InvalidArgumentError if known == "eager" else ValueError
    with pytest.raises(expected, match=re.escape(message)):
        function(**tensors, **attributes)


def test_wrong_shape_that_is_known_at_run_time_only_raises_then():
    specs = [tf.TensorSpec(None)] * 3
    function = tf.function(deform_depthwise_conv2d, input_signature=specs)
    tensors = [tf.zeros((2, 5, 6, 4)), tf.zeros((3, 3, 2, 4)), tf.zeros((2, 5, 6, 18))]
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        function(*tensors)
    assert "filters have 2 channels" in str(error.value).replace("] [", "")


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
