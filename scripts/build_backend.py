"""What pip and other front ends call to build the package: scikit-build-core, told for what.

A wheel is built for the TensorFlow of the environment that it is installed into. An environment
variable names another minor version, or that one where the front end hides it, as uv does:

    DEFORM_CONV_TENSORFLOW=2.20 uv pip install .

Where nothing can be compiled, there is a wheel of the Python alone, for portable mode:

    pip install -C wheel.cmake=false .

An editable installation is built as in a checkout, by compile.sh, which tells of its options.
"""

import os
import platform
import re
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
PYTHON_ALONE = {"wheel.cmake": "false"}
# compile.sh runs CMake, and its libraries stay where they are.
EDITABLE = PYTHON_ALONE


def get_requires_for_build_wheel(config_settings=None):
    return _scikit_build.get_requires_for_build_wheel(config_settings) + _requires(config_settings)


def get_requires_for_build_editable(config_settings=None):
    # As for a wheel: CMake and Ninja where there are none.
    return get_requires_for_build_wheel(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    if PYTHON_ALONE.items() <= (config_settings or {}).items():
        return _scikit_build.build_wheel(wheel_directory, config_settings, metadata_directory)
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
    options = [_option_of_compile_sh(*setting) for setting in (config_settings or {}).items()]
    project = Path(__file__).resolve().parent.parent
    command = [project / "compile.sh", *filter(None, options)]
    subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, check=True)
    return _scikit_build.build_editable(
        wheel_directory, EDITABLE | (config_settings or {}), metadata_directory
    )


def _option_of_compile_sh(name: str, value: str) -> str | None:
    """What a setting of CMake is to compile.sh. Settings of others are None."""
    options = {
        ("cmake.define.DEFORM_CONV_CUDA", "OFF"): "--cpu-only",
        ("cmake.define.DEFORM_CONV_XLA", "OFF"): "--no-xla",
    }
    if not name.startswith("cmake."):
        return None
    if (name, value) not in options:
        allowed = ", ".join("=".join(option) for option in options)
        raise SystemExit(
            f"error: an editable installation takes {allowed} of CMake's settings; got "
            f"{name}={value}"
        )
    return options[name, value]


def _requires(config_settings) -> list[str]:
    """The TensorFlow that is asked for, where the environment does not have it."""
    version = _asked_for()
    given = config_settings and DEFINITION in config_settings
    if not version or given or find_tensorflow(version):
        return []
    package = "tensorflow-cpu" if platform.machine() == "x86_64" else "tensorflow"
    return [f"{package}=={version}.*"]  # what is built fits every TensorFlow of that version


def _asked_for() -> str | None:
    """The minor version that the environment variable names."""
    version = os.environ.get(VARIABLE)
    if version and not (re.fullmatch(r"\d+\.\d+", version) and not check_version(version)):
        raise SystemExit(
            f"error: {VARIABLE} must be a minor version from 2.17 on, such as 2.20; got {version}"
        )
    return version or None


def _tensorflow() -> str:
    """The TensorFlow to build for. Ends the build with one line where there is none."""
    version = _asked_for()
    found = find_tensorflow(version)
    if not found:
        name = f"TensorFlow {version}" if version else "TensorFlow"
        raise SystemExit(
            f"error: no {name} for {sys.executable}. If it is installed, the build cannot see it, "
            f"as with uv: name its version, such as {VARIABLE}=2.20, or use --no-build-isolation. "
            "Otherwise install it first"
        )
    if problem := check_version(found):
        raise SystemExit(f"error: {problem}")
    return found
