"""Writing files so that nothing is lost: not to a crash, a power cut, a full disk, or a second
process that writes the same."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.cli import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def write_file(path: Path, data: bytes) -> None:
    """Makes `data` the content of `path`, and the folder if there is none.

    Whatever happens, and at any moment, `path` is either the whole old file or the whole new one.
    On return, the new one is on the disk.

    Raises:
      UserError: it cannot be written.
    """
    with _unfinished(path) as (file, unfinished, target):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        unfinished.replace(target)
        _sync_folder(target.parent)


def check_writable(path: Path, size: int = 0) -> None:
    """Finds out, before long work, whether `write_file` could write `size` bytes to `path`.

    Raises:
      UserError: it could not.
    """
    with _unfinished(path) as (file, _, _):
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


def unfinished_name(name: str) -> str:
    """The name, in the same folder, of what becomes the file `name` once it is whole."""
    return f".{name}.unfinished"


def refuse_overwriting(option: str, path: Path, kept: dict[str, Path]) -> None:
    """Makes sure that a file to be written is none of those that are `kept`, nor within them.

    Args:
      option: what names `path`, for the error.
      path: the file to be written.
      kept: other files and folders, by what names them.

    Raises:
      UserError: it is.
    """
    real = Path(os.path.realpath(path))
    for name, other in kept.items():
        taken = Path(os.path.realpath(other))
        unfinished = taken.with_name(unfinished_name(taken.name))
        if real in (taken, unfinished) or taken in real.parents:
            raise UserError(f"{option} {path} would take the place of {name}, {other}")


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Holds a lock, whose file is `path`, until the end of the context or of this process.

    Makes the folder if there is none. Removes the file in the end, and the folder if it is empty.

    Raises:
      UserError: another process holds the lock, of which `taken` tells; or it cannot be written.
    """
    with _failure_told(path):
        _make_folder(path.parent)
        try:
            file = _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(taken) from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # where there are other files
                path.parent.rmdir()


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[tuple[BinaryIO, Path, Path]]:
    """Yields an empty file beside `path`, its name, and the one that it may be renamed to.

    The file is locked, and removed in the end if it still has its first name.
    """
    with _failure_told(path):
        target = Path(os.path.realpath(path))  # a link stays, and what it points to is written
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it is no regular file")
        _make_folder(target.parent)
        unfinished = target.with_name(unfinished_name(target.name))
        with _open_locked(unfinished, fcntl.LOCK_EX) as file:
            try:
                file.truncate()  # a killed process may have left something
                yield file, unfinished, target
            finally:
                if _is_named(file, unfinished):
                    unfinished.unlink()


@contextlib.contextmanager
def _failure_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _open_locked(path: Path, operation: int) -> BinaryIO:
    """Opens the file `path`, or makes it, and locks it as `fcntl.flock` does.

    The system ends the lock with the process, however that ends.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, operation)
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # some network file systems have none
                file.close()
                raise
        if _is_named(file, path):
            return file
        # While this process waited, the one that held the lock renamed or removed the file.
        file.close()


def _is_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _make_folder(folder: Path) -> None:
    """Makes `folder` and those above it, so that they outlive a power cut too."""
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to the disk."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems write them at once, and refuse this
            raise
    finally:
        os.close(opened)
