"""ONNX: the files that `deform_conv.onnx.export` writes, and what it refuses.

Differences are relative to the largest magnitude in what the model computes.
"""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PROJECT, random_case
from random_layers import random_layers

import deform_conv
from deform_conv import deform_aggregate2d, deform_conv2d, deformable
from deform_conv.layers import DeformableConv2D

pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

import onnx
import onnxruntime
import openvino

from deform_conv.onnx import export
from deform_conv.openvino import extension

Spec = tf.TensorSpec


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.onnx"


def difference(actual, expected) -> float:
    actual, expected = (np.asarray(value, np.float64) for value in (actual, expected))
    assert actual.shape == expected.shape
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def in_onnx_runtime(file, *inputs) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file)
    names = [input.name for input in session.get_inputs()]
    arrays = [np.asarray(value) for value in inputs]
    return session.run(None, dict(zip(names, arrays, strict=True)))


def in_openvino(file, *inputs) -> np.ndarray:
    core = openvino.Core()
    core.add_extension(extension())
    # Otherwise a CPU with 16-bit types computes in these.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(file, "CPU", options)([np.asarray(value) for value in inputs])[0]


def nodes(file) -> list[str]:
    return [node.op_type for node in onnx.load(file).graph.node]


def randomize(layer, rng):
    """Random weights, with offsets of a pixel or two whatever the size of the kernel."""
    layer.set_weights(
        [
            rng.standard_normal(weight.shape) / np.sqrt(np.prod(weight.shape[:-1]))
            for weight in layer.get_weights()
        ]
    )


def random_model(rng, shape=(9, 8, 4), filters=6, kernel_size=3, **arguments):
    """A model of one layer with random weights."""
    layer = DeformableConv2D(filters, kernel_size, **arguments)
    model = keras.Sequential([keras.Input(shape), layer])
    randomize(layer, rng)
    return model


# --- Layers ---


def layers_to_compare() -> list:
    """24 layers, with "valid", with numbers, and with "same" at any strides and kernel sizes."""
    cases = []
    for index, (arguments, (_, *shape)) in enumerate(random_layers(24, seed=20261128)):
        if index % 3 != 0:  # the others have numbers
            arguments["padding"] = ("same", "valid")[index // 3 % 2]
        arguments["data_format"] = ("channels_last", "channels_first")[index // 4 % 2]
        last = arguments["data_format"] == "channels_last"
        cases.append((arguments, tuple(shape) if last else (shape[2], *shape[:2])))
    return cases


@pytest.mark.parametrize(("arguments", "shape"), layers_to_compare())
def test_runtimes_compute_what_a_layer_does(arguments, shape, file, rng):
    model = random_model(rng, shape, **arguments)
    for opset in (19, 22):
        export(model, file, opset, verbose=False)
        for batch in (1, 5):
            images = rng.standard_normal((batch, *shape)).astype("float32")
            expected = model(images)
            assert difference(in_onnx_runtime(file, images)[0], expected) <= 1e-5
            assert difference(in_openvino(file, images), expected) <= 1e-5


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "arguments", [{}, {"strides": (2, 3)}, {"strides": (2, 3), "dilation_rate": (2, 1)}], ids=str
)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_height_and_width_may_be_unknown(padding, arguments, data_format, file, rng):
    last = data_format == "channels_last"
    arguments = {"padding": padding, "data_format": data_format, **arguments}
    shape = (None, None, 4) if last else (4, None, None)
    model = random_model(rng, shape, kernel_size=(3, 4), modulated=True, **arguments)
    export(model, file, verbose=False)
    for size in ((9, 8), (12, 14), (5, 4)):
        shape = (2, *size, 4) if last else (2, 4, *size)
        images = rng.standard_normal(shape).astype("float32")
        assert difference(in_onnx_runtime(file, images)[0], model(images)) <= 1e-5
        assert difference(in_openvino(file, images), model(images)) <= 1e-5


def test_offsets_may_be_given(file, rng):
    inputs = [keras.Input((None, None, channels)) for channels in (4, 36, 18)]
    layer = DeformableConv2D(6, 3, strides=2, deform_groups=2, modulated=True, own_offsets=False)
    model = keras.Model(inputs, layer(inputs))
    samples = [rng.standard_normal((2, size, size, c)) for size, c in ((9, 4), (4, 36), (4, 18))]
    samples = [sample.astype("float32") for sample in samples]
    export(model, file, sample_inputs=samples, verbose=False)
    assert difference(in_onnx_runtime(file, *samples)[0], model(samples)) <= 1e-5


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("pads", [[[0, 0], [2, 2], [1, 1]], [[0, 0], [0, 3], [2, 1]]])
def test_padding_of_the_op_may_be_explicit(pads, data_format, file, rng):
    filters = rng.standard_normal((3, 3, 4, 6)).astype("float32")
    nhwc = data_format == "NHWC"
    padding = [*pads, [0, 0]] if nhwc else [[0, 0], *pads]
    height, width = 6 + sum(pads[1]), 5 + sum(pads[2])
    shapes = [(2, 8, 7, 4), (2, height, width, 18)]
    images, offset = (
        rng.standard_normal(shape if nhwc else np.take(shape, [0, 3, 1, 2])).astype("float32")
        for shape in shapes
    )

    @tf.function(input_signature=[Spec(images.shape), Spec(offset.shape)])
    def convolve(images, offset):
        return deform_conv2d(images, filters, offset, padding=padding, data_format=data_format)

    export(convolve, file, verbose=False)
    expected = convolve(images, offset)
    assert difference(in_onnx_runtime(file, images, offset)[0], expected) <= 1e-5


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("channels", [1, 6])
def test_aggregation_is_a_depthwise_convolution_with_filters_of_ones(
    channels, data_format, file, rng
):
    case = random_case(
        rng,
        filters=False,
        size=(9, 8),
        channels=channels,
        deform_groups=channels // 2 or 1,
        kernel=(3, 2),
        strides=(2, 1),
    )
    tensors = case.tensors(tf.float32, data_format=data_format)
    attributes = case.attributes_in(data_format)

    def aggregate(input, offset, weights):
        return deform_aggregate2d(input, offset, weights, **attributes)

    signature = [Spec(tensor.shape) for tensor in tensors.values()]
    export(aggregate, file, input_signature=signature)
    assert nodes(file).count("DeformConv") == 1
    (output,) = in_onnx_runtime(file, *tensors.values())
    assert difference(output, aggregate(**tensors)) <= 1e-5


@pytest.mark.parametrize("size", [(9, 8), (None, None)], ids=str)
@pytest.mark.parametrize("kernel_size", [3, 4])
@pytest.mark.parametrize("strides", [1, 2])
def test_pads_are_equal_on_opposite_sides_as_tensorrt_wants(strides, kernel_size, size, file, rng):
    model = random_model(rng, (*size, 4), 6, kernel_size, strides=strides, padding="same")
    export(model, file, verbose=False)
    (pads,) = [
        onnx.helper.get_node_attr_value(node, "pads")
        for node in onnx.load(file).graph.node
        if node.op_type == "DeformConv"
    ]
    assert pads[:2] == pads[2:]
    # Unequal pads are a node. At a stride of 2, 9 and 8 pixels are padded differently.
    assert ("Pad" in nodes(file)) == (kernel_size == 4 or strides == 2)


def test_file_has_no_more_nodes_than_it_needs(file, rng):
    export(random_model(rng, padding="same"), file, verbose=False)
    assert nodes(file) == ["Transpose", "Conv", "DeformConv", "Add", "Transpose"]


def test_mask_comes_with_a_bias_as_tensorrt_reads_it(file, rng):
    export(random_model(rng, modulated=True), file, verbose=False)
    (inputs,) = [n.input for n in onnx.load(file).graph.node if n.op_type == "DeformConv"]
    assert len(inputs) == 5
    assert "" not in inputs


# --- Types ---


def test_float16_keeps_the_precision_of_float32_offsets(file, rng):
    filters = rng.standard_normal((1, 1, 4, 6)).astype("float16")
    images = rng.standard_normal((1, 4, 600, 4)).astype("float16")
    # A float16 has steps of 0.25 here.
    offset = np.full((1, 4, 600, 2), [0, 300.1], "float32")

    @tf.function(input_signature=[Spec(images.shape, tf.float16), Spec(offset.shape)])
    def convolve(images, offset):
        return deform_conv2d(images, filters, offset)

    export(convolve, file, verbose=False)
    (actual,) = in_onnx_runtime(file, images, offset)
    assert actual.dtype == np.float16
    exact = deform_conv2d(
        *(array.astype("float64") for array in (images, filters, offset)), padding="SAME"
    )
    assert difference(actual, exact) <= 2e-3


def test_layer_may_compute_in_float16(file, rng):
    model = random_model(rng, modulated=True, dtype="mixed_float16")
    assert export(model, file, verbose=False) <= 5e-3


def test_float64_stays(file, rng):
    filters = rng.standard_normal((3, 3, 4, 6))
    signature = [Spec([None, 9, 8, 4], tf.float64), Spec([None, 9, 8, 18], tf.float64)]

    def convolve(images, offset):
        return deform_conv2d(images, filters, offset)

    assert export(convolve, file, input_signature=signature, verbose=False) <= 1e-13


def test_what_onnx_runtime_lacks_is_not_compared(file, rng, capsys):
    assert export(random_model(rng, dtype="float64"), file) is None
    assert "Not compared: " in capsys.readouterr().out
    onnx.checker.check_model(file, full_check=True)


def test_bfloat16_is_refused_since_tf2onnx_takes_it_for_float16(file, rng):
    with pytest.raises(ValueError, match=r"model must have no bfloat16.*Received: Cast "):
        export(random_model(rng, dtype="mixed_bfloat16"), file)


# --- Models and functions ---


def test_model_may_have_several_inputs_and_outputs(file, rng):
    images, offset = keras.Input((9, 8, 4), name="images"), keras.Input((9, 8, 18), name="offset")
    layer = DeformableConv2D(6, 3, padding="same", own_offsets=False)
    outputs = {"sampled": layer([images, offset]), "again": layer([images, -offset])}
    model = keras.Model({"offset": offset, "images": images}, outputs)
    export(model, file, verbose=False)
    inputs = {
        "images": rng.standard_normal((3, 9, 8, 4)).astype("float32"),
        "offset": rng.standard_normal((3, 9, 8, 18)).astype("float32"),
    }
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    assert sorted(names) == ["again", "sampled"]
    expected = model(inputs)
    for name, actual in zip(names, session.run(names, inputs), strict=True):
        assert difference(actual, expected[name]) <= 1e-5


def test_model_may_be_nested(file, rng):
    inner = random_model(rng, padding="same")
    inputs = keras.Input((9, 8, 4))
    outputs = [keras.layers.ReLU()(inner(inputs)), inner.layers[0].offset(inputs)]
    model = keras.Model(inputs, outputs)
    assert export(model, file, verbose=False) <= 1e-5


class Subclassed(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, images, training=False):
        return self.inner(images, training=training)


def test_subclassed_model_is_one_that_was_called(file, rng):
    model = Subclassed(random_model(rng))
    with pytest.raises(ValueError, match="must be built before export"):
        export(model, file)
    model(np.ones((1, 9, 8, 4), "float32"))
    assert export(model, file, verbose=False) <= 1e-5


def test_grouped_convolution_of_keras_is_converted_too(file, rng):
    inputs = keras.Input((9, 8, 4))
    offset = keras.layers.Conv2D(18, 3, groups=2, padding="same")(inputs)
    layer = DeformableConv2D(6, 3, padding="same", own_offsets=False)
    model = keras.Model(inputs, layer([inputs, offset]))
    assert export(model, file, verbose=False) <= 1e-5


def test_function_that_is_compiled_within_another_is_refused(file):
    inputs = keras.Input((9, 8, 4))
    grouped = keras.Model(inputs, keras.layers.Conv2D(6, 3, groups=2)(inputs))
    function, signature = tf.function(grouped), [Spec([1, 9, 8, 4])]
    with pytest.raises(ValueError, match=r"StatefulPartitionedCall \(a function that could not "):
        export(function, file, input_signature=signature)


@pytest.mark.parametrize("opset", [19, 20, 21, 22])
def test_other_layers_have_a_valid_form_in_each_opset(opset, file, rng):
    """tf2onnx itself knows opsets up to 18."""
    layers = [
        DeformableConv2D(6, 3, offset_kernel_initializer="he_normal"),
        keras.layers.DepthwiseConv2D(3, strides=2, padding="same"),
        keras.layers.LayerNormalization(),
        keras.layers.MaxPooling2D(2, padding="same"),
        keras.layers.Conv2DTranspose(4, 3, strides=2, activation="elu"),
        keras.layers.UpSampling2D(2, interpolation="bilinear"),
        keras.layers.AveragePooling2D(2),
        keras.layers.Reshape((5, 20)),
        keras.layers.LSTM(4, return_sequences=True),
        keras.layers.Dense(3, activation="softmax"),
    ]
    model = keras.Sequential([keras.Input((9, 8, 4)), *layers])
    assert export(model, file, opset, verbose=False) <= 1e-5


def test_tensor_that_a_function_captures_is_a_constant(file, rng):
    filters = tf.constant(rng.standard_normal((3, 3, 4, 6)), tf.float32)

    @tf.function
    def convolve(images, offset):
        return deform_conv2d(images, filters, offset)

    signature = [Spec([None, 9, 8, 4]), Spec([None, 9, 8, 18])]
    assert export(convolve, file, input_signature=signature, verbose=False) <= 1e-5
    assert [input.name for input in onnx.load(file).graph.input] == ["images", "offset"]


def test_function_of_a_saved_model_is_one_too(file, rng, tmp_path):
    random_model(rng).export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    assert export(loaded.serve, file, verbose=False) <= 1e-5


@pytest.mark.parametrize("shapes_are_known", [True, False])
def test_branch_says_the_shapes_that_tf2onnx_does_not_know(shapes_are_known, file, rng):
    filters = tf.constant(rng.standard_normal((3, 3, 4, 6)), tf.float32)
    known = tf.ensure_shape if shapes_are_known else (lambda tensor, _: tensor)

    @tf.function(input_signature=[Spec([2, 9, 8, 4]), Spec([2, 9, 8, 18]), Spec([], tf.bool)])
    def convolve(images, offset, twice):
        def branch(scale):
            images_, filters_ = known(images, [2, 9, 8, 4]), known(filters, [3, 3, 4, 6])
            return deform_conv2d(images_, filters_, scale * offset)

        return tf.cond(twice, lambda: branch(2.0), lambda: branch(1.0))

    if shapes_are_known:
        assert export(convolve, file, verbose=False) <= 1e-5
    else:
        with pytest.raises(ValueError, match=r"known number of channels .*tf\.ensure_shape"):
            export(convolve, file)


def test_network_with_deformable_layers_is_converted(file, rng):
    keras.utils.set_random_seed(1)
    network = keras.applications.MobileNetV2((64, 64, 3), weights=None, classifier_activation=None)
    initializer = keras.initializers.RandomNormal(stddev=0.01)
    chosen = ["Conv1", "block_3_project", "Conv_1"]
    model = deformable(network, chosen, modulated=True, offset_kernel_initializer=initializer)
    # As in a trained network, normalization keeps the size of what passes through the layers.
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0
        if isinstance(layer, DeformableConv2D):
            # The last one has images of 2x2 pixels, which larger offsets would leave.
            layer.offset_conv.bias.assign(rng.uniform(-0.5, 0.5, layer.offset_conv.bias.shape))
    images = rng.standard_normal((4, 64, 64, 3)).astype("float32")
    model(images, training=True)
    images = rng.standard_normal((2, 64, 64, 3)).astype("float32")
    first, second = model(images)
    assert difference(first, second) > 0.5
    assert export(model, file, sample_inputs=images, verbose=False) <= 2e-3
    assert nodes(file).count("DeformConv") == 3


# --- What is printed and refused ---


def test_comparison_is_printed(file, rng, capsys):
    model = random_model(rng)
    result = export(model, file)
    assert 0 < result <= 1e-5
    assert capsys.readouterr().out == (
        f"{file}: opset 19. ONNX Runtime {onnxruntime.__version__} differs by {result:.2g} from "
        "the model, on inputs of (2, 9, 8, 4)\n"
    )
    export(model, file, verbose=False)
    assert capsys.readouterr().out == ""


def test_file_is_written_without_onnx_runtime(file, rng, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(random_model(rng), file) is None
    assert "Not compared: onnxruntime is not installed" in capsys.readouterr().out
    monkeypatch.undo()
    in_onnx_runtime(file, np.ones((1, 9, 8, 4), "float32"))


def gradient_of_images(images, offset):
    filters = tf.ones([3, 3, 4, 6])
    with tf.GradientTape() as tape:
        tape.watch(images)
        output = deform_conv2d(images, filters, offset)
    return tape.gradient(output, images)


def test_gradients_have_no_form_in_onnx(file):
    signature = [Spec([2, 9, 8, 4]), Spec([2, 9, 8, 18])]
    with pytest.raises(ValueError, match=r"Received: DeformConv2DGrad \(a gradient; ONNX has inf"):
        export(gradient_of_images, file, input_signature=signature)


@pytest.mark.parametrize("failure", ["conversion", "comparison"])
def test_failure_leaves_what_is_there(failure, file, rng):
    file.write_text("an earlier file")
    if failure == "conversion":
        with pytest.raises(ValueError, match="Received: Betainc"):
            export(unknown_to_onnx, file, input_signature=[Spec([2, 3])])
    else:
        with pytest.raises(ArithmeticError, match=r"differs by .* At most 1e-12 is allowed"):
            export(random_model(rng), file, tolerance=1e-12)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_text() == "an earlier file"


def unknown_to_onnx(matrix):
    return tf.raw_ops.Betainc(a=matrix, b=matrix, x=matrix)


@pytest.mark.parametrize("opset", [18, 23, "19", 19.0, None])
def test_opset_is_one_that_has_deform_conv(opset, file, rng):
    with pytest.raises(ValueError, match="opset must be from 19, the first that has DeformConv, t"):
        export(random_model(rng), file, opset)


@pytest.mark.parametrize("path", [None, 3, b"model.onnx", "", ".", "none/model.onnx"], ids=str)
def test_path_is_that_of_a_file(path, rng):
    with pytest.raises(ValueError, match="path must be that of a file"):
        export(random_model(rng), path)


@pytest.mark.parametrize(
    "signature",
    [None, 3, Spec([1]), {"images": Spec([1])}, [Spec(None)], [[9, 8, 4]]],
    ids=str,
)
def test_function_needs_a_signature_of_known_ranks(signature, file):
    with pytest.raises(ValueError, match=r"input_signature must be a list of tf\.TensorSpec of kn"):
        export(lambda images: images, file, input_signature=signature)


def test_model_is_something_that_can_be_called(file):
    with pytest.raises(ValueError, match=r"model must be a Keras model, .* Received: 'resnet'"):
        export("resnet", file)


def test_channels_are_known(file):
    signature = [Spec([2, 9, 8, None]), Spec([2, 9, 8, 18])]
    with pytest.raises(ValueError, match=r"a known number of channels .*input \[2, 9, 8, -1\]"):
        export(
            lambda images, offset: deform_conv2d(images, tf.ones([3, 3, 4, 6]), offset),
            file,
            input_signature=signature,
        )


def test_sample_inputs_fit(file, rng):
    model = random_model(rng)
    with pytest.raises(ValueError, match=r"an array for each of 1 input\(s\)\. Received: 2"):
        export(model, file, sample_inputs=[np.ones((1, 9, 8, 4))] * 2)
    with pytest.raises(ValueError, match=r"sample_inputs must fit .*d: shape \(1, 9, 9, 4\)"):
        export(model, file, sample_inputs=np.ones((1, 9, 9, 4)))


def test_sample_inputs_have_the_keys_of_the_signature(file):
    inputs = {name: keras.Input((4,), name=name) for name in ("a", "b")}
    model = keras.Model(inputs, keras.layers.Concatenate()([inputs["b"], inputs["a"]]))
    array = np.ones((1, 4), "float32")
    assert export(model, file, sample_inputs={"b": array, "a": array}, verbose=False) == 0
    with pytest.raises(ValueError, match=r"sample_inputs must have the structure .*'b', 'c'"):
        export(model, file, sample_inputs={"b": array, "c": array})


def test_sample_inputs_are_numbers(file, rng):
    with pytest.raises(ValueError, match=r"sample_inputs must be arrays\. Received: 'image'"):
        export(random_model(rng), file, sample_inputs=["image"])


def test_sample_inputs_are_asked_for_where_random_ones_fail(file):
    signature = [Spec([None, None, None, 4]), Spec([None, None, None, 18])]

    def convolve(images, offset):
        return deform_conv2d(images, tf.ones([3, 3, 4, 6]), offset, padding="VALID")

    with pytest.raises(ValueError, match=r"sample_inputs must be given.*\(2, 64, 64, 18\)"):
        export(convolve, file, input_signature=signature)


# --- tf2onnx and Keras themselves ---


def test_export_of_keras_is_right_once_the_module_is_imported(file, rng):
    model = random_model(rng, strides=2, padding="same", modulated=True)
    images = rng.standard_normal((3, 9, 8, 4)).astype("float32")
    expected = model(images)
    model.export(file, format="onnx", opset_version=19, verbose=False)
    assert difference(in_onnx_runtime(file, images)[0], expected) <= 1e-5


def test_export_of_keras_fails_where_the_opset_has_no_deform_conv(file, rng):
    model = random_model(rng)
    model(np.ones((1, 9, 8, 4), "float32"))
    with pytest.raises(ValueError, match=r"DeformConv2D needs opset 19 or .*Received: 15"):
        model.export(file, format="onnx", verbose=False)
    assert not file.exists()


@pytest.mark.parametrize("first", ["", "import tf2onnx"])
def test_export_of_keras_needs_no_import_of_the_module(first, tmp_path):
    program = f"""
import sys
import keras
{first}
from deform_conv.layers import DeformableConv2D
assert ("tf2onnx" in sys.modules) == bool({first!r})
model = keras.Sequential([keras.Input((9, 8, 4)), DeformableConv2D(6, 3)])
model(keras.ops.ones((1, 9, 8, 4)))
model.export(sys.argv[1], format="onnx", opset_version=19, verbose=False)
assert "deform_conv.onnx" not in sys.modules
"""
    file = tmp_path / "model.onnx"
    subprocess.run([sys.executable, "-c", program, file], cwd=PROJECT, check=True)
    assert "DeformConv" in nodes(file)
    onnx.checker.check_model(file, full_check=True)


@pytest.mark.parametrize(("module", "package"), [("onnx", "tf2onnx"), ("openvino", "openvino")])
def test_what_is_not_installed_is_named(module, package):
    program = f"import sys; sys.modules[{package!r}] = None; import deform_conv.{module}"
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert completed.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: deform_conv.{module} needs {package}, which is not installed: "
        f"pip install 'tf-deform-conv[{module}]'"
    )


# --- Portable mode ---


@pytest.mark.parametrize(("arguments", "shape"), layers_to_compare()[::4])
def test_portable_mode_has_no_deform_conv_and_the_same_outputs(arguments, shape, file, rng):
    model = random_model(rng, shape, **arguments)
    with deform_conv.portable():
        export(model, file, verbose=False)
    assert "DeformConv" not in nodes(file)
    images = rng.standard_normal((3, *shape)).astype("float32")
    assert difference(in_onnx_runtime(file, images)[0], model(images)) <= 1e-5


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_height_and_width_may_be_unknown_in_portable_mode_too(padding, file, rng):
    model = random_model(
        rng, (None, None, 4), kernel_size=(3, 4), strides=(2, 3), padding=padding, modulated=True
    )
    with deform_conv.portable():
        export(model, file, verbose=False)
    for size in ((9, 8), (12, 13), (23, 7)):
        images = rng.standard_normal((2, *size, 4)).astype("float32")
        assert difference(in_onnx_runtime(file, images)[0], model(images)) <= 1e-5


# --- OpenVINO ---


@pytest.mark.parametrize("given", ["", "bias", "mask", "bias and mask"])
def test_openvino_reads_deform_conv_of_any_file(given, file, rng):
    shapes = {"X": [2, 4, 9, 8], "W": [6, 4, 3, 3], "offset": [2, 18, 7, 6]}
    if "bias" in given:
        shapes["B"] = [6]
    if "mask" in given:
        shapes["mask"] = [2, 9, 7, 6]
    make = onnx.helper
    names = ["X", "W", "offset", "B" if "B" in shapes else "", "mask" if "mask" in shapes else ""]
    node = make.make_node("DeformConv", names, ["Y"])
    infos = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (shapes | {"Y": [2, 6, 7, 6]}).items()
    ]
    graph = make.make_graph([node], "graph", infos[:-1], infos[-1:])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 19)], ir_version=9), file)
    inputs = [rng.standard_normal(shape).astype("float32") for shape in shapes.values()]
    assert difference(in_openvino(file, *inputs), in_onnx_runtime(file, *inputs)[0]) <= 1e-5
