"""What the tests share: golden cases, random configurations, error measures, running scripts."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Several processes of tests share a GPU.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf

from deform_conv import deform_conv2d

PROJECT = Path(__file__).resolve().parent.parent
GOLDEN_FILE = Path(__file__).parent / "data" / "torchvision_0_29.npz"
DCNV3_FILE = GOLDEN_FILE.with_name("dcnv3.npz")
ARGUMENTS = ("input", "filters", "offset", "mask")
OFFSET_ARGUMENTS = ("offset", "mask", "weights")  # in float32 beside 16-bit types

# Its assertions say what they compared, as those of tests do.
pytest.register_assert_rewrite("checks")

# The same examples in every run: a failure is of the change at hand.
hypothesis.settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    print_blob=False,
    max_examples=200,
    # `device` is the same for all examples.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("project")


def pytest_collection_modifyitems(items):
    if tf.config.list_physical_devices("GPU"):
        return
    skip = pytest.mark.skip(reason="no GPU that TensorFlow can use")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


# Tolerances are those of float32; tests/test_gpu.py tests TensorFloat-32.
tf.config.experimental.enable_tensor_float_32_execution(False)


@pytest.fixture(params=["CPU:0", pytest.param("GPU:0", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU and, marked `gpu`, on a GPU."""
    with tf.device(request.param):
        yield request.param


@pytest.fixture
def dtype_policy(request):
    """The policy of the layers that a test makes; its name is the (indirect) parameter."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def golden_cases(path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each case in a file whose keys are `case/array`."""
    with np.load(path) as file:
        arrays = dict(file)
    cases = {}
    for key in sorted(arrays):
        name, _, part = key.partition("/")
        cases.setdefault(name, {})[part] = arrays[key]
    return cases


def dcnv3_cases() -> dict[str, dict[str, np.ndarray]]:
    """What InternImage's reference function in PyTorch, `dcnv3_core_pytorch`, computes in float64.

    Each case has config (kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h,
    dilation_w, groups, remove_center), offset_scale, input, offset, mask, output and gradients.
    """
    return golden_cases(DCNV3_FILE)


def relative_error(actual, expected) -> float:
    """‖a − b‖ / ‖b‖, in float64."""
    actual, expected = (np.asarray(value).astype(np.float64) for value in (actual, expected))
    assert actual.shape == expected.shape
    distance = np.linalg.norm(actual - expected)
    norm = np.linalg.norm(expected)
    return 0.0 if distance == 0 else float(distance / norm) if norm else np.inf


def assert_close(actual, expected, tolerance, data_format=None):
    """Results as `run` gives them, each within a relative error of what is expected of it.

    The actual ones may be in another data format; those expected have their channels last.
    """
    assert set(actual) == set(expected)
    for name, value in actual.items():
        error = relative_error(value, in_format(expected[name], name, data_format))
        assert error <= tolerance, f"{name} has a relative error of {error}"


@dataclass
class Case:
    """Arguments of one deformable convolution, over any number of axes, and its attributes.

    The arguments are float64 arrays with the channels last.
    """

    arrays: dict[str, np.ndarray]
    attributes: dict = field(default_factory=dict)

    def tensors(self, dtype=tf.float64, offset_dtype=None, data_format=None):
        """The arguments as tensors; offset and mask in `offset_dtype` if given."""
        return {
            name: tf.constant(
                in_format(array, name, data_format),
                (offset_dtype or dtype) if name in OFFSET_ARGUMENTS else dtype,
            )
            for name, array in self.arrays.items()
        }

    def rounded_to(self, dtype, offset_dtype=None):
        """The case with every number rounded to its type, and offsets still off the pixel grid."""
        arrays = {}
        for name, array in self.arrays.items():
            to = (offset_dtype or dtype) if name in OFFSET_ARGUMENTS else dtype
            rounded = tf.cast(tf.cast(array, to), tf.float64).numpy()
            if name == "offset":
                # An eighth more is exact in every type, at the sizes of the tests.
                rounded = np.where(rounded == np.floor(rounded), rounded + 0.125, rounded)
            arrays[name] = rounded
        return Case(arrays, self.attributes)

    def attributes_in(self, data_format):
        """The attributes, with explicit padding in the order of `data_format`."""
        if data_format is None:
            return self.attributes
        attributes = dict(self.attributes, data_format=data_format)
        if data_format[1] == "C" and not isinstance(attributes.get("padding", "SAME"), str):
            none, *spatial, _ = attributes["padding"]
            attributes["padding"] = [none, none, *spatial]
        return attributes

    def arguments(self, dtype=tf.float64, offset_dtype=None, data_format=None):
        """Both."""
        return self.tensors(dtype, offset_dtype, data_format), self.attributes_in(data_format)


def in_format(array, name, data_format):
    """An array whose channels are last as `data_format` has it; filters are the same in all.

    Without a format, the channels stay last.
    """
    if data_format is None or data_format[1] != "C" or name.endswith("filters"):
        return array
    return np.moveaxis(np.asarray(array), -1, 1)


def run(tensors, attributes, grad_output=None, function=deform_conv2d):
    """Output and gradients, as a dict: output, grad_input, grad_filters, grad_offset, grad_mask."""
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = function(**tensors, **attributes)
    if grad_output is None:
        grad_output = tf.ones_like(output)
    gradients = tape.gradient(output, tensors, output_gradients=grad_output)
    return {"output": output} | {f"grad_{name}": value for name, value in gradients.items()}


def second_derivatives(tensors, attributes, function=deform_conv2d):
    """Gradients of a number made of the first gradients by all arguments, by all arguments."""
    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(tensors)
            output = tf.reduce_sum(function(**tensors, **attributes) ** 2)
        gradients = inner.gradient(output, tensors)
        norm = tf.add_n([tf.reduce_sum(value**3) for value in gradients.values()])
    return outer.gradient(norm, tensors)


def output_size(size, kernel, strides, dilations, padding):
    """The output's size along each axis and the padding before it, as in `tf.nn.convolution`."""
    sizes, before = [], []
    for axis, (length, taps, stride, dilation) in enumerate(
        zip(size, kernel, strides, dilations, strict=True)
    ):
        extent = (taps - 1) * dilation + 1
        if padding == "SAME":
            out = -(-length // stride)
            pad = max((out - 1) * stride + extent - length, 0) // 2
        else:
            pads = (0, 0) if padding == "VALID" else padding[axis + 1]
            out, pad = (length + sum(pads) - extent) // stride + 1, pads[0]
        sizes.append(out)
        before.append(pad)
    return sizes, before


def random_case(
    rng,
    *,
    batch=2,
    size=(6, 7),
    channels=4,
    out_channels=6,
    kernel=3,
    strides=1,
    dilations=1,
    padding="SAME",
    groups=1,
    deform_groups=1,
    mask=True,
    filters=True,
    offset_scale=1.5,
):
    """A `Case` of normal numbers, over as many axes as `size` has; without filters, of
    deform_aggregate2d. Samples stay 1e-3 away from the pixel grid, where the gradient with respect
    to the offset jumps."""
    kernel, strides, dilations = (
        tuple(np.broadcast_to(numbers, len(size)).tolist())
        for numbers in (kernel, strides, dilations)
    )
    out_size, _ = output_size(size, kernel, strides, dilations, padding)
    masks = (batch, *out_size, deform_groups * math.prod(kernel))
    offset = offset_scale * rng.standard_normal((*masks[:-1], len(size) * masks[-1]))
    whole = np.floor(offset)
    arrays = {
        "input": rng.standard_normal((batch, *size, channels)),
        "filters": rng.standard_normal((*kernel, channels // groups, out_channels)),
        "offset": whole + np.clip(offset - whole, 1e-3, 1 - 1e-3),
    }
    if mask:
        arrays["mask" if filters else "weights"] = rng.uniform(size=masks)
    attributes = {
        "strides": strides,
        "dilations": dilations,
        "padding": padding,
        "deform_groups": deform_groups,
    }
    if not filters:
        del arrays["filters"]
        attributes["kernel_size"] = kernel
    return Case(arrays, attributes)


@pytest.fixture
def rng():
    return np.random.default_rng(20261122)


@pytest.fixture(scope="module")
def torch():
    """PyTorch, which no test needs but those that compare with its own modules."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    # torchvision imports Triton where it is installed. Both Triton and TensorFlow contain LLVM, and
    # the process ends if TensorFlow is the first. None stands for a package that is not installed.
    sys.modules.setdefault("triton", None)
    import torch

    torch.manual_seed(1)
    return torch


def script(*arguments, check=True, stdout=subprocess.PIPE, **environment):
    completed = subprocess.run(
        [sys.executable, "-W", "always", *map(str, arguments)],
        cwd=PROJECT,
        env=os.environ | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    # A warning names the file that it is about.
    own = [
        line for line in completed.stderr.splitlines() if re.match(rf"{PROJECT}/[^.].*Warn", line)
    ]
    assert own == []
    if check:
        assert completed.returncode == 0, completed.stderr
    return completed


def printed_by(program, *arguments, **environment):
    """What a program in Python prints that imports from the project and from its tests."""
    paths = [str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return script("-c", program, *arguments, **environment).stdout


def error_of(*arguments, **environment):
    """The one line that a script ends with where something is missing or does not fit."""
    completed = script(*arguments, check=False, **environment)
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
    return completed.stderr.splitlines()[-1]


# Runs train_regular_conv.py; with `stop`, until its first epoch is saved.
STOP_AFTER_ONE_EPOCH = """
import sys
from utils import training
save = training.TrainingState.save
def save_and_stop(self, *result):
    save(self, *result)
    raise KeyboardInterrupt
if sys.argv[1] == "stop":
    training.TrainingState.save = save_and_stop
sys.argv = ["train_regular_conv.py", *sys.argv[2:]]
import train_regular_conv
from utils.cli import run
run(train_regular_conv.main)
"""
