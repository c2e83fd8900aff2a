"""winograd: its error, its edges, and what it leaves to others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import winograd
from gpuconv.problem import ConvProblem


def assert_close(
    problem: ConvProblem, y: HostArray, x: HostArray, w: HostArray, bias: HostArray | None
) -> None:
    """The error bound, relative to the largest window that shares a tile with the output."""
    y_ref, magnitudes = testing.expected(problem, x, w, bias)
    if problem.layout == "NHWC":
        y = y.transpose(0, 3, 1, 2)
    largest = magnitudes.copy()
    for axis in (2, 3):
        padded = np.pad(largest, [(0, 0)] * axis + [(3, 3)] + [(0, 0)] * (3 - axis))
        largest = np.lib.stride_tricks.sliding_window_view(padded, 7, axis=axis).max(axis=-1)
    bound = testing.error_bound(problem, y_ref, largest, c=winograd.ERROR_CONSTANT)
    assert (np.abs(y.astype(np.float64) - y_ref) <= bound).all()


@pytest.mark.parametrize("limit", [None, 100_000])
@pytest.mark.parametrize("seed", range(60))
def test_random(seed: int, limit: int | None) -> None:
    rng = np.random.default_rng(seed)
    batch, (c, k) = int(rng.integers(1, 5)), rng.choice([1, 2, 3, 16, 33], 2)
    k += 1
    extents = tuple(rng.integers(1, 36, 2))
    layout = str(rng.choice(["NCHW", "NHWC"]))
    dtype = str(rng.choice(["float32", "float64", "float16"]))
    options: dict[str, Any] = {
        "padding": [1, 0, 2, "same", ((0, 3), (5, 1))][rng.integers(5)],
        "padding_mode": str(rng.choice(["zeros", "reflect", "symmetric", "replicate", "circular"])),
        "layout": layout,
    }
    if options["padding"] == 0:
        extents = tuple(max(n, 3) for n in extents)
    x_shape = (batch, c, *extents) if layout == "NCHW" else (batch, *extents, c)
    x = testing.random_array(rng, tuple(map(int, x_shape)), dtype)
    x = testing.in_memory_order(
        x, str(rng.choice(testing.MEMORY_ORDERS)), channel_axis=1 if layout == "NCHW" else -1
    )
    w = testing.random_array(rng, (int(k), int(c), 3, 3), dtype)
    bias = testing.random_array(rng, (int(k),), dtype) if rng.random() < 0.5 else None
    options["workspace_limit"] = limit
    plan = gpuconv.plan_conv2d(x.shape, w.shape, dtype=dtype, bias=bias is not None, **options)
    mine = next(c for c in plan.candidates if c.algorithm == "winograd")
    if mine.cost is None:
        assert limit is not None
        return
    y = gpuconv.conv2d(x, w, bias, algorithm="winograd", **options)
    assert_close(plan.problem, y, x, w, bias)


def test_error_is_three_times_that_of_the_direct_sum() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 128, 32, 32)).astype(np.float32)
    w = rng.standard_normal((64, 128, 3, 3)).astype(np.float32)
    exact = gpuconv.conv2d(x.astype(np.float64), w.astype(np.float64), algorithm="im2col")
    errors = {
        algorithm: float(np.sqrt(np.mean((gpuconv.conv2d(x, w, algorithm=algorithm) - exact) ** 2)))
        for algorithm in ("im2col", "winograd")
    }
    assert errors["winograd"] < 4 * errors["im2col"]


def test_a_sum_that_overflows_only_in_the_transforms_is_computed_directly() -> None:
    x = np.full((1, 2, 12, 12), 1e38, np.float32)
    w = np.zeros((2, 2, 3, 3), np.float32)
    w[:, 0, 1, 1] = 1
    y = gpuconv.conv2d(x, w, padding=1, algorithm="winograd")
    assert (y == np.float32(1e38)).all()


def test_filters_transformed_in_several_passes() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 40, 20, 20)).astype(np.float32)
    w = rng.standard_normal((70, 40, 3, 3)).astype(np.float32)
    plan = gpuconv.plan_conv2d(
        x.shape, w.shape, padding=1, algorithm="winograd", workspace_limit=700_000
    )
    assert winograd._tiling(plan.problem, plan.device).filters < 70
    assert_close(plan.problem, plan(x, w), x, w, None)


def test_auto_leaves_few_channels_to_others() -> None:
    assert gpuconv.plan_conv2d((1, 3, 64, 64), (64, 3, 3, 3)).algorithm != "winograd"
    assert gpuconv.plan_conv2d((8, 128, 56, 56), (128, 128, 3, 3)).algorithm == "winograd"
