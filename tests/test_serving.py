"""Models with the op where the package is not imported: docs/examples/serve.c, and Python."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import PROJECT, relative_error
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import deform_conv
from deform_conv.layers import DeformableConv2D

COMPILER = os.environ.get("CC", "cc")
TOLERANCE = 1e-6
ON_THE_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}  # TensorFloat-32 is less exact


@dataclass
class Served:
    """A model as it is served: files in one folder, and what they must compute."""

    folder: Path
    images: np.ndarray
    expected: np.ndarray
    frozen_input: str
    frozen_output: str

    @property
    def library(self) -> Path:
        return self.folder / "libdeform_conv.so"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    # All that a server needs of the package. Where it is installed, these are in two folders.
    library = Path(deform_conv.library_path())
    for place in (library.parent, library.parent.parent):
        for file in place.glob("libdeform_conv*.so"):
            shutil.copy(file, folder)

    with tf.device("CPU:0"):
        keras.utils.set_random_seed(1)
        images = keras.Input((None, None, 3), name="images")
        layer = DeformableConv2D(
            4, 3, padding="same", modulated=True, offset_kernel_initializer="glorot_uniform"
        )
        model = keras.Model(images, layer(images))
        batch = np.random.default_rng(1).standard_normal((2, 9, 10, 3)).astype(np.float32)
        expected = model(batch).numpy()
    model.export(folder / "model", verbose=False)
    loaded = tf.saved_model.load(folder / "model")
    frozen = convert_variables_to_constants_v2(loaded.signatures["serving_default"])
    (folder / "frozen.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString())
    return Served(folder, batch, expected, frozen.inputs[0].name, frozen.outputs[0].name)


# --- C ---


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Runs docs/examples/serve.c; returns what it printed, and its outputs."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C compiler {COMPILER}")
    folder = tmp_path_factory.mktemp("serve")
    program = folder / "serve"
    lib = tf.sysconfig.get_lib()
    command = [COMPILER, "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-o", program]
    command += [PROJECT / "docs" / "examples" / "serve.c", "-isystem", tf.sysconfig.get_include()]
    command += [f"-L{lib}", "-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"]
    subprocess.run([*command, f"-Wl,-rpath,{lib}"], check=True)

    def run(library, model, input_name, output_name, images, shape=None, check=True):
        images.tofile(folder / "images")
        files = [folder / "images", folder / "outputs"]
        sizes = map(str, shape or images.shape)
        completed = subprocess.run(
            [program, library, model, input_name, output_name, *files, *sizes],
            env=ON_THE_CPU,
            capture_output=True,
            text=True,
            check=False,
        )
        if not check:
            assert completed.returncode == 1
            return completed.stderr.splitlines()[-1]
        assert completed.returncode == 0, completed.stderr
        outputs = np.fromfile(folder / "outputs", np.float32)
        return outputs.reshape([int(size) for size in completed.stdout.split()])

    return run


def names_of(folder) -> tuple[str, str]:
    """The input and the output of a SavedModel's signature, as saved_model_cli shows them."""
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    (input_info,), (output_info,) = signature.inputs.values(), signature.outputs.values()
    return input_info.name, output_info.name


def test_c_program_computes_what_keras_does(served, serve):
    model = served.folder / "model"
    outputs = serve(served.library, model, *names_of(model), served.images)
    assert relative_error(outputs, served.expected) <= TOLERANCE


def test_c_program_takes_a_frozen_graph(served, serve):
    names = served.frozen_input, served.frozen_output
    outputs = serve(served.library, served.folder / "frozen.pb", *names, served.images)
    assert relative_error(outputs, served.expected) <= TOLERANCE


def test_c_program_says_what_is_wrong(served, serve):
    model, (input_name, output_name) = served.folder / "model", names_of(served.folder / "model")
    arguments = {
        "library": served.library,
        "model": model,
        "input_name": input_name,
        "output_name": output_name,
        "images": served.images,
    }
    for wrong, message in [
        ({"library": "/none.so"}, "/none.so: /none.so: cannot open shared object file"),
        ({"model": "none"}, "none: not found"),
        ({"input_name": "images"}, "images: not the name of a tensor, such as operation:0"),
        ({"input_name": "none:0"}, "none:0: the model has no such tensor"),
        ({"output_name": output_name[:-1] + "9"}, "9: the model has no such tensor"),
        ({"shape": (2, 9, 10, 4)}, "/images: 2160 bytes; expected 2880"),
        ({"shape": (2, 9, 0, 3)}, "0: not a size"),
        ({"shape": (2, 9, "10x", 3)}, "10x: not a size"),
    ]:
        line = serve(**(arguments | wrong), check=False)
        assert line.startswith("serve: error: ") and message in line, line


# --- Python ---


def python(program: str, served: Served, **paths) -> np.ndarray:
    """The `outputs` of a program that is given `library`, `images` and `paths`."""
    np.save(served.folder / "images.npy", served.images)
    names = {"library": served.library, **paths}
    lines = [f"{name} = {str(path)!r}" for name, path in names.items()]
    program = "\n".join(
        [
            "import sys, numpy as np, tensorflow as tf",
            *lines,
            "images = np.load('images.npy')",
            program,
            "assert not [name for name in sys.modules if name.startswith('deform_conv')]",
            "np.save('outputs.npy', outputs)",
        ]
    )
    completed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=served.folder,
        env=ON_THE_CPU,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    return np.load(served.folder / "outputs.npy")


@pytest.mark.parametrize("load", ["load_op_library", "load_library"])
def test_saved_model_needs_the_library_and_not_the_package(load, served):
    program = f"""
tf.{load}(library)
model = tf.saved_model.load("model")
outputs = model.signatures["serving_default"](images=tf.constant(images))["output_0"]
"""
    assert relative_error(python(program, served), served.expected) <= TOLERANCE


def test_frozen_graph_needs_the_library_and_not_the_package(served):
    program = """
tf.load_op_library(library)
graph_def = tf.compat.v1.GraphDef.FromString(open("frozen.pb", "rb").read())
graph = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph_def, name=""), [])
outputs = graph.prune(input_name, output_name)(tf.constant(images))
"""
    names = {"input_name": served.frozen_input, "output_name": served.frozen_output}
    assert relative_error(python(program, served, **names), served.expected) <= TOLERANCE


def test_function_for_xla_needs_the_library_of_the_xla_kernels_too(served, tmp_path):
    if not deform_conv.xla_kernels_loaded():
        pytest.skip("XLA has no kernels here")
    filters = tf.random.stateless_normal([3, 3, 3, 4], [1, 2])
    module = tf.Module()
    offset = tf.random.stateless_normal([*served.images.shape[:3], 18], [3, 4])

    @tf.function(input_signature=[tf.TensorSpec(served.images.shape)], jit_compile=True)
    def convolve(images):
        return deform_conv.deform_conv2d(images, filters, offset)

    module.convolve = convolve
    tf.saved_model.save(module, tmp_path)
    program = """
tf.load_library(library)
model = tf.saved_model.load(folder)
try:
    model.convolve(images)
except tf.errors.InvalidArgumentError as error:
    assert "DeformConv2D" in str(error), error
else:
    raise AssertionError("compiled without the kernels")
tf.load_library("./libdeform_conv_xla.so")
outputs = model.convolve(images)
"""
    outputs = python(program, served, folder=tmp_path)
    with tf.device("CPU:0"):
        expected = deform_conv.deform_conv2d(served.images, filters, offset)
    assert relative_error(outputs, expected) <= TOLERANCE
