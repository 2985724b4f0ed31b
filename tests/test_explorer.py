"""Where deformable layers look: sampling locations, what is recorded, the page and the figure."""

import base64
import importlib.util
import json
import re
import sys
from dataclasses import replace

import browser as chrome
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import random_case

from deform_conv import (
    deform_aggregate2d,
    explore,
    plot_offsets,
    sampling_locations,
)
from deform_conv._explorer.page import page_of
from deform_conv._explorer.picture import picture_of
from deform_conv._explorer.record import record, sample_levels
from deform_conv.layers import (
    DeformableConv1D,
    DeformableConv2D,
    DeformableConv2DV3,
    DeformableConv2DV4,
)

OFFSETS = {"offset_kernel_initializer": "random_normal"}
ARROW_DOWN, ARROW_RIGHT = "\ue015", "\ue014"  # WebDriver's names


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(1)


@pytest.fixture
def image(rng):
    return rng.uniform(0, 4, (12, 16, 3)).astype(np.float32)


def two_layers(**options):
    """A network of two deformable layers, with a pooling between them."""
    return keras.Sequential(
        [
            keras.Input((12, 16, 3)),
            DeformableConv2D(8, 3, padding="same", name="first", **OFFSETS, **options),
            keras.layers.MaxPooling2D(),
            DeformableConv2D(4, (3, 2), strides=2, name="second", **OFFSETS),
        ]
    )


def page_data(path) -> dict:
    (text,) = re.findall(r'id="data">(.*?)</script>', path.read_text())
    return json.loads(text)


def halves(text) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


def in_halves(recording):
    """A recording with the offsets and masks that its page keeps."""
    layers = []
    for layer in recording.layers:
        offset = layer.offset.astype(np.float16).astype(np.float64)
        locations = layer.locations + (offset - layer.offset)
        layers.append(replace(layer, offset=offset, locations=locations))
    return replace(recording, layers=layers)


# --- Sampling locations ---


@pytest.mark.parametrize("padding", ["SAME", "VALID", [[0, 0], [1, 2], [0, 1], [0, 0]]])
@pytest.mark.parametrize(
    ("kernel", "strides", "dilations", "groups"),
    [((3, 3), (1, 1), (1, 1), 1), ((2, 3), (2, 3), (1, 2), 2), ((1, 4), (1, 2), (2, 1), 3)],
)
def test_locations_are_those_of_the_op(kernel, strides, dilations, groups, padding, rng):
    """The op samples a ramp, whose value at a place is the place."""
    options = {"strides": strides, "dilations": dilations, "padding": padding}
    case = random_case(
        rng,
        **options,
        size=(13, 14),
        kernel=kernel,
        channels=2 * groups,
        deform_groups=groups,
        filters=False,
    )
    offset = case.arrays["offset"]
    located = sampling_locations(offset, (13, 14), kernel, strides, padding, dilations, groups)
    ramp = np.stack(np.meshgrid(np.arange(13.0), np.arange(14.0), indexing="ij"), axis=-1)
    ramp = np.tile(ramp, [2, 1, 1, groups])
    assert located.shape == (*offset.shape[:-1], groups, *kernel, 2)
    located = located.reshape(*offset.shape[:-1], groups, -1, 2)
    # The ramp is one where all four pixels around are in the image.
    inside = np.all((located >= 0) & (located <= [12, 13]), axis=-1)
    assert inside.any()
    for tap in range(located.shape[-2]):
        weights = np.zeros([*offset.shape[:-1], groups, located.shape[-2]])
        weights[..., tap] = 1
        sampled = deform_aggregate2d(
            *(ramp, offset, weights.reshape(*offset.shape[:-1], -1), kernel),
            **options,
            deform_groups=groups,
        ).numpy()
        sampled = sampled.reshape(*offset.shape[:-1], groups, 2)
        chosen = inside[..., tap]
        np.testing.assert_allclose(sampled[chosen], located[..., tap, :][chosen], atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros([4, 4, 17]), 4, 3), r"offset must be \[\.\.\., OH, OW, 18\].*\(4, 4, 17\)"),
        ((np.zeros([18]), 4, 3), "offset must be"),
        (([["far"]], 4, 3), r"offset must be an array of real numbers\. Received: \[\['far'\]\]"),
        ((np.zeros([4, 4, 18]), "4", 3), "in_size must be"),
        ((np.zeros([4, 4, 18]), 4, 3, 0), r"strides must be at least 1\. Received: \[0, 0\]"),
        ((np.zeros([4, 4, 18]), 4, 3, 1, "same"), "padding must be"),
        # What the op refuses too: of NCHW, and negative.
        ((np.zeros([4, 4, 18]), 4, 3, 1, [[0, 0], [0, 0], [1, 1], [1, 1]]), "0 for batch and chan"),
        ((np.zeros([4, 4, 18]), 4, 3, 1, [[0, 0], [-1, 1], [1, 1], [0, 0]]), "of 0 or more"),
    ],
)
def test_locations_of_unfitting_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampling_locations(*arguments)


# --- What is recorded ---


def recorded(model, image):
    """(name, what it comes from) of each layer that is found."""
    layers = record(model, image).layers
    return [
        (layer.name, None if layer.previous is None else layers[layer.previous].name)
        for layer in layers
    ]


def test_layers_of_nested_and_shared_models_are_found(image):
    shared = DeformableConv2D(3, 3, padding="same", name="shared")
    inputs = keras.Input((12, 16, 3))
    nested = keras.Model(inputs, shared(keras.layers.ReLU()(inputs)), name="nested")
    head = keras.Sequential([DeformableConv2D(2, 3, name="head")])
    model = keras.Model(inputs, head(nested(shared(inputs))))
    assert recorded(model, image) == [
        ("shared (call 1)", None),
        ("shared (call 2)", "shared (call 1)"),
        ("head", "shared (call 2)"),
    ]


def test_layers_of_one_name_are_told_apart(image):
    def part(name):
        layer = DeformableConv2D(3, 3, padding="same", name="conv")
        return keras.Sequential([keras.Input((12, 16, 3)), layer], name=name)

    model = keras.Sequential([keras.Input((12, 16, 3)), part("a"), part("b")])
    names = [name for name, _ in recorded(model, image)]
    assert len(set(names)) == 2
    assert all("conv" in name for name in names)


class Namesakes(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [DeformableConv2D(3, 3, padding="same", name="conv") for _ in range(3)]

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


def test_layers_of_one_path_are_told_apart(image):
    names = [name for name, _ in recorded(Namesakes(), image)]
    assert [name.partition(" ")[2] for name in names] == ["", "(layer 2)", "(layer 3)"]
    assert len({name.partition(" ")[0] for name in names}) == 1


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = DeformableConv2D(3, 3, name="first")
        self.second = DeformableConv2D(3, 3, name="second")
        self.beside = DeformableConv2D(3, 3, name="beside")

    def call(self, inputs):
        outputs = self.first(inputs)
        return self.second(tf.nn.relu(outputs)), self.beside(inputs)


def test_layers_of_a_subclassed_model_are_found_and_where_their_inputs_come_from(image):
    assert recorded(Subclassed(), image) == [
        ("first", None),
        ("second", "first"),
        ("beside", None),
    ]


def test_of_several_sources_the_one_called_last_counts(image):
    inputs = keras.Input((12, 16, 3))
    first = DeformableConv2D(3, 3, padding="same", name="first")(inputs)
    second = DeformableConv2D(3, 3, padding="same", name="second")(first)
    third = DeformableConv2D(3, 3, name="third")(keras.layers.add([second, first]))
    assert recorded(keras.Model(inputs, third), image)[2] == ("third", "second")


def test_offsets_are_the_layers_own(image):
    model = two_layers(modulated=True, deform_groups=3)
    first = record(model, image).layers[0]
    layer = model.get_layer("first")
    np.testing.assert_allclose(
        first.offset.reshape(1, 12, 16, -1), layer.offset(image[np.newaxis]), atol=1e-5
    )
    np.testing.assert_allclose(
        first.mask.reshape(1, 12, 16, -1), layer.mask(image[np.newaxis]), atol=1e-5
    )
    assert first.offset.shape == (12, 16, 3, 9, 2)


def test_given_offsets_and_masks_are_recorded(image, rng):
    inputs = keras.Input((12, 16, 3))
    offset = keras.layers.Conv2D(18, 3, padding="same", name="offset")(inputs)
    mask = keras.layers.Conv2D(9, 3, padding="same", activation="sigmoid", name="mask")(inputs)
    layer = DeformableConv2D(3, 3, padding="same", own_offsets=False, modulated=True)
    model = keras.Model(inputs, layer([inputs, offset, mask]))
    expected = keras.Model(inputs, [offset, mask])(image[np.newaxis])
    (found,) = record(model, image).layers
    np.testing.assert_allclose(found.offset.reshape(1, 12, 16, 18), expected[0], atol=1e-5)
    np.testing.assert_allclose(found.mask.reshape(1, 12, 16, 9), expected[1], atol=1e-5)


def test_channels_first_layers_are_recorded_as_the_others(image):
    last, first = (
        DeformableConv2D(4, 3, strides=2, data_format=each, name="layer", **OFFSETS)
        for each in ("channels_last", "channels_first")
    )
    models = (
        keras.Sequential([keras.Input((12, 16, 3)), last]),
        keras.Sequential([keras.Input((3, 12, 16)), first]),
    )
    first.set_weights(last.get_weights())
    images = image, np.moveaxis(image, -1, 0)
    one, other = (record(*each) for each in zip(models, images, strict=True))
    np.testing.assert_allclose(one.layers[0].locations, other.layers[0].locations, atol=1e-5)
    np.testing.assert_array_equal(one.image, other.image)


@pytest.mark.parametrize("kind", [DeformableConv2DV3, DeformableConv2DV4])
def test_versions_3_and_4_are_recorded_without_the_tap_that_they_leave_out(kind, rng):
    layer = kind(3, deform_groups=2, remove_center=True)
    model = keras.Sequential([keras.Input((6, 7, 4)), layer])
    image = rng.normal(size=(6, 7, 4))
    (found,) = record(model, image).layers
    assert found.offset.shape == (6, 7, 2, 8, 2)
    assert [1, 1] not in found.taps.tolist()
    expected = layer.offset(image[np.newaxis].astype(np.float32)).numpy()
    expected = np.delete(expected.reshape(6, 7, 2, 9, 2), 4, axis=-2)
    np.testing.assert_allclose(found.offset, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (DeformableConv2D(3, 3), "model must be a Keras model. Received: <DeformableConv2D"),
        (
            keras.Sequential([keras.Input((12, 16, 3)), keras.layers.Conv2D(3, 3)]),
            "model must call a deformable layer of images.*which calls none",
        ),
        (
            keras.Sequential(
                [
                    keras.Input((12, 16, 3)),
                    keras.layers.Reshape((192, 3)),
                    DeformableConv1D(3, 3),
                ]
            ),
            "model must call a deformable layer of images.*which calls none",
        ),
    ],
)
def test_models_without_deformable_layers_are_refused(model, message, image):
    with pytest.raises(ValueError, match=message):
        record(model, image)


def test_models_of_several_inputs_are_refused(image):
    inputs = [keras.Input((12, 16, 3)) for _ in range(2)]
    model = keras.Model(inputs, DeformableConv2D(3, 3)(keras.layers.add(inputs)))
    with pytest.raises(ValueError, match=r"model must have one input\. Received: a model of 2"):
        record(model, image)


class Looping(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = DeformableConv2D(3, 3, padding="same", name="looped")

    def build(self, input_shape):
        self.layer.build(input_shape)

    def call(self, inputs):
        return tf.map_fn(lambda each: self.layer(each[np.newaxis])[0], inputs)


class Doubling(Looping):
    def call(self, inputs):
        return self.layer(tf.concat([inputs, inputs], axis=0))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Looping, "model must not call looped within a loop"),
        (Doubling, r"model must call looped with one image.*Received: .*\(2, 12, 16, 3\)"),
    ],
)
def test_calls_that_cannot_be_shown_are_refused(kind, message, image):
    with pytest.raises(ValueError, match=message):
        record(kind(), image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((12, 15, 3)), r"image must have the shape that the model takes, \(12, 16, 3\)"),
        (np.zeros((2, 12, 16, 3)), r"image must be one image.*shape \(2, 12, 16, 3\)"),
        (np.zeros((12, 16)), r"image must be one image.*shape \(12, 16\)"),
        (np.zeros((12, 16, 3), complex), "image must be an array of real numbers.*complex128"),
        (np.full((12, 16, 3), "a"), "image must be an array of real numbers.*<U1"),
        ("digit.png", "image must be an array of real numbers"),
    ],
)
def test_unfitting_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        record(two_layers(), image)


def test_a_model_of_larger_batches_is_refused(image):
    model = keras.Sequential([keras.Input(batch_shape=(8, 12, 16, 3)), DeformableConv2D(2, 3)])
    message = r"model must take one image at a time\. Received: a model of 8"
    with pytest.raises(ValueError, match=message):
        record(model, image)


def test_an_image_without_an_output_is_refused(rng):
    layer = DeformableConv2DV3(3, strides=2, padding="valid", deform_groups=1, name="layer")
    model = keras.Sequential([keras.Input((None, None, 3)), layer])
    message = r"image must be large enough for layer, .*\(2, 16\).*an output of \(0, 7\)"
    with pytest.raises(ValueError, match=message):
        record(model, rng.uniform(size=(2, 16, 3)))


def test_an_image_may_be_bfloat16(image):
    (found, _) = record(two_layers(), tf.cast(image, tf.bfloat16)).layers
    assert found.in_size == (12, 16)


def test_a_batch_of_one_is_an_image(image):
    model = two_layers()
    one, other = (record(model, each).layers[1] for each in (image, image[np.newaxis]))
    np.testing.assert_array_equal(one.locations, other.locations)


# --- Level through level ---


def constant_offsets(model, *offsets):
    """Gives each deformable layer one offset (dy, dx) for all its samples."""
    layers = [each for each in model.layers if isinstance(each, DeformableConv2D)]
    for layer, offset in zip(layers, offsets, strict=True):
        layer.offset_conv.kernel.assign(tf.zeros_like(layer.offset_conv.kernel))
        layer.offset_conv.bias.assign(np.tile(offset, layer.offset_conv.bias.shape[0] // 2))


def test_samples_of_a_level_are_those_at_the_samples_of_the_level_before():
    inputs = keras.Input((21, 21, 1))
    outputs = inputs
    for index in range(3):
        outputs = DeformableConv2D(1, 3, padding="same", name=f"conv{index}")(outputs)
    model = keras.Model(inputs, outputs)
    constant_offsets(model, (0, 0.25), (1, 0), (2, -1))
    found = sample_levels(record(model, np.zeros((21, 21, 1))), 2, (10, 10), 3, [0, 0, 0])
    assert [len(level.pixels) for level in found] == [9, 81, 729]
    square = np.argwhere(np.ones((3, 3))) - 1
    first = np.add(square, [12, 9])
    second = (first[:, np.newaxis] + square + [1, 0]).reshape(-1, 2)
    third = (second[:, np.newaxis] + square + [0, 0.25]).reshape(-1, 2)
    for level, expected in zip(found, (first, second, third), strict=True):
        np.testing.assert_allclose(level.pixels, expected, atol=1e-6)
    np.testing.assert_allclose(found[0].lengths, np.sqrt(5), rtol=1e-6)


def test_a_position_is_shown_at_the_middle_of_its_window():
    inputs = keras.Input((15, 15, 1))
    outputs = DeformableConv2D(1, 3, strides=2)(inputs)  # the middles are at 1, 3, 5, ...
    outputs = keras.layers.ReLU()(outputs)
    outputs = DeformableConv2D(1, (3, 1), dilation_rate=2)(outputs)  # rows 2, 3, 4, ... of those
    model = keras.Model(inputs, DeformableConv2D(1, 1)(outputs))
    recording = record(model, np.zeros((15, 15, 1)))
    found = sample_levels(recording, 2, (1, 1), 3, [0, 0, 0])
    np.testing.assert_allclose(found[0].pixels, [[7, 3]])
    np.testing.assert_allclose(found[1].pixels, [[3, 3], [7, 3], [11, 3]])
    rows = [[2], [3], [4], [6], [7], [8], [10], [11], [12]]
    np.testing.assert_allclose(np.unique(found[2].pixels[:, :1], axis=0), rows)
    np.testing.assert_allclose(recording.layers[1].scale, 2)


def test_a_sample_outside_has_no_next_level(image):
    model = two_layers()
    constant_offsets(model, (0, 0), (100, 0))
    found = sample_levels(record(model, image), 1, (0, 0), 3, [0, 0])
    assert [len(level.pixels) for level in found] == [6, 0]
    assert not found[0].reads.any()


# --- The page ---


def test_page_holds_the_offsets_and_masks_of_every_layer(image, tmp_path):
    model = two_layers(modulated=True)
    path = explore(model, image, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    data = page_data(path)
    assert [layer["name"] for layer in data["layers"]] == ["first", "second"]
    pooled = keras.Model(model.inputs[0], model.layers[1].output)(image[np.newaxis])
    for layer, images in zip(data["layers"], (image[np.newaxis], pooled), strict=True):
        source = model.get_layer(layer["name"])
        expected = source.offset(images).numpy().ravel()
        np.testing.assert_allclose(halves(layer["offset"]), expected, rtol=2**-11, atol=1e-5)
        mask = source.mask(images)
        if mask is None:
            assert layer["mask"] is None
        else:
            np.testing.assert_allclose(halves(layer["mask"]), mask.numpy().ravel(), rtol=2**-11)


def test_page_needs_nothing_else(image, tmp_path):
    text = explore(two_layers(), image, tmp_path / "page.html").read_text()
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace, which nothing is read from
    assert not re.findall(r"/\* [\w.]+ \*/", text)


def test_a_name_cannot_end_the_data():
    (text,) = re.findall(r'id="data">(.*?)</script>', page_of({"model": "</script><!--"}), re.S)
    assert json.loads(text) == {"model": "</script><!--"}


def test_page_counts_samples_outside_and_offsets_that_are_not_numbers(image, tmp_path):
    model = two_layers()
    constant_offsets(model, (np.nan, 0), (-100, 0))
    first, second = page_data(explore(model, image, tmp_path / "page.html"))["layers"]
    (figures,) = first["perGroup"]
    assert figures["notNumbers"] == figures["samples"] == 12 * 16 * 9
    assert (figures["outside"], figures["mean"]) == (0, None)
    assert np.isnan(halves(first["offset"])[::2]).all()
    (figures,) = second["perGroup"]
    assert (figures["notNumbers"], figures["outside"]) == (0, figures["samples"])
    assert figures["mean"] == pytest.approx(100)


def test_page_of_large_layers_keeps_fewer_positions_and_is_small(rng, tmp_path):
    image = rng.integers(0, 256, (512, 512, 3), np.uint8)  # noise, which no format makes smaller
    inputs = keras.Input((512, 512, 3))
    outputs = keras.layers.Conv2D(1, 1)(inputs)
    for _ in range(3):
        outputs = DeformableConv2D(1, 3, strides=2, padding="same", modulated=True)(outputs)
    path = explore(keras.Model(inputs, outputs), image, tmp_path / "page.html")
    assert path.stat().st_size <= 5_000_000
    steps = [layer["step"] for layer in page_data(path)["layers"]]
    assert steps == [2, 1, 1]
    first = page_data(path)["layers"][0]
    assert len(halves(first["offset"])) == 128 * 128 * 18
    assert first["perGroup"][0]["samples"] == 256 * 256 * 9


@pytest.mark.parametrize("picture", [(12, 16), (24, 32, 3), (3000, 10, 1)])
def test_a_picture_may_stand_for_the_image(picture, image, tmp_path, rng):
    path = explore(two_layers(), image, tmp_path / "page.html", picture=rng.uniform(size=picture))
    encoded = page_data(path)["picture"].partition("base64,")[2]
    shown = tf.io.decode_image(base64.b64decode(encoded)).shape
    assert max(shown[:2]) == min(max(picture), 1024)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 0.2, 1], [0, 51, 255]),  # shares
        ([0, 2, 255], [0, 2, 255]),
        ([-1, 0, 3], [0, 64, 255]),
        ([-1, -1, -1], [0, 0, 0]),
        ([np.nan, 0, 1], [0, 0, 255]),
    ],
)
def test_a_picture_is_shown_by_the_range_of_its_numbers(values, shown, image):
    recording = record(two_layers(), image)
    picture = np.array([values], np.float32)
    assert picture_of(recording, picture)[0, :, 0].tolist() == shown


def test_page_tells_how_long_offsets_are_and_where_they_point(image, tmp_path):
    model = two_layers(modulated=True)
    constant_offsets(model, (3, 0), (0, -7e4))
    first, second = page_data(explore(model, image, tmp_path / "page.html"))["layers"]
    (figures,) = first["perGroup"]
    assert figures["mean"] == pytest.approx(3)
    assert figures["maskMean"] == pytest.approx(np.mean(halves(first["mask"])), abs=1e-4)
    for name in ("lengths", "directions", "masks"):
        assert sum(figures[name]) == pytest.approx(1, abs=1e-3)
    assert figures["lengths"][-1] == 1  # all are as long as the longest one
    down, left = (of["perGroup"][0]["directions"] for of in (first, second))
    assert max(down) == max(left) == 1
    assert down.index(1) != left.index(1)
    # Longer ones than float16 holds stay numbers, which the page can draw.
    np.testing.assert_array_equal(halves(second["offset"])[1::2], -65504)


def test_unfitting_pictures_and_paths_are_refused(image, tmp_path):
    with pytest.raises(ValueError, match=r"picture must be \[h, w\].*shape \(4, 4, 2\)"):
        explore(two_layers(), image, tmp_path / "page.html", picture=np.zeros((4, 4, 2)))
    for path in (tmp_path, tmp_path / "none" / "page.html", 3):
        with pytest.raises(ValueError, match="path must be that of a file"):
            explore(two_layers(), image, path)
    with pytest.raises(OSError):
        explore(two_layers(), image, "/proc/page.html")


# --- The figure ---

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_figure_is_written_as_its_suffix_says(suffix, begins, image, tmp_path):
    path = tmp_path / f"figure{suffix}"
    figure = plot_offsets(two_layers(modulated=True), image, path, position=(1, 2))
    assert path.read_bytes().startswith(begins)
    titles = [axis.get_title() for axis in figure.axes[:2]]
    assert titles == ["second: 6 samples", "first: 54 samples"]


@needs_matplotlib
def test_figure_shows_the_samples(image):
    model = two_layers()
    figure = plot_offsets(model, image, layer="second", position=(1, 2), levels=1)
    level = sample_levels(record(model, image), 1, (1, 2), 1, [0, 0])[0]
    dots = np.concatenate([each.get_offsets() for each in figure.axes[0].collections[1:]])
    assert sorted(dots.tolist()) == sorted(level.pixels[:, ::-1].tolist())


@needs_matplotlib
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "third"}, "layer must be one of first, second. Received: 'third'"),
        ({"layer": 2}, "layer must be an integer from 0 to 1. Received: 2"),
        ({"position": 3}, r"position must be \(y, x\). Received: 3"),
        ({"position": (0, 99)}, "position must be an integer from 0 to .*Received: 99"),
        ({"levels": 4}, "levels must be an integer from 1 to 3. Received: 4"),
        ({"group": 1}, "group must be an integer from 0 to 0. Received: 1"),
        ({"path": "figure.abc"}, r"path must end in one of .*\.pdf.*Received: 'figure.abc'"),
    ],
)
def test_unfitting_arguments_of_the_figure_are_refused(options, message, image):
    with pytest.raises(ValueError, match=message):
        plot_offsets(two_layers(), image, **options)


def test_without_matplotlib_the_figure_says_what_to_install(image, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot_offsets needs matplotlib: pip install 'tf-deform"):
        plot_offsets(two_layers(), image)


# --- The page in a browser ---


@pytest.fixture(scope="module")
def browser():
    if missing := chrome.missing():
        pytest.skip(f"needs {', '.join(missing)}")
    with chrome.chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser, image, tmp_path):
    """The page of a model in a browser, and what was recorded of it."""
    model = two_layers(modulated=True)
    path = explore(model, image, tmp_path / "page.html")
    browser.emulate(1200, 900)
    browser.open(path.as_uri())
    yield browser, in_halves(record(model, image))
    assert browser.messages() == []


SAMPLES = """
return [...document.querySelectorAll("circle.sample[data-level='" + arguments[0] + "']")]
  .map((circle) => [circle.cy.baseVal.value - 0.5, circle.cx.baseVal.value - 0.5]);
"""
AREA = """
const {x, y, width, height} = document.querySelector("#stage svg").getBoundingClientRect();
const box = document.querySelector("#stage svg").viewBox.baseVal;
return {x, y, scale: width / box.width, left: box.x, top: box.y};
"""
POSITION = 'return document.getElementById("place").textContent.match(/\\d+/g).map(Number)'


def point_at(browser, place, **options):
    """Points at a place (h, w) of the image."""
    area = browser.run(AREA)
    y = area["y"] + (place[0] + 0.5 - area["top"]) * area["scale"]
    x = area["x"] + (place[1] + 0.5 - area["left"]) * area["scale"]
    browser.pointer(x, y, **options)


def check_drawn(browser, level, number):
    """Those that read nothing may be drawn at the edge."""
    drawn = np.array(browser.run(SAMPLES, number))
    assert len(drawn) == len(level.pixels)
    np.testing.assert_allclose(drawn[level.reads], level.pixels[level.reads], atol=1e-3)


def test_pointing_at_a_place_draws_where_its_position_samples(opened):
    browser, recording = opened
    browser.run("document.querySelector('#layers input[value=\"0\"]').click()")
    point_at(browser, (7.1, 3.8))
    assert browser.run(POSITION)[:2] == [7, 4]
    level = sample_levels(recording, 0, (7, 4), 1, [0, 0])[0]
    assert level.reads.all()
    check_drawn(browser, level, 1)


def test_levels_are_drawn_down_to_the_image(opened):
    browser, recording = opened
    browser.run("document.querySelector('#depths input[value=\"2\"]').click()")
    point_at(browser, (5, 8))
    position = browser.run(POSITION)[:2]
    for number, level in enumerate(sample_levels(recording, 1, position, 2, [0, 0]), start=1):
        check_drawn(browser, level, number)


def test_keys_and_touches_move_the_position(opened):
    browser, _ = opened
    browser.run("document.querySelector('#layers input[value=\"0\"]').click()")
    browser.run("document.getElementById('stage').focus()")
    before = browser.run(POSITION)
    browser.keys(ARROW_DOWN, ARROW_RIGHT, ARROW_RIGHT, "2", "m")
    after = browser.run(POSITION)
    assert [after[0] - before[0], after[1] - before[1]] == [1, 2]
    assert browser.run("return document.querySelector('#maps :checked').value") == "length"
    point_at(browser, (2, 9), press=True, kind="touch")
    assert browser.run(POSITION)[:2] == [2, 9]


def test_zoom_shows_the_place_that_was_pointed_at(browser, rng, tmp_path):
    layer = DeformableConv2D(2, 3, padding="same", **OFFSETS)
    model = keras.Sequential([keras.Input((64, 48, 1)), layer])
    image = rng.uniform(size=(64, 48, 1))
    browser.emulate(1200, 900)
    browser.open(explore(model, image, tmp_path / "page.html").as_uri())
    point_at(browser, (40, 6), press=True)  # held there
    before = browser.run(AREA)
    browser.keys("z")
    assert browser.run(AREA)["scale"] == pytest.approx(4 * before["scale"])
    assert browser.run(POSITION)[:2] == [40, 6]
    point_at(browser, (43, 7), press=True)  # lets it go
    assert browser.run(POSITION)[:2] == [43, 7]
    level = sample_levels(in_halves(record(model, image)), 0, (43, 7), 1, [0])[0]
    check_drawn(browser, level, 1)
    assert browser.messages() == []


def test_samples_outside_and_nan_are_named(browser, image, tmp_path):
    model = two_layers()
    constant_offsets(model, (np.nan, 0), (-100, 0))
    path = explore(model, image, tmp_path / "page.html")
    for layer, text in (
        ("first", "tap (0, 0), whose offset is NaN; "),
        ("second", "Outside second’s input of 6\u00a0×\u00a08: tap (0, 0) at (−100.0, "),
    ):
        browser.open("about:blank")
        browser.open(f"{path.as_uri()}#layer={layer}&at=0,0&levels=3&map=direction")
        assert text in browser.run("return document.getElementById('outside').textContent")
    assert browser.messages() == []


def test_groups_dilation_and_unpadded_layers_are_drawn_where_they_sample(
    browser, image, tmp_path, monkeypatch
):
    monkeypatch.setattr("deform_conv._explorer.page._LARGEST_DATA", 8_000)
    options = {"deform_groups": 2, "dilation_rate": 2, **OFFSETS}
    model = keras.Sequential(
        [
            keras.Input((12, 16, 3)),
            keras.layers.Conv2D(4, 1),
            DeformableConv2D(4, 3, **options),
            DeformableConv2D(2, (2, 3), **options),
        ]
    )
    path = explore(model, image, tmp_path / "page.html")
    steps = [layer["step"] for layer in page_data(path)["layers"]]
    assert max(steps) > 1
    recording = in_halves(record(model, image))
    browser.emulate(1200, 900)
    browser.open("about:blank")
    browser.open(f"{path.as_uri()}#layer={recording.layers[0].name}&at=4,6&group=2&levels=1")
    position = browser.run(POSITION)[:2]
    assert [at % steps[0] for at in position] == [0, 0]
    check_drawn(browser, sample_levels(recording, 0, position, 1, [1, 0])[0], 1)
    browser.open("about:blank")
    browser.open(f"{path.as_uri()}#layer={recording.layers[1].name}&at=2,4&group=2&levels=1")
    position = browser.run(POSITION)[:2]
    check_drawn(browser, sample_levels(recording, 1, position, 1, [0, 1])[0], 1)
    assert browser.messages() == []


@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_a_phone(opened, dark):
    browser, _ = opened
    browser.emulate(740, 360, dark=dark, phone=True)
    # There is room beside the image for a finger that scrolls.
    stage = "return document.getElementById('stage').getBoundingClientRect().height"
    assert browser.run(stage) <= 0.81 * 360
    browser.emulate(360, 740, dark=dark, phone=True)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 3 * 128) == dark
