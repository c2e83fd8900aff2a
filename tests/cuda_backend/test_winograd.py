"""winograd: its error bound, NaN and infinity, both forms around their tiles, and its plans."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dtypes, testing, toom_cook
from gpuconv.arrays import HostArray
from gpuconv.cuda_backend import compiler, launch, winograd
from gpuconv.cuda_backend.winograd import FUSED, PASSES, Form
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.plan import No, Plan, choose
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import MEMORY_ORDERS, in_memory_order, random_array
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import EmulatedDevice, emulated_device

Force = Callable[..., None]
each_form = pytest.mark.parametrize("form", [FUSED, PASSES], ids=lambda form: form.name)
each_layout = pytest.mark.parametrize("layout", ["NCHW", "NHWC"])


def _forget() -> None:
    choose.cache_clear()
    winograd._cut.cache_clear()
    winograd.prepare_part.cache_clear()


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Force]:
    """force(form, name=value) overrides what the module decides with, for plans from then on."""

    def override(form: Form | None = None, **values: Any) -> None:
        if form is not None:
            monkeypatch.setattr(winograd, "_forms", lambda *args: [form])
        for name, value in values.items():
            monkeypatch.setattr(winograd, name, value)
        _forget()

    yield override
    monkeypatch.undo()
    _forget()


def plan_of(problem: ConvProblem, device: Any) -> Plan:
    return choose("test", problem, "cuda", device, "winograd")


def run(
    plan: Plan, device: Any, x: HostArray, w: HostArray, bias: HostArray | None = None,
    out: HostArray | None = None,
) -> HostArray:  # fmt: skip
    result = plan(*(on_device(device, a) for a in (x, w, bias, out)))
    return np.asarray(on_host(result))


def shape_of(layout: str, n: int, c: int, h: int, w: int) -> tuple[int, ...]:
    return (n, c, h, w) if layout == "NCHW" else (n, h, w, c)


def largest_of_tiles(problem: ConvProblem, form: Form, x: HostArray, w: HostArray) -> HostArray:
    """sum over c of max|x_c in the tile| max|w_c|, for every output."""
    pads = zip(problem.input, problem.pad_lo, problem.pad_hi, strict=True)
    rows, columns = (source_index(n, lo, hi, problem.padding_mode) for n, lo, hi in pads)
    padded = np.abs(x.astype(np.float64))[:, :, rows][..., columns]
    padded *= (rows >= 0)[:, None] & (columns >= 0)
    m, (p, q) = form.outputs, problem.output
    down, across = -(-p // m), -(-q // m)
    padded = np.pad(padded, [(0, 0)] * 2 + [(0, m * down - p), (0, m * across - q)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (m + 2, m + 2), axis=(2, 3))
    tiles = windows[:, :, ::m, ::m].max(axis=(4, 5))  # (N, C, down, across)
    tiles = tiles.reshape(len(x), problem.groups, -1, down, across)
    taps = np.abs(w.astype(np.float64)).max(axis=(2, 3))
    taps = taps.reshape(problem.groups, -1, problem.group_in_channels)
    sums = np.einsum("ngcij,gkc->ngkij", tiles, taps)
    sums = sums.reshape(len(x), problem.out_channels, down, across)
    return np.asarray(sums.repeat(m, axis=2).repeat(m, axis=3)[:, :, :p, :q])


def check(
    problem: ConvProblem, y: HostArray, x: HostArray, w: HostArray, bias: HostArray | None = None,
    form: Form | None = None,
) -> float:  # fmt: skip
    """Assert the error bound that the module states; the largest share of it that was needed."""
    if form is None:
        device = EmulatedDevice()
        form = winograd._found(problem, device).form
    y_ref, _ = testing.expected(problem, x, w, bias)
    if problem.layout == "NHWC":
        x, y = x.transpose(0, 3, 1, 2), y.transpose(0, 3, 1, 2)
    assert y.shape == y_ref.shape
    assert dtypes.of(y.dtype) is problem.y_dtype
    direct = 81 * problem.group_in_channels * dtypes.FLOAT32.eps / 2  # for the same magnitudes
    rounding = problem.y_dtype.eps * np.abs(y_ref) + testing._smallest(problem)
    largest = largest_of_tiles(problem, form, x, w)
    bound = winograd.bound(form, problem.group_in_channels) * direct * largest
    error = np.abs(y.astype(np.float64) - y_ref)
    assert (error <= bound + rounding).all(), problem
    return float((error / (bound + rounding)).max())


def conv(
    device: Any, form: Form, shape: tuple[int, ...], k: int, dtype: str = "float32",
    groups: int = 1, bias: bool = False, seed: int = 0, **options: Any,
) -> tuple[Plan, HostArray, HostArray, HostArray | None, HostArray]:  # fmt: skip
    """Plan and compute one problem, check it, and hand back all there is of it."""
    c = shape[-1] if options.get("layout") == "NHWC" else shape[1]
    rng = np.random.default_rng(seed)
    x, w = (random_array(rng, s, dtype) for s in (shape, (k, c // groups, 3, 3)))
    b = random_array(rng, (k,), dtype) if bias else None
    problem = describe(
        "test", 2, shape, w.shape, dtype, dtype, groups=groups, bias=True if bias else None,
        **options,
    )  # fmt: skip
    plan = plan_of(problem, device)
    y = run(plan, device, x, w, b)
    check(problem, y, x, w, b, form)
    return plan, x, w, b, y


# ---- error -----------------------------------------------------------------------------------


def test_matrices_make_the_convolution() -> None:
    rng = np.random.default_rng(0)
    for outputs in toom_cook.POINTS:
        a, b, g = toom_cook.matrices(outputs)
        d, taps = rng.standard_normal((outputs + 2, outputs + 2)), rng.standard_normal((3, 3))
        y = a @ ((g @ taps @ g.T) * (b @ d @ b.T)) @ a.T
        windows = np.lib.stride_tricks.sliding_window_view(d, (3, 3))
        np.testing.assert_allclose(y, (windows * taps).sum(axis=(2, 3)), rtol=1e-12, atol=1e-12)
        for exact in (a, b):
            np.testing.assert_array_equal(exact, exact.astype(np.float32))


def test_amplification_is_of_inputs_and_taps_of_one() -> None:
    for outputs in toom_cook.POINTS:
        a, b, g = (np.abs(matrix) for matrix in toom_cook.matrices(outputs))
        filters, inputs = g @ np.ones((3, 3)) @ g.T, b @ np.ones((outputs + 2,) * 2) @ b.T
        largest = (a @ (filters * inputs) @ a.T).max()
        assert toom_cook.amplification(outputs) == pytest.approx(largest)
    assert toom_cook.amplification(2) == 64


DATA: dict[str, Callable[[np.random.Generator, tuple[int, ...]], HostArray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "positive": lambda rng, shape: rng.random(shape),
    "signs": lambda rng, shape: rng.choice([-1.0, 1.0], shape) * (1 + 2.0**-22),
    "alternating": lambda rng, shape: (-1.0) ** np.indices(shape)[-2:].sum(axis=0) / 3,
    "far apart": lambda rng, shape: (
        rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 8, (1, shape[1], 1, 1))
    ),
}


@each_form
@pytest.mark.parametrize("data", DATA)
def test_the_bound_holds(cuda_device: Any, force: Force, form: Form, data: str) -> None:
    force(form)
    used = []
    for seed, channels in enumerate((1, 5, 17, 128, 300)):
        rng = np.random.default_rng(seed)
        x, w = (
            DATA[data](rng, shape).astype(np.float32)
            for shape in ((1, channels, 9, 10), (9, channels, 3, 3))
        )
        problem = describe("test", 2, x.shape, w.shape, "float32", "float32", padding=1)
        y = run(plan_of(problem, cuda_device), cuda_device, x, w)
        used.append(check(problem, y, x, w, form=form))
    assert max(used) > 1e-4  # it says something


@each_form
def test_random_data_is_rounded_at_most_twice_as_much_as_by_implicit_gemm(
    cuda_device: Any, force: Force, form: Form
) -> None:
    force(form)
    rng = np.random.default_rng(0)
    x, w = (
        random_array(rng, (1, 128, 12, 12), "float32"),
        random_array(rng, (16, 128, 3, 3), "float32"),
    )
    exact = testing.expected(describe("test", 2, x.shape, w.shape, "float32", "float32"), x, w)[0]

    def error(algorithm: str) -> float:
        given = (on_device(cuda_device, a) for a in (x, w))
        y = on_host(gpuconv.conv2d(*given, algorithm=algorithm))
        return float(np.sqrt(np.mean((y - exact) ** 2)))

    assert error("winograd") < (1 if form is FUSED else 2) * error("implicit_gemm")


def test_auto_takes_what_rounds_at_most_twice_as_much() -> None:
    device = EmulatedDevice()

    def rejected(channels: int, groups: int = 1) -> str | None:
        problem = describe(
            "test", 2, (1, channels, 9, 9), (64, channels // groups, 3, 3), "float32", "float32",
            groups=groups,
        )  # fmt: skip
        return winograd.only_by_name(problem)

    assert "4 input channels of a group" in str(rejected(4))
    assert rejected(5) is None
    assert rejected(8, groups=2) is not None
    for channels in range(1, 200):
        problem = describe(
            "test", 2, (1, channels, 9, 9), (8, channels, 3, 3), "float32", "float32"
        )
        forms = winograd._forms(problem, device)
        assert (PASSES in forms) == (winograd.bound(PASSES, channels) <= 2)
        assert FUSED in forms
    assert winograd.bound(PASSES, 121) > 2 > winograd.bound(PASSES, 122)
    assert winograd.bound(FUSED, 100) == pytest.approx(64 * (100 + 7) / (81 * 100))


# ---- NaN and infinity ------------------------------------------------------------------------


@each_form
@each_layout
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_and_infinity_stay_where_their_windows_are(
    cuda_device: Any, force: Force, form: Form, layout: str, dtype: str
) -> None:
    force(form)
    rng = np.random.default_rng(0)
    x = random_array(rng, (2, 6, 11, 13), dtype)
    w, bias = random_array(rng, (5, 6, 3, 3), dtype), random_array(rng, (5,), dtype)
    clean = x.copy()
    x[0, 1, 4, 4], x[0, 2, 10, 12], x[1, 2, 0, 0] = np.nan, np.inf, -np.inf
    seen = np.zeros((2, 5, 11, 13), bool)
    seen[0, :, 3:6, 3:6] = seen[0, :, 9:, 11:] = seen[1, :, :2, :2] = True
    options: dict[str, Any] = {"padding": 1, "layout": layout, "bias": True}
    if layout == "NHWC":
        x, clean = (
            in_memory_order(a, "channels_last", 1).transpose(0, 2, 3, 1) for a in (x, clean)
        )
        seen = seen.transpose(0, 2, 3, 1)
    problem = describe("test", 2, x.shape, w.shape, dtype, dtype, **options)
    plan = plan_of(problem, cuda_device)
    y, expected = run(plan, cuda_device, x, w, bias), run(plan, cuda_device, clean, w, bias)
    assert (np.isfinite(y) == ~seen).all()
    np.testing.assert_allclose(y[~seen], expected[~seen], rtol=2e-3, atol=1e-4)
    # In a filter it reaches the outputs of that filter, and of no other.
    w[3, 2, 1, 1] = np.nan
    y = np.moveaxis(run(plan, cuda_device, clean, w, bias), -1 if layout == "NHWC" else 1, 0)
    expected = np.moveaxis(expected, -1 if layout == "NHWC" else 1, 0)
    assert np.isnan(y[3]).all()
    np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(expected, 3, 0))


@each_form
def test_a_sum_that_overflows_only_in_the_transforms_is_computed_directly(
    cuda_device: Any, force: Force, form: Form
) -> None:
    force(form)
    x = np.full((1, 2, 12, 12), 1e38, np.float32)
    w = np.zeros((2, 2, 3, 3), np.float32)
    w[:, 0, 1, 1] = 1
    given = (on_device(cuda_device, a) for a in (x, w))
    y = on_host(gpuconv.conv2d(*given, padding=1, algorithm="winograd"))
    np.testing.assert_array_equal(y, np.full_like(y, 1e38))


# ---- shapes ----------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("block", range(3))
def test_random_problems(cuda_device: Any, force: Force, form: Form, block: int) -> None:
    force(form)
    for seed in range(25 * block, 25 * (block + 1)):
        rng = np.random.default_rng(seed)
        groups = int(rng.choice([1, 1, 2, 3]))
        c, k = (groups * int(n) for n in rng.choice([1, 3, 8, 9, 19], 2))
        batch = int(rng.integers(1, 4))
        h, w = (int(n) for n in rng.integers(3, 15, 2))
        layout = str(rng.choice(["NCHW", "NHWC"]))
        dtype = str(rng.choice(["float32", "float32", "float16", "bfloat16"]))
        x = random_array(rng, shape_of(layout, batch, c, h, w), dtype)
        x = in_memory_order(x, str(rng.choice(MEMORY_ORDERS)), 1 if layout == "NCHW" else -1)
        taps = random_array(rng, (k, c // groups, 3, 3), dtype)
        taps = in_memory_order(taps, str(rng.choice(MEMORY_ORDERS)), 1)
        bias = random_array(rng, (k,), dtype) if rng.random() < 0.5 else None
        problem = describe(
            "test", 2, x.shape, taps.shape, dtype, dtype, groups=groups, layout=layout,
            bias=None if bias is None else True, flip=bool(rng.random() < 0.3),
            padding=[1, 0, 2, "same", ((0, 9), (11, 1))][rng.integers(5)],
            padding_mode=str(rng.choice(PADDING_MODES)),
        )  # fmt: skip
        y = run(plan_of(problem, cuda_device), cuda_device, x, taps, bias)
        check(problem, y, x, taps, bias, form)


@each_form
@each_layout
def test_shapes_around_the_blocks(cuda_device: Any, force: Force, form: Form, layout: str) -> None:
    force(form)
    for n, (k, c) in enumerate(
        itertools.product((1, 63, 64, 65), (form.chunk - 1, form.chunk, form.chunk + 1))
    ):
        width = form.outputs * form.tiles + (-1, 0, 1)[n % 3]
        conv(
            cuda_device, form, shape_of(layout, 1, c, 3, width + 2), k, layout=layout,
            bias=n % 2 == 0,
        )  # fmt: skip


@each_form
def test_dgrad_is_the_same_with_channels_exchanged(
    cuda_device: Any, force: Force, form: Form
) -> None:
    force(form)
    rng = np.random.default_rng(0)
    for padding, mode in ((1, "zeros"), (0, "zeros"), ((2, 1), "reflect")):
        x_shape, w = (2, 6, 9, 10), random_array(rng, (7, 6, 3, 3), "float32")
        problem = describe(
            "test", 2, x_shape, w.shape, "float32", "float32", padding=padding, padding_mode=mode,
            operation="dgrad",
        )  # fmt: skip
        dy = random_array(rng, (2, 7, *problem.output), "float32")
        dx = run(plan_of(problem, cuda_device), cuda_device, dy, w)
        exact = run(choose("test", problem, "cuda", cuda_device, "direct"), cuda_device, dy, w)
        np.testing.assert_allclose(dx, exact, atol=2e-4)


# ---- bits ------------------------------------------------------------------------------------


@each_form
@each_layout
def test_bits_know_nothing_of_batch_strides_and_passes(
    cuda_device: Any, force: Force, form: Form, layout: str
) -> None:
    force(form)
    shape = shape_of(layout, 3, 12, 16, 16)
    plan, x, w, bias, y = conv(
        cuda_device, form, shape, 70, bias=True, padding=1, layout=layout, groups=2
    )
    np.testing.assert_array_equal(run(plan, cuda_device, x, w, bias), y)
    for n in range(3):
        np.testing.assert_array_equal(run(plan, cuda_device, x[n : n + 1], w, bias), y[n : n + 1])
    many = run(plan, cuda_device, np.concatenate([x] * 4), w, bias)
    np.testing.assert_array_equal(many, np.concatenate([y] * 4))
    for memory in MEMORY_ORDERS:
        for axis in (1, -1):
            again = run(
                plan, cuda_device, in_memory_order(x, memory, axis), in_memory_order(w, memory, 1),
                bias, out=in_memory_order(0 * y, memory, axis),
            )  # fmt: skip
            np.testing.assert_array_equal(again, y)
    force(_MOST_TILES=1)  # one image at a time
    np.testing.assert_array_equal(run(plan, cuda_device, x, w, bias), y)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_64_bit_indices_give_the_same_bits(
    cuda_device: Any, force: Force, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(FUSED)
    options: dict[str, Any] = {"padding": 4, "padding_mode": "reflect", "bias": True, "groups": 2}
    y = conv(cuda_device, FUSED, (2, 18, 9, 7), 10, dtype, **options)[-1]
    monkeypatch.setattr(launch, "index_type", lambda *args: "int64")
    _forget()
    again = conv(cuda_device, FUSED, (2, 18, 9, 7), 10, dtype, **options)[-1]
    np.testing.assert_array_equal(y, again)


# ---- workspace -------------------------------------------------------------------------------


@each_form
def test_a_workspace_limit_means_fewer_filters_and_tiles_at_a_time(
    cuda_device: Any, force: Force, form: Form
) -> None:
    force(form)
    shape, k = (2, 3, 34, 34), 200
    plan, x, w, bias, y = conv(cuda_device, form, shape, k, bias=True, padding=1)
    least = form.positions * 3 * 64 * 4
    if form is PASSES:
        least += form.positions * form.tiles * (3 + 64) * 4
    limits = [plan.workspace_bytes, plan.workspace_bytes - 1, (plan.workspace_bytes + least) // 2]
    cuts = set()
    for limit in (*limits, least):
        tight = dataclasses.replace(plan.problem, workspace_limit=limit)
        again = plan_of(tight, cuda_device)
        assert again.workspace_bytes <= limit
        cuts.add(dataclasses.replace(winograd._found(tight, cuda_device), seconds=0.0))
        np.testing.assert_array_equal(run(again, cuda_device, x, w, bias), y)
    assert len(cuts) >= 3
    too_tight = dataclasses.replace(plan.problem, workspace_limit=least - 1)
    with pytest.raises(ValueError, match="over workspace_limit"):
        plan_of(too_tight, cuda_device)


def test_the_workspace_never_passes_64_mib() -> None:
    device = EmulatedDevice()
    for c, k, groups in ((512, 512, 1), (4096, 4096, 1), (9000, 64, 1), (2048, 2048, 32)):
        problem = describe(
            "test", 2, (32, c, 56, 56), (k, c // groups, 3, 3), "float32", "float32", groups=groups
        )
        assert winograd.supports(problem, device)
        assert winograd.workspace(problem, device) <= 64 << 20
    problem = describe("test", 2, (1, 20000, 9, 9), (2, 20000, 3, 3), "float32", "float32")
    verdict = winograd.supports(problem, device)
    assert isinstance(verdict, No)
    assert "do not fit" in verdict.reason


# ---- plans -----------------------------------------------------------------------------------


def test_variants_hold_whatever_a_problem_asks_for(
    force: Force, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {(stem, launch.freeze(macros)) for stem, macros in winograd.variants()}
    assert len(listed) <= 24
    asked = set()

    class Recorder(EmulatedDevice):
        def load(self, source: str, macros: Any, kernel: str | None = None) -> Any:
            asked.add((source, launch.freeze(macros)))
            return None

    device = Recorder()
    for dtype, form, index in itertools.product(
        winograd.TYPES, (FUSED, PASSES), ("int32", "int64")
    ):
        monkeypatch.setattr(launch, "index_type", lambda *args, index=index: index)
        force(form)
        problem = describe("test", 2, (2, 8, 9, 9), (8, 8, 3, 3), dtype, dtype)
        winograd.prepare(problem, device, launch.contiguous(problem))
    assert asked == listed


def test_the_struct_has_the_size_that_the_kernels_assert() -> None:
    source = (compiler.source_folder() / "winograd.cuh").read_text()
    assert f"sizeof(Tiles) == {winograd.TILES.itemsize}," in source


def test_what_it_does_not_serve() -> None:
    device = EmulatedDevice()
    problem = describe("test", 2, (1, 8, 9, 9), (8, 8, 3, 3), "float32", "float32")
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"operation": "wgrad"}, "computes fprop only, not wgrad"),
        ({"filter": (3, 2)}, "not 3x3"),
        ({"stride": (1, 2)}, "no stride or dilation"),
        ({"dilation": (2, 1)}, "no stride or dilation"),
        ({"x_dtype": dtypes.FLOAT64}, "no kernel for x in float64"),
        ({"w_dtype": dtypes.FLOAT16}, "must have one dtype"),
        ({"input": (2**31, 9)}, "too large"),
    )
    for change, reason in changes:
        verdict = winograd.supports(dataclasses.replace(problem, **change), device)
        assert isinstance(verdict, No)
        assert reason in verdict.reason
    device.max_shared_bytes = 64 << 10  # of compute capability 7.5
    verdict = winograd.supports(problem, device)
    assert isinstance(verdict, No)
    assert "shared memory" in verdict.reason
    many = dataclasses.replace(problem, in_channels=256)
    assert winograd.supports(many, device)
    assert winograd._found(many, device).form is PASSES


def test_the_model_prefers_it_for_networks_of_3x3_in_float32() -> None:
    device = EmulatedDevice()
    for size, c, k in ((56, 64, 64), (28, 128, 128), (14, 256, 256), (7, 512, 512), (224, 64, 64)):
        problem = describe("test", 2, (32, c, size, size), (k, c, 3, 3), "float32", "float32",
                           padding=1)  # fmt: skip
        plan = choose("test", problem, "cuda", device)
        assert plan.algorithm == "winograd"
        assert plan.workspace_bytes <= 64 << 20
    for shape, k in (((32, 3, 224, 224), 64), ((1, 16, 8, 8), 16), ((8, 64, 28, 28), 4)):
        problem = describe("test", 2, shape, (k, shape[1], 3, 3), "float32", "float32", padding=1)
        assert choose("test", problem, "cuda", device).algorithm != "winograd"


def test_warmup_prepares_what_a_call_takes(cuda_device: Any, force: Force) -> None:
    for form in (FUSED, PASSES):
        force(form)
        problem = describe("test", 2, (1, 5, 8, 8), (70, 5, 3, 3), "float32", "float32")
        plan = plan_of(problem, cuda_device)
        gpuconv.warmup(plan)
        before = winograd.prepare_part.cache_info().misses
        x, w = (np.zeros(s, np.float32) for s in (problem.x_shape, problem.w_shape))
        run(plan, cuda_device, x, w)
        assert winograd.prepare_part.cache_info().misses == before


# ---- what the emulator sees ------------------------------------------------------------------


@each_form
@each_layout
def test_no_races_and_no_bank_conflicts(force: Force, form: Form, layout: str) -> None:
    force(form)
    rng = np.random.default_rng(0)
    shape = shape_of(layout, 2, 2 * form.chunk, 16, 16)
    x, w = (
        random_array(rng, shape, "float32"),
        random_array(rng, (64, 2 * form.chunk, 3, 3), "float32"),
    )
    with emulated_device(mode="watch", order="random", block_order="shuffled") as device:
        problem = describe(
            "test", 2, shape, w.shape, "float32", "float32", layout=layout, padding=1
        )
        with gpuconv.use_backend("cuda"):
            check(problem, run(plan_of(problem, device), device, x, w), x, w, form=form)
        report = device.report
    shared = [s for s in report.sites if s.space == "shared"]
    assert sum(s.wavefronts for s in shared) == sum(s.ideal_wavefronts for s in shared) > 0
    # Every 16 bytes are loaded as such, and a warp leaves no sector of them half used.
    wide = [s for s in report.sites if s.space == "global" and s.bytes == 16]
    assert sum(s.requests for s in wide)
    assert sum(s.sectors for s in wide) == sum(s.ideal_sectors for s in wide)


@pytest.mark.parametrize("order", ["descending", "interleaved"])
def test_parts_and_groups_without_a_race(force: Force, order: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = random_array(rng, (2, 18, 5, 70), "float32"), random_array(rng, (70, 9, 3, 3), "float32")
    x[0, 0, 2, 2] = np.inf  # its tiles are computed anew, by the threads that wrote them
    for form in (FUSED, PASSES):
        force(form)
        with emulated_device(mode="watch", order=order) as device, gpuconv.use_backend("cuda"):
            problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=2, padding=1)
            y = run(plan_of(problem, device), device, x, w)
        assert np.isfinite(y[1]).all()
        assert not np.isfinite(y[0, 0, 1:4, 1:4]).any()


@pytest.mark.parametrize(
    ("form", "dtype", "arch"),
    [
        (FUSED, "float32", "sm_90a"),
        (FUSED, "float16", "sm_86"),  # the least shared memory that it fits in
        (PASSES, "float32", "sm_90a"),
        (PASSES, "float16", "sm_75"),
    ],
)
def test_sanitized(force: Force, form: Form, dtype: str, arch: str) -> None:
    force(form)
    rng = np.random.default_rng(0)
    with emulated_device(mode="sanitize", arch=arch) as device, gpuconv.use_backend("cuda"):
        for n, mode in enumerate(PADDING_MODES):
            layout = "NHWC" if n % 2 else "NCHW"
            x = random_array(rng, shape_of(layout, 2, 10, 5, 6), dtype)
            w = random_array(rng, (66, 5, 3, 3), dtype)
            if n > 2:
                x, w = in_memory_order(x, "reversed", 1), in_memory_order(w, "offset", 1)
            problem = describe(
                "test", 2, x.shape, w.shape, dtype, dtype, groups=2, layout=layout,
                padding=((2, 7), (1, 0)), padding_mode=mode, flip=n == 3,
            )  # fmt: skip
            check(problem, run(plan_of(problem, device), device, x, w), x, w, form=form)
