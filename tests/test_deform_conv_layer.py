"""The Keras layer."""

import copy
import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from checks import needs_xla
from conftest import relative_error

from deform_conv import deform_conv2d, deformable, xla_kernels_loaded
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

# Padding that Conv2D does not have.
PADDED = [
    {"padding": 1, "strides": 2},
    {"padding": (0, 2), "dilation_rate": 2, "groups": 2, "modulated": True},
    {"padding": ((2, 0), (1, 3)), "strides": (2, 3), "modulated": True, "deform_groups": 2},
]


# Strides and dilation above 1 together, which Conv2D does not have either.
STRIDED_AND_DILATED = [
    {"strides": 2, "dilation_rate": 2, "padding": "same", "modulated": True},
    {"strides": 2, "dilation_rate": 3, "padding": ((4, 2), (1, 3)), "kernel_size": (3, 2)},
    {"strides": (4, 2), "dilation_rate": (2, 4), "padding": "same", "kernel_size": (4, 3)},
    {"strides": (1, 2), "dilation_rate": (2, 1), "modulated": True, "deform_groups": 2},
    {"strides": (3, 1), "dilation_rate": (1, 2), "padding": "same", "kernel_size": 1},
    {"strides": (2, 3), "padding": ((2, 0), (1, 3)), "kernel_size": 1, "modulated": True},
]


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
@pytest.mark.parametrize("arguments", ARGUMENTS + PADDED + STRIDED_AND_DILATED)
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


# --- Padding by numbers ---


def padded(images, layer):
    """`images` with the layer's padding as zeros around them."""
    (top, bottom), (left, right) = layer.padding
    return tf.pad(images, [(0, 0), (top, bottom), (left, right), (0, 0)])


@pytest.mark.parametrize(
    "padding", [1, (1, 1), [1, (1, 1)], ((1, 1), (1, 1)), np.ones(2, int), tf.ones((2, 2), "int32")]
)
def test_one_number_and_one_per_axis_are_padding_of_both_sides(padding):
    assert DeformableConv2D(6, 3, padding=padding).padding == ((1, 1), (1, 1))


def test_padding_by_numbers_is_height_first_and_before_after():
    assert DeformableConv2D(6, 3, padding=(1, 2)).padding == ((1, 1), (2, 2))
    shape = DeformableConv2D(6, 1, padding=((1, 2), (3, 4))).compute_output_shape((2, 9, 8, 4))
    assert shape == (2, 9 + 3, 8 + 7, 6)


@pytest.mark.parametrize("arguments", PADDED)
def test_new_layer_with_padding_computes_what_conv2d_does_on_padded_images(arguments, images):
    layer = new_layer(arguments)
    regular = keras.layers.Conv2D(
        **{"filters": 6, "kernel_size": 3}
        | {name: arguments[name] for name in arguments if name not in (*OPTIONS, "padding")}
    )
    regular.build((2, 9, 8, 4))
    layer.build((2, 9, 8, 4))
    regular.set_weights(layer.get_weights()[:2])
    results = []
    for function, variables in (
        (layer, [layer.kernel, layer.bias]),
        (lambda images: regular(padded(images, layer)), regular.trainable_variables),
    ):
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = function(images)
        results.append([outputs, *tape.gradient(outputs, [images, *variables])])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 1e-6


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("arguments", PADDED)
def test_padding_by_numbers_is_that_of_the_op_and_of_the_offsets(
    arguments, data_format, images, rng
):
    inputs = keras.Input((4, 9, 8) if data_format == "channels_first" else (9, 8, 4))
    model = random_model(rng, inputs, data_format=data_format, **arguments)
    layer = model.layers[-1]

    def last(tensor):
        return tf.transpose(tensor, [0, 2, 3, 1]) if data_format == "channels_first" else tensor

    given = channels_first(images) if data_format == "channels_first" else images
    convolved = {
        convolution.name: convolution.bias
        + tf.nn.convolution(
            padded(images, layer),
            convolution.kernel,
            strides=layer.strides,
            padding="VALID",
            dilations=layer.dilation_rate,
        )
        for convolution in (layer.offset_conv, layer.mask_conv)
        if convolution is not None
    }
    offset, mask = convolved["offset_conv"], None
    assert relative_error(last(layer.offset(given)), offset) <= 1e-6
    if layer.modulated:
        mask = 2 * tf.sigmoid(convolved["mask_conv"])
        assert relative_error(last(layer.mask(given)), mask) <= 1e-6
    expected = deform_conv2d(
        images,
        layer.kernel,
        offset,
        mask,
        strides=layer.strides,
        padding=[(0, 0), *layer.padding, (0, 0)],
        dilations=layer.dilation_rate,
        deform_groups=layer.deform_groups,
    )
    assert relative_error(last(model(given)), expected + layer.bias) <= 1e-5


def test_padding_by_numbers_is_same_at_stride_1_and_elsewhere_at_stride_2(images):
    for strides, equal in ((1, True), (2, False)):
        layers = [DeformableConv2D(6, 3, strides, padding) for padding in ("same", 1)]
        outputs = []
        for layer in layers:
            layer.build((2, 9, 8, 4))
            layer.set_weights(layers[0].get_weights())
            outputs.append(layer(images))
        assert outputs[0].shape == outputs[1].shape
        assert (relative_error(*outputs) <= 1e-6) == equal


@pytest.mark.parametrize("arguments", PADDED + STRIDED_AND_DILATED)
def test_sizes_may_be_unknown_with_any_padding(arguments, images, rng):
    model = random_model(rng, keras.Input((None, None, 4)), **arguments)
    assert model.output_shape == (None, None, None, 6)
    layer = model.layers[-1]
    assert relative_error(model(images), layer(images)) <= 1e-6
    function = tf.function(layer, input_signature=[tf.TensorSpec([None, None, None, 4])])
    assert relative_error(function(images), layer(images)) <= 1e-6


def test_offsets_of_a_dilated_layer_with_padding_learn(images):
    layer = DeformableConv2D(6, 3, padding=2, dilation_rate=2, modulated=True)
    model = keras.Sequential([keras.Input((9, 8, 4)), layer])
    model.compile("adam", "mse")
    model.fit(images, tf.ones((2, 9, 8, 6)), verbose=0)
    for convolution in (layer.offset_conv, layer.mask_conv):
        assert np.all(convolution.kernel.numpy() != 0)


@pytest.mark.parametrize("own_offsets", [True, False])
def test_images_too_small_for_the_kernel_less_the_padding_are_refused(own_offsets):
    layer = DeformableConv2D(6, 7, padding=((1, 1), (3, 3)), own_offsets=own_offsets)
    with pytest.raises(ValueError, match=r"at least \(5, 1\) for the dilated kernel less the padd"):
        layer.compute_output_shape((2, 4, 8, 4))
    if own_offsets:
        layer.build((None, None, None, 4))
        message = "H of at least 4 for the dilated kernel's 5 less the padding. Received: 3"
        with pytest.raises(ValueError, match=message):
            layer(tf.zeros((2, 3, 8, 4)))


@pytest.mark.parametrize(
    "compiled", [tf.function, lambda function, **_: function], ids=["graph", "eager"]
)
def test_padding_beyond_memory_is_an_error(compiled):
    """TensorFlow's own convolutions, and those that it joins with a padding, end the process."""
    layer = DeformableConv2D(2, 1, padding=((0, 2**31 - 1), (0, 2**27)))
    function = compiled(layer, input_signature=[tf.TensorSpec([None, None, None, 64])])
    with pytest.raises(tf.errors.InvalidArgumentError):
        function(tf.zeros((1, 9, 8, 64)))  # 2**64 numbers, which no memory holds


# --- Strides and dilation ---


def test_offsets_of_a_1x1_kernel_come_of_no_strided_convolution(images):
    """Its gradient ends the process where oneDNN has AVX-512, one axis of two strided (2.21)."""
    layer = new_layer({"kernel_size": 1, "strides": (3, 1), "padding": "same", "modulated": True})
    layer.build(images.shape)
    function = tf.function(outputs_and_gradients).get_concrete_function(layer, images)
    strides = [
        op.get_attr("strides")
        for op in function.graph.get_operations()
        if op.type.startswith("Conv2D")
    ]
    assert len(strides) >= 3  # the convolution, and its two gradients
    assert all(each == [1, 1, 1, 1] for each in strides)


@pytest.mark.parametrize("size", [(9, 8), (8, 11)])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("arguments", STRIDED_AND_DILATED)
def test_offsets_of_a_strided_and_dilated_layer_are_the_ops_convolution(
    arguments, data_format, size, rng
):
    layer = new_layer(arguments | {"data_format": data_format, "dtype": "float64"})
    images = tf.constant(rng.standard_normal((2, *size, 4)))
    images = images if data_format == "channels_last" else channels_first(images)
    shape = layer(images).shape
    randomize(layer, rng)

    def expected(images):
        samples = np.prod(layer.kernel_size)
        channels_axis = 3 if data_format == "channels_last" else 1
        none = np.zeros([2 * samples if i == channels_axis else n for i, n in enumerate(shape)])
        outputs = deform_conv2d(
            images,
            layer.offset_conv.kernel,
            none,
            strides=layer.strides,
            padding=layer.tensorflow_padding,
            dilations=layer.dilation_rate,
            data_format={"channels_last": "NHWC", "channels_first": "NCHW"}[data_format],
        )
        return outputs + tf.reshape(layer.offset_conv.bias, [-1] + [1] * (3 - channels_axis))

    results = []
    for function in (layer.offset, expected):
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = function(images)
            loss = tf.reduce_sum(outputs**2)
        sources = [images, *layer.offset_conv.trainable_variables]
        results.append([outputs, *tape.gradient(loss, sources)])
    for actual, wanted in zip(*results, strict=True):
        assert relative_error(actual, wanted) <= 1e-12


@pytest.mark.parametrize("arguments", STRIDED_AND_DILATED)
def test_strided_and_dilated_layer_survives_saving_and_loading(arguments, images, tmp_path, rng):
    model = random_model(rng, **arguments)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), model(images))


# --- Offsets and masks of its own ---


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("modulated", [False, True])
def test_offsets_and_masks_learn(modulated, data_format, images, rng):
    keras.utils.set_random_seed(1)
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


@pytest.mark.parametrize("mask_scale", [1e39, 1e-320, -1, 0, "2", True])
def test_mask_scale_is_above_0_and_finite_in_float32(mask_scale):
    with pytest.raises(ValueError, match="mask_scale must be a finite number above 0"):
        DeformableConv2D(6, 3, modulated=True, mask_scale=mask_scale)


@pytest.mark.parametrize("dtype", [{"class_name": "x"}, {}, "int128", [], 1.5], ids=str)
def test_dtype_that_is_no_policy_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be "):
        DeformableConv2D(6, 3, dtype=dtype)


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


def test_offset_and_mask_may_be_those_of_arrays_and_variables(images, rng):
    (layer,) = random_model(rng, modulated=True).layers[1:]
    for method in (layer.offset, layer.mask):
        for value in (images.numpy(), tf.Variable(images), keras.Variable(images)):
            np.testing.assert_array_equal(method(value), method(images))


def test_offset_kernel_initializer_is_for_the_kernel_of_offset_conv_alone(images):
    layer = DeformableConv2D(6, 3, modulated=True, offset_kernel_initializer="ones")
    layer(images)
    assert np.all(layer.offset_conv.kernel.numpy() == 1)
    for variable in (layer.offset_conv.bias, *layer.mask_conv.weights):
        assert np.all(variable.numpy() == 0)


# --- Offsets and masks of a model ---


def showing_model(rng, data_format="channels_last", **arguments):
    """A model of outputs, offsets and masks of one layer, with random weights."""
    first = data_format == "channels_first"
    inputs = keras.Input((4, 9, 8) if first else (9, 8, 4))
    x = keras.layers.ReLU()(inputs)
    layer = DeformableConv2D(
        6, 3, modulated=True, deform_groups=2, data_format=data_format, name="conv", **arguments
    )
    model = keras.Model(inputs, [layer(x), layer.offset(x), layer.mask(x)])
    randomize(model, rng)
    return model


def assert_shows_what_samples(model, images, rng):
    """Whether outputs, offsets and masks are those of the layer, also when its variables change."""
    layer = model.get_layer("conv")
    if layer.data_format == "channels_first":
        images = channels_first(images)
    for _ in range(2):
        outputs, offset, mask = model(images)
        x = tf.nn.relu(images)
        np.testing.assert_array_equal(outputs, layer(x))
        np.testing.assert_array_equal(offset, layer.offset(x))
        np.testing.assert_array_equal(mask, layer.mask(x))
        for variable in (*layer.offset_conv.variables, *layer.mask_conv.variables):
            variable.assign(0.3 * rng.standard_normal(variable.shape))


def saved_and_loaded(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


WITH_WEIGHTS = {
    "loaded": saved_and_loaded,
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "deformable": lambda model, _: deformable(
        keras.Sequential([keras.Input((9, 8, 4)), keras.layers.Conv2D(4, 3, padding="same"), model])
    ).layers[-1],
}
WITHOUT_WEIGHTS = {
    "clone_model": lambda model, _: keras.models.clone_model(model),
    "clone_function": lambda model, _: keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config(layer.get_config())
    ),
    "from_config": lambda model, _: keras.Model.from_config(model.get_config()),
    "json": lambda model, _: keras.models.model_from_json(model.to_json()),
}
COPIES = WITH_WEIGHTS | WITHOUT_WEIGHTS


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"data_format": "channels_first"},
        {"dtype": "mixed_float16"},
        {"dtype": "float64"},
        {"padding": ((2, 0), (1, 3))},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_offsets_and_masks_of_a_copied_model_are_those_that_it_samples_with(
    arguments, make_copy, images, tmp_path, rng
):
    if (make_copy, arguments.get("data_format")) == ("deformable", "channels_first"):
        return  # TensorFlow has no convolution in this format on the CPU
    model = showing_model(rng, **arguments)
    assert_shows_what_samples(model, images, rng)
    made = COPIES[make_copy](model, tmp_path)
    assert len(made.weights) == len(model.weights)
    inputs = images
    if model.get_layer("conv").data_format == "channels_first":
        inputs = channels_first(images)
    if make_copy in WITHOUT_WEIGHTS:
        made.set_weights(model.get_weights())
    for actual, expected in zip(made(inputs), model(inputs), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert_shows_what_samples(made, images, rng)


def test_weights_of_a_model_with_offsets_survive_saving_and_loading(images, tmp_path, rng):
    model, other = showing_model(rng), showing_model(rng)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for actual, expected in zip(other(images), model(images), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_offsets_of_a_model_are_exported(images, tmp_path, rng):
    model = showing_model(rng)
    model.export(tmp_path / "model")
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    for actual, expected in zip(loaded.serve(images), model(images), strict=True):
        assert relative_error(actual, expected) <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_shapes_and_types_of_a_models_offsets_are_known_before_the_call(data_format, dtype):
    shape = (4, 9, None) if data_format == "channels_first" else (9, None, 4)
    layer = DeformableConv2D(6, 3, modulated=True, data_format=data_format, dtype=dtype)
    inputs = keras.Input(shape)
    # Asked for before the layer is called.
    offset, mask = layer.offset(inputs), layer.mask(inputs)
    position = (None, 7, None)
    for symbol, channels in ((offset, 18), (mask, 9)):
        expected = (*position, channels)
        if data_format == "channels_first":
            expected = (None, channels, 7, None)
        assert symbol.shape == expected
        assert symbol.dtype == ("float64" if dtype == "float64" else "float32")


def test_model_of_offsets_alone_survives_saving_and_loading(images, tmp_path, rng):
    inputs = keras.Input((9, 8, 4))
    model = keras.Model(inputs, DeformableConv2D(6, 3).offset(inputs))
    randomize(model, rng)
    np.testing.assert_array_equal(saved_and_loaded(model, tmp_path)(images), model(images))


def test_layer_that_is_called_twice_shows_the_offsets_of_each_call(images, tmp_path, rng):
    inner_inputs = keras.Input((9, 8, 4))
    layer = DeformableConv2D(4, 3, padding="same")
    x = layer(inner_inputs)
    offsets = [layer.offset(inner_inputs), layer.offset(x)]
    inner = keras.Model(inner_inputs, [layer(x), *offsets])
    inputs = keras.Input((9, 8, 4))
    x, *offsets = inner(inputs)
    model = keras.Model(inputs, [*offsets, *inner(x)])
    randomize(model, rng)
    expected = [layer.offset(images), layer.offset(layer(images))]
    for each in (model, saved_and_loaded(model, tmp_path), copy.deepcopy(model)):
        assert len(each.weights) == 4
        shown = each(images)
        for actual, wanted in zip(shown, expected, strict=False):
            np.testing.assert_array_equal(actual, wanted)
        for actual, wanted in zip(shown, model(images), strict=True):
            np.testing.assert_array_equal(actual, wanted)


def test_offsets_and_masks_of_one_layer_can_be_given_to_another(images, tmp_path, rng):
    inputs = keras.Input((9, 8, 4))
    lender = DeformableConv2D(4, 3, padding="same", modulated=True)
    x = lender(inputs)
    given = [x, lender.offset(inputs), lender.mask(inputs)]
    outputs = DeformableConv2D(5, 3, padding="same", modulated=True, own_offsets=False)(given)
    model = keras.Model(inputs, outputs)
    randomize(model, rng)
    expected = model(images)
    np.testing.assert_array_equal(saved_and_loaded(model, tmp_path)(images), expected)
    lender.offset_conv.bias.assign(np.ones(18))
    assert np.any(model(images) != expected)


def test_offsets_of_a_model_are_not_regularized_as_activity(images, rng):
    showing = showing_model(rng, activity_regularizer="l2")
    of_outputs_alone = keras.Model(showing.inputs, showing.outputs[0])
    losses = []
    for model in (showing, of_outputs_alone):
        model(images)
        losses.append([float(loss) for loss in model.losses])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1


def test_offsets_and_masks_of_a_model_have_gradients(images, rng):
    model = showing_model(rng)
    layer = model.get_layer("conv")
    sources = [layer.kernel, layer.offset_conv.kernel, layer.mask_conv.kernel]
    for index, source in enumerate(sources):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(images)[index] ** 2)
        assert np.all(tape.gradient(loss, source) != 0)


@keras.saving.register_keras_serializable()
class Doubling(DeformableConv2D):
    """A subclass with a call and offsets of its own."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs)

    def offset(self, inputs):
        return keras.ops.multiply(super().offset(inputs), 3.0)


def test_subclass_may_change_call_and_offsets(images, tmp_path, rng):
    layer = Doubling(6, 3)
    inputs = keras.Input((9, 8, 4))
    model = keras.Model(inputs, [layer(inputs), layer.offset(inputs)])
    randomize(model, rng)
    for each in (model, saved_and_loaded(model, tmp_path)):
        outputs, offset = each(images, training=True)
        np.testing.assert_array_equal(outputs, layer(images))
        np.testing.assert_array_equal(offset, layer.offset(images))


@keras.saving.register_keras_serializable()
class Showing(keras.Model):
    """A subclassed model that asks for offsets before the layer is built."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = DeformableConv2D(6, 3)

    def call(self, inputs):
        return self.conv.offset(inputs), self.conv(inputs)


@pytest.mark.parametrize("symbolic", [False, True])
def test_subclassed_model_shows_offsets(symbolic, images, tmp_path, rng):
    model = Showing()
    if symbolic:
        inputs = keras.Input((9, 8, 4))
        model = keras.Model(inputs, model(inputs))
    model(images)
    randomize(model, rng)
    loaded = saved_and_loaded(model, tmp_path)
    for actual, expected in zip(loaded(images), model(images), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("frames", [3, None])
def test_layer_goes_over_the_frames_of_a_video(frames, images, tmp_path, rng):
    layer = DeformableConv2D(6, 3, modulated=True)
    inputs = keras.Input((frames, 9, 8, 4))
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    randomize(model, rng)
    video = tf.stack([images, 2 * images, -images], axis=1)
    expected = tf.stack([layer(video[:, frame]) for frame in range(3)], axis=1)
    for each in (model, saved_and_loaded(model, tmp_path)):
        assert relative_error(each(video), expected) <= 1e-6


@pytest.mark.parametrize("name", ["offset_conv", "mask_conv"])
def test_part_of_a_layer_is_no_layer_of_a_model(name, tmp_path):
    layer = DeformableConv2D(6, 3, modulated=True)
    part, inputs = getattr(layer, name), keras.Input((9, 8, 4))
    with pytest.raises(ValueError, match=rf"{name} cannot be called in a .* use .* offset\(\)"):
        part(inputs)
    video = keras.Input((3, 9, 8, 4))
    model = keras.Model(video, keras.layers.TimeDistributed(part)(video))
    with pytest.raises(ValueError, match=rf"{name} cannot be saved or copied without the Deform"):
        model.save(tmp_path / "model.keras")


# --- Nothing at all ---

EMPTY = {
    "no images": (0, 9, 8, 4),
    "no rows": (2, 0, 8, 4),
    "no columns": (2, 9, 0, 4),
    "nothing": (0, 0, 0, 4),
}


def empty_case(shape, data_format, own_offsets=True, **arguments):
    """A layer, its inputs, and the shapes of its outputs and offsets."""
    layer = DeformableConv2D(
        6,
        3,
        data_format=data_format,
        modulated=True,
        deform_groups=2,
        own_offsets=own_offsets,
        **arguments,
    )
    batch, *size, _ = shape
    reach = 2 * layer.dilation_rate[0]
    cuts = {"same": (0, 0), "valid": (reach, reach)}
    if layer.padding not in cuts:
        cuts[layer.padding] = [reach - sum(pads) for pads in layer.padding]
    size = [
        max(0, -(-(length - cut) // stride))
        for length, cut, stride in zip(size, cuts[layer.padding], layer.strides, strict=True)
    ]
    shapes = [shape, (batch, *size, 36), (batch, *size, 18), (batch, *size, 6)]
    if data_format == "channels_first":
        shapes = [(n, c, h, w) for n, h, w, c in shapes]
    *given, output = shapes
    layer.build((None, None, None, 4) if data_format == "channels_last" else (None, 4, None, None))
    inputs = tf.zeros(given[0]) if own_offsets else [tf.zeros(each) for each in given]
    return layer, inputs, output, given[1]


def outputs_and_gradients(layer, inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs)
    return outputs, tape.gradient(outputs, [inputs, layer.trainable_variables])


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("own_offsets", [True, False])
@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("padding", ["same", 1, ((2, 1), (0, 3))], ids=str)  # more than nothing too
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_nothing_comes_of_nothing(shape, padding, strides, dilation, own_offsets, data_format):
    if dilation > 1 and padding != "same":
        padding = ((2 * dilation, 1), (2, 2 * dilation))
    layer, inputs, output_shape, offset_shape = empty_case(
        shape, data_format, own_offsets, padding=padding, strides=strides, dilation_rate=dilation
    )
    outputs, gradients = outputs_and_gradients(layer, inputs)
    assert outputs.shape == output_shape
    assert outputs.dtype == tf.float32
    sources = tf.nest.flatten([inputs, list(layer.trainable_variables)])
    for source, gradient in zip(sources, tf.nest.flatten(gradients), strict=True):
        assert gradient.shape == source.shape
        if source is layer.bias:  # which is added to what padding alone gives
            assert np.all(gradient == outputs.shape.num_elements() // 6)
        else:
            assert np.all(gradient == 0)
    if own_offsets:
        assert layer.offset(inputs).shape == offset_shape


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "valid"},
        {"padding": "same"},
        {"padding": ((2, 1), (0, 3))},
        {"padding": "same", "strides": 2, "dilation_rate": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "jit_compile",
    [
        False,
        pytest.param(True, marks=needs_xla),
    ],
)
def test_function_of_unknown_sizes_takes_an_empty_batch(jit_compile, arguments, data_format, rng):
    layer, inputs, output_shape, _ = empty_case((0, 9, 8, 4), data_format, **arguments)
    unknown = [None, None, None, 4] if data_format == "channels_last" else [None, 4, None, None]
    function = tf.function(
        lambda images: outputs_and_gradients(layer, images),
        input_signature=[tf.TensorSpec(unknown)],
        jit_compile=jit_compile,
    )
    outputs, gradients = function(inputs)
    assert outputs.shape == output_shape
    for gradient in tf.nest.flatten(gradients):
        assert np.all(gradient == 0)
    # And what is not empty gives what it gives elsewhere.
    randomize(layer, rng)
    inputs = tf.constant(rng.standard_normal((2, *inputs.shape[1:])), tf.float32)
    for actual, expected in zip(
        tf.nest.flatten(function(inputs)),
        tf.nest.flatten(outputs_and_gradients(layer, inputs)),
        strict=True,
    ):
        assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_images_too_small_for_an_output_have_gradients(data_format):
    """By less than a stride, so that there is no error."""
    layer, inputs, output_shape, _ = empty_case((2, 2, 8, 4), data_format, strides=2)
    outputs, gradients = outputs_and_gradients(layer, inputs)
    assert outputs.shape == output_shape
    assert all(np.all(gradient == 0) for gradient in tf.nest.flatten(gradients))


@pytest.mark.parametrize("modulated", [False, True])
def test_images_too_small_for_the_kernel_are_refused(modulated):
    layer = DeformableConv2D(6, 3, dilation_rate=2, modulated=modulated)
    layer.build((None, None, None, 4))
    message = "inputs must have H of at least 4 for the dilated kernel's 5. Received: 1"
    for call in (layer, layer.offset):
        with pytest.raises(ValueError, match=message):
            call(tf.zeros((2, 1, 8, 4)))
    function = tf.function(layer, input_signature=[tf.TensorSpec([None, None, None, 4])])
    with pytest.raises(tf.errors.InvalidArgumentError):
        function(tf.zeros((2, 1, 8, 4)))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
def test_keras_trains_and_predicts_on_an_empty_batch(dtype, modulated):
    layer = DeformableConv2D(6, 3, modulated=modulated, dtype=dtype)
    model = keras.Sequential([keras.Input((9, 8, 4)), layer])
    model.compile("sgd", "mse")
    before = model.get_weights()
    images, targets = np.zeros((0, 9, 8, 4), np.float32), np.zeros((0, 7, 6, 6), np.float32)
    model.train_on_batch(images, targets)
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)
    predictions = model.predict_on_batch(images)
    assert predictions.shape == (0, 7, 6, 6)
    assert predictions.dtype == layer.compute_dtype


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


@pytest.mark.parametrize("arguments", ARGUMENTS + PADDED)
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

INTEGER, PAIR = "an integer above 0", "one or two integers"
NUMBER, FLAG = "a finite number above 0", "True or False"
PADDING = "'valid' or 'same', or integers of at least 0"


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("filters", None, INTEGER),
        ("filters", "8", INTEGER),
        ("filters", 8.0, INTEGER),
        ("filters", True, INTEGER),
        ("filters", 0, INTEGER),
        ("groups", None, INTEGER),
        ("groups", 1.0, INTEGER),
        ("kernel_size", None, INTEGER),
        ("kernel_size", "33", INTEGER),
        ("kernel_size", b"33", INTEGER),
        ("kernel_size", {1: 3}, INTEGER),
        ("kernel_size", [3], PAIR),
        ("kernel_size", (3, 3, 3), PAIR),
        ("kernel_size", (3, 0), INTEGER),
        ("strides", (1.0, 1.0), INTEGER),
        ("strides", (1, None), INTEGER),
        ("strides", b"11", INTEGER),
        ("strides", 2**31, "at most 2147483647"),
        ("strides", 10**5000, "at most 2147483647"),
        ("dilation_rate", True, INTEGER),
        ("dilation_rate", [[1, 1]], PAIR),
        ("padding", "causal", PADDING),
        ("padding", None, PADDING),
        ("padding", b"same", PADDING),
        ("padding", "1", PADDING),
        ("padding", -1, PADDING),
        ("padding", 1.0, PADDING),
        ("padding", True, PADDING),
        ("padding", (1, 2, 3), PADDING),
        ("padding", (1, 2, 3, 4), PADDING),
        ("padding", (1, None), PADDING),
        ("padding", ((1, 1), (1, -1)), PADDING),
        ("padding", ((1, 1), (1,)), PADDING),
        ("padding", ((1, 1), (1, 1), (1, 1)), PADDING),
        ("padding", [(0, 0), (1, 1), (1, 1), (0, 0)], PADDING),
        ("padding", (1, 2**31), "at most 2147483647"),
        ("data_format", "NHWC", "'channels_last' or 'channels_first'"),
        ("data_format", 1, "'channels_last' or 'channels_first'"),
        ("use_bias", "yes", FLAG),
        ("activation", "rely", "one of keras.activations"),
        ("kernel_initializer", b"zeros", "one of keras.initializers"),
        ("bias_initializer", {1: 1}, "one of keras.initializers"),
        ("kernel_regularizer", 3, "one of keras.regularizers"),
        ("activity_regularizer", "l3", "one of keras.regularizers"),
        ("bias_constraint", [1, 2], "one of keras.constraints"),
        ("offset_kernel_initializer", "zero_ish", "one of keras.initializers"),
        ("dtype", "int32", "one of float32, float64, float16, bfloat16, or a policy"),
        ("deform_groups", 0, INTEGER),
        ("deform_groups", 1.5, INTEGER),
        ("deform_groups", True, INTEGER),
        ("deform_groups", None, INTEGER),
        ("deform_groups", [2], INTEGER),
        ("deform_groups", 2**63, "at most 2147483647"),
        ("mask_scale", 0, NUMBER),
        ("mask_scale", float("inf"), NUMBER),
        ("mask_scale", float("nan"), NUMBER),
        ("mask_scale", 10**400, NUMBER),
        ("mask_scale", "2", NUMBER),
        ("mask_scale", 1j, NUMBER),
        ("mask_scale", None, NUMBER),
        ("modulated", "yes", FLAG),
        ("modulated", None, FLAG),
        ("own_offsets", 1, FLAG),
        ("offset_trainable", "no", FLAG),
        ("offset_trainable", np.array([True, False]), FLAG),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, int) else hex(value)[:12],
)
def test_wrong_argument_is_named_with_its_rule(argument, value, rule):
    arguments = {"filters": 6, "kernel_size": 3} | {argument: value}
    with pytest.raises(ValueError, match=rf"{argument} must be {rule}.*\. Received: \S") as error:
        DeformableConv2D(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.constant(1.0),
        lambda: tf.constant("x"),
        lambda: tf.constant([3.0, 3.0]),
        lambda: tf.ragged.constant([[1], [1, 2]]),
        lambda: tf.sparse.from_dense([3, 3]),
        lambda: tf.TensorArray(tf.int32, 2),
        lambda: keras.KerasTensor((2,)),
        lambda: tf.int32,
    ],
    ids=["float", "string", "floats", "ragged", "sparse", "TensorArray", "KerasTensor", "DType"],
)
@pytest.mark.parametrize(
    "argument",
    [
        *("filters", "kernel_size", "strides", "dilation_rate", "groups", "deform_groups"),
        *("padding", "data_format", "modulated", "mask_scale", "own_offsets", "offset_trainable"),
    ],
)
def test_what_tensorflow_has_besides_integers_is_no_argument(argument, make):
    arguments = {"filters": 6, "kernel_size": 3} | {argument: make()}
    with pytest.raises(ValueError, match=rf"^{argument} must be .*\. Received: \S"):
        DeformableConv2D(**arguments)


def test_integers_of_numpy_and_tensorflow_are_arguments_that_survive_saving(images, tmp_path):
    layer = DeformableConv2D(
        np.int64(6), tf.constant([3, 3]), strides=np.uint8(2), groups=tf.Variable(2), use_bias=1
    )
    model = keras.Sequential([keras.Input((9, 8, 4)), layer])
    assert relative_error(saved_and_loaded(model, tmp_path)(images), model(images)) == 0


def test_integers_must_be_known_while_the_graph_is_made():
    function = tf.function(lambda size: DeformableConv2D(6, size))
    with pytest.raises(ValueError, match="kernel_size must be known while the graph is made"):
        function(tf.constant(3))


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


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_number_of_inputs_is_checked(count):
    inputs = [keras.Input(shape) for shape in ((9, 8, 4), (7, 6, 18), (7, 6, 9), (7, 6, 9))]
    with pytest.raises(ValueError, match=rf"expects 3 input.* received {count} input"):
        DeformableConv2D(6, 3, modulated=True, own_offsets=False)(inputs[:count])


def test_inputs_that_are_no_list_are_refused(images):
    layer = DeformableConv2D(6, 3, own_offsets=False)
    for inputs in (images, {"inputs": images, "offset": tf.zeros((2, 7, 6, 18))}):
        with pytest.raises(
            ValueError, match=r"expects 2 inputs in a list, \[inputs, offset\], and"
        ):
            layer(inputs)


NO_INPUTS = {
    "None": lambda: None,
    "text": lambda: "images",
    "ragged tensor": lambda: tf.RaggedTensor.from_tensor(tf.zeros((2, 9, 8, 4))),
    "sparse tensor": lambda: tf.sparse.from_dense(tf.ones((2, 9, 8, 4))),
    "complex tensor": lambda: tf.zeros((2, 9, 8, 4), tf.complex64),
    "string tensor": lambda: tf.fill((2, 9, 8, 4), "x"),
    "TensorArray": lambda: tf.TensorArray(tf.float32, 2),
    "dict": lambda: {"images": tf.zeros((2, 9, 8, 4))},
    "array of objects": lambda: np.array([None]),
    "tensors of two shapes": lambda: [tf.zeros((2, 9, 8, 4)), tf.zeros((2, 7, 6, 18))],
    "KerasTensor of text": lambda: keras.Input((9, 8, 4), dtype="string"),
}


@pytest.mark.parametrize("value", NO_INPUTS)
@pytest.mark.parametrize("built", [False, True])
def test_what_is_no_tensor_of_numbers_is_no_image(built, value, images):
    layer = DeformableConv2D(6, 3, modulated=True)
    if built:
        layer(images)
    message = r"^inputs must be a dense tensor of real numbers. Received: \S"
    for call in (layer, layer.offset, layer.mask):
        with pytest.raises(ValueError, match=message) as error:
            call(NO_INPUTS[value]())
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", NO_INPUTS)
@pytest.mark.parametrize("name", ["inputs", "offset", "mask"])
def test_what_is_no_tensor_of_numbers_is_refused_by_name(name, value, images, rng):
    layer = DeformableConv2D(6, 3, modulated=True, deform_groups=2, own_offsets=False)
    inputs = dict(zip(("inputs", "offset", "mask"), [images, *given_tensors(rng)], strict=True))
    inputs[name] = NO_INPUTS[value]()
    with pytest.raises(ValueError, match=rf"^{name} must be a dense tensor of real numbers"):
        layer(list(inputs.values()))


def test_inputs_of_a_model_may_be_multiples_of_tensors(images, rng):
    """Which Keras takes for sparse ones."""
    offset, _ = given_tensors(rng)
    inputs = [keras.Input(tensor.shape[1:]) for tensor in (images, offset)]
    layer = DeformableConv2D(6, 3, deform_groups=2, own_offsets=False)
    model = keras.Model(inputs, layer([2.0 * inputs[0], 0.5 * inputs[1] - 1.0]))
    expected = layer([2.0 * images, 0.5 * offset - 1.0])
    assert relative_error(model([images, offset]), expected) == 0


def test_images_of_a_model_that_are_sparse_are_refused_when_it_is_called(images):
    inputs = keras.Input((9, 8, 4), sparse=True)
    model = keras.Model(inputs, DeformableConv2D(6, 3)(inputs))
    with pytest.raises(ValueError, match="inputs must be a dense tensor of real numbers"):
        model(tf.sparse.from_dense(images))


@pytest.mark.parametrize("shape", [(9, 8, 4), (2, 9, 8, 4, 1), ()])
def test_images_have_four_dimensions(shape):
    layer = DeformableConv2D(6, 3)
    with pytest.raises(ValueError, match="expected ndim=4, found ndim"):
        layer(tf.zeros(shape))
    with pytest.raises(ValueError, match=r"inputs must be images, \[N, H, W, C\]. Received: shape"):
        layer.offset(tf.zeros(shape))


@pytest.mark.parametrize("method", ["__call__", "offset"])
def test_images_must_have_a_known_rank(method):
    layer = DeformableConv2D(6, 3)
    function = tf.function(getattr(layer, method), input_signature=[tf.TensorSpec(None)])
    with pytest.raises(ValueError, match="inputs must have a known rank"):
        function(tf.zeros((2, 9, 8, 4)))


@pytest.mark.parametrize("make", [tf.zeros, lambda shape: keras.Input(shape[1:])])
def test_images_have_the_channels_that_the_layer_was_built_for(make, images):
    layer = DeformableConv2D(6, 3)
    layer(images)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 4"):
        layer(make((2, 9, 8, 3)))
    with pytest.raises(ValueError, match=r"inputs must have 4 channels, .* Received: shape"):
        layer.offset(make((2, 9, 8, 3)))


@pytest.mark.parametrize("returns", ["outputs and offset", None, b"offset"])
def test_call_returns_outputs_offset_or_mask(returns, images):
    with pytest.raises(
        ValueError, match=r"returns must be 'outputs', 'offset' or 'mask'. Received"
    ):
        DeformableConv2D(6, 3)(images, returns=returns)


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
