"""Runs of an experiment that are missing, several at a time."""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.workers import Worker
from utils.cli import UserError, number, reading
from utils.files import locked

POLL_SECONDS = 0.1
LEAST_THREADS = 2  # of a process: one waits for the GPU


class Job(NamedTuple):
    """A run to be made.

    `task` is what a worker's `do` is given; at its end, it writes the file `record`. The run starts
    after the one named `after`, if that is to be made too, has ended. `length` is the time that it
    takes, as a multiple of other runs'.
    """

    name: str
    task: Any
    record: Path
    after: str | None = None
    length: float = 1.0


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `run_all` takes."""
    add = parser.add_argument
    add("--jobs", type=number(int, at_least=1), default=1, help="runs at a time (default: 1)")
    add(
        "--time-limit",
        type=number(float, above=0),
        help="seconds; starts no run that may take longer, and ends those that do",
    )


def is_finished(record: Path, settings: dict) -> bool:
    """Whether a run has left its record.

    Raises:
      UserError: with other settings, or the file is no record.
    """
    if not record.is_file():
        return False
    with reading(f"{record} is no record of a run"):
        kept = json.loads(record.read_text(encoding="utf-8"))["settings"]
    if kept != settings:
        raise UserError(
            f"{record} was made with other settings, {kept}; these are {settings}. "
            "Use those, or another --output"
        )
    return True


def run_all(
    some_jobs: Iterable[Job],
    do: Callable[[Any], None],
    options: argparse.Namespace,
    summary: Callable[[dict], str],
) -> None:
    """Makes runs, and tells how they end.

    Args:
      some_jobs: what to make, each after the one that it starts from.
      do: makes the run of a task, in another process.
      options: those of `add_job_options`, and `cache`, a folder for a lock and for what runs print.
      summary: a few words about a record.

    Raises:
      UserError: runs failed, or another process makes some with the same cache.
    """
    taken = f"other runs are under way with {options.cache}"
    with locked(options.cache / "jobs.lock", taken):
        jobs = Jobs(some_jobs, do, options, summary)
        jobs.work()
    print(f"{jobs.done} runs done, {len(jobs.pending)} left")
    if jobs.failed:
        raise UserError(f"{len(jobs.failed)} runs failed: {', '.join(jobs.failed)}")


class Jobs:
    """Runs that wait, are under way, are done, or failed. Arguments are as in `run_all`."""

    def __init__(
        self,
        jobs: Iterable[Job],
        do: Callable[[Any], None],
        options: argparse.Namespace,
        summary: Callable[[dict], str],
    ):
        self.pending = list(jobs)
        self.done = 0
        self.failed: dict[str, str] = {}  # by the run's name, why
        self._do, self._options, self._summary = do, options, summary
        self._count = len(self.pending)
        self._under_way: dict[Job, tuple[Worker, float]] = {}  # and when it began
        self._idle: list[Worker] = []
        self._begun = time.monotonic()
        self._workers_made = 0
        self._longest = 0.0  # seconds, of a run of length 1

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
        ready = [job for job in self.pending if self._is_ready(job)]
        room = self._options.jobs - len(self._under_way)
        starting = list(itertools.islice(filter(self._has_time, ready), max(room, 0)))
        for job in starting:
            self.pending.remove(job)
            worker = self._idle.pop() if self._idle else self._new_worker()
            worker.begin(job.task)
            self._under_way[job] = (worker, time.monotonic())
        return bool(starting)

    def _is_ready(self, job: Job) -> bool:
        """Whether the run that it starts from, if there is one, is done or has failed."""
        return job.after not in {other.name for other in (*self.pending, *self._under_way)}

    def _has_time(self, job: Job) -> bool:
        if self._options.time_limit is None:
            return True
        return self._elapsed() + self._longest * job.length < self._options.time_limit

    def _new_worker(self) -> Worker:
        options, threads = self._options, None
        if options.jobs > 1:
            threads = max(LEAST_THREADS, len(os.sched_getaffinity(0)) // options.jobs)
        self._workers_made += 1
        log = options.cache / "logs" / f"worker{self._workers_made}.log"
        return Worker(self._do, threads, log)

    def _collect(self) -> None:
        """Takes account of the runs that have ended."""
        for job, (worker, begun) in list(self._under_way.items()):
            reason = worker.outcome()
            if reason is None:
                continue
            del self._under_way[job]
            if worker.alive:
                self._idle.append(worker)
            if reason:
                self.failed[job.name] = reason
                self._tell(job, f"failed: {reason}")
                continue
            seconds = time.monotonic() - begun
            self.done += 1
            self._longest = max(self._longest, seconds / job.length)
            record = json.loads(job.record.read_text(encoding="utf-8"))
            self._tell(job, f"{self._summary(record)}, {seconds:.0f} s")

    def _tell(self, job: Job, text: str) -> None:
        print(f"[{self.done + len(self.failed)}/{self._count}] {job.name}: {text}", flush=True)

    def _end_all(self) -> None:
        for worker in (*self._idle, *(worker for worker, _ in self._under_way.values())):
            worker.end()
        self.pending += self._under_way
        self._under_way.clear()
