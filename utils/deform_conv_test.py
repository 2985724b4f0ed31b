#!/usr/bin/env python3
"""The smallest proof that a build works: random numbers in, output and gradients out.

    python utils/deform_conv_test.py

Compares both with the pure TensorFlow reference, and exits with status 1 if they differ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import UserError, run

import numpy as np
import tensorflow as tf

TOLERANCE = 1e-5


def relative_error(actual: tf.Tensor, expected: tf.Tensor) -> float:
    return float(tf.norm(actual - expected) / tf.norm(expected))


def main() -> None:
    # Here, so that run() can tell of a missing library.
    from deform_conv import deform_conv2d
    from deform_conv._reference import deform_conv2d_reference

    # A GPU would otherwise round the matrix product's arguments to 11 bits.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return tf.constant(rng.standard_normal(shape), tf.float32)

    arguments = {
        "input": normal(2, 14, 14, 8),
        "filters": normal(3, 3, 8, 16),
        "offset": normal(2, 7, 7, 2 * 2 * 9),
        "mask": tf.sigmoid(normal(2, 7, 7, 2 * 9)),
    }
    grad_output = normal(2, 7, 7, 16)
    results = []
    for function in (deform_conv2d, deform_conv2d_reference):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output = function(**arguments, strides=2, deform_groups=2)
        gradients = tape.gradient(output, arguments, output_gradients=grad_output)
        results.append(
            {"output": output} | {f"grad_{name}": grad for name, grad in gradients.items()}
        )

    actual, expected = results
    device = actual["output"].device.rpartition("device:")[2]
    print(f"deform_conv2d, version 2, on {device}, against the reference")
    worst = 0.0
    for name, value in actual.items():
        error = relative_error(value, expected[name])
        worst = max(worst, error)
        print(f"  {name:12} {list(value.shape)!s:18} relative error {error:.1e}")
    if not worst <= TOLERANCE:
        raise UserError(f"relative error {worst:.1e} is above {TOLERANCE:.0e}")
    print("ok")


if __name__ == "__main__":
    run(main)
