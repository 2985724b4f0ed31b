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
from utils.mnist import load_mnist
from utils.model import DEFORM, DEFORM_MODULATED, REGULAR, load_model, weights_file
from utils.training import add_evaluation_arguments, print_accuracies

HEADINGS = {REGULAR: "regular CNN", DEFORM: "deformable CNN", DEFORM_MODULATED: "with masks (v2)"}
# The README of github.com/SUZhaoyu/deform_conv_tensorflow claims these.
ORIGINAL = {
    "regular MNIST": {HEADINGS[REGULAR]: 98.91, HEADINGS[DEFORM]: 98.87},
    "scaled MNIST": {HEADINGS[REGULAR]: 59.32, HEADINGS[DEFORM]: 98.22},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_evaluation_arguments(parser)
    arguments = parser.parse_args()

    _, test_digits = load_mnist(arguments.data)
    names = [REGULAR, DEFORM]
    if weights_file(DEFORM_MODULATED, arguments.checkpoint_dir).is_file():
        names.append(DEFORM_MODULATED)
    models = {HEADINGS[name]: load_model(name, folder=arguments.checkpoint_dir) for name in names}
    print("in brackets: what the original project claims")
    print_accuracies(models, test_digits, arguments, ORIGINAL)


if __name__ == "__main__":
    run(main)
