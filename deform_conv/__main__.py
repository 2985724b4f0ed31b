"""Says what is installed, and proves that it works: `python -m deform_conv`.

On every device that TensorFlow has here, random numbers go through the op, forward and backward,
and are compared with the pure TensorFlow reference. In portable mode that would be a comparison of
the reference with itself: there, offsets are 0, masks 1, and the measure is tf.nn.conv2d. Exits
with status 1 if they differ.
"""

import ctypes
import sys

import numpy as np
import tensorflow as tf

from . import __version__, deform_conv2d
from ._library import PORTABLE, built_for, record, xla_kernels_loaded
from ._reference import deform_conv2d_reference

TOLERANCE = 1e-5


def describe() -> None:
    """Prints what is installed, and what of it this machine can use."""
    library = "none: TensorFlow's own ops compute, with DEFORM_CONV_PORTABLE=1"
    rows = {"library": library, "XLA": "yes"} if PORTABLE else _library_rows()
    print(f"deform_conv {__version__}")
    for name, text in ({"TensorFlow": tf.__version__} | rows).items():
        print(f"  {name:12} {text}")


def _library_rows() -> dict[str, str]:
    gpu = [text for name in ("cuda", "driver_misfit") if (text := _core_text(name))]
    return {
        "library": f"{record.path}, for TensorFlow {built_for(record.path)}",
        "CPU": _core_text("cpu_instruction_set"),
        "GPU": "; ".join(gpu) or "built without CUDA kernels",
        "XLA": "yes" if xla_kernels_loaded() else f"no: {record.xla_problem}",
    }


def _core_text(name: str) -> str:
    """What a function of core/build_info.h says."""
    # In the process already, with the library of the ops, and found by its name.
    function = getattr(ctypes.CDLL("libdeform_conv_core.so"), f"deform_conv_{name}")
    function.restype = ctypes.c_char_p
    return function().decode()


def check() -> bool:
    """Whether the op agrees with its measure, on every device."""
    # A GPU would otherwise round the matrix product's arguments to 11 bits.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return tf.constant(rng.standard_normal(shape), tf.float32)

    with tf.device("CPU:0"):
        arguments = {
            "input": normal(2, 14, 14, 8),
            "filters": normal(3, 3, 8, 16),
            "offset": normal(2, 7, 7, 2 * 2 * 9),
            "mask": tf.sigmoid(normal(2, 7, 7, 2 * 9)),
        }
        grad_output = normal(2, 7, 7, 16)
        measure, measured = "the reference", deform_conv2d_reference
        if PORTABLE:
            measure, measured = "tf.nn.conv2d", _convolution
            arguments["offset"] = tf.zeros_like(arguments["offset"])
            arguments["mask"] = tf.ones_like(arguments["mask"])
        expected = _output_and_gradients(measured, arguments, grad_output)
    worst = 0.0
    gpus = range(len(tf.config.list_physical_devices("GPU")))
    for device in ("CPU:0", *(f"GPU:{number}" for number in gpus)):
        with tf.device(device):
            actual = _output_and_gradients(deform_conv2d, arguments, grad_output)
        place = actual["output"].device.rpartition("device:")[2]
        print(f"deform_conv2d, version 2, on {place}, against {measure}")
        for name, wanted in expected.items():
            value = actual[name]
            error = float(tf.norm(value - wanted) / tf.norm(wanted))
            worst = np.maximum(worst, error)  # NaN stays
            print(f"  {name:12} {list(value.shape)!s:18} relative error {error:.1e}")
    if worst <= TOLERANCE:
        print("ok")
        return True
    print(f"error: relative error {worst:.1e} is above {TOLERANCE:.0e}", file=sys.stderr)
    return False


def _output_and_gradients(function, arguments, grad_output) -> dict[str, tf.Tensor]:
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        output = function(**arguments, strides=2, deform_groups=2)
    gradients = tape.gradient(output, arguments, output_gradients=grad_output)
    return {"output": output} | {
        f"grad_{name}": gradient for name, gradient in gradients.items() if gradient is not None
    }


def _convolution(input, filters, offset, mask, strides, deform_groups):
    """What `deform_conv2d` computes where offsets are 0 and masks 1."""
    return tf.nn.conv2d(input, filters, strides, "SAME")


def main() -> None:
    describe()
    try:
        agrees = check()
    except tf.errors.InvalidArgumentError as error:  # such as of a variable of the environment
        sys.exit(f"error: {error.message}")
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    main()
