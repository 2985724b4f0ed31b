"""Trains and tests the networks of the segmentation experiment: every arm, with every seed.

Each run leaves a JSON file in the output folder. Runs whose file is there are left out, so an
interrupted experiment goes on when it is started again. Scenes are drawn once, from glyphs, and
kept in the cache; glyphs are drawn with the font, unless --glyphs names a file of them.
"""

import argparse
import functools
import os
import time
from pathlib import Path

from experiments import jobs
from experiments.segmentation import glyphs, scenes
from experiments.segmentation.settings import ARMS, Settings, record_file
from utils.cli import PROJECT, number, run
from utils.files import check_writable

RESULTS = PROJECT / "experiments" / "results" / "segmentation"
CACHE = PROJECT / "build" / "experiments"


def main() -> None:
    started = time.monotonic()
    options = parse_arguments()
    options.output, options.cache = options.output.absolute(), options.cache.absolute()
    drawn = glyphs.load(options.glyphs) if options.glyphs else glyphs.render(options.font)
    settings = Settings(
        options.steps,
        options.batch_size,
        options.learning_rate,
        options.offset_rate,
        options.train_scenes,
        options.test_scenes,
        drawn.digest(),
    )
    missing = missing_jobs(options, settings)
    if not missing:
        print("0 runs to make")
        return
    check_writable(record_file(options.output, "any", 0))
    counts = {scenes.TRAIN: settings.train_scenes}
    counts |= dict.fromkeys(scenes.TEST_KINDS, settings.test_scenes)
    folder = scenes.prepare(drawn, counts, options.cache, len(os.sched_getaffinity(0)))
    prepared = time.monotonic() - started
    print(f"{len(missing)} runs to make; scenes are ready after {prepared:.0f} s", flush=True)
    if options.time_limit:
        options.time_limit -= prepared
    # Imports TensorFlow, which the processes that draw scenes do without.
    from experiments.segmentation.run import do

    do = functools.partial(do, settings=settings, folder=folder, output=options.output)
    jobs.run_all(missing, do, options, summary)


def missing_jobs(options: argparse.Namespace, settings: Settings) -> list[jobs.Job]:
    """Runs without a record, seed by seed, so that those that there are can be compared.

    Raises:
      UserError: there is a record of other settings.
    """
    asked = [
        jobs.Job(f"{arm}-{seed}", (arm, seed), record_file(options.output, arm, seed))
        for seed in options.seed
        for arm in options.arm
    ]
    kept = jobs.kept_records(options.output, settings._asdict())
    return [job for job in asked if job.record not in kept]


def summary(record: dict) -> str:
    iou, losses = 100 * record["mean_iou"][scenes.MIXED], record["loss"]
    return f"mean IoU {iou:.1f} %, loss {losses[0]:.3f} to {losses[-1]:.3f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    add = parser.add_argument
    seed = number(int, at_least=0, at_most=2**32 - 1)
    add("--arm", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    add("--seed", nargs="+", type=seed, default=[1, 2, 3], help="default: 1 2 3")
    count = number(int, at_least=1)
    jobs.add_job_options(parser)
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
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
