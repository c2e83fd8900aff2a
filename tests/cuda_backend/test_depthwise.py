"""What is special to depthwise: tiles and their edges, two layouts, what its warps touch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda_backend import depthwise, depthwise_tiling, launch
from gpuconv.cuda_backend.depthwise_tiling import ChannelsLast, Planes
from gpuconv.cuda_backend.launch import Layout
from gpuconv.execute import channels_first
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import MEMORY_ORDERS, assert_close, in_memory_order, random_array
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import emulated_device

LAYOUTS = ("NCHW", "NHWC")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["many processors", "one processor"])
def cut(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cuda_device: Any
) -> Iterator[str]:
    """Small problems are cut small to occupy a device; on one multiprocessor, as large ones are."""
    if request.param == "one processor":
        monkeypatch.setattr(cuda_device, "sm_count", 1)
    depthwise.prepare.cache_clear()
    yield request.param
    depthwise.prepare.cache_clear()


def problem_of(
    x: Any, w: Any, layout: str = "NCHW", bias: Any = None, **options: Any
) -> ConvProblem:
    ndim = w.ndim - 2
    name = {1: {"NCHW": "NCW", "NHWC": "NWC"}}.get(ndim, {}).get(layout, layout)
    groups = x.shape[-1 if layout == "NHWC" else -ndim - 1]
    return describe(
        f"conv{ndim}d", ndim, x.shape, w.shape, x.dtype, w.dtype, groups=groups, layout=name,
        bias=None if bias is None else bias.dtype, **options,
    )  # fmt: skip


def compute(
    device: Any, x: Any, w: Any, bias: Any = None, *, layout: str = "NCHW", out: Any = None,
    exact: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The result, compared with the reference."""
    problem = problem_of(x, w, layout, bias, **options)
    plan = choose("test", problem, "cuda", device, "depthwise")
    arrays = (on_device(device, a) for a in (x, w, bias))
    y = on_host(plan(*arrays, out=on_device(device, out)))
    assert_close(problem, y, x, w, bias, exact=exact)
    return y


def arrays_of(
    shape: tuple[int, ...],
    filter: tuple[int, ...],
    *,
    layout: str = "NCHW",
    dtype: str = "float32",
    multiplier: int = 1,
    bias: bool = False,
    integers: bool = True,
    seed: int = 0,
) -> tuple[Any, Any, Any]:
    """x of shape (N, C, spatial...) in `layout`, w, and bias."""
    rng = np.random.default_rng(seed)
    n, c, *spatial = shape
    x_shape = (n, c, *spatial) if layout == "NCHW" else (n, *spatial, c)
    x = random_array(rng, x_shape, dtype, integers)
    w = random_array(rng, (c * multiplier, 1, *filter), dtype, integers)
    return x, w, random_array(rng, (c * multiplier,), dtype, integers) if bias else None


# ---- random problems -------------------------------------------------------------------------


def random_call(seed: int) -> tuple[tuple[Any, Any, Any], dict[str, Any], str]:
    rnd = random.Random(seed)
    ndim = rnd.choice((1, 2, 2, 2))
    layout = rnd.choice(LAYOUTS)
    square = rnd.choice((3, 5, 7))
    filter = rnd.choice(
        ((square,) * ndim, (square,) * ndim, tuple(rnd.randint(1, 8) for _ in range(ndim)))
    )
    step = rnd.choice((1, 1, 2))
    stride = rnd.choice(((step,) * ndim, (step,) * ndim, tuple(rnd.randint(1, 3) for _ in filter)))
    dilation = rnd.choice(((1,) * ndim,) * 3 + (tuple(rnd.randint(1, 3) for _ in filter),))
    low = [d * (f - 1) + 1 for f, d in zip(filter, dilation, strict=True)]
    padding = tuple((rnd.randint(0, 6), rnd.randint(0, 6)) for _ in filter)
    spatial = tuple(
        max(rnd.randint(1, (40, 20)[ndim - 1]), n - sum(pad))
        for n, pad in zip(low, padding, strict=True)
    )
    arrays = arrays_of(
        (rnd.randint(1, 3), rnd.choice((1, 2, 3, 5, 8, 16, 21, 40)), *spatial),
        filter,
        layout=layout,
        dtype=rnd.choice(("float32", "float16")),
        multiplier=rnd.choice((1, 1, 1, 2, 3)),
        bias=rnd.random() < 0.4,
        integers=rnd.random() < 0.3,
        seed=seed,
    )
    options = {
        "layout": layout,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "padding_mode": rnd.choice(PADDING_MODES),
    }
    return arrays, options, rnd.choice(MEMORY_ORDERS)


@pytest.mark.parametrize("block", range(3))
def test_random_depthwise_problems(cuda_device: Any, cut: str, block: int) -> None:
    for seed in range(90 * block, 90 * (block + 1)):
        (x, w, bias), options, memory = random_call(seed)
        channel_axis = -1 if options["layout"] == "NHWC" else 1 - x.ndim
        x = in_memory_order(x, memory, channel_axis)
        compute(cuda_device, x, w, bias, **options)


# ---- tiles and their edges -------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("filter", [3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes_around_strips_segments_and_tiles(
    cuda_device: Any, cut: str, layout: str, filter: int, stride: int
) -> None:
    """Whole numbers in, exact sums out: one element off shows."""
    for height, width in ((1, 1), (7, 4), (8, 5), (9, 3), (15, 16), (16, 17), (17, 15), (33, 8)):
        x, w, bias = arrays_of((2, 3, height, width), (filter, filter), layout=layout, bias=True)
        compute(
            cuda_device, x, w, bias,
            layout=layout, stride=stride, padding=filter // 2 + (filter > height), exact=True,
        )  # fmt: skip


@pytest.mark.parametrize("width", [127, 128, 129, 255, 257, 1030])
def test_rows_of_several_tiles(cuda_device: Any, cut: str, width: int) -> None:
    x, w, _ = arrays_of((1, 2, 3, width), (3, 3))
    compute(cuda_device, x, w, padding=1, exact=True)
    x, w, _ = arrays_of((1, 2, width), (5,))
    compute(cuda_device, x, w, padding=2, padding_mode="circular", exact=True)


@pytest.mark.parametrize("planes", [1, 31, 63, 64, 65, 255, 257, 300])
def test_many_small_planes_in_a_block(cuda_device: Any, cut: str, planes: int) -> None:
    for size, dtype in ((7, "float32"), (4, "float16"), (3, "float16")):
        x, w, bias = arrays_of((1, planes, size, size), (3, 3), dtype=dtype, bias=True)
        compute(cuda_device, x, w, bias, padding=1, exact=True)
        compute(cuda_device, x, w, bias, exact=True)  # down to one element


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 24, 31, 33, 64, 65, 96, 130])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_channels_around_a_block_of_them(
    cuda_device: Any, cut: str, channels: int, dtype: str
) -> None:
    x, w, bias = arrays_of((2, channels, 6, 9), (3, 3), layout="NHWC", dtype=dtype, bias=True)
    compute(cuda_device, x, w, bias, layout="NHWC", padding=1, exact=True)


@each_layout
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_pads_longer_than_the_input(cuda_device: Any, layout: str, mode: str) -> None:
    for extents in ((1, 1), (2, 3), (5, 4)):
        for dtype in ("float32", "float16"):
            x, w, _ = arrays_of((2, 3, *extents), (3, 3), layout=layout, dtype=dtype)
            compute(
                cuda_device, x, w,
                layout=layout, padding=((11, 9), (13, 8)), padding_mode=mode, exact=True,
            )  # fmt: skip


@each_layout
@pytest.mark.parametrize("filter", [(13, 13), (31, 31), (1, 21), (19, 1), (2, 2), (9, 6)])
def test_large_and_lopsided_filters(
    cuda_device: Any, cut: str, layout: str, filter: tuple[int, int]
) -> None:
    for extents in ((14, 14), (9, 37)):
        x, w, _ = arrays_of((1, 3, *extents), filter, layout=layout)
        compute(cuda_device, x, w, layout=layout, padding="same", exact=True)


@each_layout
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_long_filter_reads_no_further_than_its_windows(
    cuda_device: Any, cut: str, layout: str, dtype: str
) -> None:
    """An infinite element makes those sums infinite that see it, and no sum beside them NaN."""
    for filter in ((13, 13), (3, 9), (2, 18)):
        x, w, _ = arrays_of((1, 5, 21, 27), filter, layout=layout, dtype=dtype, integers=False)
        view = x if layout == "NCHW" else np.moveaxis(x, -1, 1)
        view[0, 1, 10, 13] = view[0, 4, 20, 26] = np.inf
        y = compute(cuda_device, x, w, layout=layout)
        assert 0 < np.isinf(y.astype(np.float64)).sum() < y.size / 2
        assert not np.isnan(y.astype(np.float64)).any()


@each_layout
def test_a_filter_that_only_just_fits(cuda_device: Any, layout: str) -> None:
    """Tiles shrink as windows grow, down to a row; beyond that it refuses."""
    refused = 0
    for filter in ((63, 63), (101, 101), (255, 31), (201, 201), (401, 401)):
        x, w, _ = arrays_of((1, 2, 3, 5), filter, layout=layout)
        problem = problem_of(x, w, layout, padding="same")
        if depthwise.supports(problem, cuda_device):
            compute(cuda_device, x, w, layout=layout, padding="same", exact=True)
        else:
            refused += 1
    assert 0 < refused < 4


@each_layout
@pytest.mark.parametrize("limit", [48 << 10, 64 << 10, 227 << 10])
def test_no_block_takes_more_shared_memory_than_there_is(layout: str, limit: int) -> None:
    with emulated_device() as device:
        device.max_shared_bytes = limit
        for seed in range(150):
            rnd = random.Random(seed)
            extents = [rnd.choice((5, 9, 30, 130)) for _ in range(2)]
            filter = [rnd.choice((1, 3, 7, 15, 31, 63)) for _ in range(2)]
            multiplier = rnd.choice((1, 1, 2, 60))
            dtype = rnd.choice(("float16", "float32", "float64"))
            shape, c = (2, 3, *extents), rnd.choice((3, 40))
            x = np.broadcast_to(np.zeros((), dtype), (shape[0], c, *extents))
            x = np.ascontiguousarray(np.moveaxis(x, 1, -1) if layout == "NHWC" else x)
            w = np.zeros((c * multiplier, 1, *filter), dtype)
            problem = problem_of(x, w, layout, padding="same", stride=rnd.choice((1, 2)))
            if not depthwise.supports(problem, device):
                continue
            n, k, p, q = problem.y_shape
            y = np.zeros((n, p, q, k) if layout == "NHWC" else (n, k, p, q), dtype)
            views = (channels_first(a, layout == "NHWC", True) for a in (x, y))
            first, last = views
            index = launch.index_type(problem, Layout(first, w, None, last))
            for tile, variant in (
                (depthwise_tiling.tile_planes, Planes),
                (depthwise_tiling.tile_channels_last, ChannelsLast),
            ):
                chosen = variant.of(problem, index)
                if chosen.smallest_tile(problem) <= limit:
                    blocks = tile(problem, chosen, Layout(first, w, None, last), device)
                    assert blocks.shared_bytes + 5120 <= limit, problem
                    assert blocks.threads <= chosen.threads


@each_layout
@pytest.mark.parametrize("multiplier", [2, 3, 70])
def test_several_output_channels_of_each(
    cuda_device: Any, cut: str, layout: str, multiplier: int
) -> None:
    for channels, filter in ((1, 3), (3, 5), (9, 2)):
        x, w, bias = arrays_of(
            (2, channels, 9, 10), (filter, filter), layout=layout, multiplier=multiplier, bias=True
        )
        compute(cuda_device, x, w, bias, layout=layout, padding=1, exact=True)


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORY_ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_memory_order_of_x_w_and_out(
    cuda_device: Any, cut: str, memory: str, dtype: str
) -> None:
    for width in (8, 9, 32):
        x, w, bias = arrays_of((2, 4, 9, width), (3, 3), dtype=dtype, bias=True)
        y = compute(cuda_device, x, w, bias, padding=1, exact=True)
        for other in MEMORY_ORDERS:
            out = in_memory_order(np.full_like(y, 7), other, 1)
            again = compute(
                cuda_device, in_memory_order(x, memory, 1), in_memory_order(w, memory, 1), bias,
                out=out, padding=1, exact=True,
            )  # fmt: skip
            np.testing.assert_array_equal(again, y)


def test_padded_rows_and_planes(cuda_device: Any, cut: str) -> None:
    """Slices of larger arrays: aligned rows, with what lies between them left alone."""
    for dtype in ("float32", "float16"):
        x, w, _ = arrays_of((2, 3, 8, 16), (3, 3), dtype=dtype)
        wide = x[:, :, :, :9]
        room = np.full((2, 3, 8, 16), 7, dtype)
        y = compute(cuda_device, wide, w, out=room[:, :, :, :9], padding=1, exact=True)
        assert (room[:, :, :, 9:] == 7).all() or cuda_device.xp is not np
        np.testing.assert_array_equal(
            y, compute(cuda_device, np.ascontiguousarray(wide), w, padding=1)
        )


def test_64_bit_offsets(cuda_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "index_type", lambda *args: "int64")
    depthwise.prepare.cache_clear()
    for layout in LAYOUTS:
        for dtype in ("float32", "float16"):
            x, w, bias = arrays_of((2, 5, 9, 11), (3, 3), layout=layout, dtype=dtype, bias=True)
            compute(cuda_device, x, w, bias, layout=layout, padding=1, stride=2, exact=True)
    depthwise.prepare.cache_clear()


# ---- bits ------------------------------------------------------------------------------------


ORDERS = [(3, 1), (3, 2), (7, 1), (6, 1), (5, 3), (17, 1), (13, 1)]


@pytest.mark.parametrize(
    ("dtype", "filter", "stride"),
    [(dtype, *each) for dtype in ("float32", "float16") for each in ORDERS]
    + [(dtype, *each) for dtype in ("bfloat16", "float64") for each in ORDERS[::2]],
)
def test_one_order_of_every_sum(
    cuda_device: Any, dtype: str, filter: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layouts, tiles, variants, batches: the same bits, which are those of direct."""
    x, w, bias = arrays_of((3, 5, 19, 22), (filter, filter), dtype=dtype, bias=True, integers=False)
    options: dict[str, Any] = {"stride": stride, "padding": 2}
    problem = problem_of(x, w, bias=bias, **options)
    direct = choose("test", problem, "cuda", cuda_device, "direct")
    y = on_host(direct(*(on_device(cuda_device, a) for a in (x, w, bias))))

    def again(x: Any, layout: str) -> Any:
        result = compute(cuda_device, x, w, bias, layout=layout, **options)
        return channels_first(result, layout == "NHWC", True)

    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    for sm_count in (1, 1000):
        monkeypatch.setattr(cuda_device, "sm_count", sm_count)
        depthwise.prepare.cache_clear()
        np.testing.assert_array_equal(again(x, "NCHW"), y)
        np.testing.assert_array_equal(again(last, "NHWC"), y)
        np.testing.assert_array_equal(again(x[1:2], "NCHW"), y[1:2])
        np.testing.assert_array_equal(again(np.concatenate([last] * 5), "NHWC")[3:6], y)
    depthwise.prepare.cache_clear()


# ---- plans -----------------------------------------------------------------------------------


def test_it_refuses_with_a_reason(cuda_device: Any) -> None:
    x, w, _ = arrays_of((1, 4, 8, 8), (3, 3))
    fine = problem_of(x, w)
    assert depthwise.supports(fine, cuda_device) is True
    volume = describe("conv3d", 3, (1, 4, 8, 8, 8), (4, 1, 3, 3, 3), "float32", "float32", groups=4)
    dense = describe("conv2d", 2, x.shape, (4, 4, 3, 3), "float32", "float32")
    for problem, reason in (
        (dataclasses.replace(fine, operation="dgrad"), "fprop only, not dgrad"),
        (dense, "4 input channels, not one"),
        (volume, "one or two axes"),
        (problem_of(x.astype(np.int32), w.astype(np.int32)), "one type for all"),
        (problem_of(x, w, dtype="float64"), "one type for all"),
    ):
        verdict = depthwise.supports(problem, cuda_device)
        assert not verdict
        assert reason in repr(verdict)
    with pytest.raises(ValueError, match="4 input channels, not one"):
        choose("test", dense, "cuda", cuda_device, "depthwise")


def test_plans_prefer_it_where_it_is_meant_to_be(cuda_device: Any) -> None:
    for shape, filter, stride in (
        ((32, 144, 56, 56), 3, 1), ((32, 96, 112, 112), 3, 2), ((32, 384, 14, 14), 7, 1),
        ((1, 960, 7, 7), 3, 1), ((8, 128, 56, 56), 31, 1),
    ):  # fmt: skip
        for layout in LAYOUTS:
            n, c, h, w = shape
            x_shape = shape if layout == "NCHW" else (n, h, w, c)
            plan = gpuconv.plan_conv2d(
                x_shape, (c, 1, filter, filter), dtype="float16", stride=stride,
                padding=filter // 2, groups=c, layout=layout, backend="cuda",
            )  # fmt: skip
            costs = {c.algorithm: c.cost for c in plan.candidates if c.cost}
            assert costs["depthwise"] < costs["direct"]
            assert plan.workspace_bytes == 0
            assert costs["depthwise"] > plan.bytes_moved / cuda_device.bandwidth


def test_variants_hold_whatever_a_problem_asks_for() -> None:
    listed = {(stem, launch.freeze(macros)) for stem, macros in depthwise.variants()}
    assert len(listed) <= 80
    asked = set()
    for seed in range(300):
        (x, w, bias), options, _ = random_call(seed)
        problem = problem_of(x, w, bias=bias, **options)
        for index in ("int32", "int64"):
            for layout in (Planes, ChannelsLast):
                for dtype in depthwise_tiling.TYPES:
                    variant = layout.of(dataclasses.replace(problem, x_dtype=dtype), index)
                    asked.add((variant.stem, launch.freeze(variant.macros)))
    assert asked == listed


def test_structs_are_those_of_the_kernels() -> None:
    assert depthwise_tiling.TILE.itemsize == 160
    assert depthwise_tiling.TILE_CHANNELS_LAST.itemsize == 176


# ---- what the emulator sees ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_no_race_and_nothing_out_of_bounds(mode: Any) -> None:
    with (
        emulated_device(mode=mode, order="random", block_order="shuffled") as device,
        gpuconv.use_backend("cuda"),
    ):
        device.sm_count = 1
        for layout in LAYOUTS:
            for dtype, filter, stride in (
                ("float16", 3, 1), ("float32", 3, 2), ("float16", 6, 1), ("float32", 11, 1),
            ):  # fmt: skip
                for width in (9, 12):  # rows through shared memory, and vectors
                    x, w, bias = arrays_of(
                        (2, 11, 10, width), (filter, filter),
                        layout=layout, dtype=dtype, bias=True, multiplier=1 + (filter == 6),
                    )  # fmt: skip
                    compute(
                        device, x, w, bias,
                        layout=layout, stride=stride, padding=2, padding_mode="reflect",
                    )  # fmt: skip
        assert device.report.total("uninitialised") == 0
    depthwise.prepare.cache_clear()


# (N, C, H, W), dtype, filter, stride, layout; the most wavefronts and sectors, times the ideal.
TOUCHED = [
    # Rows of whole strips: not one wavefront or sector more than there must be.
    ((1, 4, 64, 64), "float32", 3, 1, "NCHW", 1.0, 1.0),
    ((1, 4, 64, 64), "float16", 3, 1, "NCHW", 1.0, 1.0),
    ((1, 8, 64, 64), "float32", 7, 1, "NCHW", 1.0, 1.01),
    # A warp's strips go on in another plane, at banks that fit, and in another sector.
    ((2, 8, 28, 28), "float32", 3, 1, "NCHW", 1.0, 1.1),
    ((2, 8, 56, 56), "float32", 3, 2, "NCHW", 1.0, 1.1),
    # y through shared memory: rows of 28 bytes have no place in common with sectors.
    ((1, 32, 14, 14), "float32", 3, 1, "NCHW", 1.12, 1.2),
    ((1, 64, 7, 7), "float32", 3, 1, "NCHW", 1.12, 1.35),
    # 128 bytes of channels: x is read without a conflict, w is written with a few.
    ((1, 64, 28, 28), "float16", 3, 1, "NHWC", 1.1, 1.0),
    ((1, 32, 14, 14), "float32", 3, 2, "NHWC", 1.1, 1.0),
    # 64 bytes: the next strip's lie in the other banks.
    ((1, 96, 14, 14), "float16", 3, 1, "NHWC", 1.1, 1.0),
    ((1, 32, 16, 16), "float32", 7, 1, "NHWC", 1.1, 1.0),
    # A filter that does not fit in registers: strips of eight pixels, taps in 16 bytes.
    ((1, 32, 16, 16), "float32", 13, 1, "NHWC", 1.1, 1.0),
    ((1, 16, 16, 16), "float32", 13, 1, "NHWC", 1.1, 1.0),
    ((1, 32, 15, 15), "float16", 14, 1, "NHWC", 1.2, 1.0),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "filter", "stride", "layout", "wavefronts", "sectors"), TOUCHED
)
def test_wavefronts_and_sectors(
    shape: Any, dtype: str, filter: int, stride: int, layout: str, wavefronts: float,
    sectors: float,
) -> None:  # fmt: skip
    with emulated_device(mode="watch") as device, gpuconv.use_backend("cuda"):
        device.sm_count = 1
        x, w, _ = arrays_of(shape, (filter, filter), layout=layout, dtype=dtype)
        compute(device, x, w, layout=layout, stride=stride, padding=filter // 2)
        report = device.report
        shared = report.total("wavefronts", "shared") / report.total("ideal_wavefronts", "shared")
        moved = report.total("sectors", "global") / report.total("ideal_sectors", "global")
        assert shared <= wavefronts, str(report)
        assert moved <= sectors, str(report)
        # Whole planes are read once; a tile of pixels has a halo that its neighbours read as well.
        reads = [s for s in report.sites if (s.space, s.operation) == ("global", "load")]
        x_bytes = max(s.lanes * s.bytes for s in reads)
        halo = 1.5 if filter <= 7 else 2  # with a halo's share of what is read
        assert x_bytes == x.nbytes if layout == "NCHW" else x_bytes <= halo * x.nbytes, str(report)
    depthwise.prepare.cache_clear()


def test_layouts_decide_the_kernel(cuda_device: Any) -> None:
    """Planes or channels: by the memory of x and y, whatever the shapes are called."""
    x = np.zeros((1, 6, 8, 8), np.float32)
    last = in_memory_order(x, "channels_last", 1)
    problem = problem_of(x, np.zeros((6, 1, 3, 3), np.float32), padding=1)
    w = np.zeros((6, 1, 3, 3), np.float32)
    for a, b, expected in ((x, x, False), (last, last, True), (x, last, False), (last, x, False)):
        assert depthwise._runs_channels_last(problem, Layout(a, w, None, b)) is expected
