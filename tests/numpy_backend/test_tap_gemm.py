"""tap_gemm: taps in the padding, shares of long sums, and weights that are not finite."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.numpy_backend import tap_gemm
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import describe
from tests.numpy_backend.forced import serves


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("seed", range(0, 600, 120))
def test_random(seed: int, limit: int | None) -> None:
    cases = map(testing.random_case, range(seed, seed + 120))
    assert sum(serves(case, "tap_gemm", workspace_limit=limit) for case in cases) > 3


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_wide_dilation_and_shares_image_by_image(memory: str, threads: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 320, 17, 19)).astype(np.float32)
    x = testing.in_memory_order(x, memory, channel_axis=1)
    w = rng.standard_normal((40, 320, 3, 3)).astype(np.float32)
    problem = describe(
        "test", 2, (1, *x.shape[1:]), w.shape, "float32", "float32", padding=8, dilation=8
    )
    plan = choose("test", problem, "numpy", Cpu(threads=threads), "tap_gemm")
    assert tap_gemm._tiling(problem, Cpu(threads=threads)).shares == threads
    y = plan(x, w)
    whole = describe("test", 2, x.shape, w.shape, "float32", "float32", padding=8, dilation=8)
    testing.assert_close(whole, y, x, w)
    for n in range(len(x)):
        np.testing.assert_array_equal(y[n : n + 1], plan(x[n : n + 1], w))


@pytest.mark.parametrize("where", ["x", "w"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("channels", [8, 2048])
def test_special_values_reach_what_the_sum_says(where: str, value: float, channels: int) -> None:
    """A tap in the padding multiplies zeros, and zero times a weight that is not finite is NaN."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, channels, 11, 12)).astype(np.float32)
    w = rng.standard_normal((5, channels, 3, 3)).astype(np.float32)
    if where == "x":
        x[0, 3, 2, 9] = value
    else:
        w[2, 1, 0, 2] = value
    options: dict[str, Any] = {"padding": 6, "dilation": 6}
    with np.errstate(invalid="ignore"):
        y = gpuconv.conv2d(x, w, algorithm="tap_gemm", **options)
        direct = gpuconv.conv2d(x, w, algorithm="im2col", **options)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(direct))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(direct))
    finite = np.isfinite(direct)
    assert finite.any()
    assert not finite.all()
    np.testing.assert_allclose(y[finite], direct[finite], rtol=1e-3, atol=1e-2)


def test_a_weight_that_is_not_finite_takes_no_memory_beyond_the_workspace() -> None:
    problem = describe(
        "test", 2, (1, 512, 24, 24), (256, 512, 3, 3), "float32", "float32", padding=12, dilation=12
    )
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, problem.x_shape, "float32")
    w = testing.random_array(rng, problem.w_shape, "float32")
    w[:, 0, 0, 0] = np.inf
    y = np.empty(problem.y_shape, np.float32)
    plan = choose("test", problem, "numpy", Cpu(threads=2), "tap_gemm")
    with np.errstate(invalid="ignore"):
        tap_gemm.run(plan, x, w, None, y)  # caches, threads and scratch memory are there for good
        tracemalloc.start()
        try:
            tap_gemm.run(plan, x, w, None, y)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert np.isnan(y[:, :, :12]).all()
    assert peak < 256 << 10  # NumPy's own buffers: not the 512 KiB of a tap's weights


def test_one_input_channel_is_left_to_others() -> None:
    problem = describe("test", 1, (1, 1, 9000), (4, 1, 3000), "float32", "float32")
    assert "one input channel" in tap_gemm.supports(problem, Cpu(threads=2)).reason


def test_auto_takes_it_where_much_of_the_filter_lies_in_the_padding() -> None:
    shapes = (1, 2048, 33, 33), (256, 2048, 3, 3)
    wide = gpuconv.plan_conv2d(*shapes, padding=12, dilation=12, backend="numpy")
    assert wide.algorithm == "tap_gemm"
    narrow = gpuconv.plan_conv2d(*shapes, padding=1, backend="numpy")
    assert narrow.algorithm != "tap_gemm"


def test_workspace_limit_is_kept() -> None:
    for limit in (None, 8 << 20, 2 << 20):
        plan = gpuconv.plan_conv2d(
            (2, 128, 40, 40), (128, 128, 3, 3), padding=4, dilation=4, algorithm="tap_gemm",
            workspace_limit=limit, backend="numpy",
        )  # fmt: skip
        assert plan.workspace_bytes <= (limit or 64 << 20)
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, 128, 40, 40)).astype(np.float32)
        w = rng.standard_normal((128, 128, 3, 3)).astype(np.float32)
        testing.assert_close(plan.problem, plan(x, w), x, w)
