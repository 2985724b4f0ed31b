"""The layers of versions 3 and 4: the published modules, their weights, and what Keras asks for."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from checks import needs_xla
from conftest import dcnv3_cases, relative_error
from published_modules import published_module, random_state

from deform_conv import deform_aggregate2d, from_torch, portable
from deform_conv._dcnv3 import from_dcnv3_offset
from deform_conv.layers import DeformableConv2DV3, DeformableConv2DV4

LAYERS = {3: DeformableConv2DV3, 4: DeformableConv2DV4}
FORMATS = ("channels_last", "channels_first")


@pytest.fixture(params=[3, 4])
def version(request):
    return request.param


def new_layer(version, **arguments):
    return LAYERS[version](**{"deform_groups": 2, **arguments})


def state_for(layer, rng, channels=8):
    """A state dict of a module like `layer`."""
    version = 3 if isinstance(layer, DeformableConv2DV3) else 4
    names = ("dw_kernel_size", "center_feature_scale", "remove_center")
    names += ("output_bias", "without_pointwise") if version == 4 else ()
    options = {name: getattr(layer, name) for name in names}
    return random_state(rng, version, channels, layer.kernel_size, layer.deform_groups, **options)


def with_weights(layer, rng, channels=8):
    """The layer, with random weights."""
    from_torch(layer, state_for(layer, rng, channels))
    return layer


def in_format(images, layer):
    return images if layer.data_format == "channels_last" else np.transpose(images, (0, 3, 1, 2))


# --- The published modules ---

CONFIGURATIONS = [
    {},
    {"deform_groups": 1, "dw_kernel_size": 5},
    {"deform_groups": 4, "offset_scale": 0.5, "center_feature_scale": True},
    {"remove_center": True, "offset_scale": 2.0},
    {"kernel_size": 5, "remove_center": True, "center_feature_scale": True, "dw_kernel_size": 1},
    {"dilation_rate": 2, "offset_scale": 1.5},
    {"kernel_size": (3, 5), "dilation_rate": (2, 1), "dw_kernel_size": (1, 3)},
    {"kernel_size": 1},
    # What the published modules have arguments for, but do not compute.
    {"kernel_size": (2, 4), "dw_kernel_size": (2, 3), "offset_scale": 2.0},
    {"strides": 2, "center_feature_scale": True},
    {"strides": (3, 2), "padding": 1, "offset_scale": 0.5},
    {"strides": 2, "padding": "valid", "remove_center": True, "center_feature_scale": True},
    {"kernel_size": 5, "dilation_rate": (1, 2), "padding": ((2, 0), (1, 4)), "strides": (1, 3)},
]
OF_VERSION_4 = [
    {"without_pointwise": True},
    {"without_pointwise": True, "center_feature_scale": True, "dw_kernel_size": 3},
    {"output_bias": False, "remove_center": True},
]
CASES = [(version, case) for version in LAYERS for case in CONFIGURATIONS]
CASES += [(4, case) for case in OF_VERSION_4]


def pads_of(layer, size):
    """The layer's padding of images of (h, w), as numbers."""
    if not isinstance(layer.padding, str):
        return layer.padding
    pads = []
    for length, taps, stride, dilation in zip(
        size, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
    ):
        extent = (taps - 1) * dilation + 1
        total = max((-(-length // stride) - 1) * stride + extent - length, 0)
        pads.append((total // 2, total - total // 2) if layer.padding == "same" else (0, 0))
    return tuple(pads)


def expected_of(layer, state, images):
    return published_module(
        state,
        images,
        version=3 if isinstance(layer, DeformableConv2DV3) else 4,
        kernel=layer.kernel_size,
        strides=layer.strides,
        pads=pads_of(layer, images.shape[1:3]),
        dilations=layer.dilation_rate,
        groups=layer.deform_groups,
        offset_scale=layer.offset_scale,
        remove_center=layer.remove_center,
    )


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(("version", "arguments"), CASES, ids=str)
def test_computes_what_the_published_module_does(version, arguments, data_format, device, rng):
    layer = new_layer(version, dtype="float64", data_format=data_format, **arguments)
    state = state_for(layer, rng)
    from_torch(layer, state)
    images = rng.standard_normal((2, 7, 8, 8))
    expected = in_format(expected_of(layer, state, images), layer)
    inputs = in_format(images, layer)
    assert relative_error(layer(inputs), expected) <= 1e-12
    assert layer.compute_output_shape(inputs.shape) == expected.shape


@pytest.mark.parametrize(
    ("channels", "size"), [(6, (1, 1)), (34, (1, 9)), (3, (5, 2))], ids=["1x1", "1x9", "5x2"]
)
def test_takes_images_of_any_size(version, channels, size, device, rng):
    layer = new_layer(version, dtype="float64", deform_groups=channels // 2 if channels > 3 else 3)
    state = state_for(layer, rng, channels)
    from_torch(layer, state)
    images = rng.standard_normal((1, *size, channels))
    assert relative_error(layer(images), expected_of(layer, state, images)) <= 1e-12


GOLDEN = dcnv3_cases()
OF_SOFTMAX = [name for name, case in GOLDEN.items() if np.all(case["mask"] > 0)]


def layer_of_case(version, case, groups, **arguments):
    kernel_h, kernel_w, *sizes, _, remove_center = (int(number) for number in case["config"])
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = sizes
    return LAYERS[version](
        (kernel_h, kernel_w),
        strides=(stride_h, stride_w),
        padding=(pad_h, pad_w),
        dilation_rate=(dilation_h, dilation_w),
        deform_groups=groups,
        offset_scale=float(case["offset_scale"]),
        remove_center=bool(remove_center),
        dtype="float64",
        **arguments,
    )


def at_middles(layer, numbers, size):
    """Images of (h, w) that have `numbers` [N, OH, OW, C] in the middle of each window."""
    middles = [
        (taps - 1) * dilation // 2 - pad[0] + stride * np.arange(count)
        for taps, dilation, pad, stride, count in zip(
            layer.kernel_size, layer.dilation_rate, layer.padding, layer.strides,
            numbers.shape[1:3], strict=True,
        )
    ]  # fmt: skip
    batch = np.arange(numbers.shape[0])
    indices = np.stack(np.meshgrid(batch, *middles, indexing="ij"), axis=-1)
    return tf.scatter_nd(indices, numbers, [len(batch), *size, numbers.shape[-1]])


def padded_groups(case, extra):
    """How many groups, and channels, hold those of the case and so many more."""
    groups, channels = int(case["config"][8]), case["input"].shape[3]
    width = channels // groups
    total = groups + -(-extra // width)
    return total, total * width


def linear_rows(rows, channels, columns, values=1.0):
    """A weight [rows, channels] with one number in each of its first rows; 0 elsewhere."""
    weight = np.zeros((rows, channels))
    weight[np.arange(len(columns)), columns] = values
    return weight


@pytest.mark.parametrize("name", GOLDEN)
def test_version_4_computes_what_internimages_function_does(name, device):
    """Further channels of the image hold the case's offsets and masks, and the layer's linear map
    picks them. The groups of these channels have masks of 0."""
    case = GOLDEN[name]
    _, height, width, channels = case["input"].shape
    groups, count = int(case["config"][8]), case["mask"].shape[3]
    all_groups, all_channels = padded_groups(case, 3 * count)
    layer = layer_of_case(4, case, all_groups, without_pointwise=True)

    taps = count // groups
    rows = np.arange(3 * count).reshape(groups, 3 * taps)
    columns = np.empty(3 * count, int)  # of the packed channels of the case's groups
    columns[rows[:, : 2 * taps].ravel()] = channels + np.arange(2 * count)
    columns[rows[:, 2 * taps :].ravel()] = channels + 2 * count + np.arange(count)
    total_rows = 8 * -(-3 * taps * all_groups // 8)
    from_torch(layer, {
        "offset_mask.weight": linear_rows(total_rows, all_channels, columns),
        "offset_mask.bias": np.zeros(total_rows),
    })  # fmt: skip

    tensors = {key: tf.constant(case[key]) for key in ("input", "offset", "mask")}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        held = tf.concat([tensors["offset"], tensors["mask"]], axis=-1)
        held = at_middles(layer, held, (height, width))
        image = tf.concat([tensors["input"], held], axis=-1)
        image = tf.pad(image, [[0, 0]] * 3 + [[0, all_channels - image.shape[3]]])
        outputs = layer(image)[..., :channels]
    gradients = tape.gradient(outputs, tensors, output_gradients=tf.constant(case["grad_output"]))
    assert relative_error(outputs, case["output"]) <= 1e-12
    for key, gradient in gradients.items():
        assert relative_error(gradient, case[f"grad_{key}"]) <= 1e-12, key


@pytest.mark.parametrize("name", OF_SOFTMAX)
def test_version_3_computes_what_internimages_function_does(name, device):
    """Further channels of the image hold the case's offsets and the logarithms of its masks.

    They pass the layer's normalization unchanged: each number comes with its negative, so that the
    mean is 0, and two channels more make the sum of squares the same everywhere. They pass the
    activation too, since gelu(x) - gelu(-x) = x.
    """
    case = GOLDEN[name]
    _, height, width, channels = case["input"].shape
    count = case["mask"].shape[3]
    all_groups, all_channels = padded_groups(case, 6 * count + 2)
    layer = layer_of_case(3, case, all_groups, dw_kernel_size=1)

    squares = 2 * (np.sum(case["offset"] ** 2, -1) + np.sum(np.log(case["mask"]) ** 2, -1))
    total = 2 * squares.max()
    dw_weight = np.zeros((all_channels, 1, 1, 1))
    dw_weight[channels : channels + 6 * count + 2] = 1
    positive = channels + np.arange(3 * count)
    taps_in_all = count // int(case["config"][8]) * all_groups

    def differences(rows, columns):
        weight = linear_rows(rows, all_channels, columns)
        return weight - linear_rows(rows, all_channels, columns + 3 * count)

    from_torch(layer, {
        "dw_conv.0.weight": dw_weight,
        "dw_conv.0.bias": np.zeros(all_channels),
        "dw_conv.1.1.weight": np.full(all_channels, np.sqrt(total / all_channels + 1e-6)),
        "dw_conv.1.1.bias": np.zeros(all_channels),
        "offset.weight": differences(2 * taps_in_all, positive[: 2 * count]),
        "offset.bias": np.zeros(2 * taps_in_all),
        "mask.weight": differences(taps_in_all, positive[2 * count :]),
        "mask.bias": np.zeros(taps_in_all),
        "input_proj.weight": np.eye(all_channels),
        "input_proj.bias": np.zeros(all_channels),
        "output_proj.weight": np.eye(all_channels),
        "output_proj.bias": np.zeros(all_channels),
    })  # fmt: skip

    tensors = {key: tf.constant(case[key]) for key in ("input", "offset", "mask")}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        held = tf.concat([tensors["offset"], tf.math.log(tensors["mask"])], axis=-1)
        rest = tf.sqrt(total / 2 - tf.reduce_sum(held**2, axis=-1, keepdims=True))
        held = tf.concat([held, -held, rest, -rest], axis=-1)
        held = at_middles(layer, held, (height, width))
        image = tf.concat([tensors["input"], held], axis=-1)
        image = tf.pad(image, [[0, 0]] * 3 + [[0, all_channels - image.shape[3]]])
        outputs = layer(image)[..., :channels]
    gradients = tape.gradient(outputs, tensors, output_gradients=tf.constant(case["grad_output"]))
    assert relative_error(outputs, case["output"]) <= 1e-12
    # Masks that a softmax makes keep their sum: the part of the gradient that changes it is lost.
    shape = (*case["mask"].shape[:3], int(case["config"][8]), -1)
    grad_mask, mask = (case[key].reshape(shape) for key in ("grad_mask", "mask"))
    grad_mask = grad_mask - np.sum(grad_mask * mask, axis=-1, keepdims=True)
    expected = {key: case[f"grad_{key}"] for key in ("input", "offset")}
    expected["mask"] = grad_mask.reshape(case["mask"].shape)
    for key, gradient in gradients.items():
        assert relative_error(gradient, expected[key]) <= 1e-12, key


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"center_feature_scale": True, "remove_center": True, "strides": 2, "offset_scale": 2}],
    ids=str,
)
def test_gradients_are_those_of_small_differences(version, arguments, data_format, device, rng):
    layer = new_layer(version, dtype="float64", data_format=data_format, dw_kernel_size=3)
    layer = layer.from_config(layer.get_config() | arguments)
    with_weights(layer, rng)
    images = tf.constant(in_format(rng.standard_normal((2, 5, 6, 8)), layer))
    factors = rng.standard_normal(layer.compute_output_shape(images.shape))
    with tf.GradientTape() as tape:
        tape.watch(images)
        total = tf.reduce_sum(layer(images) * factors)
    places = [*layer.trainable_variables, images]
    gradients = tape.gradient(
        total, [place.value if hasattr(place, "value") else place for place in places]
    )
    values = [tf.identity(place) for place in places]
    step = 1e-6
    for index, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        direction = rng.standard_normal(value.shape)
        totals = []
        for sign in (1, -1):
            moved = value + sign * step * direction
            if index < len(values) - 1:
                places[index].assign(moved)
            totals.append(
                tf.reduce_sum(layer(images if index < len(values) - 1 else moved) * factors)
            )
            if index < len(values) - 1:
                places[index].assign(value)
        numerical = float(totals[0] - totals[1]) / (2 * step)
        analytical = float(tf.reduce_sum(gradient * direction))
        assert abs(numerical - analytical) <= 1e-6 * max(1, abs(analytical)), index


# --- A new layer ---


def test_new_layer_of_version_3_takes_the_mean_of_its_window(rng):
    layer = new_layer(3)
    images = rng.standard_normal((2, 7, 8, 8), dtype="float32")
    outputs = layer(images)
    assert np.all(layer.offset(images) == 0)
    np.testing.assert_allclose(layer.mask(images), 1 / 9, rtol=1e-6)
    values = tf.pad(layer.input_proj(images), [[0, 0], [1, 1], [1, 1], [0, 0]])
    means = tf.nn.avg_pool2d(values, 3, 1, "VALID")
    assert relative_error(outputs, layer.output_proj(means)) <= 1e-6


def test_new_layer_of_version_4_has_offsets_and_masks_of_zero(rng):
    layer = new_layer(4)
    images = rng.standard_normal((2, 7, 8, 8), dtype="float32")
    assert np.all(layer(images) == 0)
    assert np.all(layer.offset(images) == 0) and np.all(layer.mask(images) == 0)


def test_arguments_are_the_defaults_of_the_published_modules(version):
    config = LAYERS[version]().get_config()
    assert config["kernel_size"] == (3, 3) and config["padding"] == "same"
    assert config["deform_groups"] == 4 and config["offset_scale"] == 1
    assert not config["center_feature_scale"] and not config["remove_center"]
    assert config["dw_kernel_size"] == ((3, 3) if version == 3 else None)
    if version == 3:
        assert config["activation"] == "gelu"
    else:
        assert config["output_bias"] and not config["without_pointwise"]


def test_projections_start_as_in_the_published_modules(version):
    layer = new_layer(version, dw_kernel_size=5, center_feature_scale=True)
    layer.build((None, None, None, 32))
    for part in (layer.input_proj, layer.output_proj):
        limit = np.sqrt(6 / 64)  # Xavier
        assert 0.9 * limit < np.abs(part.kernel).max() <= limit
        assert np.all(part.bias == 0)
    assert np.all(layer.center_proj.kernel == 0) and np.all(layer.center_proj.bias == 0)
    assert 0.9 / 5 < np.abs(layer.dw_conv.kernel).max() <= 1 / 5  # PyTorch's convolutions


def test_tap_that_is_removed_samples_nothing_and_has_no_mask(version, rng):
    layer = with_weights(new_layer(version, remove_center=True), rng)
    images = rng.standard_normal((2, 7, 8, 8), dtype="float32")
    mask = layer.mask(images).numpy().reshape(2, 7, 8, 2, 9)
    assert np.all(mask[..., 4] == 0) and np.all(mask[..., [0, 3, 5, 8]] != 0)
    offset = layer.offset(images).numpy().reshape(2, 7, 8, 2, 9, 2)
    assert np.all(offset[..., 4, :] < -1e9) and np.all(np.isfinite(offset))


# --- Weights of the published modules ---


def test_offsets_and_masks_of_version_4_are_packed_by_group(rng):
    """For each group the offsets, (x, y) tap after tap, x-major; then its masks."""
    layer = new_layer(4, kernel_size=(2, 3), dtype="float64")
    state = state_for(layer, rng)
    state["offset_mask.weight"][:] = 0
    state["offset_mask.bias"][:] = np.arange(40)  # 2 groups of 3 * 6 numbers, and 4 unused
    from_torch(layer, state)
    images = np.zeros((1, 4, 4, 8))
    offset = layer.offset(images).numpy()[0, 0, 0].reshape(2, 2, 3, 2)  # G, KH, KW, (dy, dx)
    mask = layer.mask(images).numpy()[0, 0, 0].reshape(2, 2, 3)
    for group, ky, kx in np.ndindex(2, 2, 3):
        tap = kx * 2 + ky
        assert tuple(offset[group, ky, kx]) == (18 * group + 2 * tap + 1, 18 * group + 2 * tap)
        assert mask[group, ky, kx] == 18 * group + 12 + tap


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("data_format", FORMATS)
def test_layer_is_built_if_it_is_not(version, built, data_format, rng):
    layer = new_layer(version, data_format=data_format)
    if built:
        layer.build((None, None, None, 8) if data_format == "channels_last" else (2, 8, 5, 5))
    state = state_for(layer, rng)
    network = {f"levels.0.dcn.{key}": array for key, array in state.items()} | {"x": np.ones(3)}
    from_torch(layer, network, prefix="levels.0.dcn")
    key = "input_proj.weight" if version == 3 else "value_proj.weight"
    np.testing.assert_allclose(layer.input_proj.kernel, state[key].T, rtol=1e-6)


def module_like(layer, state, **attributes):
    """What `from_torch` knows of a module that fits the layer."""
    fitting = {
        "kernel_size": 3, "stride": 1, "pad": 1, "dilation": 1, "group": 2,
        "offset_scale": 1.0, "remove_center": 0,
        "dw_kernel_size": 3 if isinstance(layer, DeformableConv2DV3) else None,
    }  # fmt: skip
    return SimpleNamespace(state_dict=lambda: state, **fitting | attributes)


def test_module_is_compared_with_the_layer(version, rng):
    layer = new_layer(version)
    state = state_for(layer, rng)
    from_torch(layer, module_like(layer, state))
    for attributes, message in [
        ({"kernel_size": 5}, "kernel_size must be 5, the kernel_size of source.*Received: .3, 3"),
        ({"stride": 2}, "strides must be 2, the stride of source"),
        ({"dilation": 2}, "dilation_rate must be 2, the dilation of source"),
        ({"group": 4}, "deform_groups must be 4, the group of source"),
        ({"offset_scale": 2.0}, "offset_scale must be 2.0, .* Received: 1.0"),
        ({"remove_center": 1}, "remove_center must be 1, .* Received: False"),
        ({"pad": 0}, "padding must be that of source: .* padding=0. Received: 'same'"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_torch(layer, module_like(layer, state, **attributes))


def without(*keys):
    return lambda state: {key: array for key, array in state.items() if key not in keys}


def test_takes_a_module_of_pytorch(torch, rng):
    """One with the parameters of DCNv3, whose features, offsets and masks PyTorch computes."""
    nn, channels, groups, taps = torch.nn, 8, 2, 9

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.dw_conv = nn.Sequential(
                nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
                nn.Sequential(nn.Identity(), nn.LayerNorm(channels, eps=1e-6)),
                nn.GELU(),
            )
            self.offset = nn.Linear(channels, groups * taps * 2)
            self.mask = nn.Linear(channels, groups * taps)
            self.input_proj = nn.Linear(channels, channels)
            self.output_proj = nn.Linear(channels, channels)
            self.kernel_size, self.group, self.offset_scale, self.pad = 3, groups, 2.0, 1

    module = Module().double()
    images = rng.standard_normal((2, 7, 8, channels))
    inputs = torch.tensor(images)
    features = module.dw_conv[0](inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    features = module.dw_conv[2](module.dw_conv[1](features))
    logits = module.mask(features).unflatten(-1, (groups, taps))
    masks = torch.softmax(logits, -1).flatten(-2)
    offset, mask = from_dcnv3_offset(
        *(tensor.detach().numpy() for tensor in (module.offset(features), masks)),
        (3, 3),
        groups=groups,
        offset_scale=2.0,
    )
    values = module.input_proj(inputs).detach().numpy()
    outputs = deform_aggregate2d(values, offset, mask, 3, deform_groups=groups)
    outputs = module.output_proj(torch.tensor(outputs.numpy()))

    layer = new_layer(3, dw_kernel_size=5, offset_scale=2.0, dtype="float64")
    from_torch(layer, module)
    assert relative_error(layer.offset(images), offset) <= 1e-12
    assert relative_error(layer.mask(images), mask) <= 1e-12
    assert relative_error(layer(images), outputs.detach().numpy()) <= 1e-12
    with pytest.raises(ValueError, match=r"activation must be 'gelu', that of source. Rec"):
        from_torch(new_layer(3, dw_kernel_size=5, offset_scale=2.0, activation="relu"), module)


WRONG_STATES = [
    (3, without("offset.weight"), {}, r"source must have the key offset\.weight. Received: \["),
    (3, without("mask.bias"), {}, "source must have the key mask.bias"),
    (3, lambda state: state | {"x": np.ones(2)}, {}, r"keys of the module .*Received: \['x'\] too"),
    (
        3,
        lambda state: state,
        {"kernel_size": 5},
        r"offset.weight must have shape \(100, (None|8)\)",
    ),
    (3, lambda state: state, {"deform_groups": 4}, "offset.weight must have shape"),
    (3, lambda state: state, {"dw_kernel_size": 5}, r"dw_conv.0.weight must have shape \(8, 1, 5"),
    (3, lambda state: state, {"center_feature_scale": True}, "center_feature_scale must be False"),
    (
        3,
        lambda state: state | {"center_feature_scale_proj_weight": np.ones((2, 8))},
        {},
        "center_feature_scale must be True, since source has the key center_feature_scale_proj_w",
    ),
    (
        3,
        lambda state: state | {"dw_conv.1.0.running_mean": np.ones(8)},
        {},
        "must have a layer normalization, .* Received: a batch normalization",
    ),
    (3, lambda state: state | {"mask.bias": "x"}, {}, "mask.bias must be a tensor of real numbers"),
    (4, without("offset_mask.bias"), {}, "must have the key offset_mask.bias"),
    (
        4,
        lambda state: state,
        {"remove_center": True},
        r"offset_mask.weight must have shape \(48, (None|8)\)",
    ),
    (
        4,
        lambda state: state,
        {"dw_kernel_size": 3},
        "dw_kernel_size must be None, since source has",
    ),
    (
        4,
        lambda state: state | {"offset_mask_dw.weight": np.ones((8, 1, 3, 3))},
        {},
        "dw_kernel_size must be a size, since source has the key offset_mask_dw.weight",
    ),
    (4, lambda state: state, {"without_pointwise": True}, "without_pointwise must be False, since"),
    (4, without("value_proj.weight"), {}, "without_pointwise must be True, since source has no"),
    (4, lambda state: state, {"output_bias": False}, "output_bias must be True, since source has"),
    (4, without("output_proj.bias"), {}, "output_bias must be False, since source has no key"),
]


@pytest.mark.parametrize(("version", "change", "arguments", "message"), WRONG_STATES)
def test_what_does_not_fit_is_refused_and_the_layer_stays(version, change, arguments, message, rng):
    state = change(state_for(new_layer(version), rng))
    layer = new_layer(version, **arguments)
    with pytest.raises(ValueError, match=message):
        from_torch(layer, state)
    assert not layer.built
    layer.build((None, None, None, 8))
    before = [variable.numpy() for variable in layer.variables]
    with pytest.raises(ValueError, match=message):
        from_torch(layer, state)
    for variable, array in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, array)


def test_arguments_of_other_modules_are_refused(version, rng):
    layer = new_layer(version)
    state = state_for(layer, rng)
    pair = (np.ones((4, 8, 3, 3)), None)
    for argument in ("offset_conv", "mask_conv"):
        with pytest.raises(ValueError, match=f"{argument} must be None for a DeformableConv2DV"):
            from_torch(layer, state, **{argument: pair})
    with pytest.raises(ValueError, match="offset_order must be 'yxyx' for a DeformableConv2DV"):
        from_torch(layer, state, offset_order="xyxy")


# --- What Keras asks for ---

ALL_OPTIONS = {
    "kernel_size": (3, 5),
    "strides": (1, 2),
    "padding": ((1, 0), (2, 2)),
    "dilation_rate": (2, 1),
    "deform_groups": 4,
    "offset_scale": 0.5,
    "dw_kernel_size": (1, 3),
    "center_feature_scale": True,
    "remove_center": True,
    "offset_trainable": False,
}
OWN_OPTIONS = {
    3: {"activation": "silu"},
    4: {"output_bias": False, "without_pointwise": True},
}


@pytest.mark.parametrize("data_format", FORMATS)
def test_saved_model_has_the_weights_offsets_and_flags(version, data_format, tmp_path, rng):
    own = {} if version == 3 else {"output_bias": False}
    arguments = ALL_OPTIONS | own | {"data_format": data_format}
    layer = with_weights(new_layer(version, **arguments), rng)
    images = in_format(rng.standard_normal((2, 7, 8, 8), dtype="float32"), layer)
    inputs = keras.Input(images.shape[1:])
    model = keras.Model(inputs, [layer(inputs), layer.offset(inputs), layer.mask(inputs)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for value, expected in zip(loaded(images), model(images), strict=True):
        np.testing.assert_array_equal(value, expected)
    copy = next(each for each in loaded.layers if isinstance(each, LAYERS[version]))
    assert copy.get_config() == layer.get_config()
    assert not copy.offset_trainable and copy.trainable


def test_config_has_every_argument(version):
    arguments = ALL_OPTIONS | OWN_OPTIONS[version]
    config = new_layer(version, **arguments).get_config()
    assert {name: config[name] for name in arguments} == arguments
    assert LAYERS[version].from_config(config).get_config() == config


def test_weights_file_is_read_into_another_model(version, tmp_path, rng):
    images = rng.standard_normal((2, 7, 8, 8), dtype="float32")

    def model():
        return keras.Sequential([keras.Input((7, 8, 8)), new_layer(version)])

    first, second = model(), model()
    with_weights(first.layers[-1], rng)
    first.save_weights(tmp_path / "some.weights.h5")
    second.load_weights(tmp_path / "some.weights.h5")
    np.testing.assert_array_equal(first(images), second(images))


@pytest.mark.parametrize("data_format", FORMATS)
def test_function_of_unknown_sizes_takes_any_images(version, data_format, rng):
    layer = with_weights(new_layer(version, strides=2, data_format=data_format), rng)
    shape = [None] * 4
    shape[3 if data_format == "channels_last" else 1] = 8
    function = tf.function(layer, input_signature=[tf.TensorSpec(shape)])
    for sizes in ((2, 7, 8), (1, 1, 1), (0, 5, 5), (2, 0, 3)):
        images = in_format(rng.standard_normal((*sizes, 8), dtype="float32"), layer)
        outputs = function(images)
        assert outputs.shape == layer.compute_output_shape(images.shape)
        np.testing.assert_allclose(outputs, layer(images), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_float16"])
@pytest.mark.parametrize("size", [(0, 5, 5), (2, 0, 5)])
def test_empty_images_give_gradients_of_zero(version, size, dtype):
    layer = new_layer(version, dtype=dtype, dw_kernel_size=3, center_feature_scale=True)
    with tf.GradientTape() as tape:
        outputs = layer(tf.zeros((*size, 8)))
        total = tf.reduce_sum(outputs)
    assert outputs.shape == (*size, 8)
    variables = layer.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(total, variables), strict=True):
        assert np.all(np.array(gradient) == 0), variable.path


def test_shape_of_a_symbol_is_known_before_the_call(version):
    layer = new_layer(version, strides=2, dtype="mixed_bfloat16")
    inputs = keras.Input((None, 9, 8))
    outputs, offset, mask = layer(inputs), layer.offset(inputs), layer.mask(inputs)
    assert (outputs.shape, outputs.dtype) == ((None, None, 5, 8), "bfloat16")
    assert (offset.shape, offset.dtype) == ((None, None, 5, 36), "float32")
    assert (mask.shape, mask.dtype) == ((None, None, 5, 18), "float32")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("mixed_float16", 3e-3), ("mixed_bfloat16", 3e-2), ("float16", 3e-3)]
)
@pytest.mark.parametrize("center_feature_scale", [False, True])
def test_result_in_16_bits_is_that_of_float32_but_for_rounding(
    version, dtype, tolerance, center_feature_scale, device, rng
):
    arguments = {"center_feature_scale": center_feature_scale, "deform_groups": 2}
    exact = new_layer(version, **arguments)
    rounded = new_layer(version, dtype=dtype, **arguments)
    state = state_for(exact, rng)
    from_torch(exact, state)
    from_torch(rounded, state)
    images = rng.standard_normal((2, 7, 8, 8), dtype="float32")
    outputs = rounded(images)
    assert outputs.dtype == rounded.compute_dtype
    assert relative_error(outputs, exact(images)) <= tolerance
    assert rounded.offset(images).dtype == rounded.mask(images).dtype == tf.float32
    np.testing.assert_allclose(rounded.offset(images), exact.offset(images), atol=1e-6)
    if dtype.startswith("mixed"):
        assert {variable.dtype for variable in rounded.variables} == {"float32"}


def test_offsets_stay_float32_within_a_mixed_model(version, rng):
    """Keras rounds the variables of layers that are called within another."""

    class Around(keras.Model):
        def __init__(self):
            super().__init__(dtype="mixed_float16")
            self.layer = with_weights(new_layer(version, dtype="mixed_float16"), rng)

        def call(self, images):
            return self.layer(images)

    model = Around()
    images = tf.constant(rng.standard_normal((2, 7, 8, 8)), tf.float16)
    np.testing.assert_array_equal(model(images), model.layer(tf.cast(images, tf.float32)))


def names_of(variables):
    return {variable.path.split("/")[-2] for variable in variables}


OFFSET_PARTS = {
    3: {"offset_proj", "mask_proj", "dw_conv", "dw_norm"},
    4: {"offset_proj", "mask_proj", "dw_conv"},
}


def test_offsets_are_frozen_and_trained_apart(version):
    layer = new_layer(version, dw_kernel_size=3)
    layer.build((None, None, None, 8))
    others = {"input_proj", "output_proj"}
    assert names_of(layer.trainable_variables) == OFFSET_PARTS[version] | others
    layer.offset_trainable = False
    assert names_of(layer.trainable_variables) == others
    layer.trainable = False
    assert layer.trainable_variables == [] and not layer.offset_trainable
    layer.offset_trainable = True
    assert names_of(layer.trainable_variables) == OFFSET_PARTS[version]
    assert names_of(layer.non_trainable_variables) == others
    layer.trainable = True
    assert names_of(layer.trainable_variables) == OFFSET_PARTS[version] | others


@pytest.mark.parametrize("offset_trainable", [False, True])
def test_frozen_layer_stays_frozen_when_it_is_made_again(version, offset_trainable, tmp_path):
    layer = new_layer(version, trainable=False, center_feature_scale=True)
    layer.offset_trainable = offset_trainable
    model = keras.Sequential([keras.Input((7, 8, 8)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = names_of(layer.trainable_variables)
    assert bool(expected) == offset_trainable
    for made_again in (loaded, keras.models.clone_model(model)):
        assert names_of(made_again.layers[0].trainable_variables) == expected


def test_parts_cannot_stand_alone(version):
    layer = new_layer(version)
    with pytest.raises(ValueError, match=rf"offset_proj cannot .* {type(layer).__name__} that it"):
        layer.offset_proj(keras.Input((7, 8, 8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be an integer above 0. Received: 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be one or two integers"),
        ({"strides": 1.5}, "strides must be an integer above 0. Received: 1.5"),
        ({"padding": "full"}, "padding must be 'valid' or 'same', or integers"),
        ({"padding": 2}, r"padding must be at most half .* Received: \(\(2, 2\), \(2, 2\)\)"),
        ({"padding": ((1, 1), (0, 2))}, "padding must be at most half of the dilated kernel"),
        ({"data_format": "NHWC"}, "data_format must be 'channels_last' or 'channels_first'"),
        ({"dilation_rate": -1}, "dilation_rate must be an integer above 0"),
        ({"deform_groups": 0}, "deform_groups must be an integer above 0"),
        ({"offset_scale": 0}, "offset_scale must be a finite number above 0. Received: 0"),
        ({"dw_kernel_size": "x"}, "dw_kernel_size must be an integer above 0. Received: 'x'"),
        ({"center_feature_scale": 1}, "center_feature_scale must be True or False. Received: 1"),
        ({"remove_center": None}, "remove_center must be True or False. Received: None"),
        ({"remove_center": True, "kernel_size": (3, 2)}, "kernel_size must be odd, .* remove_cen"),
        ({"remove_center": True, "kernel_size": 1}, "kernel_size must be above 1 for remove_cen"),
        ({"offset_trainable": "yes"}, "offset_trainable must be True or False"),
        ({"dtype": "int32"}, "dtype must be one of float32, float64, float16, bfloat16"),
    ],
    ids=str,
)
def test_wrong_argument_is_named(version, arguments, message):
    with pytest.raises(ValueError, match=message):
        new_layer(version, **arguments)


@pytest.mark.parametrize(
    ("version", "arguments", "message"),
    [
        (3, {"activation": "x"}, "activation must be one of keras.activations. Received: 'x'"),
        (4, {"output_bias": 0}, "output_bias must be True or False. Received: 0"),
        (4, {"without_pointwise": "no"}, "without_pointwise must be True or False"),
    ],
)
def test_wrong_argument_of_one_version_is_named(version, arguments, message):
    with pytest.raises(ValueError, match=message):
        new_layer(version, **arguments)


def test_wrong_images_are_refused(version):
    layer = new_layer(version)
    with pytest.raises(ValueError, match="inputs must be a dense tensor of real numbers"):
        layer("image")
    with pytest.raises(ValueError, match=r"deform_groups must divide the number of .* 7"):
        new_layer(version)(tf.zeros((1, 5, 5, 7)))
    with pytest.raises(ValueError, match="inputs must have a known number of channels"):
        layer.build((None, 5, 5, None))
    layer.build((None, None, None, 8))
    with pytest.raises(ValueError, match=r"axis -1 of input shape to have value 8"):
        layer(tf.zeros((1, 5, 5, 6)))
    with pytest.raises(ValueError, match="inputs must have 8 channels"):
        layer.offset(tf.zeros((1, 5, 5, 6)))
    with pytest.raises(ValueError, match="inputs must have a height and width of at least"):
        new_layer(version, kernel_size=7, padding=0).compute_output_shape((1, 5, 5, 8))
    for inputs in (tf.zeros((1, 2, 2, 8)), keras.Input((2, 2, 8))):
        with pytest.raises(ValueError, match="inputs must have a height and width of at least"):
            new_layer(version, padding=0)(inputs)


# --- In every mode ---


@pytest.mark.parametrize("remove_center", [False, True])
def test_portable_mode_computes_the_same(version, remove_center, rng):
    layer = with_weights(new_layer(version, remove_center=remove_center), rng)
    images = rng.standard_normal((2, 7, 8, 8), dtype="float32")
    expected = layer(images)
    with portable():
        assert relative_error(layer(images), expected) <= 1e-6


def test_saved_program_computes_the_same(version, tmp_path, rng):
    layer = with_weights(new_layer(version), rng)
    model = keras.Sequential([keras.Input((None, None, 8)), layer])
    model.export(tmp_path / "program")
    images = rng.standard_normal((2, 7, 8, 8), dtype="float32")
    loaded = tf.saved_model.load(str(tmp_path / "program"))
    np.testing.assert_allclose(loaded.serve(images), model(images), atol=1e-6)


@needs_xla
def test_compiled_function_computes_the_same(version, rng):
    layer = with_weights(new_layer(version, center_feature_scale=True), rng)
    images = tf.constant(rng.standard_normal((2, 7, 8, 8), dtype="float32"))
    compiled = tf.function(layer, jit_compile=True)
    assert relative_error(compiled(images), layer(images)) <= 1e-5


# --- Training ---


def block(version, x):
    """A block of InternImage or FlashInternImage: aggregation, then an MLP, both residual."""
    channels = x.shape[-1]
    layers = keras.layers
    normalized = layers.LayerNormalization(epsilon=1e-6)(x)
    x = x + LAYERS[version](deform_groups=4, name="aggregation")(normalized)
    hidden = layers.Dense(4 * channels, activation="gelu")(layers.LayerNormalization()(x))
    return x + layers.Dense(channels)(hidden)


def test_block_trains_on_scaled_mnist_and_its_offsets_move(version):
    keras.utils.set_random_seed(1)
    mnist = pytest.importorskip("utils.mnist", reason="needs the project's folder")
    digits = mnist.load_mnist()[0].take(1280)
    images = mnist.scale_images(digits.images, np.random.default_rng(1)) / np.float32(255)
    inputs = keras.Input((28, 28, 1))
    x = block(version, keras.layers.Conv2D(16, 5, strides=4, padding="same")(inputs))
    x = keras.layers.Flatten()(keras.layers.LayerNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    before = model.evaluate(images, digits.labels, verbose=0)
    model.fit(images, digits.labels, batch_size=32, epochs=2, verbose=0)  # 80 steps
    assert model.evaluate(images, digits.labels, verbose=0) < 0.75 * before
    layer = model.get_layer("aggregation")
    features = keras.Model(inputs, layer.input)(images[:64])
    assert np.abs(layer.offset(features)).mean() > 0.05
