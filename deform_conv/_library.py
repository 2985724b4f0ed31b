"""Finds and loads the compiled libraries, once in a process."""

import os
import sys
import types
from pathlib import Path

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from . import __version__

_LIBRARY = "libdeform_conv"
_RECORD = "_deform_conv_process"

# TensorFlow registers an op, a kernel or a gradient once in a process. This record of it is kept
# outside the package, so that a reload of the package finds it, and a copy under another name does:
#   version      of the package that loaded the library; every version can read this
#   path         of the library
#   ops          the module of the ops
#   xla_problem  why XLA has no kernels for them, or None
#   gradients    the newest gradient function of each op
process = sys.modules.setdefault(_RECORD, types.ModuleType(_RECORD))


def _load_libraries() -> None:
    """Loads what this process has not loaded yet."""
    version = getattr(process, "version", __version__)
    if version != __version__:
        raise ImportError(
            f"deform_conv {__version__} cannot be imported here: this process has loaded the ops "
            f"of deform_conv {version} from {process.path}, and can have those of one version only",
            name=_LIBRARY,
        )
    if not hasattr(process, "ops"):
        path = _find_library()
        # All at once: nothing is recorded where the library does not load.
        vars(process).update(
            version=__version__,
            path=path,
            ops=_load_ops(path),
            xla_problem="they have not been loaded",
            gradients={},
        )
    if process.xla_problem is not None:
        # Everything but jit_compile works without it.
        process.xla_problem = _load_xla_kernels(process.path.with_name(f"{_LIBRARY}_xla.so"))


def _find_library() -> Path:
    if chosen := os.environ.get("DEFORM_CONV_LIBRARY"):
        places = [Path(chosen).absolute()]
    else:
        package, name = Path(__file__).resolve().parent, f"{_LIBRARY}.so"
        # Of an installed package, and of a checkout.
        places = [package / name, package.parent / "build" / name]
    for place in places:
        if place.is_file():
            return place
    looked_for = " and ".join(map(str, places))
    raise ImportError(f"{looked_for} not found: build it with ./compile.sh", name=_LIBRARY)


def _load_ops(path: Path) -> types.ModuleType:
    """Loads the library of the ops."""
    version_file = path.with_name("tensorflow_version.txt")
    built_for = version_file.read_text().strip() if version_file.is_file() else None
    misfit = ImportError(
        f"{path} was built for TensorFlow {built_for or '(unknown)'} and does not fit "
        f"{tf.__version__}; a library fits one minor version only. Build it again with "
        "./compile.sh",
        name=_LIBRARY,
    )
    # A library of another version may load and yet disagree on the layout of TensorFlow's types.
    if built_for and built_for.split(".")[:2] != tf.__version__.split(".")[:2]:
        raise misfit
    try:
        return tf.load_op_library(str(path))
    except tf.errors.OpError as error:
        raise misfit from error


def _load_xla_kernels(path: Path) -> str | None:
    """Loads the library of the ops' XLA kernels; returns why that cannot be done, or None."""
    if not path.is_file():
        return f"{path} not found"
    try:
        tf.load_library(str(path))
    except (tf.errors.OpError, OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    return None


def xla_kernels_loaded() -> bool:
    """Whether XLA (`jit_compile=True`) can compile `deform_conv2d` in this process."""
    return process.xla_problem is None


def check_xla() -> None:
    """Raises where XLA is to compile the op and cannot. TensorFlow would not say what to do."""
    if xla_kernels_loaded():
        return
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise RuntimeError(
            f"jit_compile=True needs the XLA kernels of deform_conv2d, but {process.xla_problem}. "
            "Build them with ./compile.sh, or leave jit_compile out"
        )


_load_libraries()
