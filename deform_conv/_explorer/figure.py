"""`plot_offsets`: where deformable layers look, as a figure for print."""

import itertools

import numpy as np

from .._arguments import integer_or_none, items, shown
from .._files import path_of_a_file, replacing
from .picture import picture_of
from .record import Level, Recording, record, sample_levels

# Of a level's dots: the first is the largest.
_AREAS = (26, 10, 5)
_PANEL_INCHES, _DOTS_PER_INCH = 3.0, 200
_MOST_LEVELS = 3


def plot_offsets(
    model, image, path=None, *, layer=None, position=None, levels=None, group=0, picture=None
):
    """Draws where one output position of a deformable layer samples, level by level.

    A panel for each level has the image and the samples on it: first those of `layer`, joined to
    the places of the regular grid; then those of the deformable layer that its input comes from, at
    the positions of the first ones; and so on, as in figure 6 of Dai et al., arXiv:1703.06211. The
    colour is the offset's length in pixels of the image, the size the mask. Samples outside of
    their layer's input read zeros; they are hollow, and have no next level.

    Needs matplotlib.

    Args:
      model, image, picture: as in `explore`.
      path: of a file to write; its suffix says which kind, such as .pdf or .png. None for no file.
      layer: the name of a deformable layer, or its number in the order of the calls, from 0; None
        for the last one.
      position: (y, x) of the layer's output; None for the middle.
      levels: how many levels, from 1 to 3; None for as many as there are.
      group: the deformable group that is shown of every layer; of one with fewer, the last.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ValueError: an argument does not fit, or as in `explore`.
      ImportError: matplotlib is not installed.

    Example:
      >>> plot_offsets(model, image, "offsets.pdf", position=(7, 7))
    """
    figure = _new_figure()
    if path is not None:
        path = path_of_a_file(path)
        kinds = figure.canvas.get_supported_filetypes()
        if path.suffix[1:].lower() not in kinds:
            raise ValueError(
                f"path must end in one of .{', .'.join(sorted(kinds))}. Received: "
                f"{shown(str(path))}"
            )
    recording = record(model, image)
    index = _index_of(layer, recording)
    out_size = recording.layers[index].out_size
    position = _position(position, out_size)
    group = _number(group, "group", max(each.groups for each in recording.layers) - 1)
    count = _MOST_LEVELS if levels is None else _number(levels, "levels", _MOST_LEVELS, least=1)
    groups = [min(group, each.groups - 1) for each in recording.layers]
    found = sample_levels(recording, index, position, count, groups)
    _draw(figure, recording, found, picture_of(recording, picture))
    if path is not None:
        with replacing(path) as file:
            figure.savefig(file, dpi=_DOTS_PER_INCH)
    return figure


def _new_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_offsets needs matplotlib: pip install 'tf-deform-conv[plot]'"
        ) from error
    return Figure(layout="constrained")  # without pyplot, which would keep it and may open a window


def _number(value, argument: str, most: int, least: int = 0) -> int:
    number = integer_or_none(value, argument)
    if number is None or not least <= number <= most:
        raise ValueError(
            f"{argument} must be an integer from {least} to {most}. Received: {shown(value)}"
        )
    return number


def _index_of(layer, recording: Recording) -> int:
    names = [each.name for each in recording.layers]
    if layer is None:
        return len(names) - 1
    if isinstance(layer, str):
        if layer not in names:
            raise ValueError(f"layer must be one of {', '.join(names)}. Received: {shown(layer)}")
        return names.index(layer)
    return _number(layer, "layer", len(names) - 1)


def _position(position, out_size) -> tuple[int, int]:
    if position is None:
        return out_size[0] // 2, out_size[1] // 2
    numbers = items(position, "position") or ()
    if len(numbers) != 2:
        raise ValueError(f"position must be (y, x). Received: {shown(position)}")
    y, x = (
        _number(number, "position", size - 1)
        for number, size in zip(numbers, out_size, strict=True)
    )
    return y, x


def _draw(figure, recording: Recording, found: list[Level], picture: np.ndarray) -> None:
    height, width = recording.size
    figure.set_size_inches(
        _PANEL_INCHES * len(found) + 0.7, _PANEL_INCHES * min(2, height / width) + 0.4
    )
    lengths = np.concatenate([level.lengths[level.reads] for level in found])
    farthest = max(lengths.max(initial=0.0), 1e-6)
    limits = _limits(recording.size, found)
    for axis, number, level in zip(
        figure.subplots(1, len(found), squeeze=False)[0], itertools.count(), found, strict=False
    ):
        axis.imshow(
            picture.squeeze(-1) if picture.shape[-1] == 1 else picture,
            cmap="gray",
            vmin=0,
            vmax=255,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="nearest",
            # On grey, so that both dark and light marks are seen on it.
            alpha=0.6,
        )
        axis.set_facecolor("0.5")
        if number == 0:
            _draw_grid(axis, level)
        dots = _draw_dots(axis, level, _AREAS[number], farthest)
        axis.set_ylim(*limits[0][::-1])
        axis.set_xlim(*limits[1])
        axis.set_xticks([])
        axis.set_yticks([])
        name = recording.layers[level.layer].name
        axis.set_title(f"{name}: {len(level.reads)} samples", fontsize=8)
    bar = figure.colorbar(dots, ax=figure.axes, fraction=0.03, aspect=30, shrink=0.8)
    bar.set_label("offset in pixels of the image", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _draw_grid(axis, level: Level) -> None:
    """The regular grid, with lines to the samples."""
    ends = np.stack([level.regular, level.pixels])  # [2, S, 2]
    axis.plot(ends[..., 1], ends[..., 0], color="white", linewidth=0.8, zorder=2)
    axis.scatter(
        *level.regular.T[::-1], s=14, marker="s", facecolors="none", edgecolors="white", zorder=2
    )


def _draw_dots(axis, level: Level, area: float, farthest: float):
    areas = np.full(len(level.reads), area, float)
    if level.mask is not None:
        weights = np.nan_to_num(np.abs(level.mask))
        areas *= 0.1 + 0.9 * weights / max(weights.max(initial=0.0), 1e-12)
    y, x = level.pixels.T
    axis.scatter(
        *(values[~level.reads] for values in (x, y, areas)),
        facecolors="none",
        edgecolors="tab:red",
        linewidths=0.6,
        zorder=3,
    )
    return axis.scatter(
        *(values[level.reads] for values in (x, y, areas, level.lengths)),
        cmap=_colours(),
        vmin=0,
        vmax=farthest,
        edgecolors="black",
        linewidths=0.2,
        zorder=3,
    )


def _colours():
    """Those of "plasma", without its darkest ones, which would not be seen on dark images."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["plasma"](np.linspace(0.25, 1, 192)))


def _limits(size, found: list[Level]) -> list[tuple[float, float]]:
    """The least and greatest h and w to show: the image, and up to a quarter of it around."""
    places = np.concatenate([level.pixels for level in found])
    places = places[np.isfinite(places).all(axis=-1)]
    return [
        (
            max(along.min(initial=0) - 1, -extent / 4),
            min(along.max(initial=extent - 1) + 1, extent * 5 / 4),
        )
        for extent, along in zip(size, places.T, strict=True)
    ]
