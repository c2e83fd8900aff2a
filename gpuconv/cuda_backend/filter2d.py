"""One filter over single-channel images: a tile of the image in shared memory, rows in registers.

kernels_cuda/filter2d.cu. Every pair of real dtypes, boundary mode, stride and dilation; filters of
any extent (a large one is applied in slabs of rows). Square filters of 3, 5 and 7 are unrolled. A
stride deals the columns of the tile into phases, a dilation the output rows into classes.

Integers are summed in 32 bits where the types alone prove that exact (a uint8 image under an int8
filter of up to 65536 taps), else in 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from gpuconv import dtypes
from gpuconv.cuda_backend import launch, rates, tile
from gpuconv.cuda_backend.launch import Launch, Layout, Macros
from gpuconv.cuda_backend.tile import Block
from gpuconv.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INT8, INT16, UINT8, DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_UNROLLED = (3, 5, 7)
_TALL, _UNROLLED_TALL, _SHORT = 8, 4, 2  # output rows per thread
_STEPPED_TALL, _STEPPED_SHORT = 4, 1
_LARGE = 100  # products per output that outweigh the memory they are read from
_TILES_PER_SM = 2  # below this, shorter tiles keep more multiprocessors busy

# The shares of the multiply-add rate, and of the memory's bandwidth, that the kernels reach.
_EFFICIENCY = {"unrolled": 0.7, "any": 0.6, "stepped": 0.6}
_BANDWIDTH = {"raw": 0.85, "converted": 0.5}  # of the copy's


@dataclass(frozen=True, slots=True)
class _Types:
    """Element types of a kernel: None stands for ``any_dtype``."""

    x: DType | None
    y: DType | None
    accumulator: DType
    sum: str

    @property
    def stage(self) -> DType:
        """Of the tile in shared memory."""
        return self.accumulator if self.x is None else self.x

    @property
    def sum_bytes(self) -> int:
        return 4 if self.sum == "int32" else self.accumulator.itemsize

    @property
    def out_w(self) -> int:
        """Columns per thread: 16 bytes of the tile at most."""
        return 2 if self.stage.itemsize == 8 else 4

    def macros(self) -> Macros:
        return {
            "X_T": self.x.name if self.x else "any_dtype",
            "STAGE_T": self.stage.name,
            "SUM_T": self.sum,
            "ACC_T": self.accumulator.name,
            "Y_T": self.y.name if self.y else "any_dtype",
        }


# (x, y) of the kernels that copy x as it is: floats alike, and what images come in.
_FLOATS = {(d, d) for d in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)} | {(UINT8, FLOAT32)}
_INTEGERS = (UINT8, INT8, INT16)


def _types(problem: ConvProblem) -> _Types:
    x, y, accumulator = problem.x_dtype, problem.y_dtype, problem.accumulator
    if accumulator.is_exact:
        if x in _INTEGERS and y.is_exact and y.itemsize == 8:
            # Sums modulo 2^64 have the same bits in int64 and uint64.
            bound = tile.largest(x) * tile.largest(problem.w_dtype) * problem.reduction
            return _Types(x, dtypes.INT64, dtypes.INT64, "int32" if bound < 2**31 else "int64")
    elif (x, y) in _FLOATS and accumulator is dtypes.accumulator(y):
        return _Types(x, y, accumulator, accumulator.name)
    return _any_type(accumulator)


def _unrolled(types: _Types) -> tuple[int, ...]:
    """The filter extents that have kernels of their own: those whose taps fit in registers."""
    if types.x is None or types.x in (INT8, INT16):
        return ()
    return _UNROLLED[: 3 if types.sum_bytes == 4 else 2]


def _kind(problem: ConvProblem, types: _Types) -> str:
    if any(n > 1 for n in (*problem.stride, *problem.dilation)):
        return "stepped"
    r, s = tile.extents(problem.filter)
    if r == s and r in _unrolled(types) and tile.extents(problem.output)[0] > 1:
        return "unrolled"
    return "any"


@dataclass(frozen=True, slots=True)
class _Shape:
    """The variant for one problem, and the slabs that its filter is applied in."""

    types: _Types
    filter: int
    stepped: bool
    block: Block
    slab: int
    shared_bytes: int

    def macros(self, index: str) -> Macros:
        return {**self.types.macros(), **_macros(self.filter, self.stepped, self.block, index)}


def _macros(filter: int, stepped: bool, block: Block, index: str) -> Macros:
    return {
        "INDEX_T": index,
        "FILTER": filter,
        "OUT_H": block.out_h,
        "OUT_W": block.out_w,
        "BLOCK_W": block.block_w,
        "BLOCK_H": block.block_h,
        "STEPPED": int(stepped),
    }


@lru_cache(maxsize=1024)
def _shape(problem: ConvProblem, device: Any, batch: int, index: str = "int32") -> _Shape | None:
    """The variant, or None where not one row of the window fits in shared memory."""
    types = _types(problem)
    kind = _kind(problem, types)
    flat = tile.extents(problem.output)[0] == 1
    if index == "int64":  # rows of more than 2^31 elements: signals, and what is too rare to matter
        kind = "any" if flat and kind != "stepped" else "stepped"
    if index == "int64" or (kind == "stepped" and types not in _stepped_types()):
        types = _any_type(types.accumulator)
    elif flat:
        types = _flat_types(types)
    out_w = types.out_w
    if flat and not (index == "int64" and kind == "stepped"):
        blocks = [Block(tile.THREADS, 1, out_w)]
    elif kind == "stepped":
        blocks = [Block(32, _STEPPED_SHORT, 2)]
        tall = Block(32, _STEPPED_TALL, out_w)
        if index == "int32" and _is_tall(problem, device, batch, types, tall):
            blocks = [tall]
    elif kind == "unrolled":
        blocks = [Block(32, _UNROLLED_TALL, out_w)]
    else:
        blocks = [Block(32, _SHORT, out_w)]
        tall = Block(32, _TALL, out_w)
        if tall.count(problem, batch) >= _TILES_PER_SM * device.sm_count:
            blocks.insert(0, tall)
    filter = tile.extents(problem.filter)[0] if kind == "unrolled" else 0
    for limit in (tile.shared_budget(device), device.max_shared_bytes):
        for block in blocks:
            slab = _slab(problem, types, block, limit, kind == "stepped")
            if slab:
                size = _shared_bytes(problem, types, block, slab, kind == "stepped")
                return _Shape(types, filter, kind == "stepped", block, slab, size)
    return None


def _is_tall(problem: ConvProblem, device: Any, batch: int, types: _Types, tall: Block) -> bool:
    """Whether tall tiles of a strided or dilated problem are full, many and small enough.

    Two blocks are to fit on a multiprocessor. A large filter needs the reuse more than the blocks:
    its products are worth a tile in slabs.
    """
    if 4 * tile.class_rows(problem) < 3 * tall.tile_h:
        return False
    if tall.count(problem, batch) < _TILES_PER_SM * device.sm_count:
        return False
    r = tile.extents(problem.filter)[0]
    if _slab(problem, types, tall, device.max_shared_bytes // 2, True) == r:
        return True
    slab = _slab(problem, types, tall, device.max_shared_bytes, True)
    return problem.reduction >= _LARGE and slab >= min(r, 8)


def _any_type(total: DType) -> _Types:
    return _Types(None, None, total, total.name)


@lru_cache(maxsize=1)
def _stepped_types() -> tuple[_Types, ...]:
    """The types that strided and dilated problems have kernels for, but ``any_dtype``."""
    return tuple(types for types in _typed() if types.sum != "int64")


def _flat_types(types: _Types) -> _Types:
    """One-dimensional signals of rare types have no kernels of their own."""
    if types.x in (FLOAT32, FLOAT64, FLOAT16, BFLOAT16) or types.x is None:
        return types
    return _any_type(types.accumulator)


def _slab(problem: ConvProblem, types: _Types, block: Block, limit: int, stepped: bool) -> int:
    """Filter rows per slab within `limit` bytes of shared memory: equal slabs, or 0."""
    r = tile.extents(problem.filter)[0]
    one = _shared_bytes(problem, types, block, 1, stepped)
    if one > limit:
        return 0
    each = _shared_bytes(problem, types, block, 2, stepped) - one
    most = min(1 + (limit - one) // each, r)
    return -(-r // -(-r // most))


def _shared_bytes(
    problem: ConvProblem, types: _Types, block: Block, slab: int, stepped: bool
) -> int:
    item = types.stage.itemsize
    tiled = tile.rows(problem, block, slab) * tile.pitch(problem, block, item) * item
    lanes = 32 * block.out_w
    exchange = tile.THREADS // 32 * (lanes + lanes * types.sum_bytes // 128)
    w_pitch = _w_pitch(problem, block, stepped)
    if stepped:
        return tiled + w_pitch * (4 + slab * types.sum_bytes)
    return tiled + (slab * w_pitch + exchange) * types.sum_bytes


def _w_pitch(problem: ConvProblem, block: Block, stepped: bool) -> int:
    """Whole loads of weights; where there are taps' offsets, the tile after them is aligned."""
    return tile.padded(tile.extents(problem.filter)[1], 4 if stepped else block.out_w)


def supports(problem: ConvProblem, device: Any) -> bool | No:
    verdict = tile.plane(problem)
    if not verdict:
        return verdict
    if _shape(problem, device, problem.batch) is None or (
        _shape(problem, device, problem.batch, "int64") is None
    ):
        return No("its window does not fit in shared memory")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """The larger of arithmetic and memory, each at the share of its peak that the kernel reaches.

    Arithmetic counts the outputs of whole tiles; tiles fewer than multiprocessors leave some idle.
    Where strides or dilations leave little to reuse, it waits for shared memory.
    """
    shape = _shape(problem, device, problem.batch)
    assert shape is not None
    tiles = max(shape.block.count(problem, problem.batch), device.sm_count)
    waves = tiles * shape.block.tile_h * shape.block.tile_w
    kind = "stepped" if shape.stepped else "unrolled" if shape.filter else "any"
    rate = rates.multiply_adds(device, shape.types.sum) * _EFFICIENCY[kind]
    copied = _BANDWIDTH["converted" if shape.types.x is None else "raw"]
    seconds = waves * math.prod(problem.filter) / rate
    if shape.stepped:
        warps = tiles * tile.THREADS // 32
        cycles = _shared_cycles(problem, shape) / device.sm_count
        seconds = max(seconds, warps * cycles / float(device.clock_hz))
    return rates.LAUNCH_SECONDS + max(
        float(seconds), problem.bytes_moved / float(device.bandwidth * copied)
    )


def _shared_cycles(problem: ConvProblem, shape: _Shape) -> float:
    """Of shared memory, for the sums of a warp: elements for each row of its tile, a vector of
    weights for each output row that sees it."""
    block = shape.block
    r, s = tile.extents(problem.filter)
    seen = r + (block.out_h - 1) * tile.row_step(problem)
    rows = min(seen, r * block.out_h)
    elements = rows * block.out_w * max(32 * shape.types.stage.itemsize / rates.SHARED_BYTES, 1)
    return s * (elements + r * block.out_h / block.out_w)


def workspace(problem: ConvProblem, device: Any) -> int:
    return 0


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    bind(plan, x, w, bias, out)(x, w, bias, out)


def bind(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> Callable[..., None]:
    return partial(prepare(plan.problem, plan.device, Layout(x, w, bias, out)), plan.device)


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays."""
    index = tile.index_type(problem, layout)
    shape = _shape(problem, device, layout.batch, index)
    assert shape is not None, "supports() has said that it fits"
    block, types = shape.block, shape.types
    tiling = tile.pack(
        problem,
        layout,
        block,
        slab=shape.slab,
        w_pitch=_w_pitch(problem, block, shape.stepped),
        stage=types.stage,
        raw=types.x is not None,
        one_store=types.y is not None,
    )
    return Launch(
        kernel=device.load("filter2d", shape.macros(index)),
        grid=(block.count(problem, layout.batch), 1, 1),
        block=(tile.THREADS, 1, 1),
        constants=(launch.pack(problem, layout), tiling),
        shared_bytes=shape.shared_bytes,
    )


def variants() -> Iterator[tuple[str, Macros]]:
    """Types that are copied as they are: unrolled, tall, short; all others by their sums' type."""
    anything = [_any_type(total) for total in (dtypes.INT64, dtypes.UINT64, FLOAT32, FLOAT64)]
    found: list[tuple[_Types, int, bool, Block, str]] = []
    for types in (*_typed(), *anything):
        found += [
            (types, filter, False, Block(32, _UNROLLED_TALL, types.out_w), "int32")
            for filter in _unrolled(types)
        ]
        found += [
            (types, 0, False, Block(32, out_h, types.out_w), "int32") for out_h in (_TALL, _SHORT)
        ]
        if _flat_types(types) is types:
            found.append((types, 0, False, Block(tile.THREADS, 1, types.out_w), "int32"))
    short = Block(32, _STEPPED_SHORT, 2)
    for types in (*_stepped_types(), *anything):
        tall, flat = Block(32, _STEPPED_TALL, types.out_w), Block(tile.THREADS, 1, types.out_w)
        found += [(types, 0, True, block, "int32") for block in (short, tall)]
        if _flat_types(types) is types:
            found.append((types, 0, True, flat, "int32"))
        if types.x is None:
            found += [(types, 0, False, flat, "int64"), (types, 0, True, short, "int64")]
    for types, filter, stepped, block, index in found:
        yield "filter2d", {**types.macros(), **_macros(filter, stepped, block, index)}


def _typed() -> list[_Types]:
    pairs = sorted(_FLOATS, key=lambda pair: (pair[0].name, pair[1].name))
    typed = [_Types(x, y, dtypes.accumulator(y), dtypes.accumulator(y).name) for x, y in pairs]
    for x in _INTEGERS:
        typed += [_Types(x, dtypes.INT64, dtypes.INT64, total) for total in ("int32", "int64")]
    return typed
