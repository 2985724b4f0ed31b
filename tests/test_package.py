"""The package `deform_conv` as users import it: by its name, in a copy, again and again."""

import ast
import os
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PROJECT, relative_error

import deform_conv
import deform_conv.layers
from utils import deform_conv_wrapper

PACKAGE = PROJECT / "deform_conv"
DATA = PROJECT / "tests" / "data"
OPS_LIBRARY, XLA_LIBRARY = "libdeform_conv.so", "libdeform_conv_xla.so"
CORE_LIBRARY = "libdeform_conv_core.so"
# Where an installed package has the libraries for this TensorFlow.
INSTALLED = f"lib/tensorflow_{'_'.join(tf.__version__.split('.')[:2])}"

# What the programs below begin with.
CHECK = """
import importlib, os, sys
import tensorflow as tf

def first_and_second_order(function):
    tf.random.set_seed(1)
    shapes = (1, 5, 6, 2), (3, 3, 2, 4), (1, 5, 6, 18)
    tensors = [tf.random.normal(shape, dtype=tf.float64) for shape in shapes]
    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(tensors)
            output = function(*tensors)
            loss = tf.reduce_sum(output**2)
        gradients = inner.gradient(loss, tensors)
        norm = tf.add_n([tf.reduce_sum(gradient**3) for gradient in gradients])
    return [output, *gradients, *outer.gradient(norm, tensors)]

def check(package):
    reference = importlib.import_module("._reference", package.__name__).deform_conv2d_reference
    results = (first_and_second_order(f) for f in (package.deform_conv2d, reference))
    for actual, expected in zip(*results):
        assert tf.norm(actual - expected) <= 1e-10 * tf.norm(expected)

def check_layer(package):
    layer = package.layers.DeformableConv2D(3, 3, modulated=True)
    assert layer(tf.ones((1, 5, 6, 2))).shape == (1, 3, 4, 3)
    return layer

def failed_import(name):
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    raise AssertionError(f"{name} was imported")
"""


def run_in(folder, program, **environment):
    """Runs a program that finds modules in `folder` first."""
    inherited = {name: of for name, of in os.environ.items() if name != "DEFORM_CONV_LIBRARY"}
    completed = subprocess.run(
        [sys.executable, "-c", CHECK + program],
        cwd=folder,
        env=inherited | {name: str(of) for name, of in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr


def copy_package(folder, version=None):
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    if version:
        text = (folder / "__init__.py").read_text()
        changed = re.sub(r'__version__ = ".*?"', f'__version__ = "{version}"', text)
        (folder / "__init__.py").write_text(changed)


def copy_build(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or (CORE_LIBRARY, OPS_LIBRARY, XLA_LIBRARY):
        shutil.copy(PROJECT / "build" / name, folder)


# --- Its names ---


def test_a_users_own_utils_does_not_hide_it(tmp_path):
    (tmp_path / "utils.py").write_text("whose = 'the user'")
    program = """
import utils
from deform_conv.layers import DeformableConv2D
assert utils.whose == "the user"
assert DeformableConv2D(3, 3)(tf.ones((1, 5, 6, 2))).shape == (1, 3, 4, 3)
"""
    run_in(tmp_path, program, PYTHONPATH=PROJECT)


def test_wrapper_in_utils_is_the_same_function():
    assert deform_conv_wrapper.deform_conv2d is deform_conv.deform_conv2d
    assert deform_conv_wrapper.__all__ == ["deform_conv2d"]


def test_without_keras_the_op_works(tmp_path):
    # TensorFlow imports Keras where it can.
    program = """
sys.modules["keras"] = None
from deform_conv import *
import deform_conv
assert deform_conv2d is deform_conv.deform_conv2d
check(deform_conv)
assert "keras" in failed_import("deform_conv.layers")
"""
    run_in(tmp_path, program, PYTHONPATH=PROJECT)


def test_what_needs_keras_is_imported_when_it_is_asked_for(tmp_path):
    program = """
import deform_conv
assert {"deformable", "explore", "layers", "plot_offsets"} <= set(dir(deform_conv))
modules = {"deform_conv.convert", "deform_conv.layers", "deform_conv._explorer"}
assert not modules & set(sys.modules)
assert deform_conv.layers is sys.modules["deform_conv.layers"]
assert deform_conv.deformable is sys.modules["deform_conv.convert"].deformable
assert deform_conv.explore is sys.modules["deform_conv._explorer"].explore
"""
    run_in(tmp_path, program, PYTHONPATH=PROJECT)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'deform_conv' has no attribute 'conv3d'"):
        deform_conv.conv3d  # noqa: B018


def test_version_is_that_of_the_citation():
    (version,) = re.findall(r"^version: (.*)$", (PROJECT / "CITATION.cff").read_text(), re.M)
    assert deform_conv.__version__ == version


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_no_module_needs_the_packages_name_or_utils(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module]
        else:
            continue
        assert not {name.partition(".")[0] for name in absolute} & {"deform_conv", "utils"}


def test_layer_saved_under_its_former_module_loads():
    # Written when the layer was utils.deform_conv_layer.DeformableConv2D.
    images = np.linspace(-1, 1, 2 * 9 * 10 * 4, dtype=np.float32).reshape(2, 9, 10, 4)
    with tf.device("CPU:0"):
        model = keras.models.load_model(DATA / "layer_of_utils.keras")
        output = model(images)
    assert type(model.layers[-1]) is deform_conv.layers.DeformableConv2D
    assert relative_error(output, np.load(DATA / "layer_of_utils_output.npy")) <= 1e-6


# --- Where it finds the library ---


@pytest.mark.parametrize("name", ["renamed", "vendor.deform_conv"])
def test_copy_finds_the_build_beside_it(name, tmp_path):
    copy = tmp_path.joinpath(*name.split("."))
    copy_package(copy)
    copy_build(copy.parent / "build")
    program = f"""
import {name} as copy
check(copy)
layer = check_layer(copy)
import keras
model = copy.deformable(keras.Sequential([keras.Input((5, 6, 2)), keras.layers.Conv2D(3, 3)]))
assert type(model.layers[-1]) is type(layer)
assert copy.xla_kernels_loaded()
assert "deform_conv" not in sys.modules
"""
    run_in(tmp_path, program, DEFORM_CONV_LIBRARY="")  # as good as none


def test_library_in_the_package_wins_over_the_build(tmp_path):
    copy_package(tmp_path / "installed")
    copy_build(tmp_path / "build")
    within = tmp_path / "installed" / INSTALLED / OPS_LIBRARY
    within.parent.mkdir(parents=True)
    within.write_bytes(b"not a library")
    program = f"""
message = failed_import("installed")
assert message.startswith({str(within)!r}) and "not found" not in message, message
"""
    run_in(tmp_path, program)


def test_installed_package_has_the_core_for_all_versions_of_tensorflow(tmp_path):
    copy_package(tmp_path / "installed")
    copy_build(tmp_path / "installed" / "lib", CORE_LIBRARY)
    copy_build(tmp_path / "installed" / INSTALLED, OPS_LIBRARY, XLA_LIBRARY)
    run_in(tmp_path, "import installed; check(installed); assert installed.xla_kernels_loaded()")


def test_library_path_is_that_of_the_library_for_this_tensorflow(tmp_path):
    copy_package(tmp_path / "installed")
    copy_build(tmp_path / "installed" / "lib", CORE_LIBRARY)
    for version in (INSTALLED, "lib/tensorflow_2_99"):
        copy_build(tmp_path / "installed" / version, OPS_LIBRARY)
    path = tmp_path / "installed" / INSTALLED / OPS_LIBRARY
    run_in(tmp_path, f"import installed; assert installed.library_path() == {str(path)!r}")


def test_version_of_tensorflow_that_was_not_installed_for_is_named(tmp_path):
    copy_package(tmp_path / "installed")
    for version in ("2_17", "2_18"):
        copy_build(tmp_path / "installed" / "lib" / f"tensorflow_{version}", OPS_LIBRARY)
    program = """
message = failed_import("installed")
text = "is for TensorFlow 2.17, 2.18, and this is TensorFlow " + tf.__version__
assert text + ". Install one of those. Or build deform_conv for yours" in message, message
tf.__version__ = "2.16.2"
message = failed_import("installed")
assert "this is TensorFlow 2.16.2. Install one of those. 2.17 is the oldest" in message, message
"""
    run_in(tmp_path, program)


def test_without_tensorflow_it_says_what_to_install():
    program = """
import sys
sys.modules["tensorflow"] = None
try:
    import deform_conv
except ImportError as error:
    print(error)
"""
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert completed.stdout.startswith("deform_conv needs TensorFlow, 2.17 or newer, which is not")
    for extra in ("and-cuda", "tensorflow", "tensorflow-cpu"):
        assert f"'tf-deform-conv[{extra}]'" in completed.stdout


def test_describes_and_checks_itself():
    completed = subprocess.run(
        [sys.executable, "-m", "deform_conv"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    lines = completed.stdout.splitlines()
    assert lines[0] == f"deform_conv {deform_conv.__version__}"
    assert f"  library      {PROJECT}/build/{OPS_LIBRARY}, for TensorFlow {tf.__version__}" in lines
    assert "  XLA          yes" in lines
    assert "deform_conv2d, version 2, on CPU:0, against the reference" in lines
    assert lines[-1] == "ok"


def test_environment_variable_wins_over_both(tmp_path):
    copy_package(tmp_path / "local")
    copy_build(tmp_path)
    for folder in (f"local/{INSTALLED}", "build"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / OPS_LIBRARY).write_bytes(b"not a library")
    # A path relative to the current folder will do.
    run_in(tmp_path, "import local; check(local)", DEFORM_CONV_LIBRARY=OPS_LIBRARY)


# --- Imported more than once ---


def test_every_module_can_be_reloaded(tmp_path):
    program = """
import deform_conv
from deform_conv import _library, _reference, convert, layers, ops
before, old = check_layer(deform_conv), deform_conv.deform_conv2d
for module in (deform_conv, _library, _reference, ops, layers, convert, deform_conv):
    importlib.reload(module)
check(deform_conv)
import types
check(types.SimpleNamespace(deform_conv2d=old, __name__="deform_conv"))  # held since before
after = check_layer(deform_conv)
assert type(before) is not type(after)
import keras
for layer in (before, after):
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == "deform_conv>DeformableConv2D"
    assert type(keras.saving.deserialize_keras_object(config)) is type(after)
"""
    run_in(tmp_path, program, PYTHONPATH=PROJECT)


def test_changed_gradient_takes_effect_with_a_reload(tmp_path):
    copy_package(tmp_path / "edited")
    copy_build(tmp_path / "build")
    program = """
import edited
check(edited)
with open("edited/ops.py", "a") as file:
    file.write('''
@gradient_of("DeformConv2D")
def _zeros(op, grad_output):
    return [tf.zeros_like(tensor) for tensor in op.inputs]
''')
importlib.reload(edited.ops)
gradients = first_and_second_order(edited.deform_conv2d)[1:4]
assert all(tf.reduce_all(gradient == 0) for gradient in gradients)
"""
    run_in(tmp_path, program)


def test_two_copies_in_one_process_share_the_library(tmp_path):
    # Files of their own: links to one file would be one library.
    for name in ("first", "second"):
        copy_package(tmp_path / name / f"{name}_copy")
        copy_build(tmp_path / name / "build")
    program = """
sys.path += ["first", "second"]
import first_copy, second_copy
assert first_copy.deform_conv2d is not second_copy.deform_conv2d
for package in (first_copy, second_copy):
    check(package)
layer, other = (check_layer(package) for package in (first_copy, second_copy))
import keras
config = keras.saving.serialize_keras_object(layer)
assert config["registered_name"] == "deform_conv>DeformableConv2D"
assert type(keras.saving.deserialize_keras_object(config)) is type(other)
with open("/proc/self/maps") as maps:
    loaded = {line.split()[-1] for line in maps if "libdeform_conv" in line}
assert loaded and not [path for path in loaded if "second" in path], loaded
"""
    run_in(tmp_path, program)


def test_two_threads_may_import_two_copies_at_once(tmp_path):
    for name in ("first", "second"):
        copy_package(tmp_path / name)
    copy_build(tmp_path / "build")
    program = """
import threading
start = threading.Barrier(2)
def load(name):
    start.wait()
    importlib.import_module(name)
threads = [threading.Thread(target=load, args=[name]) for name in ("first", "second")]
for thread in threads: thread.start()
for thread in threads: thread.join()
for name in ("first", "second"):
    check(sys.modules[name])
"""
    run_in(tmp_path, program)


def test_import_works_where_the_modules_of_an_earlier_one_are_forgotten(tmp_path):
    # As fixtures do that restore sys.modules.
    program = """
from unittest import mock
with mock.patch.dict(sys.modules):
    import deform_conv
assert "deform_conv" not in sys.modules
import deform_conv
check(deform_conv)
"""
    run_in(tmp_path, program, PYTHONPATH=PROJECT)


def test_another_version_beside_it_is_refused(tmp_path):
    copy_package(tmp_path / "old", version="0.0.9")
    copy_package(tmp_path / "new", version="0.1.9")
    program = f"""
assert "not found" in failed_import("new")  # which leaves nothing behind
os.symlink({str(PROJECT / "build")!r}, "build")
import old
message = failed_import("new")
assert "deform_conv 0.1.9" in message and "deform_conv 0.0.9" in message, message
check(old)
"""
    run_in(tmp_path, program)


@pytest.mark.parametrize("remedy", ["build", "variable"])
def test_import_works_after_one_that_failed(remedy, tmp_path):
    copy_package(tmp_path / "local")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    program = f"""
message = failed_import("local")
for place in ("local/{INSTALLED}", "build"):
    assert f"{{os.getcwd()}}/{{place}}/libdeform_conv.so" in message, message
assert "not found: build it with ./compile.sh" in message
os.environ["DEFORM_CONV_LIBRARY"] = "broken.so"
message = failed_import("local")
assert message.startswith(f"{{os.getcwd()}}/broken.so is not the libdeform_conv.so of"), message
if {remedy!r} == "build":
    del os.environ["DEFORM_CONV_LIBRARY"]
    os.symlink({str(PROJECT / "build")!r}, "build")
else:
    os.environ["DEFORM_CONV_LIBRARY"] = {str(PROJECT / "build" / OPS_LIBRARY)!r}
import local
check(local)
"""
    run_in(tmp_path, program)


def test_kernels_for_xla_that_were_missing_are_loaded_with_a_reload(tmp_path):
    copy_package(tmp_path / "local")
    copy_build(tmp_path / "build", CORE_LIBRARY, OPS_LIBRARY)
    program = f"""
import local
assert not local.xla_kernels_loaded()
check(local)
os.symlink({str(PROJECT / "build" / XLA_LIBRARY)!r}, "build/{XLA_LIBRARY}")
importlib.reload(local._library)
assert local.xla_kernels_loaded()
compiled = tf.function(local.deform_conv2d, jit_compile=True)
compiled(tf.ones((1, 5, 6, 2)), tf.ones((3, 3, 2, 4)), tf.ones((1, 5, 6, 18)))
"""
    run_in(tmp_path, program)
