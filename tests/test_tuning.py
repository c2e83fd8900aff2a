"""tune measures, remembers and is believed only where use_tuned says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import conv, tuning, winners
from gpuconv.plan import Plan, choose
from gpuconv.testing import random_case
from tests.emulator import emulated_device

X, W = (2, 4, 9, 8), (4, 4, 3, 3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, and a process that has tuned nothing."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_winners", {})
    yield tmp_path / "gpuconv"
    choose.cache_clear()
    conv._calls.clear()


def plan(**options: Any) -> Plan:
    return gpuconv.plan_conv2d(X, W, **{"backend": "numpy", "padding": 1, **options})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What each algorithm is said to take, in seconds; a second where nothing is said."""
    times: dict[str, float] = {}
    monkeypatch.setattr(
        tuning, "_seconds", lambda plan, operands, out: times.get(plan.algorithm, 1.0)
    )
    return times


def a_slow_one(made: Plan) -> str:
    """A candidate that "auto" does not choose here."""
    return next(
        c.algorithm for c in made.candidates if c.rejected is None and c.algorithm != made.algorithm
    )


def test_the_fastest_wins(clock: dict[str, float]) -> None:
    made = plan()
    slow = a_slow_one(made)
    clock[slow] = 0.5
    tuned = gpuconv.tune(made)
    assert tuned.algorithm == slow
    assert tuned.problem == made.problem
    assert f"-> {slow}" in str(tuned)
    x, w = np.ones(X, np.float32), np.ones(W, np.float32)
    np.testing.assert_allclose(tuned(x, w), made(x, w), rtol=1e-5)


def test_a_winner_is_believed_inside_of_use_tuned_alone(clock: dict[str, float]) -> None:
    made = plan()
    slow = a_slow_one(made)
    clock[slow] = 0.5
    gpuconv.tune(made)
    for _ in range(2):
        assert plan().algorithm == made.algorithm
        with gpuconv.use_tuned():
            assert plan().algorithm == slow
            assert plan(algorithm=made.algorithm).algorithm == made.algorithm
            assert plan(stride=2).algorithm  # not tuned: planned as ever
    assert plan() is made


def test_calls_follow(clock: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = np.ones(X, np.float32), np.ones(W, np.float32)
    made = plan()
    slow = a_slow_one(made)
    clock[slow] = 0.5
    gpuconv.tune(made)
    gpuconv.tune(plan(operation="wgrad"))
    seen: list[str] = []
    for candidate in made.candidates:
        if candidate.rejected is None:
            module = choose("f", made.problem, "numpy", made.device, candidate.algorithm)
            run = module.implementation.run

            def watched(plan: Plan, *arrays: Any, run: Any = run) -> None:
                seen.append(plan.algorithm)
                run(plan, *arrays)

            monkeypatch.setattr(module.implementation, "run", watched)
    for _ in range(2):
        gpuconv.conv2d(x, w, padding=1)
        with gpuconv.use_tuned():
            gpuconv.conv2d(x, w, padding=1)
    assert seen == [made.algorithm, slow] * 2
    with gpuconv.use_tuned():
        gpuconv.grad.conv2d_weight(x, W, np.ones(X, np.float32), padding=1)


def test_another_process_reads_the_file(
    clock: dict[str, float], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan()
    slow = a_slow_one(made)
    clock[slow] = 0.5
    gpuconv.tune(made)
    (file,) = folder.glob("*")
    content = json.loads(file.read_text())
    assert content["algorithm"] == slow
    assert content["seconds"][made.algorithm] == 1.0
    assert "x[2,4,9,8]" in content["problem"]
    monkeypatch.setattr(tuning, "_winners", {})
    choose.cache_clear()
    with gpuconv.use_tuned():
        assert plan().algorithm == slow


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"algorithm": 7}', '{"algorithm": "none such"}', "\0\xff"]
)
def test_a_file_that_is_damaged_is_no_winner(
    clock: dict[str, float], folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    made = plan()
    clock[a_slow_one(made)] = 0.5
    gpuconv.tune(made)
    (file,) = folder.glob("*")
    file.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(tuning, "_winners", {})
    choose.cache_clear()
    with gpuconv.use_tuned():
        assert plan().algorithm == made.algorithm


def test_no_file_is_read_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(winners, "read", refuse)
    choose.cache_clear()
    gpuconv.conv2d(np.ones(X, np.float32), np.ones(W, np.float32), padding=1)
    with gpuconv.use_tuned(), pytest.raises(AssertionError, match="read"):
        plan()


def test_the_name_of_a_file_holds_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan()

    def name(of: Plan) -> str:
        return winners.file_name(of.problem, of.backend, of.device)

    names = {name(made), name(plan(stride=2)), name(plan(dtype="float64"))}
    monkeypatch.setattr(winners, "_sources", lambda backend: "other kernels")
    names.add(name(made))
    monkeypatch.setattr("gpuconv.numpy_backend.processor", lambda: "another processor")
    names.add(name(made))
    assert len(names) == 5


def test_a_folder_that_cannot_be_written_is_told(
    clock: dict[str, float], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    made = plan()
    slow = a_slow_one(made)
    clock[slow] = 0.5
    with pytest.warns(RuntimeWarning, match="cannot keep what tune has found"):
        assert gpuconv.tune(made).algorithm == slow
    with gpuconv.use_tuned():
        assert plan().algorithm == slow


def test_candidates_that_disagree_are_a_fault(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan()
    module = choose("f", made.problem, "numpy", made.device, a_slow_one(made)).implementation
    right = module.run

    def wrong(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
        right(plan, x, w, bias, out)
        out[-1, -1, -1, -1] += 1e-3

    monkeypatch.setattr(module, "run", wrong)
    with pytest.raises(RuntimeError, match="disagree on fprop 2-D"):
        gpuconv.tune(made)


@pytest.mark.parametrize("block", range(2))
def test_random_problems_can_be_tuned(clock: dict[str, float], block: int) -> None:
    """Candidates agree within their bounds for every dtype, layout and operation."""
    from gpuconv.numpy_backend.device import cpu

    for seed in range(40 * block, 40 * (block + 1)):
        problem = random_case(seed).problem()
        made = choose("test", problem, "numpy", cpu())
        assert gpuconv.tune(made).problem == problem


def test_on_an_emulated_device(clock: dict[str, float]) -> None:
    with emulated_device():
        made = plan(backend="cuda")
        slow = a_slow_one(made)
        clock[slow] = 0.5
        assert gpuconv.tune(made).algorithm == slow
        with gpuconv.use_tuned():
            assert plan(backend="cuda").algorithm == slow
        wgrad = plan(backend="cuda", operation="wgrad")
        assert gpuconv.tune(wgrad).problem == wgrad.problem


def test_the_clock_is_asked_for_as_long_as_it_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of 0.3 ms: eight of them make more than 2 ms."""
    now, calls, waits = [0.0], [], []
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])

    class Called:
        class device:  # noqa: N801
            @staticmethod
            def synchronize() -> None:
                waits.append(1)

        def __call__(self, *operands: Any, out: Any) -> None:
            calls.append(operands)
            now[0] += 0.3e-3

    assert tuning._seconds(Called(), (1, 2, 3), None) == pytest.approx(0.3e-3)  # type: ignore[arg-type]
    assert len(calls) == 1 + 2 + 4 + 8
    assert len(waits) == 8


def test_hopeless_candidates_are_not_tried() -> None:
    made = gpuconv.plan_conv2d((8, 64, 56, 56), (64, 64, 3, 3), backend="numpy")
    tried = {p.algorithm for p in tuning._competitors(made)}
    costs = {c.algorithm: c.cost or 0 for c in made.candidates if c.rejected is None}
    assert made.algorithm in tried
    assert "direct" not in tried
    assert all(costs[name] <= 50 * made.cost for name in tried)
    assert {p.algorithm for p in tuning._competitors(plan())} >= {"direct", "im2col"}


def test_wrong_repeats_and_empty_problems() -> None:
    with pytest.raises(ValueError, match="repeats is at least 1, got 0"):
        gpuconv.tune(plan(), repeats=0)
    empty = gpuconv.plan_conv2d((0, 4, 9, 8), W, backend="numpy")
    assert gpuconv.tune(empty) is empty
