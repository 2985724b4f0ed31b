"""The Keras layer: made with random and wrong settings, and called in several ways."""

import re

import keras
import numpy as np
import tensorflow as tf
from op_calls import Call
from op_cases import Case
from op_changes import LAYER_NAMES
from op_oracle import results
from op_values import resolved
from op_verdicts import RIGHT, Verdict, names_one_of, of_error

from deform_conv.layers import DeformableConv2D


def _verdict_on_error(case, error, fits, inputs) -> Verdict:
    if case.blamed == () and _conv2d_raises(case, type(error), inputs):
        return Verdict("refused", f"as a Conv2D is: {error}")
    verdict = of_error(error, case.blamed or (), must_fit=fits)
    # Keras writes names in its own way: Input 0, `inputs`, ndim.
    unnamed = not names_one_of(str(error), LAYER_NAMES, re.IGNORECASE)
    if verdict.outcome == "refused" and not case.blamed and unnamed:
        return Verdict("error that names no argument", verdict.detail)
    return verdict


def _conv2d_raises(case, kind, inputs) -> bool:
    """Whether Keras's own layer refuses the same in the same way."""
    ours = ("deform_groups", "modulated", "mask_scale", "own_offsets", "offset_trainable",
            "offset_kernel_initializer")  # fmt: skip
    settings = {n: resolved(v) for n, v in case.attributes.items() if n not in ours}
    settings["kernel_initializer"] = case.attributes["offset_kernel_initializer"]
    try:
        keras.layers.Conv2D(**settings)(inputs)
    except kind:
        return True
    except Exception:
        return False
    return False


def _inputs(call):
    """What the layer is called with: one tensor, or a list."""
    values = {**call.others, **call.tensors}
    inputs = [values[name] for name in ("input", "offset", "mask") if name in values]
    count = call.case.more.get("count")
    if count is not None:
        return (inputs * 4)[:count]
    return inputs if len(inputs) > 1 else inputs[0]


def _fits(case, call) -> bool:
    """Whether the call must work: settings and arguments are as they were drawn."""
    return case.blamed is None and not call.others


def layer(case: Case) -> Verdict:
    call = Call(case)
    fits, inputs = _fits(case, call), _inputs(call)
    keras.utils.set_random_seed(case.number)
    try:
        made = DeformableConv2D(**{n: resolved(v) for n, v in case.attributes.items()})
        outputs, gradient = _called(case, made, inputs)
    except Exception as error:
        return _verdict_on_error(case, error, fits, inputs)
    if case.blamed:
        return Verdict("taken though it does not fit", f"output {tuple(outputs.shape)}")
    if case.blamed == () or not fits:
        return RIGHT
    return _compared(case, call, made, outputs, gradient)


def _called(case, made, inputs):
    """The layer's output and, where it is asked for, the kernel's gradient."""
    how, gradient = case.more["call"], None
    if how == "symbolic":
        several = isinstance(inputs, list)
        symbols = [
            keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype.name)
            for tensor in (inputs if several else [inputs])
        ]
        model = keras.Model(symbols, made(symbols if several else symbols[0]))
        return model(inputs), None
    if not case.wanted:
        return (tf.function(made) if how == "function" else made)(inputs), None

    def with_gradient(inputs):
        with tf.GradientTape() as tape:
            outputs = made(inputs)
        if isinstance(outputs, keras.KerasTensor):  # of a KerasTensor, for a functional model
            return outputs, None
        return outputs, tape.gradient(outputs, made.kernel.value)

    if how == "function":
        made(inputs)  # a graph cannot make variables
        with_gradient = tf.function(with_gradient)
    outputs, gradient = with_gradient(inputs)
    return outputs, gradient


def _compared(case, call, made, outputs, gradient) -> Verdict:
    """With what NumPy makes of the layer's own offset and mask, and these of its convolutions."""
    compute = made.compute_dtype
    offset_dtype = "float64" if compute == "float64" else "float32"
    images = call.tensors["input"]
    arrays = {"input": tf.cast(images, compute).numpy()}
    arrays["filters"] = tf.cast(made.kernel.value, compute).numpy()
    if made.own_offsets:
        arrays["offset"] = made.offset(images).numpy()
        if made.modulated:
            arrays["mask"] = made.mask(images).numpy()
        if problem := _offset_problem(case, made, images, arrays["offset"], offset_dtype):
            return problem
    else:
        arrays |= {
            n: call.arrays[n].astype(offset_dtype) for n in ("offset", "mask") if n in call.arrays
        }
    ones = np.ones(outputs.shape)
    expected = results(arrays, compute, case.meaning, ones)
    if problem := expected["output"].difference(outputs, compute):
        return Verdict("wrong result", f"output: {problem}")
    same = gradient is not None and compute == made.variable_dtype
    if same and (problem := expected["grad_filters"].difference(gradient, compute)):
        return Verdict("wrong result", f"gradient by the kernel: {problem}")
    if made.compute_output_shape(_shapes(call)) != tuple(outputs.shape):
        return Verdict(
            "wrong result", f"compute_output_shape {made.compute_output_shape(_shapes(call))}"
        )
    return RIGHT


def _shapes(call):
    shapes = [
        tuple(call.tensors[n].shape) for n in ("input", "offset", "mask") if n in call.tensors
    ]
    return shapes if len(shapes) > 1 else shapes[0]


def _offset_problem(case, made, images, offset, dtype) -> Verdict | None:
    """Whether the offsets are other than a plain convolution's."""
    arrays = {"input": tf.cast(images, dtype).numpy(), "filters": made.offset_conv.kernel.numpy()}
    shape = list(offset.shape)
    shape[1 if case.meaning["data_format"] == "NCHW" else 3] //= made.deform_groups
    arrays["offset"] = np.zeros(shape)
    expected = results(arrays, dtype, case.meaning | {"deform_groups": 1})["output"]
    problem = expected.difference(offset, dtype)
    return Verdict("wrong result", f"offset: {problem}") if problem else None


RUN = {"layer": layer}
