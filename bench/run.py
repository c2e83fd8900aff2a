"""Row by row: build the contestants, check their results, time them, write down what was found.

What is found is plain data, the "document", as it stands in the JSON file: settings, machine,
versions, ceilings, and one entry per row. It is written before and after every row, so a run that
is cut short, or crashes the device, loses one row and no more, and another run can go on with it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import machine
from bench.check import Check, WrongError
from bench.measure import Budget, CpuSampler, CudaTimer, Samples, interleave, ratio
from bench.peers import PEERS, Contestant, Unable, gpuconv_contestant, planned
from bench.suites import SUITES, Row

SCHEMA = 1
DIED = "the process died while it was measured"
Document = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run measures and how."""

    backend: str
    suites: dict[str, list[Row]]
    dtype: str = "float32"
    precision: str = "ieee"
    peers: tuple[str, ...] = ()
    threads: int = 1
    algorithms: float | None = None  # also every algorithm of at most so many times auto's cost
    channels_last: bool = False  # also with x in channels-last memory
    budget: Budget = field(default_factory=Budget)
    row_limit: float = 3.0  # predicted seconds of one call, above which a row is left out
    deadline: float = math.inf  # seconds after which no further row is begun
    out: Path | None = None
    resume: bool = False  # go on with the run whose document is at `out`
    commit: str | None = None


def run(
    settings: Settings, progress: Callable[[int, int, str], None] = lambda done, of, name: None
) -> Document:
    """Measure everything; the document holds what could be measured, and why the rest could not."""
    began = time.monotonic()
    if any(name.startswith("torch") for name in settings.peers):
        import_module("torch")
    resumed = settings.resume and settings.out is not None and settings.out.exists()
    document = _go_on(settings) if resumed else _begin(settings)
    before = document.get("seconds", 0.0)
    timer = CudaTimer() if settings.backend == "cuda" else None
    rows = [row for suite in settings.suites.values() for row in suite]
    known = {entry["key"] for entry in document["rows"]}
    try:
        for done, row in enumerate(rows):
            if row.key in known:
                continue
            progress(done, len(rows), row.key)
            if time.monotonic() - began > settings.deadline:
                document["cut"] = f"out of time: {len(rows) - done} of {len(rows)} rows not begun"
                break
            document["measuring"] = _entry(row)
            write(document, settings.out)
            entry = measure_row(row, settings, document["ceilings"]["start"], timer)
            del document["measuring"]
            document["rows"].append(entry)
            write(document, settings.out)
            if _device_lost(entry):
                document["cut"] = f"the device was lost in {row.key}"
                break
        else:
            progress(len(rows), len(rows), "")
            document["ceilings"]["end"] = _ceilings(settings)
    except KeyboardInterrupt:
        document["cut"] = "interrupted"
        document.pop("measuring", None)  # it did no harm, and may be tried again
    document["seconds"] = round(before + time.monotonic() - began, 1)
    write(document, settings.out)
    return document


def _begin(settings: Settings) -> Document:
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        **_about(settings),
        "ceilings": {"start": _ceilings(settings)},
        "suites": _suites(settings),
        "rows": [],
    }


def _about(settings: Settings) -> Document:
    """What the rows of one document have in common."""
    return {
        "commit": settings.commit or machine.commit(),
        "backend": settings.backend,
        "dtype": settings.dtype,
        "precision": settings.precision,
        "peers": list(settings.peers),
        "algorithms": settings.algorithms,
        "machine": machine.describe(settings.backend, settings.threads),
        "versions": machine.versions(),
    }


def _suites(settings: Settings) -> dict[str, dict[str, str]]:
    return {
        name: {"title": SUITES[name].title, "source": SUITES[name].source}
        for name in settings.suites
    }


def _go_on(settings: Settings) -> Document:
    """The document at `out`; what was being measured when its process died is not tried again.

    Raises ValueError where it is another code's, another machine's, or measures something else.
    """
    assert settings.out is not None
    document = read(settings.out)
    now = json.loads(json.dumps(_about(settings)))
    for about in (now, document):
        about["machine"].pop("sm_clock", None)  # it is another at every moment
    if other := [name for name in now if now[name] != document[name]]:
        raise ValueError(
            f"{settings.out} is of another run: it differs in {', '.join(other)}; measure it anew"
        )
    document.pop("cut", None)
    if "measuring" in document:
        document["rows"].append(document.pop("measuring") | {"skipped": DIED})
    document["suites"] |= _suites(settings)
    return document


def _ceilings(settings: Settings) -> dict[str, float]:
    return machine.ceilings(settings.backend, settings.dtype, settings.threads, settings.precision)


def write(document: Document, path: Path | None) -> None:
    """Write the document to `path`, whole or not at all; one line per row, for diffs."""
    if path is None:
        return
    rest = {k: v for k, v in document.items() if k != "rows"}
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in document["rows"])
    text = json.dumps(rest, indent=1, allow_nan=False)[:-2] + f',\n "rows": [\n{rows}\n]}}\n'
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read(path: Path) -> Document:
    """A document that ``write`` wrote."""
    document: Document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result of this benchmark")
    return document


def measure_row(
    row: Row, settings: Settings, ceilings: dict[str, float], timer: CudaTimer | None
) -> dict[str, Any]:
    """One row's entry. Nothing that goes wrong in it is raised."""
    entry = _entry(row)
    floors = {name: entry[name] / ceilings[name] for name in ("flops", "bytes")}
    entry["floor"] = _round(max(floors.values()))
    entry["limit"] = "compute" if floors["flops"] > floors["bytes"] else "memory"
    others = machine.Others()
    try:
        if (reason := _too_big(row, settings, floors)) is not None:
            return entry | {"skipped": reason}
        cells = _cells(row, settings, entry, timer)
        return entry | {"others": others.cores(), "cells": cells}
    except Exception as error:
        return entry | {"skipped": f"{type(error).__name__}: {_line(error)}"}
    finally:
        if timer is not None:
            _release_device_memory()


def _entry(row: Row) -> dict[str, Any]:
    """What is known of the row beforehand."""
    return {
        "key": row.key,
        "suite": row.suite,
        "name": row.name,
        "operation": row.operation,
        "problem": str(row.problem),
        "batch": row.batch,
        "x": list(row.x_shape),
        "w": list(row.w_shape),
        "count": row.count,
        "flops": row.flops,
        "bytes": row.bytes_moved,
    }


def _release_device_memory() -> None:
    """Give back what the libraries' pools hold: the next row goes by what is free."""
    with suppress(Exception):
        import_module("cupy").get_default_memory_pool().free_all_blocks()
    with suppress(Exception):
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def _too_big(row: Row, settings: Settings, floors: dict[str, float]) -> str | None:
    seconds = max(floors.values())
    if seconds > settings.row_limit:
        return f"a call takes {seconds:.1f} s or more; --row-limit {math.ceil(seconds)} allows it"
    # Inputs and results of each contestant at once, and the copies that checking makes.
    needed = row.bytes_moved * (len(settings.peers) + 4)
    if needed > machine.available_bytes(settings.backend):
        return f"needs about {needed / 2**30:.0f} GiB of memory"
    return None


def _cells(
    row: Row, settings: Settings, entry: dict[str, Any], timer: CudaTimer | None
) -> dict[str, Any]:
    """What each contestant made of the row, by its name."""
    data = row.data()
    check = Check(row, data)
    cells: dict[str, dict[str, Any]] = {}
    standing: list[Contestant] = []
    first: dict[str, float] = {}
    for name, build in _builders(row, data, settings):
        try:
            contestant = build()
            contestant.name = name
            cells[name] = dict(contestant.info)
            first[name], result = _first_call(contestant, settings.backend, cells[name])
            cells[name]["error_of_bound"] = _round(check(contestant.to_host(result), contestant.c))
            del result
            if timer:
                contestant.info["host_seconds"] = timer.host(contestant) or 0.0
            standing.append(contestant)
        except Unable as reason:
            cells[name] = {"unable": str(reason), **reason.info}
        except WrongError as error:
            cells.setdefault(name, {})["wrong"] = str(error)
        except Exception as error:
            if isinstance(error, ValueError) and name.startswith("gpuconv."):
                # Asked for by name, it looked at w and refused: separable, of a dense filter.
                cells[name] = {"unable": _line(error)}
                continue
            cells.setdefault(name, {})["failed"] = f"{type(error).__name__}: {_line(error)}"
    check.trusted = None
    if timer is None:
        times = interleave(standing, CpuSampler(), settings.budget, first=first)
    else:
        times = interleave(standing, timer.cold, settings.budget, first=first, number=1)
        short = Budget(settings.budget.seconds / 3, least=3, most=10)
        warm = interleave(standing, timer.warm, short, first=first, number=5)
        for contestant in standing:
            cell = cells[contestant.name]
            cell["warm"] = _round(warm[contestant.name].median)
            cell["host"] = _round(contestant.info.get("host_seconds", 0.0))
            cell["host_timed"] = contestant.host_timed
    for contestant in standing:
        cells[contestant.name].update(_stats(times[contestant.name], entry))
        if "gpuconv" in times:
            against = ratio(times["gpuconv"], times[contestant.name])
            cells[contestant.name]["ratio"] = [_round(value) for value in against]
    return cells


def _builders(
    row: Row, data: Any, settings: Settings
) -> Iterator[tuple[str, Callable[[], Contestant]]]:
    backend = settings.backend
    ours = partial(gpuconv_contestant, row, data, backend)
    yield "gpuconv", ours
    if settings.channels_last:
        yield "gpuconv_last", partial(ours, channels_last=True)
    if settings.algorithms is not None:
        plan = planned(row, backend)
        hopeless = min(2 * settings.row_limit, max(settings.algorithms * plan.cost, 1e-3))
        for candidate in plan.candidates:
            name, cost = f"gpuconv.{candidate.algorithm}", candidate.cost
            if cost is None or candidate.algorithm == plan.algorithm:
                continue
            if cost <= hopeless:
                yield name, partial(ours, candidate.algorithm)
            else:
                yield name, partial(_too_slow, cost, cost / plan.cost)
    for name in settings.peers:
        yield name, partial(_build_peer, name, row, data, settings)


def _too_slow(predicted: float, times: float) -> Contestant:
    raise Unable(f"predicted to take {times:.3g} times as long as auto's", predicted=predicted)


def _build_peer(name: str, row: Row, data: Any, settings: Settings) -> Contestant:
    peer = PEERS[settings.backend][name]
    if peer.flops_per_second is not None:
        seconds = row.flops / peer.flops_per_second
        if seconds > 2 * settings.row_limit:
            peer.build(row, data)  # says so if it could not do it anyway
            raise Unable(f"too slow to wait for, about {seconds:.0f} s")
    return peer.build(row, data)


def _first_call(contestant: Contestant, backend: str, cell: dict[str, Any]) -> tuple[float, Any]:
    """Its seconds and its result; gpuconv's peak memory goes to its cell."""
    contestant.before()
    ours = contestant.name.startswith("gpuconv")
    watch = _watch_memory(backend) if ours else None
    start = time.perf_counter()
    if watch is None:
        result = contestant.run()
    else:
        with watch as peak:
            result = contestant.run()
        cell["peak_bytes"] = max(0, peak() - int(getattr(result, "nbytes", 0)))
    if backend == "cuda":
        import_module("cupy").cuda.runtime.deviceSynchronize()
    return time.perf_counter() - start, result


@contextmanager
def _watch_memory(backend: str) -> Iterator[Callable[[], int]]:
    """The largest sum of allocations that lived at once inside the block, the result's included."""
    if backend == "cuda":
        with _cupy_peak() as peak:
            yield peak
        return
    _drop_scratch()
    tracemalloc.start(1)
    before = tracemalloc.get_traced_memory()[0]
    highest = [0]
    try:
        yield lambda: highest[0]
    finally:
        highest[0] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()


def _drop_scratch() -> None:
    """The NumPy backend keeps scratch memory for the next call; but it counts as that call's."""
    with suppress(ImportError):
        names = vars(import_module("gpuconv.numpy_backend.scratch"))
        if "_kept" in names:
            names["_kept"] = None


@contextmanager
def _cupy_peak() -> Iterator[Callable[[], int]]:
    cupy = import_module("cupy")

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc, name-defined]
        name = "peak"
        live = 0
        peak = 0
        sizes: dict[int, int] = {}  # noqa: RUF012  (one hook at a time)

        def malloc_postprocess(self, **event: Any) -> None:
            size = int(event["mem_size"])
            self.sizes[int(event["mem_ptr"])] = size
            self.live += size
            self.peak = max(self.peak, self.live)

        def free_postprocess(self, **event: Any) -> None:
            self.live -= self.sizes.pop(int(event["mem_ptr"]), 0)

    with Hook() as hook:
        yield lambda: int(hook.peak)


def _stats(samples: Samples, entry: dict[str, Any]) -> dict[str, Any]:
    median, (low, high) = samples.median, samples.quartiles
    return {
        "median": _round(median),
        "low": _round(low),
        "high": _round(high),
        "rounds": len(samples.seconds),
        "number": samples.number,
        "flops_per_s": _round(entry["flops"] / median),
        "bytes_per_s": _round(entry["bytes"] / median),
        "of_ceiling": _round(entry["floor"] / median),
    }


def _device_lost(entry: dict[str, Any]) -> bool:
    """Whether a kernel broke the CUDA context: nothing works after that in this process."""
    failures = [str(cell.get("failed", "")) for cell in entry.get("cells", {}).values()]
    failures.append(str(entry.get("skipped", "")))
    marks = ("IllegalAddress", "illegal memory access", "LaunchFailure", "unspecified launch",
             "misaligned address", "MisalignedAddress", "device-side assert")  # fmt: skip
    return any(mark in text for text in failures for mark in marks)


def _line(error: BaseException) -> str:
    """The first line of an error's text, not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if len(text) <= 300 else text[:297] + "..."


def _round(value: float) -> float:
    """Five digits: what is measured has no more."""
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0
