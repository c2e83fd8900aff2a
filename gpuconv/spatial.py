"""Arrays without N and C, of any number of axes, as problems of the core: under signal and ndimage.

Axes that are not filtered are batches. They stay where they are in memory (as axes under which the
filter has extent 1) as long as the core's three axes suffice; more than three filtered axes are
summed over the first axis' taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.dtypes import DType
from gpuconv.execute import Operands
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.plan import Plan, choose
from gpuconv.problem import LAYOUTS, ConvProblem, PaddingMode

_MOST_AXES = max(LAYOUTS)


@dataclass(frozen=True)
class Windows:
    """How a filter slides over an array: everything per axis of the array."""

    function: str
    operands: Operands
    dtype: DType  # of the result
    pads: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    flip: bool
    padding_mode: PaddingMode = "zeros"
    fill: Any = 0  # what "zeros" reads beyond the edge
    method: str = "auto"  # or "direct" (never by FFT), "fft" (where it serves)

    def run(self, a: Any, b: Any, axes: tuple[int, ...]) -> Any:
        """a under the filter b along `axes`; along the others they broadcast."""
        if not axes:
            return (a * b).astype(self.dtype.numpy)
        if self.fill and self.padding_mode == "zeros":
            return self._filled(a, b, axes)
        if len(axes) > _MOST_AXES:
            return self._tap_by_tap(a, b, axes)
        if all(b.shape[i] == 1 for i in range(b.ndim) if i not in axes):
            return self._one_filter(a, b, axes)
        return self._filter_each(a, b, axes)

    def _one_filter(self, a: Any, b: Any, axes: tuple[int, ...]) -> Any:
        """One filter for every batch: N images of one channel."""
        order = list(range(a.ndim))
        # Where three axes reach to the end nothing moves: those between are filtered by 1.
        spatial = order[min(axes) :] if a.ndim - min(axes) <= _MOST_AXES else list(axes)
        batch = [i for i in order if i not in spatial]
        x, w = (s.transpose(*batch, *spatial) for s in (a, b))
        x = x.reshape(-1 if a.size else 0, 1, *x.shape[len(batch) :])
        w = w.reshape(1, 1, *w.shape[len(batch) :])
        y = self._compute(x, w, spatial)
        y = y.reshape(*(a.shape[i] for i in batch), *y.shape[2:])
        return y.transpose(_inverse([*batch, *spatial]))

    def _filter_each(self, a: Any, b: Any, axes: tuple[int, ...]) -> Any:
        """A filter for every batch: one image of as many groups."""
        batch = [i for i in range(a.ndim) if i not in axes]
        extents = np.broadcast_shapes(*(tuple(s.shape[i] for i in batch) for s in (a, b)))
        x, w = (self._each(s.transpose(*batch, *axes), extents) for s in (a, b))
        y = self._compute(x[None], w[:, None], axes)
        y = y.reshape(*extents, *y.shape[2:])
        return y.transpose(_inverse([*batch, *axes]))

    def _each(self, array: Any, batch: tuple[int, ...]) -> Any:
        """The array once for every element of the batch, in one leading axis."""
        spatial = array.shape[len(batch) :]
        if array.shape[: len(batch)] != batch:
            full = self.operands.empty((*batch, *spatial), dtypes.of(array.dtype))
            full[...] = array
            array = full
        return array.reshape(math.prod(batch), *spatial)

    def _compute(self, x: Any, w: Any, axes: Any) -> Any:
        return self.operands.compute(self.plan(self.problem(x, w, axes)), x, w)

    def problem(self, x: Any, w: Any, axes: Any) -> ConvProblem:
        """Of x (N, C, spatial...) under w, whose spatial axes are `axes` of the caller's array."""
        x_dtype, w_dtype = dtypes.of(x.dtype), dtypes.of(w.dtype)
        return ConvProblem(
            input=x.shape[2:],
            filter=w.shape[2:],
            batch=x.shape[0],
            in_channels=x.shape[1],
            out_channels=w.shape[0],
            groups=x.shape[1],
            stride=tuple(self.stride[axis] for axis in axes),
            pad_lo=tuple(self.pads[axis][0] for axis in axes),
            pad_hi=tuple(self.pads[axis][1] for axis in axes),
            padding_mode=self.padding_mode,
            flip=self.flip,
            x_dtype=x_dtype,
            w_dtype=w_dtype,
            y_dtype=self.dtype,
            accumulator=dtypes.sum_type(x_dtype, w_dtype, self.dtype),
            layout=LAYOUTS[len(axes)][0],
        )

    def plan(self, problem: ConvProblem) -> Plan:
        """The cheapest algorithm that `method` allows."""
        where = self.operands.backend, self.operands.device
        plan = choose(self.function, problem, *where)
        if self.method == "fft":
            if any(c.algorithm == "fft" and c.cost is not None for c in plan.candidates):
                return choose(self.function, problem, *where, "fft")
        elif self.method == "direct" and plan.algorithm == "fft":
            allowed = (c.algorithm for c in plan.candidates if c.rejected is None)
            return choose(self.function, problem, *where, next(n for n in allowed if n != "fft"))
        return plan

    def _filled(self, a: Any, b: Any, axes: tuple[int, ...]) -> Any:
        """With the fill value written around a: no boundary mode of the core reads it."""
        fill = np.asarray(self.fill)
        # In the sum's type: a uint8 image may lie in a float's surroundings.
        dtype = dtypes.sum_type(dtypes.of(a.dtype), dtypes.of(b.dtype), self.dtype)
        if fill.dtype.kind == "c" and not dtype.is_complex:
            raise ValueError(
                f"{self.function}: could not cast `fillvalue` {self.fill!r} to the type of the "
                f"sum, {dtype}"
            )
        pads = [pair if i in axes else (0, 0) for i, pair in enumerate(self.pads)]
        extents = tuple(n + lo + hi for n, (lo, hi) in zip(a.shape, pads, strict=True))
        padded = self.operands.empty(extents, dtype)
        padded[...] = fill.astype(dtype.numpy)
        padded[tuple(slice(lo, lo + n) for n, (lo, _) in zip(a.shape, pads, strict=True))] = a
        inside = replace(self, fill=0, pads=((0, 0),) * a.ndim)
        return inside.run(padded, b, axes)

    def _tap_by_tap(self, a: Any, b: Any, axes: tuple[int, ...]) -> Any:
        """The first axis as a sum of windows along the others."""
        axis, rest = axes[0], axes[1:]
        (lo, hi), step, taps = self.pads[axis], self.stride[axis], b.shape[axis]
        source = source_index(a.shape[axis], lo, hi, self.padding_mode)
        outputs = (len(source) - taps) // step + 1
        total: Any = None
        for tap in range(taps):
            rows = source[tap : tap + (outputs - 1) * step + 1 : step]
            real = np.flatnonzero(rows >= 0)  # the others add a zero
            if not len(real):
                continue
            weight = taps - 1 - tap if self.flip else tap
            slab = a[_along(axis, self._indices(rows[real]))]
            part = self.run(slab, b[_along(axis, slice(weight, weight + 1))], rest)
            if total is None:
                extents = (*part.shape[:axis], outputs, *part.shape[axis + 1 :])
                total = self.operands.empty(extents, self.dtype)
                total[...] = 0
            total[_along(axis, slice(int(real[0]), int(real[-1]) + 1))] += part
        return total

    def _indices(self, rows: Any) -> Any:
        """Rows as a slice where they are evenly spaced: a view instead of a copy."""
        steps = np.diff(rows)
        if len(rows) == 1:
            return slice(int(rows[0]), int(rows[0]) + 1)
        if (steps == steps[0]).all() and steps[0] > 0:
            return slice(int(rows[0]), int(rows[-1]) + 1, int(steps[0]))
        return rows.tolist()


def _along(axis: int, index: Any) -> tuple[Any, ...]:
    return (slice(None),) * axis + (index,)


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
