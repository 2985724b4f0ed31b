"""Draws the fuzzer's cases: what is called how, as plain data that prints in full.

A case follows from the seed, its number and its mode, and from nothing else.
"""

import math
import random
from dataclasses import dataclass, field, replace

from op_oracle import LARGEST, OFFSET_DTYPES, MisfitError, from_native, native, output_shape

# How often each mode is drawn, in parts of the whole.
WEIGHTS = {
    "eager": 5000,
    "raw": 3200,
    "graph": 500,
    "v1": 150,
    "raw_graph": 300,
    "shapes": 300,
    "layer": 200,
    "jit": 150,
    "raw_jit": 60,
    "second": 30,
    "threads": 6,
    "parallel": 6,
    "allocation": 40,
    "memory": 1,
}
ARGUMENTS = ("input", "filters", "offset", "mask")
ATTRIBUTES = ("strides", "padding", "dilations", "deform_groups", "data_format")
FLOATS = tuple(OFFSET_DTYPES)
# XLA compiles for shapes and attributes: there are so many of them, each called again and again.
JIT_SETTINGS = 10


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


def case(seed: int, number: int, mode: str) -> Case:
    """The case of this number: of `mode`, or of any for "all"."""
    draw = Draw(f"{seed} {number}")
    drawn = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    mode = drawn if mode == "all" else mode
    made = Case(seed, number, mode)
    _DRAWN_BY.get(mode, _draw_trial)(draw, made)
    return made


# --- Arguments that fit ---

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


def fit(case, draw, *, dtypes=FLOATS, size="any"):
    """Fills in arguments and attributes that fit each other; `size` is any, small or large."""
    small = size == "small"
    while True:
        case.meaning = meaning = _meaning(draw)
        large = size == "large" or (size == "any" and draw.chance(0.02))
        groups = draw.choice((1, 1, 1, 2, 3))
        channels = math.lcm(groups, meaning["deform_groups"]) * draw.choice(
            (1, 2, 3) if small else CHANNELS
        )
        sizes = [
            draw.choice((0, 1, 1, 1, 2, 2, 3)) if size == "any" else 2,
            *(draw.randrange(2, 6) if small else _length(draw, large) for _ in range(2)),
            channels,
        ]
        kernel = draw.choice(((1, 1), (3, 3), (3, 3), (2, 3), (1, 4), (5, 2)))
        shapes = {
            "input": tuple(from_native(sizes, meaning["data_format"])),
            "filters": (*kernel, channels // groups, groups * draw.choice((1, 2, 3, 4, 8, 17))),
        }
        if _refit(case, shapes, draw.chance(0.5)):
            break
    case.arguments = {}
    dtype = draw.choice(dtypes)
    offset_dtype = draw.choice(OFFSET_DTYPES[dtype])
    for name, shape in case.more.pop("shapes").items():
        moves = name in ("offset", "mask")
        fill = draw.choice(OFFSET_FILLS if name == "offset" else INPUT_FILLS)
        case.arguments[name] = Numbers(shape, offset_dtype if moves else dtype, fill)
    case.attributes = _spelled(draw, case.meaning)
    case.wanted = draw.some(case.arguments)


def _refit(case, shapes, mask, limit=200_000):
    """Puts shapes into `case.more`, with an offset and a mask that fit, if there is an output."""
    try:
        output = output_shape(shapes, case.meaning)
    except MisfitError:
        return False
    data_format = case.meaning["data_format"]
    taps = math.prod(shapes["filters"][:2]) * case.meaning["deform_groups"]
    for name, per_tap in (("offset", 2), ("mask", 1)):
        if name == "offset" or mask:
            shape = from_native(range(4), data_format)
            sizes = [*native(output, data_format)[:3], per_tap * taps]
            shapes[name] = tuple(sizes[axis] for axis in shape)
    if any(math.prod(shape) > limit for shape in (*shapes.values(), output)):
        return False
    case.more["shapes"] = shapes
    return True


def _spelled(draw, meaning):
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


# --- Changes after which they may not fit ---

DTYPES = (
    *FLOATS, "int32", "int64", "uint8", "bool", "complex64", "string", "float8_e5m2", "qint8",
)  # fmt: skip
WHOLE = (0, -1, LARGEST, LARGEST + 1, 2**62, 2**63 - 1, -(2**63))
TOO_WIDE = (2**63, -(2**63) - 1, 2**64 + 1, 2**70)
NO_INTEGERS = (
    1.5, math.nan, math.inf, "2", "11", b"\x01\x01", b"\x01", "", None, True, (), {}, {1: 1}, {1, 2},
    (1, None), (1, "1"), (1, 1.0), ((1, 1), (1, 1)), (1, 2, 3), (1,) * 5, (True, 1), (1, 2**63),
    Odd("float array"), Odd("bool array"), Odd("string tensor"), Odd("float tensor"),
    Odd("matrix tensor"), Odd("empty tensor"), Odd("keras tensor"), Odd("ragged"), Odd("sparse"),
    Odd("object"), Odd("function"), Odd("iterator"), Odd("type"), Odd("bytearray"),
)  # fmt: skip
# What is an integer, or two, in another guise. It may be taken or refused.
GUISES = (
    Odd("one tensor"), Odd("ones tensor"), Odd("one array"), Odd("ones array"), Odd("variable"),
    Odd("numpy integer"), Odd("index"), range(1, 2), Odd("int8 tensor"),
)  # fmt: skip
NO_PADDINGS = (
    "same", "SAME ", "valid", "EXPLICIT", "FULL", "", b"SAME", None, 0, 1, 1.5, True, (), (1, 1),
    ((1, 1), (1, 1)), ((0, 0),) * 3, ((0, 0),) * 5, ((0, 0), (1, 1, 1), (1, 1), (0, 0)), (0,) * 8,
    ((0, 0), (1, -1), (0, 0), (0, 0)), ((1, 0), (0, 0), (0, 0), (0, 0)), ["SAME"], ["ab"] * 4,
    [b"\x00\x00"] * 4, ((0, 0), (1, 0.5), (1, 1), (0, 0)), ((0, 0), (1, None), (1, 1), (0, 0)),
    ((0, 0), (2**63, 0), (1, 1), (0, 0)), ((0, 0), (2**62, 2**62), (2**62, 2**62), (0, 0)),
    ({}, {}, {}, {}), ({0, 1},) * 4, {"a": 1}, Odd("object"), Odd("string tensor"),
    Odd("float tensor"), Odd("matrix tensor"), Odd("keras tensor"), Odd("ragged"), Odd("function"),
    Odd("float array"), Odd("type"),
)  # fmt: skip
PADDING_GUISES = (Odd("padding array"), Odd("padding tensor"), Odd("padding iterator"))
NO_FORMATS = (
    "nhwc", "nchw", "NHCW", "NCHW ", "channels_last", "", None, 0, True, b"NHWC", ["NHWC"],
    ("NHWC", "NCHW"), {"NHWC"}, Odd("string tensor"), Odd("ones array"), Odd("object"),
    Odd("ones tensor"), Odd("float tensor"),
)  # fmt: skip
NO_TENSORS = (
    "text", b"bytes", ["a"], {}, {"a": 1}, {1.0}, Odd("none"), Odd("object"), Odd("function"),
    Odd("iterator"), Odd("ragged"), Odd("sparse"), Odd("indexed slices"), Odd("keras tensor"),
    Odd("tensor spec"), Odd("type"), Odd("ragged list"), Odd("object array"),
    Odd("dataset"), Odd("layer"), Odd("optional"), Odd("tensor array"), Odd("resource"),
    1j, 10**400, (1, "a"), math.nan, Odd("deep list"), Odd("dead tensor"), Odd("string array"),
    Odd("keras variable of another shape"),
)  # fmt: skip


def _change_rank(draw, case):
    name = draw.choice(list(case.arguments))
    shape = case.arguments[name].shape
    other = draw.choice(
        [(), (0,), (1,), shape[1:], shape[:-1], (1, *shape), (*shape, 1), (*shape, 2, 0)]
    )
    _reshape(case, name, other)


def _change_size(draw, case):
    name = draw.choice(list(case.arguments))
    shape = list(case.arguments[name].shape)
    axis = draw.randrange(4)
    size = shape[axis]
    shape[axis] = draw.choice([size + 1, max(size - 1, 0), 2 * size, 0, size // 2, size + 2])
    _reshape(case, name, tuple(shape))


def _permute(draw, case):
    name = draw.choice(list(case.arguments))
    _reshape(case, name, tuple(draw.sample(case.arguments[name].shape, 4)))


def _reshape(case, name, shape):
    case.change = f"shape of {name}"
    case.arguments[name] = replace(case.arguments[name], shape=shape)


def _change_dtype(draw, case):
    name = draw.choice(list(case.arguments))
    numbers = replace(case.arguments[name], dtype=draw.choice(DTYPES))
    case.arguments[name] = numbers
    case.change = f"dtype of {name}"
    case.blamed = wrong_dtypes(case.arguments)


def wrong_dtypes(arguments):
    """The arguments whose dtypes do not go with the others', or None if all do."""
    dtypes = {name: value.dtype for name, value in arguments.items()}
    if dtypes["input"] not in OFFSET_DTYPES:
        return ("input",)
    if dtypes["filters"] != dtypes["input"]:
        # The offset may be wrong too, where the input is.
        return ("filters", "input")
    if dtypes["offset"] not in OFFSET_DTYPES[dtypes["input"]]:
        return ("offset",)
    return ("mask",) if dtypes.get("mask", dtypes["offset"]) != dtypes["offset"] else None


def _change_object(draw, case):
    name = draw.choice(ARGUMENTS)
    case.arguments[name] = draw.choice(NO_TENSORS)
    case.change = f"{name} is no tensor"
    case.blamed = (name,)
    if case.arguments[name] in (math.nan, Odd("deep list"), Odd("keras variable of another shape")):
        case.blamed = ARGUMENTS  # a tensor, but not of this shape, nor perhaps of this type
    if (name, case.arguments[name]) == ("mask", Odd("none")):
        del case.arguments[name]
        case.blamed = None
    case.wanted = ()


def _change_form(draw, case):
    """Arrays, lists and variables, which are taken like tensors."""
    name = draw.choice(list(case.arguments))
    numbers = case.arguments[name]
    form = draw.choice(
        ("array", "list", "variable", "keras variable", "not contiguous", "read only")
    )
    # Python's numbers become float32 as an input, the input's type as filters and offset.
    kept = {"input": "float32", "filters": numbers.dtype, "mask": numbers.dtype}
    converted = kept.get(name, case.arguments["input"].dtype)
    if form == "list" and (converted != numbers.dtype or 0 in numbers.shape):
        form = "array"
    case.arguments[name] = replace(numbers, form=form)
    case.change = f"{name} is passed as {form}"
    case.wanted = tuple(other for other in case.wanted if other != name)


def _change_attribute(draw, case):
    """Integers that may be far out, with shapes that fit them where any do."""
    name = draw.choice(("strides", "dilations", "padding", "deform_groups"))
    numbers = draw.choices((*WHOLE, 1, 2, LARGEST - 1, LARGEST // 2), k=2)
    if name == "deform_groups":
        case.meaning[name] = numbers[0]
    elif name == "padding":
        case.meaning[name] = (tuple(numbers), (0, draw.choice(WHOLE)))
    else:
        case.meaning[name] = tuple(numbers)
    if draw.chance(0.3):
        case.meaning["strides"] = (draw.choice((LARGEST, 2**30)),) * 2
    case.change = "attributes far out"
    case.attributes = _spelled(draw, case.meaning)
    shapes = {name: case.arguments[name].shape for name in ("input", "filters")}
    if _refit(case, shapes, "mask" in case.arguments):
        for argument, shape in case.more.pop("shapes").items():
            case.arguments[argument] = replace(case.arguments[argument], shape=shape)


def _change_to_no_attribute(draw, case):
    name = draw.choice(ATTRIBUTES)
    guise = False
    if name == "data_format":
        value = draw.choice(NO_FORMATS)
    elif name == "padding":
        guise = draw.chance(0.15)
        value = draw.choice(PADDING_GUISES if guise else NO_PADDINGS)
    else:
        guise = draw.chance(0.25)
        value = draw.choice(GUISES if guise else (*NO_INTEGERS, *TOO_WIDE))
    case.attributes[name] = value
    case.change = f"{name} in {'another guise' if guise else 'a wrong form'}"
    case.blamed = () if guise else (name,)
    if guise and name != "padding" and name != "deform_groups":
        case.meaning[name] = (1, 1)
    elif guise and name == "padding":
        case.meaning[name] = ((1, 1), (1, 1))
    elif guise:
        case.meaning[name] = 1


CHANGES = (
    _change_rank, _change_size, _change_size, _permute, _change_dtype, _change_object, _change_object,
    _change_form, _change_form, _change_attribute, _change_to_no_attribute, _change_to_no_attribute,
)  # fmt: skip


def _draw_op(draw, case):
    fit(case, draw)
    if draw.chance(0.55):
        draw.choice(CHANGES)(draw, case)


def _draw_graph(draw, case):
    _draw_op(draw, case)
    _draw_specs(draw, case)


def _draw_specs(draw, case):
    """What is known of the shapes while the graph is made."""
    specs = {}
    for name, value in case.arguments.items():
        if isinstance(value, Numbers) and value.form == "tensor":
            known = draw.choice(("all", "all", "rank", "nothing", "some"))
            specs[name] = {
                "all": value.shape,
                "nothing": None,
                "rank": (None,) * len(value.shape),
                "some": tuple(size if draw.chance(0.5) else None for size in value.shape),
            }[known]
    case.more["known"] = specs


def _draw_v1(draw, case):
    _draw_graph(draw, case)


# --- Shapes in inference only ---

SIZES = (
    None,
    None,
    0,
    1,
    2,
    3,
    4,
    9,
    18,
    LARGEST - 1,
    LARGEST,
    LARGEST + 1,
    2**32,
    2**40,
    2**61,
    2**62 + 1,
)


def _draw_shapes(draw, case):
    """Arguments of which only the shapes matter, and of these only what a graph knows."""
    fit(case, draw)
    case.wanted = ()
    case.more["known"] = known = {}
    data_format = case.meaning["data_format"]
    case.more["op"] = draw.choice(("op", "raw", "grad"))
    change = draw.choice(("some unknown", "some far out", "all far out", "kernel far out"))
    if draw.chance(0.3):
        _change_attribute(draw, case)
    case.change += f"; shapes: {change}"
    for name, value in case.arguments.items():
        far = {"some far out": 0.15, "all far out": 1}.get(change, 0)
        known[name] = tuple(
            draw.choice(SIZES) if draw.chance(far) else None if draw.chance(0.3) else size
            for size in value.shape
        )
        if draw.chance(0.1):
            known[name] = None
    if change == "kernel far out":
        # So many taps that their product may be past any integer, and little else is known.
        sizes = (1, 2**16, 2**30, 2**30 + 1, LARGEST - 1, LARGEST)
        known["filters"] = (*draw.choices(sizes, k=2), None, draw.choice((None, 8)))
        known["input"] = draw.choice((None, tuple(from_native((2, 5, 6, None), data_format))))
        case.meaning |= {"dilations": (1, 1), "padding": draw.choice(("SAME", "VALID"))}
        case.meaning["deform_groups"] = draw.choice((1, 2, 3, 4, 2**16, 2**30, LARGEST))
        case.attributes = _spelled(draw, case.meaning)
    if case.more["op"] != "op":
        case.attributes = raw_attributes(case.meaning)
    if case.more["op"] == "grad":
        known["grad_output"] = draw.choice(
            (None, (), (0,), (LARGEST, LARGEST, None, None), (2, 3, 4, 5))
        )


# --- Raw ops ---


# For raw ops TensorFlow checks types and attributes itself. Its errors name an attribute or the op.
RAW_NAMES = (
    *ARGUMENTS, *ATTRIBUTES, "explicit_paddings", "grad_output", "T", "Toffset", "mask_count",
    "DeformConv2D", "DeformConv2DGrad", "attr",
)  # fmt: skip


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


def raw_meaning(attributes):
    """`attributes` as the oracle takes them, or None where they are in a wrong form."""
    if not _has_types(attributes):
        return None
    data_format, padding = attributes["data_format"], attributes["padding"]
    if data_format not in ("NHWC", "NCHW"):
        return None
    if padding not in ("SAME", "VALID", "EXPLICIT"):
        return None
    explicit = attributes.get("explicit_paddings", [])
    lists = attributes["strides"], attributes["dilations"], explicit
    if list(map(len, lists)) != [4, 4, 8 if padding == "EXPLICIT" else 0]:
        return None
    meaning = {"data_format": data_format, "deform_groups": attributes["deform_groups"]}
    for name in ("strides", "dilations"):
        batch, *sizes, channels = native(attributes[name], data_format)
        if (batch, channels) != (1, 1):
            return None
        meaning[name] = tuple(sizes)
    meaning["padding"] = padding
    if padding == "EXPLICIT":
        pairs = [tuple(explicit[axis : axis + 2]) for axis in range(0, 8, 2)]
        batch, *sizes, channels = native(pairs, data_format)
        if (batch, channels) != ((0, 0), (0, 0)):
            return None
        meaning["padding"] = tuple(sizes)
    return meaning


def _has_types(attributes):
    """Whether each attribute has the type that the op gives it."""
    lists = [attributes[name] for name in ("strides", "dilations")]
    lists.append(attributes.get("explicit_paddings", []))
    lists.append([attributes["deform_groups"]])
    strings = attributes["data_format"], attributes["padding"]
    return all(isinstance(text, str) for text in strings) and all(
        isinstance(numbers, list)
        and all(isinstance(n, int) and -(2**63) <= n < 2**63 for n in numbers)
        for numbers in lists
    )


RAW_ODD = {
    "strides": ([], [1], [1, 1, 1], [1] * 5, [0] * 4, [1, -1, 1, 1], [2, 1, 1, 1], "1", None, [1.5] * 4,
                [2**63] * 4, [1, LARGEST + 1, 1, 1], [1, 2**63 - 1, 2**63 - 1, 1]),
    "dilations": ([], [1, 1], [0, 1, 1, 1], [1, 2**62, 2**62, 1], [1, 1, 1, 2], None, "x"),
    "padding": ("same", "", "FULL", None, 3, ["SAME"]),
    "explicit_paddings": ([], [0], [1] * 8, [0] * 7, [0] * 9, [0, 0, -1, 0, 0, 0, 0, 0], [2**63 - 1] * 8,
                          [0, 0, 2**62, 2**62, 2**62, 2**62, 0, 0], None, "x"),
    "deform_groups": (0, -1, LARGEST, LARGEST + 1, 2**63 - 1, -(2**63), 2**63, None, "1", 1.5),
    "data_format": ("nhwc", "", "NCWH", None, 1),
}  # fmt: skip


def _draw_raw(draw, case, dtypes=FLOATS, setting=None):
    fitting = draw if setting is None else Draw(f"{case.seed} setting {setting}")
    fit(case, fitting, dtypes=dtypes)
    case.attributes = raw_attributes(case.meaning)
    case.more["op"] = op = draw.choice(
        ("deform_conv2d", "deform_conv2d_grad", "deform_conv2d_grad")
    )
    case.more["masks"] = "mask" in case.arguments
    if op == "deform_conv2d":
        case.wanted = ()
    else:
        shape = tuple(output_shape(_shapes(case), case.meaning))
        case.arguments["grad_output"] = Numbers(
            shape, case.arguments["input"].dtype, draw.choice(INPUT_FILLS)
        )
    if draw.chance(0.6):
        _change_raw(draw, case)


def _shapes(case):
    return {name: case.arguments[name].shape for name in ARGUMENTS if name in case.arguments}


def _change_raw(draw, case):
    changes = ["shape", "dtype", "types", "attribute", "masks"]
    if "grad_output" in case.arguments:
        changes += ["grad_output"] * 3
    change = draw.choice(changes)
    if change == "grad_output":
        shape = case.arguments[change].shape
        others = [(0,), (1,), (), shape[1:], (*shape, 1), tuple(reversed(shape)), (1, *shape[1:])]
        others += [tuple(draw.sample(shape, 4)), (*shape[:3], shape[3] + 1), (*shape[:3], 0)]
        _reshape(case, change, draw.choice(others))
    elif change == "shape":
        draw.choice((_change_rank, _change_size, _change_size, _permute))(draw, case)
    elif change == "dtype":
        _change_dtype(draw, case)
        case.blamed = _raw_blame(case)
    elif change == "types":
        # Any pair, of which the kernels take some.
        types = draw.choice(FLOATS), draw.choice(FLOATS)
        for name, value in case.arguments.items():
            case.arguments[name] = replace(value, dtype=types[name in ("offset", "mask")])
        case.change = "types"
        case.blamed = _raw_blame(case)
    elif change == "attribute":
        name = draw.choice(list(RAW_ODD))
        case.attributes[name] = draw.choice(RAW_ODD[name])
        case.change = f"{name} in a wrong form or out of range"
        meaning = raw_meaning(case.attributes)
        if meaning is None:
            # What is no attribute of the op's types TensorFlow itself refuses, or converts.
            case.blamed = RAW_NAMES if _has_types(case.attributes) else ()
            case.more["unclear"] = case.blamed == ()
        else:
            case.meaning = meaning
    else:
        case.more["masks"] = draw.choice((2, 3))
        case.change = "more than one mask"
        case.blamed = ("mask",)
        case.arguments.setdefault("mask", replace(case.arguments["offset"], shape=(1, 1, 1, 1)))


def _raw_blame(case):
    blamed = wrong_dtypes(case.arguments)
    grad_output = case.arguments.get("grad_output")
    if blamed is None and grad_output and grad_output.dtype != case.arguments["input"].dtype:
        blamed = ("grad_output",)
    # TensorFlow reports the types of a raw op itself, by the names of argument or attribute.
    return None if blamed is None else RAW_NAMES


def _draw_raw_graph(draw, case):
    _draw_raw(draw, case)
    _draw_specs(draw, case)


# --- XLA ---


def _draw_jit(draw, case):
    setting = draw.randrange(JIT_SETTINGS)
    fit(case, Draw(f"{case.seed} setting {setting}"))
    if draw.chance(0.9):
        case.more["setting"] = setting
        for name, value in case.arguments.items():
            fill = draw.choice(OFFSET_FILLS if name == "offset" else INPUT_FILLS)
            case.arguments[name] = replace(value, fill=fill)
    else:
        draw.choice((_change_rank, _change_size, _permute, _change_dtype, _change_attribute))(
            draw, case
        )


def _draw_raw_jit(draw, case):
    # One compilation each: of small tensors.
    _draw_raw(draw, case, setting=draw.randrange(JIT_SETTINGS))


# --- Second order ---


def _draw_second(draw, case):
    while not case.arguments or any(0 in value.shape for value in case.arguments.values()):
        case.arguments = {}
        fit(case, draw, dtypes=("float64",), size="small")
    case.arguments = {name: replace(value, fill="normal") for name, value in case.arguments.items()}
    case.wanted = draw.some(case.arguments) or ("offset",)
    case.more["graph"] = draw.chance(0.2)


# --- The layer ---

LAYER_ODD = {
    "filters": (0, -1, 1.5, None, "a", 2**40),
    "kernel_size": (0, (0, 1), (1, 2, 3), -1, None, "3", 1.5),
    "strides": (0, (1, -1), "a", None, (1, 2, 3)),
    "padding": ("full", "", 3, None, "causal", ((1, 1), (1, 1))),
    "data_format": ("NHWC", "channels", 3),
    "dilation_rate": (0, -1, "a", None, (1, 2, 3)),
    "groups": (0, -1, 7, None, "a", 1.5),
    "activation": ("no such", 3),
    "deform_groups": (0, -1, 1.5, True, "1", None, 2**40, 7, Odd("float tensor"), Odd("object")),
    "modulated": (1, 0, "True", None, Odd("ones array"), Odd("object")),
    "mask_scale": (
        0,
        -1.0,
        math.inf,
        math.nan,
        "2",
        None,
        True,
        1j,
        Odd("object"),
        Odd("string tensor"),
    ),
    "own_offsets": (1, "no", None, Odd("ones tensor")),
    "offset_trainable": (1, "yes", Odd("ones array")),
    "offset_kernel_initializer": ("no such", 3),
}
LAYER_NAMES = (*LAYER_ODD, "inputs", "input", "offset", "mask", "ndim", "rank", "shape")


def _draw_layer(draw, case):
    while True:
        fit(case, draw, size=draw.choice(("any", "small")))
        meaning = case.meaning
        # Keras has no explicit padding, no dilation beside strides, and no empty output of "valid".
        dilated_strides = max(meaning["strides"]) > 1 < max(meaning["dilations"])
        empty = meaning["padding"] == "VALID" and 0 in case.arguments["offset"].shape[1:]
        if isinstance(meaning["padding"], str) and not dilated_strides and not empty:
            break
    shape, channels_first = case.arguments["input"].shape, meaning["data_format"] == "NCHW"
    filters = case.arguments["filters"].shape
    dtype = case.arguments["input"].dtype
    case.attributes = {
        "filters": filters[3],
        "kernel_size": filters[:2],
        "strides": meaning["strides"],
        "padding": meaning["padding"].lower(),
        "data_format": "channels_first" if channels_first else "channels_last",
        "dilation_rate": meaning["dilations"],
        "groups": shape[1 if channels_first else 3] // filters[2],
        "use_bias": draw.chance(0.5),
        "deform_groups": meaning["deform_groups"],
        "modulated": "mask" in case.arguments,
        "mask_scale": draw.choice((1, 2.0, 0.5)),
        "own_offsets": draw.chance(0.6),
        "offset_kernel_initializer": draw.choice(("zeros", "random_normal", "glorot_uniform")),
        "dtype": draw.choice((dtype, dtype, f"mixed_{dtype}")) if "16" in dtype else dtype,
    }
    if case.attributes["own_offsets"]:
        del case.arguments["offset"]
        case.arguments.pop("mask", None)
    del case.arguments["filters"]
    # As they are drawn, numbers may be larger than what a convolution of the offsets takes well.
    case.arguments = {
        name: replace(
            value,
            dtype="float64" if dtype == "float64" else "float32" if name != "input" else dtype,
        )
        for name, value in case.arguments.items()
    }
    if case.attributes["own_offsets"]:
        case.arguments["input"] = replace(case.arguments["input"], fill="normal")
    case.wanted = draw.choice(((), ("variables",)))
    case.more["call"] = draw.choice(("eager", "eager", "eager", "function", "symbolic"))
    if draw.chance(0.5):
        _change_layer(draw, case)


def _change_layer(draw, case):
    change = draw.choice(("setting", "setting", "shape", "object", "count"))
    name = draw.choice(list(case.arguments))
    if change == "setting":
        name = draw.choice(list(LAYER_ODD))
        case.attributes[name] = draw.choice(LAYER_ODD[name])
        case.change = f"{name} in a wrong form or out of range"
        # Keras takes some of them: a number for an activation's slope, say.
        case.blamed = ()
        ours = ("deform_groups", "modulated", "mask_scale", "own_offsets", "offset_trainable")
        if name in ours:
            case.blamed = (name,)
    elif change == "shape":
        case.more["call"] = "eager"
        draw.choice((_change_rank, _change_size, _change_size))(draw, case)
        case.blamed = ()
    elif change == "object":
        case.more["call"] = "eager"
        value = draw.choice(NO_TENSORS)
        case.arguments[name] = value
        case.change = f"{name} is no tensor"
        case.blamed = ()
    else:
        case.more["call"] = "eager"
        case.more["count"] = draw.choice((0, 1, 2, 3, 4))
        case.change = "another number of inputs"
        case.blamed = ()


# --- Trials of a whole: many calls each ---


def _draw_trial(draw, case):
    if case.mode == "memory":
        case.more = {"what": draw.choice(("eager", "layer")), "calls": 2000}
    elif case.mode == "allocation":
        # Of what TensorFlow and Python allocate besides, nothing is as large.
        least, sizes = 1 << 16, [0]
        while max(sizes) < least:
            fit(case, draw, size="large")
            sizes = [math.prod(value.shape) for value in case.arguments.values()]
        case.more = {"how": draw.choice(("eager",) * 6 + ("function",) * 3 + ("huge",))}
        case.more |= {"failing": draw.choice((1, 1, 2, 3, 4, 5, 6, 8)), "least": least}
    else:
        case.more = {"calls": 8 if case.mode == "threads" else draw.choice((2, 4, 6))}
        case.more["repeats"] = 6


_DRAWN_BY = {
    "eager": _draw_op,
    "graph": _draw_graph,
    "v1": _draw_v1,
    "raw": _draw_raw,
    "raw_graph": _draw_raw_graph,
    "shapes": _draw_shapes,
    "jit": _draw_jit,
    "raw_jit": _draw_raw_jit,
    "second": _draw_second,
    "layer": _draw_layer,
}
