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


KINDS = ("normal", "positive", "constant", "wave", "uneven", "spikes", "zeros around")


def data(kind, rng, shape):
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "positive":
        return rng.random(shape)
    if kind == "constant":
        return np.full(shape, 0.7)
    if kind == "wave":
        return np.sin(np.indices(shape).sum(axis=0) * rng.uniform(0.01, 3))
    x = rng.standard_normal(shape)
    if kind == "uneven":  # a part is darker than the rest
        x[..., : shape[-1] // 2] *= 10.0 ** -rng.uniform(0, 8)
    elif kind == "spikes":
        x.flat[rng.integers(0, x.size, 3)] = 10.0 ** rng.uniform(1, 8)
    else:
        inside = tuple(slice(n // 3, -(n // 3)) for n in shape[2:])
        x[:, :, *inside] *= 1e5
        x[np.abs(x) < 10] = 0
    return x


@pytest.mark.parametrize("kind_w", KINDS)
@pytest.mark.parametrize("kind_x", KINDS)
def test_single_precision_keeps_its_bound(kind_x, kind_w):
    rng = np.random.default_rng([KINDS.index(kind_x), KINDS.index(kind_w)])
    for shape, filter in (((1, 1, 90, 100), (1, 1, 9, 13)), ((1, 1, 3000), (1, 1, 101))):
        x = data(kind_x, rng, shape).astype(np.float32)
        w = data(kind_w, rng, filter).astype(np.float32)
        problem = describe("t", len(shape) - 2, shape, filter, "float32", "float32", padding="same")
        testing.assert_close(problem, run(problem, x, w), x, w, c=fft.ERROR_CONSTANT)


@pytest.fixture
def sweeps(monkeypatch):
    """The types that transforms ran in, and of how many blocks."""
    seen = []
    sweep = fft._Tiles._sweep

    def recorded(self, dtype, first, outs, parts, blocks):
        seen.append((dtype.name, len(blocks)))
        sweep(self, dtype, first, outs, parts, blocks)

    monkeypatch.setattr(fft._Tiles, "_sweep", recorded)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
@pytest.mark.parametrize(
    ("shape", "filter"),
    [
        ((1, 1, 200, 210), (1, 1, 31, 31)),
        ((2, 3, 90, 80), (6, 1, 25, 41)),
        ((1, 1, 40_000), (1, 1, 255)),
    ],
)
def test_ordinary_data_is_transformed_in_single_precision(shape, filter, dtype, sweeps):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(shape).astype(dtype), rng.standard_normal(filter).astype(dtype)
    options = {"padding": "same", "groups": shape[1]}
    problem = describe("t", len(shape) - 2, shape, filter, dtype, dtype, **options)
    y = run(problem, x, w)
    assert [name for name, _ in sweeps] == ["complex64" if dtype == "complex64" else "float32"]
    testing.assert_close(problem, y, x, w, c=fft.ERROR_CONSTANT)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-38, 1e-25, 1e18])
def test_only_the_blocks_that_need_it_are_transformed_in_double_precision(value, sweeps):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 260, 270)).astype(np.float32)
    w = rng.standard_normal((1, 1, 31, 31)).astype(np.float32)
    # So little that the picture takes many tiles.
    problem = describe(
        "t", 2, x.shape, w.shape, "float32", "float32", padding="same", workspace_limit=3 << 20
    )
    if abs(value) < 1:
        x *= np.float32(value)
    else:
        x[0, 0, 30, 40] = value
    y = run(problem, x, w)
    testing.assert_close(problem, y, x, w, c=fft.ERROR_CONSTANT)
    (_, blocks), (name, again) = sweeps
    assert name == "float64"
    assert (again == blocks) == (abs(value) < 1)


@pytest.mark.parametrize("shape", [(3, 2, 120, 130), (3, 2, 9000)])
def test_an_image_of_a_batch_has_the_bits_it_has_alone(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    x[1, ..., 50:] *= 1e-6  # one of them partly in double precision
    w = rng.standard_normal((2, 1, *([25] * (len(shape) - 2)))).astype(np.float32)
    problem = describe(
        "t", len(shape) - 2, shape, w.shape, "float32", "float32", padding="same", groups=2
    )
    y = run(problem, x, w)
    for n in range(3):
        plan = choose("test", problem, "numpy", CPU, "fft")
        alone = np.empty_like(y[:1])
        fft.run(plan, x[n : n + 1], w, None, alone)
        assert np.array_equal(y[n : n + 1], alone)


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
        testing.assert_close(problem, y, x, w, c=fft.ERROR_CONSTANT)
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
    bound = testing.error_bound(problem, wide, magnitudes, c=fft.ERROR_CONSTANT)
    assert (np.abs(y[0, 0] - wide) <= bound).all()


def test_integers_beyond_what_rounding_proves():
    rng = np.random.default_rng(0)
    for low, high in ((-(2**15), 2**15), (-(2**31), 2**31), (-(2**62), 2**62)):
        x = rng.integers(low, high, (1, 2, 40, 50))
        w = rng.integers(low, high, (2, 1, 7, 7))
        problem = describe("test", 2, x.shape, w.shape, "int64", "int64", groups=2)
        testing.assert_close(problem, run(problem, x, w), x, w)
