"""Finds and loads the compiled libraries, once in a process."""

import os
import threading
import types
from pathlib import Path

import tensorflow as tf

from . import __version__

# The library's file, and the name that ImportErrors of this module carry: scripts show those in one
# line.
_LIBRARY = "libdeform_conv"

# TensorFlow registers an op, a kernel or a gradient once in a process. This record of it is kept on
# TensorFlow's module, so that it lasts as long as the registrations do. A reload of the package
# finds it, and so does a copy under another name.
#   lock           held while something is registered: two threads may import two copies
#   version, path  of the package and of the library that it loaded; every version keeps these two
#   ops            the module of the ops
#   xla_problem    why XLA has no kernels for them, or None
#   gradients      the newest gradient function of each op
record = vars(tf).setdefault("_deform_conv_record", types.SimpleNamespace(lock=threading.RLock()))


def _load_libraries() -> None:
    """Loads what this process has not loaded yet."""
    version = getattr(record, "version", __version__)
    if version != __version__:
        raise ImportError(
            f"deform_conv {__version__} cannot be imported here: this process has loaded the ops "
            f"of deform_conv {version} from {record.path}, and can have those of one version only. "
            "Restart Python to use another",
            name=_LIBRARY,
        )
    if not hasattr(record, "ops"):
        path = _find_library()
        # All at once: nothing is recorded where the library does not load.
        vars(record).update(
            version=__version__,
            path=path,
            ops=_load_ops(path),
            xla_problem="they have not been loaded",
            gradients={},
        )
    if record.xla_problem is not None:
        # Everything but jit_compile works without it.
        path = record.path.with_name(f"{record.path.stem}_xla.so")
        record.xla_problem = _load_xla_kernels(path)


def _find_library() -> Path:
    if chosen := os.environ.get("DEFORM_CONV_LIBRARY"):
        places = [Path(chosen).absolute()]
        looked_for = f"DEFORM_CONV_LIBRARY: {places[0]}"
    else:
        package, name = Path(__file__).resolve().parent, f"{_LIBRARY}.so"
        # Of an installed package, and of a checkout.
        places = [package / name, package.parent / "build" / name]
        looked_for = " and ".join(map(str, places))
    for place in places:
        if place.is_file():
            return place
    raise ImportError(f"{looked_for} not found: build it with ./compile.sh", name=_LIBRARY)


def _load_ops(path: Path) -> types.ModuleType:
    """Loads the library of the ops."""
    version_file = path.with_name("tensorflow_version.txt")
    built_for = version_file.read_text().strip() if version_file.is_file() else None
    same_version = built_for and built_for.split(".")[:2] == tf.__version__.split(".")[:2]
    misfit = ImportError(
        f"{path} was built for TensorFlow {built_for or '(unknown)'} and does not fit "
        f"{tf.__version__}; a library fits one minor version only. Build it again with "
        "./compile.sh",
        name=_LIBRARY,
    )
    # A library of another version may load and yet disagree on the layout of TensorFlow's types.
    if built_for and not same_version:
        raise misfit
    try:
        ops = tf.load_op_library(str(path))
    except (tf.errors.OpError, RuntimeError) as error:
        if not same_version:
            raise misfit from error
        raise ImportError(
            f"{path} does not load: {error}. Build it again with ./compile.sh", name=_LIBRARY
        ) from error
    if not hasattr(ops, "deform_conv2d"):
        raise ImportError(f"{path} does not hold the op deform_conv2d", name=_LIBRARY)
    return ops


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
    """Whether XLA (`jit_compile=True`) can compile `deform_conv2d` in this process.

    Returns:
      False where the library of the XLA kernels is missing or does not load. Everything but
      `jit_compile` works then.
    """
    return record.xla_problem is None


def check_xla() -> None:
    """Raises where XLA is to compile the op and cannot. TensorFlow would not say what to do."""
    if xla_kernels_loaded():
        return
    from tensorflow.python.ops import control_flow_util

    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise RuntimeError(
            f"jit_compile=True needs the XLA kernels of deform_conv2d, but {record.xla_problem}. "
            "Build them with ./compile.sh, or leave jit_compile out"
        )


with record.lock:
    _load_libraries()
