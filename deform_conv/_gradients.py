"""How gradients of the ops are registered and computed, of first and second order."""

from collections.abc import Callable, Iterable, Sequence

import tensorflow as tf

from ._library import record

_ATTRIBUTES = (
    "strides",
    "padding",
    "explicit_paddings",
    "dilations",
    "deform_groups",
    "data_format",
)


def attributes_of(op, *more: str) -> dict:
    """Attributes that all ops have, and `more`."""
    attributes = {name: op.get_attr(name) for name in (*_ATTRIBUTES, *more)}
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in attributes.items()
    }


def gradient_of(op_type: str):
    """Makes a function the gradient of an op, in place of an earlier one.

    TensorFlow takes one function for each op and keeps it. So it is given one that calls the
    newest, for a reload or a copy of the function's module to take effect.
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


def wanted_gradients(
    op,
    arguments: Sequence[str],
    compute: Callable[..., Iterable],
    apart: str | None = None,
) -> list[tf.Tensor | None]:
    """Gradients of the op's inputs that somebody wants; None for the others.

    Args:
      op: the op.
      arguments: what its inputs are called, in their order; the last ones may be missing.
      compute: takes `want_grad_<argument>` for each argument, and calls the gradient op.
      apart: the argument whose gradient has an op of its own in a graph. A tf.gradients() graph
        does not say what is wanted, but prunes ops whose outputs nobody uses.
    """
    wanted = [
        index
        for index in range(len(op.inputs))
        if index not in (getattr(op, "skip_input_indices", None) or ())
    ]
    parts = [wanted]
    if apart is not None and not hasattr(op, "skip_input_indices"):
        parts = [
            [index for index in wanted if (arguments[index] == apart) == alone]
            for alone in (False, True)
        ]
    gradients = [None] * len(op.inputs)
    for part in parts:
        wants = {f"want_grad_{name}": index in part for index, name in enumerate(arguments)}
        flat = tf.nest.flatten(compute(**wants))
        for index in part:
            gradients[index] = flat[index]
    return gradients


def second_order(
    op, grad_gradients, arguments: Sequence[str], reference: Callable[..., tf.Tensor]
) -> list[tf.Tensor]:
    """Gradients of the inputs of a gradient op, from those of its outputs.

    Differentiates the gradients of `reference`, which computes the output in TensorFlow's own ops
    from the arguments; they are as those of wanted_gradients().
    """
    rank = len(op.get_attr("data_format"))
    # Tensors of a known rank, each read once: in a tf.compat.v1 loop, every read of op.inputs gives
    # another one.
    *values, grad_output = [tf.ensure_shape(tensor, [None] * rank) for tensor in op.inputs]
    wanted = [
        index
        for index, name in enumerate(arguments[: len(values)])
        if op.get_attr(f"want_grad_{name}")
    ]
    with tf.GradientTape() as second:
        second.watch([*values, grad_output])
        with tf.GradientTape() as first:
            first.watch(values)
            output = reference(*values)
        gradients = first.gradient(
            output, [values[index] for index in wanted], output_gradients=grad_output
        )
    return second.gradient(
        gradients,
        [*values, grad_output],
        output_gradients=[grad_gradients[index] for index in wanted],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
