"""ONNX: `export` writes models that hold `deform_conv2d` with ONNX's own op for it, `DeformConv`.

tf2onnx by itself knows the op once both it and `deform_conv` are imported, so that Keras's
`model.export(path, format="onnx", opset_version=19)` is right too.
"""

import contextlib
import itertools
import logging
import types
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from keras.src.export.export_utils import get_input_signature, make_tf_tensor_spec

from ._arguments import converting, integer_or_none, shown
from ._files import path_of_a_file, replacing
from ._layer_arguments import positive_number
from ._offset_convolution import takes_empty

try:
    import onnx
    import tf2onnx

    from ._onnx_op import IR_VERSIONS
except ModuleNotFoundError as error:
    if error.name not in ("onnx", "tf2onnx"):
        raise
    raise ModuleNotFoundError(
        f"deform_conv.onnx needs {error.name}, which is not installed: "
        "pip install 'tf-deform-conv[onnx]'",
        name=error.name,
    ) from None

__all__ = ["export"]

# Why an op that users may meet has no form in ONNX.
_REASONS = {
    "DeformAggregate2DGrad": "a gradient; ONNX has inference only",
    "DeformConv2DGrad": "a gradient; ONNX has inference only",
    "PartitionedCall": "a function that could not be inlined",
    "StatefulPartitionedCall": "a function that could not be inlined, perhaps because of "
    "jit_compile=True",
}

_FLOAT16 = onnx.TensorProto.FLOAT16


def export(
    model,
    path,
    opset: int = 19,
    *,
    input_signature=None,
    sample_inputs=None,
    tolerance: float | None = None,
    verbose: bool = True,
) -> float | None:
    """Writes a model as an ONNX file, with a `DeformConv` for each deformable convolution.

    The result is checked by `onnx.checker` and, where onnxruntime is installed, compared with the
    model. Where that fails, nothing is written.

    In portable mode there are ONNX's older, general ops in place of `DeformConv`.

    Unknown sizes stay unknown: the batch, and height and width. Deformable convolutions in float16
    are computed in float32, between casts, since ONNX would compute positions in 16 bits.

    Args:
      model: a Keras model that is built (a subclassed one that was called), a `tf.function`, or
        another callable that takes tensors. Its inference is exported.
      path: of the file.
      opset: from 19, the first that has `DeformConv`, to 22.
      input_signature: what `model` is called with: a list with a `tf.TensorSpec`, or a structure of
        them, for each argument. None for what a Keras model or a `tf.function` says itself.
      sample_inputs: the arrays to compare on, in the structure of the signature or in one list.
        None for random ones (normal numbers; 0 and 1 for integers), whose batch is 2 and other
        unknown sizes are 64.
      tolerance: the largest difference allowed, relative to the output's largest magnitude. None
        for 1e-2, or 1e-1 for models with float16 in them; single layers reach 1e-6 and 1e-3.
      verbose: whether to print what was compared.

    Returns:
      The largest difference, relative as `tolerance`; None where nothing could be compared:
      onnxruntime is not installed, or has no implementation of one of the ops.

    Raises:
      ValueError: an argument does not fit, or `model` has an op without a form in ONNX.
      onnx.checker.ValidationError: the result is no valid ONNX.
      ArithmeticError: the outputs differ by more than `tolerance`.

    Example:
      >>> layer = DeformableConv2D(16, 3, padding="same")
      >>> model = keras.Sequential([keras.Input((None, None, 3)), layer])
      >>> difference = deform_conv.onnx.export(model, "model.onnx")
      model.onnx: opset 19. ONNX Runtime 1.32.0 differs by 2.4e-07 from the model, on inputs of
      (2, 64, 64, 3)
    """
    if integer_or_none(opset, "opset") not in IR_VERSIONS:
        first, *_, last = IR_VERSIONS
        raise ValueError(
            f"opset must be from {first}, the first that has DeformConv, to {last}. "
            f"Received: {shown(opset)}"
        )
    if tolerance is not None:
        tolerance = positive_number(tolerance, "tolerance")
    path = path_of_a_file(path)
    signature = _signature(model, input_signature)
    proto = _converted(model, signature, opset)
    onnx.checker.check_model(proto, full_check=True)
    difference, comparison = _compare(proto, model, signature, sample_inputs)
    if difference is not None:
        if tolerance is None:
            tolerance = 1e-1 if _has_float16(proto.graph) else 1e-2
        if not difference <= tolerance:  # NaN is none either
            raise ArithmeticError(f"{comparison}. At most {tolerance:.2g} is allowed")

    with replacing(path) as file:
        onnx.save(proto, file)
    if verbose:
        print(f"{path}: opset {opset}. {comparison}")
    return difference


def _signature(model, given) -> list:
    """What `model` is called with: a `tf.TensorSpec`, or a structure of them, per argument."""
    if not callable(model):
        raise ValueError(
            f"model must be a Keras model, a tf.function or a callable. Received: {shown(model)}"
        )
    if given is None and isinstance(model, keras.Model):
        given = keras.tree.map_structure(make_tf_tensor_spec, get_input_signature(model))
    elif given is None:
        given = getattr(model, "input_signature", None)  # of a tf.function
    specs = tf.nest.flatten(given)
    if not isinstance(given, list | tuple) or not all(
        isinstance(spec, tf.TensorSpec) and spec.shape.rank is not None for spec in specs
    ):
        raise ValueError(
            "input_signature must be a list of tf.TensorSpec of known rank, or of structures of "
            f"them; only Keras models and some functions have one. Received: {shown(given)}"
        )
    return list(given)


# --- Conversion ---


def _converted(model, signature: list, opset: int) -> onnx.ModelProto:
    function = tf.function(model, input_signature=signature, autograph=False)
    token = takes_empty.set(False)
    try:
        concrete = function.get_concrete_function()
    finally:
        takes_empty.reset(token)
    _check_types(concrete.graph.as_graph_def())
    for op in concrete.graph.get_operations():
        # Keras has XLA compile a grouped convolution on a CPU, and such a call is not inlined.
        if op.type.endswith("PartitionedCall"):
            op._clear_attr("_XlaMustCompile")
    with _logged_errors() as errors:
        proto, _ = tf2onnx.convert.from_function(
            types.SimpleNamespace(get_concrete_function=lambda *_: concrete),
            signature,
            opset=opset,
        )
    if leftover := sorted(_unknown_ops(proto.graph, opset)):
        names = [f"{name} ({_REASONS[name]})" if name in _REASONS else name for name in leftover]
        causes = "".join(f"; {error}" for error in dict.fromkeys(map(str, errors)))
        raise ValueError(
            f"model must have only operations with a form in ONNX. Received: {', '.join(names)}"
            f"{causes}"
        )
    _inline_captured(proto.graph, concrete)
    return proto


def _check_types(graph_def) -> None:
    functions = [function.node_def for function in graph_def.library.function]
    for node in [node for nodes in (graph_def.node, *functions) for node in nodes]:
        if any(attribute.type == tf.bfloat16.as_datatype_enum for attribute in node.attr.values()):
            raise ValueError(
                "model must have no bfloat16, which tf2onnx takes for float16: give its weights to "
                f"a model in float32. Received: {node.op} {node.name}"
            )


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[Exception]]:
    """Collects the exceptions that tf2onnx logs while it goes on, in place of printing them."""
    errors = []
    handler = logging.Handler()
    handler.emit = lambda record: errors.extend(
        [record.exc_info[1]] if record.exc_info and record.levelno >= logging.ERROR else []
    )
    logger = logging.getLogger(tf2onnx.__name__)
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield errors
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def _unknown_ops(graph: onnx.GraphProto, opset: int) -> set[str]:
    """The ops that are none of ONNX's: tf2onnx leaves those in place that it cannot convert."""
    unknown = set()
    for node in graph.node:
        if node.domain or not onnx.defs.has(node.op_type, opset):
            unknown.add(node.op_type)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                unknown |= _unknown_ops(body, opset)
    return unknown


def _inline_captured(graph: onnx.GraphProto, concrete) -> None:
    """Makes constants of what the function captured; tf2onnx makes inputs of tensors."""
    captured = concrete.captured_inputs
    inner = concrete.inputs[len(concrete.inputs) - len(captured) :]
    values = {tensor.name: value for tensor, value in zip(inner, captured, strict=True)}
    for input in [input for input in graph.input if input.name in values]:
        value = values[input.name].numpy()
        graph.initializer.append(onnx.numpy_helper.from_array(value, input.name))
        graph.input.remove(input)


# --- Comparison ---


def _has_float16(graph: onnx.GraphProto) -> bool:
    types = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    return _FLOAT16 in (*types, *(constant.data_type for constant in graph.initializer))


def _compare(proto, model, signature: list, sample_inputs) -> tuple[float | None, str]:
    """The largest difference between ONNX Runtime and `model`, and a sentence about it."""
    samples = _samples(signature, sample_inputs)
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None, "Not compared: onnxruntime is not installed"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        return None, f"Not compared: {error}"
    shapes = ", ".join(str(sample.shape) for sample in samples)
    tensors = map(tf.constant, samples)
    try:
        outputs = model(*tf.nest.pack_sequence_as(signature, list(tensors)))
    except Exception as error:
        if sample_inputs is not None:
            raise
        raise ValueError(
            f"sample_inputs must be given for this model, which fails on random inputs of {shapes}"
        ) from error
    names = [input.name for input in session.get_inputs()]
    actual = session.run(None, dict(zip(names, samples, strict=True)))
    expected = [output for output in tf.nest.flatten(outputs) if output is not None]
    difference = max(itertools.starmap(_difference, zip(actual, expected, strict=True)))
    return difference, (
        f"ONNX Runtime {onnxruntime.__version__} differs by {difference:.2g} from the model, on "
        f"inputs of {shapes}"
    )


def _samples(signature: list, given) -> list[np.ndarray]:
    specs = tf.nest.flatten(signature)
    if given is None:
        rng = np.random.default_rng(0)
        return [_random(spec, rng) for spec in specs]
    keys = [each.keys() for each in signature if isinstance(each, dict)]
    if isinstance(given, dict) and [given.keys()] != keys:
        raise ValueError(
            "sample_inputs must have the structure of the signature, "
            f"{shown(signature)}, or be one list. Received: a dict of {shown(list(given))}"
        )
    arrays = tf.nest.flatten(given)
    if len(arrays) != len(specs):
        raise ValueError(
            f"sample_inputs must have an array for each of {len(specs)} input(s). "
            f"Received: {len(arrays)}"
        )
    samples = []
    for array, spec in zip(arrays, specs, strict=True):
        with converting(
            lambda array=array: f"sample_inputs must be arrays. Received: {shown(array)}"
        ):
            sample = np.asarray(array, spec.dtype.as_numpy_dtype)
        if not spec.shape.is_compatible_with(sample.shape):
            raise ValueError(
                f"sample_inputs must fit {shown(spec)}. Received: shape {sample.shape}"
            )
        samples.append(sample)
    return samples


def _random(spec: tf.TensorSpec, rng) -> np.ndarray:
    shape = [
        (2 if axis == 0 else 64) if size is None else size for axis, size in enumerate(spec.shape)
    ]
    numbers = rng.standard_normal(shape) if spec.dtype.is_floating else rng.integers(0, 2, shape)
    return numbers.astype(spec.dtype.as_numpy_dtype)


def _difference(actual, expected) -> float:
    """The largest difference, relative to the largest magnitude in `expected`."""
    actual, expected = (np.asarray(value).astype(np.float64) for value in (actual, expected))
    if actual.shape != expected.shape:
        return np.inf
    difference, scale = (
        float(np.max(np.abs(value), initial=0)) for value in (actual - expected, expected)
    )
    return difference / scale if scale else difference
