"""Finds and loads the compiled libraries, once in a process."""

import os
import re
import threading
import types
import warnings
from pathlib import Path

from . import __version__

try:
    import tensorflow as tf
except ModuleNotFoundError as error:
    if error.name != "tensorflow":
        raise
    raise ModuleNotFoundError(
        "deform_conv needs TensorFlow, 2.17 or newer, which is not installed. Install what suits "
        "the machine: pip install 'tf-deform-conv[and-cuda]' (NVIDIA GPUs), "
        "'tf-deform-conv[tensorflow]' or 'tf-deform-conv[tensorflow-cpu]'",
        name="tensorflow",
    ) from None

# The library's file, and the name that ImportErrors of this module carry: scripts show those in one
# line.
_LIBRARY = "libdeform_conv"

_XLA_LIBRARY = "libdeform_conv_xla"

# An installed package has its libraries in a folder of its own, a checkout has them beside it.
_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "lib"
_BUILD = "build it with ./compile.sh"
# Without the cache: pip keeps what it built for another TensorFlow there.
_REINSTALL = "pip install --no-deps --force-reinstall --no-cache-dir ."

_WITHOUT = "Or set DEFORM_CONV_PORTABLE=1 to do without: slowly, by TensorFlow's own ops"

# TensorFlow registers an op, a kernel or a gradient once in a process. This record of it is kept on
# TensorFlow's module, so that it lasts as long as the registrations do. A reload of the package
# finds it, and so does a copy under another name.
#   lock           held while something is registered: two threads may import two copies
#   version, path  of the package and of the library that it loaded; every version keeps these two
#   ops            the module of the ops
#   xla_problem    why XLA has no kernels for them, or None
#   gradients      the newest gradient function of each op
record = vars(tf).setdefault(
    "_deform_conv_record", types.SimpleNamespace(lock=threading.RLock(), gradients={})
)


def _portable_mode() -> bool:
    """Whether the environment asks to do without the libraries."""
    value = os.environ.get("DEFORM_CONV_PORTABLE", "")
    if value not in ("", "0", "1"):
        raise ImportError(
            f"DEFORM_CONV_PORTABLE must be 1, or 0 or empty; received {value!r}", name=_LIBRARY
        )
    return value == "1"


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
        )
    if record.xla_problem is not None:
        # Everything but jit_compile works without it.
        path = record.path.with_name(f"{_XLA_LIBRARY}.so")
        record.xla_problem = _load_xla_kernels(path)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _is_older_than(version: tuple[int, int]) -> bool:
    """Whether the TensorFlow of this process is."""
    return tuple(map(int, _minor(tf.__version__).split("."))) < version


def _find_library() -> Path:
    if chosen := os.environ.get("DEFORM_CONV_LIBRARY"):
        path = Path(chosen).absolute()
        if path.is_file():
            return path
        raise ImportError(f"DEFORM_CONV_LIBRARY: {path} not found: {_BUILD}", name=_LIBRARY)
    name = f"{_LIBRARY}.so"
    places = [
        _INSTALLED / f"tensorflow_{_minor(tf.__version__).replace('.', '_')}" / name,
        _PACKAGE.parent / "build" / name,
    ]
    for place in places:
        if place.is_file():
            return place
    if installed := sorted(_INSTALLED.glob(f"tensorflow_*/{name}")):
        versions = [path.parent.name.partition("_")[2].replace("_", ".") for path in installed]
        remedy = (
            "2.17 is the oldest that deform_conv works with"
            if _is_older_than((2, 17))
            else f"Or build deform_conv for yours: in a checkout, {_REINSTALL}"
        )
        raise ImportError(
            f"this installation of deform_conv {__version__} is for TensorFlow "
            f"{', '.join(versions)}, and this is TensorFlow {tf.__version__}. Install one of "
            f"those. {remedy}. {_WITHOUT}",
            name=_LIBRARY,
        )
    places = " and ".join(map(str, places))
    raise ImportError(f"{places} not found: {_BUILD}. {_WITHOUT}", name=_LIBRARY)


def built_for(path: Path, library: str = _LIBRARY) -> str | None:
    """The TensorFlow that a file was built for, or None if it is not `library`."""
    text = rb"%s was built for TensorFlow (\d[^\0]*)\0" % library.encode()
    found = re.search(text, path.read_bytes())
    return found and found[1].decode()


def _misfit(path: Path, library: str) -> str | None:
    """Why a file is not `library` for this TensorFlow, or None if it is."""
    version = built_for(path, library)
    if version is None:
        return f"{path} is not the {library}.so of deform_conv"
    # One of another minor version may load and yet disagree on the layout of TensorFlow's types, or
    # end the process.
    if _minor(version) != _minor(tf.__version__):
        return (
            f"{path} was built for TensorFlow {version} and does not fit {tf.__version__}; a "
            "library fits one minor version only"
        )
    return None


def _load_ops(path: Path) -> types.ModuleType:
    """Loads the library of the ops."""
    remedy = "Build it again with ./compile.sh"
    if _INSTALLED in path.parents:
        remedy = f"Install deform_conv again, or build it: in a checkout, {_REINSTALL}"
    if problem := _misfit(path, _LIBRARY):
        raise ImportError(f"{problem}. {remedy}", name=_LIBRARY)
    try:
        return tf.load_op_library(str(path))
    except (tf.errors.OpError, RuntimeError) as error:
        raise ImportError(f"{path} does not load: {error}. {remedy}", name=_LIBRARY) from error


def _load_xla_kernels(path: Path) -> str | None:
    """Loads the library of the ops' XLA kernels; returns why that cannot be done, or None."""
    if _is_older_than((2, 20)):
        return f"they need TensorFlow 2.20 or newer, and this is {tf.__version__}"
    if not path.is_file():
        return f"{path} not found"
    if problem := _misfit(path, _XLA_LIBRARY):
        return problem
    try:
        tf.load_library(str(path))
    except (tf.errors.OpError, OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    return None


def library_path() -> str:
    """Path of the library of the ops that this process has loaded.

    Returns:
      The path of a `libdeform_conv.so`, for programs that load it themselves: `tf.load_library`,
      or `TF_LoadLibrary` in C. It fits one minor version of TensorFlow, and needs
      `libdeform_conv_core.so` in its folder or the one above.

    Raises:
      RuntimeError: with `DEFORM_CONV_PORTABLE=1`, which loads no library.
    """
    if PORTABLE:
        raise RuntimeError("with DEFORM_CONV_PORTABLE=1 this process has loaded no library")
    return str(record.path)


def xla_kernels_loaded() -> bool:
    """Whether XLA (`jit_compile=True`) can compile `deform_conv2d` in this process.

    Returns:
      False where the library of the XLA kernels is missing or does not load. Everything but
      `jit_compile` works then. True with `DEFORM_CONV_PORTABLE=1`, which needs no kernels.
    """
    return PORTABLE or record.xla_problem is None


def in_xla_context() -> bool:
    """Whether what is called now is traced for XLA."""
    from tensorflow.python.ops import control_flow_util

    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def check_xla() -> None:
    """Raises where XLA is to compile the op and cannot. TensorFlow would not say what to do."""
    if xla_kernels_loaded():
        return
    if in_xla_context():
        raise RuntimeError(
            f"jit_compile=True needs the XLA kernels of deform_conv2d, but {record.xla_problem}. "
            "Install or build what is missing, or leave jit_compile out"
        )


PORTABLE = _portable_mode()
if PORTABLE:
    warnings.warn(
        "DEFORM_CONV_PORTABLE=1: deform_conv computes by TensorFlow's own ops, which take several "
        "times the time and memory of its compiled ones",
        stacklevel=1,
    )
else:
    with record.lock:
        _load_libraries()
