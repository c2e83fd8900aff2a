"""3x3 convolution of stride 1 by Winograd's F(4x4, 3x3): 36 products where the sum has 144.

Each 4x4 tile of outputs is A'[(G w G') * (B' d B)]A of the 6x6 inputs d that it sees. The middle
product, summed over channels, is 36 matrix products, one for each position of the transformed tile.
A block of tiles (images n, rows of tiles i, tiles j in a row) passes through

    block    [n, h][w][c]           the padded input, channels last whatever x's memory order
    rows     [n, h][b][j][c]        B' along W: one 6x6 matrix on every tile of a row
    tiles    [a][b][n, i][j][c]     B' along H
    products [a][b][n, i][j][k]     36 times (tiles, C) @ (C, K)
    sums     [n, i, u][b][j][k]     A' along H
    result   [n, p][j, v][k]        A' along W; or [n, p][k][j, v] where channels come first

and stays in a core's second-level cache meanwhile. The transforms are products with 6x6 matrices:
BLAS does them four times as fast as NumPy adds slices.

The points are 0, +-5/8, +-3/2 and infinity: with them the error is three times that of the direct
sum (root mean square, on random data), where the usual 0, +-1, +-2 make it six times. It is
relative to the largest sum of magnitudes among the windows that share a tile. Inf and NaN would
spread over their tile: a block whose result is not finite is computed anew as a direct sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv import toom_cook
from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import gemm, tiling, windows
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

ERROR_CONSTANT = 8.0  # its error bound over that of the direct sum (c in gpuconv.testing)

_OUT, _IN = 4, 6  # extents of a tile: of outputs, of the inputs that they see
_BLOCK_BYTES = 1 << 20  # of transformed tiles: half of a core's second-level cache
_FEWEST_TILES, _MOST_TILES = 100, 200  # in a block: products on fewer rows are slow


_A, _B, _FILTER = toom_cook.matrices(_OUT)
_G = np.kron(_FILTER, _FILTER)  # (36, 9)


@dataclass(frozen=True)
class _Tiling:
    """How the work is cut: fixed by the plan, so that no image's bits depend on its batch."""

    images: int  # that share a block; more than 1 only where it takes in whole images
    box: tuple[int, int]  # tiles of a block along H and W
    filters: int  # output channels whose transformed filters are held at a time
    threads: int
    weights: int  # elements of scratch, each: the filters, converted,
    transformed: int  # and transformed,
    block: int  # per thread the padded input,
    even: int  # `rows`, then `products`, then `result`,
    odd: int  # `tiles`, then `sums`

    def bytes(self, itemsize: int) -> int:
        sizes = (self.weights, self.transformed, self.block, self.even, self.odd)
        weights, transformed, *each = (rounded(n * itemsize) for n in sizes)
        return weights + transformed + self.threads * sum(each) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"it computes fprop, not {problem.operation}")
    if problem.filter != (3, 3):
        return No("the filter is not 3x3")
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        return No("it has no stride or dilation")
    if problem.groups != 1:
        return No("it has no groups")
    if problem.out_channels < 2:
        return No("one output channel is no matrix product")
    if problem.accumulator.kind != "f":
        return No(f"it sums real floats, not {problem.accumulator}")
    return True


def only_by_name(problem: ConvProblem) -> str | None:
    """Few channels do not average the transforms' rounding errors, nor pay for the transforms."""
    if problem.in_channels < 16:
        return "with fewer than 16 input channels its error is not that of a sum"
    return None


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The 36 products, a few nanoseconds per element for the transforms, and the filters' own."""
    cut = _tiling(problem, device)
    c, k = problem.in_channels, problem.out_channels
    tiles = problem.batch * math.prod(_grid(problem))
    together = cut.images * math.prod(cut.box)
    blocks = max(math.ceil(tiles / together), 1)
    rate = 1.5 * device.gemm_flops * together / (together + 8)
    if together * c * k > 1e6:  # beyond, BLAS packs its operands first
        rate *= 0.85
    products = 2 * _IN * _IN * tiles * c * k / rate
    passes = math.ceil(k / cut.filters)
    transforms = _OUT * _OUT * tiles * (2.8 * c * passes + 2.4 * k) * 1e-9
    size = gemm.itemsize(problem) / 4
    work = size * (products + transforms) + 20 * blocks * passes * device.call_seconds
    filters = size * _IN * _IN * c * k * 1.2e-9
    return (
        work / tiling.speedup(blocks, cut.threads)
        + filters / cut.threads
        + 2 * device.start(cut.threads)
    )


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(gemm.itemsize(problem))


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    itemsize = gemm.itemsize(problem)
    limit = problem.workspace_within(WORKSPACE_CAP)
    channels = problem.in_channels
    filters = problem.out_channels
    while _IN * _IN * channels * filters * itemsize > limit // 3 and filters > 3:
        filters = -(-filters // 2)
    most = _BLOCK_BYTES // (_IN * _IN * max(channels, 1) * itemsize)
    tiles = min(max(most, _FEWEST_TILES), _MOST_TILES)
    threads = device.threads if problem.flops > gemm.WORTH_THREADS else 1
    tiles = tiling.balance(_grid(problem), tiles, problem.batch, threads, _FEWEST_TILES // 4)
    while True:
        cut = _cut(problem, tiles, filters, threads)
        if cut.bytes(itemsize) <= limit or (tiles, min(filters, 4), threads) == (1, filters, 1):
            return cut
        if tiles > 16:
            tiles //= 2
        elif threads > 1:
            threads -= 1
        elif filters > 4:
            filters = -(-filters // 2)
        else:
            tiles //= 2


def _grid(problem: ConvProblem) -> tuple[int, int]:
    """Tiles that cover the output."""
    p, q = problem.output
    return -(-p // _OUT), -(-q // _OUT)


def _cut(problem: ConvProblem, tiles: int, filters: int, threads: int) -> _Tiling:
    grid = _grid(problem)
    i, j = tiling.cut(grid, tiles)
    images = 1
    if (i, j) == grid and tiles >= 2 * i * j:
        images = tiling.share(tiles // (i * j), problem.batch, threads)
        product = gemm.planned_type(problem)
        if not gemm.rows_alike(images * i * j, problem.in_channels, filters, product):
            images = 1
    height, width = images * (_OUT * i + 2), _OUT * j + 2
    c, k, count = problem.in_channels, filters, images * i * j
    return _Tiling(
        images=images,
        box=(i, j),
        filters=filters,
        threads=threads,
        weights=problem.out_channels * problem.reduction,
        transformed=_IN * _IN * c * k,
        block=height * width * c,
        even=max(height * _IN * j * c, _IN * _IN * count * k),
        odd=max(_IN * _IN * count * c, _OUT * _IN * count * k),
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
    product = gemm.planned_type(problem)
    bias = gemm.bias_vector(problem, bias, product)
    if problem.flip:
        w = np.flip(w, (2, 3))
    weights = gemm.matrix(w[None], memory.take(cut.weights, product))[0]
    transformed = memory.take(cut.transformed, product)
    x_last = x.strides[1] == x.itemsize and x.shape[1] > 1
    last = problem.channels_last  # not as out lies: the same bits go to any memory
    scratch = [_Scratch(problem, cut, product, x_last, last, memory) for _ in range(cut.threads)]
    boxes = [(corner, extents) for corner, extents, _ in tiling.boxes(_grid(problem), cut.box)]
    blocks = [(n, *box) for n in range(0, x.shape[0], cut.images) for box in boxes]
    for first in range(0, problem.out_channels, cut.filters):
        chosen = slice(first, first + cut.filters)
        filters = _transform(weights[chosen], transformed, cut.threads)
        some_bias = None if bias is None else bias[chosen, None, None]
        one = _Pass(problem, cut, x, weights[chosen], filters, some_bias, out[:, chosen], scratch)
        run_blocks(min(cut.threads, len(blocks)), blocks, one.work)


def _transform(weights: HostArray, scratch: HostArray, threads: int) -> HostArray:
    """G w G' of the filters (K, C*9), as (36, C, K)."""
    k, c = len(weights), weights.shape[1] // 9
    taps = weights.reshape(k, c, 9).transpose(1, 2, 0)
    filters = scratch[: _IN * _IN * c * k].reshape(_IN * _IN, c, k)
    g = _G.astype(weights.dtype)

    def work(channels: slice, worker: int) -> None:
        np.matmul(g, taps[channels], out=filters[:, channels].transpose(1, 0, 2))

    step = max(c // (2 * threads), 1)
    run_blocks(threads, [slice(start, start + step) for start in range(0, c, step)], work)
    return filters


class _Pass:
    """The whole input under some of the filters."""

    def __init__(
        self,
        problem: ConvProblem,
        cut: _Tiling,
        x: HostArray,
        weights: HostArray,
        filters: HostArray,
        bias: HostArray | None,
        out: HostArray,
        scratch: list[_Scratch],
    ) -> None:
        self.problem, self.cut, self.scratch = problem, cut, scratch
        self.x, self.weights, self.filters, self.bias, self.out = x, weights, filters, bias, out

    def work(self, block: tuple[int, tiling.Box, tiling.Box], worker: int) -> None:
        n, corner, box = block
        views = self.scratch[worker].views(box, len(self.weights))
        x = self.x[n : n + self.cut.images]
        h, w = (_OUT * c for c in corner)
        p, q = (
            min(_OUT * b, e - s) for b, e, s in zip(box, self.problem.output, (h, w), strict=True)
        )
        _read(self.problem, x, (h, w), views.staged)
        if views.staged is not views.block:
            np.copyto(views.block, views.staged)
        np.matmul(views.b, views.columns, out=views.rows)
        np.matmul(views.b, views.overlapping, out=views.tiles)
        np.matmul(views.depth, self.filters, out=views.products)
        np.matmul(views.a, views.product_rows, out=views.sums)
        if views.last:
            np.matmul(views.a, views.sum_columns, out=views.result)
        else:
            np.matmul(views.sum_columns, views.a.T, out=views.result)
        for i in range(len(x)):
            flat = views.flat[i]
            if not math.isfinite(np.dot(flat, flat)):
                _direct(views, i, self.weights)
            target = self.out[n + i, :, h : h + p, w : w + q]
            gemm.store(self.problem, views.y[i, :, :p, :q], self.bias, target)


def _read(problem: ConvProblem, x: HostArray, corner: tuple[int, int], block: HostArray) -> None:
    """Fill `block` (n, c, h, w) with the padded input from `corner` on; zeros where it ends."""
    ends = []
    for axis, (start, extent) in enumerate(zip(corner, block.shape[2:], strict=True)):
        padded = problem.pad_lo[axis] + problem.input[axis] + problem.pad_hi[axis]
        ends.append(min(start + extent, padded))
    covered = (len(x), *(e - c for e, c in zip(ends, corner, strict=True)))
    if covered != (block.shape[0], *block.shape[2:]):
        block[...] = 0
        block = block[: len(x), :, : covered[1], : covered[2]]
    windows.read(problem, x, list(zip(corner, ends, strict=True)), block)


def _direct(views: _Views, image: int, weights: HostArray) -> None:
    """The direct sum of one image of the block, over what the transforms made of it."""
    block = views.block[image]
    c, h, w = block.strides
    q = block.shape[2] - 2
    shape = (q, block.shape[0], 3, 3)
    columns = views.spare[: math.prod(shape)].reshape(shape)
    for p in range(block.shape[1] - 2):
        np.copyto(columns, as_strided(block[:, p:], shape, (w, c, h, w)))
        y = views.y[image, :, p]
        np.matmul(weights, columns.reshape(q, -1).T, out=y)


@dataclass(frozen=True)
class _Views:
    """One worker's scratch memory, as the arrays that blocks of one size need."""

    last: bool  # whether `result` is channels last
    a: HostArray
    b: HostArray
    staged: HostArray  # (n, c, h, w) in x's memory order: a transpose is fast only within the cache
    block: HostArray  # (n, c, h, w)
    columns: HostArray  # of `block`: (n h, j, 6, c)
    rows: HostArray  # (n h, j, b, c)
    overlapping: HostArray  # of `rows`: (n, i, b, 6, j c)
    tiles: HostArray  # (n, i, b, a, j c)
    depth: HostArray  # of `tiles`: (a b, n i j, c)
    products: HostArray  # (a b, n i j, k)
    product_rows: HostArray  # of `products`: (n, i, b, a, j k)
    sums: HostArray  # (n, i, b, u, j k)
    sum_columns: HostArray  # of `sums`: (n, p, j, b, k), or (n, p, j, k, b)
    result: HostArray  # (n, p, j, v, k), or (n, p, j, k, v)
    flat: HostArray  # of `result`: (n, everything)
    y: HostArray  # of `result`: (n, k, p, q)
    spare: HostArray  # memory that is free once `result` is written


class _Scratch:
    def __init__(
        self,
        problem: ConvProblem,
        cut: _Tiling,
        product: gemm.Type,
        x_last: bool,
        last: bool,
        memory: Arena,
    ) -> None:
        self._images, self._channels = cut.images, problem.in_channels
        self._x_last, self._last = x_last, last
        self._a, self._b = _A.astype(product), _B.astype(product)
        self._block = memory.take(cut.block, product)
        self._even = memory.take(cut.even, product)
        self._odd = memory.take(cut.odd, product)
        self._views: dict[tuple[tiling.Box, int], _Views] = {}

    def views(self, box: tiling.Box, filters: int) -> _Views:
        key = (box, filters)
        if key not in self._views:
            self._views[key] = self._make(box[0], box[1], filters)
        return self._views[key]

    def _make(self, i: int, j: int, k: int) -> _Views:
        n, c, last = self._images, self._channels, self._last
        h, w = _OUT * i + 2, _OUT * j + 2

        def piece(memory: HostArray, *shape: int) -> HostArray:
            return memory[: math.prod(shape)].reshape(shape)

        block = piece(self._block, n * h, w, c)
        rows = piece(self._even, n * h, _IN, j, c)
        tiles = piece(self._odd, _IN, _IN, n, i, j * c)
        products = piece(self._even, _IN * _IN, n * i * j, k)
        sums = piece(self._odd, n, i, _OUT, _IN, j * k)
        row, inner, size = block.strides
        h_row, h_b = rows.strides[:2]
        sum_columns = sums.reshape(n, i * _OUT, _IN, j, k)
        if last:
            result = piece(self._even, n, i * _OUT, j, _OUT, k)
            y = result.reshape(n, i * _OUT, j * _OUT, k).transpose(0, 3, 1, 2)
        else:
            result = piece(self._even, n, i * _OUT, k, j, _OUT)
            y = result.reshape(n, i * _OUT, k, j * _OUT).transpose(0, 2, 1, 3)
        channels_first = block.reshape(n, h, w, c).transpose(0, 3, 1, 2)
        return _Views(
            last=last,
            a=self._a,
            b=self._b,
            staged=channels_first if self._x_last else piece(self._odd, n, c, h, w),
            block=channels_first,
            columns=as_strided(block, (n * h, j, _IN, c), (row, _OUT * inner, inner, size)),
            rows=rows.transpose(0, 2, 1, 3),
            overlapping=as_strided(
                rows, (n, i, _IN, _IN, j * c), (h * h_row, _OUT * h_row, h_b, h_row, size)
            ),
            tiles=tiles.transpose(2, 3, 1, 0, 4),
            depth=tiles.reshape(_IN * _IN, n * i * j, c),
            products=products,
            product_rows=products.reshape(_IN, _IN, n, i, j * k).transpose(2, 3, 1, 0, 4),
            sums=sums.transpose(0, 1, 3, 2, 4),
            sum_columns=sum_columns.transpose((0, 1, 3, 2, 4) if last else (0, 1, 3, 4, 2)),
            result=result if last else result.transpose(0, 1, 3, 2, 4),
            flat=result.reshape(n, -1),
            y=y,
            spare=self._odd,
        )
