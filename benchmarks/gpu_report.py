"""The tables of benchmark_gpu.py's times, as Markdown. No framework is needed here."""

from collections.abc import Iterable, Sequence

import report
from gpu_layers import BACK_TO_BACK, INPUTS, LINKS
from layers import MEASUREMENTS

# Names in the tables of what is timed.
CONTESTANTS = {
    "deform_conv2d": "deform_conv2d",
    "general": "general",
    "deterministic": "deterministic",
    "other": "fastest other path",
    "torchvision": "torchvision",
    "cudnn_conv2d": "conv2d",
}
INSIDE = {"deform_conv2d": "deform_conv2d", "tf.nn.conv2d": "conv2d"}
# Of each of these, the time of one divided by that of the other.
RATIOS = (
    ("deform_conv2d", "cudnn_conv2d"),
    ("torchvision", "deform_conv2d"),
    ("general", "deform_conv2d"),
    ("deterministic", "deform_conv2d"),
)
# For each type and measurement: at most so many times the time of cuDNN's convolution, and at least
# so many times as fast as torchvision.
GOALS = {
    "float16": {"forward": (2, 4), "forward+backward": (3, 7)},
    "bfloat16": {"forward": (2, 4), "forward+backward": (3, 7)},
    "tf32": {"forward": (2, 2.5), "forward+backward": (3, 6)},
}
MEANS = "Geometric means of the ratios of times, with their goals.\n"
# Microseconds that a call may cost inside TensorFlow beside the core's own.
TENSORFLOW_GOAL_US = 15


def as_markdown(results: dict) -> str:
    lines = [heading(results)]
    for run in results["runs"]:
        if run["columns_bytes"]:
            lines.append(f"## Columns of at most {run['columns_bytes'] >> 20} MiB\n")
        lines += times_as_markdown(run["rows"])
    lines += floors_as_markdown(results["runs"][0]["rows"], results["ceilings"])
    lines += memory_as_markdown(results["runs"][0]["rows"])
    lines += small_as_markdown(results["small"])
    if results.get("tensorflow"):
        lines += tensorflow_as_markdown(results["tensorflow"], results["chains"])
    return "\n".join(lines)


def heading(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{results['machine']}; {versions}.\n"


# --- Times ---


def times_as_markdown(rows: list[dict]) -> list[str]:
    sections = ["Medians in milliseconds; in brackets, the time divided by deform_conv2d's.\n"]
    for measurement in MEASUREMENTS:
        all_times = [row["ms"][measurement] for row in rows]
        names = [name for name in CONTESTANTS if any(name in times for times in all_times)]
        cells = [
            [row["type"], row["layer"], *(_with_ratio(times, name) for name in names)]
            for row, times in zip(rows, all_times, strict=True)
        ]
        header = [f"{measurement}, ms", "N, C→O, H×W", *(CONTESTANTS[name] for name in names)]
        sections.append(report.table(header, cells))
    return [*sections, MEANS, means(rows, RATIOS, GOALS)]


def _with_ratio(times: dict, name: str) -> str:
    if name not in times:
        return "–"
    if name == "deform_conv2d":
        return f"{times[name]:.3f}"
    return f"{times[name]:.3f} ({times[name] / times['deform_conv2d']:.2f}×)"


def means(rows: list[dict], pairs: Sequence[tuple[str, str]], goals_of: dict) -> str:
    """The first two of `pairs` have goals."""
    header = ["", *(f"{CONTESTANTS[a]} / {CONTESTANTS[b]}" for a, b in pairs)]
    cells = []
    for type_name in types_of(rows):
        for measurement in MEASUREMENTS:
            times = [row["ms"][measurement] for row in rows if row["type"] == type_name]
            ratios = [mean_ratio(times, a, b) for a, b in pairs]
            texts = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            if goals := goals_of.get(type_name, {}).get(measurement):
                texts[0] += f" (at most {goals[0]})"
                texts[1] += f" (at least {goals[1]})" * (ratios[1] is not None)
            cells.append([f"{type_name}, {measurement}", *texts])
    return report.table(header, cells)


def types_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["type"] for row in rows))


def mean_ratio(times: Iterable[dict], numerator: str, denominator: str) -> float | None:
    """None where one of them has not been timed."""
    ratios = [
        of[numerator] / of[denominator] for of in times if {numerator, denominator} <= set(of)
    ]
    return report.geometric_mean(ratios) if ratios else None


# --- What the device would allow ---


def floors_ms(row: dict, measurement: str, ceilings: dict) -> tuple[float, float]:
    """Milliseconds that the fewest bytes and the products take at the device's best."""
    least = row["least"][measurement]
    operations_per_s = ceilings["operations_per_s"][row["type"]]
    return (
        1e3 * least["bytes"] / ceilings["copy_bytes_per_s"],
        1e3 * least["operations"] / operations_per_s,
    )


def floors_as_markdown(rows: list[dict], ceilings: dict) -> list[str]:
    products = ", ".join(
        f"{1e-12 * value:.0f} ({name})" for name, value in ceilings["operations_per_s"].items()
    )
    sections = [
        "## What the device would allow\n",
        "The fewest bytes: each pass reads its arguments and writes its results once. Measured in "
        f"the same run: a copy reads and writes {1e-12 * ceilings['copy_bytes_per_s']:.2f} TB/s; a "
        f"product of 8192³ does {products} TFLOP/s. The share is that of the larger of the two "
        "times in deform_conv2d's.\n",
    ]
    header = ["N, C→O, H×W", "MB", "at copy's rate, ms", "GFLOP", "at product's rate, ms"]
    for measurement in MEASUREMENTS:
        cells = []
        for row in rows:
            least, ours = row["least"][measurement], row["ms"][measurement]["deform_conv2d"]
            bytes_ms, operations_ms = floors_ms(row, measurement, ceilings)
            cells.append(
                [
                    row["type"],
                    row["layer"],
                    f"{1e-6 * least['bytes']:.0f}",
                    f"{bytes_ms:.3f}",
                    f"{1e-9 * least['operations']:.0f}",
                    f"{operations_ms:.3f}",
                    f"{ours:.3f}",
                    f"{100 * max(bytes_ms, operations_ms) / ours:.0f} %",
                ]
            )
        sections.append(report.table([measurement, *header, "deform_conv2d, ms", "share"], cells))
    return sections


def memory_as_markdown(rows: list[dict]) -> list[str]:
    names = [name for name in CONTESTANTS if name in rows[0]["extra_bytes"]]
    cells = []
    for row in rows:
        extra = row["extra_bytes"]
        cells.append([row["type"], row["layer"]])
        cells[-1] += (f"{extra[name] / 2**20:.0f}" if name in extra else "–" for name in names)
    return [
        "## Memory\n",
        "The most that forward+backward holds on the device beside its arguments and results.\n",
        report.table(["MiB", "N, C→O, H×W", *(CONTESTANTS[name] for name in names)], cells),
    ]


# --- Calls that are bound by launching ---


def small_as_markdown(rows: list[dict]) -> list[str]:
    cells = []
    for row in rows:
        cells.append([row["type"], row["layer"]])
        for measurement in MEASUREMENTS:
            ours, theirs = (
                row["ms"][measurement][name] for name in ("deform_conv2d", "cudnn_conv2d")
            )
            cells[-1] += (f"{1e3 * ours[key]:.1f} / {1e3 * theirs[key]:.1f}" for key in ours)
    columns = [f"{key}, {way}" for key in MEASUREMENTS for way in ("back to back", "on the GPU")]
    return [
        "## Small layers\n",
        "The MNIST network's, in microseconds: deform_conv2d (the C interface) / cuDNN's conv2d "
        f"(in PyTorch). {BACK_TO_BACK} calls back to back, as the host's clock sees them; and the "
        "time between events on the GPU.\n",
        report.table(["", "N, C→O, H×W", *columns], cells),
    ]


def tensorflow_as_markdown(inside: dict, chains: list[dict]) -> list[str]:
    alone = {(row["type"], row["layer"]): row["us"] for row in chains}
    cells, excess = [], []
    for row in inside["rows"]:
        core = alone[row["type"], row["layer"]]
        for measurement in MEASUREMENTS:
            us, core_us = row["us"][measurement], core[measurement]
            excess.append(us["deform_conv2d"] - core_us)
            cells.append(
                [
                    f"{row['type']}, {measurement}",
                    row["layer"],
                    f"{core_us:.1f}",
                    f"{us['deform_conv2d']:.1f}",
                    f"{excess[-1]:+.1f}",
                    f"{us['tf.nn.conv2d']:.1f}",
                    f"{us['deform_conv2d'] / us['tf.nn.conv2d']:.2f}×",
                ]
            )
    cost = ", ".join(f"{inside['chain_us'][key]:.1f} ({key})" for key in MEASUREMENTS)
    header = ["", "N, C→O, H×W", "C interface", "deform_conv2d", "more", "tf.nn.conv2d", "ratio"]
    return [
        "## Inside TensorFlow\n",
        f"{inside['device']}, TensorFlow {inside['version']}. Microseconds of a call among "
        f"others: the host's time for {3 * LINKS} calls less that for {LINKS}, in one "
        f"tf.function, divided by {2 * LINKS}. Calls take {INPUTS} inputs in turn and wait for "
        f"the one before, by reading the sizes of its results, which alone costs {cost} "
        "microseconds a call and is not taken off. The C interface is called from Python in the "
        "same way, without TensorFlow.\n",
        report.table(header, cells),
        f"At most {max(excess):.1f} microseconds more than the C interface's (goal: at most "
        f"{TENSORFLOW_GOAL_US}).\n",
    ]


# --- The plot ---


def bars(results: dict) -> dict:
    """For report.plot_gpu()."""
    inside = (results.get("tensorflow") or {}).get("rows", [])
    inside_us = {(row["type"], row["layer"]): row["us"] for row in inside}
    panels = bars_of(
        results["runs"][0]["rows"],
        results["ceilings"],
        ("deform_conv2d", "general", "torchvision", "cudnn_conv2d"),
    )
    for (type_name, layer), of in inside_us.items():
        for measurement, us in of.items():
            panels[f"{type_name}, {measurement}"].get(layer, {"ms": {}})["ms"].update(
                {f"{INSIDE[name]}, in TensorFlow": 1e-3 * value for name, value in us.items()}
            )
    return panels


def bars_of(rows: list[dict], ceilings: dict, names: Sequence[str]) -> dict:
    """In each panel, milliseconds by layer, and the device's floor."""
    panels = {}
    for row in rows:
        for measurement in MEASUREMENTS:
            times = row["ms"][measurement]
            of = {CONTESTANTS[name]: times[name] for name in names if name in times}
            floor = max(floors_ms(row, measurement, ceilings))
            panel = panels.setdefault(f"{row['type']}, {measurement}", {})
            panel[row["layer"]] = {"ms": of, "floor": floor}
    return panels
