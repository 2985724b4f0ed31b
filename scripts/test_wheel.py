#!/usr/bin/env python3
"""Installs the wheel of dist/ into fresh environments, and tests it there from an empty folder.

    python scripts/test_wheel.py [--table] [--wheel FILE] [ENVIRONMENT...]

ENVIRONMENT is a Python and packages, such as "3.11 tensorflow-cpu==2.20.*"; without any, all that
the wheel is for. Pythons are those that uv finds. --table writes what works into docs/install.md.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "install.md"
UV = "uv>=0.9,<1"
TOOLS = ["pytest>=8.4,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.130,<7"]
TESTS = [
    *("test_deform_conv2d.py", "test_aggregate.py", "test_depthwise.py", "test_one_dimension.py"),
    *("test_deform_conv_layer.py", "test_deform_conv_v3_v4.py", "test_deformable.py"),
    *("test_plain_weights.py", "test_explorer.py"),
]

ENVIRONMENTS = [
    *(f"3.11 tensorflow-cpu=={version}.*" for version in ("2.17", "2.18", "2.19", "2.20", "2.21")),
    *(f"{python} tensorflow-cpu==2.21.*" for python in ("3.10", "3.12", "3.13")),
    *(f"3.11 tensorflow=={version}.*" for version in ("2.17", "2.18", "2.19", "2.20", "2.21")),
    "3.10 tensorflow-cpu==2.17.* keras==3.5.*",  # the oldest of everything
]


def run(*command, **options) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def test(wheel: Path, environment: str, uv: Path, folder: Path) -> dict[str, str]:
    """Makes the environment, runs the tests there, and returns what works, by column."""
    python_version, *packages = environment.split()
    python = folder / "venv" / "bin" / "python"

    def pip(command, *arguments):
        return run(uv, "pip", command, "--python", python, *arguments)

    run(uv, "venv", "--python", python_version, folder / "venv")
    # TensorFlow first, as users have it: the wheel must leave it alone.
    pip("install", *packages)
    before = pip("freeze").splitlines()
    pip("install", wheel)
    added = set(pip("freeze").splitlines()) - set(before)
    if [name for name in added if not name.startswith("tf-deform-conv")]:
        sys.exit(f"the wheel changed the environment: {added}")
    pip("check")
    pip("install", *TOOLS)

    # Nothing of the project is here but the tests.
    place = folder / "empty"
    shutil.copytree(PROJECT / "tests", place / "tests")
    shutil.copy(PROJECT / "pyproject.toml", place)
    described = run(python, "-m", "deform_conv", cwd=place)
    if str(folder) not in described:
        sys.exit(f"not the installed package:\n{described}")
    versions = {of["name"]: of["version"] for of in json.loads(pip("list", "--format", "json"))}
    package = packages[0].partition("=")[0]
    xla = tuple(map(int, versions[package].split(".")[:2])) >= (2, 20)
    if ("XLA          yes" in described) != xla:
        sys.exit(f"XLA's kernels should {'' if xla else 'not '}load:\n{described}")
    # tensorflow-cpu has no GPUs to run the kernels on.
    gpu = package == "tensorflow" and "GPU          CUDA" in described
    tests = [*TESTS, "test_xla.py"] if xla else TESTS
    pytest = ["pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    printed = run(python, "-m", *pytest, *(f"tests/{name}" for name in tests), cwd=place)

    return {
        "TensorFlow": f"{package} {versions[package]}",
        "Python": run(python, "-c", "import platform; print(platform.python_version())").strip(),
        "Keras": versions["keras"],
        "NumPy": versions["numpy"],
        "op, gradients, layer": "yes",
        "`jit_compile`": "yes" if xla else "no",
        "CUDA kernels load": "yes" if gpu else "–",
        "tests": re.search(r"(\d+) passed", printed)[1],
    }


def write_table(rows: list[dict[str, str]]) -> None:
    """Writes a row for each environment between the marks of the page."""
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    marks = r"(<!-- scripts/test_wheel.py writes this table -->\n).*?(<!-- end -->)"
    text, count = re.subn(
        marks,
        lambda match: "".join([match[1], *(f"{line}\n" for line in lines), match[2]]),
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, f"no marks in {PAGE}"
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT")
    parser.add_argument("--table", action="store_true", help="write docs/install.md")
    parser.add_argument("--wheel", type=Path, help="instead of that in dist/")
    arguments = parser.parse_args()
    if arguments.table and arguments.environments:
        parser.error("--table is for all environments")
    wheels = list((PROJECT / "dist").glob("*x86_64.whl"))
    if arguments.wheel:
        wheels = [arguments.wheel.resolve()]
    if len(wheels) != 1:
        sys.exit(f"dist/ must hold one wheel for x86-64, and holds {len(wheels)}")

    tools = PROJECT / "build" / "wheel" / "uv"
    uv = tools / "bin" / "uv"
    if not uv.exists():
        venv.create(tools, with_pip=True)
        run(tools / "bin" / "pip", "install", "--quiet", UV)
    rows = []
    for environment in arguments.environments or ENVIRONMENTS:
        with tempfile.TemporaryDirectory(dir=tools.parent) as folder:
            rows.append(test(wheels[0], environment, uv, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.table:
        write_table(rows)
    print(f"{wheels[0].name} works in {len(rows)} environments")


if __name__ == "__main__":
    main()
