"""The sum as it is written, for any problem: the algorithm of last resort, without workspace.

kernels_cuda/direct.cu, and direct_dgrad.cu and direct_wgrad.cu for the gradients. Every pair of
dtypes, boundary mode, stride and size: also past 2^31 elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch, rates
from gpuconv.cuda_backend.launch import Launch, Layout, Macros
from gpuconv.dtypes import DType
from gpuconv.plan import Plan
from gpuconv.problem import ROLES, ConvProblem, Operation

OPERATIONS = ("fprop", "dgrad", "wgrad")

_BLOCK = 256
_K_TILE = 4
_BLOCKS_PER_SM = 32
_THREADS_PER_SM = 512  # from so many threads on, some may be given up for reuse

_EFFICIENCY = 0.08  # the share of its rate that a loop of two loads per product reaches
_ANY_EFFICIENCY = 0.02  # with the dtype switched on at every load
_BANDWIDTH = 0.6  # the share of the memory's bandwidth

_TILE: dict[Operation, str] = {"fprop": "K_TILE", "dgrad": "C_TILE", "wgrad": "K_TILE"}


def supports(problem: ConvProblem, device: Any) -> bool:
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """The larger of arithmetic and memory, each at the share of its peak that this reaches."""
    efficiency = _EFFICIENCY if _is_uniform(problem) else _ANY_EFFICIENCY
    if _tile(problem, device) == 1:
        efficiency /= 2
    peak = 2 * rates.multiply_adds(device, problem.accumulator)
    arithmetic = problem.flops / (peak * efficiency)
    memory: float = problem.bytes_moved / (device.bandwidth * _BANDWIDTH)
    return rates.LAUNCH_SECONDS + max(arithmetic, memory)


def workspace(problem: ConvProblem, device: Any) -> int:
    return 0


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    bind(plan, x, w, bias, out)(x, w, bias, out)


def bind(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> Callable[..., None]:
    problem, device = plan.problem, plan.device
    if problem.operation == "dgrad":
        gradient = prepare(problem, device, Layout(out, w, bias, x))
        return lambda dy, w, bias, dx: gradient(device, dx, w, bias, dy)
    if problem.operation == "wgrad":
        gradient = prepare(problem, device, Layout(x, out, None, w))
        return lambda x, dy, bias, dw: gradient(device, x, dw, dy)
    return partial(prepare(problem, device, Layout(x, w, bias, out)), device)


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays."""
    return {"fprop": _forward, "dgrad": _input_gradient, "wgrad": _weight_gradient}[
        problem.operation
    ](problem, device, layout)


def _forward(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
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


def _input_gradient(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    positions = layout.batch * math.prod(problem.input)
    index = launch.index_type(problem, layout, positions * problem.in_channels)
    macros = macros_for(problem, device, index)
    group_tiles = -(-problem.group_in_channels // int(macros["C_TILE"]))
    c_tiles = group_tiles * problem.groups
    blocks = -(-positions * c_tiles // _BLOCK)
    extents = (1,) * (3 - problem.ndim) + problem.input
    return Launch(
        kernel=device.load("direct_dgrad", macros),
        grid=(max(min(blocks, _BLOCKS_PER_SM * device.sm_count), 1), 1, 1),
        block=(_BLOCK, 1, 1),
        constants=(
            launch.pack(problem, layout),
            launch.divisor(c_tiles),
            launch.divisor(group_tiles),
            *map(launch.divisor, extents),
            np.int32(launch.channels_last(layout.x)),
            np.int32(problem.conjugate),
        ),
    )


def _weight_gradient(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    positions = layout.batch * math.prod(problem.output)
    macros = macros_for(problem, device, launch.index_type(problem, layout, positions))
    group_tiles = -(-problem.group_out_channels // int(macros["K_TILE"]))
    k_tiles = group_tiles * problem.groups
    tiles = k_tiles * problem.group_in_channels * math.prod(problem.filter)
    return Launch(
        kernel=device.load("direct_wgrad", macros),
        grid=(max(min(tiles, _BLOCKS_PER_SM * device.sm_count), 1), 1, 1),
        block=(_BLOCK, 1, 1),
        constants=(
            launch.pack(problem, layout),
            launch.divisor(k_tiles),
            launch.divisor(group_tiles),
            np.int32(problem.conjugate),
        ),
    )


def _tile(problem: ConvProblem, device: Any) -> int:
    """Channels of the result per thread: several where they share what is read, and threads abound.

    It changes no bits: every sum has the same order whatever its neighbours.
    """
    channels = problem.group_out_channels
    if problem.operation == "dgrad":
        channels = problem.group_in_channels
    if channels < _K_TILE or not _is_uniform(problem):
        return 1
    if problem.operation != "fprop" and problem.accumulator.is_exact:
        return 1  # gradients of integers are rare
    threads = math.prod(problem.result_shape) // _K_TILE
    if problem.operation == "wgrad":
        threads *= _BLOCK  # a block for each
    return _K_TILE if threads >= _THREADS_PER_SM * device.sm_count else 1


def _is_uniform(problem: ConvProblem) -> bool:
    """Whether all dtypes are those that follow from one: the variants compiled for one type."""
    first = problem.dtype_of(problem.roles[0])
    return launch.type_macros(problem) == _uniform(first, problem.operation)


def _uniform(dtype: DType, operation: Operation) -> Macros:
    """Both operands of `dtype`; result and bias of the type that follows from it."""
    macros = launch.uniform_macros(dtype)
    given, result = macros["X_T"], macros["Y_T"]
    roles = zip(ROLES[operation], (given, given, result), strict=True)
    macros.update({f"{role.upper()}_T": name for role, name in roles})
    if operation == "wgrad":
        macros["B_T"] = macros["Y_T"]  # as launch.type_macros has it: there is no bias
    return macros


def macros_for(problem: ConvProblem, device: Any, index: str) -> Macros:
    """The variant that computes `problem`; ``variants`` lists them all."""
    if not _is_uniform(problem) or (problem.operation != "fprop" and index == "int64"):
        types = launch.any_macros(problem.accumulator)
    else:
        types = launch.type_macros(problem)
    tile = _tile(problem, device) if index == "int32" else 1
    return {**types, "INDEX_T": index, _TILE[problem.operation]: tile, "BLOCK": _BLOCK}


def variants() -> Iterator[tuple[str, Macros]]:
    """The variants of ``direct``, and those of the gradients."""
    yield from forward_variants()
    for operation in ("dgrad", "wgrad"):
        yield from gradient_variants(operation)


def gradient_variants(operation: Operation) -> Iterator[tuple[str, Macros]]:
    """15 uniform types by one channel and, of the floating ones, K_TILE; 6 sums of any types."""
    stem, tile = f"direct_{operation}", _TILE[operation]
    common: Macros = {"INDEX_T": "int32", "BLOCK": _BLOCK}
    for dtype in dtypes.ALL:
        for channels in (1,) if dtype.is_exact else (1, _K_TILE):
            yield stem, {**_uniform(dtype, operation), **common, tile: channels}
    sums = {dtypes.accumulator(dtypes.natural_result(dtype, dtype)): None for dtype in dtypes.ALL}
    for accumulator in sums:
        for index in ("int32", "int64"):
            types = launch.any_macros(accumulator)
            yield stem, {**types, **common, "INDEX_T": index, tile: 1}


def forward_variants() -> Iterator[tuple[str, Macros]]:
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
