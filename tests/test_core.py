"""What must hold of the compiled library: instruction sets, threads, symbols, the loader."""

import ctypes
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, random_case, relative_error, run

BUILD = PROJECT / "build"
CORE = PROJECT / "src" / "core"
CPUINFO = Path("/proc/cpuinfo")
PROCESSOR = CPUINFO.read_text() if CPUINFO.exists() else ""

# Computes a case of each kind in a process with settings of its own, and prints the results.
COMPUTE = """
import json, sys
import numpy as np
import tensorflow as tf
threads = int(sys.argv[1])
if threads:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
from tests.conftest import random_case, run
results = {}
cases = ((5, 24, 1), (1, 48, 1), (1, 48, 3), (1, 64, 64), (3, 32, 8), (1, 64, 4), (1, 64, 8))
for batch, channels, groups in cases:
    for dtype in (tf.float64, tf.float32, tf.float16, tf.bfloat16):
        case = random_case(np.random.default_rng(1), batch=batch, size=(17, 19), channels=channels,
                           out_channels=2 * channels, groups=groups, deform_groups=2)
        for key, value in run(case.tensors(dtype), case.attributes).items():
            values = tf.cast(value, tf.float64).numpy().ravel().tolist()
            results[f"{dtype.name} {batch} {channels} {groups} {key}"] = values
print(json.dumps(results))
"""


def compute(threads=0, **environment):
    completed = subprocess.run(
        [sys.executable, "-c", COMPUTE, str(threads)],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return {key: np.array(values) for key, values in json.loads(completed.stdout).items()}


@pytest.fixture(scope="module")
def two_threads():
    return compute(threads=2)


# Different orders of the same sums, in the type that they are computed in, then rounded.
ROUNDING = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


def assert_equal_but_for_rounding(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        distance = np.linalg.norm(value - expected[key]) / np.linalg.norm(expected[key])
        assert distance <= ROUNDING[key.split()[0]], key


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_number_of_threads_changes_rounding_at_most(threads, two_threads):
    assert_equal_but_for_rounding(compute(threads=threads), two_threads)


def test_same_number_of_threads_gives_the_same_bits(two_threads):
    for key, value in compute(threads=2).items():
        np.testing.assert_array_equal(value, two_threads[key])


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_instruction_set_changes_rounding_at_most(instruction_set, two_threads):
    results = compute(threads=2, DEFORM_CONV_CPU_ISA=instruction_set)
    assert_equal_but_for_rounding(results, two_threads)
    if instruction_set == "baseline" and "avx2" in PROCESSOR and "fma" in PROCESSOR:
        # It must have taken effect: a fused multiplication rounds once where baseline rounds twice.
        assert any(np.any(value != two_threads[key]) for key, value in results.items())


def test_unknown_instruction_set_is_refused():
    message = 'DEFORM_CONV_CPU_ISA must be "baseline", "avx2", "avx512" or unset; received "sse9"'
    with pytest.raises(AssertionError, match=f"InvalidArgumentError: .*{re.escape(message)}"):
        compute(threads=1, DEFORM_CONV_CPU_ISA="sse9")
    assert core_text("cpu_instruction_set", DEFORM_CONV_CPU_ISA="sse9") == message


EMPTY_BATCH = """
import resource
import tensorflow as tf
from tests.conftest import run
tensors = {
    "input": tf.zeros((0, 4, 4, 6), tf.float16),
    "filters": tf.zeros((3, 3, 6, 8), tf.float16),
    "offset": tf.zeros((0, 2**30, 1, 18), tf.float32),
}
padding = [[0, 0], [2**30 - 2, 0], [0, 0], [0, 0]]
resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
print(run(tensors, {"padding": padding, "strides": [1, 2]})["grad_filters"].shape)
"""


def test_empty_batch_takes_no_memory_for_an_image():
    """In 16 bits, the copy of one output would take 34 GB here."""
    printed = subprocess.run(
        [sys.executable, "-c", EMPTY_BATCH],
        cwd=PROJECT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "(3, 3, 6, 8)" in printed


def symbols(*arguments):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    printed = subprocess.run(["nm", "-C", *arguments], capture_output=True, text=True, check=True)
    return printed.stdout.splitlines()


def test_objects_of_an_instruction_set_share_no_function_with_others():
    """The linker would keep one copy for all, maybe one that older processors cannot run."""
    folders = list(BUILD.glob("CMakeFiles/cpu_kernels_*.dir"))
    assert "cpu_kernels_baseline.dir" in {folder.name for folder in folders}
    for folder in folders:
        name = folder.stem.removeprefix("cpu_kernels_")
        objects = sorted(map(str, folder.rglob("*.o")))
        assert objects
        # With several files, nm prints the name of each, and empty lines.
        shared = [
            line
            for line in symbols("--defined-only", *objects)
            if line.split()[1:2] in (["W"], ["V"], ["u"])
            and f"Eigen_{name}::" not in line
            and f"deform_conv::{name}::" not in line
            and "DW.ref.__gxx_personality_v0" not in line
        ]
        assert not shared


LIBRARIES = ("libdeform_conv_core.so", "libdeform_conv.so", "libdeform_conv_xla.so")


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_exports_the_cores_interface_alone_and_imports_nothing_of_cuda(library):
    """TensorFlow loads it beside its own CUDA, cuBLAS and Eigen: they must not get mixed up."""
    path = str(BUILD / library)
    exported = [line.split(maxsplit=2)[2] for line in symbols("-D", "--defined-only", path)]
    foreign = [name for name in exported if not re.search(r"(\b|^)deform_conv(::|_)", name)]
    assert foreign == []
    assert bool(exported) == (library == "libdeform_conv_core.so")
    imported = [line.split(maxsplit=1)[1] for line in symbols("-D", "--undefined-only", path)]
    assert imported
    assert [name for name in imported if re.match("cuda|cublas|cudnn|cu[A-Z]", name)] == []


def core_text(name, **environment):
    """What a function of core/build_info.h says, in a process without TensorFlow."""
    program = f"""
import ctypes
function = ctypes.CDLL({str(BUILD / LIBRARIES[0])!r}).deform_conv_{name}
function.restype = ctypes.c_char_p
print(function().decode())
"""
    completed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return completed.stdout.strip()


def test_best_instruction_set_of_the_processor_is_used():
    """A linker that brings another __cpu_model would leave every processor with the baseline."""
    best = "baseline"
    if {"avx2", "fma", "f16c"} <= set(PROCESSOR.split()):
        best = "avx2"
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(PROCESSOR.split()):
            best = "avx512"
    assert core_text("cpu_instruction_set") == best
    assert core_text("cpu_instruction_set", DEFORM_CONV_CPU_ISA="baseline") == "baseline"


# A driver for an older CUDA, as far as the CUDA runtime asks it.
OLD_DRIVER = """
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return 0; }
"""


def test_older_driver_is_named_with_what_to_do(tmp_path):
    if not core_text("cuda"):
        pytest.skip("built without CUDA kernels")
    source = tmp_path / "driver.c"
    source.write_text(OLD_DRIVER)
    library = tmp_path / "libcuda.so.1"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-o", library, source], check=True)
    misfit = core_text("driver_misfit", LD_LIBRARY_PATH=str(tmp_path))
    assert re.search(
        r"built with CUDA 1[3-9]\.\d, which needs an NVIDIA driver for CUDA 1[3-9]\.0 or newer; "
        r"this one is for CUDA 12\.4\. Update the driver, or compute on the CPU$",
        misfit,
    )


# --- Parts of a batch ---


@pytest.mark.skipif(sys.platform != "linux", reason="needs GNU's linker")
def test_fused_kernels_get_batches_of_too_many_pixels_in_parts(tmp_path):
    """On no GPU. The program has those kernels itself; all others stay undefined. It also tests the
    workspace that the parts share, and what is chosen for layers without filters."""
    program = tmp_path / "gpu_parts"
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-no-pie"]
    options = [f"-I{PROJECT / 'src'}", "-DDEFORM_CONV_SM90", "-Wl,--unresolved-symbols=ignore-all"]
    sources = [PROJECT / "tests" / "gpu_parts.cc", CORE / "params.cc", CORE / "size_rules.cc"]
    names = ("implementations", "embedded", "embedding", "filters_of_ones")
    sources += [CORE / "gpu" / f"{name}.cc" for name in names]
    subprocess.run([*compiler, *options, *sources, "-o", program], check=True)
    completed = subprocess.run([program], capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout


# --- The C interface ---


@pytest.fixture(scope="module")
def c_interface(tmp_path_factory):
    library = tmp_path_factory.mktemp("c_interface") / "libdeform_conv_core_cpu.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread"]
    command += [f"-I{PROJECT / 'src'}", CORE / "c_api" / "deform_conv2d_cpu.cc", "-o", library]
    command += [f"-L{BUILD}", "-ldeform_conv_core", f"-Wl,-rpath,{BUILD}"]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("forward", "backward"):
        getattr(loaded, f"deform_conv2d_{name}_cpu").restype = ctypes.c_char_p
    return loaded


def problem_of(case, element_type):
    """DeformConvProblem of `case`, whose padding is VALID."""
    shapes = [case.arrays[name].shape for name in ("input", "filters", "offset", "mask")]
    attributes = [
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        case.attributes["deform_groups"],
        element_type,
        0,
        0,
        0,
        0,
    ]
    return (ctypes.c_int64 * 30)(*itertools.chain(*shapes), *attributes)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("element_type", "dtype"), [(0, np.float32), (1, np.float64)])
def test_c_interface_computes_what_the_op_does(c_interface, element_type, dtype, threads):
    case = random_case(np.random.default_rng(1), size=(9, 11), deform_groups=2, padding="VALID")
    expected = {
        key: value.numpy() for key, value in run(case.tensors(dtype), case.attributes).items()
    }
    arrays = {name: np.ascontiguousarray(of, dtype) for name, of in case.arrays.items()}
    actual = {key: np.empty_like(value) for key, value in expected.items()}
    pointers = {key: of.ctypes.data_as(ctypes.c_void_p) for key, of in (arrays | actual).items()}
    arguments = [pointers[name] for name in ("input", "filters", "offset", "mask")]
    gradients = [pointers[f"grad_{name}"] for name in ("input", "filters", "offset", "mask")]
    grad_output = np.ones_like(expected["output"])
    problem = problem_of(case, element_type)
    assert not c_interface.deform_conv2d_forward_cpu(
        problem, *arguments, pointers["output"], threads
    )
    assert not c_interface.deform_conv2d_backward_cpu(
        problem, *arguments, grad_output.ctypes.data_as(ctypes.c_void_p), *gradients, threads
    )
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= 8 * np.finfo(dtype).eps, key


@pytest.mark.parametrize(
    ("element_type", "threads", "message"),
    [
        (2, 1, "element_type must be 0 or 1; received 2"),
        (0, 0, "threads must be from 1 to 1024; received 0"),
    ],
)
def test_c_interface_names_what_is_wrong(c_interface, element_type, threads, message):
    case = random_case(np.random.default_rng(1), size=(9, 11), deform_groups=2, padding="VALID")
    error = c_interface.deform_conv2d_forward_cpu(
        problem_of(case, element_type), None, None, None, None, None, threads
    )
    assert error.decode() == message


# --- The sources ---


def test_every_source_of_the_core_is_in_one_list():
    listed = re.findall(r"^  (\S+)$", (CORE / "sources.cmake").read_text(), re.M)
    sources = [file for file in CORE.rglob("*") if file.suffix in (".cc", ".cu")]
    assert sorted(listed) == sorted(str(file.relative_to(CORE)) for file in sources)


def test_files_that_may_spill_registers_exist_and_are_named_with_a_reason():
    text = (PROJECT / "CMakeLists.txt").read_text()
    named = re.search(r"set\(spilling\n(.*?)\)\n", text, re.S)[1].rstrip(")").splitlines()
    for before, line in itertools.pairwise([None, *map(str.strip, named)]):
        if not line.startswith("#"):
            assert (PROJECT / line).exists(), line
            assert before is not None and before.startswith("#"), line


def test_core_includes_nothing_of_tensorflow_and_cudas_headers_only_for_nvcc():
    """So kernels compile in seconds, and TensorFlow's CUDA is not mixed with that of nvcc."""
    for file in CORE.rglob("*.*"):
        included = re.findall(r'^#include [<"](.*)[>"]', file.read_text(), re.M)
        assert not [name for name in included if re.match("tensorflow/|tsl/|xla/|absl/", name)], (
            file
        )
        if file.suffix not in (".cu", ".cuh") and file.parent.name != "c_api":
            assert not [name for name in included if re.match("cuda|cublas|cub/", name)], file


# Prints layers whose embedding breaks a rule, and how many were tried.
EMBED_LAYERS = r"""
#include <cstdio>
#include "core/gpu/embedding.h"
using deform_conv::ChannelAims;
using deform_conv::DeformConvParams;
using deform_conv::Embedding;

bool IsRight(const DeformConvParams& layer, const ChannelAims& aims) {
  const Embedding embedding = EmbeddingOf(layer, aims);
  const DeformConvParams& larger = embedding.larger;
  // So no embedding is embedded again, and again.
  if (!EmbeddingOf(larger, aims).changes_nothing()) return false;
  if (embedding.changes_nothing()) return true;
  const auto taken = [&](int64_t channels) { return channels % aims.in_vector == 0; };
  const int64_t merged = layer.groups / larger.groups;
  const int64_t run = layer.in_channels / embedding.in_runs;
  const bool whole = layer.groups % larger.groups == 0 &&
                     layer.in_channels % embedding.in_runs == 0 &&
                     larger.in_channels % larger.groups == 0 &&
                     larger.in_channels % larger.deform_groups == 0 &&
                     larger.out_channels % larger.groups == 0 &&
                     merged * layer.group_in_channels() % run == 0 &&
                     layer.deform_group_channels() % run == 0;
  return whole && taken(larger.group_in_channels()) && taken(larger.deform_group_channels()) &&
         larger.group_out_channels() % aims.out_vector == 0 &&
         larger.in_channels >= layer.in_channels && larger.in_channels <= 4 * layer.in_channels &&
         larger.out_channels >= layer.out_channels;
}

int main() {
  int tried = 0;
  const ChannelAims all_aims[] = {{8, 8, 64, 8, 1},     {8, 8, 64, 32, 2.0}, {4, 4, 32, 4, 1},
                                  {4, 4, 32, 32, 1.25}, {8, 8, 1, 8, 1},     {4, 1, 1, 4, 1}};
  for (const ChannelAims& aims : all_aims) {
    for (int64_t groups = 1; groups <= 32; ++groups) {
      for (int64_t in = 1; in <= 70; ++in) {
        for (int64_t deform_groups = 1; deform_groups <= 16; ++deform_groups) {
          if (groups * in % deform_groups != 0) continue;
          for (const int64_t out : {1, 2, 3, 5, 8, 16, 33, 64, 100}) {
            DeformConvParams layer = {};
            layer.kernel_h = layer.kernel_w = 3;
            layer.groups = groups;
            layer.deform_groups = deform_groups;
            layer.in_channels = groups * in;
            layer.out_channels = groups * out;
            ++tried;
            if (IsRight(layer, aims)) continue;
            std::printf("%d groups of %d to %d channels, %d deformable groups\n", int(groups),
                        int(in), int(out), int(deform_groups));
          }
        }
      }
    }
  }
  std::printf("%d layers\n", tried);
}
"""


def test_embedded_layers_are_whole_groups_of_larger_ones(tmp_path):
    source, program = tmp_path / "embed_layers.cc", tmp_path / "embed_layers"
    source.write_text(EMBED_LAYERS)
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", f"-I{PROJECT / 'src'}"]
    command += [source, CORE / "gpu" / "embedding.cc", "-o", program]
    subprocess.run(command, check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    (counted,) = printed.splitlines()
    assert int(counted.removesuffix(" layers")) > 100_000


# --- The loader ---


def import_with(library):
    completed = subprocess.run(
        [sys.executable, "-c", "import utils.deform_conv_wrapper"],
        cwd=PROJECT,
        env={**os.environ, "DEFORM_CONV_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode != 0
    return completed.stderr


def test_loader_says_what_to_do_where_the_library_is_missing(tmp_path):
    assert "not found: build it with ./compile.sh" in import_with(tmp_path / "none.so")


def test_loader_says_which_tensorflow_a_library_was_built_for(tmp_path):
    library = tmp_path / "libdeform_conv.so"
    library.write_bytes(b"not a library")
    assert f"{library} is not the libdeform_conv.so of deform_conv" in import_with(library)
    xla_library = BUILD / "libdeform_conv_xla.so"
    assert f"{xla_library} is not the libdeform_conv.so of" in import_with(xla_library)
    library.write_bytes(b"\0libdeform_conv was built for TensorFlow 2.18.0\0")
    message = import_with(library)
    assert "was built for TensorFlow 2.18.0" in message
    assert "Build it again with ./compile.sh" in message


def test_library_of_another_version_is_not_even_loaded(tmp_path):
    """It might load, and disagree with TensorFlow about what its types look like."""
    text = (BUILD / "libdeform_conv.so").read_bytes()
    assert len(re.findall(rb"built for TensorFlow \d+\.\d+", text)) == 1
    library = tmp_path / "libdeform_conv.so"
    library.write_bytes(re.sub(rb"(built for TensorFlow )\d+\.\d\d", rb"\g<1>2.18", text))
    assert "was built for TensorFlow 2.18.0 and does not fit" in import_with(library)


# --- compile.sh ---


def compile_sh(*arguments, **environment):
    return subprocess.run(
        [str(PROJECT / "compile.sh"), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"PYTHON": "no-such-python"}, "no-such-python not found"),
        ([], {"CXX": "no-such-compiler"}, "compiler no-such-compiler not found"),
        (["--gpu"], {}, "unknown option --gpu"),
    ],
)
def test_compile_sh_stops_with_one_clear_line(arguments, environment, message):
    completed = compile_sh(*arguments, **environment)
    assert completed.returncode == 1
    assert completed.stderr.startswith("compile.sh: error: ")
    assert message in completed.stderr
    assert len(completed.stderr.splitlines()) == 1


def test_compile_sh_stops_where_nvcc_does_not_know_an_architecture():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")

    def configuration():
        names = ("CMake*", "*.ninja", "Makefile", "configuration.txt", "libdeform_conv.so")
        paths = [path for name in names for path in BUILD.glob(name)]
        return {path.name: path.stat().st_mtime for path in paths if path.is_file()}

    before = configuration()
    completed = compile_sh(CUDA_ARCHS="12")
    assert completed.returncode == 1
    assert "CUDA_ARCHS: nvcc does not know compute capability 12" in completed.stderr
    # What was built is there still, and how to go on with it.
    assert "libdeform_conv.so" in before
    assert before == configuration()


def test_compile_sh_stops_with_one_clear_line_without_tensorflow(tmp_path):
    # The interpreter alone, without the packages of its environment.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    completed = compile_sh(PYTHON=str(python))
    assert completed.returncode == 1
    assert f"no TensorFlow in the environment of {sys.executable}" in completed.stderr
    assert len(completed.stderr.splitlines()) == 1


def test_memory_beside_the_tensors_is_bounded(tmp_path):
    report = tmp_path / "memory.json"
    script = PROJECT / "benchmarks" / "benchmark_cpu.py"
    subprocess.run(
        [sys.executable, script, "--parts", "memory", "--output", report],
        check=True,
        capture_output=True,
    )
    extra = {name: of["extra_mib"] for name, of in json.loads(report.read_text())["memory"].items()}
    assert extra.keys() == {"float32", "float16", "bfloat16", "float32, NCHW"}
    assert extra.pop("float32") <= 40
    # Copies of some images at a time. Copies of the whole batch would take 195 MiB.
    assert all(of <= 100 for of in extra.values()), extra
    assert "## Memory" in report.with_suffix(".md").read_text()
