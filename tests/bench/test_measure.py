"""The machinery of measuring, on clocks that tests turn by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import report
from bench import run as running
from bench.check import Check, WrongError
from bench.measure import (
    Budget,
    CpuSampler,
    CudaTimer,
    Samples,
    interleave,
    ratio,
    rounds_each,
)
from bench.peers import Contestant, gpuconv_contestant, planned
from bench.run import Settings, measure_row
from bench.suites import Row

CEILINGS = {"flops": 1e11, "bytes": 1e10}


class Clock:
    """Time passes only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.log.append("rest")

    def contestant(self, name: str, *seconds: float) -> Contestant:
        """Its calls take `seconds` in turn, the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Contestant(name, call, np.asarray)


def test_contestants_take_turns() -> None:
    clock = Clock()
    a, b = clock.contestant("a", 1.0), clock.contestant("b", 3.0)
    samples = interleave([a, b], CpuSampler(clock), Budget(seconds=16, least=2))
    assert "".join(clock.log[-4:]) in ("abab", "baba") or clock.log[-2:] == ["a", "a"]
    assert samples["a"].median == 1.0
    assert samples["b"].median == 3.0
    assert samples["a"].number == samples["b"].number == 1


def test_short_calls_are_repeated_after_a_rest_and_an_untimed_call() -> None:
    clock = Clock()
    sampler = CpuSampler(clock, clock.sleep)
    a = clock.contestant("a", 9.0, 1e-6)  # the first call plans and compiles
    samples = interleave([a], sampler, Budget(seconds=0.1, least=3, sample_seconds=1e-4))
    assert samples["a"].number == 100
    assert samples["a"].median == pytest.approx(1e-6)
    assert clock.log.count("rest") == len(samples["a"].seconds) + 1


def test_slow_calls_are_not_called_more_than_needed() -> None:
    clock = Clock()
    a = clock.contestant("a", 5.0)
    interleave([a], CpuSampler(clock, clock.sleep), Budget(1, least=3), first={"a": 5.0})
    # One untimed call before it is known how slow it is.
    assert clock.log == ["rest", "a", "a", "rest", "a", "rest", "a"]


def test_every_other_round_runs_backwards() -> None:
    clock = Clock()
    contestants = [clock.contestant(name, 5.0) for name in "abc"]
    first = dict.fromkeys("abc", 5.0)
    interleave(contestants, CpuSampler(clock), Budget(45, least=3, most=3), first=first)
    assert "".join(clock.log[-9:]) == "abccbaabc"


def test_the_rounds_share_the_budget() -> None:
    budget = Budget(seconds=10, least=3, most=60)
    assert rounds_each({"a": 1.0, "b": 1.0}, budget) == {"a": 5, "b": 5}
    assert rounds_each({"slow": 100.0, "fast": 0.1}, budget) == {"slow": 2, "fast": 3}
    assert rounds_each({"slow": 9.0, "slower": 10.0}, budget) == {"slow": 3, "slower": 3}
    assert rounds_each({"slow": 2.0, "fast": 0.1}, budget) == {"slow": 3, "fast": 40}
    assert rounds_each({"a": 1e-9}, budget) == {"a": 60}
    assert rounds_each({}, budget) == {}


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine slowed down threefold half-way: the ratio does not see it, medians would.
    ours = Samples([1.0, 1.0, 3.0, 3.0])
    theirs = Samples([2.0, 2.0, 6.0, 6.0, 6.0])
    assert ratio(ours, theirs) == (2.0, 2.0, 2.0)
    assert Samples([1.0, 2.0, 3.0, 4.0, 5.0]).quartiles == (2.0, 4.0)


class FakeCupy:
    """Enough of CuPy to see in which order the device is given its work."""

    def __init__(self, clock: Clock) -> None:
        log = clock.log

        class Event:
            def record(self) -> None:
                log.append("event")
                self.time = clock.now

            def synchronize(self) -> None:
                log.append("wait")

        def elapsed(start: Any, end: Any) -> float:
            return (end.time - start.time) * 1e3 or 0.1

        class Buffer:
            def fill(self, value: int) -> None:
                log.append("flush")

        self.zeros = lambda size, dtype: Buffer()
        self.cuda = SimpleNamespace(
            Event=Event,
            get_elapsed_time=elapsed,
            Device=lambda: SimpleNamespace(attributes={"L2CacheSize": 50 << 20}),
            runtime=SimpleNamespace(deviceSynchronize=lambda: log.append("sync")),
        )


def test_a_cold_sample_flushes_outside_of_the_events() -> None:
    clock = Clock()
    timer = CudaTimer(FakeCupy(clock), clock)
    a = clock.contestant("a", 0.25)
    a.info["host_seconds"] = 0.0
    clock.log.clear()
    assert timer.cold(a) == 0.25
    assert clock.log == ["flush", "event", "a", "event", "wait"]
    clock.log.clear()
    assert timer.warm(a, 3) == 0.25
    assert clock.log == ["flush", "event", "a", "a", "a", "event", "wait"]
    # As many flushes as the host needs to get ahead: the fake's take 10 µs each.
    a.info["host_seconds"] = 100e-6
    clock.log.clear()
    timer.cold(a)
    assert clock.log.count("flush") == 15
    assert timer.host(a, calls=3) == 0.25


def test_a_host_timed_contestant_starts_on_an_idle_device() -> None:
    clock = Clock()
    timer = CudaTimer(FakeCupy(clock), clock)
    a = clock.contestant("a", 0.5)
    a.host_timed = True
    clock.log.clear()
    assert timer.cold(a) == 0.5
    assert clock.log == ["flush", "sync", "a"]
    assert timer.host(a) is None


# ---- checking ----------------------------------------------------------------------------------

LARGE = Row("s", "large", (2, 16, 60, 60), (24, 8, 3, 3), padding=1, stride=2, groups=2)
SMALL = Row("s", "small", (2, 4, 9, 9), (6, 4, 3, 3), padding=1)


def every_gradient(row: Row) -> list[Row]:
    return [replace(row, operation=operation) for operation in ("dgrad", "wgrad")]


LARGE_DGRAD, LARGE_WGRAD = (replace(LARGE, operation=op) for op in ("dgrad", "wgrad"))
LARGE_TRANSPOSED = Row("s", "t", (2, 16, 40, 40), (16, 12, 4, 4), 2, 1, transposed=True)


@pytest.mark.parametrize(
    "row",
    [SMALL, LARGE, LARGE_DGRAD, LARGE_WGRAD, LARGE_TRANSPOSED],
    ids=["whole", "samples", "dgrad", "wgrad", "transposed"],
)
def test_a_right_result_passes_and_wrong_ones_do_not(row: Row) -> None:
    data = row.data()
    contestant = gpuconv_contestant(row, data, "numpy")
    y = contestant.run()
    check = Check(row, data)
    assert check.whole == (row is SMALL)
    assert 0 <= check(y) < 1
    for spoil in ("scaled", "nan", "shape", "hole"):
        bad = y.copy()
        if spoil == "scaled":
            bad *= np.float32(1.001)
        elif spoil == "nan":
            bad[...] = np.nan
        elif spoil == "shape":
            bad = bad[..., 1:]
        else:  # one output in thousands: found by comparing whole results
            bad[tuple(n // 2 for n in bad.shape)] = 0
        with pytest.raises(WrongError):
            check(bad)
    assert 0 <= check(y.copy()) < 1


def test_the_sampled_reference_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in (
        LARGE,
        Row("s", "d", (1, 6, 30, 31), (6, 1, 5, 5), padding=8, dilation=4, groups=6),
        Row("s", "v", (3, 5, 200), (7, 5, 4), stride=3),
        *every_gradient(LARGE),
        *every_gradient(Row("s", "h", (2, 4, 19, 9), (6, 4, 3, 2), 3, 2, 2)),
        *every_gradient(Row("s", "n", (2, 2, 6, 6), (2, 2, 3, 3), 1, 8, 8)),
        *every_gradient(Row("s", "w", (3, 5, 200), (7, 5, 4), stride=5)),
        LARGE_TRANSPOSED,
    ):
        sampled, whole = Check(row, row.data()), Check(row, row.data())
        with monkeypatch.context() as patch:
            patch.setattr(Check, "whole", False)
            y_ref, magnitudes = sampled._reference
            where = sampled._where
            patch.setattr(Check, "whole", True)
            every, sums = whole._reference
        shape = row.problem.result_shape
        np.testing.assert_allclose(y_ref, every.reshape(shape)[where], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(magnitudes, sums.reshape(shape)[where], rtol=1e-12)


def test_a_long_sum_s_bound_is_not_all_that_is_asked_of_it() -> None:
    """A weight's gradient over 800,000 pixels, in which one image of 16 was forgotten."""
    row = Row("s", "r", (16, 2, 224, 224), (2, 2, 1, 1), operation="wgrad")
    data = row.data()
    check = Check(row, data)
    x, dy = (a.astype(np.float64) for a in (data.x, data.w))
    right = np.einsum("nchw,nkhw->kc", x, dy)[:, :, None, None]
    forgotten = np.einsum("nchw,nkhw->kc", x[1:], dy[1:])[:, :, None, None]
    assert check(right.astype(np.float32), 64) < 1
    with pytest.raises(WrongError, match="on the whole"):
        check(forgotten.astype(np.float32), 64)


def test_tf32_has_a_bound_of_its_own() -> None:
    row = Row("s", "r", (1, 64, 12, 12), (8, 64, 1, 1), precision="tf32")
    ieee = Row("s", "r", (1, 64, 12, 12), (8, 64, 1, 1))
    data = row.data()

    def tf32(a: np.ndarray) -> np.ndarray:  # the operands' fraction cut to 10 bits
        return (a.view(np.int32) & ~0x1FFF).view(np.float32)

    y = np.einsum("nchw,kc->nkhw", tf32(data.x), tf32(data.w)[:, :, 0, 0])
    assert Check(row, data)(y) < 1
    with pytest.raises(WrongError):
        Check(ieee, data)(y)


# ---- a row from end to end ---------------------------------------------------------------------


def settings(**options: Any) -> Settings:
    tiny = Budget(seconds=1e-3, least=2, most=2, sample_seconds=0)
    return Settings(**{"backend": "numpy", "suites": {}, "budget": tiny} | options)


def test_a_row_is_measured_checked_and_put_beside_its_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = running.PEERS["numpy"]

    def wrong(row: Row, data: Any) -> Contestant:
        return Contestant("wrong", lambda: np.zeros(row.problem.y_shape, "float32"), np.asarray)

    def crash(row: Row, data: Any) -> Contestant:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(known, "wrong", SimpleNamespace(build=wrong, flops_per_second=None))
    monkeypatch.setitem(known, "crash", SimpleNamespace(build=crash, flops_per_second=None))
    names = ("fftconvolve", "ndimage", "wrong", "crash")
    row = Row("filters", "r", (1, 1, 40, 50), (1, 1, 5, 5), padding=2)
    entry = measure_row(row, settings(peers=names, algorithms=1e9), CEILINGS, None)
    cells = entry["cells"]
    assert cells["gpuconv"]["ratio"] == [1.0, 1.0, 1.0]
    assert cells["gpuconv"]["rounds"] == 2
    assert cells["gpuconv"]["algorithm"]
    assert f"gpuconv.{cells['gpuconv']['algorithm']}" not in cells  # it would be timed twice
    assert cells["gpuconv.direct"]["median"] > 0
    assert cells["ndimage"]["median"] > 0
    assert cells["fftconvolve"]["error_of_bound"] < 1
    assert "outer products" in cells["gpuconv.separable"]["unable"]
    assert "wrong" in cells["wrong"]
    assert "median" not in cells["wrong"]
    assert cells["crash"]["failed"] == "RuntimeError: no such thing"
    assert entry["limit"] == "memory"
    assert entry["bytes"] == 4 * (2 * 40 * 50 + 25)


def test_algorithms_that_cost_too_much_are_not_timed_and_say_so() -> None:
    row = Row("filters", "r", (1, 1, 512, 512), (1, 1, 7, 7), padding=3)
    plan = planned(row, "numpy")
    cells = measure_row(row, settings(algorithms=4.0), CEILINGS, None)["cells"]
    costs = {c.algorithm: c.cost for c in plan.candidates if c.cost is not None}
    assert {f"gpuconv.{name}" for name in costs if name != plan.algorithm} == {
        name for name in cells if name.startswith("gpuconv.")
    }
    dear = {name for name, cost in costs.items() if cost > max(4 * plan.cost, 1e-3)}
    assert dear
    for name in costs.keys() - {plan.algorithm}:
        cell = cells[f"gpuconv.{name}"]
        assert (name in dear) == ("times as long as auto's" in cell.get("unable", ""))
        assert name not in dear or cell["predicted"] == costs[name]


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
def test_a_gradient_row_is_measured_like_any_other(operation: Any) -> None:
    pytest.importorskip("torch")
    row = replace(SMALL, operation=operation)
    names = ("torch", "torch_last", "ndimage")
    entry = measure_row(row, settings(peers=names, channels_last=True), CEILINGS, None)
    assert entry["operation"] == operation
    assert entry["problem"].startswith(operation)
    for name in ("gpuconv", "gpuconv_last", "torch", "torch_last"):
        assert entry["cells"][name]["median"] > 0
        assert entry["cells"][name]["error_of_bound"] < 1
    assert "unable" in entry["cells"]["ndimage"]


def test_what_takes_too_long_or_too_much_is_left_out() -> None:
    row = Row("vgg16", "r", (32, 64, 224, 224), (64, 64, 3, 3), padding=1)
    entry = measure_row(row, settings(row_limit=0.1), CEILINGS, None)
    assert "--row-limit" in entry["skipped"]
    large = Row("s", "r", (1 << 20, 64, 64, 64), (64, 64, 1, 1))
    assert "memory" in measure_row(large, settings(row_limit=1e9), CEILINGS, None)["skipped"]


def test_a_hopeless_peer_is_not_waited_for() -> None:
    row = Row("filters", "r", (1, 1, 300, 300), (1, 1, 63, 63), padding=31)
    entry = measure_row(row, settings(peers=("ndimage",), row_limit=0.1), CEILINGS, None)
    assert "too slow" in entry["cells"]["ndimage"]["unable"]
    assert "median" in entry["cells"]["gpuconv"]


def test_peak_memory_counts_scratch_that_was_kept_from_the_last_call() -> None:
    for row in (
        Row("filters", "r", (1, 1, 512, 512), (1, 1, 7, 7), padding=3),
        Row("vgg16", "r", (1, 64, 56, 56), (64, 64, 3, 3), padding=1),
    ):
        peaks = [
            measure_row(row, settings(), CEILINGS, None)["cells"]["gpuconv"]["peak_bytes"]
            for _ in range(2)
        ]
        assert peaks[1] > 0.5 * peaks[0]
        assert peaks[1] > 20_000


def test_a_run_writes_after_every_row_and_survives_what_rows_raise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(running.machine, "ceilings", lambda *args: CEILINGS)
    rows = [Row("small", name, (1, 1, 8, 8), (1, 1, 3, 3)) for name in "abc"]
    out = tmp_path / "a.json"
    written = []

    def progress(done: int, of: int, name: str) -> None:
        written.append(len(running.read(out)["rows"]) if out.exists() else 0)
        if done == 1:
            monkeypatch.setattr(running, "_cells", lambda *args: 1 / 0)

    document = running.run(settings(suites={"small": rows}, out=out), progress)
    assert written == [0, 1, 2, 3]
    assert "cells" in document["rows"][0]
    assert "ZeroDivisionError" in document["rows"][1]["skipped"]
    assert running.read(out) == document
    assert {"machine", "versions", "commit", "created", "ceilings"} <= document.keys()
    assert document["machine"]["threads"] == 1


def test_a_run_goes_on_with_the_rows_that_are_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(running.machine, "ceilings", lambda *args: CEILINGS)
    rows = [Row("small", name, (1, 1, 8, 8), (1, 1, 3, 3)) for name in "abcd"]
    options = {"suites": {"small": rows}, "out": tmp_path / "a.json", "resume": True}

    def dies(row: Row, *args: Any) -> Any:
        if row.name == "c":
            raise SystemExit("a segmentation fault, say")
        return measure_row(row, *args)

    with monkeypatch.context() as patch:
        patch.setattr(running, "measure_row", dies)
        with pytest.raises(SystemExit):
            running.run(settings(**options))
    seen: list[str] = []
    document = running.run(settings(**options), lambda done, of, name: seen.append(name))
    assert seen[0] == rows[3].key
    assert [row["name"] for row in document["rows"]] == ["a", "b", "c", "d"]
    assert document["rows"][2]["skipped"] == running.DIED
    assert report.troubles(document) == [f"{rows[2].key}: {running.DIED}"]
    assert "measuring" not in document
    assert running.run(settings(**options))["rows"] == document["rows"]
    with pytest.raises(ValueError, match="differs in precision"):
        running.run(settings(precision="tf32", **options))


def test_a_run_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.machine, "ceilings", lambda *args: CEILINGS)
    rows = [Row("small", "a", (1, 1, 8, 8), (1, 1, 3, 3))]
    document = running.run(settings(suites={"small": rows}, deadline=-1))
    assert "1 of 1 rows" in document["cut"]
    assert document["rows"] == []


def test_a_lost_device_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.machine, "ceilings", lambda *args: CEILINGS)

    def broken(*args: Any) -> Any:
        return {"gpuconv": {"failed": "CUDARuntimeError: cudaErrorIllegalAddress: an illegal"}}

    monkeypatch.setattr(running, "_cells", broken)
    rows = [Row("small", name, (1, 1, 8, 8), (1, 1, 3, 3)) for name in "ab"]
    document = running.run(settings(suites={"small": rows}))
    assert len(document["rows"]) == 1
    assert "device was lost" in document["cut"]
