"""Draws a case: it follows from the seed, its number and its mode, and from nothing else."""

import math
from dataclasses import replace

from op_cases import (
    ARGUMENTS,
    FLOATS,
    INPUT_FILLS,
    OFFSET_FILLS,
    Case,
    Draw,
    Numbers,
    fit,
    raw_attributes,
    spelled,
)
from op_changes import (
    CHANGES,
    change_attribute,
    change_dtype,
    change_layer,
    change_rank,
    change_raw,
    change_size,
    permute,
)
from op_oracle import LARGEST, from_native, native, output_shape

# How often each mode is drawn, in parts of the whole.
WEIGHTS = {
    "eager": 5000,
    "raw": 3200,
    "graph": 500,
    "aggregate": 300,
    "v1": 150,
    "raw_graph": 300,
    "shapes": 300,
    "layer": 200,
    "jit": 150,
    "raw_jit": 60,
    "second": 30,
    "reference": 60,
    "threads": 6,
    "parallel": 6,
    "allocation": 40,
    "memory": 1,
}
# XLA compiles for shapes and attributes: there are so many of them, each called again and again.
JIT_SETTINGS = 10


def case(seed: int, number: int, mode: str) -> Case:
    """The case of this number: of `mode`, or of any for "all"."""
    draw = Draw(f"{seed} {number}")
    drawn = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    mode = drawn if mode == "all" else mode
    made = Case(seed, number, mode)
    _DRAWN_BY.get(mode, _draw_trial)(draw, made)
    return made


# --- The public op ---


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


def _draw_aggregate(draw, case):
    fit(case, draw, filters=False)
    case.more["call"] = draw.choice(("eager",) * 8 + ("graph", "jit"))
    _draw_specs(draw, case)
    # Of the filters that there are not, a graph knows the kernel's size, and the input's channels.
    known = case.more["known"]
    shape = known["input"]
    channels = None if shape is None else native(shape, case.meaning["data_format"])[3]
    known["filters"] = (*case.arguments["filters"].shape[:2], 1, channels)


# --- Shapes in inference only ---

SIZES = (None, None, 0, 1, 2, 3, 4, 9, 18, LARGEST - 1, LARGEST, LARGEST + 1)
SIZES += (2**32, 2**40, 2**61, 2**62 + 1)


def _draw_shapes(draw, case):
    """Arguments of which only the shapes matter, and of these only what a graph knows."""
    fit(case, draw)
    case.wanted = ()
    case.more["known"] = known = {}
    data_format = case.meaning["data_format"]
    case.more["op"] = draw.choice(("op", "raw", "grad"))
    change = draw.choice(("some unknown", "some far out", "all far out", "kernel far out"))
    if draw.chance(0.3):
        change_attribute(draw, case)
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
        case.attributes = spelled(draw, case.meaning)
    if case.more["op"] != "op":
        case.attributes = raw_attributes(case.meaning)
    if case.more["op"] == "grad":
        known["grad_output"] = draw.choice(
            (None, (), (0,), (LARGEST, LARGEST, None, None), (2, 3, 4, 5))
        )


# --- Raw ops ---


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
        change_raw(draw, case)


def _shapes(case):
    return {name: case.arguments[name].shape for name in ARGUMENTS if name in case.arguments}


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
        draw.choice((change_rank, change_size, permute, change_dtype, change_attribute))(draw, case)


def _draw_raw_jit(draw, case):
    # One compilation each: of small tensors.
    _draw_raw(draw, case, setting=draw.randrange(JIT_SETTINGS))


# --- The pure TensorFlow reference, and second order, which is made of it ---


def _draw_second(draw, case):
    while not case.arguments or any(0 in value.shape for value in case.arguments.values()):
        case.arguments = {}
        fit(case, draw, dtypes=("float64",), size="small")
    case.arguments = {name: replace(value, fill="normal") for name, value in case.arguments.items()}
    case.wanted = draw.some(case.arguments) or ("offset",)
    case.more["graph"] = draw.chance(0.2)


def _draw_reference(draw, case):
    fit(case, draw, dtypes=("float64",))


# --- The layer ---


def _draw_layer(draw, case):
    while True:
        fit(case, draw, size=draw.choice(("any", "small")))
        meaning = case.meaning
        # Keras has no explicit padding, no dilation beside strides, and no empty output of "valid".
        dilated_strides = max(meaning["strides"]) > 1 < max(meaning["dilations"])
        empty = meaning["padding"] == "VALID" and 0 in case.arguments["offset"].shape[1:]
        # A convolution gives the offsets. On oneDNN, TensorFlow's own (2.21) reads memory not yet
        # written for some images of one channel with strides, such as 5x2 with a 1x4 kernel.
        channels = native(case.arguments["input"].shape, meaning["data_format"])[3]
        unwritten = channels == 1 and max(meaning["strides"]) > 1
        if isinstance(meaning["padding"], str) and not (dilated_strides or empty or unwritten):
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
        change_layer(draw, case)


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
    "aggregate": _draw_aggregate,
    "v1": _draw_graph,
    "raw": _draw_raw,
    "raw_graph": _draw_raw_graph,
    "shapes": _draw_shapes,
    "jit": _draw_jit,
    "raw_jit": _draw_raw_jit,
    "second": _draw_second,
    "reference": _draw_reference,
    "layer": _draw_layer,
}
