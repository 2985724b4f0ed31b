#!/usr/bin/env python3
"""Finds the TensorFlow of a Python environment, without importing it.

    python scripts/find_tensorflow.py

Prints <version>=<folder of the package>, as CMakeLists.txt takes it, or says what is missing and
exits with status 1.
"""

import importlib.metadata
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 17)  # that the libraries can be built for


def find_tensorflow(minor_version: str | None = None) -> str | None:
    """The TensorFlow of the running Python's environment, as <version>=<folder>.

    Args:
      minor_version: only of this minor version, such as "2.20".

    Returns:
      None where there is none.
    """
    for folder in dict.fromkeys(_folders()):
        package = Path(folder, "tensorflow")
        if not package.joinpath("include").is_dir():
            continue
        for distribution in importlib.metadata.distributions(path=[folder]):
            # Its name may be tensorflow, tensorflow-cpu, tf-nightly and more.
            files = map(str, distribution.files or [])
            if not any(file.startswith("tensorflow/libtensorflow_framework") for file in files):
                continue
            if minor_version in (None, ".".join(distribution.version.split(".")[:2])):
                return f"{distribution.version}={package}"
    return None


def _folders() -> Iterator[str]:
    """Where packages are, the first first."""
    # While pip builds in an environment of its own, sys.path has that one's packages only, and the
    # folders of the user's environment must be asked for.
    yield from sys.path
    yield sysconfig.get_path("purelib")
    yield sysconfig.get_path("platlib")
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if not configuration.is_file():
        yield site.getusersitepackages()
    elif re.search(r"^include-system-site-packages *= *true", configuration.read_text(), re.M):
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        yield sysconfig.get_path("purelib", vars=base)
        yield site.getusersitepackages()


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
