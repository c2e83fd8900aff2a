"""magnitudes: a lower bound on every window's sum of magnitudes, and one that is worth having."""

from __future__ import annotations

import numpy as np
import pytest

from gpuconv.numpy_backend import magnitudes


def least(x, w, inside, last):
    filters = magnitudes.Filters(np.abs(w).astype(float))
    block = np.abs(x)
    marks = np.empty((len(x), *magnitudes.marks_shape(x.shape[1:], w.shape[2:])), bool)
    return magnitudes.least_sums(block, filters, inside, last, marks)


def sums(x, w, last):
    """S of every window, (groups, outs, windows)."""
    windows = np.lib.stride_tricks.sliding_window_view(np.abs(x), w.shape[2:], axis=(1, 2, 3))
    windows = windows[:, : last[0] + 1, : last[1] + 1, : last[2] + 1]
    total = np.einsum("gzpqtrs,gktrs->gkzpq", windows, np.abs(w))
    return total.reshape(*w.shape[:2], -1)


@pytest.mark.parametrize("seed", range(200))
def test_no_window_has_less(seed):
    rng = np.random.default_rng(seed)
    taps = tuple(rng.choice([1, 2, 5, 9, 17, 20], 3) if seed % 2 else (1, 1, rng.integers(1, 90)))
    extents = tuple(n + int(rng.integers(0, 20)) for n in taps)
    groups, outs = rng.integers(1, 3, 2)
    x = rng.standard_normal((groups, *extents)) * (rng.random((groups, *extents)) < rng.random())
    w = rng.standard_normal((groups, outs, *taps)) * (rng.random(taps) < rng.random())
    last = tuple(int(rng.integers(0, n - r + 1)) for n, r in zip(extents, taps, strict=True))
    inside = tuple(
        (a := int(rng.integers(0, n)), int(rng.integers(a, n + 1))) for n in extents
    )  # fmt: skip
    outside = np.ones(extents, bool)
    outside[tuple(slice(*span) for span in inside)] = False
    x[:, outside] = 0
    found = least(x.astype(np.float32), w, inside, last)
    assert (found <= sums(x, w, last).min(axis=2) * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("filter", ["normal", "one tap", "line"])
def test_pictures_have_no_dark_windows(filter):
    rng = np.random.default_rng(0)
    x = 0.2 + rng.random((1, 1, 100, 120))
    w = rng.standard_normal((1, 1, 1, 31, 31))
    if filter == "one tap":
        w[...] = 0
        w[..., 15, 15] = 1
    elif filter == "line":
        w[..., :15, :] = w[..., 16:, :] = 0
    spans = (0, 1), (0, 100), (0, 120)
    found = least(x, w, spans, (0, 69, 89))
    assert (found > 0.03 * sums(x, w, (0, 69, 89)).min()).all()
    x[0, 0, 15:-15, 15:-15] = 0
    assert (least(x, w, spans, (0, 69, 89)) < 1e-12).all()


def test_nan_is_no_bound():
    x = np.ones((1, 1, 40, 40), np.float32)
    x[0, 0, 4, 5] = np.nan  # in a row that the level is taken from
    assert np.isnan(least(x, np.ones((1, 1, 1, 9, 9)), ((0, 1), (0, 40), (0, 40)), (0, 31, 31)))
