"""The sum as it is written, for any problem: the algorithm of last resort, without workspace.

kernels_cuda/direct.cu. Every pair of dtypes, boundary mode, stride and size: also past 2^31
elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from gpuconv import dtypes
from gpuconv.cuda_backend import launch
from gpuconv.cuda_backend.launch import Launch, Layout, Macros
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_BLOCK = 256
_K_TILE = 4
_BLOCKS_PER_SM = 32
_THREADS_PER_SM = 512  # from so many threads on, some may be given up for reuse

# Of the float32 rate: what one sum in this type costs on a data-centre GPU.
_RATE = {"float32": 1.0, "float64": 0.5, "complex64": 1.0, "complex128": 0.5}
_EXACT_RATE = 0.12  # 64-bit integer products are made of several 32-bit ones
_EFFICIENCY = 0.08  # the share of its rate that a loop of two loads per product reaches
_ANY_EFFICIENCY = 0.02  # with the dtype switched on at every load


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """The larger of arithmetic and memory, each at the share of its peak that this reaches."""
    rate = _RATE.get(problem.accumulator.name, _EXACT_RATE)
    efficiency = _EFFICIENCY if _is_uniform(problem) else _ANY_EFFICIENCY
    if _k_tile(problem, device) == 1:
        efficiency /= 2
    peak: float = 256 * device.sm_count * device.clock_hz  # 128 fused float32 multiply-adds a cycle
    arithmetic = problem.flops / (peak * rate * efficiency)
    memory: float = problem.bytes_moved / (device.bandwidth * 0.6)
    return launch.LAUNCH_SECONDS + max(arithmetic, memory)


def workspace(problem: ConvProblem, device: Any) -> int:
    return 0


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    prepare(plan.problem, plan.device, Layout(x, w, bias, out))(plan.device, x, w, bias, out)


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays."""
    positions = layout.batch * math.prod(problem.output)
    index = launch.index_type(problem, layout, positions * problem.out_channels)
    macros = macros_for(problem, device, index)
    group_tiles = -(-problem.group_out_channels // int(macros["K_TILE"]))
    k_tiles = group_tiles * problem.groups
    blocks = -(-positions * k_tiles // _BLOCK)
    blocks = max(min(blocks, _BLOCKS_PER_SM * device.sm_count), 1)
    return Launch(
        kernel=device.load("direct", macros),
        grid=(blocks, 1, 1),
        block=(_BLOCK, 1, 1),
        constants=(
            launch.pack(problem, layout),
            launch.divisor(k_tiles),
            launch.divisor(group_tiles),
        ),
    )


def _k_tile(problem: ConvProblem, device: Any) -> int:
    """Output channels per thread: several where x is read again for each and threads abound.

    It changes no bits: every sum has the same order whatever its neighbours.
    """
    if problem.group_out_channels < _K_TILE or not _is_uniform(problem):
        return 1
    threads = math.prod(problem.y_shape) // _K_TILE
    return _K_TILE if threads >= _THREADS_PER_SM * device.sm_count else 1


def _is_uniform(problem: ConvProblem) -> bool:
    """Whether all dtypes are those that follow from x's: the variants compiled for one type."""
    return launch.type_macros(problem) == launch.uniform_macros(problem.x_dtype)


def macros_for(problem: ConvProblem, device: Any, index: str) -> Macros:
    """The variant that computes `problem`; ``variants`` lists them all."""
    if not _is_uniform(problem):
        types = launch.any_macros(problem.accumulator)
    else:
        types = launch.uniform_macros(problem.x_dtype)
    k_tile = _k_tile(problem, device) if index == "int32" else 1
    return {**types, "INDEX_T": index, "K_TILE": k_tile, "BLOCK": _BLOCK}


def variants() -> Iterator[tuple[str, Macros]]:
    """15 uniform types by (int32 with 1 and K_TILE channels, int64), 6 sums of any types by two."""
    for dtype in dtypes.ALL:
        for index, k_tile in (("int32", 1), ("int32", _K_TILE), ("int64", 1)):
            yield (
                "direct",
                {
                    **launch.uniform_macros(dtype),
                    "INDEX_T": index,
                    "K_TILE": k_tile,
                    "BLOCK": _BLOCK,
                },
            )
    sums = {dtypes.accumulator(dtypes.natural_result(dtype, dtype)): None for dtype in dtypes.ALL}
    for accumulator in sums:
        for index in ("int32", "int64"):
            yield (
                "direct",
                {**launch.any_macros(accumulator), "INDEX_T": index, "K_TILE": 1, "BLOCK": _BLOCK},
            )
