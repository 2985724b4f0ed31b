"""Deformable convolutions of other libraries, for comparison on the CPU, where they are installed.

Each is called in its own layout (NCHW), on its own tensors, with what can be prepared prepared.
They live in a process of their own, since PyTorch's and TensorFlow's copies of LLVM do not go
together, and are timed there.
"""

import os

# Threads that wait must not spin, or they would slow down whoever's turn is next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable
from importlib import metadata, util

import numpy as np

Functions = dict[str, Callable[[], object]]


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    packages = {"torchvision": ("torch", "torchvision"), "ONNX Runtime": ("onnx", "onnxruntime")}
    return {
        name: metadata.version(needed[-1])
        for name, needed in packages.items()
        if all(map(util.find_spec, needed))
    }


def milliseconds(function: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result  # freed outside the time
    return 1e3 * elapsed


class PeerProcess:
    """The installed peers, in their process. A context manager."""

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        self._executor = concurrent.futures.ProcessPoolExecutor(1, context)
        return self

    def __exit__(self, *_):
        self._executor.shutdown()

    def prepare(self, **layer) -> dict[str, dict[str, Callable[[], float]]]:
        """For each measurement, the peers that have it: a function that calls and times one.

        Arguments are those of deform_conv2d: `arrays` in NHWC (image, filters, offset, perhaps
        mask, and grad_output), stride, dilation, groups, deform_groups, padding (rows and columns
        at either end), and threads. What was prepared before is freed.
        """
        names = self._executor.submit(_prepare, **layer).result()
        return {
            measurement: {name: self._timer(measurement, name) for name in of}
            for measurement, of in names.items()
        }

    def _timer(self, measurement: str, name: str) -> Callable[[], float]:
        return lambda: self._executor.submit(_time, measurement, name).result()


# --- In that process ---

_prepared: dict[str, Functions] = {}


def _prepare(**layer) -> dict[str, list[str]]:
    _prepared.clear()
    _prepared.update(_functions_of(**layer))
    return {measurement: list(functions) for measurement, functions in _prepared.items()}


def _time(measurement: str, name: str) -> float:
    return milliseconds(_prepared[measurement][name])


def _functions_of(
    arrays: dict[str, np.ndarray],
    stride: int,
    dilation: int,
    groups: int,
    deform_groups: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    threads: int,
) -> dict[str, Functions]:
    """For each measurement, the installed peers' functions."""
    # torchvision pads both ends alike. Input that needs another padding gets it outside the time.
    if any(before != after for before, after in padding):
        image = np.pad(arrays["image"], ((0, 0), *padding, (0, 0)))
        arrays, padding = arrays | {"image": image}, ((0, 0), (0, 0))
    tensors = {
        name: np.ascontiguousarray(
            array.transpose(3, 2, 0, 1) if name == "filters" else np.moveaxis(array, 3, 1)
        )
        for name, array in arrays.items()
    }
    grad_output = tensors.pop("grad_output")
    functions: dict[str, Functions] = {"forward": {}, "forward+backward": {}}
    installed = versions()
    if "torchvision" in installed:
        pads = tuple(before for before, _ in padding)
        attributes = {"stride": stride, "dilation": dilation, "padding": pads}
        forward, backward = _torchvision(tensors, grad_output, attributes, threads)
        functions["forward"]["torchvision"] = forward
        functions["forward+backward"]["torchvision"] = backward
    if "ONNX Runtime" in installed:
        (top, bottom), (left, right) = padding
        attributes = {
            "strides": [stride, stride],
            "dilations": [dilation, dilation],
            "group": groups,
            "offset_group": deform_groups,
            "pads": [top, left, bottom, right],
        }
        functions["forward"]["ONNX Runtime"] = _onnx_runtime(tensors, attributes, threads)
    return functions


def _torchvision(tensors, grad_output, attributes, threads):
    import torch
    from torchvision.ops import deform_conv2d

    torch.set_num_threads(threads)
    grad_output = torch.from_numpy(grad_output)
    constants = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in constants.items()}

    def convolve(image, filters, offset, mask=None):
        return deform_conv2d(image, offset, filters, mask=mask, **attributes)

    def forward():
        with torch.no_grad():
            return convolve(**constants)

    def backward():
        output = convolve(**leaves)
        return output, torch.autograd.grad(output, list(leaves.values()), grad_output)

    return forward, backward


def _onnx_runtime(tensors, attributes, threads):
    import onnxruntime
    from onnx import TensorProto, helper

    tensors = {"X": tensors["image"], "W": tensors["filters"], "offset": tensors["offset"]} | (
        {"mask": tensors["mask"]} if "mask" in tensors else {}
    )
    names = [name if name in tensors else "" for name in ("X", "W", "offset", "B", "mask")]
    node = helper.make_node(
        "DeformConv",
        names if "mask" in tensors else names[:3],
        ["Y"],
        kernel_shape=tensors["W"].shape[2:],
        **attributes,
    )
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, tensor.shape)
        for name, tensor in tensors.items()
    ]
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", "c", "h", "w"])
    graph = helper.make_graph([node], "deform_conv", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for name, tensor in tensors.items()
    }
    return lambda: session.run_with_ort_values(["Y"], feed)[0]
