"""depthwise: memory orders, and what it leaves of NaN."""

from __future__ import annotations

import numpy as np
import pytest

from gpuconv import testing
from gpuconv.numpy_backend import depthwise
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import describe

CPU = Cpu(threads=2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("memory", testing.MEMORY_ORDERS)
@pytest.mark.parametrize("channels", [1, 3, 70])
def test_the_expected_memory_order_is_only_a_hint(channels_last, memory, channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, channels, 31, 40), np.float32)
    x = testing.in_memory_order(x, memory, channel_axis=1)
    w = rng.standard_normal((2 * channels, 1, 3, 5), np.float32)
    problem = describe(
        "test", 2, x.shape, w.shape, x.dtype, w.dtype, groups=channels, padding=(1, 2),
        channels_last=channels_last, stride=(1, 2),
    )  # fmt: skip
    plan = choose("test", problem, "numpy", CPU, "depthwise")
    y = np.empty(problem.y_shape, np.float32)
    depthwise.run(plan, x, w, None, y)
    testing.assert_close(problem, y, x, w)


def test_64_bit_integers_wrap():
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**63), 2**63 - 1, (1, 2, 9, 9))
    w = rng.integers(-(2**63), 2**63 - 1, (2, 1, 3, 3))
    problem = describe("test", 2, x.shape, w.shape, "int64", "int64", groups=2)
    plan = choose("test", problem, "numpy", CPU, "depthwise")
    y = np.empty(problem.y_shape, np.int64)
    depthwise.run(plan, x, w, None, y)
    testing.assert_close(problem, y, x, w)
