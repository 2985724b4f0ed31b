"""Runs of an experiment that are missing, several at a time."""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.workers import Workers
from utils.cli import UserError, number, reading
from utils.files import locked

POLL_SECONDS = 0.1


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
        "--gpu-memory",
        type=number(int, at_least=1),
        default=6500,
        metavar="MIB",
        help="of a run, where several share a GPU (default: %(default)s)",
    )
    add(
        "--time-limit",
        type=number(float, above=0),
        help="seconds; starts no run that may take longer, and ends those that do",
    )


def kept_records(folder: Path, settings: dict) -> dict[Path, dict]:
    """The records that runs have left in a folder, by their files.

    Raises:
      UserError: one was made with other settings, or is no record.
    """
    kept = {}
    for path in sorted(folder.glob("*.json")):
        with reading(f"{path} is no record of a run"):
            kept[path] = json.loads(path.read_text(encoding="utf-8"))
            others = kept[path]["settings"]
        if others != settings:
            raise UserError(
                f"{path} was made with other settings, {others}; these are {settings}. "
                "Use those, or another --output"
            )
    return kept


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
        names = ", ".join(jobs.failed)
        raise UserError(
            f"{len(jobs.failed)} runs failed: {names}. {jobs.log} has what they printed"
        )


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
        self.log = options.cache / "logs" / "runs.log"
        self._options, self._summary = options, summary
        self._count = len(self.pending)
        self._workers = Workers(do, options.jobs, options.gpu_memory, self.log)
        # Names of runs that were under way together when the process died. Each is made once more,
        # by itself, which tells the one that ended it from the others.
        self._suspects: set[str] = set()
        self._under_way: dict[int, tuple[Job, float]] = {}  # by its place, and when it began
        self._begun = time.monotonic()
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
        most = self._options.jobs
        under_way = [job for job, _ in self._under_way.values()]
        if any(job.name in self._suspects for job in (*ready, *under_way)):
            ready, most = [job for job in ready if job.name in self._suspects], 1
        room = most - len(under_way)
        starting = list(itertools.islice(filter(self._has_time, ready), max(room, 0)))
        for job in starting:
            self.pending.remove(job)
            self._under_way[self._workers.begin(job.task)] = (job, time.monotonic())
        return bool(starting)

    def _is_ready(self, job: Job) -> bool:
        """Whether the run that it starts from, if there is one, is done or has failed."""
        under_way = (other for other, _ in self._under_way.values())
        return job.after not in {other.name for other in (*self.pending, *under_way)}

    def _has_time(self, job: Job) -> bool:
        if self._options.time_limit is None:
            return True
        return self._elapsed() + self._longest * job.length < self._options.time_limit

    def _collect(self) -> None:
        """Takes account of the runs that have ended."""
        outcomes = self._workers.outcomes()
        together = sum(outcome.died for outcome in outcomes) > 1
        for place, reason, died in outcomes:
            job, begun = self._under_way.pop(place)
            if died and together:
                self.pending.insert(0, job)
                self._suspects.add(job.name)
                print(f"{job.name}: {reason}; it is made again by itself", flush=True)
                continue
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
        self._workers.end()
        self.pending += (job for job, _ in self._under_way.values())
        self._under_way.clear()
