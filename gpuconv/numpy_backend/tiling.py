"""Cutting the output into boxes: the blocks of work of the algorithms on matrix products."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from gpuconv.arrays import HostArray
from gpuconv.problem import ConvProblem

Box = tuple[int, ...]


def cut(output: Box, pixels: int) -> Box:
    """The extents of boxes of at most `pixels` that are one run of the flattened output each."""
    box = list(output)
    for axis in range(len(box)):
        inner = math.prod(box[axis + 1 :])
        most = max(pixels // inner, 1)
        # Equal sizes: the last box would else be a splinter.
        box[axis] = math.ceil(box[axis] / math.ceil(box[axis] / most))
        if inner <= pixels:
            break
    return tuple(box)


def count(output: Box, box: Box) -> int:
    """How many boxes cover the output."""
    return math.prod(math.ceil(p / b) for p, b in zip(output, box, strict=True))


def boxes(output: Box, box: Box) -> Iterator[tuple[Box, Box, int]]:
    """Each box that covers the output: its corner, its extents, and where its run begins."""
    for corner in itertools.product(*(range(0, p, b) for p, b in zip(output, box, strict=True))):
        extents = tuple(min(b, p - c) for b, p, c in zip(box, output, corner, strict=True))
        start = 0
        for c, p in zip(corner, output, strict=True):
            start = start * p + c
        yield corner, extents, start


def region(corner: Box, extents: Box) -> tuple[Any, ...]:
    """The index of a box of outputs in an array whose last axes are the output's."""
    return (..., *(slice(c, c + n) for c, n in zip(corner, extents, strict=True)))


def flat(array: HostArray, ndim: int) -> HostArray | None:
    """`array` with its last `ndim` axes as one, or None where they are not one run of memory."""
    for axis in range(array.ndim - ndim, array.ndim - 1):
        if array.strides[axis] != array.strides[axis + 1] * array.shape[axis + 1]:
            return None
    return array.reshape(*array.shape[: array.ndim - ndim], -1)


def spans(extent: int, part: int) -> list[slice]:
    """The pieces of `part` that make up `extent`."""
    return [slice(a, min(a + part, extent)) for a in range(0, extent, part)]


def even(extent: int, most: int) -> int:
    """The size of equal parts of `extent`, at most `most` each."""
    return -(-extent // -(-extent // most))


def share(images: int, batch: int, threads: int) -> int:
    """How many of `batch` images, at most `images`, share a block: all threads end at once."""
    per_thread = math.ceil(batch / threads)
    return math.ceil(per_thread / math.ceil(per_thread / max(images, 1)))


def parts(problem: ConvProblem, box: Box, images: int, threads: int) -> int:
    """Into how many a block's output channels are cut, to occupy every thread."""
    blocks = math.ceil(problem.batch / images) * count(problem.output, box)
    if 2 * blocks > threads or problem.group_out_channels < 16 * threads:
        return 1
    return threads // max(blocks, 1)


_HANDOVER_SECONDS = 50e-6  # until a thread that waits for the interpreter's lock runs again


def speedup(blocks: int, threads: int, call_seconds: float = math.inf) -> float:
    """By how much `threads` shorten equal blocks: the last round may leave some of them idle.

    Threads take turns at Python between NumPy's calls: calls of `call_seconds` overlap only as far
    as they outlast a turn.
    """
    most = blocks / math.ceil(blocks / threads)
    if call_seconds == math.inf:
        return most
    return 1 + (most - 1) * call_seconds / (call_seconds + _HANDOVER_SECONDS)


def balance(output: Box, pixels: int, batch: int, threads: int, fewest: int) -> int:
    """`pixels` a block, fewer where a handful of blocks would keep the threads busy unevenly."""
    blocks = batch * count(output, cut(output, pixels))
    if blocks % threads == 0 or blocks > 4 * threads:
        return pixels
    rounds = math.ceil(blocks / threads)
    even = math.ceil(batch * math.prod(output) / (rounds * threads))
    row = math.prod(output[1:])
    if even > row:
        even = math.ceil(even / row) * row
    return even if even >= fewest else pixels
