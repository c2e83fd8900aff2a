"""Convolution as one matrix product for each tap of the filter, of what the tap sees of x alone.

    y[k, p] = sum over taps r, p with stride*p + dilation*r - pad within x, of  W_r (K, C) @ x_r

Where a filter is dilated as wide as the image, many of its taps lie in the padding: those of 3x3
at a dilation of 12 see 57% of 33x33 outputs. A tap's outputs are a box, whose inputs are laid out
alone; the products are added to the box of the sums. That takes an addition for each output and
tap, which many channels make up for.

Nothing is added for a tap beyond the edge, but for a weight that is not finite: its product with
the padding's zero is NaN.
"""

from __future__ import annotations

import itertools
import math
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

_MOST_PIXELS = 2048  # of a block
_CHANNELS, _FILTERS = 1024, 512  # of a product, at most
_REORDER_SECONDS = 2e-9  # of one weight: they lie R*S apart


@dataclass(frozen=True)
class _Tiling:
    box: tiling.Box
    channels: int  # of a group, in a product
    filters: int  # of a group, in an item
    shares: int  # of the channels, each summed on its own
    threads: int

    def pieces(self, problem: ConvProblem) -> tuple[int, int]:
        """Elements of a worker's scratch: a tap's inputs, and sums or products."""
        pixels = problem.groups * math.prod(self.box)
        return self.channels * pixels, self.filters * pixels

    def bytes(self, problem: ConvProblem) -> int:
        size = gemm.itemsize(problem)
        columns, sums = (rounded(n * size) for n in self.pieces(problem))
        weights = rounded(math.prod(problem.w_shape) * size)
        partial = rounded(self._partial(problem) * size)
        return weights + partial + self.threads * (columns + 2 * sums) + ALIGN

    def _partial(self, problem: ConvProblem) -> int:
        if self.shares == 1:
            return 0
        return self.shares * problem.out_channels * math.prod(problem.output)


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"it computes fprop, not {problem.operation}")
    if math.prod(problem.filter) == 1:
        return No("the filter has one tap")
    if problem.group_in_channels == 1:
        return No("one input channel: its products have a single term")
    if problem.padding_mode != "zeros" and problem.padded:
        return No(f"it reads zeros beyond the edge, not {problem.padding_mode}")
    if problem.accumulator.is_exact:
        return No(f"it sums floats, not {problem.accumulator}")
    needed, limit = _tiling(problem, device).bytes(problem), problem.workspace_within(WORKSPACE_CAP)
    if needed > limit:
        return No(f"the reordered filter and its blocks take {needed} bytes, over {limit}")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products within x, the layout, the additions, and the filter's reordering."""
    cut = _tiling(problem, device)
    size, taps = gemm.itemsize(problem), math.prod(problem.filter)
    seen = math.prod(
        sum(len(range(*_span(problem, axis, r, 0, extent))) for r in range(problem.filter[axis]))
        for axis, extent in enumerate(problem.output)
    )
    boxes = tiling.count(problem.output, cut.box)
    items = problem.batch * boxes
    passes = math.ceil(problem.group_out_channels / cut.filters)
    sums = math.ceil(problem.group_in_channels / cut.channels)
    columns = max(seen / (taps * boxes), 1)  # of a product, on the average
    rate = gemm.rate(problem, device, 1.55, (cut.filters, 8), (columns, 16), (cut.channels, 8))
    flops = problem.flops * seen / (taps * math.prod(problem.output))
    copied = problem.batch * seen * problem.in_channels * passes
    added = 1.5 * problem.batch * seen * problem.out_channels * sums
    calls = items * passes * taps * sums * (8 + problem.groups / 2)
    work = (
        flops / rate
        + (copied + added) * size / (2 * device.copy_bytes)
        + calls * device.call_seconds
    )
    weights = math.prod(problem.w_shape) * _REORDER_SECONDS * size / 4
    memory = problem.bytes_moved / device.memory_bytes
    threads = tiling.speedup(items * passes * cut.shares, cut.threads)
    return work / threads + weights / cut.threads + memory + 2 * device.start(cut.threads)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(problem)


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    limit = problem.workspace_within(WORKSPACE_CAP)
    threads = device.threads if problem.flops > gemm.WORTH_THREADS else 1
    cut = _Tiling(
        box=tiling.cut(problem.output, _MOST_PIXELS),
        channels=tiling.even(problem.group_in_channels, _CHANNELS),
        filters=tiling.even(problem.group_out_channels, _FILTERS),
        shares=1,
        threads=threads,
    )
    items = problem.batch * tiling.count(problem.output, cut.box)
    items *= -(-problem.group_out_channels // cut.filters)
    if items < threads:
        shares = min(-(-threads // items), problem.group_in_channels)
        cut = replace(cut, shares=shares)
        cut = replace(cut, channels=min(cut.channels, -(-problem.group_in_channels // shares)))
    while cut.bytes(problem) > limit:
        if cut.channels > 128:
            cut = replace(cut, channels=-(-cut.channels // 2))
        elif cut.filters > 128:
            cut = replace(cut, filters=-(-cut.filters // 2))
        elif math.prod(cut.box) > 256:
            cut = replace(cut, box=tiling.cut(problem.output, math.prod(cut.box) // 2))
        elif cut.threads > 1:
            cut = replace(cut, threads=cut.threads - 1, shares=1)
        elif cut.channels > 1:
            cut = replace(cut, channels=-(-cut.channels // 2))
        elif cut.filters > 1:
            cut = replace(cut, filters=-(-cut.filters // 2))
        elif math.prod(cut.box) > 1:
            cut = replace(cut, box=tiling.cut(problem.output, math.prod(cut.box) // 2))
        else:
            break
    return cut


def _span(problem: ConvProblem, axis: int, tap: int, start: int, stop: int) -> tuple[int, int]:
    """The outputs from `start` to `stop` that see x, not its padding, through `tap`."""
    stride = problem.stride[axis]
    at = problem.dilation[axis] * tap - problem.pad_lo[axis]
    low = max(-(at // stride), start)
    high = min((problem.input[axis] - 1 - at) // stride + 1, stop)
    return low, max(high, low)


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    with arena(workspace(plan.problem, plan.device)) as memory:
        call = _Call(plan.problem, _tiling(plan.problem, plan.device), x, w, bias, out, memory)
        call.run()


_Item = tuple[int, "_Box", slice, int]  # image, box, filters of each group, share


class _Call:
    def __init__(
        self,
        problem: ConvProblem,
        cut: _Tiling,
        x: HostArray,
        w: HostArray,
        bias: HostArray | None,
        out: HostArray,
        memory: Arena,
    ) -> None:
        self.problem, self.cut = problem, cut
        groups, product = problem.groups, problem.accumulator.numpy
        if problem.flip:
            w = np.flip(w, tuple(range(2, w.ndim)))
        self.w = w.reshape(groups, -1, *w.shape[1:])
        self.weights = self._room_for_weights(memory.take(w.size, product))
        self.spoilt: dict[int, HostArray] = {}
        self.bias = gemm.bias_vector(problem, bias, product)
        if self.bias is not None:
            self.bias = self.bias.reshape(groups, -1, *[1] * problem.ndim)
        self.x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        self.out = out.reshape(out.shape[0], groups, -1, *out.shape[2:])
        self.partial: HostArray | None = None
        if cut.shares > 1:
            shape = (cut.shares, *self.out.shape[1:])
            self.partial = memory.take(math.prod(shape), product).reshape(shape)
        columns, sums = cut.pieces(problem)
        self.scratch = [
            tuple(memory.take(n, product) for n in (columns, sums, sums))
            for _ in range(cut.threads)
        ]

    def _room_for_weights(self, memory: HostArray) -> HostArray:
        """(taps, G, K/G, C/G), in the order in which w's memory runs along K and C."""
        groups, k, c = self.w.shape[:3]
        if self.w.strides[1] < self.w.strides[2]:
            return memory.reshape(-1, groups, c, k).swapaxes(2, 3)
        return memory.reshape(-1, groups, k, c)

    def run(self) -> None:
        problem, cut = self.problem, self.cut
        part = -(-problem.group_in_channels // (4 * cut.threads))
        run_blocks(cut.threads, tiling.spans(problem.group_in_channels, part), self._reorder)
        zeros: HostArray = np.zeros(problem.group_in_channels, self.weights.dtype)
        for tap, weights in enumerate(self.weights):
            flat = weights if weights.flags.c_contiguous else weights.swapaxes(1, 2)
            flat = flat.reshape(-1)
            if not np.isfinite(np.dot(flat, flat)):
                self.spoilt[tap] = np.vecdot(weights, zeros)
        boxes = _boxes(problem, cut.box)
        filters = tiling.spans(problem.group_out_channels, cut.filters)
        # A batch's images are each computed as one would be alone: with the same shares.
        images = [[n] for n in range(len(self.x))]
        if cut.shares == 1:
            images = [list(range(len(self.x)))]
        for some in images:
            blocks = list(itertools.product(some, boxes, filters, range(cut.shares)))
            run_blocks(cut.threads, blocks, self.work)
            if self.partial is not None:
                for share in self.partial[1:]:
                    self.partial[0] += share
                gemm.store(problem, self.partial[0], self.bias, self.out[some[0]])

    def _reorder(self, channels: slice, worker: int) -> None:
        source = self.w[:, :, channels]
        taps = source.reshape(*source.shape[:3], -1)
        for tap in range(taps.shape[-1]):
            np.copyto(self.weights[tap][:, :, channels], taps[..., tap], casting="unsafe")

    def work(self, item: _Item, worker: int) -> None:
        n, box, filters, share = item
        problem = self.problem
        columns, memory, products = self.scratch[worker]
        count = filters.stop - filters.start
        shape = (problem.groups, count, *box.extents)
        sums = memory[: math.prod(shape)].reshape(shape)
        sums[...] = 0
        for channels in self._channels(share):
            for tap, (inside, outputs, extents) in enumerate(box.taps):
                if not math.prod(extents):
                    continue
                source = self.x[n, :, channels][inside]
                matrix = tiling.flat(source, problem.ndim)
                if matrix is None or matrix.dtype != sums.dtype or not gemm.readable(matrix):
                    matrix = gemm.laid_out(source, columns, 2)
                size = (problem.groups, count, math.prod(extents))
                product = products[: math.prod(size)].reshape(size)
                gemm.multiply(self.weights[tap][:, filters, channels], matrix, product)
                sums[outputs] += product.reshape(*size[:2], *extents)
        if share == 0:
            for tap, nothing in self.spoilt.items():
                outside = np.ones(box.extents, bool)
                outside[box.taps[tap][1]] = False
                added = nothing[:, filters].reshape(*sums.shape[:2], *[1] * problem.ndim)
                np.add(sums, added, out=sums, where=outside)
        if self.partial is not None:
            self.partial[share][:, filters][box.region] = sums
            return
        bias = None if self.bias is None else self.bias[:, filters]
        gemm.store(problem, sums, bias, self.out[n][:, filters][box.region])

    def _channels(self, share: int) -> list[slice]:
        """The channels of a share, as many at a time as a product takes."""
        part = -(-self.problem.group_in_channels // self.cut.shares)
        stop = min((share + 1) * part, self.problem.group_in_channels)
        step = self.cut.channels
        return [slice(c, min(c + step, stop)) for c in range(share * part, stop, step)]


_Tap = tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, ...]]


class _Box:
    """A box of outputs, and of every tap: where it reads x, which outputs, and their extents."""

    def __init__(self, problem: ConvProblem, corner: tiling.Box, extents: tiling.Box) -> None:
        self.extents = extents
        ends = [c + n for c, n in zip(corner, extents, strict=True)]
        self.region = tiling.region(corner, extents)
        self.taps: list[_Tap] = []
        for tap in itertools.product(*map(range, problem.filter)):
            inside, outputs, counts = [], [], []
            for axis, (r, start, stop) in enumerate(zip(tap, corner, ends, strict=True)):
                low, high = _span(problem, axis, r, start, stop)
                stride = problem.stride[axis]
                first = stride * low + problem.dilation[axis] * r - problem.pad_lo[axis]
                last = first + (high - low - 1) * stride
                inside.append(slice(first, last + 1, stride))
                outputs.append(slice(low - start, high - start))
                counts.append(high - low)
            self.taps.append(((..., *inside), (..., *outputs), tuple(counts)))


@lru_cache(maxsize=256)
def _boxes(problem: ConvProblem, box: tiling.Box) -> list[_Box]:
    return [
        _Box(problem, corner, extents) for corner, extents, _ in tiling.boxes(problem.output, box)
    ]
