"""Reading a box of the padded input: the piece of x that a block of outputs sees.

The boundary is written out for that piece alone, whatever the padding mode, while the values are
converted to the type that the block is computed in.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import sources
from gpuconv.problem import ConvProblem

Range = tuple[int, int]
Copy = tuple[Any, Any]  # indices: where to, and which part of x, or None for zeros


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
    fill(x, _copies(problem, [(start, stop - start, 1) for start, stop in ranges]), block)


def reading(problem: ConvProblem, corner: Sequence[int], box: Sequence[int]) -> list[Copy]:
    """What fills (..., spatial...) with the padded positions that a box of outputs reads."""
    counts = extents(problem, box)
    runs = [(c * s, n, 1) for c, s, n in zip(corner, problem.stride, counts, strict=True)]
    return _copies(problem, runs)


def gathering(problem: ConvProblem, corner: Sequence[int], box: Sequence[int]) -> list[Copy]:
    """What fills (..., taps..., positions...) with the windows of a box of outputs, by ``fill``.

    Nothing but what the windows hold is read, however far apart their elements lie.
    """
    found = []
    for tap in itertools.product(*map(range, problem.filter)):
        runs = [
            (c * stride + r * dilation, count, stride)
            for c, r, count, stride, dilation in zip(
                corner, tap, box, problem.stride, problem.dilation, strict=True
            )
        ]
        found += [((..., *tap, *to[1:]), source) for to, source in _copies(problem, runs)]
    return found


def rows(
    problem: ConvProblem,
    corner: Sequence[int],
    phase: int,
    count: int,
    tap: int,
    width: int,
    from_x: bool,
) -> list[Copy]:
    """What fills (..., count, width) with the inputs of one tap of a filter's row, by ``fill``.

    The rows are every stride-th from the `phase`-th on that the box at `corner` reads. They come
    from x, (..., H, W), or from the block that ``reading`` fills.
    """
    (p, q), (down, along) = corner, problem.stride
    shift = tap * problem.dilation[1]
    if from_x:
        return _copies(
            problem, [(p * down + phase, count, down), (q * along + shift, width, along)]
        )
    last_row, last = phase + (count - 1) * down, shift + (width - 1) * along
    return [((...,), (..., slice(phase, last_row + 1, down), slice(shift, last + 1, along)))]


def fill(x: HostArray, copies: Sequence[Copy], target: HostArray) -> None:
    """Copy pieces of x, (..., spatial...), to their places in `target`, and zeros."""
    for place, source in copies:
        if source is None:
            target[place] = 0
        else:
            np.copyto(target[place], x[source], casting="unsafe")


def _copies(problem: ConvProblem, runs: Sequence[tuple[int, int, int]]) -> list[Copy]:
    """The copies that fill (..., spatial...) with some padded positions, (start, count, step)."""
    pieces = [
        _pieces(*axis, problem.padding_mode, *run)
        for *axis, run in zip(problem.input, problem.pad_lo, runs, strict=True)
    ]
    found: list[Copy] = []
    for axis, some in enumerate(pieces):
        around = [(slice(None),) * n for n in (axis, len(pieces) - axis - 1)]
        found += [((..., *around[0], p, *around[1]), None) for p, source in some if source is None]
    for combination in itertools.product(*([p for p in some if p[1]] for some in pieces)):
        places, sources = zip(*combination, strict=True)
        found.append(((..., *places), (..., *sources)))
    return found


@lru_cache(maxsize=4096)
def _pieces(
    extent: int, lo: int, mode: str, start: int, count: int, step: int
) -> list[tuple[slice, slice | None]]:
    """`count` padded positions from `start` on, cut where their source is not one slice of x.

    Each piece is (where in the block, which slice of x), the latter None for zeros.
    """
    index = sources(start - lo, count, step, extent, mode)
    pieces: list[tuple[slice, slice | None]] = []
    begin = 0
    while begin < count:
        end = begin + _run(index[begin:])
        first, last = int(index[begin]), int(index[end - 1])
        source = None
        if first >= 0:
            apart = (last - first) // max(end - begin - 1, 1)
            if apart >= 0:  # one element, repeated, where the positions are 0 apart
                source = slice(first, last + 1, max(apart, 1))
            else:
                source = slice(first, last - 1 if last else None, apart)
        pieces.append((slice(begin, end), source))
        begin = end
    return pieces


def _run(index: npt.NDArray[np.intp]) -> int:
    """How many elements from the first on are zeros, or are equally far apart."""
    if index[0] < 0:
        alike = index < 0
    else:
        apart = index[1] - index[0] if len(index) > 1 else 0
        alike = (index >= 0) & (index == index[0] + apart * np.arange(len(index)))
    return len(index) if alike.all() else int(np.argmin(alike))


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
