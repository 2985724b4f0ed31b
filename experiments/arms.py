"""The arms of the study, as data: which network, from where, what of it is trained, and how.

All arms of one data set that are trained by gradients see equally many images in equally many
steps, with one optimizer and one batch size. Those that start from the trained regular network have
that training besides. Recipes train longer.
"""

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from experiments.datasets import DATASETS, FASHION, MNIST
from utils.cli import UserError
from utils.mnist import EASY_SHIFT, HARD_SHIFT
from utils.model import (
    CONVOLUTION_NAMES,
    DEFORM,
    DEFORM_MODULATED,
    DEFORM_V3,
    DEFORM_V4,
    REGULAR,
)

BATCH_SIZE = 250
EPOCHS = 10
SEEDS = (1, 2, 3)
RECIPES_SEEDS = (1, 2)  # any two would do
SHIFTS = (EASY_SHIFT, HARD_SHIFT)

# What an arm trains.
ALL = "all weights"
NORM = "batch normalisation's scales and shifts"
STATISTICS = "batch normalisation's statistics, without gradients"
OFFSETS = "offsets, and masks where there are any"
CONSTANT_OFFSETS = "biases of the offset convolutions"
MASKS = "masks"
NOTHING = "nothing"

# Which random offsets an arm has, that are not trained.
CONVOLUTION, CONSTANT = "of a random convolution", "constant"

# Standard deviations of the random offsets of each layer, in pixels: about those that tuning on
# MNIST arrives at.
RANDOM_OFFSETS = dict(zip(CONVOLUTION_NAMES, (0.1, 0.5, 0.6, 1.4), strict=True))


@dataclass(frozen=True)
class Recipe:
    """How an arm is trained; `unscaled_share` in the first and the last epoch."""

    learning_rate: float = 2e-3
    unscaled_share: tuple[float, float] = (0.15, 0.15)
    distillation: float = 0.0
    average: float = 0.0
    times_epochs: int = 1  # as many epochs as the other arms, times this


UNSCALED = Recipe(unscaled_share=(1.0, 1.0))


@dataclass(frozen=True)
class Arm:
    """One line of a table. Without `pretrained`, the network starts from random weights."""

    name: str
    title: str
    model: str = REGULAR
    trained: str = ALL
    pretrained: bool = False
    layers: tuple[str, ...] = CONVOLUTION_NAMES  # whose offsets are trained
    random_offsets: str | None = None
    wide: bool = False  # with as many parameters as the deformable network of version 1
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def trains(self) -> bool:
        """Whether there are epochs at all."""
        return self.trained not in (NOTHING, STATISTICS)


def _tuned(name: str, title: str, trained: str = OFFSETS, model: str = DEFORM, **more) -> Arm:
    return Arm(name, title, model, trained, pretrained=True, **more)


TRAINED_REGULAR = Arm("regular", "regular, on unscaled images", recipe=UNSCALED)

STUDY = (
    TRAINED_REGULAR,
    _tuned("offsets-v1", "offsets only, version 1"),
    _tuned("offsets-v2", "offsets and masks only, version 2", model=DEFORM_MODULATED),
    _tuned("finetuned", "regular, all weights tuned", ALL, REGULAR),
    _tuned("finetuned-norm", "regular, batch normalisation tuned", NORM, REGULAR),
    _tuned(
        "finetuned-norm-fast",
        "the same, 10 times the learning rate",
        NORM,
        REGULAR,
        recipe=Recipe(learning_rate=2e-2),
    ),
    _tuned("statistics", "regular, statistics estimated again", STATISTICS, REGULAR),
    _tuned("offsets-last2", "offsets of the last two layers only", layers=CONVOLUTION_NAMES[2:]),
    _tuned("offsets-constant", "learned constant offsets", CONSTANT_OFFSETS),
    _tuned("masks", "masks only", MASKS, DEFORM_MODULATED),
    _tuned("random", "random offsets", NOTHING, random_offsets=CONVOLUTION),
    Arm("scratch-regular", "regular"),
    Arm("scratch-wide", "regular, wider", wide=True),
    Arm("scratch-v1", "version 1", DEFORM),
    Arm("scratch-v2", "version 2", DEFORM_MODULATED),
    Arm("scratch-random", "random offsets of a convolution", DEFORM, random_offsets=CONVOLUTION),
    Arm("scratch-constant", "random constant offsets", DEFORM, random_offsets=CONSTANT),
    Arm("scratch-v3", "version 3", DEFORM_V3),
    Arm("scratch-v4", "version 4", DEFORM_V4),
)

# Those that are trained with the larger shift too.
HARD = (
    "offsets-v1",
    "offsets-v2",
    "finetuned",
    "scratch-regular",
    "scratch-v1",
    "scratch-wide",
)


def _recipe(version: int, name: str, title: str, **recipe) -> Arm:
    model = {1: DEFORM, 2: DEFORM_MODULATED}[version]
    return _tuned(
        f"recipe-v{version}-{name}",
        f"version {version}, {title}",
        model=model,
        recipe=Recipe(times_epochs=3, **recipe),
    )


# Ways to tune the offsets, for the weights that the project ships.
RECIPES = (
    _recipe(1, "base", "three times the epochs"),
    _recipe(1, "all", "twice the learning rate, 70 % distilled, averaged, half to 15 % unscaled",
            learning_rate=4e-3, unscaled_share=(0.5, 0.15), distillation=0.7, average=0.999),
    _recipe(1, "rate1", "half the learning rate", learning_rate=1e-3),
    _recipe(1, "rate4", "twice the learning rate", learning_rate=4e-3),
    _recipe(1, "share30", "30 % unscaled", unscaled_share=(0.3, 0.3)),
    _recipe(1, "share-rises", "0 to 50 % unscaled", unscaled_share=(0.0, 0.5)),
    _recipe(1, "distilled", "half of the loss distilled", distillation=0.5),
    _recipe(1, "distilled90", "90 % of the loss distilled", distillation=0.9),
    _recipe(1, "averaged", "weights averaged", average=0.999),
    _recipe(1, "rate4-distilled-share30",
            "twice the learning rate, 90 % distilled, averaged, 30 % unscaled",
            learning_rate=4e-3, distillation=0.9, unscaled_share=(0.3, 0.3), average=0.999),
    _recipe(1, "rate4-distilled-share50", "the same, 50 % unscaled",
            learning_rate=4e-3, distillation=0.9, unscaled_share=(0.5, 0.5), average=0.999),
    _recipe(1, "rate8-distilled-share30",
            "four times the learning rate, 90 % distilled, averaged, 30 % unscaled",
            learning_rate=8e-3, distillation=0.9, unscaled_share=(0.3, 0.3), average=0.999),
    _recipe(1, "shipped", "90 % distilled, averaged, 20 % unscaled, as shipped",
            distillation=0.9, unscaled_share=(0.2, 0.2), average=0.999),
    _recipe(2, "base", "three times the epochs"),
    _recipe(2, "distilled90", "90 % of the loss distilled", distillation=0.9),
    _recipe(2, "rate4-distilled-share30",
            "twice the learning rate, 90 % distilled, averaged, 30 % unscaled",
            learning_rate=4e-3, distillation=0.9, unscaled_share=(0.3, 0.3), average=0.999),
    _recipe(2, "shipped", "90 % distilled, averaged, 20 % unscaled, as shipped",
            distillation=0.9, unscaled_share=(0.2, 0.2), average=0.999),
)  # fmt: skip

ARMS = {arm.name: arm for arm in (*STUDY, *RECIPES)}


class Run(NamedTuple):
    """One training of one arm. `shift` is that of the images it trains on, in pixels."""

    dataset: str
    arm: str
    shift: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.arm}-shift{self.shift:g}-seed{self.seed}"

    @classmethod
    def of(cls, name: str) -> "Run":
        """The run of a name.

        Raises:
          ValueError: no run has it.
        """
        dataset, _, rest = name.partition("-")
        arm, _, numbers = rest.rpartition("-shift")
        shift, _, seed = numbers.partition("-seed")
        if dataset not in DATASETS or arm not in ARMS or shift not in map("{:g}".format, SHIFTS):
            raise ValueError(f"there is no run {name}; mnist-regular-shift1-seed1 is one")
        return cls(dataset, arm, float(shift), int(seed))

    @property
    def regular(self) -> "Run | None":
        """The run whose weights this one starts from, if there is one."""
        if not ARMS[self.arm].pretrained:
            return None
        return Run(self.dataset, TRAINED_REGULAR.name, EASY_SHIFT, self.seed)


def plan() -> list[Run]:
    """All runs, the most important first."""
    return [
        *_runs(MNIST, (arm.name for arm in STUDY), EASY_SHIFT),
        *_runs(MNIST, (arm.name for arm in RECIPES), EASY_SHIFT, RECIPES_SEEDS),
        *_runs(FASHION, (arm.name for arm in STUDY), EASY_SHIFT),
        *_runs(MNIST, HARD, HARD_SHIFT),
        *_runs(FASHION, HARD, HARD_SHIFT),
    ]


def _runs(dataset: str, arms: Iterable[str], shift: float, seeds=SEEDS) -> Iterator[Run]:
    arms = list(arms)
    for seed in seeds:
        for arm in arms:
            yield Run(dataset, arm, shift, seed)


def chosen(
    datasets: Iterable[str] = (),
    arms: Iterable[str] = (),
    shifts: Iterable[float] = (),
    seeds: Iterable[int] = (),
) -> list[Run]:
    """The runs to do, in their order.

    Those of the plan, as far as what is given allows; an empty list allows all. Seeds that are
    given are taken in place of the plan's.

    Args:
      datasets: names.
      arms: names, or patterns with `*`.
      shifts: in pixels.
      seeds: any.

    Raises:
      UserError: no arm has a given name.
    """
    datasets, arms, shifts, seeds = (list(values) for values in (datasets, arms, shifts, seeds))
    for pattern in arms:
        if not fnmatch.filter(ARMS, pattern):
            raise UserError(f"there is no arm {pattern}; there are {', '.join(ARMS)}")
    runs = [
        run
        for run in plan()
        if (not datasets or run.dataset in datasets)
        and (not arms or any(fnmatch.fnmatchcase(run.arm, pattern) for pattern in arms))
        and (not shifts or run.shift in shifts)
    ]
    if seeds:
        runs = [run._replace(seed=seed) for seed in seeds for run in runs]
    return list(dict.fromkeys(runs))
