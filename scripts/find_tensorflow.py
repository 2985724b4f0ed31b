#!/usr/bin/env python3
"""Finds the TensorFlow of a Python environment, without importing it.

    python scripts/find_tensorflow.py

Prints <version>=<folder of the package>, as CMakeLists.txt takes it, or says what is missing and
exits with status 1.
"""

import importlib.metadata
import sys
import sysconfig
from pathlib import Path

OLDEST, NEWEST = (2, 17), (2, 21)  # that the libraries were built and tested with


def find_tensorflow(minor_version: str | None = None) -> str | None:
    """The TensorFlow of the running Python's environment, as <version>=<folder>.

    Args:
      minor_version: only of this minor version, such as "2.20".

    Returns:
      None where there is none.
    """
    # While pip builds in an environment of its own, sys.path has that one's packages only, and
    # sysconfig still has the user's folders.
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in dict.fromkeys(folders):
        package = Path(folder, "tensorflow")
        if not package.joinpath("include").is_dir():
            continue
        for distribution in importlib.metadata.distributions(path=[folder]):
            # tensorflow, tensorflow-cpu, tf-nightly
            name = distribution.metadata["Name"].lower().replace("_", "-")
            if name not in ("tensorflow", "tf-nightly") and not name.startswith("tensorflow-"):
                continue
            # Not one that only depends on it, or has plugins for it.
            files = distribution.files or []
            if not any(
                str(file).startswith("tensorflow/libtensorflow_framework") for file in files
            ):
                continue
            if minor_version in (None, ".".join(distribution.version.split(".")[:2])):
                return f"{distribution.version}={package}"
    return None


def check_version(tensorflow: str) -> str | None:
    """Why the libraries cannot be built for a TensorFlow, given as <version>=<folder>."""
    version = tensorflow.partition("=")[0]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"TensorFlow {OLDEST[0]}.{OLDEST[1]} or newer is needed, and this is {version}"
    return None


def main() -> None:
    found = find_tensorflow()
    if not found:
        sys.exit(f"no TensorFlow in the environment of {sys.executable}")
    if problem := check_version(found):
        sys.exit(problem)
    print(found)


if __name__ == "__main__":
    main()
