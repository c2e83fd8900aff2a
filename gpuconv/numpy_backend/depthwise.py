"""Depthwise convolution, tap by tap: multiply a shifted block by a weight, and add.

    y[n, c*M + m, p] = sum over r of  x[n, c, stride*p + dilation*r - pad] * w[c*M + m, r]

for one to three axes and any channel multiplier M = K/C. A block of the input is brought, padded
and converted, into scratch memory that stays in the cache; each tap is one product and one sum over
all outputs of the block, written into reused buffers. The innermost loop runs along the axis that
is contiguous in the caller's memory: a row's columns, or channels where they come last.

Nothing but the window's own elements is touched, so NaN and Inf stay where they belong, and 64-bit
integers add up modulo 2^64: this is what ``filter2d`` and ``fft`` fall back to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import planes
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_CACHED = 384 << 10  # bytes of a worker's scratch memory that stay in its core's cache
_BUFFERS = 14 << 10  # elements of the buffers that NumPy's products of views use
_INLINE = 150e-6  # seconds of work below which waking threads costs more than it saves


@dataclass(frozen=True)
class Tiling:
    """How one class of outputs is cut into blocks."""

    axes: tuple[Axis, Axis, Axis]
    multiplier: int
    itemsize: int
    channels_last: bool
    rows: int
    columns: int
    channels: int = 1
    images: int = 1

    def block_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        d, h, w = self.axes
        return d.filter, h.reads(rows), w.reads(columns)

    @property
    def taps(self) -> int:
        return math.prod(axis.filter for axis in self.axes)

    @property
    def outputs(self) -> int:
        """Of a block."""
        return self.images * self.channels * self.multiplier * self.rows * self.columns

    @property
    def memory(self) -> int:
        """Bytes of one worker, with what NumPy's own loops take."""
        return self.scratch + _BUFFERS * self.itemsize

    @property
    def scratch(self) -> int:
        """Bytes of one worker: the block, sums, products and weights."""
        block = self.images * self.channels * math.prod(self.block_shape(self.rows, self.columns))
        weights = self.channels * self.multiplier * self.taps
        pieces = (block, self.outputs, self.outputs, weights)
        return sum(rounded(self.itemsize * piece) for piece in pieces)

    def seconds(self, problem: ConvProblem, device: Cpu) -> float:
        """Predicted time of one image on one thread.

        Per tap and block two calls; per run of contiguous elements a few nanoseconds; per element
        two passes through the caches.
        """
        outputs = problem.out_channels * math.prod(axis.outputs for axis in self.axes)
        inner = self.channels if self.channels_last else self.columns
        element = self.itemsize / (2.5 * device.copy_bytes)
        if problem.accumulator.is_exact:
            element *= 4
        elif problem.accumulator.is_complex:
            element *= 2
        calls = outputs / self.outputs * self.images
        per_tap = calls * 2 * device.call_seconds * 0.5 + outputs * (25e-9 / inner + 2.5 * element)
        read = problem.in_channels * math.prod(axis.reads(axis.outputs) for axis in self.axes)
        return self.taps * per_tap + calls * 10 * device.call_seconds + 4 * read * element


@lru_cache(maxsize=1024)
def tilings(problem: ConvProblem, device: Cpu) -> tuple[Tiling, ...]:
    """One per class of the dilation; they do not depend on the batch, as bits would then."""
    limit = WORKSPACE_CAP if problem.workspace_limit is None else problem.workspace_limit
    limit = (min(limit, WORKSPACE_CAP) - ALIGN) // device.threads
    return tuple(
        _fit(axes, problem, device, min(limit, _CACHED)) for axes in planes.classes(problem)
    )


def _fit(axes: tuple[Axis, Axis, Axis], problem: ConvProblem, device: Cpu, limit: int) -> Tiling:
    rows, columns = axes[1].outputs, axes[2].outputs
    size = problem.accumulator.itemsize
    last = problem.channels_last and problem.in_channels > 1
    tiling = Tiling(axes, problem.group_out_channels, size, last, rows, columns)
    if last:
        tiling = replace(tiling, channels=problem.in_channels)
    while tiling.memory > limit and tiling.rows > 1:
        tiling = replace(tiling, rows=-(-tiling.rows // 2))
    while tiling.memory > limit and tiling.columns > 64:
        tiling = replace(tiling, columns=-(-tiling.columns // 2))
    while tiling.memory > limit and tiling.channels > 1:
        tiling = replace(tiling, channels=-(-tiling.channels // 2))
    while tiling.memory > limit and tiling.columns > 1:
        tiling = replace(tiling, columns=-(-tiling.columns // 2))
    if (tiling.rows, tiling.columns) != (rows, columns):
        return tiling
    while tiling.channels < problem.in_channels:
        wider = replace(tiling, channels=min(2 * tiling.channels, problem.in_channels))
        if wider.memory > limit:
            return tiling
        tiling = wider
    while tiling.images < problem.batch:
        more = replace(tiling, images=2 * tiling.images)
        if more.memory > limit:
            break
        tiling = more
    return tiling


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"{problem.operation} is not what it computes")
    if not problem.depthwise:
        return No(f"each output channel sees {problem.group_in_channels} input channels, not one")
    if 0 in problem.x_shape or 0 in problem.y_shape:
        return No("x or the result is empty")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """Two passes through the caches per tap, spread over the threads."""
    total = problem.batch * sum(t.seconds(problem, device) for t in tilings(problem, device))
    if total <= _INLINE:
        return total + 10e-6
    return total / device.threads + 60e-6


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return device.threads * max(t.memory for t in tilings(problem, device)) + ALIGN


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem, device = plan.problem, plan.device
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    w = planes.by_plane(problem, w)
    x, out = planes.lift(x), planes.lift(out)
    for tiling in tilings(problem, device):
        small = x.shape[0] * tiling.seconds(problem, device) < _INLINE
        threads = 1 if small else device.threads
        workers: list[_Worker] = []

        def block(
            where: tuple[Any, ...],
            index: int,
            t: Tiling = tiling,
            workers: list[_Worker] = workers,
        ) -> None:
            channels, images, z, rows, columns = where
            d, h, across = t.axes
            outs = slice(channels[0] * t.multiplier, channels[1] * t.multiplier)
            ins = slice(*images), slice(*channels)
            workers[index].compute(
                x[ins],
                w[ins[1]],
                (z * d.stride, rows[0] * h.stride, columns[0] * across.stride),
                None if bias is None else bias[outs],
                out[ins[0], outs, d.out(z, z + 1), h.out(*rows), across.out(*columns)],
            )

        d, h, across = tiling.axes
        blocks = planes.Grid(
            planes.spans(problem.in_channels, tiling.channels),
            planes.spans(x.shape[0], tiling.images),
            range(d.outputs),
            planes.spans(h.outputs, tiling.rows),
            planes.spans(across.outputs, tiling.columns),
        )
        with arena(threads * tiling.scratch + ALIGN) as memory:
            for _ in range(threads):
                piece = memory.take(tiling.scratch, np.dtype(np.uint8))
                workers.append(_Worker(tiling, problem.accumulator.numpy, piece))
            run_blocks(threads, blocks, block)


class _Worker:
    """One worker's scratch memory."""

    def __init__(self, tiling: Tiling, dtype: np.dtype[Any], memory: HostArray) -> None:
        self.tiling, self.dtype = tiling, dtype
        self.scratch = Scratch(memory)

    def _take(self, images: int, channels: int, *rest: int) -> HostArray:
        """Scratch (images, channels, ...), whose memory runs as the caller's does."""
        if not self.tiling.channels_last:
            return self.scratch.take((images, channels, *rest), self.dtype)
        last = self.scratch.take((images, *rest, channels), self.dtype)
        return last.transpose(0, last.ndim - 1, *range(1, last.ndim - 1))

    def compute(
        self,
        x: HostArray,
        w: HostArray,
        starts: tuple[int, int, int],
        bias: HostArray | None,
        out: HostArray,
    ) -> None:
        t = self.tiling
        self.scratch.free()
        images, channels = x.shape[:2]
        rows, columns = out.shape[3:]
        block = self._take(images, channels, *t.block_shape(rows, columns))
        sums = self._take(images, channels, t.multiplier, 1, rows, columns)
        products = self._take(images, channels, t.multiplier, 1, rows, columns)
        weights = self._take(1, *w.shape)[0]
        np.copyto(weights, w, casting="unsafe")
        planes.read(block, x, t.axes, starts)
        planes.direct_sum(sums, block, weights, t.axes, products)
        planes.store(out, sums, bias, exact=False)
