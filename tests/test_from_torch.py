"""Weights from PyTorch."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PROJECT, relative_error
from random_layers import random_layers

from deform_conv import from_torch
from deform_conv.layers import DeformableConv2D

# PyTorch does not know the CUDA that TensorFlow has loaded.
pytestmark = pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning")

CHANNELS, FILTERS, TAPS = 4, 6, 2 * 3  # of the layers below, with kernels of (2, 3)


def new_layer(**arguments):
    return DeformableConv2D(**{"filters": FILTERS, "kernel_size": (2, 3), **arguments})


def convolution(out_channels, channels=CHANNELS, bias=True, seed=1):
    """A state dict of a convolution, as arrays."""
    rng = np.random.default_rng(seed)
    arrays = {"weight": rng.standard_normal((out_channels, channels, 2, 3))}
    return arrays | ({"bias": rng.standard_normal(out_channels)} if bias else {})


def below(prefix, arrays):
    return {f"{prefix}.{key}": value for key, value in arrays.items()}


def module(tensors, **attributes):
    """What `from_torch` knows of a module: its state dict, and attributes."""
    return SimpleNamespace(state_dict=lambda: tensors, **attributes)


class ModuleClass:
    """A class of modules, which is no module."""

    def state_dict(self):
        raise NotImplementedError


def assert_is(convolution, arrays):
    """Whether a layer has the weight, in its own order, and the bias of `arrays`."""
    expected = arrays["weight"].transpose(2, 3, 1, 0)
    assert relative_error(convolution.kernel, expected) <= 1e-7
    if convolution.use_bias:
        assert relative_error(convolution.bias, arrays["bias"]) <= 1e-7


KERNEL, OFFSETS, MASKS = (
    convolution(FILTERS),
    convolution(2 * TAPS, seed=2),
    convolution(TAPS, seed=3),
)
BOTH = {key: np.concatenate([OFFSETS[key], MASKS[key]]) for key in OFFSETS}
SCALE_1 = {"modulated": True, "mask_scale": 1}
LAYERS = list(random_layers(24, seed=1))


# --- What it takes ---


def test_it_is_imported_when_it_is_asked_for_and_imports_no_pytorch():
    program = """
import sys, deform_conv
assert "from_torch" in dir(deform_conv) and "deform_conv.torch" not in sys.modules
assert deform_conv.from_torch is sys.modules["deform_conv.torch"].from_torch
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=True)


@pytest.mark.parametrize("form", [dict, lambda arrays: tuple(arrays.values()), module])
def test_source_and_offsets_may_be_state_dicts_pairs_and_modules(form):
    layer = new_layer(modulated=True)
    from_torch(layer, form(KERNEL), offset_conv=form(OFFSETS), mask_conv=form(MASKS))
    for each, arrays in ((layer, KERNEL), (layer.offset_conv, OFFSETS), (layer.mask_conv, MASKS)):
        assert_is(each, arrays)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("built", [False, True])
def test_layer_is_built_if_it_is_not(built, data_format):
    layer = new_layer(data_format=data_format, groups=2)
    shape = (2, 9, 8, CHANNELS) if data_format == "channels_last" else (2, CHANNELS, 9, 8)
    if built:
        layer.build(shape)
    arrays = convolution(FILTERS, CHANNELS // 2)
    from_torch(layer, arrays, offset_conv=OFFSETS)
    assert_is(layer, arrays)
    assert layer.compute_output_shape(shape) == layer(tf.zeros(shape)).shape


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16"]
)
def test_layer_may_be_of_any_type(dtype):
    layer = new_layer(dtype=dtype)
    from_torch(layer, KERNEL, offset_conv=OFFSETS)
    for each, arrays in ((layer, KERNEL), (layer.offset_conv, OFFSETS)):
        expected = tf.cast(arrays["weight"].transpose(2, 3, 1, 0), each.kernel.dtype)
        np.testing.assert_array_equal(each.kernel, expected)


@pytest.mark.parametrize("prefix", ["net.0.conv", "net.0.conv."])
def test_prefix_says_where_in_a_state_dict_the_layer_is(prefix):
    network = below("net.0.conv", KERNEL | below("conv_offset", OFFSETS)) | {
        "net.0.conv2.weight": MASKS["weight"],
        "net.1.running_var": np.ones(6),
        "weight": np.ones(6),
    }
    layer = new_layer()
    from_torch(layer, network, prefix=prefix)
    assert_is(layer, KERNEL)
    assert_is(layer.offset_conv, OFFSETS)


def test_prefix_is_the_name_of_a_submodule_of_a_module():
    conv = module(
        KERNEL | below("conv_offset", OFFSETS), stride=(2, 1), conv_offset=module(OFFSETS)
    )
    network = SimpleNamespace(state_dict=dict, layer1=SimpleNamespace(**{"0": conv}))
    layer = new_layer(strides=(2, 1))
    from_torch(layer, network, prefix="layer1.0")
    assert_is(layer, KERNEL)
    with pytest.raises(ValueError, match=r"strides must be \(2, 1\), .* of source.layer1.0"):
        from_torch(new_layer(), network, prefix="layer1.0")
    with pytest.raises(ValueError, match=r"prefix must be .* submodule. Received: 'layer2"):
        from_torch(layer, network, prefix="layer2.0")


@pytest.mark.parametrize("name", ["conv_offset_mask", "conv_offset", "offset_conv"])
def test_one_convolution_of_both_has_the_masks_last(name):
    layer = new_layer(**SCALE_1)
    from_torch(layer, KERNEL | below(name, BOTH))
    assert_is(layer, KERNEL)
    assert_is(layer.offset_conv, OFFSETS)
    assert_is(layer.mask_conv, MASKS)


@pytest.mark.parametrize("name", ["mask_conv", "modulator_conv", "conv_mask"])
@pytest.mark.parametrize("kernel", ["deform_conv", "regular_conv", "dcn", "conv"])
def test_parts_of_a_block_are_known_by_their_usual_names(kernel, name):
    layer = new_layer(modulated=True)
    block = below(kernel, KERNEL) | below("offset_conv", OFFSETS) | below(name, MASKS)
    from_torch(layer, block)
    assert_is(layer, KERNEL)
    assert_is(layer.offset_conv, OFFSETS)
    assert_is(layer.mask_conv, MASKS)


@pytest.mark.parametrize("arguments", [{}, SCALE_1])
def test_convolution_of_offsets_without_bias_has_one_of_zeros(arguments):
    layer = new_layer(offset_kernel_initializer="ones", **arguments)
    layer.build((None, None, None, CHANNELS))
    layer.offset_conv.bias.assign(np.ones(2 * TAPS))
    from_torch(layer, KERNEL, offset_conv=((BOTH if arguments else OFFSETS)["weight"], None))
    assert np.all(layer.offset_conv.bias == 0)


@pytest.mark.parametrize(
    ("order", "name"),
    [
        ("yxyx", lambda axis, group, tap: 2 * (TAPS * group + tap) + "yx".index(axis)),
        ("xyxy", lambda axis, group, tap: 2 * (TAPS * group + tap) + "xy".index(axis)),
        ("yyxx", lambda axis, group, tap: 2 * TAPS * "yx".index(axis) + TAPS * group + tap),
        ("xxyy", lambda axis, group, tap: 2 * TAPS * "xy".index(axis) + TAPS * group + tap),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_offset_order_says_what_each_channel_moves(both, order, name):
    """Each channel of the offsets has its own number as its bias."""
    layer = new_layer(deform_groups=2, **(SCALE_1 if both else {}))
    channels = 2 * 2 * TAPS + both * 2 * TAPS
    weight = np.arange(channels)[:, None, None, None] * np.ones((1, CHANNELS, 2, 3))
    from_torch(layer, KERNEL, offset_conv=(weight, np.arange(channels)), offset_order=order)
    expected = [name(axis, group, tap) for group in (0, 1) for tap in range(TAPS) for axis in "yx"]
    np.testing.assert_array_equal(layer.offset_conv.bias, expected)
    np.testing.assert_array_equal(layer.offset_conv.kernel[0, 0, 0], expected)
    if both:
        np.testing.assert_array_equal(layer.mask_conv.bias, np.arange(24, 36))


def test_layer_with_given_offsets_takes_the_kernel_and_bias_alone():
    layer = new_layer(own_offsets=False, modulated=True)
    from_torch(layer, KERNEL)
    assert_is(layer, KERNEL)


def test_layer_of_a_model_stays_in_it():
    layer = new_layer(padding="same")
    model = keras.Sequential([keras.Input((9, 8, CHANNELS)), layer])
    from_torch(layer, KERNEL, offset_conv=OFFSETS)
    images = tf.random.normal((2, 9, 8, CHANNELS), seed=1)
    np.testing.assert_array_equal(model(images), layer(images))
    assert_is(model.layers[0], KERNEL)


# --- Arguments of a module ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"padding": "same"}, {"padding": (1, 2)}),
        ({"padding": (1, 2)}, {"padding": "same"}),
        ({"padding": "same", "dilation_rate": (2, 1)}, {"padding": (2, 2), "dilation": (2, 1)}),
        ({"padding": ((0, 1), (1, 1)), "kernel_size": (2, 3)}, {"padding": "same"}),
        ({"padding": "valid"}, {"padding": 0}),
        ({"padding": 0}, {"padding": "valid"}),
        ({"padding": 2, "strides": 2}, {"padding": 2, "stride": 2}),
        ({"padding": "same", "strides": 2, "kernel_size": 1}, {"padding": 0, "stride": 2}),
        ({"groups": 2, "deform_groups": 2}, {"groups": 2, "deform_groups": 2}),
        ({"deform_groups": 2}, {"deformable_groups": 2, "padding_mode": "zeros"}),
    ],
    ids=str,
)
def test_module_with_the_arguments_of_the_layer_is_taken(ours, theirs):
    layer = new_layer(**{"kernel_size": (3, 5), "own_offsets": False} | ours)
    weight = np.ones((FILTERS, CHANNELS // layer.groups, *layer.kernel_size))
    from_torch(layer, module({"weight": weight, "bias": np.ones(FILTERS)}, **theirs))
    assert np.all(layer.kernel == 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"strides": 1}, {"stride": (2, 2)}, r"strides must be \(2, 2\), .* Received: \(1, 1\)"),
        ({"dilation_rate": 2}, {"dilation": 1}, r"dilation_rate must be 1, .* Received: \(2, 2\)"),
        ({"groups": 1}, {"groups": 2}, r"groups must be 2, .* Received: 1"),
        ({"deform_groups": 2}, {"deform_groups": 4}, r"deform_groups must be 4, .* Received: 2"),
        (
            {"deform_groups": 2},
            {"deformable_groups": 1},
            r"deform_groups must be 1, .*: 2",
        ),
        (
            {"padding": 1},
            {"padding": (1, 2)},
            r"padding=\(1, 2\)\. Received: \(\(1, 1\), ",
        ),
        ({"padding": "same"}, {"padding": 1}, r"padding=1\. Received: 'same'"),
        ({"padding": "valid"}, {"padding": "same"}, r"padding='same'\. Received: 'valid'"),
        (
            {"padding": "same", "strides": 2},
            {"padding": (1, 2), "stride": 2},
            r"padding must be that of source: construct the layer with padding=\(1, 2\)\. Received",
        ),
        (
            {},
            {"padding_mode": "reflect"},
            r"must have padding_mode='zeros'. Received: 'refl",
        ),
        ({}, {"transposed": True}, r"source must have transposed=False. Received: True"),
    ],
    ids=str,
)
def test_module_with_other_arguments_is_refused(ours, theirs, message):
    layer = new_layer(**{"kernel_size": (3, 5), "own_offsets": False} | ours)
    weight = np.ones((FILTERS, CHANNELS, *layer.kernel_size))
    with pytest.raises(ValueError, match=message):
        from_torch(layer, module({"weight": weight, "bias": np.ones(FILTERS)}, **theirs))


@pytest.mark.parametrize("given", [False, True])
def test_arguments_of_the_offsets_convolution_are_compared_too(given):
    layer = new_layer(dilation_rate=2)
    conv_offset = module(OFFSETS, dilation=(1, 1))  # as in older versions of mmcv
    message = r"dilation_rate must be \(1, 1\), the dilation of \S*conv\S*. Received: \(2, 2\)"
    with pytest.raises(ValueError, match=message):
        if given:
            from_torch(layer, KERNEL, offset_conv=conv_offset)
        else:
            tensors = KERNEL | below("conv_offset", OFFSETS)
            from_torch(layer, module(tensors, conv_offset=conv_offset))


# --- What it refuses ---


def missing(arrays, key):
    return {name: value for name, value in arrays.items() if name != key}


@pytest.mark.parametrize(
    ("arguments", "source", "given", "message"),
    [
        ({}, None, {}, r"source must be a module or a state dict .* Received: None"),
        ({}, (KERNEL["weight"],), {}, r"source must be a module or a state dict"),
        ({}, ModuleClass, {}, r"source must be a module .* Received: <class '\S*ModuleClass'>"),
        ({}, tuple(KERNEL.values()), {"prefix": "conv"}, r"without a prefix, a pair"),
        ({}, KERNEL, {"prefix": 1}, r"prefix must be a string. Received: 1"),
        ({}, {}, {}, r"source must have the key weight or deform_conv.weight .* Received: no keys"),
        ({}, KERNEL, {"prefix": "net"}, r"source.net must have the key weight .* no keys"),
        ({}, missing(KERNEL, "weight"), {}, r"the key weight .* Received: \['bias'\]"),
        ({}, KERNEL | {"g": 1}, {"offset_conv": OFFSETS}, r"source must have the .*\['g'\] too"),
        ({}, KERNEL, {}, r"offset_conv must be given, .* or the layer be one with own_offsets=F"),
        (
            SCALE_1,
            KERNEL,
            {"offset_conv": OFFSETS},
            r"mask_conv must be given, since source",
        ),
        (
            {},
            KERNEL | below("conv_offset", OFFSETS),
            {"offset_conv": OFFSETS},
            r"offset_conv must be None, since there is source.conv_offset. Received: \{",
        ),
        (
            {},
            KERNEL | below("conv_offset.0", OFFSETS),
            {},
            r"offset_conv must be given|source must have the keys of one deformable convolution",
        ),
        (
            {},
            KERNEL,
            {"offset_conv": below("0", OFFSETS)},
            r"offset_conv must have the key weight. Received: \['0.weight', '0.bias'\]",
        ),
        (
            {"own_offsets": False},
            KERNEL | below("conv_offset", OFFSETS),
            {},
            r"own_offsets must be True for the layer to have source.conv_offset",
        ),
        (
            {"modulated": True},
            KERNEL | below("conv_offset", BOTH),
            {},
            r"mask_scale must be 1, .* construct the layer with mask_scale=1. Received: 2.0",
        ),
        (
            {},
            KERNEL | below("conv_offset", BOTH),
            {},
            r"modulated must be True, since source.conv_offset computes masks. Received: False",
        ),
        (
            {},
            KERNEL,
            {"offset_conv": OFFSETS, "mask_conv": MASKS},
            r"modulated must be True, since mask_conv computes masks. Received: False",
        ),
        (
            {"use_bias": False},
            KERNEL,
            {"offset_conv": OFFSETS},
            r"use_bias must be True, .* a b",
        ),
        (
            {},
            (KERNEL["weight"], None),
            {"offset_conv": OFFSETS},
            r"use_bias must be False, .* no",
        ),
        (
            {},
            (KERNEL["weight"].transpose(2, 3, 1, 0), KERNEL["bias"]),
            {"offset_conv": OFFSETS},
            r"\(OIHW\) of shape \(6, 3, 2, 3\), .* \(HWIO\) of .* \(2, 3, 3, 6\).* \(2, 3, 4, 6\)",
        ),
        (
            {},
            KERNEL,
            {"offset_conv": MASKS},
            r"offset_conv must have a weight .* \(12, 4, 2, 3\).* Received: shapes \(6, 4, 2, 3\)",
        ),
        (
            {},
            KERNEL,
            {"offset_conv": convolution(2 * TAPS, channels=3)},
            r"offset_conv must have a weight .* \(12, 4, 2, 3\).* Received: shapes \(12, 3, 2, 3\)",
        ),
        (
            {"modulated": True},
            KERNEL,
            {"offset_conv": OFFSETS, "mask_conv": OFFSETS},
            r"mask_conv must have a weight .* \(6, 4, 2, 3\).* Received: shapes \(12, 4, 2, 3\)",
        ),
        (
            {},
            (KERNEL["weight"], np.ones(5)),
            {"offset_conv": OFFSETS},
            r"source must have .* and a bias of 6 numbers. Received: .* \(5,\)",
        ),
        ({}, (KERNEL["bias"], None), {}, r"source.weight must be a tensor of real numbers with 4"),
        ({}, (KERNEL["weight"] + 1j, None), {}, r"source.weight must be a tensor of real numbers"),
        ({}, ("weight", None), {}, r"source.weight must be a tensor of real numbers with 4 dim"),
        (
            {},
            KERNEL,
            {"offset_conv": OFFSETS, "offset_order": "xy"},
            r"offset_order must be 'yx",
        ),
        ({"deform_groups": 3}, KERNEL, {"offset_conv": OFFSETS}, r"offset_conv must have a weight"),
        (
            {"deform_groups": 3},
            KERNEL,
            {"offset_conv": convolution(3 * 2 * TAPS)},
            r"deform_groups must divide the number of input channels, 4. Received: 3",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named_and_changes_nothing(arguments, source, given, message):
    layer = new_layer(**arguments)
    with pytest.raises(ValueError, match=message) as error:
        from_torch(layer, source, **given)
    assert "\n" not in str(error.value)
    assert not layer.built
    assert layer.weights == []
    if layer.deform_groups == 3:
        return
    layer.build((None, None, None, CHANNELS))
    before = layer.get_weights()
    with pytest.raises(ValueError):
        from_torch(layer, source, **given)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_built_layer_keeps_its_number_of_channels():
    layer = new_layer()
    layer.build((None, None, None, 3))
    with pytest.raises(ValueError, match=r"shape \(6, 3, 2, 3\), .* Received: shapes \(6, 4, 2, 3"):
        from_torch(layer, KERNEL, offset_conv=OFFSETS)


def test_layer_must_be_deformable():
    with pytest.raises(ValueError, match=r"layer must be a DeformableConv2D, .* Received: <Conv2D"):
        from_torch(keras.layers.Conv2D(6, 3), KERNEL)


# --- PyTorch's own modules ---


@pytest.fixture(scope="module")
def torchvision(torch):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    import torchvision

    return torchvision


def numpy(tensor):
    """A tensor of PyTorch in the layout of this library."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def hwio(tensor):
    return tensor.detach().numpy().transpose(2, 3, 1, 0) if tensor.ndim == 4 else numpy(tensor)


def torch_arguments(arguments):
    """The arguments of a layer as those of PyTorch's convolutions."""
    padding = arguments["padding"]
    if padding == "same":
        axes = zip(arguments["kernel_size"], arguments["dilation_rate"], strict=True)
        padding = tuple((taps - 1) * dilation // 2 for taps, dilation in axes)
    return {
        "kernel_size": arguments["kernel_size"],
        "stride": arguments["strides"],
        "dilation": arguments["dilation_rate"],
        "padding": padding,
    }


def torch_modules(torch, torchvision, arguments, channels):
    """A deformable convolution, and those of its offsets and, modulated, its masks."""
    options = torch_arguments(arguments)
    taps = arguments["deform_groups"] * int(np.prod(arguments["kernel_size"]))
    conv = torchvision.ops.DeformConv2d(
        channels,
        arguments["filters"],
        groups=arguments["groups"],
        bias=arguments["use_bias"],
        **options,
    )
    offset_conv = torch.nn.Conv2d(channels, 2 * taps, **options)
    mask_conv = torch.nn.Conv2d(channels, taps, **options) if arguments["modulated"] else None
    return conv, offset_conv, mask_conv


def results_of_torch(torch, images, grad_outputs, conv, offset_conv, mask_conv):
    """Offset, mask, outputs and the gradients by everything, in the layout of this library."""
    images = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    offset = offset_conv(images)
    mask = mask_conv and torch.sigmoid(mask_conv(images))
    samples = {"offset": offset} | ({"mask": mask} if mask_conv else {})
    for tensor in samples.values():
        tensor.retain_grad()
    outputs = conv(images, offset, mask)
    outputs.backward(torch.tensor(grad_outputs.transpose(0, 3, 1, 2)))
    results = {"outputs": numpy(outputs), "grad inputs": numpy(images.grad)}
    results["outputs of given"] = results["outputs"]
    for name, tensor in samples.items():
        results |= {name: numpy(tensor), f"grad {name}": numpy(tensor.grad)}
    for name, module in (("conv", conv), ("offset", offset_conv), ("mask", mask_conv)):
        for key, parameter in module.named_parameters() if module else ():
            results[f"grad {name} {key}"] = hwio(parameter.grad)
    return results


def results_of_layer(images, samples, grad_outputs, layer, given):
    """The same, of `layer`; of `given`, which is given offset and mask, the gradients by them."""
    images = tf.constant(images)
    samples = {name: tf.constant(array) for name, array in samples.items()}
    parts = {"conv": layer, "offset": layer.offset_conv}
    if layer.modulated:
        parts["mask"] = layer.mask_conv
    sources = {"inputs": images}
    for name, part in parts.items():
        sources[f"{name} weight"] = part.kernel.value
        if part.use_bias:
            sources[f"{name} bias"] = part.bias.value
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([images, *samples.values()])
        outputs = layer(images)
        outputs_of_given = given([images, *samples.values()])
    gradients = tape.gradient(outputs, sources, grad_outputs)
    gradients |= tape.gradient(outputs_of_given, samples, grad_outputs)
    results = {"outputs": outputs, "outputs of given": outputs_of_given}
    results["offset"] = layer.offset(images)
    if layer.modulated:
        results["mask"] = layer.mask(images)
    return results | {f"grad {name}": gradient for name, gradient in gradients.items()}


# In float32, the order of the sums shows.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
@pytest.mark.parametrize(("arguments", "shape"), LAYERS, ids=map(str, range(len(LAYERS))))
def test_outputs_and_gradients_are_those_of_torchvision(
    arguments, shape, dtype, tolerance, torch, torchvision, rng
):
    conv, offset_conv, mask_conv = modules = [
        module and module.to(getattr(torch, dtype))
        for module in torch_modules(torch, torchvision, arguments, shape[-1])
    ]
    layer = DeformableConv2D(**arguments, dtype=dtype)
    given = DeformableConv2D(**arguments, own_offsets=False, dtype=dtype)
    from_torch(layer, conv, offset_conv=offset_conv, mask_conv=mask_conv)
    from_torch(given, conv)

    images = rng.standard_normal(shape).astype(dtype)
    grad_outputs = rng.standard_normal(layer.compute_output_shape(shape)).astype(dtype)
    expected = results_of_torch(torch, images, grad_outputs, *modules)
    samples = {name: expected[name] for name in ("offset", "mask") if name in expected}
    actual = results_of_layer(images, samples, grad_outputs, layer, given)
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


# --- Modules of other libraries, as their documentation and papers describe them ---


@pytest.fixture(scope="module")
def others(torch, torchvision):
    """Makers of modules by their names, with random weights, and the options that they go with."""

    class Deformable(torch.nn.Module):
        """What they share: a weight, perhaps a bias, and the arguments as attributes."""

        def __init__(self, channels, filters, kernel_size, bias=True, **arguments):
            super().__init__()
            self.groups = arguments.pop("groups", 1)
            self.stride, self.padding, self.dilation = (
                arguments[name] for name in ("stride", "padding", "dilation")
            )
            shape = (filters, channels // self.groups, *kernel_size)
            self.weight = torch.nn.Parameter(0.1 * torch.randn(shape))
            self.bias = torch.nn.Parameter(torch.randn(filters)) if bias else None

        def sample(self, images, offset, mask=None):
            return torchvision.ops.deform_conv2d(
                images,
                offset,
                self.weight,
                self.bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=mask,
            )

        def sample_with_both(self, images, outputs):
            first, second, mask = torch.chunk(outputs, 3, dim=1)
            return self.sample(images, torch.cat((first, second), dim=1), torch.sigmoid(mask))

    class DeformConv2dPack(Deformable):
        """mmcv's: version 1, without a bias."""

        def __init__(self, *sizes, deform_groups, **arguments):
            super().__init__(*sizes, bias=False, **arguments)
            self.deform_groups = deform_groups
            self.conv_offset = conv(sizes, 2 * deform_groups, arguments)

        def forward(self, images):
            return self.sample(images, self.conv_offset(images))

    class ModulatedDeformConv2dPack(Deformable):
        """mmcv's: version 2."""

        def __init__(self, *sizes, deform_groups, **arguments):
            super().__init__(*sizes, **arguments)
            self.deform_groups = deform_groups
            self.conv_offset = conv(sizes, 3 * deform_groups, arguments)

        def forward(self, images):
            return self.sample_with_both(images, self.conv_offset(images))

    class DCN(Deformable):
        """The module of DCNv2 for PyTorch."""

        def __init__(self, *sizes, deform_groups, **arguments):
            super().__init__(*sizes, **arguments)
            self.deformable_groups = deform_groups
            self.conv_offset_mask = conv(sizes, 3 * deform_groups, arguments)

        def forward(self, images):
            return self.sample_with_both(images, self.conv_offset_mask(images))

    class Block(torch.nn.Module):
        """A block around torchvision's function, whose masks go up to 2."""

        def __init__(self, *sizes, deform_groups, groups, **arguments):
            super().__init__()
            self.arguments = arguments
            self.offset_conv = conv(sizes, 2 * deform_groups, arguments)
            self.modulator_conv = conv(sizes, deform_groups, arguments)
            self.regular_conv = torch.nn.Conv2d(*sizes, groups=groups, **arguments)

        def forward(self, images):
            return torchvision.ops.deform_conv2d(
                images,
                self.offset_conv(images),
                self.regular_conv.weight,
                self.regular_conv.bias,
                **self.arguments,
                mask=2 * torch.sigmoid(self.modulator_conv(images)),
            )

    def conv(sizes, per_tap, arguments):
        channels, _, kernel_size = sizes
        arguments = {name: value for name, value in arguments.items() if name != "groups"}
        return torch.nn.Conv2d(channels, per_tap * np.prod(kernel_size), kernel_size, **arguments)

    return {
        "DeformConv2dPack": (DeformConv2dPack, {"use_bias": False}),
        "ModulatedDeformConv2dPack": (ModulatedDeformConv2dPack, SCALE_1),
        "DCN": (DCN, SCALE_1),
        "Block": (Block, {"modulated": True, "mask_scale": 2}),
    }


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("form", ["module", "state dict"])
@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack", "DCN", "Block"])
def test_layer_computes_what_a_module_of_another_library_does(
    name, form, data_format, torch, others, rng
):
    cls, options = others[name]
    conv = cls(
        *(4, 6, (3, 5)), stride=(2, 1), padding=(1, 2), dilation=1, groups=2, deform_groups=2
    ).double()
    layer = DeformableConv2D(
        *(6, (3, 5)),
        strides=(2, 1),
        padding=(1, 2),
        groups=2,
        deform_groups=2,
        data_format=data_format,
        dtype="float64",
        **options,
    )
    network = torch.nn.Sequential(torch.nn.ReLU(), conv)
    if form == "module":
        from_torch(layer, network, prefix="1")
    else:
        from_torch(layer, network.state_dict(), prefix="1")
    images = rng.standard_normal((2, 4, 9, 8))
    expected = conv(torch.tensor(images))
    if data_format == "channels_first":
        assert relative_error(layer(images), expected.detach()) <= 1e-12
    else:
        assert relative_error(layer(images.transpose(0, 2, 3, 1)), numpy(expected)) <= 1e-12


def test_wrong_stride_of_a_module_of_pytorch_is_refused(torch, torchvision):
    conv = torchvision.ops.DeformConv2d(4, 6, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match=r"padding=\(1, 1\)\. Received: 'same'"):
        from_torch(DeformableConv2D(6, 3, 2, "same", own_offsets=False), conv)
    with pytest.raises(ValueError, match=r"strides must be \(2, 2\), .* Received: \(1, 1\)"):
        from_torch(DeformableConv2D(6, 3, 1, "same", own_offsets=False), conv)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_of_all_floating_types_are_taken(dtype, torch, torchvision):
    conv = torchvision.ops.DeformConv2d(4, 6, 3).double()
    torch.nn.init.normal_(conv.weight)  # of numbers that no other type holds
    conv = conv.to(getattr(torch, dtype))
    assert conv.weight.requires_grad
    layer = DeformableConv2D(6, 3, own_offsets=False, dtype="float64")
    for source in (conv, conv.state_dict(), (conv.weight, conv.bias)):
        from_torch(layer, source)
        np.testing.assert_array_equal(layer.kernel, hwio(conv.weight.double()))
        np.testing.assert_array_equal(layer.bias, numpy(conv.bias.double()))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.long(),
        lambda weight: weight.to("meta"),
        lambda weight: weight.cfloat(),
        lambda weight: weight.to_sparse(),
    ],
    ids=["integers", "meta", "complex", "sparse"],
)
def test_tensors_without_real_numbers_are_refused(change, torch):
    with pytest.raises(ValueError, match=r"source.weight must be a tensor of real numbers"):
        from_torch(new_layer(), (change(torch.ones(6, 4, 2, 3)), None))


def test_sequence_of_convolutions_for_the_offsets_is_refused(torch):
    offset_conv = torch.nn.Sequential(torch.nn.Conv2d(4, 12, (2, 3)))
    with pytest.raises(ValueError, match=r"offset_conv must have the key weight. Received: \['0.w"):
        from_torch(new_layer(), KERNEL, offset_conv=offset_conv)
