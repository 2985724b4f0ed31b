"""The images of the study: MNIST, and Fashion-MNIST as Debian packages it."""

import gzip
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.cli import UserError, reading
from utils.mnist import MNIST_FILE, Digits, checked_digits, load_mnist

MNIST, FASHION = "mnist", "fashion"
DATASETS = {MNIST: "MNIST", FASHION: "Fashion-MNIST"}

# Where Debian's package dataset-fashion-mnist installs it.
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)

# The last training images are held out: recipes can be chosen by them, and nothing trains on them.
HELD_OUT = 5000

_UNSIGNED_BYTES = 8  # the type of idx files' elements


class Parts(NamedTuple):
    """What a network trains on, what recipes are chosen by, and what the tables are of."""

    train: Digits
    held_out: Digits
    test: Digits


def load(dataset: str, fashion_folder: Path = FASHION_FOLDER) -> Parts:
    """Reads MNIST or FASHION.

    Raises:
      UserError: a file is missing, or is none of the data set.
    """
    train, test = load_mnist() if dataset == MNIST else _load_fashion(Path(fashion_folder))
    held_out = Digits(*(array[-HELD_OUT:] for array in train))
    return Parts(train.take(-HELD_OUT), held_out, test)


def checksums(dataset: str, fashion_folder: Path = FASHION_FOLDER) -> dict[str, str]:
    """The SHA-256 sums of the data set's files, by their names."""
    if dataset == MNIST:
        paths = [MNIST_FILE]
    else:
        paths = [Path(fashion_folder) / name for name in FASHION_FILES]
    with reading(f"cannot read {DATASETS[dataset]}"):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _load_fashion(folder: Path) -> tuple[Digits, Digits]:
    arrays = [_read_idx(folder / name) for name in FASHION_FILES]
    train, test = (checked_digits(*pair, folder) for pair in (arrays[:2], arrays[2:]))
    return train, test


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the idx format: zeros, type, number of axes, big-endian sizes, data."""
    if not path.is_file():
        raise UserError(
            f"{path} not found: Debian's package dataset-fashion-mnist has it, and --fashion-mnist "
            "names another folder"
        )
    with reading(f"{path} is no idx file of bytes"):
        content = gzip.decompress(path.read_bytes())
        if content[:3] != bytes([0, 0, _UNSIGNED_BYTES]):
            raise ValueError("it begins with other bytes")
        axes = content[3]
        shape = np.frombuffer(content, ">u4", axes, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
