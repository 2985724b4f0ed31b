"""Processes that make runs, one after the other.

TensorFlow takes seconds to import and to set a GPU up, which a process for every run would pay for.
"""

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_REASON = 300  # characters
PATIENCE = 5  # seconds, for a process that was told to end

_spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork


def use_devices(threads: int | None = None) -> None:
    """Lets several processes share a GPU, and the processors, of which each takes `threads`.

    Must come before anything else is done in TensorFlow.
    """
    from utils.quiet_tensorflow import tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


class Worker:
    """One of the processes, which calls `do` with each task. Both must be picklable.

    What it and TensorFlow print goes to the file `log`.
    """

    def __init__(self, do: Callable[[Any], None], threads: int | None, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_work, args=(theirs, do, threads, log))
        self._process.start()
        theirs.close()

    def begin(self, task: Any) -> None:
        self._connection.send(task)

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


def _work(connection, do: Callable[[Any], None], threads: int | None, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    use_devices(threads)
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the parent has ended
            return
        connection.send(_reason_of_failure(do, task))


def _reason_of_failure(do: Callable[[Any], None], task: Any) -> str:
    """Makes a run. Returns "" if it is done."""
    from utils.quiet_tensorflow import keras

    try:
        do(task)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:LONGEST_REASON]
    finally:
        keras.backend.clear_session()
        gc.collect()
    return ""
