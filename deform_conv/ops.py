"""`deform_conv2d`: deformable convolution as a TensorFlow op, with its gradients."""

from collections.abc import Sequence

import tensorflow as tf
import wrapt

from ._arguments import (
    check_filters_order,
    integer,
    padding_attributes,
    per_dimension,
    shown,
    to_tensor,
)
from ._library import check_xla, record
from ._portable import deform_conv_portable, in_portable_mode, reference_of_op

__all__ = ["deform_conv2d"]

_ops = getattr(record, "ops", None)  # None in a process that is in portable mode

# Positions and sums are in float32 for 16-bit types, so these may have float32 offsets and masks.
_OFFSET_DTYPES = {
    tf.float32: (tf.float32,),
    tf.float64: (tf.float64,),
    tf.float16: (tf.float16, tf.float32),
    tf.bfloat16: (tf.bfloat16, tf.float32),
}


def deform_conv2d(
    input,
    filters,
    offset,
    mask=None,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
    dilations: int | Sequence[int] = 1,
    deform_groups: int = 1,
    data_format: str = "NHWC",
    name: str | None = None,
) -> tf.Tensor:
    """Convolves `input` with `filters`, taking each sample where `offset` moves it.

    Version 1 of Dai et al., Deformable Convolutional Networks, arXiv:1703.06211; with `mask`
    version 2 of Zhu et al., Deformable ConvNets v2, arXiv:1811.11168. With an offset of zeros and
    no mask it is `tf.nn.conv2d`, where the input is finite.

    The input, extended with zeros, is sampled bilinearly; a sample at (h, w) counts if
    -1 < h < H and -1 < w < W, and is 0 otherwise (also for NaN and infinite offsets), as are the
    gradients through it. At integer positions where a sample counts, the gradient with respect to
    the offset is the one towards +; at exactly -1 it is 0. A sample reads all four pixels around
    it, and is NaN where one that has the weight 0 is NaN or infinite.

    There are `C / filters.shape[2]` convolution groups, as in `tf.nn.conv2d`, and `deform_groups`
    groups of consecutive input channels, each with offsets and a mask of its own.

    Gradients with respect to input, filters, offset and mask are registered; only those that are
    asked for are computed. Second-order gradients work too, in pure TensorFlow, so slowly. Within
    `deform_conv.portable()`, TensorFlow's own ops compute everything.

    Args:
      input: `[N, H, W, C]`, or `[N, C, H, W]` for data_format "NCHW"; float32, float64, float16 or
        bfloat16.
      filters: `[KH, KW, C / groups, O]` in both data formats; dtype of `input`.
      offset: `[N, OH, OW, 2 * deform_groups * KH * KW]`, or `[N, 2 * deform_groups * KH * KW, OH,
        OW]`; in pixels. Channel `((g * KH + ky) * KW + kx) * 2` moves the sample of tap (ky, kx)
        in group g down, the channel after it right. Dtype of `input`, or float32 beside a 16-bit
        input (a float16 cannot tell an offset of 128.0 from one of 128.05).
      mask: `[N, OH, OW, deform_groups * KH * KW]`, or `[N, deform_groups * KH * KW, OH, OW]`;
        channel `(g * KH + ky) * KW + kx` scales the sample of that tap. Dtype of `offset`. None
        for version 1.
      strides: one number, (h, w), or four numbers in the order of `data_format`.
      padding: "SAME", "VALID", or four pairs in the order of `data_format`, as `tf.nn.conv2d`
        takes them: `[[0, 0], [top, bottom], [left, right], [0, 0]]` for "NHWC".
      dilations: as `strides`.
      deform_groups: number of deformable groups; divides C.
      data_format: "NHWC" or "NCHW".
      name: a name for the operation.

    Returns:
      `[N, OH, OW, O]`, or `[N, O, OH, OW]`; dtype of `input`. OH and OW are those of
      `tf.nn.conv2d`.

    Raises:
      ValueError: an argument has the wrong form or dtype, or a static shape does not fit.
      tf.errors.InvalidArgumentError: a shape that is known at run time only does not fit. Either
        names the argument, what is expected and what was received.
      RuntimeError: called under `jit_compile=True`, and the library of XLA kernels is missing.

    Example:
      >>> images = tf.random.normal([8, 28, 28, 3])
      >>> filters = tf.random.normal([3, 3, 3, 16])
      >>> offset = tf.random.normal([8, 28, 28, 2 * 3 * 3])
      >>> deform_conv2d(images, filters, offset).shape
      TensorShape([8, 28, 28, 16])
    """
    _check_data_format(data_format, ("NHWC", "NCHW"))
    _check_name(name)
    if in_portable_mode():
        compute = deform_conv_portable
    else:
        check_xla()
        compute = _ops.deform_conv2d
    with tf.name_scope(name or "DeformConv2D"):
        return compute(
            **_op_arguments(
                *(input, filters, offset, mask),
                *(strides, padding, dilations, deform_groups, data_format),
            )
        )


def _check_data_format(data_format, allowed: tuple[str, str]) -> None:
    if not isinstance(data_format, str) or data_format not in allowed:
        raise ValueError(
            f"data_format must be {allowed[0]!r} or {allowed[1]!r}; received {shown(data_format)}"
        )


def _check_name(name) -> None:
    if not isinstance(name, str | None):
        raise ValueError(f"name must be a string or None; received {shown(name)}")


def _op_arguments(
    input, filters, offset, mask, strides, padding, dilations, deform_groups, data_format
) -> dict:
    """Inputs and attributes of the op for two or three axes, checked but for shapes."""
    input = to_tensor(input, "input", tuple(_OFFSET_DTYPES))
    dtype, offset_dtypes = input.dtype, _OFFSET_DTYPES[input.dtype]
    filters = to_tensor(filters, "filters", (dtype,), hint=dtype)
    offset = to_tensor(offset, "offset", offset_dtypes, hint=dtype)
    masks = []
    if mask is not None:
        masks = [to_tensor(mask, "mask", (offset.dtype,), hint=offset.dtype)]
    deform_groups = integer(deform_groups, "deform_groups")
    check_filters_order(input, filters, offset, deform_groups, data_format)
    return {
        "input": input,
        "filters": filters,
        "offset": offset,
        "mask": masks,
        "strides": per_dimension(strides, "strides", data_format),
        "dilations": per_dimension(dilations, "dilations", data_format),
        "deform_groups": deform_groups,
        "data_format": data_format,
        **padding_attributes(padding, data_format),
    }


# --- Gradients ---

_ATTRIBUTES = (
    "strides",
    "padding",
    "explicit_paddings",
    "dilations",
    "deform_groups",
    "data_format",
)
_GRADIENTS = ("grad_input", "grad_filters", "grad_offset", "grad_mask")


def _attributes(op) -> dict:
    attributes = {name: op.get_attr(name) for name in _ATTRIBUTES}
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in attributes.items()
    }


def _gradient_of(op_type: str):
    """Makes a function the gradient of an op, in place of an earlier one.

    TensorFlow takes one function for each op and keeps it. So it is given one that calls the
    newest, for a reload or a copy of this module to take effect.
    """

    def register(function):
        gradients = record.gradients
        with record.lock:
            if op_type not in gradients:

                @tf.RegisterGradient(op_type)
                def newest(op, *grad_outputs):
                    return gradients[op_type](op, *grad_outputs)

            gradients[op_type] = function
        return function

    return register


@_gradient_of("DeformConv2D")
def _deform_conv2d_grad(op, grad_output):
    return first_order(op, grad_output, _ops.deform_conv2d_grad)


def first_order(op, grad_output, compute):
    """Gradients of the op's inputs: input, filters, offset and, if there is one, mask.

    `compute` is the op that computes them.
    """
    wanted = [
        index
        for index in range(len(op.inputs))
        if index not in (getattr(op, "skip_input_indices", None) or ())
    ]
    if hasattr(op, "skip_input_indices"):
        parts = [wanted]
    else:
        # A tf.gradients() graph does not say what is wanted, but prunes ops whose outputs nobody
        # uses. Filters have an op of their own, so that a frozen layer does not pay for them.
        parts = [[index for index in wanted if index != 1], [1]]
    input, filters, offset, *mask = op.inputs
    gradients = [None] * len(op.inputs)
    for part in parts:
        outputs = compute(
            input=input,
            filters=filters,
            offset=offset,
            mask=mask,
            grad_output=grad_output,
            **{f"want_{name}": index in part for index, name in enumerate(_GRADIENTS)},
            **_attributes(op),
        )
        flat = tf.nest.flatten(outputs)
        for index in part:
            gradients[index] = flat[index]
    return gradients


@_gradient_of("DeformConv2DGrad")
def second_order(op, *grad_gradients):
    """Second order: differentiates the gradients of the pure TensorFlow reference."""
    attributes = _attributes(op)
    rank = len(attributes["data_format"])
    # Tensors of a known rank, each read once: in a tf.compat.v1 loop, every read of op.inputs gives
    # another one.
    *arguments, grad_output = [tf.ensure_shape(tensor, [None] * rank) for tensor in op.inputs]
    wanted = [
        index
        for index, name in enumerate(_GRADIENTS[: len(arguments)])
        if op.get_attr(f"want_{name}")
    ]
    with tf.GradientTape() as second:
        second.watch([*arguments, grad_output])
        with tf.GradientTape() as first:
            first.watch(arguments)
            input, filters, offset, *mask = arguments
            output = reference_of_op(input, filters, offset, mask, **attributes)
        gradients = first.gradient(
            output, [arguments[index] for index in wanted], output_gradients=grad_output
        )
    return second.gradient(
        gradients,
        [*arguments, grad_output],
        output_gradients=[grad_gradients[index] for index in wanted],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )


# --- ONNX ---


@wrapt.when_imported("tf2onnx")
def _teach_tf2onnx(_):
    """Gives tf2onnx the op, whoever imports it: Keras does so after it has traced a model."""
    from . import _onnx_op  # noqa: F401
