"""depthwise_last: any rank, stride, pad and memory order, and what is not finite."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import depthwise_last
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import describe
from tests.numpy_backend.forced import CPU, compute, serves


def case(x_shape, filters, dtype="float32", multiplier=1, **options):
    """A problem, with random x and w."""
    channels = x_shape[1]
    problem = describe(
        "test", len(filters), x_shape, (channels * multiplier, 1, *filters), dtype, dtype,
        groups=channels, **options,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, x_shape, dtype)
    return problem, x, testing.random_array(rng, problem.w_shape, dtype)


force = partial(compute, "depthwise_last")


@pytest.mark.parametrize("seed", range(0, 600, 60))
def test_random(seed):
    cases = map(testing.random_case, range(seed, seed + 60))
    assert sum(serves(case, "depthwise_last") for case in cases) > 3


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
def test_ranks_pads_and_memory_orders(memory, last, multiplier):
    for shape, filters, options in (
        ((2, 20, 14, 13), (3, 3), {"padding": 1}),
        ((1, 96, 30, 31), (5, 4), {"padding": 2, "stride": 2}),
        ((3, 130, 7, 7), (7, 7), {"padding": 3, "padding_mode": "reflect"}),
        ((2, 7, 9, 8, 10), (3, 2, 3), {"padding": 1, "dilation": 2}),
        ((2, 5, 300), (9,), {"padding": ((7, 1),), "stride": 3}),
        ((1, 2, 6, 5), (6, 5), {}),
    ):
        problem, x, w = case(
            shape, filters, multiplier=multiplier, bias=True, channels_last=last, **options
        )
        x = testing.in_memory_order(x, memory, channel_axis=1)
        bias = testing.random_array(np.random.default_rng(1), problem.y_shape[1:2], "float32")
        testing.assert_close(problem, force(problem, x, w, bias, memory=memory), x, w, bias)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types(dtype):
    problem, x, w = case((2, 40, 12, 12), (3, 3), dtype, padding=1)
    testing.assert_close(problem, force(problem, x, w), x, w)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_an_image_has_the_bits_that_it_has_alone(last, stride):
    problem, x, w = case((19, 33, 15, 14), (3, 5), padding=2, stride=stride, channels_last=last)
    whole = force(problem, x, w)
    for n in (0, 7, 18):
        np.testing.assert_array_equal(whole[n : n + 1], force(problem, x[n : n + 1], w))
    np.testing.assert_array_equal(whole[3:14], force(problem, x[3:14], w))
    alone, _, _ = case((1, 33, 15, 14), (3, 5), padding=2, stride=stride)
    np.testing.assert_array_equal(whole[3:4], force(alone, x[3:4], w, device=Cpu(threads=1)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spoiled", ["x", "w"])
def test_what_is_not_finite_stays_where_it_is(value, spoiled):
    problem, x, w = case((3, 70, 14, 20), (3, 3), padding=1)
    if spoiled == "x":
        x[0, 1, 5, 7] = x[2, 2, 0, 0] = x[2, 69, 13, 19] = value
    else:
        w[1, 0, 0, 2] = value
    y, expected = force(problem, x, w), compute("direct", problem, x, w)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))
    inside = np.isfinite(expected)
    assert inside.any()
    np.testing.assert_allclose(y[inside], expected[inside], rtol=1e-4, atol=1e-5)


def test_blocks_whose_scratch_memory_held_what_is_not_finite():
    problem, x, w = case((2, 50, 14, 14), (3, 3), padding=1, workspace_limit=100_000)
    force(problem, np.full_like(x, np.nan), w)
    testing.assert_close(problem, force(problem, x, w), x, w)


@pytest.mark.parametrize("limit", [None, 1 << 20, 50_000])
def test_workspace_limit(limit):
    for shape, filters in (((6, 96, 56, 56), (7, 7)), ((2, 3, 20_000), (5,)), ((1, 300, 9), (9,))):
        problem, x, w = case(shape, filters, padding="same", workspace_limit=limit)
        assert depthwise_last.workspace(problem, CPU) <= (limit or 64 << 20)
        testing.assert_close(problem, force(problem, x, w), x, w)


def test_small_maps_of_many_channels_choose_it():
    for shape, filters, stride in (
        ((1, 960, 7, 7), (3, 3), 1),
        ((1, 384, 14, 14), (3, 3), 1),
        ((1, 576, 14, 14), (3, 3), 2),
    ):
        problem, _, _ = case(shape, filters, stride=stride, padding=1)
        assert choose("test", problem, "numpy", CPU).algorithm == "depthwise_last"
    problem, _, _ = case((1, 3, 512, 512), (3, 3), padding=1)
    assert choose("test", problem, "numpy", CPU).algorithm != "depthwise_last"


def test_pixels_share_a_run_where_channels_are_few():
    runs = []
    for channels in (8, 64, 1024):
        problem, _, _ = case((1, channels, 28, 28), (3, 3), padding=1)
        (tiling,) = depthwise_last.tilings(problem, CPU)
        runs.append(tiling.pixels * tiling.pitch)
        assert runs[-1] >= 400
        strided, _, _ = case((1, channels, 28, 28), (3, 3), stride=2)
        assert depthwise_last.tilings(strided, CPU)[0].pixels == 1
    assert max(runs) < 4000


@pytest.mark.parametrize("dtype", ["int64", "complex64"])
def test_what_it_refuses(dtype):
    problem, _, _ = case((2, 4, 8, 8), (3, 3), dtype)
    assert depthwise_last.supports(problem, CPU).reason
    dense = describe("test", 2, (1, 8, 9, 9), (8, 4, 3, 3), "float32", "float32", groups=2)
    assert depthwise_last.supports(dense, CPU).reason
