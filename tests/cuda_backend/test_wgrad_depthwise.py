"""What is special to wgrad_depthwise: shares, slices, memory orders, what its warps touch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cuda_backend import launch, wgrad_depthwise
from gpuconv.cuda_backend.wgrad_depthwise import Variant
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, ConvProblem, describe
from gpuconv.testing import MEMORY_ORDERS, assert_close, in_memory_order, random_array
from tests.cuda_backend.conftest import on_device, on_host
from tests.emulator import EmulatedDevice, emulated_device

ORDERS = ("planes", "channels last")
each_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(params=["many processors", "one processor"])
def cut(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cuda_device: Any
) -> Iterator[str]:
    """Small problems are cut small to occupy a device; on one multiprocessor, as large ones are."""
    if request.param == "one processor":
        monkeypatch.setattr(cuda_device, "sm_count", 1)
    forget()
    yield request.param
    forget()


def forget() -> None:
    wgrad_depthwise.prepare.cache_clear()
    wgrad_depthwise._cut.cache_clear()


def problem_of(
    shape: tuple[int, ...],
    filter: tuple[int, ...],
    *,
    dtype: str = "float32",
    multiplier: int = 1,
    order: str = "planes",
    flip: bool = False,
    workspace_limit: int | None = None,
    **options: Any,
) -> ConvProblem:
    """The weight gradient for x of `shape`, (N, C, spatial...)."""
    ndim, c = len(filter), shape[1]
    problem = describe(
        f"conv{ndim}d", ndim, shape, (c * multiplier, 1, *filter), dtype, dtype,
        operation="wgrad", groups=c, **options,
    )  # fmt: skip
    last = order == "channels last"
    return replace(problem, flip=flip, channels_last=last, workspace_limit=workspace_limit)


def arrays_of(problem: ConvProblem, *, integers: bool = True, seed: int = 0) -> tuple[Any, Any]:
    """x and dy, in the memory order of the problem."""
    rng = np.random.default_rng(seed)
    order = "channels_last" if problem.channels_last else "c"
    x, dy = (
        random_array(rng, shape, problem.x_dtype, integers)
        for shape in (problem.x_shape, problem.y_shape)
    )
    return (
        (x, dy) if order == "c" else (in_memory_order(x, order, 1), in_memory_order(dy, order, 1))
    )


def compute(
    device: Any, problem: ConvProblem, x: Any, dy: Any, *, out: Any = None, exact: bool = False
) -> Any:
    """The result, compared with the reference."""
    plan = choose("test", problem, "cuda", device, "wgrad_depthwise")
    dw = on_host(plan(*(on_device(device, a) for a in (x, dy)), out=on_device(device, out)))
    assert_close(replace(problem, batch=len(x)), dw, x, dy, exact=exact)
    return dw


# ---- random problems -------------------------------------------------------------------------


def random_problem(seed: int) -> ConvProblem:
    rnd = random.Random(seed)
    ndim = rnd.choice((1, 2, 2, 2))
    square = (rnd.choice((3, 5, 7)),) * ndim
    filter = rnd.choice((square, square, tuple(rnd.randint(1, 12) for _ in range(ndim))))
    step = rnd.choice((1, 1, 2))
    stride = rnd.choice(((step,) * ndim, (step,) * ndim, tuple(rnd.randint(1, 3) for _ in filter)))
    dilation = rnd.choice(((1,) * ndim,) * 3 + (tuple(rnd.randint(1, 3) for _ in filter),))
    pairs = tuple((rnd.randint(0, 6), rnd.randint(0, 6)) for _ in filter)
    padding = rnd.choice((tuple((n // 2, n // 2) for n in filter), pairs))
    low = [d * (f - 1) + 1 for f, d in zip(filter, dilation, strict=True)]
    spatial = tuple(
        max(rnd.randint(1, (60, 24)[ndim - 1]), n - sum(pad))
        for n, pad in zip(low, padding, strict=True)
    )
    return problem_of(
        (rnd.randint(1, 3), rnd.choice((1, 2, 3, 5, 8, 16, 21, 40)), *spatial),
        filter,
        dtype=rnd.choice(("float32", "float16")),
        multiplier=rnd.choice((1, 1, 1, 2, 3)),
        order=rnd.choice(ORDERS),
        flip=rnd.random() < 0.2,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=rnd.choice(PADDING_MODES),
    )


@pytest.mark.parametrize("block", range(3))
def test_random_problems(cuda_device: Any, cut: str, block: int) -> None:
    for seed in range(50 * block, 50 * (block + 1)):
        problem, rnd = random_problem(seed), random.Random(seed)
        x, dy = arrays_of(problem, integers=seed % 3 == 0, seed=seed)
        if not problem.channels_last:
            x, dy = (in_memory_order(a, rnd.choice(MEMORY_ORDERS), 1) for a in (x, dy))
        compute(cuda_device, problem, x, dy)


@each_order
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types(cuda_device: Any, order: str, dtype: str) -> None:
    for filter, stride in ((3, 1), (5, 2), (7, 1), (9, 1), (4, 3)):
        problem = problem_of(
            (2, 9, 13, 18), (filter, filter), dtype=dtype, order=order, stride=stride, padding=2
        )
        compute(cuda_device, problem, *arrays_of(problem, integers=False))


# ---- tiles, slices and their edges -----------------------------------------------------------


@each_order
@pytest.mark.parametrize(("filter", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (4, 3)])
def test_sizes_around_strips_segments_and_tiles(
    cuda_device: Any, cut: str, order: str, filter: int, stride: int
) -> None:
    """Whole numbers in, exact sums out: one element off shows."""
    for height, width in ((1, 1), (7, 4), (8, 5), (9, 3), (15, 16), (16, 17), (17, 15), (33, 8)):
        problem = problem_of(
            (2, 3, height, width), (filter, filter), order=order, stride=stride,
            padding=filter // 2 + (filter > height),
        )  # fmt: skip
        compute(cuda_device, problem, *arrays_of(problem), exact=True)


@each_order
@pytest.mark.parametrize("filter", [(8, 8), (9, 7), (31, 31), (1, 40), (33, 2), (40, 33)])
def test_slices_of_large_filters(cuda_device: Any, order: str, filter: tuple[int, int]) -> None:
    """Slices that are cut off at the filter's end, and more of them than a block takes."""
    for height, width in ((12, 37), (20, 8)):
        problem = problem_of(
            (1, 2, height, width), filter, order=order, padding=tuple(n // 2 for n in filter)
        )
        compute(cuda_device, problem, *arrays_of(problem), exact=True)


@each_order
def test_rows_longer_than_a_tile(cuda_device: Any, order: str) -> None:
    for filter in (3, 9):
        problem = problem_of((1, 2, 3, 1500), (filter, filter), order=order, padding=filter // 2)
        compute(cuda_device, problem, *arrays_of(problem), exact=True)
    signal = problem_of((2, 3, 3000), (25,), order=order, padding=12, dilation=2)
    compute(cuda_device, signal, *arrays_of(signal), exact=True)


@pytest.mark.parametrize("channels", [1, 31, 33, 150])
@each_order
def test_channels_around_those_of_a_block(
    cuda_device: Any, cut: str, order: str, channels: int
) -> None:
    for multiplier in (1, 2):
        problem = problem_of((2, channels, 5, 6), (3, 3), order=order, multiplier=multiplier)
        compute(cuda_device, problem, *arrays_of(problem), exact=True)


def test_slices_of_larger_arrays(cuda_device: Any) -> None:
    """Aligned rows whose ends lie in the middle of a copy, and what surrounds them left alone."""
    for dtype in ("float32", "float16"):
        problem = problem_of((2, 3, 8, 13), (3, 3), dtype=dtype, padding=1)
        x, dy = (np.full((2, 3, 8, 16), np.nan, a.dtype) for a in arrays_of(problem))
        x[..., :13], dy[..., :13] = arrays_of(problem)
        room = np.full((3, 1, 3, 8), 7, x.dtype)
        compute(cuda_device, problem, x[..., :13], dy[..., :13], out=room[..., :3], exact=True)
        assert (room[..., 3:] == 7).all()


# ---- what decides a sum's order --------------------------------------------------------------


@each_order
@pytest.mark.parametrize("flip", [False, True])
def test_shares_of_the_images(cuda_device: Any, order: str, flip: bool) -> None:
    """One block per channel or several: the plan says which, and one can do without workspace."""
    found = set()
    for filter, limit in ((3, None), (3, 0), (9, None), (9, 0)):
        problem = problem_of(
            (5, 4, 28, 28), (filter, filter), order=order, flip=flip, padding=1,
            workspace_limit=limit,
        )  # fmt: skip
        x, dy = arrays_of(problem)
        plan = choose("test", problem, "cuda", cuda_device, "wgrad_depthwise")
        assert plan.workspace_bytes == 0 if limit == 0 else plan.workspace_bytes > 0
        found.add(plan.workspace_bytes)
        compute(cuda_device, problem, x, dy, exact=True)
        for batch in (1, 3):  # fewer images than shares: some have none
            compute(cuda_device, problem, x[:batch], dy[:batch], exact=True)
    assert len(found) > 2


@each_order
def test_the_same_bits_again(cuda_device: Any, order: str) -> None:
    problem = problem_of((4, 6, 28, 28), (3, 3), order=order, padding=1)
    x, dy = arrays_of(problem, integers=False)
    first = compute(cuda_device, problem, x, dy)
    again = compute(cuda_device, problem, x.copy(order="K"), dy.copy(order="K"))
    np.testing.assert_array_equal(first, again)


@each_order
@pytest.mark.parametrize("filter", [3, 7, 9])
def test_infinity_stays_with_the_taps_that_meet_it(
    cuda_device: Any, order: str, filter: int
) -> None:
    """A corner of x meets one tap alone; what is left of a strip or segment multiplies nothing."""
    problem = problem_of((1, 2, 12, 14), (filter, filter), order=order)
    x, dy = arrays_of(problem)
    for row, tap_r in ((0, 0), (11, filter - 1)):
        for column, tap_s in ((0, 0), (13, filter - 1)):
            given = x.copy(order="K")
            given[0, 1, row, column] = np.inf
            plan = choose("test", problem, "cuda", cuda_device, "wgrad_depthwise")
            dw = on_host(plan(*(on_device(cuda_device, a) for a in (given, np.abs(dy) + 1))))
            infinite = np.zeros(dw.shape, bool)
            infinite[1, 0, tap_r, tap_s] = True
            np.testing.assert_array_equal(np.isinf(dw), infinite)
            assert not np.isnan(dw).any()


def test_64_bit_offsets(cuda_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "index_type", lambda *args: "int64")
    forget()
    for order in ORDERS:
        problem = problem_of((2, 5, 9, 11), (3, 3), order=order, padding=1, stride=2)
        compute(cuda_device, problem, *arrays_of(problem), exact=True)
    forget()


# ---- plans -----------------------------------------------------------------------------------


def test_it_refuses_with_a_reason(cuda_device: Any) -> None:
    fine = problem_of((1, 4, 8, 8), (3, 3))
    assert wgrad_depthwise.supports(fine, cuda_device) is True
    dense = describe(
        "conv2d", 2, (1, 4, 8, 8), (4, 4, 3, 3), "float32", "float32", operation="wgrad"
    )
    for problem, reason in (
        (replace(fine, operation="fprop"), "wgrad only, not fprop"),
        (dense, "4 input channels, not one"),
        (problem_of((1, 4, 8, 8, 8), (3, 3, 3)), "one or two axes"),
        (problem_of((1, 4, 8, 8), (3, 3), dtype="int32"), "one type for all"),
        (problem_of((1, 1, 300, 300), (64, 64), dilation=4, padding=120), "shared memory"),
    ):
        verdict = wgrad_depthwise.supports(problem, cuda_device)
        assert not verdict
        assert reason in repr(verdict)


def test_plans_prefer_it_where_it_is_meant_to_be(cuda_device: Any) -> None:
    for shape, filter, stride in (
        ((32, 144, 56, 56), 3, 1), ((32, 96, 112, 112), 3, 2), ((32, 384, 14, 14), 7, 1),
        ((32, 960, 7, 7), 3, 1), ((8, 128, 56, 56), 31, 1),
    ):  # fmt: skip
        for order in ORDERS:
            problem = problem_of(
                shape, (filter, filter), dtype="float16", stride=stride, padding=filter // 2,
                order=order,
            )  # fmt: skip
            plan = choose("test", problem, "cuda", cuda_device)
            assert plan.algorithm == "wgrad_depthwise"
            assert plan.cost > plan.bytes_moved / cuda_device.bandwidth


@pytest.mark.parametrize("limit", [48 << 10, 64 << 10, 227 << 10])
def test_no_block_takes_more_than_there_is(limit: int) -> None:
    with emulated_device() as device:
        device.max_shared_bytes = limit
        for seed in range(60):
            problem = random_problem(seed)
            for last in (False, True):
                for index in ("int32", "int64"):
                    cut = wgrad_depthwise._cut(problem, Variant.of(problem, last, index), device)
                    if cut is not None:
                        assert cut.shared_bytes(problem) + 2048 <= limit, problem
                        assert cut.threads <= cut.variant.threads
                        assert cut.channels <= 128


def test_variants_hold_whatever_a_problem_asks_for() -> None:
    listed = {(stem, launch.freeze(macros)) for stem, macros in wgrad_depthwise.variants()}
    assert len(listed) <= 56
    asked = set()
    for seed in range(300):
        problem = random_problem(seed)
        for index in ("int32", "int64"):
            for last in (False, True):
                for dtype in wgrad_depthwise.TYPES:
                    variant = Variant.of(replace(problem, x_dtype=dtype), last, index)
                    asked.add(("wgrad_depthwise", launch.freeze(variant.macros)))
    assert asked == {(stem, macros) for stem, macros in listed if stem == "wgrad_depthwise"}


def test_structs_are_those_of_the_kernel() -> None:
    assert wgrad_depthwise.AREA.itemsize == 64
    assert wgrad_depthwise.TILE.itemsize == 304


# ---- what the emulator sees ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sanitize", "watch"])
def test_no_race_and_nothing_out_of_bounds(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for processors in (1, 100):
        monkeypatch.setattr(EmulatedDevice, "sm_count", processors)
        forget()
        with (
            emulated_device(mode=mode, order="random", block_order="shuffled") as device,
            gpuconv.use_backend("cuda"),
        ):
            for order in ORDERS:
                for dtype, filter, stride in (
                    ("float16", 3, 1), ("float32", 3, 2), ("float16", 9, 1), ("float32", 3, 3),
                ):  # fmt: skip
                    for width in (9, 16):
                        problem = problem_of(
                            (3, 11, 10, width), (filter, filter), dtype=dtype, order=order,
                            stride=stride, padding=1 + filter // 3, padding_mode="reflect",
                            multiplier=1 + (filter == 9),
                        )  # fmt: skip
                        compute(device, problem, *arrays_of(problem))
    forget()


# (N, C, H, W), dtype, filter, stride, order; the most wavefronts of the sums' loop, and sectors
# that are read, times the ideal.
TOUCHED = [
    ((1, 4, 64, 64), "float32", 3, 1, "planes", 1.0, 1.0),
    ((1, 4, 64, 64), "float16", 3, 1, "planes", 1.0, 1.0),
    # Rows of 112 bytes end in the middle of a sector, and a warp copies some of them alone.
    ((2, 4, 56, 56), "float16", 7, 1, "planes", 1.0, 1.25),
    ((2, 4, 56, 56), "float32", 3, 2, "planes", 1.3, 1.1),
    # Rows of 28 bytes, 4 bytes at a time: what else is in a sector waits in the L1 cache.
    ((2, 32, 14, 14), "float16", 3, 1, "planes", 1.0, 2.0),
    ((2, 64, 14, 14), "float16", 3, 1, "channels last", 1.0, 1.0),
    ((2, 64, 7, 7), "float32", 3, 1, "channels last", 1.0, 1.0),
]


def aligned(device: Any, array: Any) -> Any:
    """The same in memory that begins at a multiple of a sector, as a real device's does."""
    axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    memory = device.empty(tuple(array.shape[axis] for axis in axes), array.dtype)
    memory[...] = array.transpose(axes)
    return memory.transpose([axes.index(axis) for axis in range(array.ndim)])


@pytest.mark.parametrize(
    ("shape", "dtype", "filter", "stride", "order", "wavefronts", "sectors"), TOUCHED
)
def test_wavefronts_and_sectors(
    shape: Any, dtype: str, filter: int, stride: int, order: str, wavefronts: float,
    sectors: float, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every element of x and dy is read once, and shared memory without a conflict."""
    monkeypatch.setattr(EmulatedDevice, "sm_count", 1)
    forget()
    with emulated_device(mode="watch") as device, gpuconv.use_backend("cuda"):
        problem = problem_of(
            shape, (filter, filter), dtype=dtype, order=order, stride=stride, padding=filter // 2
        )
        x, dy = (aligned(device, a) for a in arrays_of(problem))
        compute(device, problem, x, dy)
        sites = device.report.sites
        reads = [s for s in sites if (s.space, s.operation) == ("global", "load")]
        assert sum(s.lanes * s.bytes for s in reads) == x.nbytes + dy.nbytes, str(device.report)
        moved = 32 * sum(s.sectors for s in reads) / (x.nbytes + dy.nbytes)
        assert moved <= sectors, str(device.report)
        loads = [s for s in sites if (s.space, s.operation) == ("shared", "load")]
        inner = max(loads, key=lambda s: s.lanes * s.bytes)
        assert inner.wavefronts <= wavefronts * inner.ideal_wavefronts, str(device.report)
    forget()
