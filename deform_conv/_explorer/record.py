"""What the deformable layers of a model sample with in an image, and from where it comes."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from .._arguments import shown
from .._locations import grid_start, reads, rescaled, sampling_locations
from .._sampling_layer import SamplingLayer, observing


@dataclass(frozen=True)
class SampledLayer:
    """One call of a deformable layer for one image. G are its deformable groups, T its taps.

    Attributes:
      name: the layer's, and which call it is where there are several.
      kind: the layer's class.
      in_size, out_size: (h, w) of its input and its output.
      strides, dilation_rate: (h, w).
      start: where tap (0, 0) of position (0, 0) is without an offset, (h, w) in pixels.
      middle: the middle of the window of position (0, 0), likewise.
      scale, shift: (h, w); place p of the input is shown at `scale * p + shift` in the image.
      taps: (ky, kx) of each tap, `[T, 2]`. One that `remove_center` leaves out is not there.
      offset: (dy, dx) in pixels of the input, `[OH, OW, G, T, 2]`, float64.
      locations: the sampling locations in the input, likewise.
      mask: `[OH, OW, G, T]`; None for a layer without.
      previous: the index of the deformable layer that the input comes from; None for the image.
        Where there are several, the one called last.
    """

    name: str
    kind: str
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    strides: tuple[int, int]
    dilation_rate: tuple[int, int]
    start: tuple[int, int]
    middle: tuple[float, float]
    scale: tuple[float, float]
    shift: tuple[float, float]
    taps: np.ndarray
    offset: np.ndarray
    locations: np.ndarray
    mask: np.ndarray | None
    previous: int | None

    @property
    def groups(self) -> int:
        return self.offset.shape[2]

    @property
    def reads(self) -> np.ndarray:
        """Which samples read something of the input, `[OH, OW, G, T]`."""
        return reads(self.locations, self.in_size)

    def in_image(self, places: np.ndarray) -> np.ndarray:
        """Where places (h, w) of the input are shown in the image."""
        return np.multiply(self.scale, places) + self.shift


@dataclass(frozen=True)
class Recording:
    """An image and the deformable layers that a model calls for it, in the order of their calls.

    `image` is `[H, W, C]`.
    """

    image: np.ndarray
    layers: list[SampledLayer]

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[:2]


@dataclass(frozen=True)
class Level:
    """The samples of one level, S of them.

    Attributes:
      layer: the index of the layer that samples.
      regular: the places without offsets, (h, w) in pixels of the image, `[S, 2]`.
      pixels: the sampling locations, likewise.
      lengths: how far the offsets move them, `[S]` in pixels of the image.
      mask: `[S]`, or None.
      reads: which read something of the layer's input, `[S]`.
    """

    layer: int
    regular: np.ndarray
    pixels: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    reads: np.ndarray


def record(model, image) -> Recording:
    """Runs `model` on `image`, and keeps what its deformable layers sample with.

    Raises:
      ValueError: `model` is no Keras model of one input, or calls no deformable layer of images, or
        calls one within a loop; `image` is none that it takes.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"model must be a Keras model. Received: {shown(model)}")
    images = _images(model, image)
    if not model.built:
        model(images)
    calls = []

    def run(images):
        with observing(lambda *call: calls.append(call)):
            model(images)
        calls[:] = [call for call in calls if call[0].rank == 2]
        for layer, _, outputs in calls:
            _check_call(layer, outputs)
        return [_sampling(layer, inputs) for layer, inputs, _ in calls]

    # A graph, since it tells which layer the input of another one comes from.
    function = tf.function(run, autograph=False)
    graph = function.get_concrete_function(tf.TensorSpec(images.shape, images.dtype))
    if not calls:
        raise ValueError(
            "model must call a deformable layer of images, DeformableConv2D or one of its kin. "
            f"Received: {shown(model)}, which calls none"
        )
    channels_first = calls[0][0].data_format == "channels_first"
    names = _names([layer for layer, _, _ in calls])
    previous = _sources(calls)
    image = np.moveaxis(images[0], 0, -1) if channels_first else images[0]
    layers = []
    for (layer, _, _), arrays, name, source in zip(
        calls, graph(tf.constant(images)), names, previous, strict=True
    ):
        before = None if source is None else layers[source]
        layers.append(
            _sampled_layer(
                layer,
                *arrays,
                name=name,
                previous=source,
                before=before,
                image_size=image.shape[:2],
            )
        )
    return Recording(image, layers)


def sample_levels(
    recording: Recording,
    layer: int,
    position: Sequence[int],
    count: int,
    groups: Sequence[int],
) -> list[Level]:
    """The samples of an output position, level through level down to the image.

    The first level are the samples of `layer` at `position` (y, x). Each next one are the samples
    of the layer that the input comes from, at the output positions nearest to those samples of the
    level before that read something. `groups` has a deformable group for each layer.
    """
    found, positions = [], np.array([position])
    while len(found) < count and layer is not None:
        sampled = recording.layers[layer]
        chosen = (*positions.T, groups[layer])
        locations, offset = (
            array[chosen].reshape(-1, 2) for array in (sampled.locations, sampled.offset)
        )
        found.append(
            Level(
                layer,
                sampled.in_image(locations - offset),
                sampled.in_image(locations),
                np.linalg.norm(offset * sampled.scale, axis=-1),
                None if sampled.mask is None else sampled.mask[chosen].reshape(-1),
                reads(locations, sampled.in_size),
            )
        )
        layer = sampled.previous
        if layer is not None:
            out_size = recording.layers[layer].out_size
            inside = rescaled(locations[found[-1].reads], sampled.in_size, out_size)
            # The pixel whose square the place lies in.
            nearest = np.floor(inside + 0.5).astype(int)
            positions = np.clip(nearest, 0, np.array(out_size) - 1)
    return found


def _images(model: keras.Model, image) -> np.ndarray:
    """The batch of one image that the model is called with."""
    images = real_numbers(image, "image")
    if images.ndim == 3:
        images = images[np.newaxis]
    if images.ndim != 4 or len(images) != 1 or images.size == 0:
        raise ValueError(
            "image must be one image, [H, W, C] or, for a channels-first model, [C, H, W]. "
            f"Received: shape {np.shape(image)}"
        )
    inputs = getattr(model, "inputs", None)
    if inputs:
        if len(inputs) != 1:
            raise ValueError(f"model must have one input. Received: a model of {len(inputs)}")
        batch = inputs[0].shape[0]
        if batch not in (None, 1):
            raise ValueError(f"model must take one image at a time. Received: a model of {batch}")
        if not tf.TensorShape(inputs[0].shape).is_compatible_with(images.shape):
            raise ValueError(
                f"image must have the shape that the model takes, {tuple(inputs[0].shape[1:])}. "
                f"Received: shape {np.shape(image)}"
            )
    return images


def real_numbers(value, argument: str) -> np.ndarray:
    """An array of integers, booleans or float32."""
    try:
        array = np.asarray(value)
    except Exception as error:
        raise ValueError(
            f"{argument} must be an array of real numbers. Received: {shown(value)}"
        ) from error
    if array.dtype == tf.bfloat16.as_numpy_dtype:
        array = array.astype(np.float32)
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"{argument} must be an array of real numbers. Received: dtype {array.dtype}"
        )
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _names(layers: list[SamplingLayer]) -> list[str]:
    """A name for each call, none of them twice."""
    names, counts = [], collections.Counter()
    for index, layer in enumerate(layers):
        namesakes = [other for other in layers if other.name == layer.name]
        name = layer.path if any(other is not layer for other in namesakes) else layer.name
        if sum(other is layer for other in layers) > 1:
            name += f" (call {sum(other is layer for other in layers[: index + 1])})"
        # Layers of a subclassed model may have one path.
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name} (layer {counts[name]})")
    return names


def _sources(calls: list[tuple]) -> list[int | None]:
    """For each call of (layer, inputs, outputs), which call its image comes from, if any does."""
    producers = {outputs.op: index for index, (_, _, outputs) in enumerate(calls)}
    sources = []
    for _, inputs, _ in calls:
        images = inputs[0] if isinstance(inputs, list) else inputs
        waiting, seen, found = [images.op], set(), []
        while waiting:
            operation = waiting.pop()
            if operation in seen:
                continue
            seen.add(operation)
            if operation in producers:
                found.append(producers[operation])
            else:
                waiting.extend(tensor.op for tensor in operation.inputs)
        sources.append(max(found, default=None))
    return sources


def _check_call(layer: SamplingLayer, outputs) -> None:
    if outputs.graph is not tf.compat.v1.get_default_graph():
        raise ValueError(
            f"model must not call {layer.name} within a loop, a condition or a tf.function of its "
            "own: what it samples with is not known outside of that"
        )
    if outputs.shape[0] != 1:
        raise ValueError(
            f"model must call {layer.name} with one image for each image that it is given. "
            f"Received: outputs of shape {outputs.shape}"
        )


def _sampling(layer: SamplingLayer, inputs) -> list[tf.Tensor]:
    """Height and width of the layer's input, its offsets, and its masks if there are some."""
    images, *given = inputs if isinstance(inputs, list) else [inputs]
    if not layer.own_offsets:
        tensors = given
    else:
        mask = layer.mask(images)
        tensors = [layer.offset(images), *([] if mask is None else [mask])]
    images, *tensors = (layer._to_channels_last(tensor) for tensor in (images, *tensors))
    return [tf.shape(images), *tensors]


def _placed(in_size, before: SampledLayer | None, image_size) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift from places in the input of a layer to places in the image.

    An output position of the layer before stands for the middle of its window. Planes of different
    sizes have the same extent.
    """
    scale = np.divide(image_size if before is None else before.out_size, in_size)
    shift = 0.5 * scale - 0.5
    if before is None:
        return scale, shift
    strides = np.array(before.strides)
    return before.scale * strides * scale, before.in_image(before.middle + strides * shift)


def _sampled_layer(
    layer: SamplingLayer, shape, offset, mask=None, *, name, previous, before, image_size
) -> SampledLayer:
    """The record of a call, from what `_sampling` returns for one image."""
    in_size = tuple(int(size) for size in shape[1:3])
    groups, kernel = layer.deform_groups, layer.kernel_size
    attributes = (layer.strides, layer.padding_in("channels_last"), layer.dilation_rate)
    offset = np.asarray(offset[0], np.float64)
    if offset.size == 0:
        raise ValueError(
            f"image must be large enough for {name}, whose input has {in_size} pixels then. "
            f"Received: an output of {offset.shape[:2]}"
        )
    locations = sampling_locations(offset, in_size, kernel, *attributes, groups)
    out_size, taps = offset.shape[:2], np.argwhere(np.ones(kernel))
    kept = np.ones(len(taps), bool)
    if getattr(layer, "remove_center", False):
        kept[len(taps) // 2] = False
    if mask is not None:
        mask = np.asarray(mask[0], np.float64).reshape(*out_size, groups, -1)[..., kept]
    start = grid_start(in_size, kernel, *attributes)
    scale, shift = _placed(in_size, before, image_size)
    return SampledLayer(
        name=name,
        kind=type(layer).__name__,
        in_size=in_size,
        out_size=out_size,
        strides=tuple(layer.strides),
        dilation_rate=tuple(layer.dilation_rate),
        start=tuple(start),
        middle=tuple(start + (np.array(kernel) - 1) * layer.dilation_rate / 2),
        scale=tuple(scale),
        shift=tuple(shift),
        taps=taps[kept],
        offset=offset.reshape(*out_size, groups, -1, 2)[..., kept, :],
        locations=locations.reshape(*out_size, groups, -1, 2)[..., kept, :],
        mask=mask,
        previous=previous,
    )
