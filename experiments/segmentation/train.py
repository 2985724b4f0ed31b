"""Trains and tests the networks of the segmentation experiment: every arm, with every seed.

Each run leaves a JSON file in the output folder. Runs whose file is there are left out, so an
interrupted experiment goes on when it is started again. Scenes are drawn once, from glyphs, and
kept in the cache; glyphs are drawn with the font, unless --glyphs names a file of them.
"""

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from experiments import jobs
from experiments.segmentation import glyphs, scenes
from experiments.segmentation.settings import ARMS, Settings
from utils.cli import PROJECT, UserError, number, reading, run
from utils.files import check_writable, write_file

RESULTS = PROJECT / "experiments" / "results" / "segmentation"
CACHE = PROJECT / "build" / "experiments"
PICTURED = 6  # of the mixed test scenes, the first
PICTURED_SEED = 1  # whose networks' predictions of them are kept


def main() -> None:
    started = time.monotonic()
    arguments = parse_arguments()
    drawn = glyphs.load(arguments.glyphs) if arguments.glyphs else glyphs.render(arguments.font)
    settings = Settings(
        arguments.steps,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.offset_rate,
        arguments.train_scenes,
        arguments.test_scenes,
        drawn.digest(),
    )
    missing = missing_runs(arguments, settings)
    counts = {scenes.TRAIN: settings.train_scenes}
    counts |= dict.fromkeys(scenes.TEST_KINDS, settings.test_scenes)
    # Before TensorFlow is imported, which forked processes do not get along with.
    folder = scenes.prepare(drawn, counts, arguments.cache, len(os.sched_getaffinity(0)))
    if arguments.here:
        for arm, seed in missing:
            make_run(arm, seed, settings, folder, arguments.output)
        return
    check_writable(record_file(arguments.output, "any", 0))
    keep_pictured(folder, arguments.output)
    prepared = time.monotonic() - started
    print(f"{len(missing)} runs to make; scenes are ready after {prepared:.0f} s", flush=True)
    options = [sys.executable, "-m", "experiments.segmentation.train", *sys.argv[1:], "--here"]
    commands = {
        f"{arm}, seed {seed}": [*options, "--arm", arm, "--seed", str(seed)]
        for arm, seed in missing
    }
    limit = arguments.time_limit and arguments.time_limit - prepared
    failed, cut = jobs.run_all(commands, arguments.jobs, limit)
    if cut:
        print(f"no time was left for {'; '.join(cut)}: start again for the rest")
    if failed:
        raise UserError(f"these runs failed: {'; '.join(failed)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    add = parser.add_argument
    seed = number(int, at_least=0, at_most=2**32 - 1)
    add("--arm", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--seed", nargs="+", type=seed, default=[1, 2, 3], help="default: 1 2 3")
    count = number(int, at_least=1)
    add("--jobs", type=count, default=1, help="runs at a time (default: %(default)s)")
    add("--steps", type=count, default=4096, help="of training (default: %(default)s)")
    add("--batch-size", type=count, default=32, help="default: %(default)s")
    rate = number(float, above=0, at_most=1e3)
    add("--learning-rate", type=rate, default=2e-3, help="default: %(default)s")
    add(
        "--offset-rate",
        type=rate,
        default=0.1,
        help="the learning rate of offsets and masks, as a multiple of the other "
        "(default: %(default)s)",
    )
    add("--train-scenes", type=count, default=8192, help="default: %(default)s")
    add("--test-scenes", type=count, default=300, help="of each kind (default: %(default)s)")
    add("--font", type=Path, default=glyphs.FONT, help="of colour bitmaps (default: %(default)s)")
    add("--glyphs", type=Path, help="a file that experiments.segmentation.glyphs wrote")
    add("--output", type=Path, default=RESULTS, help="by default experiments/results/segmentation")
    add("--cache", type=Path, default=CACHE, help="for scenes; by default build/experiments")
    add("--time-limit", type=number(float, above=0), help="in seconds; runs that it cuts are lost")
    add("--here", action="store_true", help="make the runs in this process")
    return parser.parse_args()


def record_file(output: Path, arm: str, seed: int) -> Path:
    return Path(output) / f"{arm}-{seed}.json"


def missing_runs(arguments: argparse.Namespace, settings: Settings) -> list[tuple[str, int]]:
    """Arms and seeds without a record, seed by seed, so that what there is can be compared.

    Raises:
      UserError: a record was made with other settings.
    """
    missing = []
    for seed in arguments.seed:
        for arm in arguments.arm:
            path = record_file(arguments.output, arm, seed)
            if not path.is_file():
                missing.append((arm, seed))
                continue
            with reading(f"{path} is no record of this experiment"):
                kept = json.loads(path.read_text(encoding="utf-8"))["settings"]
            for name, value in settings._asdict().items():
                if kept.get(name) != value:
                    raise UserError(
                        f"{path} was made with {name} {kept.get(name)}, not {value}; name another "
                        "--output"
                    )
    return missing


def make_run(arm: str, seed: int, settings: Settings, folder: Path, output: Path) -> None:
    """Trains and tests a network, and writes its record, and predictions for the picture."""
    from experiments import results
    from experiments.segmentation.training import predictor, train_and_test

    record, model = train_and_test(arm, seed, settings, folder)
    if seed == PICTURED_SEED:
        images = scenes.load(folder, scenes.MIXED).images[:PICTURED]
        write_arrays(Path(output) / f"{arm}.npz", labels=predictor(model)(images))
    results.write(record_file(output, arm, seed), record)
    print(
        f"{arm}, seed {seed}: mean IoU {100 * record['mean_iou'][scenes.MIXED]:.1f} %, "
        f"loss {record['loss'][0]:.3f} to {record['loss'][-1]:.3f}, "
        f"{sum(record['seconds'].values()):.0f} s",
        flush=True,
    )


def keep_pictured(folder: Path, output: Path) -> None:
    """Writes the scenes of which predictions are kept, with their true labels."""
    pictured = scenes.load(folder, scenes.MIXED)
    write_arrays(
        Path(output) / "scenes.npz",
        images=pictured.images[:PICTURED],
        labels=pictured.labels[:PICTURED],
    )


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_file(path, buffer.getvalue())


if __name__ == "__main__":
    run(main)
