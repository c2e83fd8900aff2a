"""Depthwise convolution: planes under filters of their own, as products with a banded matrix.

    y[n, c*M + m, p] = sum over r of  x[n, c, stride*p + dilation*r - pad] * w[c*M + m, r]

for one to three axes and any channel multiplier M = K/C. Each row of a block of the padded input is
copied S times, shifted by one more element each:

    shifted[h, t, s, q] = x[t, h, stride*q + s]

The rows of all windows of a row of outputs are then neighbours in memory, a matrix of R*T*S by Q,
and B rows of outputs below each other are one product of it with the filter laid out as a band:

    y[p + b, q] = sum over k of  band[b, k] * shifted[stride*p + k // (T*S), k % (T*S), q]

         h:  0 1 2 3          B = 2 rows of outputs, R = 3: a quarter of the band is zeros
    b = 0:   w w w .
    b = 1:   . w w w

It is a product of few rows, which BLAS runs at its full rate as long as it need not pack its
operands, and it wastes less than a band along the columns would. Rows of zeros above and below the
input are left out of it, with the columns of the band that would meet them.

A band's zeros would carry a NaN or Inf of x to other outputs of its rows (0 * inf = nan). It
shows: an image's block that comes out with a NaN is summed again, tap by tap; so is all that lies
under a filter that is not finite, whose products with the rows left out are not zero.
A small plane under a small filter is not worth that many calls. Padded, with its rows one after
another, it is one sum over the taps of windows of the whole plane, which einsum makes in one call;
where a window runs from one row into the next, its sum is not copied out.
Filters that turn out to have rank 1 are left to ``filter2d`` where two passes are much faster.
Integers are summed in floating point where their magnitudes prove that exact, else tap by tap,
modulo 2^64: this is what ``filter2d`` and ``fft`` fall back to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import filter2d, planes, separable
from gpuconv.numpy_backend.device import UNPACKED, VECTOR, WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_BYTE = np.dtype(np.uint8)
_CACHED = 2 << 20  # bytes of scratch memory that stay in a core's cache
# Two threads that hand the interpreter's lock to each other every few microseconds are slower than
# one: NumPy's calls must be long, and blocks larger than a core's own cache.
_SHARED = 8 << 20
_SMALL = 1 << 17  # products that no BLAS finds worth a second thread
_BUFFERS = 14 << 10  # elements of the buffers that NumPy's products of views use
_INLINE = 2e-3  # seconds of work below which waking threads after a rest costs more than it saves
_MOSTLY = 0.9
_BLOCK = 20e-6  # seconds that the calls of a block take
_BANDS = 3e-6  # and those of some bands of it
_FEW = 4  # planes that are worth a call of their own each
_FLAT = 1 << 20  # bytes of all products of a plane that is summed as a whole
_FLAT_CALLS = 10e-6  # seconds that the calls of a block of such take,
_FLAT_IMAGE = 2e-6  # and those of each image
_PASSES = 0.7  # of the time of the products
_HANDOVER = 50e-6  # seconds that threads wait for each other in the calls of a block
_CONVERTED = 0.7e-9  # seconds per element that changes its type on the way in or out


@dataclass(frozen=True)
class Bands:
    """Bands of outputs below each other, which one call of matmul makes."""

    rows: slice  # of outputs
    count: int  # of bands
    extent: int  # rows of outputs of each
    first: int  # the row of the block that the first of them reads first
    skipped: int  # rows of the window before that, which are zeros
    reads: int  # rows that each reads


@lru_cache(maxsize=64)
def _bands(h: Axis, start: int, rows: int, band: int) -> tuple[int, int, tuple[Bands, ...]]:
    """The padded rows that `rows` outputs from the padded row `start` must read, and their bands.

    The rows, from the first to before the last, are relative to `start`.
    """
    reads = h.reads(rows)
    lo, hi = (min(max(edge - start, 0), reads) for edge in h.inside)
    if hi - lo > _MOSTLY * reads:  # a few zeros are no reason for products of several kinds
        lo, hi = 0, reads
    elif lo >= hi:  # nothing but zeros: one row of them
        lo, hi = 0, 1
    found: list[Bands] = []
    for begin in range(0, rows, band):
        extent = min(band, rows - begin)
        top = begin * h.stride
        first = min(max(top, lo), hi)
        last = max(min(top + h.reads(extent), hi), first)
        skipped = first - top if last > first else 0
        here = Bands(slice(begin, begin + extent), 1, extent, first - lo, skipped, last - first)
        before = found[-1] if found else None
        if before and (before.extent, before.skipped, before.reads) == (
            extent, skipped, here.reads,
        ) and here.first - before.first == before.count * band * h.stride:  # fmt: skip
            found[-1] = replace(
                before, rows=slice(before.rows.start, here.rows.stop), count=before.count + 1
            )
        else:
            found.append(here)
    return lo, hi, tuple(found)


@dataclass(frozen=True)
class Tiling:
    """How one class of outputs is cut into blocks."""

    axes: tuple[Axis, Axis, Axis]
    all_channels: int
    multiplier: int
    itemsize: int
    exact: bool
    channels_last: bool
    threads: int
    band: int  # B, output rows of one product
    rows: int  # of outputs in a block, and so on
    columns: int
    channels: int = 1
    images: int = 1

    @cached_property
    def taps(self) -> int:
        return math.prod(axis.filter for axis in self.axes)

    @cached_property
    def lone(self) -> bool:
        """Whether a block covers all outputs of its images."""
        d, h, w = self.axes
        extents = (1, self.rows, self.columns)
        return extents == (d.outputs, h.outputs, w.outputs) and self.channels == self.all_channels

    @cached_property
    def place(self) -> tuple[slice, ...]:
        """Where the class lies in the whole output."""
        return (slice(None), slice(None), *(axis.out(0, axis.outputs) for axis in self.axes))

    @cached_property
    def in_place(self) -> bool:
        """Whether products go to the result itself, where its memory allows."""
        return not self.channels_last and self.width(self.columns) == self.columns

    @cached_property
    def small(self) -> bool:
        """Whether BLAS multiplies such bands on one thread anyway, whatever it may use."""
        return self.band > 1 and self.band * self.depth * self.columns < _SMALL

    def width(self, columns: int) -> int:
        """Columns that are computed: part of a vector costs more than a whole one."""
        vector = VECTOR // self.itemsize
        if not self.channels_last and self.taps < 24:
            return columns  # less than copying the sums
        return -(-columns // vector) * vector

    @cached_property
    def depth(self) -> int:
        """Rows of `shifted` that a product sees, where none is left out."""
        d, h, w = self.axes
        return h.reads(self.band) * d.filter * w.filter

    @cached_property
    def reads(self) -> int:
        """Rows of a block's input that are not left out."""
        h = self.axes[1]
        reads, inside = h.reads(self.rows), h.inside[1] - h.inside[0]
        return reads if inside > _MOSTLY * reads else max(inside, 1)

    @cached_property
    def scratch(self) -> int:
        """Bytes of one worker."""
        d, h, w = self.axes
        each = self.images * self.channels
        filters = self.channels * self.multiplier
        width = self.width(self.columns)
        sums = each * self.multiplier * self.rows * width
        row = each * d.filter * w.reads(width)
        shifted = each * d.filter * self.reads * w.filter * width

        def room(*pieces: int) -> int:
            return sum(rounded(self.itemsize * piece) for piece in pieces)

        total = room(filters * self.taps, filters * self.band * self.depth, sums)
        total += max(room(row * self.reads, shifted), room(row * h.reads(self.rows), sums))
        return total + (_BUFFERS * self.itemsize if self.exact else 0)

    @cached_property
    def seconds(self) -> float:
        """Predicted time of one plane of one image, on one thread.

        Copies by their elements and runs, products by the vectors they multiply.
        """
        d, h, w = self.axes
        vector = VECTOR // self.itemsize
        width = self.width(self.columns)
        blocks = d.outputs * (h.outputs / self.rows) * (w.outputs / self.columns)
        size = self.itemsize / 4
        read = d.filter * self.reads * w.reads(width)
        sums = self.multiplier * self.rows * width
        runs = d.filter * self.reads * w.filter
        apart = w.stride > 1
        shifted = runs * (width * 0.25e-9 + 3e-9 if apart else width * 0.09e-9 * size + 6e-9)
        partial = 0.6e-9 * self.band if width % vector else 0
        vectors = -(-width // vector)
        step = 0.2e-9 + vectors * (0.2e-9 + max(0.17e-9 * self.band, 0.3e-9)) + partial
        _, _, bands = _bands(h, 0, self.rows, self.band)
        products = self.multiplier * sum(some.count for some in bands)
        depths = self.multiplier * sum(some.count * some.reads for some in bands)
        multiplied = products * 30e-9 + depths * d.filter * w.filter * step + sums * 0.05e-9 * size
        slow = 1.0 if self.scratch <= _CACHED else 1.2
        copied = read * (0.4e-9 if self.channels_last else 0.15e-9 * size)
        if self.channels_last:
            copied += sums * 0.35e-9
        elif not self.in_place:
            copied += sums * 0.15e-9 * size
        checked = sums * 0.05e-9 * size
        each = slow * (copied + shifted + multiplied) + checked
        calls = _BLOCK + len(bands) * _BANDS + (_HANDOVER if self.threads > 1 else 0)
        return blocks * (each + calls / (self.channels * self.images))


@lru_cache(maxsize=1024)
def tilings(problem: ConvProblem, device: Cpu) -> tuple[Tiling, ...]:
    """One per class of the dilation; no sum depends on the batch, as bits would then."""
    limit = (problem.workspace_within(WORKSPACE_CAP) - ALIGN) // device.threads
    return tuple(_fit(axes, problem, device, limit) for axes in planes.classes(problem))


def _fit(axes: tuple[Axis, Axis, Axis], problem: ConvProblem, device: Cpu, limit: int) -> Tiling:
    """The fastest tiling whose scratch memory stays in the cache, or at least under `limit`."""
    rows, columns = axes[1].outputs, axes[2].outputs
    accumulator = problem.accumulator
    last = problem.channels_last and problem.in_channels > 1
    start = Tiling(
        axes, problem.in_channels, problem.group_out_channels, accumulator.itemsize,
        accumulator.is_exact, last, 1, 1, rows, columns,
    )  # fmt: skip
    if last:  # a cache line has neighbouring channels: use all of it
        most = max(64 // problem.x_dtype.itemsize, 1)
        start = replace(start, channels=min(most, problem.in_channels))
    best = _best(start, min(_CACHED, limit))
    alone = problem.in_channels * _grown(best, 1, min(_CACHED, limit)).seconds
    if alone > _INLINE and device.threads > 1:
        best = _best(replace(start, threads=device.threads), min(_SHARED, limit))
    # From here on nothing changes bits, and all images of the batch count.
    if problem.batch * alone > _INLINE:
        best = replace(best, threads=device.threads)
    best = _balanced(best, problem.batch)
    return _grown(best, problem.batch, min(_SHARED if best.threads > 1 else _CACHED, limit))


def _best(start: Tiling, limit: int) -> Tiling:
    """The fastest for one image within `limit` bytes, or the smallest."""
    rows, columns = start.axes[1].outputs, start.axes[2].outputs
    options = [
        _grown(_shrunk(replace(start, band=band, columns=some), budget), 1, budget)
        for budget in {min(_CACHED, limit), limit}
        for band in (1, 2, 4, 6)
        if band <= rows
        for some in _widths(start, band, columns)
    ]
    best = min(options, key=lambda option: (max(option.scratch, limit), option.seconds))
    return replace(best, channels=min(start.channels, best.channels))


def _balanced(tiling: Tiling, batch: int) -> Tiling:
    """Equal pieces, and enough of them that every thread has some."""
    rows, columns = tiling.axes[1].outputs, tiling.axes[2].outputs
    pieces = -(-rows // tiling.rows)
    if batch * tiling.all_channels < tiling.threads and tiling.columns == columns:
        pieces = min(-(-pieces // tiling.threads) * tiling.threads, rows)
    each = -(-rows // pieces)
    return replace(tiling, rows=min(-(-each // tiling.band) * tiling.band, tiling.rows))


def _grown(tiling: Tiling, batch: int, limit: int) -> Tiling:
    """With more channels and images in a block, where it holds whole planes."""
    rows, columns = tiling.axes[1].outputs, tiling.axes[2].outputs
    if tiling.rows < rows or tiling.columns < columns:
        return tiling
    most = tiling.all_channels
    if batch < tiling.threads:
        most = -(-most // tiling.threads)
    share = -(-batch // tiling.threads)
    return planes.grown(tiling, tiling.all_channels, most, share, limit)


def _widths(start: Tiling, band: int, columns: int) -> list[int]:
    """Columns of a block: at most what BLAS multiplies without packing."""
    most = max(UNPACKED // (band * replace(start, band=band).depth) // 64 * 64, 64)
    found = []
    for limit in (min(512, most), min(128, most)):
        pieces = -(-columns // limit)
        each = -(-columns // pieces)
        found.append(each if pieces == 1 else min(-(-each // 16) * 16, columns))
    return sorted(set(found))


def _shrunk(tiling: Tiling, limit: int) -> Tiling:
    """The tiling with as many rows as fit; where none do, with fewer channels and columns."""
    while tiling.scratch > limit and tiling.rows > tiling.band:
        half = -(-tiling.rows // (2 * tiling.band)) * tiling.band
        tiling = replace(tiling, rows=half if half < tiling.rows else tiling.band)
    while tiling.scratch > limit and tiling.channels > 1:
        tiling = replace(tiling, channels=-(-tiling.channels // 2))
    while tiling.scratch > limit and tiling.columns > 1:
        tiling = replace(tiling, columns=-(-tiling.columns // 2))
    return tiling


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"{problem.operation} is not what it computes")
    if not problem.depthwise:
        return No(f"each output channel sees {problem.group_in_channels} input channels, not one")
    if reason := planes.scattered(problem):
        return No(reason)
    return True


@dataclass(frozen=True)
class Flat:
    """How planes are summed as a whole."""

    axes: tuple[Axis, Axis, Axis]
    itemsize: int
    images: int = 1  # of a block
    threads: int = 1

    @cached_property
    def width(self) -> int:
        return self.axes[2].reads(self.axes[2].outputs)

    @cached_property
    def size(self) -> int:
        """Elements of a padded plane."""
        return self.axes[1].reads(self.axes[1].outputs) * self.width

    @cached_property
    def taps(self) -> int:
        return self.axes[1].filter * self.axes[2].filter

    @cached_property
    def length(self) -> int:
        """Sums of a plane, from the first that is wanted to the last."""
        return (self.axes[1].outputs - 1) * self.width + self.axes[2].outputs

    @cached_property
    def scratch(self) -> int:
        """Bytes of one worker."""
        each = self.itemsize * self.images
        sums = rounded(each * self.axes[1].outputs * self.width)
        return rounded(each * self.taps) + rounded(each * self.size) + 2 * sums

    @cached_property
    def seconds(self) -> float:
        """Predicted time of one image on one thread, but for a block's calls."""
        each = self.size * 0.3e-9 + self.length * (0.2e-9 + self.taps * 0.11e-9)
        return _FLAT_IMAGE + each * self.itemsize / 4


@lru_cache(maxsize=1024)
def _flat(problem: ConvProblem, device: Cpu) -> Flat | None:
    """How to sum whole planes, where that is fast: one by one is for few of them.

    A plan's batch may decide that, and with it the bits: a call's batch does not.
    """
    axes = planes.classes(problem)
    d, h, w = axes[0]
    accumulator = problem.accumulator
    if (
        len(axes) > 1
        or problem.in_channels > 1
        or problem.batch > _FEW
        or problem.group_out_channels > 1
        or accumulator.is_exact
        or accumulator.is_complex
        or (d.outputs, d.filter, h.stride, w.stride) != (1, 1, 1, 1)
    ):
        return None
    flat = Flat(axes[0], accumulator.itemsize)
    if flat.size * flat.taps * flat.itemsize > _FLAT:
        return None
    limit = problem.workspace_within(WORKSPACE_CAP) - ALIGN
    if flat.scratch > limit:
        return None
    parallel = problem.batch * flat.seconds > _INLINE
    threads = min(device.threads, limit // flat.scratch) if parallel else 1
    images = min(-(-problem.batch // threads), min(limit // threads, _CACHED) // flat.scratch)
    return replace(flat, images=max(images, 1), threads=threads)


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The copies and products of all planes, spread over the threads."""
    flat = _flat(problem, device)
    if flat is not None:
        calls = -(-problem.batch // flat.images) * _FLAT_CALLS
        work = (calls + problem.batch * flat.seconds) / flat.threads
        return 8e-6 + work + (planes.START if flat.threads > 1 else 0)
    found = tilings(problem, device)
    memory = problem.bytes_moved / device.memory_bytes
    ends = (problem.x_shape, problem.x_dtype), (problem.y_shape, problem.y_dtype)
    converted = sum(math.prod(shape) for shape, t in ends if t is not problem.accumulator)
    memory += converted * _CONVERTED / device.threads
    total = 0.0
    for t in found:
        work = problem.batch * problem.in_channels * t.seconds
        total += work if t.threads == 1 else work / t.threads + planes.START
    return total + 10e-6 + (memory if total > _INLINE else 0)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    flat = _flat(problem, device)
    if flat is not None:
        return flat.threads * flat.scratch + ALIGN
    own = device.threads * max(t.scratch for t in tilings(problem, device)) + ALIGN
    if _has_other(problem, device):
        own = max(own, filter2d.workspace(problem, device))
    # Of integers, the filters' magnitudes in float64.
    return own + 16 * math.prod(problem.w_shape) * problem.accumulator.is_exact


@lru_cache(maxsize=1024)
def _has_other(problem: ConvProblem, device: Cpu) -> bool:
    return in_passes(problem, device, cost(problem, device))


def in_passes(problem: ConvProblem, device: Cpu, seconds: float) -> bool:
    """Whether filters that turn out to have rank 1 are worth two passes, which filter2d makes.

    `seconds` is the predicted time without.
    """
    return (
        not problem.accumulator.is_exact
        and separable.possible(problem)
        and filter2d.workspace(problem, device) <= problem.workspace_within(WORKSPACE_CAP)
        and separable.cost(problem, device) < _PASSES * seconds
    )


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem, device = plan.problem, plan.device
    flat = _flat(problem, device)
    if flat is not None:
        _sum_planes(flat, problem, x, w, bias, out)
        return
    if _has_other(problem, device):
        factors = separable.factors(problem, w)
        if factors is not None:
            filter2d.apply(plan, x, w, bias, out, factors)
            return
    dtype: np.dtype[Any] | None = None  # the one that integers are summed in
    if problem.accumulator.is_exact:
        dtype = planes.exact_dtype(x, w, problem.x_dtype)
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    w = planes.by_plane(problem, w)
    x, out = planes.lift(x), planes.lift(out)
    for tiling in tilings(problem, device):
        here = out[tiling.place]
        work = x.shape[0] * problem.in_channels * tiling.seconds
        lone = tiling.lone and x.shape[0] <= tiling.images
        threads = 1 if lone or work < _INLINE else tiling.threads
        with arena(threads * tiling.scratch + ALIGN) as memory:
            workers = [
                _Worker(tiling, problem, dtype, w, memory.take(tiling.scratch, _BYTE))
                for _ in range(threads)
            ]
            if lone and tiling.small:
                workers[0].weigh((0, problem.in_channels))
                workers[0].compute(x, (0, 0, 0), bias, here)
            else:
                _run_blocks(tiling, workers, x, bias, here)


def _sum_planes(
    flat: Flat,
    problem: ConvProblem,
    x: HostArray,
    w: HostArray,
    bias: HostArray | None,
    out: HostArray,
) -> None:
    _, h, across = flat.axes
    dtype = problem.accumulator.numpy
    size, width = dtype.itemsize, flat.width
    w = w.reshape(h.filter, across.filter)
    if problem.flip:
        w = w[::-1, ::-1]
    x, out = planes.lift(x), planes.lift(out)
    holds = planes.integers_hold(problem, dtype)

    def block(span: tuple[int, int], index: int) -> None:
        scratch = workers[index]
        scratch.free()
        taps = scratch.take(w.shape, dtype)
        np.copyto(taps, w, casting="unsafe")
        here = slice(*span)
        count = span[1] - span[0]
        padded = scratch.take((count, 1, 1, h.reads(h.outputs), width), dtype)
        planes.read(padded, x[here], flat.axes, (0, 0, 0))
        sums = scratch.take((count, 1, 1, 1, h.outputs, width), dtype)
        for n in range(count):
            windows: HostArray = np.ndarray(
                (*w.shape, flat.length), dtype, padded, n * flat.size * size,
                (width * size, size, size),
            )  # fmt: skip
            # In this order the innermost loop runs along the plane.
            total = sums[n].reshape(-1)[: flat.length]
            np.einsum("rs,rsn->n", taps, windows, out=total, order="F")
        kept = sums[..., : across.outputs]
        planes.store(out[here], kept, bias, False, scratch if holds else None)

    spans = planes.spans(x.shape[0], flat.images)
    threads = min(flat.threads, len(spans))
    with arena(threads * flat.scratch + ALIGN) as memory:
        workers = [Scratch(memory.take(flat.scratch, _BYTE)) for _ in range(threads)]
        if len(spans) == 1:
            block(spans[0], 0)
        else:
            run_blocks(threads, spans, block)


def _run_blocks(
    tiling: Tiling, workers: list[_Worker], x: HostArray, bias: HostArray | None, out: HostArray
) -> None:
    """All blocks of one class, whose outputs are `out`."""
    d, h, w = tiling.axes
    blocks = planes.Grid(
        planes.spans(x.shape[1], tiling.channels),
        planes.spans(x.shape[0], tiling.images),
        range(d.outputs),
        planes.spans(h.outputs, tiling.rows),
        planes.spans(w.outputs, tiling.columns),
    )

    def block(where: tuple[Any, ...], index: int) -> None:
        channels, images, z, rows, columns = where
        ins = slice(*images), slice(*channels)
        outs = slice(channels[0] * tiling.multiplier, channels[1] * tiling.multiplier)
        workers[index].weigh(channels)
        workers[index].compute(
            x[ins],
            (z * d.stride, rows[0] * h.stride, columns[0] * w.stride),
            None if bias is None else bias[outs],
            out[ins[0], outs, z : z + 1, slice(*rows), slice(*columns)],
        )

    run_blocks(len(workers), blocks, block)


class _Worker:
    """One worker's scratch memory, and the filters of the channels that it last computed."""

    def __init__(
        self,
        tiling: Tiling,
        problem: ConvProblem,
        exact: np.dtype[Any] | None,
        w: HostArray,
        memory: HostArray,
    ) -> None:
        self.tiling = tiling
        self.scratch = Scratch(memory)
        self.all_filters = w
        self.exact = tiling.exact and exact is not None  # integers in floating point
        self.by_bands = self.exact or not tiling.exact  # or tap by tap
        self.multiplies = self.by_bands  # where the filters are finite
        self.dtype = problem.accumulator.numpy if exact is None else exact
        self.holds = planes.integers_hold(problem, self.dtype)
        self.channels: tuple[int, int] | None = None
        self.w: HostArray
        self.band: HostArray
        self.kept = 0

    def weigh(self, channels: tuple[int, int]) -> None:
        """Lay out the filters of `channels`."""
        if channels == self.channels:
            return
        self.channels = channels
        t = self.tiling
        d, h, across = t.axes
        filters = self.all_filters[slice(*channels)]
        self.scratch.free()
        # The taps in the order of the band's, (R, T, S): neighbours in memory, copied as one.
        count = filters.shape[0]
        taps = self.scratch.take(
            (count, t.multiplier, h.filter, d.filter, across.filter), self.dtype
        )
        self.w = taps.swapaxes(2, 3)
        np.copyto(self.w, filters, casting="unsafe")
        if self.by_bands:
            shape = (count, t.multiplier, t.band, t.depth)
            band = self.scratch.take(shape, self.dtype)
            band.fill(0)
            c_, m_, b_, k_ = band.strides
            step = h.stride * d.filter * across.filter
            diagonal: HostArray = np.ndarray(
                (*shape[:3], t.taps), self.dtype, band, 0, (c_, m_, b_ + step * k_, k_)
            )
            diagonal[...] = taps.reshape(count, t.multiplier, 1, t.taps)
            self.band = band[:, :, None]
        self.multiplies = self.by_bands and (self.exact or bool(np.isfinite(taps).all()))
        self.kept = self.scratch.mark()

    def compute(
        self,
        x: HostArray,
        starts: tuple[int, int, int],
        bias: HostArray | None,
        out: HostArray,
    ) -> None:
        t = self.tiling
        self.scratch.free(self.kept)
        images, channels = x.shape[:2]
        rows, columns = out.shape[3:]
        shape = (images, channels, t.multiplier, rows, t.width(columns))
        in_place = (
            t.in_place
            and shape[4] == columns
            and out.dtype == self.dtype
            and out.flags.aligned
            and out.strides[4] == out.itemsize
            and out.strides[3] >= columns * out.itemsize
            and out.strides[3] % out.itemsize == 0
        )
        sums = out.reshape(shape) if in_place else self.scratch.take(shape, self.dtype)
        kept = sums[..., None, :, :columns]
        before = self.scratch.mark()
        if self.multiplies:
            self._multiply(x, starts, sums)
            # The columns computed in vain hold no NaN but x's own.
            if t.band > 1 and not self.exact:
                for n in planes.spoilt(sums):
                    self.scratch.free(before)
                    self._tap_by_tap(x[n : n + 1], starts, kept[n : n + 1])
        else:
            self._tap_by_tap(x, starts, kept)
        if not in_place or bias is not None:
            self.scratch.free(before)
            planes.store(out, kept, bias, self.exact, self.scratch if self.holds else None)

    def _block(self, images: int, channels: int, extents: tuple[int, int, int]) -> HostArray:
        """Scratch (images, channels, depth, rows, columns) for a part of the padded input.

        Rows of all channels are neighbours where channels come last in the caller's memory: its
        cache lines are then read at once.
        """
        if not self.tiling.channels_last:
            return self.scratch.take((images, channels, *extents), self.dtype)
        depth, rows, columns = extents
        block = self.scratch.take((images, depth, rows, channels, columns), self.dtype)
        return block.transpose(0, 3, 1, 2, 4)

    def _multiply(self, x: HostArray, starts: tuple[int, int, int], sums: HostArray) -> None:
        """The products of a block: sums (images, channels, multiplier, rows, columns)."""
        t = self.tiling
        d, h, w = t.axes
        images, channels, multiplier, rows, width = sums.shape
        lo, hi, bands = _bands(h, starts[1], rows, t.band)
        block = self._block(images, channels, (d.filter, hi - lo, w.reads(width)))
        planes.read(block, x, t.axes, (starts[0], starts[1] + lo, starts[2]))
        shape = (images, channels, hi - lo, d.filter, w.filter, width)
        shifted = self.scratch.take(shape, self.dtype)
        n_, c_, d_, h_, w_ = block.strides
        memory = block.transpose(0, 2, 3, 1, 4) if t.channels_last else block
        source: HostArray = np.ndarray(
            shape, self.dtype, memory, 0, (n_, c_, h_, d_, w_, w.stride * w_)
        )
        np.copyto(shifted, source)
        n_, c_, h_, _, s_, q_ = shifted.strides
        row = d.filter * w.filter
        for some in bands:
            windows: HostArray = np.ndarray(
                (images, channels, 1, some.count, some.reads * row, width),
                self.dtype,
                shifted,
                some.first * h_ if some.reads else 0,
                (n_, c_, 0, some.extent * h.stride * h_, s_, q_),
            )
            first = some.skipped * row
            np.matmul(
                self.band[..., : some.extent, first : first + some.reads * row],
                windows,
                out=sums[..., some.rows, :].reshape(
                    images, channels, multiplier, some.count, some.extent, width
                ),
            )

    def _tap_by_tap(self, x: HostArray, starts: tuple[int, int, int], sums: HostArray) -> None:
        """The same, for sums (images, channels, multiplier, 1, rows, columns)."""
        t = self.tiling
        d, h, w = t.axes
        images, channels = x.shape[:2]
        extents = d.filter, h.reads(sums.shape[4]), w.reads(sums.shape[5])
        block = self._block(images, channels, extents)
        planes.read(block, x, t.axes, starts)
        product = self.scratch.take(sums.shape, self.dtype)
        planes.direct_sum(sums, block, self.w, t.axes, product)
