"""two_passes: padding, remainders of blocks, types, what it leaves of NaN, and bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import column_sums, filter2d, separable, two_passes
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, describe

CPU = Cpu(threads=2)


def describe2d(x, w, **options):
    return describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=x.shape[1], **options)


@pytest.fixture
def served(monkeypatch):
    """How many calls were computed in two passes, and how many had planes to compute again."""
    counts = {"calls": 0, "again": 0}
    run, again = two_passes.run, two_passes._Call.again

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(two_passes, "run", counted("calls", run))
    monkeypatch.setattr(two_passes._Call, "again", counted("again", again))
    return counts


def run(problem, x, w, bias=None, cpu=CPU):
    plan = choose("test", problem, "numpy", cpu, "separable")
    y = np.full((x.shape[0], *problem.y_shape[1:]), 77, problem.y_dtype.numpy)
    with np.errstate(all="ignore"):
        separable.run(plan, x, w, bias, y)
    return y


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def outer(filters, rows, columns, seed=1):
    u, v = normal(filters, 1, rows, 1, seed=seed), normal(filters, 1, 1, columns, seed=seed + 1)
    return u * v


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("flip", [False, True])
def test_every_padding(mode, flip, served):
    for extents, filters, padding in (
        ((21, 33), (3, 3), 1), ((20, 31), (5, 4), ((3, 0), (0, 2))), ((9, 40), (7, 7), 0),
        ((3, 5), (3, 3), ((4, 3), (7, 6))), ((2, 30), (9, 3), (4, 1)), ((3, 16), (3, 3), 1),
        ((1, 1), (3, 3), 1), ((6, 70), (2, 33), (1, 16)),
    ):  # fmt: skip
        x, w = normal(2, 3, *extents), outer(6, *filters)
        problem = describe2d(x, w, padding=padding, padding_mode=mode, flip=flip)
        bias = normal(6, seed=3)
        testing.assert_close(problem, run(problem, x, w), x, w)
        problem = dataclasses.replace(problem, bias=problem.x_dtype)
        testing.assert_close(problem, run(problem, x, w, bias), x, w, bias)
    assert served["calls"] == 16
    assert not served["again"]


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
def test_every_memory_order_gives_the_same_bits(memory, served):
    x, w = normal(2, 3, 31, 40), outer(3, 3, 5)
    problem = describe2d(x, w, padding=(1, 2))
    expected = run(problem, x, w)
    testing.assert_close(problem, expected, x, w)
    other = testing.in_memory_order(x, memory, channel_axis=1)
    np.testing.assert_array_equal(run(problem, other, w), expected)
    big = np.zeros((2, 3, 64, 82), np.float32)
    for out in (big[..., 1:32, 2:42], big[..., 1:63:2, 2:82:2], big[..., 31:0:-1, 42:2:-1]):
        big.fill(0)
        plan = choose("test", problem, "numpy", CPU, "separable")
        separable.run(plan, other, w, None, out)
        np.testing.assert_array_equal(out, expected)
        out[...] = 0
        assert not big.any()  # nothing else was written
    assert served["calls"]


@pytest.mark.parametrize("x_dtype", ["uint8", "int16", "int32", "float16", "float64"])
def test_types(x_dtype, served):
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, (2, 2, 17, 23), x_dtype)
    hats = np.multiply.outer([1, -2, 1], [1, 2, 3, 2, 1])[None, None].repeat(2, axis=0)
    for w_dtype in ("int16", "float32", "float64"):
        w = hats.astype(w_dtype)
        problem = describe2d(x, w, padding=2)
        testing.assert_close(problem, run(problem, x, w), x, w)
    assert served["calls"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_keep_to_their_windows(value, served):
    x, w = normal(1, 2, 200, 250), outer(2, 3, 5)
    problem = describe2d(x, w, padding=(1, 2))
    clean = run(problem, x, w)
    assert not served["again"]
    for row, column in ((20, 0), (0, 249), (199, 125)):
        spoilt = x.copy()
        spoilt[0, 1, row, column] = value
        y = run(problem, spoilt, w)
        hit = np.zeros(y.shape, bool)
        hit[0, 1, max(row - 1, 0) : row + 2, max(column - 2, 0) : column + 3] = True
        np.testing.assert_array_equal(~np.isfinite(y), hit)
        testing.assert_close(problem, np.where(hit, clean, y), x, w)
    assert served["again"] == 3


def test_lines_that_overflow_are_no_nan(served):
    x, w = np.full((1, 1, 20, 30), 3e38, np.float32), np.ones((1, 1, 3, 3), np.float32)
    assert (run(describe2d(x, w), x, w) == np.inf).all()
    assert served["again"]


@pytest.mark.parametrize(("extents", "filters"), [((203, 333), (5, 5)), ((13, 20), (3, 7))])
def test_bits_depend_on_neither_blocks_nor_batch_nor_threads(extents, filters, monkeypatch, served):
    x, w = normal(20, 2, *extents), outer(2, *filters)
    problem = describe2d(x, w, padding=1)
    alone = describe2d(x[:1], w, padding=1)
    expected = [run(alone, image[None], w)[0] for image in x]
    testing.assert_close(problem, expected, x, w)
    np.testing.assert_array_equal(run(alone, x, w), expected)  # a batch that was not planned
    monkeypatch.setattr(column_sums, "_INLINE", 0.0)
    tiled = set()
    for threads in (1, 2, 3):
        for limit in (None, threads * 150_000):
            some = dataclasses.replace(problem, workspace_limit=limit)
            cpu = Cpu(threads=threads)
            tiling, used = two_passes._tiling.__wrapped__(some, cpu)
            tiled.add((tiling.rows, tiling.channels, tiling.images, used))
            assert two_passes.workspace(some, cpu) <= (limit or 1 << 26)
            plan = choose("test", some, "numpy", cpu, "separable")
            y = np.empty(problem.y_shape, np.float32)
            separable.run(plan, x, w, None, y)
            np.testing.assert_array_equal(y, expected)
    assert len(tiled) > 3
    assert served["calls"] > 20


def test_where_outputs_lie_apart_it_is_left_to_other_blocks(served):
    x, w = normal(1, 1, 40, 50), outer(1, 3, 5)
    for options in ({"stride": 2}, {"dilation": 2}):
        problem = describe2d(x, w, **options)
        assert not two_passes.serves(problem, CPU)
        assert filter2d.fits(problem, CPU)
        testing.assert_close(problem, run(problem, x, w), x, w)
    assert not served["calls"]
