#!/usr/bin/env python3
"""Tests the trained networks on regular and scaled MNIST, beside the original project's figures.

    python utils/evaluate.py [--test-digits N]

Reads the weights in checkpoint/; the scaled digits are the same in every run.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import run

from utils.mnist import load_mnist, scaled_test_digits
from utils.model import DEFORM, DEFORM_MODULATED, REGULAR, load_model, weights_file
from utils.training import accuracy, add_evaluation_arguments

# The README of github.com/SUZhaoyu/deform_conv_tensorflow claims these.
ORIGINAL = {
    "regular MNIST": {REGULAR: 98.91, DEFORM: 98.87},
    "scaled MNIST": {REGULAR: 59.32, DEFORM: 98.22},
}
HEADINGS = {REGULAR: "regular CNN", DEFORM: "deformable CNN", DEFORM_MODULATED: "with masks (v2)"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_evaluation_arguments(parser)
    arguments = parser.parse_args()

    _, test_digits = load_mnist(arguments.data)
    test_sets = {
        "regular MNIST": test_digits,
        "scaled MNIST": scaled_test_digits(test_digits, arguments.shift),
    }
    names = [REGULAR, DEFORM]
    if weights_file(DEFORM_MODULATED, arguments.checkpoint_dir).is_file():
        names.append(DEFORM_MODULATED)
    models = {name: load_model(name, folder=arguments.checkpoint_dir) for name in names}

    tested = len(test_digits.take(arguments.test_digits).labels)
    print(
        f"test accuracy in percent on {tested} digits (in brackets: the original project's claim)"
    )
    print(" " * 14, *(f"{HEADINGS[name]:>18}" for name in names))
    for set_name, digits in test_sets.items():
        cells = []
        for name, model in models.items():
            claim = ORIGINAL[set_name].get(name)
            percent = accuracy(model, digits.take(arguments.test_digits))
            cells.append(f"{percent:.2f}" + (f" ({claim:.2f})" if claim else ""))
        print(f"{set_name:14}", *(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    run(main)
