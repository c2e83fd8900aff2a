"""The sum as it is written, for any problem: the algorithm that needs no workspace.

The output is computed in chunks whose temporaries stay under 64 KiB: one image, one output channel,
a few positions along the last axis at a time, adding one product per filter tap and input channel.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.boundary import source_index
from gpuconv.numpy_backend.device import Cpu
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_CHUNK = 1024  # positions at a time: three temporaries of at most 16 bytes an element


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    return problem.operation == "fprop" or No("computes fprop only")


def cost(problem: ConvProblem, device: Cpu) -> float:
    """Five NumPy calls per chunk, tap and channel, and each product a few nanoseconds."""
    rows = math.prod(problem.y_shape[:-1]) * math.ceil(problem.output[-1] / _CHUNK)
    calls = rows * problem.reduction * 5
    return calls * device.call_seconds + problem.flops * 1e-9


def workspace(problem: ConvProblem, device: Cpu) -> int:
    return 0


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem = plan.problem
    wide = problem.accumulator.numpy
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    index = [
        source_index(n, lo, hi, problem.padding_mode)
        for n, lo, hi in zip(problem.input, problem.pad_lo, problem.pad_hi, strict=True)
    ]
    channels = range(problem.group_in_channels)
    taps = list(itertools.product(*map(range, problem.filter)))
    q_stride, q_dilation = problem.stride[-1], problem.dilation[-1]
    for n, k, *outer in np.ndindex(x.shape[0], *problem.y_shape[1:-1]):
        first = k // problem.group_out_channels * problem.group_in_channels
        for q0 in range(0, problem.output[-1], _CHUNK):
            count = min(_CHUNK, problem.output[-1] - q0)
            total = np.zeros(count, wide)
            if bias is not None:
                total += bias[k].astype(wide)
            for tap in taps:
                rows = [
                    index[axis][p * problem.stride[axis] + r * problem.dilation[axis]]
                    for axis, (p, r) in enumerate(zip(outer, tap[:-1], strict=True))
                ]
                start = q0 * q_stride + tap[-1] * q_dilation
                columns = index[-1][start : start + (count - 1) * q_stride + 1 : q_stride]
                inside = (columns >= 0) & (-1 not in rows)
                for c in channels:
                    row = x[(n, first + c, *rows)]
                    values = row[columns].astype(wide) if inside.any() else np.zeros(count, wide)
                    values[~inside] = 0  # a pad's zero, whatever the element -1 read
                    total += values * w[(k, c, *tap)].astype(wide)
            out[(n, k, *outer, slice(q0, q0 + count))] = total
