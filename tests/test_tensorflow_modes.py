"""The op in TensorFlow's ways of running: eager, functions, graphs, SavedModel, derivatives."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from checks import (
    assert_forward_mode_is_the_jacobian,
    assert_function_takes,
    assert_saved_model_runs_and_trains_in_another_process,
    assert_second_derivatives_equal,
    assert_v1_graph_equals_eager,
    gradients_alone,
    output_shape,
    run_in_v1_graph,
)
from conftest import ARGUMENTS as NAMES
from conftest import PROJECT, assert_close, random_case, relative_error, run

from deform_conv import deform_conv2d
from deform_conv._reference import deform_conv2d_reference

pytestmark = pytest.mark.usefixtures("device")


def test_function_equals_eager(rng):
    case = random_case(rng)
    eager = run(case.tensors(), case.attributes)
    traced = tf.function(lambda tensors: run(tensors, case.attributes))(case.tensors())
    assert_close(traced, eager, 1e-14)


def test_v1_graph_equals_eager(rng):
    assert_v1_graph_equals_eager(deform_conv2d, random_case(rng))


def test_one_function_takes_any_shape(rng):
    cases = [random_case(rng, size=size) for size in ((6, 7), (3, 11))]
    assert_function_takes(cases, deform_conv2d, deform_conv2d, 1e-14)


# --- Shape inference ---


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        (([8, 28, 28, 3], [3, 3, 3, 16], None), {}, [8, 28, 28, 16]),
        (([8, 28, 28, 3], [3, 3, 3, 16], None), {"strides": 2}, [8, 14, 14, 16]),
        (([8, 28, 27, 3], [5, 3, 3, 16], None), {"padding": "VALID"}, [8, 24, 25, 16]),
        (([8, 3, 28, 27], [3, 3, 3, 16], None), {"data_format": "NCHW"}, [8, 16, 28, 27]),
        (([None, 28, None, 3], [3, 3, 3, 16], None), {}, [None, 28, None, 16]),
        (([None] * 4, None, None), {}, [None] * 4),
        ((None, None, None), {}, [None] * 4),
        # SAME needs no kernel size, VALID does.
        (([8, 28, 28, 3], [None, None, 3, 16], None), {}, [8, 28, 28, 16]),
        (
            ([8, 28, 28, 3], [None, 3, 3, 16], None),
            {"padding": "VALID"},
            [8, None, 26, 16],
        ),
        # The offset knows the batch and the output's size; it may know what the input does not.
        (([None, None, 9, 3], [3, 3, 3, 16], [8, 7, None, 18]), {}, [8, 7, 9, 16]),
        ((None, [3, 3, 3, 16], [8, 14, None, 18]), {}, [8, 14, None, 16]),
    ],
)
def test_output_shape_is_inferred_as_far_as_it_is_known(shapes, attributes, expected):
    assert output_shape(deform_conv2d, shapes, **attributes) == expected


def test_gradients_have_the_static_shapes_of_their_arguments(rng):
    case = random_case(rng)
    function = tf.function(lambda tensors: run(tensors, case.attributes))
    shapes = function.get_concrete_function(case.tensors()).output_shapes
    for name, array in case.arrays.items():
        assert shapes[f"grad_{name}"] == array.shape


# --- Only what is asked for ---


@pytest.mark.parametrize("wanted", [["offset"], ["filters"], ["input", "mask"], list(NAMES)])
def test_tape_asks_for_the_wanted_gradients_only(wanted, rng):
    case = random_case(rng)
    tensors = case.tensors()

    @tf.function
    def gradients(tensors):
        return gradients_alone(deform_conv2d, tensors, case.attributes, wanted)

    graph = gradients.get_concrete_function(tensors).graph
    (operation,) = [op for op in graph.get_operations() if op.type == "DeformConv2DGrad"]
    for name in NAMES:
        assert operation.get_attr(f"want_grad_{name}") == (name in wanted)
    expected = run(tensors, case.attributes)
    assert_close(gradients(tensors), {name: expected[f"grad_{name}"] for name in wanted}, 1e-12)


@pytest.mark.parametrize(
    ("wanted", "count"), [(["offset"], 1), (["filters"], 1), (["filters", "offset"], 2)]
)
def test_v1_graph_runs_the_needed_gradient_ops_only(wanted, count, rng):
    case = random_case(rng)
    values, steps = run_in_v1_graph(deform_conv2d, case, wanted)
    assert sum(step.startswith("gradients/DeformConv2D") for step in steps) == count
    expected = run(case.tensors(), case.attributes)
    assert_close(values, {key: expected[key] for key in values}, 1e-12)


# --- Higher derivatives ---


@pytest.mark.parametrize("padding", ["SAME", ((0, 0), (1, 2), (2, 0), (0, 0))])
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_second_derivatives_equal_the_references(mode, padding, rng):
    case = random_case(rng, batch=1, size=(4, 4), channels=2, out_channels=2, padding=padding)
    assert_second_derivatives_equal(deform_conv2d, deform_conv2d_reference, case, 1e-10, mode=mode)


@pytest.mark.parametrize("of", NAMES)
def test_second_derivatives_equal_finite_differences(of, rng):
    case = random_case(rng, batch=1, size=(4, 5), channels=2, out_channels=3, strides=(1, 2))
    tensors = case.tensors()
    weights = {name: tf.constant(rng.standard_normal(case.arrays[name].shape)) for name in NAMES}

    def slope(value):
        """A number made of all first gradients, as a function of the argument `of`."""
        with tf.GradientTape() as tape:
            arguments = tensors | {of: value}
            tape.watch(arguments)
            loss = tf.reduce_sum(deform_conv2d(**arguments, **case.attributes) ** 2)
        gradients = tape.gradient(loss, arguments)
        return tf.add_n([tf.reduce_sum(weights[name] * gradients[name]) for name in NAMES])

    with tf.GradientTape() as tape:
        tape.watch(tensors[of])
        number = slope(tensors[of])
    direction = tf.constant(rng.standard_normal(tensors[of].shape))
    actual = tf.reduce_sum(tape.gradient(number, tensors[of]) * direction)
    step = 1e-5 * direction  # offsets are 1e-3 away from the pixel grid
    difference = (slope(tensors[of] + step) - slope(tensors[of] - step)) / 2e-5
    np.testing.assert_allclose(actual, difference, rtol=1e-6)


def test_second_derivatives_of_tensors_of_unknown_rank(rng):
    case = random_case(rng, batch=1, size=(3, 4), channels=2, out_channels=2)

    def second(tensors, function):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                output = tf.reduce_sum(function(**tensors, **case.attributes) ** 2)
            gradient = inner.gradient(output, tensors["offset"])
        return outer.gradient(gradient, tensors)

    specs = {name: tf.TensorSpec(None, tf.float64) for name in NAMES}
    traced = tf.function(lambda t: second(t, deform_conv2d), input_signature=[specs])
    ours, theirs = traced(case.tensors()), second(case.tensors(), deform_conv2d_reference)
    assert_close(ours, theirs, 1e-10)


def test_second_derivative_of_some_arguments_only(rng):
    case = random_case(rng, batch=1, size=(3, 4), channels=2, out_channels=2, mask=False)
    tensors = case.tensors()

    def second(function):
        with tf.GradientTape() as outer:
            outer.watch(tensors["offset"])
            with tf.GradientTape() as inner:
                inner.watch(tensors["input"])
                output = tf.reduce_sum(function(**tensors, **case.attributes) ** 2)
            gradient = inner.gradient(output, tensors["input"])
        return outer.gradient(gradient, tensors["offset"])

    assert relative_error(second(deform_conv2d), second(deform_conv2d_reference)) <= 1e-10


def test_jacobian_and_forward_mode_agree(rng):
    case = random_case(rng, batch=1, size=(3, 3), channels=2, out_channels=2)
    assert_forward_mode_is_the_jacobian(deform_conv2d, case, rng)


# --- Functions that call functions ---


@pytest.fixture
def stacked(rng):
    """Three cases, stacked along a new first axis, that share their filters."""
    cases = [random_case(rng).tensors() for _ in range(3)]
    filters = cases[0].pop("filters")
    return filters, {
        name: tf.stack([case[name] for case in cases]) for name in ("input", "offset", "mask")
    }


@pytest.mark.parametrize("mapping", [tf.map_fn, tf.vectorized_map], ids=lambda f: f.__name__)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
def test_mapping_over_cases_gives_each_ones_output_and_gradient(mapping, graph, stacked):
    filters, arguments = stacked

    def one(arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments["offset"])
            output = deform_conv2d(filters=filters, **arguments)
        return output, tape.gradient(output, arguments["offset"])

    def mapped(arguments):
        if mapping is tf.vectorized_map:
            return mapping(one, arguments)
        return mapping(one, arguments, fn_output_signature=(tf.float64, tf.float64))

    results = (tf.function(mapped) if graph else mapped)(arguments)
    for index in range(3):
        expected = one({name: value[index] for name, value in arguments.items()})
        for value, other in zip(results, expected, strict=True):
            assert relative_error(value[index], other) <= 1e-12


def test_recomputed_gradients_equal_stored_ones(rng):
    case = random_case(rng)

    def positional(input, filters, offset, mask):
        return deform_conv2d(input, filters, offset, mask, **case.attributes)

    recomputed = tf.recompute_grad(positional)
    tensors = list(case.tensors().values())
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = recomputed(*tensors)
    expected = run(case.tensors(), case.attributes, tf.ones_like(output))
    for name, value in zip(NAMES, tape.gradient(output, tensors), strict=True):
        assert relative_error(value, expected[f"grad_{name}"]) <= 1e-12


# --- SavedModel ---


def test_saved_model_runs_and_trains_in_another_process(tmp_path, rng):
    filters = tf.Variable(tf.constant(rng.standard_normal((3, 3, 2, 3)), tf.float32))
    offset = tf.constant(rng.standard_normal((1, 5, 5, 18)), tf.float32)
    assert_saved_model_runs_and_trains_in_another_process(
        tmp_path / "model", lambda image: deform_conv2d(image, filters, offset), filters
    )


def test_saved_model_without_the_library_names_the_op(tmp_path, rng):
    module = tf.Module()
    filters, offset = tf.ones((3, 3, 2, 3)), tf.zeros((1, 5, 5, 18))
    module.convolve = tf.function(
        lambda image: deform_conv2d(image, filters, offset),
        input_signature=[tf.TensorSpec((1, 5, 5, 2))],
    )
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, tmp_path / "model", options=options)
    load = "import sys, tensorflow as tf; tf.saved_model.load(sys.argv[1])"
    completed = subprocess.run(
        [sys.executable, "-c", load, str(tmp_path / "model")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode != 0
    assert "Op type not registered 'DeformConv2D'" in completed.stderr
