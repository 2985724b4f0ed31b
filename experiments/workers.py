"""Processes that do runs, one after the other.

TensorFlow takes seconds to import and to set a GPU up, which a process for every run would pay for.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

from utils.quiet_tensorflow import keras, quiet

from experiments.arms import Run
from experiments.run import do, use_devices

LONGEST_REASON = 300  # characters
PATIENCE = 5  # seconds, for a process that was told to end

_spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork


class Worker:
    """One of the processes. What it and TensorFlow print goes to a file."""

    def __init__(self, options: argparse.Namespace, threads: int | None, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_work, args=(theirs, options, threads, log))
        with _unchanged_log_level():
            self._process.start()
        theirs.close()

    def begin(self, asked: Run) -> None:
        self._connection.send(asked)

    def outcome(self) -> str | None:
        """None while the run is under way, "" once it is done, or else why it failed."""
        if not self._connection.poll():
            return None
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return f"its process ended with status {self._process.exitcode}"

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        """Ends the process, and the run that it may be at."""
        self._process.terminate()
        self._process.join(PATIENCE)
        if self.alive:
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _unchanged_log_level() -> Iterator[None]:
    """Lets a process that is started keep TensorFlow's notices to itself, as this one has done."""
    level = os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None) if quiet else None
    try:
        yield
    finally:
        if level is not None:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = level


def _work(connection, options: argparse.Namespace, threads: int | None, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the study, which ends this
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    use_devices(threads)
    while True:
        try:
            asked = connection.recv()
        except EOFError:  # the study has ended
            return
        connection.send(_reason_of_failure(asked, options))


def _reason_of_failure(asked: Run, options: argparse.Namespace) -> str:
    """Does a run. Returns "" if it is done."""
    try:
        do(asked, options)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:LONGEST_REASON]
    finally:
        keras.backend.clear_session()
        gc.collect()
    return ""
