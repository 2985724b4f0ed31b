"""What is compared, and what all runs have in common."""

from pathlib import Path
from typing import NamedTuple

# Filters of the encoder's stages; each but the first halves the resolution.
WIDTHS = (16, 32, 64, 128)


class Arm(NamedTuple):
    """A network that takes part. `widths` are those of the encoder's stages."""

    title: str
    deformable: bool = False
    modulated: bool = False
    widths: tuple[int, ...] = WIDTHS


# The wide ones have as many parameters as the deformable ones, within 1 %: the last two stages,
# those that are deformable elsewhere, have more filters.
ARMS = {
    "regular": Arm("regular"),
    "wide": Arm("regular, parameters of v1", widths=(16, 32, 66, 138)),
    "wide_modulated": Arm("regular, parameters of v2", widths=(16, 32, 68, 142)),
    "deformable": Arm("deformable, v1", deformable=True),
    "modulated": Arm("deformable, v2", deformable=True, modulated=True),
}
EQUAL_PARAMETERS = {"deformable": "wide", "modulated": "wide_modulated"}


# So many test scenes of each kind are what offsets are measured with, the first.
MEASURED = 50


class Settings(NamedTuple):
    """How a network is trained and tested."""

    steps: int
    batch_size: int
    learning_rate: float
    offset_rate: float  # that of offsets and masks is so many times the learning rate
    train_scenes: int
    test_scenes: int  # of each kind
    glyphs: str  # their digest


def record_file(output: Path, arm: str, seed: int) -> Path:
    """Where the record of a run is kept."""
    return Path(output) / f"{arm}-{seed}.json"
