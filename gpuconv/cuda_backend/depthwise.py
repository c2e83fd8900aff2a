"""Depthwise convolution in one pass over memory: every output channel sees one input channel.

kernels_cuda/depthwise.cu for planes (N, C, H, W), depthwise_channels_last.cu for memory in which
neighbours are channels. Both bring a tile of x to shared memory, halo and boundary included, and
make all outputs of it from there; depthwise_tiling.py cuts the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from gpuconv.cuda_backend import launch, rates
from gpuconv.cuda_backend.depthwise_tiling import (
    FILTERS,
    TYPES,
    ChannelsLast,
    Planes,
    Variant,
    tile_channels_last,
    tile_planes,
)
from gpuconv.cuda_backend.launch import Launch, Layout, Macros
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

# The shares of their peaks that the kernels are expected to reach: predictions. Of the instructions
# in the loop of "long", 0.75 to 0.85 are multiply-adds; tiles' edges and their loads take of that.
_BANDWIDTH = 0.8
_RATE = {"unrolled": 0.6, "long": 0.6, "any": 0.12}
_OVERHEAD = 12  # instructions per output element beyond its products


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    if not problem.depthwise:
        return No(f"an output channel sees {problem.group_in_channels} input channels, not one")
    if problem.ndim > 2:
        return No("takes one or two axes, not three")
    x = problem.x_dtype
    if x not in TYPES or launch.type_macros(problem) != launch.uniform_macros(x):
        return No(f"takes {', '.join(t.name for t in TYPES)}, one type for all arrays")
    if any(
        Planes.of(problem, index).smallest_tile(problem) > device.max_shared_bytes
        for index in ("int32", "int64")
    ):
        return No("the part of x that one row of outputs sees is too large for shared memory")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """The larger of memory, at 0.8 of the bandwidth, and arithmetic, at a share of the peak rate.

    Arithmetic is a multiply-add per tap and a dozen instructions per output element. A problem too
    small to fill the device has that share of its rate.
    """
    variant: Variant = (ChannelsLast if problem.channels_last else Planes).of(problem, "int32")
    outputs = math.prod(problem.y_shape)
    instructions = outputs * (math.prod(problem.filter) + _OVERHEAD)
    used = min(1.0, outputs / (variant.strip * 256 * device.sm_count))
    memory: float = problem.bytes_moved / (device.bandwidth * _BANDWIDTH)
    if problem.channels_last and problem.group_out_channels > 1:
        memory *= 2  # its neighbours in y are not made by neighbouring threads
    peak = rates.multiply_adds(device, problem.accumulator)
    arithmetic = instructions / (peak * _RATE[variant.name] * max(used, 1e-3))
    return float(rates.LAUNCH_SECONDS + max(memory, arithmetic))


def workspace(problem: ConvProblem, device: Any) -> int:
    return 0


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    bind(plan, x, w, bias, out)(x, w, bias, out)


def bind(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> Callable[..., None]:
    return partial(prepare(plan.problem, plan.device, Layout(x, w, bias, out)), plan.device)


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays."""
    index = launch.index_type(problem, layout)
    last = ChannelsLast.of(problem, index)
    variant: Variant = last
    if (
        _runs_channels_last(problem, layout)
        and last.smallest_tile(problem) <= device.max_shared_bytes
    ):
        blocks = tile_channels_last(problem, last, layout, device)
    else:
        variant = planes = Planes.of(problem, index)
        blocks = tile_planes(problem, planes, layout, device)
    return Launch(
        kernel=device.load(variant.stem, variant.macros),
        grid=(blocks.count, 1, 1),
        block=(blocks.threads, 1, 1),
        constants=(launch.pack(problem, layout), blocks.tile),
        shared_bytes=blocks.shared_bytes,
    )


def _runs_channels_last(problem: ConvProblem, layout: Layout) -> bool:
    """Whether neighbours in the memory of x and of y are channels."""
    return (
        problem.in_channels > 1
        and launch.channels_last(layout.x)
        and launch.channels_last(layout.y)
    )


def variants() -> Iterator[tuple[str, Macros]]:
    """Per layout and type: three filters by two strides, "long", "any" with both index types."""
    for layout in (Planes, ChannelsLast):
        for dtype in TYPES:
            for filter in FILTERS:
                for stride in (1, 2):
                    yield _listed(layout("unrolled", dtype, filter, stride, "int32"))
            yield _listed(layout("long", dtype, 0, 1, "int32"))
            for index in ("int32", "int64"):
                yield _listed(layout("any", dtype, 0, 0, index))


def _listed(variant: Variant) -> tuple[str, Macros]:
    return variant.stem, variant.macros
