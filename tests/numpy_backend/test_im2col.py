"""im2col and pointwise: any problem, within their workspace, image by image alike."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.numpy_backend import gemm, im2col, scratch
from gpuconv.numpy_backend.device import WORKSPACE_CAP
from gpuconv.problem import describe
from tests.numpy_backend.forced import serves

LIMITS = (None, 200_000, 4_000)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("seed", range(0, 1200, 60))
def test_im2col_random(seed: int, limit: int | None) -> None:
    served = [
        serves(testing.random_case(s), "im2col", workspace_limit=limit)
        for s in range(seed, seed + 60)
    ]
    assert all(served) or limit == 4_000
    assert sum(served) > 30


@pytest.mark.parametrize("limit", LIMITS)
def test_pointwise_random(limit: int | None) -> None:
    served = 0
    for seed in range(6000):
        case = testing.random_case(seed)
        if set(case.w_shape[2:]) == {1}:
            served += serves(case, "pointwise", workspace_limit=limit)
    assert served > 50


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((2, 64, 56, 56), (64, 64, 3, 3), {"padding": 1}),
        ((3, 128, 7, 7), (64, 128, 3, 3), {"padding": 1}),
        ((1, 3, 224, 224), (64, 3, 7, 7), {"padding": 3, "stride": 2}),
        ((2, 64, 28, 28), (64, 2, 3, 3), {"padding": 1, "groups": 32}),
        ((2, 32, 30, 30), (48, 32, 3, 3), {"padding": 6, "dilation": 6, "padding_mode": "reflect"}),
    ],
)
def test_im2col_large(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], options: dict[str, Any], layout: str
) -> None:
    """Problems of several blocks, and of several images to a block."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(x_shape).astype(np.float32)
    w = rng.standard_normal(w_shape).astype(np.float32)
    bias = rng.standard_normal(w_shape[0]).astype(np.float32)
    if layout == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    y = gpuconv.conv2d(x, w, bias, layout=layout, algorithm="im2col", **options)
    plan = gpuconv.plan_conv2d(x.shape, w_shape, bias=True, layout=layout, **options)
    testing.assert_close(plan.problem, y, x, w, bias)


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((3, 320, 12, 13), (24, 320, 3, 3), {"padding": 1}),
        ((5, 288, 4, 4), (16, 288, 3, 3), {"padding": 1}),
        ((2, 512, 9, 9), (24, 256, 3, 3), {"padding": 2, "groups": 2, "stride": 2}),
        ((1, 1, 70, 70), (4, 1, 60, 60), {"padding": 3}),
    ],
)
def test_long_sums_are_products_of_some_channels_each(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], options: dict[str, Any], memory: str
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(x_shape).astype(np.float32)
    x = testing.in_memory_order(x, memory, channel_axis=1)
    w = rng.standard_normal(w_shape).astype(np.float32)
    plan = gpuconv.plan_conv2d(x.shape, w.shape, algorithm="im2col", **options)
    y = plan(x, w)
    testing.assert_close(plan.problem, y, x, w)
    for n in range(len(x)):
        np.testing.assert_array_equal(y[n : n + 1], plan(x[n : n + 1], w))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "symmetric", "replicate", "circular"])
def test_windows_far_wider_than_their_block(padding_mode: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 300, 21, 19)).astype(np.float32)
    w = rng.standard_normal((8, 300, 3, 3)).astype(np.float32)
    options: dict[str, Any] = {"padding": 9, "dilation": 9, "padding_mode": padding_mode}
    y = gpuconv.conv2d(x, w, algorithm="im2col", **options)
    testing.assert_close(gpuconv.plan_conv2d(x.shape, w.shape, **options).problem, y, x, w)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
def test_pointwise_large(memory: str, groups: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64, 57, 53)).astype(np.float32)
    x = testing.in_memory_order(x, memory, channel_axis=1)
    w = rng.standard_normal((96, 64 // groups, 1, 1)).astype(np.float32)
    y = gpuconv.conv2d(x, w, stride=stride, groups=groups, algorithm="pointwise")
    plan = gpuconv.plan_conv2d(x.shape, w.shape, stride=stride, groups=groups)
    testing.assert_close(plan.problem, y, x, w)


@pytest.mark.parametrize("algorithm", ["im2col", "pointwise", "winograd"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_computed_as_each_would_be_alone(algorithm: str, channels_last: bool) -> None:
    rng = np.random.default_rng(0)
    filter_extent = 1 if algorithm == "pointwise" else 3
    for c, k, extent in ((16, 32, 7), (3, 5, 4), (33, 17, 9), (64, 64, 14), (8, 1, 6), (40, 2, 12)):
        for dtype in (np.float32, np.float64):
            x = rng.standard_normal((5, c, extent, extent + 1)).astype(dtype)
            if channels_last:
                x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            w = rng.standard_normal((k, c, filter_extent, filter_extent)).astype(dtype)
            if algorithm == "winograd" and k == 1:
                continue
            plan = gpuconv.plan_conv2d(
                x.shape, w.shape, padding=filter_extent // 2, dtype=dtype, algorithm=algorithm
            )
            y = plan(x, w)
            for n in range(len(x)):
                np.testing.assert_array_equal(y[n : n + 1], plan(x[n : n + 1], w))
            np.testing.assert_array_equal(y, plan(x, w))


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "innermost", "options"),
    [
        ((37, 6, 14, 14), (16, 6, 5, 5), True, {}),
        ((19, 6, 9, 8), (8, 3, 3, 3), True, {"groups": 2, "padding": 1, "stride": (1, 2)}),
        ((21, 5, 6, 7), (4, 5, 3, 3), True, {"padding": 1, "padding_mode": "reflect"}),
        ((11, 1, 20, 20), (6, 1, 5, 5), False, {"padding": 2}),
        ((23, 8, 5, 4, 4), (6, 8, 3, 3, 3), True, {"padding": 1}),
    ],
)
def test_many_small_images_share_a_block(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    innermost: bool,
    options: dict[str, Any],
    dtype: str,
    memory: str,
) -> None:
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, x_shape, dtype)
    x = testing.in_memory_order(x, memory, channel_axis=1)
    w = testing.random_array(rng, w_shape, dtype)
    bias = testing.random_array(rng, w_shape[:1], "uint64" if dtype == "uint8" else dtype)
    plan_conv = gpuconv.plan_conv2d if x.ndim == 4 else gpuconv.plan_conv3d
    plan = plan_conv(x.shape, w.shape, dtype=x.dtype, bias=True, algorithm="im2col", **options)
    cut = im2col._tiling(plan.problem, plan.device)
    assert cut.inner == (innermost and cut.images > 1)  # 1 where BLAS treats columns unlike
    y = plan(x, w, bias)
    testing.assert_close(plan.problem, y, x, w, bias)
    for n in (0, len(x) // 2, len(x) - 1):
        np.testing.assert_array_equal(y[n : n + 1], plan(x[n : n + 1], w, bias))


@pytest.mark.parametrize("limit", [None, 3_000_000, 400_000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int32", "complex64"])
@pytest.mark.parametrize("algorithm", ["im2col", "pointwise", "winograd"])
def test_scratch_memory_is_what_the_plan_says(
    algorithm: str, dtype: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    extent = 1 if algorithm == "pointwise" else 3
    x = testing.random_array(rng, (4, 48, 60, 60), dtype)
    w = testing.random_array(rng, (64, 48, extent, extent), dtype)
    if algorithm == "winograd" and dtype not in ("float32", "float16"):
        return
    plan = gpuconv.plan_conv2d(
        x.shape, w.shape, padding=extent // 2, workspace_limit=limit, dtype=dtype,
        algorithm=algorithm,
    )  # fmt: skip
    assert plan.workspace_bytes <= min(limit or WORKSPACE_CAP, WORKSPACE_CAP)
    out = np.empty(plan.problem.y_shape, plan.problem.y_dtype.numpy)
    plan(x, w, out=out)  # whatever is made once
    monkeypatch.setattr(scratch, "_kept", None)
    tracemalloc.start()
    try:
        plan(x, w, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= plan.workspace_bytes + 64 * 1024


def test_scratch_is_kept_between_calls_but_not_shared() -> None:
    with scratch.arena(1000) as first, scratch.arena(1000) as second:
        a, b = first.take(10, np.dtype("f4")), second.take(10, np.dtype("f4"))
        assert not np.shares_memory(a, b)
        assert a.ctypes.data % scratch.ALIGN == 0
        kept = second
    with scratch.arena(1000) as again:
        assert again is not kept


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "taps", "expected"),
    [
        ("uint8", "uint8", 9, "float32"),
        ("uint8", "int8", 5000, "float64"),
        ("int16", "int16", 9, "float64"),
        ("int32", "int32", 9, "int64"),
        ("bool", "bool", 9, "float32"),
    ],
)
def test_exact_products_take_the_narrowest_type_that_holds_every_sum(
    x_dtype: str, w_dtype: str, taps: int, expected: str
) -> None:
    case_x, case_w = np.zeros((1, 1, taps + 8), x_dtype), np.zeros((1, 1, taps), w_dtype)
    problem = describe("conv1d", 1, case_x.shape, case_w.shape, x_dtype, w_dtype)
    assert gemm.planned_type(problem) == np.dtype(expected)
    if expected == "int64":  # whose values decide
        case_x[...] = 1000
        assert gemm.product_type(problem, case_x, case_w) == np.dtype("float32")
        case_x[...] = case_w[...] = 1 << 30
        assert gemm.product_type(problem, case_x, case_w) == np.dtype("int64")


def test_integers_wrap_at_64_bits() -> None:
    x = np.full((1, 2, 5, 5), 2**62, np.int64)
    w = np.full((3, 2, 3, 3), 3, np.int64)
    y = gpuconv.conv2d(x, w, algorithm="im2col")
    assert (y == np.int64((18 * 3 * 2**62 + 2**63) % 2**64 - 2**63)).all()


@pytest.mark.parametrize("algorithm", ["im2col", "winograd"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_special_value_stays_within_its_windows(algorithm: str, value: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 20, 20)).astype(np.float32)
    w = rng.standard_normal((8, 16, 3, 3)).astype(np.float32)
    x[1, 3, 6, 9] = value
    y = gpuconv.conv2d(x, w, padding=1, algorithm=algorithm)
    seen = np.zeros(y.shape, bool)
    seen[1, :, 5:8, 8:11] = True
    np.testing.assert_array_equal(~np.isfinite(y), seen)
