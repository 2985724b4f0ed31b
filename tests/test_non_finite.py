"""What infinite numbers and NaN do: what the formula makes of them, and nothing else.

A result is NaN or infinite where the formula's is, and finite where the formula's is. Corners
outside the image have no part in a sample. Corners inside take part even where their weight is 0,
and 0 times infinity is NaN.
"""

import numpy as np
import pytest
import tensorflow as tf
from conftest import random_case, run

from deform_conv import deform_conv2d
from deform_conv._reference import deform_conv2d_reference

pytestmark = pytest.mark.usefixtures("device")

SIZE = (5, 6)


def corners_of(h, w):
    """(pixel, weight, weight's derivative along h, and along w) of the corners in the image."""
    top, left = int(np.floor(h)), int(np.floor(w))
    h_fraction, w_fraction = h - top, w - left
    for y, h_weight, h_slope in ((top, 1 - h_fraction, -1), (top + 1, h_fraction, 1)):
        for x, w_weight, w_slope in ((left, 1 - w_fraction, -1), (left + 1, w_fraction, 1)):
            if 0 <= y < SIZE[0] and 0 <= x < SIZE[1]:
                yield (y, x), h_weight * w_weight, h_slope * w_weight, h_weight * w_slope


def formula(input, filters, offset, mask, grad_output):
    """Output and gradients for one image, 3x3 filters and SAME padding, sample by sample."""
    results = {
        "output": np.zeros(grad_output.shape),
        "grad_input": np.zeros(input.shape),
        "grad_filters": np.zeros(filters.shape),
        "grad_offset": np.zeros(offset.shape),
        "grad_mask": np.zeros(mask.shape),
    }
    for y, x, ky, kx in np.ndindex(*SIZE, 3, 3):
        at, tap = (0, y, x), ky * 3 + kx
        h = y - 1 + ky + offset[(*at, 2 * tap)]
        w = x - 1 + kx + offset[(*at, 2 * tap + 1)]
        inside = -1 < h < SIZE[0] and -1 < w < SIZE[1]
        scale = mask[(*at, tap)] if inside else 0.0
        column = filters[ky, kx] @ grad_output[at]
        value, slope_h, slope_w = np.zeros((3, input.shape[-1]))
        for pixel, weight, along_h, along_w in corners_of(h, w) if inside else ():
            value += weight * input[(0, *pixel)]
            slope_h += along_h * input[(0, *pixel)]
            slope_w += along_w * input[(0, *pixel)]
            results["grad_input"][(0, *pixel)] += weight * scale * column
        results["output"][at] += scale * value @ filters[ky, kx]
        results["grad_filters"][ky, kx] += np.outer(scale * value, grad_output[at])
        if inside:
            results["grad_mask"][(*at, tap)] = column @ value
            results["grad_offset"][(*at, 2 * tap)] = scale * column @ slope_h
            results["grad_offset"][(*at, 2 * tap + 1)] = scale * column @ slope_w
    return results


def depthwise_formula(input, filters, grad_output, **shared):
    """The same with 3x3 filters of one input channel each, which have an output channel each."""
    results = [
        formula(
            input[..., c : c + 1], filters[..., c : c + 1], grad_output=grad_output[..., c : c + 1],
            **shared,
        )
        for c in range(input.shape[-1])
    ]  # fmt: skip
    return {
        name: sum(each[name] for each in results)
        if name in ("grad_offset", "grad_mask")
        else np.concatenate([each[name] for each in results], axis=-1)
        for name in results[0]
    }


def problem(rng, channels=20, **options):
    """Arrays whose samples lie inside, across the border and outside, and some on whole pixels."""
    arrays = random_case(
        rng, batch=1, size=SIZE, channels=channels, out_channels=8, **options
    ).arrays
    arrays["offset"][:, :, :3] = np.round(arrays["offset"][:, :, :3])
    return arrays | {"grad_output": rng.standard_normal((1, *SIZE, 8))}


def results_of(arrays, dtype=tf.float32, function=deform_conv2d):
    offset_dtype = tf.float64 if dtype == tf.float64 else tf.float32
    tensors = {
        name: tf.constant(array, offset_dtype if name in ("offset", "mask") else dtype)
        for name, array in arrays.items()
    }
    grad_output = tensors.pop("grad_output")
    return run(tensors, {}, grad_output, function)


def assert_follow_the_formula(actual, arrays, tolerance, formula=formula):
    with np.errstate(invalid="ignore"):
        expected = formula(**arrays)
    for name, tensor in actual.items():
        value, wanted = tf.cast(tensor, tf.float64).numpy(), expected[name]
        np.testing.assert_array_equal(np.isfinite(value), np.isfinite(wanted), name)
        if name in ("grad_offset", "grad_mask"):
            # Summed up corner by corner: infinite terms that have one sign in the formula may have
            # two there, and then give NaN.
            value, wanted = (np.where(np.isfinite(one), one, np.nan) for one in (value, wanted))
        np.testing.assert_allclose(value, wanted, rtol=tolerance, atol=tolerance, err_msg=name)


BAD = [np.inf, -np.inf, np.nan]
ARGUMENTS = ["input", "filters", "mask", "grad_output"]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_one_bad_number_anywhere(argument, bad, rng):
    clean = problem(rng)
    for index in rng.choice(clean[argument].size, 12, replace=False):
        arrays = clean | {argument: clean[argument].copy()}
        arrays[argument].flat[index] = bad
        assert_follow_the_formula(results_of(arrays), arrays, 1e-4)


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_one_bad_number_anywhere_in_a_depthwise_layer(argument, bad, rng):
    clean = problem(rng, channels=8, groups=8)
    for index in rng.choice(clean[argument].size, 12, replace=False):
        arrays = clean | {argument: clean[argument].copy()}
        arrays[argument].flat[index] = bad
        assert_follow_the_formula(results_of(arrays), arrays, 1e-4, depthwise_formula)


def test_bad_masks_at_every_sample(rng):
    """At the border and on whole pixels too, where some corner has no part or no weight."""
    arrays = problem(rng) | {"mask": rng.choice(BAD, size=(1, *SIZE, 9))}
    assert_follow_the_formula(results_of(arrays), arrays, 1e-4)


@pytest.mark.parametrize(
    ("position", "slopes"),
    [((-0.5, -0.25), (0.75, 0.5)), ((1.5, 2.25), (-0.75, -0.5)), ((-0.5, 2.25), (0.75, -0.5))],
)
def test_infinite_gradient_at_a_corner_of_the_image(position, slopes):
    """One corner of the sample lies inside, and the others add nothing, not even NaN."""
    tensors = {
        "input": tf.fill((1, 2, 3, 1), 2.0),
        "filters": tf.ones((1, 1, 1, 1)),
        "offset": tf.constant(np.array(position), tf.float32, (1, 1, 1, 2)),
        "mask": tf.ones((1, 1, 1, 1)),
    }
    results = run(tensors, {"strides": (2, 3)}, tf.fill((1, 1, 1, 1), np.inf))
    np.testing.assert_array_equal(results["grad_offset"][0, 0, 0], np.inf * np.array(slopes))
    assert results["grad_mask"] == np.inf


# --- Tensor cores ---

LOW_PRECISION = [tf.float16, tf.bfloat16, tf.float32]


@pytest.fixture
def tensor_cores():
    """Lets float32 be multiplied as TensorFloat-32."""
    tf.config.experimental.enable_tensor_float_32_execution(True)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.usefixtures("tensor_cores")
def test_one_bad_number_on_tensor_cores(argument, dtype, rng):
    """Finite where the formula is, but for the input's gradient, which is summed region by region:
    of a patch of 8x8 positions, all pixels of a channel may be NaN together."""
    with tf.device("GPU:0"):
        clean = {
            name: tf.cast(tf.cast(array, dtype), tf.float64).numpy()
            for name, array in problem(rng, channels=64).items()
        }
        for index in rng.choice(clean[argument].size, 12, replace=False):
            arrays = clean | {argument: clean[argument].copy()}
            arrays[argument].flat[index] = np.inf
            with np.errstate(invalid="ignore"):
                expected = formula(**arrays)
            for name, value in results_of(arrays, dtype).items():
                bad = ~np.isfinite(tf.cast(value, tf.float64))
                if name == "grad_input":
                    assert np.all(bad[~np.isfinite(expected[name])])
                    assert not np.any(bad[..., np.all(np.isfinite(expected[name]), (0, 1, 2))])
                else:
                    np.testing.assert_array_equal(bad, ~np.isfinite(expected[name]), name)


def half_sample(mask, corners, weight=0.5):
    """A sample between two pixels of float16, with a mask of float32, on tensor cores."""
    image = np.zeros((1, 8, 8, 8), np.float16)
    image[0, 3, 3], image[0, 3, 4] = corners
    offset = np.zeros((1, 8, 8, 2), np.float32)
    offset[0, 3, 3, 1] = weight
    masks = np.ones((1, 8, 8, 1), np.float32)
    masks[0, 3, 3] = mask
    filters = np.eye(8, dtype=np.float16)[np.newaxis, np.newaxis]
    with tf.device("GPU:0"):
        return deform_conv2d(image, filters, offset, masks).numpy()[0, 3, 3, 0]


@pytest.mark.gpu
def test_bounds_of_masks_beside_float16():
    """docs/reliability.md states them: in fused kernels, a mask times a weight is a float16, and so
    is its product with a corner."""
    assert half_sample(8.0, (3e3, -3e3)) == 0
    assert half_sample(2.0, (3e4, -3e4)) == 0
    assert half_sample(6e-5, (1e3, 1e3)) == pytest.approx(6e-2, rel=2e-3)
    assert half_sample(1e-6, (1e3, 1e3)) == pytest.approx(1e-3, abs=6e-8 * 1e3)


# --- At the border ---


def test_infinite_pixel_reaches_one_pixel_further_than_in_conv2d(rng):
    """With offsets of 0, a sample has four corners all the same, three of them without weight."""
    image = np.zeros((1, 9, 9, 1), np.float32)
    image[0, 4, 4, 0] = np.inf
    filters = rng.standard_normal((3, 3, 1, 1)).astype(np.float32)
    ours = deform_conv2d(image, filters, np.zeros((1, 9, 9, 18), np.float32))
    theirs = tf.nn.conv2d(image, filters, 1, "SAME")
    assert np.sum(~np.isfinite(ours)) == 16
    assert np.sum(~np.isfinite(theirs)) == 9


def test_mask_that_is_large_beside_samples_that_cancel():
    """The mask scales the sample. Times a corner of it, it would overflow."""
    arguments = {
        "input": tf.constant([3e38, -3e38], shape=(1, 1, 2, 1)),
        "filters": tf.ones((1, 1, 1, 1)),
        "offset": tf.constant([0, 0.5, 0, 0], shape=(1, 1, 2, 2), dtype=tf.float32),
        "mask": tf.constant([8.0, 1.0], shape=(1, 1, 2, 1)),
    }
    for function in (deform_conv2d, deform_conv2d_reference):
        assert function(**arguments).numpy()[0, 0, 0, 0] == 0
