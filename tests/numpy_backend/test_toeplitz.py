"""toeplitz: strides, pads and memory orders, and what is not finite."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import toeplitz
from gpuconv.plan import choose
from gpuconv.problem import describe
from tests.numpy_backend.forced import CPU, compute


def case(x_shape, filters, dtype="float32", **options):
    """A problem, with random x and w."""
    channels = x_shape[1]
    problem = describe(
        "test", len(filters), x_shape, (channels, 1, *filters), dtype, dtype,
        **{"groups": channels, **options},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, x_shape, dtype)
    return problem, x, testing.random_array(rng, problem.w_shape, dtype)


force = partial(compute, "toeplitz")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("filters", [(13, 13), (1, 9), (5, 2), (27, 30)])
def test_strides_and_pads(filters, stride, dtype):
    for shape in ((11, 5, 14, 17), (8, 3, 28, 30)):
        same = tuple(n // 2 for n in filters)
        for pad in {same, tuple((n, n - 1) for n in filters)}:
            problem, x, w = case(shape, filters, dtype, stride=stride, padding=pad, bias=True)
            bias = testing.random_array(np.random.default_rng(1), (shape[1],), dtype)
            testing.assert_close(problem, force(problem, x, w, bias), x, w, bias)


def test_a_stride_that_leaves_much_of_the_padded_rows_unread():
    for shape, filters, stride, pad in (
        ((8, 2, 14, 14), (2, 2), 10, ((5, 0), (5, 0))),
        ((32, 16, 7, 7), (1, 1), 6, ((3, 0), (3, 0))),
        ((8, 2, 14, 14), (2, 2), 10, ((0, 5), (0, 5))),
        ((8, 2, 9, 9), (3, 3), 1, ((9, 9), (9, 9))),
    ):
        problem, x, w = case(shape, filters, stride=stride, padding=pad)
        testing.assert_close(problem, force(problem, x, w), x, w)


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
def test_memory_orders_and_the_bits_of_an_image_alone(memory):
    problem, x, w = case((19, 20, 14, 14), (13, 13), padding=6)
    whole = force(problem, testing.in_memory_order(x, memory, channel_axis=1), w, memory=memory)
    testing.assert_close(problem, whole, x, w)
    for n in (0, 7, 18):
        np.testing.assert_array_equal(whole[n : n + 1], force(problem, x[n : n + 1], w))
    np.testing.assert_array_equal(whole[3:14], force(problem, x[3:14], w))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("spoiled", ["x", "w"])
def test_what_is_not_finite_stays_where_it_is(value, spoiled):
    problem, x, w = case((9, 3, 14, 20), (9, 9), padding=4)
    if spoiled == "x":
        x[0, 1, 5, 7] = x[8, 2, 0, 0] = x[8, 2, 13, 19] = value
    else:
        w[1, 0, 0, 2] = value
    y, expected = force(problem, x, w), compute("direct", problem, x, w)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(expected))
    inside = np.isfinite(expected)
    assert inside.any()
    np.testing.assert_allclose(y[inside], expected[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [None, 4 << 20, 700_000])
def test_workspace_limit(limit):
    problem, x, w = case((16, 20, 28, 28), (13, 13), padding=6, workspace_limit=limit)
    assert toeplitz.workspace(problem, CPU) <= (limit or 64 << 20)
    testing.assert_close(problem, force(problem, x, w), x, w)


def test_wide_filters_of_a_batch_choose_it():
    problem, _, _ = case((32, 256, 28, 28), (29, 29), padding=14)
    assert choose("test", problem, "numpy", CPU).algorithm == "toeplitz"
    problem, _, _ = case((32, 64, 56, 56), (3, 3), padding=1)
    assert choose("test", problem, "numpy", CPU).algorithm != "toeplitz"


def test_each_thread_that_has_images_of_a_channel_pays_for_its_matrix():
    problem, _, _ = case((8, 4, 14, 14), (9, 9), padding=4)
    tiling = replace(toeplitz._tiling(problem, CPU), images=8, threads=2)
    one, two, three = (tiling.seconds(batch, CPU) for batch in (8, 16, 24))
    assert two == pytest.approx(2 * one)
    assert three - two == pytest.approx(one - tiling.matrix * toeplitz._ELEMENT)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 4, 20, 20), {}),
        ((8, 4, 20, 20), {"dilation": 2}),
        ((8, 4, 20, 20), {"padding": 1, "padding_mode": "reflect"}),
        ((8, 4, 20, 20), {"dtype": "int64"}),
        ((8, 4, 20, 20), {"dtype": "float16"}),
        ((8, 4, 9, 9, 9), {}),
        ((8, 4, 20), {}),
        ((8, 4, 20, 3), {}),
    ],
)
def test_what_it_refuses(shape, options):
    dtype = options.pop("dtype", "float32")
    problem, _, _ = case(shape, (3,) * (len(shape) - 2), dtype, **options)
    assert toeplitz.supports(problem, CPU).reason
