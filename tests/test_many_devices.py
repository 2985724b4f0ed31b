"""Training on several devices and in several processes gives the result of one."""

import contextlib
import json
import os
import random
import shutil
import socket
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from conftest import STOP_AFTER_ONE_EPOCH, error_of, script

from utils.cli import UserError
from utils.model import DEFORM, REGULAR, load_model, weights_file
from utils.strategy import open_strategy

# Two replicas get 32 and 31 digits of a batch, and 2 and 1 of the last one. Adam divides gradients
# by their own size, so it turns rounding into steps of the learning rate: a small one here.
FEW = ("--epochs", 2, "--train-digits", 192, "--batch-size", 63, "--test-digits", 100)
FEW += ("--learning-rate", 1e-4)
# Rounding makes up to 3e-6. An average over replicas instead of digits would make 8e-4, batch
# normalisation of each replica by itself 2e-3.
RTOL = 5e-5
STRATEGIES = {
    "none": (),
    "mirrored": ("--strategy", "mirrored", "--logical-cpus", 2),
    "multiworker": ("--strategy", "multiworker"),
}
KILLED_AFTER_ONE_EPOCH = STOP_AFTER_ONE_EPOCH.replace(
    "raise KeyboardInterrupt", "import os; os.kill(os.getpid(), 9)"
)
KILLED = -9
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}


def free_ports(count):
    """Numbers that the system gives no connection by itself, so they are free a while later too."""
    ports = []
    for port in random.sample(range(20000, 30000), 100):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def workers(*programs, check=True):
    """Runs each program, a tuple of arguments, as a worker of one cluster."""
    addresses = [f"localhost:{port}" for port in free_ports(len(programs))]

    def worker(index):
        task = {"type": "worker", "index": index}
        tf_config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        return script(*programs[index], check=check, TF_CONFIG=tf_config, **ON_CPU)

    with ThreadPoolExecutor(len(programs)) as threads:
        return list(threads.map(worker, range(len(programs))))


def train(strategy, folder, *options, program="train_regular_conv.py"):
    """Runs a training script with its checkpoints and `history` in `folder`."""
    arguments = (program, *FEW, *STRATEGIES[strategy], *options, "--checkpoint-dir", folder)
    arguments += ("--history", folder / "history")
    if strategy == "multiworker":
        return workers(arguments, arguments)
    return [script(*arguments, **ON_CPU)]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "history").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains with a strategy, once; returns the folder and what was printed."""
    done = {}

    def train_once(strategy):
        if strategy not in done:
            folder = tmp_path_factory.mktemp(strategy)
            done[strategy] = folder, [completed.stdout for completed in train(strategy, folder)]
        return done[strategy]

    return train_once


@pytest.mark.parametrize("strategy", ["mirrored", "multiworker"])
def test_the_loss_curve_is_that_of_one_device(strategy, trained):
    expected = losses(trained("none")[0])
    assert len(expected) == 2
    np.testing.assert_allclose(losses(trained(strategy)[0]), expected, rtol=RTOL)


def test_tuning_on_two_devices_gives_the_loss_curve_and_the_averages_of_one(tmp_path):
    for strategy in ("none", "mirrored"):
        (tmp_path / strategy).mkdir()
        weights = ("--regular-weights", weights_file(REGULAR))
        train(strategy, tmp_path / strategy, *weights, program="tune_deform_conv.py")
    expected, shared = (losses(tmp_path / strategy) for strategy in ("none", "mirrored"))
    np.testing.assert_allclose(shared, expected, rtol=RTOL)
    expected, shared = (
        load_model(DEFORM, folder=tmp_path / strategy).get_layer("conv4").offset_conv.kernel.numpy()
        for strategy in ("none", "mirrored")
    )
    assert np.abs(shared - expected).mean() < 0.01 * np.abs(expected).mean()


def test_the_chief_alone_prints_and_leaves_nothing_but_its_files(trained):
    folder, (chief, other) = trained("multiworker")
    assert "regular MNIST" in chief
    assert other == "worker 1 of 2: waiting for the others\n"
    assert {path.name for path in folder.iterdir()} == {"history", weights_file(REGULAR).name}


# --- Resuming ---


@pytest.fixture(scope="module", params=STRATEGIES)
def killed(request, tmp_path_factory):
    """A strategy, the folder of a training killed after an epoch, and how its processes ended.

    Of two workers, the second is killed.
    """
    strategy = request.param
    folder = tmp_path_factory.mktemp(f"killed-{strategy}")
    arguments = (*FEW, *STRATEGIES[strategy], "--checkpoint-dir", folder)
    arguments += ("--history", folder / "history")
    programs = [("-c", KILLED_AFTER_ONE_EPOCH, "stop", *arguments)]
    if strategy == "multiworker":
        completed = workers(("train_regular_conv.py", *arguments), *programs, check=False)
    else:
        completed = [script(*programs[0], check=False, **ON_CPU)]
    return strategy, folder, completed


def test_a_killed_process_loses_no_whole_epoch(killed):
    _, folder, completed = killed
    assert completed[-1].returncode == KILLED
    assert (folder / f"{REGULAR}.training" / "state").exists()
    assert not weights_file(REGULAR, folder).exists()


@pytest.mark.parametrize("killed", ["multiworker"], indirect=True)
def test_a_worker_that_lost_another_says_so_in_one_line(killed):
    _, _, (chief, _) = killed
    assert chief.returncode == 1
    assert "Traceback" not in chief.stderr
    assert chief.stderr.splitlines()[-1] == (
        "train_regular_conv.py: error: lost another worker; start all of them again to go on "
        "after the last whole epoch"
    )


def test_a_killed_training_goes_on_to_the_same_result(killed, trained, tmp_path):
    strategy, folder, _ = killed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert "resuming after epoch 1" in train(strategy, tmp_path)[0].stdout
    expected, _ = trained(strategy)
    np.testing.assert_allclose(losses(tmp_path), losses(expected), rtol=1e-5)
    resumed, uninterrupted = (
        load_model(REGULAR, folder=ended).get_weights() for ended in (tmp_path, expected)
    )
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("killed", ["mirrored"], indirect=True)
def test_a_killed_training_goes_on_with_another_number_of_replicas(killed, trained, tmp_path):
    _, folder, _ = killed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert "resuming after epoch 1" in train("none", tmp_path)[0].stdout
    np.testing.assert_allclose(losses(tmp_path), losses(trained("none")[0]), rtol=RTOL)


# --- What cannot be right ---


def test_workers_of_different_settings_are_refused(tmp_path):
    common = ("train_regular_conv.py", *FEW, *STRATEGIES["multiworker"])
    common += ("--checkpoint-dir", tmp_path)
    for completed in workers((*common, "--seed", 1), (*common, "--seed", 2), check=False):
        assert completed.returncode == 1
        assert "the workers differ in their settings" in completed.stderr.splitlines()[-1]


def test_a_missing_tf_config_is_refused(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    options = Namespace(strategy="multiworker", logical_cpus=None)
    with pytest.raises(UserError, match="multiworker needs TF_CONFIG="), open_strategy(options):
        pass


@pytest.mark.parametrize(
    "tf_config",
    [
        "not JSON",
        "[]",
        '{"cluster": {"worker": ["localhost:1"]}}',
        '{"cluster": {"worker": []}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": "localhost:1"}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "ps", "index": 0}}',
    ],
)
def test_a_malformed_tf_config_is_refused(tf_config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config)
    options = Namespace(strategy="multiworker", logical_cpus=None)
    with pytest.raises(UserError, match="TF_CONFIG must be like"), open_strategy(options):
        pass


def test_a_last_batch_of_fewer_digits_than_replicas_is_refused():
    options = (*STRATEGIES["mirrored"], "--train-digits", 127, "--batch-size", 63)
    message = error_of("train_regular_conv.py", *options, **ON_CPU)
    assert message.endswith("--batch-size 63 makes batches of 1 that 2 replicas cannot share")


def test_logical_cpus_without_mirroring_are_refused():
    options = Namespace(strategy="none", logical_cpus=2)
    with pytest.raises(UserError, match="--logical-cpus goes with"), open_strategy(options):
        pass


# --- GPUs ---


@pytest.mark.gpu
@pytest.mark.skipif(len(tf.config.list_physical_devices("GPU")) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("program", ["train_regular_conv.py", "tune_deform_conv.py"])
def test_the_loss_curve_of_two_gpus_is_that_of_one(program, tmp_path):
    options = [*FEW, "--checkpoint-dir", tmp_path]
    if program == "tune_deform_conv.py":
        options += ["--regular-weights", weights_file(REGULAR)]
    two = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    environment = {
        "CUDA_VISIBLE_DEVICES": ",".join(two),
        # TensorFloat-32 would round far more than a sum in another order does.
        "NVIDIA_TF32_OVERRIDE": "0",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    curves = []
    for strategy in ("none", "mirrored"):
        history = ("--history", tmp_path / "history")
        script(program, *options, *history, "--strategy", strategy, **environment)
        curves.append(losses(tmp_path))
    np.testing.assert_allclose(curves[1], curves[0], rtol=RTOL)
