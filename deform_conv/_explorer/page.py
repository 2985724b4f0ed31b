"""`explore`: a page that shows where deformable layers look."""

import base64
import importlib.resources
import json
import math
from pathlib import Path

import numpy as np

from .._files import path_of_a_file, replacing
from .picture import encoded, picture_of
from .record import Recording, SampledLayer, record

# What all offsets and masks of a page take at most, in bytes before base64 makes 4 of 3.
_LARGEST_DATA = 2_600_000
_BINS, _SECTORS = 32, 24


def explore(model, image, path="offsets.html", *, picture=None) -> Path:
    """Writes a page that shows where the deformable layers of a model look in an image.

    The page is one HTML file that needs nothing else. Pointing at a place shows where the output
    position there samples, level through level of deformable layers down to the image; maps and
    histograms show offsets and masks of each layer. It is described in docs/explorer.md.

    Every `DeformableConv2D`, `DeformableConv2DV3` and `DeformableConv2DV4` is found that the model
    calls: in nested models, shared, with offsets of its own or given ones. Offsets and masks are
    kept as float16, within 1/2048 of their value. Where they would make the file larger than 5 MB,
    every second position of the largest layer is kept, or fewer; the page says so.

    Args:
      model: a Keras model of one input.
      image: one image as the model takes it, `[H, W, C]`, or `[C, H, W]` where the first deformable
        layer is "channels_first"; a batch of one will do.
      path: of the file to write.
      picture: what to show in place of `image`, such as the photo before preprocessing: `[h, w]`,
        `[h, w, 1]` or `[h, w, 3]`, of any size. Numbers from 0 to 1 or from 0 to 255 are shown as
        they are, others stretched.

    Returns:
      The path.

    Raises:
      ValueError: an argument does not fit, or the model calls no such layer, or calls one within a
        loop.
      OSError: the file cannot be written.

    Example:
      >>> deform_conv.explore(model, image, "offsets.html")
    """
    path = path_of_a_file(path)
    recording = record(model, image)
    kind, data = encoded(picture_of(recording, picture))
    page = page_of(
        {
            "model": model.name,
            "height": recording.size[0],
            "width": recording.size[1],
            "picture": f"data:{kind};base64,{_base64(data)}",
            "layers": _layers(recording),
        }
    )
    with replacing(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def page_of(data: dict) -> str:
    """The page of data that explorer.js understands."""
    folder = importlib.resources.files(__package__)

    def part(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    page = part("explorer.html")
    # JSON has no other place for "<", which could end the element that holds it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    for name, content in (
        ("explorer.css", part("explorer.css")),
        ("sampling.js", part("sampling.js")),
        ("elements.js", part("elements.js")),
        ("explorer.js", part("explorer.js")),
        ("data", text),
    ):
        page = page.replace(f"/* {name} */", content)
    return page


def _layers(recording: Recording) -> list[dict]:
    return [
        _layer(layer, step)
        for layer, step in zip(recording.layers, _steps(recording.layers), strict=True)
    ]


def _steps(layers: list[SampledLayer]) -> list[int]:
    """For each layer, 2 where every second position is kept along both axes, and so on."""
    steps = [1] * len(layers)

    def kept(index: int) -> int:
        """The bytes of a layer; 0 of one position, since there are no fewer."""
        layer, step = layers[index], steps[index]
        positions = math.prod(-(-size // step) for size in layer.out_size)
        numbers = 2 if layer.mask is None else 3
        per_position = math.prod(layer.offset.shape[2:4]) * numbers * 2
        return positions * per_position if positions > 1 else 0

    while sum(map(kept, range(len(layers)))) > _LARGEST_DATA:
        steps[max(range(len(layers)), key=kept)] += 1
    return steps


def _layer(layer: SampledLayer, step: int) -> dict:
    """A layer as the page has it."""
    lengths = np.hypot(layer.offset[..., 0], layer.offset[..., 1])
    top = _top(lengths)
    mask_range = None
    if layer.mask is not None:
        mask_range = [min(0.0, -_top(-layer.mask)), _top(layer.mask)]
    return {
        "name": layer.name,
        "kind": layer.kind,
        "inSize": layer.in_size,
        "outSize": layer.out_size,
        "strides": layer.strides,
        "dilation": layer.dilation_rate,
        "start": layer.start,
        "firstMiddle": layer.middle,
        "scale": layer.scale,
        "shift": layer.shift,
        "taps": layer.taps.tolist(),
        "groups": layer.groups,
        "previous": layer.previous,
        "step": step,
        "offset": _halves(layer.offset[::step, ::step]),
        "mask": None if layer.mask is None else _halves(layer.mask[::step, ::step]),
        "top": top,
        "maskRange": mask_range,
        "perGroup": [_of_group(layer, lengths, g, top, mask_range) for g in range(layer.groups)],
    }


def _of_group(layer: SampledLayer, lengths: np.ndarray, g: int, top: float, mask_range) -> dict:
    """Figures and histograms of all samples of a deformable group."""
    offset, lengths = layer.offset[:, :, g], lengths[:, :, g]
    finite = np.isfinite(lengths)
    angles = np.arctan2(offset[..., 0], offset[..., 1])[finite]
    sectors, _ = np.histogram(
        angles % (2 * np.pi), _SECTORS, (0, 2 * np.pi), weights=lengths[finite]
    )
    return {
        "mean": _mean(lengths),
        "samples": lengths.size,
        "outside": int(np.sum(~layer.reads[:, :, g] & ~np.isnan(lengths))),
        "notNumbers": int(np.isnan(lengths).sum()),
        "lengths": _histogram(lengths, 0.0, top),
        "directions": _shares(sectors),
        "maskMean": None if layer.mask is None else _mean(layer.mask[:, :, g]),
        "masks": None if layer.mask is None else _histogram(layer.mask[:, :, g], *mask_range),
    }


def _top(values: np.ndarray) -> float:
    """The number that 995 of 1000 do not exceed, and at least one that can be divided by."""
    finite = values[np.isfinite(values)]
    return max(float(np.quantile(finite, 0.995)) if finite.size else 0.0, 1e-6)


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def _histogram(values: np.ndarray, least: float, greatest: float) -> list[float]:
    """The shares in equal bins. Those beyond the ends are in the first and the last one."""
    finite = np.clip(values[np.isfinite(values)], least, greatest)
    return _shares(np.histogram(finite, _BINS, (least, greatest))[0])


def _shares(counts: np.ndarray) -> list[float]:
    total = counts.sum()
    return [round(float(count / total), 5) if total else 0.0 for count in counts]


def _halves(values: np.ndarray) -> str:
    largest = np.finfo(np.float16).max  # 65504, which is far enough
    return _base64(np.clip(values, -largest, largest).astype("<f2").tobytes())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
