#!/usr/bin/env python3
"""Does every run of the study that is missing, several at a time.

    python -m experiments.study [--dataset mnist] [--arm 'offsets-*'] [--seed 1] [--jobs 8]

A finished run is a JSON file in the output folder, and is not done again. So a study that was
interrupted goes on when it is started again, and loses no more than the runs that were under way.
Runs that fail are told of in the end, and the exit status is 1. experiments/README.md tells more.
"""

import argparse
import itertools
import json
import os
import time
from pathlib import Path

from experiments import datasets
from experiments.arms import ARMS, SHIFTS, Run, chosen
from experiments.run import add_run_options, record_file, settings_of, weights_of
from experiments.workers import Worker
from utils.cli import UserError, number, reading, run
from utils.files import locked

POLL_SECONDS = 0.1
LEAST_THREADS = 2  # of a process: one waits for the GPU


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", action="append", default=[], choices=datasets.DATASETS, help="of these only")
    add("--arm", action="append", default=[], help="of these only; names or patterns such as 'r*'")
    add("--shift", action="append", default=[], type=float, choices=SHIFTS, help="of these only")
    add("--seed", action="append", default=[], type=number(int, at_least=0), help="of these only")
    add("--jobs", type=number(int, at_least=1), default=1, help="runs at a time (default: 1)")
    add(
        "--time-limit",
        type=number(float, above=0),
        help="seconds; starts no run that may take longer, and ends those that do",
    )
    add("--list", action="store_true", help="print what is missing, and do nothing")
    add_run_options(parser)
    options = parser.parse_args()
    options.output, options.cache = options.output.absolute(), options.cache.absolute()

    missing = missing_runs(options)
    if options.list:
        print(*(each.name for each in missing), sep="\n")
        return
    lock = options.cache / "study.lock"
    with locked(lock, f"another study is under way with {options.cache}"):
        study = Study(missing, options)
        study.work()
    print(f"{study.done} runs done, {len(study.pending)} left")
    if study.failed:
        raise UserError(f"{len(study.failed)} runs failed: {', '.join(study.failed)}")


def missing_runs(options: argparse.Namespace) -> list[Run]:
    """What is asked for and not kept yet, each after the run that it starts from.

    Raises:
      UserError: a run was done with other settings.
    """
    missing = {}
    for asked in chosen(options.dataset, options.arm, options.shift, options.seed):
        if _finished(asked, options):
            continue
        regular = asked.regular
        if regular and not (_finished(regular, options) and weights_of(regular, options).is_file()):
            missing[regular] = None
        missing[asked] = None
    return list(missing)


def _finished(asked: Run, options: argparse.Namespace) -> bool:
    path = record_file(asked, options)
    if not path.is_file():
        return False
    with reading(f"{path} is no record of a run"):
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if settings != settings_of(options):
        raise UserError(
            f"{path} was made with other settings, {settings}; these are {settings_of(options)}. "
            "Use those, or another --output"
        )
    return True


class Study:
    """Runs that wait, are under way, are done, or failed."""

    def __init__(self, runs: list[Run], options: argparse.Namespace):
        self.pending = list(runs)
        self.done = 0
        self.failed: dict[str, str] = {}  # by the run's name, why
        self._options, self._count = options, len(runs)
        self._under_way: dict[Run, tuple[Worker, float]] = {}  # and when it began
        self._idle: list[Worker] = []
        self._begun = time.monotonic()
        self._workers_made = 0
        self._longest = 0.0  # seconds, of runs with the usual number of epochs

    def work(self) -> None:
        """Does all runs, as far as the time limit allows."""
        try:
            while self._start_some() or self._under_way:
                if self._elapsed() >= (self._options.time_limit or float("inf")):
                    return
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            self._end_all()

    def _elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _start_some(self) -> bool:
        """Starts what there is room for; returns whether any run was started."""
        ready = [asked for asked in self.pending if self._is_ready(asked)]
        room = self._options.jobs - len(self._under_way)
        starting = list(itertools.islice(filter(self._has_time, ready), max(room, 0)))
        for asked in starting:
            self.pending.remove(asked)
            worker = self._idle.pop() if self._idle else self._new_worker()
            worker.begin(asked)
            self._under_way[asked] = (worker, time.monotonic())
        return bool(starting)

    def _is_ready(self, asked: Run) -> bool:
        """Whether the run that it starts from, if there is one, is done or has failed."""
        regular = asked.regular
        return regular not in self.pending and regular not in self._under_way

    def _has_time(self, asked: Run) -> bool:
        if self._options.time_limit is None:
            return True
        expected = self._longest * ARMS[asked.arm].recipe.times_epochs
        return self._elapsed() + expected < self._options.time_limit

    def _new_worker(self) -> Worker:
        options, threads = self._options, None
        if options.jobs > 1:
            threads = max(LEAST_THREADS, len(os.sched_getaffinity(0)) // options.jobs)
        self._workers_made += 1
        log = options.cache / "logs" / f"worker{self._workers_made}.log"
        return Worker(options, threads, log)

    def _collect(self) -> None:
        """Takes account of the runs that have ended."""
        for asked, (worker, begun) in list(self._under_way.items()):
            reason = worker.outcome()
            if reason is None:
                continue
            del self._under_way[asked]
            if worker.alive:
                self._idle.append(worker)
            if reason:
                self.failed[asked.name] = reason
                self._tell(asked, f"failed: {reason}")
                continue
            seconds = time.monotonic() - begun
            self.done += 1
            self._longest = max(self._longest, seconds / ARMS[asked.arm].recipe.times_epochs)
            self._tell(asked, f"{_summary(record_file(asked, self._options))}, {seconds:.0f} s")

    def _tell(self, asked: Run, text: str) -> None:
        print(f"[{self.done + len(self.failed)}/{self._count}] {asked.name}: {text}", flush=True)

    def _end_all(self) -> None:
        for worker in (*self._idle, *(worker for worker, _ in self._under_way.values())):
            worker.end()
        self.pending += self._under_way
        self._under_way.clear()


def _summary(path: Path) -> str:
    record = json.loads(path.read_text(encoding="utf-8"))
    test = record["accuracy"]["test"]
    return ", ".join(f"{name} {percent:.2f} %" for name, percent in test.items())


if __name__ == "__main__":
    run(main)
