"""What is special to filter2d: its tiles, its slabs, its types, and how its threads use memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda_backend import filter2d, launch, tile
from gpuconv.cuda_backend.tile import Block
from gpuconv.plan import Plan, choose
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import (
    MEMORY_ORDERS,
    assert_close,
    in_memory_order,
    random_array,
)
from tests.cuda_backend.conftest import on_device, on_host
from tests.cuda_backend.test_kernels import sparse
from tests.emulator import emulated_device

TYPES = [
    ("float32", "float32"),
    ("float64", "float64"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("uint8", "float32"),
    ("uint8", "uint8"),  # proved exact in 32 bits
    ("uint8", "int64"),
    ("int8", "int8"),
    ("int8", "int32"),
    ("int16", "int8"),
    ("int16", "int16"),
    ("uint16", "float32"),  # told at run time
    ("float32", "float64"),
    ("uint64", "uint64"),
    ("bool", "int32"),
]
SIZES = [*((n, n) for n in (*range(1, 10), 15, 31, 63)), (1, 9), (9, 1), (3, 5), (2, 17)]

by_type = pytest.mark.parametrize(("x_dtype", "w_dtype"), TYPES)


@pytest.fixture
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiles of large images for small ones too."""
    monkeypatch.setattr(filter2d, "_TILES_PER_SM", 0)
    clear()
    yield
    clear()


def clear() -> None:
    filter2d._shape.cache_clear()
    filter2d.prepare.cache_clear()


def plan_of(x: Any, w: Any, device: Any, bias: Any = None, **options: Any) -> Plan:
    ndim = w.ndim - 2
    problem = describe(
        "test", ndim, x.shape, w.shape, x.dtype, w.dtype,
        bias=None if bias is None else bias.dtype, **options,
    )  # fmt: skip
    return choose("test", problem, "cuda", device, "filter2d")


def compute(device: Any, x: Any, w: Any, bias: Any = None, **options: Any) -> Any:
    plan = plan_of(x, w, device, bias, **options)
    y = on_host(plan(*(on_device(device, a) for a in (x, w, bias))))
    assert_close(plan.problem, y, x, w, bias)
    return y


def images(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    filter: tuple[int, ...],
    x_dtype: str = "float32",
    w_dtype: str = "float32",
) -> tuple[Any, Any]:
    x = random_array(rng, (shape[0], 1, *shape[1:]), x_dtype)
    return x, random_array(rng, (1, 1, *filter), w_dtype)


# ---- results -------------------------------------------------------------------------------


@by_type
def test_every_filter_size(cuda_device: Any, x_dtype: str, w_dtype: str) -> None:
    rng = np.random.default_rng(0)
    for (r, s), mode in zip(SIZES, itertools.cycle(PADDING_MODES), strict=False):
        x, w = images(rng, (1, 21, 139), (r, s), x_dtype, w_dtype)
        bias = None
        if r % 2:
            y_dtype = plan_of(x, w, cuda_device, padding="same").problem.y_dtype
            bias = random_array(rng, (1,), y_dtype)
        compute(cuda_device, x, w, bias, padding="same", padding_mode=mode)


@by_type
def test_tall_tiles(cuda_device: Any, tall_tiles: None, x_dtype: str, w_dtype: str) -> None:
    rng = np.random.default_rng(0)
    for r, s in ((1, 1), (2, 3), (4, 4), (9, 6), (12, 9), (31, 15)):
        x, w = images(rng, (2, 71, 133), (r, s), x_dtype, w_dtype)
        compute(cuda_device, x, w, padding="same", padding_mode="symmetric")


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_images_around_the_size_of_a_tile(cuda_device: Any, size: int) -> None:
    rng = np.random.default_rng(0)
    for height, width in itertools.product((1, 15, 16, 17, 31, 32, 33), (1, 127, 128, 129, 257)):
        x, w = images(rng, (1, height, width), (size, size))
        compute(cuda_device, x, w, padding="same_lower")


def test_tall_tiles_and_images_of_their_size(cuda_device: Any, tall_tiles: None) -> None:
    rng = np.random.default_rng(0)
    for height, width in itertools.product((63, 64, 65, 129), (127, 128, 129)):
        x, w = images(rng, (1, height, width), (4, 6))
        compute(cuda_device, x, w, padding="same", padding_mode="reflect")


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "float64", "int32"])
def test_signals(cuda_device: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for length, taps in itertools.product((1, 1023, 1024, 1025), (1, 2, 7, 64, 501)):
        x, w = images(rng, (3, length), (taps,), dtype, dtype)
        compute(cuda_device, x, w, padding="same")
    x, w = images(rng, (2, 900), (5,), dtype, dtype)
    compute(cuda_device, x, w, stride=3, dilation=7, padding=40, padding_mode="circular")


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("x_dtype", ["float32", "uint8"])
def test_pads_longer_than_the_image(cuda_device: Any, x_dtype: str, mode: str) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 7), (3, 2), (5, 16)):
        for r, s in ((3, 3), (4, 2), (7, 7)):
            x, w = images(rng, (2, height, width), (r, s), x_dtype)
            compute(cuda_device, x, w, padding=((9, 21), (40, 13)), padding_mode=mode)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "float64"])
def test_every_alignment(cuda_device: Any, dtype: str) -> None:
    """Rows and pads at every distance from a multiple of 16 bytes."""
    rng = np.random.default_rng(0)
    w_dtype = "float32" if dtype == "uint8" else dtype
    for width, pad in itertools.product((144, *range(137, 142)), (0, 1, 2, 3, 4, 16)):
        x, w = images(rng, (1, 19, width), (3, 3), dtype, w_dtype)
        compute(cuda_device, x, w, padding=((1, 1), (pad, 2)))
    whole = random_array(rng, (1, 1, 24, 180), dtype)
    for left in range(17):  # the window of a larger image
        x = whole[:, :, 2:, left : left + 130]
        compute(cuda_device, x, w, padding=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_memory_orders(cuda_device: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w = images(rng, (2, 37, 135), (5, 5), dtype, "float32" if dtype == "uint8" else dtype)
    plan = plan_of(x, w, cuda_device, padding=2)
    y = compute(cuda_device, x, w, padding=2)
    for order, out_order in itertools.product(MEMORY_ORDERS, MEMORY_ORDERS):
        given = (in_memory_order(a, order, 1) for a in (x, w))
        out = in_memory_order(np.full_like(y, 1), out_order, 1)
        again = plan(*(on_device(cuda_device, a) for a in given), out=on_device(cuda_device, out))
        np.testing.assert_array_equal(on_host(again), y)
    sliced = np.repeat(np.repeat(x, 2, axis=2), 3, axis=3)[:, :, ::-2, 1::3][:, :, ::-1]
    np.testing.assert_array_equal(compute(cuda_device, sliced, w, padding=2), y)


def test_strides_and_dilations(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    for stride, dilation, size in itertools.product(
        ((1, 2), (2, 2), (3, 1)), ((1, 1), (2, 3)), ((3, 3), (1, 4), (7, 2))
    ):
        x, w = images(rng, (2, 45, 150), size)
        compute(cuda_device, x, w, stride=stride, dilation=dilation, padding="same")


@by_type
def test_strides_and_dilations_of_every_type(
    cuda_device: Any, tall_tiles: None, x_dtype: str, w_dtype: str
) -> None:
    rng = np.random.default_rng(0)
    for (stride, dilation, size, height), mode in zip(
        [
            (2, 1, (3, 3), 61),
            (3, 1, (5, 6), 80),
            (4, 1, (2, 3), 40),
            (1, 2, (3, 3), 55),
            (1, 3, (4, 5), 80),
            ((2, 3), (3, 2), (3, 4), 90),
            ((4, 6), (6, 4), (2, 3), 100),
            (1, (40, 1), (2, 1), 60),
        ],
        itertools.cycle(PADDING_MODES),
        strict=False,
    ):
        x, w = images(rng, (2, height, 139), size, x_dtype, w_dtype)
        options: Any = {"stride": stride, "dilation": dilation, "padding_mode": mode}
        tall = compute(cuda_device, x, w, padding="same", **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(filter2d, "_TILES_PER_SM", 1 << 20)
            clear()
            np.testing.assert_array_equal(
                compute(cuda_device, x, w, padding="same", **options), tall
            )
        clear()


def test_nan_stays_where_its_strided_and_dilated_windows_are(
    cuda_device: Any, tall_tiles: None
) -> None:
    rng = np.random.default_rng(0)
    for stride, dilation, size in ((2, 1, 3), (3, 1, 6), (1, 2, 5), (2, 3, 3)):
        x, w = images(rng, (1, 90, 140), (size, size))
        x[0, 0, 40, 70] = np.nan
        y = compute(cuda_device, x, w, stride=stride, dilation=dilation)
        rows, columns = (
            {(at - tap * dilation) // stride for tap in range(size)
             if (at - tap * dilation) % stride == 0}
            for at in (40, 70)
        )  # fmt: skip
        found = {(int(p), int(q)) for p, q in np.argwhere(np.isnan(y[0, 0]))}
        assert found == set(itertools.product(rows, columns))


def test_result_types(cuda_device: Any) -> None:
    rng = np.random.default_rng(0)
    for x_dtype, w_dtype in (("uint8", "uint8"), ("int16", "int32"), ("bool", "bool")):
        x, w = images(rng, (1, 20, 40), (3, 3), x_dtype, w_dtype)
        for dtype in ("uint8", "int32", "uint64", "float32", "float64"):
            compute(cuda_device, x, w, dtype=dtype, padding=1)
    x, w = images(rng, (1, 20, 40), (3, 3), "float32", "float32")
    for dtype in ("float16", "float64"):
        compute(cuda_device, x, w, dtype=dtype, padding=1)


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [("uint8", "uint8"), ("uint8", "int8"), ("int8", "int8"), ("int16", "int8")],
)
def test_the_largest_integers(cuda_device: Any, x_dtype: str, w_dtype: str) -> None:
    """32-bit sums are used where no data can make them overflow, and nowhere else."""
    for edge in ("min", "max"):
        x = np.full((1, 1, 70, 70), getattr(np.iinfo(x_dtype), edge), x_dtype)
        for size in (3, 5, 7, 15, 17, 63):
            w = np.full((1, 1, size, size), np.iinfo(w_dtype).min or 255, w_dtype)
            compute(cuda_device, x, w)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int16"])
def test_sums_do_not_depend_on_the_tiles(
    cuda_device: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tall or short, unrolled or not, in slabs, with either index: the same bits."""
    rng = np.random.default_rng(0)
    for size in ((3, 3), (7, 7), (20, 9)):
        x, w = images(rng, (3, 40, 150), size, dtype, "float32")
        clear()
        usual = compute(cuda_device, x, w, padding="same")
        for n in range(3):
            alone = compute(cuda_device, x[n : n + 1], w, padding="same")
            np.testing.assert_array_equal(alone, usual[n : n + 1])
        for changes in (
            {"_TILES_PER_SM": 0},
            {"_UNROLLED": (0, 0, 0)},
            {"shared_budget": lambda device: 17 << 10},
            {"index_type": lambda *_: "int64"},
        ):
            with monkeypatch.context() as patch:
                for name, value in changes.items():
                    module = {"shared_budget": tile, "index_type": tile}.get(name, filter2d)
                    patch.setattr(module, name, value)
                clear()
                again = compute(cuda_device, x, w, padding="same")
            np.testing.assert_array_equal(again, usual)
    clear()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_nan_and_infinity_stay_where_their_windows_are(cuda_device: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for size in (3, 4, 5, 6, 7, 9):
        x, w = images(rng, (1, 40, 140), (size, size), dtype, "float32")
        if dtype == "uint8":  # there the filter has it
            w[0, 0, 1, 1] = np.inf
            x[0, 0] = 0
            assert np.isnan(compute(cuda_device, x, w)).all()
            continue
        w = w.astype(dtype)
        x[0, 0, 20, 70], x[0, 0, 3, 127] = np.nan, np.inf
        y = compute(cuda_device, x, w)
        clean = np.ones(y.shape, bool)
        for row, column in ((20, 70), (3, 127)):
            clean[0, 0, max(row - size + 1, 0) : row + 1, column - size + 1 : column + 1] = False
        assert np.isfinite(y[clean]).all()
        assert not np.isfinite(y[~clean]).any()


FAR = 2**31 + 1000  # elements, and bytes


@pytest.mark.parametrize("which", ["x image", "x row", "x back", "x column", "w", "y"])
def test_offsets_past_two_to_the_31(cuda_device: Any, which: str, tmp_path: Path) -> None:
    """Far images and rows need no other kernel; far columns do."""
    rng = np.random.default_rng(0)
    for height, x_dtype, w_dtype in ((5, "uint8", "float32"), (1, "int8", "int8")):
        x, w = images(rng, (2, height, 6), (min(height, 3), 2), x_dtype, w_dtype)
        plan = plan_of(x, w, cuda_device, padding=1, dtype="int8" if height == 1 else None)
        y = on_host(plan(on_device(cuda_device, x), on_device(cuda_device, w)))
        expect = "int64" if which in ("x column", "w") else "int32"
        given_x, given_w, out = x, w, None
        if which.startswith("x"):
            strides = {
                "x image": (FAR, 60, 6, 1),
                "x row": (100, 50, FAR // 4, 1),
                "x back": (60, 30, -FAR // 4, 1),
                "x column": (100, 10, 1, FAR // 5),
            }
            given_x = sparse(str(tmp_path), x.shape, strides[which], "x").view(x.dtype)
            given_x[...] = x
        elif which == "w" and w_dtype == "int8":
            given_w = sparse(str(tmp_path), w.shape, (1, 1, 1, FAR // 2), "w")
            given_w[...] = w
        elif which == "y" and height == 1:
            out = sparse(str(tmp_path), y.shape, (FAR, 1, FAR // 4, 1), "y")
        else:
            continue
        layout = launch.Layout(given_x, given_w, None, y if out is None else out)
        assert tile.index_type(plan.problem, layout) == expect
        again = plan(given_x, given_w, out=out)
        np.testing.assert_array_equal(on_host(again), y)


# ---- choices ---------------------------------------------------------------------------------


def test_variants_hold_whatever_a_problem_asks_for(
    cuda_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {launch.freeze(macros) for _, macros in filter2d.variants()}
    assert len(listed) <= 100
    asked = set()
    for tiles, (x, w), size, height, stride, index in itertools.product(
        (0, 2), (*TYPES, ("int32", "int32")), (3, 4, 5, 7), (1, 60), (1, 2), ("int32", "int64")
    ):
        monkeypatch.setattr(filter2d, "_TILES_PER_SM", tiles)
        clear()
        problem = describe(
            "test", 2, (1, 1, height, 60), (1, 1, size, size), x, w, stride=stride, padding="same"
        )
        shape = filter2d._shape(problem, cuda_device, 1, index)
        assert shape is not None
        asked.add(launch.freeze(shape.macros(index)))
    clear()
    assert asked == listed


def test_what_it_refuses(cuda_device: Any) -> None:
    problem = ConvProblem((30, 30), (3, 3))
    assert filter2d.supports(problem, cuda_device) is True
    for changes, reason in (
        ({"operation": "dgrad"}, "fprop only"),
        ({"in_channels": 2}, "one channel"),
        ({"in_channels": 2, "out_channels": 2, "groups": 2}, "one channel"),
        ({"stride": (40, 40)}, "shared memory"),
    ):
        verdict = filter2d.supports(replace(problem, **changes), cuda_device)
        assert not verdict
        assert reason in verdict.reason


class Small:
    """The limits of a device of compute capability 7.5."""

    max_shared_bytes, sm_count, bandwidth, clock_hz = 64 << 10, 40, 3e11, 1.5e9


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_the_largest_filters_fit_in_64_kib(dtype: str) -> None:
    device: Any = Small()
    problem = plan_problem((4096, 4096), (63, 63), dtype)
    shape = filter2d._shape(problem, device, 1)
    assert shape is not None
    assert 8 <= shape.slab <= 63
    assert shape.shared_bytes <= device.max_shared_bytes


def plan_problem(image: tuple[int, ...], filter: tuple[int, ...], dtype: str) -> ConvProblem:
    return describe("test", len(image), (1, 1, *image), (1, 1, *filter), dtype, dtype)


def test_auto_takes_it_for_images(cuda_device: Any) -> None:
    for dtype, size in itertools.product(("float32", "uint8"), (3, 5, 9, 31)):
        plan = gpuconv.plan_conv2d(
            (1, 1, 2048, 2048), (1, 1, size, size), dtype=(dtype, "float32"), padding="same",
            backend="cuda",
        )  # fmt: skip
        assert plan.algorithm == "filter2d", str(plan)
        assert plan.workspace_bytes == 0


# ---- how it uses memory ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["descending", "random", "interleaved"])
def test_no_race(order: Any) -> None:
    rng = np.random.default_rng(0)
    with (
        emulated_device(mode="watch", order=order, block_order="shuffled") as device,
        gpuconv.use_backend("cuda"),
    ):
        for size, x_dtype in ((3, "float32"), (6, "float32"), (3, "uint8")):
            x, w = images(rng, (2, 35, 131), (size, size), x_dtype)
            compute(device, x, w, padding="same", padding_mode="reflect")


def test_no_race_between_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "shared_budget", lambda device: 17 << 10)
    clear()
    rng = np.random.default_rng(0)
    with emulated_device(mode="watch", order="random") as device, gpuconv.use_backend("cuda"):
        x, w = images(rng, (1, 35, 131), (25, 6))
        compute(device, x, w, padding="same")
    clear()


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "size", "padding"),
    [
        ("float32", "float32", 3, 1),
        ("float32", "float32", 3, 0),
        ("float32", "float32", 9, 4),
        ("float16", "float16", 3, 1),
        ("uint8", "float32", 3, 1),
        ("uint8", "int64", 3, 1),
        ("float64", "float64", 5, 2),
    ],
)
def test_banks_and_sectors(x_dtype: str, w_dtype: str, size: int, padding: int) -> None:
    rng = np.random.default_rng(0)
    with emulated_device(mode="watch") as device, gpuconv.use_backend("cuda"):
        x, w = images(rng, (1, 64, 384), (size, size), x_dtype, w_dtype)
        compute(device, x, w, padding=padding)
        report = device.report
    # At the right edge of an image without pads, single elements complete the last vectors.
    most = report.total("ideal_wavefronts", "shared") * (1.0 if padding else 1.05)
    assert report.total("wavefronts", "shared") <= most, str(report)
    # A row of a tile begins anywhere in a sector, and its last few elements are a request more.
    sectors = report.total("sectors", "global")
    assert sectors <= 1.25 * report.total("ideal_sectors", "global"), str(report)
    # Every byte is read and written about once: the halo of tiles of 32 rows, or 16.
    once = (x.nbytes + 64 * 384 * plan_of(x, w, device).problem.y_dtype.itemsize) / 32
    # Small elements come as two aligned words for each of the tile, the second out of L1.
    twice = x.nbytes / 32 if x.itemsize < 4 else 0
    assert sectors <= (1.35 + size / 16) * (once + twice), str(report)
    assert not any(site.uninitialised for site in report.sites), str(report)


@pytest.mark.parametrize("tiles", [0, 1 << 20])
@pytest.mark.parametrize(
    ("stride", "dilation"), [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), ((2, 3), (3, 2))]
)
@pytest.mark.parametrize("x_dtype", ["float32", "float64", "float16", "uint8"])
def test_windows_of_strides_and_dilations_meet_no_bank_twice(
    monkeypatch: pytest.MonkeyPatch, x_dtype: str, stride: Any, dilation: Any, tiles: int
) -> None:
    monkeypatch.setattr(filter2d, "_TILES_PER_SM", tiles)
    clear()
    rng = np.random.default_rng(0)
    with emulated_device(mode="watch", order="random") as device, gpuconv.use_backend("cuda"):
        x, w = images(rng, (1, 99, 200), (3, 5), x_dtype, "int8" if x_dtype == "uint8" else x_dtype)
        compute(device, x, w, stride=stride, dilation=dilation, padding=2)
        report = device.report
    loads = [s for s in report.sites if (s.space, s.operation) == ("shared", "load")]
    assert loads
    assert all(site.cost == site.ideal for site in loads), str(report)
    stores = [s for s in report.sites if (s.space, s.operation) == ("shared", "store")]
    if stride in (1, 3) and x.itemsize >= 4:  # where lanes at an edge do not confuse the count
        assert all(site.cost == site.ideal for site in stores), str(report)
    assert not any(site.uninitialised for site in report.sites), str(report)
    clear()


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("stride", range(2, 17))
def test_phases_of_a_stride_are_written_without_a_conflict(itemsize: int, stride: int) -> None:
    """Each column of the tile goes to its phase: of no warp's do two words lie in one bank."""
    block = Block(32, 4, 4)
    problem = describe(
        "test", 2, (1, 1, 40, 9999), (1, 1, 3, 5), "float32", "float32", stride=stride
    )
    pitch = tile.phase_pitch(problem, block, itemsize)
    columns = tile.columns(problem, block)
    assert pitch >= -(-columns // stride)
    together = min(32, 128 // itemsize)  # lanes that shared memory serves at once
    most = 0
    for first in range(0, columns - together + 1, together):
        places = [j % stride * pitch + j // stride for j in range(first, first + together)]
        words = {at * itemsize // max(itemsize, 4) for at in places}
        banks = Counter(word % (128 // max(itemsize, 4)) for word in words)
        most = max(most, *banks.values())
    # Even strides but powers of two: no distance between phases is free of conflicts.
    hard = itemsize >= 4 and stride % 2 == 0 and stride & (stride - 1)
    assert most == (2 if hard else 1)


def test_rows_that_are_aligned_are_read_16_bytes_at_a_time() -> None:
    rng = np.random.default_rng(0)
    with emulated_device(mode="watch") as device, gpuconv.use_backend("cuda"):
        x, w = images(rng, (1, 40, 256), (3, 3))
        compute(device, x, w, padding=((1, 1), (4, 4)))
        loads = [s for s in device.report.sites if (s.space, s.operation) == ("global", "load")]
        assert sum(s.lanes * s.bytes for s in loads if s.bytes == 16) > 0.9 * x.nbytes
        device.report.clear()
        compute(device, x, w, padding="same")
        stores = [s for s in device.report.sites if (s.space, s.operation) == ("global", "store")]
        assert {s.bytes for s in stores} == {16}


def test_no_access_out_of_bounds() -> None:
    rng = np.random.default_rng(0)
    with emulated_device(mode="sanitize") as device, gpuconv.use_backend("cuda"):
        for x_dtype, size in (("uint8", (3, 3)), ("float32", (4, 5))):
            for width, left in ((130, 0), (131, 1), (129, 3), (6, 2)):
                whole, w = images(rng, (1, 18, width + 4), size, x_dtype)
                x = whole[:, :, 1:, left : left + width]
                compute(device, x, w, padding="same", padding_mode="symmetric")
                compute(device, np.ascontiguousarray(x[..., ::-1]), w, padding="same")
                for stride, dilation in ((2, 1), (1, 2), (3, 2)):
                    compute(device, x, w, stride=stride, dilation=dilation, padding=4)
