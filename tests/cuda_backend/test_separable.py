"""What is special to separable: only filters of rank 1, the look at w, and its two passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda_backend import separable, tile
from gpuconv.plan import Plan, choose
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import MEMORY_ORDERS, assert_close, in_memory_order, random_array
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import emulated_device

TYPES = [
    ("float32", "float32"),
    ("float64", "float64"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("uint8", "float32"),
    ("uint16", "float32"),
    ("float32", "float64"),
    ("uint8", "uint8"),
    ("uint8", "int64"),
    ("int16", "int16"),
]
SIZES = [(2, 2), (3, 3), (4, 7), (5, 5), (7, 2), (9, 6), (2, 9), (15, 15), (31, 4), (63, 63)]


@pytest.fixture
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiles of large images for small ones too."""
    monkeypatch.setattr(separable, "_TILES_PER_SM", 0)
    monkeypatch.setattr(separable, "_TALL_FILTER", 0)
    clear()
    yield
    clear()


def clear() -> None:
    separable._block.cache_clear()
    separable.prepare.cache_clear()


def rank_one(rng: np.random.Generator, size: tuple[int, int], dtype: str) -> Any:
    """A filter with the rounding of an outer product; of small integers in exact dtypes."""
    exact = np.dtype(dtype).kind in "iu" if dtype != "bfloat16" else False
    u, v = (random_array(rng, (n,), dtype, exact) for n in size)
    w = np.multiply.outer(u, v).astype(u.dtype)
    # Products of 16-bit floats round to fewer digits than their sums have.
    if w.dtype.itemsize == 2 and not exact:
        w = np.multiply.outer(*(random_array(rng, (n,), dtype, True) for n in size))
        w[0, 0] = w[0, 0] or 1
        w = np.multiply.outer(w[:, 0], w[0]).astype(u.dtype)
    return w[None, None]


def plan_of(x: Any, w: Any, device: Any, bias: Any = None, **options: Any) -> Plan:
    problem = describe(
        "test", w.ndim - 2, x.shape, w.shape, x.dtype, w.dtype,
        bias=None if bias is None else bias.dtype, **options,
    )  # fmt: skip
    return choose("test", problem, "cuda", device, "separable")


def compute(device: Any, x: Any, w: Any, bias: Any = None, **options: Any) -> Any:
    plan = plan_of(x, w, device, bias, **options)
    y = on_host(plan(*(on_device(device, a) for a in (x, w, bias))))
    assert_close(plan.problem, y, x, w, bias)
    return y


# ---- results -------------------------------------------------------------------------------


@pytest.mark.parametrize(("x_dtype", "w_dtype"), TYPES)
def test_every_filter_size(cuda_device: Any, x_dtype: str, w_dtype: str) -> None:
    rng = np.random.default_rng(0)
    for size, mode in zip(SIZES, itertools.cycle(PADDING_MODES), strict=False):
        x, w = random_array(rng, (2, 1, 35, 139), x_dtype), rank_one(rng, size, w_dtype)
        y_dtype = plan_of(x, w, cuda_device, padding="same").problem.y_dtype
        bias = random_array(rng, (1,), y_dtype) if size[0] % 2 else None
        compute(cuda_device, x, w, bias, padding="same", padding_mode=mode)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "uint8"])
def test_tall_tiles(cuda_device: Any, tall_tiles: None, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for size in SIZES[:-1]:
        x, w = random_array(rng, (1, 1, 71, 133), dtype), rank_one(rng, size, dtype)
        compute(cuda_device, x, w, padding="same", padding_mode="symmetric")


def test_images_around_the_size_of_a_tile(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    for height, width in itertools.product((1, 31, 32, 33, 65), (1, 127, 128, 129, 257)):
        x, w = random_array(rng, (1, 1, height, width), "float32"), rank_one(rng, (4, 3), "float32")
        compute(cuda_device, x, w, padding="same")


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pads_longer_than_the_image(cuda_device: Any, mode: str) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 7), (5, 16)):
        x, w = random_array(rng, (2, 1, height, width), "float32"), rank_one(rng, (3, 6), "float32")
        compute(cuda_device, x, w, padding=((9, 21), (40, 13)), padding_mode=mode)


def test_a_flipped_filter_and_every_memory_order(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (2, 1, 37, 135), "float32"), rank_one(rng, (4, 3), "float32")
    for flip in (False, True):
        problem = replace(plan_of(x, w, cuda_device, padding=1).problem, flip=flip)
        plan = choose("test", problem, "cuda", cuda_device, "separable")
        y = on_host(plan(on_device(cuda_device, x), on_device(cuda_device, w)))
        assert_close(problem, y, x, w)
        for order in MEMORY_ORDERS:
            given = [in_memory_order(a, order, 1) for a in (x, w)]
            out = in_memory_order(np.full_like(y, 1), order, 1)
            again = plan(
                *(on_device(cuda_device, a) for a in given), out=on_device(cuda_device, out)
            )
            np.testing.assert_array_equal(on_host(again), y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_error_bound(cuda_device: Any, dtype: str) -> None:
    """That of the direct sum, for weights off by as much as their factors may be."""
    rng = np.random.default_rng(0)
    eps = np.finfo(dtype).eps
    for size in SIZES:
        wide = rank_one(rng, size, "float64")
        w = (wide * (1 + rng.uniform(-0.4, 0.4, wide.shape) * eps)).astype(dtype)
        for seed in range(3):
            x = random_array(np.random.default_rng(seed), (1, 1, 40, 80), dtype)
            compute(cuda_device, x, w, padding="same")


def test_sums_do_not_depend_on_the_tiles_or_the_batch(
    cuda_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for dtype, size in itertools.product(("float32", "uint8"), ((3, 3), (20, 9))):
        x, w = random_array(rng, (3, 1, 70, 150), dtype), rank_one(rng, size, "float32")
        clear()
        usual = compute(cuda_device, x, w, padding="same")
        alone = compute(cuda_device, x[1:2], w, padding="same")
        np.testing.assert_array_equal(alone, usual[1:2])
        for index in ("int32", "int64"):
            with monkeypatch.context() as patch:
                patch.setattr(separable, "_TILES_PER_SM", 0)
                patch.setattr(separable, "_TALL_FILTER", 0)
                patch.setattr(tile, "index_type", lambda *_, index=index: index)
                clear()
                again = compute(cuda_device, x, w, padding="same")
            np.testing.assert_array_equal(again, usual)
    clear()


def test_nan_and_infinity_stay_where_their_windows_are(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    for size in ((3, 3), (4, 5), (9, 6), (20, 7)):
        x, w = random_array(rng, (1, 1, 60, 140), "float32"), rank_one(rng, size, "float32")
        x[0, 0, 30, 70], x[0, 0, 3, 127] = np.nan, np.inf
        y = compute(cuda_device, x, w)
        clean = np.ones(y.shape, bool)
        for row, column in ((30, 70), (3, 127)):
            top = max(row - size[0] + 1, 0)
            clean[0, 0, top : row + 1, column - size[1] + 1 : column + 1] = False
        assert np.isfinite(y[clean]).all()
        assert not np.isfinite(y[~clean]).any()


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8"])
def test_filters_of_higher_rank_are_refused_and_nothing_is_written(
    cuda_device: Any, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (1, 1, 20, 20), dtype), rank_one(rng, (3, 5), dtype)
    for off in (w + random_array(rng, w.shape, dtype), w + np.eye(3, 5, dtype=dtype)):
        plan = plan_of(x, off.astype(dtype), cuda_device)
        out = on_device(cuda_device, np.full((1, 1, 18, 16), 7, plan.problem.y_dtype.numpy))
        with pytest.raises(ValueError, match="outer products of a column and a row"):
            plan(on_device(cuda_device, x), on_device(cuda_device, off.astype(dtype)), out=out)
        assert (on_host(out) == 7).all()


def test_auto_never_chooses_it(cuda_device: Any) -> None:
    plan = gpuconv.plan_conv2d((1, 1, 2048, 2048), (1, 1, 31, 31), backend="cuda")
    assert plan.algorithm != "separable"
    rejected = next(c.rejected for c in plan.candidates if c.algorithm == "separable")
    assert rejected is not None
    assert "w's values" in rejected
    named = gpuconv.plan_conv2d(
        (1, 1, 2048, 2048), (1, 1, 31, 31), backend="cuda", algorithm="separable"
    )
    assert named.algorithm == "separable"
    assert named.workspace_bytes == 0
    assert named.cost < plan.cost


def test_what_it_refuses(cuda_device: Any) -> None:
    problem = ConvProblem((30, 30), (3, 3))
    assert separable.supports(problem, cuda_device) is True
    for changes, reason in (
        ({"operation": "wgrad"}, "fprop only"),
        ({"in_channels": 2}, "one channel"),
        ({"stride": (2, 1)}, "strides and dilations"),
        ({"dilation": (1, 2)}, "strides and dilations"),
        ({"filter": (1, 9)}, "second pass"),
        ({"input": (900, 900), "filter": (500, 500)}, "shared memory"),
    ):
        verdict = separable.supports(replace(problem, **changes), cuda_device)
        assert not verdict
        assert reason in verdict.reason


# ---- how it uses memory ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["descending", "random", "interleaved"])
def test_no_race(order: Any) -> None:
    rng = np.random.default_rng(0)
    with (
        emulated_device(mode="watch", order=order, block_order="shuffled") as device,
        gpuconv.use_backend("cuda"),
    ):
        x, w = random_array(rng, (2, 1, 35, 131), "float32"), rank_one(rng, (6, 5), "float32")
        compute(device, x, w, padding="same", padding_mode="reflect")  # sums change hands
        compute(device, x[..., :128], w, padding=((3, 2), (4, 4)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_banks_and_sectors(dtype: str) -> None:
    rng = np.random.default_rng(0)
    with emulated_device(mode="watch") as device, gpuconv.use_backend("cuda"):
        x, w = random_array(rng, (1, 1, 64, 384), dtype), rank_one(rng, (9, 6), dtype)
        y = compute(device, x, w, padding="same")
        report = device.report
    total = report.total
    assert total("wavefronts", "shared") == total("ideal_wavefronts", "shared"), str(report)
    assert total("sectors", "global") <= 1.25 * total("ideal_sectors", "global"), str(report)
    assert total("sectors", "global") <= 1.5 * (x.nbytes + y.nbytes) / 32, str(report)
    assert not any(site.uninitialised for site in report.sites), str(report)


def test_no_access_out_of_bounds() -> None:
    rng = np.random.default_rng(0)
    with emulated_device(mode="sanitize") as device, gpuconv.use_backend("cuda"):
        for size, width in itertools.product(((2, 2), (5, 7), (20, 3)), (6, 129, 131)):
            x, w = random_array(rng, (2, 1, 18, width), "float32"), rank_one(rng, size, "float32")
            compute(device, x, w, padding="same", padding_mode="symmetric")
