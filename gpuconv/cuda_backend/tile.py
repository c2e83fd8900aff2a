"""Cutting an image into tiles that fit in shared memory: what filter2d and separable share.

``TILING`` mirrors ``struct Tiling`` of kernels_cuda/tile.cuh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.cuda_backend import launch
from gpuconv.cuda_backend.launch import DIVISOR, Layout
from gpuconv.dtypes import DType
from gpuconv.plan import No
from gpuconv.problem import ConvProblem

TILING = np.dtype(
    [
        ("tiles_w", DIVISOR),
        ("tiles_h", DIVISOR),
        ("slab", np.int32),
        ("columns", np.int32),
        ("pitch", np.int32),
        ("w_pitch", np.int32),
        ("flags", np.int32),
        ("classes", np.int32),
        ("row_step", np.int32),
        ("phase_pitch", np.int32),
    ],
    align=True,
)
UNIT_COLUMNS, ALIGNED, STORE_VECTORS = 1, 2, 4  # flags: TILE_...

THREADS = 256
_VECTOR = 16  # bytes of the widest load
_BANKS, _WORD = 128, 4  # bytes of all banks of shared memory, and of one
_LANES = 32  # of a warp
_INDEX_LIMIT = 2**31 - 2**26  # less what the last tile reaches past the output


@dataclass(frozen=True, slots=True)
class Block:
    """How the 256 threads of a block lie over its tile of outputs."""

    block_w: int  # threads along W,
    out_h: int  # and the outputs of each
    out_w: int

    @property
    def block_h(self) -> int:
        return THREADS // self.block_w

    @property
    def tile_h(self) -> int:
        return self.block_h * self.out_h

    @property
    def tile_w(self) -> int:
        return self.block_w * self.out_w

    def count(self, problem: ConvProblem, batch: int) -> int:
        """Tiles of a batch."""
        q = extents(problem.output)[1]
        return batch * self.count_h(problem) * -(-q // self.tile_w)

    def count_h(self, problem: ConvProblem) -> int:
        """Tiles along H: of each class of output rows its own."""
        return classes(problem) * -(-class_rows(problem) // self.tile_h)


def plane(problem: ConvProblem) -> bool | No:
    """Whether the problem is one filter over single-channel images."""
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    if problem.ndim > 2:
        return No("images have one or two axes, not three")
    if (problem.in_channels, problem.out_channels) != (1, 1):
        return No("takes images of one channel, and one filter")
    if problem.accumulator.is_complex:
        return No("does not sum complex numbers")
    return True


def extents(values: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) of a problem of one or two axes."""
    return values if len(values) == 2 else (1, *values)  # type: ignore[return-value]


def padded(count: int, step: int) -> int:
    """`count`, up to a multiple of `step`."""
    return -(-count // step) * step


def classes(problem: ConvProblem) -> int:
    """Output rows this far apart have their windows in the same input rows, `dilation` apart."""
    stride, dilation = extents(problem.stride)[0], extents(problem.dilation)[0]
    return min(dilation // math.gcd(stride, dilation), extents(problem.output)[0])


def class_rows(problem: ConvProblem) -> int:
    """Output rows of a class."""
    return -(-extents(problem.output)[0] // classes(problem))


def row_step(problem: ConvProblem) -> int:
    """Rows of the tile from one output row of a class to the next."""
    stride, dilation = extents(problem.stride)[0], extents(problem.dilation)[0]
    return stride // math.gcd(stride, dilation)


def columns(problem: ConvProblem, block: Block) -> int:
    """Elements of a row of the tile: whole loads of a thread."""
    (_, s), (_, stride), (_, dilation) = map(
        extents, (problem.filter, problem.stride, problem.dilation)
    )
    return padded((block.tile_w - 1) * stride + (s - 1) * dilation + 1, block.out_w)


def rows(problem: ConvProblem, block: Block, slab: int) -> int:
    """Rows of the tile that `slab` rows of the filter see."""
    return (block.tile_h - 1) * row_step(problem) + slab


def phase_pitch(problem: ConvProblem, block: Block, itemsize: int) -> int:
    """Elements between the phases that a stride deals a row's columns into.

    Neighbouring columns are in different phases, `step` elements apart modulo the banks. A warp's
    are in different banks where stride * step is 1 modulo the banks: column j is then in bank
    j * step. Where there is no such step the phases divide the banks among them; that is free of
    conflicts for powers of two, and for other even strides of 4 or 8 bytes two columns meet. Of
    smaller elements a warp needs a part of the banks only: its phases lie a word apart, and up to
    strides of 16 no two columns meet.
    """
    stride = extents(problem.stride)[1]
    count = -(-columns(problem, block) // stride)
    if stride == 1:
        return count
    banks = _BANKS // itemsize
    if itemsize < _WORD:
        step = -(-_LANES // stride) + _WORD // itemsize - 1
    elif math.gcd(stride, banks) == 1:
        step = pow(stride, -1, banks)
    else:
        step = -(-banks // stride)
    return count + (step - count) % banks


def pitch(problem: ConvProblem, block: Block, itemsize: int) -> int:
    """Elements between rows of the tile: whole vectors."""
    phases = extents(problem.stride)[1]
    return padded(phases * phase_pitch(problem, block, itemsize), _VECTOR // itemsize)


def shared_budget(device: Any) -> int:
    """Bytes that leave room for three blocks on a multiprocessor, where it has that much."""
    return int(min(max(device.max_shared_bytes // 3, 48 << 10), device.max_shared_bytes))


def index_type(problem: ConvProblem, layout: Layout) -> str:
    """ "int32" where every position, and every offset within a row or w, fits; else "int64".

    Rows and images themselves are found with 64-bit offsets.
    """
    widths = ((problem.input[-1], layout.x[-1]), (problem.output[-1], layout.y[-1]))
    reach = max(n * abs(stride) for n, stride in widths)
    reach = max(reach, sum(n * abs(s) for n, s in zip(problem.filter, layout.w[2:], strict=True)))
    for extent, output, filter, stride, dilation, lo, hi in zip(
        problem.input, problem.output, problem.filter, problem.stride, problem.dilation,
        problem.pad_lo, problem.pad_hi, strict=True,
    ):  # fmt: skip
        # The boundary modes compute up to twice the extent, and tiles reach past the last output.
        span = output * stride + dilation * filter
        reach = max(reach, 2 * extent + lo + hi + span)
    return "int32" if reach < _INDEX_LIMIT else "int64"


def pack(
    problem: ConvProblem,
    layout: Layout,
    block: Block,
    *,
    slab: int,
    w_pitch: int,
    stage: DType,
    raw: bool,
    one_store: bool,
) -> Any:
    """The ``Tiling`` of a launch: a NumPy struct, to be passed by value.

    `stage` is the tile's type; `raw`: it is x's own, and bytes are copied as they are. `one_store`:
    a thread's outputs of a row may be one store where y's addresses allow.
    """
    t = np.zeros((), TILING)
    t["tiles_h"] = launch.divisor(block.count_h(problem))
    t["tiles_w"] = launch.divisor(-(-extents(problem.output)[1] // block.tile_w))
    t["classes"], t["row_step"] = classes(problem), row_step(problem)
    t["phase_pitch"] = phase_pitch(problem, block, stage.itemsize)
    t["slab"], t["w_pitch"] = slab, w_pitch
    t["columns"], t["pitch"] = columns(problem, block), pitch(problem, block, stage.itemsize)
    flags = 0
    if raw and layout.x[-1] == 1:
        flags |= UNIT_COLUMNS
        left = problem.pad_lo[-1] * stage.itemsize
        if left % _VECTOR == 0 and _rows_at_multiples(
            _VECTOR, layout.x, problem.input, layout, problem.x_dtype
        ):
            flags |= ALIGNED
    store = block.out_w * problem.y_dtype.itemsize
    if (
        one_store
        and layout.y[-1] == 1
        and store <= _VECTOR
        and _rows_at_multiples(store, layout.y, problem.output, layout, problem.y_dtype)
    ):
        flags |= STORE_VECTORS
    t["flags"] = flags
    t.flags.writeable = False
    return t


def _rows_at_multiples(
    count: int,
    strides: tuple[int, ...],
    spatial: tuple[int, ...],
    layout: Layout,
    dtype: DType,
) -> bool:
    """Whether every row of every image begins at a multiple of `count` bytes."""
    steps = [strides[0]] if layout.batch > 1 else []
    if len(spatial) == 2 and spatial[0] > 1:
        steps.append(strides[2])
    return layout.alignment % count == 0 and not any(s * dtype.itemsize % count for s in steps)


def largest(dtype: DType) -> int:
    """The largest magnitude of an integer type's values."""
    if dtype is dtypes.BOOL:
        return 1
    bits = 8 * dtype.itemsize
    return 1 << (bits - 1) if dtype.kind == "i" else (1 << bits) - 1
