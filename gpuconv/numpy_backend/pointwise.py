"""1x1 convolution: one matrix product, W (K, C) times x (C, pixels), straight from and to memory.

Nothing is laid out anew where BLAS can read x as it lies; strides and other dtypes go through a
copy of one block at a time.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import gemm, tiling
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_BLOCK_BYTES = 4 << 20  # of input and output together
_FEWEST_PIXELS = 200  # of a block: products of fewer columns are slow


@dataclass(frozen=True)
class _Tiling:
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
    return gemm.seconds(problem, device, math.prod(cut.box), cut.parts, cut.threads, 0.0, 8)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(gemm.itemsize(problem))


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    itemsize = gemm.itemsize(problem)
    limit = WORKSPACE_CAP
    if problem.workspace_limit is not None:
        limit = min(limit, problem.workspace_limit)
    channels = problem.in_channels + problem.out_channels
    pixels = max(_BLOCK_BYTES // (channels * itemsize), _FEWEST_PIXELS)
    threads = device.threads if problem.flops > gemm.WORTH_THREADS else 1
    pixels = tiling.balance(problem.output, pixels, problem.batch, threads, _FEWEST_PIXELS)
    while True:
        box = tiling.cut(problem.output, pixels)
        size = math.prod(box)
        result = _Tiling(
            box=box,
            parts=tiling.parts(problem, box, 1, threads),
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
    turned = gemm.channels_last(problem)
    weights = gemm.matrix(
        w.reshape(groups, -1, *w.shape[1:]),
        memory.take(cut.weights, product),
        turned=turned,
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
    boxes = list(tiling.boxes(problem.output, cut.box))
    blocks = list(itertools.product(range(len(x)), boxes, range(cut.parts)))
    step = math.ceil(problem.group_out_channels / cut.parts)
    column_bias = None if bias is None else bias.reshape(groups, -1, 1)

    def work(item: tuple[int, tuple[tiling.Box, tiling.Box, int], int], worker: int) -> None:
        n, (corner, box, start), part = item
        block, sums = scratch[worker]
        rows = slice(part * step, (part + 1) * step)
        pixels = math.prod(box)
        some = weights[:, rows]
        some_bias = None if column_bias is None else column_bias[:, rows]
        region = (..., *(slice(c, c + b) for c, b in zip(corner, box, strict=True)))
        columns = None if x_flat is None else x_flat[n, :, :, start : start + pixels]
        if columns is None or not gemm.readable(columns):
            source = x[n][region]
            copy = block[: source.size].reshape(source.shape)
            np.copyto(copy, source, casting="unsafe")
            columns = copy.reshape(groups, -1, pixels)
        if out_flat is not None:
            target = out_flat[n, :, rows, start : start + pixels]
            if gemm.in_place(problem, product, target, turned):
                gemm.multiply(some, columns, target)
                if some_bias is not None:
                    target += some_bias
                return
        target = out[n][:, rows][region]
        products = gemm.sums(sums, (groups, some.shape[1], pixels), turned)
        gemm.multiply(some, columns, products)
        if some_bias is not None:
            some_bias = some_bias.reshape(*some_bias.shape[:2], *[1] * problem.ndim)
        gemm.store(problem, products.reshape(target.shape), some_bias, target)

    run_blocks(cut.threads, blocks, work)
