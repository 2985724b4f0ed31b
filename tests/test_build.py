"""How the package is built: for which TensorFlow, with what in it, and what the scripts print."""

import os
import site
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "scripts"))
import build_backend
from find_tensorflow import check_version, find_tensorflow

# --- Which TensorFlow ---


def install(folder, name, version, files=("tensorflow/libtensorflow_framework.so.2",)):
    """What pip leaves of a TensorFlow, as far as it matters here."""
    folder.joinpath("tensorflow", "include").mkdir(parents=True, exist_ok=True)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")
    info.joinpath("RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def no_environment(monkeypatch, tmp_path):
    """An environment with nothing in it: sys.path, and the folder that pip hides behind it."""
    prefix = str(tmp_path / "prefix")
    seen = SimpleNamespace(path=[str(tmp_path / "path")], prefix=prefix, base_prefix=prefix)
    monkeypatch.setattr(sys.modules["find_tensorflow"], "sys", seen)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_, **__: str(tmp_path / "site"))
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.delenv("DEFORM_CONV_TENSORFLOW", raising=False)
    return tmp_path


def test_tensorflow_of_the_tests_is_found():
    version, _, folder = find_tensorflow().partition("=")
    assert version == tf.__version__
    assert Path(folder) == Path(tf.__file__).parent


def test_tensorflow_of_the_tests_is_found_without_importing_it():
    program = "import sys, find_tensorflow as f; assert f.find_tensorflow(); print(*sys.modules)"
    completed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT / "scripts",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tensorflow" not in completed.stdout.split()


@pytest.mark.parametrize("name", ["tensorflow", "tensorflow-cpu", "tf_nightly"])
def test_tensorflow_that_pip_hides_while_it_builds_is_found(name, no_environment):
    install(no_environment / "site", name, "2.19.1")
    assert find_tensorflow() == f"2.19.1={no_environment}/site/tensorflow"
    assert find_tensorflow("2.19") == find_tensorflow()
    assert find_tensorflow("2.20") is None


def test_tensorflow_that_the_user_installed_for_all_environments_is_found(no_environment):
    install(no_environment / "user", "tensorflow", "2.20.0")
    assert find_tensorflow() == f"2.20.0={no_environment}/user/tensorflow"


def test_packages_named_like_tensorflow_are_not_taken_for_it(no_environment):
    files = ["tensorflow_datasets/__init__.py"]
    install(no_environment / "site", "tensorflow-datasets", "4.9.0", files)
    assert find_tensorflow() is None
    install(no_environment / "site", "tensorflow-cpu", "2.20.0")
    assert find_tensorflow().startswith("2.20.0=")


def test_too_old_a_tensorflow_is_refused():
    assert check_version("2.17.0=/somewhere") is None
    assert check_version("2.30.0.dev1=/somewhere") is None
    assert check_version("2.16.2=/x") == "TensorFlow 2.17 or newer is needed, and this is 2.16.2"


def test_build_without_tensorflow_ends_with_what_to_do(no_environment):
    with pytest.raises(SystemExit, match=r"no TensorFlow for .*DEFORM_CONV_TENSORFLOW=2\.20"):
        build_backend.build_wheel(str(no_environment))


@pytest.mark.parametrize("version", ["2.20.1", "2.16", "latest"])
def test_version_that_cannot_be_built_for_is_refused_before_it_is_fetched(version, monkeypatch):
    monkeypatch.setenv("DEFORM_CONV_TENSORFLOW", version)
    with pytest.raises(SystemExit, match=rf"a minor version from 2\.17 on, .* got {version}"):
        build_backend.get_requires_for_build_wheel()


def test_settings_of_cmake_that_an_editable_installation_cannot_take_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"cmake\.define\.DEFORM_CONV_CUDA=OFF, .* got cmake.x=1"):
        build_backend.build_editable(str(tmp_path), {"cmake.x": "1"})


def test_build_requires_the_tensorflow_that_the_variable_names(no_environment, monkeypatch):
    monkeypatch.setenv("DEFORM_CONV_TENSORFLOW", "2.20")
    required = build_backend.get_requires_for_build_wheel()
    assert [name for name in required if name.startswith("tensorflow")] in (
        ["tensorflow-cpu==2.20.*"],
        ["tensorflow==2.20.*"],
    )
    # Not where the environment has it, and not another one instead.
    install(no_environment / "site", "tensorflow", "2.20.0")
    required = build_backend.get_requires_for_build_wheel()
    assert not [name for name in required if name.startswith("tensorflow")]
    monkeypatch.setenv("DEFORM_CONV_TENSORFLOW", "2.21")
    with pytest.raises(SystemExit, match=r"no TensorFlow 2\.21 for "):
        build_backend.build_wheel(str(no_environment))


# --- What is in it ---


def test_sdist_has_what_a_build_needs_and_nothing_large(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    with tarfile.open(tmp_path / build_backend.build_sdist(str(tmp_path))) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers()]
    needed = {
        "CMakeLists.txt",
        "LICENSE",
        "compile.sh",
        "deform_conv/_library.py",
        "pyproject.toml",
        "scripts/build_backend.py",
        "scripts/find_tensorflow.py",
        "src/core/sources.cmake",
        "src/link/exports.map",
        "src/tf/llvm_stubs/llvm/ADT/ArrayRef.h",
    }
    assert needed <= set(names)
    folders = {name.partition("/")[0] for name in names}
    assert not folders & {
        "benchmarks",
        "build",
        "checkpoint",
        "data",
        "dist",
        "experiments",
        "img",
        ".venv",
    }


def test_wheel_of_the_python_alone_is_for_any_platform_and_needs_no_tensorflow(
    no_environment, monkeypatch
):
    monkeypatch.chdir(PROJECT)
    settings = {"wheel.cmake": "false"}
    assert not build_backend.get_requires_for_build_wheel(settings)
    name = build_backend.build_wheel(str(no_environment), settings)
    assert name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(no_environment / name) as wheel:
        modules = {file for file in wheel.namelist() if file.startswith("deform_conv/")}
    package = PROJECT / "deform_conv"
    sources = [*package.rglob("*.py"), *package.glob("_explorer/*.*")]
    assert modules == {str(file.relative_to(PROJECT)) for file in sources}
    assert "deform_conv/_explorer/explorer.html" in modules


# --- What the scripts print ---


def without_log_level():
    return {name: of for name, of in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


def test_a_script_prints_nothing_that_the_project_did_not_write():
    completed = subprocess.run(
        [sys.executable, PROJECT / "utils" / "deform_conv_test.py"],
        env=without_log_level(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stderr == ""


@pytest.mark.parametrize("end", ["pass", "os.abort()"], ids=["returns", "crashes"])
def test_warnings_and_errors_of_tensorflow_are_printed(end):
    program = f"""
import os, sys
sys.modules["tensorflow"] = sys.modules["keras"] = object()
from utils.quiet_tensorflow import _without_notices
with _without_notices():
    os.write(2, b"I0000 00:00:1.5 7 port.cc:1] for information\\n")
    os.write(2, b"W0000 00:00:1.5 7 gpu.cc:2] a warning\\n")
    os.write(2, b"not of the log")
    {end}
os.write(2, b"; I0000 after")
"""
    completed = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    expected = "W0000 00:00:1.5 7 gpu.cc:2] a warning\nnot of the log"
    if end == "pass":
        expected += "; I0000 after"
    else:
        # The process that prints may end a little later than the one that crashed.
        assert completed.returncode != 0
    assert completed.stderr == expected
