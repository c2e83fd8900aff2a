"""Boundary indices against numpy.pad."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv.numpy_backend.boundary import source_index

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
