"""Where the deformable layers of a model look in an image: an HTML page, and a figure."""

from .figure import plot_offsets
from .page import explore

__all__ = ["explore", "plot_offsets"]
