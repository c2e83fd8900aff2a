"""Tables, comparison and plots, from documents written by hand."""

from __future__ import annotations

import copy
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import compare, plots, report
from bench.run import read, write


def cell(median: float, ours: float, spread: float = 0.02, **more: Any) -> dict[str, Any]:
    return {
        "median": median, "low": median * (1 - spread / 2), "high": median * (1 + spread / 2),
        "rounds": 9, "number": 1, "flops_per_s": 1e9, "bytes_per_s": 1e9, "of_ceiling": 0.5,
        "ratio": [median / ours * 0.99, median / ours, median / ours * 1.01], **more,
    }  # fmt: skip


def entry(
    name: str, ours: float, peers: dict[str, float], suite: str = "filters", count: int = 1,
    algorithm: str = "filter2d", operation: str = "fprop",
) -> dict[str, Any]:  # fmt: skip
    cells = {
        "gpuconv": cell(ours, ours, algorithm=algorithm, peak_bytes=3 << 20, predicted=ours / 2)
    }
    cells |= {peer: cell(time, ours) for peer, time in peers.items()}
    label = name if operation == "fprop" else f"{name} {operation}"
    return {
        "key": f"{suite}/{label} n1 float32", "suite": suite, "name": name,
        "operation": operation, "problem": f"{operation} …",
        "batch": 1, "x": [1, 1, 8, 8], "w": [1, 1, 3, 3], "count": count, "flops": 10**9,
        "bytes": 10**8, "floor": 0.01, "limit": "memory", "others": 0.0, "cells": cells,
    }  # fmt: skip


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    ceilings = {"flops": 1e11, "bytes": 1e10}
    return {
        "schema": 1, "created": "2026-01-02T03:04:05+00:00", "command": "python -m bench",
        "commit": "0123456789abcdef", "backend": "numpy", "dtype": "float32",
        "precision": "ieee", "peers": ["torch", "opencv"], "algorithms": None,
        "machine": {"cpu": "a CPU", "threads": 2}, "versions": {"numpy": "2.0"},
        "ceilings": {"start": ceilings, "end": ceilings},
        "suites": {
            name: {"title": name.title(), "source": "here"}
            for name in dict.fromkeys(row["suite"] for row in rows)
        },
        "rows": list(rows),
    }  # fmt: skip


DOCUMENT = document(
    entry("512x512 3x3", 2.0, {"torch": 4.0, "opencv": 1.0}),
    entry("512x512 7x7", 1.0, {"torch": 4.0, "opencv": 8.0}, algorithm="fft"),
    entry("layer", 1.0, {"torch": 2.0}, suite="resnet50", count=3),
)
BACKWARD = document(
    *DOCUMENT["rows"],
    entry("layer", 4.0, {"torch": 2.0}, suite="resnet50", count=3, operation="dgrad"),
    entry("layer", 1.0, {"torch": 3.0}, suite="resnet50", count=3, operation="wgrad"),
)


def test_means() -> None:
    assert report.geomean([1, 4]) == pytest.approx(2)
    assert report.geomean([1, 4], [3, 1]) == pytest.approx(2**0.5)
    assert report.geomean([]) is None
    first, second, third = DOCUMENT["rows"]
    assert [report.best_peer(row) for row in (first, second, third)] == ["opencv", "torch", "torch"]
    assert report.best_ratio(first) == 0.5
    assert report.best_ratio(second) == 4.0


def test_a_table_names_rows_algorithms_and_ratios() -> None:
    tables = report.suite_tables(DOCUMENT)
    text = tables[0].plain()
    lines = text.splitlines()
    assert lines[0] == "Filters  (here)"
    assert lines[1].split()[:3] == ["row", "algorithm", "time"]
    assert "512x512 3x3 n1 float32" in lines[3]
    assert lines[3].split()[4:] == [
        "filter2d", "2", "s", "1%", "1", "1", "50%", "m", "3", "MiB", "opencv", "0.5", "2", "0.5",
    ]  # fmt: skip
    assert "layer n1 float32 (x3)" in tables[1].plain()


def test_the_summary_has_every_mean() -> None:
    table = report.summary_table(DOCUMENT)
    rows = {
        row[0]: [c.text if isinstance(c, report.Cell) else c for c in row] for row in table.rows
    }
    # rows, geomean of 0.5 and 4, by layers, 5 s of the best peers over 3 s, worst, under 0.9
    assert rows["filters, batch 1"][1:7] == ["2", "1.41", "1.41", "1.67", "0.5", "1"]
    assert rows["filters, batch 1"][7:] == ["2.83", "2"]
    assert rows["resnet50, batch 1"][1:] == ["1", "2", "2", "2", "2", "0", "2", ""]
    assert rows["all"][1] == "3"
    assert rows["all"][3] == f"{(0.5 * 4 * 2**3) ** (1 / 5):.3g}"


def test_gradients_have_tables_and_means_of_their_own() -> None:
    titles = [table.title for table in report.suite_tables(BACKWARD)]
    assert titles == ["Filters  (here)", "Resnet50  (here)", "Resnet50: dgrad  (here)",
                      "Resnet50: wgrad  (here)"]  # fmt: skip
    assert "layer n1 float32 (x3)" in report.suite_tables(BACKWARD)[2].plain()
    rows = {
        row[0]: [c.text if isinstance(c, report.Cell) else c for c in row]
        for row in report.summary_table(BACKWARD).rows
    }
    assert rows["resnet50, batch 1"][2] == "2"
    assert rows["resnet50 dgrad, batch 1"][2] == "0.5"
    assert rows["resnet50 wgrad, batch 1"][2] == "3"
    assert rows["all fprop"][1:3] == ["3", f"{4 ** (1 / 3):.3g}"]
    assert rows["all dgrad"][2] == "0.5"
    assert rows["all"][1] == "5"
    after = copy.deepcopy(BACKWARD)
    after["rows"][3]["cells"]["gpuconv"] = cell(2.0, 2.0)
    text = compare.table(BACKWARD, after).plain()
    assert "speed-ups of dgrad: 2.000" in text
    assert "speed-ups of fprop: 1.000" in text
    text = compare.table(DOCUMENT, BACKWARD).plain()
    assert "only in the second: 2" in text
    assert "speed-ups: 1.000" in text


def test_what_went_wrong_is_said() -> None:
    bad = copy.deepcopy(DOCUMENT)
    bad["rows"][0]["cells"]["gpuconv"] = {"algorithm": "fft", "wrong": "3 outputs are off"}
    bad["rows"][1]["cells"]["torch"] = {"failed": "RuntimeError: no"}
    bad["rows"][2] = {k: v for k, v in bad["rows"][2].items() if k not in ("cells", "others")}
    bad["rows"][2]["skipped"] = "too large"
    bad["ceilings"]["end"] = {"flops": 0.5e11, "bytes": 1e10}
    bad["rows"][1]["others"] = 1.5
    bad["cut"] = "interrupted"
    stream = io.StringIO()
    report.show(bad, stream)
    text = stream.getvalue()
    assert "3x3 n1 float32: gpuconv wrong: 3 outputs are off" in text
    assert "torch failed: RuntimeError: no" in text
    assert "left out: too large" in text
    assert "CUT SHORT: interrupted" in text
    assert "the matrix product ended at 0.50 of its speed" in text
    assert "1 of 2 rows (marked *)" in text
    assert "7x7 n1 float32 *" in text
    assert report.troubles(bad) == [
        "filters/512x512 3x3 n1 float32: gpuconv wrong: 3 outputs are off"
    ]
    assert report.troubles(DOCUMENT) == []
    assert "3 outputs are off" in report.short_table(bad).plain()


def test_colours_in_a_terminal() -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    report.suite_tables(DOCUMENT)[0].print(stream)
    assert "opencv" in stream.getvalue()


def test_the_choice_of_auto_is_judged_where_every_algorithm_was_measured() -> None:
    assert report.algorithm_table(DOCUMENT) is None
    assert report.choice_table(DOCUMENT) is None
    judged = copy.deepcopy(BACKWARD)
    judged["algorithms"] = 4.0
    first, second, third, fourth, _ = judged["rows"]
    times = {"median": 1.0, "low": 1.0, "high": 1.0, "predicted": 3.0}
    first["cells"] |= {
        "gpuconv.fft": times,  # auto took 2 s
        "gpuconv.im2col": {"unable": "predicted to take 9 times ...", "predicted": 9.0},
    }
    # What auto must not choose is no better choice.
    second["cells"]["gpuconv.separable"] = times | {"median": 0.2, "only_by_name": "w's values"}
    second["cells"]["gpuconv.filter2d"] = times | {"median": 0.95}
    third["cells"]["gpuconv.direct"] = {"unable": "no such dtype"}
    fourth["cells"] = {"gpuconv": {"wrong": "all of it"}, "gpuconv.direct": times}
    (lost,) = report.algorithm_table(judged).rows  # type: ignore[union-attr]
    assert lost[0] == first["key"]
    assert lost[1:3] == ["filter2d", "fft"]
    assert lost[-1] == "2.00"
    table = report.choice_table(judged)
    assert table is not None
    rows = {
        row[0]: [c.text if isinstance(c, report.Cell) else c for c in row] for row in table.rows
    }
    # rows, within 10%, share, worst, algorithms not timed
    assert rows["filters"][1:] == ["2", "1", "50%", "2.00", "1"]
    assert rows["resnet50"][1:] == ["1", "1", "100%", "1.00", "0"]
    assert rows["resnet50 wgrad"][1:] == ["1", "1", "100%", "1.00", "0"]
    assert rows["all"][1:] == ["4", "3", "75%", "2.00", "1"]
    assert "on 3 of 4 rows, 75.0%" in table.notes[0]
    assert "4 times auto's" in table.notes[1]
    stream = io.StringIO()
    report.show(judged, stream)
    text = stream.getvalue()
    assert text.index("geomean") < text.index("Rows where") < text.index("within 10% of the best")
    race = report.race_table(judged).plain()
    assert "fft 1 s, 3 s; filter2d 2 s" in race
    assert "gpuconv wrong: all of it" in race


def test_compare_tells_changes_from_noise() -> None:
    after = copy.deepcopy(DOCUMENT)
    after["commit"] = None
    after["versions"] = {"numpy": "2.1"}
    rows = after["rows"]
    rows[0]["cells"]["gpuconv"] = cell(1.0, 1.0, algorithm="fft")  # twice as fast
    rows[1]["cells"]["gpuconv"] = cell(1.3, 1.3, spread=0.5)  # slower, but who knows
    rows[2]["cells"]["gpuconv"] = cell(2.0, 2.0)  # half as fast, as torch is
    rows[2]["cells"]["torch"] = cell(4.0, 2.0)
    rows.append(entry("new", 1.0, {"torch": 1.0}))
    found = {change.key: change for change in compare.changes(DOCUMENT, after)}
    assert len(found) == 3
    assert found["filters/512x512 3x3 n1 float32"].speedup == 2
    assert found["filters/512x512 3x3 n1 float32"].counts
    assert not found["filters/512x512 7x7 n1 float32"].counts
    assert found["resnet50/layer n1 float32"].counts
    assert found["resnet50/layer n1 float32"].against_peers == pytest.approx(1)
    text = compare.table(DOCUMENT, after).plain()
    assert "3 rows in both: 1 faster, 1 slower, 1 unchanged within the noise." in text
    assert "Rows only in the first: 0; only in the second: 1." in text
    assert "numpy: 2.0 -> 2.1" in text
    same = compare.table(DOCUMENT, DOCUMENT)
    assert same.rows == []


def test_documents_are_written_a_line_per_row_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(DOCUMENT, path)
    assert read(path) == DOCUMENT
    assert sum(line.startswith('{"key"') for line in path.read_text().splitlines()) == 3
    write(document(), path)
    assert read(path)["rows"] == []
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="no result of this benchmark"):
        read(path)


def test_plots(tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    written = plots.plot(DOCUMENT, tmp_path / "pictures")
    assert {path.name for path in written} == {
        "ratio_filters.png", "ratio_resnet50.png", "roofline.png", "time_filters.png",
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in written)
    written = plots.plot(BACKWARD, tmp_path / "more")
    assert {"ratio_resnet50_dgrad.png", "roofline_wgrad.png"} <= {path.name for path in written}


def test_crossovers() -> None:
    rows = [(3, DOCUMENT["rows"][0]), (12, DOCUMENT["rows"][1])]
    assert plots.crossovers(rows) == [(6.0, "filter2d", "fft")]


def test_the_commands_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    write(DOCUMENT, path)
    assert command.main(["show", str(path)]) == 0
    assert "geomean" in capsys.readouterr().out
    assert command.main(["compare", str(path), str(path)]) == 0
    assert "3 unchanged" in capsys.readouterr().out
    assert command.main(["table", str(path), str(path)]) == 0
    assert "| 512x512 7x7 | 4.0 | 8.0 (`filter2D`) |" in capsys.readouterr().out
