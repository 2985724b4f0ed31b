#!/usr/bin/env python3
"""Does one run of the study, and keeps its record. `experiments.study` does many.

python -m experiments.run mnist-offsets-v1-shift1-seed1
"""

import argparse
import functools
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

from utils.quiet_tensorflow import keras

import numpy as np

from experiments import datasets, results
from experiments.arms import ARMS, BATCH_SIZE, EPOCHS, SHIFTS, STATISTICS, TRAINED_REGULAR, Run
from experiments.networks import build
from experiments.offsets import OffsetStatistics
from experiments.training import (
    JIT_CHOICES,
    NOTHING,
    DeviceDigits,
    Predictor,
    reestimate_statistics,
    train,
)
from experiments.workers import seeded, use_devices
from utils.cli import PROJECT, UserError, number, reading, run
from utils.mnist import Digits, scaled_test_digits
from utils.model import REGULAR, load_model, save_weights

RESULTS = PROJECT / "experiments" / "results" / "study"
CACHE = PROJECT / "build" / "experiments"

ZOOMS = tuple(1 + 0.25 * step for step in range(9))
# So many scaled images of those held out are what offsets are measured with.
MEASURED = 500
DIGITS = 4  # after the point, of numbers that are kept


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that each run of a study has."""
    add = parser.add_argument
    add("--epochs", type=number(int, at_least=1), default=EPOCHS, help="default: %(default)s")
    add(
        "--batch-size",
        type=number(int, at_least=1),
        default=BATCH_SIZE,
        help="default: %(default)s",
    )
    add("--train-digits", type=number(int, at_least=1), help="train on the first N images only")
    add("--test-digits", type=number(int, at_least=1), help="test on the first N images only")
    add(
        "--output",
        type=Path,
        default=RESULTS,
        help="where the records go (default: experiments/results/study)",
    )
    add(
        "--cache",
        type=Path,
        default=CACHE,
        help="where the weights of regular networks go (default: build/experiments)",
    )
    add(
        "--fashion-mnist",
        type=Path,
        default=datasets.FASHION_FOLDER,
        help="the folder of Fashion-MNIST's four files (default: %(default)s)",
    )
    add(
        "--jit-compile",
        choices=JIT_CHOICES,
        default=NOTHING,
        help="what of a training step XLA compiles (default: %(default)s)",
    )


def settings_of(options: argparse.Namespace) -> dict:
    """What two records of one run can differ in; `experiments.study` refuses to mix them."""
    names = ("epochs", "batch_size", "train_digits", "test_digits")
    return {name: getattr(options, name) for name in names}


def record_file(asked: Run, options: argparse.Namespace) -> Path:
    return options.output / f"{asked.name}.json"


def weights_file(regular: Run, digest: str, options: argparse.Namespace) -> Path:
    """Where a run of the regular arm leaves its weights, for those that start from them.

    Its record has their digest, so that weights of another training are never taken for them.
    """
    return options.cache / f"{regular.name}-{digest}.weights.h5"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=_run, help="DATASET-ARM-shiftSHIFT-seedSEED")
    add_run_options(parser)
    options = parser.parse_args()
    use_devices()
    do(options.run, options)


def _run(name: str) -> Run:
    try:
        return Run.of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def do(asked: Run, options: argparse.Namespace) -> None:
    """Does a run and keeps its record.

    Raises:
      UserError: images, or the weights to start from, cannot be read, or the record not written.
      FloatingPointError: the loss was NaN or infinite.
    """
    results.write(record_file(asked, options), _record_of(asked, options))


def _record_of(asked: Run, options: argparse.Namespace) -> dict:
    begun = time.monotonic()
    arm = ARMS[asked.arm]
    images = _images(
        asked.dataset, options.fashion_mnist, options.train_digits, options.test_digits
    )
    with seeded(asked.seed):
        regular = _regular(asked, options)
        model = build(arm, regular, images.some, asked.seed)
    statistics = OffsetStatistics(model)
    history = _train(asked, options, model, regular, images, statistics)
    weights = _digest(model) if arm is TRAINED_REGULAR else None
    if weights:
        with seeded(asked.seed):  # it builds a network to save
            save_weights(model, weights_file(asked, weights, options))
    return _rounded(
        {
            "dataset": asked.dataset,
            "arm": arm.name,
            "shift": asked.shift,
            "seed": asked.seed,
            "settings": settings_of(options),
            "jit_compile": options.jit_compile,
            "environment": results.environment(),
            "checksums": datasets.checksums(asked.dataset, options.fashion_mnist),
            "starts_from": regular and _digest(regular),
            "weights": weights,
            "parameters": model.count_params(),
            "trained_parameters": int(sum(np.prod(v.shape) for v in model.trainable_variables)),
            "padding": statistics.padding(),
            "epochs": history,
            "accuracy": _accuracies(Predictor(model), images),
            "seconds": time.monotonic() - begun,
        }
    )


def _regular(asked: Run, options: argparse.Namespace) -> keras.Model | None:
    regular = asked.regular
    if regular is None:
        return None
    record, weights = record_file(regular, options), None
    if record.is_file():
        with reading(f"{record} is no record of a run"):
            digest = json.loads(record.read_text(encoding="utf-8")).get("weights")
        weights = digest and weights_file(regular, digest, options)
    if not (weights and weights.is_file()):
        raise UserError(
            f"{asked.name} starts from the weights of {regular.name}, which are not in "
            f"{options.cache}; `python -m experiments.run {regular.name}` leaves them there"
        )
    return load_model(REGULAR, weights)


class Images(NamedTuple):
    """What a run needs of a data set, scaled where that is the same in every run."""

    train: DeviceDigits
    some: np.ndarray  # of those to train on
    measured: dict[float, np.ndarray]  # by the shift
    tests: dict[str, dict[str, DeviceDigits]]  # by part, and how they are scaled


# A thread's images are on its device. It has those of the data set that it was last at.
_here = threading.local()
_reading = threading.Lock()


def _images(*arguments) -> Images:
    """The images on this thread's device. Arguments are those of `_digits`."""
    if getattr(_here, "arguments", None) != arguments:
        with _reading:
            train, tests = _digits(*arguments)
        _here.images = Images(
            DeviceDigits.of(train),
            train.images[:BATCH_SIZE],
            {shift: tests["held out"][_scaled(shift)].images[:MEASURED] for shift in SHIFTS},
            {
                part: {name: DeviceDigits.of(digits) for name, digits in of.items()}
                for part, of in tests.items()
            },
        )
        _here.arguments = arguments
    return _here.images


@functools.lru_cache(maxsize=len(datasets.DATASETS))
def _digits(
    dataset: str, fashion_folder: Path, train_digits: int | None, test_digits: int | None
) -> tuple[Digits, dict[str, dict[str, Digits]]]:
    """What to train on; and what to test on, by part, and how they are scaled."""
    train, *others = datasets.load(dataset, fashion_folder)
    tests = {
        name: {"regular": part}
        | {_scaled(shift): scaled_test_digits(part, shift) for shift in SHIFTS}
        for name, part in zip(
            ("held out", "test"), (part.take(test_digits) for part in others), strict=True
        )
    }
    return train.take(train_digits), tests


def _scaled(shift: float) -> str:
    return f"scaled {shift:g}"


def _train(
    asked: Run, options, model, regular, images: Images, statistics: OffsetStatistics
) -> list[dict]:
    """Returns what each epoch came to; offsets before the first one are those of epoch 0."""
    arm = ARMS[asked.arm]
    history = []

    def keep(line: dict) -> None:
        history.append(line | {"offsets": statistics(images.measured[asked.shift])})

    common = {"batch_size": options.batch_size, "shift": asked.shift, "seed": asked.seed}
    if arm.trained == STATISTICS:
        share = arm.recipe.unscaled_share[0]
        reestimate_statistics(model, images.train, share=share, **common)
    keep({"epoch": 0})
    if arm.trains:
        distilled = arm.recipe.distillation > 0
        train(
            model,
            images.train,
            arm.recipe,
            epochs=options.epochs * arm.recipe.times_epochs,
            teacher_logits=Predictor(regular).logits(images.train) if distilled else None,
            jit_compile=options.jit_compile,
            after_epoch=keep,
            **common,
        )
    return history


def _accuracies(predictor: Predictor, images: Images) -> dict:
    """In percent: of those held out and of the test set, and of that zoomed along both axes."""
    accuracies = {
        part: {name: predictor.accuracy(digits) for name, digits in of.items()}
        for part, of in images.tests.items()
    }
    test = images.tests["test"]["regular"]
    accuracies["zoom"] = {f"{zoom:g}": predictor.accuracy(test, zoom) for zoom in ZOOMS}
    return accuracies


def _digest(model: keras.Model) -> str:
    content = b"".join(weight.tobytes() for weight in model.get_weights())
    return hashlib.sha256(content).hexdigest()[:16]


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


if __name__ == "__main__":
    run(main)
