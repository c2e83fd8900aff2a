"""What is special to fft: its tiles, its memory, and an error bound of its own."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpuconv
from gpuconv.cuda_backend import fft
from gpuconv.execute import channels_first
from gpuconv.plan import Plan, choose
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import assert_close, expected, random_array, random_case
from tests.cuda_backend.conftest import on_device, on_host

SMALL_TILES = 96 << 10  # bytes of workspace that make tiles of a few thousand elements


def plan_of(problem: ConvProblem, device: Any) -> Plan | None:
    try:
        return choose("test", problem, "cuda", device, "fft")
    except ValueError:
        return None


def describe_pair(x: Any, w: Any, **options: Any) -> ConvProblem:
    return describe("test", w.ndim - 2, x.shape, w.shape, x.dtype, w.dtype, **options)


def check(device: Any, plan: Plan, x: Any, w: Any, bias: Any = None) -> Any:
    """Run, and compare: integers exactly, floats within the bound that the module states."""
    problem = plan.problem
    y = on_host(plan(*(on_device(device, a) for a in (x, w, bias))))
    if problem.accumulator.is_exact:
        assert_close(problem, y, x, w, bias)
        return y
    y_ref, magnitudes = expected(problem, x, w, bias)
    got = channels_first(y, problem.layout.endswith("C"), problem.batched)
    assert got.dtype == problem.y_dtype.numpy
    elements = max(math.prod(t.tile) for t in fft._found(problem, device))
    wide = x.astype(np.complex128)
    channels = problem.group_in_channels
    # The norm of all of x, as often as the longest pads repeat it, is no less than a tile's.
    repeats = math.prod(
        -(-(n + lo + hi) // n) + 1
        for n, lo, hi in zip(problem.input, problem.pad_lo, problem.pad_hi, strict=True)
    )
    x_norm = math.sqrt((abs(wide) ** 2).sum() * repeats * channels)
    w_norm = math.sqrt((abs(w.astype(np.complex128)) ** 2).sum())
    bound = fft.NORM_CONSTANT * math.log2(max(elements, 2)) * 2.0**-52 * x_norm * w_norm
    allowed = bound + 2.0**-52 * magnitudes + problem.y_dtype.eps * abs(y_ref) + 2.0**-24 * (
        problem.y_dtype.itemsize == 2
    )  # fmt: skip
    largest = float(ml_dtypes.finfo(got.real.dtype).max)
    finite = abs(y_ref) < 0.99 * largest
    assert (abs(got.astype(y_ref.dtype) - y_ref) <= allowed)[finite].all(), str(problem)
    return y


@pytest.mark.parametrize("limit", [None, SMALL_TILES])
def test_random_problems(cuda_device: Any, limit: int | None) -> None:
    served = 0
    for seed in range(900):
        case = random_case(seed, largest=16)
        problem = replace(case.problem(), workspace_limit=limit)
        if plan := plan_of(problem, cuda_device):
            check(cuda_device, plan, *case.arrays())
            served += 1
    assert served > 400


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "float16", "uint8"])
def test_large_filters(cuda_device: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for size, mode in zip(((15, 15), (31, 9), (63, 63), (64, 1)), PADDING_MODES, strict=False):
        x = random_array(rng, (2, 1, 90, 150), dtype)
        w = random_array(rng, (1, 1, *size), dtype)
        for limit in (None, 2 << 20):
            problem = describe_pair(x, w, padding="same", padding_mode=mode, workspace_limit=limit)
            plan = plan_of(problem, cuda_device)
            assert plan is not None
            check(cuda_device, plan, x, w)


def test_float32_is_within_the_direct_sums_bound(cuda_device: Any) -> None:
    """Transforms are made in float64."""
    rng = np.random.default_rng(0)
    x, w = (
        random_array(rng, (1, 3, 80, 90), "float32"),
        random_array(rng, (2, 3, 21, 17), "float32"),
    )
    problem = describe_pair(x, w)
    plan = plan_of(problem, cuda_device)
    assert plan is not None
    y = on_host(plan(on_device(cuda_device, x), on_device(cuda_device, w)))
    assert_close(problem, y, x, w, c=1e-3)  # far within


@pytest.mark.parametrize("extent", [200, 201, 255, 256, 257])
def test_signals_around_the_size_of_a_tile(cuda_device: Any, extent: int) -> None:
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (1, 1, extent), "float64"), random_array(rng, (1, 1, 33), "float64")
    for limit, stride, dilation in itertools.product((None, 12 << 10), (1, 3), (1, 2)):
        problem = describe_pair(
            x, w, padding="full", stride=stride, dilation=dilation, workspace_limit=limit
        )
        plan = plan_of(problem, cuda_device)
        assert plan is not None
        check(cuda_device, plan, x, w)


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pads_longer_than_the_image(cuda_device: Any, mode: str) -> None:
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (1, 2, 5, 7), "float64"), random_array(rng, (3, 2, 9, 4), "float64")
    problem = describe_pair(x, w, padding=((30, 9), (21, 50)), padding_mode=mode)
    plan = plan_of(problem, cuda_device)
    assert plan is not None
    check(cuda_device, plan, x, w)


def test_images_of_a_batch_have_the_bits_they_have_alone(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (4, 4, 40, 50), "float32"), random_array(rng, (6, 2, 9, 9), "float32")
    for limit in (None, SMALL_TILES):
        problem = describe_pair(x, w, groups=2, workspace_limit=limit)
        plan = plan_of(problem, cuda_device)
        assert plan is not None
        whole = check(cuda_device, plan, x, w)
        for n in range(4):
            alone = plan(on_device(cuda_device, x[n : n + 1]), on_device(cuda_device, w))
            np.testing.assert_array_equal(on_host(alone), whole[n : n + 1])
        many = plan(on_device(cuda_device, np.concatenate([x, x])), on_device(cuda_device, w))
        np.testing.assert_array_equal(on_host(many)[4:], whole)


def test_negative_strides_and_foreign_memory_orders(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (1, 3, 40, 50), "float32"), random_array(rng, (2, 3, 7, 9), "float32")
    plan = plan_of(describe_pair(x, w, padding=3), cuda_device)
    assert plan is not None
    y = check(cuda_device, plan, x, w)
    for view in (
        np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1],
        np.asfortranarray(x),
        np.repeat(x, 2, axis=-1)[..., ::2],
    ):
        again = plan(on_device(cuda_device, view), on_device(cuda_device, w))
        np.testing.assert_array_equal(on_host(again), y)


def test_sums_of_integers_are_exact_where_it_serves(cuda_device: Any) -> None:
    for dtype, size, serves in (
        ("uint8", 63, True), ("int8", 63, True), ("int16", 9, True), ("int32", 3, False),
        ("uint64", 3, False), ("bool", 31, True),
    ):  # fmt: skip
        info = None if dtype == "bool" else np.iinfo(dtype)
        x = np.full((1, 1, 70, 80), True if info is None else info.max, dtype)
        w = np.full((1, 1, size, size), True if info is None else info.min or info.max, dtype)
        plan = plan_of(describe_pair(x, w, padding=3), cuda_device)
        assert (plan is not None) == serves, dtype
        if plan:
            check(cuda_device, plan, x, w)


@pytest.mark.parametrize("limit", [200 << 10, 1 << 20, 8 << 20, None])
def test_memory_stays_within_the_plan(cuda_device: Any, limit: int | None) -> None:
    if cuda_device.xp is not np:
        pytest.skip("CuPy's pool is not tracemalloc's to see")
    rng = np.random.default_rng(0)
    for shape, filter_shape, groups in (
        ((2, 1, 300, 400), (1, 1, 31, 31), 1),
        ((1, 8, 60, 70), (8, 8, 9, 9), 1),
        ((1, 8, 60, 70), (8, 1, 9, 9), 8),
        ((1, 1, 3000), (1, 1, 501), 1),
    ):
        x, w = random_array(rng, shape, "float32"), random_array(rng, filter_shape, "float32")
        plan = plan_of(describe_pair(x, w, groups=groups, workspace_limit=limit), cuda_device)
        assert plan is not None
        assert plan.workspace_bytes <= (fft.WORKSPACE_CAP if limit is None else limit)
        out = plan(x, w)
        tracemalloc.start()
        plan(x, w, out=out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= plan.workspace_bytes + (128 << 10), str(plan)


def test_a_large_image_stays_under_the_cap(cuda_device: Any) -> None:
    plan = gpuconv.plan_conv2d(
        (1, 1, 30000, 30000), (1, 1, 255, 255), algorithm="fft", backend="cuda"
    )
    assert plan.workspace_bytes <= fft.WORKSPACE_CAP
    assert plan.workspace_bytes > 16 << 20  # and uses it
    limited = gpuconv.plan_conv2d(
        (1, 1, 3000, 3000), (1, 1, 255, 255), workspace_limit=0, backend="cuda"
    )
    candidate = next(c for c in limited.candidates if c.algorithm == "fft")
    assert candidate.rejected == "no tile's spectra fit in the workspace"


def test_auto_never_chooses_it(cuda_device: Any) -> None:
    plan = gpuconv.plan_conv2d((1, 1, 2048, 2048), (1, 1, 511, 511), backend="cuda")
    candidate = next(c for c in plan.candidates if c.algorithm == "fft")
    assert plan.algorithm != "fft"
    assert "NaN" in str(candidate.rejected)
    assert candidate.cost is not None
    assert candidate.cost < plan.cost  # it would have been the fastest
