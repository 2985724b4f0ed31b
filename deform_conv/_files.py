"""Files that users ask for by a path."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ._arguments import shown


def path_of_a_file(path) -> Path:
    """The argument `path` of a function that writes a file, or a ValueError before the work."""
    try:
        path = Path(path)
    except TypeError:
        raise ValueError(f"path must be that of a file. Received: {shown(path)}") from None
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"path must be that of a file, in a folder that exists. Received: {shown(str(path))}"
        )
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, of a file that takes the place of `path` once it is whole."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder, path.name)
        yield file
        file.replace(path)
