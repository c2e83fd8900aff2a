"""Convolution as a matrix product on tensor cores: implicit_gemm with mma.sync.

kernels_cuda/implicit_gemm_mma.cu. 16-bit floats with sums in float32; float32 where the problem's
precision is "tf32", or "tf32x3" in three products; float64.

What decides the order of a sum, and with it its bits: the memory order that is planned for, the
shapes, the workspace's limit and the device. The batch, the strides and the tile do not, nor which
block computes it: as many blocks run as the device holds at a time, and each goes through tiles.
Long sums of small images are sums of parts, always the same: a small batch has tiles for each part,
and split_sum.cu adds them up; in a large one a tile has all parts of its sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch, rates, split_sum
from gpuconv.cuda_backend.device import capability
from gpuconv.cuda_backend.implicit_gemm import (
    STORE_CHANNELS,
    STORE_PIXELS,
    bind_packed,
    contiguous_strides,
    dense,
    filter_bytes,
    index_type,
    multiples,
    packed_filter,
    part_bytes,
    part_size,
    pass_layouts,
    prepare_packing,
    w_vector,
    x_vector,
    y_vector,
)
from gpuconv.cuda_backend.launch import DIVISOR, Launch, Layout, Macros, Strides
from gpuconv.cuda_backend.occupancy import occupancy
from gpuconv.dtypes import DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

HALO_LAYOUT = np.dtype(
    [
        ("line", DIVISOR),
        ("phases", DIVISOR),
        ("rows", DIVISOR),
        ("planes", DIVISOR),
        ("row_stride", DIVISOR),
        ("plane_stride", DIVISOR),
        ("taps", np.int32),
        ("columns", np.int32),
        ("pitch", np.int32),
        ("buffer", np.int32),
        ("last_line", np.int32),
        ("last_column", np.int32),
        ("places", np.int32),
        ("loads", np.int32),
        ("bytes", np.int32),
        ("split_channels", np.int32),
    ],
    align=True,
)
TILING = np.dtype(
    [
        ("band", DIVISOR),
        ("pixel_tiles", DIVISOR),
        ("bands", DIVISOR),
        ("groups", DIVISOR),
        ("block", DIVISOR),
        ("split_stride", np.int64),
        ("tiles", np.int32),
        ("depth", np.int32),
        ("slices", np.int32),
        ("part_slices", np.int32),
        ("split_slices", np.int32),
        ("w_vector", np.int32),
        ("x_vector", np.int32),
        ("y_vector", np.int32),
        ("partial_vector", np.int32),
        ("halo", HALO_LAYOUT),
    ],
    align=True,
)
VECTORS, GATHER, PACKED, PIXELS, HALO = range(5)  # LOAD: how x is loaded
_ROW_BYTES = 64  # of a slice of k
_HALO_SIZES = (2, 4)  # of elements, in bytes
_HALO_LOADS = 3  # chunks that a thread can have under way during a slice


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

# Instructions that a warp issues, as counted in the machine code of sm_90a and rounded: of a slice,
# for each of its products, and for each 16 bytes of x that a thread loads element by element; for
# each pixel of a tile's halo once.
_SLICE_SLOTS, _PRODUCT_SLOTS = 100, 2.6
_CHUNK_SLOTS = {VECTORS: 0, GATHER: 67, PACKED: 112, PIXELS: 0, HALO: 62}
_PLACE_SLOTS = 120
_WARP_SLOTS = 4  # that a multiprocessor issues in a cycle
_PRODUCT_SIZE = {2: 16 * 8 * 16, 4: 16 * 8 * 8, 8: 8 * 8 * 4}  # multiply-adds, by element size
_L2_RATE = 24  # bytes that a multiprocessor gets from L2 in a cycle, while all others do
_L1_REUSE = 4  # how often x is read from L1 for once from L2, at most
_SLICE_CYCLES = 200  # of a slice beyond its products and instructions: the barrier, latencies
_START_CYCLES = 2000  # of a block before its first slice: the launch, the first loads' latency
_PLACE_CYCLES = 1000  # of a thread's pixel of the first halo: the latency of its loads
_STORE_CYCLES = 1000  # of a tile after its last slice, while the next tile's first ones are loaded
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
    """Tiles at their share of the tensor cores' rate, or memory where it is slower.

    The multiprocessor with the most tiles, n, takes the longest of: all their products, all their
    instructions, their bytes from L2, each at its full rate; and the ceil(n / blocks that
    fit) tiles of one block, each alone, waiting for its own barriers and stores. Loads run on from
    a block's tile to its next, so that only the first waits for them.
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
    problem, device, batch = plan.problem, plan.device, x.shape[0]
    if _packs(problem):
        w = packed_filter(problem, device, x, w, bias, out)
    images = _pass_images(problem, device) if _choose(problem, device, batch).split else batch
    for first in range(0, batch, images):
        arrays = x[first : first + images], w, bias, out[first : first + images]
        _bind(problem, device, *arrays)(*arrays)


def bind(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> Callable[..., None] | None:
    """What ``run`` does where it takes one pass over the images."""
    problem, device, batch = plan.problem, plan.device, x.shape[0]
    if _choose(problem, device, batch).split and batch > _pass_images(problem, device):
        return None
    if _packs(problem):
        return bind_packed(problem, device, _bind, x, w, bias, out)
    return _bind(problem, device, x, w, bias, out)


def _bind(
    problem: ConvProblem, device: Any, x: Any, w: Any, bias: Any, out: Any
) -> Callable[..., None]:
    layout = Layout(x, w, bias, out)
    if not _choose(problem, device, x.shape[0]).split:
        whole = prepare_whole(problem, device, layout)
        return lambda x, w, bias, out: whole(device, x, w, bias, out, None)
    multiply, add = prepare_split(problem, device, layout)
    size = _parts(problem, device) * x.shape[0] * part_size(problem)

    def call(x: Any, w: Any, bias: Any, out: Any) -> None:
        parts = device.empty((size,), problem.accumulator.numpy)
        multiply(device, x, w, None, None, parts)
        add(device, parts, bias, out)

    return call


def prepare(problem: ConvProblem, device: Any, layout: Layout) -> tuple[Launch, ...]:
    """All that ``run`` launches for contiguous arrays, loaded."""
    pack = prepare_packing(problem, device, layout) if _packs(problem) else None
    launches = [] if pack is None else [pack]
    split = _choose(problem, device, layout.batch).split
    images = _pass_images(problem, device) if split else layout.batch
    for each in pass_layouts(problem, layout, images):
        if _choose(problem, device, each.batch).split:
            launches += prepare_split(problem, device, each)
        else:
            launches.append(prepare_whole(problem, device, each))
    return tuple(launches)


@lru_cache(maxsize=1024)
def prepare_whole(problem: ConvProblem, device: Any, layout: Layout) -> Launch:
    """Everything of a launch but the arrays; a block computes all parts of its sums."""
    return _multiply(problem, device, layout, None)


@lru_cache(maxsize=1024)
def prepare_split(problem: ConvProblem, device: Any, layout: Layout) -> tuple[Launch, Launch]:
    """The two passes of a split sum: its parts to the workspace, and from there to y."""
    shape = (layout.batch, *problem.y_shape[1:])
    strides = contiguous_strides(shape, launch.channels_last(layout.y))
    multiply = _multiply(problem, device, layout, strides)
    p, parts = launch.pack(problem, layout), _parts(problem, device)
    return multiply, split_sum.prepare(device, problem.x_dtype, p, math.prod(shape), parts)


def _multiply(problem: ConvProblem, device: Any, layout: Layout, partial: Strides | None) -> Launch:
    """The launch of the product; `partial` is the strides of one part, where the sum is split."""
    split = partial is not None
    index = index_type(problem, layout)
    form = _form_of(problem, layout, index)
    choice = _cheapest(problem, device, layout.batch, form, index, split)
    form, tile = choice.form, choice.tile
    channel_tiles = -(-problem.group_out_channels // tile.channels)
    pixel_tiles = -(-layout.batch * math.prod(problem.output) // tile.pixels)
    slices, part_slices = _slices(problem, device)
    parts = _parts(problem, device)
    total = not split and parts > 1
    tiles = channel_tiles * pixel_tiles * problem.groups * (parts if split else 1)
    shared = _shared_bytes(problem, tile, layout.batch, form, total)
    resident = _resident(problem, device, tile, form, index, shared)
    running = min(tiles, resident * device.sm_count)
    band = _band(problem, device, tile, channel_tiles, running)
    y = layout.y if partial is None else partial

    p = launch.pack(problem, layout).copy()
    p["y_strides"] = [*y[:2], *[0] * (3 - problem.ndim), *y[2:]]
    tiling = np.zeros((), TILING)
    tiling["band"] = launch.divisor(band)
    tiling["bands"] = launch.divisor(channel_tiles // band)
    tiling["pixel_tiles"] = launch.divisor(pixel_tiles)
    tiling["groups"] = launch.divisor(problem.groups)
    tiling["block"] = launch.divisor(_channel_block(problem))
    tiling["split_stride"] = layout.batch * math.prod(problem.y_shape[1:])
    tiling["tiles"] = tiles
    tiling["depth"], tiling["slices"] = problem.reduction, slices
    tiling["part_slices"] = part_slices
    tiling["split_slices"] = part_slices if split else slices
    vector = 16 // problem.x_dtype.itemsize
    if layout.alignment == 16:
        tiling["w_vector"] = w_vector(problem, p, form in (VECTORS, GATHER, HALO), vector)
        tiling["x_vector"] = form == VECTORS and x_vector(problem, layout, vector)
    if form == PIXELS:
        tiling["x_vector"] = _pixel_bytes(problem, layout) == 16
    if form == HALO:
        _fill_halo(tiling, problem, _halo(problem, tile, layout.batch))
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
        grid=(running, 1, 1),
        block=(tile.threads, 1, 1),
        constants=(p, tiling),
        shared_bytes=shared,
    )


def _band(problem: ConvProblem, device: Any, tile: Tile, channel_tiles: int, running: int) -> int:
    """Channel tiles that follow each other before the next pixels do: a divisor of all.

    All of them where the L2 cache keeps w, so that x comes from memory once. Else what runs at a
    time is to be nearly a square of outputs, which reads the least of both.
    """
    if 2 * filter_bytes(problem) // problem.groups <= device.l2_bytes:
        return channel_tiles
    square = max(math.sqrt(running * tile.pixels / tile.channels), 1.0)
    bands = (n for n in range(1, min(channel_tiles, int(square**2)) + 1) if channel_tiles % n == 0)
    return min(bands, key=lambda n: max(n / square, square / n))


# ---- the order of a sum ----------------------------------------------------------------------


def _form(problem: ConvProblem) -> int:
    """How x is loaded where its memory is as planned."""
    return PIXELS if _in_place(problem) else _general_form(problem)


def _form_of(problem: ConvProblem, layout: Layout, index: str) -> int:
    """The same for memory as it is. It changes no bit."""
    if _in_place(problem) and index == "int32" and _pixel_bytes(problem, layout):
        return PIXELS
    return _general_form(problem)


def _general_form(problem: ConvProblem) -> int:
    """A form that reads any memory, only slower where it is not as planned."""
    if problem.group_in_channels % (16 // problem.x_dtype.itemsize):
        return PACKED
    return VECTORS if problem.channels_last else GATHER


def _forms(problem: ConvProblem, form: int, index: str) -> tuple[int, ...]:
    """Those that read the same memory in the same order, `form` among them."""
    if form == GATHER and index == "int32" and _blocks_of_taps(problem):
        return GATHER, HALO
    return (form,)


def _blocks_of_taps(problem: ConvProblem) -> bool:
    """Whether slices of planes are taps of a channel block: all of them, then the next block's."""
    return (
        problem.x_dtype.itemsize in _HALO_SIZES
        and not problem.channels_last
        and math.prod(problem.filter) > 1
        and problem.group_in_channels % _tile_k(problem) == 0
    )


def _in_place(problem: ConvProblem) -> bool:
    """Whether neighbouring pixels of a plane of x make neighbouring pixels of y, 8 bytes of them.

    ldmatrix turns elements of 16 bits alone.
    """
    return (
        problem.x_dtype.is_half
        and not problem.channels_last
        and math.prod(problem.filter) == 1
        and set(problem.stride) == {1}
        and problem.output == problem.input
        and not any(problem.pad_lo)
        and math.prod(problem.input) % 4 == 0
    )


def _pixel_bytes(problem: ConvProblem, layout: Layout) -> int:
    """Bytes of neighbouring pixels of x that can be copied at once: 16, 8 or none."""
    pixels, extents = math.prod(problem.input), (layout.batch, problem.in_channels)
    for size in (16, 8) if dense(layout.x[2:], problem.input) else ():
        vector = size // problem.x_dtype.itemsize
        whole = pixels % vector == 0 and multiples(layout.x[:2], extents, vector)
        if whole and layout.alignment >= size:
            return size
    return 0


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
    if wanted < _FEWEST_PARTS:
        return slices, slices
    part_slices = -(-slices // wanted)
    if _blocks_of_taps(problem):
        taps = math.prod(problem.filter)
        whole = -(-part_slices // taps) * taps
        if -(-slices // whole) >= _FEWEST_PARTS:
            part_slices = whole
    return slices, part_slices


def _parts(problem: ConvProblem, device: Any) -> int:
    slices, part_slices = _slices(problem, device)
    return -(-slices // part_slices)


def _images(problem: ConvProblem, device: Any) -> int:
    """How many images' parts fit the workspace."""
    limit = _WORKSPACE
    if problem.workspace_limit is not None:
        packed = filter_bytes(problem) if _packs(problem) else 0  # which fits
        limit = min(limit, problem.workspace_limit - packed)
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


# ---- what the taps of a tile read ------------------------------------------------------------


@dataclass(frozen=True)
class Halo:
    """What a tile reads of x, in shared memory: kernels_cuda/implicit_gemm_halo.cuh explains it."""

    phases: int
    rows: int
    planes: int
    taps: int
    columns: int
    buffer: int
    last_line: int
    last_column: int
    places: int
    threads: int

    @property
    def pitch(self) -> int:
        return self.columns + self.columns % 2

    @property
    def line(self) -> int:
        return _lanes(self.columns)

    @property
    def loads(self) -> int:
        """Chunks that a thread loads during a slice, to have all of them in a block's slices."""
        return -(-self.places * (_ROW_BYTES // 16) // self.taps)

    @property
    def bytes(self) -> int:
        found = 2 * self.buffer * _ROW_BYTES + 8 * (self.places * self.threads + self.taps)
        return -(-found // 16) * 16


def _lanes(columns: int) -> int:
    return -(-columns // 8) * 8


@lru_cache(maxsize=4096)
def _halo(problem: ConvProblem, tile: Tile, batch: int) -> Halo | None:
    """That of a tile, or None where it is too much to load during a block's slices."""
    z, p, q = _three(problem.output)
    sd, sh, sw = _three(problem.stride)
    reach = [
        dilation * (taps - 1)
        for dilation, taps in zip(_three(problem.dilation), _three(problem.filter), strict=True)
    ]
    planes, rows = (z - 1) * sd + reach[0] + 1, (p - 1) * sh + reach[1] + 1
    columns = q + reach[2] // sw
    last_line = (reach[0] * rows + reach[1]) * sw + sw - 1
    # The most rows, planes and images that a tile can pass on to: its first pixel is a multiple of
    # as many as it has.
    steps = min(tile.pixels, batch * z * p * q) - 1
    row_steps, plane_steps, image_steps = (
        min((extent - math.gcd(extent, tile.pixels) + steps) // extent, batch * others - 1)
        for extent, others in ((q, z * p), (p * q, z), (z * p * q, 1))
    )
    lines = (
        row_steps * sh
        + plane_steps * max(sd * rows - p * sh, 0)
        + image_steps * max((planes - z * sd) * rows, 0)
    ) * sw + last_line

    def pixels(line: int) -> int:
        """From the first to the last, in lines of so many."""
        return steps - row_steps * q + lines * line + reach[2] // sw + 1

    places = -(-(pixels(_lanes(columns)) + 7) // tile.threads)
    halo = Halo(
        phases=sw, rows=rows, planes=planes, taps=math.prod(problem.filter), columns=columns,
        buffer=-(-(pixels(columns + columns % 2) + 2) // 2) * 2, last_line=last_line,
        last_column=reach[2] // sw, places=places, threads=tile.threads,
    )  # fmt: skip
    counted = (batch * planes * rows * sw + last_line) * halo.line + places * tile.threads
    return halo if halo.loads <= _HALO_LOADS and counted < 2**31 else None


def _halo_serves(problem: ConvProblem, device: Any, tile: Tile, batch: int, split: bool) -> bool:
    """Whether it is of a bearable size, and a block of all taps or none in a part of its own."""
    whole = _slices(problem, device)[1] % math.prod(problem.filter) == 0
    return _halo(problem, tile, batch) is not None and (whole or not split)


def _three(extents: tuple[int, ...]) -> tuple[int, int, int]:
    z, p, q = (1, 1, *extents)[-3:]
    return z, p, q


def _fill_halo(tiling: Any, problem: ConvProblem, halo: Halo | None) -> None:
    assert halo is not None  # or it would not have been chosen
    layout = tiling["halo"]
    layout["plane_stride"], layout["row_stride"], _ = map(launch.divisor, _three(problem.stride))
    for field in ("line", "phases", "rows", "planes"):
        layout[field] = launch.divisor(getattr(halo, field))
    for field in (
        "taps", "columns", "pitch", "buffer", "last_line", "last_column", "places", "loads",
        "bytes",
    ):  # fmt: skip
        layout[field] = getattr(halo, field)
    layout["split_channels"] = tiling["split_slices"] // halo.taps * _tile_k(problem)


# ---- the tile --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    form: int
    tile: Tile
    split: bool  # whether parts of sums have blocks of their own
    seconds: float
    busy: float  # the multiprocessors' part of them: the fewer the better where memory decides


def _tiles(problem: ConvProblem, form: int, index: str) -> tuple[Tile, ...]:
    """The tiles that kernels are compiled for."""
    if index == "int64":
        return (SMALL,)
    return _TILES[problem.x_dtype.itemsize, _products(problem)][form]


@lru_cache(maxsize=4096)
def _choose(problem: ConvProblem, device: Any, batch: int) -> _Choice:
    """The cheapest way; one that needs workspace only where the planned batch does, too."""
    form = _form(problem)
    whole = _cheapest(problem, device, batch, form, "int32", False)
    if _parts(problem, device) == 1 or not _images(problem, device):
        return whole
    if batch != problem.batch and not _choose(problem, device, problem.batch).split:
        return whole
    split = _cheapest(problem, device, batch, form, "int32", True)
    return min(whole, split, key=lambda choice: choice.seconds)


@lru_cache(maxsize=4096)
def _cheapest(
    problem: ConvProblem, device: Any, batch: int, form: int, index: str, split: bool
) -> _Choice:
    total = not split and _parts(problem, device) > 1
    room = device.max_shared_bytes - _taps_bytes(problem, form, index)
    choices = [
        _Choice(each, tile, split, *_seconds(problem, device, tile, batch, each, index, split))
        for each in _forms(problem, form, index)
        for tile in _tiles(problem, each, index)
        if each != HALO or _halo_serves(problem, device, tile, batch, split)
        if _shared_bytes(problem, tile, batch, each, total) <= room
    ]
    return min(choices, key=lambda choice: (choice.seconds, choice.busy))


def _shared_bytes(problem: ConvProblem, tile: Tile, batch: int, form: int, total: bool) -> int:
    """Dynamic shared memory: the stages, a halo and, where a block adds up parts, their totals."""
    stages = tile.stage_bytes
    if form == HALO and (halo := _halo(problem, tile, batch)):
        # Of w alone, with room for the rows of all warps at the end.
        room = tile.threads // 32 * 8 * tile.warp_pixels * problem.accumulator.itemsize
        stages = tile.stages * max(tile.channels * _ROW_BYTES, room) + halo.bytes
    totals = tile.channels * tile.pixels * problem.accumulator.itemsize if total else 0
    return stages + totals


def _taps_bytes(problem: ConvProblem, form: int, index: str) -> int:
    """Static shared memory: two slices' taps, of five indices each, at most.

    NVIDIA's compiler leaves what is used: of `pixels` none, of `halo` the fifth that is w's.
    """
    taps = _tile_k(problem) if form == PACKED else 4
    return 2 * taps * 5 * (8 if index == "int64" else 4)


def _resident(
    problem: ConvProblem, device: Any, tile: Tile, form: int, index: str, shared: int
) -> int:
    """Blocks that share a multiprocessor, each with the registers of the kernel's REGISTERS.

    But for what the kernel allows more where shared memory decides: before sm_80, and of `packed`
    on sm_86 and sm_89. `shared`: the dynamic part of a block's shared memory.
    """
    sums = tile.channels * tile.pixels * problem.accumulator.itemsize // (4 * tile.threads)
    sums *= 2 if _products(problem) == 3 else 1
    wide = index == "int64"
    registers = 255 if sums >= (64 if wide else 128) else 168 if sums >= 64 or wide else 128
    shared += _taps_bytes(problem, form, index)
    return max(occupancy(device.arch, tile.threads, registers, shared).blocks, 1)


def _seconds(
    problem: ConvProblem, device: Any, tile: Tile, batch: int, form: int, index: str, split: bool
) -> tuple[float, float]:
    """Of a choice: in all, and of the multiprocessors."""
    pixels = batch * math.prod(problem.output)
    parts = _parts(problem, device)
    slices, part_slices = _slices(problem, device)
    tiles = (
        (parts if split else 1)
        * problem.groups
        * -(-problem.group_out_channels // tile.channels)
        * -(-pixels // tile.pixels)
    )
    tile_k = _tile_k(problem)
    products = tile.channels * tile.pixels * tile_k / _rate(problem, device)
    halo = _halo(problem, tile, batch) if form == HALO else None
    # The taps of a pixel overlap in L1, if not all of them.
    loaded: float = tile.pixels
    fetched = loaded / min(math.prod(problem.filter), _L1_REUSE)
    if halo:
        loaded = fetched = halo.places * halo.threads / halo.taps
    fetches = (tile.channels + fetched) * _ROW_BYTES / _L2_RATE
    of_warp = tile.warp_channels * tile.warp_pixels * tile_k * _products(problem)
    length = part_slices if split else slices
    issued = (
        _SLICE_SLOTS
        + _PRODUCT_SLOTS * of_warp / _PRODUCT_SIZE[problem.x_dtype.itemsize]
        + _CHUNK_SLOTS[form] * loaded * (_ROW_BYTES // 16) / tile.threads
        + (_PLACE_SLOTS * halo.places / length if halo else 0)
    ) * (tile.threads / 32 / _WARP_SLOTS)
    # Four schedulers share a multiprocessor's rate; a block of two warps reaches half of it.
    alone = max(products, issued) * max(1.0, 128 / tile.threads) + _SLICE_CYCLES
    most = -(-tiles // device.sm_count)
    total = not split and parts > 1
    shared = _shared_bytes(problem, tile, batch, form, total)
    walked = -(-most // _resident(problem, device, tile, form, index, shared))
    start = _START_CYCLES + (_PLACE_CYCLES * halo.places if halo else 0)
    cycles = start + max(
        length * most * max(products / tile.efficiency, issued, fetches),
        walked * (length * alone + _STORE_CYCLES),
    )
    moved = problem.bytes_moved
    launches = rates.LAUNCH_SECONDS
    if split:
        moved += 2 * parts * batch * part_bytes(problem)
        launches *= 2
    busy = float(cycles / device.clock_hz)
    return launches + max(busy, float(moved / (_BANDWIDTH * device.bandwidth))), busy


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
        PIXELS: (HUGE, LARGE, WIDE, MEDIUM, SMALL, NARROW),
        HALO: (LARGE, LARGE_8, WIDE, MEDIUM, SMALL, NARROW),
    },
    (4, 1): {
        VECTORS: (LARGE, MEDIUM, SMALL),
        GATHER: (MEDIUM_8, SMALL),
        PACKED: (SMALL,),
        HALO: (LARGE, MEDIUM, SMALL),
    },
    (4, 3): {
        VECTORS: (LARGE_8, MEDIUM_8, SMALL),
        GATHER: (MEDIUM_8, SMALL),
        PACKED: (SMALL,),
        HALO: (LARGE_8, MEDIUM_8, SMALL),
    },
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

    float32 has them for one product and for three. Pixels are copied with int32 alone.
    """
    for dtype in _TYPES:
        for products in (1, 3) if dtype is dtypes.FLOAT32 else (1,):
            for form, last in ((VECTORS, True), (GATHER, False), (PACKED, False), (PACKED, True)):
                for tile in _TILES[dtype.itemsize, products][form]:
                    macros = _macros(dtype, products, form, last, tile, "int32")
                    yield "implicit_gemm_mma", macros
                macros = _macros(dtype, products, form, last, SMALL, "int64")
                yield "implicit_gemm_mma", macros
            if dtype.itemsize in _HALO_SIZES:
                for tile in _TILES[dtype.itemsize, products][HALO]:
                    macros = _macros(dtype, products, HALO, False, tile, "int32")
                    yield "implicit_gemm_mma", macros
        if dtype.is_half:
            for tile in _TILES[dtype.itemsize, 1][PIXELS]:
                yield "implicit_gemm_mma", _macros(dtype, 1, PIXELS, False, tile, "int32")
        # Those of split_sum and pack_filter are among implicit_gemm's.
