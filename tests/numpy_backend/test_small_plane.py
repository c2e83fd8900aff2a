"""small_plane: against the reference, its two ways to sum, and what it leaves to others."""

from __future__ import annotations

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from gpuconv.numpy_backend import small_plane
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import PADDING_MODES, describe

CPU = Cpu(threads=2)


def plan_of(x, w, **options):
    problem = describe("test", x.ndim - 2, x.shape, w.shape, x.dtype, w.dtype, **options)
    return choose("test", problem, "numpy", CPU, "small_plane")


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("extents", [(1,), (40,), (1, 7), (9, 12), (40, 50)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_it_is_the_reference(mode, extents, dtype):
    rng = np.random.default_rng(0)
    taps = (3, 4)[-len(extents) :]
    padding = ((2, 3), (4, 1))[-len(extents) :]
    for batch in (1, 3):
        x = rng.standard_normal((batch, 1, *extents)).astype(dtype)
        w = rng.standard_normal((1, 1, *taps)).astype(dtype)
        plan = plan_of(x, w, padding=padding, padding_mode=mode)
        testing.assert_close(plan.problem, plan(x, w), x, w)


@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_both_ways_to_sum_give_the_same(mode, monkeypatch):
    rng = np.random.default_rng(1)
    x = rng.integers(-9, 10, (1, 1, 20, 17)).astype(np.float64)
    w = rng.integers(-9, 10, (1, 1, 3, 2)).astype(np.float64)
    plan = plan_of(x, w, padding=1, padding_mode=mode)
    results = []
    for most in (0, small_plane._GATHERED):
        monkeypatch.setattr(small_plane, "_GATHERED", most)
        small_plane._layout.cache_clear()
        results.append(plan(x, w))
    small_plane._layout.cache_clear()
    np.testing.assert_array_equal(*results)
    testing.assert_close(plan.problem, results[0], x, w)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("extent", [8, 60])
def test_a_nan_stays_in_the_windows_that_hold_it(mode, extent):
    x = np.ones((1, 1, extent, extent), np.float32)
    x[0, 0, 3, extent - 1] = np.nan  # the next row begins beside it
    w = np.ones((1, 1, 3, 3), np.float32)
    y = plan_of(x, w, padding=1, padding_mode=mode)(x, w)
    bad = np.zeros((extent, extent), bool)
    bad[2:5, extent - 2 :] = True
    np.testing.assert_array_equal(np.isnan(y[0, 0]), bad)


@pytest.mark.parametrize("extent", [9, 100])
def test_the_index_is_part_of_the_workspace(extent):
    x, w = np.ones((1, 1, extent, extent), np.float32), np.ones((1, 1, 3, 3), np.float32)
    zeros, reflect = (plan_of(x, w, padding=1, padding_mode=m) for m in ("zeros", "reflect"))
    index = small_plane._layout(reflect.problem).index
    assert reflect.workspace_bytes - zeros.workspace_bytes >= index.nbytes


@pytest.mark.parametrize("extent", [9, 50])
def test_x_and_out_of_any_strides(extent):
    rng = np.random.default_rng(2)
    big = rng.standard_normal((1, 1, 2 * extent, 2 * extent)).astype(np.float32)
    w = rng.standard_normal((1, 1, 3, 3)).astype(np.float32)
    for x in (big[..., ::2, ::-2], big[..., :extent, extent:].swapaxes(2, 3)):
        plan = plan_of(x, w, padding=1, padding_mode="circular")
        expected = plan(np.ascontiguousarray(x), w)
        around = np.full((1, 1, 2 * extent + 2, extent + 4), 7, np.float32)
        out = around[..., 1:-1:2, 2:-2]
        assert plan(x, w, out=out) is out
        np.testing.assert_array_equal(out, expected)
        out[...] = 7
        assert (around == 7).all()  # nothing else was written


def test_an_image_has_the_bits_that_it_has_alone():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 1, 13, 15)).astype(np.float32)
    w = rng.standard_normal((1, 1, 3, 3)).astype(np.float32)
    plan = plan_of(x[:2], w, padding=1)
    for n, image in enumerate(plan(x, w)):
        np.testing.assert_array_equal(image, plan(x[n : n + 1], w)[0])


@pytest.mark.parametrize("extent", [5, 50])
def test_sums_are_cut_off_and_wrap_as_integers(extent):
    rng = np.random.default_rng(4)
    x = rng.integers(0, 256, (extent, extent)).astype(np.uint8)
    w = rng.integers(-40, 41, (3, 3)) / 8
    got = gpuconv.ndimage.correlate(x, w)
    wide = np.pad(x.astype(np.float64), 1, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3))
    sums = np.einsum("pqrs,rs->pq", windows, w)  # exact: eighths
    np.testing.assert_array_equal(got, np.trunc(sums).astype(np.int64).astype(np.uint8))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options", "reason"),
    [
        ((1, 2, 9, 9), (2, 1, 3, 3), {"groups": 2}, "one plane"),
        ((1, 1, 9, 9), (1, 1, 3, 3), {"stride": 2}, "no stride"),
        ((1, 1, 9, 9), (1, 1, 3, 3), {"dilation": (1, 2)}, "no stride"),
        ((1, 1, 9, 9, 9), (1, 1, 3, 3, 3), {}, "one plane"),
        ((5, 1, 9, 9), (1, 1, 3, 3), {}, "blocks of its own"),
        ((1, 1, 512, 512), (1, 1, 3, 3), {}, "blocks of its own"),
    ],
)
def test_what_it_leaves_to_others(x_shape, w_shape, options, reason):
    dtype = np.dtype(np.float32)
    problem = describe("test", len(x_shape) - 2, x_shape, w_shape, dtype, dtype, **options)
    with pytest.raises(ValueError, match=reason):
        choose("test", problem, "numpy", CPU, "small_plane")
