"""1x1 convolution: one matrix product, W (K, C) times x (C, pixels), straight from and to memory.

Nothing is laid out anew where BLAS can read x as it lies; strides and other dtypes go through a
copy of one block at a time.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import gemm, tiling
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_BLOCK_BYTES = 4 << 20  # of input and output together
_FEWEST_PIXELS = 200  # of a block: products of fewer columns are slow
# A single product each: nothing hides how long waking takes.
_WORTH_THREADS = 2 * gemm.WORTH_THREADS
_LARGE = 64 << 20  # bytes of a result that is new memory in every call:
_FRESH = 5e-11  # seconds per byte, of BLAS meeting pages that no one has touched,
_SHORT_SUM = 32  # but where sums are short, and it waits for memory anyway


@dataclass(frozen=True)
class _Tiling:
    images: int  # of a block; more than 1 only where the box is a whole image
    box: tiling.Box
    parts: int  # of a block's output channels, where there are fewer blocks than threads
    threads: int
    weights: int  # elements of scratch: the converted filters,
    block: int  # per thread a block of x,
    sums: int  # and its products

    def bytes(self, itemsize: int) -> int:
        weights, *each = (rounded(n * itemsize) for n in (self.weights, self.block, self.sums))
        return weights + self.threads * sum(each) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"it computes fprop, not {problem.operation}")
    if math.prod(problem.filter) != 1:
        return No("the filter is larger than 1x1")
    if problem.padded:
        return No("it reads no padding")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    cut = _tiling(problem, device)
    # With fewer columns reading the matrix is what takes time.
    columns = max(math.prod(cut.box), 8)
    seconds = gemm.seconds(problem, device, columns, cut.images, cut.parts, cut.threads, 0.0, 8)
    size = math.prod(problem.y_shape) * problem.y_dtype.itemsize
    return seconds + (size * _FRESH if size > _LARGE and problem.reduction > _SHORT_SUM else 0)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(gemm.itemsize(problem))


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    itemsize = gemm.itemsize(problem)
    limit = problem.workspace_within(WORKSPACE_CAP)
    channels = problem.in_channels + problem.out_channels
    pixels = max(_BLOCK_BYTES // (channels * itemsize), _FEWEST_PIXELS)
    threads = device.threads if problem.flops > _WORTH_THREADS else 1
    pixels = tiling.balance(problem.output, pixels, problem.batch, threads, _FEWEST_PIXELS)
    while True:
        box = tiling.cut(problem.output, pixels)
        images = 1
        if box == problem.output:
            images = tiling.share(pixels // math.prod(box), problem.batch, threads)
        size = images * math.prod(box)
        result = _Tiling(
            images=images,
            box=box,
            parts=tiling.parts(problem, box, images, threads),
            threads=threads,
            weights=math.prod(problem.w_shape),
            block=problem.in_channels * size,
            sums=problem.out_channels * size,
        )
        if result.bytes(itemsize) <= limit or (pixels, threads) == (1, 1):
            return result
        if pixels > 64 or threads == 1:
            pixels //= 2
        else:
            threads -= 1


_Box = tuple[tuple[Any, ...], slice]


@lru_cache(maxsize=1024)
def _boxes(output: tiling.Box, box: tiling.Box) -> list[_Box]:
    """The region of the output, and the run of the flattened output, of every box."""
    return [
        (tiling.region(corner, extents), slice(start, start + math.prod(extents)))
        for corner, extents, start in tiling.boxes(output, box)
    ]


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    cut = _tiling(plan.problem, plan.device)
    with arena(cut.bytes(gemm.itemsize(plan.problem))) as memory:
        _run(plan.problem, cut, x, w, bias, out, memory)


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
    last = gemm.channels_last(problem)
    weights = gemm.matrix(
        w.reshape(groups, -1, *w.shape[1:]),
        memory.take(cut.weights, product),
        turned=gemm.turns(problem),
    )
    x = x[(slice(None), slice(None), *(slice(None, None, s) for s in problem.stride))]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    out = out.reshape(out.shape[0], groups, -1, *out.shape[2:])
    x_flat, out_flat = tiling.flat(x, problem.ndim), tiling.flat(out, problem.ndim)
    if x.dtype != product:
        x_flat = None
    scratch = [
        (memory.take(cut.block, product), memory.take(cut.sums, product))
        for _ in range(cut.threads)
    ]
    boxes = _boxes(problem.output, cut.box)
    blocks = list(itertools.product(range(0, len(x), cut.images), boxes, range(cut.parts)))
    step = math.ceil(problem.group_out_channels / cut.parts)
    column_bias = None if bias is None else bias.reshape(groups, -1, 1)

    def work(item: tuple[int, _Box, int], worker: int) -> None:
        n, (region, run), part = item
        block, sums = scratch[worker]
        images, rows = slice(n, n + cut.images), slice(part * step, (part + 1) * step)
        some = weights[:, rows]
        some_bias = None if column_bias is None else column_bias[:, rows]
        columns = None if x_flat is None else x_flat[images, :, :, run]
        if columns is None or not gemm.readable(columns):
            columns = gemm.laid_out(x[images][region], block, 3)
        if out_flat is not None:
            target = out_flat[images, :, rows, run]
            if gemm.in_place(problem, product, target, last):
                gemm.multiply(some, columns, target)
                if some_bias is not None:
                    target += some_bias
                return
        target = out[images, :, rows][region]
        shape = (len(columns), *some.shape[:2], columns.shape[-1])
        products = gemm.sums(sums, shape, last)
        gemm.multiply(some, columns, products)
        if some_bias is not None:
            some_bias = some_bias.reshape(*some_bias.shape[:2], *[1] * problem.ndim)
        gemm.store(problem, products.reshape(target.shape), some_bias, target)

    run_blocks(cut.threads, blocks, work)
