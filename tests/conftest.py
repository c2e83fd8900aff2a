"""Fixed random inputs, GPU tests that skip themselves, and no silent skips where asked."""

from __future__ import annotations

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,  # a failure on one machine is a failure on every machine
    deadline=None,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-missing-packages",
        action="store_true",
        help="a test that skips because a package is not installed fails",
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and item.config.getoption("--no-missing-packages"):
        reason = str(call.excinfo.value) if call.excinfo else ""
        if "could not import" in reason:
            report.outcome, report.longrepr = "failed", reason


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        from gpuconv import backends

        if reason := backends.why_no_cuda():
            pytest.skip(f"no CUDA device: {reason}")
