"""`deformable`: makes the convolutions of a trained Keras model deformable."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import keras

from ._arguments import shown
from .layers import DeformableConv1D, DeformableConv2D

__all__ = ["deformable"]

_DEFORMABLE = {
    keras.layers.Conv1D: DeformableConv1D,
    keras.layers.Conv2D: DeformableConv2D,
}
_OPTIONS = (
    "deform_groups",
    "modulated",
    "mask_scale",
    "offset_kernel_initializer",
    "offset_trainable",
)


def deformable(
    model: keras.Model,
    layers: str | Sequence[str] | Callable[[keras.layers.Layer], bool] | None = None,
    **options,
) -> keras.Model:
    """Copies `model` with deformable layers in place of `Conv2D` and `Conv1D` layers.

    The copy has the names, weights, dtype policies and trainable flags of the model, and computes
    what the model does until its offsets are trained (unless `options` have it start elsewhere).
    Nested models are copied too, and shared layers stay shared. The model is left as it is. The
    copy is not compiled.

    Layers within other layers, such as in `TimeDistributed` or a nested subclassed model, are
    copied as they are.

    Args:
      model: a built Functional or Sequential model.
      layers: which layers become deformable: a name or a pattern such as "conv5_*_2_conv", a
        sequence of these, or a function that is given a layer and says whether; None for every
        `Conv2D` with a kernel larger than 1x1, and every `Conv1D` with one larger than 1.
      **options: arguments of `DeformableConv2D` and `DeformableConv1D`: `deform_groups`,
        `modulated`, `mask_scale`, `offset_kernel_initializer`, `offset_trainable`.

    Returns:
      A new model, of the class that `keras.models.clone_model` gives.

    Raises:
      ValueError: `model` is another kind of model, or of Keras 2; `layers` choose no layer, or one
        that is neither a `Conv2D` nor a `Conv1D`; or an option does not fit.

    Example:
      >>> model = keras.applications.ResNet50()
      >>> model = deformable(model, "conv5_block*_2_conv", modulated=True)
    """
    _check_is_keras_3(model)
    if not _is_graph(model) or not model.built:
        raise ValueError(
            "model must be a Functional or Sequential model that is built. Received: "
            f"{shown(model)} of type {type(model).__name__}"
        )
    if unknown := set(options).difference(_OPTIONS):
        raise ValueError(
            f"options must be among {', '.join(_OPTIONS)}. Received: {', '.join(sorted(unknown))}"
        )
    originals = list(_descendants(model))
    chosen = _choose(layers, [layer for layer in originals if not _is_graph(layer)])

    def copy_of(layer):
        config = layer.get_config()
        if any(layer is one for one in chosen):
            try:
                return _DEFORMABLE[type(layer)].from_config({**config, **options})
            except TypeError as error:
                # Keras puts the layer's own error into a longer one.
                own = error.__context__
                raise (own if isinstance(own, ValueError) else error) from None
        return type(layer).from_config(config)

    with _taken_for_uncompiled([model, *filter(_is_graph, originals)]):
        copy = keras.models.clone_model(model, clone_function=copy_of, recursive=True)
    _copy_state(model, copy, options.get("offset_trainable"))
    return copy


def _check_is_keras_3(model) -> None:
    """By the names of modules: Keras 2 need not be installed."""
    for cls in type(model).__mro__:
        if re.match(r"(tf_keras|tensorflow\.python\.keras)\b", cls.__module__):
            raise ValueError(
                "model must be one of Keras 3, which `import keras` gives. Received: "
                f"{shown(model)} of type {cls.__module__}.{cls.__name__}, which is Keras 2"
            )


def _is_graph(layer: keras.layers.Layer) -> bool:
    """Whether `layer` is a Functional or Sequential model, which Keras can take apart."""
    return isinstance(layer, keras.Model) and isinstance(layer, keras.Sequential | keras.Function)


def _descendants(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The layers of `model` and those of the models nested in it."""
    for layer in model.layers:
        yield layer
        if _is_graph(layer):
            yield from _descendants(layer)


def _choose(layers, candidates: list[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """Those of `candidates` that the argument `layers` of `deformable` means."""
    convolutions = [layer for layer in candidates if type(layer) in _DEFORMABLE]
    if layers is None:
        choices = {"None": [layer for layer in convolutions if max(layer.kernel_size) > 1]}
    elif callable(layers) and not isinstance(layers, keras.layers.Layer | type):
        choices = {shown(layers): [layer for layer in candidates if layers(layer)]}
    else:
        choices = {
            repr(pattern): [layer for layer in candidates if fnmatchcase(layer.name, pattern)]
            for pattern in _patterns(layers)
        }
    for choice, matches in choices.items():
        if not matches:
            names = ", ".join(layer.name for layer in convolutions) or "none"
            raise ValueError(
                f"layers must choose from the model's Conv1D and Conv2D layers, {names}. Received: "
                f"{choice}, which matches no layer"
            )
        for layer in matches:
            if type(layer) not in _DEFORMABLE:
                raise ValueError(
                    f"layers must choose Conv1D and Conv2D layers only. Received: {choice}, which "
                    f"chooses {layer.name} of type {type(layer).__name__}"
                )
    return [layer for matches in choices.values() for layer in matches]


def _patterns(layers) -> list[str]:
    patterns = [layers] if isinstance(layers, str) else layers
    if isinstance(patterns, Sequence) and patterns and all(isinstance(p, str) for p in patterns):
        return list(patterns)
    raise ValueError(
        "layers must be None, a function, or one or more names or patterns. Received: "
        f"{shown(layers)}"
    )


@contextlib.contextmanager
def _taken_for_uncompiled(models: list[keras.Model]) -> Iterator[None]:
    """Keeps `clone_model` from compiling the copies, which would make a new optimizer for each."""
    compiled = [model for model in models if model.compiled]
    try:
        for model in compiled:
            model.compiled = False
        yield
    finally:
        for model in compiled:
            model.compiled = True


def _copy_state(
    source: keras.layers.Layer, target: keras.layers.Layer, offset_trainable: bool | None
) -> None:
    """Gives `target` the trainable flags and the weights of `source`."""
    target.trainable = source.trainable  # of all layers within too, so those come after
    if _is_graph(source):
        for layer in source.layers:
            # An unnamed Input has another name in the copy.
            if not isinstance(layer, keras.layers.InputLayer):
                _copy_state(layer, target.get_layer(layer.name), offset_trainable)
        return
    # The variables of a deformable layer are those of the plain one and, after them, the offsets'.
    same = type(source) is type(target)
    for variable, its_copy in zip(source.variables, target.variables, strict=same):
        its_copy.assign(variable)
        its_copy.trainable = variable.trainable
    if not same and offset_trainable is not None:
        target.offset_trainable = offset_trainable
