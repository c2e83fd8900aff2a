"""wgrad_row_gemm: strides, groups, shares, joint images, runs of whole rows, special values."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.numpy_backend import wgrad_row_gemm
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, describe
from tests.numpy_backend.forced import CPU, compute


def gradient(x: Any, w_shape: tuple[int, ...], **options: Any) -> tuple[Any, Any, Any]:
    """The problem, random dy, and dw, whose every element has been written."""
    problem = describe("test", 2, x.shape, w_shape, x.dtype, x.dtype, operation="wgrad", **options)
    dy = testing.random_array(np.random.default_rng(1), problem.y_shape, str(x.dtype))
    return problem, dy, force(problem, x, dy)


force = partial(compute, "wgrad_row_gemm")


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_strides_and_dilations(stride: int, dilation: int, dtype: str) -> None:
    x = testing.random_array(np.random.default_rng(0), (3, 6, 23, 30), dtype)
    for filters in ((3, 3), (5, 2), (2, 7)):
        problem, dy, dw = gradient(
            x, (8, 3, *filters), stride=(stride, 1), dilation=(dilation, stride), groups=2,
            padding=3,
        )  # fmt: skip
        testing.assert_close(problem, dw, x, dy)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
def test_memory_orders_and_modes(memory: str, mode: str) -> None:
    x = testing.random_array(np.random.default_rng(0), (2, 8, 14, 15), "float32")
    x = testing.in_memory_order(x, memory, channel_axis=1)
    problem, dy, dw = gradient(x, (8, 4, 3, 3), groups=2, padding=1, padding_mode=mode)
    testing.assert_close(problem, dw, x, dy)


@pytest.mark.parametrize(
    ("shape", "w_shape", "options", "shares", "images"),
    [
        ((70, 64, 7, 7), (64, 64, 3, 3), {"padding": 1}, 2, 10),
        ((1, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}, 2, 1),
        ((3, 256, 28, 28), (256, 8, 3, 3), {"padding": 1, "groups": 32}, 2, 1),
        ((1, 300, 33, 33), (20, 300, 3, 3), {"padding": 12, "dilation": 12}, 1, 1),
        ((2, 8, 40, 40), (8, 8, 3, 9), {"padding": (1, 4)}, 1, 1),
        ((2, 4, 5, 6), (4, 4, 3, 15), {"padding": (20, 7)}, 1, 1),
    ],
)
def test_shares_and_joint_images(
    shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    options: dict[str, Any],
    shares: int,
    images: int,
) -> None:
    x = testing.random_array(np.random.default_rng(0), shape, "float32")
    problem, dy, dw = gradient(x, w_shape, **options)
    cut = wgrad_row_gemm._tiling(problem, CPU)
    assert (cut.shares, cut.images) == (shares, images)
    testing.assert_close(problem, dw, x, dy)
    np.testing.assert_array_equal(dw, force(problem, x, dy))


def test_a_smaller_batch_than_planned() -> None:
    x = testing.random_array(np.random.default_rng(0), (40, 16, 9, 9), "float32")
    problem, dy, _ = gradient(x, (16, 16, 3, 3), padding=1)
    for n in (1, 7):
        small = describe(
            "test", 2, x[:n].shape, (16, 16, 3, 3), "float32", "float32", operation="wgrad",
            padding=1,
        )  # fmt: skip
        testing.assert_close(small, force(problem, x[:n], dy[:n]), x[:n], dy[:n])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_special_values_reach_what_the_sum_says(value: float) -> None:
    for operand in ("x", "dy"):
        x = testing.random_array(np.random.default_rng(0), (2, 8, 12, 12), "float32")
        problem, dy, _ = gradient(x, (8, 4, 3, 3), groups=2, padding=1)
        (x if operand == "x" else dy)[0, 1, 0, 11] = value
        dw = force(problem, x, dy)
        direct = choose("test", problem, "numpy", CPU, "wgrad_gemm")
        expected = np.empty_like(dw)
        with np.errstate(invalid="ignore"):
            direct.implementation.run(direct, x, dy, None, expected)
        np.testing.assert_array_equal(np.isnan(dw), np.isnan(expected))
        np.testing.assert_array_equal(np.isinf(dw), np.isinf(expected))
        assert not np.isfinite(dw).all()
        assert np.isfinite(dw).any()


@pytest.mark.parametrize("limit", [None, 4 << 20, 300_000])
def test_workspace_limit(limit: int | None) -> None:
    x = testing.random_array(np.random.default_rng(0), (2, 32, 60, 60), "float32")
    problem, dy, dw = gradient(x, (32, 8, 3, 3), groups=4, padding=1, workspace_limit=limit)
    assert wgrad_row_gemm.workspace(problem, CPU) <= (limit or 64 << 20)
    testing.assert_close(problem, dw, x, dy)


def test_auto_takes_it_for_groups() -> None:
    plan = gpuconv.plan_conv2d(
        (32, 512, 14, 14), (512, 16, 3, 3), padding=1, groups=32, operation="wgrad", backend="numpy"
    )
    assert plan.algorithm == "wgrad_row_gemm"
