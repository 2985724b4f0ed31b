"""The Keras layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import relative_error

from utils.deform_conv_layer import DeformableConv2D

pytestmark = pytest.mark.usefixtures("device")

ARGUMENTS = [
    {},
    {"strides": 2, "padding": "same"},
    {"dilation_rate": 2, "groups": 2, "deform_groups": 2},
    {"modulated": True, "use_bias": False, "activation": "relu", "kernel_size": (2, 3)},
]


@pytest.fixture
def images(rng):
    return tf.constant(rng.standard_normal((2, 9, 8, 4)), "float32")


def randomize(layer, rng):
    layer.set_weights([0.1 * rng.standard_normal(w.shape) for w in layer.get_weights()])


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_new_layer_computes_what_conv2d_does(arguments, images):
    arguments = {"filters": 6, "kernel_size": 3} | arguments
    layer = DeformableConv2D(**arguments)
    outputs = layer(images)
    regular = keras.layers.Conv2D(
        **{k: v for k, v in arguments.items() if k not in ("deform_groups", "modulated")}
    )
    regular.build((2, 9, 8, 4))
    regular.set_weights(layer.get_weights()[: len(regular.weights)])
    assert relative_error(outputs, regular(images)) <= 1e-6
    assert layer.compute_output_shape((2, 9, 8, 4)) == outputs.shape


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_layer_survives_saving_and_loading(arguments, images, tmp_path, rng):
    inputs = keras.Input((9, 8, 4))
    layer = DeformableConv2D(**({"filters": 6, "kernel_size": 3} | arguments))
    model = keras.Model(inputs, layer(inputs))
    randomize(layer, rng)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert relative_error(loaded(images), model(images)) <= 1e-6


@pytest.mark.parametrize("modulated", [False, True])
def test_offsets_and_masks_learn(modulated, images, rng):
    model = keras.Sequential(
        [keras.Input((9, 8, 4)), DeformableConv2D(3, 3, modulated=modulated, deform_groups=2)]
    )
    layer = model.layers[0]
    model.compile("adam", "mse")
    model.fit(images, rng.standard_normal((2, 7, 6, 3)), verbose=0)
    trained = [layer.offset_conv, layer.mask_conv] if modulated else [layer.offset_conv]
    for convolution in trained:
        assert np.all(convolution.kernel.numpy() != 0)
    assert layer.offset(images).shape == (2, 7, 6, 2 * 2 * 9)
    assert (layer.mask(images) is not None) == modulated


def test_channels_first_equals_channels_last(images, rng):
    # 6 filters on an output 6 wide: the bias must not be taken for one along the width.
    last = DeformableConv2D(6, 3, modulated=True, deform_groups=2)
    first = DeformableConv2D(6, 3, modulated=True, deform_groups=2, data_format="channels_first")
    last.build(images.shape)
    first.build((2, 4, 9, 8))
    randomize(last, rng)
    first.set_weights(last.get_weights())
    outputs = first(tf.transpose(images, [0, 3, 1, 2]))
    assert relative_error(tf.transpose(outputs, [0, 2, 3, 1]), last(images)) <= 1e-5


def test_mixed_precision_keeps_offsets_in_float32(images):
    layer = DeformableConv2D(6, 3, modulated=True, dtype="mixed_float16")
    outputs = layer(images)
    assert outputs.dtype == tf.float16
    assert layer.kernel.dtype == "float32"
    assert layer.offset(images).dtype == tf.float32


@pytest.mark.parametrize("deform_groups", [0, -1, 1.5])
def test_deform_groups_must_be_a_positive_integer(deform_groups):
    with pytest.raises(ValueError, match=r"deform_groups must be an integer above 0. Received"):
        DeformableConv2D(6, 3, deform_groups=deform_groups)


def test_deform_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"must divide the number of input channels, 4. Received"):
        DeformableConv2D(6, 3, deform_groups=3).build((2, 9, 8, 4))
