"""A process that makes runs, several at a time, each in a thread.

TensorFlow takes seconds to import and to set a GPU up, which a process for every run would pay for.
Processes that share a GPU take turns on it, and the small steps of these runs leave most of it
idle. So each thread has a logical GPU, whose stream runs beside the others. On an H100, seven
threads ended a run every 4 seconds, and four processes every 14.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LONGEST_REASON = 300  # characters
PATIENCE = 5  # seconds, for a process that was told to end

_spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
_seeds = threading.Lock()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and TensorFlow; no other thread does so before this is left.

    What draws from them, as every new network does, must be in here.
    """
    from utils.quiet_tensorflow import keras

    with _seeds:
        keras.utils.set_random_seed(seed)
        yield


def use_devices(count: int = 1, gpu_memory: int = 0) -> list[str]:
    """Lets so many runs at a time use this machine. Returns the device of each.

    Must come before anything else is done in TensorFlow.

    Args:
      count: how many.
      gpu_memory: of each, if there are several, in MiB.
    """
    from utils.quiet_tensorflow import tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return ["CPU:0"] * count
    tf.config.set_visible_devices(gpus[:1], "GPU")
    if count == 1:
        tf.config.experimental.set_memory_growth(gpus[0], True)
        return ["GPU:0"]
    part = tf.config.LogicalDeviceConfiguration(memory_limit=gpu_memory)
    tf.config.set_logical_device_configuration(gpus[0], [part] * count)
    return [f"GPU:{index}" for index in range(count)]


class Outcome(NamedTuple):
    """The end of a run: its place, "" if it is done or else why it failed, and whether it or
    another run took the process with it.
    """

    place: int
    reason: str
    died: bool = False


class Workers:
    """The process; it is started when it is needed, and again if it has died.

    Args:
      do: makes the run of a task. It and the tasks must be picklable.
      count: how many runs it makes at a time, at most.
      gpu_memory: as `use_devices` takes it.
      log: a file for what the runs and TensorFlow print.
    """

    def __init__(self, do: Callable[[Any], None], count: int, gpu_memory: int, log: Path):
        self._arguments = do, count, gpu_memory, log
        self._process = None
        self._free, self._busy = list(range(count)), set()

    def begin(self, task: Any) -> int:
        """Begins a run. Returns its place among those at a time."""
        if self._process is None or not (self._busy or self._process.is_alive()):
            self._start()
        place = self._free.pop()
        self._busy.add(place)
        with contextlib.suppress(OSError):  # it has died, which `outcomes` tells
            self._connection.send((place, task))
        return place

    def outcomes(self) -> list[Outcome]:
        """Of the runs that have ended."""
        ended = {}
        try:
            while self._busy - ended.keys() and self._connection.poll():
                place, reason = self._connection.recv()
                ended[place] = Outcome(place, reason)
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            reason = f"the process of the runs under way ended with status {status}"
            ended |= {place: Outcome(place, reason, True) for place in self._busy - ended.keys()}
            self._process = None
        self._busy -= ended.keys()
        self._free += ended
        return list(ended.values())

    def end(self) -> None:
        """Ends the process, and the runs that are under way."""
        if self._process is None:
            return
        self._process.terminate()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        self._arguments[-1].parent.mkdir(parents=True, exist_ok=True)
        self._connection, theirs = _spawn.Pipe()
        process = _spawn.Process(target=_work, args=(theirs, *self._arguments))
        # Ctrl-C is for this process, which ends the other: that one never receives it. What tracks
        # its resources would let it through where it is started, so it is started before.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._process = process
        theirs.close()


def _work(connection, do: Callable[[Any], None], count: int, gpu_memory: int, log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # or what is printed last would not be written
    sending = threading.Lock()
    tasks = [queue.SimpleQueue() for _ in range(count)]

    def make_runs(place: int, device: str) -> None:
        try:
            while True:
                reason = _reason_of_failure(do, tasks[place].get(), device)
                with sending:
                    connection.send((place, reason))
        finally:
            os._exit(1)  # or the run's end would be waited for without end

    for place, device in enumerate(use_devices(count, gpu_memory)):
        threading.Thread(target=make_runs, args=(place, device), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            place, task = connection.recv()
            tasks[place].put(task)
    os._exit(0)  # without waiting for the runs


def _reason_of_failure(do: Callable[[Any], None], task: Any, device: str) -> str:
    """Makes a run. Returns "" if it is done."""
    from utils.quiet_tensorflow import tf

    try:
        with tf.device(device):
            do(task)
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be full
            traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:LONGEST_REASON]
    finally:
        gc.collect()  # networks refer to themselves
    return ""
