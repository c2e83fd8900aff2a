"""The layers of a call: all of them are there, and they are not more than the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import host_cost


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr(host_cost, "_ROUNDS", 5)
    assert host_cost.main(["--json", str(tmp_path / "costs.json")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "costs.json").read_text())
    assert [costs["backend"] for costs in found] == ["numpy", "cuda"]
    for costs in found:
        assert {"conv2d(x, w)", "plan(x, w)", "plan(x, w, out=out)"} <= set(costs["calls"])
        assert {"take in", "check", "problem look-up", "plan look-up"} <= set(costs["first"])
        for name, value in (costs["calls"] | costs["first"]).items():
            assert 0 < value < 1e4, name
            assert name in shown
        layers = costs["layers"]
        assert sum(layers.values()) == pytest.approx(costs["calls"]["plan(x, w)"])
        # A call like one before it is not looked at again.
        assert costs["calls"]["conv2d(x, w)"] < costs["calls"]["conv2d(x, w), not seen before"]


def test_without_cupy_the_numpy_backend_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(host_cost, "_ROUNDS", 5)
    monkeypatch.setattr(host_cost, "null_device", missing)
    monkeypatch.setattr(host_cost.backends, "why_no_cuda", lambda: RuntimeError("none"))
    assert host_cost.main([]) == 0
    captured = capsys.readouterr()
    assert "numpy backend" in captured.out
    assert "cuda backend" not in captured.out
    assert "No module named 'cupy'" in captured.err
