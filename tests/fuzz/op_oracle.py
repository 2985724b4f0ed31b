"""What a deformable convolution must give, in NumPy and Python's integers: the fuzzer's oracle.

It shares no code with the library: neither its arithmetic nor its checks.
"""

import itertools
import math

import ml_dtypes
import numpy as np

LARGEST = 2**31 - 1
# The types of offset and mask that each type of input and filters goes with.
OFFSET_DTYPES = {
    "float32": ("float32",),
    "float64": ("float64",),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
}
NUMPY_DTYPES = {"bfloat16": ml_dtypes.bfloat16}


class MisfitError(Exception):
    """The arguments do not fit each other; says why."""


def native(sizes, data_format):
    """Reorders one thing per axis of `data_format` for NHWC."""
    return [sizes[axis] for axis in ((0, 2, 3, 1) if data_format == "NCHW" else range(4))]


def from_native(sizes, data_format):
    return [sizes[axis] for axis in ((0, 3, 1, 2) if data_format == "NCHW" else range(4))]


def _require(condition, why):
    if not condition:
        raise MisfitError(why)


def _agree(size, other, why):
    _require(None in (size, other) or size == other, why)


def _output_length(length, kernel, stride, dilation, padding):
    if length is None:
        return None
    _require(length <= LARGEST, "input is too large")
    if padding == "SAME":
        out = -(-length // stride)
        if kernel is not None:
            extent = (kernel - 1) * dilation + 1
            _require(extent <= LARGEST, "dilated kernel is too large")
            _require(max((out - 1) * stride + extent, length) <= LARGEST, "padding is too large")
        return out
    if kernel is None:
        return None
    extent = (kernel - 1) * dilation + 1
    _require(extent <= LARGEST, "dilated kernel is too large")
    padded = length + (0 if padding == "VALID" else sum(padding))
    _require(padded <= LARGEST, "padding is too large")
    _require(padded + stride >= extent, "kernel is larger than the input")
    return (padded + stride - extent) // stride


def output_shape(shapes, meaning):
    """The output's shape in `data_format`, None where unknown; raises `MisfitError`.

    `shapes` has a tuple for each argument, with None for what is unknown, or None for a shape of
    unknown rank. `meaning` has (h, w) for strides and dilations, for padding a string or
    ((top, bottom), (left, right)), deform_groups and data_format.
    """
    data_format = meaning["data_format"]
    ranked = {}
    for name, shape in shapes.items():
        sizes = [None] * 4 if shape is None else list(shape)
        _require(len(sizes) == 4, f"{name} has rank {len(sizes)}")
        ranked[name] = sizes if name == "filters" else native(sizes, data_format)
    batch, *lengths, channels = ranked["input"]
    *kernel, group_channels, out_channels = ranked["filters"]
    groups = meaning["deform_groups"]
    for number in (*meaning["strides"], *meaning["dilations"], groups):
        _require(1 <= number <= LARGEST, "attribute out of range")
    padding = meaning["padding"]
    if not isinstance(padding, str):
        _require(all(0 <= n <= LARGEST for n in itertools.chain(*padding)), "padding out of range")
    for size in kernel:
        _require(size is None or 1 <= size <= LARGEST, "kernel size out of range")
    _require(0 not in (channels, group_channels, out_channels), "no channels")
    if channels is not None:
        _require(channels % groups == 0, "deform_groups do not divide the channels")
        if group_channels is not None:
            _require(channels % group_channels == 0, "groups do not divide the channels")
            if out_channels is not None:
                _require(out_channels % (channels // group_channels) == 0, "output channels")
    out = [
        _output_length(*sizes, padding if isinstance(padding, str) else padding[axis])
        for axis, sizes in enumerate(
            zip(lengths, kernel, meaning["strides"], meaning["dilations"], strict=True)
        )
    ]
    result = [batch, *out]
    for name, per_tap in (("offset", 2), ("mask", 1)):
        if name not in ranked:
            continue
        for index, size in enumerate(ranked[name][:3]):
            _agree(size, result[index], f"{name} has another size than the output")
        if None not in kernel:
            _agree(ranked[name][3], per_tap * groups * math.prod(kernel), f"{name}'s channels")
        known = zip(result, ranked[name], strict=False)
        result = [size if other is None else other for other, size in known]
    return from_native([*result, out_channels], data_format)


# --- Numbers ---


def _epsilon(dtype) -> float:
    return float(ml_dtypes.finfo(NUMPY_DTYPES.get(dtype, dtype)).eps)


def _largest(dtype) -> float:
    return float(ml_dtypes.finfo(NUMPY_DTYPES.get(dtype, dtype)).max)


def _least(dtype) -> float:
    return float(ml_dtypes.finfo(NUMPY_DTYPES.get(dtype, dtype)).smallest_normal)


def _flushed(dtype, factors) -> float:
    """What a product that is flushed to zero may have been worth, times so many large numbers."""
    return 1e10**factors * _least(dtype)


class Expected:
    """An array in float64, the sum of its terms' absolute values, and how many there were.

    A term is a product of two arrays' numbers, times those of `factors` others.
    """

    def __init__(self, value, magnitude, terms, factors=1):
        self.value, self.magnitude, self.terms, self.factors = value, magnitude, terms, factors

    def transposed(self, axes):
        value, magnitude = self.value.transpose(axes), self.magnitude.transpose(axes)
        return Expected(value, magnitude, self.terms, self.factors)

    def difference(self, actual, dtype) -> str | None:
        """What is wrong with `actual`, computed in `dtype` or float32 and rounded to `dtype`.

        Where a term is not finite, neither is the sum. Where sums may overflow, anything goes.
        """
        actual = np.asarray(actual)
        if actual.shape != self.value.shape:
            return f"shape {actual.shape} instead of {self.value.shape}"
        actual = actual.astype(np.float64)
        compute = "float64" if dtype == "float64" else "float32"
        flushed = _flushed(compute, self.factors)
        with np.errstate(all="ignore"):
            limit = (
                (self.terms + 16) * (_epsilon(compute) * self.magnitude + flushed)
                + _epsilon(dtype) * np.abs(self.value)
                + _least(dtype)
            )
            finite = np.isfinite(self.magnitude)
            overflows = finite & (self.magnitude > min(_largest(compute), _largest(dtype)) / 4)
            right = np.where(finite, np.abs(actual - self.value) <= limit, ~np.isfinite(actual))
        wrong = np.argwhere(~(right | overflows))
        if not len(wrong):
            return None
        at = tuple(int(i) for i in wrong[0])
        return (
            f"{len(wrong)} of {actual.size} numbers, first at {at}: {actual[at]!r} instead of "
            f"{self.value[at]!r} ± {limit[at]!r}"
        )


def _corners(params):
    """Flat pixel, weight and derivatives of each corner of each sample; what counts of them."""
    arrays, in_h, in_w = params["arrays"], *params["in_size"]
    offset = arrays["offset"]
    batch, out_h, out_w, _ = offset.shape
    kernel_h, kernel_w = arrays["filters"].shape[:2]
    compute = np.float64 if params["dtype"] == "float64" else np.float32
    groups = params["deform_groups"]
    offset = offset.astype(compute).reshape(batch, out_h, out_w, groups, kernel_h, kernel_w, 2)
    axes = []
    for axis, (size, out, kernel) in enumerate(((in_h, out_h, kernel_h), (in_w, out_w, kernel_w))):
        positions = np.arange(out).reshape(
            [1, -1, 1, 1, 1, 1] if axis == 0 else [1, 1, -1, 1, 1, 1]
        )
        taps = np.arange(kernel).reshape([1, 1, 1, 1, -1, 1] if axis == 0 else [1] * 5 + [-1])
        base = positions * params["strides"][axis] + taps * params["dilations"][axis]
        moved = offset[..., axis]
        near = np.abs(moved) < 2.0**40  # false for NaN
        moved = np.where(near, moved, 0)
        whole = np.floor(moved)
        fraction = (moved - whole).astype(compute)
        low = base - params["pads"][axis] + whole.astype(np.int64)
        inside = near & ((low >= 0) | ((low == -1) & (fraction > 0))) & (low < size)
        axes.append((low, fraction, inside, size))
    (h_low, h, h_inside, _), (w_low, w, w_inside, _) = axes
    inside = h_inside & w_inside
    one = compute(1)
    corners = []
    for down, right in itertools.product((0, 1), (0, 1)):
        pixel_h, pixel_w = h_low + down, w_low + right
        counts = inside & (pixel_h >= 0) & (pixel_h < in_h) & (pixel_w >= 0) & (pixel_w < in_w)
        h_weight, w_weight = (h if down else one - h), (w if right else one - w)
        corners.append(
            {
                "counts": counts,
                "pixel": np.where(counts, pixel_h * in_w + pixel_w, 0),
                "weight": np.where(counts, h_weight * w_weight, 0).astype(np.float64),
                "by_h": np.where(counts, w_weight if down else -w_weight, 0).astype(np.float64),
                "by_w": np.where(counts, h_weight if right else -h_weight, 0).astype(np.float64),
            }
        )
    return corners


def _sum(corners, key, values, absolute):
    """Σ of corner weights (or derivatives) times values, over the corners that count."""
    total = 0.0
    for corner, value in zip(corners, values, strict=True):
        weight = np.abs(corner[key]) if absolute else corner[key]
        term = weight[..., None] * (np.abs(value) if absolute else value)
        total = total + np.where(corner["counts"][..., None], term, 0)
    return total


def results(arrays, dtype, meaning, grad_output=None):
    """`Expected` output and, for `grad_output`, gradients, by name; tensors in `data_format`.

    `arrays` has the arguments in any type; `dtype` is that of the input.
    """
    data_format = meaning["data_format"]
    to_nhwc = native(range(4), data_format)
    to_format = from_native(range(4), data_format)
    arrays = {
        name: array.astype(np.float64).transpose(range(4) if name == "filters" else to_nhwc)
        for name, array in arrays.items()
    }
    if grad_output is not None:
        grad_output = grad_output.astype(np.float64).transpose(to_nhwc)
    with np.errstate(all="ignore"):
        found = _native_results(arrays, dtype, meaning, grad_output)
    return {
        name: value if name == "grad_filters" else value.transposed(to_format)
        for name, value in found.items()
    }


def _native_results(arrays, dtype, meaning, grad_output):
    images, filters = arrays["input"], arrays["filters"]
    batch, in_h, in_w, channels = images.shape
    kernel_h, kernel_w, group_channels, out_channels = filters.shape
    taps, deform_groups = kernel_h * kernel_w, meaning["deform_groups"]
    groups = channels // group_channels
    out_h, out_w = arrays["offset"].shape[1:3]
    positions = batch * out_h * out_w
    pads = []
    for axis, (size, out) in enumerate(((in_h, out_h), (in_w, out_w))):
        if meaning["padding"] == "SAME":
            extent = (filters.shape[axis] - 1) * meaning["dilations"][axis] + 1
            pads.append(max((out - 1) * meaning["strides"][axis] + extent - size, 0) // 2)
        else:
            pads.append(0 if meaning["padding"] == "VALID" else meaning["padding"][axis][0])
    corners = _corners(
        {**meaning, "arrays": arrays, "in_size": (in_h, in_w), "dtype": dtype, "pads": pads}
    )
    sampled = (batch, out_h, out_w, deform_groups, taps)
    corners = [{key: v.reshape(sampled) for key, v in corner.items()} for corner in corners]
    inside = np.any([corner["counts"] for corner in corners], axis=0)

    # [batch, pixels and one more, deform_groups, channels]: an image of no pixels has one to read.
    pixels = np.zeros((batch, in_h * in_w + 1, deform_groups, channels // deform_groups))
    pixels[:, :-1] = images.reshape(pixels[:, :-1].shape)
    n = np.arange(batch).reshape(-1, 1, 1, 1, 1)
    g = np.arange(deform_groups).reshape(1, 1, 1, -1, 1)
    values = [pixels[n, corner["pixel"], g] for corner in corners]
    mask = np.where(inside, arrays.get("mask", np.ones(sampled)).reshape(sampled), 0)[..., None]

    def by_group(array):  # samples -> [groups, positions, taps * group_channels]
        array = array.transpose(0, 1, 2, 4, 3, 5).reshape(positions, taps, groups, group_channels)
        return array.transpose(2, 0, 1, 3).reshape(groups, positions, taps * group_channels)

    def of_samples(array):  # and back
        array = array.reshape(groups, positions, taps, group_channels).transpose(1, 2, 0, 3)
        array = array.reshape(*sampled[:3], taps, deform_groups, channels // deform_groups)
        return array.transpose(0, 1, 2, 4, 3, 5)

    def of_outputs(array):  # [groups, positions, out] -> [batch, out_h, out_w, out_channels]
        return array.transpose(1, 0, 2).reshape(batch, out_h, out_w, out_channels)

    matrix = filters.reshape(taps * group_channels, groups, -1).transpose(1, 0, 2)
    signed, absolute = (
        (_sum(corners, "weight", values, sign), np.abs(mask) if sign else mask)
        for sign in (False, True)
    )
    columns, columns_magnitude = (
        by_group(signed[0] * signed[1]),
        by_group(absolute[0] * absolute[1]),
    )
    found = {
        "output": Expected(
            of_outputs(columns @ matrix),
            of_outputs(columns_magnitude @ np.abs(matrix)),
            4 * taps * group_channels,
        )
    }
    if grad_output is None:
        return found

    grads = grad_output.reshape(positions, groups, out_channels // groups).transpose(1, 0, 2)
    found["grad_filters"] = Expected(
        *(
            product.reshape(groups, kernel_h, kernel_w, group_channels, out_channels // groups)
            .transpose(1, 2, 3, 0, 4)
            .reshape(filters.shape)
            for product in (
                columns.transpose(0, 2, 1) @ grads,
                columns_magnitude.transpose(0, 2, 1) @ np.abs(grads),
            )
        ),
        4 * positions,
    )
    found |= _sample_gradients(
        corners,
        values,
        mask,
        inside,
        of_samples(grads @ matrix.transpose(0, 2, 1)),
        of_samples(np.abs(grads) @ np.abs(matrix).transpose(0, 2, 1)),
        arrays,
        pixels,
        (n, g),
        out_channels // groups,
    )
    return found


def _sample_gradients(
    corners, values, mask, inside, grad_columns, magnitude, arrays, pixels, indices, terms
):
    """Gradients by input, offset and mask, from those by the columns."""
    n, g = indices
    grads, counts = [], np.zeros(pixels.shape[1], np.int64)
    for product, absolute in ((grad_columns * mask, False), (magnitude * np.abs(mask), True)):
        grad = np.zeros_like(pixels)
        for corner in corners:
            counts_here = corner["counts"]
            term = np.where(counts_here[..., None], corner["weight"][..., None] * product, 0)
            np.add.at(grad, (n, corner["pixel"], g), term)
            if absolute and counts_here.size:
                counts += np.bincount(corner["pixel"][counts_here], minlength=len(counts))
        grads.append(grad[:, :-1].reshape(arrays["input"].shape))
    found = {"grad_input": Expected(*grads, terms + int(counts.max(initial=0)))}

    terms += 8 * pixels.shape[-1]
    mask_terms, offset_terms = [], []
    for grad, absolute in ((grad_columns, False), (magnitude, True)):
        scale = np.abs(mask) if absolute else mask
        by = {
            key: np.where(inside, np.sum(grad * _sum(corners, key, values, absolute), axis=-1), 0)
            for key in ("weight", "by_h", "by_w")
        }
        # What the library sums up before it subtracts: dot products of each corner's pixel.
        scaled = [np.where(inside, by[key] * scale[..., 0], 0) for key in ("by_h", "by_w")]
        offset_terms.append(np.stack(scaled, axis=-1).reshape(arrays["offset"].shape))
        if "mask" in arrays:
            mask_terms.append(by["weight"].reshape(arrays["mask"].shape))
    found["grad_offset"] = Expected(*offset_terms, terms, factors=2)  # input and mask
    if mask_terms:
        found["grad_mask"] = Expected(*mask_terms, terms)
    return found
