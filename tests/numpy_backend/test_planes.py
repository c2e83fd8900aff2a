"""What depthwise, filter2d, separable and fft have in common: each against the reference, and the
rules that every algorithm keeps."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.numpy_backend import (
    column_sums,
    depthwise,
    fft,
    filter2d,
    planes,
    scratch,
    separable,
)
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.numpy_backend.device import WORKSPACE_CAP
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, describe
from tests.numpy_backend.forced import CPU, compute

MODULES = {
    "depthwise": depthwise, "column_sums": column_sums, "filter2d": filter2d,
    "separable": separable, "fft": fft,
}  # fmt: skip


def rank_one(w):
    """Filters of rank 1, made of the first column and row of w's, in small integers."""
    if w.ndim != 4 or w.dtype.kind == "c":
        return w
    column, row = w[..., :, :1].astype(float), w[..., :1, :].astype(float)
    column, row = np.where(column < 0, -1, 1), np.round(4 * np.tanh(row))
    if w.dtype.kind in "ub":
        column, row = np.abs(column), np.abs(row)
    return (column * row).astype(w.dtype)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("hundred", range(6))
def test_random_problems(name, hundred):
    served = 0
    for seed in range(100 * hundred, 100 * hundred + 100):
        case = testing.random_case(seed)
        x, w, bias = case.arrays()
        problem = case.problem()
        if not MODULES[name].supports(problem, CPU):
            continue
        if name == "separable":
            w = rank_one(w)
        if name == "fft" and fft.only_by_name(problem):
            continue  # its bound there is another: test_fft.py
        served += 1
        call = getattr(gpuconv, case.function)
        y = call(x, w, bias, algorithm=name, **case.kwargs)
        exact = case.integers and name != "fft"
        testing.assert_close(problem, y, x, w, bias, exact=exact)
    assert served >= {"depthwise": 40, "filter2d": 40, "column_sums": 1}.get(name, 2)


@pytest.mark.parametrize("name", ["depthwise", "filter2d"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((3, 40, 33, 50), (40, 1, 3, 3), {"padding": 1, "groups": 40}),
        ((2, 20, 70, 19), (40, 1, 5, 5), {"padding": 2, "groups": 20, "stride": 2}),
        ((1, 3, 150, 301), (3, 1, 9, 11), {"padding": "same", "groups": 3, "dilation": (2, 3)}),
        ((9, 1, 28, 28), (7, 1, 5, 5), {"padding_mode": "reflect", "padding": 4}),
    ],
)
def test_several_blocks(name, channels_last, x_shape, w_shape, options):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(x_shape, np.float32)
    w = rng.standard_normal(w_shape, np.float32)
    bias = rng.standard_normal(w_shape[0], np.float32)
    if channels_last:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    problem = describe(
        "test", 2, x_shape, w_shape, x.dtype, w.dtype, bias=True,
        channels_last=channels_last, **options,
    )  # fmt: skip
    testing.assert_close(problem, compute(name, problem, x, w, bias), x, w, bias)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("shape", "filters"), [((60, 90), (7, 5)), ((200, 333), (9, 9)), ((17, 18), (5, 6))]
)
def test_images_of_a_batch_and_threads_do_not_matter(name, shape, filters):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6, *shape), np.float32)
    w = rank_one(rng.standard_normal((6, 1, *filters), np.float32))
    if name != "separable":
        w[:, :, 0, 0] += 3
    x[2, 3, 4, 5] = np.nan  # an image that is computed the slow way does not change the others
    problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=6, padding=2)
    whole = compute(name, problem, x, w)
    for _ in range(3):
        np.testing.assert_array_equal(whole, compute(name, problem, x, w))
    alone = [compute(name, problem, x[n : n + 1], w) for n in range(5)]
    np.testing.assert_array_equal(whole, np.concatenate(alone))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_nan_and_inf_stay_in_their_windows(name, value, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2, 50, 130)).astype(dtype)
    w = rank_one(rng.standard_normal((2, 1, 5, 6)).astype(dtype))
    if name != "separable":
        w[0, 0, 0, 0] += 3
    clean = x.copy()
    for at in [(0, 0, 0, 0), (1, 0, 49, 129), (1, 1, 20, 47)]:
        x[at] = value
    problem = describe("test", 2, x.shape, w.shape, dtype, dtype, groups=2, padding=3)
    y, expected = compute(name, problem, x, w), compute("direct", problem, x, w)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(y[np.isinf(y)], expected[np.isinf(y)])
    inside = np.isfinite(expected)
    reference = compute("direct", problem, clean, w)
    np.testing.assert_allclose(
        y[inside].astype(float), reference[inside].astype(float), rtol=2e-2, atol=1e-2
    )


@pytest.mark.parametrize("name", ["depthwise", "filter2d", "fft"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(name, value):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 20, 40), np.float32)
    w = rng.standard_normal((1, 1, 5, 5), np.float32)
    w[0, 0, 2, 3] = value
    problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, padding=2)
    expected = compute("direct", problem, x, w)
    np.testing.assert_array_equal(compute(name, problem, x, w), expected)


INTEGERS = ["bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "uint64"]
PAIRS = [
    pair
    for pair in itertools.product(INTEGERS, repeat=2)
    if "uint64" not in pair or set(pair) <= {"uint64", "uint8", "uint16"}  # a type holds both
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("x_type", "w_type"), PAIRS)
def test_integers_are_exact(name, x_type, w_type):
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, (2, 2, 30, 40), x_type)
    w = testing.random_array(rng, (2, 1, 5, 5), w_type)
    if name == "separable":
        w = testing.random_array(rng, (2, 1, 5, 5), w_type, integers=True)
        w = w[..., :1, :] * w[..., :, :1]
    problem = describe("test", 2, x.shape, w.shape, x_type, w_type, groups=2, padding=2, bias=True)
    bias = testing.random_array(rng, (2,), str(problem.y_dtype))
    testing.assert_close(problem, compute(name, problem, x, w, bias), x, w, bias)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32", "bool"])
def test_integers_wrap_as_their_result_type_does(name, dtype):
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, (1, 1, 30, 40), "uint8")
    w = np.multiply.outer([1, -2, 7, 9, 5], [4, 6, 4, 30, -7])[None, None]
    problem = describe("test", 2, x.shape, w.shape, x.dtype, w.dtype, padding=2, dtype=dtype)
    testing.assert_close(problem, compute(name, problem, x, w), x, w)


PROBLEMS = [
    ((1, 1, 200, 300), (1, 1, 7, 7), {"padding": 3}),
    ((4, 32, 56, 56), (32, 1, 5, 5), {"groups": 32, "padding": 2}),
    ((1, 2, 300, 90), (2, 1, 15, 21), {"groups": 2, "padding": 10}),
    ((2, 3, 20000), (3, 1, 33), {"groups": 3}),
    ((1, 2, 20, 30, 40), (4, 1, 3, 5, 7), {"groups": 2, "dilation": 2}),
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("limit", [None, 4 << 20, 200_000, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize("at", range(len(PROBLEMS)))
def test_workspace_is_what_is_allocated(name, limit, dtype, at, monkeypatch):
    x_shape, w_shape, options = PROBLEMS[at]
    problem = describe(
        "test", len(x_shape) - 2, x_shape, w_shape, dtype, dtype, workspace_limit=limit, **options
    )
    module = MODULES[name]
    if not module.supports(problem, CPU):
        return
    stated = module.workspace(problem, CPU)
    assert stated <= WORKSPACE_CAP
    if limit is not None and stated > limit:
        assert limit < 1 << 20
        return
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, x_shape, dtype, integers=True)
    w = testing.random_array(rng, w_shape, dtype, integers=True)
    if name == "separable":
        w = rank_one(w)
    plan = choose("test", problem, "numpy", CPU, name)
    y = np.empty(problem.y_shape, problem.y_dtype.numpy)
    module.run(plan, x, w, None, y)  # caches and threads are there for good
    monkeypatch.setattr(scratch, "_kept", None)
    tracemalloc.start()
    try:
        module.run(plan, x, w, None, y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= stated + CPU.threads * (64 << 10), (peak, stated)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_not_depthwise_or_forward_is_refused(name):
    module = MODULES[name]
    problem = describe("test", 2, (1, 4, 20, 20), (4, 2, 7, 7), "int64", "int64", groups=2)
    assert not module.supports(problem, CPU)
    forward = describe("test", 2, (1, 4, 20, 20), (4, 1, 7, 7), "float32", "float32", groups=4)
    assert module.supports(forward, CPU)
    for operation in ("dgrad", "wgrad"):
        assert operation in module.supports(replace(forward, operation=operation), CPU).reason


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_runs_name_every_padded_position(mode):
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, lo, hi, stride, dilation, taps = rng.integers(1, 9, 6)
        x = rng.integers(1, 100, (1, 1, int(n)))
        try:
            problem = describe(
                "test", 1, x.shape, (1, 1, int(taps)), "int64", "int64",
                stride=int(stride), dilation=int(dilation), padding=((int(lo), int(hi)),),
                padding_mode=mode,
            )  # fmt: skip
        except ValueError:  # no output
            continue
        index = source_index(int(n), int(lo), int(hi), mode)
        padded = np.where(index < 0, 0, x[0, 0, index])
        found = np.full(problem.output, -1)
        w = rng.integers(1, 100, int(taps))
        for axes in planes.classes(problem):
            axis = axes[2]
            start = int(rng.integers(0, axis.outputs))
            count = axis.reads(axis.outputs - start)
            block = np.full((1, 1, 1, 1, count), -1)
            planes.read(block, planes.lift(x), axes, (0, 0, start * axis.stride))
            sums = np.convolve(block[0, 0, 0, 0], w[::-1], "valid")[:: axis.stride]
            found[axis.out(start, axis.outputs)] = sums
        for q in np.flatnonzero(found >= 0):
            first = q * int(stride)
            window = padded[first : first + dilation * (taps - 1) + 1 : dilation]
            assert found[q] == (window * w).sum()


def test_spoilt_names_the_images_with_a_nan():
    sums = np.ones((4, 3, 5))
    sums[2] = np.inf
    assert planes.spoilt(sums) == []
    sums[1, 2, 0] = sums[3, 0, 4] = np.nan
    assert planes.spoilt(sums) == [1, 3]
