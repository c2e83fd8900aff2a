"""Arrays without N and C, of any number of axes, as problems of the core.

Axes that are not filtered are batches. They stay where they are in memory: those before the
filtered ones are N, neighbours among the others one axis under which the filter has extent 1. Only
where more than the core's three axes are left are they brought to the front. More than three
filtered axes are summed over the first axis' taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, dtypes
from gpuconv.arrays import HostArray
from gpuconv.dtypes import DType
from gpuconv.execute import Operands
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.plan import Plan, choose
from gpuconv.problem import LAYOUTS, ConvProblem, PaddingMode

Shape = tuple[int, ...]
_MOST_AXES = max(LAYOUTS)
# They can cut their sums off to integers.
_CUTTING = ("depthwise", "column_sums", "filter2d", "small_plane")


def array_like(x: Any) -> Any:
    """x itself where it is an array of any library (masked ones are for others to refuse)."""
    if arrays.maybe_library(x) is not None or isinstance(x, np.ma.MaskedArray):
        return x
    return np.asarray(x)


@dataclass(frozen=True)
class Windows:
    """How a filter slides over an array: everything per axis of the array, nothing of its data."""

    function: str
    dtype: DType  # of the result
    pads: tuple[tuple[int, int], ...]
    stride: Shape
    flip: bool
    padding_mode: PaddingMode = "zeros"
    method: str = "auto"  # or "direct" (never by FFT), "fft" (where it serves)
    separable: bool = False  # the filter is known to be a product of two 1-D ones

    def run(self, operands: Operands, a: Any, b: Any, axes: Shape, fill: Any = 0) -> Any:
        """a under the filter b along `axes`; along the others they broadcast.

        Both are the backend's arrays, and so is the result. "zeros" reads `fill` beyond the edge.
        """
        step = self.step(operands, a, b, axes, fill)
        if step is not None:
            return step.run(operands, a, b)
        if not axes:
            return (a * b).astype(self.dtype.numpy)
        if self._reads(fill):
            return self._filled(operands, a, b, axes, fill)
        if len(axes) > _MOST_AXES:
            return self._tap_by_tap(operands, a, b, axes)
        batch = [i for i in range(a.ndim) if i not in axes]
        extents = np.broadcast_shapes(*(tuple(s.shape[i] for i in batch) for s in (a, b)))
        a, b = (_broadcast(operands, array, batch, extents) for array in (a, b))
        return self._step(operands, a, b, axes).run(operands, a, b)

    def step(self, operands: Operands, a: Any, b: Any, axes: Shape, fill: Any = 0) -> Step | None:
        """The one step that `run` takes; None where it does more than that, or less."""
        if not 0 < len(axes) <= _MOST_AXES or self._reads(fill):
            return None
        if any(n != 1 for i, n in enumerate(b.shape) if i not in axes):
            return None
        return self._step(operands, a, b, axes)

    def _reads(self, fill: Any) -> bool:
        """Whether windows reach beyond the edge to a `fill` that is not zero."""
        return bool(fill and self.padding_mode == "zeros" and any(map(any, self.pads)))

    def plan(self, operands: Operands, a: Any, b: Any, axes: Shape) -> Plan:
        """What `run` would do, for at most three axes and no batches."""
        return self._step(operands, a, b, axes).plan

    def _step(self, operands: Operands, a: Any, b: Any, axes: Shape) -> Step:
        types = dtypes.of(a.dtype), dtypes.of(b.dtype)
        return _step(self, a.shape, b.shape, *types, axes, operands.backend, operands.device)

    def _filled(self, operands: Operands, a: Any, b: Any, axes: Shape, fill: Any) -> Any:
        """With `fill` written around a: no boundary mode of the core reads it."""
        # In the sum's type: a uint8 image may lie in a float's surroundings.
        dtype = dtypes.sum_type(dtypes.of(a.dtype), dtypes.of(b.dtype), self.dtype)
        pads = [pair if i in axes else (0, 0) for i, pair in enumerate(self.pads)]
        extents = tuple(n + lo + hi for n, (lo, hi) in zip(a.shape, pads, strict=True))
        padded = operands.empty(extents, dtype)
        padded[...] = np.asarray(fill).astype(dtype.numpy)
        padded[tuple(slice(lo, lo + n) for n, (lo, _) in zip(a.shape, pads, strict=True))] = a
        inside = Windows(
            self.function, self.dtype, ((0, 0),) * a.ndim, self.stride, self.flip,
            method=self.method, separable=self.separable,
        )  # fmt: skip
        return inside.run(operands, padded, b, axes)

    def _tap_by_tap(self, operands: Operands, a: Any, b: Any, axes: Shape) -> Any:
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
            slab = a[_along(axis, _as_slice(rows[real]))]
            part = self.run(operands, slab, b[_along(axis, slice(weight, weight + 1))], rest)
            if total is None:
                extents = (*part.shape[:axis], outputs, *part.shape[axis + 1 :])
                total = operands.empty(extents, self.dtype)
                total[...] = 0
            total[_along(axis, slice(int(real[0]), int(real[-1]) + 1))] += part
        return total


@dataclass(frozen=True)
class Step:
    """A plan of the core, and the way of an array's axes into it and back."""

    plan: Plan
    order: Shape | None  # of the axes, where they do not stay in place
    x_shape: Shape
    w_shape: Shape
    y_shape: Shape
    back: Shape | None

    def run(self, operands: Operands, a: Any, b: Any) -> Any:
        if self.order is not None:
            a, b = a.transpose(self.order), b.transpose(self.order)
        y = operands.compute(self.plan, a.reshape(self.x_shape), b.reshape(self.w_shape))
        y = y.reshape(self.y_shape)
        return y if self.back is None else y.transpose(self.back)

    def again(self, a: HostArray, b: HostArray, out: HostArray | None = None) -> HostArray:
        """`run` of the NumPy backend for arrays as in a call before, which checked them.

        The result goes to `out`, C-contiguous and no operand's memory, where that is given.
        """
        plan = self.plan
        if self.order is not None:
            a, b = a.transpose(self.order), b.transpose(self.order)
        shape, dtype = self._result
        y: HostArray = np.empty(shape, dtype) if out is None else out.reshape(shape)
        plan.implementation.run(plan, a.reshape(self.x_shape), b.reshape(self.w_shape), None, y)
        if out is not None:
            return out
        y = y.reshape(self.y_shape)
        return y if self.back is None else y.transpose(self.back)

    @cached_property
    def _result(self) -> tuple[Shape, np.dtype[Any]]:
        problem = self.plan.problem
        return problem.result_shape, problem.result_dtype.numpy


@lru_cache(maxsize=4096)
def _step(
    windows: Windows, a_shape: Shape, b_shape: Shape, a_dtype: DType, b_dtype: DType, axes: Shape,
    backend: str, device: Any,
) -> Step:  # fmt: skip
    """The step of such windows; batches of b are either of extent 1 or those of a."""
    ndim = len(a_shape)
    batch = tuple(i for i in range(ndim) if i not in axes)
    filters = math.prod(b_shape[i] for i in batch)
    lead, runs = tuple(range(axes[0])), _runs(axes, ndim)
    order = None
    if len(runs) > _MOST_AXES or filters > 1:
        order, lead, runs = (*batch, *axes), batch, [(axis,) for axis in axes]
    elif len(runs) == 1 and lead:  # filter rows of an image, not one-row images
        lead, runs = (), [lead, *runs]
    extents = tuple(math.prod(a_shape[i] for i in run) for run in runs)
    filter_extents = tuple(math.prod(b_shape[i] for i in run) for run in runs)
    images = math.prod(a_shape[i] for i in lead)
    groups = images if filters > 1 else 1

    def each(values: tuple[Any, ...], merged: Any) -> tuple[Any, ...]:
        """Per run: the value of its axis where that is filtered."""
        return tuple(values[run[0]] if run[0] in axes else merged for run in runs)

    pads = each(windows.pads, (0, 0))
    problem = ConvProblem(
        input=extents,
        filter=filter_extents,
        batch=images // groups if images else 0,
        in_channels=groups,
        out_channels=groups,
        groups=groups,
        stride=each(windows.stride, 1),
        pad_lo=tuple(lo for lo, _ in pads),
        pad_hi=tuple(hi for _, hi in pads),
        padding_mode=windows.padding_mode,
        flip=windows.flip,
        x_dtype=a_dtype,
        w_dtype=b_dtype,
        y_dtype=windows.dtype,
        accumulator=dtypes.sum_type(a_dtype, b_dtype, windows.dtype),
        layout=LAYOUTS[len(runs)][0],
    )
    outputs: list[int] = [a_shape[i] for i in lead]
    for run, output in zip(runs, problem.output, strict=True):
        outputs += [output] if run[0] in axes else [a_shape[i] for i in run]
    return Step(
        _plan(windows, problem, backend, device),
        order,
        problem.x_shape,
        problem.w_shape,
        tuple(outputs),
        None if order is None else tuple(order.index(i) for i in range(ndim)),
    )


def _runs(axes: Shape, ndim: int) -> list[Shape]:
    """The axes from the first filtered one on: each alone, neighbours between them together."""
    runs: list[Shape] = []
    for axis in range(axes[0], ndim):
        if axis in axes or runs[-1][-1] in axes:
            runs.append((axis,))
        else:
            runs[-1] += (axis,)
    return runs


def _cuts(problem: ConvProblem) -> bool:
    """Whether sums in floating point are cut off to integers: the NumPy backend's business."""
    return problem.y_dtype.is_exact and not problem.accumulator.is_exact


def _plan(windows: Windows, problem: ConvProblem, backend: str, device: Any) -> Plan:
    """The cheapest algorithm that the windows' method allows."""
    function, method = windows.function, windows.method
    plan = choose(function, problem, backend, device)
    if backend == "numpy" and (windows.separable or _cuts(problem)):
        names = [*(_CUTTING if _cuts(problem) else [plan.algorithm])]
        names += ["separable"] * windows.separable
        costs = [(c.cost, c.algorithm) for c in plan.candidates if c.cost is not None]
        return choose(function, problem, backend, device, min(c for c in costs if c[1] in names)[1])
    fft = next((c for c in plan.candidates if c.algorithm == "fft" and c.cost is not None), None)
    wanted = method == "fft"
    if method == "auto" and backend == "numpy" and fft is not None:
        # The core leaves float64 to direct sums, whose error follows each window. SciPy's "auto"
        # does not, nor does this. (The CUDA backend's FFT would spread a NaN.)
        wanted = (fft.cost or 0.0) < plan.cost
    if wanted and fft is not None:
        return choose(function, problem, backend, device, "fft")
    if method == "direct" and plan.algorithm == "fft":
        allowed = (c.algorithm for c in plan.candidates if c.rejected is None)
        name = next(name for name in allowed if name != "fft")
        return choose(function, problem, backend, device, name)
    return plan


def _broadcast(operands: Operands, array: Any, batch: list[int], extents: Shape) -> Any:
    """The array with its batches as large as `extents`: a copy where they are not."""
    if tuple(array.shape[i] for i in batch) == extents:
        return array
    shape = list(array.shape)
    for axis, extent in zip(batch, extents, strict=True):
        shape[axis] = extent
    full = operands.empty(tuple(shape), dtypes.of(array.dtype))
    full[...] = array
    return full


def _as_slice(rows: Any) -> Any:
    """Rows as a slice where they are evenly spaced: a view instead of a copy."""
    steps = np.diff(rows)
    if len(rows) == 1:
        return slice(int(rows[0]), int(rows[0]) + 1)
    if (steps == steps[0]).all() and steps[0] > 0:
        return slice(int(rows[0]), int(rows[-1]) + 1, int(steps[0]))
    return rows.tolist()


def _along(axis: int, index: Any) -> tuple[Any, ...]:
    return (slice(None),) * axis + (index,)
