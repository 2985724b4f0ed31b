"""What holds for `deform_conv2d` and its kin alike; the tests of each bring their own cases."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    OFFSET_ARGUMENTS,
    assert_close,
    printed_by,
    relative_error,
    run,
    second_derivatives,
)

from deform_conv import portable, xla_kernels_loaded

# In TensorFlow 2.20 and newer.
needs_xla = pytest.mark.skipif(not xla_kernels_loaded(), reason="no XLA kernels")
# docs/layer.md, "Weights of a plain network".
needs_keras_3_10 = pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 10), reason="needs Keras 3.10"
)

# dtype of input and filters, of offset and mask, tolerance
TYPES_OF_16_BITS = [
    (tf.float16, tf.float32, 5e-3),
    (tf.float16, tf.float16, 5e-3),
    (tf.bfloat16, tf.float32, 2e-2),
    (tf.bfloat16, tf.bfloat16, 2e-2),
]
TYPES = [(tf.float64, tf.float64, 1e-12), (tf.float32, tf.float32, 1e-6), *TYPES_OF_16_BITS]


def for_types(types):
    """Runs a test with each dtype, offset_dtype and tolerance."""
    arguments = ("dtype", "offset_dtype", "tolerance")
    return pytest.mark.parametrize(arguments, types, ids=lambda each: getattr(each, "name", None))


# The ways in which a function may run.
MODES = {
    "eager": lambda function: function,
    "function": tf.function,
    "jit": functools.partial(tf.function, jit_compile=True),
}


# --- Results ---


@st.composite
def configurations(draw, axes=2, most=9):
    """Arguments of `random_case` but for channels and groups, with sizes of `most` at most."""
    number_per_axis = st.tuples(*[st.integers(1, 3)] * axes)
    kernel, strides, dilations = (draw(number_per_axis) for _ in range(3))
    size = draw(st.tuples(*[st.integers(1, most)] * axes))
    pads = st.tuples(st.integers(0, most // 2), st.integers(0, most // 2))
    explicit = st.tuples(st.just((0, 0)), *[pads] * axes, st.just((0, 0)))
    padding = draw(st.one_of(st.sampled_from(["SAME", "VALID"]), explicit))
    for axis in range(axes):
        pad = sum(padding[axis + 1]) if padding not in ("SAME", "VALID") else 0
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        hypothesis.assume(padding == "SAME" or size[axis] + pad >= reach)
    return {
        "batch": draw(st.integers(1, 3)),
        "size": size,
        "kernel": kernel,
        "strides": strides,
        "dilations": dilations,
        "padding": padding,
        "offset_scale": draw(st.sampled_from([0.5, 2.0, 10.0])),
    }


@st.composite
def convolutions(draw, axes=2, most=9):
    """Arguments of `random_case` for layers that have filters."""
    groups, deform_groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (6, 6)]))
    return draw(configurations(axes, most)) | {
        "channels": draw(st.sampled_from([6, 12, 18])),
        "out_channels": 6 * draw(st.integers(1, 2)),
        "groups": groups,
        "deform_groups": deform_groups,
        "mask": draw(st.booleans()),
    }


def results_of(function, case, *form):
    """Output and gradients of a case, whose arrays may have grad_output too."""
    tensors, attributes = case.arguments(*form)
    return run(tensors, attributes, tensors.pop("grad_output", None), function)


def assert_equals(function, reference, case, data_format, rng):
    """In output and gradients, for a random gradient of the output."""
    tensors, attributes = case.arguments(data_format=data_format)
    grad_output = tf.constant(rng.standard_normal(function(**tensors, **attributes).shape))
    actual = run(tensors, attributes, grad_output, function)
    expected = run(tensors, attributes, grad_output, reference)
    assert_close(actual, expected, 1e-12)


def assert_precise(function, reference, case, dtype, offset_dtype, tolerance, data_formats):
    """Against the reference in float64, on numbers that were rounded to their types."""
    case = case.rounded_to(dtype, offset_dtype)
    expected = results_of(reference, case)
    for data_format in data_formats:
        actual = results_of(function, case, dtype, offset_dtype, data_format)
        assert_close(actual, expected, tolerance, data_format)
        for name, value in actual.items():
            of_offset = name.removeprefix("grad_") in OFFSET_ARGUMENTS
            assert value.dtype == (offset_dtype if of_offset else dtype), name


def assert_parts_equal_the_whole(function, case):
    """On the CPU, NCHW tensors are copied some images at a time. A case should have more."""
    whole, in_parts = (
        run(*case.arguments(tf.float32, data_format=data_format), function=function)
        for data_format in (None, "NCHW")
    )
    assert_close(in_parts, whole, 1e-6, "NCHW")


def op_types(function, *specs):
    """The types of the ops that a function is traced to."""
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    return {operation.type for operation in graph.get_operations()}


def assert_portable_mode_gives_the_same(function, tensors, attributes, tolerance=1e-12):
    expected = run(tensors, attributes, function=function)
    with portable():
        actual = run(tensors, attributes, function=function)
    assert_close(actual, expected, tolerance)
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name


def assert_portable_mode_uses_no_op_of_ours(function, tensors, attributes):
    def call(tensors):
        return run(tensors, attributes, function=function)

    assert any(op_type.startswith("Deform") for op_type in op_types(call, tensors))
    with portable():
        assert not any(op_type.startswith("Deform") for op_type in op_types(call, tensors))


# --- Gradients ---


def assert_gradient_is_numerical(function, case, argument, data_format, rng):
    """That of a sum of the outputs, each times a weight of its own."""
    tensors, attributes = case.arguments(data_format=data_format)
    weights = tf.constant(rng.standard_normal(function(**tensors, **attributes).shape))

    def weighted_sum(value):
        return tf.reduce_sum(weights * function(**(tensors | {argument: value}), **attributes))

    (theoretical,), (numerical,) = tf.test.compute_gradient(
        weighted_sum, [tensors[argument]], delta=1e-5
    )
    assert relative_error(theoretical, numerical) <= 1e-8


def gradients_alone(function, tensors, attributes, wanted):
    """Those by the wanted arguments, by their names, where no others are asked for."""
    watched = {name: tensors[name] for name in wanted}
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(watched)
        output = function(**tensors, **attributes)
    return tape.gradient(output, watched)


def assert_second_derivatives_equal(
    function, reference, case, tolerance, data_format=None, mode="eager"
):
    tensors, attributes = case.arguments(data_format=data_format)
    ours = MODES[mode](lambda tensors: second_derivatives(tensors, attributes, function))
    theirs = second_derivatives(tensors, attributes, reference)
    assert_close(ours(tensors), theirs, tolerance)


def assert_forward_mode_is_the_jacobian(function, case, rng):
    """Times a direction, by the offset."""
    tensors, attributes = case.arguments()
    offset = tensors["offset"]
    direction = tf.constant(rng.standard_normal(offset.shape))
    with tf.GradientTape() as tape:
        tape.watch(offset)
        output = function(**tensors, **attributes)
    expected = tf.tensordot(tape.jacobian(output, offset), direction, offset.shape.rank)
    with tf.autodiff.ForwardAccumulator(offset, direction) as accumulator:
        output = function(**tensors, **attributes)
    assert relative_error(accumulator.jvp(output), expected) <= 1e-12


# --- Graphs ---


def assert_function_takes(
    cases, function, reference, tolerance, shape=None, data_format=None, **options
):
    """One tf.function, with these `options`, takes all cases, which have the same attributes.

    It is told `shape` of each argument, or with "each" it is traced for each case.
    """
    attributes = cases[0].attributes_in(data_format)
    if shape != "each":
        specs = {name: tf.TensorSpec(shape, tf.float64) for name in cases[0].arrays}
        options["input_signature"] = [specs]
    traced = tf.function(
        lambda tensors: run(tensors, attributes, function=function), autograph=False, **options
    )
    for case in cases:
        tensors = case.tensors(data_format=data_format)
        assert_close(traced(tensors), run(tensors, attributes, function=reference), tolerance)


def output_shape(function, shapes, **attributes):
    """What is known of the output's shape, where `shapes` are known of the arguments."""
    traced = tf.function(lambda *tensors: function(*tensors, **attributes), autograph=False)
    specs = [tf.TensorSpec(shape) for shape in shapes]
    return traced.get_concrete_function(*specs).output_shapes.as_list()


def run_in_v1_graph(function, case, wanted=None, data_format=None):
    """Output and wanted gradients from a tf.compat.v1 graph, and the names of the ops that ran."""
    tensors, attributes = case.arguments(data_format=data_format)
    wanted = list(tensors) if wanted is None else wanted
    with tf.Graph().as_default() as graph:
        placeholders = {
            name: tf.compat.v1.placeholder(tensor.dtype, [None] * tensor.shape.rank)
            for name, tensor in tensors.items()
        }
        output = function(**placeholders, **attributes)
        gradients = tf.gradients(output, [placeholders[name] for name in wanted])
        feed = {placeholders[name]: tensor.numpy() for name, tensor in tensors.items()}
        options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.SOFTWARE_TRACE)
        metadata = tf.compat.v1.RunMetadata()
        with tf.compat.v1.Session(graph=graph) as session:
            values = session.run([output, *gradients], feed, options, metadata)
    steps = [node for device in metadata.step_stats.dev_stats for node in device.node_stats]
    keys = ["output", *(f"grad_{name}" for name in wanted)]
    return dict(zip(keys, values, strict=True)), [step.node_name for step in steps]


def assert_v1_graph_equals_eager(function, case, wanted=None, data_format=None, tolerance=1e-14):
    actual, _ = run_in_v1_graph(function, case, wanted, data_format)
    eager = run(*case.arguments(data_format=data_format), function=function)
    assert_close(actual, {name: eager[name] for name in actual}, tolerance)


def assert_jitted_equals(function, tensors, attributes, tolerance):
    """Compiled by XLA, which may sum up in another order."""
    expected = run(tensors, attributes, function=function)
    actual = MODES["jit"](lambda tensors: run(tensors, attributes, function=function))(tensors)
    assert_close(actual, expected, tolerance)
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name


LOAD_AND_RUN = """
import sys
import tensorflow as tf
import deform_conv
tf.config.experimental.enable_tensor_float_32_execution(False)
module = tf.saved_model.load(sys.argv[1])
image = tf.Variable(tf.ones((1, 5, 5, 2)))
with tf.GradientTape() as tape:
    output = module.call(image)
print(float(tf.reduce_sum(output)), float(tf.reduce_sum(tape.gradient(output, image))))
"""


def assert_saved_model_runs_and_trains_in_another_process(path, call, variable):
    """`call` takes an image of 5x5 with 2 channels, and reads the variable."""
    module = tf.Module()
    module.variable = variable
    module.call = tf.function(call, input_signature=[tf.TensorSpec((1, 5, 5, 2))])
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, path, options=options)
    image = tf.Variable(tf.ones((1, 5, 5, 2)))
    with tf.GradientTape() as tape:
        output = module.call(image)
    expected = [tf.reduce_sum(output), tf.reduce_sum(tape.gradient(output, image))]
    printed = printed_by(LOAD_AND_RUN, path)
    np.testing.assert_allclose([float(text) for text in printed.split()], expected, rtol=1e-5)


# --- Wrong input ---

# What a graph knows of the shapes, and which errors it raises.
KNOWN = {
    "eager": tf.errors.InvalidArgumentError,
    "static": ValueError,
    "dynamic": (tf.errors.InvalidArgumentError, ValueError),
}


def assert_wrong_shape_raises(function, shapes, message, known, **attributes):
    """`function` takes tensors of these shapes, and the attributes."""
    tensors = [tf.zeros(shape) for shape in shapes.values()]

    def call(*tensors):
        return function(*tensors, **attributes)

    if known != "eager":
        specs = [tf.TensorSpec(t.shape if known == "static" else None) for t in tensors]
        call = tf.function(call, input_signature=specs, autograph=False)
    with pytest.raises(KNOWN[known]) as error:
        call(*tensors)
    text = str(error.value)
    if known == "dynamic":
        # Without the op, TensorFlow quotes each part of the message and has no commas in a shape.
        text, message = (
            each.replace("] [", "").replace("\\'", "'").replace(",", "") for each in (text, message)
        )
    # Of a rank it has a message of its own.
    argument, *_ = message.split()
    own = known == "dynamic" and "must have rank" in message
    assert message in text or (own and re.search(rf"Deform\w+/{argument}}}}}", text)), text
