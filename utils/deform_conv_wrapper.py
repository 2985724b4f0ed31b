"""Re-exports `deform_conv2d` of the package `deform_conv`.

from utils.deform_conv_wrapper import deform_conv2d
"""

from deform_conv import deform_conv2d

__all__ = ["deform_conv2d"]
