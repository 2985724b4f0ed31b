"""The same bits in every run, with tf.config.experimental.enable_op_determinism()."""

import pytest
from checks import needs_xla
from conftest import printed_by

# In a process of its own, since TensorFlow cannot be told to stop.
REPEAT = """
import sys
import numpy as np
import tensorflow as tf
import deform_conv
from conftest import random_case, relative_error, run
device, name, mode, repetitions = sys.argv[1:]
shapes = {
    "deform_conv2d": {
        "batch": 3, "size": (30, 31), "channels": 48, "out_channels": 12, "groups": 2,
    },
    "deform_aggregate2d": {"batch": 3, "size": (30, 31), "channels": 48, "filters": False},
    "deform_conv3d": {"size": (6, 11, 12), "channels": 24, "out_channels": 12, "groups": 2},
}
tf.config.experimental.enable_op_determinism()
rng = np.random.default_rng(1)
case = random_case(rng, deform_groups=3, offset_scale=4.0, **shapes[name])
function = getattr(deform_conv, name)
call = tf.function(
    lambda tensors: run(tensors, case.attributes, function=function), jit_compile=mode == "jit"
)
for dtype in (tf.float32, tf.float64, tf.float16, tf.bfloat16):
    with tf.device(device):
        tensors = case.tensors(dtype)
        runs = set()
        for _ in range(int(repetitions)):
            results = call(tensors)
            runs.add(b"".join(results[key].numpy().tobytes() for key in sorted(results)))
    with tf.device("CPU:0"):
        expected = run(case.tensors(dtype), case.attributes, function=function)
    errors = [relative_error(value, expected[key]) for key, value in results.items()]
    print(dtype.name, len(runs), max(errors))
"""
# Twice the errors that each device may have.
TOLERANCES = {"float32": 2e-5, "float64": 2e-12, "float16": 1e-2, "bfloat16": 4e-2}


@pytest.mark.parametrize(
    ("name", "mode", "repetitions"),
    [
        ("deform_conv2d", "plain", 100),
        pytest.param("deform_conv2d", "jit", 100, marks=needs_xla),
        ("deform_aggregate2d", "plain", 100),
        ("deform_conv3d", "plain", 20),
    ],
)
def test_repetitions_are_bit_identical_and_right(name, mode, repetitions, device):
    printed = printed_by(REPEAT, device, name, mode, repetitions)
    for line, dtype in zip(printed.splitlines()[-4:], TOLERANCES, strict=True):
        repeated, runs, error = line.split()
        assert (repeated, runs) == (dtype, "1")
        assert float(error) <= TOLERANCES[dtype]
