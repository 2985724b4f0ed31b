"""Changes to arguments that fit, after which they may not, and tables of what is no argument."""

import math
from dataclasses import replace

from op_cases import ARGUMENTS, ATTRIBUTES, FLOATS, RAW_NAMES, Odd, completed, spelled
from op_oracle import LARGEST, OFFSET_DTYPES, native

DTYPES = (
    *FLOATS, "int32", "int64", "uint8", "bool", "complex64", "string", "float8_e5m2", "qint8",
)  # fmt: skip
WHOLE = (0, -1, LARGEST, LARGEST + 1, 2**62, 2**63 - 1, -(2**63))
TOO_WIDE = (2**63, -(2**63) - 1, 2**64 + 1, 2**70)
NO_INTEGERS = (
    1.5, math.nan, math.inf, "2", "11", b"\x01\x01", b"\x01", "", None, True, (), {}, {1: 1},
    {1, 2},
    (1, None), (1, "1"), (1, 1.0), ((1, 1), (1, 1)), (1, 2, 3), (1,) * 5, (True, 1), (1, 2**63),
    Odd("float array"), Odd("bool array"), Odd("string tensor"), Odd("float tensor"),
    Odd("matrix tensor"), Odd("empty tensor"), Odd("keras tensor"), Odd("ragged"), Odd("sparse"),
    Odd("object"), Odd("function"), Odd("iterator"), Odd("type"), Odd("bytearray"),
)  # fmt: skip
# What is an integer, or two, in another guise. It may be taken or refused.
GUISES = (
    Odd("one tensor"), Odd("ones tensor"), Odd("one array"), Odd("ones array"), Odd("variable"),
    Odd("numpy integer"), Odd("index"), range(1, 2), Odd("int8 tensor"), Odd("unknown tensor"),
    Odd("unknown number"),
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
# Tensors after all, but not of this shape, nor perhaps of this type: another argument may be
# blamed. Of tensors of another graph, TensorFlow itself speaks.
TENSORS_BLAME = (*ARGUMENTS, "out of scope", "same graph")
TENSORS = (math.nan, Odd("deep list"), Odd("dead tensor"), Odd("keras variable of another shape"))


def change_rank(draw, case):
    name = draw.choice(list(case.arguments))
    shape = case.arguments[name].shape
    other = draw.choice(
        [(), (0,), (1,), shape[1:], shape[:-1], (1, *shape), (*shape, 1), (*shape, 2, 0)]
    )
    _reshape(case, name, other)


def change_size(draw, case):
    name = draw.choice(list(case.arguments))
    shape = list(case.arguments[name].shape)
    axis = draw.randrange(4)
    size = shape[axis]
    shape[axis] = draw.choice([size + 1, max(size - 1, 0), 2 * size, 0, size // 2, size + 2])
    _reshape(case, name, tuple(shape))


def permute(draw, case):
    name = draw.choice(list(case.arguments))
    _reshape(case, name, tuple(draw.sample(case.arguments[name].shape, 4)))


def _reshape(case, name, shape):
    case.change = f"shape of {name}"
    case.arguments[name] = replace(case.arguments[name], shape=shape)


def change_dtype(draw, case):
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
    if case.arguments[name] in TENSORS:
        case.blamed = TENSORS_BLAME
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


def change_attribute(draw, case):
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
    case.attributes = spelled(draw, case.meaning)
    shapes = {name: case.arguments[name].shape for name in ("input", "filters")}
    shapes = completed(shapes, case.meaning, "mask" in case.arguments) or {}
    for argument, shape in shapes.items():
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
    if guise:
        case.meaning[name] = {"padding": ((1, 1), (1, 1)), "deform_groups": 1}.get(name, (1, 1))


CHANGES = (
    change_rank, change_size, change_size, permute, change_dtype, _change_object,
    _change_object, _change_form, _change_form, change_attribute, _change_to_no_attribute,
    _change_to_no_attribute,
)  # fmt: skip


# --- Raw ops ---


def raw_meaning(attributes):
    """`attributes` as the oracle takes them, or None where they are in a wrong form."""
    if not _has_types(attributes):
        return None
    data_format, padding = attributes["data_format"], attributes["padding"]
    explicit = attributes.get("explicit_paddings", [])
    lists = attributes["strides"], attributes["dilations"], explicit
    if (
        data_format not in ("NHWC", "NCHW")
        or padding not in ("SAME", "VALID", "EXPLICIT")
        or [*map(len, lists)] != [4, 4, 8 if padding == "EXPLICIT" else 0]
    ):
        return None
    pairs = [tuple(explicit[axis : axis + 2]) for axis in range(0, 8, 2)]
    per_axis = {
        "strides": native(attributes["strides"], data_format),
        "dilations": native(attributes["dilations"], data_format),
        "padding": native(pairs, data_format),
    }
    # Of batch and channels.
    others = {name: {sizes[0], sizes[3]} for name, sizes in per_axis.items()}
    neutral = {"strides": {1}, "dilations": {1}, "padding": {(0, 0) if explicit else ()}}
    if others != neutral:
        return None
    meaning = {name: tuple(sizes[1:3]) for name, sizes in per_axis.items()}
    if padding != "EXPLICIT":
        meaning["padding"] = padding
    return meaning | {"data_format": data_format, "deform_groups": attributes["deform_groups"]}


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
    "strides": ([], [1], [1, 1, 1], [1] * 5, [0] * 4, [1, -1, 1, 1], [2, 1, 1, 1], "1", None,
                [1.5] * 4, [2**63] * 4, [1, LARGEST + 1, 1, 1], [1, 2**63 - 1, 2**63 - 1, 1]),
    "dilations": ([], [1, 1], [0, 1, 1, 1], [1, 2**62, 2**62, 1], [1, 1, 1, 2], None, "x"),
    "padding": ("same", "", "FULL", None, 3, ["SAME"]),
    "explicit_paddings": ([], [0], [1] * 8, [0] * 7, [0] * 9, [0, 0, -1, 0, 0, 0, 0, 0],
                          [2**63 - 1] * 8, [0, 0, 2**62, 2**62, 2**62, 2**62, 0, 0], None, "x"),
    "deform_groups": (0, -1, LARGEST, LARGEST + 1, 2**63 - 1, -(2**63), 2**63, None, "1", 1.5),
    "data_format": ("nhwc", "", "NCWH", None, 1),
}  # fmt: skip


def change_raw(draw, case):
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
        draw.choice((change_rank, change_size, change_size, permute))(draw, case)
    elif change == "dtype":
        change_dtype(draw, case)
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


def change_layer(draw, case):
    change = draw.choice(("setting", "setting", "shape", "object", "count"))
    name = draw.choice(list(case.arguments))
    if change == "setting":
        name = draw.choice(list(LAYER_ODD))
        case.attributes[name] = draw.choice(LAYER_ODD[name])
        case.change = f"{name} in a wrong form or out of range"
        # Keras takes some of them: a number for an activation's slope, say.
        case.blamed = ()
        ours = ("deform_groups", "modulated", "mask_scale", "own_offsets", "offset_trainable")
        # Deformable groups may divide the channels, or be too many for given offsets.
        if name in ours and case.attributes[name] not in (7, 2**40):
            case.blamed = (name,)
    elif change == "shape":
        case.more["call"] = "eager"
        draw.choice((change_rank, change_size, change_size))(draw, case)
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
