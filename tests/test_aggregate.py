"""deform_aggregate2d: against InternImage, filters of ones, and the rules; in every mode."""

import contextlib
import os
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from checks import (
    KNOWN,
    MODES,
    TYPES,
    assert_equals,
    assert_forward_mode_is_the_jacobian,
    assert_function_takes,
    assert_gradient_is_numerical,
    assert_jitted_equals,
    assert_parts_equal_the_whole,
    assert_portable_mode_gives_the_same,
    assert_portable_mode_uses_no_op_of_ours,
    assert_precise,
    assert_saved_model_runs_and_trains_in_another_process,
    assert_second_derivatives_equal,
    assert_v1_graph_equals_eager,
    assert_wrong_shape_raises,
    configurations,
    for_types,
    gradients_alone,
    needs_xla,
    output_shape,
)
from conftest import assert_close, dcnv3_cases, random_case, relative_error, run

from deform_conv import deform_aggregate2d, deform_conv2d, portable
from deform_conv._dcnv3 import from_dcnv3_offset
from deform_conv._library import record
from deform_conv._reference import deform_aggregate2d_reference, deform_conv2d_reference

pytestmark = pytest.mark.usefixtures("device")

FORMATS = ("NHWC", "NCHW")
NAMES = ("input", "offset", "weights")


def aggregate_case(rng, **configuration):
    return random_case(rng, filters=False, **configuration)


def with_filters_of_ones(input, offset, weights, kernel_size, function=deform_conv2d, **attributes):
    """The same by a depthwise convolution."""
    axis = attributes.get("data_format", "NHWC").index("C")
    filters = tf.ones((*kernel_size, 1, input.shape[axis]), input.dtype)
    return function(input, filters, offset, weights, **attributes)


def reference_with_ones(*args, **kwargs):
    return with_filters_of_ones(*args, function=deform_conv2d_reference, **kwargs)


# --- Golden cases: InternImage's reference function in PyTorch, `dcnv3_core_pytorch`, float64 ---


GOLDEN = dcnv3_cases()


def aggregate_as_dcnv3(input, offset, mask, config, offset_scale, data_format, function):
    """From the arguments of InternImage's function."""
    kernel_h, kernel_w, *sizes, groups, remove_center = (int(number) for number in config)
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = sizes
    offset, weights = from_dcnv3_offset(
        offset,
        mask,
        (kernel_h, kernel_w),
        (dilation_h, dilation_w),
        groups,
        float(offset_scale),
        bool(remove_center),
    )
    padding = [[0, 0], [pad_h, pad_h], [pad_w, pad_w], [0, 0]]
    if data_format == "NCHW":
        input, offset, weights = (tf.transpose(t, [0, 3, 1, 2]) for t in (input, offset, weights))
        padding = [padding[axis] for axis in (0, 3, 1, 2)]
    output = function(
        input,
        offset,
        weights,
        (kernel_h, kernel_w),
        strides=(stride_h, stride_w),
        padding=padding,
        dilations=(dilation_h, dilation_w),
        deform_groups=groups,
        data_format=data_format,
    )
    return output if data_format == "NHWC" else tf.transpose(output, [0, 2, 3, 1])


@pytest.mark.parametrize("function", [deform_aggregate2d, deform_aggregate2d_reference])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_internimage(name, data_format, function):
    case = GOLDEN[name]
    tensors = {key: tf.constant(case[key]) for key in ("input", "offset", "mask")}
    attributes = {key: case[key] for key in ("config", "offset_scale")}
    attributes |= {"data_format": data_format, "function": function}
    actual = run(tensors, attributes, tf.constant(case["grad_output"]), aggregate_as_dcnv3)
    assert_close(actual, {key: case[key] for key in actual}, 1e-12)


def test_tap_that_internimage_removes_costs_no_number():
    """It samples nothing, whatever the image; and the offset is finite, for those who check."""
    offset, weights = from_dcnv3_offset(
        tf.zeros((1, 5, 5, 16), tf.float16), tf.ones((1, 5, 5, 8), tf.float16), (3, 3),
        remove_center=True,
    )  # fmt: skip
    assert np.all(np.isfinite(offset))
    image = np.ones((1, 5, 5, 1), np.float16)
    image[0, 0, 0] = np.nan  # which only samples of this very pixel read
    output = deform_aggregate2d(tf.constant(image), offset, weights, 3).numpy()[0, :, :, 0]
    assert output[0, 0] == 3 and output[3, 3] == 8
    assert np.isnan(output[1, 1])


def test_kernel_without_a_center_has_none_to_remove():
    with pytest.raises(ValueError, match="odd height and width; received 3x2"):
        from_dcnv3_offset(tf.zeros((1, 5, 5, 10)), tf.zeros((1, 5, 5, 5)), (3, 2), remove_center=1)


# --- The same as filters of ones ---


@st.composite
def aggregations(draw):
    deform_groups = draw(st.integers(1, 4))
    channels = deform_groups * draw(st.sampled_from([1, 2, 3, 8, 17]))
    return draw(configurations()) | {"channels": channels, "deform_groups": deform_groups}


@hypothesis.given(
    configuration=aggregations(),
    data_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_filters_of_ones_in_any_configuration(configuration, data_format, seed):
    rng = np.random.default_rng(seed)
    case = aggregate_case(rng, **configuration)
    assert_equals(deform_aggregate2d, reference_with_ones, case, data_format, rng)


# Widths of a deformable group, and sizes, for which kernels differ.
LAYERS = [
    {"channels": 1},
    {"channels": 15, "deform_groups": 5},
    {"channels": 32, "deform_groups": 4, "strides": (2, 2)},
    {"channels": 64, "deform_groups": 4, "size": (28, 28)},
    {"channels": 64, "size": (31, 23)},
    {"channels": 128, "deform_groups": 4, "batch": 1},
    {"channels": 320},
    {"channels": 66, "deform_groups": 33},
    {"channels": 1100, "batch": 1},
    {"channels": 32, "offset_scale": 9.0},
    {"channels": 32, "kernel": (7, 7), "dilations": (3, 3), "offset_scale": 3.0},
    {"channels": 16, "kernel": (2, 5), "strides": (2, 3), "padding": "VALID"},
    {"channels": 16, "kernel": (1, 9), "size": (1, 70)},
    {"channels": 16, "kernel": (23, 23), "batch": 1},
    {"channels": 16, "padding": ((0, 0), (5, 0), (0, 7), (0, 0))},
    # No output; no pixels; no images.
    {"channels": 16, "kernel": (14, 1), "padding": "VALID"},
    {"channels": 16, "size": (0, 5), "padding": ((0, 0), (2, 2), (1, 1), (0, 0))},
    {"channels": 16, "batch": 0},
]


@for_types(TYPES)
@pytest.mark.parametrize("configuration", LAYERS, ids=str)
def test_precision(configuration, dtype, offset_dtype, tolerance, rng):
    case = aggregate_case(rng, **{"size": (13, 19)} | configuration)
    assert_precise(
        deform_aggregate2d, reference_with_ones, case, dtype, offset_dtype, tolerance, FORMATS
    )


@pytest.mark.parametrize("wanted", NAMES)
def test_gives_each_gradient_alone(wanted, rng):
    case = aggregate_case(rng, channels=24, deform_groups=3)
    tensors = case.tensors(tf.float32)
    expected = run(case.tensors(), case.attributes, function=reference_with_ones)
    gradients = gradients_alone(deform_aggregate2d, tensors, case.attributes, [wanted])
    assert relative_error(gradients[wanted], expected[f"grad_{wanted}"]) <= 1e-6


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("argument", NAMES)
def test_gradient_is_the_numerical_one(argument, data_format, rng):
    case = aggregate_case(rng, batch=1, size=(4, 5), channels=4, deform_groups=2)
    assert_gradient_is_numerical(deform_aggregate2d, case, argument, data_format, rng)


def test_copies_of_some_images_at_a_time_give_what_the_batch_gives(rng):
    # On the CPU, copies of NCHW tensors take 8 MiB a thread. Those of an image take 9 MiB here.
    case = aggregate_case(rng, batch=os.cpu_count() + 1, size=(192, 200), channels=24)
    assert_parts_equal_the_whole(deform_aggregate2d, case)


# --- Rules ---


def test_sample_outside_is_0_whatever_its_weight(rng):
    case = aggregate_case(rng, channels=20, deform_groups=2)
    for bad in (np.nan, np.inf, -np.inf, 1e30):
        tensors = case.tensors(tf.float32)
        tensors["offset"] = tf.fill(tensors["offset"].shape, bad)
        tensors["weights"] = tf.fill(tensors["weights"].shape, np.inf)
        results = run(tensors, case.attributes, function=deform_aggregate2d)
        for key, value in results.items():
            assert np.all(value.numpy() == 0), key


@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_number_reaches_what_filters_of_ones_let_it_reach(argument, bad, rng):
    case = aggregate_case(rng, channels=8, deform_groups=2)
    case.arrays[argument][0, 2, 3, 5] = bad
    actual = run(case.tensors(), case.attributes, function=deform_aggregate2d)
    expected = run(case.tensors(), case.attributes, function=with_filters_of_ones)
    for key, value in actual.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-12, atol=1e-12, err_msg=key)


def test_weights_as_in_version_3_leave_a_constant_image_as_it_is(rng):
    """A softmax over the taps makes weights that add up to 1."""
    logits = tf.constant(rng.standard_normal((1, 8, 8, 9)))
    output = deform_aggregate2d(
        tf.ones((1, 8, 8, 3), tf.float64), tf.zeros((1, 8, 8, 18), tf.float64),
        tf.nn.softmax(logits), 3,
    )  # fmt: skip
    np.testing.assert_allclose(output[:, 1:-1, 1:-1], 1, rtol=1e-14)


def test_kernel_size_is_one_number_or_two(rng):
    tensors = aggregate_case(rng, mask=True).tensors()
    one, two = (deform_aggregate2d(**tensors, kernel_size=size) for size in (3, [3, 3]))
    np.testing.assert_array_equal(one, two)


# --- Modes of TensorFlow ---


def test_no_filters_exist(rng):
    """Neither in the op, nor in its gradient."""
    case = aggregate_case(rng)

    def step(tensors):
        return run(tensors, case.attributes, function=deform_aggregate2d)

    graph = tf.function(step).get_concrete_function(case.tensors()).graph
    ops = [op for op in graph.get_operations() if op.type.startswith("DeformAggregate2D")]
    inputs = {op.type: len(op.inputs) for op in ops}
    assert inputs == {"DeformAggregate2D": 3, "DeformAggregate2DGrad": 4}
    wanted = {name for op in ops for name in op.node_def.attr if name.startswith("want")}
    assert wanted == {f"want_grad_{name}" for name in NAMES}


def test_one_function_takes_any_shape(rng):
    cases = [aggregate_case(rng, size=size) for size in ((6, 7), (3, 11))]
    assert_function_takes(cases, deform_aggregate2d, reference_with_ones, 1e-12)


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        (([8, 28, 28, 6], None, None), {}, [8, 28, 28, 6]),
        (([8, 28, 27, 6], None, None), {"padding": "VALID"}, [8, 26, 25, 6]),
        (([8, 6, 28, 27], None, None), {"data_format": "NCHW", "strides": 2}, [8, 6, 14, 14]),
        (([None, None, None, 6], [8, 5, 4, 18], None), {}, [8, 5, 4, 6]),
        ((None, None, [8, 5, 4, 9]), {}, [8, 5, 4, None]),
    ],
    ids=str,
)
def test_output_shape_is_inferred_as_far_as_it_is_known(shapes, attributes, expected):
    actual = output_shape(deform_aggregate2d, shapes, kernel_size=3, **attributes)
    assert actual == expected


@pytest.mark.parametrize("wanted", [["input"], ["offset", "weights"], NAMES], ids=str)
def test_v1_graph_equals_eager(wanted, rng):
    assert_v1_graph_equals_eager(deform_aggregate2d, aggregate_case(rng), wanted)


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("padding", ["SAME", ((0, 0), (2, 0), (1, 3), (0, 0))], ids=str)
def test_second_derivatives_equal_those_of_filters_of_ones(padding, data_format, mode, rng):
    case = aggregate_case(rng, channels=4, deform_groups=2, strides=(2, 1), padding=padding)
    assert_second_derivatives_equal(
        deform_aggregate2d, with_filters_of_ones, case, 1e-11, data_format, mode
    )


def test_jacobian_and_forward_mode_agree(rng):
    case = aggregate_case(rng, batch=1, size=(4, 3), channels=2)
    assert_forward_mode_is_the_jacobian(deform_aggregate2d, case, rng)


@needs_xla
@pytest.mark.parametrize("data_format", FORMATS)
@for_types(TYPES)
def test_xla_gives_what_the_op_gives(dtype, offset_dtype, tolerance, data_format, rng):
    case = aggregate_case(
        rng, channels=24, deform_groups=3, kernel=(3, 2), strides=(1, 2), dilations=(2, 1),
        padding=((0, 0), (2, 1), (0, 1), (0, 0)),
    )  # fmt: skip
    arguments = case.arguments(dtype, offset_dtype, data_format)
    assert_jitted_equals(deform_aggregate2d, *arguments, tolerance)


@needs_xla
@pytest.mark.parametrize("wanted", NAMES)
def test_xla_gives_each_gradient_alone(wanted, rng):
    tensors, attributes = aggregate_case(rng, channels=6, deform_groups=2).arguments()
    expected = run(tensors, attributes, function=deform_aggregate2d)
    gradients = MODES["jit"](
        lambda tensors: gradients_alone(deform_aggregate2d, tensors, attributes, [wanted])
    )
    assert relative_error(gradients(tensors)[wanted], expected[f"grad_{wanted}"]) <= 1e-12


@needs_xla
def test_xla_gives_second_derivatives(rng):
    case = aggregate_case(rng, channels=4, deform_groups=2)
    assert_second_derivatives_equal(
        deform_aggregate2d, with_filters_of_ones, case, 1e-11, mode="jit"
    )


def test_saved_model_runs_and_trains_in_another_process(tmp_path, rng):
    weights = tf.Variable(tf.constant(rng.uniform(size=(1, 5, 5, 9)), tf.float32))
    offset = tf.constant(rng.standard_normal((1, 5, 5, 18)), tf.float32)
    assert_saved_model_runs_and_trains_in_another_process(
        tmp_path / "model", lambda image: deform_aggregate2d(image, offset, weights, 3), weights
    )


# --- Portable mode ---


@pytest.mark.parametrize("data_format", FORMATS)
def test_portable_mode_gives_what_the_op_gives(data_format, rng):
    case = aggregate_case(rng, channels=12, deform_groups=3, strides=(2, 1))
    arguments = case.arguments(data_format=data_format)
    assert_portable_mode_gives_the_same(deform_aggregate2d, *arguments)
    assert_portable_mode_uses_no_op_of_ours(deform_aggregate2d, *arguments)


# --- Wrong input ---

FITTING = {"input": (2, 5, 6, 4), "offset": (2, 5, 6, 18), "weights": (2, 5, 6, 9)}
WRONG = [
    ({"offset": (2, 5, 6, 36)}, {}, "offset has 36 channels; 2 * deform_groups * 3 * 3 = 18 exp"),
    ({}, {"deform_groups": 2}, "offset has 18 channels; 2 * deform_groups * 3 * 3 = 36 expected"),
    ({}, {"kernel_size": 5}, "offset has 18 channels; 2 * deform_groups * 5 * 5 = 50 expected"),
    ({"weights": (2, 5, 6, 8)}, {}, "weights have 8 channels; deform_groups * 3 * 3 = 9 expected"),
    ({"offset": (2, 4, 6, 18)}, {}, "offset has height and width 4x6; those of the output, 5x6"),
    ({"weights": (2, 5, 5, 9)}, {}, "weights have height and width 5x5; those of the output, 5x6"),
    ({"weights": (1, 5, 6, 9)}, {}, "weights have batch size 1; that of input, 2, expected"),
    ({"input": (2, 5, 6, 0)}, {}, "input must have at least 1 channel; received 0"),
    ({"input": (5, 6, 4)}, {}, "input must have rank 4; received shape [5, 6, 4]"),
    ({"weights": ()}, {}, "weights must have rank 4; received shape []"),
    ({}, {"deform_groups": 3}, "deform_groups must divide the input's 4 channels; received 3"),
    ({}, {"kernel_size": 0}, "kernel_size must be from 1 to 2147483647; received (0, 0)"),
    ({}, {"kernel_size": (3, -1)}, "kernel_size must be from 1 to 2147483647; received (3, -1)"),
    ({}, {"dilations": 2**31 - 1}, "kernel_size and dilations: dilated kernel height 4294967295"),
    (
        {},
        {"kernel_size": (9, 3), "padding": "VALID"},
        "input has height 5 with its padding; at least 8 expected for the dilated kernel's height",
    ),
]


IDS = [message[:40] for *_, message in WRONG]


@pytest.mark.parametrize("in_portable_mode", [False, True], ids=["op", "portable"])
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG, ids=IDS)
def test_wrong_shape_raises(shapes, attributes, message, known, in_portable_mode):
    with portable() if in_portable_mode else contextlib.nullcontext():
        assert_wrong_shape_raises(
            deform_aggregate2d, FITTING | shapes, message, known, **{"kernel_size": 3} | attributes
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": (1, 2, 3)}, "kernel_size must be 1 or 2 integers; received (1, 2, 3)"),
        ({"kernel_size": 2.5}, "kernel_size must be an integer; received 2.5"),
        ({"kernel_size": None}, "kernel_size must be an integer; received None"),
        ({"weights": None}, "weights must be a tensor of float32 here; received None"),
        ({"weights": tf.zeros((2, 5, 6, 9), tf.float64)}, "weights must be float32 here; received"),
        ({"data_format": "NWHC"}, "data_format must be 'NHWC' or 'NCHW'; received 'NWHC'"),
        ({"name": 3}, "name must be a string or None; received 3"),
    ],
    ids=str,
)
def test_wrong_form_or_type_names_the_argument(arguments, message):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_aggregate2d(**tensors | {"kernel_size": 3} | arguments)


# --- The ops themselves, which graphs from files call ---


def call_op(name, **arguments):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    attributes = {"kernel_size": [3, 3], "strides": [1, 1, 1, 1], "padding": "SAME"}
    return getattr(record.ops, name)(**tensors | attributes | arguments)


def test_gradient_op_checks_the_gradient_of_the_output():
    with pytest.raises(tf.errors.InvalidArgumentError, match="grad_output must have the output's"):
        call_op("deform_aggregate2d_grad", grad_output=tf.zeros((2, 5, 6, 8)))


def test_kernel_size_of_the_op_has_two_numbers():
    with pytest.raises(tf.errors.InvalidArgumentError, match="kernel_size must be 2 numbers"):
        call_op("deform_aggregate2d", kernel_size=[3])


def test_gradients_that_are_not_wanted_are_empty():
    gradients = call_op(
        "deform_aggregate2d_grad", grad_output=tf.zeros((2, 5, 6, 4)), want_grad_offset=False
    )
    assert [gradient.shape for gradient in gradients] == [(2, 5, 6, 4), (0,), (2, 5, 6, 9)]
