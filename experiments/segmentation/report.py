"""Draws the tables and the picture of the segmentation experiment from kept results alone.

Writes the tables into the page, between its marks, and the picture beside it.
"""

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.report import table
from experiments import results
from experiments.page import with_report
from experiments.segmentation.glyphs import NAMES
from experiments.segmentation.scenes import MIXED, TEST_KINDS
from experiments.segmentation.settings import ARMS, EQUAL_PARAMETERS, MEASURED
from experiments.segmentation.train import RESULTS
from utils.cli import UserError, reading, run
from utils.files import write_file

PAGE = Path(__file__).parent / "README.md"
PICTURE = Path(__file__).parent / "scenes.png"
PICTURE_LINE = (
    f"![Test scenes, their true labels, and what the networks of seed 1 predict]({PICTURE.name})\n"
)
SCRIPT = "experiments/segmentation/report.py"


def main() -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="by default experiments/results/segmentation")
    add("--page", type=Path, default=PAGE, help="by default README.md beside this script")
    add("--picture", type=Path, default=PICTURE, help="by default scenes.png beside this script")
    arguments = parser.parse_args()
    records = results.read(arguments.results)
    if not records:
        raise UserError(f"no results in {arguments.results}: experiments.segmentation.train")
    with reading(f"{arguments.page} cannot be read"):
        text = arguments.page.read_text(encoding="utf-8")
    write_file(arguments.page, with_report(text, SCRIPT, parts_of(records)).encode())
    write_file(arguments.picture, picture(arguments.results))
    print(f"wrote {arguments.page} and {arguments.picture}")


# --- Tables ---


def parts_of(records: list[dict]) -> list[str]:
    """Tables and sentences, in Markdown."""
    if not records:
        return []
    by_arm = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in ARMS}
    by_arm = {arm: runs for arm, runs in by_arm.items() if runs}
    parts = [heading(records), iou_table(by_arm), difference_table(by_arm), PICTURE_LINE]
    return list(filter(None, [*parts, class_table(by_arm), offset_table(by_arm)]))


def heading(records: list[dict]) -> str:
    """Where the records come from.

    Raises:
      UserError: their settings differ.
    """
    results.check_alike(records, "settings", lambda record: record["settings"])
    settings = records[0]["settings"]
    machines = sorted({_machine(record["environment"]) for record in records})
    seconds = sum(sum(record["seconds"].values()) for record in records)
    return (
        f"{settings['steps']} steps of {settings['batch_size']} scenes, out of "
        f"{settings['train_scenes']}; {settings['test_scenes']} test scenes in each column. "
        f"{'; '.join(machines)}. {len(records)} runs, {seconds / 60:.0f} minutes in all.\n"
    )


def _machine(environment: dict) -> str:
    versions = environment["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("TensorFlow", "Keras"))
    return f"{environment['gpu'] or environment['processor']}; {named}; {environment['date']}"


def iou_table(by_arm: dict[str, dict[int, dict]]) -> str:
    rows = [
        [
            ARMS[arm].title,
            f"{_any(runs)['parameters']:,}",
            str(len(runs)),
            *(_percent(run["mean_iou"][kind] for run in runs.values()) for kind in TEST_KINDS),
        ]
        for arm, runs in by_arm.items()
    ]
    header = ["mean IoU in percent", "parameters", "seeds", *TEST_KINDS]
    return table(header, rows)


def difference_table(by_arm: dict[str, dict[int, dict]]) -> str:
    """Deformable less regular of equal parameters, seed by seed."""
    rows = []
    for arm, other in EQUAL_PARAMETERS.items():
        runs, others = by_arm.get(arm, {}), by_arm.get(other, {})
        seeds = sorted(runs.keys() & others.keys())
        if seeds:
            differences = [
                [runs[s]["mean_iou"][kind] - others[s]["mean_iou"][kind] for s in seeds]
                for kind in TEST_KINDS
            ]
            title = f"{ARMS[arm].title} − regular"
            rows.append([title, *(_percent(values, "+") for values in differences)])
    return rows and table(["difference at equal parameters", *TEST_KINDS], rows)


def class_table(by_arm: dict[str, dict[int, dict]]) -> str:
    rows = [
        [
            ARMS[arm].title,
            *(_percent(run["iou"][MIXED][name] for run in runs.values()) for name in NAMES),
        ]
        for arm, runs in by_arm.items()
    ]
    return table([f"IoU in percent, {MIXED}", *NAMES], rows)


def offset_table(by_arm: dict[str, dict[int, dict]]) -> str:
    rows = []
    for arm, runs in by_arm.items():
        for layer in _any(runs)["mean_offset"][MIXED]:
            of = [[run["mean_offset"][kind][layer] for run in runs.values()] for kind in TEST_KINDS]
            rows.append([f"{ARMS[arm].title}, {layer}", *(_spread(v, "{:.2f}") for v in of)])
    title = f"mean length of an offset in pixels of the layer, first {MEASURED} scenes"
    return rows and table([title, *TEST_KINDS], rows)


def _any(runs: dict[int, dict]) -> dict:
    return next(iter(runs.values()))


def _percent(shares: Iterable[float | None], sign: str = "") -> str:
    """Of one class or mean, over the seeds; a class that occurs nowhere has none."""
    shares = [100 * share for share in shares if share is not None]
    return _spread(shares, f"{{:{sign}.1f}}") if shares else "–"


def _spread(values: list[float], style: str) -> str:
    mean, spread = results.mean_and_spread(values)
    text = style.format(mean)
    return f"{text} ± {style.replace('+', '').format(spread)}" if len(values) > 1 else text


# --- The picture ---


def picture(folder: Path, shown: int = 4) -> bytes:
    """A PNG: a row for each scene; image, truth, and each arm's prediction side by side.

    Raises:
      UserError: what train.py keeps for it is not there.
    """
    with reading(f"{folder}/scenes.npz cannot be read"), np.load(folder / "scenes.npz") as file:
        columns = {"image": file["images"], "truth": file["labels"]}
    for arm, of in ARMS.items():
        path = folder / f"{arm}.npz"
        if path.is_file():
            with reading(f"{path} cannot be read"), np.load(path) as file:
                columns[of.title.replace(", ", "\n")] = file["labels"]
    return _drawn({title: images[:shown] for title, images in columns.items()})


def _drawn(columns: dict[str, np.ndarray]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ListedColormap(["black", *plt.get_cmap("tab10").colors])
    rows = len(next(iter(columns.values())))
    figure, axes = plt.subplots(
        rows,
        len(columns),
        figsize=(1.6 * len(columns), 1.6 * rows + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for column, (title, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, image in zip(column, images, strict=True):
            axis.imshow(image, cmap=colours, vmin=-0.5, vmax=len(NAMES) - 0.5)
            axis.set_xticks([])
            axis.set_yticks([])
    patches = [Patch(color=colours(i), label=name) for i, name in enumerate(NAMES)]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    # Without the version of matplotlib, so that the same results give the same file.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    run(main)
