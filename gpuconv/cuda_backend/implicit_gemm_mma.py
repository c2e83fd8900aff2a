"""Convolution as a matrix product on tensor cores: implicit_gemm with mma.sync.

kernels_cuda/implicit_gemm_mma.cu. 16-bit floats with sums in float32; float32 where the problem's
precision is "tf32", or "tf32x3" in three products; float64.

What decides the order of a sum, and with it its bits: the memory order that is planned for, the
shapes, the workspace's limit and the device. The batch, the strides and the tile do not. Long sums
of small images are sums of parts, always the same: a small batch has blocks for each part, and
split_sum.cu adds them up; in a large one a block computes all parts of its sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch, rates
from gpuconv.cuda_backend.device import capability
from gpuconv.cuda_backend.implicit_gemm import (
    STORE_CHANNELS,
    STORE_PIXELS,
    SUM_BLOCK,
    channels_innermost,
    contiguous_strides,
    filter_bytes,
    index_type,
    packed_filter,
    part_bytes,
    part_size,
    prepare_packing,
    sum_macros,
    w_vector,
    x_vector,
    y_vector,
)
from gpuconv.cuda_backend.launch import DIVISOR, Launch, Layout, Macros, Strides
from gpuconv.dtypes import DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

TILING = np.dtype(
    [
        ("channel_tiles", DIVISOR),
        ("pixel_tiles", DIVISOR),
        ("groups", DIVISOR),
        ("block", DIVISOR),
        ("split_stride", np.int64),
        ("depth", np.int32),
        ("slices", np.int32),
        ("part_slices", np.int32),
        ("split_slices", np.int32),
        ("w_vector", np.int32),
        ("x_vector", np.int32),
        ("y_vector", np.int32),
        ("partial_vector", np.int32),
    ],
    align=True,
)
VECTORS, GATHER, PACKED = range(3)  # LOAD: how x is loaded
_ROW_BYTES = 64  # of a slice of k
_TAPS_BYTES = 2560  # of shared memory, at most


@dataclass(frozen=True)
class Tile:
    """What a block computes, in output channels by pixels, and what each of its warps does."""

    channels: int
    pixels: int
    warp_channels: int
    warp_pixels: int
    stages: int
    efficiency: float  # the share of the tensor cores' rate that a full multiprocessor reaches

    @property
    def threads(self) -> int:
        return 32 * (self.channels // self.warp_channels) * (self.pixels // self.warp_pixels)

    @property
    def stage_bytes(self) -> int:
        return self.stages * (self.channels + self.pixels) * _ROW_BYTES


HUGE = Tile(128, 256, 64, 64, 4, efficiency=0.85)
LARGE = Tile(128, 128, 64, 64, 4, efficiency=0.85)
LARGE_8 = Tile(128, 128, 64, 32, 4, efficiency=0.8)  # of 8 warps, where registers are scarce
WIDE = Tile(64, 256, 64, 64, 4, efficiency=0.85)  # 64 output channels are common
MEDIUM = Tile(64, 128, 64, 32, 4, efficiency=0.75)
MEDIUM_8 = Tile(64, 128, 32, 32, 4, efficiency=0.7)  # each thread loads fewer elements one by one
NARROW = Tile(32, 128, 32, 32, 4, efficiency=0.6)
SMALL = Tile(64, 64, 32, 32, 4, efficiency=0.6)

# Elements of x that a multiprocessor loads one by one in a cycle: of `packed`, each with its tap.
_LOAD_RATE = {VECTORS: math.inf, GATHER: 24, PACKED: 8}
_L2_RATE = 24  # bytes that a multiprocessor gets from L2 in a cycle, while all others do
_L1_REUSE = 4  # how often x is read from L1 for once from L2, at most
_SLICE_CYCLES = 200  # of a slice beyond its products: the barrier, addresses
_BLOCK_CYCLES = 3000  # of a block beyond its slices: the first loads' latency, the last stores
_PART_LENGTH = 512  # the shortest part of a sum
_FEWEST_PARTS, _MOST_PARTS = 3, 8  # two do not pay for a second launch
_WORKSPACE = 64 << 20  # the parts of more images than fit are computed in several passes
_BANDWIDTH = 0.85  # the share of the memory's bandwidth


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    if problem.x_dtype not in _TYPES:
        return No(f"has no kernel for x in {problem.x_dtype}")
    if launch.type_macros(problem) != launch.uniform_macros(problem.x_dtype):
        return No("x, w, bias and the result must have one dtype")
    if problem.x_dtype is dtypes.FLOAT32 and problem.precision == "ieee":
        return No("tensor cores have no full float32: precision='tf32' or 'tf32x3' asks for less")
    if capability(device) < 80 and problem.x_dtype is not dtypes.FLOAT16:
        return No(f"needs sm_80 for {problem.x_dtype}, and this is {device.arch}")
    if max(problem.reduction, problem.out_channels, problem.in_channels) >= 2**30:
        return No("a sum or the channels are too long for its 32-bit counters")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """Waves of tiles, at the tile's share of the tensor cores' rate, or memory where it is slower.

    A multiprocessor that runs n of the tiles takes the longest of: all their products, their loads
    of single elements, their bytes from L2, each at its full rate; and ceil(n / those that fit)
    times a lone tile, which waits for its own barriers.
    """
    seconds = _choose(problem, device, problem.batch).seconds
    if _packs(problem):
        copied = 2 * filter_bytes(problem)
        seconds += rates.LAUNCH_SECONDS + copied / (_BANDWIDTH * device.bandwidth)
    return seconds


def workspace(problem: ConvProblem, device: Any) -> int:
    needed = filter_bytes(problem) if _packs(problem) else 0
    if _choose(problem, device, problem.batch).split:
        images = _pass_images(problem, device)
        needed += _parts(problem, device) * images * part_bytes(problem)
    return needed


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    call = bind(plan, x, w, bias, out)
    if call is not None:
        call(x, w, bias, out)
        return
    problem, device = plan.problem, plan.device
    if _packs(problem):
        w = packed_filter(problem, device, x, w, bias, out)
    images = _pass_images(problem, device)
    size = _parts(problem, device) * images * part_size(problem)
    parts = device.empty((size,), problem.accumulator.numpy)
    for first in range(0, x.shape[0], images):
        some, result = x[first : first + images], out[first : first + images]
        multiply, add = prepare_split(problem, device, Layout(some, w, bias, result))
        multiply(device, some, w, None, None, parts)
        add(device, parts, bias, result)


def bind(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> Callable[..., None] | None:
    """What ``run`` does where it takes one pass over the images."""
    problem, device = plan.problem, plan.device
    batch = x.shape[0]
    split = _choose(problem, device, batch).split
    if split and batch > _pass_images(problem, device):
        return None
    pack, shape, dtype = None, w.shape, w.dtype
    if _packs(problem):
        pack = prepare_packing(problem, device, Layout(x, w, bias, out))
        if pack is not None:
            w = channels_innermost(device, shape, dtype)
    layout = Layout(x, w, bias, out)
    add = None
    if split:
        multiply, add = prepare_split(problem, device, layout)
    else:
        multiply = prepare(problem, device, layout)
    size = _parts(problem, device) * batch * part_size(problem)

    def call(x: Any, w: Any, bias: Any, out: Any) -> None:
        if pack is not None:
            packed = channels_innermost(device, shape, dtype)
            pack(device, w, packed)
            w = packed
        if add is None:
            multiply(device, x, w, bias, out, None)
            return
        parts = device.empty((size,), problem.accumulator.numpy)
        multiply(device, x, w, None, None, parts)
        add(device, parts, bias, out)

    return call


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays; a block computes all parts of its sums."""
    return _multiply(problem, device, layout, None)


@lru_cache(maxsize=1024)
def prepare_split(problem: ConvProblem, device: Any, layout: Layout) -> tuple[Launch, Launch]:
    """The two passes of a split sum: its parts to the workspace, and from there to y."""
    shape = (layout.batch, *problem.y_shape[1:])
    strides = contiguous_strides(shape, launch.channels_last(layout.y))
    multiply = _multiply(problem, device, layout, strides)
    items = math.prod(shape)
    add = Launch(
        kernel=device.load("split_sum", sum_macros(problem.x_dtype)),
        grid=(min(-(-items // SUM_BLOCK), 16 * device.sm_count), 1, 1),
        block=(SUM_BLOCK, 1, 1),
        constants=(
            launch.pack(problem, layout),
            np.int32(items),
            np.int32(_parts(problem, device)),
        ),
    )
    return multiply, add


def _multiply(problem: ConvProblem, device: Any, layout: Layout, partial: Strides | None) -> Launch:
    """The launch of the product; `partial` is the strides of one part, where the sum is split."""
    form, split = _form(problem), partial is not None
    index = index_type(problem, layout)
    tiles = _tiles(problem, index)
    tile = _cheapest(problem, device, layout.batch, tiles, split).tile
    channel_tiles = -(-problem.group_out_channels // tile.channels)
    pixel_tiles = -(-layout.batch * math.prod(problem.output) // tile.pixels)
    slices, part_slices = _slices(problem, device)
    parts = _parts(problem, device)
    y = layout.y if partial is None else partial

    p = launch.pack(problem, layout).copy()
    p["y_strides"] = [*y[:2], *[0] * (3 - problem.ndim), *y[2:]]
    tiling = np.zeros((), TILING)
    tiling["channel_tiles"] = launch.divisor(channel_tiles)
    tiling["pixel_tiles"] = launch.divisor(pixel_tiles)
    tiling["groups"] = launch.divisor(problem.groups)
    tiling["block"] = launch.divisor(_channel_block(problem))
    tiling["split_stride"] = layout.batch * math.prod(problem.y_shape[1:])
    tiling["depth"], tiling["slices"] = problem.reduction, slices
    tiling["part_slices"] = part_slices
    tiling["split_slices"] = part_slices if split else slices
    vector = 16 // problem.x_dtype.itemsize
    if layout.alignment == 16:
        tiling["w_vector"] = w_vector(problem, p, form != PACKED, vector)
        tiling["x_vector"] = form == VECTORS and x_vector(problem, layout, vector)
    columns = STORE_CHANNELS if problem.channels_last else STORE_PIXELS
    if partial is not None:
        vector = 16 // problem.accumulator.itemsize
        tiling["partial_vector"] = y_vector(problem, layout.batch, y, vector) == columns
    elif layout.alignment == 16:
        tiling["y_vector"] = y_vector(problem, layout.batch, y, vector) == columns
    p.flags.writeable = tiling.flags.writeable = False
    last = problem.channels_last
    macros = _macros(problem.x_dtype, _products(problem), form, last, tile, index)
    return Launch(
        kernel=device.load("implicit_gemm_mma", macros),
        grid=(channel_tiles * pixel_tiles * problem.groups * (parts if split else 1), 1, 1),
        block=(tile.threads, 1, 1),
        constants=(p, tiling),
        shared_bytes=_shared_bytes(problem, tile, not split and parts > 1),
    )


# ---- the order of a sum ----------------------------------------------------------------------


def _form(problem: ConvProblem) -> int:
    """How x is loaded; other strides than planned are read too, only slower."""
    if problem.group_in_channels % (16 // problem.x_dtype.itemsize):
        return PACKED
    return VECTORS if problem.channels_last else GATHER


def _tile_k(problem: ConvProblem) -> int:
    return _ROW_BYTES // problem.x_dtype.itemsize


def _channel_block(problem: ConvProblem) -> int:
    """Channels of one tap that follow each other in k.

    A slice's worth, where they divide evenly: then the taps of a pixel's channels are read one
    after the other, while they are in L1.
    """
    channels, tile_k = problem.group_in_channels, _tile_k(problem)
    return tile_k if channels % tile_k == 0 else channels


@lru_cache(maxsize=4096)
def _slices(problem: ConvProblem, device: Any) -> tuple[int, int]:
    """The slices of a sum, and of one of its parts. The batch has no say."""
    slices = -(-problem.reduction // _tile_k(problem))
    blocks = (
        problem.groups
        * -(-problem.group_out_channels // SMALL.channels)
        * -(-math.prod(problem.output) // SMALL.pixels)
    )
    wanted = min(2 * device.sm_count // blocks, problem.reduction // _PART_LENGTH, _MOST_PARTS)
    return slices, -(-slices // wanted) if wanted >= _FEWEST_PARTS else slices


def _parts(problem: ConvProblem, device: Any) -> int:
    slices, part_slices = _slices(problem, device)
    return -(-slices // part_slices)


def _images(problem: ConvProblem, device: Any) -> int:
    """How many images' parts fit the workspace."""
    limit = problem.workspace_within(_WORKSPACE)
    if problem.workspace_limit is not None and _packs(problem):
        limit -= filter_bytes(problem)
    return limit // (_parts(problem, device) * part_bytes(problem))


def _pass_images(problem: ConvProblem, device: Any) -> int:
    """The images of one pass of split sums."""
    return min(_images(problem, device), max(problem.batch, 1))


def _packs(problem: ConvProblem) -> bool:
    """Whether w is copied to have its channels innermost, like x's: it changes no sum's order."""
    if _form(problem) == PACKED or math.prod(problem.filter) == 1:
        return False
    limit = problem.workspace_limit
    return limit is None or filter_bytes(problem) <= limit


# ---- the tile --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    tile: Tile
    split: bool  # whether parts of sums have blocks of their own
    seconds: float


def _tiles(problem: ConvProblem, index: str = "int32") -> tuple[Tile, ...]:
    """The tiles that kernels are compiled for."""
    if index == "int64":
        return (SMALL,)
    return _TILES[problem.x_dtype.itemsize, _products(problem)][_form(problem)]


@lru_cache(maxsize=4096)
def _choose(problem: ConvProblem, device: Any, batch: int) -> _Choice:
    """The cheapest way; one that needs workspace only where the planned batch does, too."""
    whole = _cheapest(problem, device, batch, _tiles(problem), False)
    if _parts(problem, device) == 1 or not _images(problem, device):
        return whole
    if batch != problem.batch and not _choose(problem, device, problem.batch).split:
        return whole
    split = _cheapest(problem, device, batch, _tiles(problem), True)
    return min(whole, split, key=lambda choice: choice.seconds)


@lru_cache(maxsize=4096)
def _cheapest(
    problem: ConvProblem, device: Any, batch: int, tiles: tuple[Tile, ...], split: bool
) -> _Choice:
    total = not split and _parts(problem, device) > 1
    room = device.max_shared_bytes - _TAPS_BYTES
    fit = [t for t in tiles if _shared_bytes(problem, t, total) <= room]
    choices = [_Choice(t, split, _seconds(problem, device, t, batch, split)) for t in fit]
    return min(choices, key=lambda choice: choice.seconds)


def _shared_bytes(problem: ConvProblem, tile: Tile, total: bool) -> int:
    """Dynamic shared memory: the stages and, where a block adds up parts, their totals."""
    totals = tile.channels * tile.pixels * problem.accumulator.itemsize if total else 0
    return tile.stage_bytes + totals


def _resident(problem: ConvProblem, device: Any, tile: Tile, total: bool) -> int:
    """Blocks that share a multiprocessor."""
    sums = tile.channels * tile.pixels * problem.accumulator.itemsize // (4 * tile.threads)
    sums *= 2 if _products(problem) == 3 else 1
    registers = 256 if sums >= 128 else 168 if sums >= 64 else 128
    by_registers = int(device.registers_per_sm) // (registers * tile.threads)
    reserved = 1 << 10  # by the system, for every block
    shared = _shared_bytes(problem, tile, total) + reserved
    return max(1, min(by_registers, (int(device.max_shared_bytes) + reserved) // shared))


def _seconds(problem: ConvProblem, device: Any, tile: Tile, batch: int, split: bool) -> float:
    pixels = batch * math.prod(problem.output)
    parts = _parts(problem, device)
    slices, part_slices = _slices(problem, device)
    blocks = (
        (parts if split else 1)
        * problem.groups
        * -(-problem.group_out_channels // tile.channels)
        * -(-pixels // tile.pixels)
    )
    tile_k = _tile_k(problem)
    products = tile.channels * tile.pixels * tile_k / _rate(problem, device)
    loads = tile.pixels * tile_k / _LOAD_RATE[_form(problem)]
    # The taps of a pixel overlap in L1, if not all of them.
    fetched = tile.channels + tile.pixels / min(math.prod(problem.filter), _L1_REUSE)
    fetches = fetched * _ROW_BYTES / _L2_RATE
    # Four schedulers share a multiprocessor's rate; a block of two warps reaches half of it.
    alone = max(products, loads) * max(1.0, 128 / tile.threads) + _SLICE_CYCLES
    each = -(-blocks // device.sm_count)
    waves = -(-each // _resident(problem, device, tile, not split and parts > 1))
    length = part_slices if split else slices
    cycles = max(
        length * each * max(products / tile.efficiency, loads, fetches),
        waves * (length * alone + _BLOCK_CYCLES),
    )
    moved = problem.bytes_moved
    launches = rates.LAUNCH_SECONDS
    if split:
        moved += 2 * parts * batch * part_bytes(problem)
        launches *= 2
    return launches + float(max(cycles / device.clock_hz, moved / (_BANDWIDTH * device.bandwidth)))


def _rate(problem: ConvProblem, device: Any) -> float:
    """Multiply-adds of a multiprocessor per cycle."""
    if problem.x_dtype is dtypes.FLOAT64:
        return rates.mma_sync_per_cycle(device, "float64")
    if problem.x_dtype.is_half:
        return rates.mma_sync_per_cycle(device, "half")
    return rates.mma_sync_per_cycle(device, "tf32") / (1 if problem.precision == "tf32" else 3)


# ---- variants --------------------------------------------------------------------------------

_TYPES = (dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.FLOAT32, dtypes.FLOAT64)
# By the type's size and the products: three of them need registers for both parts of an element.
_TILES: dict[tuple[int, int], dict[int, tuple[Tile, ...]]] = {
    (2, 1): {
        VECTORS: (HUGE, LARGE, WIDE, MEDIUM, SMALL, NARROW),
        GATHER: (MEDIUM_8, SMALL, NARROW),
        PACKED: (SMALL,),
    },
    (4, 1): {VECTORS: (LARGE, MEDIUM, SMALL), GATHER: (MEDIUM_8, SMALL), PACKED: (SMALL,)},
    (4, 3): {VECTORS: (LARGE_8, MEDIUM_8, SMALL), GATHER: (MEDIUM_8, SMALL), PACKED: (SMALL,)},
    (8, 1): dict.fromkeys((VECTORS, GATHER, PACKED), (SMALL,)),
}


def _products(problem: ConvProblem) -> int:
    return 3 if problem.precision == "tf32x3" and problem.x_dtype is dtypes.FLOAT32 else 1


def _macros(dtype: DType, products: int, form: int, last: bool, tile: Tile, index: str) -> Macros:
    return {
        **launch.uniform_macros(dtype),
        "PRODUCTS": products,
        "INDEX_T": index,
        "LOAD": form,
        "CHANNELS_LAST": int(last),
        "TILE_M": tile.channels,
        "TILE_N": tile.pixels,
        "WARP_M": tile.warp_channels,
        "WARP_N": tile.warp_pixels,
        "STAGES": tile.stages,
    }


def variants() -> Iterator[tuple[str, Macros]]:
    """Per type and way to load: its tiles with int32, one with int64; few channels in both orders.

    float32 has them for one product and for three.
    """
    for dtype in _TYPES:
        for products in (1, 3) if dtype is dtypes.FLOAT32 else (1,):
            for form, last in ((VECTORS, True), (GATHER, False), (PACKED, False), (PACKED, True)):
                for tile in _TILES[dtype.itemsize, products][form]:
                    macros = _macros(dtype, products, form, last, tile, "int32")
                    yield "implicit_gemm_mma", macros
                macros = _macros(dtype, products, form, last, SMALL, "int64")
                yield "implicit_gemm_mma", macros
        # Those of split_sum and pack_filter are among implicit_gemm's.
