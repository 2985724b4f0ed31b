"""What every script of the project shares: number options, errors in one line."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something the user can mend, such as a missing file: shown in one line, no traceback."""


def run(main: Callable[[], None]) -> None:
    """Calls `main`; turns what the user can mend, and Ctrl-C, into one line and an exit status."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        message, status = f"error: {error}", 1
    except ImportError as error:
        if error.name != "libdeform_conv":
            raise
        message, status = f"error: {error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return
    print(f"\n{script}: {message}" if status == 130 else f"{script}: {message}", file=sys.stderr)
    sys.exit(status)


def number(
    number_type: type, at_least: float = -math.inf, above: float = -math.inf, at_most=math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite int or float within bounds."""

    def parse(text: str):
        value = number_type(text)
        if not (math.isfinite(value) and above < value and at_least <= value <= at_most):
            bounds = [
                f"{words} {bound:g}"
                for words, bound in (("above", above), ("at least", at_least), ("at most", at_most))
                if math.isfinite(bound)
            ]
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds)}, got {text}")
        return value

    parse.__name__ = number_type.__name__  # argparse names the type in its errors by this
    return parse
