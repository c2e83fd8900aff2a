"""The gradient of w as matrix products, one for each row of the filter.

    dw[k, c, r, s] = sum over n, p, q of  X_r[(s, c), (n, p, q)] dy[k, (n, p, q)]

X_r, (S*C/G, pixels), is a run of the layout that ``filter_rows`` describes: x is copied S times
where windows would be R*S copies. It is the first factor of the products, as the side with more
rows should be. An item of work is a piece of dw, some groups by some channels by all filters, over
one share of the images and their boxes; shares are added up in order, whichever thread had them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import filter_rows, gemm, tiling, windows
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.scratch import ALIGN, Arena, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("wgrad",)

# Of columns: half of a core's second-level cache for one thread alone. Several take turns at Python
# between NumPy's calls: theirs are longer, which gains more than the cache would.
_BLOCK_BYTES, _SHARED_BLOCK_BYTES = 1 << 20, 4 << 20
_WORTH_THREADS = 4 * gemm.WORTH_THREADS  # its calls are short, with Python between them
_MOST_PIXELS, _FEWEST_PIXELS = 8192, 512  # of a block
_ROWS = 768  # of a product's first factor
_SCATTERED = 14  # by how much dw's own order is slower to write where it leaves the caches


@dataclass(frozen=True)
class _Tiling:
    images: int  # that share a block; more than 1 only where the box is a whole image
    box: tiling.Box
    groups: int  # of an item,
    channels: int  # and of each of them
    shares: int  # of the blocks
    threads: int

    def pieces(self, problem: ConvProblem) -> tuple[int, int, int, int]:
        """Elements of a worker's scratch: padded input, columns, dy, and the sums or products."""
        count = self.images * self.groups * self.channels
        return (
            count * math.prod(windows.extents(problem, self.box)),
            count * problem.filter[1] * filter_rows.positions(problem, self.box),
            self.images * self.groups * problem.group_out_channels * math.prod(self.box),
            self.groups * self.channels * math.prod(problem.filter) * problem.group_out_channels,
        )

    def bytes(self, problem: ConvProblem) -> int:
        size = gemm.itemsize(problem)
        *read, item = (rounded(n * size) for n in self.pieces(problem))
        partial = rounded(math.prod(problem.w_shape) * size * self.shares)
        return partial + self.threads * (sum(read) + item) + ALIGN


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "wgrad":
        return No(f"it computes wgrad, not {problem.operation}")
    if problem.ndim != 2 or problem.filter[0] == 1:
        return No("the filter has no rows to share columns: it is not 2-D, or of one row")
    if problem.accumulator.is_exact:
        return No(f"it sums floats, not {problem.accumulator}")
    needed, limit = workspace(problem, device), problem.workspace_within(WORKSPACE_CAP)
    if needed > limit:
        return No(f"its smallest blocks take {needed} bytes, over {limit}")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """The products, the layout, the products' sums, dw's own order, and NumPy's calls."""
    cut = _tiling(problem, device)
    size, (r, s) = gemm.itemsize(problem), problem.filter
    pixels = cut.images * math.prod(cut.box)
    half = 4 if problem.group_out_channels < 32 else 32
    sides = (problem.group_out_channels, 4), (pixels, 16), (cut.channels * s, half)
    blocks = problem.batch * math.prod(problem.output) / pixels
    laid_out = problem.in_channels * s * cut.images * filter_rows.positions(problem, cut.box)
    copied = float(laid_out * (1 if problem.stride == (1, 1) else 3))
    if problem.channels_last:  # transposes, of dy too
        copied += 3 * (laid_out / s + problem.out_channels * pixels)
    elif cut.images > 1:
        copied += problem.out_channels * pixels
    weights = math.prod(problem.w_shape)
    items = math.ceil(problem.groups / cut.groups) * math.ceil(
        problem.group_in_channels / cut.channels
    )
    calls = items * (6 + 3 * s + r)
    overhead = (calls + items * r * cut.groups / 10) * device.call_seconds
    work = (
        problem.flops / gemm.rate(problem, device, 1.4, *sides)
        + blocks * ((copied + 1.5 * weights) * size / (3 * device.copy_bytes) + overhead)
        + (1 if weights * size <= 2 << 20 else _SCATTERED) * weights * size / device.copy_bytes
    )
    memory = problem.bytes_moved / device.memory_bytes
    threads = tiling.speedup(items * cut.shares, cut.threads, work / (blocks * calls))
    return work / threads + memory + device.start(cut.threads)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return _tiling(problem, device).bytes(problem)


@lru_cache(maxsize=1024)
def _tiling(problem: ConvProblem, device: Cpu) -> _Tiling:
    itemsize = gemm.itemsize(problem)
    limit = problem.workspace_within(WORKSPACE_CAP)
    threads = device.threads if problem.flops > _WORTH_THREADS else 1
    most = _BLOCK_BYTES if threads == 1 else _SHARED_BLOCK_BYTES
    s = problem.filter[1]
    channels = tiling.even(problem.group_in_channels, max(_ROWS // s, 1))
    pixels = min(max(most // (channels * s * itemsize), _FEWEST_PIXELS), _MOST_PIXELS)
    if problem.groups == 1:
        pixels = tiling.balance(problem.output, pixels, problem.batch, threads, _FEWEST_PIXELS)
    cut = _Tiling(1, tiling.cut(problem.output, pixels), 1, channels, 1, threads)
    size = math.prod(cut.box)
    if cut.box == problem.output:
        cut = replace(cut, images=max(min(_FEWEST_PIXELS // size, problem.batch), 1))
    groups = max(most // (cut.images * size * channels * s * itemsize), 1)
    cut = replace(cut, groups=tiling.even(problem.groups, groups))
    cut = replace(cut, shares=_shares(problem, cut))
    while cut.bytes(problem) > limit:
        if cut.images > 1:
            cut = replace(cut, images=1)
        elif cut.groups > 1:
            cut = replace(cut, groups=-(-cut.groups // 2))
        elif cut.threads > 1:
            cut = replace(cut, threads=cut.threads - 1, shares=1)
        elif cut.channels > 1:
            cut = replace(cut, channels=-(-cut.channels // 2))
        elif math.prod(cut.box) > 1:
            cut = replace(cut, box=tiling.cut(problem.output, math.prod(cut.box) // 2))
        else:
            break
    return cut


def _shares(problem: ConvProblem, cut: _Tiling) -> int:
    """As many as occupy every thread, where there are fewer pieces of dw."""
    items = -(-problem.groups // cut.groups) * -(-problem.group_in_channels // cut.channels)
    blocks = -(-problem.batch // cut.images) * tiling.count(problem.output, cut.box)
    return min(-(-cut.threads // items), max(blocks, 1))


def run(plan: Plan, x: HostArray, grad: HostArray, bias: None, out: HostArray) -> None:
    cut = _tiling(plan.problem, plan.device)
    with arena(cut.bytes(plan.problem)) as memory:
        call = _Call(plan.problem, cut, x, grad, out, memory)
        run_blocks(cut.threads, call.items(), call.work)
        call.finish()


class _Call:
    def __init__(
        self,
        problem: ConvProblem,
        cut: _Tiling,
        x: HostArray,
        grad: HostArray,
        out: HostArray,
        memory: Arena,
    ) -> None:
        self.problem, self.cut = problem, cut
        groups, product = problem.groups, problem.accumulator.numpy
        self.product = product
        self.x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        self.grad = grad.reshape(grad.shape[0], groups, -1, *grad.shape[2:])
        self.x_flat = tiling.flat(self.x, 2)
        self.grad_flat = tiling.flat(self.grad, 2) if grad.dtype == product else None
        if problem.flip:
            out = np.flip(out, (2, 3))
        self.out = out.reshape(groups, -1, *out.shape[1:])
        r, s = problem.filter
        shape = (cut.shares, r, groups, s, problem.group_in_channels, problem.group_out_channels)
        self.totals = memory.take(math.prod(shape), product).reshape(shape)
        self.scratch = [
            tuple(memory.take(n, product) for n in cut.pieces(problem)) for _ in range(cut.threads)
        ]
        boxes = filter_rows.boxes(problem, cut.box, x.strides[-1] == x.itemsize)
        self.blocks = list(itertools.product(range(0, len(x), cut.images), boxes))

    def items(self) -> list[tuple[slice, slice, int]]:
        """(groups, channels, share)."""
        problem, cut = self.problem, self.cut
        return list(
            itertools.product(
                tiling.spans(problem.groups, cut.groups),
                tiling.spans(problem.group_in_channels, cut.channels),
                range(cut.shares),
            )
        )

    def work(self, item: tuple[slice, slice, int], worker: int) -> None:
        groups, channels, share = item
        cut, problem = self.cut, self.problem
        total = self.totals[share, :, groups, :, channels]
        count = len(self.blocks)
        blocks = self.blocks[count * share // cut.shares : count * (share + 1) // cut.shares]
        shape = (total.shape[1], total.shape[2] * total.shape[3], total.shape[4])
        products = self.scratch[worker][3][: total.size].reshape(problem.filter[0], *shape)
        if not blocks:  # a smaller batch than planned
            total[...] = 0
        for i, block in enumerate(blocks):
            matrices, values = self._read(block, groups, channels, worker)
            for matrix, product in zip(matrices, products, strict=True):
                np.matmul(matrix, values.swapaxes(1, 2), out=product)
            if i:
                total += products.reshape(total.shape)
            else:
                np.copyto(total, products.reshape(total.shape))

    def _read(
        self, block: tuple[int, filter_rows.Box], groups: slice, channels: slice, worker: int
    ) -> tuple[list[HostArray], HostArray]:
        """The columns of each filter row (G, S*C/G, pixels), and dy (G, K/G, pixels)."""
        n, box = block
        problem, cut = self.problem, self.cut
        read, memory, copy, _ = self.scratch[worker]
        x = self.x[n : n + cut.images, groups, channels]
        images = len(x)
        columns = filter_rows.make(
            problem, box.extents, images, x.shape[1], x.shape[2], read, memory
        )
        x_flat = None if self.x_flat is None else self.x_flat[n : n + images, groups, channels]
        columns.fill(x, x_flat, box)
        if problem.conjugate and self.product.kind == "c":
            for phase in columns.flat.values():
                np.conjugate(phase, out=phase)
        if images == 1 and self.grad_flat is not None:
            values = self.grad_flat[n, groups, :, box.start : box.start + box.pixels]
            if gemm.readable(values):
                return columns.matrices, values
        source = self.grad[n : n + images, groups][box.region].transpose(1, 2, 3, 0, 4)
        return columns.matrices, gemm.laid_out(source, copy, 2)

    def finish(self) -> None:
        """Add up the shares, and bring dw into its own order."""
        for share in self.totals[1:]:
            self.totals[0] += share
        np.copyto(self.out, self.totals[0].transpose(1, 4, 3, 0, 2), casting="unsafe")
