"""Deformable convolution for TensorFlow.

from deform_conv import deform_conv2d, deformable
from deform_conv.layers import DeformableConv2D
"""

import importlib

__version__ = "0.1.0"  # first: the loader of the library reads it

from ._library import xla_kernels_loaded
from .ops import deform_conv2d

__all__ = ["__version__", "deform_conv2d", "deformable", "layers", "xla_kernels_loaded"]


def __getattr__(name: str):
    # Both need Keras, which the op does without.
    if name == "layers":
        return importlib.import_module(".layers", __name__)
    if name == "deformable":
        return importlib.import_module(".convert", __name__).deformable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
