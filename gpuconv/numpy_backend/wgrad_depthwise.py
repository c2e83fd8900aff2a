"""The gradient of a depthwise w: for each channel and tap one long dot product.

    dw[c*M + m, r] = sum over n, p of  dy[n, c*M + m, p] x[n, c, stride*p + dilation*r - pad]

A block of the padded x is laid out by its phases modulo the stride, so that the elements that one
tap meets are one run of memory; dy is laid out at the same pitch, with zeros in the gaps:

    x[0] x[1] x[2] x[3]        y[0] y[1] 0 0        stride 1, filter 3: tap r is the dot product
    x[4] x[5] x[6] x[7]        y[2] y[3] 0 0        of y's run with x's, begun r elements later

All taps that meet one phase are one call, which goes from tap to tap while a channel's runs are in
the nearest cache. Small images share a run: a dot product of a few hundred elements is mostly
overhead. A zero times infinity is not zero: blocks whose sums are not finite are summed again
without the gaps.
Blocks of one channel are added up in a fixed order, whichever threads work.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import tiling, windows
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("wgrad",)

# Of x and dy. A block for two threads is larger than a core's cache: threads that hand the
# interpreter's lock to each other every few microseconds are slower than one.
_BLOCK_BYTES, _SHARED_BYTES = 1 << 20, 4 << 20
_RUN = 4096  # elements that a dot product is given, where there are as many
_BLOCK = 60e-6  # seconds that the calls of a block take,
_HANDOVER = 150e-6  # and with what threads then wait for each other
_WORTH_THREADS = 1e7  # flops, or bytes to move


@dataclass(frozen=True)
class Tiling:
    """How the work is cut, by the plan alone."""

    channels: int  # of a block
    images: int  # of a block; more than 1 only where the box is a whole image
    box: tiling.Box
    shares: int  # of images and boxes, each summed on its own
    threads: int

    def pitch(self, problem: ConvProblem) -> tuple[int, ...]:
        """The extents of one phase of the block."""
        reads = windows.extents(problem, self.box)
        return tuple(-(-n // s) for n, s in zip(reads, problem.stride, strict=True))

    def pieces(self, problem: ConvProblem) -> tuple[int, int, int, int]:
        """Elements of a worker's scratch: padded x, its phases, dy at their pitch, the sums."""
        pitch = self.pitch(problem)
        run = self.channels * self.images * math.prod(pitch)
        plain = run * math.prod(problem.stride)
        phases = plain if any(s > 1 for s in problem.stride) else 0
        filters = self.channels * problem.group_out_channels
        return plain, phases, run * problem.group_out_channels, filters * math.prod(problem.filter)

    def bytes(self, problem: ConvProblem) -> int:
        size = problem.accumulator.itemsize
        each = sum(rounded(n * size) for n in self.pieces(problem))
        sums = rounded(self.shares * math.prod(problem.w_shape) * size)
        return self.threads * each + sums + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "wgrad":
        return No(f"computes wgrad, not {problem.operation}")
    if not problem.depthwise:
        return No(f"each output channel sees {problem.group_in_channels} input channels, not one")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """Every tap reads x and dy once more, from a core's caches, in one dot product per plane."""
    cut = _tiling(problem, device)
    taps = math.prod(problem.filter)
    size = problem.accumulator.itemsize / 4
    boxes = problem.batch / cut.images * tiling.count(problem.output, cut.box)
    blocks = boxes * -(-problem.in_channels // cut.channels)
    plain, _, spread, _ = cut.pieces(problem)
    dots = cut.channels * problem.group_out_channels * taps
    # BLAS multiplies no integers.
    each = 1e-9 if problem.accumulator.is_exact else 0.028e-9
    multiplied = dots * _length(cut.box, cut.pitch(problem), cut.images) * each
    copied = 1.9e-9 * plain + 0.18e-9 * spread
    calls = _BLOCK if cut.threads == 1 else _HANDOVER
    seconds = blocks * ((multiplied + copied) * size + dots * 27e-9 + calls)
    return seconds / cut.threads + device.start(cut.threads)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(problem)


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> Tiling:
    limit = problem.workspace_within(WORKSPACE_CAP)
    work = max(problem.flops, problem.bytes_moved)
    threads = device.threads if work > _WORTH_THREADS else 1
    cut = Tiling(1, 1, problem.output, 1, threads)
    size, pixels = problem.accumulator.itemsize, math.prod(problem.output)
    room = _SHARED_BYTES if threads > 1 else _BLOCK_BYTES
    while sum(cut.pieces(problem)) * size > room and pixels > 512:
        pixels //= 2
        cut = replace(cut, box=tiling.cut(problem.output, pixels))
    if cut.box == problem.output:
        run = math.prod(cut.pitch(problem))
        cut = replace(cut, images=max(min(_RUN // run, problem.batch), 1))
        each = max(sum(cut.pieces(problem)) * size, 1)
        most = max(min(room // each, -(-problem.in_channels // threads)), 1)
        pieces = -(-problem.in_channels // most)
        cut = replace(cut, channels=-(-problem.in_channels // pieces))
    if -(-problem.in_channels // cut.channels) < threads:
        blocks = -(-problem.batch // cut.images) * tiling.count(problem.output, cut.box)
        cut = replace(cut, shares=max(min(2 * threads, blocks), 1))
    while cut.bytes(problem) > limit:
        if cut.threads > 1:
            cut = replace(cut, threads=cut.threads - 1)
        elif cut.shares > 1:
            cut = replace(cut, shares=1)
        elif cut.channels > 1:
            cut = replace(cut, channels=-(-cut.channels // 2))
        elif cut.images > 1:
            cut = replace(cut, images=-(-cut.images // 2))
        elif pixels > 1:
            pixels = min(pixels // 2, math.prod(cut.box))
            cut = replace(cut, box=tiling.cut(problem.output, max(pixels, 1)))
        else:
            break
    return cut


def run(plan: Plan, x: HostArray, grad: HostArray, bias: None, out: HostArray) -> None:
    problem = plan.problem
    with arena(workspace(problem, plan.device)) as memory:
        _run(problem, _tiling(problem, plan.device), x, grad, out, memory)


def _run(
    problem: ConvProblem,
    cut: Tiling,
    x: HostArray,
    grad: HostArray,
    out: HostArray,
    memory: Arena,
) -> None:
    dtype, multiplier = problem.accumulator.numpy, problem.group_out_channels
    taps = math.prod(problem.filter)
    shape = (cut.shares, taps, problem.in_channels, multiplier)
    sums = memory.take(math.prod(shape), dtype).reshape(shape)
    workers = [_Worker(problem, cut, dtype, memory) for _ in range(cut.threads)]
    grad = grad.reshape(grad.shape[0], problem.in_channels, multiplier, *grad.shape[2:])
    boxes = list(tiling.boxes(problem.output, cut.box))
    firsts = range(0, x.shape[0], cut.images)
    blocks = list(itertools.product(firsts, boxes))
    channels = range(0, problem.in_channels, cut.channels)

    def item(where: tuple[int, int], worker: int) -> None:
        first, share = where
        chosen = slice(first, min(first + cut.channels, problem.in_channels))
        total = sums[share, :, chosen]
        total[...] = 0
        begin, end = (len(blocks) * i // cut.shares for i in (share, share + 1))
        for n, (corner, extents, _) in blocks[begin:end]:
            images = slice(n, n + cut.images)
            workers[worker].add(x[images, chosen], grad[images, chosen], corner, extents, total)

    run_blocks(cut.threads, list(itertools.product(channels, range(cut.shares))), item)
    for share in range(1, cut.shares):
        sums[0] += sums[share]
    # (taps, C, M) to (C * M, 1, taps...)
    result = sums[0].transpose(1, 2, 0).reshape(problem.w_shape)
    if problem.flip:
        result = np.flip(result, tuple(range(2, result.ndim)))
    np.copyto(out, result, casting="unsafe")


class _Worker:
    """One worker's scratch memory."""

    def __init__(
        self, problem: ConvProblem, cut: Tiling, dtype: np.dtype[Any], memory: Arena
    ) -> None:
        self.problem, self.strided = problem, any(s > 1 for s in problem.stride)
        self.plain, self.phases, self.grad, self.sums = (
            memory.take(n, dtype) for n in cut.pieces(problem)
        )
        # Taps that are so many apart meet the same phase.
        self.apart = [
            s // math.gcd(s, d) for s, d in zip(problem.stride, problem.dilation, strict=True)
        ]

    def add(
        self,
        x: HostArray,
        grad: HostArray,
        corner: tiling.Box,
        extents: tiling.Box,
        total: HostArray,
    ) -> None:
        """Add the block's sums to `total` (taps, channels, M)."""
        problem = self.problem
        stride, dilation, ndim = problem.stride, problem.dilation, problem.ndim
        images, channels, multiplier = grad.shape[:3]
        reads = windows.extents(problem, extents)
        pitch = tuple(-(-n // s) for n, s in zip(reads, stride, strict=True))
        whole = tuple(n * s for n, s in zip(pitch, stride, strict=True))
        block = self.plain[: channels * images * math.prod(whole)]
        block = block.reshape(channels, images, *whole)
        ends = [a + b for a, b in zip(corner, extents, strict=True)]
        ranges = [
            windows.input_range(problem, axis, a, b)
            for axis, (a, b) in enumerate(zip(corner, ends, strict=True))
        ]
        inside = block[(slice(None), slice(None), *map(slice, reads))].swapaxes(0, 1)
        _clear_margin(block, reads)
        windows.read(problem, x, ranges, inside)
        if block.dtype.kind == "c" and not problem.conjugate:
            np.conjugate(block, out=block)  # vecdot conjugates it again
        values = grad[tiling.region(corner, extents)]
        split = itertools.chain(*zip(pitch, stride, strict=True))
        phases = block.reshape(channels, images, *split)
        order = (0, *range(3, 2 * ndim + 2, 2), 1, *range(2, 2 * ndim + 1, 2))
        phases = phases.transpose(order)  # channels, phases..., images, pitch...
        if self.strided:
            runs = self.phases[: phases.size].reshape(phases.shape)
            np.copyto(runs, phases)
            phases = runs
        runs = phases.reshape(channels, *stride, -1)
        spread = self.grad[: channels * multiplier * images * math.prod(pitch)]
        spread = spread.reshape(channels, multiplier, images, *pitch)
        _clear_margin(spread, extents)
        inner = tiling.region((0,) * ndim, extents)
        np.copyto(spread[inner], np.moveaxis(values, 0, 2), casting="unsafe")
        steps = _steps(pitch)
        length = _length(extents, pitch, images)
        spread = spread.reshape(channels, multiplier, -1)[..., :length]
        found = self.sums[: channels * multiplier * math.prod(problem.filter)]
        found = found.reshape(channels, multiplier, *problem.filter)
        spread = spread[(slice(None), slice(None), *(None,) * ndim)]
        for first in np.ndindex(*map(min, self.apart, problem.filter)):
            at = [r * d for r, d in zip(first, dilation, strict=True)]
            phase = tuple(a % s for a, s in zip(at, stride, strict=True))
            start = sum(a // s * step for a, s, step in zip(at, stride, steps, strict=True))
            taps = tuple(slice(r, None, step) for r, step in zip(first, self.apart, strict=True))
            target = found[(slice(None), slice(None), *taps)]
            apart = zip(self.apart, dilation, stride, steps, strict=True)
            run = runs[(slice(None), *phase, slice(start, None))]
            seen = as_strided(
                run,
                (channels, 1, *target.shape[2:], length),
                (
                    run.strides[0],
                    0,
                    *(n * d // s * step * run.itemsize for n, d, s, step in apart),
                    run.itemsize,
                ),
            )
            np.vecdot(seen, spread, out=target)
        if found.dtype.kind in "fc" and not np.isfinite(found).all():
            self._without_gaps(inside, values, extents, total)
        else:
            total += np.moveaxis(found.reshape(channels, multiplier, -1), -1, 0)

    def _without_gaps(
        self, block: HostArray, values: HostArray, extents: tiling.Box, total: HostArray
    ) -> None:
        values = values.astype(block.dtype)
        view = windows.windows(self.problem, block, extents)
        for i, tap in enumerate(np.ndindex(*self.problem.filter)):
            seen = view[(slice(None), slice(None), *tap)][:, :, None].conj()
            total[i] += (seen * values).sum(axis=(0, *range(3, values.ndim)))


def _steps(pitch: tuple[int, ...]) -> list[int]:
    """How far apart neighbours along each axis lie in a run."""
    return [math.prod(pitch[axis + 1 :]) for axis in range(len(pitch))]


def _length(extents: tiling.Box, pitch: tuple[int, ...], images: int) -> int:
    """Elements of a dot product: from the first of the images' outputs to the last."""
    within = sum((n - 1) * step for n, step in zip(extents, _steps(pitch), strict=True))
    return (images - 1) * math.prod(pitch) + within + 1


def _clear_margin(array: HostArray, extents: tuple[int, ...]) -> None:
    """Zero what lies beyond `extents` along the last axes."""
    for axis, extent in enumerate(extents):
        inner = [slice(None)] * (len(extents) - 1 - axis)
        margin: tuple[Any, ...] = (..., slice(extent, None), *inner)
        array[margin] = 0
