"""What the fuzzer calls, as plain data that prints in full, and arguments that fit each other."""

import itertools
import math
import random
from dataclasses import dataclass, field

from op_oracle import OFFSET_DTYPES, MisfitError, from_native, native, output_shape

ARGUMENTS = ("input", "filters", "offset", "mask")
ATTRIBUTES = ("strides", "padding", "dilations", "deform_groups", "data_format")
FLOATS = tuple(OFFSET_DTYPES)
# For raw ops TensorFlow checks types and attributes itself. Its errors name an attribute or the op.
RAW_NAMES = (
    *ARGUMENTS, *ATTRIBUTES, "explicit_paddings", "grad_output", "T", "Toffset", "mask_count",
    "DeformConv2D", "DeformConv2DGrad", "attr",
)  # fmt: skip


@dataclass(frozen=True)
class Numbers:
    """An array to be filled, and the Python type that it is passed as."""

    shape: tuple
    dtype: str
    fill: str = "normal"
    form: str = "tensor"


@dataclass(frozen=True)
class Odd:
    """An object that `op_values.ODD` makes."""

    name: str


@dataclass
class Case:
    seed: int
    number: int
    mode: str
    change: str = "none: it fits"  # what may not fit
    arguments: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)  # as they are passed
    meaning: dict = field(default_factory=dict)  # the same as op_oracle takes them
    wanted: tuple = ()  # arguments whose gradients are asked for
    # What an error must name. None: whether there is one is for the oracle to say, and it may name
    # any argument. (): there may be an error, which names any argument.
    blamed: tuple | None = None
    more: dict = field(default_factory=dict)  # of this mode only

    def __str__(self):
        lines = [
            f"case {self.number} of seed {self.seed}, mode {self.mode}",
            f"change: {self.change}",
        ]
        lines += [f"{name} = {value!r}" for name, value in self.arguments.items()]
        lines += [f"{name} = {value!r}" for name, value in self.attributes.items()]
        lines += [f"gradients by {', '.join(self.wanted) or 'nothing'}"]
        lines += [f"{name}: {value!r}" for name, value in self.more.items()]
        return "\n".join(lines)


class Draw(random.Random):
    def chance(self, probability):
        return self.random() < probability

    def some(self, items):
        return tuple(item for item in items if self.chance(0.5))


CHANNELS = (1, 1, 2, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33)
INPUT_FILLS = ("normal",) * 8 + ("integers", "zeros", "odd", "large", "small")
OFFSET_FILLS = ("normal",) * 5 + ("integers",) * 3 + ("halves", "zeros", "far", "odd", "small")


def _meaning(draw):
    meaning = {
        "strides": (draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3))),
        "padding": draw.choice(("SAME", "SAME", "VALID")),
        "dilations": (draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2))),
        "deform_groups": draw.choice((1, 1, 1, 2, 3)),
        "data_format": draw.choice(("NHWC", "NCHW")),
    }
    if draw.chance(0.25):
        meaning["padding"] = tuple(tuple(draw.choices(range(4), k=2)) for _ in range(2))
    return meaning


def _length(draw, large):
    if large:
        return draw.randrange(10, 40)
    return draw.choice((0,) + tuple(range(1, 10)) * 5)


def fit(case, draw, *, dtypes=FLOATS, size="any", filters=True):
    """Fills in arguments and attributes that fit each other; `size` is any, small or large.

    Without `filters`, they are the ones of ones that aggregating gives the same as.
    """
    small = size == "small"
    while True:
        case.meaning = meaning = _meaning(draw)
        large = size == "large" or (size == "any" and draw.chance(0.02))
        groups = draw.choice((1, 1, 1, 2, 3))
        channels = math.lcm(groups, meaning["deform_groups"]) * draw.choice(
            (1, 2, 3) if small else CHANNELS
        )
        multiplier = draw.choice((1, 2, 3, 4, 8, 17))
        if not filters:
            groups, multiplier = channels, 1
        sizes = [
            draw.choice((0, 1, 1, 1, 2, 2, 3)) if size == "any" else 2,
            *(draw.randrange(2, 6) if small else _length(draw, large) for _ in range(2)),
            channels,
        ]
        kernel = draw.choice(((1, 1), (3, 3), (3, 3), (2, 3), (1, 4), (5, 2)))
        shapes = {
            "input": tuple(from_native(sizes, meaning["data_format"])),
            "filters": (*kernel, channels // groups, groups * multiplier),
        }
        shapes = completed(shapes, meaning, not filters or draw.chance(0.5))
        # Little is compared of empty tensors.
        if shapes and (0 not in itertools.chain(*shapes.values()) or draw.chance(0.4)):
            break
    case.arguments = {}
    dtype = draw.choice(dtypes)
    offset_dtype = draw.choice(OFFSET_DTYPES[dtype])
    for name, shape in shapes.items():
        moves = name in ("offset", "mask")
        fill = draw.choice(OFFSET_FILLS if name == "offset" else INPUT_FILLS)
        case.arguments[name] = Numbers(shape, offset_dtype if moves else dtype, fill)
    if not filters:
        case.arguments["filters"] = Numbers(shapes["filters"], dtype, "ones")
    case.attributes = spelled(draw, case.meaning)
    case.wanted = draw.some(name for name in case.arguments if filters or name != "filters")


def completed(shapes, meaning, mask, limit=200_000):
    """Adds shapes of offset and, perhaps, mask; None where nothing fits, or is too large."""
    try:
        output = output_shape(shapes, meaning)
    except MisfitError:
        return None
    data_format = meaning["data_format"]
    samples = math.prod(shapes["filters"][:2]) * meaning["deform_groups"]
    counts = {"offset": 2 * samples} | ({"mask": samples} if mask else {})
    per_position = {
        name: tuple(from_native([*native(output, data_format)[:3], count], data_format))
        for name, count in counts.items()
    }
    shapes = shapes | per_position
    if any(math.prod(shape) > limit for shape in (*shapes.values(), output)):
        return None
    return shapes


def spelled(draw, meaning):
    """The attributes as a caller may write them; some are left to their defaults."""
    data_format = meaning["data_format"]
    attributes = {"data_format": data_format, "deform_groups": meaning["deform_groups"]}
    for name in ("strides", "dilations"):
        h, w = meaning[name]
        spellings = [(h, w), [h, w], tuple(from_native([1, h, w, 1], data_format))]
        if h == w:
            spellings += [h, (h,), h]
        attributes[name] = draw.choice(spellings)
    padding = meaning["padding"]
    if not isinstance(padding, str):
        padding = tuple(from_native([(0, 0), *padding, (0, 0)], data_format))
    attributes["padding"] = padding
    defaults = {
        "data_format": "NHWC",
        "deform_groups": 1,
        "strides": 1,
        "dilations": 1,
        "padding": "SAME",
    }
    return {
        name: value
        for name, value in attributes.items()
        if value != defaults[name] or draw.chance(0.5)
    }


def raw_attributes(meaning):
    data_format = meaning["data_format"]
    attributes = {
        name: list(from_native([1, *meaning[name], 1], data_format))
        for name in ("strides", "dilations")
    }
    attributes |= {"padding": meaning["padding"], "deform_groups": meaning["deform_groups"]}
    attributes["data_format"] = data_format
    if not isinstance(meaning["padding"], str):
        attributes["padding"] = "EXPLICIT"
        pairs = from_native([(0, 0), *meaning["padding"], (0, 0)], data_format)
        attributes["explicit_paddings"] = [number for pair in pairs for number in pair]
    return attributes
