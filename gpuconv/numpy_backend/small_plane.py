"""One small plane under one small filter, summed whole: as few NumPy calls as there can be.

The plane is laid out padded, H by W, its rows one after another. A window that starts at element n
of it reads the elements n + W*r + s, wherever n is, so that one sum over the taps,

    sums[n] = sum over r, s of  w[r, s] padded[n + W*r + s],

which einsum makes in one call, has every output: the windows that run from the end of one row into
the next make W - Q sums per row in vain, which are not copied out. Zeros are laid around a copy of
x; in the other padding modes one index array, kept for later calls, says which element of x each of
the padded plane's is.

The smallest problems of those modes are rid of half of these calls: the index array is that of all
windows, R*S by P*Q, and the sums are the product of the filter with what it gathers. Either way
no output sees more of x than its window.

At this size a call costs more than its arithmetic: ``depthwise``, which does the same in blocks for
batches, takes three times as long for 28 x 28 elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_MOST_PLANES = 4  # beyond, planes share their calls elsewhere
_MOST_ELEMENTS = 1 << 14  # of the padded plane
_MOST_BYTES = 1 << 20  # of all products
_GATHERED = 1 << 12  # products that are gathered: no BLAS finds them worth a second thread
_CALLS = 5e-6  # seconds of a plane's calls,
_READ, _SUM, _TAP = 0.3e-9, 0.2e-9, 0.11e-9  # of each float32 read, summed and multiplied


@dataclass(frozen=True)
class _Layout:
    """The padded plane, and where x lies in it."""

    padded: tuple[int, int]  # H, W
    filter: tuple[int, int]
    outputs: tuple[int, int]
    index: npt.NDArray[np.intp] | None  # of x, row by row; None: zeros around it
    inside: tuple[slice, slice]  # where x lies then
    gathered: bool  # the index is that of all windows, (R*S, P*Q)


def _pair(values: tuple[int, ...], missing: int) -> tuple[int, int]:
    """Of rows and columns; a signal is a plane of one row."""
    rows, columns = (missing, *values)[-2:]
    return rows, columns


@lru_cache(maxsize=64)  # few: an index array takes up to 128 KiB
def _layout(problem: ConvProblem) -> _Layout:
    extents, before, after = (
        _pair(values, missing)
        for values, missing in ((problem.input, 1), (problem.pad_lo, 0), (problem.pad_hi, 0))
    )
    padded = tuple(map(sum, zip(extents, before, after, strict=True)))
    inside = tuple(slice(lo, lo + n) for lo, n in zip(before, extents, strict=True))
    index = None
    if problem.padding_mode != "zeros":
        rows, columns = (
            source_index(n, lo, hi, problem.padding_mode)
            for n, lo, hi in zip(extents, before, after, strict=True)
        )
        index = rows[:, None] * extents[1] + columns
    taps, outputs = _pair(problem.filter, 1), _pair(problem.output, 1)
    products = math.prod(taps) * math.prod(outputs)
    gathered = index is not None and products <= _GATHERED
    if index is not None and gathered:
        windows = sliding_window_view(index, taps).transpose(2, 3, 0, 1)
        index = windows.reshape(math.prod(taps), math.prod(outputs))
    return _Layout(_pair(padded, 1), taps, outputs, index, (inside[0], inside[1]), gathered)


def _elements(problem: ConvProblem) -> int:
    """Elements of the padded plane."""
    return math.prod(
        n + lo + hi for n, lo, hi in zip(problem.input, problem.pad_lo, problem.pad_hi, strict=True)
    )


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"{problem.operation} is not what it computes")
    if problem.ndim > 2 or (problem.in_channels, problem.out_channels) != (1, 1):
        return No("it takes one plane of one or two axes under one filter")
    if set(problem.stride) | set(problem.dilation) != {1} or problem.bias is not None:
        return No("it knows no stride, no dilation and no bias")
    if problem.accumulator.is_exact or problem.accumulator.is_complex:
        return No("it sums real numbers in floating point")
    elements = _elements(problem)
    products = elements * math.prod(problem.filter) * problem.accumulator.itemsize
    if problem.batch > _MOST_PLANES or elements > _MOST_ELEMENTS or products > _MOST_BYTES:
        return No("so much work is worth blocks of its own")
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """A plane's calls, and its reads, sums and products."""
    each = _READ + _SUM + _TAP * math.prod(problem.filter)
    elements = _elements(problem) * problem.accumulator.itemsize / 4
    return problem.batch * (_CALLS + elements * each)


def workspace(problem: ConvProblem, device: Cpu) -> int:
    """What is read of x, in its own type and that of the sums, and its index; the sums, as integers
    too; x; w."""
    size, own = problem.accumulator.itemsize, problem.x_dtype.itemsize
    integers = 8 if problem.y_dtype.is_exact else 0
    products = min(math.prod(problem.filter) * math.prod(problem.output), _GATHERED)
    elements = _elements(problem)
    index = 0 if problem.padding_mode == "zeros" else 8
    read = max(products, elements) * (own + size + index)
    return read + elements * (own + size + integers) + 2 * math.prod(problem.filter) * size


def run(plan: Plan, x: HostArray, w: HostArray, bias: None, out: HostArray) -> None:
    problem = plan.problem
    layout, dtype = _layout(problem), problem.accumulator.numpy
    w = w.reshape(layout.filter).astype(dtype, copy=False)
    if problem.flip:
        w = w[::-1, ::-1]
    for image, result in zip(x, out, strict=True):
        # Every index is legal: NumPy need not check them first.
        if layout.gathered:
            products = image.reshape(-1).take(layout.index, mode="clip").astype(dtype, copy=False)
            kept = w.reshape(-1).dot(products)
        elif layout.index is not None:
            padded = image.reshape(-1).take(layout.index, mode="clip").astype(dtype, copy=False)
            kept = _sum(layout, w, padded)
        else:
            padded = np.zeros(layout.padded, dtype)
            padded[layout.inside] = image[0]
            kept = _sum(layout, w, padded)
        if out.dtype.kind in "biu" and out.dtype.itemsize < 8:
            kept = kept.astype(np.int64)  # cut off before they wrap
        np.copyto(result, kept.reshape(result.shape), casting="unsafe")


def _sum(layout: _Layout, w: HostArray, padded: HostArray) -> HostArray:
    """The sums (P, Q) of a padded plane."""
    width, size = layout.padded[1], padded.itemsize
    rows, columns = layout.outputs
    count = (rows - 1) * width + columns  # from the first output to the last
    windows: HostArray = np.ndarray(
        (*layout.filter, count), padded.dtype, padded, 0, (width * size, size, size)
    )
    sums: HostArray = np.empty((rows, width), padded.dtype)
    # In this order the innermost loop runs along the plane.
    np.einsum("rs,rsn->n", w, windows, out=sums.reshape(-1)[:count], order="F")
    return sums[:, :columns]
