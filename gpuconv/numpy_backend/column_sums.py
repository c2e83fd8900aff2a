"""Pictures under 2-D filters: each column of the filter in one product, their sums in another.

    sums[p, s, j] = sum over r of  w[r, s] x[p + r, j]
    y[p, q]       = sum over s of  sums[p, s, q + s]

The R rows that a row of windows reads are a matrix in x itself, whose rows lie as far apart as x's:
with the filter's columns, (S, R), it makes a row of all sums, and nothing of x is copied. Those
that belong to a row of y start one element later with every s. They too are a matrix as it is, of
rows that lie one element farther apart than the sums', and a row of ones by it is their total.

No product is in vain, so that a NaN or Inf of x stays in the windows that hold it, and each row of
outputs is computed as it would be alone: no bit depends on the blocks.

What lies beyond the picture: rows of it are laid out around a copy of the few rows at the edge.
Columns of it need not be multiplied: their sums are those of the columns that they repeat, or zero.

Elements that are summed in another type are converted block by block. Filters that turn out to have
rank 1 are left to ``filter2d`` where two passes are much faster. Integers are summed in floating
point where their magnitudes prove that exact, else by ``depthwise``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import depthwise, filter2d, planes, separable
from gpuconv.numpy_backend.device import VECTOR, WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis, Piece, Region, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

Block = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # channels, images, rows

_BYTE = np.dtype(np.uint8)
_ALIASED = 4096  # bytes apart, two lines share a place in the nearest cache
_CACHED = 3 << 18  # bytes of a block that stay in a core's cache,
_SHARED = 5 << 18  # and where threads would rather wait for memory than for each other's calls
_INLINE = 1.2e-3  # seconds of work below which waking threads costs more than it saves
_PASSES = 0.7  # of the time of the products
_CALL = 40e-6  # seconds until the first block,
_BLOCK = 6e-6  # those of the calls of a block,
_HANDOVER = 10e-6  # and that threads wait for each other in them
_START = 300e-6  # seconds until all threads work, and until the last is done
_ROW = 0.05e-6  # seconds to start the two products of a row,
_LINE = 8e-9  # and for each row of sums
_SHORT_ROWS = 256  # columns: of shorter rows, x and y take their whole way through memory,
_FAR = 1.5  # and longer than a copy, where threads share it
_PRODUCT, _SUM, _STORE = 0.0145e-9, 0.065e-9, 0.35e-9  # of each product, sum, output in float32
_COPY = 0.15e-9  # seconds per float32 that is copied,
_CONVERTED = 2e-9  # and per element that changes its type


@dataclass(frozen=True)
class Tiling:
    """How the outputs are cut into blocks."""

    h: Axis
    w: Axis
    width: int  # columns of x
    before: int  # columns beyond it, before the first and after the last
    after: int
    multiplier: int  # output channels per plane
    itemsize: int
    converted: bool  # x is of another type than the sums
    lines: int  # rows of sums for a row of outputs
    band: int  # rows of outputs whose sums are one product
    rows: int  # of outputs in a block, and so on
    channels: int = 1
    images: int = 1

    @cached_property
    def first(self) -> int:
        """Where the sums of x's first column lie in a row of sums: aligned."""
        vector = VECTOR // self.itemsize
        return -(-self.before // vector) * vector

    @cached_property
    def pitch(self) -> int:
        """Elements between two rows of sums."""
        vector = VECTOR // self.itemsize
        pitch = -(-(self.first + self.width + self.after) // vector) * vector
        return pitch if pitch * self.itemsize % _ALIASED else pitch + vector

    @cached_property
    def reads(self) -> int:
        return self.h.reads(self.rows)

    @cached_property
    def sums_shape(self) -> tuple[int, ...]:
        return (
            self.images, self.channels, self.multiplier, self.rows, self.lines, self.pitch,
        )  # fmt: skip

    @cached_property
    def edges(self) -> list[Piece]:
        """What lies before and after x in a row of sums, and the sums that it repeats."""
        lead, stop = self.first - self.before, self.before + self.width
        return [
            (slice(lead + here.start, lead + here.stop), source)
            for here, source in self.w.pieces(0, self.w.reads(self.w.outputs))
            if (here.start, here.stop) != (self.before, stop)
        ]

    @cached_property
    def sums(self) -> int:
        """Bytes of one worker's sums."""
        return rounded(self.itemsize * math.prod(self.sums_shape))

    @cached_property
    def results(self) -> int:
        """Bytes of one worker's results."""
        each = self.images * self.channels * self.multiplier
        return rounded(self.itemsize * each * self.rows * self.w.outputs)

    @cached_property
    def touched(self) -> int:
        """Bytes that a block reads and writes: rows of x, its sums and results."""
        each = self.images * self.channels
        return self.sums + self.results + rounded(self.itemsize * each * self.reads * self.width)

    @cached_property
    def own(self) -> int:
        """The same, and the results as integers."""
        return self.touched + self.results

    @property
    def scratch(self) -> int:
        """Bytes of one worker."""
        return self.own

    @cached_property
    def copying(self) -> float:
        """Predicted time to copy a plane, where it cannot be read as it is."""
        elements = self.h.reads(self.h.outputs) * self.width
        if self.converted:
            return elements * _CONVERTED
        return elements * _COPY * self.itemsize / 4 if self.rows == self.h.outputs else 0.0

    @cached_property
    def seconds(self) -> float:
        """Predicted time of one plane of one image, on one thread, but for its blocks' calls."""
        size = self.itemsize / 4
        outputs = self.multiplier * self.h.outputs
        products = outputs * self.width * self.h.filter * self.w.filter
        sums = outputs * self.w.outputs * self.w.filter
        total = size * (products * _PRODUCT + sums * _SUM + outputs * self.w.outputs * _STORE)
        return total + outputs * (_ROW + self.lines * _LINE) + self.copying

    def calls(self, batch: int, channels: int) -> int:
        """Blocks."""
        groups = -(-batch // self.images) * -(-channels // self.channels)
        return groups * -(-self.h.outputs // self.rows)


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> tuple[Tiling, int]:
    return fitted(whole(problem), problem, device)


def _lines(w: Axis) -> int:
    """Rows of sums: BLAS makes 8 in less time than 7."""
    return w.filter + (w.filter % 8 == 7)


def whole(problem: ConvProblem) -> Tiling:
    """One block for a plane."""
    _, h, w = planes.classes(problem)[0]
    return Tiling(
        h, w, problem.input[1], problem.pad_lo[1], problem.pad_hi[1], problem.group_out_channels,
        problem.accumulator.itemsize, problem.x_dtype is not problem.accumulator, _lines(w), 1,
        h.outputs,
    )  # fmt: skip


AnyTiling = TypeVar("AnyTiling", bound=Tiling)


def fitted(start: AnyTiling, problem: ConvProblem, device: Cpu) -> tuple[AnyTiling, int]:
    """The tiling in blocks for the cache, and how many threads take them.

    No bit depends on either.
    """
    outputs = start.h.outputs
    shared = problem.batch * problem.in_channels * start.seconds > _INLINE
    threads = device.threads if shared else 1
    limit = (problem.workspace_within(WORKSPACE_CAP) - ALIGN) // threads
    best = start
    cached = _SHARED if shared else _CACHED
    while best.rows > best.band and (best.touched > cached or best.scratch > limit):
        best = replace(best, rows=max(best.rows * 3 // 4, best.band))
    pieces = -(-outputs // best.rows)
    if problem.batch * problem.in_channels < threads:  # a piece for everyone
        pieces = min(-(-pieces // threads) * threads, outputs)
    rows = -(-outputs // pieces)
    best = replace(best, rows=min(-(-rows // best.band) * best.band, best.rows))
    if pieces == 1:
        channels = problem.in_channels
        most = -(-channels // threads) if problem.batch < threads else channels
        share = -(-problem.batch // threads)
        best = planes.grown(best, channels, most, share, min(_CACHED, limit))
    return best, threads


@lru_cache(maxsize=64)  # few: thousands of blocks are some hundred kilobytes
def blocks_of(tiling: Tiling, images: int, channels: int) -> list[Block]:
    return list(
        itertools.product(
            planes.spans(channels, tiling.channels),
            planes.spans(images, tiling.images),
            planes.spans(tiling.h.outputs, tiling.rows),
        )
    )


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    verdict = takes(problem)
    if verdict and workspace(problem, device) > WORKSPACE_CAP:
        return No("a row of sums does not fit in the workspace")
    return verdict


def takes(problem: ConvProblem) -> bool | No:
    """Whether x's rows are matrices for it."""
    if problem.operation != "fprop":
        return No(f"{problem.operation} is not what it computes")
    if problem.ndim != 2 or not problem.depthwise:
        return No("it takes planes, each under 2-D filters of its own")
    if set(problem.stride) | set(problem.dilation) != {1}:
        return No("its outputs are neighbours, and so is what they read")
    if problem.accumulator.is_complex:
        return No("it sums real numbers")
    if problem.channels_last and problem.in_channels > 1:
        return No("channels come last: a row's elements lie apart")
    if reason := planes.scattered(problem):
        return No(reason)
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products of all planes and the calls of their blocks, spread over the threads."""
    return predicted(*_tiling(problem, device), problem, device)


def predicted(tiling: Tiling, threads: int, problem: ConvProblem, device: Cpu) -> float:
    calls = tiling.calls(problem.batch, problem.in_channels)
    work = problem.batch * problem.in_channels * tiling.seconds
    if problem.y_dtype is not problem.accumulator:
        work += math.prod(problem.y_shape) * _CONVERTED
    if threads == 1:
        return _CALL + work + calls * _BLOCK
    memory = problem.bytes_moved / device.memory_bytes
    work += calls * (_BLOCK + _HANDOVER)
    return work / threads + _START + memory * (_FAR if tiling.width < _SHORT_ROWS else 0.5)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    tiling, threads = _tiling(problem, device)
    own = threads * tiling.scratch + shared_scratch(problem, tiling)
    if problem.accumulator.is_exact:  # the filters' magnitudes too
        own = max(own, depthwise.workspace(problem, device)) + 16 * math.prod(problem.w_shape)
    elif _has_other(problem, device):
        own = max(own, filter2d.workspace(problem, device))
    return own


def shared_scratch(problem: ConvProblem, tiling: Tiling) -> int:
    """Bytes that all workers read: the filters, and a row of ones."""
    sizes = problem.out_channels * _lines(tiling.w) * tiling.h.filter, tiling.w.filter
    return ALIGN + sum(rounded(tiling.itemsize * count) for count in sizes)


@lru_cache(maxsize=1024)
def _has_other(problem: ConvProblem, device: Cpu) -> bool:
    """Whether filters that turn out to have rank 1 are worth two passes, which filter2d makes."""
    return (
        not problem.accumulator.is_exact
        and separable.possible(problem)
        and filter2d.fits(problem, device)
        and separable.cost(problem, device) < _PASSES * cost(problem, device)
    )


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem, device = plan.problem, plan.device
    if _has_other(problem, device):
        factors = separable.factors(problem, w)
        if factors is not None:
            filter2d.apply(plan, x, w, bias, out, factors)
            return
    dtype: np.dtype[Any] | None = problem.accumulator.numpy
    if problem.accumulator.is_exact:
        dtype = planes.exact_dtype(x, w, problem.x_dtype)
        if dtype is None:
            depthwise.run(plan, x, w, bias, out)
            return
    assert dtype is not None
    tiling, threads = _tiling(problem, device)
    if problem.flip:
        w = w[:, :, ::-1, ::-1]
    threads = usable(threads, tiling, x)
    with arena(threads * tiling.scratch + shared_scratch(problem, tiling)) as memory:
        taps, ones = weights(tiling, w, memory, dtype)
        call = Call(problem, tiling, taps, ones, x, bias, out)
        workers = [Worker(call, memory.take(tiling.scratch, _BYTE)) for _ in range(threads)]
        run_all(workers, blocks_of(tiling, x.shape[0], problem.in_channels))


def usable(threads: int, tiling: Tiling, x: HostArray) -> int:
    """How many of the planned threads a call's batch is worth."""
    return threads if x.shape[0] * x.shape[1] * tiling.seconds > _INLINE else 1


def run_all(workers: Sequence[Worker], blocks: Sequence[Block]) -> None:
    """Compute all blocks."""

    def block(where: Block, index: int) -> None:
        workers[index].compute(*where)

    run_blocks(len(workers), blocks, block)


def weights(
    tiling: Tiling, w: HostArray, memory: Arena, dtype: np.dtype[Any]
) -> tuple[HostArray, HostArray]:
    """The filters' columns, (C, multiplier, 1, lines, R), and a row of ones, (1, S)."""
    rows, columns = w.shape[2:]
    shape = -1, tiling.multiplier, 1, _lines(tiling.w), rows
    taps = memory.take(len(w) * shape[3] * rows, dtype).reshape(shape)
    taps[:, :, :, columns:] = 0  # no result sees these sums
    there = w.reshape(-1, tiling.multiplier, 1, rows, columns).swapaxes(3, 4)
    np.copyto(taps[:, :, :, :columns], there, casting="unsafe")
    ones = memory.take(columns, dtype).reshape(1, -1)
    ones.fill(1)
    return taps, ones


class Call:
    """The arrays of one call, as all of its blocks see them."""

    def __init__(
        self,
        problem: ConvProblem,
        tiling: Tiling,
        taps: HostArray,
        ones: HostArray,
        x: HostArray,
        bias: HostArray | None,
        out: HostArray,
    ) -> None:
        h, w = tiling.h, tiling.w
        self.tiling, self.dtype, self.taps, self.ones = tiling, taps.dtype, taps, ones
        self.x, self.bias, self.out = x, bias, out
        self.exact = problem.accumulator.is_exact
        self.holds = planes.integers_hold(problem, self.dtype)
        self.before = problem.pad_lo[0]
        reads = h.reads(tiling.band)
        self.last = x.shape[2] - reads  # the last row of x at which windows of x alone start
        self.windows: HostArray | None = None  # (N, C, 1, rows, those that a product reads, W)
        if _is_operand(x, self.dtype) and self.last >= 0:
            n_, c_, h_, w_ = x.strides
            shape = (*x.shape[:2], 1, self.last + 1, reads, x.shape[3])
            strides = n_, c_, 0, h_, h_, w_
            # The shorter way takes contiguous memory.
            if x.flags.c_contiguous:
                self.windows = np.ndarray(shape, x.dtype, x, 0, strides)
            else:
                self.windows = as_strided(x, shape, strides)
        self.totals: HostArray | None = None  # (N, C, multiplier, P, 1, Q)
        if _is_operand(out, self.dtype) and bias is None:
            shape = x.shape[0], x.shape[1], tiling.multiplier, h.outputs, 1, w.outputs
            self.totals = out.reshape(shape)
        # Under a filter that is not finite, zeros are worth NaN.
        self.zeros: HostArray | None = None
        if not np.isfinite(taps).all():
            self.zeros = (taps * 0).sum(axis=4)[..., None]


def _is_operand(array: HostArray, dtype: np.dtype[Any]) -> bool:
    """Whether BLAS takes rows of its planes as they are."""
    row, size = array.strides[2], dtype.itemsize
    return (
        array.dtype == dtype
        and array.flags.aligned
        and array.strides[3] == size
        and row >= array.shape[3] * size
        and row % size == 0
    )


class Worker:
    """One worker's scratch memory, laid out for the largest block."""

    def __init__(self, call: Call, memory: HostArray) -> None:
        self.call = call
        t, dtype = call.tiling, call.dtype
        self.scratch = Scratch(memory)
        self.sums = self.scratch.take(t.sums_shape, dtype)
        self.inside = self.sums[..., t.first : t.first + t.width]
        self.edges = [(self.sums[..., here], source) for here, source in t.edges]
        for edge, source in self.edges:
            if source is None:
                edge.fill(0)  # no block changes it
        # Padded, and each line one further than the last.
        *strides, line, size = self.sums.strides
        start = (t.first - t.before) * size
        self.padded = self.sums[..., t.first - t.before :]
        shape = *t.sums_shape[:-2], min(t.lines, t.w.filter), t.w.outputs
        self.shifted: HostArray = np.ndarray(
            shape, dtype, self.sums, start, (*strides, line + size, size)
        )
        self.rows = self.scratch.take((t.images, t.channels, t.reads, t.width), dtype)
        n_, c_, h_, w_ = self.rows.strides
        shape = t.images, t.channels, 1, t.rows - t.band + 1, t.h.reads(t.band), t.width
        self.copies: HostArray = np.ndarray(shape, dtype, self.rows, 0, (n_, c_, 0, h_, h_, w_))
        self.kept = self.scratch.mark()

    def compute(
        self, channels: tuple[int, int], images: tuple[int, int], rows: tuple[int, int]
    ) -> None:
        """All outputs of some rows."""
        here = slice(*images), slice(*channels)
        block = self.block(channels, images, rows)
        inside = self.inside[block]
        np.matmul(self.call.taps[here[1]], self.windows(here, block, rows), out=inside)
        self.repeat(here, block)
        totals = self.totals(here, rows)
        np.matmul(self.call.ones, self.shifted[block], out=totals)
        self.store(totals, here, rows)

    def block(
        self, channels: tuple[int, int], images: tuple[int, int], rows: tuple[int, int]
    ) -> Region:
        """Where a block's sums lie."""
        return (
            slice(images[1] - images[0]), slice(channels[1] - channels[0]), slice(None),
            slice(rows[1] - rows[0]),
        )  # fmt: skip

    def windows(self, here: Region, block: Region, rows: tuple[int, int]) -> HostArray:
        """What each row of a block reads: of x itself, or of a copy with what lies beyond it."""
        call, band = self.call, self.call.tiling.band
        start, stop = rows[0] - call.before, rows[1] - call.before - band + 1
        if call.windows is not None and 0 <= start < stop <= call.last + 1:
            return call.windows[(*here, slice(None), slice(start, stop))]
        x, h = call.x[here], call.tiling.h
        copy = self.rows[block[:2]]
        for there, source in h.pieces(rows[0], h.reads(rows[1] - rows[0])):
            copy[:, :, there] = 0 if source is None else x[:, :, source]
        return self.copies[(*block[:3], slice(max(stop - start, 1)))]

    def repeat(self, here: Region, block: Region) -> None:
        """The sums of columns beyond x."""
        inside = self.inside[block]
        for edge, source in self.edges:
            if source is not None:
                edge[block] = inside[..., source]
            elif self.call.zeros is not None:
                edge[block] = self.call.zeros[here[1]]

    def totals(self, here: Region, rows: tuple[int, int]) -> HostArray:
        """Where a block's results go: to the caller's memory where that is of their type."""
        call = self.call
        if call.totals is not None:
            return call.totals[(*here, slice(None), slice(*rows))]
        t = call.tiling
        self.scratch.free(self.kept)
        images, channels = (part.stop - part.start for part in here)
        shape = images, channels, t.multiplier, rows[1] - rows[0], 1, t.w.outputs
        return self.scratch.take(shape, call.dtype)

    def store(self, totals: HostArray, here: Region, rows: tuple[int, int]) -> None:
        """Write a block's results to the caller's memory where they are not there."""
        call, multiplier = self.call, self.call.tiling.multiplier
        if call.totals is not None:
            return
        outs = slice(here[1].start * multiplier, here[1].stop * multiplier)
        planes.store(
            call.out[here[0], outs, slice(*rows)],
            totals.swapaxes(3, 4),
            None if call.bias is None else call.bias[outs],
            call.exact,
            self.scratch if call.holds else None,
        )
