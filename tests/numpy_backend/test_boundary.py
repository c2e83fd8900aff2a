"""Boundary indices against numpy.pad."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv.numpy_backend.boundary import source_index, sources

NAMES = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}


@pytest.mark.parametrize("mode", ["zeros", "reflect", "symmetric", "replicate", "circular"])
@given(n=st.integers(1, 9), lo=st.integers(0, 40), hi=st.integers(0, 40))
def test_source_index_is_numpy_pad(mode, n, lo, hi):
    index = source_index(n, lo, hi, mode)
    values = np.append(np.arange(1, n + 1), 0)  # -1 reads the zero at the end
    expected = np.pad(np.arange(1, n + 1), (lo, hi), NAMES.get(mode, mode))
    np.testing.assert_array_equal(values[index], expected)


def test_cached_indices_cannot_be_spoilt():
    with pytest.raises(ValueError, match="read-only"):
        source_index(4, 1, 1, "reflect")[0] = 3


@pytest.mark.parametrize("mode", ["zeros", "reflect", "symmetric", "replicate", "circular"])
@given(n=st.integers(1, 9), start=st.integers(-40, 40), count=st.integers(1, 9))
def test_sources_are_some_of_the_padded_positions(mode, n, start, count):
    for step in (1, 3):
        expected = source_index(n, 40, 70, mode)[40 + start :: step][:count]
        np.testing.assert_array_equal(sources(start, count, step, n, mode), expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "symmetric", "replicate", "circular"])
@pytest.mark.parametrize("algorithm", ["direct", "im2col"])
def test_nothing_grows_with_the_padded_axis(mode, algorithm):
    """Pads of a million million: the memory of an index over them, on no machine."""
    far = 10**12
    x, w = np.array([[[1.0, 2, 3, 4, 5]]]), np.array([[[1.0, 10, 100]]])
    options = {"padding_mode": mode, "algorithm": algorithm}
    y = gpuconv.conv1d(x, w, padding="same", dilation=far, **options)
    period = {"reflect": 8, "symmetric": 10, "circular": 5}.get(mode, 1)
    near = far % period + 10 * period
    np.testing.assert_array_equal(y, gpuconv.conv1d(x, w, padding="same", dilation=near, **options))
    y = gpuconv.conv1d(x, w, padding=far, stride=far, **options)
    assert y.shape == (1, 1, 3)
    assert y[0, 0, 1] == 321


@pytest.mark.parametrize("algorithm", ["direct", "im2col"])
def test_nothing_grows_with_the_input(algorithm):
    x, w = np.ones((1, 1, 10**6), np.float32), np.ones((1, 1, 5), np.float32)
    options = {"stride": 1000, "padding": 2, "padding_mode": "reflect"}
    plan = gpuconv.plan_conv1d(x.shape, w.shape, algorithm=algorithm, backend="numpy", **options)
    small = gpuconv.plan_conv1d((1, 1, 9), w.shape, algorithm=algorithm, backend="numpy", **options)
    small(x[..., :9], w)
    tracemalloc.start()
    try:
        plan(x, w)
        assert tracemalloc.get_traced_memory()[1] < plan.workspace_bytes + (256 << 10)
    finally:
        tracemalloc.stop()


def test_wide_dilations_and_long_pads_are_not_taken_apart():
    """Their classes and runs would take longer to list than the result to compute."""

    def rejected(**options):
        plan = gpuconv.plan_conv2d((1, 1, 256, 256), (1, 1, 5, 5), backend="numpy", **options)
        found = {c.algorithm: c.rejected for c in plan.candidates}
        return found["depthwise"]

    assert "into 65536 convolutions" in rejected(dilation=256, padding="same")
    far = {"padding": 10**9, "stride": 10**9}
    for mode in ("reflect", "symmetric", "circular"):
        assert "repeat the input over more than" in rejected(padding_mode=mode, **far)
    for mode in ("zeros", "replicate"):
        assert rejected(padding_mode=mode, **far) is None
