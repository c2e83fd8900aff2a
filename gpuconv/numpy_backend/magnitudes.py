"""How small the sum of magnitudes under a filter can be, without computing it for any window.

A result's error bound is relative to S = sum of |x||w| over its window. Call x's elements below a
level t small. Where at most m of a window's elements inside of x are small,

    S >= t * (sum of |w| over the window's elements inside of x  -  sum of the m largest |w|)

whatever the filter. Small elements are counted for all windows that start in one cell of a coarse
grid together, so that the bound costs a fraction of a pass over x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpuconv.arrays import HostArray

_LEVEL = 16  # the mean magnitude over the level
_ROWS = 4  # every fourth row says enough of it
_WORD = 8  # columns that are counted at once

Extents = tuple[int, ...]
Span = tuple[int, int]


@dataclass(frozen=True)
class Filters:
    """The magnitudes of some filters, (groups, outs, T, R, S) in float64."""

    magnitudes: HostArray

    @cached_property
    def sums(self) -> HostArray:
        """(groups, outs): of the magnitudes."""
        return np.asarray(self.magnitudes.sum(axis=(2, 3, 4)))

    @cached_property
    def norms(self) -> HostArray:
        """(groups, outs): the roots of the sums of their squares."""
        return np.asarray(np.sqrt(np.square(self.magnitudes).sum(axis=(2, 3, 4))))

    @cached_property
    def largest(self) -> HostArray:
        """(groups, outs, taps + 1): the sum of the m largest at m."""
        groups, outs = self.magnitudes.shape[:2]
        falling = np.sort(self.magnitudes.reshape(groups, outs, -1), axis=2)[..., ::-1]
        result = np.zeros((groups, outs, falling.shape[2] + 1))
        np.cumsum(falling, axis=2, out=result[..., 1:])
        return result


def cell(taps: Extents) -> Extents:
    """The extents of the coarse grid's cells: about an eighth of the filter's, (T, R, S)."""
    return *(max(n // 8, 1) for n in taps[:-1]), _WORD * max(taps[-1] // (8 * _WORD), 1)


def marks_shape(extents: Extents, taps: Extents) -> Extents:
    """A block's extents, rounded up to whole cells."""
    return tuple(-(-n // c) * c for n, c in zip(extents, cell(taps), strict=True))


def least_sums(
    block: HostArray,
    filters: Filters,
    inside: tuple[Span, ...],
    last: Extents,
    marks: HostArray,
) -> HostArray:
    """A lower bound on S, (groups, outs), over the windows that start from 0 to `last`.

    `block` is (groups, depth, rows, columns) of |x|, zero outside of the spans `inside`. `marks`
    is scratch: (groups, *marks_shape) of bool.
    """
    taps = filters.magnitudes.shape[2:]
    size = cell(taps)
    level = _level(block, inside)
    counts = _small(block, level, inside, marks, size)
    covered = all(a <= 0 and b >= n + k for (a, b), n, k in zip(inside, last, taps, strict=True))
    sums = filters.magnitudes
    for axis, (step, end) in enumerate(zip(size, last, strict=True)):
        if taps[axis] == block.shape[1 + axis] == 1:
            continue
        first = np.arange(end // step + 1)
        touched = (step + taps[axis] - 2) // step + 1
        stop = np.minimum(first + touched, counts.shape[1 + axis])
        counts = _between(counts, 1 + axis, first, stop)
        if not covered:
            begin, end_inside = inside[axis]
            low = np.clip(begin - first * step, 0, taps[axis])
            high = end_inside - np.minimum(first * step + step - 1, end)
            sums = _between(sums, 2 + axis, low, np.clip(high, low, taps[axis]))
    groups, outs = filters.sums.shape
    counts = np.minimum(counts, math.prod(taps)).reshape(groups, 1, -1)
    seen = sums.reshape(groups, outs, -1)
    if covered:  # the windows differ in their counts alone
        counts, seen = counts.max(axis=2, keepdims=True), filters.sums[..., None]
    lost = np.take_along_axis(filters.largest, counts, axis=2)
    return np.asarray(level[:, None] * (seen - lost).min(axis=2))


def _level(block: HostArray, inside: tuple[Span, ...]) -> HostArray:
    """Any level will do: a part of the mean, of some of the rows where there are many."""
    rows = block[:, :, :: _ROWS if block.shape[2] > _ROWS**2 else 1]
    share = rows.shape[2] / block.shape[2]
    count = math.prod(stop - start for start, stop in inside) * share
    return np.asarray(rows.sum(axis=(1, 2, 3)) / max(_LEVEL * count, 1))


def _small(
    block: HostArray, level: HostArray, inside: tuple[Span, ...], marks: HostArray, size: Extents
) -> HostArray:
    """How many elements of each cell are inside and below the level."""
    box = tuple(slice(*span) for span in inside)
    marks[...] = False
    np.less(block[:, *box], level[:, None, None, None], out=marks[:, *box])
    counts = np.bitwise_count(marks.view(np.uint64))
    groups, depth, rows, words = counts.shape
    d, h, w = size
    counts = counts.reshape(groups, depth, rows // h, h, words).sum(axis=3, dtype=np.uint32)
    counts = counts.reshape(groups, depth // d, d, rows // h, words * _WORD // w, w // _WORD)
    return np.asarray(counts.sum(axis=(2, 5), dtype=np.int64))


def _between(array: HostArray, axis: int, starts: HostArray, stops: HostArray) -> HostArray:
    """Sums along an axis from each start to before its stop."""
    shape = list(array.shape)
    shape[axis] += 1
    total = np.zeros(shape, array.dtype)
    np.cumsum(array, axis=axis, out=total[(slice(None),) * axis + (slice(1, None),)])
    return np.asarray(total.take(stops, axis) - total.take(starts, axis))
