"""Intersection over union, from counts of pixels."""

import math

import numpy as np


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Numbers of pixels `[classes, classes]`, by true label and predicted label.

    Args:
      truth, prediction: labels below `classes`, integers of one shape.
      classes: the number of labels.
    """
    pairs = truth.astype(np.int64).ravel() * classes + prediction.ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def iou(pixels: np.ndarray) -> list[float | None]:
    """Each label's intersection over union, over all images that were counted together.

    None for a label that neither truth nor prediction has.
    """
    both = np.diag(pixels)
    either = pixels.sum(axis=0) + pixels.sum(axis=1) - both
    return [float(b / e) if e else None for b, e in zip(both, either, strict=True)]


def mean_iou(values: list[float | None]) -> float:
    """The mean over the labels that occur, NaN if none does."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else math.nan
