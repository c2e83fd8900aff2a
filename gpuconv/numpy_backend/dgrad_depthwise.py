"""The gradient of a strided depthwise convolution's x, as products with banded matrices.

    dx[n, c, i, j] = sum over p, q, r, s  of  dy[n, c, p, q] w[c, r, s]
                     where  stride*p + r - pad = i  and the same of q, s and j

dy's rows are spread along the columns with zeros between, and copied once per column of the filter,
each shifted by one more element, at the pitch of dx:

    shifted[p, s, j] = dy[p, q]  where stride*q + s - pad = j,  0 elsewhere

B rows of dx below each other, a multiple of the stride, are one product of few rows with the filter
laid out as a band: row b of them meets row p of dy under w[b + pad - stride*p],

    dx[i + b, j] = sum over p, s of  band[b, (p, s)] * shifted[p, s, j]

Most of the products are with zeros, and still take less time than four dense convolutions whose
results are then written to every other element. A float32 row with zeros between is a row of 64-bit
integers made of 32-bit ones, which NumPy converts much faster than it writes every other element.

A zero times infinity is not zero: an image's block with a NaN is summed again, tap by tap.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import planes
from gpuconv.numpy_backend.device import VECTOR, WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Scratch
from gpuconv.numpy_backend.scratch import ALIGN, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("dgrad",)

_CACHED = 2 << 20  # bytes of scratch memory that stay in a core's cache,
_SHARED = 8 << 20  # and where threads share the work: few calls, as each hands over the lock
_INLINE = 2e-3  # seconds of work below which waking threads after a rest costs more than it saves
_BLOCK = 30e-6  # seconds that the calls of a block take,
_HANDOVER = 100e-6  # and with what threads then wait for each other
_PAIRS = sys.byteorder == "little"  # whether a 64-bit integer begins with its low half


@dataclass(frozen=True)
class Tiling:
    """How the gradient is cut into blocks, and a block into products."""

    all_channels: int
    extents: tuple[int, int]  # of dx, and so on
    grad: tuple[int, int]
    filter: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    itemsize: int
    channels_last: bool
    band: int  # B
    rows: int  # of dx in a block, a multiple of B where that is not all
    channels: int = 1
    images: int = 1
    threads: int = 1

    @cached_property
    def first(self) -> int:
        """The row of dy, perhaps above its edge, that the first row of dx may meet first."""
        return -((self.filter[0] - 1 - self.pad[0]) // self.stride[0])

    @cached_property
    def depth(self) -> int:
        """Rows of dy that a band meets."""
        return (self.band - 1 + self.pad[0]) // self.stride[0] - self.first + 1

    def reads(self, rows: int) -> int:
        """Rows of dy that so many rows of dx meet."""
        bands = -(-rows // self.band)
        return (bands - 1) * self.band // self.stride[0] + self.depth

    @cached_property
    def lead(self) -> int:
        """Zeros before the first element of a spread row; pairs want to begin at even places."""
        return (self.filter[1] - 1 - self.pad[1]) % 2

    @cached_property
    def width(self) -> int:
        """Elements of a spread row."""
        return -(-(self.lead + self.extents[1] + self.filter[1] - 1) // 2) * 2

    @cached_property
    def scratch(self) -> int:
        """Bytes of one worker, beside the bands of all channels."""
        each = self.images * self.channels
        reads, columns = self.reads(self.rows), self.extents[1]
        pieces = (
            each * self.rows * columns,
            each * reads * self.width,
            each * reads * max(self.filter[1] * columns, self.grad[1]),
        )
        return sum(rounded(self.itemsize * piece) for piece in pieces)

    @cached_property
    def bands(self) -> int:
        """Bytes of the bands of all channels."""
        return rounded(self.itemsize * self.all_channels * self.band * self.depth * self.filter[1])

    @cached_property
    def seconds(self) -> float:
        """Predicted time of one plane of one image, on one thread, but for the blocks' calls.

        Copies by their elements and runs, products by the vectors they multiply.
        """
        rows, columns = self.extents
        size = self.itemsize / 4
        blocks = rows / self.rows
        reads = blocks * self.reads(self.rows)
        paired = self.itemsize == 4 and self.stride[1] == 2
        spread = reads * self.width * 0.05e-9 * size
        spread += reads * self.grad[1] * (0.2e-9 if paired else 0.3e-9)
        runs = reads * self.filter[1]
        shifted = runs * (3e-9 + columns * 0.09e-9 * size)
        vectors = -(-columns * self.itemsize // VECTOR)
        step = 0.2e-9 + vectors * (0.2e-9 + max(0.17e-9 * self.band, 0.3e-9))
        bands = blocks * -(-self.rows // self.band)
        products = bands * (30e-9 + self.depth * self.filter[1] * step)
        checked = rows * columns * 0.06e-9 * size
        if self.channels_last:
            spread += reads * self.grad[1] * 0.3e-9
            checked += rows * columns * 0.4e-9
        return spread + shifted + products + checked

    def blocks(self, batch: int) -> int:
        channels = -(-self.all_channels // self.channels)
        return channels * -(-batch // self.images) * -(-self.extents[0] // self.rows)


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "dgrad":
        return No(f"computes dgrad, not {problem.operation}")
    if not problem.depthwise or problem.group_out_channels > 1:
        return No("an input channel meets more than one filter")
    if problem.ndim > 2 or max(problem.dilation) > 1:
        return No("only 1 or 2 axes without dilation")
    if problem.padded and problem.padding_mode != "zeros":
        return No(f"padding_mode {problem.padding_mode!r} is not computed")
    if problem.accumulator.is_exact or problem.accumulator.is_complex:
        return No(f"{problem.accumulator} is not summed in floating point")
    if any(lo >= n for lo, n in zip(problem.pad_lo, problem.filter, strict=True)):
        return No("windows that lie in the padding alone")
    if max(problem.stride) == 1:
        return No("stride 1: a convolution with the filter flipped")
    if workspace(problem, device) > WORKSPACE_CAP:
        return No("the shifted copies of so wide a band do not fit in the workspace")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The copies and products of all planes, spread over the threads."""
    tiling = _tiling(problem, device)
    calls = tiling.blocks(problem.batch) * (_HANDOVER if tiling.threads > 1 else _BLOCK)
    work = problem.batch * problem.in_channels * tiling.seconds + calls
    if tiling.threads > 1:
        memory = problem.bytes_moved / device.memory_bytes
        return work / tiling.threads + memory / 2 + planes.START
    return work + _BLOCK


def workspace(problem: ConvProblem, device: Cpu) -> int:
    tiling = _tiling(problem, device)
    return tiling.threads * tiling.scratch + tiling.bands + ALIGN


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> Tiling:
    """The band and the rows of a block, which decide bits, do not depend on the batch."""
    (h, w), (p, q) = ((1, 1, *n)[-2:] for n in (problem.input, problem.output))
    r, s = (1, 1, *problem.filter)[-2:]
    a, b = (1, 1, *problem.stride)[-2:]
    u, v = (0, 0, *problem.pad_lo)[-2:]
    whole = problem.workspace_within(WORKSPACE_CAP) - ALIGN
    options = []
    last = problem.channels_last and problem.in_channels > 1
    for count in range(1, max(8 // a, 1) + 1):
        band = a * count
        cut = Tiling(
            problem.in_channels, (h, w), (p, q), (r, s), (a, b), (u, v),
            problem.accumulator.itemsize, last, band, -(-h // band) * band,
        )  # fmt: skip
        limit = (whole - cut.bands) // device.threads
        while cut.scratch > min(_CACHED, limit) and cut.rows > band:
            cut = replace(cut, rows=-(-cut.rows // (2 * band)) * band)
        options.append(cut)
    best = min(options, key=lambda cut: (max(cut.scratch + cut.bands, whole), cut.seconds))
    threads = device.threads
    if problem.batch * problem.in_channels * best.seconds < _INLINE:
        threads = 1
    best = replace(best, threads=threads)
    if best.rows < h:
        return best
    share = -(-problem.in_channels // threads) if problem.batch < threads else problem.in_channels
    budget = min(_SHARED if threads > 1 else _CACHED, (whole - best.bands) // threads)
    images = -(-problem.batch // threads)
    return planes.grown(best, problem.in_channels, share, images, budget)


def run(plan: Plan, grad: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem, tiling = plan.problem, _tiling(plan.problem, plan.device)
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    while w.ndim < 4:
        grad, w, out = (array[:, :, None] for array in (grad, w, out))
    blocks = planes.Grid(
        planes.spans(problem.in_channels, tiling.channels),
        planes.spans(len(grad), tiling.images),
        planes.spans(tiling.extents[0], tiling.rows),
    )
    work = len(grad) * problem.in_channels * tiling.seconds
    threads = 1 if work < _INLINE else tiling.threads
    dtype = problem.accumulator.numpy
    with arena(threads * tiling.scratch + tiling.bands + ALIGN) as memory:
        bands = memory.take(tiling.bands // dtype.itemsize, dtype)
        bands = _laid_out(tiling, w[:, 0], bands)
        workers = [
            _Worker(tiling, dtype, memory.take(tiling.scratch, np.dtype(np.uint8)))
            for _ in range(threads)
        ]

        def block(where: tuple[Any, ...], index: int) -> None:
            channels, images, rows = where
            here = slice(*images), slice(*channels)
            workers[index].compute(
                grad[here],
                w[here[1], 0],
                bands[here[1]],
                rows[0],
                None if bias is None else bias[here[1]],
                out[(*here, slice(*rows))],
            )

        run_blocks(threads, blocks, block)


def _laid_out(tiling: Tiling, w: HostArray, memory: HostArray) -> HostArray:
    """The bands of filters (channels, R, S): (channels, 1, B, depth * S)."""
    t = tiling
    bands = memory[: len(w) * t.band * t.depth * t.filter[1]]
    bands = bands.reshape(len(w), t.band, t.depth, t.filter[1])
    bands.fill(0)
    for row in range(t.band):
        # w's row for the first row of dy, and every stride-th before it for those below.
        top = row + t.pad[0] - t.stride[0] * t.first
        for at in range(t.depth):
            if 0 <= top - t.stride[0] * at < t.filter[0]:
                bands[:, row, at] = w[:, top - t.stride[0] * at]
    return bands.reshape(len(w), 1, t.band, -1)


class _Worker:
    """One worker's scratch memory."""

    def __init__(self, tiling: Tiling, dtype: np.dtype[Any], memory: HostArray) -> None:
        self.tiling, self.dtype = tiling, dtype
        self.scratch = Scratch(memory)

    def compute(
        self,
        grad: HostArray,
        w: HostArray,
        bands: HostArray,
        start: int,
        bias: HostArray | None,
        out: HostArray,
    ) -> None:
        """The rows of dx from `start`, as many as `out` (images, channels, rows, columns) has."""
        self.scratch.free()
        in_place = (
            out.dtype == self.dtype
            and out.flags.aligned
            and out.strides[3] == out.itemsize
            and out.strides[2] == out.shape[3] * out.itemsize
        )
        sums = out if in_place else self.scratch.take(out.shape, self.dtype)
        before = self.scratch.mark()
        self._multiply(grad, bands, start, sums)
        for n in planes.spoilt(sums):
            self.scratch.free(before)
            self._tap_by_tap(grad[n], w, start, sums[n])
        if bias is not None:
            sums += bias.astype(self.dtype).reshape(-1, 1, 1)
        if not in_place:
            np.copyto(out, sums, casting="unsafe")

    def _multiply(self, grad: HostArray, bands: HostArray, start: int, sums: HostArray) -> None:
        t = self.tiling
        images, channels, rows, columns = sums.shape
        reads, taps = t.reads(rows), t.filter[1]
        first = start // t.stride[0] + t.first
        top, bottom = max(first, 0), max(min(first + reads, t.grad[0]), 0)
        spread = self.scratch.take((images, channels, reads, t.width), self.dtype)
        spread.fill(0)
        inside = slice(top - first, max(bottom, top) - first)
        self._spread(spread[:, :, inside], grad[:, :, top : max(bottom, top)])
        shifted = self.scratch.take((images, channels, reads, taps, columns), self.dtype)
        n_, c_, p_, j_ = spread.strides
        source: HostArray = np.ndarray(
            shifted.shape, self.dtype, spread, (t.lead + taps - 1) * j_, (n_, c_, p_, -j_, j_)
        )
        np.copyto(shifted, source)
        n_, c_, p_, _, j_ = shifted.strides
        depth = t.depth * taps
        whole = rows // t.band
        for begin, count, extent in ((0, whole, t.band), (whole * t.band, 1, rows % t.band)):
            if not count or not extent:
                continue
            windows: HostArray = np.ndarray(
                (images, channels, count, depth, columns), self.dtype, shifted,
                begin // t.stride[0] * p_, (n_, c_, t.band // t.stride[0] * p_, j_ * columns, j_),
            )  # fmt: skip
            target = sums[:, :, begin : begin + count * extent]
            np.matmul(
                bands[:, :, :extent],
                windows,
                out=target.reshape(images, channels, count, extent, columns),
            )

    def _spread(self, target: HostArray, grad: HostArray) -> None:
        """dy's rows to every stride-th element of rows of zeros."""
        t = self.tiling
        step = t.stride[1]
        offset = t.lead + t.filter[1] - 1 - t.pad[1]
        count = min(t.grad[1], -(-(t.width - offset) // step))
        grad = grad[..., :count]
        if (
            _PAIRS
            and step == 2
            and grad.dtype == self.dtype
            and grad.itemsize == 4
            and grad.flags.aligned
            and offset + 2 * count <= t.width
        ):
            pairs = target[..., offset : offset + 2 * count].view(np.uint64)
            np.copyto(pairs, grad.view(np.uint32))
        else:
            places = slice(offset, offset + (count - 1) * step + 1, step)
            np.copyto(target[..., places], grad, casting="unsafe")

    def _tap_by_tap(self, grad: HostArray, w: HostArray, start: int, sums: HostArray) -> None:
        """The same for one image, (channels, rows, columns), without zeros between."""
        t = self.tiling
        rows, columns = sums.shape[1:]
        sums.fill(0)
        for tap in np.ndindex(*t.filter):
            ours, theirs = [], []
            for axis, (begin, extent) in enumerate(((start, rows), (0, columns))):
                # stride*p + shift is the place in these rows or columns that p reaches.
                shift = tap[axis] - t.pad[axis] - begin
                lo = max(-(shift // t.stride[axis]), 0)
                hi = min(-(-(extent - shift) // t.stride[axis]), t.grad[axis])
                ours.append(slice(lo * t.stride[axis] + shift, None, t.stride[axis]))
                theirs.append(slice(lo, max(hi, lo)))
            chosen = grad[:, *theirs]
            if chosen.size:
                part = self.scratch.take(chosen.shape, self.dtype)
                np.multiply(
                    chosen, w[:, *tap, None, None], out=part, dtype=self.dtype, casting="unsafe"
                )
                here = sums[:, *ours][:, : part.shape[1], : part.shape[2]]
                np.add(here, part, out=here)
                self.scratch.free(self.scratch.mark() - rounded(part.nbytes))
