"""What every script of the project shares: number options, errors in one line."""

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something the user can mend, such as a missing file: shown in one line, no traceback."""


@contextlib.contextmanager
def reading(failure: str, remedy: str = "") -> Iterator[None]:
    """A context that reads a file.

    A file may hold anything, and what reads it fail in any way: all of them become a UserError of
    `failure`, the first line of the reason, and `remedy`.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(" .:") or type(error).__name__
        raise UserError("; ".join(filter(None, (f"{failure}: {reason}", remedy)))) from error


def run(main: Callable[[], None]) -> None:
    """Calls `main`; turns what the user can mend, and Ctrl-C, into one line and an exit status."""
    script = Path(sys.argv[0]).name
    if sys.stdout is None:  # closed by who started this
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    # A path need not be text, nor a terminal know its characters.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()  # here, where a failure can still be told
    # OSError: what nobody else has told of, such as a full standard output or a path too long.
    except (UserError, OSError) as error:
        message, status = f"error: {error}", 1
    except ImportError as error:
        if error.name != "libdeform_conv":
            raise
        message, status = f"error: {error}", 1
    except Exception as error:
        # TensorFlow's error about a variable of the environment.
        found = re.search(r"DEFORM_CONV_\w+ must be .*?; received \"[^\"]*\"", str(error), re.S)
        if not found:
            raise
        message, status = f"error: {found[0]}", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return
    # A message may quote a file or a library that has line breaks.
    line = f"{script}: " + re.sub(r"\s*[\r\n]\s*", " ", message)
    print(f"\n{line}" if status == 130 else line, file=sys.stderr)
    _give_up_unwritable_output()
    sys.exit(status)


def _give_up_unwritable_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # At its end, Python would try again, and report the failure in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def number(
    number_type: type,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> Callable[[str], float]:
    """An argparse type: a finite int or float within bounds; by default, an int of 32 bits."""
    if number_type is int and at_most == math.inf:
        at_most = 2**31 - 1

    def parse(text: str):
        value = number_type(text)
        # No comparison with NaN holds.
        if not (above < value < math.inf and at_least <= value <= at_most):
            bounds = [
                f"{words} {bound:.10g}"
                for words, bound in (("above", above), ("at least", at_least), ("at most", at_most))
                if math.isfinite(bound)
            ]
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds)}, got {text}")
        return value

    parse.__name__ = number_type.__name__  # argparse names the type in its errors by this
    return parse
