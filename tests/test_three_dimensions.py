"""Three dimensions: `deform_conv3d` against the formula, the reference, other ops and its rules."""

import contextlib
import functools
import json
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from checks import (
    KNOWN,
    TYPES,
    assert_equals,
    assert_function_takes,
    assert_gradient_is_numerical,
    assert_jitted_equals,
    assert_portable_mode_gives_the_same,
    assert_portable_mode_uses_no_op_of_ours,
    assert_precise,
    assert_second_derivatives_equal,
    assert_v1_graph_equals_eager,
    assert_wrong_shape_raises,
    convolutions,
    for_types,
    gradients_alone,
    output_shape,
)
from conftest import Case, assert_close, in_format, printed_by, relative_error, run
from test_portable import INTERPRETERS
from volumes import by_formula, random_volume_case

from deform_conv import deform_conv2d, deform_conv3d, portable
from deform_conv._reference import deform_conv_reference

pytestmark = pytest.mark.usefixtures("device")

deform_conv3d_reference = functools.partial(deform_conv_reference, data_format="NDHWC")

FORMATS = ("NDHWC", "NCDHW")
EXPLICIT = [(0, 0), (0, 2), (1, 0), (3, 1), (0, 0)]


# --- The formula ---


@pytest.mark.parametrize(
    "function", [deform_conv3d, deform_conv3d_reference], ids=["op", "reference"]
)
@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"mask": False, "kernel": (1, 2, 3), "padding": EXPLICIT},
        {"strides": (1, 2, 3), "dilations": (2, 1, 1), "size": (5, 6, 7)},
        {"padding": "VALID", "size": (7, 4, 3), "kernel": (3, 2, 1), "dilations": (3, 2, 1)},
        {"groups": 2, "deform_groups": 4, "out_channels": 2, "kernel": (2, 2, 2)},
        {"groups": 3, "deform_groups": 2, "channels": 6, "kernel": (2, 1, 2), "offset_scale": 8},
        {"channels": 5, "out_channels": 5, "groups": 5, "kernel": (1, 3, 1), "deform_groups": 5},
        {"channels": 1, "out_channels": 1, "size": (1, 1, 1), "batch": 1, "kernel": (1, 1, 1)},
        {"channels": 19, "out_channels": 17, "size": (2, 3, 2), "kernel": (2, 2, 1)},
    ],
    ids=str,
)
def test_equals_the_formula(configuration, function, rng):
    case = random_volume_case(rng, **configuration)
    output = function(**case.tensors(), **case.attributes)
    grad_output = rng.standard_normal(output.shape)
    actual = run(case.tensors(), case.attributes, tf.constant(grad_output), function)
    expected = by_formula(**case.arrays, **case.attributes, grad_output=grad_output)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("argument", ["input", "filters", "offset", "mask"])
def test_gradient_is_the_numerical_one(argument, data_format, rng):
    case = random_volume_case(
        rng, batch=1, size=(4, 2, 3), kernel=(2, 1, 3), strides=(2, 1, 1), groups=2, deform_groups=2
    )
    assert_gradient_is_numerical(deform_conv3d, case, argument, data_format, rng)


def on_the_border(case):
    """The case with samples at whole numbers, and just within and just outside of each border."""
    near = np.array([-1, -1 + 1e-9, -1e-9, 0, 1, 1.5, 2, 3, 3 - 1e-9, 4, 4 - 1e-9, 5, -2, 2.25])
    offset = case.arrays["offset"]
    chosen = np.random.default_rng(5).choice(near, size=offset.shape)
    return Case(case.arrays | {"offset": chosen}, case.attributes)


def test_borders_and_whole_positions_follow_the_formula(rng):
    """A sample counts if -1 < position < size; derivatives are those towards +, and 0 at -1."""
    attributes = {"kernel": (1, 1, 1), "size": (4, 5, 3), "batch": 3, "deform_groups": 2}
    case = on_the_border(random_volume_case(rng, **attributes))
    # Positions themselves, with nothing added.
    batch, *size, channels = case.arrays["offset"].shape
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    case.arrays["offset"] -= np.tile(grid, channels // 3)
    actual = run(case.tensors(), case.attributes, function=deform_conv3d)
    expected = by_formula(**case.arrays, **case.attributes)
    for key, value in actual.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-12, atol=1e-12, err_msg=key)
    position = case.arrays["offset"].reshape(batch, *size, 2, 3) + grid[..., np.newaxis, :]
    at_minus_one = np.any(position == -1, axis=-1)
    assert np.any(at_minus_one)
    assert not np.any(actual["grad_offset"].numpy().reshape(position.shape)[at_minus_one])


# --- Other ops ---


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 3)])
def test_at_zero_offsets_it_is_conv3d(strides, padding, rng):
    case = random_volume_case(rng, size=(5, 6, 7), strides=strides, padding=padding, mask=False)
    tensors = case.tensors()
    tensors["offset"] = tf.zeros_like(tensors["offset"])
    expected = tf.nn.conv3d(tensors["input"], tensors["filters"], [1, *strides, 1], padding)
    assert relative_error(deform_conv3d(**tensors, **case.attributes), expected) <= 1e-12


@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"groups": 2, "deform_groups": 2, "mask": False},
        {"strides": (1, 2, 1), "dilations": (1, 1, 2), "padding": "VALID"},
    ],
    ids=str,
)
def test_one_plane_without_dz_is_deform_conv2d(configuration, rng):
    shape = {"size": (1, 7, 8), "kernel": (1, 3, 3)}
    case = random_volume_case(rng, **shape, **configuration)
    offset = case.arrays["offset"]
    triples = offset.reshape(*offset.shape[:-1], -1, 3)
    triples[..., 0] = 0
    plane = {name: array[:, 0] for name, array in case.arrays.items() if name != "filters"}
    plane["filters"] = case.arrays["filters"][0]
    plane["offset"] = triples[:, 0, ..., 1:].reshape(*offset.shape[:1], *offset.shape[2:-1], -1)
    attributes = case.attributes | {
        key: case.attributes[key][1:] for key in ("strides", "dilations")
    }
    expected = run(Case(plane).tensors(), attributes, function=deform_conv2d)
    actual = run(case.tensors(), case.attributes, function=deform_conv3d)
    assert set(actual) == set(expected)
    for key, value in actual.items():
        found = tf.reshape(value, triples.shape)[..., 1:] if key == "grad_offset" else value
        assert relative_error(tf.reshape(found, expected[key].shape), expected[key]) <= 1e-12, key


# --- The reference ---


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    configuration=convolutions(axes=3, most=7),
    data_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_reference_in_any_configuration(configuration, data_format, seed):
    rng = np.random.default_rng(seed)
    case = random_volume_case(rng, **configuration)
    assert_equals(deform_conv3d, deform_conv_reference, case, data_format, rng)


@pytest.mark.parametrize(
    "configuration",
    [
        {"padding": EXPLICIT, "kernel": (1, 2, 3)},
        # Beyond a tile or band.
        {"size": (6, 14, 15), "channels": 32, "out_channels": 24, "deform_groups": 2},
        {"size": (6, 14, 15), "channels": 24, "out_channels": 24, "groups": 24},
        {"size": (4, 9, 9), "channels": 96, "out_channels": 40, "mask": False},
        {"size": (4, 9, 9), "channels": 33, "out_channels": 12, "groups": 3, "batch": 5},
    ],
    ids=str,
)
@for_types(TYPES)
def test_precision(configuration, dtype, offset_dtype, tolerance, rng):
    case = random_volume_case(rng, **configuration)
    assert_precise(
        deform_conv3d, deform_conv3d_reference, case, dtype, offset_dtype, tolerance, FORMATS
    )


def test_volumes_that_are_converted_some_at_a_time_are_added_up(rng):
    """On a CPU, 16-bit tensors are copied into float32, as many volumes at a time as fit."""
    case = random_volume_case(
        rng, batch=7, size=(24, 40, 40), channels=8, out_channels=8, kernel=(1, 2, 2)
    ).rounded_to(tf.float16, tf.float32)
    expected = run(case.tensors(tf.float32), case.attributes, function=deform_conv3d)
    actual = run(case.tensors(tf.float16, tf.float32), case.attributes, function=deform_conv3d)
    assert_close(actual, expected, 1e-3)


# --- Gradients ---


def test_a_gradient_alone_is_that_of_all(rng):
    case = random_volume_case(rng, groups=2, deform_groups=2)
    everything = run(case.tensors(), case.attributes, function=deform_conv3d)
    for name in case.arrays:
        gradients = gradients_alone(deform_conv3d, *case.arguments(), [name])
        assert relative_error(gradients[name], everything[f"grad_{name}"]) <= 1e-14, name


@pytest.mark.parametrize("data_format", FORMATS)
def test_second_order_gradients_are_those_of_the_reference(data_format, rng):
    case = random_volume_case(
        rng, size=(2, 3, 4), kernel=(2, 1, 2), deform_groups=2, padding="VALID"
    )
    assert_second_derivatives_equal(deform_conv3d, deform_conv_reference, case, 1e-10, data_format)


# --- Infinite numbers, NaN, and nothing at all ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offset_that_is_no_place_gives_zero(axis, bad, rng):
    case = random_volume_case(rng, kernel=(1, 1, 1), channels=3, out_channels=3)
    case.arrays["offset"][..., axis] = bad
    case.arrays["mask"][:] = np.inf
    for key, value in run(case.tensors(), case.attributes, function=deform_conv3d).items():
        assert not np.any(value), key


@pytest.mark.parametrize("argument", ["input", "filters", "offset", "mask", "grad_output"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_number_spoils_what_it_spoils_in_the_formula(argument, bad, rng):
    case = random_volume_case(rng, size=(4, 4, 5), batch=1, groups=2, deform_groups=2)
    case.arrays["offset"][:, :2] = np.round(case.arrays["offset"][:, :2])
    case.arrays["grad_output"] = rng.standard_normal((1, 4, 4, 5, 6))
    array = case.arrays[argument]
    array[(..., *np.array(array.shape[-4:]) // 2)] = bad
    with np.errstate(invalid="ignore"):
        expected = by_formula(**case.arrays, **case.attributes)
    tensors = case.tensors()
    grad_output = tensors.pop("grad_output")
    for key, value in run(tensors, case.attributes, grad_output, deform_conv3d).items():
        finite = np.isfinite(expected[key])
        np.testing.assert_array_equal(np.isfinite(value), finite, key)
        np.testing.assert_allclose(value.numpy()[finite], expected[key][finite], 1e-10, 1e-10)


@pytest.mark.parametrize(
    "configuration",
    [
        {"batch": 0},
        {"size": (0, 4, 5)},
        {"size": (4, 4, 0), "mask": False},
        # As in tf.nn.conv3d: an input that is short of the kernel by less than a stride.
        {"size": (1, 4, 5), "kernel": (2, 2, 2), "padding": "VALID"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [tf.float32, tf.float16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("data_format", FORMATS)
def test_empty_tensors_give_empty_ones_and_zeros(configuration, dtype, data_format, rng):
    case = random_volume_case(rng, **configuration)
    tensors, attributes = case.arguments(dtype, data_format=data_format)
    for key, value in run(tensors, attributes, function=deform_conv3d).items():
        assert not np.any(value), key
        if key != "output":
            assert value.shape == tensors[key.removeprefix("grad_")].shape


# --- Wrong input ---

# Arguments that fit, for a 3x3x3 kernel on 2 volumes of 4x5x6 with 4 channels.
FITTING = {
    "input": (2, 4, 5, 6, 4),
    "filters": (3, 3, 3, 4, 8),
    "offset": (2, 4, 5, 6, 81),
    "mask": (2, 4, 5, 6, 27),
}
PADDING = ((0, 0), (1, 1), (1, -1), (1, 1), (0, 0))
WRONG_SHAPES = [
    (
        {"offset": (2, 4, 5, 6, 54)},
        {},
        "offset has 54 channels; 3 * deform_groups * 3 * 3 * 3 = 81 expected",
    ),
    (
        {"mask": (2, 4, 5, 6, 26)},
        {},
        "mask has 26 channels; deform_groups * 3 * 3 * 3 = 27 expected",
    ),
    (
        {"offset": (2, 4, 5, 5, 81)},
        {},
        "offset has depth, height and width 4x5x5; those of the output, 4x5x6, expected",
    ),
    (
        {},
        {"strides": (2, 1, 1)},
        "offset has depth, height and width 4x5x6; those of the output, 2x5x6, expected",
    ),
    ({"mask": (1, 4, 5, 6, 27)}, {}, "mask has batch size 1; that of input, 2, expected"),
    ({"filters": (3, 3, 3, 3, 8)}, {}, "filters have 3 input channels; a divisor of the input's 4"),
    (
        {"filters": (3, 3, 3, 2, 7)},
        {},
        "filters have 7 output channels; a multiple of the 2 groups",
    ),
    ({"filters": (3, 3, 3, 0, 8)}, {}, "filters must have at least 1 input and 1 output channel"),
    ({"filters": (3, 0, 3, 4, 8)}, {}, "filters must have a depth, height and width from 1 to"),
    ({"input": (2, 4, 5, 6, 0)}, {}, "input must have at least 1 channel; received 0"),
    ({"input": (4, 5, 6, 4)}, {}, "input must have rank 5; received shape [4, 5, 6, 4]"),
    ({"mask": ()}, {}, "mask must have rank 5; received shape []"),
    ({}, {"deform_groups": 3}, "deform_groups must divide the input's 4 channels; received 3"),
    ({}, {"deform_groups": 0}, "deform_groups must be from 1 to 2147483647; received 0"),
    ({}, {"strides": 0}, "strides must be from 1 to 2147483647; received (0, 0, 0)"),
    ({}, {"dilations": (1, 1, -2)}, "dilations must be from 1 to 2147483647; received (1, 1, -2)"),
    ({}, {"strides": (2, 1, 1, 1, 1)}, "strides must be 5 numbers, 1 for batch and channels"),
    ({}, {"padding": PADDING}, "padding must be from 0 to 2147483647; received -1"),
    (
        {},
        {"padding": ((1, 1), *PADDING[1:])},
        "padding must be 5 pairs of numbers, 0 for batch and channels",
    ),
    (
        {"filters": (9, 3, 3, 4, 8)},
        {"padding": "VALID"},
        "input has depth 4 with its padding; at least 8 expected for the dilated kernel's depth, 9",
    ),
]
IDS = [message[:50] for *_, message in WRONG_SHAPES]


@pytest.mark.parametrize("in_portable_mode", [False, True], ids=["op", "portable"])
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG_SHAPES, ids=IDS)
def test_wrong_shape_raises(shapes, attributes, message, known, in_portable_mode):
    with portable() if in_portable_mode else contextlib.nullcontext():
        assert_wrong_shape_raises(deform_conv3d, FITTING | shapes, message, known, **attributes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_format": "NHWC"}, "data_format must be 'NDHWC' or 'NCDHW'; received 'NHWC'"),
        ({"name": 1}, "name must be a string or None; received 1"),
        ({"strides": (1, 2)}, "strides must be 1, 3 or 5 integers; received (1, 2)"),
        ({"dilations": "2"}, "dilations must be an integer; received '2'"),
        ({"deform_groups": 1.5}, "deform_groups must be an integer; received 1.5"),
        (
            {"padding": [[0, 0]] * 4},
            "padding must be 'SAME', 'VALID' or five pairs of integers; received",
        ),
        ({"padding": "FULL"}, "padding must be 'SAME', 'VALID' or five pairs of integers"),
        ({"input": tf.zeros([1], tf.int32)}, "input must be float32, float64, float16 or bfloat16"),
        ({"filters": tf.zeros([1], tf.float16)}, "filters must be float32 here; received float16"),
        ({"offset": tf.zeros([1], tf.float64)}, "offset must be float32 here; received float64"),
        ({"mask": tf.zeros([1], tf.float64)}, "mask must be float32 here; received float64"),
    ],
    ids=str,
)
def test_wrong_argument_is_named(changes, message):
    fitting = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_conv3d(**fitting | changes)


@pytest.mark.parametrize("form", [np.array, tf.constant])
def test_padding_may_be_an_array(form, rng):
    case = random_volume_case(rng, padding=EXPLICIT)
    as_array = case.attributes | {"padding": form(EXPLICIT)}
    expected = deform_conv3d(**case.tensors(), **case.attributes)
    np.testing.assert_array_equal(deform_conv3d(**case.tensors(), **as_array), expected)


@pytest.mark.parametrize("data_format", FORMATS)
def test_filters_in_the_order_of_other_libraries_are_named(data_format):
    shapes = FITTING | {"filters": (8, 4, 3, 3, 3)}
    tensors = {
        name: in_format(np.zeros(shape), name, data_format) for name, shape in shapes.items()
    }
    message = (
        "filters must be [KD, KH, KW, C / groups, O] (DHWIO); received [8, 4, 3, 3, 3], which fits "
        "as [O, C / groups, KD, KH, KW] (OIDHW): pass tf.transpose(filters, [2, 3, 4, 1, 0])"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_conv3d(**tensors, data_format=data_format)


# --- Modes of TensorFlow ---


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [None, [None] * 5], ids=["unknown rank", "unknown sizes"])
def test_unknown_shapes(shape, data_format, rng):
    case = random_volume_case(rng, deform_groups=2, strides=(1, 2, 1), padding=EXPLICIT)
    assert_function_takes([case], deform_conv3d, deform_conv3d, 1e-14, shape, data_format)


def test_static_shapes_follow_from_what_is_known():
    def shape_of(**shapes):
        return output_shape(deform_conv3d, (FITTING | shapes).values())

    assert shape_of() == [2, 4, 5, 6, 8]
    assert shape_of(input=[None] * 5, mask=[None] * 5) == [2, 4, 5, 6, 8]
    # The offset alone tells the depth.
    assert shape_of(input=(None, None, 5, 6, 4)) == [2, 4, 5, 6, 8]
    assert shape_of(**dict.fromkeys(FITTING)) == [None] * 5


@pytest.mark.parametrize("data_format", FORMATS)
def test_portable_mode_computes_the_same(data_format, rng):
    case = random_volume_case(rng, groups=2, deform_groups=2, padding=EXPLICIT)
    arguments = case.arguments(data_format=data_format)
    assert_portable_mode_gives_the_same(deform_conv3d, *arguments)
    assert_portable_mode_uses_no_op_of_ours(deform_conv3d, *arguments)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_portable_mode_runs_in_litert(rng):
    case = random_volume_case(rng, batch=1, deform_groups=2)
    tensors = case.tensors(tf.float32)
    filters = tensors.pop("filters")

    def convolve(input, offset, mask):
        return deform_conv3d(input, filters, offset, mask, **case.attributes)

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors.values()]
    with portable():
        function = tf.function(convolve).get_concrete_function(*specs)
        program = tf.lite.TFLiteConverter.from_concrete_functions([function]).convert()
    interpreter = INTERPRETERS[-1](model_content=program)
    interpreter.allocate_tensors()
    for given, tensor in zip(interpreter.get_input_details(), tensors.values(), strict=True):
        interpreter.set_tensor(given["index"], tensor)
    interpreter.invoke()
    (result,) = interpreter.get_output_details()
    assert relative_error(interpreter.get_tensor(result["index"]), convolve(**tensors)) <= 1e-6


def test_jit_compile_computes_the_same(rng):
    case = random_volume_case(rng, deform_groups=2, strides=(1, 2, 1))
    assert_jitted_equals(deform_conv3d, *case.arguments(), 1e-12)


@pytest.mark.parametrize("data_format", FORMATS)
def test_v1_graph_equals_eager(data_format, rng):
    case = random_volume_case(rng, deform_groups=2)
    assert_v1_graph_equals_eager(deform_conv3d, case, data_format=data_format)


# --- Threads and instruction sets ---

COMPUTE = """
import json, sys
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
from conftest import run
from deform_conv import deform_conv3d
from volumes import random_volume_case
results = {}
for configuration in (
    {"size": (6, 11, 12), "channels": 24, "out_channels": 20, "deform_groups": 2},
    {"size": (5, 6, 7), "channels": 6, "out_channels": 12, "groups": 6, "batch": 3},
):
    case = random_volume_case(np.random.default_rng(1), **configuration)
    for dtype in (tf.float64, tf.float32):
        for key, value in run(case.tensors(dtype), case.attributes, None, deform_conv3d).items():
            results[f"{dtype.name} {configuration} {key}"] = value.numpy().ravel().tolist()
print(json.dumps(results))
"""


@functools.cache
def compute(threads, instruction_set=""):
    """Results of a process with so many threads; numbers are printed with all their digits."""
    environment = {"DEFORM_CONV_CPU_ISA": instruction_set, "CUDA_VISIBLE_DEVICES": ""}
    return json.loads(printed_by(COMPUTE, threads, **environment))


@pytest.mark.parametrize(
    ("threads", "instruction_set"), [(1, ""), (3, ""), (7, ""), (2, "avx2"), (2, "baseline")]
)
def test_threads_and_instruction_set_change_rounding_at_most(threads, instruction_set):
    actual, expected = compute(threads, instruction_set), compute(2)
    assert set(actual) == set(expected)
    for key, value in actual.items():
        tolerance = 1e-14 if key.startswith("float64") else 2e-6
        assert relative_error(value, expected[key]) <= tolerance, key


def test_same_number_of_threads_gives_the_same_bits():
    assert compute.__wrapped__(3) == compute(3)


# --- On a GPU ---


@pytest.mark.gpu
def test_op_runs_on_the_gpu(rng):
    with tf.device("GPU:0"):
        results = run(random_volume_case(rng).tensors(tf.float32), {}, function=deform_conv3d)
    assert all("GPU" in value.device for value in results.values())


@pytest.mark.gpu
def test_positions_in_several_chunks(rng):
    """Their columns take more than the 512 MiB of a chunk."""
    case = random_volume_case(rng, batch=1, size=(13, 60, 64), channels=64, out_channels=4)
    results = {}
    for device in ("CPU:0", "GPU:0"):
        with tf.device(device):
            results[device] = run(case.tensors(), case.attributes, function=deform_conv3d)
    assert_close(results["GPU:0"], results["CPU:0"], 1e-12)
