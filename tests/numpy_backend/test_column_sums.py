"""column_sums: padding, memory orders, types, what it leaves of NaN, and bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import column_sums, filter2d
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, describe

CPU = Cpu(threads=2)


def describe2d(x, w, **options):
    return describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=x.shape[1], **options)


def run(problem, x, w, bias=None, cpu=CPU):
    plan = choose("test", problem, "numpy", cpu, "column_sums")
    y = np.full((x.shape[0], *problem.y_shape[1:]), 77, problem.y_dtype.numpy)
    with np.errstate(all="ignore"):
        column_sums.run(plan, x, w, bias, y)
    return y


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("flip", [False, True])
def test_every_padding(mode, flip):
    for extents, filters, padding in (
        ((20, 31), (3, 3), 1), ((20, 31), (5, 4), ((3, 0), (0, 2))), ((9, 40), (7, 7), 0),
        ((3, 5), (3, 3), ((4, 3), (7, 6))), ((2, 30), (9, 3), (4, 1)), ((12, 12), (1, 5), 2),
        ((12, 12), (5, 1), 2), ((1, 1), (3, 3), 1),
    ):  # fmt: skip
        x, w = normal(2, 3, *extents), normal(6, 1, *filters, seed=1)
        problem = describe2d(x, w, padding=padding, padding_mode=mode, flip=flip)
        bias = normal(6, seed=2)
        testing.assert_close(problem, run(problem, x, w), x, w)
        problem = dataclasses.replace(problem, bias=problem.x_dtype)
        testing.assert_close(problem, run(problem, x, w, bias), x, w, bias)


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_memory_order_gives_the_same_bits(memory, channels):
    x, w = normal(2, channels, 31, 40), normal(channels, 1, 3, 5)
    problem = describe2d(x, w, padding=(1, 2))
    expected = run(problem, x, w)
    testing.assert_close(problem, expected, x, w)
    other = testing.in_memory_order(x, memory, channel_axis=1)
    np.testing.assert_array_equal(run(problem, other, w), expected)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 63), (128, 512)])
def test_out_of_any_strides(height, width):
    x, w = normal(1, 1, height, width), normal(1, 1, 3, 3)
    problem = describe2d(x, w, padding=1)
    plan = choose("test", problem, "numpy", CPU, "column_sums")
    first = run(problem, x, w)
    side = 2 * max(height, width) + 2
    big = np.zeros((1, 1, side, side), np.float32)
    views = (
        big[..., 1 : height + 1, 1 : width + 1],
        big[..., 1 : 2 * height : 2, 1 : 2 * width : 2],
        big[..., height:0:-1, width:0:-1],
        big[..., 1 : width + 1, 1 : height + 1].swapaxes(2, 3),
    )
    for out in views:
        big.fill(0)
        column_sums.run(plan, x, w, None, out)
        np.testing.assert_array_equal(out, first)
        out[...] = 0
        assert not big.any()  # nothing else was written


@pytest.mark.parametrize("x_dtype", ["uint8", "int16", "bool", "int32", "float16", "float64"])
@pytest.mark.parametrize("w_dtype", ["uint8", "int16", "float32", "float64"])
def test_types(x_dtype, w_dtype):
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, (2, 2, 17, 23), x_dtype)
    w = testing.random_array(rng, (2, 1, 3, 5), w_dtype)
    problem = describe2d(x, w, padding=2)
    testing.assert_close(problem, run(problem, x, w), x, w)


def test_large_integers_are_left_to_exact_arithmetic():
    x, w = np.full((1, 1, 9, 9), 2**62), np.ones((1, 1, 3, 3), np.int64)
    assert (run(describe2d(x, w), x, w) == 2**62).all()  # 9 * 2^62 modulo 2^64


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reach", [2, 3])
def test_nan_and_infinity_keep_to_their_windows(value, reach):
    x, w = normal(1, 1, 40, 50), normal(1, 1, 3, 2 * reach + 1)
    problem = describe2d(x, w, padding=(1, reach))
    clean = run(problem, x, w)
    for row, column in ((20, 0), (0, 49), (39, 25)):
        spoilt = x.copy()
        spoilt[0, 0, row, column] = value
        y = run(problem, spoilt, w)
        hit = np.zeros(y.shape, bool)
        windows = slice(max(column - reach, 0), column + reach + 1)
        hit[0, 0, max(row - 1, 0) : row + 2, windows] = True
        np.testing.assert_array_equal(~np.isfinite(y), hit)
        np.testing.assert_array_equal(y[~hit], clean[~hit])
    for padding in (0, 1, 4):
        problem = describe2d(x, w, padding=padding)
        spoilt = w.copy()
        spoilt[0, 0, 1, 1] = value
        y = run(problem, x, spoilt)  # zeros beyond the edge times that are NaN too
        testing.assert_close(problem, y, x, spoilt)


@pytest.mark.parametrize(("extents", "filters"), [((200, 333), (5, 5)), ((12, 20), (3, 7))])
def test_bits_depend_on_neither_blocks_nor_batch_nor_threads(extents, filters, monkeypatch):
    x, w = normal(40, 2, *extents), normal(2, 1, *filters)
    problem = describe2d(x, w, padding=1)
    alone = describe2d(x[:1], w, padding=1)
    expected = [run(alone, image[None], w)[0] for image in x]
    testing.assert_close(problem, expected, x, w)
    np.testing.assert_array_equal(run(alone, x, w), expected)  # a batch that was not planned
    monkeypatch.setattr(column_sums, "_INLINE", 0.0)
    tiled = set()
    for threads in (1, 2, 3):
        for limit in (None, 3 * 120_000):
            some = dataclasses.replace(problem, workspace_limit=limit)
            cpu = Cpu(threads=threads)
            tiling, used = column_sums._tiling.__wrapped__(some, cpu)
            tiled.add((tiling.rows, tiling.channels, tiling.images, used))
            plan = choose("test", some, "numpy", cpu, "column_sums")
            assert plan.workspace_bytes <= (limit or plan.workspace_bytes)
            y = np.empty(problem.y_shape, np.float32)
            column_sums.run(plan, x, w, None, y)
            np.testing.assert_array_equal(y, expected)
    assert len(tiled) > 3


def test_filters_of_rank_one_are_left_to_two_passes(monkeypatch):
    g = np.exp(-(np.linspace(-2, 2, 31) ** 2))
    x, w = normal(1, 1, 400, 500), np.multiply.outer(g, g).astype(np.float32)[None, None]
    problem = describe2d(x, w, padding=15)
    called = []
    apply = filter2d.apply
    monkeypatch.setattr(filter2d, "apply", lambda *a: called.append(a[-1]) or apply(*a))
    testing.assert_close(problem, run(problem, x, w), x, w)
    assert called
    assert called[0] is not None
    other = w.copy()
    other[0, 0, 3, 4] *= 2
    called.clear()
    testing.assert_close(problem, run(problem, x, other), x, other)
    assert not called


def test_what_it_does_not_take():
    for shape, filters, options, reason in (
        ((1, 1, 20, 20), (1, 1, 3, 3), {"stride": 2}, "neighbours"),
        ((1, 1, 20, 20), (1, 1, 3, 3), {"dilation": 2}, "neighbours"),
        ((1, 2, 20, 20), (1, 2, 3, 3), {"groups": 1}, "of its own"),
        ((1, 2, 20, 20), (2, 1, 3, 3), {"groups": 2, "channels_last": True}, "lie apart"),
        ((1, 1, 2, 3_000_000), (1, 1, 1, 9), {}, "workspace"),
    ):
        problem = describe("test", 2, shape, filters, "float32", "float32", **options)
        verdict = column_sums.supports(problem, CPU)
        assert not verdict
        assert reason in verdict.reason
