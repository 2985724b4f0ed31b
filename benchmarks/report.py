"""What the benchmarks share: statistics, tables, and the files that results are kept in."""

import datetime
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))


def shape_name(shape: Sequence[int]) -> str:
    """Of (N, C, O, H, W)."""
    batch, channels, out_channels, height, width = shape
    return f"{batch}, {channels}→{out_channels}, {height}×{width}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def today() -> str:
    return datetime.date.today().isoformat()


def write(path: Path, results: dict, markdown: str) -> None:
    """Writes the numbers to `path` and what people read to the .md beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    print(f"wrote {path} and {path.with_suffix('.md')}")
