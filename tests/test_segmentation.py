"""The segmentation experiment: scenes, networks, training and report, with shapes for glyphs."""

import itertools
import json

import numpy as np
import pytest
from conftest import error_of, script
from PIL import Image, ImageDraw

from experiments import results
from experiments.page import END, begin, with_report
from experiments.segmentation import glyphs, metrics, network, report, scenes, training
from experiments.segmentation.glyphs import NAMES, Glyphs
from experiments.segmentation.scenes import KINDS, MIXED, TEST_KINDS, TRAIN
from experiments.segmentation.settings import ARMS, EQUAL_PARAMETERS

SIDE = 64


def drawn_shape(corners: int, colour: tuple[int, int, int]) -> np.ndarray:
    image = Image.new("RGBA", (SIDE, SIDE))
    circle = (SIDE / 2, SIDE / 2, 0.45 * SIDE)
    ImageDraw.Draw(image).regular_polygon(circle, corners, fill=(*colour, 255))
    return np.array(image)


@pytest.fixture(scope="module")
def shapes() -> Glyphs:
    """Polygons: a label has a number of corners, and four colours."""
    labels = np.repeat(np.arange(len(NAMES), dtype=np.uint8), 4)
    colours = [(250, 20, 20), (20, 200, 20), (20, 20, 250), (250, 250, 250)]
    images = [drawn_shape(3 + int(label), colours[i % 4]) for i, label in enumerate(labels)]
    return Glyphs(np.stack(images), labels)


# --- Glyphs ---


def test_glyphs_of_the_font_have_all_labels():
    if not glyphs.FONT.is_file():
        pytest.skip(f"no font {glyphs.FONT}")
    drawn = glyphs.render()
    assert set(drawn.labels) == set(range(len(NAMES)))
    assert drawn.images[..., 3].any(axis=(1, 2)).all()
    assert len(np.unique(drawn.images, axis=0)) == len(drawn.images)


def test_glyphs_are_read_as_they_were_written(shapes, tmp_path):
    path = tmp_path / "glyphs.npz"
    path.write_bytes(shapes.encoded())
    loaded = glyphs.load(path)
    assert np.array_equal(loaded.images, shapes.images)
    assert loaded.digest() == shapes.digest()


def test_every_fourth_glyph_of_a_label_is_kept_from_training(shapes):
    assert shapes.unseen().tolist() == [False, False, False, True] * len(NAMES)


# --- Scenes ---


def test_scenes_depend_on_kind_and_number_alone(shapes):
    first = scenes.draw_scenes(shapes, KINDS[MIXED], 6)
    image, labels = scenes.Painter(shapes, KINDS[MIXED]).draw(4)
    assert np.array_equal(image, first.images[4])
    assert np.array_equal(labels, first.labels[4])
    again = scenes.draw_scenes(shapes, KINDS[MIXED], 6, processes=2)
    assert np.array_equal(again.images, first.images)
    assert len(np.unique(first.images, axis=0)) == 6
    assert len({kind.seed for kind in KINDS.values()}) == len(KINDS)


def test_scenes_have_all_labels(shapes):
    for kind in TEST_KINDS.values():
        assert set(np.unique(scenes.draw_scenes(shapes, kind, 60).labels)) == set(range(len(NAMES)))


def test_unseen_scenes_share_no_glyph_with_training(shapes):
    def colours_of(name):
        sprites = itertools.chain(*scenes.Painter(shapes, KINDS[name]).sprites)
        return {tuple(sprite.levels[0][SIDE // 2, SIDE // 2]) for sprite in sprites}

    assert colours_of(TRAIN) == colours_of(MIXED)
    assert not colours_of(TRAIN) & colours_of("unseen")


def test_bins_divide_the_sizes_and_objects_keep_to_them(shapes, rng):
    edges = [lower for lower, _ in scenes.SIZE_BINS]
    assert [*edges, scenes.SIZES[1]] == [scenes.SIZES[0], *(up for _, up in scenes.SIZE_BINS)]
    for bounds in scenes.SIZE_BINS:
        painter = scenes.Painter(shapes, KINDS[scenes.bin_name(bounds)])
        sizes = [painter.draw_object(rng).size for _ in range(50)]
        assert bounds[0] <= min(sizes) < max(sizes) <= bounds[1]


def an_object(image, label=1, matrix=((1, 0), (0, 1)), size=None, centre=(63.5, 63.5)):
    sprite = scenes.make_sprite(image)
    parts = (np.array(matrix, float), np.array(centre), np.ones(3, np.float32))
    return scenes.Object(sprite, label, size or sprite.size, *parts)


def labels_of(*objects):
    return scenes.compose(np.zeros((scenes.SIZE, scenes.SIZE, 3), np.float32), objects)[1]


@pytest.mark.parametrize("turns", range(4))
def test_mask_is_where_the_glyph_is_opaque(turns, rng):
    image = drawn_shape(3, (255, 0, 0))
    image[..., 3] = rng.integers(0, 256, (SIDE, SIDE))
    matrix = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns)  # as np.rot90 turns
    begin = (scenes.SIZE - SIDE) // 2
    expected = np.zeros((scenes.SIZE, scenes.SIZE), bool)
    opaque = np.rot90(image[..., 3] / 255 >= 0.5, turns)
    expected[begin : begin + SIDE, begin : begin + SIDE] = opaque
    assert np.array_equal(labels_of(an_object(image, matrix=matrix)) == 1, expected)


def test_size_is_the_root_of_the_masks_area(rng):
    for size in (10, 20, 40, 80):
        thing = an_object(drawn_shape(8, (255, 0, 0)), matrix=scenes.draw_matrix(rng), size=size)
        assert np.sqrt(np.count_nonzero(labels_of(thing))) == pytest.approx(size, rel=0.06)


def test_later_objects_cover_earlier_ones():
    solid, faint = drawn_shape(8, (255, 0, 0)), drawn_shape(8, (255, 0, 0))
    faint[..., 3] //= 3
    below = an_object(solid, 1, size=60)
    apart = labels_of(below)
    above = an_object(solid, 2, size=30)
    assert np.array_equal(labels_of(below, above), np.where(labels_of(above), 2, apart))
    clutter = labels_of(below, an_object(solid, 0, size=30))
    assert np.array_equal(clutter, np.where(labels_of(above), 0, apart))
    ghost = an_object(solid, 2, size=30)._replace(
        sprite=scenes.make_sprite(faint)._replace(size=50)
    )
    assert np.array_equal(labels_of(below, ghost), apart)


# --- Metrics ---


def test_iou_is_that_of_sets_of_pixels(rng):
    truth, prediction = rng.integers(0, 4, (2, 3, 8, 8), np.uint8)
    expected = []
    for label in range(5):  # the last one is nowhere
        a, b = ({*zip(*np.nonzero(of == label), strict=True)} for of in (truth, prediction))
        expected.append(len(a & b) / len(a | b) if a | b else None)
    found = metrics.iou(metrics.confusion(truth, prediction, 5))
    assert found == expected
    assert metrics.mean_iou(found) == pytest.approx(np.mean(expected[:4]))


# --- Networks ---


@pytest.fixture(scope="module")
def models():
    return {name: network.build(arm) for name, arm in ARMS.items()}


def test_compared_networks_have_as_many_parameters(models):
    count = {name: network.parameters(model) for name, model in models.items()}
    for deformable, regular in EQUAL_PARAMETERS.items():
        assert count[regular] == pytest.approx(count[deformable], rel=0.01)
        assert ARMS[deformable].widths == ARMS["regular"].widths
    assert count["regular"] < count["deformable"] < count["modulated"]


def test_last_two_stages_are_deformable(models):
    for name, arm in ARMS.items():
        layers = network.deformable_layers(models[name])
        sizes = [layer.input.shape[1] for layer in layers]
        assert sizes == ([32, 32, 16, 16] if arm.deformable else [])
        assert all(layer.modulated == arm.modulated for layer in layers)


# --- Training ---

OPTIONS = ["--steps", "12", "--batch-size", "4", "--train-scenes", "16", "--test-scenes", "3"]


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """Options with which one network has been trained, and its record."""
    folder = tmp_path_factory.mktemp("segmentation")
    (folder / "glyphs.npz").write_bytes(shapes.encoded())
    options = [*OPTIONS, "--arm", "modulated", "--seed", "1", "--glyphs", folder / "glyphs.npz"]
    options += ["--output", folder / "output", "--cache", folder / "cache"]
    script("-m", "experiments.segmentation.train", *options)
    return options, json.loads((folder / "output" / "modulated-1.json").read_text())


def test_training_learns_and_moves_samples(trained):
    _, record = trained
    assert len(record["loss"]) == 3  # 16 scenes are 4 steps
    assert record["loss"][-1] < 0.8 * record["loss"][0]
    for offsets in record["mean_offset"].values():
        assert list(offsets) == ["deform1", "deform2", "deform3", "deform4"]
        assert min(offsets.values()) > 0


def test_record_tells_results_and_where_they_come_from(trained):
    _, record = trained
    assert (record["arm"], record["seed"]) == ("modulated", 1)
    assert record["settings"]["steps"] == 12
    assert "TensorFlow" in record["environment"]["versions"]
    for name, ious in record["iou"].items():
        assert list(ious) == list(NAMES)
        assert record["mean_iou"][name] == metrics.mean_iou(list(ious.values()))


def test_finished_runs_are_not_made_again(trained):
    options, _ = trained
    output = options[options.index("--output") + 1]
    before = (output / "modulated-1.json").stat().st_mtime_ns
    assert script("-m", "experiments.segmentation.train", *options).stdout.startswith("0 runs")
    assert (output / "modulated-1.json").stat().st_mtime_ns == before
    more = [*options, "--steps", "13"]
    assert "was made with other settings" in error_of("-m", "experiments.segmentation.train", *more)


def test_flips_turn_images_and_labels_alike(rng):
    flip = np.array(list(itertools.product([False, True], repeat=2)))
    for shape in ((4, 5, 6, 3), (4, 5, 6)):
        batch = rng.random(shape)
        expected = [
            image[:: -1 if vertically else 1, :: -1 if across else 1]
            for image, (vertically, across) in zip(batch, flip, strict=True)
        ]
        assert np.array_equal(training.flipped(batch, flip), expected)


# --- Report ---


def test_report_draws_what_the_records_say(trained, tmp_path):
    options, record = trained
    page, picture = tmp_path / "page.md", tmp_path / "picture.png"
    page.write_text(f"before\n{begin(report.SCRIPT)}old\n{END}after\n")
    files = ["--page", page, "--picture", picture]
    output = options[options.index("--output") + 1]
    script("-m", "experiments.segmentation.report", "--results", output, *files)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    iou = 100 * record["mean_iou"][MIXED]
    assert f"| {ARMS['modulated'].title} | {record['parameters']:,} | 1 | {iou:.1f} |" in text
    assert Image.open(picture).width > 3 * scenes.SIZE  # image, truth, prediction


def test_tables_of_the_page_are_those_of_the_kept_results():
    page = report.PAGE.read_text(encoding="utf-8")
    parts = report.parts_of(results.read(report.RESULTS))
    assert with_report(page, report.SCRIPT, parts) == page
