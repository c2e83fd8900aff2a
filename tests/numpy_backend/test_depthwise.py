"""depthwise: memory orders, and what it leaves of NaN."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import depthwise
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import describe

CPU = Cpu(threads=2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("channels", [1, 3, 70])
def test_the_expected_memory_order_is_only_a_hint(channels_last, memory, channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, channels, 31, 40), np.float32)
    x = testing.in_memory_order(x, memory, channel_axis=1)
    w = rng.standard_normal((2 * channels, 1, 3, 5), np.float32)
    problem = describe(
        "test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=channels, padding=(1, 2),
        channels_last=channels_last, stride=(1, 2),
    )  # fmt: skip
    plan = choose("test", problem, "numpy", CPU, "depthwise")
    y = np.empty(problem.y_shape, np.float32)
    depthwise.run(plan, x, w, None, y)
    testing.assert_close(problem, y, x, w)


def test_64_bit_integers_wrap():
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**63), 2**63 - 1, (1, 2, 9, 9))
    w = rng.integers(-(2**63), 2**63 - 1, (2, 1, 3, 3))
    problem = describe("test", 2, x.shape, w.shape, "int64", "int64", groups=2)
    plan = choose("test", problem, "numpy", CPU, "depthwise")
    y = np.empty(problem.y_shape, np.int64)
    depthwise.run(plan, x, w, None, y)
    testing.assert_close(problem, y, x, w)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_windows_that_are_mostly_padding(channels_last, stride, multiplier):
    rng = np.random.default_rng(0)
    for extents, filters, padding in (
        ((7, 7), (13, 13), 6), ((2, 30), (9, 3), (4, 1)), ((3, 5), (3, 3), ((5, 7), (0, 2))),
        ((1, 4, 6), (3, 5, 3), (3, 2, 1)), ((20,), (31,), 15),
    ):  # fmt: skip
        x = rng.standard_normal((2, 6, *extents), np.float32)
        w = rng.standard_normal((6 * multiplier, 1, *filters), np.float32)
        problem = describe(
            "test", len(extents), x.shape, w.shape, x.dtype, w.dtype, groups=6, padding=padding,
            channels_last=channels_last, stride=stride,
        )  # fmt: skip
        testing.assert_close(problem, run(problem, x, w), x, w)


def test_zeros_of_the_padding_meet_weights_that_are_not_finite():
    x = np.ones((1, 2, 5, 40), np.float32)
    w = np.ones((2, 1, 9, 3), np.float32)
    w[1, 0, 0, 1] = np.inf
    problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=2, padding=(4, 1))
    y = run(problem, x, w)
    assert np.isfinite(y[:, 0]).all()
    assert np.isnan(y[0, 1, :4]).all()  # the row of zeros above the image, times infinity
    assert np.isinf(y[0, 1, 4]).all()


def test_bits_do_not_depend_on_the_memory_of_the_result():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 30, 61), np.float32)
    for filters in ((3, 3), (7, 7)):
        w = rng.standard_normal((5, 1, *filters), np.float32)
        problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=5)
        plan = choose("test", problem, "numpy", CPU, "depthwise")
        expected = run(problem, x, w)
        for memory in testing.MEMORY_ORDERS:
            y = testing.in_memory_order(np.zeros_like(expected), memory, channel_axis=1)
            depthwise.run(plan, x, w, None, y)
            np.testing.assert_array_equal(y, expected)


SMALL = (
    ((28, 28), (3, 3)), ((64, 64), (5, 5)), ((9, 40), (1, 5)), ((30, 7), (4, 1)), ((50,), (6,)),
    ((1, 8, 9), (1, 2, 3)), ((2, 3), (7, 9)),
)  # fmt: skip


def small(extents, filters, batch=1, dtype="float32", **options):
    options = {"padding": tuple(n - 1 for n in filters), **options}
    x, w = (batch, 1, *extents), (1, 1, *filters)
    return describe("test", len(extents), x, w, dtype, dtype, **options)


@pytest.mark.parametrize(("extents", "filters"), SMALL)
@pytest.mark.parametrize("mode", ["zeros", "symmetric", "circular"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_small_planes_are_summed_as_a_whole(extents, filters, mode, dtype):
    rng = np.random.default_rng(0)
    for flip in (False, True):
        problem = small(extents, filters, 3, dtype, padding_mode=mode)
        problem = dataclasses.replace(problem, flip=flip)
        assert depthwise._flat(problem, CPU)
        x = testing.random_array(rng, problem.x_shape, dtype)
        w = testing.random_array(rng, problem.w_shape, dtype)
        testing.assert_close(problem, run(problem, x, w), x, w)
        testing.assert_close(problem, run(problem, x[..., ::-1], w), x[..., ::-1], w)


def test_many_small_planes_are_summed_together():
    assert depthwise._flat(small((12, 14), (3, 5), 4), CPU)
    assert not depthwise._flat(small((12, 14), (3, 5), 5), CPU)


def test_a_small_plane_keeps_nan_and_infinity_to_their_windows():
    rng = np.random.default_rng(0)
    problem = small((12, 14), (3, 5))
    for value in (np.nan, np.inf):
        x = rng.standard_normal(problem.x_shape, np.float32)
        w = rng.standard_normal(problem.w_shape, np.float32)
        clean = run(problem, x, w)
        x[0, 0, 4, 13] = value  # at the end of a row
        y = run(problem, x, w)
        hit = np.zeros(y.shape, bool)
        hit[0, 0, 4:7, 13:18] = True
        np.testing.assert_array_equal(~np.isfinite(y), hit)
        np.testing.assert_array_equal(y[~hit], clean[~hit])
        w[0, 0, 1, 1] = value
        with np.errstate(invalid="ignore"):
            testing.assert_close(problem, run(problem, x, w), x, w)


@pytest.mark.parametrize(("extents", "filters"), SMALL[:3])
def test_bits_of_small_planes_depend_on_neither_batch_nor_threads(extents, filters, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(depthwise, "_FEW", 70)
    problem = small(extents, filters, 70)
    x = rng.standard_normal(problem.x_shape, np.float32)
    w = rng.standard_normal(problem.w_shape, np.float32)
    expected = [run(small(extents, filters), image[None], w)[0] for image in x]
    np.testing.assert_array_equal(run(problem, x, w), expected)
    monkeypatch.setattr(depthwise, "_INLINE", 0.0)
    for threads in (1, 2, 3):
        cpu = Cpu(threads=threads)
        for limit in (None, 3 * 70_000):
            some = dataclasses.replace(problem, workspace_limit=limit)
            assert depthwise._flat.__wrapped__(some, cpu).threads == threads
            plan = choose("test", some, "numpy", cpu, "depthwise")
            y = np.empty(problem.y_shape, np.float32)
            depthwise.run(plan, x, w, None, y)
            np.testing.assert_array_equal(y, expected)
            assert plan.workspace_bytes <= (limit or plan.workspace_bytes)


def run(problem, x, w):
    plan = choose("test", problem, "numpy", CPU, "depthwise")
    y = np.full(problem.y_shape, 77, problem.y_dtype.numpy)
    with np.errstate(all="ignore"):
        depthwise.run(plan, x, w, None, y)
    return y
