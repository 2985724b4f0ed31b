"""The report on the zoo: tables, and where a rule is broken. No framework is needed here."""

from collections.abc import Iterator

import gpu_report
import report
from layers import MEASUREMENTS
from zoo import ZOO

PAIRS = (
    ("deform_conv2d", "cudnn_conv2d"),
    ("torchvision", "deform_conv2d"),
    ("other", "deform_conv2d"),
)
# As gpu_report.GOALS.
GOALS = {
    "float16": {"forward": (2, 4.5), "forward+backward": (3, 10)},
    "tf32": {"forward": (2.2, 3), "forward+backward": (2.6, 6)},
}

# Of bfloat16's times divided by float16's.
BFLOAT16_GOAL = 1.05

# --- The rules for each layer ---

# The most that cuDNN's time may be multiplied by, and the same for depthwise layers.
MOST_OF_CUDNN = {"forward": (4, 3), "forward+backward": (6, 8)}
# The most that the time of another path that fits may be multiplied by, ...
MOST_OF_OTHER = 1.05
# ... beside what two measurements of the same kernels may differ by in milliseconds.
RESOLUTION_MS = 1e-3


def violations(rows: list[dict]) -> Iterator[str]:
    """`rows` as with_other() gives them."""
    for row in rows:
        for measurement in MEASUREMENTS:
            for text in broken_rules(row, measurement):
                yield f"{row['type']}, {measurement}, {row['layer']}: {text}"
        memory = row["extra_bytes"]
        if memory["deform_conv2d"] > memory.get("torchvision", float("inf")):
            yield f"{row['type']}, {row['layer']}: {memory_text(memory)} MiB"


def broken_rules(row: dict, measurement: str) -> Iterator[str]:
    times = row["ms"][measurement]
    ours, cudnn = times["deform_conv2d"], times["cudnn_conv2d"]
    if ours > times.get("torchvision", ours):
        yield f"{ours / times['torchvision']:.2f}× torchvision's time"
    if "other" in times and ours > MOST_OF_OTHER * times["other"] + RESOLUTION_MS:
        yield f"{ours / times['other']:.2f}× the time of another path ({row['other'][measurement]})"
    most = MOST_OF_CUDNN[measurement][row["depthwise"]]
    if ours > most * cudnn:
        yield f"{ours / cudnn:.2f}× cuDNN's time (at most {most})"


def with_other(row: dict) -> dict:
    """`row` with the fastest other path's time as that of "other", and its name."""
    ms, names = {}, {}
    for measurement, times in row["ms"].items():
        paths = [path for path in ("general", "fused") if path in times]
        ms[measurement] = dict(times)
        if paths:
            names[measurement] = min(paths, key=times.get)
            ms[measurement]["other"] = times[names[measurement]]
    return row | {"ms": ms, "other": names}


# --- Tables ---


def as_markdown(results: dict) -> str:
    rows = [with_other(row) for row in results["zoo"]]
    sections = [
        "# Layers of real networks on a GPU\n",
        gpu_report.heading(results),
        "deform_conv2d's medians in milliseconds; torchvision's time / ours; ours / that of "
        "cuDNN's plain convolution; another path's / ours. The other path is the faster one of "
        "general and fused, of those that fit. Where it has the kernels that were chosen, the "
        "ratio is that of two measurements of the same. Forward+backward on another path is the "
        "chosen forward and that path's backward. Memory is the most MiB that forward+backward "
        "holds beside its arguments and results: ours / torchvision's.\n",
    ]
    for type_name in gpu_report.types_of(rows):
        of_type = [row for row in rows if row["type"] == type_name]
        sections += [f"## {type_name}\n", table_of(of_type)]
    sections += ["## Means\n", gpu_report.MEANS, gpu_report.means(rows, PAIRS, GOALS)]
    sections += bfloat16_text(rows)
    sections += ["## Rules that are broken\n", rules_text()]
    sections.append("\n".join(f"- {text}" for text in violations(rows)) or "None.")
    sections += ["", "## Sizes\n", sizes_of({row["layer"] for row in rows})]
    return "\n".join(sections)


def table_of(rows: list[dict]) -> str:
    header = ["layer"]
    for measurement in MEASUREMENTS:
        header += [f"{measurement}, ms", "torchvision", "/ cuDNN", "other path"]
    cells = []
    for row in rows:
        cells.append([row["layer"]])
        for measurement in MEASUREMENTS:
            times = row["ms"][measurement]
            cells[-1].append(f"{times['deform_conv2d']:.3f}")
            cells[-1] += [
                ratio_text(times, "torchvision", "deform_conv2d"),
                ratio_text(times, "deform_conv2d", "cudnn_conv2d"),
                ratio_text(times, "other", "deform_conv2d"),
            ]
        cells[-1].append(memory_text(row["extra_bytes"]))
    return report.table([*header, "memory"], cells)


def ratio_text(times: dict, numerator: str, denominator: str) -> str:
    ratio = gpu_report.mean_ratio([times], numerator, denominator)
    return "–" if ratio is None else f"{ratio:.2f}"


def memory_text(extra_bytes: dict) -> str:
    names = [name for name in ("deform_conv2d", "torchvision") if name in extra_bytes]
    return " / ".join(f"{extra_bytes[name] / 2**20:.0f}" for name in names)


def bfloat16_text(rows: list[dict]) -> Iterator[str]:
    for measurement in MEASUREMENTS:
        ours = {
            (row["type"], row["layer"]): row["ms"][measurement]["deform_conv2d"] for row in rows
        }
        ratios = [
            ours["bfloat16", layer] / ms
            for (type_name, layer), ms in ours.items()
            if type_name == "float16" and ("bfloat16", layer) in ours
        ]
        if ratios:
            mean = f"{report.geometric_mean(ratios):.2f} (goal: at most {BFLOAT16_GOAL:g})"
            yield f"{measurement}, bfloat16 / float16: {mean}.\n"


def rules_text() -> str:
    limits = "; ".join(
        f"{measurement} {most} times, depthwise {depthwise} times"
        for measurement, (most, depthwise) in MOST_OF_CUDNN.items()
    )
    return (
        "Of each layer, type and pass: not slower than torchvision; at most "
        f"{MOST_OF_OTHER:g} times the time of another path plus {1e3 * RESOLUTION_MS:g} µs, which "
        f"events do not resolve; at most so many times cuDNN's time: {limits}. Not more memory "
        "than torchvision.\n"
    )


def sizes_of(names: set[str]) -> str:
    cells = [[name, str(layer)] for name, layer in ZOO.items() if name in names]
    return report.table(["layer", "N, C→O, H×W"], cells)


# --- The plot ---


def bars(results: dict) -> dict:
    """For report.plot_gpu()."""
    names = ("deform_conv2d", "torchvision", "cudnn_conv2d")
    return gpu_report.bars_of(results["zoo"], results["ceilings"], names)
