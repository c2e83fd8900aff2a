"""SciPy's own tests, as installed, pass with gpuconv's functions in the place of SciPy's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.conformance.differences import CONCERNED, DESELECTED, DIFFERENT, SAMPLED

ROOT = Path(__file__).parents[2]
# What must at least have reached gpuconv and passed: a run that selects too little is no proof.
AT_LEAST = {
    ("signal", "numpy"): 11_000,
    ("ndimage", "numpy"): 1_800,
    ("signal", "others"): 3_000,
    ("ndimage", "others"): 3_000,
}


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    for package in ("scipy", "hypothesis"):
        pytest.importorskip(package)


@pytest.mark.parametrize("libraries", ["numpy", "others"])
@pytest.mark.parametrize("module", CONCERNED, ids=lambda name: name.split(".")[1])
def test_scipys_tests_pass(module: str, libraries: str, tmp_path: Path) -> None:
    if libraries == "others":
        for package in ("array_api_strict", "torch", "jax"):
            pytest.importorskip(package)
    report = run_scipys_tests(module, libraries, tmp_path)
    failed = {name for name, test in report.items() if test["outcome"] == "failed"}
    listed = {name for name in report if any(fnmatchcase(name, d.pattern) for d in DIFFERENT)}
    unlisted = sorted(failed - listed)
    assert not unlisted, "\n".join(f"{name}\n{report[name]['reason']}" for name in unlisted[:5])
    passed = {name for name, test in report.items() if test["outcome"] == "passed"}
    assert not passed & listed, "listed as different in differences.py, but passed"
    reached = {name for name in passed if report[name]["calls"]}
    print(f"\n{module}, {libraries}: {len(reached)} tests passed that reached gpuconv")
    for group, count in sorted(
        Counter(name.split("::")[0].split("[")[0] for name in reached).items()
    ):
        print(f"  {count:6} {group}")
    skipped = Counter(t["reason"] for t in report.values() if t["outcome"] == "skipped")
    print(f"  failed as listed: {len(failed)}; skipped by SciPy: {sum(skipped.values())}")
    assert len(reached) >= AT_LEAST[module.split(".")[1], libraries]


def test_every_listed_difference_names_a_test() -> None:
    everything = [*DESELECTED, *SAMPLED, *DIFFERENT]
    names = {name for group in CONCERNED.values() for name in group}
    for listed in everything:
        assert listed.pattern.split("::")[0].rstrip("*").split("*")[0] in names
        assert listed.reason


def run_scipys_tests(module: str, libraries: str, folder: Path) -> dict[str, dict[str, object]]:
    """What each test came to, by its name without the module's."""
    path = folder / "report.json"
    environment = {
        **os.environ,
        "GPUCONV_REPORT": str(path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for variable in (
        "SCIPY_ARRAY_API",
        "PYTEST_ADDOPTS",
        "PYTEST_XDIST_WORKER",
        "PYTEST_XDIST_WORKER_COUNT",
    ):
        environment.pop(variable, None)
    if libraries == "others":
        environment["SCIPY_ARRAY_API"] = '["array_api_strict", "torch", "jax.numpy"]'
    tests = [f"{module}::{name}" for name in CONCERNED[module]]
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
            "-p", "tests.conformance.in_place_of_scipy", "--pyargs", *tests,
        ],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert path.exists(), run.stdout + run.stderr
    report: dict[str, dict[str, object]] = json.loads(path.read_text())
    return report
