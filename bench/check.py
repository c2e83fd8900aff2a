"""Is it right? A time counts only once its result has been compared with a float64 reference.

Small problems are compared whole. Of large ones a random subset of the outputs is computed exactly,
edges and corners among it, and the rest must agree with a contestant that passed: an output that
was never written, or a block that went wrong, shows there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bench.suites import Data, Row
from gpuconv import testing
from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import source_index

_WHOLE = 2_000_000  # products up to which the whole result is computed in float64
_SAMPLES = 192
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
        shape = self.row.problem.y_shape
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
        if not self.whole:
            self._compare_whole(y, 2 * float(bound.max()))
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

    @cached_property
    def _where(self) -> tuple[HostArray, ...]:
        """Which outputs are computed, as an index per axis of y."""
        shape = self.row.problem.y_shape
        if self.whole:
            return tuple(np.indices(shape).reshape(len(shape), -1))
        rng = np.random.default_rng(self.seed)
        index = np.stack([rng.integers(0, n, _SAMPLES) for n in shape])
        # A third of the samples near an edge of some axis, where padding and tails go wrong.
        for sample in range(_SAMPLES // 3):
            axis = sample % (len(shape) - 2) + 2
            near = int(rng.integers(0, min(4, shape[axis])))
            index[axis, sample] = near if sample % 2 else shape[axis] - 1 - near
        index[:, -1] = np.array(shape) - 1
        index[:, -2] = 0
        return tuple(index)

    @cached_property
    def _reference(self) -> tuple[HostArray, HostArray]:
        """The exact outputs at ``_where`` and their sums of magnitudes."""
        if self.whole:
            y_ref, magnitudes = testing.expected(self.row.problem, self.data.x, self.data.w)
            return y_ref[self._where], magnitudes[self._where]
        problem, x, w = self.row.problem, self.data.x, self.data.w
        sources = [
            source_index(n, lo, hi, problem.padding_mode)
            for n, lo, hi in zip(problem.input, problem.pad_lo, problem.pad_hi, strict=True)
        ]
        y_ref, magnitudes = np.zeros(_SAMPLES), np.zeros(_SAMPLES)
        for i, (n, k, *place) in enumerate(zip(*self._where, strict=True)):
            index = [
                source[p * s + d * np.arange(f)]
                for source, p, s, d, f in zip(
                    sources, place, problem.stride, problem.dilation, problem.filter, strict=True
                )
            ]
            group = int(k) // problem.group_out_channels
            channels = slice(
                group * problem.group_in_channels, (group + 1) * problem.group_in_channels
            )
            window = x[n, channels][(slice(None), *np.ix_(*index))].astype(np.float64)
            inside = [(axis >= 0).astype(np.float64) for axis in index]
            for axis, mask in enumerate(inside):
                window *= mask.reshape(-1, *[1] * (problem.ndim - 1 - axis))
            products = window * w[k].astype(np.float64)
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
