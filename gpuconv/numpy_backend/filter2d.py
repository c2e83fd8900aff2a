"""Planes, each under 2-D filters of its own, as products with small banded (Toeplitz) matrices.

B neighbouring outputs of a row read L = (B-1)*stride + S neighbouring inputs of each of R rows.
With those R*L inputs in one row of a matrix A, and the filter laid out as a band,

    y[p, B*j + b] = sum over r, l of  A[(p, j), (r, l)] * band[(r, l), b]
    band[(r, stride*b + s), b] = w[r, s],  0 elsewhere

a whole block of outputs is one matrix product. It multiplies (L/S) times as often as needed, mostly
by zeros, and is still far faster than a sum tap by tap, because BLAS does it. A is never an im2col:
rows of the input are cut into overlapping strips,

    strips[j, row] = x[row, B*stride*j : B*stride*j + L]

so that the R rows below each other that a window reads are one contiguous piece of R*L elements.
A product's rows are then (BLAS wants them at least R*L elements apart)

    "phases"  every m-th output row of a strip, one product per phase, m*stride >= R
    "copies"  the output rows of a strip, its rows copied R times: the smallest planes

Wide planes are faster in ``column_sums``, which copies nothing, where outputs are neighbours, and
under the bands of ``depthwise``, which run along the rows, where they are not.

Filters of rank 1 are applied in two "passes" instead, without strips: see ``separable``, and
``two_passes`` where outputs are neighbours.

A band's zeros would carry a NaN or Inf of x to other outputs of its strip (0 * inf = nan). It
shows: an image's block that comes out with a NaN is summed again, tap by tap.
Integers are summed in floating point where their magnitudes prove that exact, else by
``depthwise``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import depthwise, planes, separable
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

Order = Literal["phases", "copies", "passes"]

_STRIP = 16  # outputs of a strip: one vector register of float32
_PACKED = 1_000_000  # multiplications from which BLAS packs the operands of a product
_CACHED = 1 << 20  # bytes of a worker's scratch memory that stay in its core's own cache
_MOST = 8 << 20  # bytes of it that pay: beyond, no call becomes cheaper
_UNCACHED = 1.1  # how much longer everything takes outside of that cache
_INLINE = 150e-6  # seconds of work below which waking threads costs more than it saves
_TRANSPOSED = 8  # bytes of a contiguous copy that take as long as one element of a strided one
_BLOCK = 30e-6  # seconds that the calls of a block take
_ROW = 20e-9  # seconds to start a row of a block, where it is read and where it is written
_SHARED = 200e-6  # the same where threads wait for each other's calls, and wake too late
_BAND = 64 << 10  # bytes up to which a band is read again from the nearest caches,
_NEAR = 1.33  # and how much faster its products are
_PRODUCT = 0.05e-6  # seconds to start one of a batch of matrix products


@dataclass(frozen=True)
class Tiling:
    """How one class of outputs is cut into blocks, and a block into matrix products."""

    axes: tuple[Axis, Axis, Axis]
    device: Cpu
    multiplier: int  # output channels per plane
    itemsize: int
    shared: bool  # several threads take blocks
    channels_last: bool
    order: Order
    strip: int  # outputs of one strip
    rows: int  # of outputs in a block, and so on
    columns: int
    channels: int = 1
    images: int = 1

    @cached_property
    def strip_reads(self) -> int:
        """L."""
        return self.axes[2].reads(self.strip)

    @cached_property
    def phases(self) -> int:
        return -(-self.axes[1].filter // self.axes[1].stride) if self.order == "phases" else 1

    @cached_property
    def depth(self) -> int:
        """Elements of the window that lie in one strip."""
        return self.axes[0].filter * self.axes[1].filter * self.strip_reads

    def strips(self, columns: int) -> int:
        return -(-columns // self.strip)

    def padded_rows(self, rows: int) -> int:
        """Output rows that are computed, the last of them perhaps in vain."""
        if self.order == "passes":
            return separable.padded_rows(rows)
        return -(-rows // self.phases) * self.phases

    def strip_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """(strips, rows, depth, columns) of a plane, or (strips, rows, R, depth, columns)."""
        d, h, _ = self.axes
        strips, length = self.strips(columns), self.strip_reads
        if self.order == "copies":
            return strips, rows, h.filter, d.filter, length
        return strips, h.reads(self.padded_rows(rows)), d.filter, length

    def block_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """(depth, rows, columns) of the padded input that a block reads."""
        d, h, w = self.axes
        width = self.strips(columns) * self.strip
        return d.filter, h.reads(self.padded_rows(rows)), w.reads(width)

    @cached_property
    def band_shape(self) -> tuple[int, ...]:
        d, h, _ = self.axes
        return (
            self.channels, self.multiplier, h.filter, d.filter, self.strip_reads, self.strip,
        )  # fmt: skip

    @cached_property
    def scratch(self) -> int:
        """Bytes of one worker."""
        d, h, w = self.axes
        each = self.images * self.channels
        computed = self.padded_rows(self.rows)
        width = self.strips(self.columns) * self.strip
        sums = each * self.multiplier * computed * width
        if self.order == "passes":
            middle = each * self.multiplier * h.reads(computed) * width
            bands = separable.bands_size(self)
        else:
            middle = each * math.prod(self.strip_shape(self.rows, self.columns))
            bands = math.prod(self.band_shape)
        pieces = (
            each * math.prod(self.block_shape(self.rows, self.columns)),
            sums,
            max(middle, sums),
            self.channels * self.multiplier * d.filter * h.filter * w.filter,
            bands,
        )
        return sum(rounded(self.itemsize * piece) for piece in pieces)

    @cached_property
    def seconds(self) -> float:
        """Predicted time of one plane of one image, on one thread of the `device`.

        Matrix products at the device's rate, less the fewer rows they have; copies at a few
        nanoseconds per contiguous piece and `copy_bytes` per second.
        """
        d, h, w = self.axes
        size, device = self.itemsize, self.device
        strips, computed = self.strips(self.columns), self.padded_rows(self.rows)
        blocks = d.outputs * (h.outputs / self.rows) * (w.outputs / self.columns)
        read = math.prod(self.block_shape(self.rows, self.columns))
        moved = (read + self.multiplier * self.rows * self.columns) * size
        if self.channels_last:  # elements go one by one
            moved += (read + self.multiplier * self.rows * self.columns) * _TRANSPOSED
        overhead = (_SHARED if self.shared else _BLOCK) / (self.channels * self.images)
        slow = 1.0 if self.scratch <= 2 * _CACHED else _UNCACHED
        starts = (math.prod(self.block_shape(self.rows, self.columns)[:2]) + self.rows) * _ROW
        if self.order == "passes":
            flops, moved_too = separable.work(self, computed, strips * self.strip)
            rate = device.gemm_flops * 4 / size
            copied = (moved / 2 + moved_too / 4) / device.copy_bytes
            return blocks * (slow * (flops / rate + copied) + starts + overhead)
        rate = device.gemm_flops * math.sqrt(4 / size)  # strips of wide elements fill more vectors
        height, count = computed, strips
        if self.order == "phases":
            height, count = computed // self.phases, strips * self.phases
        rate *= 1.2 * height / (height + 2)
        if self.depth * self.strip * size <= _BAND:
            rate *= _NEAR
        if height * self.depth * self.strip > _PACKED:
            rate *= 0.7
        wide = -(-self.strip * size // 64) * 64 // size  # part of a vector costs a whole one
        flops = 2 * self.multiplier * count * height * self.depth * wide
        pieces = math.prod(self.strip_shape(self.rows, self.columns)[:-1])
        copied = pieces * self.strip_reads * size
        moving = pieces * 4e-9 + (copied / 4 + moved / 2) / device.copy_bytes
        products = count * self.multiplier * _PRODUCT + flops / rate
        return blocks * (slow * (moving + products) + starts + overhead)


@lru_cache(maxsize=1024)
def tilings(problem: ConvProblem, device: Cpu, passes: bool = False) -> tuple[Tiling, ...]:
    """One per class of the dilation. Nothing that decides bits depends on the batch."""
    limit = (problem.workspace_within(WORKSPACE_CAP) - ALIGN) // device.threads
    orders: tuple[Order, ...] = ("passes",) if passes else ("phases", "copies")
    return tuple(_fit(axes, problem, device, orders, limit) for axes in planes.classes(problem))


def _fit(
    axes: tuple[Axis, Axis, Axis],
    problem: ConvProblem,
    device: Cpu,
    orders: tuple[Order, ...],
    limit: int,
) -> Tiling:
    """The fastest tiling whose scratch memory is worth its size, or at least under `limit`."""
    rows, columns = axes[1].outputs, axes[2].outputs
    strip = -(-columns // -(-columns // _STRIP))
    last = problem.channels_last and problem.in_channels > 1
    start = Tiling(
        axes, device, problem.group_out_channels, problem.accumulator.itemsize, False, last,
        orders[0], strip, rows, columns,
    )  # fmt: skip
    if last:  # a cache line has neighbouring channels: use all of it
        most = max(64 // problem.x_dtype.itemsize, 1)
        start = replace(start, channels=min(most, problem.in_channels))
    best = _fastest(start, orders, limit)
    shared = device.threads > 1 and problem.in_channels * best.seconds > _INLINE
    if shared:
        best = _fastest(replace(start, shared=True), orders, limit)
    # Equal pieces, and enough of them that every thread has some.
    pieces = -(-rows // best.rows)
    if shared and problem.in_channels < device.threads and best.columns == columns:
        pieces = min(-(-pieces // device.threads) * device.threads, rows)
    best = replace(best, rows=-(-rows // pieces))
    if best.rows < rows or best.columns < columns:
        return best
    budget = min(4 * _CACHED if shared else _CACHED, limit)
    most = -(-problem.in_channels // device.threads) if shared else problem.in_channels
    share = -(-problem.batch // (2 * device.threads))
    return planes.grown(best, problem.in_channels, most, share, budget)


def _fastest(start: Tiling, orders: tuple[Order, ...], limit: int) -> Tiling:
    best = start
    for budget, narrow in ((min(_MOST, limit), start.strip), (limit, 1)):
        options = _candidates(start, orders, narrow)
        fitting = [option for option in options if option.scratch <= budget]
        if fitting:
            return min(fitting, key=lambda option: option.seconds)
        best = min(options, key=lambda option: option.scratch)
    return best


def _candidates(start: Tiling, orders: tuple[Order, ...], narrow: int) -> list[Tiling]:
    """Tilings of every order, of strips down to `narrow` outputs."""
    rows, columns = start.rows, start.columns
    return [
        replace(start, order=order, strip=strip, rows=some_rows, columns=some_columns)
        for order in orders
        for strip in _halves(start.strip, narrow)
        for some_rows in _halves(rows, 4 if strip == narrow else 1)
        for some_columns in _halves(columns, 32 * strip if strip == narrow > 1 else strip, strip)
    ]


def _halves(count: int, least: int, unit: int = 1) -> list[int]:
    """`count`, halved until `least` (in multiples of `unit`)."""
    result = [count]
    while result[-1] > least:
        result.append(max(-(-result[-1] // (2 * unit)) * unit, unit))
        if result[-1] == result[-2]:
            result.pop()
            break
    return result


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    verdict = depthwise.supports(problem, device)
    if verdict and not fits(problem, device):
        return No("the strips under so large a filter do not fit in the workspace")
    return verdict


def fits(problem: ConvProblem, device: Cpu) -> bool:
    """Whether the smallest blocks are small enough: under filters of hundreds of rows they grow.

    A limit of the caller's is the plan's to compare.
    """
    return workspace(problem, device) <= WORKSPACE_CAP


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products and copies of all planes, spread over the threads."""
    return predicted(problem, device, tilings(problem, device))


def predicted(problem: ConvProblem, device: Cpu, found: tuple[Tiling, ...]) -> float:
    total = problem.batch * problem.in_channels * sum(t.seconds for t in found)
    memory = problem.bytes_moved / (device.threads * device.copy_bytes)
    if total <= _INLINE:
        return total + 10e-6
    return total / device.threads + memory / 2 + 250e-6


def workspace(problem: ConvProblem, device: Cpu) -> int:
    from gpuconv.numpy_backend import two_passes

    found = tilings(problem, device)
    passes = two_passes.serves(problem, device)
    if separable.possible(problem) and not passes:
        found += tilings(problem, device, passes=True)
    own = device.threads * max(t.scratch for t in found) + ALIGN
    if passes:
        own = max(own, two_passes.workspace(problem, device))
    if problem.accumulator.is_exact:
        own = max(own, depthwise.workspace(problem, device))
    # The filters' magnitudes or factors, in float64.
    return own + 16 * math.prod(problem.w_shape)


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    apply(plan, x, w, bias, out, separable.factors(plan.problem, w))


def apply(
    plan: Plan,
    x: HostArray,
    w: HostArray,
    bias: HostArray | None,
    out: HostArray,
    factors: separable.Factors | None,
) -> None:
    """Run with the filters' factors, where they have rank 1."""
    from gpuconv.numpy_backend import two_passes

    problem = plan.problem
    dtype: np.dtype[Any] | None = problem.accumulator.numpy
    if problem.accumulator.is_exact:
        dtype = planes.exact_dtype(x, w, problem.x_dtype)
        if dtype is None:
            depthwise.run(plan, x, w, bias, out)
            return
    assert dtype is not None
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    if factors is not None and two_passes.serves(problem, plan.device):
        two_passes.run(plan, dtype, x, w, bias, out, factors)
        return
    w = planes.by_plane(problem, w)
    x, out = planes.lift(x), planes.lift(out)
    for tiling in tilings(problem, plan.device, factors is not None):
        _Blocks(plan, tiling, dtype, x, w, bias, out, factors).run()


class _Blocks:
    """The blocks of one class of outputs, and each worker's scratch memory."""

    def __init__(
        self,
        plan: Plan,
        tiling: Tiling,
        dtype: np.dtype[Any],
        x: HostArray,
        w: HostArray,
        bias: HostArray | None,
        out: HostArray,
        factors: separable.Factors | None,
    ) -> None:
        self.plan, self.tiling, self.dtype = plan, tiling, dtype
        self.x, self.w, self.bias, self.out, self.factors = x, w, bias, out, factors
        self.exact = plan.problem.accumulator.is_exact
        self.holds = planes.integers_hold(plan.problem, dtype)
        self.workers: list[_Worker] = []

    def run(self) -> None:
        t, problem = self.tiling, self.plan.problem
        d, h, w = t.axes
        images = self.x.shape[0]
        blocks = planes.Grid(
            planes.spans(problem.in_channels, t.channels),
            planes.spans(images, t.images),
            range(d.outputs),
            planes.spans(h.outputs, t.rows),
            planes.spans(w.outputs, t.columns),
        )
        device: Cpu = self.plan.device
        work = images * problem.in_channels * t.seconds
        threads = 1 if work < _INLINE else device.threads
        with arena(threads * t.scratch + ALIGN) as memory:
            for _ in range(threads):
                piece = memory.take(t.scratch, np.dtype(np.uint8))
                self.workers.append(_Worker(t, self.dtype, piece))
            run_blocks(threads, blocks, self.block)

    def block(self, block: tuple[Any, ...], index: int) -> None:
        channels, images, z, rows, columns = block
        t = self.tiling
        d, h, w = t.axes
        worker = self.workers[index]
        worker.weigh(self.w, channels, self.factors)
        ins = slice(*images), slice(*channels)
        outs = slice(channels[0] * t.multiplier, channels[1] * t.multiplier)
        out = self.out[ins[0], outs, d.out(z, z + 1), h.out(*rows), w.out(*columns)]
        starts = z * d.stride, rows[0] * h.stride, columns[0] * w.stride
        bias = None if self.bias is None else self.bias[outs]
        worker.compute(self.x[ins], starts, bias, out, self.exact, self.holds)


class _Worker:
    """Scratch memory, and the bands of the channels that it last computed."""

    def __init__(self, tiling: Tiling, dtype: np.dtype[Any], memory: HostArray) -> None:
        self.tiling, self.dtype = tiling, dtype
        self.scratch = Scratch(memory)
        self.channels: tuple[int, int] | None = None
        self.w: HostArray
        self.band: HostArray
        self.passes: separable.Passes | None = None
        self.kept: int

    def weigh(
        self, w: HostArray, channels: tuple[int, int], factors: separable.Factors | None
    ) -> None:
        """Lay out the filters of `channels`."""
        if channels == self.channels:
            return
        self.channels = channels
        t, count = self.tiling, channels[1] - channels[0]
        self.scratch.free()
        here = slice(*channels)
        self.w = self.scratch.take((count, *w.shape[1:]), self.dtype)
        np.copyto(self.w, w[here], casting="unsafe")
        if factors is not None:
            self.passes = separable.Passes(t, factors, here, self.scratch, self.dtype)
        else:
            self.band = self.scratch.take((count, *t.band_shape[1:]), self.dtype)
            self.band.fill(0)
            columns = t.axes[2]
            size = self.dtype.itemsize
            diagonal: HostArray = np.ndarray(
                (*self.band.shape[:4], columns.filter, t.strip),
                self.dtype,
                self.band,
                0,
                (*self.band.strides[:4], t.strip * size, (columns.stride * t.strip + 1) * size),
            )
            diagonal[...] = self.w.swapaxes(2, 3)[..., None]
        self.kept = self.scratch.mark()

    def compute(
        self,
        x: HostArray,
        starts: tuple[int, int, int],
        bias: HostArray | None,
        out: HostArray,
        exact: bool,
        holds: bool,
    ) -> None:
        t = self.tiling
        self.scratch.free(self.kept)
        images, channels = x.shape[:2]
        rows, columns = out.shape[3:]
        computed, width = t.padded_rows(rows), t.strips(columns) * t.strip
        block = self.scratch.take((images, channels, *t.block_shape(rows, columns)), self.dtype)
        planes.read(block, x, t.axes, starts)
        # The products write into `out` itself where its memory allows.
        in_place = (
            (rows, columns) == (computed, width)
            and bias is None
            and t.multiplier == 1
            and out.dtype == self.dtype
            and out.strides[4] == out.itemsize
            and out.strides[3] >= width * out.itemsize
        )
        if in_place:
            sums = out
        else:
            shape = (images, channels, t.multiplier, computed, width)
            sums = self.scratch.take(shape, self.dtype)
        target = sums.reshape(images, channels, t.multiplier, computed, width)
        before = self.scratch.mark()
        if self.passes:
            self.passes.compute(block, target, self.scratch)
        else:
            self._multiply(block, target)
        result = target[..., :rows, :columns]
        if not exact:
            self._contain(block, result, before)
        if in_place:
            return
        self.scratch.free(before)
        planes.store(out, result[:, :, :, None], bias, exact, self.scratch if holds else None)

    def _multiply(self, block: HostArray, target: HostArray) -> None:
        """The matrix products of a block: target (images, channels, multiplier, rows, columns)."""
        t = self.tiling
        _, h, w = t.axes
        images, channels, multiplier, rows, width = target.shape
        count, every = width // t.strip, rows // t.phases
        strips = self.scratch.take((images, channels, *t.strip_shape(rows, width)), self.dtype)
        n_, c_, d_, h_, w_ = block.strides
        across = t.strip * w.stride * w_
        rows_ = (h.stride * h_, h_) if t.order == "copies" else (h_,)
        source: HostArray = np.ndarray(
            strips.shape, self.dtype, block, 0, (n_, c_, across, *rows_, d_, w_)
        )
        np.copyto(strips, source)
        n_, c_, j_, row_ = strips.strides[:4]
        if t.order != "copies":
            row_ *= h.stride
        windows: HostArray = np.ndarray(
            (images, channels, 1, count, t.phases, every, t.depth),
            self.dtype,
            strips,
            0,
            (n_, c_, 0, j_, row_, t.phases * row_, w_),
        )
        band = self.band.reshape(channels, multiplier, 1, 1, t.depth, t.strip)
        split = target.reshape(
            images, channels, multiplier, every, t.phases, count, t.strip
        ).transpose(0, 1, 2, 5, 4, 3, 6)
        np.matmul(windows, band, out=split)

    def _contain(self, block: HostArray, sums: HostArray, free: int) -> None:
        """Sum an image again, tap by tap, where it has a NaN that may come from a band's zeros."""
        if not np.isnan(sums.max()):
            return
        self.scratch.free(free)
        t = self.tiling
        for n in range(sums.shape[0]):
            if np.isnan(sums[n].max()):
                product = self.scratch.take(sums[n : n + 1].shape, self.dtype)
                self.scratch.free(free)
                planes.direct_sum(
                    sums[n : n + 1, :, :, None], block[n : n + 1], self.w, t.axes,
                    product[:, :, :, None],
                )  # fmt: skip
