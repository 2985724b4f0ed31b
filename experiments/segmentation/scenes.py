"""Scenes composed of glyphs under random affine maps, with exact masks; drawn from seeds.

Needs NumPy alone.
"""

import hashlib
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.segmentation.glyphs import Glyphs

SIZE = 128  # height and width of a scene, in pixels
# An object's size is the square root of its mask's area, in pixels, before others cover it.
SIZES = (8, 80)
# Test scenes whose objects are all of one size have these bounds.
SIZE_BINS = ((8, 14), (14, 25), (25, 45), (45, 80))
MOST_OBJECTS = 16
CLUTTER_SHARE = 0.3  # of the objects
OPAQUE = 0.5  # alpha at and above which a pixel is the object's


class Kind(NamedTuple):
    """What scenes of a set have in common."""

    seed: int
    sizes: tuple[float, float] = SIZES  # bounds of the objects' sizes
    unseen: bool = False  # whether of the glyphs that are kept from training, or of the others


def bin_name(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]}-{bounds[1]} px"


TRAIN, MIXED, UNSEEN = "train", "mixed", "unseen"
TEST_KINDS = {
    MIXED: Kind(seed=2),
    UNSEEN: Kind(seed=3, unseen=True),
    **{bin_name(sizes): Kind(seed=4 + i, sizes=sizes) for i, sizes in enumerate(SIZE_BINS)},
}
KINDS = {TRAIN: Kind(seed=1), **TEST_KINDS}


class Scenes(NamedTuple):
    """Images `[N, SIZE, SIZE, 3]` and labels `[N, SIZE, SIZE]`, both uint8."""

    images: np.ndarray
    labels: np.ndarray


class Sprite(NamedTuple):
    """A glyph at halved sizes, from full to small: `[s + 2, s + 2, 4]`, RGBA in float32 from 0 to
    1, premultiplied by alpha, with a border of zeros. `size` is that of its mask, in pixels of the
    first."""

    levels: list[np.ndarray]
    size: float


def make_sprite(image: np.ndarray) -> Sprite:
    """Makes a sprite of a glyph, RGBA in uint8, `[S, S, 4]`."""
    rgba = image.astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    levels = []
    size = float(np.sqrt(np.count_nonzero(rgba[..., 3] >= OPAQUE)))
    while True:
        levels.append(np.pad(rgba, ((1, 1), (1, 1), (0, 0))))
        side = rgba.shape[0] // 2 * 2
        if side < 16:
            return Sprite(levels, size)
        rgba = rgba[:side, :side].reshape(side // 2, 2, side // 2, 2, 4).mean(axis=(1, 3))


class Object(NamedTuple):
    """A sprite in a scene."""

    sprite: Sprite
    label: int
    size: float  # in pixels of the scene
    matrix: np.ndarray  # [2, 2], of determinant ±1: the affine map of (y, x), without the size
    centre: np.ndarray  # [2], (y, x) in pixels
    gain: np.ndarray  # [3], of the colours


def sample(thing: Object) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of the scene that an object may touch, and the object there, RGBA premultiplied.

    The level of the sprite is the one that is at most twice as fine as the scene; between its
    pixels, interpolation is bilinear.
    """
    shrink = thing.sprite.size / thing.size  # pixels of the first level for one of the scene
    level = int(np.clip(np.log2(shrink), 0, len(thing.sprite.levels) - 1))
    pixels = thing.sprite.levels[level]
    shrink /= 2**level
    half = (pixels.shape[0] - 2) / 2
    reach = np.abs(thing.matrix).sum(axis=1) * (half + 1) / shrink  # of the border's corners
    start = np.clip(np.floor(thing.centre - reach), 0, SIZE).astype(int)
    stop = np.clip(np.ceil(thing.centre + reach) + 1, 0, SIZE).astype(int)
    inverse = np.linalg.inv(thing.matrix) * shrink
    y = np.arange(start[0], stop[0])[:, np.newaxis] - thing.centre[0]
    x = np.arange(start[1], stop[1])[np.newaxis] - thing.centre[1]
    # Pixel 0 of the border lies at -1 of the sprite, whose centre is at half - 0.5.
    positions = [row[0] * y + row[1] * x + half + 0.5 for row in inverse]
    last = pixels.shape[0] - 1
    positions = [np.clip(position, 0, last - 1e-3).astype(np.float32) for position in positions]
    (y0, fy), (x0, fx) = [(p.astype(np.intp), p % 1) for p in positions]
    fy, fx = fy[..., np.newaxis], fx[..., np.newaxis]
    flat = pixels.reshape(-1, 4)
    index = y0 * pixels.shape[1] + x0
    upper = flat[index] * (1 - fx) + flat[index + 1] * fx
    lower = flat[index + pixels.shape[1]] * (1 - fx) + flat[index + pixels.shape[1] + 1] * fx
    return np.s_[start[0] : stop[0], start[1] : stop[1]], upper * (1 - fy) + lower * fy


def compose(background: np.ndarray, objects: list[Object]) -> tuple[np.ndarray, np.ndarray]:
    """Paints objects, the later over the earlier. Returns colours from 0 to 1, and labels."""
    colours = background.copy()
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for thing in objects:
        part, rgba = sample(thing)
        alpha = rgba[..., 3:]
        colours[part] = colours[part] * (1 - alpha) + np.minimum(rgba[..., :3] * thing.gain, alpha)
        labels[part][alpha[..., 0] >= OPAQUE] = thing.label
    return colours, labels


class Painter:
    """Draws scenes from the glyphs that one kind of scenes has."""

    def __init__(self, glyphs: Glyphs, kind: Kind):
        chosen = glyphs.unseen() == kind.unseen
        self.kind = kind
        self.sprites = [
            [make_sprite(image) for image in glyphs.images[chosen & (glyphs.labels == label)]]
            for label in range(int(glyphs.labels.max()) + 1)
        ]

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels of the scene of this number, whatever was drawn before."""
        rng = np.random.default_rng([self.kind.seed, index])
        objects = []
        area = rng.uniform(0.15, 0.6) * SIZE**2
        while area > 0 and len(objects) < MOST_OBJECTS:
            objects.append(self.draw_object(rng))
            area -= objects[-1].size ** 2
        colours, labels = compose(draw_background(rng), objects)
        colours += rng.uniform(0, 0.06) * rng.standard_normal(colours.shape, np.float32)
        return (np.clip(colours, 0, 1) * 255 + 0.5).astype(np.uint8), labels

    def draw_object(self, rng: np.random.Generator) -> Object:
        """A glyph at any place, of any size that the kind has."""
        label = 0 if rng.random() < CLUTTER_SHARE else int(rng.integers(1, len(self.sprites)))
        sprite = self.sprites[label][rng.integers(len(self.sprites[label]))]
        size = float(np.exp(rng.uniform(*np.log(self.kind.sizes))))
        inset = min(0.35 * size, SIZE / 2 - 1)  # so that most of the object is in the scene
        return Object(
            sprite,
            label,
            size,
            draw_matrix(rng),
            rng.uniform(inset, SIZE - 1 - inset, 2),
            (rng.uniform(0.6, 1.2) * rng.uniform(0.85, 1.15, 3)).astype(np.float32),
        )


def draw_matrix(rng: np.random.Generator) -> np.ndarray:
    """An affine map that keeps areas: a turn by any angle, a shear, a stretch, maybe mirrored."""
    angle, shear = rng.uniform(-np.pi, np.pi), rng.uniform(-0.4, 0.4)
    stretch = np.exp(rng.uniform(-0.3, 0.3))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = rng.choice([-1, 1])
    return turn @ [[1, shear], [0, 1]] @ np.diag([stretch, mirror / stretch])


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """A gradient between two colours with clouds on it, float32 `[SIZE, SIZE, 3]`."""
    along = np.linspace(-1, 1, SIZE, dtype=np.float32)
    angle = rng.uniform(-np.pi, np.pi)
    ramp = (np.cos(angle) * along[:, np.newaxis] + np.sin(angle) * along)[..., np.newaxis]
    first, second = rng.uniform(0, 1, (2, 3)).astype(np.float32)
    colours = first + (second - first) * (ramp / 2.9 + 0.5)
    cells = int(rng.integers(3, 17))
    coarse = rng.standard_normal((cells + 1, cells + 1, 3), np.float32)
    at = np.linspace(0, cells - 1e-3, SIZE, dtype=np.float32)
    whole = at.astype(int)
    part = (at % 1)[:, np.newaxis, np.newaxis]
    rows = coarse[whole] * (1 - part) + coarse[whole + 1] * part
    part = part[:, 0]
    clouds = rows[:, whole] * (1 - part) + rows[:, whole + 1] * part
    return colours + np.float32(rng.uniform(0, 0.2)) * clouds


# --- Sets of scenes, kept in files ---


def prepare(glyphs: Glyphs, counts: dict[str, int], cache: Path, processes: int) -> Path:
    """Draws the first scenes of each kind, unless the cache has them. Returns their folder.

    Args:
      glyphs: what scenes are composed of.
      counts: how many of each kind.
      cache: a folder. Within it, the name of the scenes' folder tells glyphs, counts and this code.
      processes: how many draw.
    """
    told = hashlib.sha256(repr((sorted(counts.items()), glyphs.digest())).encode())
    told.update(Path(__file__).read_bytes())
    folder = Path(cache) / f"scenes-{told.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"unfinished-{folder.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        for name, count in counts.items():
            scenes = draw_scenes(glyphs, KINDS[name], count, processes)
            for part, array in scenes._asdict().items():
                np.save(unfinished / f"{name}.{part}.npy", array)
        if not folder.is_dir():  # another process may have been faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load(folder: Path, name: str) -> Scenes:
    """Scenes of a kind from a folder that `prepare` made."""
    return Scenes(*(np.load(Path(folder) / f"{name}.{part}.npy") for part in Scenes._fields))


def draw_scenes(glyphs: Glyphs, kind: Kind, count: int, processes: int = 1) -> Scenes:
    """The first `count` scenes of a kind. They do not depend on the number of processes."""
    painter = Painter(glyphs, kind)
    if processes == 1:
        return _stacked([painter.draw(index) for index in range(count)])
    # Forked processes share the sprites, and import nothing.
    with ProcessPoolExecutor(processes, get_context("fork"), _set_painter, (painter,)) as pool:
        return _stacked(pool.map(_draw, range(count), chunksize=16))


def _stacked(pairs) -> Scenes:
    images, labels = zip(*pairs, strict=True)
    return Scenes(np.stack(images), np.stack(labels))


def _set_painter(painter: Painter) -> None:
    global _painter  # noqa: PLW0603
    _painter = painter


def _draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    return _painter.draw(index)
