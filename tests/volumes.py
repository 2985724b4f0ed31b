"""Deformable convolution of volumes: random cases, and the formula in NumPy, number by number."""

import itertools

import numpy as np
from conftest import output_size, random_case


def random_volume_case(rng, **configuration):
    """A `Case` of small volumes."""
    return random_case(rng, **{"size": (4, 5, 6)} | configuration)


def corners_of(base, offset, size):
    """The corners of a sample that exist, as (voxel, weight, derivatives of the weight by d, h, w).

    None where the sample is 0: unless -1 < base + offset < size on every axis.
    """
    if not all(np.isfinite(offset)):
        return []
    whole = np.floor(offset)
    low, fraction = base + whole.astype(int), offset - whole
    # base + offset > -1, without the rounding of a sum
    above = (low >= 0) | ((low == -1) & (fraction > 0))
    if not (np.all(above) and np.all(low < size)):
        return []
    corners = []
    for steps in itertools.product((0, 1), repeat=3):
        voxel = low + steps
        if np.any(voxel < 0) or np.any(voxel >= size):
            continue
        factors = np.where(steps, fraction, 1 - fraction)
        slopes = np.where(steps, 1.0, -1.0)
        derivatives = [slopes[axis] * np.prod(np.delete(factors, axis)) for axis in range(3)]
        corners.append((tuple(voxel), np.prod(factors), np.array(derivatives)))
    return corners


def by_formula(
    input,
    filters,
    offset,
    mask=None,
    *,
    strides,
    dilations,
    padding,
    deform_groups,
    grad_output=None,
):
    """The output and every gradient, as `conftest.run` returns them, summed up term by term."""
    batch, *size, channels = input.shape
    *kernel, group_channels, out_channels = filters.shape
    taps, groups = int(np.prod(kernel)), channels // group_channels
    out_size, pads = output_size(size, kernel, strides, dilations, padding)
    offset = offset.reshape(batch, *out_size, deform_groups, taps, 3)
    masks = np.ones(offset.shape[:-1]) if mask is None else mask.reshape(offset.shape[:-1])
    group_out, deform_channels = out_channels // groups, channels // deform_groups
    flat_filters = filters.reshape(taps, group_channels, groups, group_out)
    output = np.zeros((batch, *out_size, groups, group_out))
    if grad_output is None:
        grad_output = np.ones((batch, *out_size, out_channels))
    grad_output = grad_output.reshape(output.shape)
    grads = {
        "input": np.zeros(input.shape),
        "filters": np.zeros(flat_filters.shape),
        "offset": np.zeros(offset.shape),
        "mask": np.zeros(masks.shape),
    }
    of_group = np.arange(channels).reshape(groups, group_channels)
    for n, *out in np.ndindex(batch, *out_size):
        at = (n, *out)
        for tap, index in enumerate(np.ndindex(*kernel)):
            base = np.array(out) * strides - pads + np.array(index) * dilations
            # What each channel's sample brings to the output, through the filters.
            grad_column = np.einsum("cjo,jo->jc", flat_filters[tap], grad_output[at]).ravel()
            column = np.zeros(channels)
            for g in range(deform_groups):
                own = slice(g * deform_channels, (g + 1) * deform_channels)
                scale = masks[(*at, g, tap)]
                for voxel, weight, derivatives in corners_of(base, offset[(*at, g, tap)], size):
                    values = input[(n, *voxel, own)]
                    column[own] += scale * weight * values
                    product = np.dot(values, grad_column[own])
                    grads["input"][(n, *voxel, own)] += scale * weight * grad_column[own]
                    grads["mask"][(*at, g, tap)] += weight * product
                    grads["offset"][(*at, g, tap)] += scale * derivatives * product
            columns = column[of_group]
            output[at] += np.einsum("jc,cjo->jo", columns, flat_filters[tap])
            grads["filters"][tap] += np.einsum("jc,jo->cjo", columns, grad_output[at])
    result = {"output": output.reshape(batch, *out_size, out_channels)}
    if mask is None:
        del grads["mask"]
    per_position = (batch, *out_size, -1)
    shapes = {"input": input.shape, "filters": filters.shape}
    for name, gradient in grads.items():
        result[f"grad_{name}"] = gradient.reshape(shapes.get(name, per_position))
    return result
