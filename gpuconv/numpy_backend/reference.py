"""The shortest correct definition of every problem: the oracle of the tests, not an algorithm.

    y[n, k, p] = bias[k] + sum over c, r of  x[n, g*C/G + c, stride*p + dilation*r - pad] w[k, c, r]

with g the group of k, p and r running over all spatial axes, and x read beyond its edge as
padding_mode says. It is summed in float64, complex128, or 64-bit integers.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.problem import ConvProblem


def forward(
    problem: ConvProblem, x: HostArray, w: HostArray, bias: HostArray | None = None
) -> HostArray:
    """y, (N, K, spatial...), in the wide type of the sum (not yet rounded to the result's)."""
    wide = wide_dtype(problem)
    y = np.zeros((x.shape[0], *problem.y_shape[1:]), wide)
    x, w = pad(problem, x).astype(wide), w.astype(wide)
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    everything: Any = slice(None)
    for tap in itertools.product(*map(range, problem.filter)):
        start = [d * r for d, r in zip(problem.dilation, tap, strict=True)]
        window: tuple[Any, ...] = tuple(
            slice(a, a + (n - 1) * s + 1, s)
            for a, n, s in zip(start, problem.output, problem.stride, strict=True)
        )
        for g in range(problem.groups):
            ins: Any = slice(g * problem.group_in_channels, (g + 1) * problem.group_in_channels)
            outs: Any = slice(g * problem.group_out_channels, (g + 1) * problem.group_out_channels)
            x_g, w_g = x[(everything, ins, *window)], w[(outs, everything, *tap)]
            y[:, outs] += np.einsum("nc...,kc->nk...", x_g, w_g)
    if bias is not None:
        y += bias.astype(wide).reshape(-1, *[1] * problem.ndim)
    return y


def wide_dtype(problem: ConvProblem) -> np.dtype[Any]:
    """The type that the reference sums in."""
    if problem.accumulator.is_exact:
        return problem.accumulator.numpy
    return np.dtype(np.complex128 if problem.accumulator.is_complex else np.float64)


def pad(problem: ConvProblem, x: HostArray) -> HostArray:
    """x with its boundary written out."""
    for axis in range(problem.ndim):
        index = source_index(
            problem.input[axis], problem.pad_lo[axis], problem.pad_hi[axis], problem.padding_mode
        )
        if x.shape[axis + 2] == 0:
            x = np.zeros((*x.shape[: axis + 2], len(index), *x.shape[axis + 3 :]), x.dtype)
            continue
        x = np.take(x, index, axis=axis + 2)
        x[(slice(None),) * (axis + 2) + (index < 0,)] = 0
    return x
