"""dgrad_depthwise: strides, pads and types, and what is not finite."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import dgrad_depthwise
from gpuconv.problem import describe
from tests.numpy_backend.forced import CPU, compute


def case(x_shape, filters, dtype="float32", /, **options):
    """A problem, with random dy and w."""
    channels = x_shape[1]
    problem = describe(
        "test", len(filters), x_shape, (channels, 1, *filters), dtype, dtype, operation="dgrad",
        groups=channels, **options,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    dy = testing.random_array(rng, problem.y_shape, dtype)
    return problem, dy, testing.random_array(rng, problem.w_shape, dtype)


force = partial(compute, "dgrad_depthwise")


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (4, 1)])
@pytest.mark.parametrize("filters", [(1, 1), (3, 3), (2, 5), (7, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_strides_and_pads(stride, filters, dtype):
    for shape, padding in (((3, 4, 23, 30), 0), ((2, 3, 12, 17), ((0, 1), (0, 2)))):
        for pad in {padding, tuple((n - 1, n // 2) for n in filters)}:
            problem, dy, w = case(shape, filters, dtype, stride=stride, padding=pad)
            testing.assert_close(problem, force(problem, dy, w), dy, w)


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
def test_one_axis_memory_orders_and_flip(memory):
    for flip in (False, True):
        problem, dy, w = case((2, 70, 61), (5,), stride=2, padding=2)
        problem = replace(problem, flip=flip)
        dy = testing.in_memory_order(dy, memory, channel_axis=1)
        testing.assert_close(problem, force(problem, dy, w, memory=memory), dy, w)


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bias(dtype, memory):
    problem, dy, w = case((2, 7, 19, 22), (3, 4), dtype, stride=2, padding=1, bias=True)
    bias = testing.random_array(np.random.default_rng(1), (7,), dtype)
    testing.assert_close(problem, force(problem, dy, w, bias, memory=memory), dy, w, bias)


def test_images_of_a_batch_get_the_bits_that_they_get_alone():
    problem, dy, w = case((5, 48, 112, 60), (3, 3), stride=2, padding=1)
    whole = force(problem, dy, w)
    testing.assert_close(problem, whole, dy, w)
    for n in range(5):
        np.testing.assert_array_equal(whole[n : n + 1], force(problem, dy[n : n + 1], w))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spoiled", ["dy", "w"])
@pytest.mark.parametrize(
    ("dtype", "result"),
    [("float32", "float32"), ("float16", "float32"), ("float32", "float64")],
)
def test_what_is_not_finite_stays_where_it_is(value, spoiled, dtype, result):
    problem, dy, w = case((2, 3, 25, 31), (3, 3), dtype, stride=2, padding=1, dtype=result)
    dy, w = 300 * dy, 300 * w  # float16 would not hold their products
    if spoiled == "dy":
        dy[0, 1, 5, 7] = dy[1, 2, 0, 0] = dy[1, 2, 12, 15] = value
    else:
        w[1, 0, 0, 2] = value
    dx, expected = force(problem, dy, w), compute("direct", problem, dy, w)
    np.testing.assert_array_equal(np.isnan(dx), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(dx), np.isinf(expected))
    inside = np.isfinite(expected)
    assert inside.any()
    tolerance = 32 * np.finfo(result).eps
    largest = np.abs(expected[inside]).max()
    np.testing.assert_allclose(dx[inside], expected[inside], tolerance, tolerance * largest)


@pytest.mark.parametrize("limit", [None, 2 << 20, 100_000])
def test_workspace_limit(limit):
    problem, dy, w = case((2, 40, 90, 75), (5, 5), stride=2, padding=2, workspace_limit=limit)
    assert dgrad_depthwise.workspace(problem, CPU) <= (limit or 64 << 20)
    testing.assert_close(problem, force(problem, dy, w), dy, w)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 4, 20, 20), {"stride": 1}),
        ((1, 4, 20, 20), {"stride": 2, "dilation": 2}),
        ((1, 4, 20, 20), {"stride": 2, "padding": 1, "padding_mode": "reflect"}),
        ((1, 4, 20, 20), {"stride": 2, "padding": 3}),
        ((1, 4, 20, 20), {"stride": 2, "dtype": "int64"}),
        ((1, 4, 9, 9, 9), {"stride": 2}),
    ],
)
def test_what_it_refuses(shape, options):
    dtype = options.pop("dtype", "float32")
    problem, _, _ = case(shape, (3,) * (len(shape) - 2), dtype, **options)
    assert dgrad_depthwise.supports(problem, CPU).reason
