"""What the benchmarks share: statistics, tables, and the files that results are kept in.

The experiments take tables, and the names of the machine, from here too.
"""

import datetime
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

# More of a plot's labels than so many are slanted.
MOST_UPRIGHT_LABELS = 10


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))


def shape_name(shape: Sequence[int]) -> str:
    """Of (N, C, O, H, W)."""
    batch, channels, out_channels, height, width = shape
    return f"{batch}, {channels}→{out_channels}, {height}×{width}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def driver_version() -> str:
    """That of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def today() -> str:
    return datetime.date.today().isoformat()


def write(path: Path, results: dict, markdown: str) -> None:
    """Writes the numbers to `path` and what people read to the .md beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    print(f"wrote {path} and {path.with_suffix('.md')}")


def _draw_bars(axes, times: dict[str, dict[str, float]], names: list[str], label: str) -> None:
    """Each layer's times as bars side by side, in the order of `names`; a layer may lack some."""
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = [of.get(name, math.nan) for of in times.values()]
        positions = [j + (i - (len(names) - 1) / 2) * width for j in range(len(values))]
        axes.bar(positions, values, width, label=name)
    axes.set(yscale="log", ylabel=label)
    labels = [layer.replace(", ", "\n") for layer in times]
    many = len(labels) > MOST_UPRIGHT_LABELS
    axes.set_xticks(
        range(len(labels)),
        labels,
        fontsize="small",
        rotation=40 if many else 0,
        ha="right" if many else "center",
        rotation_mode="anchor" if many else "default",
    )
    if many:
        axes.margins(x=0.01)


def plot_cpu(path: Path, results: dict) -> None:
    """Draws benchmark_cpu.py's times of layers as bars, and the ratios of its scaling as curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, scaling = results.get("layers", {}), results.get("scaling", {})
    axes_of_scaling = list(next(iter(scaling.values()), {}))
    rows = len(layers) + (1 if scaling else 0)
    if rows == 0:
        return
    figure = pyplot.figure(figsize=(12, 3.6 * rows), layout="constrained")
    subfigures = figure.subfigures(rows, squeeze=False)[:, 0]
    for subfigure, (title, by_layer) in zip(subfigures, layers.items(), strict=False):
        subfigure.suptitle(title)
        measurements = list(next(iter(by_layer.values())))
        for axes, measurement in zip(subfigure.subplots(1, 2), measurements, strict=True):
            times = {
                layer: {name: quartiles[1] for name, quartiles in of[measurement].items()}
                for layer, of in by_layer.items()
            }
            _draw_bars(axes, times, list(next(iter(times.values()))), f"{measurement}, ms")
            axes.legend(fontsize="small")
    if scaling:
        subfigures[-1].suptitle("Time of deform_conv2d / time of tf.nn.conv2d")
        for axes, axis in zip(
            subfigures[-1].subplots(1, len(axes_of_scaling), sharey=True),
            axes_of_scaling,
            strict=True,
        ):
            for threads, of_threads in scaling.items():
                for measurement in ("forward", "forward+backward"):
                    times = {value: of[measurement] for value, of in of_threads[axis].items()}
                    ratios = [
                        of["deform_conv2d"][1] / of["tf.nn.conv2d"][1] for of in times.values()
                    ]
                    values = [float(value) for value in times]
                    axes.plot(values, ratios, marker="o", label=f"{measurement}, {threads}")
            axes.set(xlabel=axis, xscale="log")
            axes.set_xticks(values, times, minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)  # of all, since they share it
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


def plot_gpu(path: Path, panels: dict[str, dict[str, dict]]) -> None:
    """Draws times as bars, and as a line what the device would need at least. There are two panels
    in a row, or one where a panel has many layers.

    `panels`: by title and layer, {"ms": the times by name, "floor": the least}.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same in every panel, for the same colours.
    names = list(
        dict.fromkeys(
            name for of in panels.values() for layer in of.values() for name in layer["ms"]
        )
    )
    across = 1 if max(map(len, panels.values())) > MOST_UPRIGHT_LABELS else 2
    rows = -(-len(panels) // across)
    figure = pyplot.figure(figsize=(14, 3.6 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False).flat
    for axes, (title, layers) in zip(grid, panels.items(), strict=False):
        times = {layer: of["ms"] for layer, of in layers.items()}
        _draw_bars(axes, times, names, f"{title}, ms")
        for j, of in enumerate(layers.values()):
            label = "the device's least" if j == 0 else None
            axes.hlines(of["floor"], j - 0.45, j + 0.45, colors="black", label=label)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize="small")
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")
