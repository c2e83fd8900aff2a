"""Convolution as a matrix product, block by block: W (K, C*R*S) times the windows (C*R*S, pixels).

Only the windows of one block of output pixels are ever laid out, in a buffer that stays in a core's
second-level cache while BLAS reads it; the products go straight to their place in the result where
BLAS can write there. Blocks are spread over threads.

The windows are laid out channels first, as the filter's own memory runs, or channels last where x's
memory does and is long enough to be worth reordering the filter:

    first: (G, C/G, taps, pixels)       last: (G, pixels, taps, C/G)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import gemm, tiling, windows
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_BLOCK_BYTES = 2 << 20  # of windows: about a core's second-level cache
_FEWEST_PIXELS, _MOST_PIXELS = 200, 4096  # of a block: products of fewer columns are slow
_GROUP_PIXELS = 1024  # of a block: products of few output channels want more columns
_FEW_PIXELS = 96  # images smaller than this share a product, which BLAS does better when wide


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: fixed by the plan, so that no image's bits depend on its batch."""

    images: int  # that share a block; more than 1 only where the box is a whole image
    box: tuple[int, ...]  # output positions of a block along each axis
    groups: int  # whose windows are laid out at a time
    filters: int  # output channels whose weights are held at a time, a multiple of all groups
    parts: int  # of a block's output channels, where there are fewer blocks than threads
    threads: int
    weights: int  # elements of scratch, each: the reordered or converted weights,
    block: int  # per thread the padded input of a block,
    columns: int  # its windows,
    sums: int  # and its products

    def bytes(self, itemsize: int) -> int:
        """All of the scratch memory."""
        weights, *each = (
            rounded(n * itemsize) for n in (self.weights, self.block, self.columns, self.sums)
        )
        return weights + self.threads * sum(each) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"it computes fprop, not {problem.operation}")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    cut = _tiling(problem, device)
    columns = cut.images * math.prod(cut.box)
    copied = problem.reduction * problem.groups * gemm.itemsize(problem)
    return gemm.seconds(problem, device, columns, cut.parts, cut.threads, copied * cut.parts, 16)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(gemm.itemsize(problem))


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> Tiling:
    """The largest blocks that stay in cache, made smaller until they fit the workspace limit."""
    itemsize = gemm.itemsize(problem)
    limit = WORKSPACE_CAP
    if problem.workspace_limit is not None:
        limit = min(limit, problem.workspace_limit)
    depth = problem.reduction * problem.groups
    filters = problem.out_channels
    weights = max(limit // 4 // itemsize, 1)
    if problem.out_channels * problem.reduction > weights:
        per_group = max(weights // depth, 1)
        filters = min(filters, problem.groups * per_group)
    threads = device.threads if problem.flops > gemm.WORTH_THREADS else 1
    together = max(_BLOCK_BYTES // (problem.reduction * itemsize * _GROUP_PIXELS), 1)
    together = math.ceil(problem.groups / math.ceil(problem.groups / together))
    pixels = _BLOCK_BYTES // (problem.reduction * together * itemsize)
    pixels = min(max(pixels, _FEWEST_PIXELS), _MOST_PIXELS)
    pixels = tiling.balance(problem.output, pixels, problem.batch, threads, _FEWEST_PIXELS)
    while True:
        cut = _cut(problem, pixels, together, filters, threads)
        if cut.bytes(itemsize) <= limit or pixels * threads * filters <= problem.groups:
            return cut
        if pixels > 64:
            pixels //= 2
        elif threads > 1:
            threads -= 1
        elif filters > problem.groups and cut.weights > cut.block + cut.columns:
            filters = max(filters // problem.groups // 2, 1) * problem.groups
        elif pixels > 1:
            pixels //= 2
        else:
            filters = max(filters // problem.groups // 2, 1) * problem.groups


def _cut(problem: ConvProblem, pixels: int, together: int, filters: int, threads: int) -> Tiling:
    box = tiling.cut(problem.output, pixels)
    size = math.prod(box)
    images = 1
    if box == problem.output and size < _FEW_PIXELS and pixels >= 2 * size:
        images = tiling.share(pixels // size, problem.batch, threads)
        product, rows = gemm.planned_type(problem), filters // problem.groups
        if not gemm.columns_alike(rows, problem.reduction, images * size, product):
            images = 1
    extents = windows.extents(problem, box)
    return Tiling(
        images=images,
        box=box,
        groups=together,
        filters=filters,
        parts=tiling.parts(problem, box, images, threads),
        threads=threads,
        weights=filters * problem.reduction,
        block=images * problem.in_channels * math.prod(extents),
        columns=images * size * problem.reduction * together,
        sums=images * size * filters,
    )


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    with arena(workspace(plan.problem, plan.device)) as memory:
        _run(plan, x, w, bias, out, memory)


def _run(
    plan: Plan,
    x: HostArray,
    w: HostArray,
    bias: HostArray | None,
    out: HostArray,
    memory: Arena,
) -> None:
    problem, cut = plan.problem, _tiling(plan.problem, plan.device)
    groups = problem.groups
    product = gemm.product_type(problem, x, w)
    bias = gemm.bias_vector(problem, bias, product)
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    turned = cut.images == 1 and gemm.channels_last(problem)
    w = w.reshape(groups, -1, *w.shape[1:])
    out = out.reshape(out.shape[0], groups, -1, *out.shape[2:])
    last = _channels_last(problem, x)
    weights_scratch = memory.take(cut.weights, product)
    scratch = [_Scratch(problem, cut, product, last, memory) for _ in range(cut.threads)]
    boxes = [_Box(problem, *box) for box in tiling.boxes(problem.output, cut.box)]
    firsts = range(0, x.shape[0], cut.images)
    blocks = list(itertools.product(firsts, boxes, range(cut.parts)))
    step = cut.filters // groups
    for first in range(0, problem.group_out_channels, step):
        chosen = slice(first, first + step)
        weights = gemm.matrix(w[:, chosen], weights_scratch, last, turned)
        column_bias = None if bias is None else bias.reshape(groups, -1, 1)[:, chosen]
        one = _Pass(problem, cut, x, weights, column_bias, out[:, :, chosen], turned, scratch)
        run_blocks(cut.threads, blocks, one.work)


class _Pass:
    """The whole input under some of the filters."""

    def __init__(
        self,
        problem: ConvProblem,
        cut: Tiling,
        x: HostArray,
        weights: HostArray,
        bias: HostArray | None,
        out: HostArray,
        turned: bool,
        scratch: list[_Scratch],
    ) -> None:
        self.problem, self.cut, self.turned, self.scratch = problem, cut, turned, scratch
        self.x, self.weights, self.bias, self.out = x, weights, bias, out
        self.out_flat = tiling.flat(out, problem.ndim) if cut.images == 1 else None
        self.rows = math.ceil(weights.shape[1] / cut.parts)

    def work(self, block: tuple[int, _Box, int], worker: int) -> None:
        n, box, part = block
        problem, scratch = self.problem, self.scratch[worker]
        rows = slice(part * self.rows, (part + 1) * self.rows)
        weights = self.weights[:, rows]
        bias = None if self.bias is None else self.bias[:, rows]
        views = scratch.views(box.extents)
        x = self.x[n : n + self.cut.images]
        windows.read(problem, x, box.ranges, views.block[: len(x)])
        if self.out_flat is not None:
            target = self.out_flat[n, :, rows, box.start : box.start + box.pixels]
            if gemm.in_place(problem, weights.dtype, target, self.turned):
                self._multiply(weights, views, target)
                if bias is not None:
                    target += bias
                return
        shape = (problem.groups, weights.shape[1], views.matrix.shape[2])
        sums = gemm.sums(scratch.sums, shape, self.turned)
        self._multiply(weights, views, sums)
        if bias is not None:
            bias = bias.reshape(*bias.shape[:2], *[1] * problem.ndim)
        for i in range(len(x)):
            target = self.out[n + i][:, rows][box.region]
            sums_i = sums[:, :, i * box.pixels : (i + 1) * box.pixels]
            gemm.store(problem, sums_i.reshape(target.shape), bias, target)

    def _multiply(self, weights: HostArray, views: _Views, out: HostArray) -> None:
        for first in range(0, self.problem.groups, self.cut.groups):
            groups = slice(first, first + self.cut.groups)
            source = views.windows[groups]
            if views.windows is not views.columns:
                np.copyto(views.columns[: len(source)], source)
            matrix = views.matrix[: len(source)]
            if self.cut.images == 1:
                gemm.multiply(weights[groups], matrix, out[groups])
            else:  # in the shape that was found to treat all columns alike
                np.matmul(weights[groups], matrix, out=out[groups])


class _Box:
    """A box of outputs of one image: what does not change from image to image."""

    def __init__(
        self, problem: ConvProblem, corner: tiling.Box, extents: tiling.Box, start: int
    ) -> None:
        self.extents, self.start, self.pixels = extents, start, math.prod(extents)
        ends = [c + n for c, n in zip(corner, extents, strict=True)]
        self.region = (..., *(slice(c, end) for c, end in zip(corner, ends, strict=True)))
        self.ranges = [
            windows.input_range(problem, axis, c, end)
            for axis, (c, end) in enumerate(zip(corner, ends, strict=True))
        ]


def _channels_last(problem: ConvProblem, x: HostArray) -> bool:
    """Whether to lay out the windows channels last: reordered filters must cost less than x's."""
    if x.strides[1] != x.itemsize or problem.group_in_channels < 16:
        return False
    return math.prod(problem.w_shape) * 4 < math.prod(problem.output) * problem.in_channels


@dataclass(frozen=True)
class _Views:
    """One worker's scratch memory, as the arrays that blocks of one size need."""

    block: HostArray  # (images, C, spatial...), the padded input
    windows: HostArray  # of `block`, all groups, in the axes of `columns`; `columns` itself for 1x1
    columns: HostArray  # some groups
    matrix: HostArray  # `columns` as (groups, depth, images * pixels)


class _Scratch:
    def __init__(
        self,
        problem: ConvProblem,
        cut: Tiling,
        product: gemm.Type,
        last: bool,
        memory: Arena,
    ) -> None:
        self._problem, self._cut, self._last = problem, cut, last
        self._block = memory.take(cut.block, product)
        self._columns = memory.take(cut.columns, product)
        self.sums = memory.take(cut.sums, product)
        self._views: dict[tuple[int, ...], _Views] = {}

    def views(self, box: tuple[int, ...]) -> _Views:
        if box not in self._views:
            self._views[box] = self._make(box)
        return self._views[box]

    def _make(self, box: tuple[int, ...]) -> _Views:
        problem, images = self._problem, self._cut.images
        groups, ndim = problem.groups, problem.ndim
        if groups == math.prod(problem.filter) == math.prod(problem.stride) == 1:
            return self._pointwise(box)
        extents = windows.extents(problem, box)
        size = images * problem.in_channels * math.prod(extents)
        if self._last:
            block = self._block[:size].reshape(images, *extents, problem.in_channels)
            block = np.moveaxis(block, -1, 1)
        else:
            block = self._block[:size].reshape(images, problem.in_channels, *extents)
        view = windows.windows(problem, block, box)
        view = view.reshape(images, groups, problem.group_in_channels, *view.shape[2:])
        taps, pixels = tuple(range(3, 3 + ndim)), tuple(range(3 + ndim, 3 + 2 * ndim))
        order = (1, 0, *pixels, *taps, 2) if self._last else (1, 2, *taps, 0, *pixels)
        view = view.transpose(order)
        together, depth = self._cut.groups, problem.reduction
        shape = (together, *view.shape[1:])
        columns = self._columns[: math.prod(shape)].reshape(shape)
        matrix = columns.reshape((together, -1, depth) if self._last else (together, depth, -1))
        return _Views(block, view, columns, matrix.transpose(0, 2, 1) if self._last else matrix)

    def _pointwise(self, box: tuple[int, ...]) -> _Views:
        """The input itself, read into the columns' place."""
        images, channels = self._cut.images, self._problem.in_channels
        columns = self._columns[: channels * images * math.prod(box)]
        if self._last:
            block = np.moveaxis(columns.reshape(images, *box, channels), -1, 1)
            matrix = columns.reshape(-1, channels).T
        else:
            block = columns.reshape(channels, images, *box).swapaxes(0, 1)
            matrix = columns.reshape(channels, -1)
        columns = columns[None]
        return _Views(block, columns, columns, matrix[None])
