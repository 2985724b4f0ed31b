#!/usr/bin/env python3
"""Kills trainings and spoils their files, at random, and looks at what comes of it.

    python tests/fuzz/training.py [--script train|tune|both] [--kills N] [--faults N] [--seed N]

A training that is killed, at any moment, and started again until it has finished must leave the
files of one that ran undisturbed, byte by byte. With a full disk, a folder that cannot be written
to, a damaged file, or a second training beside it, it must leave the same, or end with one line on
stderr and an exit status other than 0; and without the fault, it must then go on to the same.

Exits with status 1 at the first finding, and keeps the folder that it happened in. The seed, which
is printed, draws the same moments and damages again.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

PROJECT = Path(__file__).resolve().parent.parent.parent
SHIPPED = PROJECT / "checkpoint" / "regular_model.weights.h5"
MODELS = {"train_regular_conv.py": "regular_model", "tune_deform_conv.py": "deform_model"}
SCRIPTS = dict(zip(("train", "tune"), MODELS, strict=True))
FEW = ("--epochs", 3, "--batch-size", 32, "--test-digits", 20)
MOST_KILLS_OF_ONE_TRAINING = 5
RESUMED = "resuming after epoch"

# So that a killed process has printed what it was to; and without TensorFlow's notices.
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("TF_CPP_MIN_LOG_LEVEL", None)

# Runs a script until it is about to do something in its folder for the n-th time: one kind of step
# (`os.rename:2`), or any (`step:7`). Then kills it.
RUN = """
import collections, json, os, resource, runpy, sys
folder, kill_at, file_limit, script, *arguments = sys.argv[1:]
if file_limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit),) * 2)
steps = collections.Counter()
def count(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        if not str(arguments[0]).startswith(folder):
            return
    elif event != "fcntl.flock":
        return
    for step in (event, "step"):
        steps[step] += 1
        if f"{step}:{steps[step]}" == kill_at:
            os.kill(os.getpid(), 9)
sys.argv = [script, *arguments]
sys.path.insert(0, os.getcwd())
sys.addaudithook(count)
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("steps", json.dumps(steps))
"""


class FindingError(Exception):
    """What must not be."""


class LeftOutError(Exception):
    """Why a fault is not tried here."""


class Ended(NamedTuple):
    """How a process ended."""

    command: str
    status: int
    stdout: str
    stderr: str
    seconds: float
    steps: dict[str, int]  # how many of each kind it took

    def expect(self, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise FindingError(
                f"{what}\n  command: {self.command}\n  exit status: {self.status}\n"
                f"  stdout: {self.stdout[-1500:]}\n  stderr: {self.stderr[-3000:]}"
            )

    def expect_one_line(self, words: str = "") -> None:
        """That it ended as it does for what the user can mend."""
        self.expect(self.status > 0, "it neither succeeded, nor ended with a status above 0")
        line = rf"\w+\.py: error: .*{re.escape(words)}.*\n"
        self.expect(bool(re.fullmatch(line, self.stderr)), f"it did not end with one line: {words}")


class Training:
    """A training script, and what it leaves where nothing disturbs it."""

    def __init__(self, script: str, work: Path):
        self.script, self.work = script, work
        self.data = work / "mnist.npz"
        if not self.data.exists():
            with np.load(PROJECT / "data" / "mnist.npz") as arrays:
                np.savez_compressed(self.data, **{name: arrays[name][:96] for name in arrays})
        self.undisturbed = self.new_folder("undisturbed")
        ended = self.run(self.undisturbed)
        ended.expect(ended.status == 0, "the undisturbed training failed")
        self.seconds, self.steps = ended.seconds, ended.steps
        self.size = self.weights(self.undisturbed).stat().st_size
        print(f"{script}: undisturbed in {self.seconds:.1f} s, steps {self.steps}", flush=True)
        # One that was killed as its second epoch was to be saved.
        self.interrupted = self.new_folder("interrupted")
        ended = self.run(self.interrupted, kill_at="os.rename:3")
        ended.expect(self.state(self.interrupted).exists(), "no state after the first epoch")

    def new_folder(self, name: str) -> Path:
        folder = self.work / self.script.removesuffix(".py") / name
        folder.mkdir(parents=True)
        return folder

    def new_interrupted(self, name: str) -> Path:
        folder = self.new_folder(name)
        shutil.copytree(self.interrupted, folder, dirs_exist_ok=True)
        return folder

    def weights(self, folder: Path) -> Path:
        return folder / f"{MODELS[self.script]}.weights.h5"

    def state(self, folder: Path) -> Path:
        return folder / f"{MODELS[self.script]}.training" / "state"

    def start(
        self, folder: Path, *options: object, kill_at: str = "", file_limit: object = ""
    ) -> subprocess.Popen:
        arguments = [*FEW, "--checkpoint-dir", folder, "--history", folder / "history"]
        arguments += ["--data", self.data]
        if self.script == SCRIPTS["tune"]:
            arguments += ["--regular-weights", SHIPPED]
        command = [sys.executable, "-c", RUN, folder, kill_at, file_limit, self.script]
        return subprocess.Popen(
            [str(word) for word in (*command, *arguments, *options)],
            cwd=PROJECT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, folder: Path, *options: object, kill_after: float | None = None, **how: object
    ) -> Ended:
        """Runs the script to its end, or until it is killed after so many seconds."""
        return end(self.start(folder, *options, **how), kill_after)

    def expect_same(self, ended: Ended, folder: Path) -> None:
        """That it succeeded, and left in `folder` what the undisturbed one did, no more."""
        ended.expect(ended.status == 0, "it failed")
        contents = [
            {str(file.relative_to(root)): file for file in root.rglob("*")}
            for root in (folder, self.undisturbed)
        ]
        ended.expect(contents[0].keys() == contents[1].keys(), f"{folder} has other files")
        for name, file in contents[0].items():
            same = file.read_bytes() == contents[1][name].read_bytes()
            ended.expect(same, f"{file} is not that of the undisturbed training")


def end(process: subprocess.Popen, kill_after: float | None = None) -> Ended:
    began = time.monotonic()
    try:
        stdout, stderr = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
    command = shlex.join(process.args[6:])
    seconds = time.monotonic() - began
    stdout, _, steps = stdout.partition("steps ")
    return Ended(command, process.returncode, stdout, stderr, seconds, json.loads(steps or "{}"))


# --- Kills ---


def kill_until_finished(
    training: Training, rng: random.Random, name: str, most: int
) -> tuple[int, int]:
    """Trains in a new folder, and kills it up to `most` times. Returns how many of them it was, and
    how many of the processes resumed after an epoch."""
    folder = training.new_folder(name)
    moments, resumed = [], 0
    for _ in range(rng.randint(1, min(most, MOST_KILLS_OF_ONE_TRAINING))):
        if rng.random() < 0.3:
            moment = {"kill_after": round(rng.uniform(0, training.seconds), 3)}
        else:
            step, count = rng.choice(sorted(training.steps.items()))
            moment = {"kill_at": f"{step}:{rng.randint(1, count)}"}
        ended = training.run(folder, **moment)
        resumed += RESUMED in ended.stdout
        if ended.status != -signal.SIGKILL:
            break
        moments.append(str(*moment.values()))
    else:
        ended = training.run(folder)
        resumed += RESUMED in ended.stdout
    print(f"{name}: killed at {', '.join(moments) or 'no moment'}", flush=True)
    training.expect_same(ended, folder)
    shutil.rmtree(folder)
    return len(moments), resumed


# --- Faults ---
# Each takes a training, random numbers, and the name of a folder to train in.


def damaged_state(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_interrupted(name)
    damage(training.state(folder), rng)
    training.run(folder).expect_one_line("--restart")
    training.expect_same(training.run(folder, "--restart"), folder)


def state_of_another_training(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_interrupted(name)
    option = rng.choice((("--seed", 2), ("--epochs", 4), ("--dtype-policy", "mixed_float16")))
    training.run(folder, *option).expect_one_line("other settings")
    training.expect_same(training.run(folder), folder)


def damaged_history(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_interrupted(name)
    damage(folder / "history", rng)
    ended = training.run(folder)
    if ended.status != 0:
        ended.expect_one_line("history")
        remove(folder / "history")
        ended = training.run(folder)
    training.expect_same(ended, folder)


def damaged_digits(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_folder(name)
    data = shutil.copy(training.data, folder / "spoiled.npz")
    damage(data, rng)
    ended = training.run(folder, "--data", data)
    if ended.status != 0:  # some bits of an .npz have no meaning
        ended.expect_one_line("spoiled.npz")


def damaged_weights(training: Training, rng: random.Random, name: str) -> None:
    if training.script == SCRIPTS["train"]:
        raise LeftOutError("it starts from no weights")
    folder = training.new_folder(name)
    weights = shutil.copy(SHIPPED, folder / "spoiled.weights.h5")
    damage(weights, rng)
    ended = training.run(folder, "--regular-weights", weights)
    if ended.status != 0:  # a weight may have become another one
        ended.expect_one_line()


def full_disk(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_interrupted(name)
    limit = round(rng.uniform(0, 4 * training.size))
    ended = training.run(folder, file_limit=limit)
    if ended.status != 0:
        ended.expect_one_line("File too large")
        ended = training.run(folder)
        ended.expect(RESUMED in ended.stdout, "it did not resume")
    training.expect_same(ended, folder)


def full_file_system(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_folder(name)
    with mounted(folder, f"size={round(rng.uniform(0, 10 * training.size))}"):
        ended = training.run(folder)
        if ended.status != 0:
            ended.expect_one_line("No space left on device")
            with contextlib.suppress(OSError):
                subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
            ended = training.run(folder)
        training.expect_same(ended, folder)


def unwritable_folder(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_folder(name)
    with mounted(folder, "ro"):
        ended = training.run(folder)
    ended.expect_one_line("Read-only file system")
    ended.expect("Epoch" not in ended.stdout, "it trained before it told of that")


def occupied_path(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_interrupted(name)
    weights, state = training.weights(folder), training.state(folder)
    path = rng.choice((weights, state, state.parent, folder / "history"))
    kept = folder / "kept"
    if path.exists():
        path.rename(kept)
    path.write_text("a note") if path == state.parent else path.mkdir()
    ended = training.run(folder)
    ended.expect_one_line(path.name)
    ended.expect("Epoch" not in ended.stdout, "it trained before it told of that")
    remove(path)
    if kept.exists():
        kept.rename(path)
    ended = training.run(folder)
    ended.expect(RESUMED in ended.stdout, "it did not resume")
    training.expect_same(ended, folder)


def two_at_once(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_folder(name)
    first = training.start(folder)
    time.sleep(rng.uniform(0, training.seconds))
    second = training.run(folder)
    first = end(first)
    for ended in (first, second):
        if ended.status != 0:
            ended.expect_one_line("another training")
    first.expect(first.status == 0 or second.status == 0, "neither succeeded")
    training.expect_same(first if first.status == 0 else second, folder)


def no_finite_numbers(training: Training, rng: random.Random, name: str) -> None:
    folder = training.new_folder(name)
    kept = training.weights(folder)
    shutil.copy(training.weights(training.undisturbed), kept)
    before = kept.read_bytes()
    ended = training.run(folder, "--learning-rate", f"1e{rng.randint(30, 38)}")
    if ended.status != 0:
        ended.expect_one_line("NaN or infinite")
        ended.expect(kept.read_bytes() == before, "it has overwritten the weights of before")
        return
    # Samples at any offset are finite, so weights may have become no more than large.
    with h5py.File(kept) as file:
        file.visititems(
            lambda name, item: ended.expect(
                not isinstance(item, h5py.Dataset) or bool(np.isfinite(item[()]).all()),
                f"it has saved NaN or infinite weights in {name}",
            )
        )


FAULTS = (
    damaged_state,
    state_of_another_training,
    damaged_history,
    damaged_digits,
    damaged_weights,
    full_disk,
    full_file_system,
    unwritable_folder,
    occupied_path,
    two_at_once,
    no_finite_numbers,
)


def damage(file: Path, rng: random.Random) -> None:
    """Changes what a file holds, or makes it something else than a file."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(("cut", "empty", "bit", "bit", "zeros", "noise", "other", "folder"))
    if kind == "cut":
        content = content[: rng.randrange(1, len(content))]
    elif kind == "empty":
        content = b""
    elif kind == "bit":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        start = rng.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif kind == "noise":
        content = rng.randbytes(len(content))
    elif kind == "other":
        content = Path(__file__).read_bytes()
    file.unlink()
    file.mkdir() if kind == "folder" else file.write_bytes(content)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at `folder`, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LeftOutError("nothing can be mounted here") from error
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


# --- The campaign ---


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", choices=(*SCRIPTS, "both"), default="both")
    parser.add_argument("--kills", type=int, default=10, help="of each script; default: 10")
    parser.add_argument(
        "--faults", type=int, default=len(FAULTS), help="of each script; default: one of each kind"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    work = Path(tempfile.mkdtemp(prefix="training-fuzz-"))
    try:
        for key, script in SCRIPTS.items():
            if arguments.script in (key, "both"):
                campaign(Training(script, work), arguments)
    except FindingError as finding:
        sys.exit(f"finding in {work}, with seed {arguments.seed}: {finding}")
    shutil.rmtree(work)
    print("no finding")


def campaign(training: Training, arguments: argparse.Namespace) -> None:
    kills = resumed = trainings = 0
    while kills < arguments.kills:
        name = f"kills-{trainings}"
        rng = random.Random(f"{arguments.seed} {training.script} {name}")
        more = kill_until_finished(training, rng, name, arguments.kills - kills)
        kills, resumed, trainings = kills + more[0], resumed + more[1], trainings + 1
    print(
        f"{training.script}: {trainings} trainings, {kills} kills, {resumed} times resumed; "
        "all ended the same",
        flush=True,
    )
    for index in range(arguments.faults):
        fault = FAULTS[index % len(FAULTS)]
        name = f"{fault.__name__}-{index}"
        try:
            fault(training, random.Random(f"{arguments.seed} {training.script} {name}"), name)
            print(f"{name}: as it must be", flush=True)
        except LeftOutError as reason:
            print(f"{name}: left out, since {reason}", flush=True)


if __name__ == "__main__":
    main()
