"""A pytest plugin that puts gpuconv's functions in the place of SciPy's, then runs SciPy's tests.

    GPUCONV_REPORT=out.json python -m pytest -p tests.conformance.in_place_of_scipy \
        --pyargs scipy.signal.tests.test_signaltools::TestConvolve

It is loaded before SciPy's test modules are, so every name they import is gpuconv's. The report
says of every test what it came to, why, and how often it called gpuconv.
With SCIPY_ARRAY_API set, SciPy's own marks choose what runs with which array library.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import zlib
from fnmatch import fnmatchcase
from typing import Any

import pytest
import scipy.ndimage
import scipy.signal
from scipy._lib import _array_api

import gpuconv.ndimage
import gpuconv.signal
from tests.conformance.differences import DESELECTED, SAMPLED, SAMPLED_ONE_IN, Listed

NAMES = {
    gpuconv.signal: (
        "convolve", "correlate", "convolve2d", "correlate2d", "fftconvolve", "oaconvolve",
        "choose_conv_method",
    ),
    gpuconv.ndimage: (
        "convolve", "correlate", "convolve1d", "correlate1d", "gaussian_filter",
        "gaussian_filter1d", "uniform_filter", "uniform_filter1d", "sobel", "prewitt", "laplace",
        "gaussian_laplace", "gaussian_gradient_magnitude", "generic_laplace",
        "generic_gradient_magnitude",
    ),
}  # fmt: skip

_calls = 0
_report: dict[str, dict[str, Any]] = {}


def _counted(function: Any) -> Any:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _calls
        _calls += 1
        return function(*args, **kwargs)

    return counted


def _put_in_place() -> None:
    table = _array_api.xp_capabilities_table
    for ours, scipys in ((gpuconv.signal, scipy.signal), (gpuconv.ndimage, scipy.ndimage)):
        for name in NAMES[ours]:
            original = getattr(scipys, name)
            replacement = _counted(getattr(ours, name))
            # SciPy's own word on which libraries it serves; JAX as it is, not inside jax.jit.
            table[replacement] = {**table[original], "jax_jit": False}
            for place in (scipys, sys.modules[original.__module__]):
                setattr(place, name, replacement)


_put_in_place()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _wanted(item)]


def _wanted(item: pytest.Item) -> bool:
    name = _name(item.nodeid)
    if _is_in(DESELECTED, name):
        return False
    if not _array_api.SCIPY_ARRAY_API:
        return True
    if "xp" not in getattr(getattr(item, "callspec", None), "params", ()):
        return False  # NumPy's turn was without it
    return not _is_in(SAMPLED, name) or zlib.crc32(name.encode()) % SAMPLED_ONE_IN == 0


def _is_in(table: list[Listed], name: str) -> bool:
    return any(fnmatchcase(name, listed.pattern) for listed in table)


def _name(nodeid: str) -> str:
    return nodeid.split("::", 1)[1]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    before = _calls
    yield
    item.user_properties.append(("calls", _calls - before))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _name(report.nodeid)
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.outcome == "failed":
            reason = report.longreprtext[-2000:]
        elif report.outcome == "skipped":
            reason = getattr(report, "wasxfail", "") or str(report.longrepr[-1])  # type: ignore[index]
        calls = dict(report.user_properties).get("calls", 0)
        _report[name] = {"outcome": report.outcome, "calls": calls, "reason": reason}


def pytest_sessionfinish() -> None:
    if path := os.environ.get("GPUCONV_REPORT"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(_report, file)
