"""Filters of rank 1, w[r, s] = u[r] v[s]: a pass along the rows and one along the columns.

kernels_cuda/separable.cu, both in one kernel. R + S products per output instead of R*S.

Whether w has rank 1 shows only in its values, which are on the device: a plan, made of shapes,
cannot know. So "auto" does not choose this algorithm. Asked for by name it brings w to the host:
its calls wait for the device, which those of no other algorithm do, and CUDA graphs cannot capture
them.

The factors are those of the NumPy backend (gpuconv/numpy_backend/separable.py): exact for integers;
for floats every weight equals their product within 4 eps of the accumulator. Rounding the factors
adds one eps, and the two sums round R + S times, less than the R*S of one sum:

    |y - y_ref| <= (5 + (R + S) / 2) eps sum |x||w|

in the worst case, which the bound of the direct sum covers (c = 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch, rates, tile
from gpuconv.cuda_backend.launch import Launch, Layout, Macros
from gpuconv.cuda_backend.tile import Block
from gpuconv.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, UINT8, DType
from gpuconv.numpy_backend import separable as host
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_TALL, _SHORT = 8, 4  # output rows per thread
_TALL_FILTER = 9  # from this height on, tall tiles pay
_TILES_PER_SM = 2

_EFFICIENCY = 0.4  # the share of the multiply-add rate
_BANDWIDTH = 0.7  # of the copy's
_ROUND_TRIP = 30e-6  # seconds to bring w to the host and the factors back

# (x, y) of the kernels that know both types; the others are told them at run time.
_FLOATS = (
    (FLOAT32, FLOAT32), (FLOAT64, FLOAT64), (FLOAT16, FLOAT16), (BFLOAT16, BFLOAT16),
    (UINT8, FLOAT32),
)  # fmt: skip


def _is_typed(problem: ConvProblem) -> bool:
    types = (problem.x_dtype, problem.y_dtype)
    return types in _FLOATS and problem.accumulator is dtypes.accumulator(problem.y_dtype)


def _out_w(accumulator: DType) -> int:
    return 16 // accumulator.itemsize


@lru_cache(maxsize=1024)
def _block(problem: ConvProblem, device: Any, batch: int, index: str = "int32") -> Block | None:
    """The tile, or None where it does not fit in shared memory. It changes no bits."""
    short = Block(32, _SHORT, _out_w(problem.accumulator))
    tall = Block(32, _TALL, short.out_w)
    many = tall.count(problem, batch) >= _TILES_PER_SM * device.sm_count
    use_tall = index == "int32" and many and problem.filter[0] >= _TALL_FILTER
    for block in (tall, short) if use_tall else (short,):
        if _shared_bytes(problem, block) <= device.max_shared_bytes:
            return block
    return None


def _shared_bytes(problem: ConvProblem, block: Block) -> int:
    item = problem.accumulator.itemsize
    r, s = problem.filter
    rows = tile.rows(problem, block, r)
    factors = tile.padded(r, block.out_w) + tile.padded(s, block.out_w)
    return (rows * tile.pitch(problem, block, item) + factors) * item


def supports(problem: ConvProblem, device: Any) -> bool | No:
    verdict = tile.plane(problem)
    if not verdict:
        return verdict
    if problem.ndim != 2 or 1 in problem.filter:
        return No("a filter with one row or column has no second pass")
    if any(n > 1 for n in (*problem.stride, *problem.dilation)):
        return No("computes strides and dilations of 1 only")
    if _block(problem, device, problem.batch) is None:
        return No("its window does not fit in shared memory")
    return True


def only_by_name(problem: ConvProblem) -> str | None:
    return "only a look at w's values, which a call would have to wait for, tells its rank"


def cost(problem: ConvProblem, device: Any) -> float:
    """The larger of the two passes over whole tiles and memory; and the way of w to the host."""
    block = _block(problem, device, problem.batch)
    assert block is not None
    r, s = problem.filter
    tiles = max(block.count(problem, problem.batch), device.sm_count)
    products = tiles * block.tile_w * ((block.tile_h + r - 1) * s + block.tile_h * r)
    peak = rates.multiply_adds(device, problem.accumulator)
    seconds = float(products / (peak * _EFFICIENCY))
    moved = problem.bytes_moved / float(device.bandwidth * _BANDWIDTH)
    return rates.LAUNCH_SECONDS + _ROUND_TRIP + max(seconds, moved)


def workspace(problem: ConvProblem, device: Any) -> int:
    return 0


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    """Waits for the device: w is factored on the host."""
    problem, device = plan.problem, plan.device
    found = host.factors(problem, w if isinstance(w, np.ndarray) else w.get())
    if found is None:
        raise ValueError(
            f"algorithm='separable' takes filters that are outer products of a column and a row; "
            f"this w {problem.w_shape} is not, within rounding. 'filter2d' serves any filter"
        )
    # Integers are summed modulo 2^64, signed or not.
    dtype = problem.accumulator.numpy
    u, v = (
        device.xp.asarray(np.ascontiguousarray(f[0, 0].astype(dtype))) for f in (found.u, found.v)
    )
    prepare(problem, device, Layout(x, w, bias, out))(device, x, u, v, bias, out)


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays."""
    index = tile.index_type(problem, layout)
    block = _block(problem, device, layout.batch, index)
    assert block is not None, "supports() has said that it fits"
    typed = _is_typed(problem) and index == "int32"
    tiling = tile.pack(
        problem,
        layout,
        block,
        slab=problem.filter[0],
        w_pitch=tile.padded(problem.filter[1], block.out_w),
        stage=problem.accumulator,
        raw=typed and problem.x_dtype is problem.accumulator,
        one_store=typed,
    )
    x, y = (problem.x_dtype, problem.y_dtype) if typed else (None, None)
    return Launch(
        kernel=device.load("separable", _macros(x, y, problem.accumulator, block.out_h, index)),
        grid=(block.count(problem, layout.batch), 1, 1),
        block=(tile.THREADS, 1, 1),
        constants=(launch.pack(problem, layout), tiling),
        shared_bytes=_shared_bytes(problem, block),
    )


def _macros(x: DType | None, y: DType | None, total: DType, out_h: int, index: str) -> Macros:
    return {
        "X_T": x.name if x else "any_dtype",
        "Y_T": y.name if y else "any_dtype",
        "ACC_T": total.name,
        "INDEX_T": index,
        "OUT_H": out_h,
        "OUT_W": _out_w(total),
    }


def variants() -> Iterator[tuple[str, Macros]]:
    """Five pairs of types, and any with four sums: tall and short; any with 64-bit indices."""
    for out_h in (_TALL, _SHORT):
        for x, y in _FLOATS:
            yield "separable", _macros(x, y, dtypes.accumulator(y), out_h, "int32")
    for total in (dtypes.INT64, dtypes.UINT64, FLOAT32, FLOAT64):
        for out_h, index in ((_TALL, "int32"), (_SHORT, "int32"), (_SHORT, "int64")):
            yield "separable", _macros(None, None, total, out_h, index)
