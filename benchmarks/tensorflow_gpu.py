#!/usr/bin/env python3
"""Times deform_conv2d and tf.nn.conv2d inside TensorFlow on a GPU, and prints JSON.

    python benchmarks/tensorflow_gpu.py [--cpu-dry-run]

benchmark_gpu.py --tensorflow runs this, in a process of its own. Times are microseconds of one call
among others: chains of calls, each in one tf.function, of which one is three times as long as the
other; the slope is a call's cost, and all that a chain costs once falls out.

A call waits for the one before. What makes it wait, and what uses each result so that no call is
left out, are their sizes, which are read and added up on the host: no kernel. Shapes are unknown to
the function, or TensorFlow would know the sizes beforehand; and no two calls have the same
arguments, or it would merge them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.quiet_tensorflow import tf

from gpu_layers import (
    CHAINED,
    CHAINED_TYPES,
    FILTERS,
    INPUTS,
    LINKS,
    arguments_of_links,
    slope_us,
)
from layers import MEASUREMENTS, Layer

from utils.cli import UserError, run

DTYPES = {"float16": tf.float16, "bfloat16": tf.bfloat16, "tf32": tf.float32}
DRY_LAYERS = (Layer(1, 8, 8, 5, 6), Layer(2, 4, 8, 7, 5))

# Results of a call, from input, filters, offset and the output's gradient.
Call = Callable[..., list[tf.Tensor]]


# --- What is timed ---


def call_of(name: str, measurement: str) -> Call:
    # Here, so that run() can tell of a missing library.
    from deform_conv import deform_conv2d

    def convolve(*arguments):
        if name == "deform_conv2d":
            return deform_conv2d(*arguments)
        return tf.nn.conv2d(*arguments, 1, "SAME")

    def call(input, filters, offset, grad_output):
        arguments = [input, filters, offset] if name == "deform_conv2d" else [input, filters]
        if measurement == "forward":
            return [convolve(*arguments)]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output = convolve(*arguments)
        return [output, *tape.gradient(output, arguments, output_gradients=grad_output)]

    return call


def no_call(measurement: str) -> Call:
    """Returns as many tensors as deform_conv2d would, which are there already."""

    def call(input, filters, offset, grad_output):
        return [input] if measurement == "forward" else [input, filters, offset, grad_output]

    return call


def chain_of(call: Call, links: int, dtype: tf.DType):
    """A function that makes so many calls and returns one number, once all are done."""

    def chain(inputs, filters, offsets, grad_output):
        sizes, all_sizes = [], []
        for i, j in arguments_of_links(links):
            with tf.control_dependencies(sizes):
                results = call(inputs[i], filters[j], offsets[i], grad_output)
                sizes = [tf.size(result) for result in results]
            all_sizes += sizes
        with tf.control_dependencies(sizes):
            # All kernels are on one stream, so what is computed from the last is computed last.
            last = tf.reshape(results[-1], [-1])[0]
        return tf.add_n(all_sizes), last

    def some(count, dtype=dtype):
        return [tf.TensorSpec([None] * 4, dtype)] * count

    signature = [some(INPUTS), some(FILTERS), some(INPUTS, tf.float32), *some(1)]
    return tf.function(chain, input_signature=signature).get_concrete_function()


def random_tensors(layer: Layer, dtype: tf.DType) -> list:
    """The arguments of a chain."""
    outputs = [layer.batch, *layer.out_size]
    assert outputs[1:] == [layer.height, layer.width]  # stride 1, padding "SAME"

    def normal(*size, scale=1.0, dtype=dtype):
        return tf.cast(scale * tf.random.normal(size), dtype)

    image = (layer.batch, layer.height, layer.width, layer.channels)
    filters = (*layer.kernel, layer.channels, layer.out_channels)
    offset = (*outputs, 2 * layer.taps)
    return [
        [normal(*image) for _ in range(INPUTS)],
        [normal(*filters, scale=layer.taps**-0.5) for _ in range(FILTERS)],
        [normal(*offset, scale=layer.scale, dtype=tf.float32) for _ in range(INPUTS)],
        normal(*outputs, layer.out_channels),
    ]


def call_us(chains: dict, arguments: list) -> float:
    """`chains` are of one kind, in two lengths."""

    def seconds_of(links):
        start = time.perf_counter()
        _, last = chains[links](*arguments)
        last.numpy()  # waits for the GPU
        return time.perf_counter() - start

    return slope_us(seconds_of, links=min(chains))


# --- The measurement ---


def time_type(type_name: str, layers, links: int) -> tuple[list[dict], dict]:
    """Rows of a call's times, and what the chain costs without calls."""
    tf.config.experimental.enable_tensor_float_32_execution(type_name == "tf32")
    dtype = DTYPES[type_name]

    def chains(call):
        return {length: chain_of(call, length, dtype) for length in (links, 3 * links)}

    rows = [{"type": type_name, "layer": str(layer), "us": {}} for layer in layers]
    chain_us = {}
    for measurement in MEASUREMENTS:
        for row in rows:
            row["us"][measurement] = {}
        for name in ("deform_conv2d", "tf.nn.conv2d"):
            of_name = chains(call_of(name, measurement))
            for row, layer in zip(rows, layers, strict=True):
                us = call_us(of_name, random_tensors(layer, dtype))
                row["us"][measurement][name] = us
                print(f"{type_name} {layer} {measurement} {name} {us:.1f} us", file=sys.stderr)
        empty = chains(no_call(measurement))
        chain_us[measurement] = call_us(empty, random_tensors(layers[-1], dtype))
    return rows, chain_us


def device_name(dry_run: bool) -> str:
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and not dry_run:
        raise UserError("TensorFlow sees no GPU")
    if not gpus:
        return "CPU"
    # Not all at once: benchmark_gpu.py holds some too.
    tf.config.experimental.set_memory_growth(gpus[0], True)
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cpu-dry-run", action="store_true", help="tiny layers, to try the script without a GPU"
    )
    arguments = parser.parse_args()
    device = device_name(arguments.cpu_dry_run)
    layers, links = (DRY_LAYERS, 4) if arguments.cpu_dry_run else (CHAINED, LINKS)
    rows, chain_us = [], {}
    for type_name in CHAINED_TYPES:
        of_type, chain_us = time_type(type_name, layers, links)
        rows += of_type
    results = {"device": device, "version": tf.__version__, "chain_us": chain_us, "rows": rows}
    print(json.dumps(results))


if __name__ == "__main__":
    run(main)
