"""Builds the CUDA core and calls it through its C interface, on PyTorch's tensors."""

import concurrent.futures
import ctypes
import hashlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from layers import Layer

PROJECT = Path(__file__).resolve().parent.parent
CORE = PROJECT / "src" / "core"
LIBRARY = PROJECT / "build" / "libdeform_conv_core_cuda.so"
OBJECTS = PROJECT / "build" / "core_cuda_objects"

# name: torch dtype, the C interface's number, TF32, bound on the relative error
TYPES = {
    "float32": (torch.float32, 0, False, 1e-6),
    "tf32": (torch.float32, 0, True, 2e-3),
    "float64": (torch.float64, 1, False, 1e-12),
    "float16": (torch.float16, 2, False, 5e-3),
    "bfloat16": (torch.bfloat16, 3, False, 2e-2),
}
# The C interface's numbers.
PATHS = {"automatic": 0, "general": 1, "fused": 2}
ARGUMENTS = ("input", "filters", "offset", "mask")

Call = Callable[[], None]


# --- Building ---


def build() -> ctypes.CDLL:
    """Compiles what has changed, links and loads the library."""
    sources, flags = _sources_and_flags(torch.cuda.get_device_capability())
    OBJECTS.mkdir(parents=True, exist_ok=True)
    objects = [_object_of(source, flags) for source in sources]
    stale = [pair for pair in zip(sources, objects, strict=True) if not pair[1].exists()]
    if stale:
        LIBRARY.unlink(missing_ok=True)  # so that no old one stays if this fails
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        for done in [executor.submit(_compile, *pair, flags) for pair in stale]:
            done.result()
    if not LIBRARY.exists():
        unfinished = _unfinished(LIBRARY)
        _run(["nvcc", *flags, "-shared", "-o", unfinished, *objects, "-lcublas"])
        unfinished.rename(LIBRARY)
    return load()


def load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("forward", "backward"):
        getattr(library, f"deform_conv2d_{name}_cuda").restype = ctypes.c_char_p
    return library


def _sources_of_cmake() -> dict[str, list[str]]:
    """The lists of src/core/sources.cmake, which CMake reads too, by name."""
    text = (CORE / "sources.cmake").read_text()
    lists = re.findall(r"^set\((\w+)_SOURCES\n(.*?)^\)", text, re.M | re.S)
    return {name: sources.split() for name, sources in lists}


def _sources_and_flags(capability: tuple[int, int]) -> tuple[list[str], list[str]]:
    """The sources of the core's GPU half, and nvcc's flags for a GPU of this compute capability."""
    lists = _sources_of_cmake()
    names = ["CORE", "CORE_GPU", "CORE_CUDA", "CORE_C_API"]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra", "-lineinfo"]
    flags += ["--expt-relaxed-constexpr", "-Xptxas", "--warn-on-spills", f"-I{PROJECT / 'src'}"]
    architecture = "{}{}".format(*capability)
    if f"CORE_CUDA_SM{architecture}" in lists:
        names.append(f"CORE_CUDA_SM{architecture}")
        flags.append(f"-DDEFORM_CONV_SM{architecture}")
        architecture += "a"  # with the instructions that this one alone has
    flags.append(f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    return [source for name in names for source in lists[name]], flags


def _object_of(source: str, flags: list[str]) -> Path:
    """Named for what it is made of, since the times of files do not survive copying."""
    headers = sorted(path for path in CORE.rglob("*") if path.suffix in (".h", ".cuh"))
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in (*headers, CORE / source):
        digest.update(path.read_bytes())
    return OBJECTS / f"{source.replace('/', '_')}.{digest.hexdigest()[:16]}.o"


def _unfinished(target: Path) -> Path:
    """A name of this process alone, since others may build at the same time."""
    return target.with_suffix(f".{os.getpid()}.unfinished")


def _compile(source: str, target: Path, flags: list[str]) -> None:
    unfinished = _unfinished(target)
    _run(["nvcc", *flags, "-c", CORE / source, "-o", unfinished])
    for old in OBJECTS.glob(f"{source.replace('/', '_')}.*.o"):
        if old != target:
            old.unlink(missing_ok=True)
    unfinished.rename(target)


def _run(command: list) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
    if done.stdout.strip():  # warnings
        print(done.stdout, end="", flush=True)


# --- Calling ---


class Problem(ctypes.Structure):
    """DeformConvProblem of src/core/c_api/deform_conv2d_cuda.h."""

    _fields_ = (
        *((name, ctypes.c_int64 * 4) for name in ARGUMENTS),
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
                "path",
            )
        ),
    )


class NoFusedKernelError(RuntimeError):
    """Fused kernels were asked for, and none fits the call."""


class Core:
    """The C interface, for contiguous NHWC tensors; offset and mask in float32 or float64.

    `kernel` is for tensors without filters, with which the core aggregates.
    """

    def __init__(self, library, type_name, *, deform_groups=1, kernel=(3, 3), stride=(1, 1),
                 pad=(1, 1), dilation=(1, 1), path="automatic", columns_bytes=0,
                 deterministic=False):  # fmt: skip
        self._library = library
        _, element_type, allow_tf32, _ = TYPES[type_name]
        self._problem = Problem(
            filters=(*kernel, 0, 0),
            stride=stride,
            dilation=dilation,
            padding=(pad[0], pad[0], pad[1], pad[1]),
            deform_groups=deform_groups,
            element_type=element_type,
            allow_tf32=allow_tf32,
            columns_bytes=columns_bytes,
            deterministic=deterministic,
            path=PATHS[path],
        )

    def bind_forward(self, tensors, output) -> Call:
        """A function that puts this call on the current stream, quickly."""
        return self._bind("forward", tensors, [output])

    def bind_backward(self, tensors, grad_output, gradients) -> Call:
        """Likewise; writes those `gradients` that there are."""
        results = [grad_output, *(gradients.get(key) for key in ARGUMENTS)]
        return self._bind("backward", tensors, results)

    def _bind(self, name, tensors, others) -> Call:
        problem = Problem.from_buffer_copy(self._problem)
        for key, tensor in tensors.items():
            setattr(problem, key, (ctypes.c_int64 * 4)(*tensor.shape))
        # The function holds on to the tensors.
        held = [*(tensors.get(key) for key in ARGUMENTS), *others]
        assert all(tensor is None or tensor.is_contiguous() for tensor in held)
        pointers = [
            ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in held
        ]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        arguments = (ctypes.byref(problem), *pointers, stream)
        function = getattr(self._library, f"deform_conv2d_{name}_cuda")

        def call(_held=held) -> None:
            if error := function(*arguments):
                message = error.decode()
                absent = message.startswith("no fused kernel for")
                raise (NoFusedKernelError if absent else RuntimeError)(message)

        return call

    def forward(self, tensors, output) -> None:
        self.bind_forward(tensors, output)()

    def backward(self, tensors, grad_output, gradients) -> None:
        self.bind_backward(tensors, grad_output, gradients)()


class Variant(NamedTuple):
    """Which implementations may be chosen, and how."""

    path: str
    columns_bytes: int = 0
    deterministic: bool = False


def core_of(library, type_name, layer: Layer, variant: Variant) -> Core:
    return Core(
        library,
        type_name,
        deform_groups=layer.deform_groups,
        kernel=layer.kernel,
        **layer.geometry,
        **variant._asdict(),
    )


# --- Tensors ---


def nchw(tensor):
    return tensor.permute(0, 3, 1, 2)


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).contiguous()


def relative_error(actual, expected) -> float:
    """Infinite where a number is missing."""
    actual, expected = actual.double(), expected.double()
    error = float(torch.linalg.norm(actual - expected) / torch.linalg.norm(expected))
    return math.inf if math.isnan(error) else error


def random_tensors(generator: torch.Generator, dtype, layer: Layer):
    """Random arguments, and the output's gradient."""

    def normal(*size):
        return torch.randn(*size, generator=generator, device=generator.device, dtype=torch.float64)

    outputs = (layer.batch, *layer.out_size)
    offset = layer.scale * normal(*outputs, 2 * layer.taps * layer.deform_groups)
    # Off the pixel grid, where the offset gradient jumps, also after rounding to `dtype`.
    offset = offset.to(dtype).double()
    offset = torch.where((offset - offset.round()).abs() < 1e-3, offset.round() + 0.125, offset)
    if layer.holes:
        offset = _with_holes(generator, offset)
    position_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    filters = normal(*layer.kernel, layer.channels // layer.groups, layer.out_channels)
    tensors = {
        "input": normal(layer.batch, layer.height, layer.width, layer.channels).to(dtype),
        "filters": (filters / math.sqrt(layer.taps)).to(dtype),
        "offset": offset.to(position_dtype),
    }
    if layer.masked:
        size = (*outputs, layer.taps * layer.deform_groups)
        mask = torch.rand(size, generator=generator, device=generator.device)
        tensors["mask"] = mask.to(dtype).to(position_dtype)
    return tensors, normal(*outputs, layer.out_channels).to(dtype)


def _with_holes(generator, offset):
    """`offset` with one number in 16 NaN or infinite."""
    values = (math.nan, math.inf, -math.inf)
    kinds = torch.randint(
        16 * len(values), offset.shape, generator=generator, device=generator.device
    )
    for kind, value in enumerate(values):
        offset = torch.where(kinds == kind, value, offset)
    return offset
