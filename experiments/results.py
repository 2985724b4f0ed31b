"""What the experiments keep of a run: a JSON file, with the machine, the date and versions."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from utils.quiet_tensorflow import keras, tf

import numpy as np

import deform_conv
from benchmarks.report import driver_version, processor_name, today
from utils.cli import UserError, reading
from utils.files import write_file


def environment() -> dict:
    """The machine, the date and the versions, of which a record tells."""
    try:
        from cv2 import __version__ as opencv
    except ImportError:  # not all experiments need it
        opencv = None
    return {
        "gpu": _gpu(),
        "processor": processor_name(),
        "processors": len(os.sched_getaffinity(0)),
        "date": today(),
        "versions": {
            "Python": platform.python_version(),
            "TensorFlow": tf.__version__,
            "Keras": keras.__version__,
            "deform_conv": deform_conv.__version__,
            "NumPy": np.__version__,
            "OpenCV": opencv,
        },
    }


def _gpu() -> str | None:
    """Name of the first GPU that TensorFlow sees, and driver where that is known; or None."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return None
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "unknown GPU")
    try:
        return f"{name}, driver {driver_version()}"
    except (OSError, subprocess.CalledProcessError, IndexError):  # there is no nvidia-smi
        return name


def write(path: Path, record: dict) -> None:
    """Writes a record as JSON, whole or not at all.

    Raises:
      UserError: it cannot be written.
      ValueError: a number in it is NaN or infinite, which JSON has no words for.
    """
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(Path(path), (text + "\n").encode())


def read(folder: Path) -> list[dict]:
    """The records of all JSON files in a folder, by the order of their names.

    Raises:
      UserError: a file holds no JSON.
    """
    records = []
    for path in sorted(Path(folder).glob("*.json")):
        with reading(f"{path} is no record of an experiment"):
            records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def check_alike(records: Iterable[dict], what: str, told: Callable[[dict], Any]) -> None:
    """Checks that records, which a table has beside each other, tell the same of something.

    Raises:
      UserError: they do not.
    """
    values = {json.dumps(told(record), sort_keys=True) for record in records}
    if len(values) > 1:
        raise UserError(f"records with different {what} make no table: {'; '.join(sorted(values))}")


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and the sample standard deviation, which is 0 for one value."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
