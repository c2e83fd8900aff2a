"""One algorithm by its name: on a problem and arrays, or on a random case."""

from __future__ import annotations

from typing import Any

import numpy as np

import gpuconv
from gpuconv import testing
from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import choose
from gpuconv.problem import ConvProblem

CPU = Cpu(threads=2)


def compute(
    name: str,
    problem: ConvProblem,
    first: HostArray,
    second: HostArray,
    bias: HostArray | None = None,
    *,
    device: Cpu = CPU,
    memory: str = "contiguous",
) -> HostArray:
    """The result of channels-first operands, in `memory` order, whose every element was 77 before.

    `first` may have another batch than the problem.
    """
    plan = choose("test", problem, "numpy", device, name)
    shape = problem.result_shape
    if problem.operation != "wgrad":
        shape = (len(first), *shape[1:])
    result = np.full(shape, 77).astype(problem.result_dtype.numpy)
    result = testing.in_memory_order(result, memory, channel_axis=1)
    with np.errstate(all="ignore"):
        plan.implementation.run(plan, first, second, bias, result)
    return result


def serves(case: testing.Case, name: str, **options: Any) -> bool:
    """Compare one case with the reference; False where the algorithm does not serve it."""
    x, w, bias = case.arrays()
    function = getattr(gpuconv, case.function)
    try:
        y = function(x, w, bias, algorithm=name, **options, **case.kwargs)
    except ValueError as error:
        if "cannot serve" in str(error):
            return False
        raise
    testing.assert_close(case.problem(), y, x, w, bias)
    return True
