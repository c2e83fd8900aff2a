"""The examples run, and their numbers are right."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import signal
from tests.emulator import emulated_device

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = ("twice_dropped_ball", "photo_filter", "output_size", "two_backends")


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name=name)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    image = pytest.importorskip("PIL.Image")
    scope = example(name)
    (tmp_path / "images").mkdir()
    scope["main"].__globals__["__file__"] = str(tmp_path / f"{name}.py")
    scope["main"]()
    assert "picture:" in capsys.readouterr().out
    with image.open(tmp_path / "images" / f"{name}.png") as drawn:
        size = drawn.size
        assert len(set(np.asarray(drawn.convert("L")).ravel().tolist())) > 20  # not blank
    with image.open(FOLDER / "images" / f"{name}.png") as committed:
        assert committed.size == size


def test_the_written_out_sum_is_the_convolution() -> None:
    scope = example("twice_dropped_ball")
    f, g = scope["FIRST"], scope["SECOND"]
    assert f.sum() == pytest.approx(1)
    assert g.sum() == pytest.approx(1)
    np.testing.assert_allclose(scope["total"](f, g), scope["total_written_out"](f, g), rtol=1e-14)
    np.testing.assert_allclose(scope["total"](f, g).sum(), 1)


def test_the_filter_leaves_nothing_of_an_even_photo() -> None:
    scope = example("photo_filter")
    assert scope["edges"](np.full((9, 12), 0.5, np.float32)).tolist() == np.zeros((9, 12)).tolist()
    one = np.zeros((5, 5), np.float32)
    one[2, 2] = 1
    np.testing.assert_array_equal(scope["edges"](one)[1:4, 1:4], scope["RIDGE"])


def test_the_photo_filtered_is_scipys() -> None:
    scipy_signal = pytest.importorskip("scipy.signal")
    pytest.importorskip("PIL")
    scope = example("photo_filter")
    photo = scope["sample_photo"]()
    expected = scipy_signal.convolve2d(photo, scope["RIDGE"], mode="same", boundary="symm")
    np.testing.assert_allclose(scope["edges"](photo), expected, atol=1e-5)


def test_the_formula_gives_the_real_extents() -> None:
    scope = example("output_size")
    for case in scope["CASES"]:
        assert scope["out_extent"](*case) == scope["real_extent"](*case)


def test_the_two_backends_agree() -> None:
    scope = example("two_backends")
    image = scope["blobs"](48)
    with emulated_device():
        on_gpu = scope["on"]("cuda", image)
    on_cpu = scope["on"]("numpy", image)
    assert on_cpu.keys() == on_gpu.keys()
    for name in on_cpu:
        np.testing.assert_allclose(on_gpu[name], on_cpu[name], atol=2e-6)


def test_readme_example_of_the_ball() -> None:
    drop = [0.2, 0.5, 0.3]
    assert signal.convolve(drop, drop).round(2).tolist() == [0.04, 0.2, 0.37, 0.3, 0.09]
    assert gpuconv.signal is signal
