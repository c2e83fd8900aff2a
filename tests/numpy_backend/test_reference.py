"""The oracle against what can be said without it: loops, and SciPy's own correlation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpuconv.numpy_backend import reference
from gpuconv.problem import ConvProblem, describe


def test_against_the_sum_written_as_loops():
    rng = np.random.default_rng(0)
    x, w, bias = rng.random((2, 4, 6, 5)), rng.random((6, 2, 3, 2)), rng.random(6)
    p = describe(
        "t", 2, x.shape, w.shape, "float64", "float64",
        stride=(2, 1), dilation=(1, 2), padding=((1, 0), (2, 1)), groups=2, bias="float64",
    )  # fmt: skip
    y = np.zeros(p.y_shape)
    for n, k, i, j in itertools.product(*map(range, p.y_shape)):
        y[n, k, i, j] = bias[k]
        for c, r, s in itertools.product(range(2), range(3), range(2)):
            h, v = 2 * i + r - 1, j + 2 * s - 2
            if 0 <= h < 6 and 0 <= v < 5:
                y[n, k, i, j] += x[n, k // 3 * 2 + c, h, v] * w[k, c, r, s]
    np.testing.assert_allclose(reference.forward(p, x, w, bias), y)


def test_flip_makes_it_a_convolution():
    signal = pytest.importorskip("scipy.signal")
    rng = np.random.default_rng(0)
    x, w = rng.random((7, 8)), rng.random((3, 4))
    p = ConvProblem(input=(7, 8), filter=(3, 4), pad_lo=(2, 3), pad_hi=(2, 3), flip=True)
    np.testing.assert_allclose(
        reference.forward(p, x[None, None], w[None, None])[0, 0], signal.convolve2d(x, w)
    )


def test_integers_wrap_at_64_bits():
    p = describe("t", 1, (1, 1, 2), (1, 1, 2), "int64", "int64")
    x = np.full((1, 1, 2), 2**62)
    assert reference.forward(p, x, np.array([[[2, 2]]])).item() == 0
