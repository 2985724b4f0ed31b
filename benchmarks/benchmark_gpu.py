#!/usr/bin/env python3
"""Checks and times the CUDA core on a GPU against torchvision and cuDNN.

    python benchmarks/benchmark_gpu.py [--check [--small]] [--time [--tensorflow]]
        [--columns-mib N ...] [--tensorflow-env FILE] [--output FILE.json]
    python benchmarks/benchmark_gpu.py [--check [--small]] --zoo [--layers NAME,...]
        [--types TYPE,...] [--output FILE.json]

With none of --check, --time and --zoo, it checks and times. --output keeps the times, as FILE.json,
FILE.md and FILE.png.

Needs nvcc, PyTorch and torchvision. Builds build/libdeform_conv_core_cuda.so from src/core and
calls it through its C interface.

--check compares outputs and gradients with torchvision in float64 and with the golden cases: of the
general implementations, the fused ones where they fit, and those chosen by default.

--time takes medians of event timings, with the L2 cache flushed before each; PyTorch's convolution
is cuDNN's, channels-last. Backward is with respect to input, filters and offset. Then memory, small
layers, and what the device's bytes and arithmetic would allow. With --tensorflow also
tensorflow_gpu.py, in a process of its own.

--zoo times layers of real networks in the same way, in fewer rounds, along each path of the library
too, and says where a rule is broken. --layers takes those whose name contains one of its parts.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import gpu_core
import gpu_report
import gpu_time
import gpu_zoo_report
import report
import torch
import torchvision
from gpu_layers import TIMED_TYPES
from zoo import layers_named


def time_inside_tensorflow(environment: Path | None) -> dict | None:
    """What tensorflow_gpu.py measures, or None where it fails, having said why."""
    command = [sys.executable, str(Path(__file__).with_name("tensorflow_gpu.py"))]
    if environment:
        command = ["bash", "-c", 'source "$0" && exec "$@"', str(environment.resolve()), *command]
    torch.cuda.empty_cache()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(f"{' '.join(command)}: exit status {done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def describe_machine() -> dict:
    machine = f"{torch.cuda.get_device_name()}, driver {report.driver_version()}, {report.today()}"
    print(machine)
    return {
        "machine": machine,
        "versions": {"PyTorch": torch.__version__, "torchvision": torchvision.__version__},
        "ceilings": gpu_time.measure_ceilings(),
    }


def measure_zoo(library, arguments) -> dict:
    results = describe_machine()
    return results | {"zoo": gpu_time.time_zoo(library, arguments.layers, arguments.types)}


def measure(library, arguments) -> dict:
    results = describe_machine() | {"runs": []}
    for mib in arguments.columns_mib:
        if len(arguments.columns_mib) > 1:
            print(f"columns of at most {mib} MiB")
        rows = gpu_time.time_layers(library, mib << 20)
        results["runs"].append({"columns_bytes": mib << 20, "rows": rows})
    results["small"] = gpu_time.time_small_layers(library)
    if arguments.tensorflow:
        results["chains"] = gpu_time.time_chains(library)
        results["tensorflow"] = time_inside_tensorflow(arguments.tensorflow_env)
    return results


def show(results: dict, tables, output: Path | None) -> None:
    """Prints, and keeps in files, what the module `tables` makes of the results."""
    markdown = tables.as_markdown(results)
    print(markdown)
    if output:
        report.write(output, results, markdown)
        report.plot_gpu(output.with_suffix(".png"), tables.bars(results))


def zoo_layers(text: str) -> dict:
    try:
        return layers_named(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def timed_types(text: str) -> list[str]:
    types = text.split(",")
    if unknown := set(types) - set(TIMED_TYPES):
        raise argparse.ArgumentTypeError(
            f"unknown types {', '.join(unknown)}; there are {', '.join(TIMED_TYPES)}"
        )
    return types


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with torchvision only")
    parser.add_argument(
        "--small", action="store_true", help="check small shapes only, for compute-sanitizer"
    )
    timed = parser.add_mutually_exclusive_group()
    timed.add_argument("--time", action="store_true", help="time only")
    timed.add_argument("--zoo", action="store_true", help="time layers of real networks only")
    parser.add_argument(
        "--layers",
        type=zoo_layers,
        default="",
        metavar="NAME,...",
        help="of the zoo (default: all)",
    )
    parser.add_argument(
        "--types",
        type=timed_types,
        default=",".join(TIMED_TYPES),
        metavar="TYPE,...",
        help="for the zoo (default: %(default)s)",
    )
    parser.add_argument(
        "--columns-mib", type=int, nargs="+", default=[0], help="bounds to time (0: the default)"
    )
    parser.add_argument(
        "--tensorflow", action="store_true", help="time the op inside TensorFlow too"
    )
    parser.add_argument(
        "--tensorflow-env", type=Path, metavar="FILE", help="bash sources it before TensorFlow"
    )
    parser.add_argument("--output", type=Path, help="write the times there, as JSON")
    arguments = parser.parse_args()
    library = gpu_core.build()
    good = True
    if arguments.check or not (arguments.time or arguments.zoo):
        good = gpu_check.check_golden(library) & gpu_check.check_layers(library, arguments.small)
        print("every error is within its bound" if good else "SOME ERRORS ARE OUT OF BOUNDS")
    if arguments.zoo:
        show(measure_zoo(library, arguments), gpu_zoo_report, arguments.output)
    elif arguments.time or not arguments.check:
        results = measure(library, arguments)
        show(results, gpu_report, arguments.output)
        good &= not arguments.tensorflow or results["tensorflow"] is not None
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
