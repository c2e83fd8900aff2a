"""Depthwise convolution with the channels as the axis along which NumPy's loops run.

    y[n, c*M + m, p] = sum over r of  x[n, c, stride*p + dilation*r - pad] * w[c*M + m, r]

A block of the padded input is laid out with its channels last, and so are the filters. What a tap
adds to the sums of a pixel is then a product of two runs of channels, and all taps of all pixels
are one call of einsum, which adds each product to its sums as it makes it:

    sums[n, p, q, c] = sum over r, s of  block[n, stride*p + r, stride*q + s, c] * taps[r, s, c]

It takes 8 ns for each run and 0.1 ns for each element: runs should be long. Where pixels of a
window's row are neighbours (stride 1), a run is made of G pixels, under G copies of the filters:

    G = 2:   block  | x[0, c...]  x[1, c...] |  x[2, c...]  x[3, c...]
             taps   | w[s, c...]  w[s, c...] |

Each output is the sum of its products in the order of the taps, whatever the blocks and the batch,
and sees nothing but its window: no NaN or Inf needs to be contained. Filters that turn out to have
rank 1 are left to ``filter2d`` where two passes are much faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import depthwise, filter2d, planes, separable
from gpuconv.numpy_backend.device import VECTOR, WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_CACHED = 3 << 19  # bytes of a block and its sums that stay in a core's cache
_RUN = 8e-9  # seconds to start a run of einsum's,
_STEP = 0.1e-9  # and for each float32 of it, within the first-level cache,
_LONGEST = 6 << 10  # which runs of so many bytes leave room for;
_LONGER = 1.5  # longer ones take that much longer
_CALL = 20e-6  # seconds of a call before the first block
_BLOCK = 10e-6  # seconds that the calls of a block take
_HANDOVER = 50e-6  # and that threads wait for each other in them
_PIXEL = 12e-9  # seconds for each pixel of a block, and for each element that is read or stored:
_READ, _STORED = 0.5e-9, 0.55e-9
_FAR = 1.6  # how much longer reading takes where the channels' planes lie far apart:
_FAR_CHANNELS, _FAR_BYTES = 64, 8 << 10  # more of them than this, and each larger
_LAST_PIXEL, _LAST_READ, _LAST_STORED = 6e-9, 0.33e-9, 0.06e-9  # where x's channels come last, too
_COPY = 0.1e-9  # seconds per element of another copy of the filters
_NEAR = 4 << 20  # bytes that a core finds in its caches,
_SHARED_CACHE = 64 << 20  # and that it may find in the one that all cores share
_BYTE = np.dtype(np.uint8)
_RUNS = 16  # how many more runs of a row are tried than the longest would be
_PIECES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # that channels are cut into


@dataclass(frozen=True)
class Tiling:
    """How one class of outputs is cut into blocks. No result depends on it."""

    axes: tuple[Axis, Axis, Axis]
    all_channels: int
    multiplier: int
    itemsize: int
    plane: int  # bytes of a plane of x
    channels_last: bool
    batch: int
    threads: int
    channels: int  # of a block
    rows: int  # of outputs, and so on
    columns: int
    images: int = 1

    @cached_property
    def taps(self) -> int:
        return math.prod(axis.filter for axis in self.axes)

    @cached_property
    def pitch(self) -> int:
        """Elements from pixel to pixel: whole vectors, an odd number of them if there are many.

        The same channel of neighbouring pixels would else fall into a few sets of the cache.
        """
        if self.channels_last and self.channels == self.all_channels:
            return self.channels
        vector = VECTOR // self.itemsize
        vectors = -(-self.channels // vector)
        return (vectors + (vectors % 2 == 0 and vectors > 6)) * vector

    @cached_property
    def pixels(self) -> int:
        """G, the pixels of a run."""
        if self.axes[2].stride > 1:
            return 1
        most = max(2 * _LONGEST // (self.pitch * self.itemsize), 1)
        fewest = -(-self.columns // most)  # runs of a row
        options = (-(-self.columns // runs) for runs in range(fewest, fewest + _RUNS))
        return min(options, key=self._row)

    def _row(self, pixels: int) -> float:
        """Predicted time that a tap of a row of outputs takes."""
        size = pixels * self.pitch * self.itemsize
        each = size / 4 * _STEP * (_LONGER if size > _LONGEST else 1)
        return -(-self.columns // pixels) * (_RUN + each)

    @cached_property
    def width(self) -> int:
        """Columns of sums that a block computes."""
        return -(-self.columns // self.pixels) * self.pixels

    @cached_property
    def extents(self) -> tuple[int, int, int]:
        """Of a block of the padded input."""
        d, h, w = self.axes
        return d.filter, h.reads(self.rows), w.reads(self.width)

    @cached_property
    def scratch(self) -> int:
        """Bytes of one worker."""
        sums = self.multiplier * self.images * self.rows * self.width * self.pitch
        block = self.images * math.prod(self.extents) * self.pitch
        weights = self.multiplier * self.taps * self.pixels * self.pitch
        return sum(rounded(self.itemsize * piece) for piece in (weights, block, sums))

    @cached_property
    def blocks(self) -> int:
        d, h, w = self.axes
        return (
            -(-self.batch // self.images)
            * -(-self.all_channels // self.channels)
            * d.outputs
            * -(-h.outputs // self.rows)
            * -(-w.outputs // self.columns)
        )

    @cached_property
    def block_seconds(self) -> float:
        """Predicted time of a block on one thread."""
        size = self.itemsize / 4
        pixel, read, stored = _PIXEL, _READ, _STORED
        if self.channels_last:
            pixel, read, stored = _LAST_PIXEL, _LAST_READ, _LAST_STORED
        elif self.channels > _FAR_CHANNELS and self.plane > _FAR_BYTES:
            read *= _FAR
        moved = math.prod(self.extents) * (pixel + read * size * self.channels)
        moved += self.multiplier * self.rows * self.columns * stored * size * self.channels
        added = self.multiplier * self.taps * self.rows * self._row(self.pixels)
        calls = _BLOCK + (_HANDOVER if self.threads > 1 else 0)
        return calls + self.images * (moved + added)

    @cached_property
    def seconds(self) -> float:
        """Predicted time of all images."""
        filters = self.multiplier * self.taps * self.channels * self.itemsize / 4
        weights = filters * (_READ + self.pixels * _COPY)
        each = self.block_seconds + weights * self.threads / self.blocks
        start = planes.START if self.threads > 1 else 0
        return -(-self.blocks // self.threads) * each + start


@lru_cache(maxsize=1024)
def tilings(problem: ConvProblem, device: Cpu) -> tuple[Tiling, ...]:
    """One per class of the dilation."""
    limit = problem.workspace_within(WORKSPACE_CAP) - ALIGN
    return tuple(_fit(axes, problem, device, limit) for axes in planes.classes(problem))


def _fit(axes: tuple[Axis, Axis, Axis], problem: ConvProblem, device: Cpu, limit: int) -> Tiling:
    """The fastest tiling whose scratch memory stays in the cache, or at least under `limit`."""
    itemsize = problem.accumulator.itemsize
    whole = Tiling(
        axes, problem.in_channels, problem.group_out_channels, itemsize,
        math.prod(problem.input) * itemsize, problem.channels_last, problem.batch, 1,
        problem.in_channels, axes[1].outputs, axes[2].outputs,
    )  # fmt: skip
    options = [
        _cut(replace(whole, threads=threads, channels=-(-whole.channels // pieces)), limit)
        for threads in {1, device.threads}
        for pieces in _PIECES
        if pieces <= whole.channels
    ]
    fits = [option for option in options if option.threads * option.scratch <= limit]
    if not fits:
        return min(options, key=lambda option: option.threads * option.scratch)
    return min(fits, key=lambda option: option.seconds)


def _cut(tiling: Tiling, limit: int) -> Tiling:
    """The tiling with as many rows, or whole images, as stay in the cache."""
    limit = min(limit // tiling.threads, _CACHED)
    rows, columns = tiling.axes[1].outputs, tiling.axes[2].outputs
    while tiling.scratch > limit and tiling.rows > 1:
        pieces = -(-rows // tiling.rows)
        fewer = -(-rows // max(pieces + 1, 5 * pieces // 4))
        tiling = replace(tiling, rows=min(fewer, tiling.rows - 1))
    while tiling.scratch > limit and tiling.columns > 1:
        tiling = replace(tiling, columns=-(-tiling.columns // 2))
    while tiling.scratch > limit and tiling.channels > 1:
        tiling = replace(tiling, channels=-(-tiling.channels // 2))
    if (tiling.rows, tiling.columns) == (rows, columns):
        share = -(-tiling.batch // tiling.threads)
        while tiling.images < share:
            more = replace(tiling, images=min(2 * tiling.images, share))
            if more.scratch > limit:
                break
            tiling = more
    return tiling


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"{problem.operation} is not what it computes")
    if not problem.depthwise:
        return No(f"each output channel sees {problem.group_in_channels} input channels, not one")
    accumulator = problem.accumulator
    if accumulator.is_exact or accumulator.is_complex:
        return No(f"{accumulator} is not summed in floating point")
    if reason := planes.scattered(problem):
        return No(reason)
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The blocks' copies and runs, spread over the threads, and a part of x's and y's way."""
    total = sum(tiling.seconds for tiling in tilings(problem, device))
    moved = problem.bytes_moved
    memory = moved / device.memory_bytes if moved > _NEAR else 0
    return _CALL + total + memory * (1 if moved > _SHARED_CACHE else 0.5)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    own = max(t.threads * t.scratch for t in tilings(problem, device)) + ALIGN
    if _has_other(problem, device):
        own = max(own, filter2d.workspace(problem, device))
    return own


@lru_cache(maxsize=1024)
def _has_other(problem: ConvProblem, device: Cpu) -> bool:
    return depthwise.in_passes(problem, device, cost(problem, device))


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem, device = plan.problem, plan.device
    if _has_other(problem, device):
        factors = separable.factors(problem, w)
        if factors is not None:
            filter2d.apply(plan, x, w, bias, out, factors)
            return
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    w = planes.by_plane(problem, w)
    x, out = planes.lift(x), planes.lift(out)
    dtype = problem.accumulator.numpy
    for tiling in tilings(problem, device):
        d, h, across = tiling.axes
        here = out[:, :, *(axis.out(0, axis.outputs) for axis in tiling.axes)]
        blocks = planes.Grid(
            planes.spans(problem.in_channels, tiling.channels),
            planes.spans(len(x), tiling.images),
            range(d.outputs),
            planes.spans(h.outputs, tiling.rows),
            planes.spans(across.outputs, tiling.columns),
        )
        with arena(tiling.threads * tiling.scratch + ALIGN) as memory:
            workers = [
                _Worker(tiling, dtype, w, memory.take(tiling.scratch, _BYTE))
                for _ in range(tiling.threads)
            ]
            call = _Call(tiling, workers, x, bias, here)
            if tiling.threads == 1:  # and no BLAS to hold to one thread
                for block in blocks:
                    call.work(block, 0)
            else:
                run_blocks(tiling.threads, blocks, call.work)


@dataclass(frozen=True)
class _Call:
    """The arrays of one call, and who works on them."""

    tiling: Tiling
    workers: list[_Worker]
    x: HostArray
    bias: HostArray | None
    out: HostArray

    def work(self, where: tuple[Any, ...], index: int) -> None:
        channels, images, z, rows, columns = where
        t = self.tiling
        d, h, w = t.axes
        ins = slice(*images), slice(*channels)
        outs = slice(channels[0] * t.multiplier, channels[1] * t.multiplier)
        self.workers[index].weigh(channels)
        self.workers[index].compute(
            self.x[ins],
            (z * d.stride, rows[0] * h.stride, columns[0] * w.stride),
            None if self.bias is None else self.bias[outs],
            self.out[ins[0], outs, z : z + 1, slice(*rows), slice(*columns)],
        )


class _Worker:
    """One worker's scratch memory, and the filters of the channels that it last computed."""

    def __init__(
        self, tiling: Tiling, dtype: np.dtype[Any], w: HostArray, memory: HostArray
    ) -> None:
        self.tiling, self.dtype, self.all_filters = tiling, dtype, w
        self.scratch = Scratch(memory)
        self.channels: tuple[int, int] | None = None
        self.taps: HostArray
        self.kept = 0

    def weigh(self, channels: tuple[int, int]) -> None:
        """Lay out the filters of `channels`: (multiplier, T, R, S, pixels * pitch)."""
        if channels == self.channels:
            return
        self.channels, t = channels, self.tiling
        self.scratch.free()
        filters = self.all_filters[slice(*channels)]
        count = len(filters)
        shape = (*filters.shape[1:], t.pixels, t.pitch)
        taps = self.scratch.take(shape, self.dtype)
        taps[..., count:] = 0
        filters = filters.transpose(1, 2, 3, 4, 0)
        np.copyto(taps[..., 0, :count], filters, casting="unsafe")
        if t.pixels > 1:
            np.copyto(taps[..., 1:, :count], taps[..., :1, :count])
        self.taps = taps.reshape(*taps.shape[:-2], -1)
        self.kept = self.scratch.mark()

    def compute(
        self,
        x: HostArray,
        starts: tuple[int, int, int],
        bias: HostArray | None,
        out: HostArray,
    ) -> None:
        """Write `out`, (images, channels * multiplier, 1, rows, columns)."""
        t = self.tiling
        self.scratch.free(self.kept)
        images, channels = x.shape[:2]
        rows, columns = out.shape[3:]
        width = -(-columns // t.pixels) * t.pixels
        block = self._read(x, starts, rows, width)
        n_, d_, h_, w_, c_ = block.strides
        _, h, across = t.axes
        run, groups = self.taps.shape[-1], width // t.pixels
        windows: HostArray = np.ndarray(
            (images, rows, groups, *self.taps.shape[1:4], run), self.dtype, block, 0,
            (n_, h.stride * h_, t.pixels * across.stride * w_, d_, h_, w_, c_),
        )  # fmt: skip
        shape = (t.multiplier, images, rows, groups, run)
        if self._in_place(out, width):
            n_, _, _, p_, q_ = out.strides
            sums = as_strided(out, shape, (0, n_, p_, t.pixels * q_, out.itemsize))
            np.einsum("npqtrsc,mtrsc->mnpqc", windows, self.taps, out=sums)
            if bias is not None:
                np.add(out, bias.astype(self.dtype, copy=False).reshape(-1, 1, 1, 1), out=out)
            return
        sums = self.scratch.take(shape, self.dtype)
        np.einsum("npqtrsc,mtrsc->mnpqc", windows, self.taps, out=sums)
        apart = sums.reshape(t.multiplier, images, 1, rows, width, t.pitch)
        kept = apart[..., :columns, :channels].transpose(1, 5, 0, 2, 3, 4)
        planes.store(out, kept, bias, False)

    def _read(self, x: HostArray, starts: tuple[int, int, int], rows: int, width: int) -> HostArray:
        """A block of the padded input, (images, depth, rows, columns, pitch)."""
        t = self.tiling
        d, h, w = t.axes
        images, channels = x.shape[:2]
        shape = (images, d.filter, h.reads(rows), w.reads(width), t.pitch)
        block = self.scratch.take(shape, self.dtype)
        block[..., channels:] = 0
        planes.read(block[..., :channels].transpose(0, 4, 1, 2, 3), x, t.axes, starts)
        return block

    def _in_place(self, out: HostArray, width: int) -> bool:
        """Whether the sums are `out` as it lies: channels last, and no more of them."""
        t = self.tiling
        size = out.itemsize
        return (
            t.multiplier == 1
            and t.pitch == out.shape[1]
            and width == out.shape[4]
            and out.dtype == self.dtype
            and out.flags.aligned
            and out.strides[1] == size
            and (t.pixels == 1 or out.strides[4] == t.pitch * size)
            and all(stride % size == 0 for stride in out.strides)
        )
