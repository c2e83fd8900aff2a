"""Depthwise convolution under filters about as wide as the image, for batches: no copies at all.

A row of outputs of one channel is a linear map of the rows of x that its windows meet. Those rows
follow each other in memory, in every image, so that for G images they are a matrix as they lie:

    y[n, c, p, :] = x[n, c, h : h + R, :] as R*W numbers  @  T[c]
    T[c][(r, i), q] = w[c, r, s]  where  i = stride*q + s - pad,  0 elsewhere

T is the same for all rows and all images; where windows reach beyond the image's top or bottom, the
rows of T that would meet the padding are left out. Of T's columns at most S/W are not zeros, which
is why this pays for wide filters alone: there the shifted copies of ``depthwise`` cost most.

A product's bits may depend on its shape, so it always has G rows: a call's last images are filled
up with zeros, and so are brought to scratch memory, as images are whose rows are not neighbours.
T's zeros times an Inf or NaN are not zero: a channel of an image with a NaN is summed again, tap by
tap, and so is everything where a filter is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import planes
from gpuconv.numpy_backend.device import UNPACKED, VECTOR, WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_IMAGES = (8, 16, 32)  # G: BLAS is slow at fewer
_CACHED = 1 << 20  # bytes of T and x of a block that stay in a core's cache
_PACKED = 1.4  # how much longer a product takes where OpenBLAS packs its operands
_HANDOVER = 150e-6  # seconds that threads wait for each other in the calls of a block
_FAR = 1e-3  # by how much a product of wide rows takes longer, for each column of x squared
_PRODUCT = 0.3e-6  # seconds to start a product
_ELEMENT = 0.35e-9  # seconds per element of T, and of what is copied


@dataclass(frozen=True)
class Tiling:
    """How the work is cut, by the plan alone."""

    h: Axis
    w: Axis
    extents: tuple[int, int]  # of an image of x
    pad: tuple[int, int]
    itemsize: int
    images: int  # G
    channels: int  # of a block
    threads: int

    @cached_property
    def rows(self) -> tuple[tuple[int, int, int], ...]:
        """For each row of outputs: its first row of x, the filter's row there, and how many."""
        found = []
        for p in range(self.h.outputs):
            top = p * self.h.stride - self.pad[0]
            first = max(top, 0)
            last = max(min(top + self.h.filter, self.extents[0]), first)
            found.append((first, first - top, last - first))
        return tuple(found)

    @cached_property
    def matrix(self) -> int:
        """Elements of T."""
        return self.h.filter * self.extents[1] * self.w.outputs

    @cached_property
    def margin(self) -> int:
        """Zeros on either side of a filter's row, from which T's rows are taken."""
        return max(self.w.stride * (self.w.outputs - 1), self.extents[1] + self.pad[1])

    @cached_property
    def scratch(self) -> int:
        """Bytes of one worker."""
        d = self.channels
        image = self.extents[0] * self.extents[1]
        result = self.h.outputs * self.w.outputs
        block = self.h.reads(self.h.outputs) * self.w.reads(self.w.outputs)
        pieces = (
            d * self.matrix, d * self.h.filter * (2 * self.margin + self.w.filter),
            d * self.images * image, d * self.images * result, block, result,
        )  # fmt: skip
        return sum(rounded(self.itemsize * piece) for piece in pieces)

    def seconds(self, batch: int, device: Cpu) -> float:
        """Predicted time of one channel of a batch, on one thread."""
        vector = VECTOR // self.itemsize
        groups = -(-batch // self.images)
        wide = -(-self.w.outputs // vector) * vector
        rate = device.gemm_flops * 4 / self.itemsize
        products = 0.0
        for _, _, count in self.rows:
            depth = count * self.extents[1]
            packed = self.images * depth * self.w.outputs > UNPACKED
            products += 2 * self.images * depth * wide / rate * (_PACKED if packed else 1)
            products += _PRODUCT
        calls = (_HANDOVER if self.threads > 1 else len(self.rows) * device.call_seconds) * groups
        # A channel's groups of images are neighbours: each thread that has some lays out T.
        laid_out = min(self.threads, groups) * self.matrix * _ELEMENT
        # Images lie far apart: a product waits for rows of x that few rows of outputs share.
        waited = 1 + _FAR * self.extents[1] ** 2 / self.h.filter
        return groups * products * waited + laid_out + calls / self.channels


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"{problem.operation} is not what it computes")
    if not problem.depthwise or problem.group_out_channels > 1:
        return No("an input channel has more than one filter, or a filter more than one channel")
    if problem.ndim != 2 or max(problem.dilation) > 1:
        return No("only 2 axes without dilation")
    if problem.output[1] == 1:
        return No("a product with a vector: BLAS may sum an image differently in another row")
    if problem.padded and problem.padding_mode != "zeros":
        return No(f"padding_mode {problem.padding_mode!r} is not computed")
    accumulator = problem.accumulator
    if accumulator.is_exact or accumulator.is_complex:
        return No(f"{accumulator} is not summed in floating point")
    if not problem.x_dtype is problem.w_dtype is problem.y_dtype is accumulator:
        return No(f"operands are not all {accumulator}, the type of the sums")
    if problem.batch < _IMAGES[0]:
        return No(f"fewer than {_IMAGES[0]} images, the rows of a product")
    if workspace(problem, device) > WORKSPACE_CAP:
        return No("the matrix of so large a filter does not fit in the workspace")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products of all rows of outputs, T for each channel, and the copies where x needs any."""
    tiling = _tiling(problem, device)
    total = problem.in_channels * tiling.seconds(problem.batch, device)
    if problem.channels_last and problem.in_channels > 1:
        moved = problem.bytes_moved / problem.accumulator.itemsize
        total += moved * 2 * _ELEMENT
    memory = problem.bytes_moved / device.memory_bytes
    return total / tiling.threads + memory / 2 + (planes.START if tiling.threads > 1 else 0)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    tiling = _tiling(problem, device)
    return tiling.threads * tiling.scratch + ALIGN


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> Tiling:
    """The fastest number of rows of a product: the plan's batch decides it, no call's does."""
    ((_, h, w),) = planes.classes(problem)
    limit = problem.workspace_within(WORKSPACE_CAP) - ALIGN
    options = []
    for images in _IMAGES:
        if images > max(problem.batch, _IMAGES[0]):
            break
        cut = Tiling(
            h, w, (problem.input[0], problem.input[1]), (problem.pad_lo[0], problem.pad_lo[1]),
            problem.accumulator.itemsize, images, 1, device.threads,
        )  # fmt: skip
        near = (cut.matrix + images * cut.extents[0] * cut.extents[1]) * cut.itemsize
        share = -(-problem.in_channels // device.threads)
        channels = max(min(_CACHED // near, limit // (device.threads * cut.scratch), share), 1)
        threads = max(min(device.threads, limit // (channels * cut.scratch)), 1)
        options.append(Tiling(h, w, cut.extents, cut.pad, cut.itemsize, images, channels, threads))
    return min(
        options,
        key=lambda cut: (max(cut.scratch, limit), cut.seconds(problem.batch, device)),
    )


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem, tiling = plan.problem, _tiling(plan.problem, plan.device)
    if problem.flip:
        w = np.flip(w, (2, 3))
    blocks = planes.Grid(
        planes.spans(problem.in_channels, tiling.channels), planes.spans(len(x), tiling.images)
    )
    with arena(tiling.threads * tiling.scratch + ALIGN) as memory:
        workers = [
            _Worker(tiling, problem, w[:, 0], memory.take(tiling.scratch, np.dtype(np.uint8)))
            for _ in range(tiling.threads)
        ]

        def block(where: tuple[Any, ...], index: int) -> None:
            channels, images = where
            here = slice(*images), slice(*channels)
            workers[index].weigh(channels)
            workers[index].compute(x[here], None if bias is None else bias[here[1]], out[here])

        run_blocks(tiling.threads, blocks, block)


class _Worker:
    """One worker's scratch memory, and T of the channels that it last computed."""

    def __init__(
        self, tiling: Tiling, problem: ConvProblem, w: HostArray, memory: HostArray
    ) -> None:
        self.tiling, self.all_filters = tiling, w
        self.axes = planes.classes(problem)[0]
        self.scratch = Scratch(memory)
        self.dtype: np.dtype[Any] = problem.accumulator.numpy
        self.channels: tuple[int, int] | None = None
        self.w: HostArray
        self.matrix: HostArray
        self.finite = False
        self.kept = 0

    def weigh(self, channels: tuple[int, int]) -> None:
        """Lay out T of `channels`."""
        if channels == self.channels:
            return
        self.channels, t = channels, self.tiling
        self.scratch.free()
        self.w = self.all_filters[slice(*channels)]
        self.finite = bool(np.isfinite(self.w).all())
        count, margin = len(self.w), t.margin
        shape = (count, t.h.filter, t.extents[1], t.w.outputs)
        matrix = self.scratch.take(shape, self.dtype)
        self.matrix = matrix.reshape(count, -1, t.w.outputs)
        self.kept = self.scratch.mark()
        rows = self.scratch.take((count, t.h.filter, 2 * margin + t.w.filter), self.dtype)
        rows.fill(0)
        rows[..., margin : margin + t.w.filter] = self.w
        c_, r_, s_ = rows.strides
        source: HostArray = np.ndarray(
            shape, self.dtype, rows, (margin + t.pad[1]) * s_, (c_, r_, s_, -t.w.stride * s_)
        )
        np.copyto(matrix, source)

    def compute(self, x: HostArray, bias: HostArray | None, out: HostArray) -> None:
        """Write `out`, (images, channels, rows, columns)."""
        t = self.tiling
        self.scratch.free(self.kept)
        images, channels = x.shape[:2]
        seen, sums = x, out
        if images < t.images or not _rows_are_neighbours(x):
            seen = self.scratch.take((t.images, *x.shape[1:]), self.dtype)
            seen[:images] = x
            seen[images:] = 0
        if images < t.images or not _rows_are_neighbours(out):
            sums = self.scratch.take((t.images, *out.shape[1:]), self.dtype)
        kept = sums[:images]
        if self.finite:
            self._multiply(seen, sums)
        if not self.finite or np.isnan(kept.max()):
            for n, c in np.ndindex(images, channels):
                if not self.finite or np.isnan(kept[n, c].max()):
                    self._tap_by_tap(x[n, c], c, kept[n, c])
        if bias is not None:
            np.add(kept, bias.astype(self.dtype, copy=False).reshape(-1, 1, 1), out=out)
        elif sums is not out:
            out[...] = kept

    def _multiply(self, x: HostArray, sums: HostArray) -> None:
        t = self.tiling
        width = t.extents[1]
        x = x.swapaxes(0, 1)
        for p, (first, top, count) in enumerate(t.rows):
            target = sums[:, :, p].swapaxes(0, 1)
            if not count:
                target[...] = 0
                continue
            rows = x[:, :, first : first + count].reshape(*x.shape[:2], count * width)
            np.matmul(rows, self.matrix[:, top * width : (top + count) * width], out=target)

    def _tap_by_tap(self, x: HostArray, channel: int, sums: HostArray) -> None:
        """One plane, from the padded block of x."""
        before = self.scratch.mark()
        _, h, w = self.axes
        extents = h.reads(h.outputs), w.reads(w.outputs)
        block = self.scratch.take((1, 1, 1, *extents), self.dtype)
        planes.read(block, x[None, None, None], self.axes, (0, 0, 0))
        total = sums[None, None, None, None]
        product = self.scratch.take(total.shape, self.dtype)
        taps = self.w[channel][None, None, None]
        planes.direct_sum(total, block, taps, self.axes, product)
        self.scratch.free(before)


def _rows_are_neighbours(array: HostArray) -> bool:
    """Whether the rows of each plane follow each other, and images lie apart by more."""
    n_, _, h_, w_ = array.strides
    size = array.itemsize
    plane = array.shape[2] * array.shape[3] * size
    return (
        array.flags.aligned
        and w_ == size
        and h_ == array.shape[3] * size
        and n_ >= plane
        and n_ % size == 0
    )
