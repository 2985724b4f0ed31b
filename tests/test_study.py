"""The study: what its arms train, that its runs resume, and that its page comes of its records."""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import random
import shutil
import sys
import time
from argparse import Namespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PROJECT, error_of, script

from experiments import datasets, jobs, results
from experiments import run as run_module
from experiments.arms import ARMS, STUDY, TRAINED_REGULAR, Run, chosen, plan
from experiments.networks import build, parameters_of, wide_convolutions
from experiments.offsets import OffsetStatistics
from experiments.report import PAGE, RESULTS, page_of, parts_of
from experiments.study import missing_runs
from experiments.training import (
    NOTHING,
    OPTIMIZER,
    DeviceDigits,
    Predictor,
    reestimate_statistics,
    scaled,
    train,
)
from experiments.workers import Outcome, Workers, seeded
from utils import mnist
from utils.cli import UserError
from utils.model import CONVOLUTION_NAMES, DEFORM, REGULAR, build_model, load_model
from utils.training import TEMPERATURE, accuracy, losses_of, make_optimizer
from utils.tuning import copy_weights, draw_epoch, share_in_epoch

FEW = ("--epochs", 1, "--train-digits", 100, "--test-digits", 50)


@pytest.fixture(scope="module")
def digits():
    return mnist.load_mnist()[1].take(300)


@pytest.fixture(scope="module")
def regular():
    return load_model(REGULAR)


# --- Data ---


def test_images_are_scaled_on_the_device_as_opencv_scales_them(digits, rng):
    scaling = mnist.draw_scaling(rng, len(digits.labels), 5.6)
    ours = scaled(digits.images.astype(np.float32), *(of.astype(np.float32) for of in scaling))
    difference = np.abs(ours.numpy().astype(int) - mnist.apply_scaling(digits.images, scaling))
    assert np.mean(difference > 1) < 5e-3
    assert difference.max() <= 255 / 32 + 1  # a sample's place is off by a 32nd of a pixel


def test_epoch_leaves_a_share_unscaled(rng):
    order, scaling = draw_epoch(rng, 200, unscaled_share=0.25)
    assert sorted(order) == list(range(200))
    unscaled = np.all(scaling.zooms == 1, axis=1)
    assert unscaled.sum() == 50
    assert not scaling.shifts[unscaled].any()
    assert not unscaled[:50].all()  # they are spread over the epoch


def test_share_goes_along_a_line():
    assert [share_in_epoch(0.0, 0.5, epoch, 3) for epoch in range(3)] == [0.0, 0.25, 0.5]
    assert share_in_epoch(0.15, 0.15, 0, 1) == 0.15


def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def test_fashion_mnist_is_read_from_idx_files(tmp_path, rng):
    images = rng.integers(0, 256, (5010, 28, 28)).astype(np.uint8)
    labels = rng.integers(0, 10, 5010).astype(np.uint8)
    for name in datasets.FASHION_FILES:
        array = images if "images" in name else labels
        (tmp_path / name).write_bytes(gzip.compress(idx(array), 1))
    parts = datasets.load("fashion", tmp_path)
    assert [len(part.labels) for part in parts] == [10, 5000, 5010]
    np.testing.assert_array_equal(parts.held_out.images[..., 0], images[10:])
    np.testing.assert_array_equal(parts.test.labels, labels)
    assert list(datasets.checksums("fashion", tmp_path)) == list(datasets.FASHION_FILES)

    (tmp_path / datasets.FASHION_FILES[0]).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no idx file of bytes"):
        datasets.load("fashion", tmp_path)
    with pytest.raises(UserError, match="dataset-fashion-mnist has it"):
        datasets.load("fashion", tmp_path / "none")


# --- Arms ---

TRAINED = {  # variables that are trained, by a part of their path
    "offsets-v1": {"offset_conv"},
    "offsets-v2": {"offset_conv", "mask_conv"},
    "finetuned-norm": {"norm"},
    "statistics": set(),
    "masks": {"mask_conv"},
    "random": set(),
}


@pytest.mark.parametrize("name", TRAINED)
def test_arm_trains_what_it_says(name, regular, digits):
    model = build(ARMS[name], regular, digits.images[:20], seed=1)
    paths = [variable.path for variable in model.trainable_variables]
    assert all(any(part in path for part in TRAINED[name]) for path in paths)
    expected = sum(
        any(part in variable.path for part in TRAINED[name])
        and "moving" not in variable.path  # statistics, which no gradient reaches
        for variable in model.variables
    )
    assert len(paths) == expected


def test_arms_of_a_part_of_the_offsets(regular, digits):
    def paths_of(name):
        model = build(ARMS[name], regular, digits.images[:20], seed=1)
        return {variable.path.partition("/")[2] for variable in model.trainable_variables}

    assert paths_of("offsets-last2") == {
        f"{layer}/offset_conv/{variable}"
        for layer in ("conv3", "conv4")
        for variable in ("kernel", "bias")
    }
    assert paths_of("offsets-constant") == {
        f"{layer}/offset_conv/bias" for layer in CONVOLUTION_NAMES
    }
    for name in ("scratch-random", "scratch-constant"):
        assert not any("offset_conv" in path for path in paths_of(name))
        assert "conv1/kernel" in paths_of(name)


def test_random_offsets_have_their_size_and_seed(regular, digits):
    first, again, other = (
        build(ARMS["random"], regular, digits.images[:100], seed) for seed in (1, 1, 2)
    )
    measured = OffsetStatistics(first)(digits.images[:100])
    # The mean size of normal numbers is 0.8 of their deviation.
    assert 0.6 * 1.4 < measured["conv4"]["mean"] < 1.0 * 1.4
    kernels = [model.get_layer("conv4").offset_conv.kernel for model in (first, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])


def test_wide_network_has_as_many_parameters_as_the_deformable_one():
    convolutions = wide_convolutions()
    count = build_model(REGULAR, convolutions=convolutions).count_params()
    assert count == parameters_of(convolutions)
    assert abs(count / build_model(DEFORM).count_params() - 1) < 0.005


def test_every_arm_is_planned_and_follows_what_it_starts_from():
    runs = plan()
    assert len(set(runs)) == len(runs)
    assert {run.arm for run in runs} == set(ARMS)
    for arm in STUDY:
        for dataset in datasets.DATASETS:
            assert {run.seed for run in runs if run[:2] == (dataset, arm.name)} >= {1, 2, 3}
    for index, run in enumerate(runs):
        assert run.regular is None or run.regular in runs[:index]


def test_run_is_known_by_its_name():
    for run in plan():
        assert Run.of(run.name) == run


def test_runs_are_chosen_by_patterns():
    runs = chosen(["mnist"], ["offsets-v*"], [1.0], [7])
    assert [run.name for run in runs] == [
        "mnist-offsets-v1-shift1-seed7",
        "mnist-offsets-v2-shift1-seed7",
    ]
    with pytest.raises(UserError, match="there is no arm offset-v1"):
        chosen(arms=["offset-v1"])


# --- Training ---


def test_loop_learns_from_the_digits(digits):
    model = build_model(REGULAR)
    on_device = DeviceDigits.of(digits)
    lines = []
    train(
        model, on_device, TRAINED_REGULAR.recipe, epochs=8, batch_size=50, shift=1.0, seed=1,
        after_epoch=lines.append,
    )  # fmt: skip
    assert [line["epoch"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["accuracy"] > 80


@pytest.mark.parametrize("name", ["scratch-v3", "scratch-v4"])
def test_gradients_reach_the_modules_of_other_versions(name, digits):
    model = build(ARMS[name], None, digits.images[:10], seed=1)
    with tf.GradientTape() as tape:
        logits = model(digits.images[:50], training=True)
        loss = tf.reduce_mean(losses_of(digits.labels[:50].astype(np.int32), logits))
    layer = model.get_layer("conv1")
    kernels = [layer.mask_proj.kernel.value, layer.offset_proj.kernel.value]
    for gradient in tape.gradient(loss, kernels):
        assert np.abs(gradient).max() > 1e-6


def test_averaging_and_distillation_change_what_is_learned(regular, digits, monkeypatch):
    monkeypatch.setattr("utils.training.LEAST_AVERAGES", 0)  # or six steps would keep no average
    teacher_logits = Predictor(regular).logits(DeviceDigits.of(digits))

    def kernel_after(jit_compile=NOTHING, **recipe):
        arm = ARMS["offsets-v1"]
        model = build(arm, regular, digits.images[:20], seed=1)
        train(
            model, DeviceDigits.of(digits), dataclasses.replace(arm.recipe, **recipe), epochs=1,
            batch_size=50, shift=1.0, seed=1, teacher_logits=teacher_logits,
            jit_compile=jit_compile,
        )  # fmt: skip
        return model.get_layer("conv4").offset_conv.kernel.numpy()

    plain = kernel_after()
    np.testing.assert_allclose(kernel_after(OPTIMIZER), plain, atol=1e-4)  # by XLA
    # The average lags behind: it is closer to the zeros that the kernels start from.
    assert np.abs(kernel_after(average=0.9)).mean() < 0.9 * np.abs(plain).mean()
    assert np.abs(kernel_after(distillation=0.9) - plain).max() > 1e-3


@pytest.mark.parametrize(("steps", "expected"), [(10000, 0.999), (50, 0.9), (4, None)])
def test_average_is_over_a_fifth_of_a_short_training_at_most(steps, expected):
    optimizer = make_optimizer(1e-3, steps, "float32", average=0.999)
    assert (optimizer.ema_momentum if optimizer.use_ema else None) == expected


def test_distilled_loss_is_least_at_the_teachers_logits(rng):
    labels, teacher = np.array([3]), rng.standard_normal((1, 10)).astype(np.float32)
    at_teacher = losses_of(labels, teacher, teacher, distillation=1.0)
    other = teacher + rng.standard_normal(10).astype(np.float32)
    elsewhere = losses_of(labels, other, teacher, distillation=1.0)
    assert at_teacher < elsewhere
    softened = np.exp(teacher / TEMPERATURE) / np.exp(teacher / TEMPERATURE).sum()
    entropy = -(softened * np.log(softened)).sum()
    np.testing.assert_allclose(at_teacher, TEMPERATURE**2 * entropy, rtol=1e-5)
    half = losses_of(labels, teacher, teacher, distillation=0.5)
    np.testing.assert_allclose(half, (at_teacher + losses_of(labels, teacher)) / 2, rtol=1e-5)


def test_statistics_are_means_over_scaled_batches(regular, digits):
    model = build(ARMS["statistics"], regular, digits.images, seed=1)
    options = {"batch_size": 100, "share": 0.15, "shift": 1.0, "seed": 1}
    reestimate_statistics(model, DeviceDigits.of(digits), **options)
    order, scaling = draw_epoch(np.random.default_rng([1, 0]), 300, 0.15, 1.0)
    images = mnist.apply_scaling(digits.images[order], scaling)
    outputs = keras.Model(model.inputs[0], model.get_layer("conv1").output)(images).numpy()
    norm = model.get_layer("norm1")
    np.testing.assert_allclose(norm.moving_mean, outputs.mean(axis=(0, 1, 2)), atol=2e-4)
    np.testing.assert_array_equal(norm.gamma, regular.get_layer("norm1").gamma)


def test_predictor_agrees_with_the_scripts(regular, digits):
    predictor, on_device = Predictor(regular), DeviceDigits.of(digits)
    assert predictor.accuracy(on_device) == pytest.approx(accuracy(regular, digits))
    assert predictor.accuracy(on_device, zoom=2.5) < predictor.accuracy(on_device)


# --- Offsets ---


def test_offset_statistics_of_known_offsets(regular, digits):
    model = build_model(DEFORM)
    copy_weights(regular, model)
    statistics = OffsetStatistics(model)
    nothing = statistics(digits.images[:10])
    # Of the 3 rows that a kernel has at 28 places, 2 are padding; the same of columns.
    padding = 100 * (1 - (82 / 84) ** 2)
    assert nothing["conv1"]["outside"] == pytest.approx(padding, abs=1e-3)
    assert statistics.padding()["conv1"] == pytest.approx(padding, abs=1e-3)
    assert nothing["conv1"]["mean"] == 0

    layer = model.get_layer("conv1")
    layer.offset_conv.bias.assign(np.tile([3.0, -1.0], 9))
    moved = statistics(digits.images[:10])["conv1"]
    assert moved["mean"] == pytest.approx(2.0)
    assert moved["largest"] == pytest.approx(3.0)
    # Rows lie from 2 to 31, of which 28 to 31 are outside; columns from -2 to 26.
    rows, columns = 1 - (4 + 3 + 2) / 84, 1 - (2 + 1) / 84
    assert moved["outside"] == pytest.approx(100 * (1 - rows * columns), abs=1e-3)


def test_modules_of_other_versions_have_offset_statistics(digits):
    model = build(ARMS["scratch-v3"], None, digits.images[:10], seed=1)
    measured = OffsetStatistics(model)(digits.images[:10])
    assert set(measured) == set(CONVOLUTION_NAMES)
    assert measured["conv2"]["mean"] == 0  # at the start


# --- One command ---


def study(folder, *options, check=True):
    places = ("--output", folder / "out", "--cache", folder / "cache")
    command = ("-m", "experiments.study", "--dataset", "mnist", "--shift", 1, "--seed", 1, *FEW)
    return script(*command, *places, *options, check=check)


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, study(folder, "--arm", "offsets-v1", "--arm", "random", "--jobs", 2).stdout


def test_study_runs_what_is_missing_and_what_that_starts_from(studied):
    folder, printed = studied
    names = [f"mnist-{arm}-shift1-seed1" for arm in ("offsets-v1", "random", "regular")]
    assert sorted(path.stem for path in (folder / "out").iterdir()) == names
    assert printed.endswith("3 runs done, 0 left\n")
    records = {record["arm"]: record for record in results.read(folder / "out")}
    tuned = records["offsets-v1"]
    assert tuned["trained_parameters"] == tuned["parameters"] - records["regular"]["parameters"]
    assert tuned["environment"]["versions"]["TensorFlow"]
    assert set(tuned["accuracy"]["test"]) == {"regular", "scaled 1", "scaled 5.6"}
    assert tuned["accuracy"]["zoom"]["1"] == tuned["accuracy"]["test"]["regular"]
    assert [line["epoch"] for line in tuned["epochs"]] == [0, 1]
    assert tuned["starts_from"] == records["random"]["starts_from"]
    assert tuned["starts_from"] == records["regular"]["weights"]


def test_study_does_no_run_twice_and_mixes_no_settings(studied):
    folder, _ = studied
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    assert study(folder, "--arm", "offsets-v1", "--arm", "random").stdout == "0 runs done, 0 left\n"
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before
    listed = study(folder, "--arm", "offsets-v*", "--list").stdout
    assert listed == "mnist-offsets-v2-shift1-seed1\n"
    # Also where it is another run that was made with other settings.
    for arm in ("random", "scratch-v1"):
        other = study(folder, "--arm", arm, "--epochs", 2, check=False)
        assert other.returncode == 1
        assert "was made with other settings" in other.stderr


def test_where_weights_are_lost_all_that_starts_from_them_is_made_again(studied, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(studied[0], folder)
    (weights,) = (folder / "cache").glob("*.weights.h5")

    def missing(*arms):
        few = {"epochs": 1, "batch_size": 250, "train_digits": 100, "test_digits": 50}
        places = {"output": folder / "out", "cache": folder / "cache"}
        options = Namespace(dataset=["mnist"], arm=arms, shift=[1.0], seed=[1], **few, **places)
        return [each.arm for each in missing_runs(options)]

    kept = ["offsets-v1", "random"]
    assert missing(*kept, "masks") == ["masks"]
    lost = weights.rename(tmp_path / "lost.h5")
    assert missing(*kept) == []  # nothing needs the weights
    assert missing(*kept, "masks") == ["regular", "offsets-v1", "masks", "random"]
    lost.rename(weights)

    # Weights of another training are another file, and what starts from others is missing.
    record_of_regular = folder / "out" / "mnist-regular-shift1-seed1.json"
    text = record_of_regular.read_text()
    record_of_regular.write_text(json.dumps(json.loads(text) | {"weights": "0123"}))
    assert missing(*kept) == ["regular", *kept]
    message = "records with different weights to start from, MNIST, seed 1 make no table"
    with pytest.raises(UserError, match=message):
        parts_of(results.read(folder / "out"))


def test_failed_runs_are_told_of(tmp_path):
    none = tmp_path / "none"
    options = ("--arm", "regular", "--dataset", "fashion", "--fashion-mnist", none, "--seed", 1)
    places = ("--output", tmp_path / "out", "--cache", tmp_path / "cache")
    message = error_of("-m", "experiments.study", *options, *FEW, *places)
    log = tmp_path / "cache" / "logs" / "runs.log"
    assert message == (
        f"study.py: error: 1 runs failed: fashion-regular-shift1-seed1. {log} has what they printed"
    )
    assert "dataset-fashion-mnist has it" in log.read_text()
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_run_whose_process_dies_has_failed_and_others_go_on(at_a_time, tmp_path):
    program = """
import os, sys
from experiments import run
do = run.do
def die(asked, options):
    os._exit(3) if asked.arm == "scratch-v1" else do(asked, options)
run.do = die
from experiments import study
if __name__ == "__main__":
    study.main()
"""
    file = tmp_path / "dying_study.py"
    file.write_text(program)
    arms = ("--arm", "scratch-v1", "--arm", "scratch-v2")
    places = ("--output", tmp_path / "out", "--cache", tmp_path / "cache")
    options = ("--dataset", "mnist", "--shift", 1, "--seed", 1, *FEW, *arms, *places)
    options = (*options, "--jobs", at_a_time)
    environment = {"PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}"}
    done = script(file, *options, check=False, **environment)
    assert (
        "scratch-v1-shift1-seed1: failed: the process of the runs under way ended with status 3"
        in done.stdout
    )
    assert "1 runs done, 0 left" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "mnist-scratch-v2-shift1-seed1.json"
    ]


def test_run_that_ends_its_thread_is_told_of_and_the_next_has_a_process_again(tmp_path):
    workers = Workers(sys.exit, 2, 1, tmp_path / "log")
    for status in (3, 4):
        place = workers.begin(status)
        while not (outcomes := workers.outcomes()):
            time.sleep(0.1)
        reason = "the process of the runs under way ended with status 1"
        assert outcomes == [Outcome(place, reason, died=True)]
    workers.end()


def test_log_has_what_runs_print_and_ctrl_c_does_not_reach_them(tmp_path):
    program = """
import sys, time
from pathlib import Path
from experiments.workers import Workers
workers = Workers(exec, 1, 1, Path(sys.argv[1]))
workers.begin("import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))")
while not (outcomes := workers.outcomes()):
    time.sleep(0.1)
workers.end()
assert not outcomes[0].reason, outcomes
"""
    script("-c", program, tmp_path / "log", PYTHONUNBUFFERED="")
    assert "SIGINT" in (tmp_path / "log").read_text()


def test_what_a_run_draws_follows_from_its_seed_whatever_runs_beside_it(tmp_path, monkeypatch):
    states = []

    @contextlib.contextmanager
    def noting(seed):
        with seeded(seed):
            yield
            states.append(random.getstate())

    monkeypatch.setattr(run_module, "seeded", noting)
    parser = argparse.ArgumentParser()
    run_module.add_run_options(parser)
    places = ("--output", tmp_path / "out", "--cache", tmp_path / "cache")
    options = parser.parse_args(list(map(str, (*FEW, *places))))
    for arm in ("regular", "offsets-v1"):
        run_module.do(Run("mnist", arm, 1.0, 1), options)
        assert random.getstate() == states[-1]  # nothing was drawn elsewhere


def test_time_limit_starts_nothing_that_takes_longer_and_ends_what_does(tmp_path, monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr("experiments.jobs.time.monotonic", lambda: now[0])
    monkeypatch.setattr("experiments.jobs.time.sleep", lambda _: now.__setitem__(0, now[0] + 1))
    runs = [jobs.Job(f"run{i}", i, tmp_path / f"run{i}.json") for i in range(6)]
    durations = (10, 10, 10, 100, 10, 10)
    options = functools.partial(Namespace, gpu_memory=1, cache=tmp_path)

    class FakeWorkers:
        def __init__(self, *_):
            self.tasks = {}  # and when they end, by their place, which is their number

        def begin(self, task):
            self.tasks[task] = now[0] + durations[task]
            runs[task].record.write_text("{}")
            return task

        def outcomes(self):
            done = [task for task, ends in self.tasks.items() if now[0] >= ends]
            for task in done:
                del self.tasks[task]
            return [Outcome(task, "") for task in done]

        def end(self):
            ended.extend(self.tasks)

    monkeypatch.setattr(jobs, "Workers", FakeWorkers)
    some = jobs.Jobs(runs, None, options(jobs=2, time_limit=45), str)
    some.work()
    assert some.done == 5
    assert ended == [3]
    assert some.pending == [runs[3]]
    assert not some.failed
    assert now[0] <= 45

    # The last one would be too late, if it took as long as those before it.
    now[0] = 0.0
    some = jobs.Jobs(runs[:3], None, options(jobs=1, time_limit=25), str)
    some.work()
    assert (some.done, some.pending) == (2, [runs[2]])


def test_run_without_the_weights_that_it_starts_from_says_how_to_make_them(tmp_path):
    places = ("--output", tmp_path, "--cache", tmp_path)
    command = ("-m", "experiments.run", "mnist-random-shift1-seed1", *FEW, *places)
    for record in (None, "{}", '{"weights": "abc"}'):
        if record:
            (tmp_path / "mnist-regular-shift1-seed1.json").write_text(record)
        error = error_of(*command)
        assert "starts from the weights of mnist-regular-shift1-seed1, which are not in" in error
        remedy = "`python -m experiments.run mnist-regular-shift1-seed1` leaves them there"
        assert error.endswith(remedy)


# --- The report ---


def record(arm, seed, scaled_accuracy, dataset="mnist", shift=1.0):
    offsets = {
        name: {"mean": 0.5, "largest": 2.0 + seed, "outside": 7.0} for name in CONVOLUTION_NAMES
    }
    tests = {"regular": 99.0, "scaled 1": scaled_accuracy, "scaled 5.6": 90.0}
    return {
        "dataset": dataset,
        "arm": arm,
        "shift": shift,
        "seed": seed,
        "settings": {"epochs": 10, "batch_size": 250, "train_digits": None, "test_digits": None},
        "environment": {
            "gpu": "a GPU",
            "processor": "a processor",
            "processors": 16,
            "date": "2026-11-28",
            "versions": {"Python": "3.12"},
        },
        "checksums": {"a file": "0123"},
        "parameters": 2000,
        "trained_parameters": 1000,
        "padding": dict.fromkeys(CONVOLUTION_NAMES, 4.7),
        "epochs": [{"epoch": epoch, "offsets": offsets} for epoch in range(2)],
        "accuracy": {"held out": tests, "test": tests, "zoom": {"1": 99.0, "2": 95.0}},
        "seconds": 36.0,
    }


def test_report_is_made_of_the_records_alone(tmp_path):
    for arm, accuracies in {
        "regular": (60, 62),
        "offsets-v1": (98, 99),
        "scratch-v1": (99,),
    }.items():
        for seed, percent in enumerate(accuracies, start=1):
            results.write(tmp_path / f"{arm}{seed}.json", record(arm, seed, float(percent)))
    results.write(tmp_path / "hard.json", record("offsets-v1", 1, 91.0, shift=5.6))
    page = tmp_path / "page.md"
    markers = "<!-- written by experiments/report.py -->\nold\n<!-- to here -->\n"
    page.write_text(f"Before.\n{markers}After.\n")
    script("-m", "experiments.report", "--results", tmp_path, "--page", page)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    cells = "1,000 of 2,000 | 98.50 ± 0.71 | 90.00 ± 0.00 | 99.00 ± 0.00 | 2 |"
    assert f"| offsets only, version 1 | {cells}" in text
    assert "| version 1 | 1,000 of 2,000 | 99.00 | 90.00 | 99.00 | 1 |" in text
    assert "| offsets only, version 1, conv2 | 0.50 ± 0.00 | 3.50 ± 0.71 |" in text
    _, hard = text.split("trained with shifts of up to 5.6 px")
    assert "| offsets only, version 1 | 1,000 of 2,000 | 91.00 | 90.00 | 99.00 | 1 |" in hard
    assert "| regular, on unscaled images | 1,000 of 2,000 | 61.00 ± 1.41 |" in hard
    assert "6 runs: 10 epochs, batches of 250." in text
    assert "0123  a file" in text
    assert "Fashion" not in text
    for plot in ("mnist-zoom.png", "mnist-offsets.png"):
        assert (tmp_path / plot).stat().st_size > 5000


def test_records_of_different_settings_or_data_make_no_table():
    records = [record("offsets-v1", seed, 98.0) for seed in (1, 2)]
    records[1]["settings"] = records[0]["settings"] | {"epochs": 1}
    with pytest.raises(UserError, match="records with different settings make no table"):
        parts_of(records)
    records[1]["settings"] = records[0]["settings"]
    records[1]["checksums"] = {"a file": "4567"}
    with pytest.raises(UserError, match="records with different files of MNIST make no table"):
        parts_of(records)


def test_report_of_a_page_without_markers_is_refused():
    with pytest.raises(UserError, match="the page must have the lines"):
        page_of("nothing", [])


def test_page_is_what_the_report_makes_of_the_kept_records():
    text = PAGE.read_text(encoding="utf-8")
    assert page_of(text, results.read(RESULTS)) == text


def test_records_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        results.write(tmp_path / "record.json", {"loss": float("nan")})
    assert results.read(tmp_path) == []


def test_mean_and_spread():
    assert results.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert results.mean_and_spread([4.0]) == (4.0, 0.0)
