"""The benchmarks' lists and reports, as far as they need no GPU."""

import json
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))
import gpu_zoo_report
import report
from layers import MEASUREMENTS
from zoo import ZOO, layers_named


def row_of(layer, type_name="float16", extra_bytes=None, **forward):
    """A measured row, whose forward+backward takes three times as long as its forward."""
    ms = {
        key: {name: factor * of for name, of in forward.items()}
        for key, factor in zip(MEASUREMENTS, (1, 3), strict=True)
    }
    return {
        "type": type_name,
        "layer": layer,
        "depthwise": ZOO[layer].depthwise,
        "ms": ms,
        "least": {key: {"bytes": 3e9, "operations": 1e12} for key in MEASUREMENTS},
        "extra_bytes": extra_bytes or {"deform_conv2d": 1 << 20, "torchvision": 2 << 20},
    }


GOOD = {"deform_conv2d": 1, "general": 2, "torchvision": 5, "cudnn_conv2d": 0.5}


def results_of(*rows):
    return {
        "machine": "a GPU",
        "versions": {"PyTorch": "2"},
        "ceilings": {
            "copy_bytes_per_s": 3e12,
            "operations_per_s": {"float16": 1e15, "bfloat16": 1e15},
        },
        "zoo": list(rows),
    }


def broken_rules(**changes):
    row = row_of(changes.pop("layer", "EDVR train"), **GOOD | changes)
    return list(gpu_zoo_report.violations([gpu_zoo_report.with_other(row)]))


# --- The layers ---


def test_names_of_layers_are_chosen_by_their_parts():
    assert list(layers_named(["EDVR", "RGB"])) == [
        "EDVR train",
        "EDVR-L train",
        "first layer RGB 7x7 s2",
    ]
    assert layers_named([""]) == ZOO
    with pytest.raises(ValueError, match='no layer\'s name contains "EDVX"; there are R50'):
        layers_named(["EDVR", "EDVX"])


def test_which_layers_are_depthwise():
    names = [name for name, layer in ZOO.items() if layer.depthwise]
    assert names == ["D-LKA 5x5 depthwise", "D-LKA 7x7 dil3 depthwise", "DCNv3-like depthwise dg4"]


# --- The rules ---


def test_layer_that_keeps_the_rules_breaks_none():
    assert broken_rules() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torchvision": 0.8}, "1.25× torchvision's time"),
        ({"general": 0.8}, "1.25× the time of another path (general)"),
        ({"general": 0.9, "fused": 0.8}, "1.25× the time of another path (fused)"),
        ({"cudnn_conv2d": 0.125}, "8.00× cuDNN's time (at most"),
        ({"cudnn_conv2d": 0.11, "layer": "D-LKA 5x5 depthwise"}, "9.09× cuDNN's time (at most"),
    ],
    ids=str,
)
def test_broken_rule_is_told_of_both_passes(changes, expected):
    texts = broken_rules(**changes)
    assert [text.split(",")[1].strip() for text in texts] == list(MEASUREMENTS)
    assert all(expected in text for text in texts)


def test_other_path_may_be_faster_by_5_percent_or_what_events_resolve():
    assert broken_rules(general=0.97) == []
    small = {name: 0.01 * of for name, of in GOOD.items()}
    assert broken_rules(**small | {"general": 0.0099, "deform_conv2d": 0.0106}) == []


def test_more_memory_than_torchvision_breaks_a_rule():
    row = row_of(
        "EDVR train", extra_bytes={"deform_conv2d": 3 << 20, "torchvision": 1 << 20}, **GOOD
    )
    texts = list(gpu_zoo_report.violations([gpu_zoo_report.with_other(row)]))
    assert texts == ["float16, EDVR train: 3 / 1 MiB"]


# --- The report ---


def test_report_has_each_layer_and_the_means():
    without_torchvision = {key: of for key, of in GOOD.items() if key != "torchvision"}
    text = gpu_zoo_report.as_markdown(
        results_of(
            row_of("EDVR train", **GOOD),
            row_of("wide 1024", **GOOD | {"cudnn_conv2d": 0.125, "fused": 1.0}),
            row_of("EDVR train", "bfloat16", {"deform_conv2d": 0}, **without_torchvision),
        )
    )
    cells = "1.000 | 5.00 | 2.00 | 2.00 | 3.000 | 5.00 | 2.00 | 2.00 | 1 / 2"
    assert f"| EDVR train | {cells} |" in text
    assert "| EDVR train | 1.000 | – | 2.00 | 2.00 | 3.000 | – | 2.00 | 2.00 | 0 |" in text
    # The geometric means of 2 and 8, 5 and 5, 2 and 1.
    means = r"\| float16, forward \| 4\.00 \(at most 2\) \| 5\.00 \(at least 4\.5\) \| 1\.41 \|"
    assert re.search(means, text)
    assert "forward+backward, bfloat16 / float16: 1.00 (goal: at most 1.05)." in text
    assert "- float16, forward, wide 1024: 8.00× cuDNN's time (at most 4)" in text
    assert "| wide 1024 | 2, 1024→1024, 25×38 |" in text


def test_report_says_so_where_no_rule_is_broken():
    text = gpu_zoo_report.as_markdown(results_of(row_of("EDVR train", **GOOD)))
    assert text.count("\nNone.\n") == 1


def test_plot_of_the_whole_zoo_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    bars = gpu_zoo_report.bars(results_of(*(row_of(name, **GOOD) for name in ZOO)))
    assert list(bars) == ["float16, forward", "float16, forward+backward"]
    assert bars["float16, forward"]["EDVR train"] == {
        "ms": {"deform_conv2d": 1, "torchvision": 5, "conv2d": 0.5},
        "floor": 1,
    }
    report.plot_gpu(tmp_path / "zoo.png", bars)
    assert (tmp_path / "zoo.png").stat().st_size > 1000


# --- The CPU's ---


def test_zoo_is_timed_on_the_cpu_against_tensorflows_own_convolutions(tmp_path):
    """A masked layer of an odd number of channels, and a depthwise one."""
    kept = tmp_path / "zoo.json"
    command = [sys.executable, PROJECT / "benchmarks" / "benchmark_cpu.py", "--parts", "zoo"]
    command += ["--layers", "odd 30", "dg4", "--rounds", "10", "--output", kept]
    subprocess.run(command, check=True, capture_output=True)
    (rows,) = json.loads(kept.read_text())["zoo"].values()
    assert list(rows) == ["R50-DCNv1 dg4 c4", "DCNv3-like depthwise dg4", "odd 30 channels"]
    for times in rows.values():
        assert list(times) == list(MEASUREMENTS)
        assert all(list(of)[:2] == ["deform_conv2d", "tf.nn.conv2d"] for of in times.values())
    assert "## Layers of real networks" in kept.with_suffix(".md").read_text()
