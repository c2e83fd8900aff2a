"""The gradient of a depthwise filter in one pass over x and dy.

    dw[k, 0, r, s] = sum over n, p, q of  dy[n, k, p, q] x[n, k / M, stride*p + dilation*r - pad]

kernels_cuda/wgrad_depthwise.cu: a block has some channels, goes through its share of the images
tile by tile, and keeps its sums in registers all the while. Where one block per channel would leave
multiprocessors idle, several share the images, and kernels_cuda/split_sum.cu adds up their parts.
The problem as it was planned decides how many, and so every sum's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.cuda_backend import launch, rates, split_sum
from gpuconv.cuda_backend.depthwise_tiling import TYPES, in_units, round_up, struct, struct_of
from gpuconv.cuda_backend.launch import Launch, Layout, Macros
from gpuconv.dtypes import FLOAT32, FLOAT64, DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

OPERATIONS = ("wgrad",)

# The shares of their peaks that the kernel is expected to reach.
_BANDWIDTH = 0.8
_RATE = {"whole": 0.6, "sliced": 0.6, "any": 0.1}

_SHARES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)  # of the images
_MOST_SLICES = 16  # of a block
_MOST_CHANNELS = 128  # of a block: wgrad_depthwise.cu's lists
_STATIC_SHARED = 2 * _MOST_CHANNELS * 8
_VECTOR = 16  # bytes of the widest copy
_BANKS = 128  # bytes that shared memory reads at once

# Instructions of a warp, beyond multiply-adds, by which cuts are compared.
_COPY = 20  # for 32 copies to shared memory
_BYTE = 0.15  # for a byte on its way there
_ROW = 14  # for a row of x, beyond its loads
_ITEM = 1500  # for a tile: barriers, and waiting
_END = 6000  # for adding up the threads' sums

# Cycles of adding up parts, and of each one's way there.
_PARTS, _PART = 3000, 100

AREA = struct(
    ("rows", "columns", "units"),
    ("row_pitch", "channel_pitch", "unit", "fill_shift"),
)
TILE = np.dtype(
    [("area", AREA, 2)]
    + [
        (name, launch.DIVISOR)
        for name in (
            "tile_columns", "tile_rows", "channel_blocks", "slice_blocks", "strips", "channels",
            "segments", "slices_s",
        )
    ]
    + [
        (name, np.int32)
        for name in (
            "segment_rows", "slices", "all_slices", "shares", "y_at", "stage_pitch", "stages",
            "team", "first_tap", "tap_step_r", "tap_step_s", "passes",
        )
    ],
    align=True,
)  # fmt: skip


# ---- variants --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One variant of the kernel, by what it is specialised in."""

    name: str  # "whole" (a small filter), "sliced" (any filter, stride 1) or "any"
    dtype: DType
    filter: int  # 3, 5, 7; 0: the problem's own
    stride: int  # 1, 2; 0: the problem's own, and its dilation
    channels_last: bool
    index: str

    @classmethod
    def of(cls, problem: ConvProblem, channels_last: bool, index: str) -> Variant:
        """The fastest variant that serves the problem."""
        dtype, stride, filter = problem.x_dtype, problem.stride[-1], problem.filter[-1]
        if index == "int32" and set(problem.dilation) == {1} and set(problem.stride) == {stride}:
            square = problem.filter == (filter, filter)
            if square and dtype is not FLOAT64 and stride in _WHOLE.get(filter, ()):
                return cls("whole", dtype, filter, stride, channels_last, index)
            if stride == 1:
                return cls("sliced", dtype, 0, 1, channels_last, index)
        return cls("any", dtype, 0, 0, channels_last and index == "int32", index)

    @property
    def taps(self) -> int:
        """The extents of what one thread sums: a filter's, or a slice's."""
        if self.filter:
            return self.filter
        return 4 if self.name == "any" or self.dtype is FLOAT64 else 8

    @property
    def strip(self) -> int:
        """Columns of dy per thread: as many as leave registers for the sums."""
        if self.name == "any":
            return 1
        if self.dtype is FLOAT64:
            return 2
        if self.channels_last:
            return 2 if self.taps >= 7 else 4
        if self.dtype.is_half:
            return 4
        return 2 if self.name == "sliced" else 4 // self.stride

    @property
    def threads(self) -> int:
        """Of a block at most: fewer where sums and rows take many registers."""
        if self.taps == 8:
            return 384
        wide = self.channels_last or self.dtype is FLOAT32
        return 192 if self.taps == 7 and wide else 256

    @property
    def blocks(self) -> int:
        """Of a multiprocessor at least: as many as its registers allow without a spill."""
        if self.index == "int64" or self.taps == 8:
            return 1
        if self.dtype is FLOAT64:
            return 2
        return {3: 4, 4: 3, 5: 2, 7: 2}[self.taps]

    @property
    def shift(self) -> int:
        """Columns of x before the first window, so that aligned rows stay so in shared memory."""
        if self.channels_last or self.name != "whole":
            return 0
        return _VECTOR // self.dtype.itemsize - self.taps // 2

    @property
    def pixel(self) -> int:
        """Elements from pixel to pixel in shared memory, where memory runs channels last."""
        return 16 if self.taps == 8 else 32

    @property
    def macros(self) -> Macros:
        return {
            **launch.uniform_macros(self.dtype),
            "INDEX_T": self.index,
            "CHANNELS_LAST": int(self.channels_last),
            "TAPS": self.taps,
            "SLICED": int(self.name != "whole"),
            "STRIDE": self.stride,
            "STRIP": self.strip,
            "THREADS": self.threads,
            "BLOCKS": self.blocks,
        }


_WHOLE = {3: (1, 2), 5: (1, 2), 7: (1,)}  # square filters held as a whole, and their strides


def variants() -> Iterator[tuple[str, Macros]]:
    """Per memory order and type: whole filters, "sliced", "any"; for planes with 64 bits, too."""
    for channels_last in (False, True):
        for dtype in TYPES:
            found = [Variant("sliced", dtype, 0, 1, channels_last, "int32")]
            found.append(Variant("any", dtype, 0, 0, channels_last, "int32"))
            if not channels_last:
                found.append(Variant("any", dtype, 0, 0, False, "int64"))
            if dtype is not FLOAT64:
                found += [
                    Variant("whole", dtype, filter, stride, channels_last, "int32")
                    for filter, strides in _WHOLE.items()
                    for stride in strides
                ]
            for variant in found:
                yield "wgrad_depthwise", variant.macros
    yield from split_sum.variants(TYPES)


# ---- the algorithm ---------------------------------------------------------------------------


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "wgrad":
        return No(f"computes wgrad only, not {problem.operation}")
    if not problem.depthwise:
        return No(f"an output channel sees {problem.group_in_channels} input channels, not one")
    if problem.ndim > 2:
        return No("takes one or two axes, not three")
    x = problem.x_dtype
    if x not in TYPES or launch.type_macros(problem) != launch.uniform_macros(x):
        return No(f"takes {', '.join(t.name for t in TYPES)}, one type for all arrays")
    for variant in (Variant.of(problem, False, "int32"), Variant.of(problem, False, "int64")):
        if _cut(problem, variant, device) is None:
            return No("the part of x that one row of dy sees is too large for shared memory")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """The larger of memory, at 0.8 of the bandwidth, and arithmetic, at a share of the peak rate.

    Arithmetic counts the multiply-adds of whole strips, slices and warps; a problem that occupies
    some of the multiprocessors alone has their share of the rate. Parts that are added up cost a
    launch more.
    """
    cut = _cut_of(problem, device, problem.channels_last)
    rate = _RATE[cut.variant.name] * (0.5 if problem.accumulator is FLOAT64 else 1.0)
    peak = rates.multiply_adds(device, problem.accumulator)
    products = cut.items(problem) * cut.blocks * cut.threads * cut.segment_rows
    products *= cut.passes * cut.variant.strip * cut.variant.taps**2
    used = min(1.0, cut.blocks * cut.shares / device.sm_count)
    arithmetic = float(products / (peak * rate * used))
    memory = float(problem.bytes_moved / (device.bandwidth * _BANDWIDTH))
    launches = 1 if cut.shares == 1 else 2
    return launches * rates.LAUNCH_SECONDS + max(arithmetic, memory)


def workspace(problem: ConvProblem, device: Any) -> int:
    """The parts, for either memory order."""
    shares = max(_cut_of(problem, device, last).shares for last in (False, True))
    return 0 if shares == 1 else shares * _part_bytes(problem)


def _part_bytes(problem: ConvProblem) -> int:
    return math.prod(problem.w_shape) * problem.accumulator.itemsize


def run(plan: Plan, x: Any, grad: Any, bias: None, out: Any) -> None:
    bind(plan, x, grad, bias, out)(x, grad, bias, out)


def bind(plan: Plan, x: Any, grad: Any, bias: None, out: Any) -> Callable[..., None]:
    problem, device = plan.problem, plan.device
    multiply, *add = prepare(problem, device, Layout(x, out, None, grad))
    if not add:
        return lambda x, dy, bias, dw: multiply(device, x, dw, dy, None)
    shape = (int(add[0].constants[2]), *problem.w_shape)

    def split(x: Any, dy: Any, bias: None, dw: Any) -> None:
        parts = device.empty(shape, problem.accumulator.numpy)
        multiply(device, x, dw, dy, parts)
        add[0](device, parts, None, dw)

    return split


@lru_cache(maxsize=1024)
def prepare(problem: ConvProblem, device: Any, layout: Layout) -> tuple[Launch, ...]:
    """The launches, of which a second one adds up parts: everything of them but the arrays."""
    p = launch.pack(problem, layout)
    index = launch.index_type(problem, layout)
    last = (
        problem.in_channels > 1
        and launch.channels_last(layout.x)
        and launch.channels_last(layout.y)
    )
    cut = _cut_of(problem, device, last, index)
    multiply = Launch(
        kernel=device.load("wgrad_depthwise", cut.variant.macros),
        grid=(cut.blocks * cut.shares, 1, 1),
        block=(cut.threads, 1, 1),
        constants=(p, _tile(problem, cut, layout)),
        shared_bytes=cut.shared_bytes(problem),
    )
    if cut.shares == 1:
        return (multiply,)
    # The parts are (K, 1, R, S) arrays, as if K were a batch of images.
    items = math.prod(problem.w_shape)
    sums = p.copy()
    sums["y_strides"], sums["output"] = (
        (*layout.w[:2], *(0,) * (5 - len(layout.w)), *layout.w[2:]),
        p["filter"],
    )
    sums["output_divisor"] = p["filter_divisor"]
    sums["out_channels_divisor"], sums["channels_last"] = launch.divisor(1), 0
    sums.flags.writeable = False
    return multiply, split_sum.prepare(device, problem.x_dtype, sums, items, cut.shares)


# ---- cuts ------------------------------------------------------------------------------------


def _two(values: tuple[int, ...], fill: int = 1) -> tuple[int, int]:
    """(H, W) of a problem of one or two axes."""
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


@dataclass(frozen=True)
class _Array:
    """x's or dy's tile in shared memory; pitches in elements."""

    rows: int
    columns: int
    row_pitch: int
    channel_pitch: int
    bytes: int


@dataclass(frozen=True)
class Cut:
    """How a problem is cut into blocks, and a block's threads lie over its tile."""

    variant: Variant
    strips: int  # of a pass
    passes: int
    segments: int
    segment_rows: int
    tile_columns: int
    tile_rows: int
    channels: int
    channel_blocks: int
    slices: int  # of a block
    slice_blocks: int
    slices_s: int  # of a row of the filter
    all_slices: int
    stages: int = 2
    shares: int = 1

    @property
    def threads(self) -> int:
        return round_up(self.slices * self.segments * self.channels * self.strips, 32)

    @property
    def blocks(self) -> int:
        """That one share of the images takes."""
        return self.channel_blocks * self.slice_blocks

    def items(self, problem: ConvProblem) -> int:
        """Tiles of all images."""
        return problem.batch * self.tile_columns * self.tile_rows

    def rows(self, problem: ConvProblem) -> int:
        """Rows of dy in a tile."""
        return min(self.segments * self.segment_rows, _two(problem.output)[0])

    def x(self, problem: ConvProblem) -> _Array:
        variant, stride, dilation = self.variant, _two(problem.stride), _two(problem.dilation)
        filter, size = _two(problem.filter), problem.x_dtype.itemsize
        rows = (self.rows(problem) - 1) * stride[0] + (filter[0] - 1) * dilation[0] + 1
        last = (self.strips * self.passes * variant.strip - 1) * stride[1]
        if variant.name == "any":
            columns = last + (filter[1] - 1) * dilation[1] + 1
        else:  # whole loads, of whole slices
            columns = variant.shift + last + self.slices_s * variant.taps
            columns = round_up(columns, variant.strip * variant.stride)
        chunk = variant.strip * (1 if variant.name == "any" else variant.stride)
        return self._array(rows, columns, self.segment_rows * stride[0], chunk, size)

    def y(self, problem: ConvProblem) -> _Array:
        columns = self.strips * self.passes * self.variant.strip
        size = problem.x_dtype.itemsize
        rows = self.rows(problem)
        return self._array(rows, columns, self.segment_rows, self.variant.strip, size)

    def _array(self, rows: int, columns: int, step: int, chunk: int, size: int) -> _Array:
        vector = _VECTOR // size
        if self.variant.channels_last:
            row = columns * self.variant.pixel
            return _Array(rows, columns, row, 1, round_up(rows * row * size, _VECTOR))
        row = round_up(columns, vector)
        if self.segments > 1:  # a segment goes on in the banks where the one before it ends
            row = _raised(row, step, self.channels * self.strips * chunk, size)
        plane = rows * row
        if self.channels > 1:
            plane = _raised(plane, 1, self.strips * chunk, size)
        return _Array(rows, round_up(columns, vector), row, plane, self.channels * plane * size)

    def stage_bytes(self, problem: ConvProblem) -> int:
        return self.x(problem).bytes + self.y(problem).bytes

    def shared_bytes(self, problem: ConvProblem) -> int:
        """The stages, or the threads' sums, which take their place."""
        sums = self.variant.taps * self.threads * problem.accumulator.itemsize
        return max(self.stages * self.stage_bytes(problem), sums)


def _raised(pitch: int, times: int, ahead: int, size: int) -> int:
    """`pitch`, raised by whole vectors, so that `times` of it end near `ahead` in the banks."""
    vector, banks = _VECTOR // size, _BANKS // size

    def off(more: int) -> int:
        distance = ((pitch + more) * times - ahead) % banks
        return min(distance, banks - distance)

    return pitch + min(range(0, banks, vector), key=off)


def _cut_of(problem: ConvProblem, device: Any, channels_last: bool, index: str = "int32") -> Cut:
    """The cut for arrays of a memory order; that for planes where no other fits."""
    cut = _cut(problem, Variant.of(problem, channels_last, index), device)
    if cut is None:
        cut = _cut(problem, Variant.of(problem, False, index), device)
    assert cut is not None, "supports has refused what fits nowhere"
    return cut


@lru_cache(maxsize=4096)
def _cut(problem: ConvProblem, variant: Variant, device: Any) -> Cut | None:
    """The cut with the least predicted work, or None where none fits in shared memory."""
    best, least = None, math.inf
    limit = int(device.max_shared_bytes) - _STATIC_SHARED - 1024
    for cut in _cuts(problem, variant):
        for stages in (2, 1):
            shared = stages * cut.stage_bytes(problem)
            if shared > limit:
                continue
            staged = _replace(cut, stages=stages)
            if staged.shared_bytes(problem) > limit:
                continue
            shares, work = _shares(problem, staged, device)
            if work < least:
                best, least = _replace(staged, shares=shares), work
            break
    return best


def _replace(cut: Cut, **changes: int) -> Cut:
    return Cut(**{**cut.__dict__, **changes})


def _cuts(problem: ConvProblem, variant: Variant) -> Iterator[Cut]:
    """Sensible ways to cut a problem up."""
    (height, width), filter = _two(problem.output), _two(problem.filter)
    down, along = (-(-extent // variant.taps) for extent in filter)
    all_slices = down * along
    most_slices = _MOST_SLICES
    if variant.channels_last:
        most_slices = min(most_slices, variant.threads // variant.pixel)
    slice_blocks = -(-all_slices // most_slices)
    slices = -(-all_slices // slice_blocks)
    room = variant.threads // slices
    all_strips = -(-width // variant.strip)
    seen = set()
    for channels in _channels(problem, variant, room):
        for widest, passes in _widths(all_strips, room // channels):
            tile_columns = -(-all_strips // (widest * passes))
            strips = -(-all_strips // (tile_columns * passes))
            most = room // (strips * channels)
            for segments in {1, 2, 3, 4, 7, 8, most // 2, most}:
                if not 1 <= segments <= min(most, height):
                    continue
                for most_rows in (4, 8, 16, 32, 64):  # of a segment
                    tile_rows = -(-height // (segments * most_rows))
                    segment_rows = -(-height // (segments * tile_rows))
                    tile_rows = -(-height // (segments * segment_rows))
                    if channels > 1 and not variant.channels_last and tile_rows * tile_columns > 1:
                        continue
                    key = (channels, strips, passes, segments, segment_rows)
                    if key in seen:
                        continue
                    seen.add(key)
                    yield Cut(
                        variant=variant,
                        strips=strips,
                        passes=passes,
                        segments=segments,
                        segment_rows=segment_rows,
                        tile_columns=tile_columns,
                        tile_rows=tile_rows,
                        channels=channels,
                        channel_blocks=-(-problem.out_channels // channels),
                        slices=slices,
                        slice_blocks=slice_blocks,
                        slices_s=along,
                        all_slices=all_slices,
                    )


def _widths(all_strips: int, most: int) -> Iterator[tuple[int, int]]:
    """Strips of a tile: how many side by side, and how many times that."""
    side = 1
    while side <= min(most, all_strips):
        yield side, 1
        side *= 2
    for passes in (1, 2, 3, 4, 8):
        strips = -(-all_strips // passes)
        if strips <= most:
            yield strips, passes
    for passes in (2, 4):
        if most * passes < all_strips:
            yield most, passes


def _channels(problem: ConvProblem, variant: Variant, room: int) -> list[int]:
    """Channels of a block: neighbours in memory, or planes where a tile holds whole ones."""
    most = min(problem.out_channels, _MOST_CHANNELS, room)
    if not variant.channels_last:
        return [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= most]
    vector = _VECTOR // problem.x_dtype.itemsize
    blocks = -(-problem.out_channels // variant.pixel)
    return [round_up(-(-problem.out_channels // blocks), vector)]


def _shares(problem: ConvProblem, cut: Cut, device: Any) -> tuple[int, float]:
    """Among how many blocks the images are shared, and the cycles of it all."""
    variant, (_, width), size = cut.variant, _two(problem.output), problem.x_dtype.itemsize
    x, y = cut.x(problem), cut.y(problem)
    half = variant.dtype.is_half
    if variant.name == "any":
        warp = cut.segment_rows * (variant.taps**2 * 3.0 + 6)
    else:
        count = (variant.strip - 1) * variant.stride + variant.taps
        loads = count if variant.channels_last else 4 * -(-(count + 3) // variant.strip)
        rows = (cut.segment_rows - 1) * variant.stride + variant.taps
        warp = cut.segment_rows * variant.strip * variant.taps**2
        warp += rows * (loads + count * half + _ROW)
    if variant.channels_last:
        unit = _VECTOR // size if problem.group_out_channels == 1 else 1
        copies = (x.rows * x.columns + y.rows * y.columns) * -(-cut.channels // unit)
    else:
        unit = max(math.gcd(width * size, _VECTOR) // size, 1)
        copies = cut.channels * (x.rows * -(-x.columns // unit) + y.rows * -(-y.columns // unit))
    warps = cut.threads // 32
    item = warps * warp * cut.passes + copies / 32 * _COPY + _ITEM
    item += (x.rows * x.columns + y.rows * y.columns) * cut.channels * size * _BYTE
    end = _END + 4 * warps * variant.taps**2
    shared = cut.shared_bytes(problem) + _STATIC_SHARED + 1024
    fit = min(
        variant.threads * variant.blocks // cut.threads, int(device.max_shared_bytes) // shared
    )
    fit = max(fit, 1)
    items, processors = cut.items(problem), device.sm_count
    limit = items if problem.workspace_limit is None else (
        problem.workspace_limit // _part_bytes(problem)
    )  # fmt: skip
    best, least = 1, math.inf
    for shares in _SHARES:
        if shares > 1 and shares > min(items, limit):
            break
        blocks = cut.blocks * shares
        resident = min(fit, -(-blocks // processors))
        waves = -(-blocks // (processors * resident))
        each = -(-items // shares) * item + end
        rate = 4 * min(1.0, resident * warps / 10)  # few warps wait for one another
        cycles = waves * resident * each / rate + (0 if shares == 1 else _PARTS + _PART * shares)
        if cycles < least:
            best, least = shares, cycles
    return best, least


# ---- the kernel's arguments ------------------------------------------------------------------


def _tile(problem: ConvProblem, cut: Cut, layout: Layout) -> Any:
    variant, x, y = cut.variant, cut.x(problem), cut.y(problem)
    x_shape = (layout.batch, *problem.x_shape[1:])
    y_shape = (layout.batch, *problem.y_shape[1:])
    if variant.channels_last:
        multiplier = problem.group_out_channels
        x_unit = _pixel_unit(cut, layout, x_shape, layout.x) if multiplier == 1 else 1
        y_unit = _pixel_unit(cut, layout, y_shape, layout.y)
    else:
        early = problem.pad_lo[-1] + variant.shift
        step = cut.strips * cut.passes * variant.strip if cut.tile_columns > 1 else 0
        x_unit = _row_unit(cut, layout, x_shape, layout.x, early, step * problem.stride[-1])
        y_unit = _row_unit(cut, layout, y_shape, layout.y, 0, step)
    contributors = cut.segments * cut.strips
    taps, filter_s, size = math.prod(problem.filter), problem.filter[-1], variant.dtype.itemsize
    return struct_of(
        TILE,
        area=np.stack([_area(cut, x, x_unit), _area(cut, y, y_unit)]),
        tile_columns=cut.tile_columns,
        tile_rows=cut.tile_rows,
        channel_blocks=cut.channel_blocks,
        slice_blocks=cut.slice_blocks,
        strips=cut.strips,
        channels=cut.channels,
        segments=cut.segments,
        slices_s=cut.slices_s,
        segment_rows=cut.segment_rows,
        slices=cut.slices,
        all_slices=cut.all_slices,
        shares=cut.shares,
        y_at=x.bytes // size,
        stage_pitch=cut.stage_bytes(problem) // size,
        stages=cut.stages,
        team=min(32, 1 << (contributors.bit_length() - 1)),
        first_tap=taps - 1 if problem.flip else 0,
        tap_step_r=-filter_s if problem.flip else filter_s,
        tap_step_s=-1 if problem.flip else 1,
        passes=cut.passes,
    )


def _area(cut: Cut, array: _Array, unit: int) -> Any:
    copied = cut.channels if cut.variant.channels_last else array.columns
    return struct_of(
        AREA,
        rows=array.rows,
        columns=array.columns,
        units=-(-copied // unit),
        row_pitch=array.row_pitch,
        channel_pitch=array.channel_pitch,
        unit=unit,
        fill_shift=_fill_shift(-(-array.columns // unit), cut.threads),
    )


def _fill_shift(copies: int, threads: int) -> int:
    """log2 of the threads along a row: all of its copies but for a few, which may be its pad's."""
    shift = 2
    while shift < 5 and (4 << shift) < 3 * copies and (2 << shift) <= threads:
        shift += 1
    return shift


def _row_unit(
    cut: Cut, layout: Layout, shape: tuple[int, ...], strides: tuple[int, ...], early: int,
    step: int,
) -> int:  # fmt: skip
    """Elements of one copy of planes: every tile's rows begin at a multiple of them."""
    size = cut.variant.dtype.itemsize
    for unit in (16 // size, 8 // size, 4 // size):
        if (
            unit > 1
            and early % unit == step % unit == 0
            and in_units(shape, strides, layout, unit, size)
        ):
            return unit
    return 1


def _pixel_unit(cut: Cut, layout: Layout, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of one copy of a pixel's channels."""
    size = cut.variant.dtype.itemsize
    for unit in (16 // size, 8 // size, 4 // size):
        if (
            unit > 1
            and strides[1] == 1
            and cut.channels % unit == 0
            and in_units(
                (shape[0], *shape[2:]), (strides[0], *strides[2:]), layout, unit, size, inner=False
            )
        ):
            return unit
    return 1
