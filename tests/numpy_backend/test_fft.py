"""fft: its bound, results that a transform's error would spoil, tiles, and channels."""

from __future__ import annotations

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.execute import channels_first
from gpuconv.numpy_backend import fft
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import describe

CPU = Cpu(threads=2)


def run(problem, x, w, bias=None):
    plan = choose("test", problem, "numpy", CPU, "fft")
    y = np.full((x.shape[0], *problem.y_shape[1:]), 77, problem.y_dtype.numpy)
    with np.errstate(all="ignore"):
        fft.run(plan, x, w, bias, y)
    return y


@pytest.mark.parametrize("seed", range(300))
def test_double_precision_keeps_the_stated_bound(seed):
    case = testing.random_case(seed, dtypes=("float64", "complex128"), mixed_dtypes=False)
    problem = case.problem()
    if not fft.supports(problem, CPU):
        return
    x, w, bias = case.arrays()
    y = getattr(gpuconv, case.function)(x, w, bias, algorithm="fft", **case.kwargs)
    y_ref, _ = testing.expected(problem, x, w, bias)
    y = channels_first(y, problem.layout.endswith("C"), problem.batched)
    x = channels_first(x, problem.layout.endswith("C"), problem.batched)
    # A window's elements repeat at most as often in a tile as pads repeat them.
    tile = np.abs(testing.reference.pad(problem, x))
    norm = np.sqrt(np.square(tile).sum()) * np.sqrt(np.square(np.abs(w)).sum())
    eps = np.finfo(float).eps
    elements = 2 * tile[0, 0].size * 16
    bound = 8 * np.log2(elements) * eps * norm + problem.result_dtype.eps * np.abs(y_ref)
    assert (np.abs(y - y_ref) <= bound).all()


def test_double_precision_is_never_chosen():
    plan = gpuconv.plan_conv2d((1, 1, 512, 512), (1, 1, 63, 63), dtype="float64")
    assert plan.algorithm != "fft"
    row = next(c for c in plan.candidates if c.algorithm == "fft")
    assert "norm" in row.rejected


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_small_results_beside_large_ones_keep_the_direct_sums_bound(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 150, 160))
    x[..., :70, :] = 0  # windows of zeros
    x[..., 100:, 60:] *= 1e-6  # and of values that the others drown
    x[0, 0, 80, 20] = 3e4
    x = x.astype(dtype)
    w = rng.standard_normal((1, 1, 9, 11)).astype(dtype)
    for stride, padding in ((1, 4), (2, 20), (3, 0)):
        options = {"stride": stride, "padding": padding}
        problem = describe("test", 2, x.shape, w.shape, dtype, dtype, **options)
        y = run(problem, x, w)
        testing.assert_close(problem, y, x, w)
        assert (y == 0).any()


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("limit", [None, 3 << 20])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_channels_are_summed_as_spectra(groups, limit, dtype):
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, (2, 6, 100, 90), dtype)
    w = testing.random_array(rng, (12, 6 // groups, 9, 7), dtype)
    bias = testing.random_array(rng, (12,), dtype)
    problem = describe(
        "test", 2, x.shape, w.shape, dtype, dtype, groups=groups, padding="same", bias=True,
        workspace_limit=limit,
    )  # fmt: skip
    testing.assert_close(problem, run(problem, x, w, bias), x, w, bias)


@pytest.mark.parametrize(("n", "taps"), [(100_000, 1001), (5000, 4999), (3000, 25)])
def test_one_axis(n, taps):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, n), np.float32)
    w = rng.standard_normal((1, 1, taps), np.float32)
    problem = describe("test", 1, x.shape, w.shape, "float32", "float32", padding="full")
    y = run(problem, x, w)
    wide = np.convolve(x[0, 0].astype(float), w[0, 0, ::-1].astype(float))
    magnitudes = np.convolve(np.abs(x[0, 0]).astype(float), np.abs(w[0, 0, ::-1]).astype(float))
    assert (np.abs(y[0, 0] - wide) <= testing.error_bound(problem, wide, magnitudes)).all()


def test_integers_beyond_what_rounding_proves():
    rng = np.random.default_rng(0)
    for low, high in ((-(2**15), 2**15), (-(2**31), 2**31), (-(2**62), 2**62)):
        x = rng.integers(low, high, (1, 2, 40, 50))
        w = rng.integers(low, high, (2, 1, 7, 7))
        problem = describe("test", 2, x.shape, w.shape, "int64", "int64", groups=2)
        testing.assert_close(problem, run(problem, x, w), x, w)
