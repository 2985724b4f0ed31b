"""Portable mode: the same results from TensorFlow's own ops, in a context or for a process."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from checks import (
    KNOWN,
    assert_portable_mode_gives_the_same,
    assert_wrong_shape_raises,
    for_types,
    op_types,
)
from conftest import assert_close, random_case, relative_error, run, second_derivatives
from test_deform_conv2d import DENSE_TYPES, FORMATS, GOLDEN
from test_non_finite import ARGUMENTS, BAD, assert_follow_the_formula, problem, results_of
from test_non_finite import SIZE as NON_FINITE_SIZE
from test_package import copy_package, run_in
from test_wrong_input import FITTING, WRONG_DTYPES, WRONG_FORMS, WRONG_SHAPES

from deform_conv import _library, deform_conv2d, portable
from deform_conv.layers import DeformableConv2D


@pytest.fixture
def portable_mode():
    with portable():
        yield


def in_portable_mode(function):
    def call(*args, **kwargs):
        with portable():
            return function(*args, **kwargs)

    return call


def specs_of(tensors, shape="known"):
    return {
        name: tf.TensorSpec(tensor.shape if shape == "known" else shape, tensor.dtype)
        for name, tensor in tensors.items()
    }


# --- Results are those of the op ---


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_op_on_cases_of_torchvision(name, data_format, device):
    case, *_ = GOLDEN[name]
    arguments = case.arguments(data_format=data_format)
    assert_portable_mode_gives_the_same(deform_conv2d, *arguments)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"mask": False},
        {"strides": (2, 1), "dilations": (1, 3), "padding": "VALID", "size": (9, 8)},
        {"padding": ((0, 0), (3, 0), (1, 2), (0, 0)), "kernel": (2, 4)},
        {"groups": 2},
        {"deform_groups": 4},
        {"channels": 12, "groups": 3, "deform_groups": 2},
        {"channels": 12, "groups": 2, "deform_groups": 3, "out_channels": 2},
        {"size": (1, 1), "offset_scale": 10.0},
        {"batch": 0},
        {"size": (0, 5), "padding": ((0, 0), (2, 2), (2, 2), (0, 0))},
    ],
    ids=str,
)
def test_equals_the_op_in_any_configuration(configuration, data_format, device, rng):
    case = random_case(rng, **configuration)
    arguments = case.arguments(data_format=data_format)
    assert_portable_mode_gives_the_same(deform_conv2d, *arguments)


@for_types(DENSE_TYPES)
def test_equals_the_op_in_every_type(dtype, offset_dtype, tolerance, device, rng):
    case = random_case(rng, size=(20, 30), channels=16, deform_groups=2)
    case = case.rounded_to(dtype, offset_dtype)
    arguments = case.arguments(dtype, offset_dtype)
    assert_portable_mode_gives_the_same(deform_conv2d, *arguments, tolerance)


@pytest.mark.parametrize("mask", [False, True])
def test_second_derivatives_equal_the_ops(mask, rng):
    case = random_case(rng, batch=1, size=(4, 4), mask=mask, groups=2, deform_groups=2)
    expected = second_derivatives(case.tensors(), case.attributes)
    actual = in_portable_mode(second_derivatives)(case.tensors(), case.attributes)
    assert_close(actual, expected, 1e-10)


def test_third_derivative_equals_a_finite_difference(rng, portable_mode):
    case = random_case(rng, batch=1, size=(3, 3), channels=2, out_channels=2)
    tensors = case.tensors()

    def second(filters):
        return second_derivatives(tensors | {"filters": filters}, case.attributes)["offset"]

    filters, direction = tensors["filters"], tf.constant(rng.standard_normal((3, 3, 2, 2)))
    weights = tf.constant(rng.standard_normal(tensors["offset"].shape))
    with tf.GradientTape() as tape:
        tape.watch(filters)
        number = tf.reduce_sum(weights * second(filters))
    actual = tf.reduce_sum(tape.gradient(number, filters) * direction)
    step = 1e-5 * direction
    difference = tf.reduce_sum(weights * (second(filters + step) - second(filters - step))) / 2e-5
    np.testing.assert_allclose(actual, difference, rtol=1e-6)


def test_positions_keep_float32_precision_far_from_the_origin(portable_mode):
    """1e-3 is no multiple of the distance of numbers of float32 around 100000."""
    width = 100_001
    image = tf.reshape(tf.cast(tf.range(width) % 7, tf.float32), (1, 1, width, 1))
    offset = tf.tile(tf.constant([0.0, 1e-3], shape=(1, 1, 1, 2)), (1, 1, width, 1))
    output = deform_conv2d(image, tf.ones((1, 1, 1, 1)), offset)
    pixels = image.numpy()[0, 0, :, 0]
    np.testing.assert_allclose(output[0, 0, :-1, 0], pixels[:-1] + 1e-3 * np.diff(pixels))


# --- NaN and infinite numbers ---


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_one_bad_number_anywhere_does_what_the_formula_says(argument, bad, rng, portable_mode):
    clean = problem(rng)
    for index in rng.choice(clean[argument].size, 4, replace=False):
        arrays = clean | {argument: clean[argument].copy()}
        arrays[argument].flat[index] = bad
        assert_follow_the_formula(results_of(arrays), arrays, 1e-4)


def test_bad_masks_do_what_the_formula_says(rng, portable_mode):
    arrays = problem(rng) | {"mask": rng.choice(BAD, size=(1, *NON_FINITE_SIZE, 9))}
    assert_follow_the_formula(results_of(arrays), arrays, 1e-4)


@pytest.mark.parametrize("bad", [*BAD, 1e30], ids=str)
def test_bad_offset_samples_zero_and_has_no_gradient(bad, rng, portable_mode):
    arrays = problem(rng)
    arrays["offset"][0, ::2, :, 3] = bad
    results = results_of(arrays)
    assert_follow_the_formula(results, arrays, 1e-4)
    assert np.all(results["grad_offset"].numpy()[0, ::2, :, 2:4] == 0)


# --- Wrong input ---


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG_SHAPES)
def test_wrong_shape_raises(shapes, attributes, message, known, portable_mode):
    assert_wrong_shape_raises(deform_conv2d, FITTING | shapes, message, known, **attributes)


@pytest.mark.parametrize(("dtypes", "message"), WRONG_DTYPES)
def test_wrong_dtype_raises(dtypes, message, portable_mode):
    tensors = {
        name: tf.zeros(shape, dtypes.get(name, tf.float32)) for name, shape in FITTING.items()
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_conv2d(**tensors)


@pytest.mark.parametrize(("attributes", "message"), WRONG_FORMS)
def test_attribute_of_the_wrong_form_raises(attributes, message, portable_mode):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=re.escape(message)):
        deform_conv2d(**tensors, **attributes)


# --- In graphs ---


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("shape", [[None] * 4, None], ids=["rank", "nothing"])
def test_shapes_may_be_unknown(shape, data_format, rng):
    case = random_case(rng, strides=(2, 1), groups=2, deform_groups=2)
    tensors, attributes = case.tensors(data_format=data_format), case.attributes_in(data_format)
    function = tf.function(
        in_portable_mode(lambda tensors: run(tensors, attributes)),
        input_signature=[specs_of(tensors, shape)],
        autograph=False,
    )
    expected = run(tensors, attributes)
    assert_close(function(tensors), expected, 1e-12)


@pytest.mark.parametrize(
    ("data_format", "images", "offset", "expected"),
    [
        ("NHWC", [None, 5, 6, 4], [None, 5, 6, 18], [None, 5, 6, 8]),
        ("NHWC", [None, None, None, 4], [3, None, 7, 18], [3, None, 7, 8]),
        ("NHWC", [2, 5, 6, 4], [None] * 4, [2, 5, 6, 8]),
        ("NCHW", [None, 4, 5, None], [None, 18, 5, None], [None, 8, 5, None]),
    ],
)
def test_what_is_known_of_the_outputs_shape_is_what_the_op_knows(
    data_format, images, offset, expected
):
    specs = [tf.TensorSpec(shape) for shape in (images, [3, 3, 4, 8], offset)]
    for call in (deform_conv2d, in_portable_mode(deform_conv2d)):
        traced = tf.function(
            lambda *tensors, call=call: call(*tensors, data_format=data_format), autograph=False
        )
        assert traced.get_concrete_function(*specs).output_shapes.as_list() == expected


@pytest.mark.parametrize("shape", ["known", None])
def test_xla_compiles_it_without_kernels_of_its_own(shape, rng, monkeypatch):
    monkeypatch.setattr(_library.record, "xla_problem", "they are missing, in this test")
    case = random_case(rng)
    tensors = case.tensors()
    function = tf.function(
        in_portable_mode(lambda tensors: run(tensors, case.attributes)),
        input_signature=[specs_of(tensors, shape)],
        jit_compile=True,
        autograph=False,
    )
    expected = run(tensors, case.attributes)
    assert_close(function(tensors), expected, 1e-10)


def test_version_1_graphs_check_shapes_when_they_run(rng):
    case = random_case(rng)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        placeholders = {
            name: tf.compat.v1.placeholder(tf.float64, [None] * 4) for name in case.arrays
        }
        output = in_portable_mode(deform_conv2d)(**placeholders, **case.attributes)
        feed = {placeholders[name]: array for name, array in case.arrays.items()}
        value = session.run(output, feed)
        feed[placeholders["offset"]] = np.zeros((3, 6, 7, 18))
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"offset.*has batch size"):
            session.run(output, feed)
    assert relative_error(value, deform_conv2d(**case.tensors(), **case.attributes)) <= 1e-12


# --- The context ---

SPECS = [tf.TensorSpec(FITTING[name]) for name in ("input", "filters", "offset")]


def test_within_it_the_op_is_not_used():
    assert "DeformConv2D" in op_types(deform_conv2d, *SPECS)
    with portable():
        assert "DeformConv2D" not in op_types(deform_conv2d, *SPECS)
    assert "DeformConv2D" in op_types(deform_conv2d, *SPECS)


def test_contexts_nest():
    with portable():
        with portable():
            pass
        assert "DeformConv2D" not in op_types(deform_conv2d, *SPECS)
    assert "DeformConv2D" in op_types(deform_conv2d, *SPECS)


def test_an_exception_ends_the_context():
    with pytest.raises(KeyError), portable():
        raise KeyError
    assert "DeformConv2D" in op_types(deform_conv2d, *SPECS)


def test_it_is_a_decorator_too():
    assert "DeformConv2D" not in op_types(portable()(deform_conv2d), *SPECS)


def test_other_threads_are_not_in_it():
    found = []
    thread = threading.Thread(target=lambda: found.append(op_types(deform_conv2d, *SPECS)))
    with portable():
        thread.start()
        thread.join()
    assert "DeformConv2D" in found[0]


def test_functions_keep_what_they_were_traced_with():
    function = tf.function(deform_conv2d, autograph=False)
    before = function.get_concrete_function(*SPECS)
    with portable():
        assert function.get_concrete_function(*SPECS) is before
    assert "DeformConv2D" in {operation.type for operation in before.graph.get_operations()}


# --- Layers and LiteRT ---


def network(shape=(20, 22, 3), **options):
    keras.utils.set_random_seed(1)
    initial = {"offset_kernel_initializer": "glorot_uniform", "padding": "same"}
    return keras.Sequential(
        [
            keras.Input(shape, **options),
            DeformableConv2D(8, 3, strides=2, activation="relu", **initial),
            DeformableConv2D(6, 3, modulated=True, groups=2, deform_groups=2, **initial),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )


def converted(model, **settings):
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    for name, value in settings.items():
        setattr(converter, name, value)
    return converter.convert()


# LiteRT's interpreter: TensorFlow's, as long as it has one, and LiteRT's own.
INTERPRETERS = [tf.lite.Interpreter] if hasattr(tf.lite, "Interpreter") else []
with contextlib.suppress(ModuleNotFoundError):
    INTERPRETERS.append(importlib.import_module("ai_edge_litert.interpreter").Interpreter)


def interpreted(program, images, interpreter=INTERPRETERS[-1]):
    lite = interpreter(model_content=program)
    (given,), (result,) = lite.get_input_details(), lite.get_output_details()
    lite.resize_tensor_input(given["index"], images.shape)
    lite.allocate_tensors()
    lite.set_tensor(given["index"], images)
    lite.invoke()
    return lite.get_tensor(result["index"])


def images_of(rng, batch=1, size=(20, 22)):
    return rng.standard_normal((batch, *size, 3)).astype(np.float32)


def test_layers_compute_what_they_compute_with_the_op(rng):
    model, images = network(), images_of(rng)
    expected = model(images)
    with portable():
        np.testing.assert_allclose(model(images), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("interpreter", INTERPRETERS, ids=lambda of: of.__module__)
@pytest.mark.parametrize("batch_size", [None, 1])
def test_litert_gives_the_models_outputs(batch_size, interpreter, rng):
    """With its builtin ops alone: the interpreter has no others."""
    model, images = network(batch_size=batch_size), images_of(rng)
    program = in_portable_mode(converted)(model)
    outputs = interpreted(program, images, interpreter)
    np.testing.assert_allclose(outputs, model(images), atol=1e-5)


def test_litert_takes_other_numbers_and_sizes_of_images(rng):
    model = network((None, None, 3))
    program = in_portable_mode(converted)(model)
    for images in (images_of(rng, 3), images_of(rng, 2, (9, 14))):
        np.testing.assert_allclose(interpreted(program, images), model(images), atol=1e-5)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_litert_takes_strides_and_dilation_together(padding, rng):
    options = {"strides": 2, "dilation_rate": (2, 3), "padding": padding}
    layer = DeformableConv2D(4, 3, offset_kernel_initializer="glorot_uniform", **options)
    model = keras.Sequential([keras.Input((None, None, 3)), layer])
    program = in_portable_mode(converted)(model)
    for images in (images_of(rng), images_of(rng, 2, (9, 14))):
        np.testing.assert_allclose(interpreted(program, images), model(images), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"target_spec": tf.lite.TargetSpec(supported_types=[tf.float16])}, 1e-3),
        ({}, 3e-2),
        ({"representative_dataset": lambda: ([images_of(np.random.default_rng(0))],)}, 1e-1),
    ],
    ids=["float16 weights", "int8 weights", "int8"],
)
def test_litert_computes_with_fewer_bits(settings, tolerance, rng):
    """In LiteRT's own interpreter: TensorFlow's is off by 0.14 with 8-bit activations."""
    pytest.importorskip("ai_edge_litert")
    model, images = network(batch_size=1), images_of(rng)
    whole = in_portable_mode(converted)(model)
    optimizations = [tf.lite.Optimize.DEFAULT]
    program = in_portable_mode(converted)(model, optimizations=optimizations, **settings)
    assert len(program) < len(whole)
    assert relative_error(interpreted(program, images), model(images)) < tolerance


def test_conversion_must_be_in_the_context():
    model = network()
    with portable():
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
    with pytest.raises(Exception, match="DeformConv2D"):
        converter.convert()


def test_model_that_has_predicted_before_converts(rng):
    model, images = network(), images_of(rng)
    expected = model.predict(images, verbose=0)
    program = in_portable_mode(converted)(model)
    np.testing.assert_allclose(interpreted(program, images), expected, atol=1e-5)


def test_function_converts(rng):
    filters = tf.constant(rng.standard_normal((3, 3, 3, 4)), tf.float32)
    offset = tf.constant(rng.standard_normal((1, 20, 22, 18)), tf.float32)
    images = images_of(rng)

    @tf.function(input_signature=[tf.TensorSpec(images.shape)], autograph=False)
    def convolve(images):
        return deform_conv2d(images, filters, offset)

    with portable():
        traced = convolve.get_concrete_function()
    # Traced as it is, it needs no context any more.
    program = tf.lite.TFLiteConverter.from_concrete_functions([traced], tf.Module()).convert()
    expected = deform_conv2d(images, filters, offset)
    np.testing.assert_allclose(interpreted(program, images), expected, atol=1e-5)


def test_exported_model_needs_no_deform_conv(rng, tmp_path):
    model, images = network(), images_of(rng)
    with portable():
        model.export(tmp_path / "model", verbose=False)
    np.save(tmp_path / "images.npy", images)
    program = """
import sys, numpy as np, tensorflow as tf
model = tf.saved_model.load("model")
output = model.serve(np.load("images.npy"))
assert "deform_conv" not in sys.modules
np.save("output.npy", output)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "output.npy"), model(images), atol=1e-5)


# --- The environment variable ---


@pytest.fixture
def no_library(tmp_path):
    """A folder with a copy of the package and no library for it."""
    copy_package(tmp_path / "deform_conv")
    return tmp_path


PORTABLE = {"DEFORM_CONV_PORTABLE": "1", "DEFORM_CONV_LIBRARY": "/nowhere/none.so"}


def test_import_without_a_library_names_the_way_out(no_library):
    program = """
message = failed_import("deform_conv")
assert "not found" in message and "DEFORM_CONV_PORTABLE=1" in message, message
"""
    run_in(no_library, program, DEFORM_CONV_PORTABLE="0")


@pytest.mark.parametrize(("value", "meaning"), [("1", True), ("0", False), ("", False)])
def test_value_turns_portable_mode_on_or_off(value, meaning, monkeypatch):
    monkeypatch.setenv("DEFORM_CONV_PORTABLE", value)
    assert _library._portable_mode() is meaning


@pytest.mark.parametrize("value", ["yes", "2", " "])
def test_value_that_means_nothing_is_refused(value, monkeypatch):
    monkeypatch.setenv("DEFORM_CONV_PORTABLE", value)
    message = f"DEFORM_CONV_PORTABLE must be 1, or 0 or empty; received {value!r}"
    with pytest.raises(ImportError, match=message):
        _library._portable_mode()


def test_in_portable_mode_everything_works_without_a_library(no_library):
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import deform_conv
(warning,) = [each for each in caught if "DEFORM_CONV_PORTABLE=1" in str(each.message)]
assert "TensorFlow's own ops" in str(warning.message)

check(deform_conv)
with deform_conv.portable():
    check(deform_conv)
layer = check_layer(deform_conv)
assert layer.supports_jit and deform_conv.xla_kernels_loaded()

import keras, numpy as np
images = keras.Input((5, 6, 2))
model = keras.Model(images, layer(images))
model.compile("sgd", "mse", jit_compile=True)
data = np.ones((4, 5, 6, 2)), np.ones((4, 3, 4, 3))
losses = model.fit(*data, epochs=3, verbose=0).history["loss"]
assert losses[-1] < losses[0]
model.save("model.keras")
np.testing.assert_allclose(keras.models.load_model("model.keras")(data[0]), model(data[0]))
assert layer(np.ones((0, 5, 6, 2))).shape == (0, 3, 4, 3)
assert type(deform_conv.deformable(
    keras.Sequential([keras.Input((5, 6, 2)), keras.layers.Conv2D(3, 3)])
).layers[-1]) is type(layer)
"""
    run_in(no_library, program, **PORTABLE)


def refused(statement, error, text):
    """The source of a program that ends well only if the statement raises the error."""
    return f"""
import deform_conv
try:
    {statement}
except {error} as error:
    assert {text!r} in str(error), error
else:
    raise AssertionError("nothing was raised")
"""


def test_in_portable_mode_there_is_no_path_of_a_library(no_library):
    program = refused("deform_conv.library_path()", "RuntimeError", "DEFORM_CONV_PORTABLE=1")
    run_in(no_library, program, **PORTABLE)


def test_in_portable_mode_a_saved_model_must_be_without_the_op(no_library):
    model = network()
    model.export(no_library / "with", verbose=False)
    with portable():
        model.export(no_library / "without", verbose=False)
    run_in(no_library, "import deform_conv\ntf.saved_model.load('without')", **PORTABLE)
    load = "tf.saved_model.load('with')"
    program = refused(load, "Exception", "Op type not registered 'DeformConv2D'")
    run_in(no_library, program, **PORTABLE)


def test_in_portable_mode_it_describes_and_checks_itself(no_library):
    completed = subprocess.run(
        [sys.executable, "-m", "deform_conv"],
        cwd=no_library,
        env=os.environ | PORTABLE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    lines = completed.stdout.splitlines()
    library = "none: TensorFlow's own ops compute, with DEFORM_CONV_PORTABLE=1"
    assert f"  library      {library}" in lines
    assert "deform_conv2d, version 2, on CPU:0, against tf.nn.conv2d" in lines
    assert lines[-1] == "ok"


def test_the_check_of_portable_mode_can_fail(no_library):
    reference = no_library / "deform_conv" / "_reference.py"
    text = reference.read_text()
    reference.write_text(
        text.replace("fraction = offset - whole", "fraction = offset - whole + 0.1")
    )
    assert reference.read_text() != text
    completed = subprocess.run(
        [sys.executable, "-m", "deform_conv"],
        cwd=no_library,
        env=os.environ | PORTABLE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 1
    assert "error: relative error" in completed.stderr
