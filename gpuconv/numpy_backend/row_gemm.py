"""Convolution as one matrix product for each row of the filter, added up.

    y[k, p, q] = sum over r of  W_r (K/G, S*C/G) @ X_r[(s, c), (p, q)]

X_r, (S*C/G, pixels), is a run of the layout that ``filter_rows`` describes: x is copied S times
where im2col's windows are R*S copies. The sums take R - 1 additions of the output instead, which
pays where a product has few rows: groups of few channels most of all.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import filter_rows, gemm, tiling, windows
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

# Of columns and sums: half of a core's second-level cache for one thread alone. Several take turns
# at Python between NumPy's calls: theirs are longer, which gains more than the cache would.
_BLOCK_BYTES, _SHARED_BLOCK_BYTES = 1 << 20, 4 << 20
_WORTH_THREADS = 4 * gemm.WORTH_THREADS  # its calls are short, with Python between them
_MOST_PIXELS = 4096  # of a block
_FEW_PIXELS = 96  # images smaller than this share a product, which BLAS does better when wide
# Depthwise problems are products of a vector with S rows. Seconds of a call and of each product,
_DEPTHWISE, _PRODUCT = 60e-6, 47e-9
# of each tap of each output, and of each element laid out at stride 1, and at others.
_TAP, _LAID_OUT, _LAID_OUT_APART = 0.055e-9, 0.33e-9, 0.6e-9


@dataclass(frozen=True)
class _Tiling:
    """How the work is cut: fixed by the plan, so that no image's bits depend on its batch."""

    images: int  # that share a block; more than 1 only where the box is a whole image
    box: tiling.Box  # output positions of a block along H and W
    groups: int  # of a block
    threads: int
    weights: int  # elements of scratch, each: the reordered weights,
    block: int  # per thread the padded input, where x's rows do not run along memory,
    columns: int  # the layout of x,
    sums: int  # the products of the first filter row, to which the others are added,
    more: int  # and those of another

    def bytes(self, itemsize: int) -> int:
        sizes = (self.weights, self.block, self.columns, self.sums, self.more)
        weights, *each = (rounded(n * itemsize) for n in sizes)
        return weights + self.threads * sum(each) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"it computes fprop, not {problem.operation}")
    if problem.ndim != 2 or problem.filter[0] == 1:
        return No("the filter has no rows to share columns: it is not 2-D, or of one row")
    if math.prod(problem.w_shape) * gemm.itemsize(problem) > WORKSPACE_CAP // 4:
        return No("the filter is too large to be reordered")
    return True


def only_by_name(problem: ConvProblem) -> str | None:
    """Its cost is fitted to groups of 4 to 32 channels, and to depthwise problems of one thread."""
    if problem.groups == 1 or 1 < problem.group_in_channels < 4:
        return "it is meant for groups of at least 4 channels, or of one"
    if problem.group_in_channels > 1:
        return None
    if problem.group_out_channels > 1 or problem.channels_last:
        return "of groups of one channel, it is meant for one filter each, channels first"
    if problem.flops > _WORTH_THREADS:
        return "of groups of one channel, it is meant for what one thread computes"
    return None


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products, the layout, the additions, NumPy's calls, and the filter's reordering."""
    if problem.depthwise and only_by_name(problem) is None:
        return _depthwise_cost(problem, device)
    cut = _tiling(problem, device)
    size, rows = gemm.itemsize(problem), problem.filter[0]
    columns = cut.images * math.prod(cut.box)
    sides = (problem.group_out_channels, 3), (columns, 16), (problem.reduction // rows, 3)
    pixels = problem.batch * math.prod(problem.output)
    laid_out = problem.groups * cut.columns / cut.groups * pixels / columns
    if problem.channels_last:  # a transpose more
        laid_out += 3 * problem.groups * cut.block / cut.groups * pixels / columns
    if problem.stride != (1, 1):
        laid_out *= 1.5
    added = 1.5 * (rows - 1) * problem.out_channels * pixels
    blocks = _blocks(problem, cut)
    calls = 6 + 3 * problem.filter[1] + 2 * rows
    overhead = (calls + cut.groups * rows / 10) * device.call_seconds
    work = (
        problem.flops / gemm.rate(problem, device, 1.5, *sides)
        + (laid_out + added) * size / (3 * device.copy_bytes)
        + blocks * overhead
    )
    reordering = math.prod(problem.w_shape) * size / device.copy_bytes
    memory = problem.bytes_moved / device.memory_bytes
    start = device.start(cut.threads)
    threads = tiling.speedup(blocks, cut.threads, work / (blocks * calls))
    return work / threads + reordering + memory + start


def _depthwise_cost(problem: ConvProblem, device: Cpu) -> float:
    cut = _tiling(problem, device)
    blocks = problem.batch * tiling.count(problem.output, cut.box)
    products = blocks * problem.groups * problem.filter[0]
    laid_out = blocks * problem.groups * cut.columns / cut.groups
    laid_out *= _LAID_OUT if problem.stride == (1, 1) else _LAID_OUT_APART
    taps = math.prod(problem.y_shape) * math.prod(problem.filter) * _TAP
    return _DEPTHWISE + products * _PRODUCT + (laid_out + taps) * gemm.itemsize(problem) / 4


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(gemm.itemsize(problem))


def _blocks(problem: ConvProblem, cut: _Tiling) -> int:
    images = math.ceil(problem.batch / cut.images)
    chunks = math.ceil(problem.groups / cut.groups)
    return max(images * tiling.count(problem.output, cut.box) * chunks, 1)


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    """The largest blocks that stay in cache, made smaller until they fit the workspace limit."""
    itemsize = gemm.itemsize(problem)
    limit = problem.workspace_within(WORKSPACE_CAP)
    threads = device.threads if problem.flops > _WORTH_THREADS else 1
    per_pixel = problem.reduction // problem.filter[0] + 2 * problem.group_out_channels
    most = _BLOCK_BYTES if threads == 1 else _SHARED_BLOCK_BYTES
    pixels = max(most // (per_pixel * itemsize), 1)
    pixels = min(pixels, _MOST_PIXELS)
    if problem.groups == 1:
        pixels = tiling.balance(problem.output, pixels, problem.batch, threads, 1)
    groups = problem.groups
    while True:
        cut = _cut(problem, pixels, groups, threads)
        each = (cut.columns + cut.sums + cut.more) * itemsize
        if groups > 1 and each > most:
            groups = min(groups - 1, max(groups * most // each, 1))
        elif cut.bytes(itemsize) <= limit or (groups, pixels, threads) == (1, 1, 1):
            break
        elif groups > 1:
            groups //= 2
        elif threads > 1 and pixels < 256:
            threads -= 1
        else:
            pixels = max(pixels // 2, 1)
    chunks = math.ceil(problem.groups / groups)
    blocks = _blocks(problem, cut)
    if blocks < 4 * threads and blocks % threads:
        chunks = min(math.ceil(chunks / threads) * threads, problem.groups)
    return _cut(problem, pixels, math.ceil(problem.groups / chunks), threads)


def _cut(problem: ConvProblem, pixels: int, groups: int, threads: int) -> _Tiling:
    box = tiling.cut(problem.output, pixels)
    size = math.prod(box)
    images = 1
    depth = problem.reduction // problem.filter[0]
    if box == problem.output and size < _FEW_PIXELS and pixels >= 2 * size:
        images = tiling.share(_FEW_PIXELS * 2 // size, problem.batch, threads)
        product = gemm.planned_type(problem)
        if not gemm.columns_alike(problem.group_out_channels, depth, images * size, product):
            images = 1
    sums = images * groups * problem.group_out_channels * size
    return _Tiling(
        images=images,
        box=box,
        groups=groups,
        threads=threads,
        weights=math.prod(problem.w_shape),
        block=images
        * groups
        * problem.group_in_channels
        * math.prod(windows.extents(problem, box)),
        columns=images * groups * depth * filter_rows.positions(problem, box),
        sums=sums,
        more=sums,
    )


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem, cut = plan.problem, _tiling(plan.problem, plan.device)
    with arena(cut.bytes(gemm.itemsize(problem))) as memory:
        _run(problem, cut, x, w, bias, out, memory)


def _run(
    problem: ConvProblem,
    cut: _Tiling,
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
        w = np.flip(w, (2, 3))
    weights = _by_rows(w, groups, memory.take(cut.weights, product))
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    out = out.reshape(out.shape[0], groups, -1, *out.shape[2:])
    if bias is not None:
        bias = bias.reshape(groups, -1, 1)
    scratch = [_Scratch(problem, cut, product, memory) for _ in range(cut.threads)]
    blocks = list(
        itertools.product(
            range(0, len(x), cut.images),
            range(0, groups, cut.groups),
            filter_rows.boxes(problem, cut.box, x.strides[-1] == x.itemsize),
        )
    )
    run_blocks(cut.threads, blocks, _Call(problem, cut, x, weights, bias, out, scratch).work)


def _by_rows(w: HostArray, groups: int, scratch: HostArray) -> HostArray:
    """The filter (K, C/G, R, S) as matrices (R, G, K/G, S*C/G)."""
    k, c, r, s = w.shape
    reordered = scratch[: w.size].reshape(r, k, s, c)
    np.copyto(reordered, w.transpose(2, 0, 3, 1), casting="unsafe")
    return reordered.reshape(r, groups, k // groups, s * c)


class _Call:
    def __init__(
        self,
        problem: ConvProblem,
        cut: _Tiling,
        x: HostArray,
        weights: HostArray,
        bias: HostArray | None,
        out: HostArray,
        scratch: list[_Scratch],
    ) -> None:
        self.problem, self.cut, self.scratch = problem, cut, scratch
        self.x, self.weights, self.bias, self.out = x, weights, bias, out
        self.out_flat = tiling.flat(out, 2) if cut.images == 1 else None
        self.x_flat = tiling.flat(x, 2) if cut.images == 1 else None

    def work(self, block: tuple[int, int, filter_rows.Box], worker: int) -> None:
        n, first, box = block
        problem, cut = self.problem, self.cut
        groups = slice(first, min(first + cut.groups, problem.groups))
        x = self.x[n : n + cut.images, groups]
        views = self.scratch[worker].views(box.extents, x.shape[1])
        flat = None if self.x_flat is None else self.x_flat[n : n + cut.images, groups]
        views.columns.fill(x, flat, box)
        bias = None if self.bias is None else self.bias[groups]
        if self.out_flat is not None:
            target = self.out_flat[n, groups, :, box.start : box.start + box.pixels]
            if gemm.in_place(problem, self.weights.dtype, target, channels_last=False):
                self._multiply(groups, views, target)
                if bias is not None:
                    target += bias
                return
        self._multiply(groups, views, views.sums)
        if bias is not None:
            bias = bias[..., None]
        for i in range(len(x)):
            target = self.out[n + i, groups][box.region]
            gemm.store(problem, views.images[i], bias, target)

    def _multiply(self, groups: slice, views: _Views, out: HostArray) -> None:
        matrices = views.columns.matrices
        np.matmul(self.weights[0, groups], matrices[0], out=out)
        for weights, matrix in zip(self.weights[1:, groups], matrices[1:], strict=True):
            np.matmul(weights, matrix, out=views.more)
            out += views.more


@dataclass(frozen=True)
class _Views:
    """One worker's scratch memory, as the arrays that blocks of one size need."""

    columns: filter_rows.Columns
    sums: HostArray  # (groups, K/G, p * images * q)
    images: HostArray  # the same, (images, groups, K/G, p, q)
    more: HostArray  # like `sums`


class _Scratch:
    def __init__(self, problem: ConvProblem, cut: _Tiling, product: gemm.Type, memory: Arena):
        self._problem, self._cut = problem, cut
        self._block = memory.take(cut.block, product)
        self._columns = memory.take(cut.columns, product)
        self._sums = memory.take(cut.sums, product)
        self._more = memory.take(cut.more, product)
        self._views: dict[tuple[tiling.Box, int], _Views] = {}

    def views(self, box: tiling.Box, groups: int) -> _Views:
        if (box, groups) not in self._views:
            self._views[box, groups] = self._make(box, groups)
        return self._views[box, groups]

    def _make(self, box: tiling.Box, groups: int) -> _Views:
        problem, images, (p, q) = self._problem, self._cut.images, box
        shape = (groups, problem.group_out_channels, p * images * q)
        sums = self._sums[: math.prod(shape)].reshape(shape)
        channels = problem.group_in_channels
        return _Views(
            columns=filter_rows.make(
                problem, box, images, groups, channels, self._block, self._columns
            ),
            sums=sums,
            images=sums.reshape(*shape[:2], p, images, q).transpose(3, 0, 1, 2, 4),
            more=self._more[: math.prod(shape)].reshape(shape),
        )
