#!/usr/bin/env python3
"""Does every run of the study that is missing, several at a time.

    python -m experiments.study [--dataset mnist] [--arm 'offsets-*'] [--seed 1] [--jobs 8]

A finished run is a JSON file in the output folder, and is not done again. So a study that was
interrupted goes on when it is started again, and loses no more than the runs that were under way.
Runs that fail are told of in the end, and the exit status is 1. experiments/README.md tells more.
"""

import argparse
import functools

from experiments import datasets, jobs
from experiments.arms import ARMS, SHIFTS, Run, chosen
from experiments.run import add_run_options, do, record_file, settings_of, weights_of
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
        print(*(each.name for each in missing), sep="\n")
        return
    some_jobs = [job_of(each, options) for each in missing]
    jobs.run_all(some_jobs, functools.partial(do, options=options), options, summary)


def missing_runs(options: argparse.Namespace) -> list[Run]:
    """What is asked for and not kept yet, each after the run that it starts from.

    Raises:
      UserError: a run was done with other settings.
    """
    settings, missing = settings_of(options), {}
    for asked in chosen(options.dataset, options.arm, options.shift, options.seed):
        if jobs.is_finished(record_file(asked, options), settings):
            continue
        regular = asked.regular
        if regular and not (
            jobs.is_finished(record_file(regular, options), settings)
            and weights_of(regular, options).is_file()
        ):
            missing[regular] = None
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
