"""How long does it take? Contestants take turns, A B A B, until the row's time is up.

Taking turns makes a disturbance (another process, a clock that changes) hit all alike, and lets
ratios be taken pair by pair: sample i of one over sample i of the other. What is reported is the
median, and the quartiles as its spread.

On a CPU a sample is wall-clock time, with warm caches where the data fits them. On a GPU it is the
time between two CUDA events, *cold*: before every sample the second-level cache is overwritten,
which also keeps the device busy for longer than the host takes to enqueue the call, so that the
events see the device's time and not the host's.
Beside it stand the *warm* time per call of several in a row, and the *host* time of a call.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from bench.peers import Contestant

Clock = Callable[[], float]


@dataclass(frozen=True)
class Budget:
    """How long a row may take."""

    seconds: float = 1.0  # of sampling, by all contestants together
    least: int = 3  # rounds for every contestant, whatever they take
    most: int = 60
    sample_seconds: float = 2e-4  # a sample on the CPU repeats shorter calls to last this long


@dataclass
class Samples:
    """Seconds per call of one contestant; round i of all contestants was measured together."""

    seconds: list[float] = field(default_factory=list)
    number: int = 1  # calls per sample

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)


def ratio(ours: Samples, theirs: Samples) -> tuple[float, float, float]:
    """theirs / ours, pair by pair: the lower quartile, the median, the upper quartile.

    More than 1: ours is faster.
    """
    pairs = min(len(ours.seconds), len(theirs.seconds))
    ratios = np.array(theirs.seconds[:pairs]) / np.array(ours.seconds[:pairs])
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(low), float(middle), float(high)


class Sampler(Protocol):
    """Seconds per call of `number` calls."""

    def __call__(self, contestant: Contestant, number: int, /) -> float: ...


@dataclass
class CpuSampler:
    """Wall-clock time, each contestant on its own feet.

    The threads of one library spin for some milliseconds after its call, waiting for more work, and
    would take the cores from the next contestant. So everyone rests before a sample, and before a
    short one an untimed call wakes the contestant's own threads.
    """

    clock: Clock = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    rest: float = 5e-3
    short: float = 20e-3  # seconds of a sample that waking threads makes no difference to
    _last: dict[str, float] = field(default_factory=dict)

    def __call__(self, contestant: Contestant, number: int, /) -> float:
        run, clock = contestant.run, self.clock
        contestant.before()
        self.sleep(self.rest)
        if self._last.get(contestant.name, 0.0) * number < self.short:
            run()
        start = clock()
        for _ in range(number):
            run()
        seconds = (clock() - start) / number
        self._last[contestant.name] = seconds
        return seconds


def interleave(
    contestants: Sequence[Contestant],
    sampler: Sampler,
    budget: Budget,
    *,
    first: dict[str, float] | None = None,
    number: int | None = None,
) -> dict[str, Samples]:
    """Sample all contestants in turns. `first`: seconds of a call, known from before.

    Every other round runs backwards, so that no contestant always follows the same one and finds
    the caches and the memory as that left them. A slow contestant drops out after a few rounds, and
    those of the rest go on without it.
    """
    samples = {c.name: Samples() for c in contestants}
    per_round = {}
    for c in contestants:
        known = (first or {}).get(c.name, 0.0)
        # The first call also plans, compiles and fills caches: only a slow one is trusted.
        estimate = known if known > budget.seconds / 2 else sampler(c, 1)
        wanted = budget.sample_seconds / max(estimate, 1e-9)
        samples[c.name].number = number or max(1, min(10_000, round(wanted)))
        per_round[c.name] = estimate * samples[c.name].number
    rounds = rounds_each(per_round, budget)
    with _no_garbage_collection():
        for i in range(max(rounds.values(), default=0)):
            for c in contestants if i % 2 == 0 else reversed(contestants):
                if i < rounds[c.name]:
                    one = samples[c.name]
                    one.seconds.append(sampler(c, one.number))
    return samples


def rounds_each(per_round: dict[str, float], budget: Budget) -> dict[str, int]:
    """How many rounds each contestant gets, by its seconds per round.

    The slowest choose first, each at most its equal share of the time that is left. Two rounds are
    enough of one that is both slow and far behind the fastest.
    """
    fastest = min(per_round.values(), default=0.0)
    rounds, left = {}, budget.seconds
    slowest_first = sorted(per_round, key=lambda name: per_round[name], reverse=True)
    for i, name in enumerate(slowest_first):
        share = left / (len(slowest_first) - i)
        fitting = int(share / max(per_round[name], 1e-9))
        hopeless = per_round[name] > max(5 * fastest, budget.seconds / budget.least)
        least = min(2, budget.least) if hopeless else budget.least
        rounds[name] = max(least, min(budget.most, fitting))
        left = max(0.0, left - rounds[name] * per_round[name])
    return rounds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# ---- a CUDA device ---------------------------------------------------------------------------


class CudaTimer:
    """Cold, warm and host times on CuPy's current device.

    Events are recorded on the legacy default stream, which CuPy and torch both use.
    """

    def __init__(self, cupy: Any = None, clock: Clock = time.perf_counter) -> None:
        self.cupy = cupy or import_module("cupy")
        self.clock = clock
        attributes = self.cupy.cuda.Device().attributes
        l2 = int(attributes.get("L2CacheSize", 0)) or 64 << 20
        self._flush = self.cupy.zeros(max(2 * l2, 64 << 20), np.uint8)
        self._flush_seconds = self._measure_flush()

    def synchronize(self) -> None:
        self.cupy.cuda.runtime.deviceSynchronize()

    def cold(self, contestant: Contestant, number: int = 1, /) -> float:
        """Seconds of one call with nothing of its data in the second-level cache."""
        contestant.before()
        if contestant.host_timed:
            self._cover(0)
            self.synchronize()
            return self._host_clocked(contestant, 1)
        self._cover(contestant.info.get("host_seconds", 50e-6))
        return self._between_events(contestant, 1)

    def warm(self, contestant: Contestant, number: int, /) -> float:
        """Seconds per call of several in a row."""
        contestant.before()
        if contestant.host_timed:
            return self._host_clocked(contestant, number)
        self._cover(number * contestant.info.get("host_seconds", 50e-6))
        return self._between_events(contestant, number)

    def host(self, contestant: Contestant, calls: int = 20) -> float | None:
        """Median seconds that a call keeps the host busy, while the device has nothing to do."""
        if contestant.host_timed:
            return None
        contestant.before()
        times = []
        for _ in range(calls):
            self.synchronize()
            start = self.clock()
            contestant.run()
            times.append(self.clock() - start)
        self.synchronize()
        return float(np.median(times))

    def _between_events(self, contestant: Contestant, number: int) -> float:
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        for _ in range(number):
            contestant.run()
        end.record()
        end.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(start, end)) / 1e3 / number

    def _host_clocked(self, contestant: Contestant, number: int) -> float:
        start = self.clock()
        for _ in range(number):
            contestant.run()
        return (self.clock() - start) / number

    def _cover(self, host_seconds: float) -> None:
        """Overwrite the cache, for at least as long as the host needs to enqueue what follows."""
        times = math.ceil(1.5 * host_seconds / self._flush_seconds)
        for _ in range(min(max(1, times), 200)):
            self._flush.fill(1)

    def _measure_flush(self) -> float:
        self._flush.fill(1)
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        for _ in range(10):
            self._flush.fill(1)
        end.record()
        end.synchronize()
        return max(float(self.cupy.cuda.get_elapsed_time(start, end)) / 1e4, 1e-6)
