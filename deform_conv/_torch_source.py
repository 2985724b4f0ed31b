"""Weights of PyTorch, without PyTorch: modules and tensors are known by their methods."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ._arguments import converting, shown
from ._layer_arguments import image_padding


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of PyTorch."""

    name: str  # for messages
    weight: np.ndarray  # [O, I, H, W]
    bias: np.ndarray | None
    module: Any  # None of a state dict or a pair

    def rows(self, index) -> "Convolution":
        """The convolution of some of the output channels."""
        bias = None if self.bias is None else self.bias[index]
        return replace(self, weight=self.weight[index], bias=bias)


class Source:
    """The tensors of what was given, until they are taken.

    Attributes:
      name: what messages call it.
      module: the module; None of a state dict or a pair.
    """

    def __init__(self, value, argument: str, prefix: str = ""):
        if not isinstance(prefix, str):
            raise ValueError(f"prefix must be a string. Received: {shown(prefix)}")
        prefix = prefix.strip(".")
        self.module = None
        self.name = f"{argument}.{prefix}" if prefix else argument
        if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
            self.module = self._submodule(value, prefix)
            tensors = self.module.state_dict()
        elif isinstance(value, Mapping):
            start = f"{prefix}." if prefix else ""
            tensors = {
                key[len(start) :]: tensor
                for key, tensor in value.items()
                if isinstance(key, str) and key.startswith(start)
            }
        elif isinstance(value, tuple | list) and len(value) == 2 and not prefix:
            tensors = dict(zip(("weight", "bias"), value, strict=True))
        else:
            raise ValueError(
                f"{argument} must be a module or a state dict of PyTorch, or, without a prefix, a "
                f"pair (weight, bias). Received: {shown(value)}"
            )
        self._tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}

    def take(self, names: Sequence[str]) -> Convolution | None:
        """The convolution with the first of `names` that there is."""
        for name in names:
            start = f"{name}." if name else ""
            if f"{start}weight" in self._tensors:
                weight, bias = (
                    as_array(
                        self._tensors.pop(start + key, None), f"{self.name}.{start}{key}", rank
                    )
                    for key, rank in (("weight", 4), ("bias", 1))
                )
                module = self.module and self._submodule(self.module, name)
                return Convolution(".".join(filter(None, (self.name, name))), weight, bias, module)
        return None

    def convolution(self, names: Sequence[str]) -> Convolution:
        part = self.take(names)
        if part is None:
            keys = " or ".join(".".join(filter(None, (name, "weight"))) for name in names)
            raise ValueError(f"{self.name} must have the key {keys}. Received: {self._keys()}")
        return part

    def array(self, key: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """The tensor of a key that there must be; None stands for any size."""
        if key not in self._tensors:
            raise ValueError(f"{self.name} must have the key {key}. Received: {self._keys()}")
        array = as_array(self._tensors[key], f"{self.name}.{key}", len(shape))
        pairs = zip(array.shape, shape, strict=True)
        if any(size is not None and found != size for found, size in pairs):
            raise ValueError(
                f"{self.name}.{key} must have shape {shape} for the layer. "
                f"Received: shape {array.shape}"
            )
        del self._tensors[key]
        return array

    def has(self, key: str) -> bool:
        """Whether there is a tensor of this key that is not taken yet."""
        return key in self._tensors

    def check_all_taken(self, whose: str) -> None:
        if self._tensors:
            raise ValueError(
                f"{self.name} must have the keys of {whose}. Received: {self._keys()} too"
            )

    def _keys(self) -> str:
        return shown(list(self._tensors)) if self._tensors else "no keys"

    def _submodule(self, module, path: str):
        try:
            return functools.reduce(getattr, filter(None, path.split(".")), module)
        except AttributeError as error:
            raise ValueError(
                f"prefix must be the name of a submodule. Received: {shown(path)}"
            ) from error


def as_array(tensor, name: str, rank: int) -> np.ndarray | None:
    """A tensor of PyTorch, or what NumPy converts, in float64, which holds all floating types."""
    if tensor is None:
        return None
    with converting(
        lambda: (
            f"{name} must be a tensor of real numbers with {rank} dimension(s). "
            f"Received: {shown(tensor)}"
        )
    ):
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
            if not tensor.is_floating_point():
                raise TypeError("no type of weights")
            tensor = tensor.double().numpy()  # NumPy has no bfloat16
        array = np.asarray(tensor)
        if array.ndim != rank or np.iscomplexobj(array):
            raise TypeError("no weights of a convolution")
        return array.astype(np.float64)


def check_padding(name: str, theirs, layer) -> None:
    """Raises unless a module's padding, if there is any, is that of the layer."""
    if theirs is not None and _pads(image_padding(theirs), layer) != _pads(layer.padding, layer):
        raise ValueError(
            f"padding must be that of {name}: construct the layer with padding={theirs!r}. "
            f"Received: {layer.padding!r}"
        )


def _pads(padding, layer):
    """`padding` as ((top, bottom), (left, right)); "same" if it depends on the size of images."""
    extents = [
        (taps - 1) * dilation
        for taps, dilation in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    ]
    if padding == "valid":
        return (0, 0), (0, 0)
    axes = zip(extents, layer.strides, strict=True)
    if padding == "same" and all(stride == 1 or extent == 0 for extent, stride in axes):
        return tuple((extent // 2, extent - extent // 2) for extent in extents)
    return padding
