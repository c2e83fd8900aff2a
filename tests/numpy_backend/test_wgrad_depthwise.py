"""wgrad_depthwise: taps that share a phase, joint runs of images, and what is not finite."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import wgrad_depthwise
from gpuconv.plan import choose
from gpuconv.problem import describe
from tests.numpy_backend.forced import CPU, compute


def gradient(x, w_shape, device=CPU, dtype=None, **options):
    """The problem, x's dy of random data, and dw."""
    ndim = len(w_shape) - 2
    dtype = dtype or x.dtype
    problem = describe(
        "test", ndim, x.shape, w_shape, dtype, dtype, operation="wgrad", **options
    )  # fmt: skip
    dy = testing.random_array(np.random.default_rng(1), problem.y_shape, str(dtype))
    return problem, dy, force(problem, x, dy, device=device)


force = partial(compute, "wgrad_depthwise")


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "complex64", "int64"])
def test_strides_and_dilations(stride, dilation, dtype):
    x = testing.random_array(np.random.default_rng(0), (3, 4, 23, 30), dtype)
    for filters in ((3, 3), (5, 2), (1, 7)):
        problem, dy, dw = gradient(
            x, (8, 1, *filters), stride=(stride, 1), dilation=(dilation, stride), groups=4,
            padding=3,
        )  # fmt: skip
        testing.assert_close(problem, dw, x, dy)


@pytest.mark.parametrize("shape", [(40, 3, 7, 7), (2, 200, 14, 14), (1, 2, 400, 300), (5, 6, 3000)])
def test_joint_runs_and_pieces_of_images(shape):
    x = testing.random_array(np.random.default_rng(0), shape, "float32")
    w_shape = (shape[1], 1, *(5,) * (len(shape) - 2))
    problem, dy, dw = gradient(x, w_shape, groups=shape[1], padding=2)
    testing.assert_close(problem, dw, x, dy)
    np.testing.assert_array_equal(dw, force(problem, x, dy))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_no_window_holds_spoils_nothing(value):
    x = testing.random_array(np.random.default_rng(0), (2, 3, 20, 31), "float32")
    x[0, 1, 5, 30] = value  # in the gap that stride 2 leaves, and under the last taps alone
    x[:, 2, 19] = value
    problem, dy, dw = gradient(x, (3, 1, 2, 3), groups=3, stride=(2, 3))
    direct = choose("test", problem, "numpy", CPU, "wgrad_gemm")
    expected = np.empty_like(dw)
    with np.errstate(all="ignore"):
        direct.implementation.run(direct, x, dy, None, expected)
    np.testing.assert_array_equal(np.isnan(dw), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(dw), np.isinf(expected))
    assert np.isfinite(dw[:2]).any()
    inside = np.isfinite(dw)
    np.testing.assert_allclose(dw[inside], expected[inside], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("limit", [None, 4 << 20, 300_000])
def test_workspace_limit(limit):
    x = testing.random_array(np.random.default_rng(0), (2, 40, 60, 60), "float32")
    problem, dy, dw = gradient(
        x, (40, 1, 3, 3), groups=40, padding=1, stride=2, workspace_limit=limit
    )
    assert wgrad_depthwise.workspace(problem, CPU) <= (limit or 64 << 20)
    testing.assert_close(problem, dw, x, dy)
