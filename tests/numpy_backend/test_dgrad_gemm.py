"""dgrad_gemm: phases of strides and dilations, pieces of rows and channels, special values."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.numpy_backend import dgrad_gemm
from gpuconv.numpy_backend.device import Cpu
from gpuconv.problem import describe
from tests.numpy_backend.forced import CPU, compute


def gradient(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: str = "float32", **options: Any
) -> tuple[Any, Any, Any, Any]:
    """The problem, random dy and w, and dx, whose every element has been written."""
    problem = describe(
        "test", len(x_shape) - 2, x_shape, w_shape, dtype, dtype, operation="dgrad", **options
    )
    rng = np.random.default_rng(0)
    dy = testing.random_array(rng, problem.y_shape, dtype)
    w = testing.random_array(rng, w_shape, dtype)
    return problem, dy, w, force(problem, dy, w)


force = partial(compute, "dgrad_gemm")


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_strides_and_dilations(stride: int, dilation: int, dtype: str) -> None:
    for filters in ((3, 3), (5, 2), (1, 7), (2, 2)):
        for groups in (1, 3):
            problem, dy, w, dx = gradient(
                (2, 6, 23, 30), (12, 6 // groups, *filters), dtype, stride=(stride, 1 + stride),
                dilation=(dilation, stride), groups=groups, padding=3,
            )  # fmt: skip
            testing.assert_close(problem, dx, dy, w)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((1, 3, 224, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
        ((2, 256, 60, 60), (32, 256, 2, 2), {"stride": 2}),
        ((2, 96, 61, 43), (128, 24, 3, 3), {"groups": 4, "padding": 1}),
        ((3, 5, 9, 40, 40), (7, 5, 3, 3, 3), {"stride": 2, "padding": 1}),
        ((2, 4, 5000), (9, 4, 11), {"stride": 5}),
    ],
)
def test_pieces_of_rows_and_channels(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    problem, dy, w, dx = gradient(x_shape, w_shape, **options)
    testing.assert_close(problem, dx, dy, w)
    for n in range(len(dy)):
        np.testing.assert_array_equal(dx[n : n + 1], force(problem, dy[n : n + 1], w))


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((9, 32, 8, 8), (64, 32, 4, 4), {"stride": 2, "padding": 1}),
        ((12, 24, 7, 7), (40, 24, 3, 3), {"padding": 1}),
        ((11, 16, 4, 4), (20, 16, 4, 4), {}),
        ((13, 12, 9, 8), (16, 6, 3, 2), {"groups": 2, "dilation": 2, "padding": 1}),
        ((10, 6, 4, 5, 5), (12, 6, 2, 3, 3), {"stride": 2, "padding": 1}),
        ((40, 8, 30), (12, 8, 5), {"stride": 3}),
    ],
)
def test_images_that_share_a_product_get_the_bits_they_would_get_alone(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    options: dict[str, Any],
    dtype: str,
    memory: str,
) -> None:
    problem = describe(
        "test", len(x_shape) - 2, x_shape, w_shape, dtype, dtype, operation="dgrad", **options
    )
    assert dgrad_gemm._images(problem, 1) > 1  # of which BLAS may forbid some
    rng = np.random.default_rng(0)
    dy = testing.random_array(rng, problem.y_shape, dtype)
    dy = testing.in_memory_order(dy, memory, channel_axis=1)
    w = testing.random_array(rng, w_shape, dtype)
    dx = force(problem, dy, w)
    testing.assert_close(problem, dx, dy, w)
    for n in (0, len(dy) // 2, len(dy) - 1):
        np.testing.assert_array_equal(dx[n : n + 1], force(problem, dy[n : n + 1], w))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ndim", [2, 3])
def test_zeros_beside_the_rows_meet_no_weight_that_is_not_finite(ndim: int, value: float) -> None:
    shape = (1, 4, *[9] * (ndim - 2), 9, 9)
    problem, dy, w, _ = gradient(shape, (6, 4, *[3] * ndim), stride=2, padding=1)
    cut = dgrad_gemm._tiling(problem, CPU)
    assert cut.width > problem.output[-1]
    w[2, 1][(0,) * ndim] = value
    dx = force(problem, dy, w)
    seen = np.zeros(dx.shape, bool)
    # The first tap, of a stride of 2 and a pad of 1, reaches the odd positions.
    seen[(0, 1, *[slice(1, 8, 2)] * ndim)] = True
    np.testing.assert_array_equal(~np.isfinite(dx), seen)


def test_rows_are_cut_until_every_thread_has_some() -> None:
    device = Cpu(threads=8)
    problem = describe(
        "test", 2, (1, 3, 512, 512), (64, 3, 7, 7), "float32", "float32", operation="dgrad",
        stride=2, padding=3,
    )  # fmt: skip
    assert dgrad_gemm._items(problem, dgrad_gemm._tiling(problem, device)) >= device.threads


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
def test_memory_orders_and_a_bias(memory: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 24, 13, 17)).astype(np.float32)
    x = testing.in_memory_order(x, memory, channel_axis=1)
    w = rng.standard_normal((24, 4, 4, 4)).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32)
    options: dict[str, Any] = {"stride": 2, "padding": 1}
    y = gpuconv.conv_transpose2d(x, w, bias, algorithm="dgrad_gemm", **options)
    expected = gpuconv.conv_transpose2d(x, w, bias, algorithm="im2col", **options)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_special_value_stays_with_what_it_is_added_to(value: float) -> None:
    problem, dy, w, _ = gradient((1, 3, 41, 40), (16, 3, 3, 3), stride=2, padding=1)
    dy[0, 5, 7, 9] = value
    dx = force(problem, dy, w)
    seen = np.zeros(dx.shape, bool)
    seen[:, :, 13:16, 17:20] = True
    np.testing.assert_array_equal(~np.isfinite(dx), seen)


@pytest.mark.parametrize("limit", [None, 1 << 20, 100_000])
def test_workspace_limit(limit: int | None) -> None:
    problem, dy, w, dx = gradient(
        (2, 8, 60, 60), (40, 8, 3, 3), padding=1, stride=2, workspace_limit=limit
    )
    assert dgrad_gemm.workspace(problem, CPU) <= (limit or 64 << 20)
    testing.assert_close(problem, dx, dy, w)


def test_auto_takes_it_below_a_first_layer() -> None:
    plan = gpuconv.plan_conv2d(
        (8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3, operation="dgrad", backend="numpy"
    )
    assert plan.algorithm == "dgrad_gemm"
