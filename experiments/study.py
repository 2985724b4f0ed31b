#!/usr/bin/env python3
"""Does every run of the study that is missing, each in a process of its own.

    python -m experiments.study [--dataset mnist] [--arm 'offsets-*'] [--seed 1] [--jobs 8]

A finished run is a JSON file in the output folder, and is not done again. So a study that was
interrupted goes on when it is started again, and loses no more than the runs that were under way.
Runs that fail are told of in the end, and the exit status is 1. experiments/README.md tells more.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments import datasets
from experiments.arms import ARMS, SHIFTS, Run, chosen
from experiments.run import add_run_options, record_file, settings_of, weights_of
from utils.cli import PROJECT, UserError, number, reading, run
from utils.files import locked

POLL_SECONDS = 0.1
LAST_WORDS = 300  # characters of what a failed run wrote


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
        self._under_way: dict[Run, tuple[subprocess.Popen, float]] = {}  # and when it began
        self._begun = time.monotonic()
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
            self._under_way[asked] = (self._start(asked), time.monotonic())
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

    def _start(self, asked: Run) -> subprocess.Popen:
        options = self._options
        command = [sys.executable, "-m", "experiments.run", asked.name]
        command += ["--output", options.output, "--cache", options.cache]
        command += ["--fashion-mnist", options.fashion_mnist.absolute()]
        for name, value in settings_of(options).items():
            if value is not None:
                command += [f"--{name.replace('_', '-')}", value]
        if options.jit_compile:
            command.append("--jit-compile")
        environment = dict(os.environ)
        if options.jobs > 1:
            processors = len(os.sched_getaffinity(0))
            environment["OMP_NUM_THREADS"] = str(max(2, processors // options.jobs))
        self._log(asked).parent.mkdir(parents=True, exist_ok=True)
        with self._log(asked).open("wb") as log:
            return subprocess.Popen(
                list(map(str, command)), cwd=PROJECT, env=environment, stdout=log, stderr=log
            )

    def _log(self, asked: Run) -> Path:
        return self._options.cache / "logs" / f"{asked.name}.log"

    def _collect(self) -> None:
        """Takes account of the runs that have ended."""
        for asked, (process, begun) in list(self._under_way.items()):
            if process.poll() is None:
                continue
            del self._under_way[asked]
            seconds = time.monotonic() - begun
            path = record_file(asked, self._options)
            if process.returncode == 0 and path.is_file():
                self.done += 1
                usual = seconds / ARMS[asked.arm].recipe.times_epochs
                self._longest = max(self._longest, usual)
                self._tell(asked, f"{_summary(path)}, {seconds:.0f} s")
            else:
                words = self._log(asked).read_text(errors="replace").strip()[-LAST_WORDS:]
                self.failed[asked.name] = words
                self._tell(asked, f"failed with status {process.returncode}: {words}")

    def _tell(self, asked: Run, text: str) -> None:
        print(f"[{self.done + len(self.failed)}/{self._count}] {asked.name}: {text}", flush=True)

    def _end_all(self) -> None:
        for asked, (process, _) in self._under_way.items():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait()
            self.pending.append(asked)
        self._under_way.clear()


def _summary(path: Path) -> str:
    record = json.loads(path.read_text(encoding="utf-8"))
    test = record["accuracy"]["test"]
    return ", ".join(f"{name} {percent:.2f} %" for name, percent in test.items())


if __name__ == "__main__":
    run(main)
