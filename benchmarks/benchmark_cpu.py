#!/usr/bin/env python3
"""Times deform_conv2d on the CPU against tf.nn.conv2d, in one run.

    python benchmarks/benchmark_cpu.py [--output FILE.json]

float32, 3x3, NHWC, stride 1, SAME. The two are timed in turn, so that whatever else the machine
does falls on both. "forward+backward" is with respect to input, filters and, for deform_conv2d,
offset. Prints medians with the quartiles, and writes them with machine, date and versions.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import number, run

import numpy as np
import tensorflow as tf

# N, C -> O, H x W
SHAPES = (
    (64, 32, 64, 28, 28),
    (1, 128, 128, 100, 152),
    (1, 256, 256, 50, 76),
    (1, 512, 512, 25, 38),
)


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def functions_of(shape: tuple[int, ...]) -> dict[str, dict[str, Callable[[], object]]]:
    """For each measurement, the two functions to compare, on the same random tensors."""
    # Here, so that run() can tell of a missing library.
    from utils.deform_conv_wrapper import deform_conv2d

    batch, channels, out_channels, height, width = shape
    rng = np.random.default_rng(0)

    def normal(*dimensions, scale=1.0):
        return tf.constant(scale * rng.standard_normal(dimensions), tf.float32)

    image = normal(batch, height, width, channels)
    filters = normal(3, 3, channels, out_channels, scale=0.05)
    offset = normal(batch, height, width, 18)
    grad_output = normal(batch, height, width, out_channels)

    def conv(image, filters):
        return tf.nn.conv2d(image, filters, 1, "SAME")

    def backward(function):
        def run(*arguments):
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                output = function(*arguments)
            # Without the output among the results, TensorFlow would leave the forward pass out.
            return output, tape.gradient(output, arguments, output_gradients=grad_output)

        return run

    def bound(function, *arguments):
        compiled = tf.function(function)
        return lambda: compiled(*arguments)

    return {
        "forward": {
            "deform_conv2d": bound(deform_conv2d, image, filters, offset),
            "tf.nn.conv2d": bound(conv, image, filters),
        },
        "forward+backward": {
            "deform_conv2d": bound(backward(deform_conv2d), image, filters, offset),
            "tf.nn.conv2d": bound(backward(conv), image, filters),
        },
    }


def time_in_turn(functions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round."""
    for function in functions.values():
        function()
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=number(int, at_least=2), default=15)
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    arguments = parser.parse_args()

    rows = []
    for shape in SHAPES:
        batch, channels, out_channels, height, width = shape
        name = f"{batch}, {channels}→{out_channels}, {height}×{width}"
        for measurement, functions in functions_of(shape).items():
            seconds = time_in_turn(functions, arguments.rounds)
            quartiles = {
                function: [1e3 * value for value in statistics.quantiles(values, n=4)]
                for function, values in seconds.items()
            }
            ours, theirs = quartiles["deform_conv2d"], quartiles["tf.nn.conv2d"]
            rows.append(
                {
                    "shape": name,
                    "measurement": measurement,
                    "quartiles_ms": quartiles,
                    "ratio": ours[1] / theirs[1],
                }
            )
            print(
                f"{name:24} {measurement:17}"
                f" deform_conv2d {ours[1]:7.1f} ms ({ours[0]:.1f}–{ours[2]:.1f})"
                f"  tf.nn.conv2d {theirs[1]:7.1f} ms ({theirs[0]:.1f}–{theirs[2]:.1f})"
                f"  ratio {ours[1] / theirs[1]:.2f}",
                flush=True,
            )
    means = {}
    for measurement in ("forward", "forward+backward"):
        ratios = [row["ratio"] for row in rows if row["measurement"] == measurement]
        means[measurement] = math.exp(statistics.mean(map(math.log, ratios)))
        print(f"geometric mean, {measurement}: {means[measurement]:.2f} times tf.nn.conv2d")

    if arguments.output:
        results = {
            "date": datetime.date.today().isoformat(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "tensorflow": tf.__version__,
            "python": platform.python_version(),
            "rounds": arguments.rounds,
            "geometric_mean_ratios": means,
            "rows": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
