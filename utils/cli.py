"""What every script of the project shares: quiet TensorFlow logs, and errors in one line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before TensorFlow is imported: its start-up notices about CPU features and absent GPUs say nothing
# that a user of these scripts could act on. Set the variable yourself to see them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

PROJECT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something the user can mend, such as a missing file: shown in one line, no traceback."""


def run(main: Callable[[], None]) -> None:
    """Calls `main` and turns a `UserError` or Ctrl-C into one line on stderr and an exit status."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)
