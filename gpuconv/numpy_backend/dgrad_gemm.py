"""The gradient of x as matrix products whose results are added where their taps lie.

    dx[n, c, stride*p + dilation*r - pad] += products[(c, r), p] = sum over k of w[k, c, r] dy[k, p]

One product for a run of dy's rows, W' (C/G*taps, K/G) @ dy (K/G, pixels), gives what every pixel
adds to dx through every tap: nothing of dy is laid out tap by tap, and BLAS reads w as it lies. So
it pays where dx has few channels, where dy has few pixels for so many weights, and where a
transposed convolution has strides as wide as its filter.

With a stride the positions of dx that one tap reaches lie apart. They are added up in phases, in
which they are neighbours, and put in their places at the end:

    sums: (G, C/G, phases..., rows, columns, n)   dx[n, stride*j + phase - pad] = sums[phase, j, n]

Short rows would be added one by one. Where a batch has many small images, several of them share a
product, innermost in memory; elsewhere zeros fill dy's rows up to the width of a phase's, which
makes a tap's products one run, shifted.

An item of work owns a range of rows j, whatever the batch, and computes the few products anew that
its neighbour needs, too.
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

OPERATIONS = ("dgrad",)

Index = tuple[Any, ...]

_BLOCK_BYTES = 1 << 20  # of sums, and of products: both stay in a core's second-level cache
_FEWEST_ROWS = 64  # of a product's first factor, where it has as many
_HALO = 8  # an item's rows are at least as many times those that it computes anew
_SHARED_COLUMNS = 512  # of a product that several images share, or that is cut by rows
_FEWEST_IMAGES = 4  # that share one
_RUN_SECONDS = 12e-9  # of adding or copying another row, beyond its elements
_APART = 1.35  # how much longer it takes where no two taps meet, and each has its own sums to write


@dataclass(frozen=True)
class _Tiling:
    images: int  # that share a product; more than 1 only where an item has all of their rows
    groups: int  # of an item,
    share: int  # channels of each of them,
    channels: int  # of a product,
    rows: int  # and rows of `sums`
    width: int  # of a row of dy, which zeros fill up
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
    """The products, their additions, the way of dy and dx, and NumPy's calls."""
    cut = _tiling(problem, device)
    size, boxes = gemm.itemsize(problem), len(_taps(problem))
    rows = cut.channels * math.prod(problem.filter)
    rate = gemm.rate(
        problem, device, 1.95,
        (rows, 8), (cut.chunk * _inner(problem, cut), 4), (problem.group_out_channels, 32),
    )  # fmt: skip
    items = math.ceil(problem.batch / cut.images) * _items(problem, cut)
    repeated = (1 + _reach(problem, 0) / cut.rows) * cut.width / problem.output[-1]
    pixels = problem.batch * math.prod(problem.output) * repeated
    added = problem.in_channels * math.prod(problem.filter) * pixels
    read = 0.0 if _direct(problem, cut) else problem.out_channels * pixels
    results = problem.batch * problem.in_channels * math.prod(problem.input)
    chunks = math.ceil((cut.rows + _reach(problem, 0)) / cut.chunk)
    calls = 12 + 2 * math.prod(problem.stride) + chunks * (4 + 2 * boxes)
    calls *= items * math.ceil(cut.share / cut.channels)
    work = (
        problem.flops * repeated / rate
        + (added / 1.5 + read / 1.3 + results) * size / device.copy_bytes
        + calls * device.call_seconds / 3
    )
    memory = problem.bytes_moved / (1.5 * device.memory_bytes)
    threads = tiling.speedup(items, cut.threads, 8 * work / max(calls, 1))
    seconds = work / threads + memory + device.start(cut.threads)
    apart = all(r <= s for r, s in zip(problem.filter, problem.stride, strict=True))
    return seconds * _APART if apart else seconds


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
    """Items of the images that share a product."""
    return (
        math.ceil(problem.groups / cut.groups)
        * math.ceil(problem.group_in_channels / cut.share)
        * math.ceil(_extent(problem, 0) / cut.rows)
    )


def _padded(problem: ConvProblem, cut: _Tiling) -> bool:
    return cut.width > problem.output[-1]


def _inner(problem: ConvProblem, cut: _Tiling) -> int:
    """The products' columns for one row of dy."""
    return math.prod(_lines(problem, cut)) * cut.images


def _lines(problem: ConvProblem, cut: _Tiling) -> tuple[int, ...]:
    """The extents of a row of dy: none where it has one axis."""
    return (*problem.output[1:-1], cut.width) if problem.ndim > 1 else ()


def _direct(problem: ConvProblem, cut: _Tiling) -> bool:
    """Whether dy may be read where it lies."""
    return cut.images == 1 and not _padded(problem, cut)


def _width(problem: ConvProblem, device: Cpu) -> int:
    """Of dy's rows: filled up where that costs less than adding every row on its own."""
    extent, output = _extent(problem, problem.ndim - 1), problem.output[-1]
    if problem.ndim == 1 or _reach(problem, problem.ndim - 1) == 0:
        return output
    depth, products = (
        problem.group_out_channels,
        problem.group_in_channels * math.prod(problem.filter),
    )
    multiplied = 2 * products * depth * (extent - output) / gemm.rate(problem, device, 1.5)
    copied = depth * (_RUN_SECONDS + output * gemm.itemsize(problem) / device.copy_bytes)
    return extent if multiplied + copied < products * _RUN_SECONDS else output


def _images(problem: ConvProblem, threads: int) -> int:
    """How many images share a product."""
    most = _SHARED_COLUMNS // max(math.prod(problem.output), 1)
    images = tiling.share(most, problem.batch, threads)
    return images if images >= _FEWEST_IMAGES else 1


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    threads = device.threads if problem.flops > gemm.WORTH_THREADS else 1
    images = _images(problem, threads)
    if images > 1:
        cut = _cut(problem, images, problem.output[-1], threads)
        sizes = {cut.channels, problem.group_in_channels % cut.channels} - {0}
        columns = _inner(problem, cut) * cut.chunk
        depth, product = problem.group_out_channels, problem.accumulator.numpy
        if cut.images > 1 and all(
            gemm.columns_alike(c * math.prod(problem.filter), depth, columns, product, turned=True)
            for c in sizes
        ):
            return cut
    return _cut(problem, 1, _width(problem, device), threads)


def _cut(problem: ConvProblem, images: int, width: int, threads: int) -> _Tiling:
    itemsize, taps = gemm.itemsize(problem), math.prod(problem.filter)
    limit = problem.workspace_within(WORKSPACE_CAP)
    height, reach = _extent(problem, 0), _reach(problem, 0)
    channels = problem.group_in_channels
    cut = _Tiling(images, problem.groups, channels, channels, height, width, 1, threads, 0, 0, 0, 0)
    least = min(max(_HALO * reach, 1), height)
    if images > 1:
        least = height

    def large() -> bool:
        sized = _sized(problem, cut)
        held = max(sized.sums, sized.products) if images > 1 else sized.sums
        return held * itemsize > _BLOCK_BYTES

    while large():
        # Products of few columns would spend their time on reading the weights.
        wide = cut.rows * _inner(problem, cut) > _SHARED_COLUMNS
        if cut.rows > least and wide:
            cut = replace(cut, rows=max(cut.rows // 2, least))
        elif cut.groups > 1:
            cut = replace(cut, groups=-(-cut.groups // 2))
        elif cut.channels * taps >= 2 * _FEWEST_ROWS and cut.channels > 1:
            cut = replace(cut, channels=-(-cut.channels // 2))
        elif cut.rows > least:
            cut = replace(cut, rows=max(cut.rows // 2, least))
        else:
            break
    blocks = math.ceil(problem.batch / images) * _items(problem, cut)
    while blocks * math.ceil(channels / cut.channels) < threads:
        if cut.channels * taps < 2 * _FEWEST_ROWS or cut.channels == 1:
            break
        cut = replace(cut, channels=-(-cut.channels // 2))
    if blocks % threads and blocks < 4 * threads:
        cut = replace(cut, share=cut.channels)
        blocks = math.ceil(problem.batch / images) * _items(problem, cut)
    if blocks < threads and images == 1:
        cut = replace(cut, rows=-(-cut.rows // -(-threads // blocks)))
    while True:
        sized = _sized(problem, cut)
        if sized.bytes(itemsize) <= limit:
            return sized
        if cut.threads > 1:
            cut = replace(cut, threads=cut.threads - 1)
        elif cut.images > 1:
            return _cut(problem, 1, width, threads)
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
    count, inner = cut.groups * cut.channels, _inner(problem, cut)
    row = count * math.prod(problem.filter) * inner
    needed = min(problem.output[0], cut.rows + _reach(problem, 0))
    chunk = needed
    if cut.images == 1:
        most = max(_BLOCK_BYTES // (row * gemm.itemsize(problem)), 1)
        chunk = -(-needed // -(-needed // most))
    plane = cut.rows * math.prod(_extent(problem, axis) for axis in range(1, problem.ndim))
    return replace(
        cut,
        chunk=chunk,
        weights=math.prod(problem.w_shape),
        values=cut.groups * problem.group_out_channels * chunk * inner,
        products=row * chunk,
        sums=count * math.prod(problem.stride) * plane * cut.images,
    )


def run(plan: Plan, grad: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    cut = _tiling(plan.problem, plan.device)
    with arena(cut.bytes(gemm.itemsize(plan.problem))) as memory:
        call = _Call(plan.problem, cut, grad, w, bias, out, memory)
        run_blocks(cut.threads, call.items(), call.work)


_Item = tuple[int, slice, slice, int]  # first image, groups, channels, first row of `sums`


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
        self.weights = _weights(problem, w, memory.take(cut.weights, product))
        self.grad = grad.reshape(grad.shape[0], groups, -1, *grad.shape[2:])
        self.flat = None
        if _direct(problem, cut) and grad.dtype == product:
            self.flat = tiling.flat(self.grad, problem.ndim)
        self.out = out.reshape(out.shape[0], groups, -1, *out.shape[2:])
        self.bias = None
        if bias is not None:
            ones = [1] * (2 * problem.ndim + 1)
            self.bias = bias.astype(product).reshape(groups, -1, *ones)
        self.scratch = [
            tuple(memory.take(n, product) for n in (cut.values, cut.products, cut.sums))
            for _ in range(cut.threads)
        ]
        self.taps = _taps(problem)
        self.places = _places(problem)

    def items(self) -> list[_Item]:
        problem, cut = self.problem, self.cut
        return list(
            itertools.product(
                range(0, len(self.grad), cut.images),
                tiling.spans(problem.groups, cut.groups),
                tiling.spans(problem.group_in_channels, cut.share),
                range(0, _extent(problem, 0), cut.rows),
            )
        )

    def work(self, item: _Item, worker: int) -> None:
        n, groups, share, begin = item
        problem, cut = self.problem, self.cut
        end = min(begin + cut.rows, _extent(problem, 0))
        start = max(begin - _reach(problem, 0), 0)
        runs = [
            (first, min(first + cut.chunk, end, problem.output[0]))
            for first in range(start, min(end, problem.output[0]), cut.chunk)
        ]
        columns = None
        for channel in range(share.start, share.stop, cut.channels):
            channels = slice(channel, min(channel + cut.channels, share.stop))
            shape = (
                groups.stop - groups.start,
                channels.stop - channels.start,
                *problem.stride,
                end - begin,
                *(_extent(problem, axis) for axis in range(1, problem.ndim)),
                cut.images,
            )
            sums = self.scratch[worker][2][: math.prod(shape)].reshape(shape)
            sums[...] = 0
            for run in runs:
                if columns is None or len(runs) > 1:
                    columns = self._read(n, groups, *run, worker)
                self._add(self._multiply(groups, channels, columns, worker), run[0], begin, sums)
            if self.bias is not None:
                sums += self.bias[groups, channels]
            self._keep(sums, begin, self.out[n : n + cut.images, groups, channels])

    def _read(self, n: int, groups: slice, first: int, last: int, worker: int) -> HostArray:
        """Rows of dy as (G, K/G, columns)."""
        problem, cut = self.problem, self.cut
        if self.flat is not None:
            inner = _inner(problem, cut)
            columns = self.flat[n, groups, :, first * inner : last * inner]
            if gemm.readable(columns):
                return columns
        source = self.grad[n : n + cut.images, groups, :, first:last]
        shape = (*source.shape[1:4], *_lines(problem, cut), cut.images)
        values = self.scratch[worker][0][: math.prod(shape)].reshape(shape)
        inside = values[..., : len(source)]
        if _padded(problem, cut):
            values[..., problem.output[-1] :, :] = 0
            inside = inside[..., : problem.output[-1], :]
        values[..., len(source) :] = 0
        np.copyto(inside, np.moveaxis(source, 0, -1), casting="unsafe")
        return values.reshape(*shape[:2], -1)

    def _multiply(
        self, groups: slice, channels: slice, columns: HostArray, worker: int
    ) -> HostArray:
        """What some rows of dy add to dx: (G, C/G, taps..., rows, columns..., images)."""
        problem, cut = self.problem, self.cut
        weights = self.weights[groups, channels]
        weights = weights.reshape(weights.shape[0], -1, weights.shape[-1])
        shape = (*weights.shape[:2], columns.shape[-1])
        products = self.scratch[worker][1][: math.prod(shape)].reshape(shape)
        if cut.images == 1:
            gemm.multiply(weights, columns, products)
        else:  # in the shape that was found to treat all columns alike
            np.matmul(weights, columns, out=products)
        count, lines = channels.stop - channels.start, _lines(problem, cut)
        products = products.reshape(shape[0], count, *problem.filter, -1, *lines, cut.images)
        if _padded(problem, cut):
            beyond = products[..., problem.output[-1] :, :]
            first: Index = (..., *[0] * (problem.ndim + 1))
            # The product of zeros with a weight that is not finite.
            if np.isnan(beyond[first]).any():
                beyond[...] = 0
        return products

    def _add(self, products: HostArray, first: int, begin: int, sums: HostArray) -> None:
        """Add the products of dy's rows from `first` on to those of dx from `begin` on."""
        problem, cut = self.problem, self.cut
        ndim = problem.ndim
        count, height = products.shape[-ndim - 1], sums.shape[-ndim - 1]
        padded = _padded(problem, cut)
        if padded:
            products = products.reshape(*products.shape[:-3], -1)
            sums = sums.reshape(*sums.shape[:-3], -1)
        for taps, phases, offset in self.taps:
            # Row p of the products belongs to row p + offset of the sums.
            low = max(begin, first + offset[0])
            high = min(begin + height, first + offset[0] + count)
            if low >= high:
                continue
            spans = [(low - begin, low - first - offset[0], high - low)]
            spans += [(o, 0, p) for o, p in zip(offset[1:], problem.output[1:], strict=True)]
            if padded:
                (a, b, rows), (shift, _, _) = spans[-2:]
                line = cut.width * cut.images
                shift *= cut.images
                spans[-2:] = [(a * line + shift, b * line, rows * line - shift)]
            to: Index = (*phases, *(slice(a, a + n) for a, _, n in spans))
            of: Index = (*taps, *(slice(a, a + n) for _, a, n in spans))
            moved = sums[:, :, *to]
            moved += products[:, :, *of]

    def _keep(self, sums: HostArray, begin: int, target: HostArray) -> None:
        """Put the phases in their places, (images, G, C/G, spatial...)."""
        problem = self.problem
        sums = np.moveaxis(sums, -1, 0)[: len(target)]
        end = begin + sums.shape[-problem.ndim]
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
            taken: Index = (*phase, slice(low - begin, high - begin))
            taken += tuple(slice(*run) for run in others)
            np.copyto(target[..., *where], sums[:, :, :, *taken], casting="unsafe")


def _weights(problem: ConvProblem, w: HostArray, scratch: HostArray) -> HostArray:
    """w (K, C/G, taps...) as (G, C/G, taps, K/G), which has K/G outermost in memory."""
    groups, product = problem.groups, scratch.dtype
    conjugated = problem.conjugate and product.kind == "c"
    if w.dtype != product or not w.flags.c_contiguous or conjugated:
        filters = scratch.reshape(w.shape)
        np.copyto(filters, w, casting="unsafe")
        if conjugated:
            np.conjugate(filters, out=filters)
        w = filters
    return w.reshape(groups, -1, w.shape[1], math.prod(problem.filter)).transpose(0, 2, 3, 1)


@lru_cache(maxsize=256)
def _taps(problem: ConvProblem) -> list[tuple[Index, Index, tuple[int, ...]]]:
    """Boxes of w's taps, the phases that they reach, and how far their sums are moved there."""
    axes = []
    for filter, stride, dilation in zip(
        problem.filter, problem.stride, problem.dilation, strict=True
    ):
        runs = []
        step = stride if dilation == 1 else 1  # neighbours reach neighbouring phases
        for begin in range(0, filter, step):
            end = min(begin + step, filter)
            offset, phase = divmod(begin * dilation, stride)
            taps = slice(begin, end)
            if problem.flip:
                last = filter - 1 - end
                taps = slice(filter - 1 - begin, last if last >= 0 else None, -1)
            runs.append((taps, slice(phase, phase + end - begin), offset))
        axes.append(runs)
    found = []
    for box in itertools.product(*axes):
        taps, phases, offsets = zip(*box, strict=True)
        found.append((taps, phases, offsets))
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
