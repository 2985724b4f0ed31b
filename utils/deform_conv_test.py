#!/usr/bin/env python3
"""The smallest proof that a build works: random numbers in, output and gradients out.

    python utils/deform_conv_test.py

The same as `python -m deform_conv`, for a checkout: compares both with the pure TensorFlow
reference on every device, and exits with status 1 if they differ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import run


def main() -> None:
    import utils.quiet_tensorflow  # noqa: F401  before deform_conv imports TensorFlow

    # Here, so that run() can tell of a missing library.
    from deform_conv import __main__

    __main__.main()


if __name__ == "__main__":
    run(main)
