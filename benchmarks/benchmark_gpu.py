#!/usr/bin/env python3
"""Checks and times the CUDA core on a GPU against torchvision and cuDNN, without TensorFlow.

    python benchmarks/benchmark_gpu.py [--check] [--time] [--columns-mib N ...] [--output FILE.json]

With --output, a table is written beside FILE.json too.

Needs nvcc, PyTorch and torchvision. Builds build/libdeform_conv_core_cuda.so from src/core, calls
it through its C interface, and compares outputs and gradients with torchvision in float64 and with
the golden cases. Times are medians of event timings, with the L2 cache flushed before each;
PyTorch's convolution is cuDNN's, channels-last. Backward is with respect to input, filters and
offset.
"""

import argparse
import ctypes
import itertools
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import report
import torch
import torchvision
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

PROJECT = Path(__file__).resolve().parent.parent
LIBRARY = PROJECT / "build" / "libdeform_conv_core_cuda.so"
SOURCES = (
    "params.cc",
    "deform_col2im_sorted_cuda.cu",
    "deform_conv2d_cuda.cc",
    "deform_im2col_cuda.cu",
    "c_interface_cuda.cc",
)
GOLDEN = PROJECT / "tests" / "data" / "torchvision_0_29.npz"

# name: torch dtype, the C interface's number, TF32, bound on the relative error
TYPES = {
    "float32": (torch.float32, 0, False, 1e-6),
    "tf32": (torch.float32, 0, True, 2e-3),
    "float64": (torch.float64, 1, False, 1e-12),
    "float16": (torch.float16, 2, False, 5e-3),
    "bfloat16": (torch.bfloat16, 3, False, 2e-2),
}
PEERS = ("torchvision", "cudnn_conv2d", "deterministic")
MEASUREMENTS = ("forward", "forward+backward")
TIMED_TYPES = ("float32", "tf32", "float16", "bfloat16")
# N, C -> O, H x W; 3x3, stride 1
SHAPES = (
    (256, 32, 64, 28, 28),
    (8, 128, 128, 100, 152),
    (8, 256, 256, 50, 76),
    (8, 512, 512, 25, 38),
)


def build() -> ctypes.CDLL:
    LIBRARY.parent.mkdir(exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    command = ["nvcc", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-Wall,-Wextra"]
    command += [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}", "-lineinfo"]
    command += ["--expt-relaxed-constexpr", f"-I{PROJECT / 'src'}", "-o", str(LIBRARY)]
    command += [str(PROJECT / "src" / "core" / source) for source in SOURCES]
    subprocess.run([*command, "-lcublas"], check=True)
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("forward", "backward"):
        getattr(library, f"deform_conv2d_{name}_cuda").restype = ctypes.c_char_p
    return library


class Problem(ctypes.Structure):
    """DeformConvProblem of src/core/c_interface_cuda.h."""

    _fields_ = (
        *((name, ctypes.c_int64 * 4) for name in ("input", "filters", "offset", "mask")),
        ("stride", ctypes.c_int64 * 2),
        ("dilation", ctypes.c_int64 * 2),
        ("padding", ctypes.c_int64 * 4),
        *(
            (name, ctypes.c_int64)
            for name in (
                "deform_groups",
                "element_type",
                "allow_tf32",
                "columns_bytes",
                "deterministic",
            )
        ),
    )


class Core:
    """The C interface, for contiguous NHWC tensors; offset and mask in float32 or float64."""

    def __init__(self, library, type_name, *, deform_groups=1, stride=(1, 1), pad=(1, 1),
                 dilation=(1, 1), columns_bytes=0, deterministic=False):  # fmt: skip
        self._library = library
        _, element_type, allow_tf32, _ = TYPES[type_name]
        self._problem = Problem(
            stride=stride,
            dilation=dilation,
            padding=(pad[0], pad[0], pad[1], pad[1]),
            deform_groups=deform_groups,
            element_type=element_type,
            allow_tf32=allow_tf32,
            columns_bytes=columns_bytes,
            deterministic=deterministic,
        )

    def _call(self, name, tensors, pointers):
        problem = self._problem
        for key in ("input", "filters", "offset", "mask"):
            if tensors.get(key) is not None:
                setattr(problem, key, (ctypes.c_int64 * 4)(*tensors[key].shape))
        arguments = [
            ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in pointers
        ]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = getattr(self._library, f"deform_conv2d_{name}_cuda")
        error = function(ctypes.byref(problem), *arguments, stream)
        if error:
            raise RuntimeError(error.decode())

    def forward(self, tensors, output):
        keys = ("input", "filters", "offset", "mask")
        self._call("forward", tensors, [*(tensors.get(key) for key in keys), output])

    def backward(self, tensors, grad_output, gradients):
        keys = ("input", "filters", "offset", "mask")
        pointers = [tensors.get(key) for key in keys]
        pointers += [grad_output, *(gradients.get(key) for key in keys)]
        self._call("backward", tensors, pointers)


def nchw(tensor):
    return tensor.permute(0, 3, 1, 2)


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).contiguous()


def relative_error(actual, expected) -> float:
    actual, expected = actual.double(), expected.double()
    return float(torch.linalg.norm(actual - expected) / torch.linalg.norm(expected))


def run_torchvision(tensors, grad_output, stride, pad, dilation):
    """Output and gradients of torchvision's op, from and to NHWC."""
    leaves = {key: value.detach().requires_grad_() for key, value in tensors.items()}
    output = torchvision_deform_conv2d(
        nchw(leaves["input"]).contiguous(),
        nchw(leaves["offset"]).contiguous(),
        leaves["filters"].permute(3, 2, 0, 1).contiguous(),
        stride=stride,
        padding=pad,
        dilation=dilation,
        mask=nchw(leaves["mask"]).contiguous() if "mask" in leaves else None,
    )
    gradients = torch.autograd.grad(output, list(leaves.values()), nchw(grad_output))
    results = {f"grad_{key}": grad for key, grad in zip(leaves, gradients, strict=True)}
    return {"output": nhwc(output.detach())} | results


def run_core(library, type_name, tensors, grad_output, **attributes):
    core = Core(library, type_name, **attributes)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    # Poisoned, so that what is not written shows.
    output = torch.full_like(grad_output, math.nan)
    gradients = {key: torch.full_like(value, math.nan) for key, value in tensors.items()}
    core.forward(tensors, output)
    core.backward(tensors, grad_output.contiguous(), gradients)
    return {"output": output} | {f"grad_{key}": value for key, value in gradients.items()}


def check_golden(library) -> bool:
    with np.load(GOLDEN) as file:
        arrays = {key: torch.from_numpy(file[key]).cuda() for key in file.files}
    good = True
    for name in sorted({key.split("/")[0] for key in arrays}):
        case = {
            key.split("/")[1]: value for key, value in arrays.items() if key.startswith(name + "/")
        }
        config = case.pop("config").tolist()
        native = {
            key.replace("weight", "filters"): value.permute(2, 3, 1, 0).contiguous()
            if key.endswith("weight")
            else nhwc(value)
            for key, value in case.items()
        }
        keys = [key for key in ("input", "filters", "offset", "mask") if key in native]
        results = run_core(
            library,
            "float64",
            {key: native[key] for key in keys},
            native["grad_output"],
            stride=tuple(config[:2]),
            pad=tuple(config[2:4]),
            dilation=tuple(config[4:6]),
            deform_groups=config[7],
        )
        # At h = -1 exactly torchvision's offset gradient is one-sided, ours is 0.
        errors = {
            key: relative_error(value, native[key])
            for key, value in results.items()
            if not (name == "zero_offsets" and key == "grad_offset")
        }
        good &= all(error <= 1e-12 for error in errors.values())
        print(f"golden {name:17}", *(f"{key} {error:.0e}" for key, error in errors.items()))
    return good


# batch, channels, out_channels, height, width, groups, deform_groups, mask, stride, dilation
CHECKED = (
    (2, 16, 16, 28, 28, 1, 1, False, 1, 1),
    (2, 16, 24, 100, 152, 1, 2, True, 1, 1),
    (1, 64, 64, 100, 152, 1, 1, False, 1, 1),
    (2, 128, 64, 50, 76, 2, 4, True, 1, 1),
    (3, 1, 4, 13, 17, 1, 1, True, 1, 1),
    (3, 3, 5, 13, 17, 1, 3, True, 2, 1),
    (3, 17, 8, 13, 17, 1, 1, True, 1, 2),
    (3, 34, 16, 13, 17, 2, 1, False, 2, 2),
    (2, 24, 24, 9, 9, 24, 3, True, 1, 1),
    (37, 40, 10, 7, 5, 5, 2, True, 1, 1),
)


def random_tensors(generator, dtype, shape, scale=2.0):
    (
        batch,
        channels,
        out_channels,
        height,
        width,
        groups,
        deform_groups,
        masked,
        stride,
        _,
    ) = shape
    out_h, out_w = ((size - 1) // stride + 1 for size in (height, width))

    def normal(*dimensions):
        return torch.randn(*dimensions, generator=generator, device="cuda", dtype=torch.float64)

    offset = scale * normal(batch, out_h, out_w, 18 * deform_groups)
    # Off the pixel grid, where the offset gradient jumps, also after rounding to `dtype`.
    offset = offset.to(dtype).double()
    offset = torch.where((offset - offset.round()).abs() < 1e-3, offset.round() + 0.125, offset)
    position_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "input": normal(batch, height, width, channels).to(dtype),
        "filters": (normal(3, 3, channels // groups, out_channels) / 3).to(dtype),
        "offset": offset.to(position_dtype),
    }
    if masked:
        mask = torch.rand(
            batch, out_h, out_w, 9 * deform_groups, generator=generator, device="cuda"
        )
        tensors["mask"] = mask.to(dtype).to(position_dtype)
    return tensors, normal(batch, out_h, out_w, out_channels).to(dtype)


def check_types(library, small: bool) -> bool:
    generator = torch.Generator("cuda").manual_seed(1)
    good = True
    for shape in (shape for shape in CHECKED if not small or shape[3] < 28):
        *_, deform_groups, _, stride, dilation = shape
        geometry = {"stride": (stride,) * 2, "pad": (dilation,) * 2, "dilation": (dilation,) * 2}
        for name, (dtype, *_, bound) in TYPES.items():
            tensors, grad_output = random_tensors(generator, dtype, shape)
            exact = {key: value.double() for key, value in tensors.items()}
            expected = run_torchvision(exact, grad_output.double(), **geometry)
            for columns_bytes, deterministic in itertools.product((0, 1 << 14), (False, True)):
                results = run_core(
                    library,
                    name,
                    tensors,
                    grad_output,
                    deform_groups=deform_groups,
                    columns_bytes=columns_bytes,
                    deterministic=deterministic,
                    **geometry,
                )
                errors = {
                    key: relative_error(value, expected[key]) for key, value in results.items()
                }
                fine = all(error <= bound for error in errors.values())
                good &= fine
                if (columns_bytes == 0 and not deterministic) or not fine:
                    text = " ".join(f"{key} {error:.1e}" for key, error in errors.items())
                    print(f"{'ok ' if fine else 'BAD'} {name:9} {shape} {text}", flush=True)
            if name == "float16" and shape == CHECKED[1]:
                theirs = run_torchvision(
                    {key: value.to(dtype) for key, value in tensors.items()},
                    grad_output,
                    **geometry,
                )
                text = " ".join(
                    f"{k} {relative_error(v, expected[k]):.1e}" for k, v in theirs.items()
                )
                print(f"    {name:9} {shape} torchvision: {text}")
    return good


def median_ms(function, repeats=30) -> float:
    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda")  # 256 MiB
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_shape(library, type_name, shape, columns_bytes):
    dtype, _, allow_tf32, _ = TYPES[type_name]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    generator = torch.Generator("cuda").manual_seed(2)
    tensors, grad_output = random_tensors(generator, dtype, (*shape, 1, 1, False, 1, 1), scale=1.0)
    core = Core(library, type_name, columns_bytes=columns_bytes)
    sorted_core = Core(library, type_name, columns_bytes=columns_bytes, deterministic=True)
    output = torch.empty_like(grad_output)
    gradients = {key: torch.empty_like(value) for key, value in tensors.items()}

    def ours():
        core.forward(tensors, output)

    def ours_backward():
        core.forward(tensors, output)
        core.backward(tensors, grad_output, gradients)

    def sorted_backward():
        core.forward(tensors, output)
        sorted_core.backward(tensors, grad_output, gradients)

    image = nchw(tensors["input"]).contiguous().requires_grad_()
    offset = nchw(tensors["offset"]).to(dtype).contiguous().requires_grad_()
    filters = tensors["filters"].permute(3, 2, 0, 1).contiguous().requires_grad_()
    grad = nchw(grad_output).contiguous()

    def theirs():
        return torchvision_deform_conv2d(image, offset, filters, padding=1)

    def theirs_backward():
        torch.autograd.grad(theirs(), (image, offset, filters), grad)

    last = torch.channels_last
    conv_image, conv_filters = (
        t.detach().to(memory_format=last).requires_grad_() for t in (image, filters)
    )
    conv_grad = grad.to(memory_format=last)

    def conv():
        return torch.nn.functional.conv2d(conv_image, conv_filters, padding=1)

    def conv_backward():
        torch.autograd.grad(conv(), (conv_image, conv_filters), conv_grad)

    functions = {
        "deform_conv2d": (ours, ours_backward),
        "deterministic": (ours, sorted_backward),
        "torchvision": (theirs, theirs_backward),
        "cudnn_conv2d": (conv, conv_backward),
    }
    if dtype == torch.bfloat16:  # torchvision has none
        del functions["torchvision"]
    with torch.no_grad():
        forward = {name: median_ms(function) for name, (function, _) in functions.items()}
    both = {name: median_ms(function) for name, (_, function) in functions.items()}
    return {"forward": forward, "forward+backward": both}


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def time_all(library, columns_bytes) -> dict:
    rows = []
    for type_name in TIMED_TYPES:
        for shape in SHAPES:
            times = time_shape(library, type_name, shape, columns_bytes)
            rows.append({"type": type_name, "shape": shape, "ms": times})
            print(" | ".join(cells_of(rows[-1])), flush=True)
    means = {}
    for measurement in MEASUREMENTS:
        for peer in PEERS:
            means[f"{measurement}, {peer}"] = report.geometric_mean(
                row["ms"][measurement][peer] / row["ms"][measurement]["deform_conv2d"]
                for row in rows
                if peer in row["ms"][measurement]
            )
    print(sentence_of(means))
    return {"columns_bytes": columns_bytes, "times_as_fast_as": means, "rows": rows}


HEADER = (
    "type", "N, C→O, H×W", "forward", "torchvision", "conv2d",
    "forward+backward", "torchvision", "conv2d", "deterministic",
)  # fmt: skip


def cells_of(row) -> list[str]:
    cells = [row["type"], report.shape_name(row["shape"])]
    for measurement in MEASUREMENTS:
        times = row["ms"][measurement]
        ours = times["deform_conv2d"]
        cells.append(f"{ours:.3f}")
        for peer in PEERS[:2]:
            cells.append(f"{times[peer]:.3f} ({times[peer] / ours:.2f}×)" if peer in times else "–")
    cells.append(f"{times['deterministic']:.3f} ({times['deterministic'] / ours:.2f}×)")
    return cells


def sentence_of(means) -> str:
    """Geometric means in words."""
    return (
        f"Geometric means: forward {means['forward, torchvision']:.2f} and forward+backward "
        f"{means['forward+backward, torchvision']:.2f} times as fast as torchvision; "
        f"{1 / means['forward, cudnn_conv2d']:.2f} and "
        f"{1 / means['forward+backward, cudnn_conv2d']:.2f} times the time of cuDNN's convolution. "
        f"Deterministic, forward+backward takes {means['forward+backward, deterministic']:.2f} "
        "times as long."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with torchvision only")
    parser.add_argument(
        "--small", action="store_true", help="check small shapes only, for compute-sanitizer"
    )
    parser.add_argument("--time", action="store_true", help="time only")
    parser.add_argument(
        "--columns-mib", type=int, nargs="*", default=[0], help="bounds to time (0: the default)"
    )
    parser.add_argument("--output", type=Path, help="write the times there, as JSON")
    arguments = parser.parse_args()
    library = build()
    good = True
    if arguments.check or not arguments.time:
        good = check_golden(library) & check_types(library, arguments.small)
        print("every error is within its bound" if good else "SOME ERRORS ARE OUT OF BOUNDS")
    if arguments.time or not arguments.check:
        machine = f"{torch.cuda.get_device_name()}, driver {driver_version()}, {report.today()}"
        print(f"{machine}; milliseconds")
        runs = []
        for mib in arguments.columns_mib:
            if len(arguments.columns_mib) > 1:
                print(f"columns of at most {mib} MiB")
            runs.append(time_all(library, mib << 20))
        if arguments.output:
            versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
            markdown = [
                f"{machine}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}.",
                "Medians in milliseconds; in brackets, the time divided by deform_conv2d's.\n",
            ]
            for run in runs:
                if run["columns_bytes"]:
                    markdown.append(f"Columns of at most {run['columns_bytes'] >> 20} MiB.\n")
                markdown.append(report.table(HEADER, map(cells_of, run["rows"])))
                markdown.append(sentence_of(run["times_as_fast_as"]) + "\n")
            results = {"machine": machine, "versions": versions, "runs": runs}
            report.write(arguments.output, results, "\n".join(markdown))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
