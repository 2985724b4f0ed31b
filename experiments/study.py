#!/usr/bin/env python3
"""Does every run of the study that is missing, several at a time.

    python -m experiments.study [--dataset mnist] [--arm 'offsets-*'] [--seed 1] [--jobs 8]

A finished run is a JSON file in the output folder, and is not done again. So a study that was
interrupted goes on when it is started again, and loses no more than the runs that were under way.
If a missing run starts from weights that are not in the cache, the run that left them is done
again, and so is all that is asked for and starts from them. Runs that fail are told of in the end,
and the exit status is 1. experiments/README.md tells more.
"""

import argparse
import functools

from experiments import datasets, jobs
from experiments.arms import ARMS, SHIFTS, Run, chosen
from experiments.run import add_run_options, do, record_file, settings_of, weights_file
from utils.cli import number, run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", action="append", default=[], choices=datasets.DATASETS, help="of these only")
    add("--arm", action="append", default=[], help="of these only; names or patterns such as 'r*'")
    add("--shift", action="append", default=[], type=float, choices=SHIFTS, help="of these only")
    add("--seed", action="append", default=[], type=number(int, at_least=0), help="of these only")
    add("--list", action="store_true", help="print what is missing, and do nothing")
    jobs.add_job_options(parser)
    add_run_options(parser)
    options = parser.parse_args()
    options.output, options.cache = options.output.absolute(), options.cache.absolute()

    missing = missing_runs(options)
    if options.list:
        for each in missing:
            print(each.name)
        return
    some_jobs = [job_of(each, options) for each in missing]
    jobs.run_all(some_jobs, functools.partial(do, options=options), options, summary)


def missing_runs(options: argparse.Namespace) -> list[Run]:
    """What is asked for and not kept yet, each after the run that it starts from.

    Raises:
      UserError: a run was done with other settings.
    """
    kept = jobs.kept_records(options.output, settings_of(options))
    records = {path.stem: record for path, record in kept.items()}

    def is_finished(asked: Run) -> bool:
        record = records.get(asked.name)
        if record is None or asked.regular is None:
            return record is not None
        # From which weights it started is compared as far as it is known.
        weights = records.get(asked.regular.name, {}).get("weights")
        return weights in (None, record["starts_from"])

    def has_left_weights(regular: Run) -> bool:
        digest = records.get(regular.name, {}).get("weights")
        return digest is not None and weights_file(regular, digest, options).is_file()

    asked_for = chosen(options.dataset, options.arm, options.shift, options.seed)
    needed = {asked.regular for asked in asked_for if asked.regular and not is_finished(asked)}
    again = {regular for regular in needed if not has_left_weights(regular)}
    missing = {}  # a set in its order
    for asked in asked_for:
        if asked.regular in again:
            missing[asked.regular] = None
        if asked.regular in again or not is_finished(asked):
            missing[asked] = None
    return list(missing)


def job_of(asked: Run, options: argparse.Namespace) -> jobs.Job:
    after = asked.regular and asked.regular.name
    length = ARMS[asked.arm].recipe.times_epochs
    return jobs.Job(asked.name, asked, record_file(asked, options), after, length)


def summary(record: dict) -> str:
    test = record["accuracy"]["test"]
    return ", ".join(f"{name} {percent:.2f} %" for name, percent in test.items())


if __name__ == "__main__":
    run(main)
