"""implicit_gemm_mma: shapes around its tiles, parts of sums, every way to load, every precision."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes
from gpuconv.arrays import HostArray
from gpuconv.cuda_backend import compiler, implicit_gemm_mma, launch, occupancy, rates
from gpuconv.cuda_backend.implicit_gemm_mma import (
    GATHER,
    HALO,
    NARROW,
    PACKED,
    PIXELS,
    SMALL,
    VECTORS,
    Tile,
)
from gpuconv.plan import No, Plan, choose, serving
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import (
    MEMORY_ORDERS,
    assert_close,
    expected,
    in_memory_order,
    random_array,
    random_case,
)
from tests.cuda_backend.conftest import on_device, on_host
from tests.cuda_backend.loads import assert_warmup_loads
from tests.emulator import EmulatedDevice, emulated_device

Force = Callable[..., None]
KINDS = ("float16", "bfloat16", "tf32", "tf32x3", "float64")  # dtypes, and precisions of float32
CACHED = ("prepare_whole", "prepare_split", "_choose", "_cheapest", "_slices", "_halo")


def _forget() -> None:
    choose.cache_clear()
    serving.cache_clear()  # and with them the gradients, which keep plans of their own
    for name in CACHED:
        getattr(implicit_gemm_mma, name).cache_clear()


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Force]:
    """force(name=value) overrides what the module decides with, for plans made from then on."""

    def override(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(implicit_gemm_mma, name, value)
        _forget()

    yield override
    monkeypatch.undo()
    _forget()


def only(choice: Any) -> Callable[..., tuple[Any, ...]]:
    """Of `_tiles` or `_forms`: no other."""
    return lambda *args: (choice,)


def typed(kind: str) -> dict[str, str]:
    """The dtype and the precision of a kind."""
    if kind.startswith("tf32"):
        return {"dtype": "float32", "precision": kind}
    return {"dtype": kind, "precision": "ieee"}


def tiles_of(kind: str, form: int) -> tuple[Tile, ...]:
    size = dtypes.of(typed(kind)["dtype"]).itemsize
    return implicit_gemm_mma._TILES[size, 3 if kind == "tf32x3" else 1][form]


def plan_of(problem: ConvProblem, device: Any) -> Plan:
    return choose("test", problem, "cuda", device, "implicit_gemm_mma")


def run(plan: Plan, device: Any, *arrays: HostArray | None, out: Any = None) -> HostArray:
    result = plan(*(on_device(device, a) for a in arrays), out=on_device(device, out))
    return np.asarray(on_host(result))


def problem_of(x: HostArray, w: HostArray, precision: str, **options: Any) -> ConvProblem:
    return describe(
        "test", w.ndim - 2, x.shape, w.shape, x.dtype, w.dtype, precision=precision, **options
    )


def conv(
    device: Any,
    kind: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    integers: bool = False,
    bias: bool = False,
    **options: Any,
) -> tuple[Plan, HostArray, HostArray, HostArray | None, HostArray]:
    """Plan and compute one problem, check it, and hand back all there is of it."""
    dtype, precision = typed(kind).values()
    rng = np.random.default_rng(0)
    x = random_array(rng, x_shape, dtype, integers)
    w = random_array(rng, w_shape, dtype, integers)
    b = random_array(rng, w_shape[:1], dtype, integers) if bias else None
    problem = problem_of(x, w, precision, bias=True if bias else None, **options)
    plan = plan_of(problem, device)
    y = run(plan, device, x, w, b)
    assert_close(problem, y, x, w, b, exact=integers and not problem.y_dtype.is_half)
    return plan, x, w, b, y


def images(form: int, n: int, channels: int, *extents: int) -> dict[str, Any]:
    """x's shape and layout for a way to load; `packed` in channels-last memory by channels < 0."""
    last = form == VECTORS or channels < 0
    c = abs(channels)
    layout = {1: ("NCW", "NWC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}[len(extents)][last]
    return {"x_shape": (n, *extents, c) if last else (n, c, *extents), "layout": layout}


# ---- shapes ----------------------------------------------------------------------------------

FORMS = {VECTORS: "vectors", GATHER: "gather", PACKED: "packed"}
EVERY_TILE = [
    pytest.param(form, tile, id=f"{FORMS[form]}-{tile.channels}x{tile.pixels}")
    for form in FORMS
    for tile in tiles_of("float16", form)
]


@pytest.mark.parametrize(("form", "tile"), EVERY_TILE)
def test_shapes_around_the_tile(cuda_device: Any, force: Force, form: int, tile: Tile) -> None:
    force(_tiles=only(tile))
    depths = (7, 33, 65) if form == PACKED else (8, 32, 40, 136)
    rows = (tile.channels - 1, 1, tile.channels, tile.channels + 1)
    for n, (k, depth) in enumerate(itertools.product(rows, depths)):
        pixels = tile.pixels + (-1, 0, 1, -9)[n % 4]
        depth = -depth if form == PACKED and n % 2 else depth
        options = images(form, 1, depth, pixels)
        conv(cuda_device, "float16", w_shape=(k, abs(depth), 1), bias=n % 3 == 0, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "channels"), [(VECTORS, 40), (GATHER, 40), (PACKED, 9), (2, -9)])
def test_every_tile_of_a_type_gives_the_same_bits(
    cuda_device: Any, force: Force, kind: str, form: int, channels: int
) -> None:
    results = []
    options = {"padding": (1, 2), "dilation": 2, "stride": (2, 1)}
    options |= images(form, 3, channels, 9, 11)
    for tile in tiles_of(kind, form):
        force(_tiles=only(tile))
        w_shape = (34, abs(channels), 3, 2)
        results.append(conv(cuda_device, kind, w_shape=w_shape, bias=True, **options)[-1])
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("form", [*FORMS, HALO])
def test_any_number_of_stages_gives_the_same_bits(
    cuda_device: Any, force: Force, form: int
) -> None:
    results = []
    force(_forms=only(form))
    channels = 33 if form == PACKED else 32
    options = images(form, 1, channels, 6, 6)
    for stages in (2, 3, 4, 5):
        force(_tiles=only(dataclasses.replace(SMALL, stages=stages)))
        results.append(conv(cuda_device, "float16", w_shape=(9, channels, 3, 3), **options)[-1])
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("block", range(4))
def test_random_problems_with_many_channels(cuda_device: Any, block: int) -> None:
    served = 0
    for seed in range(120 * block, 120 * (block + 1)):
        names = ("float16", "float32", "float32", "float64", "bfloat16")
        case = random_case(seed, channels=40, largest=8, dtypes=names, mixed_dtypes=False)
        precision = ("tf32", "tf32x3")[seed % 2]
        problem = dataclasses.replace(case.problem(), precision=precision, flip=seed % 5 == 0)
        try:
            plan = plan_of(problem, cuda_device)
        except ValueError:
            continue
        x, w, bias = case.arrays()
        assert_close(plan.problem, run(plan, cuda_device, x, w, bias), x, w, bias)
        served += 1
    assert served > 100


@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pads_longer_than_the_input(cuda_device: Any, mode: str, form: int) -> None:
    channels = 2 * (5 if form == PACKED else 8)
    options: dict[str, Any] = {"padding": ((7, 5), (0, 9), (6, 3)), "padding_mode": mode}
    options |= images(form, 2, channels, 3, 4, 2)
    w_shape = (6, channels // 2, 3, 2, 3)
    conv(cuda_device, "float16", w_shape=w_shape, groups=2, dilation=(2, 1, 1), stride=2, **options)


@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
def test_few_channels_of_many_groups_and_of_stems(cuda_device: Any, form: int) -> None:
    for channels in range(1, 9) if form == PACKED else (8, 16, 24):
        options = images(form, 2, -channels if channels % 2 else channels, 9, 9)
        if form != PACKED:
            options = images(form, 2, channels, 9, 9)
        conv(cuda_device, "float16", w_shape=(5, channels, 7, 7), stride=2, padding=3, **options)


def test_integer_valued_data_is_exact(cuda_device: Any) -> None:
    for kind in ("tf32", "tf32x3", "float64"):
        for form, channels in ((VECTORS, 16), (GATHER, 16), (PACKED, 5)):
            options = images(form, 2, channels, 7, 6)
            conv(cuda_device, kind, w_shape=(7, channels, 3, 3), integers=True, **options)


# ---- pixels that are copied as they lie ------------------------------------------------------

PIXEL_TILES = tiles_of("float16", PIXELS)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """LOAD of the launches that are prepared, and the bytes of a copy of pixels."""
    seen = []
    original = implicit_gemm_mma._form_of

    def spy(problem: ConvProblem, layout: launch.Layout, index: str) -> int:
        form = original(problem, layout, index)
        seen.append((form, implicit_gemm_mma._pixel_bytes(problem, layout)))
        return form

    monkeypatch.setattr(implicit_gemm_mma, "_form_of", spy)
    return seen


@pytest.mark.parametrize("tile", PIXEL_TILES, ids=lambda t: f"{t.channels}x{t.pixels}")
def test_pixels_around_the_tile(
    cuda_device: Any, force: Force, loads: list[tuple[int, int]], tile: Tile
) -> None:
    force(_tiles=only(tile))
    for n, (k, depth) in enumerate(
        itertools.product((tile.channels - 1, 1, tile.channels + 1), (3, 8, 33, 72))
    ):
        pixels = tile.pixels // 2 + (-4, 0, 4, 8)[n % 4]
        conv(cuda_device, "float16", (3, depth, pixels), (k, depth, 1), bias=n % 3 == 0)
    assert set(loads) == {(PIXELS, 8), (PIXELS, 16)}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("channels", [6, 48, 196])
def test_pixels_give_the_bits_of_elements(
    cuda_device: Any, force: Force, loads: list[tuple[int, int]], kind: str, channels: int
) -> None:
    in_place = implicit_gemm_mma._in_place
    for groups, shape in ((1, (3, channels, 6, 12)), (2, (2, channels, 4, 3, 5))):
        w_shape = (34, channels // groups, *(1,) * (len(shape) - 2))
        force(_PART_LENGTH=64, _in_place=in_place)
        made = conv(cuda_device, kind, shape, w_shape, bias=True, groups=groups)
        plan, x, w, bias, y = made
        for memory in MEMORY_ORDERS:
            for axis in (1, -1):
                again = run(plan, cuda_device, in_memory_order(x, memory, axis), w, bias)
                np.testing.assert_array_equal(again, y)
        force(_in_place=lambda problem: False)
        plan = plan_of(plan.problem, cuda_device)
        np.testing.assert_array_equal(run(plan, cuda_device, x, w, bias), y)
    forms = {form for form, _ in loads}
    assert forms == {PIXELS, GATHER if channels == 48 else PACKED}


def test_what_moves_no_pixel(cuda_device: Any) -> None:
    def form(x: tuple[int, ...], w: tuple[int, ...], dtype: str = "float16", **options: Any) -> int:
        return implicit_gemm_mma._form(describe("test", 2, x, w, dtype, dtype, **options))

    x, w = (2, 16, 14, 14), (8, 16, 1, 1)
    assert form(x, w) == form(x, w, "bfloat16") == form((2, 3, 14, 14), (8, 3, 1, 1)) == PIXELS
    for found in (
        form(x, w, stride=2), form(x, w, padding=1), form(x, w, padding=((1, 0), (0, 1))),
        form(x, (8, 16, 1, 3), padding=((0, 0), (1, 1))), form((2, 16, 7, 7), w),
        form((2, 14, 14, 16), w, layout="NHWC"), form(x, w, "float32", precision="tf32"),
    ):  # fmt: skip
        assert found != PIXELS


# ---- what the taps of a tile share -----------------------------------------------------------

HALO_KINDS = ("float16", "bfloat16", "tf32", "tf32x3")
# x, w, and options
SHARED: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((1, 32, 8, 8), (16, 32, 3, 3), {"padding": 1}),
    ((5, 32, 7, 7), (33, 32, 3, 3), {"padding": 1, "bias": True}),
    ((2, 64, 14, 30), (70, 64, 3, 3), {"padding": 1}),
    ((2, 32, 9, 11), (40, 32, 3, 2), {"padding": (1, 2), "dilation": 2, "stride": (2, 1)}),
    ((2, 32, 15, 13), (40, 32, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 96, 13, 15), (42, 32, 5, 3), {"stride": (3, 2), "groups": 3, "flip": True}),
    ((2, 32, 9, 8), (20, 32, 1, 4), {"stride": (4, 1), "padding": ((0, 0), (3, 0))}),
    ((2, 32, 3, 4, 5), (10, 32, 2, 3, 2), {"padding": 1, "stride": (1, 2, 2), "layout": "NCDHW"}),
    ((2, 32, 70), (10, 32, 3), {"padding": 1, "dilation": 5, "layout": "NCW"}),
    *(
        ((2, 32, 6, 11), (8, 32, 4, 3), {"padding": ((2, 9), (0, 5)), "padding_mode": mode})
        for mode in PADDING_MODES
    ),
)


@pytest.mark.parametrize(
    ("kind", "tile"),
    [(kind, tile) for kind in HALO_KINDS[::2] for tile in tiles_of(kind, HALO)]
    + [(kind, SMALL) for kind in HALO_KINDS[1::2]],
)
def test_halos_give_the_bits_of_elements(
    cuda_device: Any, force: Force, kind: str, tile: Tile
) -> None:
    served = 0
    for x_shape, w_shape, options in SHARED:
        force(_tiles=only(SMALL), _forms=only(GATHER))
        plan, x, w, bias, y = conv(cuda_device, kind, x_shape, w_shape, **options)
        force(_tiles=only(tile), _forms=only(HALO))
        if implicit_gemm_mma._halo(plan.problem, tile, x.shape[0]) is None:
            continue
        served += 1
        again = plan_of(plan.problem, cuda_device)
        for memory in ("contiguous", MEMORY_ORDERS[served % len(MEMORY_ORDERS)]):
            changed = in_memory_order(x, memory, -1)
            np.testing.assert_array_equal(run(again, cuda_device, changed, w, bias), y)
        # A batch whose last tile is cut elsewhere.
        np.testing.assert_array_equal(run(again, cuda_device, x[:1], w, bias), y[:1])
    assert served >= 9


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
@pytest.mark.parametrize("limit", [None, 0])
def test_halos_of_tiles_and_parts_that_follow_one_another(
    force: Force, monkeypatch: pytest.MonkeyPatch, mode: Any, limit: int | None
) -> None:
    monkeypatch.setattr(rates, "LAUNCH_SECONDS", 0.0)  # else it is too small to be split
    rng = np.random.default_rng(0)
    x = random_array(rng, (3, 160, 8, 9), "float16")
    w = random_array(rng, (72, 160, 2, 2), "float16")
    problem = problem_of(x, w, "ieee", workspace_limit=limit)
    results = []
    for form, blocks in ((GATHER, 1), (HALO, 7), (HALO, 2), (HALO, 1)):
        force(_tiles=only(SMALL), _forms=only(form), _PART_LENGTH=200)
        few_blocks(monkeypatch, blocks)
        with (
            emulated_device(mode=mode, order="random", block_order="shuffled") as device,
            gpuconv.use_backend("cuda"),
        ):
            assert implicit_gemm_mma._slices(problem, device) == (20, 8)
            plan = plan_of(problem, device)
            assert implicit_gemm_mma._choose(problem, device, 3).split == (limit is None)
            results.append(run(plan, device, x, w))
    assert_close(problem, results[0], x, w)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


def test_parts_that_end_between_the_taps_of_a_block(cuda_device: Any, force: Force) -> None:
    force(_tiles=only(SMALL), _forms=only(GATHER), _PART_LENGTH=200)
    options: dict[str, Any] = {"padding": 2, "workspace_limit": 0}
    plan, x, w, _, y = conv(cuda_device, "float16", (2, 64, 6, 7), (9, 64, 5, 5), **options)
    assert implicit_gemm_mma._slices(plan.problem, cuda_device) == (50, 7)
    for split in (False, True):
        serves = implicit_gemm_mma._halo_serves(plan.problem, cuda_device, SMALL, 2, split)
        assert serves == (not split)
    force(_forms=only(HALO))
    again = plan_of(plan.problem, cuda_device)
    np.testing.assert_array_equal(run(again, cuda_device, x, w), y)


def test_a_halo_holds_what_its_tile_reads() -> None:
    """Against each pixel and tap of each tile of random problems."""
    rng = np.random.default_rng(0)
    served = 0
    for _ in range(400):
        ndim = int(rng.integers(1, 4))
        extents, taps, stride, dilation, pad = (
            tuple(int(n) for n in rng.integers(low, high, ndim))
            for low, high in ((1, 40 // ndim), (1, 5), (1, 4), (1, 4), (0, 4))
        )
        batch, layout = int(rng.integers(1, 5)), ("NCW", "NCHW", "NCDHW")[ndim - 1]
        try:
            problem = describe(
                "test", ndim, (batch, 32, *extents), (8, 32, *taps), "float16", "float16",
                stride=stride, dilation=dilation, padding=pad, layout=layout,
            )  # fmt: skip
        except ValueError:
            continue
        tile = (SMALL, NARROW, implicit_gemm_mma.LARGE_8, implicit_gemm_mma.WIDE)[served % 4]
        halo = implicit_gemm_mma._halo(problem, tile, batch)
        if halo is None:
            continue
        served += 1
        lead = (1,) * (3 - ndim)
        (z, p, q), (sd, sh, sw) = (*lead, *problem.output), (*lead, *stride)
        images, planes, rows, columns = np.indices((batch, z, p, q)).reshape(4, -1)
        line = ((images * halo.planes + planes * sd) * halo.rows + rows * sh) * sw
        tap = np.indices((*lead, *taps)).reshape(3, -1) * np.reshape((*lead, *dilation), (3, 1))
        tap_line = (tap[0] * halo.rows + tap[1]) * sw + tap[2] % sw
        tap_column = tap[2] // sw
        assert (columns.max() + tap_column.max()) < halo.columns <= halo.pitch
        assert tap_line.max() <= halo.last_line
        assert tap_column.max() == halo.last_column
        for first in range(0, line.size, tile.pixels):
            chosen = slice(first, first + tile.pixels)
            lines = (line[chosen, None] + tap_line).ravel()
            at = (columns[chosen, None] + tap_column).ravel()
            origin = line[first] * halo.pitch + columns[first] // 2 * 2
            assert np.all(lines * halo.pitch + at >= origin)
            assert np.max(lines * halo.pitch + at // 2 * 2 + 1 - origin) < halo.buffer
            start = line[first] * halo.line + columns[first] // 8 * 8
            last = np.max(lines) * halo.line + columns[chosen][-1] + halo.last_column
            assert last - start < halo.places * tile.threads
    assert served > 100


def test_where_a_halo_is_chosen() -> None:
    device = EmulatedDevice()

    def form(x: tuple[int, ...], w: tuple[int, ...], kind: str = "float16", **options: Any) -> int:
        dtype, precision = typed(kind).values()
        problem = describe("test", 2, x, w, dtype, dtype, precision=precision, **options)
        return implicit_gemm_mma._choose(problem, device, x[0]).form

    for size, channels in ((112, 64), (56, 64), (28, 128), (14, 256), (7, 512)):
        x, w = (32, channels, size, size), (channels, channels, 3, 3)
        for kind in HALO_KINDS:
            assert form(x, w, kind, padding=1) == HALO
        assert form(x, w, "float64", padding=1) == GATHER
        assert form(x, w, "float16", padding=36, dilation=36) == GATHER  # too far apart
        assert form(x, (channels, channels, 1, 1), "float16", stride=2) == GATHER
    assert form((32, 40, 28, 28), (64, 40, 3, 3)) == GATHER
    assert form((32, 28, 28, 32), (64, 32, 3, 3), layout="NHWC") == VECTORS


# ---- tiles that follow one another -----------------------------------------------------------


def few_blocks(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As on a small device: launches that are prepared from now on have so many blocks."""
    original = implicit_gemm_mma._multiply

    def fewer(*args: Any) -> launch.Launch:
        made = original(*args)
        return dataclasses.replace(made, grid=(min(made.grid[0], most), 1, 1))

    monkeypatch.setattr(implicit_gemm_mma, "_multiply", fewer)
    _forget()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "channels"), [(VECTORS, 40), (GATHER, 40), (PACKED, 37), (PIXELS, 148)]
)  # of a group
def test_any_number_of_blocks_gives_the_same_bits(
    cuda_device: Any, force: Force, monkeypatch: pytest.MonkeyPatch, kind: str, form: int,
    channels: int,
) -> None:  # fmt: skip
    """One multiprocessor's blocks walk over tiles that a large device's have one each of."""
    taps, groups = (1, 1) if form == PIXELS else (2, 2), 1 if form == PACKED else 2
    options = images(form, 2, groups * channels, 12, 11)
    options |= {"groups": groups, "w_shape": (140, channels, *taps)}
    for limit in (None, 0):  # sums in parts of their own blocks, and in one
        monkeypatch.setattr(rates, "LAUNCH_SECONDS", 0.0)  # else they are too small to be split
        force(_tiles=only(SMALL), _PART_LENGTH=channels * math.prod(taps) // 3)
        options["workspace_limit"] = limit
        plan, x, w, bias, y = conv(cuda_device, kind, bias=True, **options)
        problem = plan.problem
        assert implicit_gemm_mma._choose(problem, cuda_device, 2).split == (limit is None)
        slices, part_slices = implicit_gemm_mma._slices(problem, cuda_device)
        assert slices % part_slices  # the last part is shorter than the others
        for blocks in (5, 2, 1):
            few_blocks(monkeypatch, blocks)
            again = plan_of(problem, cuda_device)
            np.testing.assert_array_equal(run(again, cuda_device, x, w, bias), y)
        monkeypatch.undo()


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
@pytest.mark.parametrize("form", [*FORMS, PIXELS])
def test_tiles_of_a_block_do_not_race(
    force: Force, monkeypatch: pytest.MonkeyPatch, mode: Any, form: int
) -> None:
    force(_tiles=only(SMALL))
    few_blocks(monkeypatch, 2)
    rng = np.random.default_rng(0)
    for channels in (33, 144) if form == PACKED else (32, 144):  # a slice or two, and more
        options = images(form, 3, channels, 6, 8)
        x = random_array(rng, options.pop("x_shape"), "float16")
        w = random_array(rng, (72, channels, 1, 1), "float16")
        problem = problem_of(x, w, "ieee", workspace_limit=0, **options)
        with (
            emulated_device(mode=mode, order="random", block_order="shuffled") as device,
            gpuconv.use_backend("cuda"),
        ):
            assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)


def test_bands_of_channels_give_the_same_bits(cuda_device: Any, force: Force) -> None:
    force(_tiles=only(SMALL))
    options = images(VECTORS, 2, 32, 9, 9) | {"groups": 2}
    plan, x, w, _, y = conv(cuda_device, "float16", w_shape=(760, 16, 1, 1), **options)
    for band in (1, 2, 3, 6):
        force(_band=lambda *args, n=band: n)
        np.testing.assert_array_equal(run(plan_of(plan.problem, cuda_device), cuda_device, x, w), y)


def test_a_band_is_all_channels_or_nearly_a_square() -> None:
    device = EmulatedDevice()
    problem = describe(
        "test", 2, (64, 28, 28, 2048), (4096, 2048, 1, 1), "float16", "float16", layout="NHWC"
    )  # fmt: skip
    assert implicit_gemm_mma._band(problem, device, SMALL, 64, 500) == 64
    device.l2_bytes = 6 << 20
    assert implicit_gemm_mma._band(problem, device, SMALL, 64, 500) == 16
    assert implicit_gemm_mma._band(problem, device, SMALL, 61, 500) == 61
    assert implicit_gemm_mma._band(problem, device, SMALL, 1021, 500) == 1


def test_as_many_blocks_run_as_fit() -> None:
    """By what ptxas says of some kernels: no block waits for another to end, none is missing."""
    pytest.importorskip("cupy")
    device = EmulatedDevice()
    for dtype, tile, form in (
        ("float16", implicit_gemm_mma.HUGE, VECTORS), ("float16", implicit_gemm_mma.WIDE, PIXELS),
        ("float16", implicit_gemm_mma.MEDIUM_8, GATHER), ("float16", SMALL, PACKED),
        ("float64", SMALL, VECTORS), ("float16", implicit_gemm_mma.LARGE, HALO),
        ("float16", implicit_gemm_mma.LARGE_8, HALO), ("float16", NARROW, HALO),
    ):  # fmt: skip
        last = form == VECTORS
        taps = 3 if form == HALO else 1
        problem = describe("test", 2, (4, 32, 8, 8), (8, 32, taps, taps), dtype, dtype)
        macros = implicit_gemm_mma._macros(problem.x_dtype, 1, form, last, tile, "int32")
        report = compiler.compile_kernel("implicit_gemm_mma", macros, device.arch).report
        dynamic = implicit_gemm_mma._shared_bytes(problem, tile, 4, form, False)
        static = implicit_gemm_mma._taps_bytes(problem, form, "int32")
        assert report.shared == {PIXELS: 0, HALO: static // 5}.get(form, static)
        shared = report.shared + dynamic
        found = occupancy.occupancy(device.arch, tile.threads, report.registers, shared)
        resident = implicit_gemm_mma._resident(problem, device, tile, form, "int32", dynamic)
        assert found.blocks == resident


# ---- numbers ---------------------------------------------------------------------------------


def test_three_products_are_near_float32_and_one_is_not(cuda_device: Any) -> None:
    errors = {}
    for kind in ("tf32", "tf32x3"):
        plan, x, w, _, y = conv(cuda_device, kind, (2, 64, 12, 12), (32, 64, 3, 3))
        y_ref, magnitudes = expected(plan.problem, x, w)
        errors[kind] = float(np.max(np.abs(y - y_ref) / magnitudes))
    assert errors["tf32x3"] < 16 * 2.0**-23  # tensor cores may truncate the sums
    assert 2.0**-16 < errors["tf32"] < 2.0**-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
def test_nan_and_infinity_stay_where_their_windows_are(
    cuda_device: Any, kind: str, form: int
) -> None:
    dtype, precision = typed(kind).values()
    channels = 5 if form == PACKED else 8
    rng = np.random.default_rng(0)
    options = images(form, 2, channels, 11, 13)
    x = random_array(rng, options.pop("x_shape"), dtype)
    w = random_array(rng, (5, channels, 3, 3), dtype)
    first = np.moveaxis(x, -1, 1) if form == VECTORS else x
    first[0, 1, 4, 4], first[1, 2, 0, 0] = np.nan, np.inf
    problem = problem_of(x, w, precision, padding=1, **options)
    y = run(plan_of(problem, cuda_device), cuda_device, x, w)
    if kind != "tf32x3":  # which makes NaN of infinity
        assert_close(problem, y, x, w)
    y = np.moveaxis(y, -1, 1) if form == VECTORS else y
    clean = np.ones(y.shape, bool)
    clean[0, :, 3:6, 3:6] = clean[1, :, :2, :2] = False
    assert np.isfinite(y[clean]).all()
    assert not np.isfinite(y[~clean]).any()


@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
def test_a_pads_zero_is_multiplied(cuda_device: Any, form: int) -> None:
    channels = 1 if form == PACKED else 8
    options = images(form, 1, channels, 3)
    x = np.ones(options.pop("x_shape"), np.float16)
    w = np.zeros((1, channels, 2), np.float16)
    w[0, 0] = np.inf, 1
    problem = problem_of(x, w, "ieee", padding=1, **options)
    y = run(plan_of(problem, cuda_device), cuda_device, x, w)
    np.testing.assert_array_equal(y.ravel(), [np.nan, np.inf, np.inf, np.inf])


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "tf32", "float64"])
@pytest.mark.parametrize(("form", "channels"), [(VECTORS, 16), (GATHER, 16), (PACKED, 4), (2, -4)])
def test_bits_know_nothing_of_strides_and_alignment(
    cuda_device: Any, kind: str, form: int, channels: int
) -> None:
    if kind == "float64" and form == PACKED:
        channels -= 1  # a multiple of the two that 16 bytes hold is no case for `packed`
    if kind == "tf32" and form == PACKED:
        channels += 1
    options = images(form, 2, channels, 8, 8)
    plan, x, w, bias, y = conv(
        cuda_device, kind, w_shape=(16, abs(channels), 3, 3), bias=True, padding=1, **options
    )
    assert implicit_gemm_mma._form(plan.problem) == form
    for memory in MEMORY_ORDERS:
        for axis in (1, -1):
            for which in range(4):  # one of the three alone, and all
                orders = [memory if which in (i, 3) else "contiguous" for i in range(3)]
                again = run(
                    plan, cuda_device, in_memory_order(x, orders[0], axis),
                    in_memory_order(w, orders[1], 1), bias,
                    out=in_memory_order(0 * y, orders[2], axis),
                )  # fmt: skip
                np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
def test_vectors_are_used_where_memory_allows(
    cuda_device: Any, force: Force, monkeypatch: pytest.MonkeyPatch, form: int
) -> None:
    seen = []
    original = implicit_gemm_mma._multiply

    def spy(*args: Any) -> Any:
        made = original(*args)
        seen.append(tuple(int(made.constants[1][f]) for f in ("w_vector", "x_vector", "y_vector")))
        return made

    force(_multiply=spy)
    channels = 4 if form == PACKED else 16
    options = images(form, 2, channels, 8, 8)
    w_shape = (16, channels, 4, 2)
    plan, x, w, _, y = conv(cuda_device, "float16", w_shape=w_shape, padding=(0, 1), **options)
    memory = "channels_last" if form != PACKED else "contiguous"
    again = run(plan, cuda_device, in_memory_order(x, "offset", 1), in_memory_order(w, memory, 1))
    np.testing.assert_array_equal(again, y)
    vectors = int(form == VECTORS)
    pixels = int(form == VECTORS or y.size // 32 % 8 == 0)
    assert seen == [(1, vectors, pixels), (0, 0, 0)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("form", [VECTORS, GATHER])
def test_a_packed_filter_changes_no_bit(cuda_device: Any, flip: bool, form: int) -> None:
    options = images(form, 1, 16, 6, 7)
    plan, x, w, _, y = conv(cuda_device, "float16", w_shape=(5, 16, 3, 2), flip=flip, **options)
    assert plan.workspace_bytes == w.nbytes
    for memory in MEMORY_ORDERS:
        again = run(plan, cuda_device, x, in_memory_order(w, memory, 1))
        np.testing.assert_array_equal(again, y)
    for limit in (w.nbytes - 1, 0):
        tight = plan_of(dataclasses.replace(plan.problem, workspace_limit=limit), cuda_device)
        assert tight.workspace_bytes == 0
        np.testing.assert_array_equal(run(tight, cuda_device, x, w), y)


@pytest.mark.parametrize(("form", "channels"), [(VECTORS, 16), (GATHER, 16), (PACKED, 6), (2, -6)])
def test_64_bit_indices_give_the_same_bits(
    cuda_device: Any, force: Force, form: int, channels: int
) -> None:
    options: dict[str, Any] = {"padding": 4, "padding_mode": "reflect", "bias": True, "groups": 2}
    options |= images(form, 2, channels, 9, 7)
    w_shape = (10, abs(channels) // 2, 3, 3)
    y = conv(cuda_device, "float16", w_shape=w_shape, **options)[-1]
    force(index_type=lambda *args: "int64")
    np.testing.assert_array_equal(y, conv(cuda_device, "float16", w_shape=w_shape, **options)[-1])


def test_offsets_past_2_31(cuda_device: Any, tmp_path: Path) -> None:
    far = 2**31 + 1000
    memory: Any = np.memmap(tmp_path / "x", np.float16, "w+", shape=(3 * far + 200,))  # holes
    strides = (2 * (2 * far + 64), 2 * far, 2)
    x = np.lib.stride_tricks.as_strided(np.asarray(memory), (2, 2, 16), strides)
    rng = np.random.default_rng(0)
    x[...] = random_array(rng, x.shape, "float16")
    w = random_array(rng, (3, 2, 3), "float16")
    problem = problem_of(x, w, "ieee", padding=1)
    assert_close(problem, run(plan_of(problem, cuda_device), cuda_device, x, w), x, w)


# ---- parts of sums ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "tf32", "float64"])
@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
def test_parts_of_a_sum_have_blocks_of_their_own_or_not(
    cuda_device: Any, force: Force, kind: str, form: int
) -> None:
    channels = 77 if form == PACKED else 72
    options = {"padding": 2, "bias": True} | images(form, 3, channels, 5, 4)
    plan, x, *others, y = conv(cuda_device, kind, w_shape=(9, channels, 5, 5), **options)
    problem = plan.problem
    filter_bytes = 0 if form == PACKED else others[0].nbytes
    assert implicit_gemm_mma._parts(problem, cuda_device) == 3
    assert implicit_gemm_mma._choose(problem, cuda_device, 3).split
    assert plan.workspace_bytes == filter_bytes + 3 * y.size * problem.accumulator.itemsize
    np.testing.assert_array_equal(run(plan, cuda_device, x, *others), y)
    for image in range(3):
        alone = run(plan, cuda_device, x[image : image + 1], *others)
        np.testing.assert_array_equal(alone, y[image : image + 1])
    many = run(plan, cuda_device, np.concatenate([x] * 3), *others)
    np.testing.assert_array_equal(many, np.concatenate([y] * 3))
    # One image has the bits that it has in the batch, and a limit changes none either.
    one = plan_of(dataclasses.replace(problem, batch=1), cuda_device)
    np.testing.assert_array_equal(run(one, cuda_device, x[:1], *others), y[:1])
    whole = plan_of(dataclasses.replace(problem, workspace_limit=0), cuda_device)
    assert whole.workspace_bytes == 0
    np.testing.assert_array_equal(run(whole, cuda_device, x, *others), y)
    for tile in tiles_of(kind, form):
        force(_tiles=only(tile))
        for limit in (None, 0):
            changed = dataclasses.replace(problem, workspace_limit=limit)
            again = run(plan_of(changed, cuda_device), cuda_device, x, *others)
            np.testing.assert_array_equal(again, y)


def test_the_images_that_fit_the_workspace_are_one_pass(cuda_device: Any, force: Force) -> None:
    options = images(PACKED, 3, 77, 5, 4)
    plan, *arrays, y = conv(cuda_device, "float16", w_shape=(9, 77, 5, 5), padding=2, **options)
    force(_WORKSPACE=3 * (9 * 20 * 4) * 2)  # three parts of two images
    again = plan_of(plan.problem, cuda_device)
    assert again.workspace_bytes == plan.workspace_bytes * 2 // 3
    np.testing.assert_array_equal(run(again, cuda_device, *arrays), y)


def test_a_large_batch_needs_no_workspace(cuda_device: Any) -> None:
    problem = describe(
        "test", 2, (256, 77, 7, 7), (512, 77, 5, 5), "float16", "float16", padding=2
    )  # fmt: skip
    assert implicit_gemm_mma._parts(problem, cuda_device) > 1
    assert plan_of(problem, cuda_device).workspace_bytes == 0
    # Nor may a call of that plan with fewer images, which was promised none.
    assert not implicit_gemm_mma._choose(problem, cuda_device, 1).split
    one = dataclasses.replace(problem, batch=1)
    assert plan_of(one, cuda_device).workspace_bytes > 0


def test_a_workspace_limit_is_kept(cuda_device: Any, force: Force) -> None:
    options = images(VECTORS, 3, 72, 5, 4)
    w_shape = (9, 72, 5, 5)
    part, filter_bytes = 3 * 9 * 20 * 4, 2 * 9 * 72 * 25
    for limit in (0, filter_bytes - 1, filter_bytes, filter_bytes + part, filter_bytes + 3 * part):
        made = conv(
            cuda_device, "float16", w_shape=w_shape, padding=2, workspace_limit=limit, **options
        )
        assert made[0].workspace_bytes <= limit
    # A copy of w that is larger than all that parts may take.
    force(_WORKSPACE=filter_bytes // 2)
    conv(cuda_device, "float16", w_shape=w_shape, padding=2, workspace_limit=1 << 30, **options)


def test_more_parts_than_slices_leave_none_empty(cuda_device: Any, force: Force) -> None:
    force(_PART_LENGTH=8)
    for depth in range(8, 600, 72):
        conv(cuda_device, "float16", (2, depth, 3), (2, depth, 1))
        conv(cuda_device, "float16", (2, 3, depth), (2, depth, 1), layout="NWC")


# ---- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("limit", "stems"),
    [(None, {"implicit_gemm_mma", "split_sum", "pack_filter"}), (0, {"implicit_gemm_mma"})],
)
def test_warmup_loads_what_a_call_launches(
    force: Force, passes: int, limit: int | None, stems: set[str]
) -> None:
    if passes == 2:
        force(_WORKSPACE=3 * (9 * 20 * 4) * 2)  # three parts of two images
    problem = describe(
        "test", 2, (3, 5, 4, 72), (9, 72, 5, 5), "float16", "float16",
        layout="NHWC", padding=2, workspace_limit=limit,
    )  # fmt: skip
    x, w = np.zeros((3, 5, 4, 72), np.float16), np.zeros(problem.w_shape, np.float16)
    launches = 1 + 2 * passes if limit is None else 1
    assert_warmup_loads(problem, "implicit_gemm_mma", x, w, stems, launches)


def test_variants_hold_whatever_a_problem_asks_for(
    force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {launch.freeze(macros) for _, macros in implicit_gemm_mma.variants()}
    assert len(listed) <= 96
    asked = set()

    class Recorder(EmulatedDevice):
        def load(self, source: str, macros: Any, kernel: str | None = None) -> Any:
            if source == "implicit_gemm_mma":
                asked.add(launch.freeze(macros))
            return None

    device = Recorder()
    for kind, channels, layout, batch, size, rows, (taps, stride) in itertools.product(
        KINDS, (3, 32, 512), ("NCHW", "NHWC"), (1, 64), (7, 28, 56), (24, 64, 1024),
        ((1, 1), (3, 1), (3, 2)),
    ):  # fmt: skip
        dtype, precision = typed(kind).values()
        shape = (batch, size, size, channels) if layout == "NHWC" else (
            batch, channels, size, size)  # fmt: skip
        problem = describe(
            "test", 2, shape, (rows, channels, taps, taps), dtype, dtype,
            layout=layout, precision=precision, stride=stride,
        )  # fmt: skip
        y = np.broadcast_to(np.zeros((), problem.x_dtype.numpy), problem.y_shape)
        x = np.broadcast_to(np.zeros((), problem.x_dtype.numpy), problem.x_shape)
        layouts = launch.Layout(x, x, None, y), launch.contiguous(problem)
        for index, given in itertools.product(("int32", "int64"), layouts):
            force(index_type=lambda *a, i=index: i)
            implicit_gemm_mma.prepare_whole(problem, device, given)
            if implicit_gemm_mma._parts(problem, device) > 1:
                implicit_gemm_mma.prepare_split(problem, device, given)
    assert asked == listed


def test_the_struct_has_the_size_that_the_kernel_asserts() -> None:
    source = (compiler.source_folder() / "implicit_gemm_mma.cu").read_text()
    assert f"sizeof(Tiling) == {implicit_gemm_mma.TILING.itemsize}," in source


def test_what_it_does_not_serve(cuda_device: Any) -> None:
    problem = describe("test", 1, (1, 2, 9), (2, 2, 3), "float16", "float16")
    single = {"x_dtype": dtypes.FLOAT32, "w_dtype": dtypes.FLOAT32, "y_dtype": dtypes.FLOAT32}
    for changes, reason in (
        ({"operation": "wgrad"}, "computes fprop only, not wgrad"),
        ({"x_dtype": dtypes.COMPLEX64}, "no kernel for x in complex64"),
        ({"w_dtype": dtypes.FLOAT64}, "must have one dtype"),
        ({"bias": dtypes.FLOAT32}, "must have one dtype"),
        (single, "precision='tf32' or 'tf32x3'"),
    ):
        changed = dataclasses.replace(problem, **changes)  # type: ignore[arg-type]
        verdict = implicit_gemm_mma.supports(changed, cuda_device)
        assert isinstance(verdict, No)
        assert reason in verdict.reason


def test_turing_has_float16_alone() -> None:
    device = EmulatedDevice(arch="sm_75")
    device.max_shared_bytes = 64 << 10
    for kind in KINDS:
        dtype, precision = typed(kind).values()
        for batch in (1, 256):
            problem = describe(
                "test", 2, (batch, 256, 7, 7), (256, 256, 3, 3), dtype, dtype, precision=precision
            )
            assert bool(implicit_gemm_mma.supports(problem, device)) == (kind == "float16")
            if kind == "float16":
                tile = implicit_gemm_mma._choose(problem, device, batch).tile
                assert tile.stage_bytes <= device.max_shared_bytes
    planes = describe("test", 2, (256, 256, 16, 16), (256, 256, 1, 1), "float16", "float16")
    assert implicit_gemm_mma._form(planes) == PIXELS
    # Some is static.
    tile = implicit_gemm_mma._choose(planes, device, 256).tile
    assert tile.stage_bytes < device.max_shared_bytes


def test_the_model_prefers_tensor_cores_where_they_are(cuda_device: Any) -> None:
    for kind, layout, size in itertools.product(KINDS[:4], ("NCHW", "NHWC"), (14, 56)):
        dtype, precision = typed(kind).values()
        shape = (32, 128, size, size) if layout == "NCHW" else (32, size, size, 128)
        plan = gpuconv.plan_conv2d(
            shape, (128, 128, 3, 3), padding=1, layout=layout, dtype=dtype, precision=precision,
            backend="cuda",
        )  # fmt: skip
        costs = {c.algorithm: c.cost for c in plan.candidates}
        assert costs["implicit_gemm_mma"] < costs["implicit_gemm"]
    slow = EmulatedDevice(arch="sm_86")
    problem = describe("test", 2, (8, 64, 56, 56), (64, 64, 3, 3), "float64", "float64")
    assert implicit_gemm_mma.cost(problem, slow) > 8 * implicit_gemm_mma.cost(problem, cuda_device)


def test_tiles_follow_the_problem() -> None:
    device = EmulatedDevice()

    def tile(batch: int, channels: int, size: int, rows: int) -> tuple[int, int]:
        problem = describe(
            "test", 2, (batch, size, size, channels), (rows, channels, 3, 3),
            "float16", "float16", layout="NHWC",
        )  # fmt: skip
        chosen = implicit_gemm_mma._choose(problem, device, batch).tile
        return chosen.channels, chosen.pixels

    assert tile(1, 32, 14, 64) == (64, 64)
    assert tile(32, 64, 58, 24) == (32, 128)
    assert tile(32, 64, 58, 64) == (64, 256)
    assert tile(128, 256, 58, 256)[0] == 128


@pytest.mark.parametrize("operation", ["dgrad", "wgrad"])
@pytest.mark.parametrize("kind", ["float16", "tf32", "tf32x3", "float64"])
def test_gradients(cuda_device: Any, operation: Any, kind: str) -> None:
    dtype, precision = typed(kind).values()
    rng = np.random.default_rng(0)
    x, w = (random_array(rng, s, dtype) for s in ((3, 16, 9, 10), (24, 16, 3, 3)))
    problem = problem_of(x, w, precision, padding=1, stride=2)
    problem = dataclasses.replace(problem, operation=operation)
    dy = random_array(rng, problem.y_shape, dtype)
    plan = plan_of(problem, cuda_device)
    first, second = (dy, w) if operation == "dgrad" else (x, dy)
    assert_close(problem, run(plan, cuda_device, first, second), first, second)


# ---- what the emulator sees ------------------------------------------------------------------

WATCHED = [
    ("float16", form, tile) for form in (*FORMS, PIXELS, HALO) for tile in tiles_of("float16", form)
] + [
    *((kind, form, SMALL) for kind in ("tf32", "float64") for form in FORMS),
    ("tf32", HALO, SMALL),
]


SANITIZED = [
    ("float16", VECTORS, "sm_75"), ("float16", PACKED, "sm_75"), ("tf32x3", GATHER, "sm_90a"),
    ("float64", VECTORS, "sm_90a"), ("float16", PIXELS, "sm_90a"), ("float16", PIXELS, "sm_75"),
    ("float16", HALO, "sm_90a"), ("float16", HALO, "sm_75"), ("tf32x3", HALO, "sm_90a"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "form", "arch"), SANITIZED)
def test_sanitized(force: Force, kind: str, form: int, arch: str) -> None:
    force(_PART_LENGTH=150, **({"_forms": only(form)} if form in (GATHER, HALO) else {}))
    unit = 32 if form == HALO else 8
    dtype, precision = typed(kind).values()
    rng = np.random.default_rng(0)
    with emulated_device(mode="sanitize", arch=arch) as device, gpuconv.use_backend("cuda"):
        for n, (step, mode) in enumerate(zip((2, 3, 4, 6, 9), PADDING_MODES, strict=True)):
            options = images(form, 2, unit * step + (form == PACKED), 5, 6)
            taps = (3, 2)
            if form == PIXELS:
                taps, options = (1, 1), images(form, 2, unit * step, 4, 5 + n % 2)
            x = random_array(rng, options.pop("x_shape"), dtype)
            w = random_array(rng, (7, unit * step + (form == PACKED), *taps), dtype)
            if n % 2 and form != PIXELS:
                x, w = in_memory_order(x, "reversed", 1), in_memory_order(w, "offset", 1)
            if form != PIXELS:
                options |= {"padding": ((2, 7), (1, 0)), "padding_mode": mode, "flip": n == 3}
            options["workspace_limit"] = (None, 0)[n % 2]
            problem = problem_of(x, w, precision, **options)
            assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)


@pytest.mark.parametrize(("kind", "form", "tile"), WATCHED)
def test_no_races_and_no_bank_conflicts(force: Force, kind: str, form: int, tile: Tile) -> None:
    force(_tiles=only(tile), _forms=only(form))
    dtype, precision = typed(kind).values()
    channels = 17 if form == PACKED else 64
    options = images(form, 2, channels, 8, 8)
    rng = np.random.default_rng(0)
    x = random_array(rng, options.pop("x_shape"), dtype)
    memory = "contiguous" if form == PACKED else "channels_last"
    taps, padding = ((1, 1), 0) if form == PIXELS else ((4, 4), ((1, 2), (2, 1)))
    w = in_memory_order(random_array(rng, (tile.channels, channels, *taps), dtype), memory, 1)
    problem = problem_of(x, w, precision, padding=padding, workspace_limit=0, **options)
    with emulated_device(mode="watch", order="random", block_order="shuffled") as device:
        with gpuconv.use_backend("cuda"):
            assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)
        report = device.report
    shared = [s for s in report.sites if s.space == "shared"]
    conflicts = {
        operation: sum(
            s.wavefronts - s.ideal_wavefronts for s in shared if s.operation == operation
        )
        for operation in ("load", "store")
    }
    assert conflicts["load"] == 0
    # The first and the last line of a halo are for some of their lanes alone.
    assert conflicts["store"] <= (0.01 if form == HALO else 0) * sum(s.wavefronts for s in shared)
    assert sum(s.wavefronts for s in shared)
    # Every 16 bytes are loaded as such, and leave no sector half used.
    wide = [s for s in report.sites if s.space == "global" and s.bytes == 16]
    assert sum(s.requests for s in wide)
    assert sum(s.sectors for s in wide) == sum(s.ideal_sectors for s in wide)
    everything = report.total("sectors", "global") / report.total("ideal_sectors", "global")
    assert everything < (1.01 if form in (VECTORS, PIXELS) else 1.6 if form == HALO else 1.3)
