"""What pip and other front ends call to build the package: scikit-build-core, told for what.

A wheel is built for the TensorFlow of the environment that it is installed into. An environment
variable names another minor version, or that one where the front end hides it, as uv does:

    DEFORM_CONV_TENSORFLOW=2.20 uv pip install .

An editable installation is built as in a checkout, by compile.sh, which tells of its options.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

from find_tensorflow import check_version, find_tensorflow
from scikit_build_core import build as _scikit_build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

VARIABLE = "DEFORM_CONV_TENSORFLOW"
DEFINITION = "cmake.define.TENSORFLOWS"
# compile.sh runs CMake, and its libraries stay where they are.
EDITABLE = {"wheel.cmake": "false"}


def get_requires_for_build_wheel(config_settings=None):
    return _scikit_build.get_requires_for_build_wheel(config_settings) + _requires(config_settings)


def get_requires_for_build_editable(config_settings=None):
    # As for a wheel: CMake and Ninja where there are none.
    return get_requires_for_build_wheel(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    settings = {
        DEFINITION: None if config_settings and DEFINITION in config_settings else _tensorflow(),
        "cmake.define.DEFORM_CONV_CUDA_ARCHS": os.environ.get("CUDA_ARCHS"),
    }
    settings = {name: value for name, value in settings.items() if value}
    return _scikit_build.build_wheel(
        wheel_directory, settings | (config_settings or {}), metadata_directory
    )


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return _scikit_build.prepare_metadata_for_build_editable(
        metadata_directory, EDITABLE | (config_settings or {})
    )


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _tensorflow()
    project = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([project / "compile.sh"], env=environment, check=True)
    return _scikit_build.build_editable(
        wheel_directory, EDITABLE | (config_settings or {}), metadata_directory
    )


def _requires(config_settings) -> list[str]:
    """The TensorFlow that is asked for, where the environment does not have it."""
    version = os.environ.get(VARIABLE)
    given = config_settings and DEFINITION in config_settings
    if not version or given or find_tensorflow(version):
        return []
    package = "tensorflow-cpu" if platform.machine() == "x86_64" else "tensorflow"
    return [f"{package}=={version}.*"]  # what is built fits every TensorFlow of that version


def _tensorflow() -> str:
    """The TensorFlow to build for. Ends the build with one line where there is none."""
    version = os.environ.get(VARIABLE)
    found = find_tensorflow(version)
    if not found:
        name = f"TensorFlow {version}" if version else "TensorFlow"
        raise SystemExit(
            f"error: no {name} in the environment of {sys.executable}. Install "
            f"TensorFlow first, or name the version to build for, such as {VARIABLE}=2.20"
        )
    if problem := check_version(found):
        raise SystemExit(f"error: {problem}")
    return found
