"""What is special to filter2d_mma: its tiles and bands, its leads, its marks, its use of memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda_backend import compiler, filter2d_mma, launch, tile
from gpuconv.cuda_backend.filter2d_mma import MEDIUM, NARROW, SMALL
from gpuconv.plan import Plan, choose
from gpuconv.problem import PADDING_MODES, describe
from gpuconv.testing import (
    MEMORY_ORDERS,
    assert_close,
    expected,
    in_memory_order,
    random_array,
)
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import EmulatedDevice, emulated_device

# dtypes, and precisions of float32
KINDS = {
    "float16": ("float16", "ieee"),
    "bfloat16": ("bfloat16", "ieee"),
    "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"),
}
# One slice to eleven: in one step, in equal ones, in unequal ones.
SIZES = [
    (1, 1), (3, 3), (5, 5), (7, 7), (9, 9), (2, 10), (15, 15), (4, 26), (31, 31), (3, 63), (2, 90),
    (33, 1), (1, 74),
]  # fmt: skip


def tiles_of(kind: str) -> tuple[Any, ...]:
    return filter2d_mma._TILES[3 if kind == "tf32x3" else 1]


each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """only(tile): the one that plans made from then on may choose."""

    def override(block: Any) -> None:
        monkeypatch.setattr(filter2d_mma, "_TILES", dict.fromkeys((1, 3), (block,)))
        forget()

    yield override
    monkeypatch.undo()
    forget()


def forget() -> None:
    filter2d_mma._choose.cache_clear()
    filter2d_mma.prepare.cache_clear()
    choose.cache_clear()


def plan_of(kind: str, x: Any, w: Any, device: Any, bias: Any = None, **options: Any) -> Plan:
    problem = describe(
        "test", w.ndim - 2, x.shape, w.shape, x.dtype, w.dtype, precision=KINDS[kind][1],
        bias=None if bias is None else bias.dtype, **options,
    )  # fmt: skip
    return choose("test", problem, "cuda", device, "filter2d_mma")


def compute(
    kind: str, device: Any, x: Any, w: Any, bias: Any = None, exact: bool = False, **options: Any
) -> Any:
    plan = plan_of(kind, x, w, device, bias, **options)
    y = on_host(plan(*(on_device(device, a) for a in (x, w, bias))))
    assert_close(plan.problem, y, x, w, bias, exact=exact)
    return y


def images(
    kind: str, shape: tuple[int, ...], filter: tuple[int, ...], integers: bool = False
) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    dtype = KINDS[kind][0]
    x = random_array(rng, (shape[0], 1, *shape[1:]), dtype, integers)
    return x, random_array(rng, (1, 1, *filter), dtype, integers)


# ---- results ---------------------------------------------------------------------------------


@each_kind
def test_every_filter_size(cuda_device: Any, kind: str) -> None:
    for (r, s), mode in zip(SIZES, itertools.cycle(PADDING_MODES), strict=False):
        x, w = images(kind, (1, 35, 139), (r, s))
        bias = random_array(np.random.default_rng(1), (1,), x.dtype) if r % 2 else None
        compute(kind, cuda_device, x, w, bias, padding="same", padding_mode=mode)


@pytest.mark.parametrize(
    ("kind", "block"), [(kind, block) for kind in KINDS for block in tiles_of(kind)]
)
def test_images_around_the_size_of_a_tile(
    cuda_device: Any, only: Callable[[Any], None], kind: str, block: Any
) -> None:
    only(block)
    for height, width in itertools.product(
        (1, block.height - 1, block.height, block.height + 1),
        (1, 7, block.width - 1, block.width, block.width + 1),
    ):
        x, w = images(kind, (1, height, width), (3, 5))
        compute(kind, cuda_device, x, w, padding="same_lower")


@each_kind
def test_sums_depend_on_neither_the_tile_nor_the_batch(
    cuda_device: Any, only: Callable[[Any], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = tiles_of(kind)
    for size in ((3, 3), (9, 20), (5, 75)):
        x, w = images(kind, (3, 66, 130), size)
        results = []
        for block in blocks:
            only(block)
            results.append(compute(kind, cuda_device, x, w, padding=3))
        with monkeypatch.context() as patch:
            patch.setattr(tile, "index_type", lambda *_: "int64")
            forget()
            results.append(compute(kind, cuda_device, x, w, padding=3))
            forget()
        for n in range(3):
            alone = compute(kind, cuda_device, x[n : n + 1], w, padding=3)
            np.testing.assert_array_equal(alone, results[0][n : n + 1])
        for result in results[1:]:
            np.testing.assert_array_equal(results[0], result)


@each_kind
def test_every_alignment(cuda_device: Any, kind: str) -> None:
    """Rows and pads at every distance from a multiple of 16 bytes."""
    for width, pad in itertools.product((72, *range(65, 70)), (*range(9), 16)):
        x, w = images(kind, (1, 5, width), (2, 3))
        compute(kind, cuda_device, x, w, padding=((1, 1), (pad, 2)))
    whole, w = images(kind, (1, 9, 120), (2, 3))
    for left in range(9):  # the window of a larger image
        compute(kind, cuda_device, whole[:, :, 2:, left : left + 70], w, padding=1)


@each_kind
def test_memory_orders(cuda_device: Any, kind: str) -> None:
    x, w = images(kind, (2, 37, 136), (5, 5))
    plan = plan_of(kind, x, w, cuda_device, padding=2)
    y = compute(kind, cuda_device, x, w, padding=2)
    for order, out_order in itertools.product(MEMORY_ORDERS, MEMORY_ORDERS):
        given = (in_memory_order(a, order, 1) for a in (x, w))
        out = in_memory_order(np.full_like(y, 1), out_order, 1)
        again = plan(*(on_device(cuda_device, a) for a in given), out=on_device(cuda_device, out))
        np.testing.assert_array_equal(on_host(again), y)
    sliced = np.repeat(np.repeat(x, 2, axis=2), 3, axis=3)[:, :, ::-2, 1::3][:, :, ::-1]
    np.testing.assert_array_equal(compute(kind, cuda_device, sliced, w, padding=2), y)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("kind", ["float16", "tf32"])
def test_pads_longer_than_the_image(cuda_device: Any, kind: str, mode: str) -> None:
    for height, width in ((1, 1), (1, 7), (3, 2), (5, 16)):
        for size in ((3, 3), (4, 2), (7, 7)):
            x, w = images(kind, (2, height, width), size)
            options: Any = {"padding": ((9, 21), (40, 13)), "padding_mode": mode}
            compute(kind, cuda_device, x, w, **options)


@each_kind
def test_signals(cuda_device: Any, kind: str) -> None:
    for length, taps in ((1, 1), (200, 9), (127, 100)):
        x, w = images(kind, (2, length), (taps,))
        compute(kind, cuda_device, x, w, padding="same")


@each_kind
def test_every_channel_has_its_own_filter(cuda_device: Any, kind: str) -> None:
    rng = np.random.default_rng(0)
    dtype = KINDS[kind][0]
    for channels, size, mode in zip((2, 3, 8), (3, 7, 20), PADDING_MODES, strict=False):
        x = random_array(rng, (2, channels, 28, 28), dtype)
        w, bias = (random_array(rng, (channels, *s), dtype) for s in ((1, size, size), ()))
        options: Any = {"padding": "same", "padding_mode": mode, "groups": channels}
        plan = plan_of(kind, x, w, cuda_device, bias, **options)
        y = compute(kind, cuda_device, x, w, bias, **options)
        for order in MEMORY_ORDERS:
            given = (in_memory_order(a, order, 1) for a in (x, w))
            again = plan(*(on_device(cuda_device, a) for a in given), on_device(cuda_device, bias))
            np.testing.assert_array_equal(on_host(again), y)


@each_kind
def test_integers_are_summed_without_an_error(cuda_device: Any, kind: str) -> None:
    for size in ((3, 3), (7, 7), (9, 25)):
        x, w = images(kind, (1, 40, 70), size, integers=True)
        compute(kind, cuda_device, x, w, exact=kind.startswith("tf32"), padding="same")


def test_three_products_are_near_float32_and_one_is_not(cuda_device: Any) -> None:
    errors = {}
    for kind in ("tf32", "tf32x3"):
        x, w = images(kind, (1, 70, 140), (9, 9))
        y = compute(kind, cuda_device, x, w)
        y_ref, magnitudes = expected(plan_of(kind, x, w, cuda_device).problem, x, w)
        errors[kind] = float(np.max(np.abs(y - y_ref) / magnitudes))
    assert errors["tf32x3"] < 8 * 2.0**-23
    assert 2.0**-16 < errors["tf32"] < 2.0**-10


# ---- what is not finite ----------------------------------------------------------------------


@each_kind
def test_nan_and_infinity_stay_where_their_windows_are(cuda_device: Any, kind: str) -> None:
    for r, s in ((1, 1), (3, 3), (4, 6), (9, 9), (3, 20)):
        x, w = images(kind, (2, 40, 140), (r, s))
        places = (0, 20, 70, np.nan), (0, 3, 127, np.inf), (1, 0, 0, -np.inf), (1, 39, 139, np.nan)
        clean = np.ones((2, 41 - r, 141 - s), bool)
        for n, row, column, value in places:
            x[n, 0, row, column] = value
            clean[n, max(row - r + 1, 0) : row + 1, max(column - s + 1, 0) : column + 1] = False
        y = compute(kind, cuda_device, x, w)[:, 0].astype(np.float32)
        assert np.isfinite(y[clean]).all()
        assert not np.isfinite(y[~clean]).any()


@each_kind
def test_sums_beside_a_nan_are_those_without(cuda_device: Any, kind: str) -> None:
    """What is computed anew has no more than the error that it would have."""
    x, w = images(kind, (1, 20, 70), (5, 5))
    y = compute(kind, cuda_device, x, w, padding=2)
    x[0, 0, 10, 30] = np.nan
    marked = compute(kind, cuda_device, x, w, padding=2)
    far = np.ones(y.shape, bool)
    far[0, 0, 8:13, 16:48] = False  # in none of the products that have it
    np.testing.assert_array_equal(marked[far], y[far])


@each_kind
def test_a_pads_zero_is_multiplied(cuda_device: Any, kind: str) -> None:
    x, w = images(kind, (1, 3, 3), (2, 2))
    x[:], w[:] = 1, 0
    w[0, 0, 0, 0] = np.inf
    y = compute(kind, cuda_device, x, w, padding=1)[0, 0].astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), [[1, 1, 1, 1], *[[1, 0, 0, 0]] * 3])


@each_kind
def test_a_bias_that_is_not_finite(cuda_device: Any, kind: str) -> None:
    x, w = images(kind, (1, 8, 9), (3, 3))
    for value in (np.nan, np.inf):
        y = compute(kind, cuda_device, x, w, np.full((1,), value, x.dtype)).astype(np.float32)
        np.testing.assert_array_equal(y, np.full_like(y, value))


def test_numbers_at_the_end_of_their_type(cuda_device: Any) -> None:
    x, w = images("float16", (1, 20, 70), (3, 3))
    x[:], w[:] = 60000, 0.5
    assert np.isinf(compute("float16", cuda_device, x, w)).all()
    w[:] = 1 / 16
    assert np.isfinite(compute("float16", cuda_device, x, w)).all()
    x, w = images("tf32", (1, 20, 70), (3, 3))
    x[:], w[:] = np.finfo(np.float32).max, 1 / 16  # tf32 of it is infinite
    for kind in ("tf32", "tf32x3"):
        assert np.isfinite(compute(kind, cuda_device, x, w)).all()


# ---- choices ---------------------------------------------------------------------------------


class Loader(EmulatedDevice):
    """`loaded`: the kernels that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: set[Any] = set()

    def load(self, source: str, macros: Any, kernel: str | None = None) -> Any:
        self.loaded.add((source, launch.freeze(macros)))


def test_variants_hold_whatever_a_problem_asks_for(
    only: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {(stem, launch.freeze(macros)) for stem, macros in filter2d_mma.variants()}
    device = Loader()
    tiles = [(kind, block) for kind in KINDS for block in tiles_of(kind)]
    for (kind, block), index in itertools.product(tiles, ("int32", "int64")):
        only(block)
        monkeypatch.setattr(tile, "index_type", lambda *_, index=index: index)
        x, w = images(kind, (1, 30, 40), (3, 3))
        problem = plan_of(kind, x, w, device).problem
        filter2d_mma.prepare(problem, device, launch.contiguous(problem))
    assert device.loaded == listed


def test_what_it_refuses(cuda_device: Any) -> None:
    problem = describe("test", 2, (1, 1, 30, 30), (1, 1, 3, 3), "float16", "float16")
    assert filter2d_mma.supports(problem, cuda_device) is True
    for changes, reason in (
        ({"operation": "dgrad"}, "fprop only"),
        ({"in_channels": 2}, "one filter for each channel"),
        ({"in_channels": 2, "out_channels": 4, "groups": 2}, "one filter for each channel"),
        (
            {"in_channels": 2, "out_channels": 2, "groups": 2, "channels_last": True},
            "neighbours of a row",
        ),
        ({"stride": (2, 1)}, "no stride"),
        ({"dilation": (1, 2)}, "no stride or dilation"),
        ({"filter": (400, 400)}, "shared memory"),
    ):
        verdict = filter2d_mma.supports(replace(problem, **changes), cuda_device)
        assert not verdict
        assert reason in verdict.reason
    for types, reason in (
        (("float32", "float32"), "no full float32"),
        (("float64", "float64"), "no kernel"),
        (("float16", "float32"), "one dtype"),
    ):
        mixed = describe("test", 2, (1, 1, 30, 30), (1, 1, 3, 3), *types)
        verdict = filter2d_mma.supports(mixed, cuda_device)
        assert not verdict
        assert reason in verdict.reason


def test_before_sm_80_it_takes_float16_alone() -> None:
    with emulated_device(arch="sm_75") as device, gpuconv.use_backend("cuda"):
        for kind in KINDS:
            x, w = images(kind, (1, 40, 70), (5, 12))
            if kind == "float16":
                compute(kind, device, x, w, padding="same")
            else:
                with pytest.raises(ValueError, match="needs sm_80"):
                    plan_of(kind, x, w, device)


def test_the_largest_filters_of_images_fit() -> None:
    for kind, limit in itertools.product(KINDS, (64 << 10, 99 << 10, 227 << 10)):
        dtype, precision = KINDS[kind]
        problem = describe(
            "test", 2, (1, 1, 4096, 4096), (1, 1, 63, 63), dtype, dtype, precision=precision
        )
        if limit > 64 << 10 or problem.x_dtype.is_half:
            assert filter2d_mma._shared_bytes(problem, NARROW) <= limit


@pytest.mark.parametrize(
    ("kind", "size", "algorithm"),
    [
        ("float16", 3, "filter2d"),  # limited by memory in either
        ("float16", 15, "filter2d_mma"),
        ("bfloat16", 31, "filter2d_mma"),
        ("tf32", 5, "filter2d"),
        ("tf32", 31, "filter2d_mma"),
    ],
)
def test_auto_takes_it_where_products_are_the_limit(kind: str, size: int, algorithm: str) -> None:
    dtype, precision = KINDS[kind]
    shapes = (1, 1, 4096, 4096), (1, 1, size, size)
    problem = describe("test", 2, *shapes, dtype, dtype, padding="same", precision=precision)
    plan = choose("test", problem, "cuda", EmulatedDevice())
    assert plan.algorithm == algorithm, str(plan)
    assert plan.workspace_bytes == 0


# ---- how it uses memory ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["descending", "random", "interleaved"])
def test_no_race(order: Any, only: Callable[[Any], None]) -> None:
    with (
        emulated_device(mode="watch", order=order, block_order="shuffled") as device,
        gpuconv.use_backend("cuda"),
    ):
        for kind, block in ("float16", MEDIUM), ("tf32", SMALL), ("tf32x3", SMALL):
            only(block)
            x, w = images(kind, (2, 35, 67), (3, 20))
            x[1, 0, 20, 20] = np.nan  # computed anew
            compute(kind, device, x, w, padding="same", padding_mode="reflect")


@pytest.mark.parametrize(
    ("kind", "block", "size"),
    [
        ("float16", MEDIUM, (3, 3)),
        ("float16", SMALL, (9, 17)),
        ("tf32", SMALL, (9, 9)),
        ("tf32x3", SMALL, (2, 63)),
    ],
)
def test_banks_and_sectors(
    kind: str, block: Any, size: tuple[int, int], only: Callable[[Any], None]
) -> None:
    only(block)
    with emulated_device(mode="watch") as device, gpuconv.use_backend("cuda"):
        given = images(kind, (1, 65, 256), size)
        x, w = (device.empty(a.shape, a.dtype) for a in given)
        x[...], w[...] = given
        compute(kind, device, x, w, padding="same")
        report = device.report
    assert not any(site.uninitialised for site in report.sites), str(report)
    source = (compiler.source_folder() / "filter2d_mma.cu").read_text().splitlines()
    products = [
        site
        for site in report.sites
        if (site.space, site.operation) == ("shared", "load")
        and any(word in source[int(site.line.split()[0].split(":")[-1]) - 1]
                for word in ("ldmatrix", "taps["))
    ]  # fmt: skip
    assert {site.bytes for site in products} == {4, 16}
    assert all(site.wavefronts == site.ideal_wavefronts for site in products)
    # A tile's first and last chunk of a row share their sectors with the tiles beside it.
    whole = [s for s in report.sites if s.space == "global" and s.bytes == 16]
    ideal = sum(s.ideal_sectors for s in whole)
    assert ideal >= 0.8 * (x.nbytes + x.nbytes) / 32
    assert sum(s.sectors for s in whole) <= 1.3 * ideal, str(report)
