"""What the algorithms on matrix products share: the products' type, and how results are kept.

Integers are exact: they are multiplied in a floating type where its significand holds every
possible sum, which BLAS does fast, and in 64-bit integers elsewhere, which it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.dtypes import DType
from gpuconv.numpy_backend import tiling
from gpuconv.numpy_backend.device import UNPACKED, Cpu
from gpuconv.numpy_backend.workers import one_blas_thread
from gpuconv.problem import ConvProblem

Type = np.dtype[Any]

WORTH_THREADS = 16e6  # flops: below, waking a second thread costs more than it saves

_FLOAT32, _FLOAT64, _INT64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)


def planned_type(problem: ConvProblem) -> Type:
    """The type of the products, as far as the dtypes alone decide it; int64 where values must."""
    if not problem.accumulator.is_exact:
        return problem.accumulator.numpy
    return _exact_type(problem, _largest(problem.x_dtype) * _largest(problem.w_dtype))


def product_type(problem: ConvProblem, x: HostArray, w: HostArray) -> Type:
    """The type of the products for these very operands."""
    planned = planned_type(problem)
    if planned != _INT64:
        return planned
    return _exact_type(problem, _magnitude(x) * _magnitude(w))


def _exact_type(problem: ConvProblem, largest_product: int) -> Type:
    largest_sum = largest_product * problem.reduction
    if largest_sum <= 1 << 24 and problem.result_dtype.itemsize == 8:
        return _FLOAT32
    return _FLOAT64 if largest_sum <= 1 << 53 else _INT64


def _largest(dtype: DType) -> int:
    if dtype.kind == "b":
        return 1
    return 1 << (8 * dtype.itemsize - (dtype.kind == "i"))


def _magnitude(array: HostArray) -> int:
    if array.dtype.kind == "b" or array.size == 0:
        return 1
    return max(abs(int(array.max())), abs(int(array.min())))


def itemsize(problem: ConvProblem) -> int:
    """Bytes of scratch per element: exact products may turn out to need 64 bits."""
    return 8 if problem.accumulator.is_exact else problem.accumulator.itemsize


def matrix(
    filters: HostArray, scratch: HostArray, channels_last: bool = False, turned: bool = False
) -> HostArray:
    """The filters (G, K/G, C/G, taps...) as matrices (G, K/G, depth), copied where they must be.

    The depth runs over (C/G, taps), or over (taps, C/G) with `channels_last`. `turned` matrices
    have K/G innermost in memory, as a product that is written channels last is fastest.
    """
    groups, count = filters.shape[:2]
    if channels_last:
        filters = np.moveaxis(filters, 2, -1)
    elif not turned and filters.dtype == scratch.dtype and filters[0, 0].flags.c_contiguous:
        rows = filters.reshape(groups, count, -1)
        if readable(rows):
            return rows
    if turned:
        shape = (groups, *filters.shape[2:], count)
        reordered = scratch[: filters.size].reshape(shape)
        np.copyto(np.moveaxis(reordered, -1, 1), filters, casting="unsafe")
        return reordered.reshape(groups, -1, count).transpose(0, 2, 1)
    reordered = scratch[: filters.size].reshape(filters.shape)
    np.copyto(reordered, filters, casting="unsafe")
    return reordered.reshape(groups, count, -1)


def channels_last(problem: ConvProblem) -> bool:
    """Whether products are computed channels last.

    The expected memory decides, not that of `out`: the same bits come whatever memory they go to.
    """
    return problem.channels_last and problem.batch * math.prod(problem.output) > 256


def turns(problem: ConvProblem) -> bool:
    """Whether the filters are turned for products that are channels last.

    It makes them a few percent faster, and costs several nanoseconds for each weight.
    """
    return problem.channels_last and problem.batch * math.prod(problem.output) > 16384


def sums(scratch: HostArray, shape: tuple[int, ...], channels_last: bool) -> HostArray:
    """Room for products (..., K/G, pixels)."""
    *stacked, count, pixels = shape
    room = scratch[: math.prod(shape)]
    if channels_last:
        return room.reshape(*stacked, pixels, count).swapaxes(-1, -2)
    return room.reshape(shape)


def multiply(weights: HostArray, columns: HostArray, out: HostArray) -> None:
    """``out[...] = weights @ columns``, (G, K/G, depth) @ (..., G, depth, pixels).

    Small filters multiply a few hundred columns at a time: up to a million products OpenBLAS takes
    a way that does not pack its operands first, and is up to 1.4 times as fast.
    """
    pixels = columns.shape[-1]
    step = UNPACKED // max(weights.shape[-2] * weights.shape[-1], 1) // 32 * 32
    whole = pixels // step * step if 192 <= step < pixels else 0
    # It gains only where pixels run along memory.
    if not whole or columns.strides[-1] != columns.itemsize or weights.shape[-2] < 24:
        np.matmul(weights, columns, out=out)
        return
    shape = (-1, whole // step, step)
    pieces = columns[..., :whole].reshape(*columns.shape[:-1], *shape[1:]).swapaxes(-2, -3)
    places = out[..., :whole].reshape(*out.shape[:-1], *shape[1:]).swapaxes(-2, -3)
    np.matmul(weights[:, None], pieces, out=places)
    if whole < pixels:
        np.matmul(weights, columns[..., whole:], out=out[..., whole:])


@lru_cache(maxsize=1024)
def columns_alike(rows: int, depth: int, columns: int, product: Type, turned: bool = False) -> bool:
    """Whether a column's bits do not depend on its place in (rows, depth) @ (depth, columns).

    BLAS libraries promise no such thing, and some break it at the edges of their tiles; images may
    share a product only where it holds. It is found by multiplying equal columns.
    """
    if rows == 1 or product.kind == "c":
        return False  # a product with a vector; complex products differ too often to be tried
    for filters, column in _samples(rows, depth, product):
        filters = np.asfortranarray(filters) if turned else filters
        first = np.repeat(column[:, None], columns, axis=1)
        for result in (filters @ first, filters @ first.T.copy().T):
            if (result != result[:, :1]).any():
                return False
    return True


@lru_cache(maxsize=1024)
def rows_alike(rows: int, depth: int, columns: int, product: Type) -> bool:
    """The same of the rows of the first factor."""
    if columns == 1:
        return False
    for filters, row in _samples(columns, depth, product):
        result = np.repeat(row[None], rows, axis=0) @ filters.T.copy()
        if (result != result[:1]).any():
            return False
    return True


def _samples(rows: int, depth: int, product: Type) -> Iterator[tuple[HostArray, HostArray]]:
    """Random matrices and vectors: enough that bits which differ do not agree by chance."""
    rng = np.random.default_rng(0)
    with one_blas_thread():
        for _ in range(64 // rows + 1):
            filters = rng.random((rows, depth), np.float32) - np.float32(0.5)
            column = rng.random(depth, np.float32) - np.float32(0.5)
            yield filters.astype(product) * filters[0, 0], column.astype(product) * column[0]


def bias_vector(problem: ConvProblem, bias: HostArray | None, product: Type) -> HostArray | None:
    """The bias in the type it is added in: the products', or 64-bit integers."""
    if bias is None:
        return None
    return bias.astype(_INT64 if problem.accumulator.is_exact else product)


def in_place(problem: ConvProblem, product: Type, target: HostArray, channels_last: bool) -> bool:
    """Whether BLAS can write its result into `target`, (..., K/G, pixels), as into ``sums``."""
    if channels_last:
        target = target.swapaxes(-1, -2)
    return (
        not problem.accumulator.is_exact
        and target.dtype == product
        and target.strides[-1] == target.itemsize
        and min(target.shape[-2:]) > 1
        and readable(target)
    )


def readable(matrices: HostArray) -> bool:
    """Whether BLAS can work on `matrices`, (..., rows, columns), where they lie."""
    rows, columns = matrices.shape[-2:]
    row_stride, column_stride = matrices.strides[-2:]
    size = matrices.itemsize
    return (column_stride == size and row_stride % size == 0 and row_stride >= columns * size) or (
        row_stride == size and column_stride % size == 0 and column_stride >= rows * size
    )


def laid_out(source: HostArray, scratch: HostArray, leading: int) -> HostArray:
    """`source` copied to `scratch`, in its type, with all but the `leading` axes made one."""
    copy = scratch[: source.size].reshape(source.shape)
    np.copyto(copy, source, casting="unsafe")
    return copy.reshape(*source.shape[:leading], -1)


def store(problem: ConvProblem, sums: HostArray, bias: HostArray | None, target: HostArray) -> None:
    """Write `sums`, which are scratch, to `target` with the bias added and the type converted.

    Exact sums pass through 64-bit integers, in which they wrap as the contract says.
    """
    if problem.accumulator.is_exact and target.itemsize == 8:
        target = target.view(_INT64)
        np.copyto(target, sums, casting="unsafe")
        if bias is not None:
            target += bias
        return
    if sums.dtype == _FLOAT64 and problem.accumulator.is_exact:
        whole = sums.view(_INT64)
        np.copyto(whole, sums, casting="unsafe")
        sums = whole
    if bias is not None:
        sums += bias
    np.copyto(target, sums, casting="unsafe")


def rate(problem: ConvProblem, device: Cpu, factor: float, *sides: tuple[float, float]) -> float:
    """Flops a second of products, `factor` times the nominal rate for large matrices.

    Each of `sides` is an extent, and that at which BLAS reaches half of its rate.
    """
    found = factor * device.gemm_flops * 4 / itemsize(problem)
    for extent, half in sides:
        found *= extent / (extent + half)
    return found


def seconds(
    problem: ConvProblem,
    device: Cpu,
    columns: int,
    products: int,
    parts: int,
    threads: int,
    copied: float,
    calls: float,
    turns: float = 0,
) -> float:
    """Predicted time of a convolution as products of W (K/G, depth) with (depth, columns).

    The products at BLAS's rate for such shapes, `copied` bytes per pixel beside them, `calls`
    NumPy calls per block of `products` times `columns` pixels and one of `parts` of the output
    channels, and the operands' way through memory. Where a block's calls are short, `turns` is how
    many there are, between which threads take turns at Python.
    """
    pixels = math.prod(problem.output) * problem.batch
    sides = (problem.group_out_channels / parts, 8), (columns, 16), (problem.reduction, 8)
    blocks = max(math.ceil(pixels / (columns * products)), 1) * parts
    work = (
        problem.flops / rate(problem, device, 1.5, *sides)
        + pixels * copied / (3 * device.copy_bytes)
        + blocks * (calls + problem.groups / 2) * device.call_seconds
    )
    memory = problem.bytes_moved / device.memory_bytes
    each = work / (blocks * turns) if turns else math.inf
    return work / tiling.speedup(blocks, threads, each) + memory + device.start(threads)
