"""separable: which filters have rank 1, and what the two passes cost in accuracy."""

from __future__ import annotations

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.numpy_backend import separable
from gpuconv.numpy_backend.device import Cpu
from gpuconv.problem import describe

CPU = Cpu(threads=2)


def problem_of(w, dtype):
    shape = (1, len(w), 50, 60)
    return describe("test", 2, shape, w.shape, dtype, w.dtype, groups=len(w), padding="full")


def gaussian(size, sigma, dtype, normalise=True):
    r = np.arange(size) - size // 2
    g = np.exp(-(r**2) / (2 * sigma**2))
    w = np.multiply.outer(g, g)
    return (w / w.sum() if normalise else w).astype(dtype)[None, None]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("size", "sigma"), [(3, 0.5), (7, 1.0), (31, 5.0), (63, 3.0)])
def test_a_gaussian_has_rank_one_despite_its_rounding(dtype, size, sigma):
    for normalise in (False, True):
        w = gaussian(size, sigma, dtype, normalise)
        assert separable.factors(problem_of(w, dtype), w) is not None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_rounding_does_not_explain_is_refused(dtype):
    w = gaussian(7, 1.5, dtype)
    w[0, 0, 2, 2] *= 1 + 32 * np.finfo(dtype).eps
    assert separable.factors(problem_of(w, dtype), w) is None
    x = np.zeros((1, 1, 50, 60), dtype)
    with pytest.raises(ValueError, match="higher rank"):
        gpuconv.conv2d(x, w, padding=2, algorithm="separable")


def test_one_filter_of_higher_rank_among_many():
    rng = np.random.default_rng(0)
    w = np.concatenate([gaussian(5, 1.0, np.float32)] * 3)
    assert separable.factors(problem_of(w, np.float32), w) is not None
    w[2] = rng.random((1, 5, 5))
    assert separable.factors(problem_of(w, np.float32), w) is None


def test_integers_factor_exactly():
    for u, v in [((1, 2, 1), (-1, 0, 1)), ((6, 9), (4, 10)), ((0, 0), (1, 2)), ((-3, 5), (7, 0))]:
        w = np.multiply.outer(u, v)[None, None]
        found = separable.factors(problem_of(w, np.int64), w)
        product = found.u[0, 0][:, None] * found.v[0, 0]
        np.testing.assert_array_equal(product, w[0, 0])
        assert found.u.dtype.kind == "i"
        w[0, 0, 0, 0] += 1
        again = separable.factors(problem_of(w, np.int64), w)
        rank = np.linalg.matrix_rank(w[0, 0])
        assert (again is None) == (rank > 1)


@pytest.mark.parametrize("values", [np.nan, np.inf, 1e-42])
def test_odd_weights(values):
    w = np.full((1, 1, 3, 3), values, np.float32)
    found = separable.factors(problem_of(w, np.float32), w)
    assert found is None


@pytest.mark.parametrize("name", ["auto", "filter2d", "fft", "separable"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stride", [1, 2])
def test_within_the_direct_sums_bound(name, dtype, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 1, 120, 140)).astype(dtype)
    for size, sigma in [(5, 1.0), (9, 2.0), (31, 5.0)]:
        w = gaussian(size, sigma, dtype)
        problem = describe("test", 2, x.shape, w.shape, dtype, dtype, padding="full", stride=stride)
        y = gpuconv.conv2d(x, w, padding="full", stride=stride, algorithm=name)
        testing.assert_close(problem, y, x, w)


def test_flipped_factors():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 20, 30))
    w = np.multiply.outer([1.0, 2, 5], [3.0, -1, 0, 4])[None, None]
    problem = describe("test", 2, x.shape, w.shape, "float64", "float64", flip=True)
    plan = gpuconv.plan.choose("test", problem, "numpy", CPU, "separable")
    y = np.empty(problem.y_shape)
    separable.run(plan, x, w, None, y)
    testing.assert_close(problem, y, x, w)
