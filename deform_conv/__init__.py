"""Deformable convolution for TensorFlow.

from deform_conv import deform_conv1d, deform_conv2d, deform_conv3d
from deform_conv import deform_aggregate2d, deform_depthwise_conv2d, deformable, from_torch
from deform_conv import explore, plot_offsets, sampling_locations
from deform_conv.layers import DeformableConv1D, DeformableConv2D

`deformable`, `explore`, `from_torch`, `layers` and `plot_offsets` need Keras, and import it when
they are first asked for.
"""

import importlib as _importlib
import typing as _typing

__version__ = "0.2.0"  # before the imports: the loader of the library reads it

from ._library import library_path, xla_kernels_loaded
from ._locations import sampling_locations
from ._one_dimension import deform_conv1d
from ._portable import portable
from .ops import deform_aggregate2d, deform_conv2d, deform_depthwise_conv2d
from .ops3d import deform_conv3d

if _typing.TYPE_CHECKING:
    from . import layers as layers
    from ._explorer import explore as explore
    from ._explorer import plot_offsets as plot_offsets
    from .convert import deformable as deformable
    from .torch import from_torch as from_torch

# Without the names that need Keras: a star import would need it too.
__all__ = [
    "__version__",
    "deform_aggregate2d",
    "deform_conv1d",
    "deform_conv2d",
    "deform_conv3d",
    "deform_depthwise_conv2d",
    "library_path",
    "portable",
    "sampling_locations",
    "xla_kernels_loaded",
]


# Where the names that need Keras are.
_OF_KERAS = {
    "deformable": ".convert",
    "explore": "._explorer",
    "from_torch": ".torch",
    "layers": ".layers",
    "plot_offsets": "._explorer",
}


def __getattr__(name: str):
    """Imports what needs Keras when it is first asked for."""
    if name not in _OF_KERAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(_OF_KERAS[name], __name__)
    return module if name == "layers" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_KERAS})
