"""The Keras layer."""

import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import relative_error

from deform_conv import deform_conv2d, xla_kernels_loaded
from deform_conv.layers import DeformableConv2D

pytestmark = pytest.mark.usefixtures("device")

# Options of the layer alone, and arguments of Conv2D, in combinations.
ARGUMENTS = [
    {},
    {"strides": 2, "padding": "same"},
    {"dilation_rate": 2, "groups": 2, "deform_groups": 2},
    {"modulated": True, "use_bias": False, "activation": "relu", "kernel_size": (2, 3)},
]
OPTIONS = ("deform_groups", "modulated")


@pytest.fixture
def images(rng):
    return tf.constant(rng.standard_normal((2, 9, 8, 4)), "float32")


def new_layer(arguments):
    return DeformableConv2D(**({"filters": 6, "kernel_size": 3} | arguments))


def randomize(layer, rng):
    layer.set_weights([0.1 * rng.standard_normal(w.shape) for w in layer.get_weights()])


def random_model(rng, inputs=None, **arguments):
    """A model of one layer, that `images` fit, with random weights."""
    inputs = keras.Input((9, 8, 4)) if inputs is None else inputs
    layer = new_layer(arguments)
    model = keras.Model(inputs, layer(inputs))
    randomize(layer, rng)
    return model


def given_tensors(rng, modulated=True):
    """Offset and mask for `images`, a 3x3 kernel, "valid" padding and two deformable groups."""
    offset = tf.constant(rng.standard_normal((2, 7, 6, 2 * 2 * 9)), "float32")
    mask = tf.constant(rng.uniform(size=(2, 7, 6, 2 * 9)), "float32")
    return [offset, mask] if modulated else [offset]


def channels_first(tensor):
    return tf.transpose(tensor, [0, 3, 1, 2])


def names(variables):
    """The variables' paths within the layer."""
    return [re.sub(r".*deformable_conv2d[^/]*/", "", variable.path) for variable in variables]


# --- As Conv2D ---


def test_arguments_are_those_of_conv2d_in_its_order_and_then_keywords():
    conv2d, layer = (
        list(inspect.signature(cls).parameters.values())
        for cls in (keras.layers.Conv2D, DeformableConv2D)
    )
    shared = len(conv2d) - 1  # all but **kwargs
    assert [(p.name, p.default) for p in layer[:shared]] == [
        (p.name, p.default) for p in conv2d[:shared]
    ]
    assert {p.kind for p in layer[shared:-1]} == {inspect.Parameter.KEYWORD_ONLY}


def test_each_argument_of_conv2d_reaches_it():
    arguments = {
        "filters": 6,
        "kernel_size": (1, 3),
        "strides": (2, 1),
        "padding": "same",
        "data_format": "channels_first",
        "dilation_rate": (1, 1),
        "groups": 2,
        "activation": "relu",
        "use_bias": False,
        "kernel_initializer": "ones",
        "bias_initializer": "ones",
        "kernel_regularizer": "l1",
        "bias_regularizer": "l2",
        "activity_regularizer": "l2",
        "kernel_constraint": "non_neg",
        "bias_constraint": "unit_norm",
    }
    expected = keras.layers.Conv2D(*arguments.values(), name="layer").get_config()
    config = DeformableConv2D(*arguments.values(), name="layer").get_config()
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_new_layer_computes_what_conv2d_does(arguments, images):
    layer = new_layer(arguments)
    outputs = layer(images)
    regular = keras.layers.Conv2D(
        **{"filters": 6, "kernel_size": 3}
        | {name: value for name, value in arguments.items() if name not in OPTIONS}
    )
    regular.build((2, 9, 8, 4))
    regular.set_weights(layer.get_weights()[: len(regular.weights)])
    assert relative_error(outputs, regular(images)) <= 1e-6


def test_channels_first_equals_channels_last(images, rng):
    # 6 filters on an output 6 wide: the bias must not be taken for one along the width.
    last = DeformableConv2D(6, 3, modulated=True, deform_groups=2)
    first = DeformableConv2D(6, 3, modulated=True, deform_groups=2, data_format="channels_first")
    last.build(images.shape)
    first.build((2, 4, 9, 8))
    randomize(last, rng)
    first.set_weights(last.get_weights())
    assert relative_error(first(channels_first(images)), channels_first(last(images))) <= 1e-5


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_shape_and_type_are_known_before_the_call(arguments, data_format, images):
    layer = new_layer(arguments | {"data_format": data_format, "dtype": "mixed_bfloat16"})
    images = images if data_format == "channels_last" else channels_first(images)
    outputs = layer(images)
    assert layer.compute_output_shape(images.shape) == outputs.shape
    spec = layer.compute_output_spec(keras.KerasTensor(images.shape))
    assert (spec.shape, spec.dtype) == (outputs.shape, outputs.dtype.name)


def test_batch_and_image_size_may_be_unknown(images, rng):
    model = random_model(rng, keras.Input((None, None, 4)), padding="same")
    assert model.output_shape == (None, None, None, 6)
    layer = model.layers[-1]
    assert relative_error(model(images), layer(images)) <= 1e-6
    assert model.predict(images[:1, :5], verbose=0).shape == (1, 5, 8, 6)


def test_integer_images_are_converted(rng):
    images = tf.constant(rng.integers(0, 255, (2, 9, 8, 4)), "uint8")
    layer = DeformableConv2D(6, 3)
    assert relative_error(layer(images), layer(tf.cast(images, "float32"))) <= 1e-6


# --- Offsets and masks of its own ---


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("modulated", [False, True])
def test_offsets_and_masks_learn(modulated, data_format, images, rng):
    targets = tf.constant(rng.standard_normal((2, 7, 6, 3)))
    if data_format == "channels_first":
        images, targets = channels_first(images), channels_first(targets)
    layer = DeformableConv2D(3, 3, modulated=modulated, deform_groups=2, data_format=data_format)
    model = keras.Sequential([keras.Input(images.shape[1:]), layer])
    model.compile("adam", "mse")
    model.fit(images, targets, verbose=0)
    for convolution in [layer.offset_conv, layer.mask_conv] if modulated else [layer.offset_conv]:
        assert np.all(convolution.kernel.numpy() != 0)


def test_offset_and_mask_are_those_that_the_layer_samples_with(images, rng):
    (layer,) = random_model(rng, modulated=True, deform_groups=2).layers[1:]
    expected = deform_conv2d(
        images,
        layer.kernel,
        layer.offset(images),
        layer.mask(images),
        padding="VALID",
        deform_groups=2,
    )
    assert relative_error(layer(images), expected + layer.bias) <= 1e-6


@pytest.mark.parametrize("mask_scale", [1, 2.0])
def test_mask_starts_at_half_of_its_scale(mask_scale, images):
    layer = DeformableConv2D(6, 3, modulated=True, mask_scale=mask_scale)
    layer(images)
    np.testing.assert_array_equal(layer.mask(images), np.full((2, 7, 6, 9), mask_scale / 2))


def test_unmodulated_layer_has_no_mask(images):
    assert new_layer({}).mask(images) is None


def test_offset_and_mask_may_be_asked_for_before_the_layer_is_called(images):
    layer = DeformableConv2D(6, 3, modulated=True)
    offset, mask = layer.offset(images), layer.mask(images)
    outputs = layer(images)
    assert offset.shape[:3] == mask.shape[:3] == outputs.shape[:3]
    assert len(layer.weights) == 6


def test_offset_kernel_initializer_is_for_the_kernel_of_offset_conv_alone(images):
    layer = DeformableConv2D(6, 3, modulated=True, offset_kernel_initializer="ones")
    layer(images)
    assert np.all(layer.offset_conv.kernel.numpy() == 1)
    for variable in (layer.offset_conv.bias, *layer.mask_conv.weights):
        assert np.all(variable.numpy() == 0)


# --- Training parts of it ---

BRANCH = ["offset_conv/kernel", "offset_conv/bias", "mask_conv/kernel", "mask_conv/bias"]


def test_all_of_a_new_layer_is_trainable(rng):
    model = random_model(rng, modulated=True)
    assert names(model.trainable_variables) == ["kernel", "bias", *BRANCH]


def test_a_frozen_layer_is_wholly_frozen(rng):
    model = random_model(rng, modulated=True)
    layer = model.layers[-1]
    layer.trainable = False
    assert model.trainable_variables == layer.trainable_variables == []
    assert not layer.offset_trainable
    assert names(layer.non_trainable_variables) == ["kernel", "bias", *BRANCH]


def test_a_layer_made_frozen_is_wholly_frozen(rng):
    assert random_model(rng, modulated=True, trainable=False).trainable_variables == []


def test_a_frozen_model_freezes_the_layers_in_it(rng):
    inner = random_model(rng, modulated=True)
    inner.trainable = False
    inputs = keras.Input((9, 8, 4))
    assert keras.Model(inputs, inner(inputs)).trainable_variables == []


@pytest.mark.parametrize("built", [False, True])
def test_offsets_can_be_trained_alone(built, images):
    layer = DeformableConv2D(6, 3, modulated=True)
    model = keras.Sequential([layer])
    if built:
        model.build((None, 9, 8, 4))
    layer.trainable = False
    layer.offset_trainable = True
    model.build((None, 9, 8, 4))
    assert names(layer.trainable_variables) == names(layer.trainable_weights) == BRANCH
    assert names(layer.non_trainable_variables) == ["kernel", "bias"]
    assert names(layer.non_trainable_weights) == ["kernel", "bias"]
    before = layer.get_weights()
    model.compile("adam", "mse")
    model.fit(images, tf.ones((2, 7, 6, 6)), verbose=0)
    moved = [np.any(old != new) for old, new in zip(before, layer.get_weights(), strict=True)]
    assert moved == [False, False, True, True, True, True]


def test_kernel_and_bias_can_be_trained_alone(rng):
    model = random_model(rng, modulated=True)
    model.layers[-1].offset_trainable = False
    assert names(model.trainable_variables) == ["kernel", "bias"]


@pytest.mark.parametrize("offset_trainable", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_both_trainable_flags_are_arguments_and_survive_saving(
    trainable, offset_trainable, rng, tmp_path
):
    flags = {"trainable": trainable, "offset_trainable": offset_trainable}
    model = random_model(rng, modulated=True, **flags)
    model.save(tmp_path / "model.keras")
    for layer in (model.layers[-1], keras.models.load_model(tmp_path / "model.keras").layers[-1]):
        assert {name: layer.get_config()[name] for name in flags} == flags
        expected = ["kernel", "bias"] * trainable + BRANCH * offset_trainable
        assert names(layer.trainable_variables) == expected


# --- Given offsets ---


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("modulated", [False, True])
def test_given_offsets_and_masks_are_used(modulated, data_format, images, rng):
    tensors = [images, *given_tensors(rng, modulated)]
    layer = DeformableConv2D(
        6, 3, modulated=modulated, deform_groups=2, own_offsets=False, data_format=data_format
    )
    first = data_format == "channels_first"
    outputs = layer([channels_first(t) for t in tensors] if first else tensors)
    expected = deform_conv2d(images, layer.kernel, *tensors[1:], padding="VALID", deform_groups=2)
    assert relative_error(outputs, channels_first(expected) if first else expected) <= 1e-5
    assert len(layer.weights) == 2


def given_model(dtype=None):
    inputs = [keras.Input(shape) for shape in ((9, 8, 4), (7, 6, 36), (7, 6, 18))]
    layer = DeformableConv2D(6, 3, modulated=True, deform_groups=2, own_offsets=False, dtype=dtype)
    return keras.Model(inputs, layer(inputs))


def test_model_with_given_offsets_survives_saving_and_loading(images, rng, tmp_path):
    model, tensors = given_model(), [images, *given_tensors(rng)]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert relative_error(loaded(tensors), model(tensors)) <= 1e-6


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16", "float16"])
@pytest.mark.parametrize("symbolic", [False, True])
def test_given_float32_offsets_and_masks_are_not_rounded(symbolic, dtype, images, rng):
    model = given_model(dtype)
    layer = model.layers[-1]
    images = tf.cast(images, layer.compute_dtype)
    kernel = tf.cast(layer.kernel, layer.compute_dtype)
    offset, mask = given_tensors(rng)

    def expected(offset, mask):
        return deform_conv2d(images, kernel, offset, mask, padding="VALID", deform_groups=2)

    call = model if symbolic else layer
    outputs = call([images, offset, mask]).numpy()
    np.testing.assert_array_equal(outputs, expected(offset, mask))
    rounded = expected(*(tf.cast(tensor, layer.compute_dtype) for tensor in (offset, mask)))
    assert np.any(outputs != rounded)


def test_given_16_bit_offsets_are_taken_beside_a_float32_mask(images, rng):
    offset, mask = given_tensors(rng)
    layer = DeformableConv2D(
        6, 3, modulated=True, deform_groups=2, own_offsets=False, dtype="mixed_float16"
    )
    half = tf.cast(offset, "float16")
    np.testing.assert_array_equal(
        layer([images, half, mask]), layer([images, tf.cast(half, "float32"), mask])
    )


def test_gradients_reach_a_network_that_gives_the_offsets(images):
    inputs = keras.Input((9, 8, 4))
    offset = keras.layers.Conv2D(2 * 9, 3, name="mine")(inputs)
    model = keras.Model(inputs, DeformableConv2D(6, 3, own_offsets=False)([inputs, offset]))
    before = model.get_layer("mine").kernel.numpy()
    model.compile("adam", "mse")
    model.fit(images, tf.ones((2, 7, 6, 6)), verbose=0)
    assert np.all(model.get_layer("mine").kernel.numpy() != before)


# --- Types ---


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_variables_offsets_and_masks_in_float32(dtype, images):
    layer = DeformableConv2D(6, 3, modulated=True, dtype=dtype)
    assert layer(images).dtype == layer.compute_dtype
    assert {variable.dtype for variable in layer.variables} == {"float32"}
    assert layer.offset(images).dtype == layer.mask(images).dtype == tf.float32


@pytest.mark.parametrize(
    ("dtype", "offset_dtype"), [("float16", "float32"), ("float64", "float64")]
)
def test_in_one_type_offsets_are_float32_at_least(dtype, offset_dtype, images):
    layer = DeformableConv2D(6, 3, modulated=True, dtype=dtype)
    assert layer(images).dtype == layer.kernel.dtype == dtype
    assert layer.offset(images).dtype == layer.mask(images).dtype == offset_dtype


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("mixed_float16", 2e-3), ("mixed_bfloat16", 2e-2), ("float64", 1e-5)]
)
def test_result_is_that_of_float32_but_for_rounding(dtype, tolerance, images, rng):
    model, other = (random_model(rng, modulated=True, dtype=d) for d in ("float32", dtype))
    other.set_weights(model.get_weights())
    assert relative_error(tf.cast(other(images), "float32"), model(images)) <= tolerance


# --- Saving and training ---


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_layer_survives_saving_and_loading(arguments, images, tmp_path, rng):
    model = random_model(rng, **arguments)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert relative_error(loaded(images), model(images)) <= 1e-6


def test_config_makes_an_equal_layer():
    layer = DeformableConv2D(
        6,
        3,
        deform_groups=2,
        modulated=True,
        mask_scale=1,
        offset_kernel_initializer=keras.initializers.RandomNormal(stddev=0.5, seed=3),
        offset_trainable=False,
    )
    config = layer.get_config()
    assert DeformableConv2D.from_config(config).get_config() == config


def test_weights_survive_saving_and_loading(images, tmp_path, rng):
    model, other = (random_model(rng, modulated=True) for _ in range(2))
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(images), model(images))


@pytest.mark.parametrize("given", [False, True])
def test_exported_model_computes_the_same(given, images, tmp_path, rng):
    model = given_model() if given else random_model(rng, modulated=True)
    tensors = [images, *given_tensors(rng)] if given else images
    model.export(tmp_path / "model")
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    assert relative_error(loaded.serve(tensors), model(tensors)) <= 1e-6


class Interruption(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise InterruptedError


def test_interrupted_fit_resumes_to_the_same_weights(images, tmp_path, rng):
    weights = random_model(rng, modulated=True).get_weights()

    def fit(folder, *callbacks):
        model = random_model(rng, modulated=True)
        model.set_weights(weights)
        model.compile("adam", "mse")
        backup = keras.callbacks.BackupAndRestore(tmp_path / folder)
        targets = tf.ones((2, 7, 6, 6))
        model.fit(
            images, targets, epochs=3, shuffle=False, verbose=0, callbacks=[backup, *callbacks]
        )
        return np.concatenate([weight.ravel() for weight in model.get_weights()])

    with pytest.raises(InterruptedError):
        fit("interrupted", Interruption())
    resumed, uninterrupted = fit("interrupted"), fit("uninterrupted")
    # On a GPU the sums' order varies.
    assert relative_error(resumed, uninterrupted) <= 1e-5


def test_xla_compiles_the_layer_where_it_knows_the_op():
    assert new_layer({}).supports_jit == xla_kernels_loaded()


# --- Wrong arguments and inputs ---


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("deform_groups", 0, "an integer above 0"),
        ("deform_groups", 1.5, "an integer above 0"),
        ("deform_groups", True, "an integer above 0"),
        ("mask_scale", 0, "a finite number above 0"),
        ("mask_scale", float("inf"), "a finite number above 0"),
        ("mask_scale", float("nan"), "a finite number above 0"),
        ("mask_scale", "2", "a finite number above 0"),
        ("modulated", "yes", "True or False"),
        ("own_offsets", 1, "True or False"),
        ("offset_trainable", "no", "True or False"),
    ],
)
def test_wrong_argument_is_named_with_its_rule(argument, value, rule):
    with pytest.raises(ValueError, match=rf"{argument} must be {rule}. Received: '?{value}"):
        DeformableConv2D(6, 3, **{argument: value})


def test_deform_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"must divide the number of input channels, 4. Received"):
        DeformableConv2D(6, 3, deform_groups=3).build((2, 9, 8, 4))


def test_channels_must_be_known():
    with pytest.raises(ValueError, match=r"known number of channels. Received: shape"):
        DeformableConv2D(6, 3)(keras.Input((9, 8, None)))


def test_given_offsets_cannot_be_trained_by_the_layer():
    with pytest.raises(ValueError, match=r"offset_trainable must be False where own_offsets is"):
        DeformableConv2D(6, 3, own_offsets=False, offset_trainable=True)


def test_layer_without_offsets_of_its_own_computes_none(images):
    with pytest.raises(ValueError, match=r"own_offsets must be True .* Received: False"):
        DeformableConv2D(6, 3, own_offsets=False).offset(images)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_number_of_inputs_is_checked(count):
    inputs = [keras.Input(shape) for shape in ((9, 8, 4), (7, 6, 18), (7, 6, 9), (7, 6, 9))]
    with pytest.raises(ValueError, match=rf"expects 3 input.* received {count} input"):
        DeformableConv2D(6, 3, modulated=True, own_offsets=False)(inputs[:count])


@pytest.mark.parametrize(
    ("offset", "mask", "message"),
    [
        ((7, 6, 17), (7, 6, 9), "expected axis -1 of input shape to have value 18"),
        ((7, 6, 18), (7, 6, 8), "expected axis -1 of input shape to have value 9"),
        ((9, 8, 18), (7, 6, 9), r"offset must have the .* output, \(None, 7, 6\). Received: shape"),
        ((7, 6, 18), (9, 8, 9), r"mask must have the .* output, \(None, 7, 6\). Received: shape"),
    ],
)
def test_shapes_of_given_offsets_and_masks_are_checked(offset, mask, message):
    inputs = [keras.Input(shape) for shape in ((9, 8, 4), offset, mask)]
    with pytest.raises(ValueError, match=message):
        DeformableConv2D(6, 3, modulated=True, own_offsets=False)(inputs)
