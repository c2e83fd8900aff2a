"""Reading a box of the padded input: the piece of x that a block of outputs sees.

The boundary is written out for that piece alone, whatever the padding mode, while the values are
converted to the type that the block is computed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.problem import ConvProblem

Range = tuple[int, int]


def input_range(problem: ConvProblem, axis: int, start: int, stop: int) -> Range:
    """The padded positions (0 is the first pad) that outputs `start` to `stop` read on `axis`."""
    span = problem.dilation[axis] * (problem.filter[axis] - 1)
    stride = problem.stride[axis]
    return start * stride, (stop - 1) * stride + span + 1


def extents(problem: ConvProblem, box: Sequence[int]) -> tuple[int, ...]:
    """How many padded positions a box of outputs reads along each axis."""
    return tuple(input_range(problem, axis, 0, n)[1] for axis, n in enumerate(box))


def read(problem: ConvProblem, x: HostArray, ranges: Sequence[Range], block: HostArray) -> None:
    """Fill `block` with the padded positions `ranges` of x; both are (N, C, spatial...)."""
    pieces = [
        _pieces(
            problem.input[axis],
            problem.pad_lo[axis],
            problem.pad_hi[axis],
            problem.padding_mode,
            *ranges[axis],
        )
        for axis in range(problem.ndim)
    ]
    whole = (slice(None), slice(None))
    if all(len(p) == 1 for p in pieces) and all(p[0][1] is not None for p in pieces):
        source = (*whole, *(p[0][1] for p in pieces))
        np.copyto(block, x[source], casting="unsafe")
        return
    if problem.padding_mode == "zeros":
        block[...] = 0
        pieces = [[p for p in axis if p[1] is not None] for axis in pieces]
    for combination in itertools.product(*pieces):
        target = block[(*whole, *(p[0] for p in combination))]
        np.copyto(target, x[(*whole, *(p[1] for p in combination))], casting="unsafe")


@lru_cache(maxsize=4096)
def _pieces(
    extent: int, lo: int, hi: int, mode: str, start: int, stop: int
) -> list[tuple[slice, slice | None]]:
    """The padded positions `start` to `stop`, cut where their source is not one slice of x.

    Each piece is (where in the block, which slice of x), the latter None for zeros.
    """
    if mode == "zeros" or (start >= lo and stop <= lo + extent):
        first, last = min(max(start, lo), lo + extent), max(min(stop, lo + extent), lo)
        if last <= first:
            return [(slice(0, stop - start), None)]
        pieces: list[tuple[slice, slice | None]] = [
            (slice(first - start, last - start), slice(first - lo, last - lo))
        ]
        if first > start or last < stop:
            pieces.append((slice(0, 0), None))
        return pieces
    index = source_index(extent, lo, hi, mode)[start:stop]
    steps = np.diff(index)
    # A new piece starts where the step changes, or is none of -1, 0, 1.
    cuts = [0]
    for i in range(1, len(index)):
        begun = cuts[-1]
        step = steps[i - 1]
        if abs(step) > 1 or (i - 1 > begun and step != steps[begun]):
            cuts.append(i)
    pieces = []
    for a, b in zip(cuts, [*cuts[1:], len(index)], strict=True):
        first, last = int(index[a]), int(index[b - 1])
        if last >= first:
            source = slice(first, last + 1)  # one element, repeated, where the step is 0
        else:
            source = slice(first, last - 1 if last else None, -1)
        pieces.append((slice(a, b), source))
    return pieces


def windows(problem: ConvProblem, block: HostArray, box: Sequence[int]) -> HostArray:
    """The view (N, C, taps..., positions...) of the windows of `box` outputs within `block`."""
    n, c, *spatial = block.strides
    return as_strided(
        block,
        (*block.shape[:2], *problem.filter, *box),
        (
            n,
            c,
            *(s * d for s, d in zip(spatial, problem.dilation, strict=True)),
            *(s * d for s, d in zip(spatial, problem.stride, strict=True)),
        ),
    )
