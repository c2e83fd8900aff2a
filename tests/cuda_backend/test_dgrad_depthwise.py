"""What is special to dgrad_depthwise: parities of rows and columns, edges, what is written."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes
from gpuconv.cuda_backend import dgrad_depthwise, launch
from gpuconv.plan import choose
from gpuconv.problem import ConvProblem, describe
from gpuconv.testing import MEMORY_ORDERS, assert_close, in_memory_order, random_array
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import emulated_device

ORDERS = ("c", "channels_last")
each_order = pytest.mark.parametrize("order", ORDERS)
each_filter = pytest.mark.parametrize("filter", [3, 5])


def problem_of(
    shape: tuple[int, ...],
    filter: int,
    *,
    dtype: str = "float32",
    order: str = "c",
    multiplier: int = 1,
    bias: bool = False,
    flip: bool = False,
    **options: Any,
) -> ConvProblem:
    """The gradient of x of `shape`, (N, C, H, W)."""
    c = shape[1]
    problem = describe(
        "conv2d", 2, shape, (c * multiplier, 1, filter, filter), dtype, dtype,
        operation="dgrad", groups=c, **{"stride": 2, **options},
    )  # fmt: skip
    return replace(
        problem, flip=flip, channels_last=order == "channels_last",
        bias=dtypes.of(np.dtype(dtype)) if bias else None,
    )  # fmt: skip


def arrays_of(problem: ConvProblem, *, integers: bool = True, seed: int = 0) -> tuple[Any, ...]:
    """dy, w, and the bias where there is one."""
    rng = np.random.default_rng(seed)
    dy, w = (
        random_array(rng, shape, problem.x_dtype, integers)
        for shape in (problem.y_shape, problem.w_shape)
    )
    bias = random_array(rng, (problem.in_channels,), problem.x_dtype, integers)
    order = "channels_last" if problem.channels_last else "c"
    return in_memory_order(dy, order, 1), w, bias if problem.bias else None


def compute(
    device: Any, problem: ConvProblem, dy: Any, w: Any, bias: Any = None, *, out: Any = None,
    exact: bool = False,
) -> Any:  # fmt: skip
    """The result, compared with the reference."""
    plan = choose("test", problem, "cuda", device, "dgrad_depthwise")
    arrays = (on_device(device, a) for a in (dy, w, bias))
    dx = on_host(plan(*arrays, out=on_device(device, out)))
    assert_close(replace(problem, batch=len(dy)), dx, dy, w, bias, exact=exact)
    return dx


@each_order
@each_filter
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_random_problems(cuda_device: Any, order: str, filter: int, dtype: str) -> None:
    for seed in range(25):
        rnd = random.Random(seed)
        padding = tuple((rnd.randint(0, 4), rnd.randint(0, 4)) for _ in range(2))
        spatial = tuple(max(rnd.randint(1, 20), filter - sum(pad)) for pad in padding)
        problem = problem_of(
            (rnd.randint(1, 3), rnd.choice((1, 3, 8, 33)), *spatial), filter, dtype=dtype,
            order=order, multiplier=rnd.choice((1, 1, 2)), bias=rnd.random() < 0.3,
            flip=rnd.random() < 0.3, padding=padding,
        )  # fmt: skip
        dy, w, bias = arrays_of(problem, integers=False, seed=seed)
        compute(cuda_device, problem, dy, w, bias)


@each_order
@each_filter
def test_sizes_around_a_threads_rows_and_columns(cuda_device: Any, order: str, filter: int) -> None:
    """Whole numbers in, exact sums out: one element off shows."""
    for height, width in ((7, 9), (8, 8), (9, 7), (15, 12), (16, 13), (17, 4)):
        for pad in (0, 1, 2, 3):
            if min(height, width) + 2 * pad < filter:
                continue
            problem = problem_of((2, 3, height, width), filter, order=order, padding=pad)
            compute(cuda_device, problem, *arrays_of(problem), exact=True)


def test_memory_orders_and_slices(cuda_device: Any) -> None:
    problem = problem_of((2, 4, 9, 12), 3, padding=1)
    dy, w, _ = arrays_of(problem)
    dx = compute(cuda_device, problem, dy, w, exact=True)
    for memory in MEMORY_ORDERS:
        out = in_memory_order(np.full_like(dx, 7), memory, 1)
        given = (in_memory_order(a, memory, 1) for a in (dy, w))
        np.testing.assert_array_equal(compute(cuda_device, problem, *given, out=out), dx)
    room = np.full((2, 4, 9, 16), 7, dx.dtype)
    compute(cuda_device, problem, dy, w, out=room[..., :12], exact=True)
    assert (room[..., 12:] == 7).all()


def test_images_have_the_bits_they_have_alone(cuda_device: Any) -> None:
    problem = problem_of((4, 5, 20, 22), 5, padding=2)
    dy, w, _ = arrays_of(problem, integers=False)
    whole = compute(cuda_device, problem, dy, w)
    for n in range(4):
        alone = compute(cuda_device, problem, dy[n : n + 1], w)
        np.testing.assert_array_equal(alone, whole[n : n + 1])


def test_64_bit_offsets(cuda_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "index_type", lambda *args: "int64")
    dgrad_depthwise.prepare.cache_clear()
    for order in ORDERS:
        problem = problem_of((2, 5, 9, 11), 3, order=order, padding=1)
        compute(cuda_device, problem, *arrays_of(problem), exact=True)
    dgrad_depthwise.prepare.cache_clear()


def test_it_refuses_with_a_reason(cuda_device: Any) -> None:
    fine = problem_of((1, 4, 8, 8), 3, padding=1)
    assert dgrad_depthwise.supports(fine, cuda_device) is True
    dense = describe(
        "conv2d", 2, (1, 4, 8, 8), (4, 4, 3, 3), "float32", "float32", operation="dgrad", stride=2
    )
    for problem, reason in (
        (replace(fine, operation="fprop"), "dgrad only, not fprop"),
        (dense, "4 input channels, not one"),
        (problem_of((1, 4, 8, 8), 3, dtype="float64"), "one type for all"),
        (problem_of((1, 4, 8, 8), 4), "3x3 and 5x5"),
        (problem_of((1, 4, 8, 8), 3, stride=1), "stride 2 and dilation 1"),
        (problem_of((1, 4, 8, 8), 3, dilation=2), "stride 2 and dilation 1"),
        (problem_of((1, 4, 8, 8), 3, padding=1, padding_mode="reflect"), "zeros only"),
    ):
        verdict = dgrad_depthwise.supports(problem, cuda_device)
        assert not verdict
        assert reason in repr(verdict)


@each_order
def test_plans_prefer_it(cuda_device: Any, order: str) -> None:
    problem = problem_of((32, 96, 112, 112), 3, dtype="float16", order=order, padding=1)
    plan = choose("test", problem, "cuda", cuda_device)
    assert plan.algorithm == "dgrad_depthwise"
    assert plan.cost > plan.bytes_moved / cuda_device.bandwidth


def test_variants_hold_whatever_a_problem_asks_for() -> None:
    listed = {launch.freeze(macros) for _, macros in dgrad_depthwise.variants()}
    assert len(listed) == 12
    for filter in (3, 5):
        for index in ("int32", "int64"):
            macros = dgrad_depthwise._macros(dtypes.FLOAT16, filter, index)
            assert launch.freeze(macros) in listed
    assert dgrad_depthwise.TILE.itemsize == 56


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_nothing_out_of_bounds(mode: Any) -> None:
    with (
        emulated_device(mode=mode, order="random", block_order="shuffled") as device,
        gpuconv.use_backend("cuda"),
    ):
        for order in ORDERS:
            for dtype, filter, pad in (("float16", 3, 1), ("float32", 5, 0), ("float32", 3, 2)):
                for width in (9, 16):
                    problem = problem_of(
                        (3, 11, 10, width), filter, dtype=dtype, order=order, padding=pad, bias=True
                    )
                    compute(device, problem, *arrays_of(problem))


@each_order
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sectors(order: str, dtype: str) -> None:
    """dx is written once, and but for the ends of rows in whole sectors."""
    with emulated_device(mode="watch") as device, gpuconv.use_backend("cuda"):
        problem = problem_of((1, 64, 56, 56), 3, dtype=dtype, order=order, padding=1)
        dy, w, _ = arrays_of(problem)
        out = device.empty(
            (1, 64, 56, 56) if order == "c" else (1, 56, 56, 64), problem.x_dtype.numpy
        )
        dx = out if order == "c" else out.transpose(0, 3, 1, 2)
        compute(device, problem, dy, w, out=dx)
        writes = [s for s in device.report.sites if (s.space, s.operation) == ("global", "store")]
        assert device.launches == 1
        assert sum(s.lanes * s.bytes for s in writes) == dx.nbytes, str(device.report)
        assert 32 * sum(s.sectors for s in writes) <= 1.25 * dx.nbytes, str(device.report)
