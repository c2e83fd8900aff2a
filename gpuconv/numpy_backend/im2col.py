"""Convolution as a matrix product, block by block: W (K, C*R*S) times the windows (C*R*S, pixels).

Only the windows of one block of output pixels are ever laid out, in a buffer that stays in a core's
second-level cache while BLAS reads it; the products go straight to their place in the result where
BLAS can write there. Blocks are spread over threads. Sums over thousands of elements are products
of a share of the channels each, added up in order: blocks of few pixels would spend their time on
reading the weights.

The windows are laid out channels first, as the filter's own memory runs, or channels last where x's
memory does and is long enough to be worth reordering the filter:

    first: (G, channels, taps, pixels)       last: (G, pixels, taps, channels)

Several small images share a block. Where their rows are short and many, the images lie innermost,
from the padded input on: (G, channels, taps, positions, images).
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
_DEEPEST, _DEEP_PIXELS = 2304, 1024  # a longer sum is cut, to the length that its block leaves
_ROW_COPY, _ROW_ELEMENTS = 0.3, 30  # a row's copy, over the cost model's rate
_FEW_PIXELS = 96  # images smaller than this share a product, which BLAS does better when wide,
_LITTLE_WORK = 3e5  # those of fewer flops, which take no longer than the calls,
_MANY_IMAGES = 8  # and at least as many where they lie innermost
# Of laying out a row, and of an element between images that lie innermost and their own memory.
_ROW_SECONDS, _TURN_SECONDS = 5e-9, 1e-9
_CALL = 35e-6  # seconds to make ready for the first block
_SHORT_BLOCK = 60e-6  # seconds: of shorter ones, threads spend more on taking turns at Python


@dataclass(frozen=True)
class Tiling:
    """How the work is cut: fixed by the plan, so that no image's bits depend on its batch."""

    images: int  # that share a block; more than 1 only where the box is a whole image
    box: tuple[int, ...]  # output positions of a block along each axis
    inner: bool  # whether images lie innermost, where x is not channels last
    groups: int  # whose windows are laid out at a time, each of
    channels: int  # of its input channels
    filters: int  # output channels whose weights are held at a time, a multiple of all groups
    parts: int  # of a block's output channels, where there are fewer blocks than threads
    threads: int
    weights: int  # elements of scratch, each: the reordered or converted weights,
    block: int  # per thread the padded input of a block, none where windows are read from x,
    columns: int  # its windows,
    sums: int  # its products,
    more: int  # and those that are added to them

    def bytes(self, itemsize: int) -> int:
        """All of the scratch memory."""
        weights, *each = (
            rounded(n * itemsize)
            for n in (self.weights, self.block, self.columns, self.sums, self.more)
        )
        return weights + self.threads * sum(each) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"it computes fprop, not {problem.operation}")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    cut = _tiling(problem, device)
    columns = cut.images * math.prod(cut.box)
    # NumPy copies windows row by row: a short row costs as much as some thirty elements more.
    row = cut.box[-1] * (cut.images if cut.inner else 1)
    slower = max(_ROW_COPY + _ROW_ELEMENTS / row, 1)
    copied = problem.reduction * problem.groups * gemm.itemsize(problem) * slower
    if cut.inner:
        copied += 3 * device.copy_bytes * _turned(problem)
    calls = (16 if cut.threads > 1 else 6) * problem.group_in_channels // cut.channels
    turns = 8 * math.ceil(problem.groups / cut.groups) if problem.groups > 1 else 0
    return _CALL + gemm.seconds(
        problem, device, columns, 1, cut.parts, cut.threads, copied * cut.parts, calls, turns
    )


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(gemm.itemsize(problem))


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> Tiling:
    # Groups are many short calls, with Python between them.
    worth = gemm.WORTH_THREADS * (4 if problem.groups > 1 else 1)
    cut = _fitted(problem, device.threads if problem.flops > worth else 1)
    if cut.threads > 1:
        pixels = cut.images * math.prod(cut.box)
        work = 2 * problem.out_channels * problem.reduction / (1.3 * device.gemm_flops)
        copied = problem.reduction * problem.groups * gemm.itemsize(problem)
        if pixels * (work + copied / (3 * device.copy_bytes)) < _SHORT_BLOCK:
            return _fitted(problem, 1)
    return cut


def _fitted(problem: ConvProblem, threads: int) -> Tiling:
    """The largest blocks that stay in cache, made smaller until they fit the workspace limit."""
    itemsize = gemm.itemsize(problem)
    limit = problem.workspace_within(WORKSPACE_CAP)
    depth = problem.reduction * problem.groups
    filters = problem.out_channels
    weights = max(limit // 4 // itemsize, 1)
    if problem.out_channels * problem.reduction > weights:
        per_group = max(weights // depth, 1)
        filters = min(filters, problem.groups * per_group)
    channels = _channels(problem)
    length = problem.reduction // problem.group_in_channels * channels
    wide = min(_GROUP_PIXELS, problem.batch * math.prod(problem.output))
    together = max(_BLOCK_BYTES // (length * itemsize * wide), 1)
    together = math.ceil(problem.groups / math.ceil(problem.groups / together))
    pixels = _BLOCK_BYTES // (length * together * itemsize)
    if channels < problem.group_in_channels:
        pixels = max(pixels, _DEEP_PIXELS)
    pixels = min(max(pixels, _FEWEST_PIXELS), _MOST_PIXELS)
    pixels = tiling.balance(problem.output, pixels, problem.batch, threads, _FEWEST_PIXELS)
    while True:
        cut = _cut(problem, pixels, together, channels, filters, threads)
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


def _channels(problem: ConvProblem) -> int:
    """How many channels of a group share a product: equal parts of them."""
    channels, taps = problem.group_in_channels, math.prod(problem.filter)
    if problem.reduction <= _DEEPEST:
        return channels
    most = max(_DEEPEST // 2 // taps, 1)
    found = next(n for n in range(min(most, channels), 0, -1) if channels % n == 0)
    return found if 4 * found >= most else channels


def _cut(
    problem: ConvProblem, pixels: int, together: int, channels: int, filters: int, threads: int
) -> Tiling:
    box = tiling.cut(problem.output, pixels)
    size = math.prod(box)
    images = 1
    # Rows are copied one by one; images that lie innermost make them long.
    rows = problem.reduction * problem.groups * size // box[-1]
    inner = rows * _ROW_SECONDS > size * _turned(problem) and not _from_x(problem, box)
    if box == problem.output and pixels >= 2 * size:
        images = tiling.share(pixels // size, problem.batch, threads)
        little = size < _FEW_PIXELS or problem.flops < _LITTLE_WORK * problem.batch
        if not little and not (inner and images >= _MANY_IMAGES):
            images = 1
        product, count = gemm.planned_type(problem), filters // problem.groups
        length = math.prod(problem.filter) * channels
        if not gemm.columns_alike(count, length, images * size, product):
            images = 1
    some = images * together * channels
    block = 0 if _from_x(problem, box) else some * math.prod(windows.extents(problem, box))
    return Tiling(
        images=images,
        box=box,
        inner=inner and images > 1,
        groups=together,
        channels=channels,
        filters=filters,
        parts=tiling.parts(problem, box, images, threads),
        threads=threads,
        weights=filters * problem.reduction,
        block=block,
        columns=some * math.prod(problem.filter) * size,
        sums=images * size * filters,
        more=images * size * filters if channels < problem.group_in_channels else 0,
    )


def _turned(problem: ConvProblem) -> float:
    """Seconds of an output pixel to bring its inputs and results from one order to the other."""
    read = problem.in_channels * math.prod(problem.input) / math.prod(problem.output)
    return _TURN_SECONDS * (read + problem.out_channels)


def _from_x(problem: ConvProblem, box: tuple[int, ...]) -> bool:
    """Whether windows are read from x itself: where a block's input is larger than its windows."""
    read, laid_out = math.prod(windows.extents(problem, box)), math.prod(box)
    taps = math.prod(problem.filter)
    return taps == 1 or read > taps * laid_out


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    cut = _tiling(plan.problem, plan.device)
    with arena(cut.bytes(gemm.itemsize(plan.problem))) as memory:
        _run(plan.problem, cut, x, w, bias, out, memory)


def _run(
    problem: ConvProblem,
    cut: Tiling,
    x: HostArray,
    w: HostArray,
    bias: HostArray | None,
    out: HostArray,
    memory: Arena,
) -> None:
    groups = problem.groups
    product = gemm.product_type(problem, x, w)
    bias = gemm.bias_vector(problem, bias, product)
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    written_last = cut.images == 1 and gemm.channels_last(problem)
    turned = cut.images == 1 and gemm.turns(problem)
    w = w.reshape(groups, -1, *w.shape[1:])
    out = out.reshape(out.shape[0], groups, -1, *out.shape[2:])
    last = _channels_last(problem, x)
    shares = [slice(c, c + cut.channels) for c in range(0, w.shape[2], cut.channels)]
    pieces = np.split(memory.take(cut.weights, product), len(shares))
    scratch = [_Scratch(problem, cut, product, last, memory) for _ in range(cut.threads)]
    boxes = _boxes(problem, cut.box)
    firsts = range(0, x.shape[0], cut.images)
    blocks = list(itertools.product(firsts, boxes, range(cut.parts)))
    step = cut.filters // groups
    for first in range(0, problem.group_out_channels, step):
        chosen = slice(first, first + step)
        weights = [
            gemm.matrix(w[:, chosen, channels], piece, last, turned)
            for channels, piece in zip(shares, pieces, strict=True)
        ]
        column_bias = None if bias is None else bias.reshape(groups, -1, 1)[:, chosen]
        one = _Pass(problem, cut, x, weights, column_bias, out[:, :, chosen], written_last, scratch)
        run_blocks(cut.threads, blocks, one.work)


class _Pass:
    """The whole input under some of the filters."""

    def __init__(
        self,
        problem: ConvProblem,
        cut: Tiling,
        x: HostArray,
        weights: list[HostArray],
        bias: HostArray | None,
        out: HostArray,
        written_last: bool,
        scratch: list[_Scratch],
    ) -> None:
        self.problem, self.cut, self.written_last, self.scratch = (
            problem,
            cut,
            written_last,
            scratch,
        )
        self.x = x.reshape(x.shape[0], problem.groups, -1, *x.shape[2:])
        self.weights, self.bias, self.out = weights, bias, out
        self.out_flat = tiling.flat(out, problem.ndim) if cut.images == 1 else None
        self.product = weights[0].dtype
        self.rows = math.ceil(weights[0].shape[1] / cut.parts)

    def work(self, block: tuple[int, _Box, int], worker: int) -> None:
        n, box, part = block
        problem, scratch = self.problem, self.scratch[worker]
        rows = slice(part * self.rows, (part + 1) * self.rows)
        bias = None if self.bias is None else self.bias[:, rows]
        views = scratch.views(box.extents)
        images = min(self.cut.images, len(self.x) - n)
        if self.out_flat is not None:
            target = self.out_flat[n, :, rows, box.start : box.start + box.pixels]
            if gemm.in_place(problem, self.product, target, self.written_last):
                self._multiply(n, box, rows, scratch, target)
                if bias is not None:
                    target += bias
                return
        shape = (problem.groups, self.out[0, :, rows].shape[1], views.matrix.shape[2])
        sums = gemm.sums(scratch.sums, shape, self.written_last)
        self._multiply(n, box, rows, scratch, sums)
        if bias is not None:
            bias = bias.reshape(*bias.shape[:2], *[1] * problem.ndim)
        target = self.out[n : n + images, :, rows][box.region]
        if scratch.inner:
            sums = np.moveaxis(sums.reshape(*shape[:2], *box.extents, -1), -1, 0)
        else:
            sums = np.moveaxis(sums.reshape(*shape[:2], -1, *box.extents), 2, 0)
        gemm.store(problem, sums[:images], bias, target)

    def _multiply(self, n: int, box: _Box, rows: slice, scratch: _Scratch, out: HostArray) -> None:
        cut, views = self.cut, scratch.views(box.extents)
        more = (
            gemm.sums(scratch.more, out.shape, self.written_last) if len(self.weights) > 1 else out
        )
        for first in range(0, self.problem.groups, cut.groups):
            groups = slice(first, first + cut.groups)
            for i, weights in enumerate(self.weights):
                channels = slice(i * cut.channels, (i + 1) * cut.channels)
                x = self.x[n : n + cut.images, groups, channels]
                columns = views.columns[:, : x.shape[1]]
                if views.block is None:
                    windows.fill(x, box.copies, columns[: len(x)])
                else:
                    windows.fill(x, box.copies, views.block[: len(x), : x.shape[1]])
                    np.copyto(columns, views.windows[:, : x.shape[1]])
                matrix = views.matrix[: x.shape[1]]
                target = more[groups] if i else out[groups]
                if cut.images == 1:
                    gemm.multiply(weights[groups, rows], matrix, target)
                else:  # in the shape that was found to treat all columns alike
                    np.matmul(weights[groups, rows], matrix, out=target)
                if i:
                    out[groups] += target


class _Box:
    """A box of outputs of one image: what does not change from image to image."""

    def __init__(
        self, problem: ConvProblem, corner: tiling.Box, extents: tiling.Box, start: int, whole: bool
    ) -> None:
        self.extents, self.start, self.pixels = extents, start, math.prod(extents)
        self.region = tiling.region(corner, extents)
        if whole:
            self.copies = windows.gathering(problem, corner, extents)
        else:
            self.copies = windows.reading(problem, corner, extents)


@lru_cache(maxsize=256)
def _boxes(problem: ConvProblem, box: tiling.Box) -> list[_Box]:
    from_x = _from_x(problem, box)
    return [_Box(problem, *each, from_x) for each in tiling.boxes(problem.output, box)]


def _channels_last(problem: ConvProblem, x: HostArray) -> bool:
    """Whether to lay out the windows channels last: reordered filters must cost less than x's."""
    if x.strides[1] != x.itemsize or problem.group_in_channels < 16:
        return False
    return math.prod(problem.w_shape) * 4 < math.prod(problem.output) * problem.in_channels


@dataclass(frozen=True)
class _Views:
    """One worker's scratch memory, as the arrays that blocks of one size need."""

    block: HostArray | None  # (images, groups, channels, spatial...), the padded input
    windows: HostArray  # of `block`, (images, groups, channels, taps..., positions...)
    columns: HostArray  # the same, laid out
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
        self.inner = cut.inner and not last
        self._block = memory.take(cut.block, product) if cut.block else None
        self._columns = memory.take(cut.columns, product)
        self.sums = memory.take(cut.sums, product)
        self.more = memory.take(cut.more, product)
        self._views: dict[tuple[int, ...], _Views] = {}

    def views(self, box: tuple[int, ...]) -> _Views:
        if box not in self._views:
            self._views[box] = self._make(box)
        return self._views[box]

    def _make(self, box: tuple[int, ...]) -> _Views:
        problem, images, ndim = self._problem, self._cut.images, self._problem.ndim
        groups, channels, taps = self._cut.groups, self._cut.channels, problem.filter
        depth = channels * math.prod(taps)
        columns = self._columns[: groups * depth * images * math.prod(box)]
        if self._last:
            matrix = columns.reshape(groups, -1, depth).transpose(0, 2, 1)
            columns = columns.reshape(groups, images, *box, *taps, channels)
            order = (1, 0, 2 + 2 * ndim, *range(2 + ndim, 2 + 2 * ndim), *range(2, 2 + ndim))
        elif self.inner:
            matrix = columns.reshape(groups, depth, -1)
            columns = columns.reshape(groups, channels, *taps, *box, images)
            order = (2 + 2 * ndim, *range(2 + 2 * ndim))
        else:
            matrix = columns.reshape(groups, depth, -1)
            columns = columns.reshape(groups, channels, *taps, images, *box)
            order = (2 + ndim, 0, 1, *range(2, 2 + ndim), *range(3 + ndim, 3 + 2 * ndim))
        columns = columns.transpose(order)
        if self._block is None:
            return _Views(None, columns, columns, matrix)
        extents = windows.extents(problem, box)
        block = self._block[: images * groups * channels * math.prod(extents)]
        if self._last:
            block = np.moveaxis(block.reshape(images, *extents, groups * channels), -1, 1)
        elif self.inner:
            block = np.moveaxis(block.reshape(groups * channels, *extents, images), -1, 0)
        else:
            block = block.reshape(images, groups * channels, *extents)
        view = windows.windows(problem, block, box)
        view = view.reshape(images, groups, channels, *view.shape[2:])
        block = block.reshape(images, groups, channels, *extents)
        return _Views(block, view, columns, matrix)
