"""filter2d: the orders of its products, and blocks that write in place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import filter2d
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import describe

CPU = Cpu(threads=2)


@pytest.mark.parametrize("order", ["phases", "copies"])
@pytest.mark.parametrize("rows", [1, 3, 8, 37])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_order_of_products(order, rows, stride, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 111, 95))
    w = rng.standard_normal((6, 1, 4, 5))
    problem = describe(
        "test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=3, stride=stride, padding=(1, 2)
    )
    (tiling,) = filter2d.tilings(problem, CPU)
    tiling = replace(tiling, order=order, rows=min(rows, problem.output[0]), images=1)
    monkeypatch.setattr(filter2d, "tilings", lambda *_, **__: (tiling,))
    y = np.full(problem.y_shape, 77.0)
    filter2d.run(choose("test", problem, "numpy", CPU, "filter2d"), x, w, None, y)
    testing.assert_close(problem, y, x, w)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 63), (128, 512)])
def test_out_of_any_strides(height, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, height, width), np.float32)
    w = rng.standard_normal((1, 1, 3, 3), np.float32)
    problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, padding=1)
    plan = choose("test", problem, "numpy", CPU, "filter2d")
    first = np.empty_like(x)
    filter2d.run(plan, x, w, None, first)
    testing.assert_close(problem, first, x, w)
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
        filter2d.run(plan, x, w, None, out)
        np.testing.assert_array_equal(out, first)
        out[...] = 0
        assert not big.any()  # nothing else was written


def test_large_integers_are_left_to_exact_arithmetic():
    x = np.full((1, 1, 9, 9), 2**62)
    w = np.ones((1, 1, 3, 3), np.int64)
    problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype)
    y = np.empty(problem.y_shape, np.int64)
    filter2d.run(choose("test", problem, "numpy", CPU, "filter2d"), x, w, None, y)
    assert (y == 2**62).all()  # 9 * 2^62 modulo 2^64
