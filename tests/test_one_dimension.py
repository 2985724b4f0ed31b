"""`deform_conv1d` and `DeformableConv1D`: one dimension, as two dimensions of one row."""

import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from checks import (
    KNOWN,
    assert_function_takes,
    assert_gradient_is_numerical,
    assert_portable_mode_gives_the_same,
    assert_precise,
    assert_v1_graph_equals_eager,
    assert_wrong_shape_raises,
    for_types,
    needs_keras_3_10,
    needs_xla,
    output_shape,
)
from conftest import (
    PROJECT,
    Case,
    in_format,
    random_case,
    relative_error,
    run,
    script,
    second_derivatives,
)

from deform_conv import deform_conv1d, deformable, portable
from deform_conv.layers import DeformableConv1D, DeformableConv2D

FORMATS = ["NWC", "NCW"]


# --- The operation ---


def sequences_case(rng, *, length=9, taps=3, stride=1, dilations=1, **configuration) -> Case:
    """A `Case` of sequences."""
    case = random_case(
        rng, size=(length,), kernel=taps, strides=stride, dilations=dilations, **configuration
    )
    del case.attributes["strides"]
    case.attributes |= {"stride": stride, "dilations": dilations}
    return case


CONFIGURATIONS = [
    {},
    {"mask": False},
    {"stride": 2},
    {"stride": 3, "dilations": 2, "padding": "VALID"},
    {"padding": [[0, 0], [4, 1], [0, 0]], "taps": 4},
    {"groups": 2, "deform_groups": 4},
    {"channels": 12, "groups": 3, "deform_groups": 2},
    {"channels": 5, "groups": 5, "out_channels": 5},
    {"taps": 1, "channels": 3, "out_channels": 1},
    {"length": 1, "offset_scale": 5.0},
    {"batch": 0},
    {"length": 0, "padding": [[0, 0], [2, 2], [0, 0]]},
]


def as_rows(tensors, attributes):
    """The tensors and attributes that `deform_conv2d` takes for the same, in images of one row."""
    attributes = dict(attributes)
    last = attributes["data_format"] == "NWC"
    row = 1 if last else 2
    rows = {
        name: tf.expand_dims(tensor, 0 if name == "filters" else row)
        for name, tensor in tensors.items()
    }
    dx = tensors["offset"]
    pairs = tf.stack([tf.zeros_like(dx), dx], axis=3 if last else 2)
    shape = np.array(rows["offset"].shape)
    shape[3 if last else 1] *= 2
    rows["offset"] = tf.reshape(pairs, shape)
    attributes["strides"] = (1, attributes.pop("stride"))
    attributes["dilations"] = (1, attributes["dilations"])
    attributes["data_format"] = "NHWC" if last else "NCHW"
    if not isinstance(attributes["padding"], str):
        attributes["padding"] = np.insert(attributes["padding"], row, (0, 0), axis=0).tolist()
    return rows, attributes


def without_rows(results, data_format):
    """What `run` gives of images of one row, as it gives it of sequences."""
    last = data_format == "NWC"
    flat = {
        name: tf.squeeze(value, 0 if name == "grad_filters" else 1 if last else 2)
        for name, value in results.items()
    }
    grad = flat["grad_offset"]
    return flat | {"grad_offset": grad[..., 1::2] if last else grad[:, 1::2]}


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", [tf.float64, tf.float32, tf.bfloat16], ids=lambda d: d.name)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_equals_two_dimensions_with_one_row_bit_for_bit(configuration, dtype, data_format, rng):
    case = sequences_case(rng, **configuration)
    tensors, attributes = case.arguments(dtype, data_format=data_format)
    actual = run(tensors, attributes, function=deform_conv1d)
    expected = without_rows(run(*as_rows(tensors, attributes)), data_format)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        np.testing.assert_array_equal(value, expected[name], name)
        assert value.dtype == dtype


def test_offsets_that_are_not_finite_sample_0_as_in_two_dimensions(rng):
    case = sequences_case(rng)
    case.arrays["offset"][0, 2:5, 1] = np.nan, np.inf, -np.inf
    tensors, attributes = case.arguments(data_format="NWC")
    actual = run(tensors, attributes, function=deform_conv1d)
    expected = without_rows(run(*as_rows(tensors, attributes)), "NWC")
    for name, value in actual.items():
        assert np.all(np.isfinite(value))
        np.testing.assert_array_equal(value, expected[name], name)


def slow(input, filters, offset, mask=None, *, stride, dilations, padding, deform_groups):
    """The formula, one sample after the other, in NWC."""
    batch, length, channels = input.shape
    taps, group_channels, out_channels = filters.shape
    out_length = offset.shape[1]
    pad_left = 0
    if padding == "SAME":
        covered = (out_length - 1) * stride + (taps - 1) * dilations + 1
        pad_left = max(covered - length, 0) // 2
    elif padding != "VALID":
        pad_left = padding[1][0]
    group_out = out_channels // (channels // group_channels)

    def step(n, w, c):
        return input[n, w, c] if 0 <= w < length else 0.0

    output = np.zeros((batch, out_length, out_channels))
    for n, t, o, k, i in np.ndindex(batch, out_length, out_channels, taps, group_channels):
        c = o // group_out * group_channels + i
        number = c // (channels // deform_groups) * taps + k
        w = t * stride - pad_left + k * dilations + offset[n, t, number]
        if -1 < w < length:
            low = int(np.floor(w))
            sample = (low + 1 - w) * step(n, low, c) + (w - low) * step(n, low + 1, c)
            factor = 1.0 if mask is None else mask[n, t, number]
            output[n, t, o] += filters[k, i, o] * factor * sample
    return output


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_equals_the_formula(configuration, data_format, rng):
    case = sequences_case(rng, **configuration)
    tensors, attributes = case.arguments(data_format=data_format)
    expected = in_format(slow(**case.arrays, **case.attributes), "output", data_format)
    assert relative_error(deform_conv1d(**tensors, **attributes), expected) <= 1e-13


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("stride", "dilations"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("taps", [1, 2, 5])
def test_zero_offsets_give_conv1d(taps, stride, dilations, padding, rng):
    input, filters = rng.standard_normal((2, 21, 6)), rng.standard_normal((taps, 3, 4))
    expected = tf.nn.conv1d(input, filters, stride, padding, dilations=dilations)
    offset = np.zeros((*expected.shape[:2], taps))
    output = deform_conv1d(
        input, filters, offset, stride=stride, padding=padding, dilations=dilations
    )
    assert relative_error(output, expected) <= 1e-14


@pytest.mark.parametrize(
    ("position", "value"),
    [(-1.0, 0), (-0.75, 0.25), (0, 1), (0.25, 1.25), (2.0, 3), (2.5, 1.5), (3.0, 0), (9, 0)],
)
def test_sample_is_linear_in_the_sequence_extended_with_zeros(position, value):
    input = np.array([1.0, 2, 3]).reshape(1, 3, 1)
    output = deform_conv1d(input[:, :1], np.ones((1, 1, 1)), np.zeros((1, 1, 1)))
    assert output.numpy().item() == 1
    offset = np.array([position, 0.0, 0.0]).reshape(1, 3, 1)
    output = deform_conv1d(input, np.ones((1, 1, 1)), offset)
    assert output[0, 0, 0] == value


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("argument", ["input", "filters", "offset", "mask"])
def test_gradient_is_the_numerical_one(argument, data_format, rng):
    case = sequences_case(rng, length=5, groups=2, deform_groups=2, stride=2, out_channels=2)
    assert_gradient_is_numerical(deform_conv1d, case, argument, data_format, rng)


@pytest.mark.parametrize("of", ["input", "filters", "offset", "mask"])
def test_second_derivatives_are_the_numerical_ones(of, rng):
    case = sequences_case(rng, batch=1, length=4, channels=2, out_channels=2, deform_groups=2)
    tensors, attributes = case.arguments(data_format="NWC")
    ours = second_derivatives(tensors, attributes, deform_conv1d)[of]

    def gradients_norm(value):
        changed = tensors | {of: value}
        with tf.GradientTape() as tape:
            tape.watch(changed)
            output = tf.reduce_sum(deform_conv1d(**changed, **attributes) ** 2)
        gradients = tape.gradient(output, changed)
        return tf.add_n([tf.reduce_sum(gradient**3) for gradient in gradients.values()])

    numerical = np.zeros(tensors[of].shape)
    for index in np.ndindex(*numerical.shape):
        step = np.zeros_like(numerical)
        step[index] = 1e-5
        numerical[index] = (
            gradients_norm(tensors[of] + step) - gradients_norm(tensors[of] - step)
        ) / 2e-5
    assert relative_error(ours, numerical) <= 1e-7


@for_types(
    [
        (tf.float32, tf.float32, 1e-6),
        (tf.float16, tf.float16, 2e-3),
        (tf.float16, tf.float32, 2e-3),
        (tf.bfloat16, tf.bfloat16, 1e-2),
        (tf.bfloat16, tf.float32, 1e-2),
    ]
)
def test_every_type_gives_what_float64_gives(dtype, offset_dtype, tolerance, device, rng):
    case = sequences_case(rng, length=40, channels=16, deform_groups=2)
    assert_precise(deform_conv1d, deform_conv1d, case, dtype, offset_dtype, tolerance, FORMATS)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=needs_xla)], ids=["graph", "xla"]
)
@pytest.mark.parametrize("shape", [None, [None] * 3, "each"], ids=["rank", "sizes", "nothing"])
def test_function_of_unknown_shapes_equals_eager(shape, jit_compile, data_format, rng):
    case = sequences_case(rng, stride=2, groups=2, deform_groups=2)
    assert_function_takes(
        [case], deform_conv1d, deform_conv1d, 1e-13, shape, data_format, jit_compile=jit_compile
    )


@pytest.mark.parametrize("data_format", FORMATS)
def test_v1_graph_equals_eager(data_format, rng):
    case = sequences_case(rng)
    assert_v1_graph_equals_eager(deform_conv1d, case, data_format=data_format, tolerance=1e-13)


@pytest.mark.parametrize(
    ("data_format", "input", "offset", "expected"),
    [
        ("NWC", [None, 6, 4], [None, 6, 3], [None, 6, 8]),
        ("NWC", [None, None, 4], [3, None, 3], [3, None, 8]),
        ("NWC", [2, None, 4], [None, 7, None], [2, 7, 8]),
        ("NWC", None, None, [None, None, 8]),
        ("NCW", [None, 4, 5], [None, None, None], [None, 8, 5]),
    ],
)
def test_shape_of_the_output_is_known_as_far_as_it_can_be(data_format, input, offset, expected):
    shapes = (input, [3, 4, 8], offset)
    assert output_shape(deform_conv1d, shapes, data_format=data_format) == expected


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS[:6], ids=str)
def test_portable_mode_equals_the_op(configuration, data_format, rng):
    case = sequences_case(rng, **configuration)
    arguments = case.arguments(data_format=data_format)
    assert_portable_mode_gives_the_same(deform_conv1d, *arguments, tolerance=1e-13)


def test_mask_and_gradients_that_nobody_asks_for_are_not_needed(rng):
    tensors = sequences_case(rng, mask=False).tensors()
    with tf.GradientTape() as tape:
        tape.watch(tensors["offset"])
        output = deform_conv1d(**tensors)
    gradient = tape.gradient(output, tensors["offset"])
    assert gradient.shape == tensors["offset"].shape
    assert np.any(gradient != 0)


def test_stride_and_dilations_take_every_form(rng):
    case = sequences_case(rng, stride=2, dilations=3)
    tensors = case.tensors()
    expected = deform_conv1d(**tensors, stride=2, dilations=3)
    for stride, dilations in (([2], (3,)), ((1, 2, 1), [1, 3, 1]), (np.int64(2), tf.constant(3))):
        output = deform_conv1d(**tensors, stride=stride, dilations=dilations)
        np.testing.assert_array_equal(output, expected)


# Arguments that fit, for a kernel of 3 on 2 sequences of 6 steps with 4 channels.
FITTING = {"input": (2, 6, 4), "filters": (3, 4, 8), "offset": (2, 6, 3), "mask": (2, 6, 3)}

WRONG_SHAPES = [
    ({"offset": (2, 6, 6)}, {}, "offset has 6 channels; deform_groups * 3 = 3 expected"),
    ({"offset": (2, 6, 2)}, {}, "offset has 2 channels; deform_groups * 3 = 3 expected"),
    ({}, {"deform_groups": 2}, "offset has 3 channels; deform_groups * 3 = 6 expected"),
    ({"mask": (2, 6, 6)}, {}, "mask has 6 channels; deform_groups * 3 = 3 expected"),
    ({"offset": (2, 5, 3)}, {}, "offset has length 5; that of the output, 6, expected"),
    ({}, {"stride": 2}, "offset has length 6; that of the output, 3, expected"),
    ({"mask": (2, 4, 3)}, {}, "mask has length 4; that of the output, 6, expected"),
    ({"offset": (3, 6, 3)}, {}, "offset has batch size 3; that of input, 2, expected"),
    ({"filters": (3, 3, 8)}, {}, "filters have 3 input channels; a divisor of the input's 4"),
    ({"filters": (3, 2, 7)}, {}, "filters have 7 output channels; a multiple of the 2 groups"),
    ({"filters": (0, 4, 8)}, {}, "filters must have a length from 1 to 2147483647; received 0"),
    ({"input": (2, 6, 0)}, {}, "input must have at least 1 channel; received 0"),
    ({}, {"deform_groups": 3}, "deform_groups must divide the input's 4 channels; received 3"),
    ({}, {"stride": 0}, "stride must be from 1 to 2147483647; received 0"),
    ({}, {"dilations": -1}, "dilations must be from 1 to 2147483647; received -1"),
    ({}, {"stride": (2, 1, 1)}, "stride must be 3 numbers, 1 for batch and channels; received"),
    ({}, {"padding": [[1, 1], [0, 0], [0, 0]]}, "padding must be 3 pairs of numbers, 0 for batch"),
    (
        {"filters": (9, 4, 8)},
        {"padding": "VALID"},
        "input has length 6 with its padding; at least 8 expected for the dilated kernel's length",
    ),
]
WRONG_RANKS = [
    ({"input": (6, 4)}, {}, "input must have rank 3; received shape [6, 4]"),
    ({"filters": (1, 3, 4, 8)}, {}, "filters must have rank 3; received shape [1, 3, 4, 8]"),
    ({"offset": (2, 1, 6, 6)}, {}, "offset must have rank 3; received shape [2, 1, 6, 6]"),
    ({"mask": ()}, {}, "mask must have rank 3; received shape []"),
]


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(("shapes", "attributes", "message"), WRONG_SHAPES + WRONG_RANKS)
def test_wrong_shape_is_an_error_in_terms_of_sequences(shapes, attributes, message, known):
    assert_wrong_shape_raises(deform_conv1d, FITTING | shapes, message, known, **attributes)


@pytest.mark.parametrize("data_format", FORMATS)
def test_filters_in_the_order_of_other_libraries_are_named(data_format):
    tensors = [tf.zeros(shape) for shape in ((2, 6, 4), (8, 2, 3), (2, 6, 3))]
    if data_format == "NCW":
        tensors = [tensors[0], tensors[1], tensors[2]]
        tensors[0], tensors[2] = (tf.transpose(tensors[i], [0, 2, 1]) for i in (0, 2))
    message = (
        "filters must be [K, C / groups, O] (WIO); received [8, 2, 3], which fits as "
        "[O, C / groups, K] (OIW): pass tf.transpose(filters, [2, 1, 0])"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_conv1d(*tensors, data_format=data_format)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_format": "NHWC"}, "data_format must be 'NWC' or 'NCW'; received 'NHWC'"),
        ({"name": 1}, "name must be a string or None; received 1"),
        ({"padding": "CAUSAL"}, "padding must be 'SAME', 'VALID' or three pairs of integers; rece"),
        ({"padding": 1}, "padding must be 'SAME', 'VALID' or three pairs of integers; received 1"),
        ({"padding": [[0, 0]] * 4}, "padding must be 'SAME', 'VALID' or three pairs of integers;"),
        ({"stride": (1, 2)}, "stride must be 1 or 3 integers; received (1, 2)"),
        ({"dilations": 1.5}, "dilations must be an integer; received 1.5"),
        ({"deform_groups": None}, "deform_groups must be an integer; received None"),
        ({"offset": tf.zeros((2, 6, 3), tf.float64)}, "offset must be float32 here; received flo"),
        ({"mask": "abc"}, "mask must be float32 here; received string"),
        ({"input": keras.Input((6, 4))}, "use DeformableConv1D, or call deform_conv1d in the call"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_argument_of_the_wrong_form_is_named(arguments, message):
    tensors = {name: tf.zeros(shape) for name, shape in FITTING.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        deform_conv1d(**(tensors | arguments))


# --- The layer ---


@pytest.fixture
def sequences(rng):
    return tf.constant(rng.standard_normal((2, 12, 4)), tf.float32)


def in_keras_format(values, data_format):
    return values if data_format == "channels_last" else tf.transpose(values, [0, 2, 1])


def moved(layer, scale=0.3):
    """The layer, built, with offsets and masks that depend on its input."""
    for convolution in filter(None, (layer.offset_conv, layer.mask_conv)):
        for variable in convolution.variables:
            variable.assign(scale * keras.random.normal(variable.shape, seed=1))
    return layer


PADDINGS = ["valid", "same", "causal", 2, (3, 1)]


def test_arguments_are_those_of_conv1d_in_its_order_and_then_those_of_two_dimensions():
    conv1d, layer, other = (
        list(inspect.signature(cls).parameters.values())
        for cls in (keras.layers.Conv1D, DeformableConv1D, DeformableConv2D)
    )
    shared = len(conv1d) - 1  # all but **kwargs
    assert [(p.name, p.default) for p in layer[:shared]] == [
        (p.name, p.default) for p in conv1d[:shared]
    ]
    assert layer[shared:] == other[shared:]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
def test_new_layer_is_the_conv1d_of_its_weights(padding, stride, dilation, data_format, sequences):
    arguments = {
        "strides": stride,
        "dilation_rate": dilation,
        "padding": padding,
        "groups": 2,
        "activation": "relu",
        "bias_initializer": "random_normal",
    }
    layer = DeformableConv1D(6, 3, modulated=True, data_format=data_format, **arguments)
    outputs = layer(in_keras_format(sequences, data_format))
    plain = keras.layers.Conv1D(6, 3, data_format="channels_last", **arguments)
    plain.build(sequences.shape)
    plain.set_weights([layer.kernel, layer.bias])
    expected = in_keras_format(plain(sequences), data_format)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("padding", ["valid", "same", 2, (3, 1)])
def test_equals_the_layer_of_two_dimensions_with_one_row(
    padding, stride, dilation, modulated, data_format, sequences
):
    inputs = in_keras_format(sequences, data_format)
    arguments = {"modulated": modulated, "deform_groups": 2, "data_format": data_format}
    layer = DeformableConv1D(6, 3, stride, padding, dilation_rate=dilation, **arguments)
    layer.build(inputs.shape)
    moved(layer)
    if not isinstance(padding, str):
        padding = ((0, 0), (padding, padding) if isinstance(padding, int) else padding)
    rows = DeformableConv2D(
        6, (1, 3), (1, stride), padding, dilation_rate=(1, dilation), **arguments
    )
    images = tf.expand_dims(inputs, 1 if data_format == "channels_last" else 2)
    rows.build(images.shape)
    rows.kernel.assign(layer.kernel[tf.newaxis])
    kernel, bias = (tf.convert_to_tensor(variable) for variable in layer.offset_conv.variables)
    for ours, theirs in ((kernel[tf.newaxis], "kernel"), (bias, "bias")):
        pairs = tf.stack([tf.zeros_like(ours), ours], axis=-1)
        getattr(rows.offset_conv, theirs).assign(tf.reshape(pairs, [*ours.shape[:-1], -1]))
    if modulated:
        rows.mask_conv.kernel.assign(layer.mask_conv.kernel[tf.newaxis])
        rows.mask_conv.bias.assign(layer.mask_conv.bias)
    outputs = tf.squeeze(rows(images), 1 if data_format == "channels_last" else 2)
    np.testing.assert_allclose(layer(inputs), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_sizes_may_be_unknown_and_0_and_all_shapes_are_told(
    padding, stride, dilation, data_format, sequences
):
    layer = DeformableConv1D(
        6, 3, stride, padding, data_format, dilation, modulated=True, deform_groups=2
    )
    inputs = in_keras_format(sequences, data_format)
    layer.build(inputs.shape)
    expected = moved(layer)(inputs)
    unknown = [None, None, 4] if data_format == "channels_last" else [None, 4, None]
    function = tf.function(layer, input_signature=[tf.TensorSpec(unknown)])
    np.testing.assert_allclose(function(inputs), expected, rtol=1e-5, atol=1e-5)
    for none in (inputs[:0], in_keras_format(sequences[:, :0], data_format)):
        if none.shape[0] == 0 or padding in ("same", "causal"):
            outputs = function(none)
            assert outputs.shape == layer(none).shape == layer.compute_output_shape(none.shape)
    shown = keras.KerasTensor(inputs.shape)
    assert layer.compute_output_spec(shown).shape == expected.shape
    for name in ("offset", "mask"):
        value = getattr(layer, name)(inputs)
        assert layer.compute_output_spec(shown, returns=name).shape == value.shape
        assert value.shape[1 if data_format == "channels_first" else 2] == 2 * 3


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_causal_outputs_depend_on_no_later_step(stride, dilation, data_format, given, sequences):
    layer = DeformableConv1D(
        5,
        3,
        stride,
        "causal",
        data_format,
        dilation,
        deform_groups=2,
        own_offsets=not given,
    )
    out_length = -(-sequences.shape[1] // stride)
    offset = tf.constant(
        3 * keras.random.normal([2, out_length, 2 * 3], seed=2) * (1 if given else 0)
    )

    def convolve(sequences):
        inputs = in_keras_format(sequences, data_format)
        outputs = layer([inputs, in_keras_format(offset, data_format)] if given else inputs)
        return in_keras_format(outputs, data_format)

    convolve(sequences)
    moved(layer, scale=1.0)
    expected = convolve(sequences)
    for step in range(out_length):
        later = step * stride + 1
        # Not even where they are not finite.
        changed = tf.concat([sequences[:, :later], sequences[:, later:] * np.nan], axis=1)
        np.testing.assert_array_equal(convolve(changed)[:, : step + 1], expected[:, : step + 1])


def test_causal_offsets_are_held_at_the_outputs_step_with_no_gradient_beyond():
    layer = DeformableConv1D(1, 3, padding="causal", kernel_initializer="ones", own_offsets=False)
    inputs = tf.reshape(tf.constant([1.0, 2, 4, 8, 16]), [1, 5, 1])
    offset = tf.Variable(np.tile([[[5.0, 0.5, 0.0]]], (1, 5, 1)).astype(np.float32))
    with tf.GradientTape() as tape:
        outputs = layer([inputs, offset])
        output = outputs[0, 3, 0]
    # Taps at steps 1 + 5, held at 3; 2 + 0.5; and 3.
    np.testing.assert_allclose(output / layer.kernel[0, 0, 0], 8 + 6 + 8, rtol=1e-6)
    gradient = tape.gradient(output, offset)[0, 3]
    # The derivative at the output's step is the one from before it.
    np.testing.assert_allclose(gradient, [0, 8 - 4, 8 - 4], rtol=1e-6)


def test_causal_layer_returns_the_offsets_that_it_samples_with(sequences):
    layer = DeformableConv1D(6, 3, padding="causal", dilation_rate=2)
    layer(sequences)
    layer.offset_conv.bias.assign([9.0, 1.0, 9.0])
    given = DeformableConv1D(6, 3, padding="same", own_offsets=False)
    offset = layer.offset(sequences)
    np.testing.assert_allclose(offset, np.tile([4.0, 1.0, 0.0], (2, 12, 1)), atol=1e-6)
    given = DeformableConv1D(6, 3, padding=(4, 0), dilation_rate=2, own_offsets=False)
    given.build([sequences.shape, offset.shape])
    given.set_weights([layer.kernel, layer.bias])
    np.testing.assert_array_equal(given([sequences, offset]), layer(sequences))


@pytest.mark.parametrize(
    ("dtype", "compute", "weights", "offsets"),
    [
        ("float32", "float32", "float32", "float32"),
        ("float64", "float64", "float64", "float64"),
        ("mixed_float16", "float16", "float32", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_types(dtype, compute, weights, offsets, padding, data_format, sequences):
    layer = DeformableConv1D(
        6, 3, padding=padding, data_format=data_format, modulated=True, dtype=dtype
    )
    inputs = in_keras_format(sequences, data_format)
    with tf.GradientTape() as tape:
        outputs = layer(inputs)
        loss = tf.reduce_sum(tf.cast(outputs, tf.float32) ** 2)
    assert outputs.dtype == compute
    assert layer.kernel.dtype == weights
    assert layer.offset(inputs).dtype == layer.mask(inputs).dtype == offsets
    assert layer.offset_conv.kernel.dtype == offsets
    gradients = tape.gradient(loss, layer.trainable_variables)
    assert all(np.any(tf.cast(gradient, tf.float32) != 0) for gradient in gradients)


def test_model_with_its_offsets_is_saved_and_loaded_and_cloned(sequences, tmp_path):
    inputs = keras.Input((None, 4))
    layer = DeformableConv1D(4, 3, padding="causal", modulated=True, deform_groups=2, name="first")
    x = layer(inputs)
    shared = DeformableConv1D(3, 3, padding=(2, 0), own_offsets=False, name="second")
    x = shared([x, keras.layers.Conv1D(3, 3, padding="causal", dtype="float32")(x)])
    model = keras.Model(inputs, [x, layer.offset(inputs), layer(inputs, returns="mask")])
    moved(layer)
    expected = model(sequences)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    cloned = keras.models.clone_model(model)
    cloned.set_weights(model.get_weights())
    for copy in (loaded, cloned):
        assert copy.get_layer("first").get_config() == layer.get_config()
        assert copy.get_layer("second").padding == ((2, 0),)
        for actual, value in zip(copy(sequences), expected, strict=True):
            np.testing.assert_array_equal(actual, value)
    model.export(tmp_path / "exported")
    exported = tf.saved_model.load(tmp_path / "exported")
    for actual, value in zip(exported.serve(sequences), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-5)


def test_a_keras_file_needs_no_more_than_the_import_of_the_layers(sequences, tmp_path):
    model = keras.Sequential([keras.Input((12, 4)), DeformableConv1D(4, 3)])
    model.save(tmp_path / "model.keras")
    program = (
        "import keras, deform_conv.layers\n"
        f"print(type(keras.models.load_model({str(tmp_path / 'model.keras')!r}).layers[0]))"
    )
    (tmp_path / "program.py").write_text(program)
    printed = script(tmp_path / "program.py", PYTHONPATH=str(PROJECT))
    assert "DeformableConv1D" in printed.stdout


@pytest.mark.parametrize("length", [12, None])
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "causal"},
        {"padding": "same", "strides": 2, "modulated": True},
        {"padding": 1, "data_format": "channels_first", "deform_groups": 2},
    ],
    ids=str,
)
def test_onnx_and_litert_compute_the_same(arguments, length, sequences, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for name in ("onnx", "tf2onnx"):
        pytest.importorskip(name)
    from deform_conv.onnx import export

    data_format = arguments.get("data_format", "channels_last")
    inputs = keras.Input((length, 4) if data_format == "channels_last" else (4, length))
    layer = DeformableConv1D(6, 3, **arguments)
    model = keras.Model(inputs, layer(inputs))
    moved(layer)
    given = in_keras_format(sequences, data_format).numpy()
    expected = model(given)

    export(model, tmp_path / "model.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: given})
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    with portable():
        interpreter = tf.lite.Interpreter(model_content=converter.convert())
    (argument,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(argument["index"], given.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(argument["index"], given)
    interpreter.invoke()
    np.testing.assert_allclose(
        interpreter.get_tensor(result["index"]), expected, rtol=1e-4, atol=1e-5
    )


def test_fit_learns_with_xla_as_without(sequences):
    targets = np.zeros((2, 6), np.float32)
    losses = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(3)
        layer = DeformableConv1D(6, 3, padding="causal", modulated=True)
        pooling = keras.layers.GlobalMaxPooling1D()
        model = keras.Sequential([keras.Input((None, 4)), layer, pooling])
        model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=jit_compile)
        losses.append(model.fit(sequences, targets, epochs=5, verbose=0).history["loss"])
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@needs_keras_3_10
def test_weights_of_a_plain_network_are_loaded(sequences, tmp_path):
    def network(convolution):
        x = inputs = keras.Input((12, 4))
        for name in ("first", "second", "third"):
            x = (convolution if name == "second" else keras.layers.Conv1D)(4, 3, name=name)(x)
        return keras.Model(inputs, x)

    plain, both = network(keras.layers.Conv1D), network(DeformableConv1D)
    plain.save_weights(tmp_path / "plain.weights.h5")
    both.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(both(sequences), plain(sequences), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"weights of other, or of a Conv1D of that name\. Rec"):
        keras.Sequential([keras.Input((12, 4)), DeformableConv1D(4, 3, name="other")]).load_weights(
            tmp_path / "plain.weights.h5"
        )


@pytest.mark.parametrize("padding", ["valid", "causal"])
def test_deformable_converts_conv1d_too(padding, sequences):
    inputs = keras.Input((12, 4))
    x = keras.layers.Conv1D(4, 3, padding=padding, activation="relu", name="wide")(inputs)
    model = keras.Model(inputs, keras.layers.Conv1D(4, 1, name="pointwise")(x))
    copy = deformable(model, deform_groups=2, modulated=True)
    np.testing.assert_allclose(copy(sequences), model(sequences), rtol=1e-4, atol=1e-5)
    assert type(copy.get_layer("wide")) is DeformableConv1D
    assert copy.get_layer("wide").padding == padding
    assert type(copy.get_layer("pointwise")) is keras.layers.Conv1D


def test_offsets_are_learned():
    keras.utils.set_random_seed(1)
    sequences = np.cumsum(np.random.default_rng(1).standard_normal((64, 40, 1)), axis=1) / 4
    late = np.roll(sequences, 1, axis=1)  # each step is the one before
    layer = DeformableConv1D(1, 1, use_bias=False, kernel_initializer="ones", name="conv")
    model = keras.Sequential([keras.Input((40, 1)), layer])
    layer.trainable = False
    layer.offset_trainable = True
    model.compile(keras.optimizers.Adam(0.02), "mse")
    before = model.evaluate(sequences[:, 2:-1], late[:, 2:-1], verbose=0)
    model.fit(sequences[:, 2:-1], late[:, 2:-1], epochs=40, verbose=0)
    after = model.evaluate(sequences[:, 2:-1], late[:, 2:-1], verbose=0)
    assert after < 0.3 * before
    assert abs(np.median(layer.offset(sequences)) + 1) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": 0}, "filters must be an integer above 0. Received: 0"),
        ({"kernel_size": (3, 3)}, "kernel_size must be one integer. Received: (3, 3)"),
        ({"strides": "2"}, "strides must be an integer above 0. Received: '2'"),
        ({"data_format": "NWC"}, "data_format must be 'channels_last' or 'channels_first'."),
        (
            {"padding": (1, 2, 3)},
            "padding must be 'valid', 'same' or 'causal', or integers of at least 0: one or "
            "(left, right). Received: (1, 2, 3)",
        ),
        ({"padding": ((1, 1), (2, 2))}, "padding must be 'valid', 'same' or 'causal', or integers"),
        ({"mask_scale": 0}, "mask_scale must be a finite number above 0. Received: 0"),
    ],
    ids=str,
)
def test_wrong_argument_of_the_layer_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DeformableConv1D(**({"filters": 6, "kernel_size": 3} | arguments))


def test_causal_padding_is_for_one_dimension():
    with pytest.raises(ValueError, match="padding must be 'valid' or 'same', or integers"):
        DeformableConv2D(6, 3, padding="causal")


def test_wrong_input_of_the_layer_is_named(sequences):
    layer = DeformableConv1D(6, 9, name="conv")
    with pytest.raises(ValueError, match=r"inputs must be sequences, \[N, L, C\]. Received: shape"):
        layer.offset(sequences[0])
    given = DeformableConv1D(6, 3, own_offsets=False, modulated=True)
    offset = sequences[:, :10, :3]
    with pytest.raises(ValueError, match="axis -1 of input shape to have value 3, but rec"):
        given([sequences, sequences, offset])
    with pytest.raises(tf.errors.InvalidArgumentError, match="offset has length 9; that of the ou"):
        given([sequences, offset[:, 1:], offset])
    symbolic = [keras.Input(shape[1:]) for shape in ((2, 12, 4), (2, 10, 3), (2, 9, 3))]
    with pytest.raises(
        ValueError, match=r"mask must have the batch size and length of the output, \(None, 10\)"
    ):
        given(symbolic)
    numbers = DeformableConv1D(6, 9, padding=1)
    with pytest.raises(ValueError, match=r"inputs must have a length of at least 7 for the dilat"):
        numbers(keras.Input((6, 4)))
    with pytest.raises(ValueError, match=r"conv/offset_conv|offset_conv cannot be called in a fun"):
        layer(sequences)
        layer.offset_conv(keras.Input((12, 4)))
    message = r"cannot be saved or copied without the DeformableConv1D that it is part of"
    with pytest.raises(ValueError, match=message):
        layer.offset_conv.get_config()
