"""The yardstick itself: problems cover the contract, and the bound refuses wrong answers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.testing import assert_close, random_case


def test_random_problems_cover_every_option():
    seen = Counter()
    for seed in range(600):
        case = random_case(seed)
        problem = case.problem()
        seen.update([case.x_dtype, case.memory, f"{case.ndim}-D", problem.layout])
        seen[problem.padding_mode] += problem.padded
        seen["pads longer than the input"] += any(
            lo > n for lo, n in zip(problem.pad_lo, problem.input, strict=True)
        )
        seen["asymmetric"] += problem.pad_lo != problem.pad_hi
        seen["strided"] += any(s > 1 for s in problem.stride)
        seen["dilated"] += any(d > 1 for d in problem.dilation)
        seen["grouped"] += problem.groups > 1
        seen["depthwise"] += problem.groups > 1 and problem.depthwise
        seen["one channel"] += problem.in_channels == problem.out_channels == 1
        seen["bias"] += case.bias
        seen["unbatched"] += not problem.batched
        seen["mixed"] += case.x_dtype != case.w_dtype
        seen["filter larger than the image"] += any(
            f > n for f, n in zip(problem.filter, problem.input, strict=True)
        )
    wanted = {
        *testing.FLOATING, *testing.EXACT, *testing.MEMORY_ORDERS, "1-D", "2-D", "3-D",
        "NCW", "NWC", "NCHW", "NHWC", "NCDHW", "NDHWC",
        "zeros", "reflect", "symmetric", "replicate", "circular",
    }  # fmt: skip
    assert wanted <= set(seen)
    assert min(seen.values()) >= 5, seen


def test_cases_are_values_of_their_seed():
    a, b = random_case(7), random_case(7)
    assert a == b
    for left, right in zip(a.arrays(), b.arrays(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_memory_orders_change_strides_not_values():
    array = np.arange(24.0).reshape(2, 3, 4)
    strides = set()
    for memory in testing.MEMORY_ORDERS:
        other = testing.in_memory_order(array, memory, 1)
        np.testing.assert_array_equal(other, array)
        strides.add((other.strides, other.ctypes.data % 16))
    assert len(strides) >= 4


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("mistake", ["missing tap", "shifted", "one ulp too many", "nan", "shape"])
def test_wrong_answers_are_refused(dtype, mistake):
    rng = np.random.default_rng(0)
    x = testing.random_array(rng, (1, 2, 9, 9), dtype)
    w = testing.random_array(rng, (3, 2, 3, 3), dtype)
    problem = gpuconv.plan_conv2d(x.shape, w.shape, dtype=dtype, backend="numpy").problem
    y = gpuconv.conv2d(x, w)
    assert_close(problem, y, x, w)
    if mistake == "missing tap":
        w2 = w.copy()
        w2[1, 1, 2, 2] = 0
        y = gpuconv.conv2d(x, w2)
    elif mistake == "shifted":
        y = np.roll(y, 1, axis=-1)
    elif mistake == "one ulp too many":
        scale = 60 * np.finfo(y.dtype).eps * np.abs(y).max()
        y[0, 0, 0, 0] += np.asarray(scale, y.dtype)
    elif mistake == "nan":
        y[0, 0, 0, 0] = np.nan
    else:
        y = y[..., :-1]
    with pytest.raises(AssertionError):
        assert_close(problem, y, x, w)


def test_integers_compare_exactly():
    x, w = np.arange(20).reshape(1, 1, 20), np.ones((1, 1, 3), np.int64)
    problem = gpuconv.plan_conv1d(x.shape, w.shape, dtype="int64", backend="numpy").problem
    y = gpuconv.conv1d(x, w)
    assert_close(problem, y, x, w)
    y[0, 0, 3] += 1
    with pytest.raises(AssertionError):
        assert_close(problem, y, x, w)


def test_what_overflows_must_overflow():
    x, w = np.full((1, 1, 4), 60000, np.float16), np.ones((1, 1, 3), np.float16)
    problem = gpuconv.plan_conv1d(x.shape, w.shape, dtype="float16", backend="numpy").problem
    y = gpuconv.conv1d(x, w)
    assert np.isinf(y).all()
    assert_close(problem, y, x, w)
    with pytest.raises(AssertionError):
        assert_close(problem, np.full_like(y, 65504), x, w)
