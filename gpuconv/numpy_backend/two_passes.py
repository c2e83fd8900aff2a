"""Pictures under filters of rank 1, w[r, s] = u[r] v[s]: down the columns, then along the rows.

    line[p, j] = sum over r of  u[r] x[p + r, j]
    y[p, q]    = sum over s of  v[s] line[p, q + s]

It is the way of ``separable`` where outputs are neighbours, and so is what they read. Blocks, what
lies beyond the picture, and the caller's memory are as in ``column_sums``: a few rows of outputs
read a matrix in x itself, and nothing of x is copied. Along the rows a product's operands are

    line[rows, B*i : B*i + B+S-1]        band[s + b, b] = v[s], 0 elsewhere

Both products multiply by a band's zeros, which would carry a NaN or Inf of x to other outputs
(0 * inf = nan). It shows: a plane that comes out with a NaN is computed again, by ``column_sums``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import column_sums, planes, separable
from gpuconv.numpy_backend.column_sums import Call, Tiling, Worker
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Region, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.plan import Plan
from gpuconv.problem import ConvProblem

_BYTE = np.dtype(np.uint8)
_BAND = 4  # rows of outputs of one product of the first pass,
_STRIP = 16  # and columns of one of the second
_OUTPUT, _TAP = 0.75e-9, 0.0155e-9  # seconds of each output, and for each of its R + S products


@dataclass(frozen=True)
class Passes(Tiling):
    """How the outputs are cut into blocks; `exact` is how those of a plane with a NaN are cut."""

    exact: Tiling | None = None

    @property
    def scratch(self) -> int:
        return max(self.own, self.exact.scratch) if self.exact else self.own

    @cached_property
    def seconds(self) -> float:
        outputs = self.multiplier * self.h.outputs * self.w.outputs
        each = _OUTPUT + _TAP * (self.h.filter + self.w.filter)
        return outputs * each * self.itemsize / 4 + self.copying


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> tuple[Passes, int]:
    exact = column_sums.whole(problem)
    band = min(_BAND, exact.h.outputs)
    values = {name: getattr(exact, name) for name in Tiling.__dataclass_fields__}
    start = Passes(**(values | {"lines": 1, "band": band}))
    best, threads = column_sums.fitted(start, problem, device)
    limit = (problem.workspace_within(WORKSPACE_CAP) - ALIGN) // threads
    exact = replace(exact, rows=min(best.rows, 16))
    while exact.scratch > max(best.scratch, limit) and exact.rows > 1:
        exact = replace(exact, rows=exact.rows // 2)
    return replace(best, exact=exact), threads


@lru_cache(maxsize=1024)
def serves(problem: ConvProblem, device: Cpu) -> bool:
    """Whether filters of this shape, if they have rank 1, are for it."""
    return (
        separable.possible(problem)
        and bool(column_sums.takes(problem))
        and workspace(problem, device) <= WORKSPACE_CAP
    )


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products of all planes and the calls of their blocks, spread over the threads."""
    return column_sums.predicted(*_tiling(problem, device), problem, device)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    tiling, threads = _tiling(problem, device)
    return threads * tiling.scratch + _shared(problem, tiling)


def _bands(problem: ConvProblem, tiling: Tiling) -> int:
    """Bytes of both bands of all filters."""
    down = tiling.band * tiling.h.reads(tiling.band)
    across = (_STRIP + tiling.w.filter - 1) * _STRIP
    return sum(rounded(tiling.itemsize * problem.out_channels * n) for n in (down, across))


def _shared(problem: ConvProblem, tiling: Tiling) -> int:
    """Bytes that all workers read."""
    return _bands(problem, tiling) + column_sums.shared_scratch(problem, tiling)


def run(
    plan: Plan,
    dtype: np.dtype[Any],
    x: HostArray,
    w: HostArray,
    bias: HostArray | None,
    out: HostArray,
    factors: separable.Factors,
) -> None:
    """Compute in `dtype`, with the filters' factors; w is in the order of a correlation."""
    problem = plan.problem
    tiling, threads = _tiling(problem, plan.device)
    threads = column_sums.usable(threads, tiling, x)
    with arena(threads * tiling.scratch + _shared(problem, tiling)) as memory:
        call = _Call(problem, tiling, dtype, memory, x, w, bias, out, factors)
        pieces = [memory.take(tiling.scratch, _BYTE) for _ in range(threads)]
        blocks = column_sums.blocks_of(tiling, x.shape[0], problem.in_channels)
        column_sums.run_all([_Worker(call, piece) for piece in pieces], blocks)
        if call.spoilt:
            again = call.again()
            rows = planes.spans(tiling.h.outputs, again.tiling.rows)
            blocks = [
                ((c, c + 1), (n, n + 1), some) for n, c in sorted(call.spoilt) for some in rows
            ]
            column_sums.run_all([Worker(again, piece) for piece in pieces], blocks)


class _Call(Call):
    """The arrays of one call, and the bands of its filters."""

    tiling: Passes

    def __init__(
        self,
        problem: ConvProblem,
        tiling: Passes,
        dtype: np.dtype[Any],
        memory: Arena,
        x: HostArray,
        w: HostArray,
        bias: HostArray | None,
        out: HostArray,
        factors: separable.Factors,
    ) -> None:
        taps, ones = column_sums.weights(tiling, w, memory, dtype)
        super().__init__(problem, tiling, taps, ones, x, bias, out)
        self._problem = problem
        self.spoilt: set[tuple[int, int]] = set()  # images and channels that have a NaN
        scratch = Scratch(memory.take(_bands(problem, tiling), _BYTE))
        band, taken = tiling.band, tiling.h.reads(tiling.band)
        self.down = scratch.take((*factors.u.shape[:2], band, taken), dtype)
        self.down.fill(0)
        for b in range(band):
            self.down[:, :, b, b : b + tiling.h.filter] = factors.u
        self.across = separable.band(factors.v, 1, _STRIP, scratch, dtype)

    def again(self) -> Call:
        """The same as a sum of columns."""
        assert self.tiling.exact is not None
        return Call(
            self._problem, self.tiling.exact, self.taps, self.ones, self.x, self.bias, self.out
        )


class _Worker(Worker):
    """Both passes, in one worker's scratch memory."""

    call: _Call

    def __init__(self, call: _Call, memory: HostArray) -> None:
        super().__init__(call, memory)
        t = call.tiling
        images, channels, multiplier, rows = t.sums_shape[:4]
        n_, c_, m_, h_, _, size = self.sums.strides
        count, width = t.w.outputs // _STRIP, _STRIP + t.w.filter - 1
        start = (t.first - t.before) * size
        self.strips: HostArray = np.ndarray(
            (images, channels, multiplier, count, rows, width),
            call.dtype,
            self.sums,
            start,
            (n_, c_, m_, _STRIP * size, h_, size),
        )
        left = t.w.outputs % _STRIP
        self.rest = self.padded[..., 0, t.w.outputs - left : t.w.outputs + t.w.filter - 1]

    def compute(
        self, channels: tuple[int, int], images: tuple[int, int], rows: tuple[int, int]
    ) -> None:
        call = self.call
        here = slice(*images), slice(*channels)
        block = self.block(channels, images, rows)
        self._down(call.down[here[1]][:, :, None], self.windows(here, block, rows), block)
        self.repeat(here, block)
        totals = self.totals(here, rows)
        self._across(call.across[here[1]], block, totals[..., 0, :])
        if not call.exact and np.isnan(totals.max()):
            for n, c in itertools.product(range(*images), range(*channels)):
                if np.isnan(totals[n - images[0], c - channels[0]].max()):
                    call.spoilt.add((n, c))
        self.store(totals, here, rows)

    def _down(self, band: HostArray, windows: HostArray, block: Region) -> None:
        """The first pass, some rows of outputs at a time; the last of them may be made twice."""
        t = self.call.tiling
        lines = self.inside[block][..., 0, :]
        *lead, rows, width = lines.shape
        each = t.band
        if rows < each:
            reads = t.h.reads(rows)
            np.matmul(
                band[..., :rows, :reads], windows[..., :1, :reads, :], out=lines[..., None, :, :]
            )
            return
        whole = rows // each * each
        np.matmul(
            band,
            windows[..., : whole - each + 1 : each, :, :],
            out=lines[..., :whole, :].reshape(*lead, whole // each, each, width),
        )
        if whole < rows:
            np.matmul(
                band,
                windows[..., rows - each :, :, :],
                out=lines[..., None, rows - each :, :],
            )

    def _across(self, band: HostArray, block: Region, totals: HostArray) -> None:
        """The second pass: totals (images, channels, multiplier, rows, columns)."""
        images, channels, multiplier, rows = block
        *lead, height, width = totals.shape
        count, left = divmod(width, _STRIP)
        if count:
            split = totals[..., : width - left].reshape(*lead, height, count, _STRIP)
            strips = self.strips[images, channels, multiplier, :, rows]
            np.matmul(strips, band[:, :, None], out=split.swapaxes(3, 4))
        if left:
            taken = left + self.call.tiling.w.filter - 1
            np.matmul(self.rest[block], band[..., :taken, :left], out=totals[..., width - left :])
