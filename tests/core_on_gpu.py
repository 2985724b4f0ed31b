"""What the core does on a GPU beside computing: memory, errors, threads, large batches.

    python tests/core_on_gpu.py [NAME ...]

Through the C interface, with PyTorch, torchvision and nvcc, and without TensorFlow, which does not
load into one process with PyTorch. test_gpu.py runs each of the functions in a process of its own.
"""

import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_core
from gpu_core import TYPES, Core, Variant, core_of, random_tensors, relative_error
from gpu_time import pool_peak, results_like
from layers import Layer

MIB = 1 << 20


class Skipped(Exception):  # noqa: N818 - it is no error
    """Says what is missing."""


def random_call(layer, type_name, seed=0):
    """Arguments, the output's gradient, and an output and gradients to write to."""
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors, grad_output = random_tensors(generator, TYPES[type_name][0], layer)
    return tensors, grad_output, *results_like(tensors, grad_output)


def needs_fused_kernels():
    if torch.cuda.get_device_capability() != (9, 0):
        raise Skipped("fused kernels are for compute capability 9.0")


# --- The sorted gradient of the input ---


def sorting_holds_its_memory_once_however_many_chunks_there_are(library):
    layer = Layer(64, 64, 64, 100, 152)
    tensors, grad_output, _, gradients = random_call(layer, "float32")
    variant = Variant("general", columns_bytes=256 * MIB, deterministic=True)
    backward = core_of(library, "float32", layer, variant).bind_backward(
        tensors, grad_output, gradients
    )
    backward()  # cuBLAS takes memory at its first call
    # Columns, and the corners of 2²³ / 4 samples with a copy to sort: numbers of 4 bytes.
    assert pool_peak(backward) <= (256 + 6 * 32) * MIB


def pixels_that_nothing_samples_are_left_out_when_sorting(library):
    """All samples are of one pixel in a large image: before and behind it are gaps."""
    layer = Layer(2, 8, 8, 500, 400, kernel=(1, 1))
    tensors, grad_output, _, gradients = random_call(layer, "float32")
    tensors["filters"] = torch.eye(8, device="cuda").reshape(1, 1, 8, 8)
    y = torch.arange(500, device="cuda").reshape(1, 500, 1).expand(2, 500, 400)
    x = torch.arange(400, device="cuda").reshape(1, 1, 400).expand(2, 500, 400)
    # Of the first image pixel (123, 45), of the second none.
    tensors["offset"] = torch.stack((123 - y, 45 - x), dim=-1).float().contiguous()
    tensors["offset"][1] = 1e6
    core = core_of(library, "float32", layer, Variant("general", deterministic=True))
    core.backward(tensors, grad_output, gradients)
    expected = torch.zeros_like(tensors["input"])
    expected[0, 123, 45] = grad_output[0].double().sum((0, 1)).float()
    torch.testing.assert_close(gradients["input"], expected, rtol=1e-4, atol=1e-2)
    assert torch.count_nonzero(gradients["input"]) == 8


# --- Layers without filters ---


def aggregated(*sizes, **options) -> Layer:
    batch, channels, *extent = sizes
    options = {"masked": True, "scale": 2} | options
    return Layer(batch, channels, channels, *extent, groups=channels, **options)


def layers_without_filters_are_those_with_filters_of_ones(library):
    """By tensor cores, the depthwise kernels, and where none fits: deterministic, or many taps."""
    layers = [
        aggregated(2, 128, 30, 47, deform_groups=4),
        aggregated(3, 64, 14, 14, deform_groups=4, masked=False, scale=1),
        aggregated(2, 48, 13, 17, deform_groups=2, stride=2),
        aggregated(1, 160, 9, 11, scale=20),
        aggregated(2, 32, 20, 27, dilation=2, holes=True),
        aggregated(1, 32, 12, 13, deform_groups=2, kernel=(5, 5)),
        aggregated(2, 64, 1, 90, deform_groups=2, kernel=(1, 9)),
        aggregated(3, 32, 14, 14, kernel=(1, 1)),
        Layer(2, 64, 64, 40, 41, groups=64, deform_groups=4, masked=True, scale=2),
        Layer(3, 30, 30, 9, 11, groups=30, deform_groups=2, masked=True, stride=2),
        Layer(2, 1, 1, 9, 11, masked=True, dilation=2),
        Layer(1, 16, 16, 12, 13, groups=16, kernel=(51, 51), masked=True),
    ]
    for layer in layers:
        for type_name, tolerance in (("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 5e-2)):
            for deterministic in (False, True):
                variant = Variant("automatic", deterministic=deterministic)
                core = core_of(library, type_name, layer, variant)
                tensors, grad_output, output, gradients = random_call(layer, type_name)
                tensors["filters"].fill_(1)
                core.forward(tensors, output)
                core.backward(tensors, grad_output, gradients)
                del tensors["filters"], gradients["filters"]
                actual, actual_gradients = results_like(tensors, grad_output)
                core.forward(tensors, actual)
                core.backward(tensors, grad_output, actual_gradients)
                assert relative_error(actual, output) <= tolerance, (layer, type_name)
                for key, gradient in actual_gradients.items():
                    error = relative_error(gradient, gradients[key])
                    assert error <= tolerance, (layer, type_name, key, error)


def infinite_pixels_reach_their_own_samples_only(library):
    """Though tensor cores multiply each pixel of a region with each position."""
    layer = aggregated(1, 64, 20, 21, deform_groups=2, scale=1)
    for type_name, tolerance in (("float16", 5e-3), ("bfloat16", 2e-2)):
        tensors, _, output, _ = random_call(layer, type_name)
        del tensors["filters"]
        core = core_of(library, type_name, layer, Variant("automatic"))
        core.forward(tensors, output)
        expected = output.clone()
        tensors["input"][0, 10, 11, 5] = torch.inf
        core.forward(tensors, output)
        finite = output.isfinite()
        assert finite[..., :5].all() and finite[..., 6:].all()
        # Samples of the 3x3 taps move by a few pixels.
        reached = torch.nonzero(~finite[0, :, :, 5])
        assert len(reached) > 0
        assert (reached - torch.tensor([10, 11], device="cuda")).abs().max() <= 8
        assert relative_error(output[finite], expected[finite]) <= tolerance


# --- Empty images ---


def filters_of_empty_images_have_a_gradient_of_zeros(library):
    """Also where the only other gradient that is wanted is that of the images."""
    for type_name, (dtype, *_) in TYPES.items():
        position_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {
            "input": torch.zeros(2, 0, 11, 8, dtype=dtype, device="cuda"),
            "filters": torch.ones(1, 5, 8, 16, dtype=dtype, device="cuda"),
            "offset": torch.zeros(2, 2, 11, 10, dtype=position_dtype, device="cuda"),
        }
        grad_output = torch.ones(2, 2, 11, 16, dtype=dtype, device="cuda")
        filters_gradient = torch.full_like(tensors["filters"], torch.nan)
        # PyTorch's own empty tensors have no address, and their gradients are not asked for.
        input_gradient = NoTensor(tensors["input"].shape, filters_gradient.data_ptr())
        gradients = {"input": input_gradient, "filters": filters_gradient}
        for path in ("automatic", "general"):
            core = Core(library, type_name, kernel=(1, 5), pad=(1, 2), path=path)
            core.backward(tensors, grad_output, gradients)
            assert torch.count_nonzero(filters_gradient) == 0, (type_name, path)


# --- Errors of other calls ---


def error_of_one_call_is_not_told_of_the_next(library):
    # Columns that no GPU holds, of tensors that are never read.
    core = Core(library, "float32", columns_bytes=1 << 60)
    shapes = {
        "input": (1 << 12, 1 << 12, 1 << 12, 64),
        "filters": (3, 3, 64, 1),
        "offset": (1 << 12, 1 << 12, 1 << 12, 18),
    }
    tensors = {key: NoTensor(shape) for key, shape in shapes.items()}
    try:
        core.forward(tensors, NoTensor(()))
    except RuntimeError as error:
        assert "cannot allocate" in str(error), error
    else:
        raise AssertionError("there is that much memory")
    layer = Layer(2, 8, 8, 9, 9)
    tensors, grad_output, output, gradients = random_call(layer, "float32")
    good = core_of(library, "float32", layer, Variant("general"))
    good.forward(tensors, output)
    good.backward(tensors, grad_output, gradients)
    torch.cuda.synchronize()


class NoTensor:
    """A shape and an address, for calls that neither read nor write."""

    def __init__(self, shape, address=0):
        self.shape, self._address = shape, address

    def is_contiguous(self):
        return True

    def data_ptr(self):
        return self._address


# --- Threads ---


def threads_may_need_different_amounts_of_shared_memory(library):
    """Layers of the same kernels with few and with many taps, at once."""
    needs_fused_kernels()
    layers = [Layer(1, 64, 64, 13, 17, kernel=kernel) for kernel in ((1, 1), (3, 3), (5, 3))]
    errors = []

    def work(layer):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                tensors, grad_output, output, gradients = random_call(layer, "float16")
                core = core_of(library, "float16", layer, Variant("fused"))
                forward = core.bind_forward(tensors, output)
                backward = core.bind_backward(tensors, grad_output, gradients)
                for _ in range(2000):
                    forward()
                    backward()
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# --- More pixels than a fused kernel numbers ---


def fused_kernels_take_a_batch_of_2_to_the_27_pixels(library):
    """A 1x1 identity convolution with an offset of one pixel moves images by one pixel."""
    needs_fused_kernels()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        raise Skipped("needs 40 GB of memory")

    layer = Layer(33, 32, 32, 2048, 2048, kernel=(1, 1))
    assert layer.batch * layer.height * layer.width > 1 << 27
    half = {"dtype": torch.float16, "device": "cuda"}
    image = torch.randn(layer.batch, 1, layer.width, layer.channels, **half)
    image = image.expand(-1, layer.height, -1, -1).contiguous()
    offset = torch.zeros(layer.batch, layer.height, layer.width, 2, device="cuda")
    offset[..., 1] = 1
    identity = torch.eye(layer.channels, **half).reshape(1, 1, layer.channels, -1)
    tensors = {"input": image, "filters": identity, "offset": offset}
    core = core_of(library, "float16", layer, Variant("fused"))

    output = torch.full_like(image, torch.nan)
    core.forward(tensors, output)
    for n in range(layer.batch):
        assert torch.equal(output[n, :, :-1], image[n, :, 1:]), n
        assert torch.count_nonzero(output[n, :, -1]) == 0

    # The gradient moves back.
    gradients = {"input": output.fill_(torch.nan), "offset": torch.full_like(offset, torch.nan)}
    core.backward(tensors, image, gradients)
    for n in range(layer.batch):
        assert torch.equal(gradients["input"][n, :, 1:], image[n, :, :-1]), n
        assert torch.count_nonzero(gradients["input"][n, :, 0]) == 0
        assert torch.isfinite(gradients["offset"][n]).all()


CHECKS = (
    sorting_holds_its_memory_once_however_many_chunks_there_are,
    pixels_that_nothing_samples_are_left_out_when_sorting,
    layers_without_filters_are_those_with_filters_of_ones,
    infinite_pixels_reach_their_own_samples_only,
    filters_of_empty_images_have_a_gradient_of_zeros,
    error_of_one_call_is_not_told_of_the_next,
    threads_may_need_different_amounts_of_shared_memory,
    fused_kernels_take_a_batch_of_2_to_the_27_pixels,
)


def main() -> None:
    checks = {check.__name__: check for check in CHECKS}
    library = gpu_core.build()
    for name in sys.argv[1:] or checks:
        try:
            checks[name](library)
        except Skipped as missing:
            print(f"{name}: skipped: {missing}", flush=True)
        else:
            print(f"{name}: ok", flush=True)


if __name__ == "__main__":
    main()
