"""Deformable convolution for TensorFlow.

from deform_conv import deform_conv1d, deform_conv2d, deform_depthwise_conv2d, deform_aggregate2d
from deform_conv import deformable, from_torch
from deform_conv.layers import DeformableConv1D, DeformableConv2D

`deformable`, `from_torch` and `layers` need Keras, and import it when they are first asked for.
"""

import importlib as _importlib
import typing as _typing

__version__ = "0.2.0"  # before the imports: the loader of the library reads it

from ._library import library_path, xla_kernels_loaded
from ._one_dimension import deform_conv1d
from ._portable import portable
from .ops import deform_aggregate2d, deform_conv2d, deform_depthwise_conv2d

if _typing.TYPE_CHECKING:
    from . import layers as layers
    from .convert import deformable as deformable
    from .torch import from_torch as from_torch

# Without the names that need Keras: a star import would need it too.
__all__ = [
    "__version__",
    "deform_aggregate2d",
    "deform_conv1d",
    "deform_conv2d",
    "deform_depthwise_conv2d",
    "library_path",
    "portable",
    "xla_kernels_loaded",
]


def __getattr__(name: str):
    """Imports what needs Keras when it is first asked for."""
    if name == "layers":
        return _importlib.import_module(".layers", __name__)
    if name == "deformable":
        return _importlib.import_module(".convert", __name__).deformable
    if name == "from_torch":
        return _importlib.import_module(".torch", __name__).from_torch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "deformable", "from_torch", "layers"})
