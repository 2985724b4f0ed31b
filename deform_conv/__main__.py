"""Says what is installed, and proves that it works: `python -m deform_conv`.

On every device that TensorFlow has here, random numbers go through the op, forward and backward,
and are compared with the pure TensorFlow reference. Exits with status 1 if they differ.
"""

import ctypes
import sys

import numpy as np
import tensorflow as tf

from . import __version__, deform_conv2d
from ._library import built_for, record, xla_kernels_loaded
from ._reference import deform_conv2d_reference

TOLERANCE = 1e-5


def describe() -> None:
    """Prints what is installed, and what of it this machine can use."""
    gpu = [text for name in ("cuda", "driver_misfit") if (text := _core_text(name))]
    rows = {
        "TensorFlow": tf.__version__,
        "library": f"{record.path}, for TensorFlow {built_for(record.path)}",
        "CPU": _core_text("cpu_instruction_set"),
        "GPU": "; ".join(gpu) or "built without CUDA kernels",
        "XLA": "yes" if xla_kernels_loaded() else f"no: {record.xla_problem}",
    }
    print(f"deform_conv {__version__}")
    for name, text in rows.items():
        print(f"  {name:12} {text}")


def _core_text(name: str) -> str:
    """What a function of core/build_info.h says."""
    # In the process already, with the library of the ops, and found by its name.
    function = getattr(ctypes.CDLL("libdeform_conv_core.so"), f"deform_conv_{name}")
    function.restype = ctypes.c_char_p
    return function().decode()


def check() -> bool:
    """Whether the op agrees with the reference, on every device."""
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
        expected = _output_and_gradients(deform_conv2d_reference, arguments, grad_output)
    worst = 0.0
    gpus = range(len(tf.config.list_physical_devices("GPU")))
    for device in ("CPU:0", *(f"GPU:{number}" for number in gpus)):
        with tf.device(device):
            actual = _output_and_gradients(deform_conv2d, arguments, grad_output)
        place = actual["output"].device.rpartition("device:")[2]
        print(f"deform_conv2d, version 2, on {place}, against the reference")
        for name, value in actual.items():
            error = float(tf.norm(value - expected[name]) / tf.norm(expected[name]))
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
    return {"output": output} | {f"grad_{name}": grad for name, grad in gradients.items()}


def main() -> None:
    describe()
    try:
        agrees = check()
    except tf.errors.InvalidArgumentError as error:  # such as of a variable of the environment
        sys.exit(f"error: {error.message}")
    sys.exit(0 if agrees else 1)


if __name__ == "__main__":
    main()
