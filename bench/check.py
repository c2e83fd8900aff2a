"""Is it right? A time counts only once its result has been compared with a float64 reference.

Small problems are compared whole. Of large ones a random subset of the outputs is computed exactly,
edges and corners among it, and the rest must agree with a contestant that passed: an output that
was never written, or a block that went wrong, shows there.

The error bound of a sum of a million products, as wgrad has, is as large as the sum of such random
data itself. So results must also be right to 1% on the whole, which no rounding of any type or
algorithm here comes near, and no wrong result either: an image left out of 32 makes 18%.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bench.suites import Data, Row
from gpuconv import testing
from gpuconv.arrays import HostArray
from gpuconv.problem import ConvProblem

_WHOLE = 2_000_000  # products up to which the whole result is computed in float64
_SAMPLES = 192
_SAMPLED = 30_000_000  # products of all samples together: fewer of them where sums are long
_OFF = 0.01  # the largest error allowed, root mean square over that of the results
_TF32_EPS = 2.0**-10  # 10 bits of fraction; two operands are rounded


class WrongError(AssertionError):
    """A result beyond the error bound."""


@dataclass
class Check:
    """The reference of one row, computed when first asked for."""

    row: Row
    data: Data
    seed: int = 0
    trusted: HostArray | None = None  # the first whole result that passed

    def __call__(self, y: HostArray, c: float = 1.0) -> float:
        """Raise WrongError unless y is right; else the largest error as a part of the bound."""
        shape = self.row.problem.result_shape
        if y.shape != shape:
            raise WrongError(f"shape {y.shape}, not {shape}")
        y_ref, magnitudes = self._reference
        got = np.asarray(y[self._where]).astype(np.float64)
        bound = self.bound(y_ref, magnitudes, c)
        with np.errstate(invalid="ignore"):
            error = np.abs(got - y_ref)
            wrong = ~(error <= bound)  # NaN is never within a bound
        if wrong.any():
            worst = int(np.argmax(np.where(wrong, np.nan_to_num(error, nan=np.inf), -1)))
            raise WrongError(
                f"{wrong.sum()} of {wrong.size} outputs checked are wrong: got "
                f"{got.flat[worst]:.7g}, expected {y_ref.flat[worst]:.7g}, "
                f"bound {bound.flat[worst]:.2g}"
            )
        off, size = (math.sqrt(float(np.mean(a**2))) for a in (error, y_ref))
        if off > _OFF * size:
            raise WrongError(f"off by {off:.2g} on the whole, where results are {size:.2g}")
        if not self.whole:
            self._compare_whole(y, min(2 * float(bound.max()), 10 * _OFF * size))
        return float((error / bound).max()) if error.size else 0.0

    def bound(self, y_ref: HostArray, magnitudes: HostArray, c: float) -> HostArray:
        """``testing.error_bound``, and what rounding the operands to TF32 adds where allowed."""
        bound = testing.error_bound(self.row.problem, y_ref, magnitudes, c=c)
        if self.row.precision == "tf32":
            bound = bound + 2 * _TF32_EPS * magnitudes
        return bound

    @property
    def whole(self) -> bool:
        """Whether every output is computed."""
        return self.row.flops <= 2 * _WHOLE

    @property
    def _samples(self) -> int:
        most = _SAMPLED // max(self.row.problem.reduction, 1)
        return max(_SAMPLES // 8, min(_SAMPLES, most))

    @cached_property
    def _where(self) -> tuple[HostArray, ...]:
        """Which outputs are computed, as an index per axis of the result."""
        shape = self.row.problem.result_shape
        if self.whole:
            return tuple(np.indices(shape).reshape(len(shape), -1))
        rng = np.random.default_rng(self.seed)
        index = np.stack([rng.integers(0, n, self._samples) for n in shape])
        # A third of the samples near an edge of some axis, where padding and tails go wrong.
        for sample in range(self._samples // 3):
            axis = sample % (len(shape) - 2) + 2
            near = int(rng.integers(0, min(4, shape[axis])))
            index[axis, sample] = near if sample % 2 else shape[axis] - 1 - near
        index[:, -1] = np.array(shape) - 1
        index[:, -2] = 0
        return tuple(index)

    @cached_property
    def _reference(self) -> tuple[HostArray, HostArray]:
        """The exact outputs at ``_where`` and their sums of magnitudes."""
        problem, x, w = self.row.problem, self.data.x, self.data.w
        if self.whole:
            y_ref, magnitudes = testing.expected(problem, x, w)
            return y_ref[self._where], magnitudes[self._where]
        operands = {"fprop": _of_output, "dgrad": _of_input, "wgrad": _of_weight}
        y_ref, magnitudes = np.zeros(self._samples), np.zeros(self._samples)
        for i, at in enumerate(zip(*self._where, strict=True)):
            a, b = operands[problem.operation](problem, x, w, *map(int, at))
            products = a.astype(np.float64) * b.astype(np.float64)
            y_ref[i], magnitudes[i] = products.sum(), np.abs(products).sum()
        return y_ref, magnitudes

    def _compare_whole(self, y: HostArray, tolerance: float) -> None:
        """Compare all of y with the first result that passed, piece by piece."""
        if self.trusted is None:
            if not all(np.isfinite(image).all() for image in y):
                raise WrongError("not every output is finite")
            self.trusted = y
            return
        eps = 2 * self.row.problem.result_dtype.eps
        step = max(1, (1 << 22) // max(math.prod(y.shape[1:]), 1))
        for start in range(0, y.shape[0], step):
            mine = y[start : start + step].astype(np.float32)
            other = self.trusted[start : start + step].astype(np.float32)
            with np.errstate(invalid="ignore"):
                near = np.abs(mine - other) <= tolerance + eps * np.abs(other)
            if not near.all():
                at = np.unravel_index(int(np.argmin(near)), near.shape)
                raise WrongError(
                    f"{near.size - near.sum()} outputs differ from another contestant's: "
                    f"at {(start + int(at[0]), *map(int, at[1:]))} got {mine[at]:.7g}, "
                    f"not {other[at]:.7g}"
                )


# What is multiplied, pair by pair, and summed into one element of the result. Zeros lie beyond the
# edge, so pairs that would read there are left out.

Pairs = tuple[HostArray, HostArray]


def _of_output(problem: ConvProblem, x: HostArray, w: HostArray, n: int, k: int, *p: int) -> Pairs:
    taps, places = _inside(
        p, lambda p, r, s, d, lo: s * p + d * r - lo, problem.filter, problem.input, problem
    )
    group, count = k // problem.group_out_channels, problem.group_in_channels
    inputs = slice(group * count, (group + 1) * count)
    return x[n, inputs][_all_and(places)], w[k][_all_and(taps)]


def _of_input(problem: ConvProblem, dy: HostArray, w: HostArray, n: int, c: int, *i: int) -> Pairs:
    def place(i: int, r: HostArray, s: int, d: int, lo: int) -> HostArray:
        p, rest = np.divmod(i + lo - d * r, s)
        return np.where(rest == 0, p, -1)

    taps, places = _inside(i, place, problem.filter, problem.output, problem)
    (group, channel), count = divmod(c, problem.group_in_channels), problem.group_out_channels
    outputs = slice(group * count, (group + 1) * count)
    return dy[n, outputs][_all_and(places)], w[outputs, channel][_all_and(taps)]


def _of_weight(problem: ConvProblem, x: HostArray, dy: HostArray, k: int, c: int, *r: int) -> Pairs:
    outputs, places = _inside(
        r, lambda r, p, s, d, lo: s * p + d * r - lo, problem.output, problem.input, problem
    )
    channel = k // problem.group_out_channels * problem.group_in_channels + c
    of_x: tuple[Any, ...] = (slice(None), channel, *map(_run, places, problem.stride))
    of_dy: tuple[Any, ...] = (slice(None), k, *map(_run, outputs))
    return x[of_x], dy[of_dy]


def _all_and(indices: list[HostArray]) -> tuple[Any, ...]:
    """All channels, and these places along each axis."""
    return (slice(None), *np.ix_(*indices))


def _run(places: HostArray, step: int = 1) -> slice:
    """Evenly spaced places as a slice, which unlike np.ix_ copies nothing of a whole batch."""
    return slice(int(places[0]), int(places[-1]) + 1, step) if places.size else slice(0)


def _inside(
    at: tuple[int, ...],
    place: Callable[[int, HostArray, int, int, int], HostArray],
    counts: tuple[int, ...],
    extents: tuple[int, ...],
    problem: ConvProblem,
) -> tuple[list[HostArray], list[HostArray]]:
    """Along each axis: which of `counts` meet the element `at`, and the places that they read."""
    steps, places = [], []
    for a, count, extent, s, d, lo in zip(
        at, counts, extents, problem.stride, problem.dilation, problem.pad_lo, strict=True
    ):
        step = np.arange(count)
        read = place(a, step, s, d, lo)
        inside = (read >= 0) & (read < extent)
        steps.append(step[inside])
        places.append(read[inside])
    return steps, places
