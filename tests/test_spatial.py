"""How arrays of any axes become problems of the core: which axes move, and what is cached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuconv import dtypes, ndimage, signal, spatial
from gpuconv.execute import Operands
from gpuconv.numpy_backend.device import cpu
from gpuconv.problem import ConvProblem


def step(shape: tuple[int, ...], taps: dict[int, int], batch: tuple[int, ...] = ()) -> Any:
    """The step of a "valid" filter with `taps` per axis."""
    filter = tuple(taps.get(i, batch[i] if batch else 1) for i in range(len(shape)))
    windows = spatial.Windows(
        "test", dtypes.FLOAT32, ((0, 0),) * len(shape), (1,) * len(shape), flip=True
    )
    float32 = dtypes.FLOAT32
    return spatial._step(
        windows, shape, filter, float32, float32, tuple(sorted(taps)), "numpy", cpu()
    )


def problem_of(*args: Any, **kwargs: Any) -> tuple[Any, ConvProblem]:
    found = step(*args, **kwargs)
    return found.order, found.plan.problem


@pytest.mark.parametrize(
    ("shape", "taps", "x_shape", "w_shape"),
    [
        ((8, 9), {0: 3, 1: 2}, (1, 1, 8, 9), (1, 1, 3, 2)),
        ((8, 9), {0: 3}, (1, 1, 8, 9), (1, 1, 3, 1)),
        ((8, 9), {1: 3}, (1, 1, 8, 9), (1, 1, 1, 3)),
        ((9,), {0: 3}, (1, 1, 9), (1, 1, 3)),
        ((4, 8, 9), {0: 3}, (1, 1, 4, 72), (1, 1, 3, 1)),  # neighbours go together
        ((4, 8, 9), {1: 3}, (4, 1, 8, 9), (1, 1, 3, 1)),
        ((4, 8, 9), {2: 3}, (1, 1, 32, 9), (1, 1, 1, 3)),
        ((4, 8, 9), {0: 3, 2: 2}, (1, 1, 4, 8, 9), (1, 1, 3, 1, 2)),
        ((4, 8, 9), {1: 3, 2: 2}, (4, 1, 8, 9), (1, 1, 3, 2)),
        ((2, 4, 5, 8, 9), {2: 3}, (8, 1, 5, 72), (1, 1, 3, 1)),
        ((2, 4, 5, 8, 9), {0: 2, 4: 3}, (1, 1, 2, 160, 9), (1, 1, 2, 1, 3)),
    ],
)
def test_axes_that_are_not_filtered_stay_in_place(
    shape: Any, taps: Any, x_shape: Any, w_shape: Any
) -> None:
    order, problem = problem_of(shape, taps)
    assert order is None
    assert (problem.x_shape, problem.w_shape) == (x_shape, w_shape)


def test_axes_move_only_where_more_than_three_are_left() -> None:
    order, problem = problem_of((2, 4, 5, 8, 9), {0: 2, 2: 3})
    assert order == (1, 3, 4, 0, 2)
    assert problem.x_shape == (288, 1, 2, 5)


def test_a_filter_for_every_batch_is_one_of_groups() -> None:
    order, problem = problem_of((6, 8, 9), {1: 3, 2: 2}, batch=(6, 1, 1))
    assert order == (0, 1, 2)
    assert (problem.groups, problem.x_shape, problem.w_shape) == (6, (1, 6, 8, 9), (6, 1, 3, 2))


def test_one_dimensional_filters_read_the_image_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """No transposed or copied image on the way in, along any axis."""
    images = np.random.default_rng(0).random((3, 40, 50))
    seen: list[Any] = []
    compute = Operands.compute

    def watched(self: Operands, plan: Any, x: Any, *args: Any) -> Any:
        seen.append(x)
        return compute(self, plan, x, *args)

    monkeypatch.setattr(Operands, "compute", watched)
    for image in (images, images[0]):
        for axis in range(image.ndim):
            ndimage.correlate1d(image, [1, 2, 1], axis)
            x = seen.pop()
            assert np.shares_memory(x, image)
            assert x.flags.c_contiguous
    signal.convolve2d(images[0], images[1][:3, :3])
    assert np.shares_memory(seen.pop(), images)


def test_the_second_call_plans_nothing() -> None:
    image, weights = np.random.default_rng(0).random((13, 17)), np.ones((3, 3))

    def calls() -> None:
        signal.convolve2d(image, weights)
        ndimage.convolve(image, weights)
        ndimage.gaussian_filter(image, 1.0)

    calls()
    caches = (signal._way, ndimage._slide, ndimage._gaussian_weights, spatial._step)
    before = [cache.cache_info().misses for cache in caches]
    calls()
    assert [cache.cache_info().misses for cache in caches] == before


def test_fill_values_do_not_fill_the_cache() -> None:
    image, weights = np.ones((5, 6)), np.ones((3, 3))
    ndimage.correlate(image, weights, mode="constant", cval=np.nan)
    signal.convolve2d(image, weights, fillvalue=0.5)
    caches = (signal._way, ndimage._slide, spatial._step)
    before = [cache.cache_info().misses for cache in caches]
    for value in (1, 2.5, -3, np.nan):
        got = ndimage.correlate(image, weights, mode="constant", cval=value)
        np.testing.assert_allclose(got[0, 0], 4 + 5 * value)
        got = signal.convolve2d(image, weights, fillvalue=value)
        np.testing.assert_allclose(got[0, 0], 1 + 8 * value)
    assert [cache.cache_info().misses for cache in caches] == before


def test_array_like() -> None:
    assert spatial.array_like([1, 2]).dtype == np.int64
    array = np.ones(3)
    assert spatial.array_like(array) is array
    masked = np.ma.ones(3)
    assert spatial.array_like(masked) is masked
