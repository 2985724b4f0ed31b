"""Times the CUDA core, torchvision's op and cuDNN's convolution, and measures memory."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from gpu_core import (
    PATHS,
    TYPES,
    Core,
    NoFusedKernelError,
    Variant,
    core_of,
    nchw,
    random_tensors,
)
from gpu_layers import (
    BACK_TO_BACK,
    CHAINED,
    CHAINED_TYPES,
    DETECTION,
    FILTERS,
    INPUTS,
    LINKS,
    TIMED_TYPES,
    arguments_of_links,
    slope_us,
)
from layers import EXPERIMENT, MEASUREMENTS, Layer
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

ROUNDS, WARM_UPS = 30, 5
# Of the zoo, which is large.
ZOO_ROUNDS, ZOO_WARM_UPS = 9, 2
FLUSHES = 4
PRODUCT_SIZE = 8192  # as gpu_report.py says
COPY_BYTES = 1 << 30

# For each measurement.
Functions = dict[str, Callable[[], object]]


# --- What is timed ---


def core_functions(core: Core, tensors, grad_output, results=None) -> Functions:
    """Of the core, backward alone too. What it writes to may be given."""
    output, gradients = results or results_like(tensors, grad_output)
    forward = core.bind_forward(tensors, output)
    backward = core.bind_backward(tensors, grad_output, gradients)

    return {
        "forward": forward,
        "backward": backward,
        "forward+backward": in_order(forward, backward),
    }


def results_like(tensors, grad_output):
    gradients = {key: torch.empty_like(value) for key, value in tensors.items()}
    return torch.empty_like(grad_output), gradients


def torchvision_functions(layer: Layer, tensors, grad_output) -> Functions:
    dtype = grad_output.dtype  # of offset and mask too: torchvision wants one
    leaves = {
        key: (tensor.permute(3, 2, 0, 1) if key == "filters" else nchw(tensor))
        .to(dtype)
        .contiguous()
        .requires_grad_()
        for key, tensor in tensors.items()
    }
    image, filters, offset = (leaves[key] for key in ("input", "filters", "offset"))
    stride, pad, dilation = layer.geometry.values()
    return _autograd_functions(
        lambda: torchvision_deform_conv2d(
            image, offset, filters, None, stride, pad, dilation, leaves.get("mask")
        ),
        list(leaves.values()),
        nchw(grad_output).contiguous(),
    )


def convolution_functions(layer: Layer, tensors, grad_output) -> Functions:
    last = torch.channels_last
    image = nchw(tensors["input"])
    filters = tensors["filters"].permute(3, 2, 0, 1)
    leaves = [t.contiguous(memory_format=last).requires_grad_() for t in (image, filters)]
    stride, pad, dilation = layer.geometry.values()
    return _autograd_functions(
        lambda: torch.nn.functional.conv2d(*leaves, None, stride, pad, dilation, layer.groups),
        leaves,
        nchw(grad_output).contiguous(memory_format=last),
    )


def _autograd_functions(function, leaves, grad_output) -> Functions:
    def forward():
        with torch.no_grad():
            return function()

    def both():
        output = function()
        return output, torch.autograd.grad(output, leaves, grad_output)

    return {"forward": forward, "forward+backward": both}


def contestants(library, type_name, layer, tensors, grad_output, columns_bytes=0):
    variants = {
        "deform_conv2d": Variant("automatic", columns_bytes),
        "general": Variant("general", columns_bytes),
        "deterministic": Variant("automatic", columns_bytes, deterministic=True),
    }
    result = {
        name: core_functions(core_of(library, type_name, layer, variant), tensors, grad_output)
        for name, variant in variants.items()
    }
    return result | peers(layer, tensors, grad_output)


def peers(layer: Layer, tensors, grad_output) -> dict[str, Functions]:
    result = {}
    if grad_output.dtype != torch.bfloat16:  # torchvision has none
        result["torchvision"] = torchvision_functions(layer, tensors, grad_output)
    result["cudnn_conv2d"] = convolution_functions(layer, tensors, grad_output)
    return result


def contestants_of_zoo(library, type_name, layer, tensors, grad_output):
    """Beside the core as it is, the pass that is judged, forward or backward, on each path that
    fits it. So forward+backward on another path has its backward on that path, and the chosen
    forward."""
    results = results_like(tensors, grad_output)  # of all paths: 4K images are large

    def functions_along(path: str) -> Functions:
        core = core_of(library, type_name, layer, Variant(path))
        return core_functions(core, tensors, grad_output, results)

    chosen = functions_along("automatic")
    result = {"deform_conv2d": chosen}
    for path in PATHS:
        if path == "automatic":
            continue
        alone = functions_along(path)
        result[path] = {}
        if fits(alone["forward"]):
            result[path]["forward"] = alone["forward"]
        if fits(alone["backward"]):
            result[path]["forward+backward"] = in_order(chosen["forward"], alone["backward"])
    return result | peers(layer, tensors, grad_output)


def fits(function) -> bool:
    try:
        function()
    except NoFusedKernelError:
        return False
    return True


def in_order(first: Callable, second: Callable) -> Callable:
    def both():
        first()
        second()

    return both


def fresh_tensors(type_name, layer: Layer):
    """Random tensors that no run before has seen. Sets whether PyTorch uses TF32."""
    dtype, _, allow_tf32, _ = TYPES[type_name]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    generator = torch.Generator("cuda")
    generator.seed()
    return random_tensors(generator, dtype, layer)


# --- How it is timed ---


def times_in_turn(
    functions: dict[str, Callable], rounds: int = ROUNDS, warm_ups: int = WARM_UPS
) -> dict[str, float]:
    """Median milliseconds on the GPU of each function.

    What is written before each call takes the place of its tensors in the L2 cache, and takes long
    enough, about 1.5 ms, for all kernels of the call to be waiting when the first begins, also
    where PyTorch's backward pass launches them from Python.
    """
    flush = torch.empty(1 << 28, dtype=torch.int32, device="cuda")  # 1 GiB
    for function in functions.values():
        for _ in range(warm_ups):
            function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(FLUSHES):
                flush.zero_()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(of) for name, of in times.items()}


def seconds_of(functions) -> float:
    """Of calling all of them, one after the other."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for function in functions:
        function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# --- Parts ---


def measure_ceilings() -> dict:
    """What the device does at most: bytes read and written by copying, operations in products."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy_ms = times_in_turn({"copy": lambda: target.copy_(source)})["copy"]
    ceilings = {"copy_bytes_per_s": 2 * COPY_BYTES / (1e-3 * copy_ms), "operations_per_s": {}}
    for type_name in TIMED_TYPES:
        dtype, _, allow_tf32, _ = TYPES[type_name]
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        a, b, c = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda").to(dtype) for _ in "abc")
        ms = times_in_turn({"product": lambda: torch.mm(a, b, out=c)}, 10)["product"]  # noqa: B023
        ceilings["operations_per_s"][type_name] = 2 * PRODUCT_SIZE**3 / (1e-3 * ms)
    return ceilings


def least_work(layer: Layer, tensors, grad_output) -> dict:
    """For each measurement: the bytes of what must be read and written, once in each pass, and the
    operations of the products."""
    arguments = sum(tensor.nbytes for tensor in tensors.values())
    output = grad_output.nbytes
    forward, backward = arguments + output, 2 * arguments + output
    return {
        "forward": {"bytes": forward, "operations": 2 * layer.multiply_adds},
        "forward+backward": {"bytes": forward + backward, "operations": 6 * layer.multiply_adds},
    }


def time_layers(library, columns_bytes: int) -> list[dict]:
    rows = []
    for type_name in TIMED_TYPES:
        for layer in DETECTION:
            tensors, grad_output = fresh_tensors(type_name, layer)
            compared = contestants(library, type_name, layer, tensors, grad_output, columns_bytes)
            rows.append(
                {"type": type_name, "layer": str(layer)}
                | measured(layer, compared, tensors, grad_output, ROUNDS, WARM_UPS)
            )
            print(type_name, layer, _as_text(rows[-1]["ms"]), flush=True)
    return rows


def time_zoo(library, layers: dict[str, Layer], types: Sequence[str]) -> list[dict]:
    rows = []
    for type_name in types:
        for name, layer in layers.items():
            tensors, grad_output = fresh_tensors(type_name, layer)
            compared = contestants_of_zoo(library, type_name, layer, tensors, grad_output)
            rows.append(
                {"type": type_name, "layer": name, "depthwise": layer.depthwise}
                | measured(layer, compared, tensors, grad_output, ZOO_ROUNDS, ZOO_WARM_UPS)
            )
            print(type_name, name, _as_text(rows[-1]["ms"]), flush=True)
    return rows


def measured(
    layer: Layer, compared: dict[str, Functions], tensors, grad_output, rounds, warm_ups
) -> dict:
    """Times and memory of a layer, and what it needs at least."""
    ms = {}
    for key in MEASUREMENTS:
        functions = {name: of[key] for name, of in compared.items() if key in of}
        ms[key] = times_in_turn(functions, rounds, warm_ups)
    return {
        "ms": ms,
        "least": least_work(layer, tensors, grad_output),
        "extra_bytes": extra_bytes(compared, tensors, grad_output),
    }


def time_small_layers(library) -> list[dict]:
    """Of back-to-back calls, which the host bounds, and on the GPU alone."""
    rows = []
    for type_name in TIMED_TYPES:
        for layer in EXPERIMENT:
            tensors, grad_output = fresh_tensors(type_name, layer)
            compared = contestants(library, type_name, layer, tensors, grad_output)
            ms = {}
            for key in MEASUREMENTS:
                functions = {
                    name: compared[name][key] for name in ("deform_conv2d", "cudnn_conv2d")
                }
                gpu = times_in_turn(functions)
                ms[key] = {
                    name: {"back to back": back_to_back_ms(function), "GPU": gpu[name]}
                    for name, function in functions.items()
                }
            rows.append({"type": type_name, "layer": str(layer), "ms": ms})
    return rows


def back_to_back_ms(function) -> float:
    calls = [function] * BACK_TO_BACK
    seconds_of(calls)  # to warm up
    return 1e3 * statistics.median(seconds_of(calls) for _ in range(5)) / BACK_TO_BACK


def time_chains(library) -> list[dict]:
    """Microseconds of a call of the core among others, as tensorflow_gpu.py measures them."""
    rows = []
    for type_name in CHAINED_TYPES:
        for layer in CHAINED:
            sets = [fresh_tensors(type_name, layer)[0] for _ in range(INPUTS)]
            _, grad_output = fresh_tensors(type_name, layer)
            filters = [tensors["filters"] for tensors in sets[:FILTERS]]
            results = results_like(sets[0], grad_output)
            core = core_of(library, type_name, layer, Variant("automatic"))
            links = [
                core_functions(core, sets[i] | {"filters": filters[j]}, grad_output, results)
                for i, j in arguments_of_links(3 * LINKS)
            ]
            us = {}
            for key in MEASUREMENTS:
                functions = [link[key] for link in links]
                us[key] = slope_us(lambda n: seconds_of(functions[:n]))  # noqa: B023
            rows.append({"type": type_name, "layer": str(layer), "us": us})
    return rows


def _as_text(ms: dict) -> str:
    return "; ".join(
        f"{key}: " + ", ".join(f"{name} {value:.3f} ms" for name, value in of.items())
        for key, of in ms.items()
    )


# --- Memory ---


def extra_bytes(compared: dict[str, Functions], tensors, grad_output) -> dict[str, int]:
    """The most that forward+backward holds beside its arguments and results."""
    result = {}
    for name, functions in compared.items():
        if "backward" in functions:
            result[name] = max(pool_peak(functions[key]) for key in ("forward", "backward"))
    if "torchvision" in compared:
        # Results are made in the call here, all in the output's type, and count as held at the
        # peak.
        elements = sum(tensor.numel() for tensor in tensors.values()) + grad_output.numel()
        peak = allocator_peak(compared["torchvision"]["forward+backward"])
        result["torchvision"] = peak - elements * grad_output.element_size()
    return result


def allocator_peak(function) -> int:
    """The most bytes that `function` adds to what PyTorch has allocated."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def pool_peak(function) -> int:
    """The most bytes that `function` adds to the device's default pool, the core's workspace.

    The driver is asked, since the core and PyTorch each have a CUDA runtime of their own.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    used_now, used_high = 7, 8  # CU_MEMPOOL_ATTR_USED_MEM_CURRENT and _HIGH
    pool, value = ctypes.c_void_p(), ctypes.c_uint64()

    def attribute(verb: str, key: int, number: int = 0) -> int:
        value.value = number
        _succeed(getattr(driver, f"cuMemPool{verb}Attribute")(pool, key, ctypes.byref(value)))
        return value.value

    torch.cuda.synchronize()
    device = ctypes.c_int()
    _succeed(driver.cuCtxGetDevice(ctypes.byref(device)))
    _succeed(driver.cuDeviceGetDefaultMemPool(ctypes.byref(pool), device))
    before = attribute("Get", used_now)
    attribute("Set", used_high, 0)  # the peak is counted from here
    function()
    torch.cuda.synchronize()
    return attribute("Get", used_high) - before


def _succeed(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"the CUDA driver returned {status}")
