"""Convolution as a matrix product of w with the patches of x, which are never written to memory.

kernels_cuda/implicit_gemm.cu. A block computes a tile of output channels by pixels; the plain cores
multiply, in full precision. Small results with long sums are split among more blocks along the sum,
and kernels_cuda/split_sum.cu adds the parts in order.

What decides the order of a sum, and with it its bits: the memory order that is planned for, the
shapes, the workspace's limit and the device. The batch, the strides and the tile do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch, rates, split_sum
from gpuconv.cuda_backend.launch import DIVISOR, Launch, Layout, Macros, Strides
from gpuconv.dtypes import DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

TILING = np.dtype(
    [
        ("row_tiles", DIVISOR),
        ("pixel_tiles", DIVISOR),
        ("groups", DIVISOR),
        ("split_stride", np.int64),
        ("k_tiles", np.int32),
        ("split_tiles", np.int32),
        ("w_vector", np.int32),
        ("x_vector", np.int32),
        ("y_vector", np.int32),
    ],
    align=True,
)
STORE_ELEMENTS, STORE_PIXELS, STORE_CHANNELS = range(3)


@dataclass(frozen=True)
class Tile:
    """What a block computes (rows are output channels), and how many of it each thread."""

    rows: int
    pixels: int
    thread_rows: int
    thread_pixels: int
    efficiency: float  # the share of the multiply-add rate that a full multiprocessor reaches
    blocks: int  # that share a multiprocessor

    @property
    def threads(self) -> int:
        return self.rows // self.thread_rows * (self.pixels // self.thread_pixels)


LARGE = Tile(128, 128, 8, 8, efficiency=0.8, blocks=2)
MEDIUM = Tile(64, 64, 8, 4, efficiency=0.65, blocks=5)
FLAT = Tile(32, 128, 4, 8, efficiency=0.65, blocks=5)  # few output channels
SMALL = Tile(32, 32, 4, 4, efficiency=0.45, blocks=8)

TYPES = (dtypes.FLOAT32, dtypes.FLOAT64, dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.COMPLEX64)
_PACK_BLOCK = 256  # threads of pack_filter

_SPLIT_LENGTH = 384  # the shortest sum worth a block of its own: large batches pay for its store
_MOST_SPLITS = 8
_WORKSPACE = 64 << 20  # the parts of more images than fit are computed in several passes
_PACKING_PAYS = 5  # launches that the product must take, for w to be copied first
_STEP_CYCLES = 500  # of one tile of k, beyond its multiplications: loads, stores, the barrier
_BANDWIDTH = 0.8  # the share of the memory's bandwidth


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    if problem.x_dtype not in TYPES:
        return No(f"has no kernel for x in {problem.x_dtype}")
    if launch.type_macros(problem) != launch.uniform_macros(problem.x_dtype):
        return No("x, w, bias and the result must have one dtype")
    if max(problem.reduction, problem.out_channels, problem.in_channels) >= 2**30:
        return No("a sum or the channels are too long for its 32-bit counters")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """Waves of tiles, at the tile's share of the multiply-add rate, or memory where that is slower.

    A multiprocessor that runs n of the tiles takes the longer of: all their multiplications at its
    full rate; and ceil(n / those that fit) times a lone tile, which waits for its own loads.
    """
    splits, _ = _passes(problem, device)
    _, seconds = _choose(problem, device, problem.batch, splits)
    if _packs(problem, device):
        copied = 2 * filter_bytes(problem)
        seconds += rates.LAUNCH_SECONDS + copied / (_BANDWIDTH * device.bandwidth)
    return seconds


def workspace(problem: ConvProblem, device: Any) -> int:
    splits, images = _passes(problem, device)
    parts = 0 if splits == 1 else splits * images * part_bytes(problem)
    return parts + (filter_bytes(problem) if _packs(problem, device) else 0)


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    problem, device = plan.problem, plan.device
    if _packs(problem, device):
        w = packed_filter(problem, device, x, w, bias, out)
    splits, images = _passes(problem, device)
    if splits == 1:
        images = x.shape[0]
    for first in range(0, x.shape[0], images):
        arrays = x[first : first + images], w, bias, out[first : first + images]
        _bind(problem, device, *arrays)(*arrays)


def bind(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> Callable[..., None] | None:
    """What ``run`` does where it takes one pass over the images."""
    problem, device = plan.problem, plan.device
    splits, images = _passes(problem, device)
    if splits > 1 and x.shape[0] > images:
        return None
    if _packs(problem, device):
        return bind_packed(problem, device, _bind, x, w, bias, out)
    return _bind(problem, device, x, w, bias, out)


def _bind(
    problem: ConvProblem, device: Any, x: Any, w: Any, bias: Any, out: Any
) -> Callable[..., None]:
    layout = Layout(x, w, bias, out)
    splits, _ = _passes(problem, device)
    if splits == 1:
        return partial(prepare_whole(problem, device, layout), device)
    multiply, add = prepare_split(problem, device, layout, splits)
    size = splits * x.shape[0] * part_size(problem)

    def call(x: Any, w: Any, bias: Any, out: Any) -> None:
        parts = device.empty((size,), problem.accumulator.numpy)
        multiply(device, x, w, None, parts)
        add(device, parts, bias, out)

    return call


def bind_packed(
    problem: ConvProblem, device: Any, bind: Callable[..., Callable[..., None]],
    x: Any, w: Any, bias: Any, out: Any,
) -> Callable[..., None]:  # fmt: skip
    """What `bind` makes of w with its channels innermost; w is copied first, where it need be."""
    pack = prepare_packing(problem, device, Layout(x, w, bias, out))
    if pack is None:
        return bind(problem, device, x, w, bias, out)
    shape, dtype = w.shape, w.dtype
    multiply = bind(problem, device, x, channels_innermost(device, shape, dtype), bias, out)

    def call(x: Any, w: Any, bias: Any, out: Any) -> None:
        packed = channels_innermost(device, shape, dtype)
        pack(device, w, packed)
        multiply(x, packed, bias, out)

    return call


def packed_filter(problem: ConvProblem, device: Any, x: Any, w: Any, bias: Any, out: Any) -> Any:
    """w with its channels innermost in memory: itself, or a copy."""
    pack = prepare_packing(problem, device, Layout(x, w, bias, out))
    if pack is None:
        return w
    packed = channels_innermost(device, w.shape, w.dtype)
    pack(device, w, packed)
    return packed


def channels_innermost(device: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory for a filter of that shape."""
    memory = device.empty((shape[0], *shape[2:], shape[1]), dtype)
    return memory.transpose(0, memory.ndim - 1, *range(1, memory.ndim - 1))


def prepare(problem: ConvProblem, device: Any, layout: Layout) -> tuple[Launch, ...]:
    """All that ``run`` launches for contiguous arrays, loaded."""
    pack = prepare_packing(problem, device, layout) if _packs(problem, device) else None
    launches = [] if pack is None else [pack]
    splits, images = _passes(problem, device)
    if splits == 1:
        return (*launches, prepare_whole(problem, device, layout))
    for each in pass_layouts(problem, layout, images):
        launches += prepare_split(problem, device, each, splits)
    return tuple(launches)


def pass_layouts(problem: ConvProblem, layout: Layout, images: int) -> list[Layout]:
    """Those of passes over so many images of contiguous arrays; the last may have fewer."""
    if layout.batch <= images:
        return [layout]
    batches = {images, layout.batch % images} - {0}
    return [launch.contiguous(replace(problem, batch=batch)) for batch in batches]


@lru_cache(maxsize=1024)
def prepare_whole(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays."""
    return _multiply(problem, device, layout, layout.y, layout.alignment, 1)


@lru_cache(maxsize=1024)
def prepare_packing(problem: ConvProblem, device: Any, layout: Layout) -> Launch | None:
    """The launch that copies w, or None where w can be loaded in vectors as it is.

    A flipped filter is copied as it is, and stays flipped.
    """
    p = launch.pack(replace(problem, flip=False), layout)
    if w_vector(problem, p, True, 16 // problem.w_dtype.itemsize) and layout.alignment == 16:
        return None
    threads = problem.out_channels * problem.group_in_channels
    return Launch(
        kernel=device.load("pack_filter", _pack_macros(problem.w_dtype)),
        grid=launch.strided_grid(device, threads, _PACK_BLOCK),
        block=(_PACK_BLOCK, 1, 1),
        constants=(p,),
    )


@lru_cache(maxsize=1024)
def prepare_split(
    problem: ConvProblem, device: Any, layout: Layout, splits: int
) -> tuple[Launch, Launch]:
    """The two passes of a split sum: products to the workspace, and from there to y."""
    shape = (layout.batch, *problem.y_shape[1:])
    strides = contiguous_strides(shape, launch.channels_last(layout.y))
    multiply = _multiply(problem, device, layout, strides, 16, splits)
    k_tiles, split_tiles = (int(multiply.constants[1][f]) for f in ("k_tiles", "split_tiles"))
    parts = -(-k_tiles // split_tiles)
    p = launch.pack(problem, layout)
    return multiply, split_sum.prepare(device, problem.x_dtype, p, math.prod(shape), parts)


def _multiply(
    problem: ConvProblem, device: Any, layout: Layout, y: Strides, y_alignment: int, splits: int
) -> Launch:
    """The launch of the product; `y` is the result's or, where the sum is split, one part's."""
    split = splits > 1
    index = index_type(problem, layout)
    if index == "int64":
        tile = MEDIUM
    else:
        tile, _ = _choose(problem, device, layout.batch, splits)
    channels_inner = _channels_inner(problem)
    macros = _macros(problem.x_dtype, tile, index, channels_inner, split)
    row_tiles = -(-problem.group_out_channels // tile.rows)
    pixel_tiles = -(-layout.batch * math.prod(problem.output) // tile.pixels)
    k_tiles = _k_tiles(problem)
    split_tiles = -(-k_tiles // splits)
    splits = -(-k_tiles // split_tiles)  # rounding up may leave the last with nothing

    p = launch.pack(problem, layout).copy()
    p["y_strides"] = [*y[:2], *[0] * (3 - problem.ndim), *y[2:]]
    tiling = np.zeros((), TILING)
    tiling["row_tiles"] = launch.divisor(row_tiles)
    tiling["pixel_tiles"] = launch.divisor(pixel_tiles)
    tiling["groups"] = launch.divisor(problem.groups)
    tiling["split_stride"] = layout.batch * math.prod(problem.y_shape[1:]) if split else 0
    tiling["k_tiles"], tiling["split_tiles"] = k_tiles, split_tiles
    vector = 16 // problem.x_dtype.itemsize
    if layout.alignment == 16:
        tiling["w_vector"] = w_vector(problem, p, channels_inner, vector)
        tiling["x_vector"] = channels_inner and x_vector(problem, layout, vector)
    fragment = 16 // problem.accumulator.itemsize
    y_dtype = problem.accumulator if split else problem.y_dtype
    if y_alignment >= fragment * y_dtype.itemsize:
        tiling["y_vector"] = y_vector(problem, layout.batch, y, fragment)
    p.flags.writeable = tiling.flags.writeable = False
    return Launch(
        kernel=device.load("implicit_gemm", macros),
        grid=(row_tiles * pixel_tiles * problem.groups * splits, 1, 1),
        block=(tile.threads, 1, 1),
        constants=(p, tiling),
    )


# ---- the order of a sum ----------------------------------------------------------------------


def _tile_k(dtype: DType) -> int:
    """k's of a tile. The same for all tiles of a type: it is part of the order of sums."""
    return 16 if dtype.is_half else 8


def _channels_inner(problem: ConvProblem) -> bool:
    """Whether the kernel loads neighbouring channels rather than neighbouring pixels.

    Where x's memory is planned to run channels last, unless too many of the channels that it would
    multiply are none. Other strides than planned are read too, only slower.
    """
    tile_k, channels = _tile_k(problem.x_dtype), problem.group_in_channels
    last = problem.channels_last or math.prod(problem.input) == 1
    return last and 4 * -(-channels // tile_k) * tile_k <= 5 * channels


def _k_tiles(problem: ConvProblem) -> int:
    tile_k = _tile_k(problem.x_dtype)
    if _channels_inner(problem):
        return -(-problem.group_in_channels // tile_k) * math.prod(problem.filter)
    return -(-problem.reduction // tile_k)


@lru_cache(maxsize=4096)
def _passes(problem: ConvProblem, device: Any) -> tuple[int, int]:
    """Into how many parts sums are split, and the images of one pass. The first knows no batch."""
    image_bytes = part_bytes(problem)
    limit = problem.workspace_within(_WORKSPACE)
    blocks = (
        problem.groups
        * -(-problem.group_out_channels // MEDIUM.rows)
        * -(-math.prod(problem.output) // MEDIUM.pixels)
    )
    splits = min(
        2 * device.sm_count // blocks,
        problem.reduction // _SPLIT_LENGTH,
        _MOST_SPLITS,
        limit // image_bytes,
    )
    if splits < 2:
        return 1, problem.batch
    return splits, min(limit // (splits * image_bytes), max(problem.batch, 1))


def part_size(problem: ConvProblem) -> int:
    """Elements of one image's result."""
    return math.prod(problem.y_shape[1:])


def part_bytes(problem: ConvProblem) -> int:
    """The same in bytes of the type of sums."""
    return max(part_size(problem), 1) * problem.accumulator.itemsize


@lru_cache(maxsize=4096)
def _packs(problem: ConvProblem, device: Any) -> bool:
    """Whether w is copied to have its channels innermost, like x's: it changes no sum's order.

    Where channels are loaded in vectors, (K, C, R, S) memory would cost a whole sector of cache for
    every element of w. The copy pays off where the product takes longer than a few launches.
    """
    if not _channels_inner(problem) or math.prod(problem.filter) == 1:
        return False
    if problem.group_in_channels * problem.w_dtype.itemsize % 16:
        return False
    splits, images = _passes(problem, device)
    needed = filter_bytes(problem)
    if splits > 1:
        needed += splits * images * part_bytes(problem)
    if problem.workspace_limit is not None and needed > problem.workspace_limit:
        return False
    _, seconds = _choose(problem, device, problem.batch, splits)
    return seconds > _PACKING_PAYS * rates.LAUNCH_SECONDS and needed < _WORKSPACE * 2


def filter_bytes(problem: ConvProblem) -> int:
    return math.prod(problem.w_shape) * problem.w_dtype.itemsize


# ---- the tile --------------------------------------------------------------------------------


def _tiles(dtype: DType, split: bool) -> tuple[Tile, ...]:
    """The tiles that kernels are compiled for."""
    if dtype.itemsize == 8:
        return MEDIUM, SMALL
    if dtype.is_half:
        return (MEDIUM, SMALL) if split else (LARGE, MEDIUM, SMALL)
    return LARGE, MEDIUM, FLAT, SMALL


@lru_cache(maxsize=4096)
def _choose(problem: ConvProblem, device: Any, batch: int, splits: int) -> tuple[Tile, float]:
    """The cheapest tile, and its seconds."""
    tiles = _tiles(problem.x_dtype, splits > 1)
    costs = [_seconds(problem, device, tile, batch, splits) for tile in tiles]
    best = min(range(len(tiles)), key=costs.__getitem__)
    return tiles[best], costs[best]


def _seconds(problem: ConvProblem, device: Any, tile: Tile, batch: int, splits: int) -> float:
    pixels = batch * math.prod(problem.output)
    blocks = (
        splits
        * problem.groups
        * -(-problem.group_out_channels // tile.rows)
        * -(-pixels // tile.pixels)
    )
    tile_k = _tile_k(problem.x_dtype)
    k_tiles = -(-_k_tiles(problem) // splits)
    step = tile.rows * tile.pixels * tile_k / _per_cycle(problem.accumulator, device)
    # Four schedulers share a multiprocessor's rate; a block of two warps reaches half of it.
    alone = step * max(1.0, 128 / tile.threads) + _STEP_CYCLES
    each = -(-blocks // device.sm_count)
    cycles = k_tiles * max(each * step / tile.efficiency, -(-each // tile.blocks) * alone)
    moved = problem.bytes_moved
    launches = rates.LAUNCH_SECONDS
    if splits > 1:
        moved += 2 * splits * batch * part_bytes(problem)
        launches *= 2
    return launches + float(max(cycles / device.clock_hz, moved / (_BANDWIDTH * device.bandwidth)))


def _per_cycle(accumulator: DType, device: Any) -> float:
    """Products of a multiprocessor per cycle."""
    return rates.per_cycle(device, accumulator) / (4 if accumulator.is_complex else 1)


# ---- 16 bytes at once ------------------------------------------------------------------------


def multiples(strides: Strides, extents: tuple[int, ...], vector: int) -> bool:
    """Whether every step along an axis keeps the place within 16 bytes."""
    return all(s % vector == 0 for s, n in zip(strides, extents, strict=True) if n > 1)


def dense(strides: Strides, extents: tuple[int, ...]) -> bool:
    """Whether the elements lie one after the other, the last axis fastest."""
    expected = 1
    for stride, extent in zip(reversed(strides), reversed(extents), strict=True):
        if extent > 1 and stride != expected:
            return False
        expected *= extent
    return True


def w_vector(problem: ConvProblem, p: Any, channels_inner: bool, vector: int) -> bool:
    strides = tuple(int(s) for s in p["w_strides"])
    extents = (problem.out_channels, problem.group_in_channels, *map(int, p["filter"]))
    if channels_inner:  # vectors of channels
        return (
            strides[1] == 1
            and extents[1] % vector == 0
            and int(p["w_offset"]) % vector == 0
            and multiples((strides[0], *strides[2:]), (extents[0], *extents[2:]), vector)
        )
    return (
        problem.reduction % vector == 0
        and dense(strides[1:], extents[1:])
        and multiples(strides[:1], extents[:1], vector)
    )


def x_vector(problem: ConvProblem, layout: Layout, vector: int) -> bool:
    strides = (layout.x[0], *layout.x[2:])
    extents = (layout.batch, *problem.input)
    return (
        layout.x[1] == 1
        and problem.group_in_channels % vector == 0
        and multiples(strides, extents, vector)
    )


def y_vector(problem: ConvProblem, batch: int, y: Strides, fragment: int) -> int:
    """Which neighbours in y a thread writes at once."""
    output = problem.output
    if (
        math.prod(output) % fragment == 0
        and dense(y[2:], output)
        and multiples(y[:2], (batch, problem.out_channels), fragment)
    ):
        return STORE_PIXELS
    if (
        problem.group_out_channels % fragment == 0
        and y[1] == 1
        and multiples((y[0], *y[2:]), (batch, *output), fragment)
    ):
        return STORE_CHANNELS
    return STORE_ELEMENTS


def contiguous_strides(shape: tuple[int, ...], channels_last: bool) -> Strides:
    """The strides of a contiguous (N, K, spatial...) array in one of the two memory orders."""
    order = (0, *range(2, len(shape)), 1) if channels_last else tuple(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


# ---- variants --------------------------------------------------------------------------------


def index_type(problem: ConvProblem, layout: Layout) -> str:
    """As launch.index_type; the kernel also computes offsets of positions beyond the edges."""
    margin = 3 * _tile_k(problem.x_dtype)  # and of the k's of two tiles past the last
    reach = layout.batch * math.prod(problem.output) + LARGE.pixels
    x_reach = (layout.batch - 1) * abs(layout.x[0])
    x_reach += (problem.in_channels + margin) * abs(layout.x[1])
    w_reach = (problem.out_channels - 1) * abs(layout.w[0])
    w_reach += (problem.group_in_channels + margin) * abs(layout.w[1])
    for axis in range(problem.ndim):
        tap = problem.dilation[axis] * problem.filter[axis]
        extent = problem.input[axis] + problem.pad_lo[axis] + problem.pad_hi[axis] + tap
        x_reach += extent * abs(layout.x[2 + axis])
        w_reach += problem.filter[axis] * abs(layout.w[2 + axis])
    return launch.index_type(problem, layout, max(reach, x_reach, w_reach))


def _macros(dtype: DType, tile: Tile, index: str, channels_inner: bool, split: bool) -> Macros:
    types = launch.uniform_macros(dtype)
    if split:  # the result is the workspace, which gets no bias
        types["Y_T"] = types["ACC_T"]
    return {
        **types,
        "INDEX_T": index,
        "CHANNELS_INNER": int(channels_inner),
        "TILE_M": tile.rows,
        "TILE_N": tile.pixels,
        "TILE_K": _tile_k(dtype),
        "THREAD_M": tile.thread_rows,
        "THREAD_N": tile.thread_pixels,
    }


def _pack_macros(dtype: DType) -> Macros:
    return {"DATA_T": f"uint{8 * dtype.itemsize}", "BLOCK": _PACK_BLOCK}


def variants() -> Iterator[tuple[str, Macros]]:
    """Per type: its tiles with int32, one with int64, each for both memory orders.

    16-bit types have them again with the float32 result of a split sum; the other types' results
    are of their sums' type as they are.
    """
    for dtype in TYPES:
        for split in (False, True) if dtype.is_half else (False,):
            for channels_inner in (False, True):
                for tile in _tiles(dtype, split):
                    yield (
                        "implicit_gemm",
                        _macros(dtype, tile, "int32", channels_inner, split),
                    )
                yield "implicit_gemm", _macros(dtype, MEDIUM, "int64", channels_inner, split)
    yield from split_sum.variants(TYPES)
    for dtype in (dtypes.FLOAT16, dtypes.FLOAT32, dtypes.FLOAT64):
        yield "pack_filter", _pack_macros(dtype)
