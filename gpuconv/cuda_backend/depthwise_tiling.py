"""How depthwise cuts a problem into blocks: variants of the kernels, tiles, shared memory.

Nothing here changes a bit of a result: every output's sum has one order, whatever its tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch
from gpuconv.cuda_backend.launch import DIVISOR, Layout, Macros
from gpuconv.dtypes import DType
from gpuconv.problem import ConvProblem

TYPES = (dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.FLOAT32, dtypes.FLOAT64)
FILTERS = (3, 5, 7)  # square filters whose taps are held in registers

STORE_ELEMENTS, STORE_VECTORS, STORE_ROWS, STORE_PLANES = range(4)  # depthwise.cu

_STATIC_SHARED = 256 * (8 + 8 + 4)  # depthwise.cu's list of planes, 64-bit
_SHARED_AIM = 40 << 10  # of one block, so that several share a multiprocessor
_WARPS = 8  # of "long", channels last, that keep a multiprocessor busy: each has 32 sums at once
_FILTERS_SHARED = 16 << 10  # for the filters of a block that has several per channel
_LOAD = 8  # what a byte of x costs, in multiply-adds, mostly on its way from the L2 cache
_BANKS = 128  # bytes that shared memory reads at once


def struct(divisors: Sequence[str], integers: Sequence[str]) -> np.dtype[Any]:
    """A kernel's struct: its divisors, then its integers."""
    fields = [(name, DIVISOR) for name in divisors] + [(name, np.int32) for name in integers]
    return np.dtype(fields, align=True)


# struct Tile of depthwise.cu and of depthwise_channels_last.cu.
TILE = struct(
    (
        "tile_columns", "tile_rows", "channel_tiles", "strips", "planes", "input_rows",
        "in_channels",
    ),
    (
        "segments", "segment_rows", "channels", "pitch", "plane_pitch", "filter_pitch",
        "stage_pitch", "weights_at", "stage_at", "fill_shift", "pairs", "store",
    ),
)  # fmt: skip
TILE_CHANNELS_LAST = struct(
    (
        "tile_columns", "tile_rows", "channel_tiles", "channel_blocks", "strips", "lanes", "units",
        "columns",
    ),
    (
        "segments", "segment_rows", "channels", "multiplier", "unit", "pixel_pitch", "row_pitch",
        "filter_pitch", "weights_at", "input_rows", "vectors",
    ),
)  # fmt: skip


def struct_of(dtype: np.dtype[Any], **values: Any) -> Any:
    """The struct, passed by value; it is shared by all calls with the same strides."""
    result = np.zeros((), dtype)
    for name, value in values.items():
        result[name] = launch.divisor(value) if dtype[name] == DIVISOR else value
    result.flags.writeable = False
    return result


@dataclass(frozen=True)
class Blocks:
    """How a launch is cut up."""

    tile: Any  # the kernel's struct Tile
    count: int
    threads: int
    shared_bytes: int


# ---- variants --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Base:
    """One variant of a kernel, by what it is specialised in."""

    name: str  # "unrolled" (one small filter), "long" (any filter, stride 1) or "any"
    dtype: DType
    filter: int  # 3, 5, 7; 0: the problem's own
    stride: int  # 1, 2; 0: the problem's own, and its dilation
    index: str

    @classmethod
    def of(cls, problem: ConvProblem, index: str) -> Self:
        """The fastest variant that serves the problem."""
        dtype, stride = problem.x_dtype, problem.stride[-1]
        plain = (
            index == "int32" and set(problem.dilation) == {1} and set(problem.stride) == {stride}
        )
        if plain and problem.ndim == 2 and stride in (1, 2):
            filter = problem.filter[0]
            if filter in FILTERS and filter == problem.filter[1]:
                return cls("unrolled", dtype, filter, stride, index)
        if plain and stride == 1:
            return cls("long", dtype, 0, 1, index)
        return cls("any", dtype, 0, 0, index)

    def _macros(self) -> Macros:
        return {
            **launch.uniform_macros(self.dtype),
            "INDEX_T": self.index,
            "FILTER_R": self.filter,
            "FILTER_S": self.filter,
            "STRIDE": self.stride,
        }


class Variant(Protocol):
    """What the two layouts have in common."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def strip(self) -> int: ...
    @property
    def segment(self) -> int: ...
    @property
    def macros(self) -> Macros: ...
    def smallest_tile(self, problem: ConvProblem) -> int: ...


@dataclass(frozen=True)
class Planes(_Base):
    """A variant of depthwise.cu."""

    stem: ClassVar[str] = "depthwise"
    threads: ClassVar[int] = 256  # of a block at most; so many planes, too

    @property
    def strip(self) -> int:
        """Columns of y per thread: 16 bytes of x to the next thread's, or 8 of 16-bit types."""
        if self.name == "any":
            return 1
        return 4 if self.dtype.is_half else 16 // self.dtype.itemsize // self.stride

    @property
    def segment(self) -> int:
        """Rows of y per thread."""
        return 4 if self.dtype is dtypes.FLOAT64 else 8

    @property
    def blocks(self) -> int:
        """Of a multiprocessor at least: as many as its registers allow without a spill."""
        if self.dtype is dtypes.FLOAT64:
            return {3: 2, 5: 2, 7: 1, 0: 2}[self.filter]
        return 2 if self.name == "long" else {3: 3, 5: 2, 7: 2, 0: 3}[self.filter]

    @property
    def chunk(self) -> int:
        """Elements of x in one load."""
        return 1 if self.name == "any" else self.strip * self.stride

    @property
    def taps(self) -> int:
        """Taps of a row that "long" takes at once."""
        return 2 if self.dtype is dtypes.FLOAT64 else 4

    @property
    def macros(self) -> Macros:
        return {
            **self._macros(),
            "STRIP": self.strip,
            "SEGMENT": self.segment,
            "BLOCKS": self.blocks,
        }

    def smallest_tile(self, problem: ConvProblem) -> int:
        extents = _Extents(problem)
        strips = min(32, -(-extents.output[1] // self.strip))
        cut = _Cut(strips=strips, segments=1, segment_rows=1, tile_columns=1, tile_rows=1)
        return _PlaneMemory(extents, self, cut).shared_bytes() + _STATIC_SHARED + 4096


@dataclass(frozen=True)
class ChannelsLast(_Base):
    """A variant of depthwise_channels_last.cu."""

    stem: ClassVar[str] = "depthwise_channels_last"

    @property
    def strip(self) -> int:
        """Columns of y per thread: of "long", the sums of a row that a tap serves once loaded."""
        return 8 if self.name == "long" else 4

    @property
    def segment(self) -> int:
        """Rows of y per thread: what its taps, in pairs or not, leave registers for."""
        if self.name == "long":
            return 4 if self.dtype is dtypes.FLOAT32 else 2
        if self.dtype is dtypes.FLOAT64 or (self.dtype.is_half and self.stride == 2):
            return 2
        return 3 if self.dtype.is_half and self.filter == 7 else 4

    @property
    def vec(self) -> int:
        """Channels per thread: a whole bank of shared memory."""
        return 2 if self.dtype.is_half else 1

    @property
    def taps(self) -> int:
        """Taps of a row in one load of w: "long" takes 16 bytes of them."""
        if self.name != "long":
            return 1
        return 4 if self.dtype is dtypes.FLOAT32 else 2

    @property
    def threads(self) -> int:
        """Of a block at most: fewer where the taps take many registers."""
        return 128 if self.filter > 3 else 256

    @property
    def blocks(self) -> int:
        """Of a multiprocessor at least. ptxas spills where it is left fewer registers than this."""
        return 2

    @property
    def macros(self) -> Macros:
        return {
            **self._macros(),
            "STRIP": self.strip,
            "SEGMENT": self.segment,
            "VEC": self.vec,
            "THREADS": self.threads,
            "BLOCKS": self.blocks,
        }

    def smallest_tile(self, problem: ConvProblem) -> int:
        cut = _Cut(strips=1, segments=1, segment_rows=1, tile_columns=1, tile_rows=1)
        channels = min(round_up(problem.in_channels, 16 // self.dtype.itemsize), 32)
        memory = _PixelMemory(_Extents(problem), self, cut, channels)
        return memory.shared_bytes() + _STATIC_SHARED + 4096


# ---- cuts ------------------------------------------------------------------------------------


class _Extents:
    """The extents of a problem as two axes."""

    def __init__(self, problem: ConvProblem) -> None:
        def two(values: tuple[int, ...], fill: int) -> tuple[int, int]:
            return (fill, values[0]) if len(values) == 1 else (values[0], values[1])

        self.output = two(problem.output, 1)
        self.filter = two(problem.filter, 1)
        self.stride = two(problem.stride, 1)
        self.dilation = two(problem.dilation, 1)
        self.multiplier = problem.group_out_channels
        self.in_channels = problem.in_channels
        self.size = problem.x_dtype.itemsize
        self.sum_size = problem.accumulator.itemsize

    @property
    def taps(self) -> int:
        return self.filter[0] * self.filter[1]

    def span(self, axis: int) -> int:
        """Elements of x from a window's first to behind its last."""
        return (self.filter[axis] - 1) * self.dilation[axis] + 1


@dataclass(frozen=True)
class _Cut:
    """tile_columns x tile_rows tiles of strips x segments, of `planes` planes at once."""

    strips: int
    segments: int
    segment_rows: int
    tile_columns: int
    tile_rows: int
    planes: int = 1

    @property
    def tiles(self) -> int:
        return self.tile_columns * self.tile_rows

    def rows(self, extents: _Extents) -> int:
        """Rows of y in a tile."""
        return min(self.segments * self.segment_rows, extents.output[0])

    def input_rows(self, extents: _Extents) -> int:
        """Rows of x that they see."""
        return (self.rows(extents) - 1) * extents.stride[0] + extents.span(0)


def _cuts(extents: _Extents, strip: int, segment: int, items: int) -> Iterator[_Cut]:
    """Every sensible way to cut y into tiles of at most `items` strips by segments."""
    all_strips = -(-extents.output[1] // strip)
    all_segments = -(-extents.output[0] // segment)
    rows = -(-extents.output[0] // all_segments)
    all_segments = -(-extents.output[0] // rows)
    seen = set()
    for widest in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        columns = -(-all_strips // widest)
        strips = -(-all_strips // columns)
        if strips > items or strips in seen:
            continue
        seen.add(strips)
        for tall in range(1, min(all_segments, items // strips) + 1):
            down = -(-all_segments // tall)
            if -(-all_segments // down) == tall:
                yield _Cut(strips, tall, rows, columns, down)
    if rows > 1:  # where a filter is tall, no more than one row may fit
        for widest in (1, 8, 32):
            strips = min(widest, items, all_strips)
            yield _Cut(strips, 1, 1, -(-all_strips // strips), extents.output[0])


def _more_planes(cuts: Iterable[_Cut], items: int, all_planes: int) -> Iterator[_Cut]:
    """The same, and where a tile holds a whole plane, several of them."""
    for cut in cuts:
        yield cut
        if cut.tiles == 1:
            for planes in range(2, min(items // (cut.strips * cut.segments), all_planes) + 1):
                yield _Cut(cut.strips, cut.segments, cut.segment_rows, 1, 1, planes)


# ---- planes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PlaneMemory:
    """What a cut takes in shared memory; pitches may grow a little to keep banks apart."""

    extents: _Extents
    variant: Planes
    cut: _Cut

    def pitch(self) -> int:
        """Elements of a row of x: whatever any thread's loads reach."""
        variant, filter = self.variant, self.extents.filter[1]
        early = int(variant.dtype.is_half)  # a tile may begin a column early
        if variant.name == "any":
            last = (self.cut.strips - 1) * self.extents.stride[1]
            return round_up(last + self.extents.span(1) + early, 1 + early)
        if variant.name == "long":
            last = (filter - 1) // variant.taps * variant.taps
            reach = last + round_up(variant.strip + variant.taps - 1 + early, variant.chunk)
        else:
            reach = round_up((variant.strip - 1) * variant.stride + filter + early, variant.chunk)
        return (self.cut.strips - 1) * variant.chunk + reach

    def filter_pitch(self) -> int:
        """Of w, from plane to plane: odd in banks, so that lanes on several do not collide."""
        height, width = self.extents.filter
        if self.variant.name == "long":
            return (height * -(-width // self.variant.taps) | 1) * self.variant.taps
        return height * width | 1

    def shared_bytes(self) -> int:
        x = self.cut.input_rows(self.extents) * self.pitch() * self.extents.size
        return self.cut.planes * (x + self.filter_pitch() * self.extents.sum_size)


def _best_plane_cut(extents: _Extents, variant: Planes, all_planes: int, device: Any) -> _Cut:
    """The cut with the least work: of whole warps on sums, of loads with their halo, of blocks."""
    limit = _dynamic_shared(device)
    best, least = None, math.inf
    cuts = _cuts(extents, variant.strip, variant.segment, variant.threads)
    for cut in _more_planes(cuts, variant.threads, all_planes):
        memory = _PlaneMemory(extents, variant, cut)
        shared = memory.shared_bytes()
        if shared > limit:
            continue
        threads = round_up(cut.strips * cut.segments * cut.planes, 32)
        outputs = threads * variant.strip * cut.segment_rows * extents.multiplier
        loads = cut.planes * cut.input_rows(extents) * memory.pitch()
        blocks = -(-all_planes // cut.planes) * cut.tiles
        work = _balanced(
            outputs * (extents.taps + 4) + _LOAD * loads * extents.size + 4000,
            blocks,
            shared / _SHARED_AIM,
            device.sm_count,
        )
        if work < least:
            best, least = cut, work
    assert best is not None, "supports has refused what fits nowhere"
    return best


def _balanced(work: float, blocks: int, few: float, sm_count: int) -> float:
    """Of all blocks: too few leave multiprocessors idle, too large ones little to overlap with.

    `few`: by how much too few share a multiprocessor, where it is more than 1.
    """
    return work * max(blocks, 2 * sm_count) * max(1.0, few)


def tile_planes(problem: ConvProblem, variant: Planes, layout: Layout, device: Any) -> Blocks:
    """The blocks of depthwise.cu."""
    extents = _Extents(problem)
    all_planes = layout.batch * problem.in_channels
    cut = _best_plane_cut(extents, variant, all_planes, device)
    memory = _PlaneMemory(extents, variant, cut)
    size, chunk, planes = extents.size, variant.chunk, cut.planes
    step = extents.stride[1] if variant.name == "any" else 1  # chunks from strip to strip

    # A plane's or segment's first strip lies in the banks behind its predecessor's last, if there
    # is room for that.
    limit = _dynamic_shared(device)
    input_rows = cut.input_rows(extents)
    pitch = memory.pitch()
    plane_pitch = input_rows * pitch
    filter_bytes = planes * memory.filter_pitch() * extents.sum_size
    if cut.segments > 1:
        down = cut.segment_rows * extents.stride[0]
        wider = _raise(pitch, down, cut.strips * planes * step, chunk, size, pitch // 4)
        if planes * input_rows * wider * size + filter_bytes <= limit:
            pitch, plane_pitch = wider, input_rows * wider
    if planes > 1 and planes * (plane_pitch * size + _BANKS) + filter_bytes <= limit:
        plane_pitch = _raise(plane_pitch, 1, cut.strips * step, chunk, size, _BANKS // size)

    # y goes over x; with other output channels still to be made of x, behind the filters.
    store = _store(problem, variant, layout, cut)
    rows, stage_pitch = cut.rows(extents), cut.strips * variant.strip
    if store >= STORE_ROWS and planes > 1:
        stage_pitch = _raise(stage_pitch, rows, cut.strips, variant.strip, size, stage_pitch // 2)
    stage_bytes = planes * rows * stage_pitch * size if store >= STORE_ROWS else 0
    weights_at = round_up(planes * plane_pitch * size, 16)
    tiles = -(-all_planes // planes) * cut.tiles
    channels = _channels_of_a_block(
        extents, filter_bytes, tiles, limit - weights_at - stage_bytes - 16, device
    )
    shared_bytes = weights_at + channels * filter_bytes
    stage_at = 0 if channels == 1 else round_up(shared_bytes, 16)
    if store >= STORE_ROWS:
        shared_bytes = max(shared_bytes, stage_at + stage_bytes)

    x_shape = (layout.batch, *problem.x_shape[1:])
    pairs = variant.dtype.is_half and in_units(x_shape, layout.x, layout, 2, size)
    threads = round_up(cut.strips * cut.segments * planes, 32)
    tile = struct_of(
        TILE,
        tile_columns=cut.tile_columns,
        tile_rows=cut.tile_rows,
        channel_tiles=-(-extents.multiplier // channels),
        strips=cut.strips,
        planes=planes,
        input_rows=input_rows,
        in_channels=problem.in_channels,
        segments=cut.segments,
        segment_rows=cut.segment_rows,
        channels=channels,
        pitch=pitch,
        plane_pitch=plane_pitch,
        filter_pitch=memory.filter_pitch(),
        stage_pitch=stage_pitch,
        weights_at=weights_at,
        stage_at=stage_at,
        fill_shift=_fill_shift(pitch // (2 if pairs else 1), input_rows * planes, threads),
        pairs=int(pairs),
        store=store,
    )
    return Blocks(tile, tiles * -(-extents.multiplier // channels), threads, shared_bytes)


def _channels_of_a_block(
    extents: _Extents, filter_bytes: int, tiles: int, room: int, device: Any
) -> int:
    """How many output channels of each input channel one block makes of its tile."""
    channels = max(1, min(extents.multiplier, min(_FILTERS_SHARED, room) // filter_bytes))
    while channels > 1 and tiles * -(-extents.multiplier // channels) < 2 * device.sm_count:
        channels = -(-channels // 2)
    return channels


def _fill_shift(units: int, rows: int, threads: int) -> int:
    """log2 of the threads that go along one row of x, `units` loads long: a warp, or fewer where
    rows are short, or more where there are few rows."""
    side = 8
    while side < units and (side < 32 or (threads % (2 * side) == 0 and side * rows < threads)):
        side *= 2
    return side.bit_length() - 1


def _store(problem: ConvProblem, variant: Planes, layout: Layout, cut: _Cut) -> int:
    """How y is written: in vectors, through shared memory, or element by element."""
    shape = (layout.batch, *problem.y_shape[1:])
    if variant.strip == 1 or layout.y[-1] != 1:
        return STORE_ELEMENTS
    size = variant.dtype.itemsize
    vectors = in_units(shape, layout.y, layout, variant.strip, size)
    if vectors and problem.output[-1] * size >= 32:  # a row covers whole sectors of memory
        return STORE_VECTORS
    inner, dense = 1, True
    for extent, stride in zip(reversed(shape), reversed(layout.y), strict=True):
        dense = dense and (extent == 1 or stride == inner)
        inner *= extent
    if dense and cut.tiles == 1 and problem.group_out_channels == 1:
        return STORE_PLANES
    return STORE_VECTORS if vectors else STORE_ROWS


# ---- channels last ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _PixelMemory:
    """What a cut takes in shared memory, with so many channels of a pixel (whole 16 bytes)."""

    extents: _Extents
    variant: ChannelsLast
    cut: _Cut
    channels: int

    def columns(self) -> int:
        """Pixels of a row of x: whatever any thread's loads reach."""
        stride, filter = self.extents.stride[1], self.extents.filter[1]
        last = (self.cut.strips * self.variant.strip - 1) * stride
        if self.variant.name == "any":
            return last + self.extents.span(1)
        return round_up(last + filter, 2)  # pixels lie swapped in pairs

    def pixel_pitch(self) -> int:
        """Elements from pixel to pixel: where pixels are not swapped, a gap keeps strips apart."""
        if self.variant.name != "any":
            return self.channels
        size, strip = self.extents.size, self.variant.strip * self.extents.stride[1]
        chunk = 16 // size
        return _raise(self.channels, strip, self.channels // chunk, chunk, size, self.channels // 2)

    def row_pitch(self) -> int:
        """Elements from row to row: the next segment lies in the banks behind the last strip."""
        chunk = 16 // self.extents.size
        pitch = self.columns() * self.pixel_pitch()
        rows = self.cut.segment_rows * self.extents.stride[0]
        chunks = self.cut.strips * self.channels // chunk
        more = pitch // 4 if self.cut.segments > 1 else 0
        return _raise(pitch, rows, chunks, chunk, self.extents.size, more)

    def filter_pitch(self) -> int:
        """Of w, from tap to tap, or load to load of "long": its neighbour is in other banks."""
        return (self.channels + self.variant.vec) * self.variant.taps

    def filter_bytes(self) -> int:
        """Of one filter per channel."""
        height, width = self.extents.filter
        loads = height * -(-width // self.variant.taps)
        return loads * self.filter_pitch() * self.extents.sum_size

    def shared_bytes(self) -> int:
        x = self.cut.input_rows(self.extents) * self.row_pitch() * self.extents.size
        return x + self.filter_bytes()


def _best_pixel_cut(
    extents: _Extents, variant: ChannelsLast, batch: int, device: Any
) -> _PixelMemory:
    """The cut with the least work, as for planes."""
    limit = _dynamic_shared(device)
    best, least = None, math.inf
    for channels in _channel_choices(extents):
        lanes = -(-min(channels, extents.in_channels) // variant.vec)
        blocks = -(-extents.in_channels // channels)
        for cut in _cuts(extents, variant.strip, variant.segment, variant.threads // lanes):
            memory = _PixelMemory(extents, variant, cut, channels)
            shared = memory.shared_bytes()
            if shared > limit:
                continue
            threads = round_up(lanes * cut.strips * cut.segments, 32)
            outputs = threads * variant.vec * variant.strip * cut.segment_rows * extents.multiplier
            sums = outputs * (extents.taps + 4)
            if lanes % 16 and lanes < 32:
                sums += sums // 2  # lanes on neighbouring strips wait for one another
            loads = cut.input_rows(extents) * memory.columns() * channels
            weights = channels * extents.taps * extents.multiplier
            # Filters and halos of "long" may leave room for few blocks: then warps are what counts.
            resident = (limit // shared) * threads
            few = _WARPS * 32 / resident if variant.name == "long" else shared / _SHARED_AIM
            work = _balanced(
                sums + _LOAD * loads * extents.size + 12 * weights + 4000,
                batch * blocks * cut.tiles, few, device.sm_count,
            )  # fmt: skip
            if work < least:
                best, least = memory, work
    assert best is not None, "supports has refused what fits nowhere"
    return best


def _channel_choices(extents: _Extents) -> list[int]:
    """Channels of a block: 128 or 64 bytes of them, or fewer where that makes all blocks alike."""
    whole = 16 // extents.size
    choices = []
    for most in (128 // extents.size, 64 // extents.size):
        blocks = -(-extents.in_channels // most)
        alike = round_up(-(-extents.in_channels // blocks), whole)
        choices += [alike] if blocks == 1 else [most, alike]
    return list(dict.fromkeys(choices))


def tile_channels_last(
    problem: ConvProblem, variant: ChannelsLast, layout: Layout, device: Any
) -> Blocks:
    """The blocks of depthwise_channels_last.cu."""
    extents = _Extents(problem)
    memory = _best_pixel_cut(extents, variant, layout.batch, device)
    cut, size = memory.cut, extents.size
    channel_blocks = -(-extents.in_channels // memory.channels)
    tiles = layout.batch * cut.tiles * channel_blocks
    filter_bytes = memory.filter_bytes()
    input_rows, columns = cut.input_rows(extents), memory.columns()
    row_pitch = memory.row_pitch()
    weights_at = input_rows * row_pitch * size
    room = _dynamic_shared(device) - weights_at
    multiplier = _channels_of_a_block(extents, filter_bytes, tiles, room, device)
    unit = 1
    for bytes in (16, 8, 4):
        if bytes > size and unit == 1 and _channels_in_units(problem, layout, bytes // size):
            unit = bytes // size
    vectors = (
        variant.vec > 1
        and extents.multiplier == 1
        and layout.y[1] == 1
        and in_units(
            (layout.batch, *problem.y_shape[2:]), (layout.y[0], *layout.y[2:]), layout,
            variant.vec, size, inner=False,
        )
    )  # fmt: skip
    lanes = -(-min(memory.channels, extents.in_channels) // variant.vec)
    tile = struct_of(
        TILE_CHANNELS_LAST,
        tile_columns=cut.tile_columns,
        tile_rows=cut.tile_rows,
        channel_tiles=-(-extents.multiplier // multiplier),
        channel_blocks=channel_blocks,
        strips=cut.strips,
        lanes=lanes,
        units=memory.channels // unit,
        columns=columns,
        segments=cut.segments,
        segment_rows=cut.segment_rows,
        channels=memory.channels,
        multiplier=multiplier,
        unit=unit,
        pixel_pitch=memory.pixel_pitch(),
        row_pitch=row_pitch,
        filter_pitch=memory.filter_pitch(),
        weights_at=weights_at,
        input_rows=input_rows,
        vectors=int(vectors),
    )
    return Blocks(
        tile,
        count=tiles * -(-extents.multiplier // multiplier),
        threads=round_up(lanes * cut.strips * cut.segments, 32),
        shared_bytes=weights_at + multiplier * filter_bytes,
    )


def _channels_in_units(problem: ConvProblem, layout: Layout, unit: int) -> bool:
    return layout.x[1] == 1 and in_units(
        (layout.batch, *problem.input), (layout.x[0], *layout.x[2:]), layout,
        unit, problem.x_dtype.itemsize, inner=False,
    )  # fmt: skip


def _dynamic_shared(device: Any) -> int:
    """Bytes that a block can have, besides what it has of itself and some for rounding."""
    return int(device.max_shared_bytes) - _STATIC_SHARED - 2048


# ---- numbers ---------------------------------------------------------------------------------


def in_units(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    layout: Layout,
    unit: int,
    size: int,
    *,
    inner: bool = True,
) -> bool:
    """Whether every row begins at a multiple of `unit` elements and has its elements side by side.

    `inner`: the last axis runs along the rows; else the axes are those across them alone.
    """
    if inner:
        if strides[-1] != 1:
            return False
        shape, strides = shape[:-1], strides[:-1]
    return layout.alignment >= unit * size and all(
        stride % unit == 0 for stride, extent in zip(strides, shape, strict=True) if extent > 1
    )


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _raise(pitch: int, rows: int, chunks: int, chunk: int, size: int, most: int) -> int:
    """`pitch`, raised by at most `most`, so that `rows` of them end `chunks` further in the banks.

    As it is where no such pitch is near: then some lanes of a warp wait for one another.
    """
    banks = _BANKS // (chunk * size)
    for more in range(0, min(most, (banks - 1) * chunk) + 1, max(chunk, 4 // size)):
        if ((pitch + more) // chunk * rows - chunks) % banks == 0:
            return pitch + more
    return pitch
