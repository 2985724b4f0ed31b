"""The experiment: scaled MNIST, the models, and each script run for real on a few digits."""

import re
import shutil

import cv2
import numpy as np
import pytest
from conftest import STOP_AFTER_ONE_EPOCH, error_of, script
from PIL import Image

from utils import mnist
from utils.model import (
    CONVOLUTION_NAMES,
    DEFORM,
    DEFORM_MODULATED,
    REGULAR,
    build_model,
    load_model,
    offsets_of,
    weights_file,
)
from utils.training import accuracy
from utils.tuning import copy_weights, frozen_variables
from utils.visualization import samples_of

# --- Scaled MNIST ---


@pytest.fixture(scope="module")
def digits():
    return mnist.load_mnist()


def test_mnist_is_whole(digits):
    train, test = digits
    assert train.images.shape == (60_000, 28, 28, 1)
    assert test.images.shape == (10_000, 28, 28, 1)
    assert set(train.labels) == set(range(10))


SCALED_MEANS = [6.88, 19.03, 3.01, 17.74, 7.71]


def test_scaling_shrinks_each_axis_by_a_factor_from_1_to_2_5(rng):
    square = np.zeros((500, 28, 28, 1), np.uint8)
    square[:, 4:24, 4:24] = 255
    scaled = mnist.scale_images(square, rng, shift=0.0)[..., 0] / 255.0
    # Interpolation keeps the sum along an axis through the square.
    heights, widths = (
        scaled[:, :, 13:15].sum(axis=1).mean(axis=1),
        scaled[:, 13:15].sum(axis=2).mean(axis=1),
    )
    factors = 20 / np.stack([heights, widths])
    assert 0.98 <= factors.min() <= 1.1
    assert 2.4 <= factors.max() <= 2.55
    assert np.abs(np.median(factors, axis=1) - 1.75).max() < 0.15
    # The axes are drawn independently.
    assert abs(np.corrcoef(factors)[0, 1]) < 0.15


@pytest.mark.parametrize("shift", [0.0, 1.0, 5.6])
def test_scaling_shifts_by_up_to_the_given_pixels(shift, rng):
    dot = np.zeros((400, 28, 28, 1), np.uint8)
    dot[:, 12:16, 12:16] = 255  # about the centre, which zooming leaves in place
    scaled = mnist.scale_images(dot, rng, shift)[..., 0].astype(float)
    mass = scaled.sum(axis=(1, 2))
    grid = np.arange(28) - 13.5
    centres = np.stack([(scaled.sum(axis=a) @ grid) / mass for a in (2, 1)], axis=1)
    assert np.abs(centres).max() <= shift + 0.1
    assert np.abs(centres).max() >= 0.9 * shift


def test_scaled_test_digits_are_the_same_in_every_run(digits):
    scaled = mnist.scaled_test_digits(digits[1])
    again = mnist.scaled_test_digits(digits[1])
    np.testing.assert_array_equal(scaled.images, again.images)
    np.testing.assert_array_equal(scaled.labels, digits[1].labels)
    # The published accuracies are on these.
    means = scaled.images[:5].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, SCALED_MEANS, atol=0.2)


def test_edges_are_repeated():
    ramp = np.tile(np.arange(10, 150, 5, dtype=np.uint8), (28, 1))
    warped = mnist.warp(ramp, mnist.zoom_matrix((2.0, 2.0)))
    # The ramp takes the middle half; beside it, its first and its last value go on.
    assert np.all(warped[:, :7] == ramp[0, 0])
    assert np.all(warped[:, -7:] == ramp[0, -1])


# --- Models ---


def test_deformable_model_starts_as_the_regular_one(digits):
    regular = build_model(REGULAR)
    images = digits[1].images[:16]
    for name in (DEFORM, DEFORM_MODULATED):
        model = build_model(name)
        copy_weights(regular, model)
        np.testing.assert_allclose(model(images), regular(images), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scaled", "at_least"),
    [
        (REGULAR, False, 99.3),
        (DEFORM, False, 99.15),
        (DEFORM, True, 98.9),
        (DEFORM_MODULATED, False, 99.2),
        (DEFORM_MODULATED, True, 99.1),
    ],
)
def test_shipped_weights_reach_the_published_accuracy(name, scaled, at_least, digits):
    test = mnist.scaled_test_digits(digits[1]) if scaled else digits[1]
    assert accuracy(load_model(name), test) >= at_least


def test_shipped_deformable_model_differs_from_the_regular_one_in_its_offsets_only(digits):
    regular, deform = load_model(REGULAR), load_model(DEFORM)
    for source, target in frozen_variables(regular, deform):
        np.testing.assert_array_equal(source.numpy(), target.numpy())
    scaled = mnist.scaled_test_digits(digits[1]).images[:100]
    for name in CONVOLUTION_NAMES:
        assert np.abs(offsets_of(deform, name, scaled)).mean() > 0.01  # from zeros


# --- Training scripts ---

FEW = ("--epochs", 2, "--train-digits", 256, "--test-digits", 200)
SCHEDULE = ("--unscaled-share", 0.25, "--unscaled-share-at-end", 0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint directory with a regular model, and what its training printed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, script("train_regular_conv.py", *FEW, "--checkpoint-dir", folder).stdout


def test_regular_training_writes_weights_and_tests_on_both_sets(trained):
    folder, printed = trained
    assert load_model(REGULAR, folder=folder)
    assert re.search(r"regular MNIST +\d+\.\d\d$", printed, re.M)
    assert re.search(r"scaled MNIST +\d+\.\d\d$", printed, re.M)
    assert not (folder / f"{REGULAR}.training").exists()


@pytest.mark.parametrize(
    ("options", "name", "convolutions"),
    [
        ((), DEFORM, ["offset_conv"]),
        (
            # Of so many steps that there is something to average.
            ("--modulated", *SCHEDULE, "--distillation", 0.5, "--average", 0.9, "--batch-size", 16),
            DEFORM_MODULATED,
            ["offset_conv", "mask_conv"],
        ),
    ],
)
def test_tuning_trains_offsets_and_nothing_else(trained, options, name, convolutions):
    folder, _ = trained
    printed = script("tune_deform_conv.py", *FEW, *options, "--checkpoint-dir", folder).stdout
    expected = {
        f"{name}/{layer}/{convolution}/{variable}"
        for layer in CONVOLUTION_NAMES
        for convolution in convolutions
        for variable in ("kernel", "bias")
    }
    assert {
        line.strip() for line in printed.splitlines() if line.startswith("  " + name)
    } == expected
    assert "all 26 other variables are bit-identical to the regular model's" in printed
    for layer in CONVOLUTION_NAMES:
        (mean,) = re.findall(rf"{layer}: mean \|offset\| (\d+\.\d+)", printed)
        assert float(mean) > 0
    assert re.search(r"scaled MNIST +\d+\.\d\d +\d+\.\d\d$", printed, re.M)
    assert load_model(name, folder=folder)


def test_weights_that_are_written_are_the_averages(trained, tmp_path):
    folder, _ = trained
    sizes = []
    for average in (0, 0.9):
        arguments = ("--average", average, "--batch-size", 16, "--checkpoint-dir", tmp_path)
        arguments += ("--regular-weights", weights_file(REGULAR, folder))
        script("tune_deform_conv.py", *FEW, *arguments)
        kernel = load_model(DEFORM, folder=tmp_path).get_layer("conv4").offset_conv.kernel
        sizes.append(np.abs(kernel).mean())
    # They lag behind: they are closer to the zeros that the kernels start from.
    assert 0 < sizes[1] < 0.98 * sizes[0]


def test_interrupted_training_resumes_to_the_same_result(trained, tmp_path):
    uninterrupted, _ = trained
    arguments = [*FEW, "--checkpoint-dir", tmp_path]
    stopped = script("-c", STOP_AFTER_ONE_EPOCH, "stop", *arguments, check=False)
    assert stopped.returncode == 130
    assert not weights_file(REGULAR, tmp_path).exists()

    other = error_of("train_regular_conv.py", *arguments, "--learning-rate", 0.01)
    assert "holds a training begun with other settings" in other
    assert "--restart" in other

    printed = script("-c", STOP_AFTER_ONE_EPOCH, "go on", *arguments).stdout
    assert "resuming after epoch 1" in printed
    resumed, expected = (
        load_model(REGULAR, folder=folder).get_weights() for folder in (tmp_path, uninterrupted)
    )
    for ours, theirs in zip(resumed, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_restart_forgets_an_interrupted_training(tmp_path):
    arguments = [*FEW, "--checkpoint-dir", tmp_path]
    script("-c", STOP_AFTER_ONE_EPOCH, "stop", *arguments, check=False)
    printed = script("train_regular_conv.py", *arguments, "--restart", "--seed", 2).stdout
    assert "resuming" not in printed


def test_tuning_does_not_resume_from_another_regular_model(trained, tmp_path):
    folder, _ = trained
    weights = shutil.copy(weights_file(REGULAR, folder), tmp_path)
    arguments = [*FEW, "--checkpoint-dir", tmp_path]
    stop = STOP_AFTER_ONE_EPOCH.replace("train_regular_conv", "tune_deform_conv")
    assert script("-c", stop, "stop", *arguments, check=False).returncode == 130
    shutil.copy(weights_file(REGULAR), weights)
    other = error_of("tune_deform_conv.py", *arguments)
    assert "holds a training begun with other settings" in other


def test_killed_trainings_end_as_undisturbed_ones():
    options = ("--script", "train", "--kills", 3, "--faults", 0, "--seed", 1)
    assert script("tests/fuzz/training.py", *options).stdout.endswith("no finding\n")


# --- Evaluation and visualisation ---


def test_evaluation_prints_the_table(trained):
    printed = script("utils/evaluate.py", "--test-digits", 200).stdout
    assert re.search(r"regular MNIST +\d+\.\d\d \(98\.91\) +\d+\.\d\d \(98\.87\)", printed)
    assert re.search(r"scaled MNIST +\d+\.\d\d \(59\.32\) +\d+\.\d\d \(98\.22\)", printed)


def test_samples_are_placed_in_the_image():
    """Those of a layer whose pixels are 2x2 of the image, by offsets of (1, 0)."""
    offset = np.tile([1.0, 0.0], [7, 7, 9])
    samples = samples_of(offset, in_size=14, kernel_size=3, stride=2, image_size=28)
    assert samples.positions.shape == samples.regular.shape == (7 * 7 * 9, 2)
    np.testing.assert_array_equal(samples.distances, 1)
    np.testing.assert_array_equal(samples.positions - samples.regular, np.tile([2, 0], (441, 1)))
    one = samples_of(offset, 14, 3, 2, 28, position=(0, 3))
    assert list(one.regular[0]) == [0.5, 12.5]  # the middle of the squares of pixel (0, 6)
    assert len(samples.beyond(0.9).positions) == 441
    assert len(samples.beyond(1).positions) == 0


def test_plot_writes_an_animation_a_still_and_a_page(tmp_path):
    output, page = tmp_path / "new" / "viz.gif", tmp_path / "pages" / "viz.html"
    script("plot_conv_test.py", "--frames", 3, "--output", output, "--html", page)
    with Image.open(output) as animation, Image.open(output.with_suffix(".png")) as still:
        assert animation.n_frames == 3
        assert animation.size == still.size
    assert page.read_text().startswith("<!doctype html>")


def test_plot_resizes_other_images_with_a_notice(tmp_path):
    image = tmp_path / "large.png"
    cv2.imwrite(str(image), np.zeros((56, 40, 3), np.uint8))
    output = tmp_path / "viz.gif"
    printed = script("plot_conv_test.py", "--frames", 2, "--image", image, "--output", output)
    assert "is 56x40; resizing to 28x28" in printed.stdout


def test_plot_draws_fewer_samples_above_a_higher_threshold(tmp_path):
    sizes = []
    for threshold in (("0.5",), ("2", "3")):
        output = tmp_path / "viz.gif"
        script("plot_conv_test.py", "--frames", 2, "--output", output, "--threshold", *threshold)
        sizes.append(output.with_suffix(".png").stat().st_size)
    assert sizes[1] < sizes[0]


def test_deform_conv_test_proves_the_build():
    printed = script("utils/deform_conv_test.py").stdout
    assert "against the reference" in printed
    assert printed.splitlines()[-1] == "ok"
