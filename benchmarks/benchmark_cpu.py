#!/usr/bin/env python3
"""Times deform_conv2d on the CPU against tf.nn.conv2d, in one run.

    python benchmarks/benchmark_cpu.py [--rounds N] [--output FILE.json]

float32, 3x3, NHWC, SAME: four shapes of detection networks at stride 1, and the layers of the
experiment's network. The two are timed in turn, so that whatever else the machine does falls on
both. "forward+backward" is with respect to input, filters and, for deform_conv2d, offset. Prints
medians with the quartiles; --output keeps them, and writes a table beside FILE.json.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import number, run

import numpy as np
import report
import tensorflow as tf

# N, C -> O, H x W, stride
SHAPES = (
    (64, 32, 64, 28, 28, 1),
    (1, 128, 128, 100, 152, 1),
    (1, 256, 256, 50, 76, 1),
    (1, 512, 512, 25, 38, 1),
)
LAYERS = (
    (64, 1, 32, 28, 28, 1),
    (64, 32, 64, 28, 28, 2),
    (64, 64, 128, 14, 14, 1),
    (64, 128, 128, 14, 14, 2),
)
MEASUREMENTS = ("forward", "forward+backward")
HEADER = (
    "N, C→O, H×W", "forward, ms", "tf.nn.conv2d", "ratio",
    "forward+backward, ms", "tf.nn.conv2d", "ratio",
)  # fmt: skip


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def instruction_set() -> str:
    """The one that the library chooses here; see src/core/cpu_kernels.cc."""
    if asked := os.environ.get("DEFORM_CONV_CPU_ISA"):
        return f"{asked} at most"
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else ()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags):
        return "AVX-512"
    return "AVX2" if {"avx2", "fma", "f16c"} <= set(flags) else "baseline"


def functions_of(shape: tuple[int, ...]) -> dict[str, dict[str, Callable[[], object]]]:
    """For each measurement, the two functions to compare, on the same random tensors."""
    # Here, so that run() can tell of a missing library.
    from utils.deform_conv_wrapper import deform_conv2d

    batch, channels, out_channels, height, width, stride = shape
    rng = np.random.default_rng(0)

    def normal(*dimensions, scale=1.0):
        return tf.constant(scale * rng.standard_normal(dimensions), tf.float32)

    image = normal(batch, height, width, channels)
    filters = normal(3, 3, channels, out_channels, scale=0.05)
    out_size = [-(-size // stride) for size in (height, width)]
    offset = normal(batch, *out_size, 18)
    grad_output = normal(batch, *out_size, out_channels)

    def deform_conv(image, filters, offset):
        return deform_conv2d(image, filters, offset, strides=stride)

    def conv(image, filters):
        return tf.nn.conv2d(image, filters, stride, "SAME")

    def backward(function):
        def run(*arguments):
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                output = function(*arguments)
            # Without the output among the results, TensorFlow would leave the forward pass out.
            return output, tape.gradient(output, arguments, output_gradients=grad_output)

        return run

    def bound(function, *arguments):
        # A concrete function, so that Python does not look at the arguments in every call.
        concrete = tf.function(function).get_concrete_function(*arguments)
        return lambda: concrete(*arguments)

    return {
        "forward": {
            "deform_conv2d": bound(deform_conv, image, filters, offset),
            "tf.nn.conv2d": bound(conv, image, filters),
        },
        "forward+backward": {
            "deform_conv2d": bound(backward(deform_conv), image, filters, offset),
            "tf.nn.conv2d": bound(backward(conv), image, filters),
        },
    }


def time_in_turn(functions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each function in each round."""
    for function in functions.values():
        function()
        function()
    milliseconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
            del result  # freed outside the time
    return milliseconds


def time_shapes(shapes: Sequence[tuple[int, ...]], rounds: int) -> dict:
    """Quartiles in milliseconds and ratios of medians, for each shape and measurement."""
    rows = []
    print(*HEADER, sep=" | ")
    for shape in shapes:
        row = {"shape": shape}
        for measurement, functions in functions_of(shape).items():
            quartiles = {
                name: statistics.quantiles(values, n=4)
                for name, values in time_in_turn(functions, rounds).items()
            }
            ratio = quartiles["deform_conv2d"][1] / quartiles["tf.nn.conv2d"][1]
            row[measurement] = {"quartiles_ms": quartiles, "ratio": ratio}
        rows.append(row)
        print(*cells_of(row), sep=" | ", flush=True)
    means = {
        measurement: report.geometric_mean(row[measurement]["ratio"] for row in rows)
        for measurement in MEASUREMENTS
    }
    print(sentence_of(means))
    return {"rows": rows, "geometric_mean_ratios": means}


def cells_of(row) -> list[str]:
    *shape, stride = row["shape"]
    cells = [report.shape_name(shape) + (f", stride {stride}" if stride > 1 else "")]
    for measurement in MEASUREMENTS:
        for low, median, high in row[measurement]["quartiles_ms"].values():
            cells.append(f"{median:.1f} ({low:.1f}–{high:.1f})")
        cells.append(f"{row[measurement]['ratio']:.2f}")
    return cells


def sentence_of(means) -> str:
    """Geometric means in words."""
    return (
        f"Geometric means: forward {means['forward']:.2f}, forward+backward "
        f"{means['forward+backward']:.2f} times the time of tf.nn.conv2d."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=number(int, at_least=2), default=25)
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    arguments = parser.parse_args()

    machine = (
        f"{processor_name()}, {os.cpu_count()} cores, instruction set {instruction_set()}, "
        f"TensorFlow {tf.__version__}, Python {platform.python_version()}, {report.today()}"
    )
    print(machine)
    sections = {
        "Shapes of detection networks": time_shapes(SHAPES, arguments.rounds),
        "Layers of the experiment's network": time_shapes(LAYERS, arguments.rounds),
    }
    if arguments.output:
        markdown = [f"{machine}.", f"Medians of {arguments.rounds} rounds, with the quartiles.\n"]
        for title, section in sections.items():
            markdown.append(f"## {title}\n")
            markdown.append(report.table(HEADER, map(cells_of, section["rows"])))
            markdown.append(sentence_of(section["geometric_mean_ratios"]) + "\n")
        results = {"machine": machine, "rounds": arguments.rounds, "sections": sections}
        report.write(arguments.output, results, "\n".join(markdown))


if __name__ == "__main__":
    run(main)
