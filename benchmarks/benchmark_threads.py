#!/usr/bin/env python3
"""Times the core on a CPU with 1, 2, 4 threads and so on, and writes a report.

Beside it stands torch.nn.functional.conv2d with as many threads. PyTorch is needed, and the core
behind its C interface:

    ./compile.sh && cmake --build build --target deform_conv_core_cpu

Times are medians; the functions of one number of threads take turns.
"""

import argparse
import ctypes
import os
import statistics
import time
from pathlib import Path

import gpu_time
import report
import torch
from gpu_core import ARGUMENTS, PROJECT, Problem, random_tensors
from layers import MEASUREMENTS, Layer

LIBRARY = PROJECT / "build" / "libdeform_conv_core_cpu.so"
LAYERS = (
    Layer(1, 128, 128, 100, 152, masked=True),
    Layer(16, 256, 256, 50, 76, masked=True),
)
CORE, CONVOLUTION = "deform_conv2d", "torch.nn.functional.conv2d"


def load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("forward", "backward"):
        getattr(library, f"deform_conv2d_{name}_cpu").restype = ctypes.c_char_p
    return library


def core_functions(library: ctypes.CDLL, layer: Layer, tensors, grad_output, threads: int):
    """The passes, by measurement, on float32 or float64 tensors in NHWC."""
    (stride, pad, dilation) = layer.geometry.values()
    problem = Problem(
        stride=stride,
        dilation=dilation,
        padding=(pad[0], pad[0], pad[1], pad[1]),
        deform_groups=layer.deform_groups,
        element_type={torch.float32: 0, torch.float64: 1}[grad_output.dtype],
        **{name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )
    output, gradients = gpu_time.results_like(tensors, grad_output)

    def call(name, *others) -> None:
        held = (*(tensors.get(key) for key in ARGUMENTS), *others)
        pointers = [None if of is None else ctypes.c_void_p(of.data_ptr()) for of in held]
        function = getattr(library, f"deform_conv2d_{name}_cpu")
        if error := function(ctypes.byref(problem), *pointers, threads):
            raise RuntimeError(error.decode())

    def forward():
        call("forward", output)
        return output

    def both():
        forward()
        call("backward", grad_output, *map(gradients.get, ARGUMENTS))
        return output, gradients

    return dict(zip(MEASUREMENTS, (forward, both), strict=True))


def medians_in_turn(functions: dict, rounds: int) -> dict[str, float]:
    """Milliseconds. Each call follows one of the same that is not counted: other threads than its
    own may spin for a while after their work."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            begin = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(of) for name, of in times.items()}


def time_layer(library: ctypes.CDLL, layer: Layer, rounds: int) -> dict:
    """Milliseconds by measurement, threads and name."""
    tensors, grad_output = random_tensors(torch.Generator().manual_seed(1), torch.float32, layer)
    results = {measurement: {} for measurement in MEASUREMENTS}
    for threads in thread_counts():
        torch.set_num_threads(threads)
        functions = {
            CORE: core_functions(library, layer, tensors, grad_output, threads),
            CONVOLUTION: gpu_time.convolution_functions(layer, tensors, grad_output),
        }
        for measurement in MEASUREMENTS:
            results[measurement][threads] = medians_in_turn(
                {name: of[measurement] for name, of in functions.items()}, rounds
            )
    return results


def thread_counts() -> list[int]:
    """Powers of two up to the processors, and these."""
    most = len(os.sched_getaffinity(0))
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def as_markdown(results: dict) -> str:
    lines = [
        "# The core on many threads\n",
        f"{results['machine']}, PyTorch {results['versions']['PyTorch']}, {results['date']}.",
        "Medians in ms, float32; in brackets how many times as fast as with one thread.\n",
    ]
    for layer, by_measurement in results["layers"].items():
        for measurement, by_threads in by_measurement.items():
            first = next(iter(by_threads.values()))
            rows = [
                [
                    str(threads),
                    *(f"{of[name]:.2f} ({first[name] / of[name]:.1f})" for name in first),
                ]
                for threads, of in by_threads.items()
            ]
            lines += [f"## {layer}, {measurement}\n", report.table(["threads", *first], rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, default=PROJECT / "build" / "benchmark_threads.json")
    arguments = parser.parse_args()
    if not LIBRARY.exists():
        parser.error(f"{LIBRARY} is missing; see --help for how to build it")
    library = load()
    results = {
        "machine": f"{report.processor_name()}, {thread_counts()[-1]} processors",
        "versions": {"PyTorch": torch.__version__},
        "date": report.today(),
        "layers": {str(layer): time_layer(library, layer, arguments.rounds) for layer in LAYERS},
    }
    report.write(arguments.output, results, as_markdown(results))


if __name__ == "__main__":
    main()
