"""Processes side by side, of which each makes one run of an experiment."""

import os
import subprocess
import time
from collections.abc import Sequence

# Of several processes on a GPU, none may take all its memory.
_ENVIRONMENT = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}


def run_all(
    commands: dict[str, Sequence[str]], jobs: int, time_limit: float | None = None
) -> tuple[list[str], list[str]]:
    """Runs commands, in their order, `jobs` at a time. Returns the names of those that failed, and
    of those that the time did not suffice for.

    After a failure, the others run on. When the time is over, those that run are ended.

    Args:
      commands: arguments of a process, by the name of the run.
      jobs: the number of processes at a time.
      time_limit: for all together, in seconds.
    """
    ends = time.monotonic() + time_limit if time_limit else float("inf")
    waiting, running, failed, cut = list(commands), {}, [], []
    try:
        while waiting or running:
            if time.monotonic() >= ends:
                return failed, [*running, *waiting]
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = subprocess.Popen(commands[name], env=os.environ | _ENVIRONMENT)
            time.sleep(0.1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        failed.append(name)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed, cut
