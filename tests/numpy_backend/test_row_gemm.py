"""row_gemm: any 2-D problem, within its workspace, image by image alike."""

from __future__ import annotations

import numpy as np
import pytest

import gpuconv
from gpuconv import testing
from tests.numpy_backend.forced import serves


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("seed", range(0, 600, 60))
def test_random(seed: int, limit: int | None) -> None:
    cases = map(testing.random_case, range(seed, seed + 60))
    assert sum(serves(case, "row_gemm", workspace_limit=limit) for case in cases) > 3


@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "symmetric", "replicate", "circular"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("groups", [8, 64])
def test_groups_images_and_modes(groups: int, stride: int, mode: str, memory: str) -> None:
    rng = np.random.default_rng(0)
    for extent in (7, 30):
        x = rng.standard_normal((5, 64, extent, extent + 1)).astype(np.float32)
        x = testing.in_memory_order(x, memory, channel_axis=1)
        w = rng.standard_normal((64, 64 // groups, 3, 3)).astype(np.float32)
        plan = gpuconv.plan_conv2d(
            x.shape, w.shape, padding=1, padding_mode=mode, stride=stride, groups=groups,
            algorithm="row_gemm",
        )  # fmt: skip
        y = plan(x, w)
        testing.assert_close(plan.problem, y, x, w)
        for n in range(len(x)):
            np.testing.assert_array_equal(y[n : n + 1], plan(x[n : n + 1], w))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_special_value_of_a_depthwise_problem_stays_within_its_windows(value: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 20, 20)).astype(np.float32)
    w = rng.standard_normal((16, 1, 3, 3)).astype(np.float32)
    x[0, 3, 6, 9] = x[1, 15, 19, 19] = value
    for stride in (1, 2):
        options = {"padding": 1, "stride": stride, "groups": 16}
        y = np.isfinite(gpuconv.conv2d(x, w, algorithm="row_gemm", **options))
        expected = np.isfinite(gpuconv.conv2d(x, w, algorithm="direct", **options))
        assert not y.all()
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_special_value_stays_within_its_windows(value: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 20, 20)).astype(np.float32)
    w = rng.standard_normal((16, 8, 3, 3)).astype(np.float32)
    x[1, 3, 6, 9] = value
    y = gpuconv.conv2d(x, w, padding=1, groups=2, algorithm="row_gemm")
    seen = np.zeros(y.shape, bool)
    seen[1, :8, 5:8, 8:11] = True
    np.testing.assert_array_equal(~np.isfinite(y), seen)


def test_auto_takes_it_for_groups_and_for_depthwise_problems_of_one_thread() -> None:
    for x, w, groups, stride, taken in (
        ((1, 256, 56, 56), (256, 1, 3, 3), 256, 2, True),
        ((32, 256, 56, 56), (256, 1, 3, 3), 256, 2, False),
        ((1, 64, 28, 28), (64, 2, 3, 3), 32, 1, False),
        ((1, 64, 28, 28), (128, 1, 3, 3), 64, 1, False),
    ):
        plan = gpuconv.plan_conv2d(x, w, padding=1, groups=groups, stride=stride)
        assert (plan.algorithm == "row_gemm") == taken
    grouped = gpuconv.plan_conv2d((32, 512, 14, 14), (512, 16, 3, 3), padding=1, groups=32)
    assert grouped.algorithm == "row_gemm"
    assert gpuconv.plan_conv2d((1, 3, 64, 64), (64, 3, 3, 3)).algorithm != "row_gemm"
