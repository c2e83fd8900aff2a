"""Filters of rank 1, w[r, s] = u[r] v[s]: one pass along the rows, one along the columns.

Both passes are products with small banded matrices, as in ``filter2d``, whose blocks and scratch
memory they share; neither needs strips, as windows of one axis do not overlap in the other:

    mid[row, B*j + b] = sum over l of  x[row, B*stride*j + l] * across[l, b]
    y[B*i + b, q]     = sum over l of  down[b, l] * mid[B*stride*i + l, q]

R + S products per output instead of R*S (about 2*B more in practice). Where outputs are neighbours,
and so is what they read, ``two_passes`` does the same without a copy of x.

Nobody has to ask for it: ``filter2d``, ``depthwise`` and ``fft`` look at w when they run, and take
this way where all filters have rank 1. Asked for by name, it refuses filters of a higher rank.

Factors are exact for integers. For floats every weight must equal its factors' product within
``4 eps`` of the accumulator (what the rounding of an outer product, normalised or not, leaves), so

    |y - y_ref| <= (4 + growth) eps sum |x||w|

with the growth of two sums of R and S terms, which is less than that of one of R*S terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.device import Cpu
from gpuconv.numpy_backend.planes import Scratch
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

if TYPE_CHECKING:
    from gpuconv.numpy_backend.filter2d import Tiling

_SMALL = 1 << 15  # bytes of filters that are worth remembering
_GROUP = 8  # output rows of one product of the second pass


@dataclass(frozen=True)
class Factors:
    """u (C, multiplier, R) and v (C, multiplier, S), in the order of a correlation."""

    u: HostArray
    v: HostArray


def possible(problem: ConvProblem) -> bool:
    """Whether filters of this shape and type are looked at."""
    return (
        problem.ndim == 2
        and problem.depthwise
        and min(problem.filter) > 1
        and not problem.accumulator.is_complex
    )


def factors(problem: ConvProblem, w: HostArray) -> Factors | None:
    """The factors of all of w's filters, or None where one of them has none.

    They are read-only: those of small filters are kept for later calls.
    """
    if not possible(problem) or w.size == 0:
        return None
    if w.nbytes <= _SMALL:
        return _remembered(problem, w.tobytes(), w.dtype, w.shape)
    return _factors(problem, w)


@lru_cache(maxsize=64)
def _remembered(
    problem: ConvProblem, memory: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Factors | None:
    return _factors(problem, np.frombuffer(memory, dtype).reshape(shape))


def _factors(problem: ConvProblem, w: HostArray) -> Factors | None:
    w = w[:, 0]
    check = _integer if problem.accumulator.is_exact else _floating
    some = max(2048 // math.prod(problem.filter), 1)  # few at a time: this takes no workspace
    parts = []
    for start in range(0, len(w), some):
        part = w[start : start + some]
        # Most filters show their rank in one minor, the corners.
        a, b, c, d = (float(part[0, r, s]) for r in (0, -1) for s in (0, -1))
        if not abs(a * d - b * c) <= 2**-6 * (abs(a * d) + abs(b * c)):
            return None
        found = check(problem, part)
        if found is None:
            return None
        parts.append(found)
    u, v = (np.concatenate(halves) for halves in zip(*parts, strict=True))
    if problem.flip:
        u, v = u[:, ::-1], v[:, ::-1]
    shape = problem.in_channels, problem.group_out_channels, -1
    return Factors(u.reshape(shape), v.reshape(shape))


def _pivots(w: HostArray) -> tuple[HostArray, HostArray, HostArray, HostArray]:
    """Each filter's largest element, its column and its row."""
    each = np.arange(len(w))
    at = np.abs(w).reshape(len(w), -1).argmax(axis=1)
    r, s = np.divmod(at, w.shape[2])
    return each, w[each, r, s], w[each, :, s], w[each, r, :]


def _floating(problem: ConvProblem, w: HostArray) -> tuple[HostArray, HostArray] | None:
    wide = w.astype(np.float64)
    if not np.isfinite(wide).all():
        return None
    _, pivot, u, v = _pivots(wide)
    pivot = np.where(pivot == 0, 1, pivot)
    v = v / pivot[:, None]
    off = np.abs(wide - u[:, :, None] * v[:, None, :])
    eps = problem.accumulator.eps
    tiny = float(np.finfo(problem.accumulator.numpy).tiny)
    # Below the normal numbers rounding is absolute; filters made of such are none of ours.
    if not (np.abs(pivot) * eps > tiny).all() or (off > 4 * eps * np.abs(wide) + tiny).any():
        return None
    # Products with subnormal factors take a hundred times as long, and add nothing.
    u[np.abs(u) < tiny] = 0
    v[np.abs(v) < tiny] = 0
    return u, v


def _integer(problem: ConvProblem, w: HostArray) -> tuple[HostArray, HostArray] | None:
    if w.dtype.itemsize == 8 and w.dtype.kind == "u" and int(w.max()) > 1 << 62:
        return None
    w = w.astype(np.int64)
    if int(w.max()) > 1 << 30 or int(w.min()) < -(1 << 30):  # the products below must not wrap
        return None
    each, _, u, v = _pivots(w)
    # A primitive column divides every other, so the row's factors are integers too.
    common = np.maximum(np.gcd.reduce(u, axis=1), 1)
    u = u // common[:, None]
    at = np.abs(u).argmax(axis=1)
    lead = u[each, at]
    v = w[each, at, :] // np.where(lead == 0, 1, lead)[:, None]
    return (u, v) if np.array_equal(u[:, :, None] * v[:, None, :], w) else None


def padded_rows(rows: int) -> int:
    """Output rows that are computed: groups of equal size."""
    groups = -(-rows // _GROUP)
    return groups * -(-rows // groups)


def bands_size(tiling: Tiling) -> int:
    """Elements of the two bands."""
    group = min(tiling.rows, _GROUP)
    each = tiling.strip_reads * tiling.strip + group * tiling.axes[1].reads(group)
    return tiling.channels * tiling.multiplier * each + 32


class Passes:
    """The bands of some channels, and the two passes over a block."""

    def __init__(
        self,
        tiling: Tiling,
        factors: Factors,
        channels: slice,
        scratch: Scratch,
        dtype: np.dtype[Any],
    ) -> None:
        self._tiling = tiling
        _, h, w = tiling.axes
        u, v = factors.u[channels], factors.v[channels]
        self._across = band(v, w.stride, tiling.strip, scratch, dtype)
        self._u, self._stride = u, h.stride
        group = min(tiling.rows, _GROUP)
        memory = scratch.take((*u.shape[:2], group, h.reads(group)), dtype)
        self._memory, self._down = memory.reshape(-1), memory[:, :, :0]

    def _group(self, rows: int) -> HostArray:
        """The band of groups of `rows` output rows."""
        if self._down.shape[2] != rows:
            shape = (*self._u.shape[:2], rows, (rows - 1) * self._stride + self._u.shape[2])
            self._down = self._memory[: math.prod(shape)].reshape(shape)
            self._down.fill(0)
            for b in range(rows):
                start = b * self._stride
                self._down[:, :, b, start : start + self._u.shape[2]] = self._u
        return self._down

    def compute(self, block: HostArray, target: HostArray, scratch: Scratch) -> None:
        """block (images, channels, 1, rows, columns) to target (..., multiplier, rows, columns)."""
        t = self._tiling
        _, h, w = t.axes
        images, channels, multiplier, rows, width = target.shape
        count = width // t.strip
        read = h.reads(rows)
        mid = scratch.take((images, channels, multiplier, read, width), target.dtype)
        n_, c_, _, h_, w_ = block.strides
        windows: HostArray = np.ndarray(
            (images, channels, 1, count, read, t.strip_reads),
            block.dtype,
            block,
            0,
            (n_, c_, 0, t.strip * w.stride * w_, h_, w_),
        )
        split = mid.reshape(images, channels, multiplier, read, count, t.strip).swapaxes(3, 4)
        np.matmul(windows, self._across[:, :, None], out=split)
        groups = -(-rows // _GROUP)
        group = rows // groups
        down = self._group(group)
        n_, c_, m_, h_, w_ = mid.strides
        below: HostArray = np.ndarray(
            (images, channels, multiplier, groups, h.reads(group), width),
            mid.dtype,
            mid,
            0,
            (n_, c_, m_, group * h.stride * h_, h_, w_),
        )
        grouped = target.reshape(images, channels, multiplier, groups, group, width)
        np.matmul(down[:, :, None], below, out=grouped)


def band(
    v: HostArray, stride: int, outputs: int, scratch: Scratch, dtype: np.dtype[Any]
) -> HostArray:
    """(..., L, outputs): the filter from row stride * b on in column b."""
    taps = v.shape[2]
    result = scratch.take((*v.shape[:2], (outputs - 1) * stride + taps, outputs), dtype)
    result.fill(0)
    for b in range(outputs):
        result[:, :, b * stride : b * stride + taps, b] = v
    return result


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    from gpuconv.numpy_backend import filter2d

    verdict = filter2d.supports(problem, device)
    if verdict and not possible(problem):
        return No("a separable filter is real and has two axes of at least 2 elements")
    return verdict


def only_by_name(problem: ConvProblem) -> str | None:
    return "whether w has rank 1 shows only when it runs: the others then take this way themselves"


def work(tiling: Tiling, rows: int, columns: int) -> tuple[float, float]:
    """Operations of the two passes over one plane's block, and bytes they write."""
    h = tiling.axes[1]
    group = min(tiling.rows, _GROUP)
    middle = h.reads(rows) * columns * tiling.multiplier
    outputs = rows * columns * tiling.multiplier
    flops = 2 * (middle * tiling.strip_reads + outputs * h.reads(group))
    return flops, (middle + outputs) * tiling.itemsize


def cost(problem: ConvProblem, device: Cpu) -> float:
    from gpuconv.numpy_backend import filter2d, two_passes

    if two_passes.serves(problem, device):
        return two_passes.cost(problem, device)
    return filter2d.predicted(problem, device, filter2d.tilings(problem, device, passes=True))


def workspace(problem: ConvProblem, device: Cpu) -> int:
    from gpuconv.numpy_backend import filter2d

    return filter2d.workspace(problem, device)


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    from gpuconv.numpy_backend import filter2d

    found = factors(plan.problem, w)
    if found is None:
        raise ValueError(
            "algorithm='separable' takes filters that are outer products of a column and a row; "
            "w has a filter of higher rank. 'filter2d' serves any filter"
        )
    filter2d.apply(plan, x, w, bias, out, found)
