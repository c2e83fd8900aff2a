"""The sum as it is written, for any problem: the algorithm that needs no workspace.

The output is computed in chunks whose temporaries stay under 64 KiB: one image, one output channel,
a few positions along the last axis at a time, adding one product per filter tap and input channel.
The gradients go the same way: dgrad adds each product to the elements of dx that the window reads,
wgrad sums the products of one tap over all images and positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import sources
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("fprop", "dgrad", "wgrad")

_CHUNK = 1024  # positions at a time: three temporaries of at most 16 bytes an element


def supports(problem: ConvProblem, device: Cpu) -> bool:
    return True


def cost(problem: ConvProblem, device: Cpu) -> float:
    """Five NumPy calls per chunk, tap and channel, and each product a few nanoseconds."""
    rows = math.prod(problem.y_shape[:-1]) * math.ceil(problem.output[-1] / _CHUNK)
    calls = rows * problem.group_in_channels * math.prod(problem.filter) * 5
    return calls * device.call_seconds + problem.flops * 1e-9


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return 0


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem = plan.problem
    if problem.operation == "dgrad":
        _input_gradient(problem, x, w, bias, out)
    elif problem.operation == "wgrad":
        _weight_gradient(problem, x, w, out)
    else:
        _forward(problem, x, w, bias, out)


def _forward(
    problem: ConvProblem, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray
) -> None:
    wide = problem.accumulator.numpy
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    channels, last = range(problem.group_in_channels), problem.ndim - 1
    taps = list(itertools.product(*map(range, problem.filter)))
    for n, k, *outer in np.ndindex(x.shape[0], *problem.y_shape[1:-1]):
        first = k // problem.group_out_channels * problem.group_in_channels
        for q0 in range(0, problem.output[-1], _CHUNK):
            count = min(_CHUNK, problem.output[-1] - q0)
            total = np.zeros(count, wide)
            if bias is not None:
                total += bias[k].astype(wide)
            for tap in taps:
                rows = _window(problem, outer, tap[:-1])
                columns = _columns(problem, last, tap[-1], q0, count)
                inside = (columns >= 0) & (-1 not in rows)
                for c in channels:
                    row = x[(n, first + c, *rows)]
                    values = row[columns].astype(wide) if inside.any() else np.zeros(count, wide)
                    values[~inside] = 0  # a pad's zero, whatever the element -1 read
                    total += values * w[(k, c, *tap)].astype(wide)
            out[(n, k, *outer, slice(q0, q0 + count))] = total


def _input_gradient(
    problem: ConvProblem, grad: HostArray, w: HostArray, bias: HostArray | None, out: HostArray
) -> None:
    wide = problem.accumulator.numpy
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    count = problem.output[-1]
    last_taps, outer_taps = range(problem.filter[-1]), problem.filter[:-1]
    outer_axes = range(problem.ndim - 1)
    for begin in range(0, problem.input[-1], _CHUNK):
        end = min(begin + _CHUNK, problem.input[-1])
        # The positions of dy, a chunk at a time, that meet this piece of dx in each tap.
        hits = []
        for s in last_taps:
            for q0 in range(0, count, _CHUNK):
                columns = _columns(problem, problem.ndim - 1, s, q0, min(_CHUNK, count - q0))
                met = np.flatnonzero((columns >= begin) & (columns < end))
                if len(met):
                    hits.append((s, met + q0, columns[met] - begin))
        for n, c, *outer in np.ndindex(grad.shape[0], *problem.x_shape[1:-1]):
            group, channel = divmod(c, problem.group_in_channels)
            total = np.zeros(end - begin, wide)
            if bias is not None:
                total += bias[c].astype(wide)
            for tap in np.ndindex(outer_taps):
                rows = [_readers(problem, a, tap[a], outer[a]) for a in outer_axes]
                for row in itertools.product(*rows):
                    for k in range(problem.group_out_channels):
                        k += group * problem.group_out_channels
                        for s, positions, home in hits:
                            weight = w[(k, channel, *tap, s)].astype(wide)
                            if problem.conjugate:
                                weight = weight.conj()
                            values = grad[(n, k, *row)][positions].astype(wide) * weight
                            if problem.padding_mode == "zeros":
                                total[home] += values
                            else:  # one element may be read in several places
                                np.add.at(total, home, values)
            out[(n, c, *outer, slice(begin, end))] = total


def _weight_gradient(problem: ConvProblem, x: HostArray, grad: HostArray, out: HostArray) -> None:
    wide = problem.accumulator.numpy
    if problem.flip:
        out = np.flip(out, tuple(range(2, out.ndim)))
    for k, channel, *tap in np.ndindex(*problem.w_shape):
        c = k // problem.group_out_channels * problem.group_in_channels + channel
        total = np.zeros((), wide)
        for n, *outer in np.ndindex(x.shape[0], *problem.output[:-1]):
            rows = _window(problem, outer, tap[:-1])
            for q0 in range(0, problem.output[-1], _CHUNK):
                count = min(_CHUNK, problem.output[-1] - q0)
                columns = _columns(problem, problem.ndim - 1, tap[-1], q0, count)
                inside = (columns >= 0) & (-1 not in rows)
                values = np.zeros(count, wide)
                if inside.any():
                    values[...] = x[(n, c, *rows)][columns]
                    values[~inside] = 0
                if problem.conjugate:
                    values = values.conj()
                values *= grad[(n, k, *outer, slice(q0, q0 + count))].astype(wide)
                total += values.sum()
        out[(k, channel, *tap)] = total


@lru_cache(maxsize=64)
def _rows(problem: ConvProblem, axis: int, place: int) -> tuple[int, ...]:
    """Which rows of x the window at `place` reads along `axis`, tap by tap; -1 is a pad's zero."""
    start = place * problem.stride[axis] - problem.pad_lo[axis]
    step, count = problem.dilation[axis], problem.filter[axis]
    return tuple(sources(start, count, step, problem.input[axis], problem.padding_mode).tolist())


def _window(problem: ConvProblem, places: Sequence[int], tap: Sequence[int]) -> list[int]:
    """Where a tap of the window at `places` reads x, along all axes but the last."""
    return [_rows(problem, a, p)[r] for a, (p, r) in enumerate(zip(places, tap, strict=True))]


@lru_cache(maxsize=8)
def _columns(
    problem: ConvProblem, axis: int, tap: int, first: int, count: int
) -> npt.NDArray[np.intp]:
    """Where `tap` of `count` windows, from the one at `first` on, reads x along `axis`."""
    step = problem.stride[axis]
    start = first * step + tap * problem.dilation[axis] - problem.pad_lo[axis]
    return sources(start, count, step, problem.input[axis], problem.padding_mode)


def _readers(problem: ConvProblem, axis: int, tap: int, row: int) -> list[int]:
    """The windows along `axis` whose `tap` reads the row `row` of x."""
    found = []
    for first in range(0, problem.output[axis], _CHUNK):
        count = min(_CHUNK, problem.output[axis] - first)
        met = np.flatnonzero(_columns(problem, axis, tap, first, count) == row)
        found += (met + first).tolist()
    return found
