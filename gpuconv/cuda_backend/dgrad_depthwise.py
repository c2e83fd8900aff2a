"""The gradient of x under a depthwise convolution of stride 2, in one pass over dy and dx.

    dx[n, c, i, j] = sum over k, r, s, p, q with 2*p + r - pad = i, 2*q + s - pad = j  of
        dy[n, k, p, q] w[k, 0, r, s]

kernels_cuda/dgrad_depthwise.cu. As four dense convolutions (gpuconv/transposed.py) the same would
read dy four times, and write every sector of dx as often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from gpuconv.cuda_backend import launch, rates
from gpuconv.cuda_backend.depthwise_tiling import in_units, struct, struct_of
from gpuconv.cuda_backend.launch import Launch, Layout, Macros
from gpuconv.dtypes import BFLOAT16, FLOAT16, FLOAT32, DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("dgrad",)

# The shares of their peaks that the kernel is expected to reach.
_BANDWIDTH = 0.7
_RATE = 0.4
_OVERHEAD = 4  # instructions per element of dx beyond its products

_TYPES = (FLOAT16, BFLOAT16, FLOAT32)
_FILTERS = (3, 5)
_ROWS, _COLUMNS = 8, 4  # of a thread: dgrad_depthwise.cu
_BLOCK = 128
_BLOCKS = {3: 3, 5: 2}  # of a multiprocessor at least: as many as its registers allow

TILE = struct(("strips", "groups", "channels"), ("channels_last", "vectors"))


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "dgrad":
        return No(f"computes dgrad only, not {problem.operation}")
    if not problem.depthwise:
        return No(f"an output channel sees {problem.group_in_channels} input channels, not one")
    x = problem.x_dtype
    if x not in _TYPES or launch.type_macros(problem) != launch.uniform_macros(x):
        return No(f"takes {', '.join(t.name for t in _TYPES)}, one type for all arrays")
    square = problem.filter[:1] * 2
    if problem.filter != square or square[0] not in _FILTERS:
        return No("takes filters of 3x3 and 5x5")
    if problem.stride != (2, 2) or problem.dilation != (1, 1):
        return No("takes stride 2 and dilation 1")
    if problem.padded and problem.padding_mode != "zeros":
        return No(f"pads with zeros only, not as {problem.padding_mode!r} does")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """The larger of memory, at 0.7 of the bandwidth, and arithmetic, at 0.4 of the peak rate."""
    elements = math.prod(problem.x_shape)
    taps = math.prod(problem.filter) / 4 * problem.group_out_channels
    peak = rates.multiply_adds(device, problem.accumulator)
    arithmetic = elements * (taps + _OVERHEAD) / (peak * _RATE)
    memory = problem.bytes_moved / (device.bandwidth * _BANDWIDTH)
    return rates.LAUNCH_SECONDS + float(max(arithmetic, memory))


def workspace(problem: ConvProblem, device: Any) -> int:
    return 0


def run(plan: Plan, grad: Any, w: Any, bias: Any, out: Any) -> None:
    bind(plan, grad, w, bias, out)(grad, w, bias, out)


def bind(plan: Plan, grad: Any, w: Any, bias: Any, out: Any) -> Callable[..., None]:
    device = plan.device
    gradient = prepare(plan.problem, device, Layout(out, w, bias, grad))
    return lambda dy, w, bias, dx: gradient(device, dx, w, bias, dy)


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays."""
    height, width = problem.input
    strips = -(-width // _COLUMNS)
    groups = -(-(height + problem.pad_lo[0] % 2) // _ROWS)
    items = layout.batch * problem.in_channels * groups * strips
    shape = (layout.batch, *problem.x_shape[1:])
    index = launch.index_type(problem, layout, items)
    tile = struct_of(
        TILE,
        strips=strips,
        groups=groups,
        channels=problem.in_channels,
        channels_last=int(launch.channels_last(layout.x)),
        vectors=int(in_units(shape, layout.x, layout, _COLUMNS, problem.x_dtype.itemsize)),
    )
    return Launch(
        kernel=device.load("dgrad_depthwise", _macros(problem.x_dtype, problem.filter[0], index)),
        grid=(-(-items // _BLOCK), 1, 1),
        block=(_BLOCK, 1, 1),
        constants=(launch.pack(problem, layout), tile),
    )


def _macros(dtype: DType, filter: int, index: str) -> Macros:
    types = launch.uniform_macros(dtype)
    return {
        **types, "INDEX_T": index, "FILTER": filter, "BLOCK": _BLOCK, "BLOCKS": _BLOCKS[filter],
    }  # fmt: skip


def variants() -> Iterator[tuple[str, Macros]]:
    """Per type and filter: 32-bit and 64-bit offsets."""
    for dtype in _TYPES:
        for filter in _FILTERS:
            for index in ("int32", "int64"):
                yield "dgrad_depthwise", _macros(dtype, filter, index)
