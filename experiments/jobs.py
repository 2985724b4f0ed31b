"""Runs of an experiment that are missing, each in a process of its own, several at a time."""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from utils.cli import PROJECT, UserError, number, reading
from utils.files import locked

POLL_SECONDS = 0.1
LAST_WORDS = 300  # characters of what a failed run wrote


class Job(NamedTuple):
    """A run to be made.

    `arguments` are those of Python, and `record` is the file that the run writes at its end. It
    starts after the run named `after`, if that is to be made too, has ended. `length` is the time
    that it takes, as a multiple of other runs'.
    """

    name: str
    arguments: tuple
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
    jobs: Iterable[Job], options: argparse.Namespace, summary: Callable[[dict], str]
) -> None:
    """Makes runs, and tells how they end.

    Args:
      jobs: what to make, each after the one that it starts from.
      options: those of `add_job_options`, and `cache`, a folder for a lock and for what runs print.
      summary: a few words about a record.

    Raises:
      UserError: runs failed, or another process makes some with the same cache.
    """
    taken = f"another process makes runs with {options.cache}"
    with locked(options.cache / "jobs.lock", taken):
        jobs = Jobs(jobs, options, summary)
        jobs.work()
    print(f"{jobs.done} runs done, {len(jobs.pending)} left")
    if jobs.failed:
        raise UserError(f"{len(jobs.failed)} runs failed: {', '.join(jobs.failed)}")


def share_machine() -> None:
    """Leaves to the other runs their part of the GPU's memory and of the processors."""
    from utils.quiet_tensorflow import tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # where several runs share the processors
        tf.config.threading.set_intra_op_parallelism_threads(int(threads))
        tf.config.threading.set_inter_op_parallelism_threads(int(threads))


class Jobs:
    """Runs that wait, are under way, are done, or failed."""

    def __init__(
        self, jobs: Iterable[Job], options: argparse.Namespace, summary: Callable[[dict], str]
    ):
        self.pending = list(jobs)
        self.done = 0
        self.failed: dict[str, str] = {}  # by the run's name, why
        self._options, self._summary, self._count = options, summary, len(self.pending)
        self._under_way: dict[Job, tuple[subprocess.Popen, float]] = {}  # and when it began
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
        room = self._options.jobs - len(self._under_way)
        starting = list(itertools.islice(filter(self._has_time, ready), max(room, 0)))
        for job in starting:
            self.pending.remove(job)
            self._under_way[job] = (self._start(job), time.monotonic())
        return bool(starting)

    def _is_ready(self, job: Job) -> bool:
        """Whether the run that it starts from, if there is one, is done or has failed."""
        return job.after not in {other.name for other in (*self.pending, *self._under_way)}

    def _has_time(self, job: Job) -> bool:
        if self._options.time_limit is None:
            return True
        return self._elapsed() + self._longest * job.length < self._options.time_limit

    def _start(self, job: Job) -> subprocess.Popen:
        environment = dict(os.environ)
        if self._options.jobs > 1:
            processors = len(os.sched_getaffinity(0))
            environment["OMP_NUM_THREADS"] = str(max(2, processors // self._options.jobs))
        self._log(job).parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *map(str, job.arguments)]
        with self._log(job).open("wb") as log:
            return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)

    def _log(self, job: Job) -> Path:
        return self._options.cache / "logs" / f"{job.name}.log"

    def _collect(self) -> None:
        """Takes account of the runs that have ended."""
        for job, (process, begun) in list(self._under_way.items()):
            if process.poll() is None:
                continue
            del self._under_way[job]
            seconds = time.monotonic() - begun
            if process.returncode == 0 and job.record.is_file():
                self.done += 1
                self._longest = max(self._longest, seconds / job.length)
                record = json.loads(job.record.read_text(encoding="utf-8"))
                self._tell(job, f"{self._summary(record)}, {seconds:.0f} s")
            else:
                words = self._log(job).read_text(errors="replace").strip()[-LAST_WORDS:]
                self.failed[job.name] = words
                self._tell(job, f"failed with status {process.returncode}: {words}")

    def _tell(self, job: Job, text: str) -> None:
        print(f"[{self.done + len(self.failed)}/{self._count}] {job.name}: {text}", flush=True)

    def _end_all(self) -> None:
        for job, (process, _) in self._under_way.items():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait()
            self.pending.append(job)
        self._under_way.clear()
