"""Scripts that are interrupted, or given what they cannot use: nothing is lost, one line tells."""

import json
import os
import resource
import shutil
import struct
import sys
import zipfile
import zlib
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import STOP_AFTER_ONE_EPOCH, error_of, script

import plot_conv_test
import train_regular_conv
import tune_deform_conv
from utils import evaluate, mnist, training
from utils.cli import UserError
from utils.files import check_writable, locked, write_file
from utils.model import DEFORM, REGULAR, build_model, save_weights, weights_file
from utils.training_state import TrainingState, check_history, write_history

FEW = ("--epochs", 2, "--train-digits", 256, "--test-digits", 200)


def run(program, *arguments):
    """Runs the module of a script, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
        program.main()


def refusal(program, *arguments):
    """What the module of a script, run in this process, tells in one line."""
    with pytest.raises(UserError) as refused:
        run(program, *arguments)
    return str(refused.value)


# --- Writing files ---


@contextmanager
def files_of_at_most(size):
    """As on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    steps = []

    def fsync(file):
        path = Path(f"/proc/self/fd/{file}").readlink()
        steps.append((path, path.read_bytes() if path.is_file() else sorted(path.iterdir())))

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "folder"
    file, unfinished = folder / "file", folder / ".file.unfinished"
    write_file(file, b"new")
    assert steps == [(tmp_path, [folder]), (unfinished, b"new"), (folder, [file])]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files_of_at_most(1000):
        with pytest.raises(UserError, match=rf"^cannot write {path}: File too large$"):
            write_file(path, bytes(5000))
        with pytest.raises(UserError, match=rf"^cannot write {path}: File too large$"):
            check_writable(path, 5000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_cannot_be_written_leave_those_of_before(tmp_path):
    shutil.copy(weights_file(REGULAR), tmp_path)
    with files_of_at_most(100_000), pytest.raises(UserError, match="File too large"):
        save_weights(build_model(REGULAR), weights_file(REGULAR, tmp_path))
    assert weights_file(REGULAR, tmp_path).read_bytes() == weights_file(REGULAR).read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_are_kept_in_keras_own_format(tmp_path):
    model = build_model(REGULAR)
    save_weights(model, weights_file(REGULAR, tmp_path))
    again = build_model(REGULAR)
    again.load_weights(weights_file(REGULAR, tmp_path))
    for ours, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    for path in (tmp_path, Path("/dev/null")):
        for write in (check_writable, lambda path: write_file(path, b"")):
            with pytest.raises(UserError, match=f"cannot write {path}: it is no regular file"):
                write(path)
    assert Path("/dev/null").is_char_device()


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    path = tmp_path / "folder" / "lock"
    for _ in range(2):
        with locked(path, ""), pytest.raises(UserError, match="taken"):
            locked(path, "taken").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_two_trainings_of_one_model_do_not_share_a_folder(tmp_path):
    with locked(tmp_path / f"{REGULAR}.training" / "lock", ""):
        message = refusal(train_regular_conv, *FEW, "--checkpoint-dir", tmp_path)
    assert message == (
        f"another training of regular_model is under way in {tmp_path}/regular_model.training"
    )


@pytest.mark.parametrize("lost", ["weights", "state", "history"])
def test_what_cannot_be_written_is_told_before_the_training(lost, tmp_path, capsys):
    path = {
        "weights": weights_file(REGULAR, tmp_path),
        "state": tmp_path / f"{REGULAR}.training" / "state",
        "history": tmp_path / "history",
    }[lost]
    path.mkdir(parents=True)
    options = ("--checkpoint-dir", tmp_path, "--history", tmp_path / "history")
    assert f"{path}" in refusal(train_regular_conv, *FEW, *options)
    assert "Epoch" not in capsys.readouterr().out


def test_a_disk_too_full_for_the_state_is_told_before_the_training(tmp_path, capsys):
    with files_of_at_most(2_000_000):  # the weights would fit
        message = refusal(train_regular_conv, *FEW, "--checkpoint-dir", tmp_path)
    assert message == f"cannot write {tmp_path}/regular_model.training/state: File too large"
    assert "Epoch" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


PLACES = {
    "the weights file": lambda folder, digits: folder / "regular_model.weights.h5",
    "the training's state": lambda folder, digits: folder / "regular_model.training" / "history",
    "--data": lambda folder, digits: digits,
}


@pytest.mark.parametrize("name", PLACES)
def test_history_takes_the_place_of_no_other_file_of_the_training(name, tmp_path):
    digits = mnist_file(tmp_path / "mnist.npz")
    place = PLACES[name](tmp_path, digits)
    options = ("--checkpoint-dir", tmp_path, "--data", digits, "--history", place)
    assert f"--history {place} would take the place of {name}, " in refusal(
        train_regular_conv, *FEW, *options
    )
    assert list(tmp_path.iterdir()) == [digits]


def test_tuned_weights_do_not_take_the_place_of_the_regular_ones(tmp_path):
    path = weights_file(DEFORM, tmp_path)
    shutil.copy(weights_file(REGULAR), path)
    options = ("--regular-weights", path, "--checkpoint-dir", tmp_path)
    message = refusal(tune_deform_conv, *FEW, *options)
    assert message == f"the weights file {path} would take the place of --regular-weights, {path}"
    assert path.read_bytes() == weights_file(REGULAR).read_bytes()


def test_a_training_goes_on_with_the_data_that_it_began_with_wherever_they_are(tmp_path):
    first, moved = mnist_file(tmp_path / "mnist.npz"), tmp_path / "moved.npz"
    options = ("--epochs", 2, "--checkpoint-dir", tmp_path)
    stopped = script("-c", STOP_AFTER_ONE_EPOCH, "stop", *options, "--data", first, check=False)
    assert stopped.returncode == 130
    first.rename(moved)
    mnist_file(first, y_train=np.ones(3, np.uint8))
    assert "begun with other settings" in refusal(train_regular_conv, *options, "--data", first)
    run(train_regular_conv, *options, "--data", moved)


def test_weights_of_another_suffix_are_told(tmp_path):
    path = tmp_path / "regular.h5"
    shutil.copy(weights_file(REGULAR), path)
    message = refusal(tune_deform_conv, "--regular-weights", path, "--checkpoint-dir", tmp_path)
    assert message == f"the name of weights must end in .weights.h5; it is {path}"


def test_restart_does_not_empty_a_folder_that_is_linked_to(state, tmp_path):
    make, file = state
    other = tmp_path / "other"
    file.parent.rename(other)
    file.parent.symlink_to(other)
    with pytest.raises(UserError, match=r"--restart does not empty .*, which is a link"):
        begin(make(restart=True))
    assert (other / "state").exists()


@pytest.mark.parametrize("content", [b"a note\n", b"\xff\xfe", b"[]\n", b'{"epoch": 1}\n', b"1\n"])
def test_only_a_history_is_overwritten_by_a_history(content, tmp_path):
    path = tmp_path / "history"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"history .* is no history of a training, and is not over"):
        check_history(path)
    assert path.read_bytes() == content
    write_history(path, [{"epoch": 1, "loss": 2.0, "accuracy": 0.5}])
    check_history(path)


def test_a_resumed_training_writes_the_whole_history(tmp_path):
    arguments = [*FEW, "--checkpoint-dir", tmp_path, "--history", tmp_path / "history"]
    assert script("-c", STOP_AFTER_ONE_EPOCH, "stop", *arguments, check=False).returncode == 130
    assert not (tmp_path / "history").exists()  # stopped after the state, before the history
    script("-c", STOP_AFTER_ONE_EPOCH, "go on", *arguments)
    lines = [json.loads(line) for line in (tmp_path / "history").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_a_training_killed_at_its_end_ends_the_same(tmp_path, monkeypatch, capsys):
    """After its weights are written, and before its state is removed."""
    arguments = [train_regular_conv, *FEW, "--checkpoint-dir", tmp_path]

    def end_of_process(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(TrainingState, "remove", end_of_process)
        run(*arguments)
    weights = weights_file(REGULAR, tmp_path).read_bytes()
    run(*arguments)
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert weights_file(REGULAR, tmp_path).read_bytes() == weights
    assert list(tmp_path.iterdir()) == [weights_file(REGULAR, tmp_path)]


# --- NaN ---


def test_a_training_that_ends_in_nan_says_so_and_keeps_what_was(tmp_path):
    shutil.copy(weights_file(REGULAR), tmp_path)
    options = ("--checkpoint-dir", tmp_path, "--history", tmp_path / "history")
    message = refusal(train_regular_conv, *FEW, *options, "--learning-rate", "1e35")
    assert message.startswith("epoch 1 ended with NaN or infinite numbers, and is not kept")
    assert weights_file(REGULAR, tmp_path).read_bytes() == weights_file(REGULAR).read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_nan_in_a_later_epoch_leaves_the_state_before_it(tmp_path, monkeypatch, capsys):
    history = tmp_path / "history"
    options = (*FEW, "--checkpoint-dir", tmp_path, "--history", history)
    with monkeypatch.context() as patch:
        results = iter([(2.0, 0.5), (np.nan, 0.5)])
        patch.setattr(training, "_train_epoch", lambda *_: next(results))
        assert refusal(train_regular_conv, *options).startswith("epoch 2 ended with NaN")
    assert json.loads(history.read_text()) == {"epoch": 1, "loss": 2.0, "accuracy": 0.5}
    assert not weights_file(REGULAR, tmp_path).exists()
    run(train_regular_conv, *options)
    assert "resuming after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_with_nan_are_refused(value, tmp_path):
    model = build_model(REGULAR)
    model.get_layer("conv2").bias.assign(np.full(64, value))
    path = weights_file(REGULAR, tmp_path)
    save_weights(model, path)
    message = f"{path} holds NaN or infinite weights of regular_model, in regular_model/conv2/bias"
    for program in (tune_deform_conv, evaluate):
        assert refusal(program, "--checkpoint-dir", tmp_path) == message


# --- Damaged states ---


@pytest.fixture
def state(tmp_path):
    """A function that makes the state of a training in `tmp_path`, and the file of a saved one."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="dense")], name="small")

    def make(model=model, **settings):
        optimizer = keras.optimizers.Adam(1e-3)
        optimizer.build(model.trainable_variables)
        arguments = Namespace(checkpoint_dir=tmp_path, **{"restart": False, **settings})
        return TrainingState(model, optimizer, arguments, tf.distribute.get_strategy())

    make().save(loss=2.0, accuracy=0.5)
    return make, tmp_path / "small.training" / "state"


def begin(state):
    with state.held():
        state.begin()
    return state.epochs_done


def test_a_state_is_restored(state):
    make, file = state
    assert begin(make()) == 1
    assert begin(make(restart=True)) == 0
    assert not file.exists()


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-100],
    "cut at the first line": lambda content: content[:65],
    "text": lambda content: b"a note\n",
    "binary": lambda content: bytes(range(256)) * 10,
    "an archive": lambda content: content[65:],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_told_and_kept(kind, state):
    make, file = state
    damaged = DAMAGES[kind](file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(
        UserError, match=rf"^{file} cannot be read: it is damaged.*--restart starts over$"
    ):
        begin(make())
    assert file.read_bytes() == damaged
    assert begin(make(restart=True)) == 0


def test_a_flipped_bit_anywhere_in_a_state_is_noticed(state, rng):
    make, file = state
    whole = file.read_bytes()
    for place in (0, 64, *rng.integers(0, len(whole), 30)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="state cannot be read: it is damaged"):
            begin(make())


def test_a_folder_in_place_of_a_state_is_told(state):
    make, file = state
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="state cannot be read: it is no regular file; --restart"):
        begin(make())
    assert begin(make(restart=True)) == 0


def test_a_state_of_other_variables_is_told(state):
    make, _ = state
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, name="dense")], name="small")
    with pytest.raises(UserError, match="holds other variables than those of small; --restart"):
        forged = make(other)
        forged._settings = make()._settings  # as if it began with the same weights
        begin(forged)


@pytest.mark.parametrize("about", ["no JSON", "1", "{}", '{"history": 1, "settings": ""}'])
def test_a_state_of_another_make_is_told(about, state):
    make, _ = state
    forged = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "dumps", lambda _: about)
        forged.save(loss=2.0, accuracy=0.5)
    with pytest.raises(UserError, match=r"state cannot be read: .*; --restart starts over"):
        begin(make())


def test_a_training_killed_after_its_state_is_removed_starts_over(state):
    make, file = state
    file.unlink()
    for name in ("lock", ".state.unfinished"):
        file.with_name(name).touch()
    assert begin(make()) == 0
    assert not file.parent.exists()


def test_a_folder_with_other_files_than_a_state_is_told(state):
    make, file = state
    file.rename(file.with_name("ckpt-1.index"))
    with pytest.raises(UserError, match=r"holds no state of a training, but ckpt-1\.index; --rest"):
        begin(make())
    assert begin(make(restart=True)) == 0


# --- Missing and unfitting files ---


def test_missing_and_unfitting_files_are_told_in_one_line(tmp_path):
    nothing = tmp_path / "nothing.npz"
    assert f"MNIST file {nothing} not found" in error_of("train_regular_conv.py", "--data", nothing)
    nothing.write_bytes(b"no archive")
    assert "is no MNIST file with x_train" in refusal(evaluate, "--data", nothing)

    missing = refusal(tune_deform_conv, "--checkpoint-dir", tmp_path)
    assert "regular_model.weights.h5 not found: train_regular_conv.py writes them" in missing

    shutil.copy(weights_file(REGULAR), weights_file(DEFORM, tmp_path))
    options = ("--checkpoint-dir", tmp_path, "--output", tmp_path / "viz.gif")
    unfitting = refusal(plot_conv_test, *options)
    assert "does not hold the weights of deform_model" in unfitting
    weights_file(REGULAR, tmp_path).write_bytes(b"no weights")
    broken = refusal(tune_deform_conv, "--checkpoint-dir", tmp_path)
    assert "does not hold the weights of regular_model" in broken

    image = tmp_path / "image.png"
    assert "not found" in refusal(plot_conv_test, "--image", image, *options)
    image.write_bytes(b"no image")
    assert "is no image that OpenCV can read" in error_of("plot_conv_test.py", "--image", image)


def mnist_file(path, **arrays):
    digits = {
        f"{kind}_{part}": values
        for part in ("train", "test")
        for kind, values in (("x", np.zeros((3, 28, 28), np.uint8)), ("y", np.arange(3)))
    }
    np.savez(path, **digits | arrays)
    return path


def test_labels_may_be_whole_numbers_of_any_type(tmp_path):
    train, _ = mnist.load_mnist(mnist_file(tmp_path / "mnist.npz"))
    assert train.labels.dtype == np.uint8
    np.testing.assert_array_equal(train.labels, [0, 1, 2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_train": np.int64(1)}, r"labels int64\[\]"),
        ({"y_train": np.array(["one", "two", "three"])}, r"labels <U5\[3\]"),
        ({"y_test": np.array([0.5, 1.5, 2.5])}, r"labels float64\[3\]"),
        ({"y_test": np.array([True, False, True])}, r"labels bool\[3\]"),
        ({"y_test": np.array([[0], [1], [2]])}, r"labels int64\[3, 1\]"),
        ({"y_test": np.array([0, 1, 10])}, "labels from 0 to 10; 0 to 9 expected"),
        ({"y_train": np.array([-1, 1, 2])}, "labels from -1 to 2; 0 to 9 expected"),
        ({"x_train": np.uint8(1)}, r"images uint8\[\]"),
        ({"x_train": np.zeros((3, 28, 28))}, r"images float64\[3, 28, 28\]"),
        (
            {"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, int)},
            "holds no digits",
        ),
        ({"y_test": np.array([None, 1, 2])}, "is no MNIST file .*: Object arrays"),
    ],
)
def test_digits_that_are_none_are_told(arrays, message, tmp_path):
    path = mnist_file(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(UserError, match=rf"^{path} .*{message}"):
        mnist.load_mnist(path)


def test_a_file_with_members_that_are_no_arrays_is_told(tmp_path):
    path = tmp_path / "mnist.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(name, "a note")
    with pytest.raises(UserError, match=f"^{path} is no MNIST file .*: it holds something that is"):
        mnist.load_mnist(path)


@pytest.mark.parametrize("kind", ["empty", "text", "array", "cut", "without labels", "flipped"])
def test_a_file_that_is_no_mnist_is_told(kind, tmp_path):
    path = mnist_file(tmp_path / "mnist.npz")
    content = path.read_bytes()
    if kind == "array":
        np.save(tmp_path / "array.npy", np.zeros(3))
    if kind == "without labels":
        np.savez(path, x_train=np.zeros(3))
    else:
        content = {
            "empty": lambda: b"",
            "text": lambda: b"a note",
            "array": (tmp_path / "array.npy").read_bytes,
            "cut": lambda: content[:1000],
            "flipped": lambda: content[:500] + bytes([content[500] ^ 1]) + content[501:],
        }[kind]()
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} is no MNIST file with x_train, .*: .+"):
        mnist.load_mnist(path)


def test_an_image_too_large_is_told(tmp_path):
    image = tmp_path / "large.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    image.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            for chunk in (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND")
        )
    )
    message = refusal(plot_conv_test, "--image", image, "--output", tmp_path / "viz.gif")
    assert message.startswith(f"image {image} cannot be read: ")


def test_plot_tells_of_a_place_it_cannot_write_to_before_it_draws(tmp_path):
    for name in ("viz.gif", "viz.png"):
        (tmp_path / name).mkdir()
        message = refusal(plot_conv_test, "--output", tmp_path / "viz.gif")
        assert message == f"cannot write {tmp_path / name}: it is no regular file"
        (tmp_path / name).rmdir()


def test_plot_does_not_overwrite_the_image_it_reads(tmp_path):
    image = tmp_path / "digit.png"
    cv2.imwrite(str(image), np.zeros((28, 28), np.uint8))
    before = image.read_bytes()
    completed = script(
        "plot_conv_test.py", "--image", image, "--output", tmp_path / "digit.gif", check=False
    )
    assert completed.returncode == 2
    assert f"{image} would take the place of --image" in completed.stderr
    assert image.read_bytes() == before


def test_a_full_standard_output_is_told_in_one_line():
    with Path("/dev/full").open("w") as full:
        message = error_of("utils/evaluate.py", "--test-digits", 10, stdout=full)
    assert message == "evaluate.py: error: [Errno 28] No space left on device"


def test_unknown_instruction_set_is_told_in_one_line(tmp_path):
    message = error_of(
        "plot_conv_test.py", "--output", tmp_path / "viz.gif", DEFORM_CONV_CPU_ISA="sse9"
    )
    expected = 'DEFORM_CONV_CPU_ISA must be "baseline", "avx2", "avx512" or unset; received "sse9"'
    assert message == f"plot_conv_test.py: error: {expected}"


@pytest.mark.parametrize("name", ["tune_deform_conv.py", "utils/evaluate.py", "plot_conv_test.py"])
def test_missing_library_is_told_in_one_line(name):
    message = error_of(name, DEFORM_CONV_LIBRARY="/none.so")
    assert message.endswith("/none.so not found: build it with ./compile.sh")


@pytest.mark.parametrize(
    ("program", "option", "value"),
    [
        (train_regular_conv, "--epochs", 0),
        (train_regular_conv, "--epochs", 10**22),
        (train_regular_conv, "--train-digits", "9" * 400),
        (train_regular_conv, "--logical-cpus", 10**9),
        (train_regular_conv, "--batch-size", -1),
        (train_regular_conv, "--learning-rate", "inf"),
        (train_regular_conv, "--learning-rate", "1e39"),
        (train_regular_conv, "--seed", -1),
        (train_regular_conv, "--shift", "nan"),
        (train_regular_conv, "--shift", "1e308"),
        (tune_deform_conv, "--unscaled-share", 1.5),
        (plot_conv_test, "--frames", 1),
        (plot_conv_test, "--frames", 10**9),
        (plot_conv_test, "--threshold", "nan"),
    ],
)
def test_senseless_options_are_refused(program, option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(program, option, value)
    assert f"argument {option}: must be" in capsys.readouterr().err
