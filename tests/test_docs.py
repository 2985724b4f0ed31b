"""The Python of each page is a program that runs, and whose assertions hold."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import PROJECT

PAGES = sorted(page.relative_to(PROJECT) for page in PROJECT.glob("docs/*.md"))


def program_of(page) -> str:
    text = (PROJECT / page).read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))


# What a page may need beside requirements.txt: packages, by its imports, and commands, by name.
PACKAGES = ("onnx", "onnxruntime", "openvino", "tf2onnx", "torch", "torchvision")
COMMANDS = ("cc",)


def missing_for(program: str) -> list[str]:
    imported = re.findall(r"^\s*(?:import|from) (\w+)", program, re.M)
    packages = [name for name in PACKAGES if name in imported]
    commands = [name for name in COMMANDS if f'"{name}"' in program]
    return [
        *(name for name in packages if importlib.util.find_spec(name) is None),
        *(name for name in commands if shutil.which(name) is None),
    ]


@pytest.mark.parametrize("page", ["README.md", *PAGES], ids=str)
def test_program_of_a_page_runs(page, tmp_path):
    program = program_of(page)
    if not program:
        assert str(page) in ("docs/README.md", "docs/install.md")
        return
    if missing := missing_for(program):
        pytest.skip(f"needs {', '.join(missing)}")
    file = tmp_path / "program.py"
    file.write_text(program)
    completed = subprocess.run(
        [sys.executable, file],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "benchmarks/README.md",
        "benchmarks/gpu_kernels.md",
        "experiments/README.md",
        "experiments/segmentation/README.md",
        "src/README.md",
        *PAGES,
    ],
    ids=str,
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (PROJECT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((PROJECT / page).parent / target).exists(), target


def test_table_of_versions_has_every_minor_version_and_python():
    text = (PROJECT / "docs" / "install.md").read_text()
    for version in ("2.17", "2.18", "2.19", "2.20", "2.21"):
        for package in ("tensorflow", "tensorflow-cpu"):
            assert re.search(rf"^\| {package} {re.escape(version)}\.\d+ \| 3\.\d+", text, re.M)
    assert set(re.findall(r"^\| tensorflow\S* \S+ \| (3\.\d+)", text, re.M)) == {
        "3.10",
        "3.11",
        "3.12",
        "3.13",
    }


def files_of_the_map() -> dict[str, set]:
    """What each entry in the first columns of src/README.md stands for, below core/ and tf/."""
    entries = {}
    for section in re.split(r"^## ", (PROJECT / "src" / "README.md").read_text(), flags=re.M):
        folder = PROJECT / "src" / section.partition("/")[0]
        for row in re.findall(r"^\| (`.*?) \|", section, re.M):
            before = ""
            for name in re.findall(r"`([^`]+)`", row):
                # In a row, a name without a folder is in that of the one before it.
                path = name if "/" in name else f"{before}{name}"
                before = path[: path.rfind("/") + 1]
                # `name{.h,_cpu.cc}` is several names, and a bare one has any suffix.
                parts = [part.strip("{}").split(",") for part in re.split(r"({.*?})", path)]
                patterns = ["".join(choice) for choice in itertools.product(*parts)]
                globs = [
                    pattern + ("**/*" if pattern.endswith("/") else ".*" * ("." not in pattern))
                    for pattern in patterns
                ]
                for pattern in globs:
                    found = {file for file in folder.glob(pattern) if file.is_file()}
                    entries[f"{folder.name}/{pattern}"] = found
    return entries


def test_map_names_every_source_file_and_no_other():
    entries = files_of_the_map()
    assert [entry for entry, files in entries.items() if not files] == []
    mapped = set().union(*entries.values())
    sources = {file for file in (PROJECT / "src").rglob("*.*") if file.name != "README.md"}
    assert sorted(str(file) for file in sources - mapped) == []
