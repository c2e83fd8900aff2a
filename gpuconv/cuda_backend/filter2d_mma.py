"""One filter over each channel on tensor cores: rows of inputs times banded matrices.

kernels_cuda/filter2d_mma.cu. Images of one channel, and depthwise convolutions channels first;
strides and dilations are 1. float16 and bfloat16 with sums in float32; float32 where the problem's
precision is "tf32", or "tf32x3" in three products.

A row of S taps is a band of S among 16 * slices inputs of 16 bits (8 * slices of float32), for 8
outputs: S + 7 of them at least. So 3 of 16 multiplications count for S = 3, 9 for S = 9, 31 of 48
for S = 31.

What decides the order of a sum, and with it its bits: the filter and the pad. Extents, the batch,
strides and tiles do not. A sum that is not finite is computed anew as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch, rates, tile
from gpuconv.cuda_backend.device import capability
from gpuconv.cuda_backend.launch import Launch, Layout, Macros, Strides
from gpuconv.cuda_backend.occupancy import occupancy
from gpuconv.dtypes import DType
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

Shape = tuple[int, ...]

STRIPS = np.dtype(
    [
        ("tile", tile.TILING),
        ("lead", np.int32),
        ("slices", np.int32),
        ("step", np.int32),
        ("copy", np.int32),
    ],
    align=True,
)
_SECTOR, _CHUNK, _WORD = 32, 16, 4  # bytes
_GROUP = 8  # outputs of a product
_ROWS = 16  # of a product
_MARGIN = 8  # zeros before a row of taps
_MOST_SLICES = 5  # multiplied at a time
_BANKS = 32  # of shared memory, words

_TYPES = (dtypes.FLOAT16, dtypes.BFLOAT16, dtypes.FLOAT32)
_REGISTERS = {2: 80, 4: 128}  # of a thread at most, by the size of an element

# The shares of the tensor cores' rate, and of shared memory's, that full multiprocessors reach.
_TENSOR, _SHARED = 0.75, 0.8
_L2_RATE = 24  # bytes between a multiprocessor and L2 in a cycle, while all others have theirs
_COPY_RATE = 32  # elements that it copies in a cycle, of taps and of rows that are not aligned
_START_CYCLES = 2000  # of a block before its first product: the launch, the copies' latency
_STORE_CYCLES = 1000  # after its last
_BANDWIDTH = 0.8  # the share of the memory's bandwidth: blocks copy, multiply and store in turn


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block computes."""

    warps_h: int
    warps_w: int
    groups: int  # of a warp, beside each other

    @property
    def warps(self) -> int:
        return self.warps_h * self.warps_w

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def height(self) -> int:
        return _ROWS * self.warps_h

    @property
    def width(self) -> int:
        return _GROUP * self.groups * self.warps_w


LARGE, MEDIUM, SMALL = Tile(4, 2, 8), Tile(2, 2, 8), Tile(2, 2, 4)
NARROW = Tile(2, 1, 4)  # the planes of networks
# By the number of products: three need registers for both parts of an element.
_TILES = {1: (LARGE, MEDIUM, SMALL, NARROW), 3: (SMALL, NARROW)}


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    if problem.ndim > 2:
        return No("images have one or two axes, not three")
    if not problem.in_channels == problem.out_channels == problem.groups:
        return No("takes one filter for each channel")
    if problem.channels_last and problem.groups > 1:
        return No("channels lie between the neighbours of a row")
    if _steps(problem):
        return No("it has no stride or dilation")
    if problem.x_dtype not in _TYPES:
        return No(f"has no kernel for x in {problem.x_dtype}")
    if launch.type_macros(problem) != launch.uniform_macros(problem.x_dtype):
        return No("x, w, bias and the result must have one dtype")
    if problem.x_dtype is dtypes.FLOAT32 and problem.precision == "ieee":
        return No("tensor cores have no full float32: precision='tf32' or 'tf32x3' asks for less")
    if capability(device) < 80 and problem.x_dtype is not dtypes.FLOAT16:
        return No(f"needs sm_80 for {problem.x_dtype}, and this is {device.arch}")
    if _shared_bytes(problem, NARROW) > device.max_shared_bytes:
        return No("its window does not fit in shared memory")
    return True


def cost(problem: ConvProblem, device: Any) -> float:
    """Tiles at the rate of what limits them, or memory where it is slower.

    A multiprocessor's tiles take the longest of: their products, their reads of shared memory,
    their bytes from and to L2, each at the share of its rate that is reached while other blocks
    fill the gaps; and the ceil(tiles / blocks that fit) tiles of one block, each alone: copied,
    multiplied, stored. Small filters are limited by memory, as those of filter2d are.
    """
    busy = min(_busy(problem, device, problem.batch, each) for each in _fitting(problem, device))
    memory = problem.bytes_moved / float(_BANDWIDTH * device.bandwidth)
    return rates.LAUNCH_SECONDS + max(busy, memory)


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
    block = _choose(problem, device, layout.batch) if index == "int32" else NARROW
    return Launch(
        kernel=device.load(
            "filter2d_mma", _macros(problem.x_dtype, _products(problem), block, index)
        ),
        grid=(_count(problem, layout.batch, block), 1, 1),
        block=(block.threads, 1, 1),
        constants=(launch.pack(problem, layout), _strips(problem, layout, block)),
        shared_bytes=_shared_bytes(problem, block),
    )


def variants() -> Iterator[tuple[str, Macros]]:
    """Per type and number of products: every tile with int32, one with int64."""
    for dtype in _TYPES:
        for products in (1, 3) if dtype is dtypes.FLOAT32 else (1,):
            for block in _TILES[products]:
                yield "filter2d_mma", _macros(dtype, products, block, "int32")
            yield "filter2d_mma", _macros(dtype, products, NARROW, "int64")


def _macros(dtype: DType, products: int, block: Tile, index: str) -> Macros:
    return {
        "X_T": dtype.name,
        "PRODUCTS": products,
        "INDEX_T": index,
        "WARPS_H": block.warps_h,
        "WARPS_W": block.warps_w,
        "GROUPS": block.groups,
    }


def _steps(problem: ConvProblem) -> bool:
    """Whether a stride or a dilation has any effect."""
    along = zip(problem.stride, problem.output, problem.dilation, problem.filter, strict=True)
    return any((s > 1 and n > 1) or (d > 1 and taps > 1) for s, n, d, taps in along)


def _products(problem: ConvProblem) -> int:
    return 3 if problem.precision == "tf32x3" and problem.x_dtype is dtypes.FLOAT32 else 1


# ---- how the image lies in shared memory -----------------------------------------------------


def _vector(problem: ConvProblem) -> int:
    """Elements of a chunk."""
    return _CHUNK // problem.x_dtype.itemsize


def _lead(problem: ConvProblem) -> int:
    """How many outputs before the image's first the first tile begins.

    The first input that they see is then a whole number of chunks from the image's first.
    """
    return -problem.pad_lo[-1] % _vector(problem)


def _slices(problem: ConvProblem) -> int:
    """Of two chunks each, that hold the inputs of a group."""
    inputs = problem.filter[-1] + _GROUP - 1
    return -(-inputs // (2 * _vector(problem)))


def _step(problem: ConvProblem) -> int:
    """How many slices are multiplied at a time: equal steps."""
    slices = _slices(problem)
    return -(-slices // -(-slices // _MOST_SLICES))


def _copy_words(problem: ConvProblem) -> int:
    """Words from a row of taps to its second copy.

    Of 16-bit elements, so many that no word of the one is in a bank of the other that a warp reads
    with it: half the banks apart.
    """
    elements = _MARGIN + _slices(problem) * 2 * _vector(problem)
    if problem.x_dtype.itemsize == _WORD:
        return elements
    half = _BANKS // 2
    return half * (-(-elements // (2 * half)) | 1)


def _w_pitch(problem: ConvProblem) -> int:
    copies = 1 if problem.x_dtype.itemsize == _WORD and _products(problem) == 1 else 2
    return copies * _copy_words(problem)


def _columns(problem: ConvProblem, block: Tile) -> int:
    """Elements of a row of the tile: what the last group's last slice sees is the end."""
    return block.width - _GROUP + _slices(problem) * 2 * _vector(problem)


def _pitch(problem: ConvProblem, block: Tile) -> int:
    """Elements between rows of the tile: an odd number of chunks."""
    vector = _vector(problem)
    return (_columns(problem, block) // vector | 1) * vector


def _shared_bytes(problem: ConvProblem, block: Tile) -> int:
    r = tile.extents(problem.filter)[0]
    elements = max(
        (block.height + r - 1) * _pitch(problem, block), block.height * (block.width + _GROUP)
    )
    return _WORD * r * _w_pitch(problem) + elements * problem.x_dtype.itemsize


def _strips(problem: ConvProblem, layout: Layout, block: Tile) -> Any:
    """The ``Strips`` of a launch: a NumPy struct, to be passed by value."""
    t = np.zeros((), STRIPS)
    t["tile"]["tiles_h"] = launch.divisor(_tiles(problem, block)[0])
    t["tile"]["tiles_w"] = launch.divisor(_tiles(problem, block)[1])
    t["tile"]["columns"] = _columns(problem, block)
    t["tile"]["pitch"], t["tile"]["w_pitch"] = _pitch(problem, block), _w_pitch(problem)
    flags = tile.UNIT_COLUMNS if layout.x[-1] == 1 else 0
    if _in_chunks(problem, layout, layout.x, problem.input):
        flags |= tile.ALIGNED
    if _in_chunks(problem, layout, layout.y, problem.output):
        flags |= tile.STORE_VECTORS
    t["tile"]["flags"] = flags
    t["lead"], t["slices"], t["step"] = _lead(problem), _slices(problem), _step(problem)
    t["copy"] = _copy_words(problem)
    t.flags.writeable = False
    return t


def _in_chunks(problem: ConvProblem, layout: Layout, strides: Strides, spatial: Shape) -> bool:
    """Whether every row begins at a multiple of 16 bytes, and has no gaps."""
    extents = (layout.batch, problem.groups, *spatial[:-1])
    steps = [s for s, n in zip(strides[:-1], extents, strict=True) if n > 1]
    whole = not any(s % _vector(problem) for s in steps)
    return strides[-1] == 1 and whole and layout.alignment % _CHUNK == 0


def _tiles(problem: ConvProblem, block: Tile) -> tuple[int, int]:
    """Of an image, along H and W."""
    p, q = tile.extents(problem.output)
    return -(-p // block.height), -(-(q + _lead(problem)) // block.width)


def _count(problem: ConvProblem, batch: int, block: Tile) -> int:
    return batch * problem.groups * math.prod(_tiles(problem, block))


# ---- the tile --------------------------------------------------------------------------------


def _fitting(problem: ConvProblem, device: Any) -> list[Tile]:
    return [
        b
        for b in _TILES[_products(problem)]
        if _shared_bytes(problem, b) <= device.max_shared_bytes
    ]


@lru_cache(maxsize=4096)
def _choose(problem: ConvProblem, device: Any, batch: int) -> Tile:
    """The fastest by the model."""
    return min(_fitting(problem, device), key=lambda b: _busy(problem, device, batch, b))


def _busy(problem: ConvProblem, device: Any, batch: int, block: Tile) -> float:
    """Seconds of the multiprocessors."""
    item = problem.x_dtype.itemsize
    r = tile.extents(problem.filter)[0]
    groups = r * block.warps * block.groups
    macs = groups * _ROWS * _GROUP * _slices(problem) * 2 * _vector(problem) * _products(problem)
    rate = rates.mma_sync_per_cycle(device, "half" if problem.x_dtype.is_half else "tf32")
    products = macs / rate
    reads = r * block.warps * _read_bytes(problem, block) / rates.SHARED_BYTES
    elements = (block.height + r - 1) * _columns(problem, block)
    single = r * _w_pitch(problem)
    if problem.input[-1] % _vector(problem):
        single += elements
    stored = block.height * (block.width * item + 2 * _SECTOR)  # a row's ends are other tiles', too
    copies = max((elements * item + stored) / _L2_RATE, single / _COPY_RATE)
    most = -(-_count(problem, batch, block) // device.sm_count)
    registers, shared = _REGISTERS[item], _shared_bytes(problem, block)
    resident = max(occupancy(device.arch, block.threads, registers, shared).blocks, 1)
    alone = _START_CYCLES + copies + max(products, reads) + _STORE_CYCLES
    cycles = max(
        most * max(products / _TENSOR, reads / _SHARED, copies), -(-most // resident) * alone
    )
    return float(cycles / device.clock_hz)


def _read_bytes(problem: ConvProblem, block: Tile) -> int:
    """Of shared memory, that a warp reads for a row of the filter: inputs and taps."""
    slices, step = _slices(problem), _step(problem)
    total = 0
    for first in range(0, slices, step):
        count = min(step, slices - first)
        if problem.x_dtype.is_half:
            chunks = block.groups + 2 * count - 1
        else:
            chunks = 2 * (block.groups + count - 1)
        total += _ROWS * _CHUNK * chunks
    taps = 2 * slices * (1 if _products(problem) == 1 else 2)
    return total + rates.SHARED_BYTES * taps
