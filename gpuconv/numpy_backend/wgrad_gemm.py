"""The gradient of w as matrix products: dy (K, pixels) times the windows (pixels, C*R*S).

    dw[k, c, r] = sum over n, p of  dy[n, k, p] x[n, c, stride*p + dilation*r - pad]

An item of work is a piece of dw: some filters by some channels by all taps, summed over one share
of the pixels. Block by block of pixels its windows are laid out in a buffer that stays in the
caches, multiplied, and the products added up in order. Where there are fewer pieces than threads,
the pixels are cut into a fixed number of shares whose sums are added up in order at the end: the
bits do not depend on which thread did what.

    columns: (G, C/G, taps, images * pixels)        grad: (G, K/G, images * pixels)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import gemm, tiling, windows
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("wgrad",)

_BLOCK_BYTES = 4 << 20  # of windows
_MOST_PIXELS = 4096
_ROWS = 576  # windows' rows of an item: 64 channels under 3x3
_FILTERS = 512

_FLOAT64, _INT64 = np.dtype(np.float64), np.dtype(np.int64)


@dataclass(frozen=True)
class Tiling:
    """How the work is cut, by the plan alone."""

    groups: int  # of an item
    channels: int  # of one group
    filters: int  # of one group
    images: int  # that share a block; more than 1 only where the box is a whole image
    box: tiling.Box  # output positions of a block
    shares: int  # of the pixels, each summed on its own
    threads: int

    def item(self, problem: ConvProblem) -> int:
        """Elements of an item's piece of dw."""
        return self.groups * self.filters * self.channels * math.prod(problem.filter)

    def pieces(self, problem: ConvProblem) -> tuple[int, int, int, int]:
        """Elements of a worker's scratch: padded input, windows, dy, and the sums or products."""
        pixels = self.images * math.prod(self.box)
        rows = self.groups * self.channels
        block = self.images * rows * math.prod(windows.extents(problem, self.box))
        columns = rows * math.prod(problem.filter) * pixels
        return block, columns, self.groups * self.filters * pixels, self.item(problem)

    def bytes(self, problem: ConvProblem) -> int:
        """All of the scratch memory."""
        size = gemm.itemsize(problem)
        *read, item = (rounded(n * size) for n in self.pieces(problem))
        partial = rounded(math.prod(problem.w_shape) * size) * self.shares * (self.shares > 1)
        return partial + self.threads * (sum(read) + 2 * item) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    return problem.operation == "wgrad" or No(f"computes wgrad, not {problem.operation}")


def cost(problem: ConvProblem, device: Cpu) -> float:
    """Products at BLAS's rate for such shapes, the windows' copies, the products' sums."""
    cut = _tiling(problem, device)
    size = gemm.itemsize(problem)
    taps, pixels = math.prod(problem.filter), cut.images * math.prod(cut.box)
    sides = (cut.filters, 8), (pixels, 16), (cut.channels * taps, 8)
    rate = gemm.rate(problem, device, 1.3, *sides)
    if cut.filters == 1:
        rate /= 4  # a product with a vector, of another kind
    all_pixels = problem.batch * math.prod(problem.output)
    turns = -(-problem.group_out_channels // cut.filters)
    copied = (problem.in_channels * taps * turns + problem.out_channels) * size * all_pixels
    blocks = all_pixels / pixels
    summed = 3 * size * math.prod(problem.w_shape) * blocks
    items = math.prod(problem.w_shape) / cut.item(problem)
    calls = items * blocks * (16 + cut.groups) * device.call_seconds
    seconds = problem.flops / rate + (copied + summed) / device.copy_bytes + calls
    # Groups are many short calls, between which threads take turns at Python.
    call = seconds / max(items * blocks * 10, 1) if problem.groups > 1 else math.inf
    threads = tiling.speedup(cut.threads, cut.threads, call)
    return seconds / threads + problem.bytes_moved / device.memory_bytes + device.start_seconds


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(problem)


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> Tiling:
    limit = problem.workspace_within(WORKSPACE_CAP)
    taps = math.prod(problem.filter)
    channels = tiling.even(problem.group_in_channels, max(_ROWS // taps, 1))
    groups = tiling.even(problem.groups, max(_ROWS // (taps * channels), 1))
    filters = tiling.even(problem.group_out_channels, _FILTERS)
    threads = device.threads if problem.flops > gemm.WORTH_THREADS else 1
    rows = groups * channels * taps
    pixels = max(min(_BLOCK_BYTES // (rows * gemm.itemsize(problem)), _MOST_PIXELS), 64)
    cut = Tiling(groups, channels, filters, 1, (), 1, threads)
    while True:
        cut = _shared(problem, _boxed(problem, cut, pixels))
        if cut.bytes(problem) <= limit:
            return cut
        if pixels > 256:
            pixels //= 2
        elif cut.threads > 1:
            cut = replace(cut, threads=cut.threads - 1)
        elif cut.filters > 8:
            cut = replace(cut, filters=-(-cut.filters // 2))
        elif cut.groups > 1:
            cut = replace(cut, groups=-(-cut.groups // 2))
        elif cut.channels > 1:
            cut = replace(cut, channels=-(-cut.channels // 2))
        elif pixels > 1:
            pixels //= 2
        elif cut.filters > 1:
            cut = replace(cut, filters=-(-cut.filters // 2))
        else:
            return cut


def _boxed(problem: ConvProblem, cut: Tiling, pixels: int) -> Tiling:
    box = tiling.cut(problem.output, pixels)
    images = 1
    if box == problem.output:
        images = min(max(pixels // math.prod(box), 1), problem.batch)
    return replace(cut, box=box, images=images)


def _shared(problem: ConvProblem, cut: Tiling) -> Tiling:
    """As many shares of the pixels as keep all threads busy to the end."""
    items = math.prod(
        -(-extent // part)
        for extent, part in (
            (problem.groups, cut.groups),
            (problem.group_in_channels, cut.channels),
            (problem.group_out_channels, cut.filters),
        )
    )
    blocks = -(-problem.batch // cut.images) * tiling.count(problem.output, cut.box)
    wanted = 1 if cut.threads == 1 or items >= 3 * cut.threads else 2 * cut.threads // items
    return replace(cut, shares=max(min(wanted, blocks), 1))


def run(plan: Plan, x: HostArray, grad: HostArray, bias: None, out: HostArray) -> None:
    with arena(workspace(plan.problem, plan.device)) as memory:
        _Run(plan, x, grad, out, memory).all()


def product_type(problem: ConvProblem, pixels: int) -> gemm.Type:
    """The type of the products of one block: for integers one that holds their sums exactly."""
    if not problem.accumulator.is_exact:
        return problem.accumulator.numpy
    bits = sum(
        1 if d.kind == "b" else 8 * d.itemsize - (d.kind == "i")
        for d in (problem.x_dtype, problem.y_dtype)
    )
    return _FLOAT64 if pixels << bits <= 1 << 53 else _INT64


class _Run:
    def __init__(
        self, plan: Plan, x: HostArray, grad: HostArray, out: HostArray, memory: Arena
    ) -> None:
        problem, cut = plan.problem, _tiling(plan.problem, plan.device)
        self.problem, self.cut = problem, cut
        groups = problem.groups
        self.x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        self.grad = grad.reshape(grad.shape[0], groups, -1, *grad.shape[2:])
        if problem.flip:
            out = np.flip(out, tuple(range(2, out.ndim)))
        self.out = out.reshape(groups, -1, *out.shape[1:])
        self.product = product_type(problem, cut.images * math.prod(cut.box))
        self.total = _INT64 if problem.accumulator.is_exact else self.product
        block, columns, values, item = cut.pieces(problem)
        self.scratch = [
            (
                memory.take(block, self.product),
                memory.take(columns, self.product),
                memory.take(values, self.product),
                memory.take(item, self.product),
                memory.take(item, self.total),
            )
            for _ in range(cut.threads)
        ]
        self.partial: HostArray | None = None
        if cut.shares > 1:
            self.partial = memory.take(cut.shares * out.size, self.total)
            self.partial = self.partial.reshape(cut.shares, *self.out.shape)

    def all(self) -> None:
        problem, cut = self.problem, self.cut
        items = list(
            itertools.product(
                tiling.spans(problem.groups, cut.groups),
                tiling.spans(problem.group_out_channels, cut.filters),
                tiling.spans(problem.group_in_channels, cut.channels),
                range(cut.shares),
            )
        )
        run_blocks(cut.threads, items, self._item)
        if self.partial is not None:
            for share in range(1, cut.shares):
                self.partial[0] += self.partial[share]
            self._keep(self.partial[0], self.out)

    def _keep(self, total: HostArray, target: HostArray) -> None:
        if self.problem.accumulator.is_exact:
            total = total.view(self.problem.accumulator.numpy)
        np.copyto(target, total, casting="unsafe")

    def _blocks(self, share: int) -> Iterator[tuple[int, tiling.Box, tiling.Box]]:
        """The blocks of one share of the pixels: first image, corner, extents."""
        boxes = list(tiling.boxes(self.problem.output, self.cut.box))
        firsts = range(0, self.x.shape[0], self.cut.images)
        count = len(firsts) * len(boxes)
        for i in range(count * share // self.cut.shares, count * (share + 1) // self.cut.shares):
            n, box = divmod(i, len(boxes))
            yield firsts[n], boxes[box][0], boxes[box][1]

    def _item(self, item: tuple[slice, slice, slice, int], worker: int) -> None:
        g, k, c, share = item
        _, _, _, products, total = self.scratch[worker]
        shape = (g.stop - g.start, k.stop - k.start, c.stop - c.start, *self.problem.filter)
        size = math.prod(shape)
        total, products = total[:size].reshape(shape), products[:size].reshape(shape)
        flat = (*shape[:2], -1)
        first = True
        for n, corner, extents in self._blocks(share):
            columns, values = self._read(n, corner, extents, g, k, c, worker)
            same = self.product == self.total
            np.matmul(
                values,
                columns.transpose(0, 2, 1),
                out=(total if first and same else products).reshape(flat),
            )
            if first and not same:
                np.copyto(total, products, casting="unsafe")
            elif not first:
                if not same:  # float64 holding integers: add them up as such
                    whole = products.view(_INT64)
                    np.copyto(whole, products, casting="unsafe")
                    total += whole
                else:
                    total += products
            first = False
        if first:
            total[...] = 0  # more shares than blocks: a smaller batch than planned
        if self.partial is not None:
            self.partial[(share, g, k, c)] = total
        else:
            self._keep(total, self.out[g, k, c])

    def _read(
        self,
        n: int,
        corner: tiling.Box,
        extents: tiling.Box,
        g: slice,
        k: slice,
        c: slice,
        worker: int,
    ) -> tuple[HostArray, HostArray]:
        """The windows (G, C/G * taps, pixels) and dy (G, K/G, pixels) of a block."""
        problem, cut = self.problem, self.cut
        block, columns, values, *_ = self.scratch[worker]
        x, grad = self.x[n : n + cut.images, g, c], self.grad[n : n + cut.images, g, k]
        images, groups, channels = x.shape[:3]
        ends = [a + b for a, b in zip(corner, extents, strict=True)]
        grad = grad[tiling.region(corner, extents)]
        pixels = images * math.prod(extents)
        chosen = _columns(grad, self.product)
        if chosen is None:
            chosen = gemm.laid_out(np.moveaxis(grad, 0, 2), values, 2)
        reads = windows.extents(problem, extents)
        plain = math.prod(problem.filter) == 1 and not problem.padded
        if plain:
            stride = zip(corner, ends, problem.stride, strict=True)
            read: tuple[Any, ...] = (..., *(slice(a * s, (b - 1) * s + 1, s) for a, b, s in stride))
            seen = x[read]
            direct = None if problem.conjugate and seen.dtype.kind == "c" else seen
            matrix = None if direct is None else _columns(direct, self.product)
            if matrix is not None:
                return matrix, chosen
            view = np.moveaxis(seen, 0, 2)
        else:
            part = block[: images * groups * channels * math.prod(reads)]
            part = part.reshape(images, groups * channels, *reads)
            ranges = [
                windows.input_range(problem, axis, a, b)
                for axis, (a, b) in enumerate(zip(corner, ends, strict=True))
            ]
            split = part.reshape(images, groups, channels, *reads)
            for i in range(groups):  # x's channels of several groups may be no one axis
                windows.read(problem, x[:, i], ranges, split[:, i])
            view = windows.windows(problem, part, extents)
            view = view.reshape(images, groups, channels, *view.shape[2:])
            view = np.moveaxis(view, 0, 3 + problem.ndim - 1)
        matrix = columns[: view.size].reshape(view.shape)
        np.copyto(matrix, view, casting="unsafe")
        if problem.conjugate and matrix.dtype.kind == "c":
            np.conjugate(matrix, out=matrix)
        return matrix.reshape(groups, -1, pixels), chosen


def _columns(region: HostArray, product: gemm.Type) -> HostArray | None:
    """(images, G, rows, box...) as (G, rows, pixels) where BLAS can read that as it lies."""
    if region.shape[0] != 1 or region.dtype != product:
        return None
    flat = tiling.flat(region[0], region.ndim - 3)
    return flat if flat is not None and gemm.readable(flat) else None
