"""What holds on a GPU only, or between a GPU and the CPU."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from checks import needs_xla
from conftest import PROJECT, random_case, relative_error, run

from deform_conv import deform_conv2d
from deform_conv._reference import deform_conv2d_reference

pytestmark = pytest.mark.gpu

GPU, CPU = "GPU:0", "CPU:0"


def run_on(device, case, dtype, **options):
    with tf.device(device):
        return run(case.tensors(dtype), case.attributes, **options)


@pytest.mark.parametrize(
    "configuration",
    [
        {"size": (100, 152), "channels": 16, "out_channels": 24, "deform_groups": 2},
        {"size": (50, 76), "channels": 64, "out_channels": 64, "mask": False},
        {"size": (28, 28), "channels": 34, "out_channels": 16, "groups": 2, "strides": (2, 2)},
        {"size": (13, 17), "channels": 1},
        {"size": (13, 17), "channels": 3, "deform_groups": 3, "dilations": (1, 2)},
        {"size": (13, 17), "channels": 17},
        {"size": (9, 9), "channels": 24, "out_channels": 24, "groups": 24},
        {"size": (50, 76), "channels": 64, "out_channels": 64, "groups": 16},
        {"size": (100, 152), "channels": 30, "out_channels": 33},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(tf.float64, 1e-12), (tf.float32, 1e-6), (tf.float16, 5e-3), (tf.bfloat16, 2e-2)],
    ids=lambda value: getattr(value, "name", None),
)
def test_gpu_is_as_precise_as_it_should_be(configuration, dtype, tolerance, rng):
    """Against the reference in float64, on inputs rounded to the type; and so is the CPU."""
    case = random_case(rng, **configuration).rounded_to(dtype)
    with tf.device(CPU):
        expected = run(case.tensors(), case.attributes, function=deform_conv2d_reference)
    for device in (GPU, CPU):
        for key, value in run_on(device, case, dtype).items():
            assert relative_error(tf.cast(value, tf.float64), expected[key]) <= tolerance, key


def test_op_runs_on_the_gpu(rng):
    results = run_on(GPU, random_case(rng), tf.float32)
    assert all("GPU" in value.device for value in results.values())


def test_tensor_float_32_setting_is_obeyed(rng):
    case = random_case(rng, size=(32, 32), channels=64, out_channels=64)
    expected = run_on(CPU, case, tf.float64)["output"]
    errors = []
    for allowed in (True, False):
        tf.config.experimental.enable_tensor_float_32_execution(allowed)
        errors.append(relative_error(run_on(GPU, case, tf.float32)["output"], expected))
    assert errors[1] <= 1e-6
    compute_capability = tf.config.experimental.get_device_details(
        tf.config.list_physical_devices("GPU")[0]
    )["compute_capability"]
    if compute_capability >= (8, 0):
        assert 1e-5 <= errors[0] <= 2e-3


@pytest.mark.parametrize("dtype", [tf.float16, tf.float32])
def test_batch_of_many_chunks_equals_single_images(dtype, rng):
    """67 images whose columns take several chunks, 67 being prime."""
    case = random_case(rng, batch=67, size=(48, 48), channels=128, out_channels=8, mask=False)
    tensors = case.tensors(dtype)
    with tf.device(GPU):
        together = run(tensors, case.attributes)
        singles = [
            run(
                {k: v if k == "filters" else v[n : n + 1] for k, v in tensors.items()},
                case.attributes,
            )
            for n in range(67)
        ]
    tolerance = {tf.float16: 2e-3, tf.float32: 1e-5}[dtype]
    for key in ("output", "grad_input", "grad_offset"):
        single = tf.concat([result[key] for result in singles], axis=0)
        assert relative_error(together[key], single) <= tolerance, key
    total = tf.add_n([tf.cast(result["grad_filters"], tf.float64) for result in singles])
    assert relative_error(together["grad_filters"], total) <= tolerance


def test_more_than_2_to_the_31_elements():
    """A 1x1 identity convolution with an offset of one pixel moves a large image by one pixel."""
    batch, size, channels = 9, 4096, 16
    assert batch * size * size * channels > 2**31
    with tf.device(GPU):
        row = tf.random.normal([batch, 1, size, channels], dtype=tf.float16)
        image = tf.tile(row, [1, size, 1, 1])
        offset = tf.tile(tf.constant([[[[0.0, 1.0]]]]), [batch, size, size, 1])
        identity = tf.eye(channels, dtype=tf.float16)[tf.newaxis, tf.newaxis]
        with tf.GradientTape() as tape:
            tape.watch(image)
            output = deform_conv2d(image, identity, offset)
        gradient = tape.gradient(output, image)
        for n in range(batch):
            moved = tf.pad(image[n, :, 1:], [[0, 0], [0, 1], [0, 0]])
            assert tf.reduce_all(output[n] == moved)
            # Every pixel but those of the first column is read once.
            assert tf.reduce_all(gradient[n, :, 1:] == 1)
            assert tf.reduce_all(gradient[n, :, 0] == 0)


def test_out_of_memory_raises_and_leaves_the_process_usable(rng):
    with tf.device(GPU):
        image, offset = tf.zeros((1, 4096, 4096, 1)), tf.zeros((1, 4096, 4096, 2))
        with pytest.raises(tf.errors.ResourceExhaustedError):
            deform_conv2d(image, tf.zeros((1, 1, 1, 65536)), offset)
    assert run_on(GPU, random_case(rng), tf.float32)


def test_tensors_that_do_not_begin_on_a_vector_boundary(rng):
    """Slices of larger tensors, which TensorFlow may hand over in place."""
    case = random_case(rng, batch=4, size=(5, 3), channels=8)
    with tf.device(GPU):
        tensors = case.tensors(tf.float16)
        shifted = {
            name: tf.reshape(
                tf.concat([tensor[..., :1] * 0, tensor], axis=-1)[..., 1:], tensor.shape
            )
            for name, tensor in tensors.items()
        }
        actual, expected = run(shifted, case.attributes), run(tensors, case.attributes)
    for key, value in actual.items():
        assert relative_error(value, expected[key]) <= 1e-3, key


def test_threads_do_not_disturb_each_other(rng):
    cases = [random_case(rng, size=(40, 40), channels=32, batch=4) for _ in range(4)]
    expected = [run_on(GPU, case, tf.float32) for case in cases]
    worst = [0.0] * len(cases)

    def work(index):
        for _ in range(20):
            for key, value in run_on(GPU, cases[index], tf.float32).items():
                error = relative_error(value, expected[index][key])
                worst[index] = max(worst[index], error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) <= 1e-6


# --- The core alone ---


@pytest.mark.parametrize(
    "name",
    [
        "sorting_holds_its_memory_once_however_many_chunks_there_are",
        "pixels_that_nothing_samples_are_left_out_when_sorting",
        "layers_without_filters_are_those_with_filters_of_ones",
        "infinite_pixels_reach_their_own_samples_only",
        "filters_of_empty_images_have_a_gradient_of_zeros",
        "error_of_one_call_is_not_told_of_the_next",
        "threads_may_need_different_amounts_of_shared_memory",
        "fused_kernels_take_a_batch_of_2_to_the_27_pixels",
    ],
)
def test_core_on_gpu(name):
    """In a process of its own: PyTorch and TensorFlow do not load into one."""
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    completed = subprocess.run(
        [sys.executable, PROJECT / "tests" / "core_on_gpu.py", name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    if "skipped: " in completed.stdout:
        pytest.skip(completed.stdout.rpartition("skipped: ")[-1].strip())


# --- General and fused kernels ---

ALONG_A_PATH = """
import sys
import numpy as np, tensorflow as tf
from deform_conv import deform_conv2d
if "jit" in sys.argv:
    deform_conv2d = tf.function(deform_conv2d, jit_compile=True)
rng = np.random.default_rng(1)
shapes = (2, 20, 30, 64), (3, 3, 64, 48), (2, 20, 30, 18), (2, 20, 30, 9)
tensors = [tf.constant(rng.standard_normal(shape), sys.argv[1]) for shape in shapes]
with tf.GradientTape() as tape:
    tape.watch(tensors)
    output = deform_conv2d(*tensors)
results = [output, *tape.gradient(output, tensors)]
np.savez(sys.argv[2], *[tf.cast(result, tf.float64) for result in results])
"""


def run_along(path, dtype, file, *options):
    return subprocess.run(
        [sys.executable, "-c", ALONG_A_PATH, dtype, file, *options],
        env=os.environ | {"DEFORM_CONV_PATH": path, "TF_FORCE_GPU_ALLOW_GROWTH": "true"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )


def needs_fused_kernels():
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    if details["compute_capability"] != (9, 0):
        pytest.skip("fused kernels are for compute capability 9.0")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_general_and_fused_kernels_agree(dtype, tmp_path):
    needs_fused_kernels()
    results = []
    for path in ("general", "fused"):
        file = tmp_path / f"{path}.npz"
        completed = run_along(path, dtype, file)
        assert completed.returncode == 0, completed.stderr
        with np.load(file) as arrays:
            results.append([arrays[key] for key in arrays.files])
    tolerance = {"float16": 5e-3, "bfloat16": 2e-2}[dtype]
    for general, fused in zip(*results, strict=True):
        assert relative_error(fused, general) <= tolerance
    # They are different kernels, and round differently.
    assert np.any(results[0][0] != results[1][0])


def test_fused_kernels_that_do_not_exist_are_refused(tmp_path):
    needs_fused_kernels()
    completed = run_along("fused", "float64", tmp_path / "file.npz")
    assert completed.returncode != 0
    assert "no fused kernel for the output of these sizes and types" in completed.stderr


@pytest.mark.parametrize("options", [[], pytest.param(["jit"], marks=needs_xla)], ids=["op", "jit"])
def test_unknown_path_is_refused(options, tmp_path):
    completed = run_along("fastest", "float32", tmp_path / "file.npz", *options)
    assert completed.returncode == 1  # an exception, no signal
    assert "InvalidArgumentError" in completed.stderr
    expected = 'DEFORM_CONV_PATH must be "general", "fused", or unset; received "fastest"'
    assert expected in completed.stderr
