"""Weights files of plain networks, loaded into networks with `DeformableConv2D` layers."""

import keras
import numpy as np
import pytest
from checks import needs_keras_3_10
from keras import layers

from deform_conv import deformable
from deform_conv.layers import DeformableConv2D

pytestmark = needs_keras_3_10

FORMATS = ["weights.h5", "keras"]


def convolution(name, deformables, **options):
    """3x3, from 3 channels to 3: no shape tells one from another."""
    layer = DeformableConv2D if name in deformables else layers.Conv2D
    return layer(3, 3, padding="same", name=name, **options)


def network(deformables=(), **options):
    """Five convolutions, two of them in a nested model; those in `deformables` are deformable."""
    inner_inputs = keras.Input((8, 8, 3))
    x = convolution("inner_first", deformables)(inner_inputs)
    inner = keras.Model(inner_inputs, convolution("inner_second", deformables)(x), name="inner")
    inputs = keras.Input((8, 8, 3))
    x = inner(convolution("first", deformables, **options)(inputs))
    x = layers.BatchNormalization(name="norm")(x)
    x = convolution("third", deformables)(convolution("second", deformables)(x))
    return randomized(keras.Model(inputs, x))


def randomized(model):
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if "offset_conv" not in variable.path and "mask_conv" not in variable.path:
            variable.assign(rng.uniform(0.1, 0.5, variable.shape))
    return model


def zeroed(model):
    for variable in model.variables:
        variable.assign(np.zeros(variable.shape))
    return model


def saved(model, folder, file_format="weights.h5"):
    path = folder / f"model.{file_format}"
    (model.save if file_format == "keras" else model.save_weights)(path)
    return path


@pytest.fixture
def images(rng):
    return rng.standard_normal((2, 8, 8, 3)).astype("float32")


# Sums of large terms that nearly cancel differ in float32.
in_float64 = pytest.mark.parametrize("dtype_policy", ["float64"], indirect=True)


@in_float64
@pytest.mark.usefixtures("dtype_policy")
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "deformables",
    [
        ["first"],
        ["third"],
        ["second", "third"],
        ["inner_first", "second"],
        ["first", "second", "third", "inner_first", "inner_second"],
    ],
    ids=" ".join,
)
def test_every_layer_gets_the_weights_of_its_name(deformables, file_format, images, tmp_path):
    plain = network()
    model = zeroed(network(deformables))
    model.load_weights(saved(plain, tmp_path, file_format))
    np.testing.assert_allclose(model(images), plain(images), rtol=1e-5)


@in_float64
@pytest.mark.usefixtures("dtype_policy")
def test_skip_mismatch_skips_nothing_that_fits(images, tmp_path):
    plain = network()
    model = zeroed(network(["second"]))
    model.load_weights(saved(plain, tmp_path), skip_mismatch=True)
    np.testing.assert_allclose(model(images), plain(images), rtol=1e-5)


def test_offsets_and_masks_stay_as_they_are(tmp_path):
    model = network(["second"])
    second = model.get_layer("second")
    second.offset_conv.bias.assign(np.full(18, 0.25))
    model.load_weights(saved(network(), tmp_path))
    assert np.all(second.offset_conv.bias.numpy() == 0.25)


def test_network_with_some_deformable_layers_loads_into_one_with_more(images, tmp_path):
    some = network(["second", "inner_second"])
    some.get_layer("second").offset_conv.bias.assign(np.full(18, 0.25))
    more = zeroed(network(["first", "second", "inner_first", "inner_second"]))
    more.load_weights(saved(some, tmp_path))
    np.testing.assert_allclose(more(images), some(images), rtol=1e-5)


def test_network_loads_its_own_weights_under_other_names(images, tmp_path):
    def unnamed():
        return randomized(keras.Sequential([keras.Input((8, 8, 3)), DeformableConv2D(3, 3)]))

    model, other = unnamed(), unnamed()
    assert model.layers[0].name != other.layers[0].name
    model.layers[0].offset_conv.bias.assign(np.full(18, 0.25))
    other.load_weights(saved(model, tmp_path))
    np.testing.assert_array_equal(other(images), model(images))


def test_attribute_of_a_subclassed_model_gets_the_weights_of_its_attribute(images, tmp_path):
    class Network(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.conv = layer(3, 3)
            self.more = [layer(3, 3), layers.Conv2D(3, 3)]

        def call(self, inputs):
            x = self.conv(inputs)
            for layer in self.more:
                x = layer(x)
            return x

    def built(layer):
        model = Network(layer)
        model(images)
        for number, one in enumerate(model.more):
            one.name = f"more_{number}"
        return randomized(model)

    plain, model = built(layers.Conv2D), zeroed(built(DeformableConv2D))
    model.load_weights(saved(plain, tmp_path))
    np.testing.assert_allclose(model(images), plain(images), rtol=1e-5)


def test_layer_that_the_file_does_not_have_is_named_beside_those_it_has(tmp_path):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(3, 3, name="second")(layers.Conv2D(3, 3, name="first")(inputs))
    path = saved(keras.Model(inputs, x), tmp_path)
    x = DeformableConv2D(3, 3, name="other")(layers.Conv2D(3, 3, name="first")(inputs))
    model = keras.Model(inputs, x)
    with pytest.raises(
        ValueError,
        match=r"the file must have weights of other, or of a Conv2D of that name\. "
        r"Received: first, second",
    ):
        model.load_weights(path)


def test_kernel_of_another_shape_is_refused(tmp_path):
    inputs = keras.Input((8, 8, 3))
    path = saved(keras.Model(inputs, layers.Conv2D(3, 3, name="conv")(inputs)), tmp_path)
    model = keras.Model(inputs, DeformableConv2D(3, 5, name="conv")(inputs))
    with pytest.raises(ValueError, match=r"\(5, 5, 3, 3\).*\(3, 3, 3, 3\)"):
        model.load_weights(path)


def test_convolution_without_a_bias_does_not_fit_a_layer_with_one(tmp_path):
    path = saved(network(use_bias=False), tmp_path)
    with pytest.raises(ValueError, match="expected 2 variables, but received 1"):
        network(["first"]).load_weights(path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_resnet50_loads_into_one_whose_last_stage_is_deformable(file_format, rng, tmp_path):
    def resnet():
        return keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10)

    plain = resnet()
    for variable in plain.variables:
        if "moving" in variable.path or "gamma" in variable.path:
            variable.assign(rng.uniform(0.5, 1, variable.shape))
    model = deformable(resnet(), "conv5_block*_2_conv", modulated=True)
    model.load_weights(saved(plain, tmp_path, file_format))
    photos = rng.uniform(size=(2, 64, 64, 3)).astype("float32")
    np.testing.assert_allclose(model(photos), plain(photos), rtol=1e-5, atol=1e-7)
