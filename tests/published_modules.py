"""The published modules of versions 3 and 4, slowly, in NumPy: an oracle of the layers.

Written from the papers (arXiv:2211.05778, arXiv:2401.06197) and what their code does. The taps are
in the modules' order, x-major, and their offsets (x, y).
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def random_state(rng, version, channels, kernel, groups, **options) -> dict[str, np.ndarray]:
    """A state dict of a module, whose offsets are of pixels and whose masks differ."""
    taps = kernel[0] * kernel[1] - options.get("remove_center", False)

    def linear(key, rows, scale=0.5):
        weight = scale * rng.standard_normal((rows, channels)) / math.sqrt(channels)
        return {f"{key}.weight": weight, f"{key}.bias": scale * rng.standard_normal(rows)}

    def depthwise(key, size):
        weight = rng.standard_normal((channels, 1, *size)) / math.prod(size)
        return {f"{key}.weight": weight, f"{key}.bias": rng.standard_normal(channels)}

    dw_kernel = options.get("dw_kernel_size")
    if version == 3:
        state = {
            **depthwise("dw_conv.0", dw_kernel or kernel),
            "dw_conv.1.1.weight": 1 + rng.standard_normal(channels) / 4,
            "dw_conv.1.1.bias": rng.standard_normal(channels) / 4,
            **linear("offset", groups * taps * 2, 2),
            **linear("mask", groups * taps),
            **linear("input_proj", channels, 1),
            **linear("output_proj", channels, 1),
        }
    else:
        state = linear("offset_mask", 8 * math.ceil(groups * taps * 3 / 8), 2)
        if dw_kernel:
            state |= depthwise("offset_mask_dw", dw_kernel)
        if not options.get("without_pointwise"):
            state |= linear("value_proj", channels, 1) | linear("output_proj", channels, 1)
            if not options.get("output_bias", True):
                del state["output_proj.bias"]
    if options.get("center_feature_scale"):
        weight = rng.standard_normal((groups, channels)) / math.sqrt(channels)
        state["center_feature_scale_proj_weight"] = weight
        state["center_feature_scale_proj_bias"] = rng.standard_normal(groups)
    return state


def published_module(
    state,
    images,
    *,
    version,
    kernel,
    strides,
    pads,
    dilations,
    groups,
    offset_scale=1.0,
    remove_center=False,
):
    """What the module computes of images [N, H, W, C], in float64.

    Offsets are taken at the pixel in the middle of each window, which at stride 1, with as many
    positions as pixels, is what the modules do. They do nothing of use elsewhere.

    Args:
      state: its state dict.
      kernel, strides, dilations: (h, w).
      pads: the zeros ((top, bottom), (left, right)).
    """
    axes = zip(images.shape[1:3], kernel, strides, dilations, pads, strict=True)
    middles = []
    for size, taps, stride, dilation, pad in axes:
        count = (size + sum(pad) - (taps - 1) * dilation - 1) // stride + 1
        middles.append((taps - 1) * dilation // 2 - pad[0] + stride * np.arange(count))
    at_middles = np.ix_(range(len(images)), *middles)

    features, values = images, images
    if version == 3:
        features = depthwise(images, state["dw_conv.0.weight"], state["dw_conv.0.bias"])
        features = layer_norm(features, state["dw_conv.1.1.weight"], state["dw_conv.1.1.bias"])
        features = 0.5 * features * (1 + erf(features / math.sqrt(2)))
        offset, logits = linear(features, state, "offset"), linear(features, state, "mask")
        values = linear(images, state, "input_proj")
        offset = offset.reshape(*offset.shape[:3], groups, -1, 2)
        exponentials = np.exp(logits.reshape(offset.shape[:-1]))
        mask = exponentials / exponentials.sum(-1, keepdims=True)
    else:
        if "offset_mask_dw.weight" in state:
            key = "offset_mask_dw"
            features = depthwise(images, state[f"{key}.weight"], state[f"{key}.bias"])
        taps = kernel[0] * kernel[1] - remove_center
        packed = linear(features, state, "offset_mask")[..., : 3 * groups * taps]
        packed = packed.reshape(*packed.shape[:3], groups, 3 * taps)
        offset = packed[..., : 2 * taps].reshape(*packed.shape[:4], taps, 2)
        mask = packed[..., 2 * taps :]
        if "value_proj.weight" in state:
            values = linear(images, state, "value_proj")
    offset, mask = offset[at_middles], mask[at_middles]
    outputs = aggregated(values, offset, mask, kernel, dilations, middles, offset_scale)
    if "center_feature_scale_proj_weight" in state:
        query = features[at_middles] if version == 3 else outputs
        share = linear(query, state, "center_feature_scale_proj", "_")
        share = np.repeat(1 / (1 + np.exp(-share)), images.shape[3] // groups, axis=-1)
        outputs = outputs * (1 - share) + values[at_middles] * share
    return linear(outputs, state, "output_proj") if "output_proj.weight" in state else outputs


def linear(inputs, state, key, separator="."):
    weight, bias = (state.get(f"{key}{separator}{name}", 0.0) for name in ("weight", "bias"))
    return inputs @ weight.T + bias


def depthwise(images, weight, bias):
    """A convolution of each channel with weight [C, 1, KH, KW], as large as the images."""
    kernel_h, kernel_w = weight.shape[2:]
    pads = [((size - 1) // 2, size // 2) for size in (kernel_h, kernel_w)]
    padded = np.pad(images, [(0, 0), *pads, (0, 0)])
    height, width = images.shape[1:3]
    return bias + sum(
        padded[:, y : y + height, x : x + width] * weight[:, 0, y, x]
        for y in range(kernel_h)
        for x in range(kernel_w)
    )


def layer_norm(features, weight, bias):
    mean = features.mean(-1, keepdims=True)
    variance = ((features - mean) ** 2).mean(-1, keepdims=True)
    return (features - mean) / np.sqrt(variance + 1e-6) * weight + bias


def aggregated(values, offset, mask, kernel, dilations, middles, offset_scale):
    """The weighted sums of samples: values [N, H, W, C], offset [N, OH, OW, G, taps, 2]."""
    reach_h, reach_w = ((k - 1) * d // 2 for k, d in zip(kernel, dilations, strict=True))
    grid = [
        (x * dilations[1] - reach_w, y * dilations[0] - reach_h)
        for x in range(kernel[1])
        for y in range(kernel[0])
    ]
    groups, taps = offset.shape[3:5]
    if taps < len(grid):
        del grid[len(grid) // 2]
    width = values.shape[3] // groups
    outputs = np.zeros((*offset.shape[:3], values.shape[3]))
    for n, row, column, group, tap in np.ndindex(offset.shape[:5]):
        x, y = offset_scale * (grid[tap] + offset[n, row, column, group, tap])
        channels = slice(group * width, (group + 1) * width)
        sample = bilinear(values[n, :, :, channels], middles[0][row] + y, middles[1][column] + x)
        outputs[n, row, column, channels] += mask[n, row, column, group, tap] * sample
    return outputs


def bilinear(image, h, w):
    """A sample of an image [H, W, C] extended with zeros."""
    top, left = math.floor(h), math.floor(w)
    total = np.zeros(image.shape[2])
    for y, share_y in ((top, top + 1 - h), (top + 1, h - top)):
        for x, share_x in ((left, left + 1 - w), (left + 1, w - left)):
            if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
                total += share_y * share_x * image[y, x]
    return total
