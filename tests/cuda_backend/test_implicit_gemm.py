"""implicit_gemm: shapes around its tiles, split sums, both memory orders, vectors and without."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes
from gpuconv.arrays import HostArray
from gpuconv.cuda_backend import compiler, implicit_gemm, launch
from gpuconv.cuda_backend.implicit_gemm import FLAT, LARGE, MEDIUM, SMALL, Tile
from gpuconv.plan import No, Plan, choose
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import (
    MEMORY_ORDERS,
    assert_close,
    in_memory_order,
    random_array,
    random_case,
)
from tests.cuda_backend.conftest import on_device, on_host
from tests.cuda_backend.loads import assert_warmup_loads
from tests.emulator import EmulatedDevice, emulated_device

Force = Callable[..., None]
NAMES = {LARGE: "large", MEDIUM: "medium", FLAT: "flat", SMALL: "small"}
CACHED = ("prepare_whole", "prepare_split", "prepare_packing", "_choose", "_passes", "_packs")


def _forget() -> None:
    choose.cache_clear()
    for name in CACHED:
        getattr(implicit_gemm, name).cache_clear()


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Force]:
    """force(name=value) overrides what the module decides with, for plans made from then on."""

    def override(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(implicit_gemm, name, value)
        _forget()

    yield override
    monkeypatch.undo()
    _forget()


def only(tile: Tile) -> Callable[..., tuple[Tile, ...]]:
    return lambda dtype, split: (tile,)


def plan_of(problem: ConvProblem, device: Any) -> Plan:
    return choose("test", problem, "cuda", device, "implicit_gemm")


def run(plan: Plan, device: Any, *arrays: HostArray | None, out: Any = None) -> HostArray:
    result = plan(*(on_device(device, a) for a in arrays), out=on_device(device, out))
    return np.asarray(on_host(result))


def conv(
    device: Any,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: str = "float32",
    integers: bool = False,
    bias: bool = False,
    seed: int = 0,
    **options: Any,
) -> tuple[Plan, HostArray, HostArray, HostArray | None, HostArray]:
    """Plan and compute one problem, check it, and hand back all there is of it."""
    ndim = len(w_shape) - 2
    problem = describe(
        "test", ndim, x_shape, w_shape, dtype, dtype, bias=True if bias else None, **options
    )
    rng = np.random.default_rng(seed)
    x = random_array(rng, x_shape, dtype, integers)
    w = random_array(rng, w_shape, dtype, integers)
    b = random_array(rng, w_shape[:1], dtype, integers) if bias else None
    plan = plan_of(problem, device)
    y = run(plan, device, x, w, b)
    assert_close(problem, y, x, w, b, exact=integers and not problem.y_dtype.is_half)
    return plan, x, w, b, y


# ---- shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("layout", ["NCW", "NWC"])
def test_shapes_around_the_tile(cuda_device: Any, force: Force, tile: Tile, layout: str) -> None:
    force(_tiles=only(tile))
    small, large = (tile.rows - 1, 1), (tile.rows, tile.rows + 1)
    for n, (rows, depth) in enumerate(itertools.product((*small, *large), (7, 8, 9, 17))):
        pixels = tile.pixels + (-1, 0, 1)[n % 3]
        x_shape = (1, pixels, depth) if layout == "NWC" else (1, depth, pixels)
        conv(cuda_device, x_shape, (rows, depth, 1), layout=layout, integers=True, bias=n % 2 == 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "complex64"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_tile_of_a_type_gives_the_same_bits(
    cuda_device: Any, force: Force, dtype: str, layout: str
) -> None:
    shape = (3, 9, 11, 20) if layout == "NHWC" else (3, 20, 9, 11)
    results = []
    for tile in implicit_gemm._tiles(dtypes.of(dtype), False):
        force(_tiles=only(tile))
        options = {"layout": layout, "padding": (1, 2), "dilation": 2, "stride": (2, 1)}
        results.append(conv(cuda_device, shape, (34, 20, 3, 2), dtype, bias=True, **options)[-1])
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


@pytest.mark.parametrize("block", range(4))
def test_random_problems_with_many_channels(cuda_device: Any, force: Force, block: int) -> None:
    tiles = [only(tile) for tile in NAMES]
    served = 0
    for seed in range(150 * block, 150 * (block + 1)):
        case = random_case(seed, channels=40, largest=8, dtypes=("float32", "float64", "float16"))
        force(_tiles=tiles[seed % 2 + 1 if case.x_dtype != "float64" else 1])
        try:
            plan = plan_of(case.problem(), cuda_device)
        except ValueError:
            continue
        x, w, bias = case.arrays()
        assert_close(plan.problem, run(plan, cuda_device, x, w, bias), x, w, bias)
        served += 1
    assert served > 100


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pads_longer_than_the_input(cuda_device: Any, mode: str, layout: str) -> None:
    shape = (2, 3, 4, 2, 16) if layout == "NDHWC" else (2, 16, 3, 4, 2)
    options = {"padding": ((7, 5), (0, 9), (6, 3)), "padding_mode": mode, "layout": layout}
    conv(cuda_device, shape, (6, 8, 3, 2, 3), groups=2, dilation=(2, 1, 1), stride=2, **options)


def test_a_pads_zero_is_multiplied(cuda_device: Any) -> None:
    x, w = np.ones((1, 1, 3), np.float32), np.array([[[np.inf, 1]]], np.float32)
    y = gpuconv.conv1d(
        *(on_device(cuda_device, a) for a in (x, w)), padding=1, algorithm="implicit_gemm"
    )
    np.testing.assert_array_equal(on_host(y), [[[np.nan, np.inf, np.inf, np.inf]]])


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_bits_know_nothing_of_strides_and_alignment(
    cuda_device: Any, dtype: str, layout: str
) -> None:
    shape = (2, 8, 8, 16) if layout == "NHWC" else (2, 16, 8, 8)
    plan, x, w, bias, y = conv(
        cuda_device, shape, (16, 16, 3, 3), dtype, bias=True, padding=1, layout=layout
    )
    for memory in MEMORY_ORDERS:
        for axis in (1, -1):
            again = run(
                plan, cuda_device, in_memory_order(x, memory, axis),
                in_memory_order(w, memory, 1), bias, out=in_memory_order(0 * y, memory, axis),
            )  # fmt: skip
            np.testing.assert_array_equal(y, again)
            for which in range(3):  # one of the three alone
                orders = ["contiguous"] * 3
                orders[which] = memory
                again = run(
                    plan, cuda_device, in_memory_order(x, orders[0], axis),
                    in_memory_order(w, orders[1], 1), bias,
                    out=in_memory_order(0 * y, orders[2], axis),
                )  # fmt: skip
                np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_vectors_are_used_where_memory_allows(
    cuda_device: Any, force: Force, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = implicit_gemm._multiply

    def spy(*args: Any) -> Any:
        made = original(*args)
        seen.append(tuple(int(made.constants[1][f]) for f in ("w_vector", "x_vector", "y_vector")))
        return made

    monkeypatch.setattr(implicit_gemm, "_multiply", spy)
    _forget()
    shape = (2, 8, 8, 16) if layout == "NHWC" else (2, 16, 8, 8)
    plan, x, w, _, y = conv(cuda_device, shape, (16, 16, 3, 3), padding=1, layout=layout)
    last = in_memory_order(w, "channels_last", 1)
    np.testing.assert_array_equal(run(plan, cuda_device, x, last), y)
    run(plan, cuda_device, in_memory_order(x, "offset", 1), w)
    inner = implicit_gemm.STORE_CHANNELS, implicit_gemm.STORE_PIXELS
    if layout == "NHWC":
        assert seen == [(0, 1, inner[0]), (1, 1, inner[0]), (0, 0, 0)]
    else:
        assert seen == [(1, 0, inner[1]), (0, 0, inner[1]), (0, 0, 0)]


@pytest.mark.parametrize("flip", [False, True])
def test_a_packed_filter_changes_no_bit(cuda_device: Any, force: Force, flip: bool) -> None:
    rng = np.random.default_rng(0)
    x = random_array(rng, (1, 6, 7, 16), "float32")
    w = random_array(rng, (5, 16, 3, 2), "float32")
    problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, layout="NHWC", flip=flip)
    plan = plan_of(problem, cuda_device)
    assert plan.workspace_bytes == 0
    y = run(plan, cuda_device, x, w)
    assert_close(problem, y, x, w)
    force(_PACKING_PAYS=0)
    plan = plan_of(problem, cuda_device)
    assert plan.workspace_bytes == w.nbytes
    np.testing.assert_array_equal(run(plan, cuda_device, x, w), y)
    for memory in MEMORY_ORDERS:
        again = run(plan, cuda_device, x, in_memory_order(w, memory, 1))
        np.testing.assert_array_equal(again, y)
    tight = dataclasses.replace(problem, workspace_limit=w.nbytes - 1)
    assert plan_of(tight, cuda_device).workspace_bytes == 0


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_64_bit_indices_give_the_same_bits(cuda_device: Any, force: Force, layout: str) -> None:
    shape = (2, 9, 7, 16) if layout == "NHWC" else (2, 16, 9, 7)
    options = {"padding": 4, "padding_mode": "reflect", "layout": layout, "bias": True}
    y = conv(cuda_device, shape, (10, 8, 3, 3), groups=2, **options)[-1]
    force(index_type=lambda *args: "int64")
    again = conv(cuda_device, shape, (10, 8, 3, 3), groups=2, **options)[-1]
    np.testing.assert_array_equal(y, again)


def test_offsets_past_2_31(cuda_device: Any, tmp_path: Path) -> None:
    far = 2**31 + 1000
    strides = (2 * far + 64, far, 1)
    memory: Any = np.memmap(tmp_path / "x", np.float16, "w+", shape=(3 * far + 200,))  # holes
    x = np.lib.stride_tricks.as_strided(
        np.asarray(memory), (2, 2, 16), tuple(2 * s for s in strides)
    )
    rng = np.random.default_rng(0)
    x[...] = random_array(rng, x.shape, "float16")
    w = random_array(rng, (3, 2, 3), "float16")
    problem = describe("test", 1, x.shape, w.shape, x.dtype, w.dtype, padding=1)
    assert implicit_gemm.index_type(problem, launch.Layout(x, w, None, w)) == "int64"
    assert_close(problem, run(plan_of(problem, cuda_device), cuda_device, x, w), x, w)


def test_positions_beyond_the_edge_count_among_the_indices(cuda_device: Any) -> None:
    problem = describe(
        "test", 2, (1, 1, 4, 4), (1, 1, 2**20, 1), "float32", "float32",
        padding=((2**20, 2**20), (0, 0)),
    )  # fmt: skip
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1, 1, 4, 4), (0, 0, 4096, 4))
    w = np.zeros((1, 1, 1, 1), np.float32)
    layout = launch.Layout(x, w, None, w)
    assert launch.index_type(problem, layout) == "int32"
    assert implicit_gemm.index_type(problem, layout) == "int64"


# ---- split sums ------------------------------------------------------------------------------


LONG = {"x_shape": (3, 64, 5, 4), "w_shape": (9, 64, 5, 5)}  # 1600 products, 20 pixels


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_split_sums(cuda_device: Any, force: Force, dtype: str, layout: str) -> None:
    n, c, h, w = LONG["x_shape"]
    shape = (n, h, w, c) if layout == "NHWC" else (n, c, h, w)
    options = {"padding": 2, "layout": layout, "bias": True}
    plan, *arrays, y = conv(cuda_device, shape, LONG["w_shape"], dtype, **options)
    problem = plan.problem
    splits, images = implicit_gemm._passes(problem, cuda_device)
    assert splits == 4
    assert images == 3
    parts = splits * problem.accumulator.itemsize * y.size
    assert plan.workspace_bytes == parts + (
        implicit_gemm.filter_bytes(problem) if implicit_gemm._packs(problem, cuda_device) else 0
    )
    np.testing.assert_array_equal(run(plan, cuda_device, *arrays), y)
    x, *others = arrays
    for image in range(n):
        alone = run(plan, cuda_device, x[image : image + 1], *others)
        np.testing.assert_array_equal(alone, y[image : image + 1])
    again = run(plan, cuda_device, np.concatenate([x] * 3), *others)
    np.testing.assert_array_equal(again, np.concatenate([y] * 3))
    # A problem of one image splits alike: its bits are the batch's.
    one = plan_of(dataclasses.replace(problem, batch=1), cuda_device)
    np.testing.assert_array_equal(run(one, cuda_device, x[:1], *others), y[:1])
    force(_tiles=only(SMALL))
    plan = plan_of(problem, cuda_device)
    np.testing.assert_array_equal(run(plan, cuda_device, *arrays), y)


def test_the_images_that_fit_the_workspace_are_one_pass(cuda_device: Any, force: Force) -> None:
    plan, *arrays, y = conv(cuda_device, **LONG, padding=2)
    force(_WORKSPACE=4 * (9 * 20 * 4) * 2)  # four parts of two images
    again = plan_of(plan.problem, cuda_device)
    assert again.workspace_bytes == plan.workspace_bytes * 2 // 3
    np.testing.assert_array_equal(run(again, cuda_device, *arrays), y)


def test_a_workspace_limit_means_fewer_splits(cuda_device: Any) -> None:
    previous = None
    part = 9 * 20 * 4
    for parts in (4, 3, 2, 1, 0):
        for spare in (part // 2, 0):
            limit = parts * part + spare if parts else spare // 2
            plan, *_ = conv(cuda_device, **LONG, padding=2, integers=True, workspace_limit=limit)
            splits, _ = implicit_gemm._passes(plan.problem, cuda_device)
            assert plan.workspace_bytes <= limit
            assert splits == (parts if parts >= 2 else 1)
            assert previous is None or splits <= previous
            previous = splits


def test_more_splits_than_tiles_of_k_leave_none_empty(cuda_device: Any, force: Force) -> None:
    force(_SPLIT_LENGTH=8)
    for depth in range(8, 90, 5):
        conv(cuda_device, (2, depth, 3), (2, depth, 1), integers=True)
        conv(cuda_device, (2, 3, depth), (2, depth, 1), integers=True, layout="NWC")


# ---- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("limit", "stems"),
    [(None, {"implicit_gemm", "split_sum", "pack_filter"}), (0, {"implicit_gemm"})],
)
def test_warmup_loads_what_a_call_launches(
    force: Force, passes: int, limit: int | None, stems: set[str]
) -> None:
    images = 33 if passes == 1 else 22
    force(_PACKING_PAYS=0, _WORKSPACE=4 * (9 * 20 * 4) * images)  # four parts of each
    problem = describe(
        "test", 2, (33, 5, 4, 64), (9, 64, 5, 5), "float32", "float32",
        layout="NHWC", padding=2, workspace_limit=limit,
    )  # fmt: skip
    x, w = np.zeros((33, 5, 4, 64), np.float32), np.zeros(problem.w_shape, np.float32)
    launches = 1 + 2 * passes if limit is None else 1
    assert_warmup_loads(problem, "implicit_gemm", x, w, stems, launches)


def test_variants_hold_whatever_a_problem_asks_for(
    cuda_device: Any, force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {(stem, launch.freeze(macros)) for stem, macros in implicit_gemm.variants()}
    assert len(listed) <= 64
    asked = set()

    class Recorder(EmulatedDevice):
        def load(self, source: str, macros: Any, kernel: str | None = None) -> Any:
            asked.add((source, launch.freeze(macros)))
            return None

    device = Recorder()
    for dtype, channels, layout, batch in itertools.product(
        implicit_gemm.TYPES, (3, 32, 512), ("NCHW", "NHWC"), (1, 32)
    ):
        for size in (1, 7, 56):
            shape = (batch, size, size, channels) if layout == "NHWC" else (
                batch, channels, size, size)  # fmt: skip
            problem = describe(
                "test", 2, shape, (4 * channels, channels, 3, 3), dtype, dtype,
                padding=1, layout=layout,
            )  # fmt: skip
            splits, _ = implicit_gemm._passes(problem, device)
            for rows in (4 * channels, 24, 128):
                problem = dataclasses.replace(problem, out_channels=rows)
                splits, _ = implicit_gemm._passes(problem, device)
                y = np.broadcast_to(np.zeros((), problem.x_dtype.numpy), problem.y_shape)
                x = np.broadcast_to(np.zeros((), problem.x_dtype.numpy), problem.x_shape)
                given = launch.Layout(x, x, None, y)
                for index in ("int32", "int64"):
                    monkeypatch.setattr(implicit_gemm, "index_type", lambda *a, i=index: i)
                    implicit_gemm.prepare_whole.cache_clear()
                    implicit_gemm.prepare_split.cache_clear()
                    implicit_gemm.prepare_whole(problem, device, given)
                    if splits > 1:
                        implicit_gemm.prepare_split(problem, device, given, splits)
                implicit_gemm.prepare_packing(problem, device, given)
    assert asked <= listed
    assert listed == asked


def test_the_struct_has_the_size_that_the_kernel_asserts() -> None:
    source = (compiler.source_folder() / "implicit_gemm.cu").read_text()
    assert f"sizeof(Tiling) == {implicit_gemm.TILING.itemsize}," in source


def test_what_it_does_not_serve(cuda_device: Any) -> None:
    problem = describe("test", 1, (1, 2, 9), (2, 2, 3), "float32", "float32")
    for changes, reason in (
        ({"operation": "wgrad"}, "computes fprop only, not wgrad"),
        ({"x_dtype": dtypes.INT32}, "no kernel for x in int32"),
        ({"w_dtype": dtypes.FLOAT64}, "must have one dtype"),
        ({"bias": dtypes.FLOAT16}, "must have one dtype"),
    ):
        changed = dataclasses.replace(problem, **changes)  # type: ignore[arg-type]
        verdict = implicit_gemm.supports(changed, cuda_device)
        assert isinstance(verdict, No)
        assert reason in verdict.reason


def test_the_model_prefers_it_to_direct_where_channels_abound(cuda_device: Any) -> None:
    def costs(x_shape: tuple[int, ...], w_shape: tuple[int, ...], **options: Any) -> Any:
        plan = gpuconv.plan_conv2d(x_shape, w_shape, backend="cuda", **options)
        return {c.algorithm: c.cost for c in plan.candidates}

    for batch, size in ((1, 56), (32, 28), (8, 7)):
        for layout in ("NCHW", "NHWC"):
            shape = (batch, 128, size, size) if layout == "NCHW" else (batch, size, size, 128)
            found = costs(shape, (128, 128, 3, 3), padding=1, layout=layout)
            assert found["implicit_gemm"] < found["direct"]
    found = costs((8, 64, 56, 56), (64, 1, 3, 3), groups=64)
    assert found["implicit_gemm"] > found["direct"]


def test_small_problems_get_small_tiles() -> None:
    device = EmulatedDevice()

    def tile(batch: int, channels: int, size: int, rows: int) -> Tile:
        problem = describe(
            "test", 2, (batch, channels, size, size), (rows, channels, 3, 3), "float32", "float32"
        )
        splits, _ = implicit_gemm._passes(problem, device)
        return implicit_gemm._choose(problem, device, batch, splits)[0]

    assert tile(1, 16, 14, 32) is SMALL
    assert tile(64, 256, 58, 256) is LARGE
    assert tile(8, 32, 114, 32) is FLAT


# ---- what the emulator sees ------------------------------------------------------------------

WATCHED = (
    ("NCHW", LARGE, "float32"), ("NHWC", LARGE, "float32"), ("NCHW", MEDIUM, "float64"),
    ("NHWC", MEDIUM, "float64"), ("NHWC", SMALL, "float16"), ("NCHW", FLAT, "float32"),
    ("NCHW", SMALL, "complex64"),
)  # fmt: skip


@pytest.mark.parametrize(("layout", "tile", "dtype"), WATCHED)
def test_no_races_and_no_bank_conflicts(force: Force, layout: str, tile: Tile, dtype: str) -> None:
    force(_tiles=only(tile))
    shape = (2, 8, 8, 16) if layout == "NHWC" else (2, 16, 8, 8)
    rng = np.random.default_rng(0)
    x = random_array(rng, shape, dtype)
    w = in_memory_order(
        random_array(rng, (64, 16, 3, 3), dtype),
        "channels_last" if layout == "NHWC" else "contiguous",
        1,
    )
    with emulated_device(mode="watch", order="random", block_order="shuffled") as device:
        problem = describe("test", 2, shape, w.shape, dtype, dtype, layout=layout, padding=1)
        with gpuconv.use_backend("cuda"):
            assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)
        report = device.report
    tiles = [s for s in report.sites if s.space == "shared" and s.bytes * s.lanes > 16 * s.requests]
    assert sum(s.wavefronts for s in tiles) == sum(s.ideal_wavefronts for s in tiles) > 0
    # Every 16 bytes are loaded as such, and a warp's loads leave no sector half used.
    wide = [s for s in report.sites if s.space == "global" and s.bytes == 16]
    assert sum(s.requests for s in wide)
    assert sum(s.sectors for s in wide) == sum(s.ideal_sectors for s in wide)
    everything = report.total("sectors", "global") / report.total("ideal_sectors", "global")
    assert everything < (1.05 if layout == "NHWC" else 1.5)


@pytest.mark.parametrize("order", ["descending", "interleaved"])
def test_split_and_packed_sums_without_a_race(force: Force, order: Any) -> None:
    force(_PACKING_PAYS=0, _SPLIT_LENGTH=100)
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (2, 3, 4, 40), "float32"), random_array(rng, (6, 40, 3, 3), "float32")
    with emulated_device(mode="watch", order=order) as device, gpuconv.use_backend("cuda"):
        problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, layout="NHWC", padding=1)
        assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)
        assert device.launches == 3
        stems = {site.kernel for site in device.report.sites}
    assert stems == {"implicit_gemm", "split_sum", "pack_filter"}


@pytest.mark.parametrize(
    ("layout", "tile", "dtype", "arch"),
    [
        ("NCHW", SMALL, "float32", "sm_90a"), ("NHWC", MEDIUM, "float16", "sm_75"),
        ("NHWC", SMALL, "float64", "sm_90a"),
    ],
)  # fmt: skip
def test_sanitized(force: Force, layout: str, tile: Tile, dtype: str, arch: str) -> None:
    force(_tiles=only(tile), _SPLIT_LENGTH=150, _PACKING_PAYS=0)
    rng = np.random.default_rng(0)
    with emulated_device(mode="sanitize", arch=arch) as device, gpuconv.use_backend("cuda"):
        for n, (channels, mode) in enumerate(zip((16, 24, 19, 17, 33), PADDING_MODES, strict=True)):
            shape = (2, 5, 6, channels) if layout == "NHWC" else (2, channels, 5, 6)
            x, w = random_array(rng, shape, dtype), random_array(rng, (7, channels, 3, 2), dtype)
            if n % 2:
                x, w = in_memory_order(x, "reversed", 1), in_memory_order(w, "offset", 1)
            problem = describe(
                "test", 2, x.shape, w.shape, x.dtype, w.dtype,
                layout=layout, padding=((2, 7), (1, 0)), padding_mode=mode, flip=n == 3,
            )  # fmt: skip
            assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)
