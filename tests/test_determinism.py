"""The same bits in every run, with tf.config.experimental.enable_op_determinism()."""

import os
import subprocess
import sys

import pytest
from conftest import PROJECT

# In a process of its own, since TensorFlow cannot be told to stop.
REPEAT = """
import sys
import numpy as np
import tensorflow as tf
from conftest import random_case, run
device, jit_compile = sys.argv[1], sys.argv[2] == "jit"
tf.config.experimental.enable_op_determinism()
case = random_case(
    np.random.default_rng(1), batch=3, size=(30, 31), channels=48, out_channels=12, groups=2,
    deform_groups=3, offset_scale=4.0,
)
for dtype in (tf.float32, tf.float64, tf.float16, tf.bfloat16):
    with tf.device(device):
        tensors = case.tensors(dtype)
        function = tf.function(lambda t: run(t, case.attributes), jit_compile=jit_compile)
        runs = set()
        for _ in range(100):
            results = function(tensors)
            runs.add(b"".join(results[key].numpy().tobytes() for key in sorted(results)))
    print(dtype.name, len(runs))
"""


@pytest.mark.parametrize("compiled", ["plain", "jit"])
def test_100_repetitions_are_bit_identical(compiled, device):
    paths = [str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")]
    printed = subprocess.run(
        [sys.executable, "-c", REPEAT, device, compiled],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split("\n")[-5:-1] == ["float32 1", "float64 1", "float16 1", "bfloat16 1"]
