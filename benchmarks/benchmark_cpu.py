#!/usr/bin/env python3
"""Times deform_conv2d on the CPU, measures its memory, and writes a report.

    python benchmarks/benchmark_cpu.py [--rounds N] [--parts PART ...] [--layers NAME ...]
                                       [--output FILE.json]

Parts, each in a process of its own:

    layers   four layers of detection networks and the experiment's four, against tf.nn.conv2d and,
             where requirements-peers.txt is installed, torchvision and ONNX Runtime
    zoo      layers of real networks (zoo.py), with batches of an eighth, against the same, or
             tf.nn.depthwise_conv2d; --layers takes those whose names contain one of the texts
    types    float16, bfloat16 and NCHW against float32 in NHWC
    scaling  over batches, channels, image sizes and threads, against tf.nn.conv2d
    memory   the most that forward and backward hold beyond their tensors

Scaling is measured with 1, 2, 4 threads and so on, up to as many as there are processors.

3x3 kernels, SAME padding, float32 and NHWC unless said otherwise; offsets with a standard deviation
of one pixel. "forward+backward" is with respect to input, filters and, for deformable convolutions,
offset and mask. What is compared is timed in turn, so that whatever else the machine does falls on
all. Prints medians; --output keeps them with their quartiles, as FILE.json, FILE.md and FILE.png.
"""

import argparse
import concurrent.futures
import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import peers
import report
from layers import EXPERIMENT, MEASUREMENTS, Layer
from zoo import layers_named

from utils.cli import number, run

# Peers take part in every so many rounds: they are slow.
PEER_INTERVAL = 5

DETECTION = (
    Layer(64, 32, 64, 28, 28),
    Layer(1, 128, 128, 100, 152),
    Layer(1, 256, 256, 50, 76),
    Layer(1, 512, 512, 25, 38),
)
SCALING = {
    "batch": {n: Layer(n, 32, 64, 28, 28) for n in (1, 2, 4, 8, 16, 32, 64)},
    "channels": {c: Layer(4, c, c, 14, 14) for c in (16, 32, 64, 128, 256, 512, 1024)},
    "image size": {size: Layer(1, 64, 64, size, size) for size in (14, 28, 56, 112, 224)},
}
MEMORY_LAYER = Layer(16, 256, 256, 50, 76)
ZOO_BATCH_PARTS = 8  # the zoo's batches are those of one GPU
# Types and data formats, as arguments of tensorflow_functions().
VARIANTS = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32, NCHW": {"data_format": "NCHW"},
}


def instruction_set() -> str:
    """The one that the library chooses here; see src/core/cpu/kernels.cc."""
    if asked := os.environ.get("DEFORM_CONV_CPU_ISA"):
        return f"{asked} at most"
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else ()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags):
        return "AVX-512"
    return "AVX2" if {"avx2", "fma", "f16c"} <= set(flags) else "baseline"


# --- What is timed ---


def arrays_of(layer: Layer) -> dict[str, np.ndarray]:
    """Random arguments and the output's gradient."""
    rng = np.random.default_rng(0)
    outputs = (layer.batch, *layer.out_size)

    def normal(*dimensions, scale=1.0):
        return (scale * rng.standard_normal(dimensions, np.float32)).astype(np.float32)

    filters = (*layer.kernel, layer.channels // layer.groups, layer.out_channels)
    samples = layer.deform_groups * layer.taps
    return {
        "image": normal(layer.batch, layer.height, layer.width, layer.channels),
        "filters": normal(*filters, scale=0.05),
        "offset": normal(*outputs, 2 * samples),
        "grad_output": normal(*outputs, layer.out_channels),
    } | ({"mask": normal(*outputs, samples)} if layer.masked else {})


# Calls a function, and returns the milliseconds that it took.
Timer = Callable[[], float]


def tensorflow_functions(
    layer: Layer, name: str, dtype: str = "float32", data_format: str = "NHWC"
) -> dict[str, Callable[[], object]]:
    """For each measurement, a call of "deform_conv2d" or "tf.nn.conv2d" on random tensors.

    In depthwise layers, the latter is tf.nn.depthwise_conv2d.
    """
    from utils.quiet_tensorflow import tf

    # Here, so that run() can tell of a missing library.
    from deform_conv import deform_conv2d

    def tensor(key, array):
        if data_format == "NCHW" and key != "filters":
            array = np.moveaxis(array, 3, 1)
        return tf.cast(tf.constant(array), dtype)

    arrays = {key: tensor(key, array) for key, array in arrays_of(layer).items()}
    arguments = [arrays["image"], arrays["filters"]]
    if name == "deform_conv2d":
        arguments += [arrays[key] for key in ("offset", "mask") if key in arrays]
    elif layer.depthwise:
        shape = (*layer.kernel, layer.channels, layer.out_channels // layer.channels)
        arguments[1] = tf.reshape(arguments[1], shape)

    def forward(*arguments):
        if name == "deform_conv2d":
            return deform_conv2d(
                *arguments,
                strides=layer.stride,
                dilations=layer.dilation,
                deform_groups=layer.deform_groups,
                data_format=data_format,
            )
        if layer.depthwise:
            return tf.nn.depthwise_conv2d(
                *arguments, (1, *[layer.stride] * 2, 1), "SAME", dilations=[layer.dilation] * 2
            )
        return tf.nn.conv2d(
            *arguments, layer.stride, "SAME", data_format=data_format, dilations=layer.dilation
        )

    def backward(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output = forward(*arguments)
        # Without the output among the results, TensorFlow would leave the forward pass out.
        grads = tape.gradient(output, arguments, output_gradients=arrays["grad_output"])
        return output, grads

    def bound(function):
        # A concrete function, so that Python does not look at the arguments in every call.
        concrete = tf.function(function).get_concrete_function(*arguments)
        return lambda: concrete(*arguments)

    return {"forward": bound(forward), "forward+backward": bound(backward)}


def tensorflow_timers(layer: Layer, name: str, **options) -> dict[str, Timer]:
    functions = tensorflow_functions(layer, name, **options)
    return {key: partial(peers.milliseconds, function) for key, function in functions.items()}


def peer_timers(layer: Layer, process: peers.PeerProcess) -> dict[str, dict[str, Timer]]:
    def padding(size, out_size, taps):
        total = max((out_size - 1) * layer.stride + layer.dilation * (taps - 1) + 1 - size, 0)
        return total // 2, total - total // 2

    return process.prepare(
        arrays=arrays_of(layer),
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
        deform_groups=layer.deform_groups,
        padding=tuple(map(padding, (layer.height, layer.width), layer.out_size, layer.kernel)),
        threads=os.cpu_count(),
    )


def time_in_turn(
    timers: dict[str, Timer], rounds: int, intervals: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """The quartiles of each function's milliseconds; some take part at intervals only."""
    for timer in timers.values():
        timer()
        timer()
    milliseconds = {name: [] for name in timers}
    gc.collect()
    gc.disable()  # Python's collection of garbage would fall on whoever's turn it is
    for i in range(rounds):
        for name, timer in timers.items():
            if i % (intervals or {}).get(name, 1) == 0:
                milliseconds[name].append(timer())
    gc.enable()
    return {name: statistics.quantiles(values, n=4) for name, values in milliseconds.items()}


def compare(contestants: dict[str, dict], rounds: int, intervals=None) -> dict:
    """For each measurement, the quartiles of each contestant that has it."""
    return {
        measurement: time_in_turn(
            {name: of[measurement] for name, of in contestants.items() if measurement in of},
            rounds,
            intervals,
        )
        for measurement in MEASUREMENTS
    }


# --- Parts ---


def time_layers(rounds: int, groups: dict[str, dict[str, Layer]]) -> dict:
    """For each title, the layers by name, against TensorFlow's convolution and the peers."""
    names = ["deform_conv2d", "tf.nn.conv2d", *peers.versions()]
    intervals = dict.fromkeys(names[2:], PEER_INTERVAL)
    result = {title: {} for title in groups}
    with peers.PeerProcess() as process:
        for title, layers in groups.items():
            for layer_name, layer in layers.items():
                contestants = {name: tensorflow_timers(layer, name) for name in names[:2]}
                for measurement, timers in peer_timers(layer, process).items():
                    for name, timer in timers.items():
                        contestants.setdefault(name, {})[measurement] = timer
                times = compare(contestants, rounds, intervals)
                result[title][layer_name] = times
                print(layer_name, _medians(times), flush=True)
    return result


def by_text(layers: Iterable[Layer]) -> dict[str, Layer]:
    return {str(layer): layer for layer in layers}


def thread_counts() -> list[int]:
    """1, 2, 4 and so on, and as many as there are processors."""
    most = os.cpu_count()
    return sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})


def time_types(rounds: int) -> dict:
    rows = {}
    for layer in DETECTION:
        contestants = {
            name: tensorflow_timers(layer, "deform_conv2d", **options)
            for name, options in VARIANTS.items()
        }
        rows[str(layer)] = compare(contestants, rounds)
        print(layer, _medians(rows[str(layer)]), flush=True)
    return {"Types and data formats": rows}


def time_scaling(rounds: int) -> dict:
    result = {}
    for axis, layers in SCALING.items():
        result[axis] = {}
        for value, layer in layers.items():
            contestants = {
                name: tensorflow_timers(layer, name) for name in ("deform_conv2d", "tf.nn.conv2d")
            }
            result[axis][value] = compare(contestants, rounds)
            print(f"{axis} {value}", _medians(result[axis][value]), flush=True)
    return result


def measure_memory(variant: str) -> dict:
    """MiB of forward+backward's results, and what it holds beside them at its peak.

    To be called in a process of its own: memory that was used and freed before would hide some.
    """
    options = VARIANTS[variant]
    small = MEMORY_LAYER._replace(batch=1, height=8, width=8)
    tensorflow_functions(small, "deform_conv2d", **options)["forward+backward"]()
    call = tensorflow_functions(MEMORY_LAYER, "deform_conv2d", **options)["forward+backward"]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status_bytes("VmRSS")
    output, gradients = call()
    at_peak = _status_bytes("VmHWM") - before
    results = sum(len(tensor.numpy().tobytes()) for tensor in (output, *gradients))
    return {"results_mib": results / 2**20, "extra_mib": (at_peak - results) / 2**20}


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _medians(times: dict) -> str:
    return "; ".join(
        f"{measurement}: "
        + ", ".join(f"{name} {quartiles[1]:.2f} ms" for name, quartiles in of.items())
        for measurement, of in times.items()
    )


def in_own_process(function: Callable, *arguments, threads: int | None = None):
    """function(*arguments), in a process whose TensorFlow has so many threads."""
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _set_threads, (threads or os.cpu_count(),)
    ) as executor:
        return executor.submit(function, *arguments).result()


def _set_threads(threads: int) -> None:
    from utils.quiet_tensorflow import tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)


# --- The report ---


def ratios(rows: dict, name: str, to: str, measurement: str) -> list[float]:
    """Medians of one contestant in each row, divided by another's."""
    times = [row[measurement] for row in rows.values()]
    return [of[name][1] / of[to][1] for of in times]


def rows_as_markdown(rows: dict, *references: str) -> str:
    """Tables of each contestant's times and, in round brackets, their ratio to the first reference.

    A row for each reference gives the geometric means of the ratios to it.
    """
    sections = []
    for measurement in MEASUREMENTS:
        names = list(next(iter(rows.values()))[measurement])
        cells = []
        for title, row in rows.items():
            times = row[measurement]
            cells.append([title])
            for name in names:
                low, median, high = times[name]
                ratio = f" ({median / times[references[0]][1]:.2f}×)" * (name != references[0])
                cells[-1].append(f"{median:.1f} [{low:.1f}, {high:.1f}]{ratio}")
        for to in references:
            means = (report.geometric_mean(ratios(rows, name, to, measurement)) for name in names)
            cells.append([f"geometric mean, × {to}", *(f"{mean:.2f}" for mean in means)])
        sections.append(report.table([f"{measurement}, ms", *names], cells))
    return "\n".join(sections)


def scaling_as_markdown(scaling: dict) -> str:
    """For each axis, the ratios to tf.nn.conv2d."""
    sections = []
    for axis in SCALING:
        cells = []
        for value in next(iter(scaling.values()))[axis]:
            cells.append([str(value)])
            for measurement in MEASUREMENTS:
                for of_threads in scaling.values():
                    times = of_threads[axis][value][measurement]
                    median, ratio = times["deform_conv2d"][1], times["tf.nn.conv2d"][1]
                    cells[-1].append(f"{median:.2f} ({median / ratio:.2f}×)")
        header = [axis] + [
            f"{measurement}, {threads}" for measurement in MEASUREMENTS for threads in scaling
        ]
        sections.append(report.table(header, cells))
    return "\n".join(sections)


def as_markdown(results: dict) -> str:
    lines = [
        f"{results['machine']}.",
        f"Medians of {results['rounds']} rounds with the quartiles in brackets, milliseconds.\n",
    ]
    for title, rows in results.get("layers", {}).items():
        lines += [
            f"## {title}\n",
            "(×) is the time divided by that of tf.nn.conv2d.\n",
            rows_as_markdown(rows, "tf.nn.conv2d", "deform_conv2d"),
        ]
    for title, rows in results.get("zoo", {}).items():
        lines += [
            f"## {title}\n",
            "(×) is the time divided by that of tf.nn.conv2d, in depthwise layers "
            "tf.nn.depthwise_conv2d.\n",
            rows_as_markdown(rows, "tf.nn.conv2d", "deform_conv2d"),
        ]
    for title, rows in results.get("types", {}).items():
        lines += [
            f"## {title}\n",
            "(×) is the time divided by that of float32 in NHWC.\n",
            rows_as_markdown(rows, "float32"),
        ]
    if scaling := results.get("scaling"):
        layers = "; ".join(f"{axis}: {list(of.values())[-1]}" for axis, of in SCALING.items())
        lines += [
            "## Scaling\n",
            "deform_conv2d, ms (×: divided by the time of tf.nn.conv2d). "
            f"The last row of each is {layers}.\n",
            scaling_as_markdown(scaling),
        ]
    if memory := results.get("memory"):
        rows = [
            [name, f"{of['results_mib']:.0f}", f"{of['extra_mib']:.0f}"]
            for name, of in memory.items()
        ]
        lines += [
            "## Memory\n",
            f"MiB of forward+backward of {MEMORY_LAYER} at its peak, beside the arguments.\n",
            report.table(["", "results", "more"], rows),
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    all_parts = ("layers", "zoo", "types", "scaling", "memory")
    parser.add_argument("--rounds", type=number(int, at_least=10), default=25)
    parser.add_argument("--parts", nargs="+", choices=all_parts, default=all_parts)
    parser.add_argument("--layers", nargs="+", default=[""], help="parts of names in the zoo")
    parser.add_argument("--output", type=Path, help="write the report there")
    arguments = parser.parse_args()
    zoo_layers = {
        name: layer._replace(batch=max(layer.batch // ZOO_BATCH_PARTS, 1))
        for name, layer in layers_named(arguments.layers).items()
    }

    from utils.quiet_tensorflow import tf

    # This fails early where the library is missing.
    import deform_conv  # noqa: F401

    compared = "".join(f", {name} {version}" for name, version in peers.versions().items())
    machine = (
        f"{report.processor_name()}, {os.cpu_count()} cores, instruction set {instruction_set()}, "
        f"TensorFlow {tf.__version__}{compared}, Python {platform.python_version()}, "
        f"{report.today()}"
    )
    print(machine, flush=True)
    results = {"machine": machine, "rounds": arguments.rounds}
    if "layers" in arguments.parts:
        titled = {
            "Layers of detection networks": by_text(DETECTION),
            "The experiment's layers": by_text(EXPERIMENT),
        }
        results["layers"] = in_own_process(time_layers, arguments.rounds, titled)
    if "zoo" in arguments.parts:
        titled = {"Layers of real networks": zoo_layers}
        results["zoo"] = in_own_process(time_layers, arguments.rounds, titled)
    if "types" in arguments.parts:
        results["types"] = in_own_process(time_types, arguments.rounds)
    if "scaling" in arguments.parts:
        results["scaling"] = {
            f"{threads} thread{'s' * (threads > 1)}": in_own_process(
                time_scaling, arguments.rounds, threads=threads
            )
            for threads in thread_counts()
        }
    if "memory" in arguments.parts:
        results["memory"] = {name: in_own_process(measure_memory, name) for name in VARIANTS}
    markdown = as_markdown(results)
    print(markdown)
    if arguments.output:
        report.write(arguments.output, results, markdown)
        report.plot_cpu(arguments.output.with_suffix(".png"), results)


if __name__ == "__main__":
    run(main)
