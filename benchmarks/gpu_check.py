"""Compares the CUDA core with torchvision in float64, and with the golden cases."""

import collections
import math

import numpy as np
import report
import torch
from gpu_core import (
    ARGUMENTS,
    PROJECT,
    TYPES,
    Core,
    NoFusedKernelError,
    Variant,
    core_of,
    nchw,
    nhwc,
    random_tensors,
    relative_error,
)
from layers import Layer
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

GOLDEN = PROJECT / "tests" / "data" / "torchvision_0_29.npz"
OFFSET_SCALE = 2.0
FAR = 20.0  # most samples are outside the image, and far from their neighbours


def layer(*sizes, **options) -> Layer:
    return Layer(*sizes, **{"scale": OFFSET_SCALE} | options)


ANY_CHANNELS = (
    layer(2, 16, 16, 28, 28),
    layer(2, 16, 24, 100, 152, deform_groups=2, masked=True),
    layer(1, 64, 64, 100, 152),
    layer(2, 128, 64, 50, 76, groups=2, deform_groups=4, masked=True),
    layer(3, 1, 4, 13, 17, masked=True),
    layer(3, 3, 5, 13, 17, deform_groups=3, masked=True, stride=2),
    layer(3, 17, 8, 13, 17, masked=True, dilation=2),
    layer(3, 34, 16, 13, 17, groups=2, stride=2, dilation=2),
    layer(2, 24, 24, 9, 9, groups=24, deform_groups=3, masked=True),
    layer(37, 40, 10, 7, 5, groups=5, deform_groups=2, masked=True),
    # depthwise
    layer(2, 32, 32, 30, 47, groups=32, masked=True),
    layer(3, 64, 64, 13, 17, groups=64, deform_groups=4, masked=True),
    layer(2, 96, 96, 28, 28, groups=96, kernel=(5, 5)),
    layer(1, 96, 96, 28, 28, groups=96, kernel=(7, 7), dilation=3),
    layer(2, 30, 30, 13, 17, groups=30, stride=2, masked=True),
    layer(2, 16, 48, 13, 17, groups=16, masked=True),
    layer(2, 24, 48, 13, 17, groups=24, deform_groups=3, stride=2, dilation=2),
    layer(1, 64, 64, 1, 200, groups=64, kernel=(1, 9)),
    layer(1, 288, 288, 9, 9, groups=288, deform_groups=9),
    layer(2, 32, 32, 30, 47, groups=32, scale=FAR, masked=True),
    layer(2, 32, 32, 30, 47, groups=32, holes=True, masked=True),
)
# Channels in eights, as the fused kernels want them: whole K blocks and parts of one,
# output channels of one tile, several, and parts of one; few positions and ragged ones.
EIGHTS = (
    layer(1, 8, 8, 13, 17),
    layer(1, 24, 24, 7, 5, masked=True),
    layer(2, 32, 64, 9, 9),
    layer(1, 40, 72, 30, 47, masked=True),
    layer(1, 64, 136, 13, 17),
    layer(1, 72, 256, 9, 9, masked=True),
    layer(2, 96, 264, 30, 47),
    layer(1, 128, 64, 30, 47, masked=True),
    layer(1, 192, 256, 13, 17),
    layer(2, 128, 128, 100, 152),
    layer(1, 256, 256, 50, 76, masked=True),
    # kernels
    layer(2, 64, 64, 13, 17, kernel=(1, 1), masked=True),
    layer(2, 40, 24, 13, 17, kernel=(2, 2)),
    layer(2, 64, 72, 30, 47, kernel=(5, 3), masked=True),
    layer(1, 24, 136, 9, 9, kernel=(5, 3)),
    layer(1, 64, 64, 30, 47, kernel=(7, 7), masked=True),
    # one row, one column, one pixel
    layer(2, 64, 64, 1, 300, kernel=(1, 9)),
    layer(2, 40, 72, 70, 1, masked=True),
    layer(3, 64, 64, 1, 1, masked=True),
    # strides and dilations
    layer(2, 64, 64, 30, 47, stride=2, masked=True),
    layer(1, 40, 72, 13, 17, stride=2),
    layer(1, 96, 64, 30, 47, dilation=2),
    layer(2, 32, 24, 13, 17, kernel=(5, 3), stride=2, dilation=2, masked=True),
    # groups
    layer(2, 64, 128, 13, 17, groups=2, masked=True),
    layer(1, 48, 144, 9, 9, groups=2),
    layer(2, 64, 64, 13, 17, deform_groups=2, masked=True),
    layer(1, 96, 136, 30, 47, deform_groups=4),
    layer(2, 128, 144, 9, 9, groups=2, deform_groups=4, masked=True),
    layer(1, 192, 72, 13, 17, deform_groups=2),
    layer(2, 64, 64, 30, 47, deform_groups=8, masked=True),
    layer(1, 128, 136, 30, 47, deform_groups=16, masked=True),
    layer(1, 96, 64, 13, 17, deform_groups=12),
    # K in parts
    layer(1, 512, 512, 13, 17, masked=True),
    # offsets
    layer(1, 64, 64, 30, 47, scale=FAR),
    layer(2, 40, 24, 13, 17, scale=FAR, masked=True),
    layer(1, 128, 136, 30, 47, scale=FAR, deform_groups=2),
    layer(2, 64, 64, 13, 17, holes=True),
    layer(2, 64, 72, 30, 47, holes=True, deform_groups=4, stride=2, masked=True),
    layer(2, 64, 64, 30, 47, holes=True, deform_groups=8, masked=True),
    layer(2, 64, 64, 30, 47, scale=FAR, deform_groups=8, masked=True),
    # batches
    layer(37, 32, 24, 7, 5),
    layer(37, 64, 64, 9, 9, masked=True),
)
# Where RegionScatterSm90 does not fit, and sums of regions are made without tensor cores.
REGIONS = (
    # few channels in a deformable group
    layer(2, 24, 24, 13, 17, deform_groups=24, masked=True),
    layer(2, 24, 16, 13, 17, deform_groups=8),
    layer(2, 32, 24, 30, 47, deform_groups=8, masked=True),
    layer(2, 64, 64, 30, 47, deform_groups=8, masked=True),
    layer(1, 128, 64, 30, 47, deform_groups=16, masked=True),
    layer(1, 128, 64, 13, 17, deform_groups=8),
    layer(37, 32, 24, 7, 5, deform_groups=8),
    # channels that are cut into slices, also odd ones
    layer(1, 200, 64, 13, 17, masked=True),
    layer(1, 130, 24, 13, 17, groups=2, deform_groups=2, stride=2),
    # Neither kind of group divides the other.
    layer(1, 96, 40, 13, 17, groups=4, deform_groups=6, masked=True),
    layer(1, 60, 40, 13, 17, groups=4, deform_groups=6, masked=True),
    # strides, kernels, images of one row
    layer(2, 64, 64, 30, 47, stride=4, masked=True),
    layer(2, 48, 64, 30, 47, stride=2, deform_groups=3, masked=True),
    layer(1, 64, 64, 30, 47, kernel=(5, 5), deform_groups=8, masked=True),
    layer(1, 30, 30, 30, 47, kernel=(7, 7), stride=2),
    layer(1, 64, 64, 30, 47, kernel=(7, 7), dilation=2),
    layer(2, 64, 64, 1, 200, kernel=(1, 9), deform_groups=4),
    layer(2, 8, 8, 1, 1, deform_groups=2, masked=True),
    # offsets
    layer(2, 64, 64, 30, 47, deform_groups=8, scale=FAR, masked=True),
    layer(2, 64, 64, 13, 17, deform_groups=8, holes=True, masked=True),
    layer(2, 40, 40, 30, 47, deform_groups=5, holes=True, stride=2),
)
# What tensor cores take with other channels: narrow convolution groups, which are merged, and
# channels of any number, which are padded; both; in one part and in several.
EMBEDDED = (
    layer(2, 16, 16, 13, 17, groups=8, masked=True),
    layer(2, 18, 24, 13, 17, groups=6),
    layer(1, 64, 64, 30, 47, groups=16, masked=True),
    layer(2, 36, 30, 13, 17, groups=6, deform_groups=2, masked=True),
    layer(2, 128, 128, 30, 47, groups=8, masked=True),
    layer(1, 60, 60, 13, 17, groups=3, stride=2),
    layer(2, 96, 96, 9, 9, groups=4, deform_groups=2, masked=True),
    layer(1, 512, 512, 25, 38, groups=32, masked=True),
    layer(1, 128, 64, 13, 17, groups=4, deform_groups=2),
    layer(2, 45, 18, 9, 9, groups=9, deform_groups=5, masked=True),
    layer(2, 64, 64, 13, 17, groups=16, holes=True, masked=True),
    layer(1, 64, 64, 30, 47, groups=8, scale=FAR, dilation=2),
    layer(2, 3, 64, 30, 47, kernel=(7, 7), stride=2),
    layer(2, 5, 7, 13, 17, masked=True),
    layer(1, 17, 33, 30, 47),
    layer(2, 30, 30, 30, 47, masked=True),
    layer(2, 33, 1, 13, 17, dilation=2),
    layer(2, 64, 33, 13, 17, masked=True),
    layer(2, 21, 21, 13, 17, deform_groups=3, masked=True),
    layer(1, 90, 15, 30, 47, deform_groups=3),
    layer(2, 30, 30, 13, 17, holes=True, stride=2, masked=True),
    layer(37, 6, 10, 7, 5, groups=2),
    layer(8, 250, 250, 96, 96, kernel=(1, 1), masked=True),
)
SMALL = (
    layer(1, 64, 8, 7, 9, deform_groups=8, masked=True, holes=True),
    layer(1, 15, 8, 1, 40, deform_groups=5, kernel=(1, 3), stride=2, scale=FAR),
    *ANY_CHANNELS[4:8:3],
    layer(1, 24, 24, 7, 5, masked=True, holes=True),
    layer(1, 72, 136, 9, 9, deform_groups=3, scale=FAR),
    layer(2, 64, 144, 7, 5, groups=2, kernel=(2, 2), masked=True),
    # Neither kind of group divides the other.
    layer(2, 192, 192, 13, 17, groups=3, deform_groups=2, masked=True),
    layer(2, 48, 408, 9, 9, groups=3, deform_groups=2),
    layer(2, 48, 48, 9, 9, groups=48, deform_groups=2, masked=True, holes=True),
    layer(1, 10, 30, 9, 9, groups=10, stride=2, masked=True, scale=FAR),
    layer(2, 36, 30, 9, 9, groups=6, deform_groups=2, masked=True, holes=True),
    layer(1, 30, 33, 9, 9, masked=True),
)


FEW_COLUMNS = 1 << 16
# Of one or several bands of patches, or of single images.
SOME_COLUMNS = 1 << 20
VARIANTS = (
    Variant("general"),
    Variant("general", FEW_COLUMNS),
    Variant("general", 0, deterministic=True),
    Variant("general", FEW_COLUMNS, deterministic=True),
    Variant("automatic"),
    Variant("automatic", 0, deterministic=True),
    Variant("fused"),
    Variant("fused", SOME_COLUMNS),
    Variant("fused", FEW_COLUMNS),
)
SMALL_VARIANTS = (
    Variant("general"),
    Variant("general", FEW_COLUMNS, deterministic=True),
    Variant("fused"),
    Variant("fused", FEW_COLUMNS),
)

# What one call of the core computes: the output, or these gradients.
OUTPUT = ("output",)
SAMPLED = ("grad_input", "grad_offset", "grad_mask")
FILTERS = ("grad_filters",)
ALL = (*SAMPLED, *FILTERS)
# There are fused kernels for these.
PASSES = {"output": OUTPUT, "gradients of input, offset, mask": SAMPLED}


def calls_of(variant: Variant, small: bool) -> list[tuple[str, ...]]:
    calls = [OUTPUT, ALL]
    if variant.path == "fused":
        calls.append(SAMPLED)  # without columns for the filters' gradient
    if not small and variant in (Variant(variant.path), Variant("general", FEW_COLUMNS)):
        calls += [(key,) for key in ALL if (key,) not in calls]
    return calls


def run_core(core, tensors, grad_output, keys) -> dict[str, torch.Tensor]:
    """The results `keys` of one call. Poisoned, so that what is not written shows."""
    if keys == OUTPUT:
        output = torch.full_like(grad_output, math.nan)
        core.forward(tensors, output)
        return {"output": output}
    gradients = {
        key: torch.full_like(value, math.nan)
        for key, value in tensors.items()
        if f"grad_{key}" in keys
    }
    core.backward(tensors, grad_output, gradients)
    return {f"grad_{key}": value for key, value in gradients.items()}


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


def exact_results(tensors, grad_output, layer: Layer):
    """torchvision's, in float64. With NaN among its offsets it may read out of bounds."""
    exact = {key: value.double() for key, value in tensors.items()}
    exact["offset"] = torch.nan_to_num(exact["offset"], nan=1e6, posinf=1e6, neginf=-1e6)
    return run_torchvision(exact, grad_output.double(), **layer.geometry)


# --- The golden cases ---


def check_golden(library) -> bool:
    with np.load(GOLDEN) as file:
        arrays = {key: torch.from_numpy(file[key]).cuda() for key in file.files}
    good = True
    for name in sorted({key.split("/")[0] for key in arrays}):
        case = {
            key.split("/")[1]: value for key, value in arrays.items() if key.startswith(name + "/")
        }
        errors = golden_errors(library, case)
        if name == "zero_offsets":
            # At h = -1 exactly torchvision's offset gradient is one-sided, ours is 0.
            del errors["grad_offset"]
        good &= all(error <= 1e-12 for error in errors.values())
        print(f"golden {name:17} {as_text(errors)}")
    return good


def golden_errors(library, case) -> dict[str, float]:
    config = case.pop("config").tolist()
    native = {
        key.replace("weight", "filters"): value.permute(2, 3, 1, 0).contiguous()
        if key.endswith("weight")
        else nhwc(value)
        for key, value in case.items()
    }
    tensors = {key: native[key] for key in ARGUMENTS if key in native}
    core = Core(
        library,
        "float64",
        stride=tuple(config[:2]),
        pad=tuple(config[2:4]),
        dilation=tuple(config[4:6]),
        deform_groups=config[7],
    )
    results = {}
    for keys in (OUTPUT, ALL):
        results |= run_core(core, tensors, native["grad_output"], keys)
    return {key: relative_error(value, native[key]) for key, value in results.items()}


# --- Random layers ---


class Summary:
    """The largest errors, which calls the fused kernels did, and what went wrong."""

    def __init__(self):
        self.errors = collections.defaultdict(dict)  # (type, path): errors
        self.fused = collections.Counter()  # (type, pass)
        self.layers = 0
        self.bad = []

    def add(self, type_name, path, layer, errors, absent) -> None:
        """Of one layer: the largest error of each result, and the calls without a fused kernel."""
        worst = self.errors[type_name, path]
        for key, error in errors.items():
            worst[key] = max(error, worst.get(key, 0.0))
        fine = all(error <= TYPES[type_name][-1] for error in errors.values())
        verdict = "BAD" if not fine else "ok " if errors else "n/a"
        line = f"{verdict} {type_name:8} {path:9} {layer}: {as_text(errors)}".rstrip()
        if absent:
            line += " no fused kernel"
            if errors:
                line += f" for {', '.join('+'.join(call) for call in dict.fromkeys(absent))}"
        print(line, flush=True)
        if not fine:
            self.bad.append(line)
        if path == "fused":
            done = (name for name, call in PASSES.items() if call not in absent)
            self.fused.update((type_name, name) for name in done)

    def print(self) -> None:
        header = ["largest relative errors", "output", *ALL]
        rows = [
            [f"{type_name}, {path}"]
            + [f"{of[key]:.1e}" if key in of else "–" for key in header[1:]]
            for (type_name, path), of in self.errors.items()
        ]
        print(f"\n{report.table(header, rows)}")
        rows = [
            [name, *(f"{self.fused[name, key]} of {self.layers}" for key in PASSES)]
            for name in TYPES
        ]
        print(report.table(["done by fused kernels", *PASSES], rows), flush=True)
        for line in self.bad:
            print(line)


def as_text(errors: dict[str, float]) -> str:
    return " ".join(f"{key} {error:.1e}" for key, error in errors.items())


def check_layers(library, small: bool) -> bool:
    generator = torch.Generator("cuda").manual_seed(1)
    summary = Summary()
    for layer in SMALL if small else ANY_CHANNELS + EIGHTS + REGIONS + EMBEDDED:
        summary.layers += 1
        for type_name in TYPES:
            check_layer(library, type_name, layer, small, generator, summary)
    summary.print()
    return not summary.bad


def check_layer(library, type_name, layer, small, generator, summary) -> None:
    tensors, grad_output = random_tensors(generator, TYPES[type_name][0], layer)
    expected = exact_results(tensors, grad_output, layer)
    variants = SMALL_VARIANTS if small else VARIANTS
    for path in dict.fromkeys(variant.path for variant in variants):
        errors, absent = {}, []
        for variant in (variant for variant in variants if variant.path == path):
            core = core_of(library, type_name, layer, variant)
            for call in calls_of(variant, small):
                check_call(core, tensors, grad_output, call, expected, errors, absent)
        summary.add(type_name, path, layer, errors, absent)
    if type_name == "float16" and layer == ANY_CHANNELS[1]:
        theirs = torchvision_errors(tensors, grad_output, layer, expected)
        print(f"    float16  torchvision itself, {layer}: {theirs}")


def check_call(core, tensors, grad_output, call, expected, errors, absent) -> None:
    """Adds to the largest `errors`, or to the calls that are `absent`."""
    keys = tuple(key for key in call if key in expected)
    if not keys:  # a mask's gradient, where there is no mask
        return
    try:
        results = run_core(core, tensors, grad_output, keys)
    except NoFusedKernelError:
        absent.append(call)
        return
    for key, value in results.items():
        errors[key] = max(relative_error(value, expected[key]), errors.get(key, 0.0))


def torchvision_errors(tensors, grad_output, layer, expected) -> str:
    theirs = {key: value.to(grad_output.dtype) for key, value in tensors.items()}
    results = run_torchvision(theirs, grad_output, **layer.geometry)
    return as_text({key: relative_error(value, expected[key]) for key, value in results.items()})
