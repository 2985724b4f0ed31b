"""What deform_conv2d computes: against torchvision, the reference, tf.nn.conv2d and the rules."""

import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from checks import (
    TYPES,
    TYPES_OF_16_BITS,
    assert_equals,
    assert_gradient_is_numerical,
    assert_parts_equal_the_whole,
    assert_precise,
    convolutions,
    for_types,
    gradients_alone,
)
from conftest import (
    GOLDEN_FILE,
    Case,
    assert_close,
    golden_cases,
    in_format,
    random_case,
    relative_error,
    run,
)

from deform_conv import deform_conv2d
from deform_conv._reference import deform_conv2d_reference

pytestmark = pytest.mark.usefixtures("device")

FORMATS = ("NHWC", "NCHW")


# --- Golden cases: torchvision 0.29, float64 ---


def cases_of_torchvision():
    cases = {}
    for name, values in golden_cases(GOLDEN_FILE).items():
        config = [int(number) for number in values.pop("config")]
        native = {
            key.replace("weight", "filters"): array.transpose(
                [2, 3, 1, 0] if key.endswith("weight") else [0, 2, 3, 1]
            )
            for key, array in values.items()
        }
        attributes = {
            "strides": config[0:2],
            "padding": [[0, 0], [config[2]] * 2, [config[3]] * 2, [0, 0]],
            "dilations": config[4:6],
            "deform_groups": config[7],
        }
        arguments = ("input", "filters", "offset", "mask")
        case = Case({key: native.pop(key) for key in arguments if key in native}, attributes)
        cases[name] = (case, native.pop("grad_output"), native)
    return cases


GOLDEN = cases_of_torchvision()


def samples_on_the_border(case):
    """Which offset pairs lead to exactly h = -1 or w = -1, where torchvision's offset gradient is
    one-sided and ours is 0."""
    offset = case.arrays["offset"]
    n, out_h, out_w, _ = offset.shape
    kernel_h, kernel_w = case.arrays["filters"].shape[:2]
    groups = case.attributes["deform_groups"]
    offset = offset.reshape(n, out_h, out_w, groups, kernel_h, kernel_w, 2)
    _, (pad_top, _), (pad_left, _), _ = case.attributes["padding"]
    (stride_h, stride_w), (dilation_h, dilation_w) = (
        case.attributes[key] for key in ("strides", "dilations")
    )
    y, x, ky, kx = (np.arange(size) for size in (out_h, out_w, kernel_h, kernel_w))
    h = (y[:, None] * stride_h - pad_top + ky * dilation_h)[:, None, None, :, None]
    w = (x[:, None] * stride_w - pad_left + kx * dilation_w)[:, None, None, :]
    on_border = (h + offset[..., 0] == -1) | (w + offset[..., 1] == -1)
    return np.repeat(on_border[..., None], 2, axis=-1).reshape(n, out_h, out_w, -1)


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_torchvision(name, data_format, function):
    case, grad_output, expected = GOLDEN[name]
    actual = run(
        case.tensors(data_format=data_format),
        case.attributes_in(data_format),
        tf.constant(in_format(grad_output, "grad_output", data_format)),
        function,
    )
    assert set(actual) == set(expected)
    for key, value in actual.items():
        theirs, ours = in_format(expected[key], key, data_format), value.numpy()
        if key == "grad_offset":
            border = in_format(samples_on_the_border(case), key, data_format)
            assert np.all(ours[border] == 0)
            ours, theirs = ours[~border], theirs[~border]
        assert relative_error(ours, theirs) <= 1e-12, key


# --- The reference ---


@hypothesis.given(
    configuration=convolutions(),
    data_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_reference_in_any_configuration(configuration, data_format, seed):
    rng = np.random.default_rng(seed)
    case = random_case(rng, **configuration)
    assert_equals(deform_conv2d, deform_conv2d_reference, case, data_format, rng)


# --- Precision of each type, against the reference in float64 on the rounded inputs ---

# float32 as precise as sums over many channels and positions are.
DENSE_TYPES = [(tf.float32, tf.float32, 1e-5), *TYPES_OF_16_BITS]


@for_types(DENSE_TYPES)
@pytest.mark.parametrize(
    ("size", "channels"), [((28, 28), 32), ((100, 152), 16)], ids=["28x28", "100x152"]
)
def test_precision(size, channels, dtype, offset_dtype, tolerance, rng):
    case = random_case(
        rng,
        batch=1,
        size=size,
        channels=channels,
        out_channels=channels,
        deform_groups=2,
        offset_scale=2.0,
    )
    case.arrays["grad_output"] = rng.standard_normal((1, *size, channels))
    assert_precise(
        deform_conv2d, deform_conv2d_reference, case, dtype, offset_dtype, tolerance, FORMATS
    )


def test_float32_offsets_are_finer_than_float16_ones(rng):
    """A float16 near 128 moves in steps of 1/8; a float32 offset must not be rounded to it."""
    image = tf.constant(rng.standard_normal((1, 1, 200, 1)), tf.float16)
    filters = tf.ones((1, 1, 1, 1), tf.float16)
    offset = tf.tile(tf.constant([0.0, 128.0625], tf.float32)[tf.newaxis], [200, 1])
    output = deform_conv2d(image, filters, tf.reshape(offset, (1, 1, 200, 2)))
    pixels = image.numpy().astype(np.float64)[0, 0, :, 0]
    expected = pixels[128] * (1 - 0.0625) + pixels[129] * 0.0625
    assert output.numpy()[0, 0, 0, 0] == pytest.approx(expected, rel=1e-3)


# --- Numerical gradients ---


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("argument", ["input", "filters", "offset", "mask"])
def test_gradient_is_the_numerical_one(argument, data_format, rng):
    case = random_case(
        rng, size=(5, 4), strides=(2, 1), dilations=(1, 2), groups=2, deform_groups=2
    )
    assert_gradient_is_numerical(deform_conv2d, case, argument, data_format, rng)


# --- Zero offsets ---


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 0), (2, 1), (0, 3), (0, 0))])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (1, 1)])
def test_zero_offsets_give_conv2d(kernel, padding, stride, rng):
    image = tf.constant(rng.standard_normal((2, 11, 12, 4)))
    filters = tf.constant(rng.standard_normal((*kernel, 4, 3)))
    expected = tf.nn.conv2d(image, filters, stride, padding)
    offset = tf.zeros((*expected.shape[:3], 2 * kernel[0] * kernel[1]), tf.float64)
    output = deform_conv2d(image, filters, offset, strides=stride, padding=padding)
    assert relative_error(output, expected) <= 1e-12


@pytest.mark.parametrize("dilation", [2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_zero_offsets_give_dilated_conv2d(padding, dilation, rng):
    image = tf.constant(rng.standard_normal((2, 11, 12, 4)))
    filters = tf.constant(rng.standard_normal((3, 3, 4, 3)))
    expected = tf.nn.conv2d(image, filters, 1, padding, dilations=dilation)
    offset = tf.zeros((*expected.shape[:3], 18), tf.float64)
    output = deform_conv2d(image, filters, offset, padding=padding, dilations=dilation)
    assert relative_error(output, expected) <= 1e-12


@pytest.mark.parametrize("size", [2, 3])
def test_valid_input_short_of_the_kernel_by_less_than_a_stride_gives_nothing(size):
    filters = tf.zeros((4, 1, 1, 1))
    output = deform_conv2d(
        tf.zeros((1, size, 5, 1)), filters, tf.zeros((1, 0, 3, 8)), strides=2, padding="VALID"
    )
    assert output.shape == (1, 0, 3, 1)


# --- The sampling rule ---

HEIGHT, WIDTH = 3, 4


def sample(h, w, function=deform_conv2d):
    """The sample of a fixed 3x4 image at (h, w), and its gradients by image, h, w and mask."""
    image = tf.constant(np.arange(1.0, 13.0).reshape(1, HEIGHT, WIDTH, 1))
    offset = tf.constant([h, w], tf.float64)
    arguments = {
        "input": image,
        "filters": tf.ones((1, 1, 1, 1), tf.float64),
        # One output position, at (0, 0): the offset is the position.
        "offset": tf.reshape(offset, (1, 1, 1, 2)),
        "mask": tf.ones((1, 1, 1, 1), tf.float64),
    }
    results = run(arguments, {"strides": max(HEIGHT, WIDTH)}, function=function)
    return {key: value.numpy().squeeze() for key, value in results.items()}


@pytest.mark.parametrize(
    ("position", "value"),
    [
        ((0.0, 0.0), 1.0),
        ((0.5, 0.0), 3.0),
        ((0.0, 0.5), 1.5),
        ((1.25, 2.5), 8.5),
        ((HEIGHT - 1.0, WIDTH - 1.0), 12.0),  # the last pixel counts whole
        ((HEIGHT - 0.75, 0.0), 0.75 * 9.0),  # beyond it, the image fades into zeros
        ((-0.25, 0.0), 0.75 * 1.0),
        ((0.0, WIDTH - 0.5), 0.5 * 4.0),
    ],
)
def test_sample_is_bilinear_in_the_image_extended_with_zeros(position, value):
    results = sample(*position)
    assert results["output"] == pytest.approx(value, abs=1e-12)
    assert results["grad_mask"] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "position",
    [
        (-1.0, 1.0),
        (float(HEIGHT), 1.0),
        (1.0, -1.0),
        (1.0, float(WIDTH)),
        (-1.5, 1.0),
        (1.0, 1e30),
        (np.nan, 1.0),
        (1.0, np.nan),
        (np.inf, 1.0),
        (1.0, -np.inf),
        (np.nan, np.inf),
    ],
)
def test_sample_outside_is_zero_with_zero_gradients(position):
    for key, value in sample(*position).items():
        if key != "grad_filters":
            assert np.all(value == 0), key
    assert sample(*position)["grad_filters"] == 0


@pytest.mark.parametrize(
    ("position", "gradient"),
    [
        ((1.0, 1.0), (4.0, 1.0)),  # pixel below and pixel to the right, less this one (6)
        ((0.0, 0.0), (4.0, 1.0)),
        ((HEIGHT - 1.0, 1.0), (-10.0, 1.0)),  # below the last row are zeros
        ((1.0, WIDTH - 1.0), (4.0, -8.0)),
        ((-0.5, 0.0), (1.0, 0.5)),
    ],
)
def test_offset_gradient_at_integers_is_the_one_towards_plus(position, gradient):
    np.testing.assert_allclose(sample(*position)["grad_offset"], gradient, atol=1e-12)


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize(
    ("outside", "just_inside", "gradient"),
    [
        ((-1.0, 1.0), (-1 + 1e-9, 1.0), (2.0, 0.0)),  # pixel (0, 1)
        ((1.0, -1.0), (1.0, -1 + 1e-9), (0.0, 5.0)),  # pixel (1, 0)
    ],
    ids=["h", "w"],
)
def test_offset_gradient_at_exactly_minus_1_is_0_and_not_the_one_towards_plus(
    outside, just_inside, gradient, function
):
    np.testing.assert_array_equal(sample(*outside, function)["grad_offset"], (0.0, 0.0))
    np.testing.assert_allclose(sample(*just_inside, function)["grad_offset"], gradient, atol=1e-8)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.float16, tf.bfloat16])
@pytest.mark.parametrize("pixel", [np.nan, np.inf, -np.inf])
def test_pixel_that_is_not_finite_reaches_one_output_more_each_way_than_in_conv2d(
    pixel, dtype, rng
):
    """A sample between pixels has four corners, of which three have the weight 0 here."""
    image = rng.standard_normal((1, 9, 9, 2))
    image[0, 4, 4, 0] = pixel
    filters = tf.constant(rng.standard_normal((3, 3, 2, 3)), dtype)
    outputs = [
        deform_conv2d(tf.constant(image, dtype), filters, tf.zeros((1, 9, 9, 18), dtype)),
        tf.nn.conv2d(tf.constant(image, tf.float32), tf.cast(filters, tf.float32), 1, "SAME"),
    ]
    ours, theirs = (~np.isfinite(tf.cast(output, tf.float32))[0] for output in outputs)
    assert np.all(ours.sum((0, 1)) == 16)
    assert np.all(theirs.sum((0, 1)) == 9)
    assert np.all(ours[2:6, 2:6])
    assert np.all(theirs[3:6, 3:6])


@pytest.mark.parametrize("dtype", [tf.float32, tf.float16, tf.bfloat16])
def test_nan_and_infinite_offsets_leave_other_samples_alone(dtype, rng):
    case = random_case(rng, channels=8)
    clean = case.tensors(dtype)
    bad = rng.uniform(size=case.arrays["offset"].shape) < 0.2
    values = rng.choice([np.nan, np.inf, -np.inf], size=bad.shape)
    # An offset pair with a bad number is as good as a mask of 0.
    pair_bad = bad.reshape(*bad.shape[:3], -1, 2).any(axis=-1)
    dirty = clean | {"offset": tf.constant(np.where(bad, values, case.arrays["offset"]), dtype)}
    masked = clean | {"mask": tf.where(pair_bad, tf.zeros_like(clean["mask"]), clean["mask"])}
    actual, expected = (run(tensors, case.attributes) for tensors in (dirty, masked))
    for key in ("output", "grad_input", "grad_filters"):
        tensors = (tf.cast(results[key], tf.float32) for results in (actual, expected))
        # Equal, but for the order in which a GPU sums the input's gradient.
        assert relative_error(*tensors) <= {tf.float32: 1e-6, tf.float16: 1e-3}.get(dtype, 1e-2)
    for value in actual.values():
        assert np.all(np.isfinite(tf.cast(value, tf.float32)))


def test_sample_outside_counts_as_zero_whatever_the_mask():
    arguments = {
        "input": tf.ones((1, 1, 1, 1)),
        "filters": tf.ones((1, 1, 1, 1)),
        "offset": tf.constant([5.0, 0.0], shape=(1, 1, 1, 2)),
        "mask": tf.constant(np.nan, tf.float32, (1, 1, 1, 1)),
    }
    for function in (deform_conv2d, deform_conv2d_reference):
        assert all(np.all(value == 0) for value in run(arguments, {}, function=function).values())


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_image_without_pixels_is_all_zeros(size, rng):
    """With padding there is an output; second derivatives take the reference."""
    padding = ((0, 0), (2, 2), (2, 2), (0, 0))
    case = random_case(rng, size=size, padding=padding)
    for function in (deform_conv2d, deform_conv2d_reference):
        results = run(case.tensors(), case.attributes, function=function)
        assert tf.size(results["output"]) > 0
        assert all(np.all(value == 0) for value in results.values())


def test_positions_keep_float32_precision_far_from_the_origin(rng):
    """1e-6 is lost in h = 100000 + 1e-6, but not in the distance to the next pixel."""
    width = 100_001
    image = tf.constant(rng.standard_normal((1, 1, width, 1)), tf.float32)
    offset = tf.constant(np.tile([0.0, 1e-6], (1, 1, width, 1)), tf.float32)
    filters = tf.ones((1, 1, 1, 1))
    tensors = {"input": image, "filters": filters, "offset": offset}
    slope = run(tensors, {})["grad_offset"].numpy()[0, 0, :-1, 1]
    np.testing.assert_allclose(slope, np.diff(image.numpy()[0, 0, :, 0]), rtol=1e-5)


@pytest.mark.parametrize("where", [(0.0, 0.0), (-0.5, 7.25)], ids=["one", "border"])
def test_gradient_of_a_pixel_that_all_samples_share(where, device, rng):
    """A sum of 360 000 terms. The CPU sums them up by blocks; a GPU adds them in any order."""
    size, batch = 200, 2
    y, x, ky, kx = np.indices((size, size, 3, 3))
    offset = np.stack([where[0] - (y - 1 + ky), where[1] - (x - 1 + kx)], axis=-1)
    arrays = {
        "input": np.ones((batch, size, size, 1)),
        "filters": np.ones((3, 3, 1, 1)),
        "offset": np.broadcast_to(offset.reshape(1, size, size, 18), (batch, size, size, 18)),
    }
    grad_output = rng.uniform(20, 40, (batch, size, size, 1))
    exact, summed = (
        run(
            {name: tf.constant(array, dtype) for name, array in arrays.items()},
            {},
            tf.constant(grad_output, dtype),
        )["grad_input"]
        for dtype in (tf.float64, tf.float32)
    )
    assert np.sum(exact) > 1e7
    tolerance = 2e-6 if "CPU" in device else 2e-4
    np.testing.assert_allclose(summed, exact, rtol=tolerance)


# --- Batches and sizes ---


def test_batch_of_37_equals_37_single_images(rng):
    case = random_case(rng, batch=37, channels=5, deform_groups=5)
    tensors = case.tensors(tf.float32)
    grad_output = tf.constant(rng.standard_normal((37, 6, 7, 6)), tf.float32)
    together = run(tensors, case.attributes, grad_output)
    singles = [
        run(
            {k: v if k == "filters" else v[n : n + 1] for k, v in tensors.items()},
            case.attributes,
            grad_output[n : n + 1],
        )
        for n in range(37)
    ]
    for key in ("output", "grad_input", "grad_offset", "grad_mask"):
        single = tf.concat([result[key] for result in singles], axis=0)
        assert relative_error(together[key], single) <= 1e-6, key
    total = tf.add_n([result["grad_filters"] for result in singles])
    assert relative_error(together["grad_filters"], total) <= 1e-5


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype", [tf.float32, tf.float16])
def test_empty_batch(dtype, data_format, rng):
    case = random_case(rng, batch=0)
    results = run(case.tensors(dtype, data_format=data_format), case.attributes_in(data_format))
    assert results["output"].shape == in_format(np.zeros((0, 6, 7, 6)), "output", data_format).shape
    assert np.all(results["grad_filters"] == 0)
    for name in ("input", "offset", "mask"):
        array = in_format(case.arrays[name], name, data_format)
        assert results[f"grad_{name}"].shape == array.shape


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 17, 33])
def test_any_channel_count(channels, rng):
    case = random_case(rng, channels=channels, out_channels=5)
    actual, expected = (
        run(case.tensors(tf.float32), case.attributes, function=function)
        for function in (deform_conv2d, deform_conv2d_reference)
    )
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize(
    "configuration",
    [
        # Few images, whose channels are shared out among threads.
        {"batch": 1, "channels": 64, "out_channels": 128},
        {"batch": 3, "channels": 64, "out_channels": 128, "deform_groups": 4},
        {"batch": 1, "channels": 64, "out_channels": 128, "groups": 64},
        {"batch": 1, "channels": 40, "out_channels": 80, "groups": 5, "deform_groups": 2},
        {"batch": 2, "channels": 48, "out_channels": 96, "groups": 2, "deform_groups": 3},
        # Channels that are cut into slices, not all as wide, across and within groups.
        {"channels": 300, "out_channels": 7},
        {"channels": 300, "out_channels": 6, "groups": 2, "deform_groups": 3},
        {"channels": 96, "out_channels": 5, "deform_groups": 48},
        # Filters that are packed and summed up in several rounds.
        {"batch": 1, "size": (3, 4), "channels": 400, "out_channels": 800},
        {"batch": 5, "size": (2, 3), "channels": 256, "out_channels": 512, "mask": False},
        # An image whose positions are divided, with few and with many pixels that several workers
        # sample; or whose channels are, with offset gradients that are summed up in several bands.
        {"batch": 1, "size": (90, 80), "channels": 32, "out_channels": 3},
        {"batch": 1, "size": (90, 80), "channels": 128, "out_channels": 3, "offset_scale": 60.0},
        {"batch": 1, "size": (50, 50), "channels": 32, "out_channels": 400},
        # Workers whose positions begin in one image and end in another.
        {"batch": 3, "size": (30, 7), "channels": 5, "out_channels": 3, "strides": (3, 1)},
        {"batch": 5, "size": (1, 1), "channels": 3, "out_channels": 2, "offset_scale": 0.5},
        # Tiles that begin and end anywhere in rows and images.
        {"batch": 7, "size": (11, 5), "channels": 3, "out_channels": 4, "strides": (2, 1)},
        # Taps so far away that positions are computed in 64 bits.
        {"dilations": (2**29, 2**29)},
    ],
    ids=str,
)
def test_equals_the_reference_however_the_work_is_divided(configuration, rng):
    case = random_case(rng, **({"size": (13, 9)} | configuration))
    actual, expected = (
        run(case.tensors(), case.attributes, function=function)
        for function in (deform_conv2d, deform_conv2d_reference)
    )
    assert_close(actual, expected, 1e-12)


# --- Groups ---


# Narrow ones go through loops of their own on a CPU, wide ones through columns and GEMMs; a single
# group never is narrow.
@pytest.mark.parametrize(
    ("group_in", "group_out"),
    [
        *[
            (1, 1),
            (1, 3),
            (1, 16),
            (2, 2),
            (2, 17),
            (3, 5),
            (4, 4),
            (5, 2),
            (8, 8),
            (16, 8),
            (17, 8),
        ],
        # Groups of a vector, whatever the type and the instruction set.
        *[(4, 9), (8, 16), (16, 16)],
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(tf.float64, 1e-12), (tf.float32, 2e-6)])
@pytest.mark.parametrize("mask", [True, False])
def test_a_group_is_a_layer_of_its_own(mask, dtype, tolerance, group_in, group_out, rng):
    groups, deform_groups = 6, 2
    case = random_case(
        rng, size=(9, 8), channels=groups * group_in, out_channels=groups * group_out,
        groups=groups, deform_groups=deform_groups, mask=mask,
    )  # fmt: skip
    tensors = case.tensors(dtype)
    output_shape = deform_conv2d(**tensors, **case.attributes).shape
    grad_output = tf.constant(rng.standard_normal(output_shape), dtype)
    actual = run(tensors, case.attributes, grad_output)

    # What group j has of each tensor; two deformable groups have three groups each.
    def part(name, tensor, j):
        parts = deform_groups if name in ("offset", "mask") else groups
        return tf.split(tensor, parts, axis=-1)[j * parts // groups]

    alone = [
        run(
            {name: part(name, tensor, j) for name, tensor in tensors.items()},
            case.attributes | {"deform_groups": 1},
            part("output", grad_output, j),
        )
        for j in range(groups)
    ]
    for key, value in actual.items():
        parts = [each[key] for each in alone]
        if key in ("grad_offset", "grad_mask"):
            parts = [tf.add_n(parts[:3]), tf.add_n(parts[3:])]
        assert relative_error(value, tf.concat(parts, axis=-1)) <= tolerance, key


# --- Depthwise layers: each convolution group has one input channel ---

DEPTHWISE = [
    {"channels": 24},
    {"channels": 24, "deform_groups": 3, "mask": False},
    # Several outputs a channel; channels that no vector holds.
    {"channels": 16, "multiplier": 3, "deform_groups": 2},
    {"channels": 15, "multiplier": 2, "deform_groups": 5},
    # More channels in a deformable group than a warp has lanes for; many small groups.
    {"channels": 320},
    {"channels": 96, "deform_groups": 12},
    {"channels": 66, "deform_groups": 33},
    # Samples that leave the region around a patch, or the image.
    {"channels": 32, "offset_scale": 9.0},
    {"channels": 32, "kernel": (7, 7), "dilations": (3, 3), "offset_scale": 3.0},
    {"channels": 16, "kernel": (2, 5), "strides": (2, 3), "padding": "VALID"},
    {"channels": 16, "kernel": (1, 9), "size": (1, 70)},
    {"channels": 16, "size": (70, 1), "dilations": (2, 1)},
    {"channels": 16, "kernel": (23, 23), "batch": 1},
    {"channels": 16, "padding": ((0, 0), (5, 0), (0, 7), (0, 0))},
    # No output; no pixels.
    {"channels": 16, "kernel": (14, 1), "padding": "VALID"},
    {"channels": 16, "size": (0, 5), "padding": ((0, 0), (2, 2), (1, 1), (0, 0))},
]


@for_types(TYPES)
@pytest.mark.parametrize("configuration", DEPTHWISE, ids=str)
def test_depthwise_layer_equals_the_reference(configuration, dtype, offset_dtype, tolerance, rng):
    configuration = {"size": (13, 19), "multiplier": 1} | configuration
    channels, multiplier = configuration["channels"], configuration.pop("multiplier")
    case = random_case(rng, groups=channels, out_channels=channels * multiplier, **configuration)
    assert_precise(
        deform_conv2d, deform_conv2d_reference, case, dtype, offset_dtype, tolerance, ["NHWC"]
    )


@pytest.mark.parametrize("wanted", ["input", "filters", "offset", "mask"])
def test_depthwise_layer_gives_each_gradient_alone(wanted, rng):
    case = random_case(rng, channels=24, groups=24, out_channels=24, deform_groups=3)
    tensors = case.tensors(tf.float32)
    expected = run(case.tensors(), case.attributes, function=deform_conv2d_reference)
    gradients = gradients_alone(deform_conv2d, tensors, case.attributes, [wanted])
    assert relative_error(gradients[wanted], expected[f"grad_{wanted}"]) <= 1e-6


def test_strides_dilations_and_padding_take_every_form(rng):
    case = random_case(rng, mask=False)
    arguments = case.tensors()
    arguments["offset"] = arguments["offset"][:, :3, :3]
    forms = [
        {"strides": 2, "dilations": 2},
        {"strides": (2, 2), "dilations": [2, 2]},
        {"strides": [1, 2, 2, 1], "dilations": (1, 2, 2, 1)},
    ]
    outputs = [
        deform_conv2d(**arguments, padding=((0, 0), (2, 1), (1, 1), (0, 0)), **form)
        for form in forms
    ]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


def test_copies_of_some_images_at_a_time_give_what_the_batch_gives(rng):
    # On the CPU, copies of NCHW tensors take 8 MiB a thread. Those of an image take 9 MiB here.
    case = random_case(rng, batch=os.cpu_count() + 1, size=(192, 200), channels=24, out_channels=8)
    assert_parts_equal_the_whole(deform_conv2d, case)
