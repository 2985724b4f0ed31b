"""The Python of each page is a program that runs, and whose assertions hold."""

import os
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

PAGES = sorted(page.relative_to(PROJECT) for page in PROJECT.glob("docs/*.md"))


def program_of(page) -> str:
    text = (PROJECT / page).read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))


@pytest.mark.parametrize("page", ["README.md", *PAGES], ids=str)
def test_program_of_a_page_runs(page, tmp_path):
    program = program_of(page)
    if not program:
        assert str(page) == "docs/README.md"
        return
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
    ["README.md", "benchmarks/README.md", "benchmarks/gpu_kernels.md", "src/README.md", *PAGES],
    ids=str,
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", (PROJECT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((PROJECT / page).parent / target).exists(), target
