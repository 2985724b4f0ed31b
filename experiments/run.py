#!/usr/bin/env python3
"""Does one run of the study, and keeps its record. `experiments.study` starts one process for each.

python -m experiments.run mnist-offsets-v1-shift1-seed1
"""

import argparse
import hashlib
import time
from pathlib import Path

from utils.quiet_tensorflow import keras

import numpy as np

from experiments import datasets, results
from experiments.arms import ARMS, BATCH_SIZE, EPOCHS, SHIFTS, STATISTICS, TRAINED_REGULAR, Run
from experiments.jobs import share_machine
from experiments.networks import build
from experiments.offsets import OffsetStatistics
from experiments.training import DeviceDigits, Predictor, reestimate_statistics, train
from utils.cli import PROJECT, UserError, number, run
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
    add("--jit-compile", action="store_true", help="let XLA compile the training step")


def settings_of(options: argparse.Namespace) -> dict:
    """What two records of one run can differ in; `experiments.study` refuses to mix them."""
    names = ("epochs", "batch_size", "train_digits", "test_digits")
    return {name: getattr(options, name) for name in names}


def record_file(asked: Run, options: argparse.Namespace) -> Path:
    return options.output / f"{asked.name}.json"


def weights_of(asked: Run, options: argparse.Namespace) -> Path:
    """Where the weights of a run of the regular arm are, for those that start from them."""
    return options.cache / f"{asked.name}.weights.h5"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=_parse, help="DATASET-ARM-shiftSHIFT-seedSEED")
    add_run_options(parser)
    options = parser.parse_args()
    share_machine()
    results.write(record_file(options.run, options), record_of(options.run, options))


def _parse(text: str) -> Run:
    dataset, _, rest = text.partition("-")
    arm, _, numbers = rest.rpartition("-shift")
    shift, _, seed = numbers.partition("-seed")
    if dataset not in datasets.DATASETS or arm not in ARMS:
        raise argparse.ArgumentTypeError(f"there is no {dataset} or no {arm}")
    return Run(dataset, arm, float(shift), int(seed))


def record_of(asked: Run, options: argparse.Namespace) -> dict:
    """Trains and tests; returns what is kept.

    Raises:
      UserError: images, or the weights to start from, cannot be read.
    """
    begun = time.monotonic()
    arm = ARMS[asked.arm]
    parts = datasets.load(asked.dataset, options.fashion_mnist)
    parts = datasets.Parts(
        parts.train.take(options.train_digits),
        *(part.take(options.test_digits) for part in parts[1:]),
    )
    keras.utils.set_random_seed(asked.seed)
    regular = _regular(asked, options)
    model = build(arm, regular, parts.train.images[:BATCH_SIZE], asked.seed)
    statistics = OffsetStatistics(model)
    history = _train(asked, options, model, regular, parts, statistics)
    if arm is TRAINED_REGULAR:
        save_weights(model, weights_of(asked, options))
    return _rounded(
        {
            "dataset": asked.dataset,
            "arm": arm.name,
            "shift": asked.shift,
            "seed": asked.seed,
            "settings": settings_of(options),
            "environment": results.environment(),
            "checksums": datasets.checksums(asked.dataset, options.fashion_mnist),
            "starts_from": regular and _digest(regular),
            "parameters": model.count_params(),
            "trained_parameters": int(sum(np.prod(v.shape) for v in model.trainable_variables)),
            "padding": statistics.padding(),
            "epochs": history,
            "accuracy": _accuracies(Predictor(model), parts),
            "seconds": time.monotonic() - begun,
        }
    )


def _regular(asked: Run, options: argparse.Namespace) -> keras.Model | None:
    if asked.regular is None:
        return None
    path = weights_of(asked.regular, options)
    if not path.is_file():
        raise UserError(
            f"{asked.name} starts from {path}, which the run {asked.regular.name} writes"
        )
    return load_model(REGULAR, path)


def _train(
    asked: Run, options, model, regular, parts: datasets.Parts, statistics: OffsetStatistics
) -> list[dict]:
    """Returns what each epoch came to; offsets before the first one are those of epoch 0."""
    arm = ARMS[asked.arm]
    measured = scaled_test_digits(parts.held_out.take(MEASURED), asked.shift).images
    history = []

    def keep(line: dict) -> None:
        history.append(line | {"offsets": statistics(measured)})

    digits = DeviceDigits.of(parts.train)
    common = {"batch_size": options.batch_size, "shift": asked.shift, "seed": asked.seed}
    if arm.trained == STATISTICS:
        share = arm.recipe.unscaled_share[0]
        reestimate_statistics(model, digits, share=share, **common)
    keep({"epoch": 0})
    if arm.trains:
        train(
            model,
            digits,
            arm.recipe,
            epochs=options.epochs * arm.recipe.times_epochs,
            teacher_logits=Predictor(regular).logits(digits) if arm.recipe.distillation else None,
            jit_compile=options.jit_compile,
            after_epoch=keep,
            **common,
        )
    return history


def _accuracies(predictor: Predictor, parts: datasets.Parts) -> dict:
    """In percent: of those held out and of the test set, and of that zoomed along both axes."""
    accuracies = {
        name: {"regular": predictor.accuracy(DeviceDigits.of(part))}
        | {f"scaled {shift:g}": _scaled_accuracy(predictor, part, shift) for shift in SHIFTS}
        for name, part in {"held out": parts.held_out, "test": parts.test}.items()
    }
    test = DeviceDigits.of(parts.test)
    accuracies["zoom"] = {f"{zoom:g}": predictor.accuracy(test, zoom) for zoom in ZOOMS}
    return accuracies


def _scaled_accuracy(predictor: Predictor, digits: Digits, shift: float) -> float:
    return predictor.accuracy(DeviceDigits.of(scaled_test_digits(digits, shift)))


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
