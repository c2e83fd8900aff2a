"""The tables of README: made of results, and README's are those of the results that it names."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from bench import markdown
from bench.run import read
from bench.suites import SUITES, Row
from tests.bench.test_report import cell, document

ROOT = Path(__file__).parents[2]


def result(row: Row, ratio: float, **peers: float) -> dict[str, Any]:
    """What a run would have written of `row`: torch's ratio, and others'."""
    cells = {"gpuconv": cell(1.0, 1.0, algorithm="im2col")}
    cells |= {name: cell(r, 1.0) for name, r in {"torch": ratio, **peers}.items()}
    return {
        "key": row.key, "suite": row.suite, "name": row.name, "operation": row.operation,
        "problem": str(row.problem), "batch": row.batch, "x": list(row.x_shape),
        "w": list(row.w_shape), "count": 1, "flops": 1, "bytes": 1, "cells": cells,
    }  # fmt: skip


def row(suite: str, name: str, **changes: Any) -> Row:
    rows = SUITES[suite].rows([1, 32], operations=("fprop", "dgrad", "wgrad"))
    wanted = {"batch": 1, "operation": "fprop", "name": name} | changes
    return next(r for r in rows if all(getattr(r, k) == v for k, v in wanted.items()))


def test_a_row_in_words() -> None:
    words = {
        ("resnet50", "conv1"): "ResNet-50 7x7/2, 3 to 64 channels at 224x224",
        ("sample", "resnet50/layer1.0.conv2"): "ResNet-50 3x3, 64 channels at 56x56",
        ("mobilenetv2", "block2.depthwise"):
            "MobileNetV2 depthwise 3x3/2, 96 channels at 112x112",
        ("resnext50", "layer2.1.conv2"): "ResNeXt-50 32x4d grouped 3x3, 256 channels at 28x28",
        ("sample", "aspp/os16.rate12"):
            "DeepLabV3 ASPP 3x3 dilated 12, 2048 to 256 channels at 33x33",
        ("unet", "up2.upconv"): "U-Net transposed 2x2/2, 512 to 256 channels at 52x52",
        ("sample", "filters/4096x4096 7x7"): "4096x4096 7x7",
        ("gaussian", "512x512 3x3"): "Gaussian, 512x512 3x3",
        ("sample", "mnist/one filter 5x5"): "10000 small pictures, one filter 5x5",
    }  # fmt: skip
    for (suite, name), expected in words.items():
        batch = {"batch": 10000} if "mnist" in name else {}
        assert markdown.title(result(row(suite, name, **batch), 1.0)) == expected
    gradient = row("resnet50", "conv1", operation="wgrad")
    assert markdown.title(result(gradient, 1.0)) == words["resnet50", "conv1"]


def test_tables_of_two_files() -> None:
    forward = document(
        result(row("resnet50", "conv1"), 1.5, torch_last=0.5),
        result(row("resnet50", "conv1", batch=32), 3.0),
        result(row("filters", "512x512 7x7"), 20.0, opencv=8.0, fftconvolve=1.111, ndimage=2.0),
    )
    backward = document(
        result(row("resnet50", "conv1", operation="dgrad"), 4.0),
        result(row("resnet50", "layer1.0.conv2", operation="wgrad"), 0.25),
    )
    backward["rows"].append({**backward["rows"][0], "key": "b", "cells": {"gpuconv": {}}})
    parts = markdown.table([forward, backward]).split("\n\n")[2:]
    means, networks, pictures, layers, planes = parts
    assert len(networks.splitlines()) == len(pictures.splitlines()) == 3
    assert means.splitlines()[2:] == [
        "| forward, batch 1 | 1 | 0.50 | 1.50 | 0.50 | | |",
        "| forward, batch 32 | 1 | 3.0 | 3.0 | | | |",
        "| input gradient, batch 1 | 1 | 4.0 | 4.0 | | | |",
        "| weight gradient, batch 1 | 1 | 0.25 | 0.25 | | | |",
        "| pictures and signals | 1 | 1.11 | 20 | | 8.0 | 1.11 |",
    ]
    assert layers.splitlines() == [
        "| layer | forward, batch 1 | forward, batch 32 | input gradient, batch 1 | "
        "weight gradient, batch 1 |",
        "| --- | --- | --- | --- | --- |",
        "| ResNet-50 7x7/2, 3 to 64 channels at 224x224 | 0.50 | 3.0 | 4.0 | |",
        "| ResNet-50 3x3, 64 channels at 56x56 | | | | 0.25 |",
    ]
    assert planes.splitlines()[2:] == [
        "| 512x512 7x7 | 20 | 8.0 (`filter2D`) | 1.11 (`fftconvolve`) |"
    ]


def test_suites_and_the_choice_of_algorithms() -> None:
    last = {"gpuconv_last": cell(0.5, 1.0), "gpuconv.direct": cell(0.8, 1.0)}
    entry = result(row("vgg16", "conv1_2"), 1.0, torch_last=2.0)
    entry["cells"] |= last
    rows = document(
        entry,
        result(row("resnet50", "conv1"), 4.0),
        result(row("resnet50", "conv1", operation="wgrad"), 0.5),
        result(row("filters", "512x512 7x7"), 24.0, opencv=9.0),
        result(row("filters", "512x512 3x3"), 6.0, opencv=1.0),
    )
    rows["algorithms"] = 4.0
    means, networks, others = markdown.table([rows]).split("\n\n")[1:4]
    assert "| both channels last |" in means.splitlines()[0]
    assert means.splitlines()[2] == "| forward, batch 1 | 2 | 2.0 | 2.0 | 2.0 | 4.0 | |"
    assert networks.splitlines() == [
        '| network | rows | forward, batch 1 | weight gradient, batch 1 | "auto" within 10% |',
        "| --- | --- | --- | --- | --- |",
        "| VGG-16 | 1 | 1.00 | | 0 of 1 |",
        "| ResNet-50 | 2 | 4.0 | 0.50 | 2 of 2 |",
    ]
    assert others.splitlines()[2:] == [
        "| Pictures under one dense filter | 2 | 3.0 | 12 | 3.0 | 2 of 2 |"
    ]


def test_a_gpu_s_rows_are_not_taken_for_the_cpu_s() -> None:
    cpu = document(result(row("resnet50", "conv1"), 1.5))
    gpu = copy.deepcopy(cpu) | {"backend": "cuda", "machine": {"gpu": "a GPU", "threads": 2}}
    gpu["rows"][0]["cells"]["torch"] = cell(7.0, 1.0)
    text = markdown.table([cpu, gpu])
    line = "| ResNet-50 7x7/2, 3 to 64 channels at 224x224 | {} |"
    assert text.index("a CPU") < text.index(line.format("1.50"))
    assert text.index(line.format("1.50")) < text.index("a GPU") < text.index(line.format("7.0"))


def test_a_doubtful_run_says_so() -> None:
    doubtful = copy.deepcopy(document(result(row("resnet50", "conv1"), 1.5)))
    doubtful["rows"][0]["others"] = 1.0
    assert "CAUTION: other processes were at work" in markdown.table([doubtful])


@pytest.mark.parametrize(
    ("name", "section"), [("README.md", r"^## Speed$(.*?)^## "), ("docs/cpu_speed.md", r"^(.*)\Z")]
)
def test_numbers_in_print_are_those_of_the_results_beside_them(name: str, section: str) -> None:
    """What is shown is lines of what ``python -m bench table`` prints of each file."""
    document = (ROOT / name).read_text(encoding="utf-8")
    found = re.search(section, document, re.M | re.S)
    assert found
    files = re.findall(r"\]\((?:\.\./)?(bench/results/[^)]+\.json)\)", found[1])
    shown = [line for line in found[1].splitlines() if line.startswith("|")]
    assert files
    assert shown
    printed = [line for file in files for line in markdown.table([read(ROOT / file)]).splitlines()]
    assert [line for line in shown if line not in printed] == []


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("*.json")), ids=str)
def test_results_that_are_kept_can_be_read(path: Path) -> None:
    kept = read(path)
    assert kept["commit"]
    assert markdown.table([kept]).startswith("Measured by")
