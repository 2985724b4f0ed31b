"""TensorFlow and Keras for the scripts, without the notices that TensorFlow writes at its start."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# What TensorFlow says at its start that a user of these scripts can do nothing about, by lines.
_NOTICES = [
    "WARNING: All log messages before absl::InitializeLog",
    r"I\d{4} ",  # for information
    "To enable the following instructions: ",
    # TensorFlow registers cuFFT, cuBLAS and the like twice.
    r".*(computation placer already registered|Unable to register cu\w+ factory)",
]
if not any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/dxg")):
    # Where there is no driver, there is no GPU to miss.
    _NOTICES.append(r"E\d{4} .*failed call to cuInit")


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Leaves the notices out of what C++ code writes to stderr meanwhile.

    Until TensorFlow has set its log up, no setting keeps it from writing them.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    read, write = os.pipe()
    # In a process of its own, so that what comes before a crash is written still. Ctrl-C is for the
    # other one alone.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    if (child := os.fork()) == 0:
        try:
            os.close(write)
            _copy_without_notices(read, stderr)
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(read)
    os.dup2(write, 2)
    os.close(write)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(child, 0)


def _copy_without_notices(read: int, write: int) -> None:
    notice = re.compile("|".join(_NOTICES))
    with os.fdopen(read, "rb") as lines:
        for line in lines:
            if not notice.match(line.decode(errors="replace")):
                os.write(write, line)


os.environ["KERAS_BACKEND"] = "tensorflow"
# To see all of it, set the variable yourself.
quiet = "TF_CPP_MIN_LOG_LEVEL" not in os.environ and "tensorflow" not in sys.modules and sys.stderr
if quiet:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # warnings and errors, once the log is set up
with _without_notices() if quiet else contextlib.nullcontext():
    import keras
    import tensorflow as tf

    if quiet:
        tf.config.list_physical_devices("GPU")  # which logs too

__all__ = ["keras", "tf"]
