"""A pytest plugin: one JSON line per outcome, and a share of the tests.

The lines are written as tests end, so they survive a run that is cut. ``--share 0/4`` runs every
fourth test: the references, which are most of the work, are then computed on several cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_file: Path | None = None


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", help="where outcomes are written")
    parser.addoption("--share", default="0/1", help="I/N: every Nth test, from the Ith")


def pytest_configure(config: Any) -> None:
    global _file
    record = config.getoption("--record")
    _file = Path(record) if record else None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    index, of = map(int, config.getoption("--share").split("/"))
    # Those that a mark deselects do not count, or the shares would be uneven.
    expression = config.getoption("-m")
    if expression.isidentifier():
        items[:] = [item for item in items if item.get_closest_marker(expression)]
    # The backend's own tests first: they must not be what a run that is cut leaves out.
    items.sort(key=lambda item: "cuda_backend" not in item.nodeid)
    items[:] = items[index::of]


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(report.nodeid, report.outcome, report)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(report.nodeid, "not collected", report)


def _write(name: str, outcome: str, report: Any) -> None:
    if _file is None:
        return
    text = ""
    if outcome == "skipped" and isinstance(report.longrepr, tuple):
        text = str(report.longrepr[2])
    elif outcome != "passed":
        text = str(getattr(report, "longreprtext", ""))[-1500:]
    seconds = round(float(getattr(report, "duration", 0.0)), 3)
    line = {"test": name, "outcome": outcome, "seconds": seconds, "text": text}
    with _file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
