#!/usr/bin/env python3
"""Writes the tables and plots of the study, from the records that are kept alone.

    python -m experiments.report

Writes the generated part of experiments/README.md, and plots beside the records.
"""

import argparse
import collections
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, no display

from matplotlib import pyplot as plt

from benchmarks.report import table
from experiments import results
from experiments.arms import ARMS, RECIPES, SHIFTS, STUDY, TRAINED_REGULAR, Arm
from experiments.datasets import DATASETS
from experiments.page import with_report
from utils.cli import PROJECT, run
from utils.files import write_file
from utils.mnist import EASY_SHIFT
from utils.model import CONVOLUTION_NAMES

PAGE = PROJECT / "experiments" / "README.md"
RESULTS = PAGE.parent / "results" / "study"
SCRIPT = "experiments/report.py"

# The arms of the curves, and of the tables of offsets.
ZOOMED = (
    "regular",
    "finetuned-norm",
    "finetuned",
    "offsets-v1",
    "offsets-v2",
    "scratch-regular",
    "scratch-v1",
)
MOVING = ("offsets-v1", "offsets-v2", "scratch-v1", "scratch-v3")
DRAWN = ("offsets-v1", "scratch-v1")

NEAR = 5  # percent, below the largest accuracy, that are drawn once more


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--page", type=Path, default=PAGE, help="what the tables are written into")
    options = parser.parse_args()
    records = results.read(options.results)
    page = page_of(options.page.read_text(encoding="utf-8"), records)
    write_file(options.page, page.encode())
    for dataset in _datasets_of(records):
        draw_zoom(options.results / f"{dataset}-zoom.png", dataset, records)
        draw_offsets(options.results / f"{dataset}-offsets.png", dataset, records)
    print(f"{len(records)} records; wrote {options.page}")


def page_of(page: str, records: list[dict]) -> str:
    """The page with what the records say between the marks.

    Raises:
      UserError: the marks are missing.
    """
    return with_report(page, SCRIPT, parts_of(records))


def parts_of(records: list[dict]) -> list[str]:
    """Headings, tables and sentences, in Markdown.

    Raises:
      UserError: records differ in settings, data, or the weights that they start from.
    """
    _check_alike(records)
    parts = []
    for dataset in _datasets_of(records):
        for shift in SHIFTS:
            parts += _accuracies(dataset, shift, records)
        if dataset == "mnist":
            parts += _recipes(records)
        parts += _offsets(dataset, records)
        title = DATASETS[dataset]
        parts += [
            f"![Accuracy on {title} against zoom](results/study/{dataset}-zoom.png)\n",
            f"![Offsets on {title} by epoch](results/study/{dataset}-offsets.png)\n",
        ]
    return parts + (_provenance(records) if records else [])


def _check_alike(records: list[dict]) -> None:
    results.check_alike(records, "settings", lambda record: record["settings"])
    of_dataset, of_seed = {}, {}
    for record in records:
        of_dataset.setdefault(record["dataset"], []).append(record)
        if record.get("starts_from") or record.get("weights"):
            of_seed.setdefault((record["dataset"], record["seed"]), []).append(record)
    for dataset, some in of_dataset.items():
        title = DATASETS[dataset]
        results.check_alike(some, f"files of {title}", lambda record: record["checksums"])
    for (dataset, seed), some in of_seed.items():
        what = f"weights to start from, {DATASETS[dataset]}, seed {seed}"
        results.check_alike(some, what, lambda each: each.get("weights") or each["starts_from"])


def _datasets_of(records: list[dict]) -> list[str]:
    return [name for name in DATASETS if any(each["dataset"] == name for each in records)]


def _of(records: list[dict], dataset: str, arm: str, shift: float) -> list[dict]:
    """The records of an arm, one for each seed. The regular arm knows no shift."""
    if arm == TRAINED_REGULAR.name:
        shift = EASY_SHIFT
    asked = (dataset, arm, shift)
    return [each for each in records if (each["dataset"], each["arm"], each["shift"]) == asked]


def _cell(records: list[dict], value: Callable[[dict], float], digits: int = 2) -> str:
    """Mean and standard deviation over the seeds; of one seed, the value."""
    mean, spread = results.mean_and_spread(value(record) for record in records)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(records) > 1 else "")


def _test(name: str) -> Callable[[dict], float]:
    return lambda record: record["accuracy"]["test"][name]


def _accuracies(dataset: str, shift: float, records: list[dict]) -> list[str]:
    tuned = [arm for arm in STUDY if arm.pretrained or arm is TRAINED_REGULAR]
    groups = {
        "from the trained regular network": tuned,
        "from random weights": [arm for arm in STUDY if arm not in tuned],
    }
    tables = []
    for heading, arms in groups.items():
        rows = list(_accuracy_rows(dataset, shift, arms, records))
        # The regular network alone, which knows no shift, makes no table.
        if any(cells[0] != TRAINED_REGULAR.title for cells in rows):
            tests = [f"scaled, ±{each:g} px" for each in SHIFTS]
            header = [heading, "parameters trained", *tests, "unscaled", "seeds"]
            tables.append(table(header, rows))
    if not tables:
        return []
    title = f"### {DATASETS[dataset]}, trained with shifts of up to {shift:g} px\n"
    return [title, "Test accuracy in percent.\n", *tables]


def _accuracy_rows(
    dataset: str, shift: float, arms: Iterable[Arm], records: list[dict]
) -> Iterable[list[str]]:
    for arm in arms:
        if of := _of(records, dataset, arm.name, shift):
            trained, total = of[0]["trained_parameters"], of[0]["parameters"]
            yield [
                arm.title,
                f"{trained:,} of {total:,}",
                *(_cell(of, _test(f"scaled {each:g}")) for each in SHIFTS),
                _cell(of, _test("regular")),
                str(len(of)),
            ]


def _recipes(records: list[dict]) -> list[str]:
    arms = [arm for arm in (*STUDY, *RECIPES) if arm in RECIPES or arm.name in MOVING[:2]]
    rows = []
    for arm in arms:
        if of := _of(records, "mnist", arm.name, EASY_SHIFT):
            held_out = [
                _cell(of, lambda record, name=name: record["accuracy"]["held out"][name])
                for name in ("scaled 1", "regular")
            ]
            rows.append(
                [
                    arm.title,
                    str(of[0]["settings"]["epochs"] * arm.recipe.times_epochs),
                    *held_out,
                    *(_cell(of, _test(name)) for name in ("scaled 1", "scaled 5.6", "regular")),
                    str(len(of)),
                ]
            )
    if not any(row[0] in {arm.title for arm in RECIPES} for row in rows):
        return []
    header = ["recipe", "epochs", "held out, scaled", "held out, unscaled"]
    header += ["test, scaled", "test, ±5.6 px", "test, unscaled", "seeds"]
    return [
        "### Recipes for tuning the offsets\n",
        "MNIST, shifts of up to 1 pixel. Accuracy in percent. The images held out have a standard "
        "error of 0.14.\n",
        table(header, rows),
    ]


def _offsets(dataset: str, records: list[dict]) -> list[str]:
    rows = []
    for arm in MOVING:
        of = _of(records, dataset, arm, EASY_SHIFT)
        for layer in CONVOLUTION_NAMES if of else ():
            cells = [
                _cell(of, lambda record, layer=layer, key=key: _last(record, layer)[key])
                for key in ("mean", "largest", "outside")
            ]
            padding = f"{of[0]['padding'][layer]:.2f}"
            rows.append([f"{ARMS[arm].title}{_start(arm)}, {layer}", *cells, padding])
    if not rows:
        return []
    header = ["layer", "mean \\|offset\\|", "largest", "outside, %", "outside without offsets, %"]
    return [
        f"### Offsets on {DATASETS[dataset]}\n",
        "After the last epoch, in pixels of the layer's input, along one axis; shifts of up to 1 "
        "pixel. A sample is outside where it lies in no pixel of the image.\n",
        table(header, rows),
    ]


def _start(arm: str) -> str:
    return "" if ARMS[arm].pretrained else ", all weights"


def _last(record: dict, layer: str) -> dict[str, float]:
    return record["epochs"][-1]["offsets"][layer]


def _provenance(records: list[dict]) -> list[str]:
    """Machines, versions, settings, hours and files."""

    def distinct(values: Iterable[str]) -> str:
        counts = collections.Counter(values)
        if len(counts) == 1:
            return next(iter(counts))
        return "; ".join(f"{value} ({count} runs)" for value, count in counts.items())

    def machine(record: dict) -> str:
        of = record["environment"]
        processors = f"{of['processors']} processors {of['processor']}"
        return ", ".join(filter(None, (of["gpu"], processors, of["date"])))

    def versions(record: dict) -> str:
        return ", ".join(f"{name} {of}" for name, of in record["environment"]["versions"].items())

    def settings(record: dict) -> str:
        of = record["settings"]
        limits = [f"{of[f'{part}_digits']} {part}ing images" for part in ("train", "test")
                  if of[f"{part}_digits"]]  # fmt: skip
        arm = ARMS[record["arm"]]
        epochs = f"{of['epochs'] * arm.recipe.times_epochs} epochs" if arm.trains else "no epochs"
        return ", ".join([epochs, f"batches of {of['batch_size']}", *limits])

    sums = {name: sha for record in records for name, sha in record["checksums"].items()}
    hours = sum(record["seconds"] for record in records) / 3600
    return [
        "### Where these figures come from\n",
        f"- {len(records)} runs: {distinct(map(settings, records))}.\n"
        f"- {distinct(map(machine, records))}.\n"
        f"- {distinct(map(versions, records))}.\n"
        f"- {hours:.1f} hours of runs, several of which share a machine; one takes "
        f"{statistics.median(record['seconds'] for record in records):.0f} seconds (median).\n",
        "SHA-256 of the data sets' files:\n",
        "".join(f"    {sha}  {name}\n" for name, sha in sorted(sums.items())),
    ]


def draw_zoom(path: Path, dataset: str, records: list[dict]) -> None:
    """Accuracy against zoom, whole and near its largest values.

    Lines are means over the seeds; their colour reaches from the smallest to the largest value.
    """
    figure, (whole, upper) = plt.subplots(1, 2, figsize=(11, 5), dpi=100, layout="constrained")
    largest = 0.0
    for arm in ZOOMED:
        if not (of := _of(records, dataset, arm, EASY_SHIFT)):
            continue
        zooms = [float(zoom) for zoom in of[0]["accuracy"]["zoom"]]
        by_zoom = list(zip(*(each["accuracy"]["zoom"].values() for each in of), strict=True))
        means, lowest, highest = ([f(v) for v in by_zoom] for f in (statistics.mean, min, max))
        largest = max(largest, *means)
        for axes in (whole, upper):
            (line,) = axes.plot(zooms, means, label=_label(arm), marker=".")
            color = line.get_color()
            axes.fill_between(zooms, lowest, highest, color=color, alpha=0.2, linewidth=0)
    for axes in (whole, upper):
        axes.axvspan(1, 2.5, color="gray", alpha=0.08, label="zooms that are trained on")
        axes.set_xlabel("zoom along both axes; above 1, the image shrinks")
        axes.grid(alpha=0.3)
    upper.set_ylim(largest - NEAR, largest + 0.1 * NEAR)
    whole.set_ylabel(f"test accuracy on {DATASETS[dataset]}, percent")
    figure.legend(*whole.get_legend_handles_labels(), fontsize="small", loc="outside lower center",
                  ncols=3)  # fmt: skip
    _save(figure, path)


def _label(arm: str) -> str:
    title = ARMS[arm].title
    return f"{title}, from random weights" if arm.startswith("scratch") else title


def draw_offsets(path: Path, dataset: str, records: list[dict]) -> None:
    """Mean |offset|, and the share of samples outside, of each layer by epoch."""
    arms = [arm for arm in DRAWN if _of(records, dataset, arm, EASY_SHIFT)]
    keys = {"mean": "mean |offset|, pixels", "outside": "samples outside, percent"}
    figure, panels = plt.subplots(
        len(keys), max(len(arms), 1), figsize=(4.5 * max(len(arms), 1), 6), dpi=100,
        sharex="col", sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, arm in enumerate(arms):
        of = _of(records, dataset, arm, EASY_SHIFT)
        panels[0, column].set_title(_label(arm), fontsize=10)
        panels[-1, column].set_xlabel("epoch")
        panels[-1, column].xaxis.get_major_locator().set_params(integer=True)
        for row, (key, label) in enumerate(keys.items()):
            panels[row, 0].set_ylabel(label)
            panels[row, column].grid(alpha=0.3)
            for layer in CONVOLUTION_NAMES:
                by_epoch = zip(*([line["offsets"][layer][key] for line in record["epochs"]]
                                 for record in of), strict=True)  # fmt: skip
                panels[row, column].plot([statistics.mean(each) for each in by_epoch], label=layer)
    if arms:
        panels[0, 0].legend(fontsize="small")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    # Without the version of matplotlib, so that the same figures give the same file.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    run(main)
