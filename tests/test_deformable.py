"""`deformable()`: copies of Keras models with deformable convolutions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import relative_error
from keras import layers

from deform_conv import deformable
from deform_conv.layers import DeformableConv2D

pytestmark = pytest.mark.usefixtures("device")

LAST_STAGE = "conv5_block*_2_conv"  # of ResNet50


@pytest.fixture
def images(rng):
    return tf.constant(rng.standard_normal((2, 8, 8, 3)), "float32")


def small_model():
    """A functional model with a nested one, a shared layer and layers of each kind; random."""
    inner_input = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, padding="same", name="inner_conv")(inner_input)
    inner = keras.Model(inner_input, layers.BatchNormalization(name="inner_norm")(x), name="inner")
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, strides=1, padding="same", activation="relu", name="first")(inputs)
    x = layers.Conv2D(4, 1, name="pointwise")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = inner(x)
    shared = layers.Conv2D(4, (3, 1), padding="same", name="shared")
    x = shared(x) + shared(layers.Dropout(0.1, name="dropout")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(inputs, layers.Dense(5, name="logits")(x), name="small")
    return randomize(model)


def randomize(model):
    rng = np.random.default_rng(1)
    model.set_weights([rng.uniform(0.1, 0.5, weight.shape) for weight in model.get_weights()])
    return model


def deformable_names(model):
    nested = [sub for sub in model.layers if isinstance(sub, keras.Model)]
    own = [layer.name for layer in model.layers if isinstance(layer, DeformableConv2D)]
    return own + [name for sub in nested for name in deformable_names(sub)]


# --- What the copy computes ---


@pytest.mark.parametrize("modulated", [False, True])
def test_copy_computes_what_the_model_does(modulated, images):
    model = small_model()
    copy = deformable(model, modulated=modulated)
    assert relative_error(copy(images), model(images)) <= 1e-5


def test_copy_of_a_sequential_model_is_one(images):
    model = randomize(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3, name="conv"),
                keras.Sequential([layers.Conv2D(4, 3, name="nested")], name="block"),
            ]
        )
    )
    copy = deformable(model)
    assert type(copy) is keras.Sequential
    assert deformable_names(copy) == ["conv", "nested"]
    assert relative_error(copy(images), model(images)) <= 1e-5


def test_copy_has_weights_of_its_own(images):
    model = small_model()
    before = model(images)
    copy = deformable(model)
    copy.set_weights([0 * weight for weight in copy.get_weights()])
    np.testing.assert_array_equal(model(images), before)


def test_model_is_left_as_it_is(images):
    model = small_model()
    model.compile("adam", "mse")
    config, weights = model.get_config(), model.get_weights()
    deformable(model)
    assert model.get_config() == config
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert model.compiled
    model.fit(images, tf.ones((2, 5)), verbose=0)


def test_copy_is_not_compiled():
    model = small_model()
    model.get_layer("inner").compile("adam", "mse")
    model.compile("adam", "mse")
    copy = deformable(model)
    assert not copy.compiled
    assert not copy.get_layer("inner").compiled


def test_names_are_kept():
    model = small_model()
    copy = deformable(model)
    assert copy.name == "small"
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]


def test_shared_layer_stays_shared():
    model = small_model()
    copy = deformable(model)
    # Two for each deformable layer: the offsets' kernel and bias.
    assert len(copy.weights) == len(model.weights) + 2 * len(deformable_names(copy))


def test_layer_shared_with_a_nested_model_stays_shared():
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    inner_input, inputs = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    inner = keras.Model(inner_input, shared(inner_input), name="inner")
    copy = deformable(keras.Model(inputs, inner(shared(inputs))))
    assert copy.get_layer("shared") is copy.get_layer("inner").get_layer("shared")


def test_state_of_random_layers_is_copied(images):
    inputs = keras.Input((8, 8, 3))
    x = layers.Dropout(0.5, seed=1, name="dropout")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 3)(x))
    model(images, training=True)
    copy = deformable(model)
    assert relative_error(copy(images, training=True), model(images, training=True)) <= 1e-5


def test_offsets_of_layers_that_are_deformable_already_stay_their_own(images):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="plain")(inputs)
    layer = DeformableConv2D(5, 3, modulated=True, name="shown")
    outputs = [layer(x), layer.offset(x), layer.mask(x)]
    model = randomize(keras.Model(inputs, outputs))
    copy = deformable(model)
    assert deformable_names(copy) == ["plain", "shown"]
    for actual, expected in zip(copy(images), model(images), strict=True):
        assert relative_error(actual, expected) <= 1e-5
    layer = copy.get_layer("shown")
    for variable in (*layer.offset_conv.variables, *layer.mask_conv.variables):
        variable.assign(variable + 0.1)
    x = copy.get_layer("plain")(images)
    outputs, offset, mask = copy(images)
    np.testing.assert_array_equal(outputs, layer(x))
    np.testing.assert_array_equal(offset, layer.offset(x))
    np.testing.assert_array_equal(mask, layer.mask(x))


# --- Which layers ---

ALL = ["first", "shared", "inner_conv"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ALL),
        ("first", ["first"]),
        ("*_conv", ["inner_conv"]),
        (["first", "inner_*v"], ["first", "inner_conv"]),
        (("first", "firs?"), ["first"]),
        ("pointwise", ["pointwise"]),
        (lambda layer: "share" in layer.name, ["shared"]),
    ],
)
def test_layers_are_chosen(choice, expected):
    assert deformable_names(deformable(small_model(), choice)) == expected


@pytest.mark.parametrize(
    "option", [{"modulated": 2}, {"mask_scale": -1}, {"deform_groups": 0}], ids=str
)
def test_options_that_do_not_fit_are_told_as_the_layer_tells(option):
    model = keras.Sequential([keras.Input((8, 8, 2)), keras.layers.Conv2D(2, 3)])
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be "):
        deformable(model, **option)


def test_options_are_given_to_each_layer():
    options = {"deform_groups": 2, "modulated": True, "mask_scale": 1.0}
    copy = deformable(
        small_model(), ["shared", "inner_conv"], offset_kernel_initializer="ones", **options
    )
    for layer in (copy.get_layer("shared"), copy.get_layer("inner").get_layer("inner_conv")):
        assert {name: layer.get_config()[name] for name in options} == options
        assert np.all(layer.offset_conv.kernel.numpy() == 1)


# --- Flags and types ---


def test_trainable_flags_carry_over():
    model = small_model()
    model.get_layer("inner").trainable = False
    model.get_layer("inner").get_layer("inner_norm").trainable = True
    model.get_layer("first").trainable = False
    model.get_layer("shared").bias.trainable = False
    copy = deformable(model)

    def paths(variables):
        return {v.path for v in variables if "offset_conv" not in v.path}

    assert paths(copy.trainable_variables) == paths(model.trainable_variables)
    assert not copy.get_layer("inner").trainable
    assert not copy.get_layer("first").offset_trainable
    assert copy.get_layer("shared").offset_trainable


def test_flag_of_a_frozen_model_carries_over():
    model = small_model()
    model.trainable = False
    assert not deformable(model).trainable


@pytest.mark.parametrize("offset_trainable", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_offsets_can_be_frozen_or_trained_whatever_the_convolution_is(frozen, offset_trainable):
    model = small_model()
    for layer in model.layers:
        layer.trainable = not frozen
    copy = deformable(model, offset_trainable=offset_trainable)
    trained = [v.path for v in copy.trainable_variables]
    assert any("offset_conv" in path for path in trained) == offset_trainable
    assert any("offset_conv" not in path for path in trained) != frozen


def test_dtype_policies_carry_over():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, dtype="mixed_bfloat16", name="half")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 3, dtype="float64", name="double")(x))
    copy = deformable(model)
    assert copy.get_layer("half").dtype_policy.name == "mixed_bfloat16"
    assert copy.get_layer("double").dtype_policy.name == "float64"


# --- Errors ---


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    "make", [Subclassed, lambda: layers.Conv2D(4, 3), lambda: keras.Sequential([layers.ReLU()])]
)
def test_model_must_be_a_built_graph(make):
    with pytest.raises(ValueError, match=r"model must be .* that is built. Received: <.*"):
        deformable(make())


@pytest.mark.parametrize("model", [None, "model", 3, [small_model], tf.zeros(2), keras.Sequential])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(
        ValueError, match=r"^model must be .* that is built. Received: \S.* of type"
    ):
        deformable(model)


@pytest.mark.parametrize("module", ["tf_keras.src.engine.functional", "tensorflow.python.keras.m"])
def test_model_of_keras_2_is_refused_as_such(module):
    legacy = type("Functional", (), {"__module__": module})
    model = type("Mine", (legacy,), {"__module__": "mine"})()
    message = (
        rf"^model must be one of Keras 3, .* Received: .* of type {module}.Functional, which is"
    )
    with pytest.raises(ValueError, match=message):
        deformable(model)


@pytest.mark.parametrize("choice", ["conv9", ["first", "conv9"]])
def test_pattern_without_a_match_is_named_beside_the_convolutions(choice):
    message = r"Conv2D layers, .*first, pointwise, .*shared.* Received: 'conv9', which matches no"
    with pytest.raises(ValueError, match=message):
        deformable(small_model(), choice)


def test_model_without_convolutions_is_refused():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.ReLU()])
    with pytest.raises(ValueError, match=r"Conv2D layers, none. Received: None"):
        deformable(model)


@pytest.mark.parametrize("choice", ["depthwise", "p*", lambda layer: layer.name == "inner_norm"])
def test_chosen_layer_must_be_exactly_a_conv2d(choice):
    with pytest.raises(ValueError, match=r"Conv2D layers only. Received: .*, which chooses \w+ of"):
        deformable(small_model(), choice)


@pytest.mark.parametrize(
    "choice",
    [3, [], [None], b"first", {"first"}, tf.constant("first"), layers.Conv2D(4, 3), layers.Conv2D],
    ids=str,
)
def test_layers_must_be_names_or_a_function(choice):
    with pytest.raises(ValueError, match=r"^layers must be None, .* Received: \S"):
        deformable(small_model(), choice)


@pytest.mark.parametrize("option", ["own_offsets", "filters"])
def test_other_options_are_refused(option):
    with pytest.raises(ValueError, match=rf"options must be among .* Received: {option}"):
        deformable(small_model(), **{option: 1})


# --- A network of keras.applications ---


@pytest.fixture(scope="module")
def resnet():
    return keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3))


def test_deformable_resnet50_computes_what_resnet50_does(resnet, rng, tmp_path):
    images = tf.constant(rng.uniform(size=(2, 64, 64, 3)), "float32")
    expected = resnet(images)
    copy = deformable(resnet, LAST_STAGE, modulated=True)
    assert deformable_names(copy) == [f"conv5_block{block}_2_conv" for block in (1, 2, 3)]
    np.testing.assert_allclose(copy(images), expected, rtol=1e-4)
    copy.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(images), expected, rtol=1e-4)


@pytest.mark.parametrize("dtype_policy", ["mixed_float16", "mixed_bfloat16"], indirect=True)
def test_offsets_of_a_mixed_precision_resnet50_learn(dtype_policy, rng):
    images = tf.constant(rng.uniform(size=(2, 32, 32, 3)), "float32")
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=10)
    for layer in model.layers:
        layer.trainable = False
    model = deformable(model, LAST_STAGE, modulated=True, offset_trainable=True)
    # The first scale that Keras would choose, 2**15, overflows here, and the step would be skipped.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=2**7)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    history = model.fit(images, tf.constant([1, 2]), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    for layer in map(model.get_layer, deformable_names(model)):
        assert layer.compute_dtype == dtype_policy.removeprefix("mixed_")
        for convolution in (layer.offset_conv, layer.mask_conv):
            assert np.any(convolution.kernel.numpy() != 0)
