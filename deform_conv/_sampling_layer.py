"""What layers share that compute where they sample their inputs."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from ._arguments import DATA_FORMATS, LETTERS, shown
from ._layer_arguments import boolean, dtype_policy, one_of, tensor

_KERAS_FORMATS = ("channels_last", "channels_first")
_INPUTS = {1: "sequences", 2: "images"}
_COMPUTE_DTYPES = ("float32", "float64", "float16", "bfloat16")

_observer = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observing(observer: Callable) -> Iterator[None]:
    """A context in which `observer(layer, inputs, outputs)` is told of each call of such a layer.

    So it finds the layers of any model, wherever they are in it.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


class SamplingLayer:
    """The part of a layer that is about its offsets and masks; it stands before Keras's class.

    The layer has `rank` axes, `data_format` and `deform_groups`, as its first `input_spec` that of
    its images (in one dimension, sequences), `own_offsets` if it may be without, and `_samples`,
    the number of its samples for each output position. It defines `_offset_parts`, `_offset` and
    `_mask`.
    """

    own_offsets = True

    @property
    def _offset_parts(self) -> list[keras.layers.Layer]:
        """The layers within that compute offsets and masks."""
        raise NotImplementedError

    def _offset(self, inputs):
        """The offsets of images, in the order of `data_format`."""
        raise NotImplementedError

    def _mask(self, inputs):
        """The masks of images, in the order of `data_format`."""
        raise NotImplementedError

    # --- Types and formats ---

    @staticmethod
    def _checked(data_format, keywords: dict) -> str | None:
        """The argument `data_format`; in `keywords`, the argument `dtype` becomes a policy."""
        if keywords.get("dtype") is not None:
            keywords["dtype"] = dtype_policy(keywords["dtype"])
        if data_format is None:
            return None
        return one_of(data_format, "data_format", _KERAS_FORMATS)

    def _check_compute_dtype(self) -> None:
        if self.compute_dtype not in _COMPUTE_DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(_COMPUTE_DTYPES)}, or a policy that computes in "
                f"one of them. Received: {shown(self.dtype_policy.name)}"
            )

    @property
    def _offset_dtype(self) -> str:
        return "float64" if self.compute_dtype == "float64" else "float32"

    @property
    def _channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else 1

    @property
    def _tensorflow_format(self) -> str:
        return DATA_FORMATS[self.rank][_KERAS_FORMATS.index(self.data_format)]

    def _to_channels_last(self, images):
        if self.data_format == "channels_last":
            return images
        return keras.ops.transpose(images, (0, *range(2, self.rank + 2), 1))

    def _from_channels_last(self, images):
        if self.data_format == "channels_last":
            return images
        return keras.ops.transpose(images, (0, self.rank + 1, *range(1, self.rank + 1)))

    # --- What is trained ---

    @property
    def offset_trainable(self) -> bool:
        """Whether offsets and masks are trained; setting `trainable` sets it too."""
        return self.own_offsets and self._offset_parts[0].trainable

    @offset_trainable.setter
    def offset_trainable(self, value: bool) -> None:
        value = boolean(value, "offset_trainable")
        if value and not self.own_offsets:
            raise ValueError(
                "offset_trainable must be False where own_offsets is: the layer has no offset "
                f"convolution. Received: {value}"
            )
        for part in self._offset_parts:
            part.trainable = value

    # In Keras a layer whose `trainable` is False has no trainable variables; here, offsets may be.

    @property
    def trainable_variables(self):
        return [variable for variable in self.variables if variable.trainable]

    @property
    def non_trainable_variables(self):
        return [variable for variable in self.variables if not variable.trainable]

    trainable_weights = trainable_variables
    non_trainable_weights = non_trainable_variables

    # --- Shapes ---

    def _channels_of(self, image_shape) -> int:
        """The number of channels of images that the layer is built for."""
        self._check_images(image_shape)
        channels = image_shape[self._channel_axis]
        if channels is None:
            raise ValueError(
                f"inputs must have a known number of channels. Received: shape {image_shape}"
            )
        if channels % self.deform_groups != 0:
            raise ValueError(
                f"deform_groups must divide the number of input channels, {channels}. "
                f"Received: {self.deform_groups}"
            )
        return channels

    def _check_images(self, shape) -> None:
        """Checks the shape of images as Keras does in calls of the layer."""
        shape = tf.TensorShape(shape)
        axes = LETTERS[self.rank]
        order = f"N{axes}C" if self.data_format == "channels_last" else f"NC{axes}"
        order = f"[{', '.join(order)}]"
        if shape.rank != self.rank + 2:
            raise ValueError(
                f"inputs must be {_INPUTS[self.rank]}, {order}. Received: shape {shape}"
            )
        channels = self.input_spec[0].axes[self._channel_axis]
        if channels is not None and shape[self._channel_axis] != channels:
            raise ValueError(
                f"inputs must have {channels} channels, {order}. Received: shape {shape}"
            )

    # --- Offsets and masks by themselves ---

    # Keras saves a model as calls of its layers, with their arguments. So the offsets and masks of
    # a model are calls of this layer with an argument. They go past Keras's own __call__, which
    # would regularize them as if they were the layer's activity.

    def __call__(self, inputs, *args, returns="outputs", **kwargs):
        if not isinstance(returns, str) or returns not in ("outputs", "offset", "mask"):
            raise ValueError(
                f"returns must be 'outputs', 'offset' or 'mask'. Received: {shown(returns)}"
            )
        if returns != "outputs":
            return self._prediction(returns, inputs)
        inputs = self._tensors(inputs)
        outputs = super().__call__(inputs, *args, **kwargs)
        if observer := _observer.get():
            observer(self, inputs, outputs)
        return outputs

    def _tensors(self, inputs):
        """The layer's inputs as tensors of numbers, symbolic or not."""
        return tensor(inputs, "inputs")

    def compute_output_spec(self, inputs, *args, returns="outputs", **kwargs):
        if returns == "outputs":
            return super().compute_output_spec(inputs, *args, **kwargs)
        shape = list(self.compute_output_shape(tuple(inputs.shape)))
        shape[self._channel_axis] = self._samples * (self.rank if returns == "offset" else 1)
        return keras.KerasTensor(shape, dtype=self._offset_dtype)

    def _prediction(self, returns: str, inputs):
        """What the methods `offset` and `mask` return."""
        inputs = tensor(inputs, "inputs")
        self._check_images(inputs.shape)
        if not self.built:
            self.build(tuple(inputs.shape))
        if isinstance(inputs, keras.KerasTensor):
            return keras.Operation.symbolic_call(self, inputs, returns=returns)
        return self._offset(inputs) if returns == "offset" else self._mask(inputs)
