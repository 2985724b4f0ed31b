"""Makes one run of the segmentation experiment, and keeps its record."""

import io
import time
from pathlib import Path

from utils.quiet_tensorflow import keras

import numpy as np

from experiments import results
from experiments.segmentation import network, scenes
from experiments.segmentation.glyphs import NAMES
from experiments.segmentation.metrics import confusion, iou, mean_iou
from experiments.segmentation.settings import ARMS, Settings, record_file
from experiments.segmentation.training import offset_meter, predictor, train
from experiments.workers import seeded
from utils.cli import UserError
from utils.files import write_file

PICTURED = 6  # of the mixed test scenes, the first
PICTURED_SEED = 1  # whose networks' predictions of them are kept


def do(arm_and_seed: tuple[str, int], settings: Settings, folder: Path, output: Path) -> None:
    """Trains and tests a network. Writes its record, and predictions for the picture.

    Args:
      arm_and_seed, settings, folder: as in `train_and_test`.
      output: the folder of the records.

    Raises:
      UserError: the loss became NaN or infinite, or a file cannot be written.
    """
    arm, seed = arm_and_seed
    record, model = train_and_test(arm, seed, settings, folder)
    if seed == PICTURED_SEED:
        keep_picture(model, arm, folder, output)
    results.write(record_file(output, arm, seed), record)


def train_and_test(
    arm: str, seed: int, settings: Settings, folder: Path
) -> tuple[dict, keras.Model]:
    """Trains a network and tests it. Returns the record of the run, and the network.

    Args:
      arm: a key of `ARMS`.
      seed: of the first weights and of the order of the scenes.
      settings: of the training.
      folder: of the scenes, from `scenes.prepare`.

    Raises:
      UserError: the loss became NaN or infinite.
    """
    begun = time.monotonic()
    with seeded(seed):
        model = network.build(ARMS[arm])
    losses = train(model, scenes.load(folder, scenes.TRAIN), settings, seed)
    if not np.isfinite(losses).all():
        raise UserError(f"{arm}, seed {seed}: the loss became NaN or infinite")
    trained = time.monotonic()
    tests = {name: scenes.load(folder, name) for name in scenes.TEST_KINDS}
    predict, mean_offsets = predictor(model), offset_meter(model)
    ious = {
        name: iou(confusion(test.labels, predict(test.images), len(NAMES)))
        for name, test in tests.items()
    }
    record = {
        "arm": arm,
        "seed": seed,
        "settings": settings._asdict(),
        "environment": results.environment(),
        "parameters": network.parameters(model),
        "loss": losses,
        "mean_iou": {name: mean_iou(values) for name, values in ious.items()},
        "iou": {name: dict(zip(NAMES, values, strict=True)) for name, values in ious.items()},
        "mean_offset": {name: mean_offsets(test.images) for name, test in tests.items()},
        "seconds": {"training": trained - begun, "testing": time.monotonic() - trained},
    }
    return record, model


def keep_picture(model: keras.Model, arm: str, folder: Path, output: Path) -> None:
    """Writes a few test scenes, and what the network predicts of them."""
    pictured = scenes.Scenes(*(part[:PICTURED] for part in scenes.load(folder, scenes.MIXED)))
    _write_arrays(output / "scenes.npz", **pictured._asdict())
    _write_arrays(output / f"{arm}.npz", labels=predictor(model)(pictured.images))


def _write_arrays(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_file(path, buffer.getvalue())
