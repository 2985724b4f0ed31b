"""`deform_conv2d`: deformable convolution as a TensorFlow op, with its gradients."""

import contextlib
import operator
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from ._library import check_xla, record
from ._reference import deform_conv2d_reference

__all__ = ["deform_conv2d"]

_ops = record.ops

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
    no mask it is `tf.nn.conv2d`.

    The input, extended with zeros, is sampled bilinearly; a sample at (h, w) counts if
    -1 < h < H and -1 < w < W, and is 0 otherwise (also for NaN and infinite offsets), as are the
    gradients through it. At integer positions the gradient with respect to the offset is the one
    towards +.

    There are `C / filters.shape[2]` convolution groups, as in `tf.nn.conv2d`, and `deform_groups`
    groups of consecutive input channels, each with offsets and a mask of its own.

    Gradients with respect to input, filters, offset and mask are registered; only those that are
    asked for are computed. Second-order gradients work too, in pure TensorFlow, so slowly.

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
    if data_format not in ("NHWC", "NCHW"):
        raise ValueError(f"data_format must be 'NHWC' or 'NCHW'; received {data_format!r}")
    check_xla()
    with tf.name_scope(name or "DeformConv2D"):
        input = tf.convert_to_tensor(input, name="input")
        if input.dtype not in _OFFSET_DTYPES:
            raise ValueError(
                f"input must be float32, float64, float16 or bfloat16; received {input.dtype.name}"
            )
        filters = _to_tensor(filters, "filters", (input.dtype,))
        offset = _to_tensor(offset, "offset", _OFFSET_DTYPES[input.dtype])
        masks = [] if mask is None else [_to_tensor(mask, "mask", (offset.dtype,))]
        return _ops.deform_conv2d(
            input=input,
            filters=filters,
            offset=offset,
            mask=masks,
            strides=_per_dimension(strides, "strides", data_format),
            dilations=_per_dimension(dilations, "dilations", data_format),
            deform_groups=_integer(deform_groups, "deform_groups"),
            data_format=data_format,
            **_padding_attributes(padding),
        )


def _to_tensor(value, argument: str, dtypes: Sequence[tf.DType]) -> tf.Tensor:
    """Converts `value` to a tensor of one of `dtypes`; Python numbers become the first."""
    if not hasattr(value, "dtype"):
        value = tf.convert_to_tensor(value, dtypes[0], name=argument)
    tensor = tf.convert_to_tensor(value, name=argument)
    if tensor.dtype not in dtypes:
        expected = " or ".join(dtype.name for dtype in dtypes)
        raise ValueError(f"{argument} must be {expected} here; received {tensor.dtype.name}")
    return tensor


def _integer(value, argument: str) -> int:
    # bool is an int to Python, but not one anybody means here.
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
            if abs(number) < 2**63:
                return number
    raise ValueError(f"{argument} must be an integer; received {value!r}")


def _per_dimension(value, argument: str, data_format: str) -> list[int]:
    """One number, (h, w) or four numbers, as four in the order of `data_format`."""
    if isinstance(value, tf.Tensor):
        static = tf.get_static_value(value)
        if static is None:
            raise ValueError(
                f"{argument} must be known while the graph is made; received {value!r}"
            )
        value = static
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = list(value) if isinstance(value, Sequence) else [value]
    numbers = [_integer(number, argument) for number in values]
    if len(numbers) == 4:
        return numbers
    if len(numbers) not in (1, 2):
        raise ValueError(f"{argument} must be 1, 2 or 4 integers; received {value!r}")
    h, w = numbers[0], numbers[-1]
    return [1, h, w, 1] if data_format == "NHWC" else [1, 1, h, w]


def _padding_attributes(padding) -> dict:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f"padding must be 'SAME', 'VALID' or four pairs of integers; received {padding!r}"
            )
        return {"padding": padding}
    try:
        pairs = [tuple(pair) for pair in padding]
    except TypeError:
        pairs = []
    if len(pairs) != 4 or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"padding must be 'SAME', 'VALID' or four pairs of integers; received {padding!r}"
        )
    explicit = [_integer(number, "padding") for pair in pairs for number in pair]
    return {"padding": "EXPLICIT", "explicit_paddings": explicit}


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
    """Gradients of the op's inputs: input, filters, offset and, if there is one, mask."""
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
        outputs = _ops.deform_conv2d_grad(
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
def _deform_conv2d_grad_grad(op, *grad_gradients):
    """Second order: differentiates the gradients of the pure TensorFlow reference."""
    # Tensors of a known rank, each read once: in a tf.compat.v1 loop, every read of op.inputs gives
    # another one.
    *arguments, grad_output = [tf.ensure_shape(tensor, [None] * 4) for tensor in op.inputs]
    attributes = _attributes(op)
    explicit = attributes.pop("explicit_paddings")
    if attributes["padding"] == "EXPLICIT":
        attributes["padding"] = [explicit[index : index + 2] for index in range(0, 8, 2)]
    wanted = [
        index
        for index, name in enumerate(_GRADIENTS[: len(arguments)])
        if op.get_attr(f"want_{name}")
    ]
    with tf.GradientTape() as second:
        second.watch([*arguments, grad_output])
        with tf.GradientTape() as first:
            first.watch(arguments)
            output = deform_conv2d_reference(*arguments, **attributes)
        gradients = first.gradient(
            output, [arguments[index] for index in wanted], output_gradients=grad_output
        )
    return second.gradient(
        gradients,
        [*arguments, grad_output],
        output_gradients=[grad_gradients[index] for index in wanted],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
