"""What a training keeps on disk while it is under way."""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

from utils.quiet_tensorflow import keras, tf

import numpy as np

from utils.cli import UserError, reading
from utils.files import check_writable, locked, unfinished_name, write_file
from utils.strategy import all_workers_have, is_chief

# Options that a training may be resumed with others of: they make no difference to its result, or
# in the case of the last two, to more than its rounding.
_NO_SETTINGS = (
    "restart",
    "test_digits",
    "checkpoint_dir",
    "history",
    "strategy",
    "logical_cpus",
)


def state_folder(name: str, folder: Path) -> Path:
    """Where the state of a training of the model `name`, whose weights go to `folder`, is kept."""
    return Path(folder) / f"{name}.training"


class TrainingState:
    """Model, optimizer, epoch and history of a training that is under way.

    They are one file, in a folder of their own: a checksum and a line break, then an .npz with
    every variable and a JSON text. So the state is replaced whole, and damage to it is noticed.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.Optimizer,
        arguments: argparse.Namespace,
        strategy: tf.distribute.Strategy,
    ):
        self.history: list[dict[str, float]] = []  # of each epoch
        self._folder = state_folder(model.name, arguments.checkpoint_dir)
        self._file, self._lock = self._folder / "state", self._folder / "lock"
        self._name = model.name
        self._strategy = strategy
        self._restart = arguments.restart
        self._variables = {f"model/{variable.path}": variable for variable in model.variables}
        for index, variable in enumerate(optimizer.variables):
            self._variables[f"optimizer/{index}/{variable.name}"] = variable
        # A schedule, data set or initial model other than the one begun would give a model of
        # neither.
        settings = {
            key: value for key, value in sorted(vars(arguments).items()) if key not in _NO_SETTINGS
        }
        settings["initial weights"] = _digest(model)
        if "data" in settings:  # a file may be moved, or another one take its place
            settings["data"] = hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest()[:16]
        self._settings = json.dumps(settings, default=str)

    def held(self) -> contextlib.AbstractContextManager:
        """A context in which no other process trains this model in this folder."""
        if not is_chief(self._strategy):
            return contextlib.nullcontext()
        return locked(
            self._lock, f"another training of {self._name} is under way in {self._folder}"
        )

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def begin(self) -> None:
        """Restores the interrupted training, if there is one.

        Raises:
          UserError: it cannot be resumed, or the next state could not be saved.
        """
        # With --restart, the chief may not have removed the state yet.
        if not self._restart:
            self._restore()
        elif is_chief(self._strategy):
            self._forget()
        if is_chief(self._strategy):
            check_writable(self._file, sum(value.nbytes for value in self._values().values()))
        if not all_workers_have(f"{self.epochs_done} {self._settings}", self._strategy):
            raise UserError(
                "the workers differ in their settings or the weights they start from, or do not "
                f"share {self._folder}"
            )
        if self.epochs_done and is_chief(self._strategy):
            print(f"resuming after epoch {self.epochs_done}")

    def save(self, loss: float, accuracy: float) -> None:
        """Saves the state after one more epoch, of this loss and accuracy."""
        epoch = self.epochs_done + 1
        self.history.append({"epoch": epoch, "loss": loss, "accuracy": accuracy})
        # Every variable is the same on all replicas, so no other worker has to take part.
        if is_chief(self._strategy):
            about = {"history": self.history, "settings": self._settings}
            buffer = io.BytesIO()
            np.savez(buffer, about=json.dumps(about), **self._values())
            content = buffer.getvalue()
            write_file(self._file, _checksum(content) + b"\n" + content)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)

    def _values(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self._variables.items()}

    def _restore(self) -> None:
        """Takes over what the file holds, if there is one."""
        if not self._file.exists():
            ours = {self._lock.name, unfinished_name(self._file.name)}
            if others := {path.name for path in self._folder.glob("*")} - ours:
                raise UserError(
                    f"{self._folder} holds no state of a training, but "
                    f"{', '.join(sorted(others))}; --restart removes that and starts over"
                )
            return
        with reading(f"{self._file} cannot be read", remedy="--restart starts over"):
            about, values = self._read()
            history, begun = list(about["history"]), about["settings"]
        if begun != self._settings:
            raise UserError(
                f"{self._folder} holds a training begun with other settings, {begun}; "
                f"this one has {self._settings}. Use those, or --restart to start over"
            )
        if _types(values) != _types(self._values()):
            raise UserError(
                f"{self._file} holds other variables than those of {self._name}; --restart starts "
                "over"
            )
        self.history = history
        for name, variable in self._variables.items():
            variable.assign(values[name])

    def _read(self) -> tuple[dict, dict[str, np.ndarray]]:
        """What `save` has written."""
        if not self._file.is_file():
            raise ValueError("it is no regular file")
        checksum, _, content = self._file.read_bytes().partition(b"\n")
        if checksum != _checksum(content):
            raise ValueError(
                "it is damaged: the checksum in it is another than that of its content"
            )
        with np.load(io.BytesIO(content)) as arrays:
            values = dict(arrays)
        about = json.loads(str(values.pop("about")))
        if not all(isinstance(value, np.ndarray) for value in values.values()):
            raise ValueError("it holds something that is no array")
        if [line["epoch"] for line in about["history"]] != list(
            range(1, len(about["history"]) + 1)
        ):
            raise ValueError("its history is not of one epoch after the other")
        return about, values

    def _forget(self) -> None:
        """Removes the state, and whatever else is in its folder."""
        if self._folder.is_symlink():
            raise UserError(f"--restart does not empty {self._folder}, which is a link")
        for path in self._folder.glob("*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._lock:
                path.unlink()


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """Writes a state's history to a file, as JSON lines."""
    write_file(path, "".join(json.dumps(line) + "\n" for line in history).encode())


def check_history(path: Path) -> None:
    """Makes sure that `write_history` can write the file, and will overwrite nothing but a history.

    Raises:
      UserError: it cannot, or would.
    """
    check_writable(path)
    if not path.exists():
        return
    with reading(f"--history {path} is no history of a training, and is not overwritten"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if set(json.loads(line)) != {"epoch", "loss", "accuracy"}:
                raise ValueError(f"line {number} is no epoch's loss and accuracy")


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _types(values: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (value.shape, value.dtype) for name, value in values.items()}


def _digest(model: keras.Model) -> str:
    """A short fingerprint of a model's weights."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(weight.tobytes())
    return digest.hexdigest()[:16]
