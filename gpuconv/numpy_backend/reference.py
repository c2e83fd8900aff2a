"""The shortest correct definition of every problem: the oracle of the tests, not an algorithm.

    y[n, k, p] = bias[k] + sum over c, r of  x[n, g*C/G + c, stride*p + dilation*r - pad] w[k, c, r]

with g the group of k, p and r running over all spatial axes, and x read beyond its edge as
padding_mode says. The gradients are its adjoints: every product x*w that makes up y is made into
dy*conj(w), added to the dx that x was read from, and dy*conj(x), added to the dw of w. Sums run in
float64, complex128, or 64-bit integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.problem import ConvProblem


def compute(
    problem: ConvProblem, a: HostArray, b: HostArray, bias: HostArray | None = None
) -> HostArray:
    """The problem's result from its two operands, in the wide type of the sum."""
    if problem.operation == "wgrad":
        return weight_gradient(problem, a, b)
    return (forward if problem.operation == "fprop" else input_gradient)(problem, a, b, bias)


def forward(
    problem: ConvProblem, x: HostArray, w: HostArray, bias: HostArray | None = None
) -> HostArray:
    """y, (N, K, spatial...), in the wide type of the sum (not yet rounded to the result's)."""
    wide = wide_dtype(problem)
    y = np.zeros((x.shape[0], *problem.y_shape[1:]), wide)
    x, w = pad(problem, x).astype(wide), w.astype(wide)
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    for x_part, w_part, y_part in _taps(problem):
        y[y_part] += np.einsum("nc...,kc->nk...", x[x_part], w[w_part])
    if bias is not None:
        y += bias.astype(wide).reshape(-1, *[1] * problem.ndim)
    return y


def input_gradient(
    problem: ConvProblem, grad: HostArray, w: HostArray, bias: HostArray | None = None
) -> HostArray:
    """dx, (N, C, spatial...), from dy and w."""
    wide = wide_dtype(problem)
    grad, w = grad.astype(wide), w.astype(wide)
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    if problem.conjugate:
        w = w.conj()
    extents = (
        n + lo + hi for n, lo, hi in zip(problem.input, problem.pad_lo, problem.pad_hi, strict=True)
    )
    padded = np.zeros((grad.shape[0], problem.in_channels, *extents), wide)
    for x_part, w_part, y_part in _taps(problem):
        padded[x_part] += np.einsum("nk...,kc->nc...", grad[y_part], w[w_part])
    for axis in range(problem.ndim):
        index = source_index(
            problem.input[axis], problem.pad_lo[axis], problem.pad_hi[axis], problem.padding_mode
        )
        padded = np.moveaxis(padded, axis + 2, 0)
        home = np.zeros((problem.input[axis], *padded.shape[1:]), wide)
        np.add.at(home, index[index >= 0], padded[index >= 0])
        padded = np.moveaxis(home, 0, axis + 2)
    if bias is not None:
        padded = padded + bias.astype(wide).reshape(-1, *[1] * problem.ndim)
    return padded


def weight_gradient(problem: ConvProblem, x: HostArray, grad: HostArray) -> HostArray:
    """dw, (K, C/G, spatial...), from x and dy."""
    wide = wide_dtype(problem)
    w = np.zeros(problem.w_shape, wide)
    x, grad = pad(problem, x).astype(wide), grad.astype(wide)
    if problem.conjugate:
        x = x.conj()
    summed = (0, *range(2, x.ndim))  # images and positions
    for x_part, w_part, y_part in _taps(problem):
        w[w_part] = np.tensordot(grad[y_part], x[x_part], (summed, summed))
    return np.flip(w, tuple(range(2, w.ndim))) if problem.flip else w


def _taps(problem: ConvProblem) -> Iterator[tuple[Any, Any, Any]]:
    """For every tap and group: the part of the padded x, of w and of y that meet in it."""
    everything = slice(None)
    for tap in itertools.product(*map(range, problem.filter)):
        start = [d * r for d, r in zip(problem.dilation, tap, strict=True)]
        window = [
            slice(a, a + max(n - 1, 0) * s + 1, s) if n else slice(0)
            for a, n, s in zip(start, problem.output, problem.stride, strict=True)
        ]
        for g in range(problem.groups):
            ins = slice(g * problem.group_in_channels, (g + 1) * problem.group_in_channels)
            outs = slice(g * problem.group_out_channels, (g + 1) * problem.group_out_channels)
            yield (everything, ins, *window), (outs, everything, *tap), (everything, outs)


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
