"""The op compiled by XLA, with jit_compile=True."""

import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from checks import (
    MODES,
    assert_jitted_equals,
    assert_second_derivatives_equal,
    gradients_alone,
)
from conftest import assert_close, printed_by, random_case, relative_error, run
from tensorflow.compiler.tf2xla.python.xla import call_module

from deform_conv import deform_conv2d
from deform_conv._library import record
from deform_conv._reference import deform_conv2d_reference
from deform_conv.layers import DeformableConv2D

pytestmark = pytest.mark.usefixtures("device")

# Of the op's own type: XLA may sum up in another order.
TOLERANCES = {tf.float64: 1e-13, tf.float32: 1e-6, tf.float16: 2e-3, tf.bfloat16: 1e-2}


jitted = MODES["jit"]


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=lambda dtype: dtype.name)
def test_jitted_output_and_gradients_equal_the_ops(dtype, mask, data_format, rng):
    case = random_case(rng, size=(12, 11), mask=mask, groups=2, deform_groups=2, strides=(2, 1))
    arguments = case.arguments(dtype, data_format=data_format)
    assert_jitted_equals(deform_conv2d, *arguments, TOLERANCES[dtype])


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_size_that_xla_knows_only_a_bound_of_is_refused(data_format, rng):
    case = random_case(rng, batch=3)
    attributes = case.attributes_in(data_format)

    @jitted
    def convolve(tensors, chosen):
        of_chosen = {
            name: value if name == "filters" else tf.boolean_mask(value, chosen)
            for name, value in tensors.items()
        }
        return deform_conv2d(**of_chosen, **attributes)

    with pytest.raises(tf.errors.InvalidArgumentError, match="for static shapes only"):
        convolve(case.tensors(data_format=data_format), tf.constant([True, False, True]))


def test_float32_offsets_beside_a_16_bit_input(rng):
    arguments = random_case(rng).arguments(tf.bfloat16, tf.float32)
    assert_jitted_equals(deform_conv2d, *arguments, TOLERANCES[tf.bfloat16])


@pytest.mark.parametrize("wanted", [["offset"], ["filters"], ["input", "mask"]])
def test_only_wanted_gradients(wanted, rng):
    case = random_case(rng)
    tensors = case.tensors()
    expected = run(tensors, case.attributes)
    gradients = jitted(lambda t: gradients_alone(deform_conv2d, t, case.attributes, wanted))
    assert_close(gradients(tensors), {name: expected[f"grad_{name}"] for name in wanted}, 1e-13)


def test_batch_of_no_images(rng):
    case = random_case(rng, batch=0)
    results = jitted(lambda t: run(t, case.attributes))(case.tensors())
    assert results["output"].shape == (0, 6, 7, 6)
    assert np.all(results["grad_filters"].numpy() == 0)


def test_large_images_are_shared_among_threads(rng):
    case = random_case(rng, batch=4, size=(40, 50), channels=32, out_channels=32)
    tensors = case.tensors(tf.float32)
    compiled = jitted(lambda t: run(t, case.attributes))
    expected = run(tensors, case.attributes)
    for _ in range(10):
        assert_close(compiled(tensors), expected, TOLERANCES[tf.float32])


def test_two_ops_that_could_run_side_by_side(rng):
    """None of them may wait for a thread that waits for the other."""
    cases = [random_case(rng, size=(30, 30), channels=16) for _ in range(4)]
    tensors = [case.tensors(tf.float32) for case in cases]

    @jitted
    def sums(tensors):
        return [tf.reduce_sum(deform_conv2d(**t, **cases[0].attributes)) for t in tensors]

    expected = [tf.reduce_sum(deform_conv2d(**t, **cases[0].attributes)) for t in tensors]
    for _ in range(20):
        np.testing.assert_allclose(sums(tensors), expected, rtol=1e-4)


def test_second_derivatives(rng):
    case = random_case(rng, batch=1, size=(4, 4), channels=2, out_channels=2)
    assert_second_derivatives_equal(deform_conv2d, deform_conv2d_reference, case, 1e-10, mode="jit")


def test_wrong_shapes_are_refused():
    function = jitted(lambda offset: deform_conv2d(tf.zeros((1, 5, 5, 2)), filters, offset))
    filters = tf.zeros((3, 3, 2, 3))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="18 expected"):
        function(tf.zeros((1, 5, 5, 36)))


# Nobody but deform_conv2d calls the gradient op. It must not read out of bounds all the same.
@pytest.mark.parametrize("shape", [(0,), (1,), (), (1, 5, 5, 4), (1, 3, 5, 5), (1, 5, 5, 3, 1)])
@pytest.mark.parametrize("static", [True, False], ids=["static", "unknown"])
def test_gradient_of_another_shape_is_refused(static, shape):
    specs = [tf.TensorSpec(shape if static else None, tf.float32)]

    @tf.function(jit_compile=True, input_signature=specs)
    def gradients(grad_output):
        return record.ops.deform_conv2d_grad(
            input=tf.zeros((1, 5, 5, 2)),
            filters=tf.zeros((3, 3, 2, 3)),
            offset=tf.zeros((1, 5, 5, 18)),
            mask=[],
            grad_output=grad_output,
            strides=[1, 1, 1, 1],
            padding="SAME",
        )

    with pytest.raises(
        (ValueError, tf.errors.InvalidArgumentError),
        match=r"grad_output must have the output's shape \[1, 5, 5, 3\]; received \[",
    ):
        gradients(tf.ones(shape))


ALL_TYPES = list(TOLERANCES)


@pytest.mark.parametrize("offset_dtype", ALL_TYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("dtype", ALL_TYPES, ids=lambda dtype: dtype.name)
def test_raw_ops_take_the_pairs_of_types_that_they_take_without_xla(dtype, offset_dtype, rng):
    tensors = random_case(rng, mask=False, padding="SAME").tensors(dtype, offset_dtype)
    attributes = {"mask": [], "strides": [1, 1, 1, 1], "padding": "SAME"}

    def outputs(tensors):
        output = record.ops.deform_conv2d(**tensors, **attributes)
        gradients = record.ops.deform_conv2d_grad(**tensors, grad_output=output, **attributes)
        return [output, *gradients[:3]]

    if offset_dtype == dtype or (dtype.size == 2 and offset_dtype == tf.float32):
        for ours, theirs in zip(jitted(outputs)(tensors), outputs(tensors), strict=True):
            assert relative_error(ours, theirs) <= TOLERANCES[dtype]
    else:
        for function in (outputs, jitted(outputs)):
            with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.NotFoundError)):
                function(tensors)


def test_compiled_module_has_the_attributes_and_nothing_that_differs_from_run_to_run(rng):
    """Or caches of compiled modules, which XLA can keep on disk, would miss."""
    tensors = random_case(rng).tensors(tf.float32)
    gradients = jitted(lambda t: run(t, {"padding": "SAME"}))
    module = gradients.experimental_get_compiler_ir(tensors)(stage="hlo")
    # The words' version, SAME, strides, dilations, padding, deform_groups.
    words = "{attributes = array<i64: 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1>"
    configurations = re.findall("backend_config=(.*)", module)
    assert set(configurations) == {f"{words}}}", f"{words}, wanted = 15 : i64}}"}


# A compiled module of foreign make: the custom call of deform_conv2d, with what it is given.
MODULE = """
func.func public @main(%input: tensor<1x5x5x2x{type}>, %filters: tensor<3x3x2x3x{type}>,
                       %offset: tensor<1x5x5x18x{offset_type}>) -> tensor<{output}> {{
  %output = stablehlo.custom_call @deform_conv2d_forward(%input, %filters, %offset)
      {{api_version = 4 : i32, backend_config = {{attributes = array<i64: {words}>}}}}
      : (tensor<1x5x5x2x{type}>, tensor<3x3x2x3x{type}>, tensor<1x5x5x18x{offset_type}>)
      -> tensor<{output}>
  return %output : tensor<{output}>
}}
"""
FITTING = {
    "type": "f32",
    "offset_type": "f32",
    "output": "1x5x5x3xf32",
    "words": "1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1",
}


def call_of_module(**differences):
    parts = FITTING | differences
    types = {"f32": tf.float32, "f64": tf.float64, "i32": tf.int32}
    *shape, output_type = parts["output"].split("x")
    tensors = [tf.ones((1, 5, 5, 2)), tf.ones((3, 3, 2, 3)), tf.zeros((1, 5, 5, 18))]
    dtypes = [types[parts["type"]]] * 2 + [types[parts["offset_type"]]]
    tensors = map(tf.cast, tensors, dtypes)
    return run_module(MODULE.format(**parts), tensors, shape, types[output_type])


def run_module(module, tensors, shape, dtype=tf.float32):
    platform = "CUDA" if "GPU" in tf.zeros(()).device else "CPU"

    @jitted
    def call(*tensors):
        return call_module(
            list(tensors),
            version=9,
            module=module.encode(),
            Tout=[dtype],
            Sout=[[int(size) for size in shape]],
            platforms=[platform],
        )

    return call(*tensors)[0]


def test_custom_call_of_a_foreign_module():
    assert np.all(call_of_module()[0, 1:-1, 1:-1] == 3 * 3 * 2)


FOREIGN = {
    "fewer words": ({"words": "1, 0, 1, 1, 1, 1, 0, 0, 0, 0"}, "not those of this version"),
    "version": ({"words": "2, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1"}, "not those of this version"),
    "padding": ({"words": "1, 3, 1, 1, 1, 1, 0, 0, 0, 0, 1"}, "not those of this version"),
    "stride of 0": ({"words": "1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1"}, "strides must be from 1"),
    "stride of 2": ({"words": "1, 0, 2, 1, 1, 1, 0, 0, 0, 0, 1"}, "offset has height and width"),
    "groups": ({"words": "1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 2"}, "36 expected"),
    "offset's type": ({"offset_type": "f64"}, "offset has another type"),
    "output's type": ({"output": "1x5x5x3xf64"}, "the output has another type"),
    "output's shape": ({"output": "1x5x5x2xf32"}, "the output's shape"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_custom_call_that_does_not_fit_is_an_error_of_the_call(name):
    """The handler reads nothing out of bounds, and the process goes on, on a GPU too."""
    differences, message = FOREIGN[name]
    with pytest.raises(tf.errors.OpError, match=message):
        call_of_module(**differences)
    assert call_of_module().shape == (1, 5, 5, 3)


# Likewise without filters.
AGGREGATE_MODULE = """
func.func public @main(%input: tensor<1x5x5x2xf32>, %offset: tensor<1x5x5x18xf32>,
                       %weights: tensor<1x5x5x9xf32>) -> tensor<1x5x5x2xf32> {{
  %output = stablehlo.custom_call @deform_aggregate2d_forward({operands})
      {{api_version = 4 : i32, backend_config = {{
        attributes = array<i64: 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1>{kernel_size}}}}}
      : ({types}) -> tensor<1x5x5x2xf32>
  return %output : tensor<1x5x5x2xf32>
}}
"""


def call_of_aggregate_module(kernel_size=", kernel_size = array<i64: 3, 3>", operands=3):
    types = ["tensor<1x5x5x2xf32>", "tensor<1x5x5x18xf32>", "tensor<1x5x5x9xf32>"]
    module = AGGREGATE_MODULE.format(
        kernel_size=kernel_size,
        operands=", ".join(("%input", "%offset", "%weights", "%weights")[:operands]),
        types=", ".join([*types, types[-1]][:operands]),
    )
    tensors = [tf.ones((1, 5, 5, 2)), tf.zeros((1, 5, 5, 18)), tf.ones((1, 5, 5, 9))]
    return run_module(module, tensors, (1, 5, 5, 2))


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ({"kernel_size": ""}, "not those of this version"),
        ({"kernel_size": ", kernel_size = array<i64: 3>"}, "not those of this version"),
        ({"kernel_size": ", kernel_size = array<i64: 0, 3>"}, "kernel_size must be from 1"),
        ({"kernel_size": ", kernel_size = array<i64: 5, 3>"}, "30 expected"),
        ({"operands": 2}, "the call has 2 operands; 3 expected"),
        ({"operands": 4}, "the call has 4 operands; 3 expected"),
    ],
    ids=str,
)
def test_custom_call_without_filters_that_does_not_fit_is_an_error_of_the_call(
    differences, message
):
    with pytest.raises(tf.errors.OpError, match=message):
        call_of_aggregate_module(**differences)
    assert np.all(call_of_aggregate_module()[0, 1:-1, 1:-1] == 3 * 3)


def test_jitted_fit_learns_what_fit_does(device, rng):
    images = rng.standard_normal((16, 9, 8, 4)).astype("float32")
    targets = rng.standard_normal((16, 9, 8, 3)).astype("float32")
    losses = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [keras.Input((9, 8, 4)), DeformableConv2D(3, 3, padding="same", modulated=True)]
        )
        model.compile("adam", "mse", jit_compile=jit_compile)
        history = model.fit(images, targets, batch_size=4, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


LATE = """
import keras, numpy as np, tensorflow as tf
np.testing.assert_allclose(tf.function(lambda x: 2 * x, jit_compile=True)(tf.ones(3)), 2)
from deform_conv.layers import DeformableConv2D
model = keras.Sequential([keras.Input((5, 5, 2)), DeformableConv2D(3, 3)])
model.compile("adam", "mse", jit_compile=True)
model.fit(tf.ones((4, 5, 5, 2)), tf.ones((4, 3, 3, 3)), verbose=0)
print("fit works")
"""


def test_library_may_be_loaded_after_xla_was_used():
    assert "fit works" in printed_by(LATE)


# --- Without the library of XLA kernels ---

WITHOUT = """
import keras, tensorflow as tf
from deform_conv.layers import DeformableConv2D
from deform_conv import deform_conv2d, xla_kernels_loaded
assert not xla_kernels_loaded()
model = keras.Sequential([keras.Input((5, 5, 2)), DeformableConv2D(3, 3)])
model.compile("adam", "mse", jit_compile="auto")
model.fit(tf.ones((4, 5, 5, 2)), tf.ones((4, 3, 3, 3)), verbose=0)
print("fit works")
convolve = tf.function(deform_conv2d, jit_compile=True)
try:
    convolve(tf.zeros((1, 5, 5, 2)), tf.zeros((3, 3, 2, 3)), tf.zeros((1, 5, 5, 18)))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_its_library_the_error_says_what_to_do_and_fit_works(broken, tmp_path):
    library = record.path
    (core,) = {*library.parent.glob("*_core.so"), *library.parent.parent.glob("*_core.so")}
    for file in (library, core):
        shutil.copy(file, tmp_path)
    if broken:
        (tmp_path / "libdeform_conv_xla.so").write_bytes(b"no library")
    library = str(tmp_path / "libdeform_conv.so")
    printed = printed_by(WITHOUT, DEFORM_CONV_LIBRARY=library)
    assert "fit works" in printed
    problem = "is not the libdeform_conv_xla.so of deform_conv" if broken else "not found"
    assert f"{tmp_path}/libdeform_conv_xla.so {problem}" in printed
    assert "Install or build what is missing, or leave jit_compile out" in printed
