"""The layout in which every row of a filter meets its inputs as one matrix: S copies of x, not R*S.

Rows p*stride + r*dilation of one filter row r are every stride-th, and neighbours within the phase
that they fall in. So where x is laid out shifted along a row only,

    columns: (phase, G, S, C/G, rows of the phase, images, q)

what filter row r sees is one run of that layout for every (s, c), and BLAS reads it where it lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import tiling, windows
from gpuconv.problem import ConvProblem


def phases(problem: ConvProblem, p: int) -> list[tuple[int, int]]:
    """The phases of the rows that `p` output rows read, and how many rows of each."""
    stride = problem.stride[0]
    last: dict[int, int] = {}
    for r in range(problem.filter[0]):
        shift, phase = divmod(r * problem.dilation[0], stride)
        last[phase] = shift
    return [(phase, p + shift) for phase, shift in last.items()]


def positions(problem: ConvProblem, box: tiling.Box) -> int:
    """Positions laid out for one image, channel and tap of a row."""
    return sum(rows for _, rows in phases(problem, box[0])) * box[1]


class Box:
    """A box of outputs of one image: what does not change from image to image."""

    def __init__(
        self,
        problem: ConvProblem,
        corner: tiling.Box,
        extents: tiling.Box,
        start: int,
        from_x: bool,
    ) -> None:
        self.extents, self.start, self.pixels = extents, start, math.prod(extents)
        self.region = tiling.region(corner, extents)
        self.read = None if from_x else windows.reading(problem, corner, extents)
        self.copies: dict[int, list[list[windows.Copy]]] = {}  # of every phase and tap s
        for phase, rows in phases(problem, extents[0]):
            self.copies[phase] = [
                windows.rows(problem, corner, phase, rows, s, extents[1], from_x)
                for s in range(problem.filter[1])
            ]
        self.runs: list[tuple[windows.Copy, list[windows.Copy]]] | None = None
        if from_x and _in_runs(problem, extents):
            (_, rows), *_ = phases(problem, extents[0])
            self.runs = [_run(problem, corner[0], rows, s) for s in range(problem.filter[1])]


def _in_runs(problem: ConvProblem, extents: tiling.Box) -> bool:
    """Whether rows of x and of the layout are as long, so that many can be copied at once."""
    return (
        problem.stride == (1, 1)
        and problem.padding_mode == "zeros"
        and extents[1] == problem.output[1] == problem.input[1]
    )


def _run(
    problem: ConvProblem, top: int, rows: int, tap: int
) -> tuple[windows.Copy, list[windows.Copy]]:
    """One copy along memory from (..., H*W) to (..., rows*q), and the zeros around it."""
    width, lo = problem.input[1], problem.pad_lo[0]
    shift = tap * problem.dilation[1] - problem.pad_lo[1]
    first, last = (min(max(h - lo, 0), problem.input[0]) for h in (top, top + rows))
    above = min(max(lo - top, 0), rows)
    below = above + last - first
    zeros: list[windows.Copy] = [
        ((..., slice(*span), slice(None)), None)
        for span in ((0, above), (below, rows))
        if span[0] < span[1]
    ]
    edge = min(abs(shift), width)
    if edge:
        column = slice(0, edge) if shift < 0 else slice(width - edge, width)
        zeros.append(((..., slice(above, below), column), None))
    back, ahead = max(-shift, 0), max(shift, 0)
    count = max((last - first) * width - back - ahead, 0)
    to, source = above * width + back, first * width + ahead
    return ((..., slice(to, to + count)), (..., slice(source, source + count))), zeros


@lru_cache(maxsize=256)
def boxes(problem: ConvProblem, box: tiling.Box, from_x: bool) -> list[Box]:
    """Every box of the output. `from_x` where x's rows run along memory: else they are read into a
    block first."""
    return [Box(problem, *each, from_x) for each in tiling.boxes(problem.output, box)]


@dataclass(frozen=True)
class Columns:
    """The layout of one block, in scratch memory."""

    block: HostArray  # (images, groups, channels, h, w), the padded input
    columns: dict[int, HostArray]  # of each phase, (images, groups, s, channels, rows, q)
    flat: dict[int, HostArray]  # the same, (groups, s, channels, rows * images * q)
    matrices: list[HostArray]  # of each filter row, (groups, s * channels, p * images * q)

    def fill(self, x: HostArray, x_flat: HostArray | None, box: Box) -> None:
        """Lay out x, (images, groups, channels, H, W); `x_flat` is it with H*W as one axis."""
        if box.runs is not None and x_flat is not None and len(x) == 1:
            for s, ((place, source), zeros) in enumerate(box.runs):
                self.flat[0][:, s][place] = x_flat[0][source]
                windows.fill(x, zeros, self.columns[0][0, :, s])
            return
        if box.read is not None:
            windows.fill(x, box.read, self.block[: len(x)])
            x = self.block[: len(x)]
        for phase, copies in box.copies.items():
            for s, some in enumerate(copies):
                windows.fill(x, some, self.columns[phase][: len(x), :, s])


def make(
    problem: ConvProblem,
    box: tiling.Box,
    images: int,
    groups: int,
    channels: int,
    block: HostArray,
    memory: HostArray,
) -> Columns:
    """The layout of `images` boxes of some groups and some channels of each, within `memory`."""
    p, q = box
    s, row = problem.filter[1], images * q
    columns, flat, used = {}, {}, 0
    for phase, count in phases(problem, p):
        size = groups * s * channels * count * row
        run = memory[used : used + size]
        used += size
        flat[phase] = run.reshape(groups, s, channels, count * row)
        columns[phase] = run.reshape(groups, s, channels, count, images, q).transpose(
            4, 0, 1, 2, 3, 5
        )
    matrices = []
    for r in range(problem.filter[0]):
        shift, phase = divmod(r * problem.dilation[0], problem.stride[0])
        matrix = flat[phase].reshape(groups, s * channels, -1)
        matrices.append(matrix[:, :, shift * row : (shift + p) * row])
    extents = windows.extents(problem, box)
    read = block[: images * groups * channels * math.prod(extents)]
    return Columns(read.reshape(images, groups, channels, *extents), columns, flat, matrices)
