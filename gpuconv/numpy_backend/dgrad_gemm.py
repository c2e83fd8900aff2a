"""The gradient of x as matrix products whose results are added where their taps lie.

    dx[n, c, stride*p + dilation*r - pad] += products[(c, r), p] = sum over k of w[k, c, r] dy[k, p]

One product for a run of dy's rows, W' (C/G*taps, K/G) @ dy (K/G, pixels), gives what every pixel
adds to dx through every tap: nothing of dy is laid out anew, and C*taps sums are written where the
windows of dy would be K*taps values. So it pays where dx has fewer channels than dy: under a first
layer, and where a transposed convolution has strides as wide as its filter.

With a stride the positions of dx that one tap reaches lie apart. They are added up in phases, in
which they are neighbours, and put in their places at the end:

    sums: (G, C/G, phases..., rows, columns)    dx[stride*j + phase - pad] = sums[phase, j]

An item of work owns a range of rows j, whatever the batch, and computes the few products anew that
its neighbour needs, too.
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
from gpuconv.numpy_backend import gemm, tiling
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("dgrad",)

Index = tuple[Any, ...]

_BLOCK_BYTES = 1 << 20  # of sums, and of products: both stay in a core's second-level cache
_FEWEST_ROWS = 64  # of a product's first factor, where it has as many
_HALO = 8  # an item's rows are at least as many times those that it computes anew


@dataclass(frozen=True)
class _Tiling:
    groups: int  # of an item,
    channels: int  # of each of them,
    rows: int  # and of `sums`
    chunk: int  # rows of dy of a product
    threads: int
    weights: int  # elements of scratch, each: the filters, converted,
    values: int  # per thread dy,
    products: int
    sums: int

    def bytes(self, itemsize: int) -> int:
        sizes = (self.weights, self.values, self.products, self.sums)
        weights, *each = (rounded(n * itemsize) for n in sizes)
        return weights + self.threads * sum(each) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "dgrad":
        return No(f"it computes dgrad, not {problem.operation}")
    if problem.padding_mode != "zeros" and problem.padded:
        return No(f"it reads zeros beyond the edge, not {problem.padding_mode}")
    if problem.accumulator.is_exact:
        return No(f"it sums floats, not {problem.accumulator}")
    needed, limit = workspace(problem, device), problem.workspace_within(WORKSPACE_CAP)
    if needed > limit:
        return No(f"a row of one channel takes {needed} bytes, over {limit}")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products, their additions row by row, the phases' way to dx, and NumPy's calls."""
    cut = _tiling(problem, device)
    size, taps = gemm.itemsize(problem), math.prod(problem.filter)
    last, inner = problem.output[-1], math.prod(problem.output[1:])
    sides = (cut.channels * taps, 8), (cut.chunk * inner, 16), (problem.group_out_channels, 8)
    items = problem.batch * _items(problem, cut)
    repeated = 1 + _reach(problem, 0) / cut.rows
    pixels = problem.batch * math.prod(problem.output)
    added = problem.in_channels * taps * pixels * repeated
    calls = 12 + math.prod(problem.stride) * 2
    chunks = math.ceil((cut.rows + _reach(problem, 0)) / cut.chunk)
    work = (
        problem.flops * repeated / gemm.rate(problem, device, 1.5, *sides)
        + added * (size / (3 * device.copy_bytes) + device.call_seconds / (100 * last))
        + problem.batch * problem.in_channels * math.prod(problem.input) * size / device.copy_bytes
        + items * (calls + chunks * (4 + 2 * taps)) * device.call_seconds
    )
    memory = problem.bytes_moved / device.memory_bytes
    threads = tiling.speedup(items, cut.threads, work / (items * (6 + chunks * (2 + taps))))
    return work / threads + memory + device.start(cut.threads)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(gemm.itemsize(problem))


def _reach(problem: ConvProblem, axis: int) -> int:
    """How far the last tap's sums lie from the first's, in positions of a phase."""
    return problem.dilation[axis] * (problem.filter[axis] - 1) // problem.stride[axis]


def _extent(problem: ConvProblem, axis: int) -> int:
    """The positions of a phase: those that taps reach, and those of dx."""
    of_dx = -(-(problem.input[axis] + problem.pad_lo[axis]) // problem.stride[axis])
    return max(problem.output[axis] + _reach(problem, axis), of_dx)


def _items(problem: ConvProblem, cut: _Tiling) -> int:
    """Items of one image."""
    return (
        math.ceil(problem.groups / cut.groups)
        * math.ceil(problem.group_in_channels / cut.channels)
        * math.ceil(_extent(problem, 0) / cut.rows)
    )


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    itemsize, taps = gemm.itemsize(problem), math.prod(problem.filter)
    limit = problem.workspace_within(WORKSPACE_CAP)
    height, reach = _extent(problem, 0), _reach(problem, 0)
    threads = device.threads if problem.flops > gemm.WORTH_THREADS else 1
    cut = _Tiling(problem.groups, problem.group_in_channels, height, 1, threads, 0, 0, 0, 0)
    least = min(max(_HALO * reach, 1), height)
    while cut.rows > least and _sized(problem, cut).sums * itemsize > _BLOCK_BYTES:
        cut = replace(cut, rows=max(cut.rows // 2, least))
    while _sized(problem, cut).sums * itemsize > _BLOCK_BYTES:
        if cut.groups > 1:
            cut = replace(cut, groups=-(-cut.groups // 2))
        elif cut.channels > 1 and cut.channels * taps >= 2 * _FEWEST_ROWS:
            cut = replace(cut, channels=-(-cut.channels // 2))
        else:
            break
    items = problem.batch * _items(problem, cut)
    if items < threads:
        cut = replace(cut, rows=-(-cut.rows // -(-threads // items)))
    while True:
        sized = _sized(problem, cut)
        if sized.bytes(itemsize) <= limit:
            return sized
        if cut.threads > 1:
            cut = replace(cut, threads=cut.threads - 1)
        elif cut.groups > 1:
            cut = replace(cut, groups=-(-cut.groups // 2))
        elif cut.channels > 1:
            cut = replace(cut, channels=-(-cut.channels // 2))
        elif cut.rows > 1:
            cut = replace(cut, rows=-(-cut.rows // 2))
        else:
            return sized


def _sized(problem: ConvProblem, cut: _Tiling) -> _Tiling:
    """`cut` with its products' rows and its scratch."""
    count = cut.groups * cut.channels
    inner = math.prod(problem.output[1:])
    row = count * math.prod(problem.filter) * inner
    most = max(_BLOCK_BYTES // (row * gemm.itemsize(problem)), 1)
    needed = min(problem.output[0], cut.rows + _reach(problem, 0))
    chunk = -(-needed // -(-needed // most))
    plane = cut.rows * math.prod(_extent(problem, axis) for axis in range(1, problem.ndim))
    return replace(
        cut,
        chunk=chunk,
        weights=math.prod(problem.w_shape),
        values=cut.groups * problem.group_out_channels * chunk * inner,
        products=row * chunk,
        sums=count * math.prod(problem.stride) * plane,
    )


def run(plan: Plan, grad: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    cut = _tiling(plan.problem, plan.device)
    with arena(cut.bytes(gemm.itemsize(plan.problem))) as memory:
        call = _Call(plan.problem, cut, grad, w, bias, out, memory)
        run_blocks(cut.threads, call.items(), call.work)


class _Call:
    def __init__(
        self,
        problem: ConvProblem,
        cut: _Tiling,
        grad: HostArray,
        w: HostArray,
        bias: HostArray | None,
        out: HostArray,
        memory: Arena,
    ) -> None:
        self.problem, self.cut = problem, cut
        groups, product = problem.groups, problem.accumulator.numpy
        self.product = product
        scratch = memory.take(cut.weights, product)
        self.weights = _weights(problem, w, product, scratch)
        self.grad = grad.reshape(grad.shape[0], groups, -1, *grad.shape[2:])
        self.flat = tiling.flat(self.grad, problem.ndim) if grad.dtype == product else None
        self.out = out.reshape(out.shape[0], groups, -1, *out.shape[2:])
        self.bias = None
        if bias is not None:
            self.bias = bias.astype(product).reshape(groups, -1, *[1] * 2 * problem.ndim)
        self.scratch = [
            tuple(memory.take(n, product) for n in (cut.values, cut.products, cut.sums))
            for _ in range(cut.threads)
        ]
        self.taps = _taps(problem)
        self.places = _places(problem)

    def items(self) -> list[tuple[int, slice, slice, int]]:
        """(image, groups, channels, first row of `sums`)."""
        problem, cut = self.problem, self.cut
        return list(
            itertools.product(
                range(len(self.grad)),
                tiling.spans(problem.groups, cut.groups),
                tiling.spans(problem.group_in_channels, cut.channels),
                range(0, _extent(problem, 0), cut.rows),
            )
        )

    def work(self, item: tuple[int, slice, slice, int], worker: int) -> None:
        n, groups, channels, begin = item
        problem = self.problem
        end = min(begin + self.cut.rows, _extent(problem, 0))
        shape = (
            groups.stop - groups.start,
            channels.stop - channels.start,
            *problem.stride,
            end - begin,
            *(_extent(problem, axis) for axis in range(1, problem.ndim)),
        )
        sums = self.scratch[worker][2][: math.prod(shape)].reshape(shape)
        sums[...] = 0
        for first, products in self._products(n, groups, channels, begin, end, worker):
            for tap, (phase, offset) in self.taps.items():
                # Row p of the products belongs to row p + offset of the sums.
                low = max(begin, first + offset[0])
                high = min(end, first + offset[0] + products.shape[-problem.ndim])
                if low >= high:
                    continue
                rows = slice(low - begin, high - begin)
                some = slice(low - first - offset[0], high - first - offset[0])
                sides = zip(offset[1:], problem.output[1:], strict=True)
                moved: Index = (slice(None), slice(None), *phase, rows)
                moved += tuple(slice(o, o + p) for o, p in sides)
                part: Index = (slice(None), slice(None), *tap, some)
                sums[moved] += products[part]
        if self.bias is not None:
            sums += self.bias[groups, channels]
        target = self.out[n, groups, channels]
        for phase, axes in self.places:
            (start, stop), *others = ((j, j + count) for j, count, _ in axes)
            low, high = max(begin, start), min(end, stop)
            if low >= high:
                continue
            stride, home = problem.stride[0], axes[0][2]
            first, last = (home + (j - start) * stride for j in (low, high - 1))
            where: list[Any] = [slice(first, last + 1, stride)]
            where += [
                slice(at, None, s)
                for (_, _, at), s in zip(axes[1:], problem.stride[1:], strict=True)
            ]
            taken: Index = (slice(None), slice(None), *phase, slice(low - begin, high - begin))
            taken += tuple(slice(*run) for run in others)
            np.copyto(target[(..., *where)], sums[taken], casting="unsafe")

    def _products(
        self, n: int, groups: slice, channels: slice, begin: int, end: int, worker: int
    ) -> Iterator[tuple[int, HostArray]]:
        """The rows of dy that rows `begin` to `end` of the sums need: the first of them, and
        their products (G, C/G, taps..., rows, columns...)."""
        problem = self.problem
        inner = math.prod(problem.output[1:])
        weights = self.weights[groups, channels]
        weights = weights.reshape(weights.shape[0], -1, weights.shape[-1])
        values, memory, _ = self.scratch[worker]
        start = max(begin - _reach(problem, 0), 0)
        for first in range(start, min(end, problem.output[0]), self.cut.chunk):
            last = min(first + self.cut.chunk, end, problem.output[0])
            columns = None
            if self.flat is not None:
                columns = self.flat[n, groups, :, first * inner : last * inner]
            if columns is None or not gemm.readable(columns):
                columns = gemm.laid_out(self.grad[n, groups, :, first:last], values, 2)
            shape = (*weights.shape[:2], columns.shape[-1])
            products = memory[: math.prod(shape)].reshape(shape)
            gemm.multiply(weights, columns, products)
            count = channels.stop - channels.start
            yield (
                first,
                products.reshape(
                    shape[0], count, *problem.filter, last - first, *problem.output[1:]
                ),
            )


def _weights(
    problem: ConvProblem, w: HostArray, product: gemm.Type, scratch: HostArray
) -> HostArray:
    """w (K, C/G, taps...) as (G, C/G, taps, K/G)."""
    k, c = w.shape[:2]
    groups = problem.groups
    filters = scratch.reshape(groups, c, -1, k // groups)
    source = w.reshape(groups, k // groups, *w.shape[1:])
    copied = filters.reshape(groups, c, *w.shape[2:], k // groups)
    np.copyto(copied, np.moveaxis(source, 1, -1), casting="unsafe")
    if problem.conjugate and filters.dtype.kind == "c":
        np.conjugate(filters, out=filters)
    return filters


@lru_cache(maxsize=256)
def _taps(problem: ConvProblem) -> dict[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of every tap of w: the phase that it reaches, and how far its sums are moved there."""
    found = {}
    for tap in itertools.product(*map(range, problem.filter)):
        at = tuple(f - 1 - r for f, r in zip(problem.filter, tap, strict=True))
        shifts = [
            divmod(d * r, s)
            for d, r, s in zip(
                problem.dilation, at if problem.flip else tap, problem.stride, strict=True
            )
        ]
        found[tap] = (tuple(phase for _, phase in shifts), tuple(offset for offset, _ in shifts))
    return found


_Axis = tuple[int, int, int]  # of one phase: its first position in dx, how many, and where in dx


@lru_cache(maxsize=256)
def _places(problem: ConvProblem) -> list[tuple[tuple[int, ...], tuple[_Axis, ...]]]:
    """Every phase that dx has positions of, and which they are along each axis."""
    found = []
    for phase in itertools.product(*map(range, problem.stride)):
        axes = []
        for extent, stride, lo, at in zip(
            problem.input, problem.stride, problem.pad_lo, phase, strict=True
        ):
            first = max(-(-(lo - at) // stride), 0)
            home = stride * first + at - lo
            axes.append((first, max(-(-(extent - home) // stride), 0), home))
        if all(count for _, count, _ in axes):
            found.append((phase, tuple(axes)))
    return found
