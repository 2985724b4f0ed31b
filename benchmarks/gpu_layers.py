"""Layers and types for a GPU only, and chains of calls. No framework is needed here."""

import statistics
from collections.abc import Callable

from layers import EXPERIMENT, Layer

DETECTION = (
    Layer(256, 32, 64, 28, 28),
    Layer(8, 128, 128, 100, 152),
    Layer(8, 256, 256, 50, 76),
    Layer(8, 512, 512, 25, 38),
)

BACK_TO_BACK = 200  # calls of a small layer
TIMED_TYPES = ("float16", "bfloat16", "tf32", "float32")

# --- Chains: what a call costs between others ---

CHAINED = (*DETECTION, EXPERIMENT[2])
CHAINED_TYPES = ("float16", "bfloat16", "tf32")
LINKS = 16
# Tensors that the links of a chain take in turn: no two links have the same two.
INPUTS, FILTERS = 13, 12


def arguments_of_links(links: int) -> list[tuple[int, int]]:
    """Which input (and offset) and which filters each link of a chain takes."""
    return [(k % INPUTS, k % FILTERS) for k in range(links)]


def slope_us(seconds_of: Callable[[int], float], links: int = LINKS, rounds: int = 15) -> float:
    """Microseconds of a link: seconds_of() a chain of 3 * links less that of one of `links`.

    What a chain costs whatever its length falls out.
    """
    short, long = links, 3 * links
    times = {short: [], long: []}
    for _ in range(2):  # to warm up
        seconds_of(short), seconds_of(long)
    for _ in range(rounds):
        for length, seconds in times.items():
            seconds.append(seconds_of(length))
    medians = {length: statistics.median(seconds) for length, seconds in times.items()}
    return 1e6 * (medians[long] - medians[short]) / (long - short)
