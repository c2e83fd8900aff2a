"""implicit_gemm_mma: shapes around its tiles, parts of sums, every way to load, every precision."""

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
from gpuconv.cuda_backend import compiler, implicit_gemm_mma, launch
from gpuconv.cuda_backend.implicit_gemm_mma import GATHER, PACKED, SMALL, VECTORS, Tile
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
from tests.emulator import EmulatedDevice, emulated_device

Force = Callable[..., None]
KINDS = ("float16", "bfloat16", "tf32", "tf32x3", "float64")  # dtypes, and precisions of float32
CACHED = ("prepare", "prepare_split", "_choose", "_cheapest", "_slices")


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


def only(tile: Tile) -> Callable[..., tuple[Tile, ...]]:
    return lambda problem, index="int32": (tile,)


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


@pytest.mark.parametrize("form", FORMS, ids=FORMS.get)
def test_any_number_of_stages_gives_the_same_bits(
    cuda_device: Any, force: Force, form: int
) -> None:
    results = []
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


# ---- numbers ---------------------------------------------------------------------------------


def test_three_products_are_near_float32_and_one_is_not(cuda_device: Any) -> None:
    errors = {}
    for kind in ("tf32", "tf32x3"):
        plan, x, w, _, y = conv(cuda_device, kind, (2, 64, 12, 12), (32, 64, 3, 3))
        y_ref, magnitudes = expected(plan.problem, x, w)
        errors[kind] = float(np.max(np.abs(y - y_ref) / magnitudes))
    assert errors["tf32x3"] < 4 * 2.0**-23
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


def test_a_workspace_limit_is_kept(cuda_device: Any) -> None:
    options = images(VECTORS, 3, 72, 5, 4)
    w_shape = (9, 72, 5, 5)
    part, filter_bytes = 3 * 9 * 20 * 4, 2 * 9 * 72 * 25
    for limit in (0, filter_bytes - 1, filter_bytes, filter_bytes + part, filter_bytes + 3 * part):
        made = conv(
            cuda_device, "float16", w_shape=w_shape, padding=2, workspace_limit=limit, **options
        )
        assert made[0].workspace_bytes <= limit


def test_more_parts_than_slices_leave_none_empty(cuda_device: Any, force: Force) -> None:
    force(_PART_LENGTH=8)
    for depth in range(8, 600, 72):
        conv(cuda_device, "float16", (2, depth, 3), (2, depth, 1))
        conv(cuda_device, "float16", (2, 3, depth), (2, depth, 1), layout="NWC")


# ---- plans -----------------------------------------------------------------------------------


def test_variants_hold_whatever_a_problem_asks_for(
    force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {launch.freeze(macros) for _, macros in implicit_gemm_mma.variants()}
    assert len(listed) <= 60
    asked = set()

    class Recorder(EmulatedDevice):
        def load(self, source: str, macros: Any, kernel: str | None = None) -> Any:
            if source == "implicit_gemm_mma":
                asked.add(launch.freeze(macros))
            return None

    device = Recorder()
    for kind, channels, layout, batch, size, rows, taps in itertools.product(
        KINDS, (3, 32, 512), ("NCHW", "NHWC"), (1, 64), (7, 56), (24, 64, 1024), (1, 3)
    ):
        dtype, precision = typed(kind).values()
        shape = (batch, size, size, channels) if layout == "NHWC" else (
            batch, channels, size, size)  # fmt: skip
        problem = describe(
            "test", 2, shape, (rows, channels, taps, taps), dtype, dtype,
            layout=layout, precision=precision,
        )  # fmt: skip
        y = np.broadcast_to(np.zeros((), problem.x_dtype.numpy), problem.y_shape)
        x = np.broadcast_to(np.zeros((), problem.x_dtype.numpy), problem.x_shape)
        given = launch.Layout(x, x, None, y)
        for index in ("int32", "int64"):
            force(index_type=lambda *a, i=index: i)
            implicit_gemm_mma.prepare(problem, device, given)
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

WATCHED = [("float16", form, tile) for form in FORMS for tile in tiles_of("float16", form)] + [
    (kind, form, SMALL) for kind in ("tf32", "float64") for form in FORMS
]


SANITIZED = [
    ("float16", VECTORS, "sm_75"), ("float16", PACKED, "sm_75"), ("tf32x3", GATHER, "sm_90a"),
    ("float64", VECTORS, "sm_90a"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "form", "arch"), SANITIZED)
def test_sanitized(force: Force, kind: str, form: int, arch: str) -> None:
    force(_PART_LENGTH=150)
    dtype, precision = typed(kind).values()
    rng = np.random.default_rng(0)
    with emulated_device(mode="sanitize", arch=arch) as device, gpuconv.use_backend("cuda"):
        for n, (step, mode) in enumerate(zip((2, 3, 4, 6, 9), PADDING_MODES, strict=True)):
            options = images(form, 2, 8 * step + (form == PACKED), 5, 6)
            x = random_array(rng, options.pop("x_shape"), dtype)
            w = random_array(rng, (7, 8 * step + (form == PACKED), 3, 2), dtype)
            if n % 2:
                x, w = in_memory_order(x, "reversed", 1), in_memory_order(w, "offset", 1)
            options |= {"padding": ((2, 7), (1, 0)), "padding_mode": mode, "flip": n == 3}
            options["workspace_limit"] = (None, 0)[n % 2]
            problem = problem_of(x, w, precision, **options)
            assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)


@pytest.mark.parametrize(("kind", "form", "tile"), WATCHED)
def test_no_races_and_no_bank_conflicts(force: Force, kind: str, form: int, tile: Tile) -> None:
    force(_tiles=only(tile))
    dtype, precision = typed(kind).values()
    channels = 17 if form == PACKED else 64
    options = images(form, 2, channels, 8, 8)
    rng = np.random.default_rng(0)
    x = random_array(rng, options.pop("x_shape"), dtype)
    memory = "contiguous" if form == PACKED else "channels_last"
    w = in_memory_order(random_array(rng, (tile.channels, channels, 4, 4), dtype), memory, 1)
    problem = problem_of(x, w, precision, padding=((1, 2), (2, 1)), workspace_limit=0, **options)
    with emulated_device(mode="watch", order="random", block_order="shuffled") as device:
        with gpuconv.use_backend("cuda"):
            assert_close(problem, run(plan_of(problem, device), device, x, w), x, w)
        report = device.report
    shared = [s for s in report.sites if s.space == "shared" and s.bytes == 16]
    assert sum(s.wavefronts for s in shared) == sum(s.ideal_wavefronts for s in shared) > 0
    # Every 16 bytes are loaded as such, and leave no sector half used.
    wide = [s for s in report.sites if s.space == "global" and s.bytes == 16]
    assert sum(s.requests for s in wide)
    assert sum(s.sectors for s in wide) == sum(s.ideal_sectors for s in wide)
    everything = report.total("sectors", "global") / report.total("ideal_sectors", "global")
    assert everything < (1.01 if form == VECTORS else 1.3)
