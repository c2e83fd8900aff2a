"""What the algorithms on single planes share: reading padded blocks, exact types, storing sums.

An output channel of a depthwise problem sees one plane of the input. The planes are read in blocks,
(images, channels, depth, rows, columns), whatever the problem's rank: missing axes have extent 1.

Dilation never reaches the arithmetic. Output positions that are equal modulo
dilation / gcd(dilation, stride) read input positions that are equal modulo dilation; each such
class along each axis is a convolution without dilation, over every dilation-th padded position.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.arrays import HostArray
from gpuconv.dtypes import DType
from gpuconv.numpy_backend.boundary import sources
from gpuconv.numpy_backend.scratch import rounded
from gpuconv.problem import ConvProblem

Piece = tuple[slice, slice | None]  # positions of a block, and the input's elements there (None: 0)
Region = tuple[slice, ...]


class _Blocked(Protocol):
    """How the work on planes is cut into blocks: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def channels(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def scratch(self) -> int:
        """Bytes of one worker."""


Growing = TypeVar("Growing", bound=_Blocked)

_CLASSES = 2048  # residue classes of a problem: each is planned by itself, in 0.2 ms
_REPEATS = 1 << 16  # positions of an axis's pads that repeat the input: a run per period
_EINSUM = 512  # outputs of a plane from which a call per plane pays
START = 400e-6  # seconds until all threads work, and until the last is done


@dataclass(frozen=True)
class Run:
    """`count` padded positions, whose input indices rise or fall by `step`; source -1: zeros."""

    start: int
    count: int
    source: int
    step: int


@dataclass(frozen=True, eq=False)
class Axis:
    """One residue class of one axis: a convolution without dilation. Each is a key of its own."""

    filter: int
    stride: int
    outputs: int  # how many outputs the class has
    first: int  # of the outputs in the whole output,
    every: int  # and the distance between them
    runs: tuple[Run, ...]

    def reads(self, outputs: int) -> int:
        """How many padded positions `outputs` neighbours read."""
        return (outputs - 1) * self.stride + self.filter

    @cached_property
    def inside(self) -> tuple[int, int]:
        """The padded positions that are not zeros: from the first to before the second."""
        read = [run for run in self.runs if run.source >= 0]
        return (read[0].start, read[-1].start + read[-1].count) if read else (0, 0)

    def out(self, start: int, stop: int) -> slice:
        """Where the outputs from `start` to `stop` lie in the whole output."""
        return slice(
            self.first + start * self.every, self.first + (stop - 1) * self.every + 1, self.every
        )

    def pieces(self, start: int, count: int) -> list[Piece]:
        """The padded positions [start, start + count), by the runs they belong to."""
        result: list[Piece] = []
        position = start
        stop = start + count
        for run in self.runs:
            lo, hi = max(run.start, start), min(run.start + run.count, stop)
            if lo >= hi:
                continue
            position = hi
            here = slice(lo - start, hi - start)
            if run.source < 0:
                result.append((here, None))
                continue
            first = run.source + (lo - run.start) * run.step
            end = first + (hi - lo) * run.step
            if run.step == 0:  # one element for all
                result.append((here, slice(first, first + 1)))
                continue
            result.append((here, slice(first, end if end >= 0 else None, run.step)))
        if position < stop:  # a block may be read past the padded input's end
            result.append((slice(position - start, count), None))
        return result


def scattered(problem: ConvProblem) -> str | None:
    """Why `classes` would take longer to make than the problem to compute; None if it would not."""
    pads = map(sum, zip(problem.pad_lo, problem.pad_hi, strict=True))
    if problem.padding_mode not in ("zeros", "replicate") and max(pads) > _REPEATS:
        return f"the pads repeat the input over more than {_REPEATS} positions"
    strides = zip(problem.stride, problem.dilation, problem.output, strict=True)
    count = math.prod(min(d // math.gcd(s, d), n) for s, d, n in strides)
    if count > _CLASSES:
        return f"the dilation splits it into {count} convolutions, more than {_CLASSES}"
    return None


@lru_cache(maxsize=1024)
def classes(problem: ConvProblem) -> tuple[tuple[Axis, Axis, Axis], ...]:
    """The undilated convolutions that make up the problem, each by its three axes."""
    missing = (Axis(1, 1, 1, 0, 1, (Run(0, 1, 0, 1),)),)
    axes: list[tuple[Axis, ...]] = [missing] * (3 - problem.ndim)
    for a in range(problem.ndim):
        stride, dilation = problem.stride[a], problem.dilation[a]
        common = math.gcd(stride, dilation)
        every = dilation // common
        axes.append(
            tuple(
                Axis(
                    filter=problem.filter[a],
                    stride=stride // common,
                    outputs=-(-(problem.output[a] - first) // every),
                    first=first,
                    every=every,
                    runs=_runs(problem, a, first * stride, dilation),
                )
                for first in range(min(every, problem.output[a]))
            )
        )
    return tuple((d, h, w) for d, h, w in itertools.product(*axes))


def _runs(problem: ConvProblem, axis: int, offset: int, step: int) -> tuple[Run, ...]:
    extent, lo, hi = problem.input[axis], problem.pad_lo[axis], problem.pad_hi[axis]
    mode = problem.padding_mode
    total = max(-(-(lo + extent + hi - offset) // step), 0)
    before = min(max(-(-(lo - offset) // step), 0), total)
    inside = max(-(-(lo + extent - offset) // step) - before, 0)

    def pad(start: int, count: int, edge: int) -> list[Run]:
        if mode in ("zeros", "replicate"):
            source = -1 if mode == "zeros" else edge
            return [Run(start, count, source, 0)] if count else []
        first = offset + start * step - lo
        return _segments(sources(first, count, step, extent, mode).tolist(), start)

    runs = pad(0, before, 0)
    if inside:
        runs.append(Run(before, inside, offset + before * step - lo, step))
    runs += pad(before + inside, total - before - inside, extent - 1)
    return tuple(runs)


def _segments(index: list[int], start: int) -> list[Run]:
    """The runs of a pad, greedily."""
    runs = []
    i = 0
    while i < len(index):
        step = 0
        if i + 1 < len(index) and index[i] >= 0 and index[i + 1] >= 0:
            step = index[i + 1] - index[i]
        j = i + 1
        while j < len(index) and index[j] - index[j - 1] == step and index[j] >= 0 <= index[i]:
            j += 1
        while index[i] < 0 and j < len(index) and index[j] < 0:
            j += 1
        runs.append(Run(start + i, j - i, index[i], step))
        i = j
    return runs


def lift(array: HostArray) -> HostArray:
    """(N, C, spatial...) with three spatial axes."""
    while array.ndim < 5:
        array = array[:, :, None]
    return array


def by_plane(problem: ConvProblem, w: HostArray) -> HostArray:
    """A depthwise problem's filters as (C, multiplier, T, R, S)."""
    w = lift(w)
    return w.reshape(problem.in_channels, problem.group_out_channels, *w.shape[2:])


def read(
    block: HostArray, planes: HostArray, axes: tuple[Axis, ...], starts: tuple[int, ...]
) -> None:
    """Fill `block`, (images, channels, depth, rows, columns), from `starts` in padded positions."""
    margins, copies = _reads(axes, starts, block.shape[2:])
    for here in margins:
        block[here] = 0
    for here, source in copies:
        block[here] = planes[source]


@lru_cache(maxsize=64)  # few: a block's pieces take about a kilobyte
def _reads(
    axes: tuple[Axis, ...], starts: tuple[int, ...], counts: tuple[int, ...]
) -> tuple[list[Region], list[tuple[Region, Region]]]:
    """Which regions of a block are zeros, and which come from where in the input."""
    pieces = [
        axis.pieces(start, count) for axis, start, count in zip(axes, starts, counts, strict=True)
    ]
    both = slice(None), slice(None)
    margins = [
        (*both, *(slice(None),) * axis, here)
        for axis, parts in enumerate(pieces)
        for here, source in parts
        if source is None
    ]
    copies = [
        ((*both, *(here for here, _ in parts)), (*both, *(s for _, s in parts if s is not None)))
        for parts in itertools.product(*pieces)
        if all(source is not None for _, source in parts)
    ]
    return margins, copies


def largest(x: HostArray, dtype: DType) -> int:
    """A bound on the magnitudes of integers, from their type where that says enough."""
    if dtype.kind == "b":
        return 1
    if dtype.itemsize <= 2:
        return 1 << (8 * dtype.itemsize - (dtype.kind == "i"))
    return max(int(x.max()), -int(x.min())) if x.size else 0


def largest_sum(x: HostArray, w: HostArray, x_type: DType) -> int:
    """A bound on any partial sum of products of integers: max |x| times a filter's sum |w|."""
    # Magnitudes are summed in floating point, which cannot overflow; rounding is made up for.
    magnitudes = np.abs(w.astype(np.float64)).sum(axis=tuple(range(1, w.ndim)))
    return int(largest(x, x_type) * float(magnitudes.max(initial=0.0)) * (1 + 2**-40)) + 1


def exact_dtype(x: HostArray, w: HostArray, x_type: DType) -> np.dtype[Any] | None:
    """The fastest floating type in which every sum of these integers is exact, if there is one."""
    largest = largest_sum(x, w, x_type)
    if largest <= 1 << 24:
        return np.dtype(np.float32)
    return np.dtype(np.float64) if largest <= 1 << 53 else None


def store(
    out: HostArray,
    sums: HostArray,
    bias: HostArray | None,
    exact: bool,
    scratch: Scratch | None = None,
) -> None:
    """Write a block of `sums`, (N, C, multiplier, Z, P, Q), with its channels' bias, to `out`.

    Sums in floating point become integers, cut off towards zero, before they become narrow ones:
    that is how they wrap. They do so in chunks of at most 32 KiB or, where integers of their own
    width hold them (`integers_hold`), in `scratch`, which has room for another array like `sums`.
    """
    out = np.reshape(out, sums.shape)  # a view: it splits the channels
    values: Any = None  # (C, multiplier, 1, 1, 1)
    if bias is not None:
        values = bias.reshape(*sums.shape[1:3], 1, 1, 1)
    if out.dtype.kind not in "biu" or sums.dtype.kind in "biu":
        if values is None:
            np.copyto(out, sums, casting="unsafe")
        elif sums.dtype == out.dtype:
            np.add(sums, values.astype(sums.dtype, copy=False), out=out)
        else:
            np.add(sums, values.astype(sums.dtype, copy=False), out=sums)
            np.copyto(out, sums, casting="unsafe")
    elif out.dtype.itemsize == 8:
        np.copyto(out.view(np.int64) if exact else out, sums, casting="unsafe")
        if values is not None:
            np.add(out, values.astype(out.dtype), out=out)
    elif scratch is not None:
        integers = scratch.take(sums.shape, np.dtype(f"i{sums.dtype.itemsize}"))
        np.copyto(integers, sums, casting="unsafe")
        if values is not None:
            np.add(integers, values.astype(integers.dtype), out=integers)
        np.copyto(out, integers, casting="unsafe")
    else:
        for n, c, m, z in np.ndindex(*sums.shape[:4]):
            for top, bottom in spans(sums.shape[4], max(4096 // sums.shape[5], 1)):
                for start, stop in spans(sums.shape[5], 4096):
                    at = n, c, m, z, slice(top, bottom), slice(start, stop)
                    part = sums[at].astype(np.int64)
                    if values is not None:
                        part += values[c, m, 0, 0, 0].astype(np.int64)
                    out[at] = part


def integers_hold(problem: ConvProblem, sums: np.dtype[Any]) -> bool:
    """Whether sums in this floating type fit in integers of its width.

    Integers are summed in float32 only where that is exact.
    """
    return sums.itemsize == 8 or problem.x_dtype.is_exact


def direct_sum(
    sums: HostArray,
    block: HostArray,
    w: HostArray,
    axes: tuple[Axis, ...],
    product: HostArray,
) -> None:
    """Sum one product per tap: sums (N, C, M, Z, P, Q), of block (N, C, D, H, W) and w (C, M, ...).

    `product` is scratch of the shape of `sums`. NaN and Inf stay in the windows that hold them.
    """
    steps = [axis.stride for axis in axes]
    counts = sums.shape[3:]
    # einsum runs through all taps in one call, but takes one plane at a time and is slow at
    # complex products.
    if math.prod(counts) >= _EINSUM and sums.dtype.kind != "c":
        strides = block.strides
        across = tuple(n * step for n, step in zip(strides[2:], steps, strict=True))
        shape = (*block.shape[:2], *w.shape[2:], *counts)
        windows = as_strided(block, shape, (*strides, *across))
        for n, c, m in np.ndindex(*sums.shape[:3]):
            # In this order the innermost loop runs along the columns.
            np.einsum("trs,trszpq->qpz", w[c, m], windows[n, c], out=sums[n, c, m].T, order="F")
        return
    total, term = sums, sums
    for tap in np.ndindex(*w.shape[2:]):
        d, h, v = (
            slice(r, r + (n - 1) * s + 1, s) for r, n, s in zip(tap, counts, steps, strict=True)
        )
        window = block[:, :, None, d, h, v]
        np.multiply(window, w[(slice(None), slice(None), *tap, None, None, None)], out=term)
        if term is not sums:
            np.add(total, term, out=total)
        term = product


def spoilt(sums: HostArray) -> list[int]:
    """The images of `sums`, (images, ...), that have a NaN."""
    if not np.isnan(sums.max()):
        return []
    return [n for n in range(len(sums)) if np.isnan(sums[n].max())]


class Scratch:
    """One worker's scratch memory: its part of the call's, handed out in aligned pieces."""

    def __init__(self, memory: HostArray) -> None:
        self._memory = memory
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        """An uninitialised C-contiguous array."""
        start = self._used
        array: HostArray = np.ndarray(shape, dtype, self._memory, start)
        self._used = start + rounded(array.nbytes)
        return array

    def mark(self) -> int:
        """What is taken so far."""
        return self._used

    def free(self, mark: int = 0) -> None:
        """What was taken after `mark` may be overwritten."""
        self._used = mark


def grown(tiling: Growing, count: int, channels: int, images: int, limit: int) -> Growing:
    """`tiling` with more planes in a block: up to so many of `count` channels, in equal pieces.

    With all channels in a block it takes images too, up to `images`. No block's scratch memory
    grows beyond `limit` bytes.
    """
    while tiling.channels < channels:
        wider = replace(tiling, channels=min(2 * tiling.channels, channels))
        if wider.scratch > limit:
            break
        tiling = wider
    tiling = replace(tiling, channels=-(-count // -(-count // tiling.channels)))
    while tiling.channels == count and tiling.images < images:
        more = replace(tiling, images=min(2 * tiling.images, images))
        if more.scratch > limit:
            break
        tiling = more
    return tiling


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of `size` that make up `count`."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


class Grid(Sequence[tuple[Any, ...]]):
    """All combinations of some axes' values, the last axis fastest, without a list of them."""

    def __init__(self, *axes: Sequence[Any]) -> None:
        self._axes = axes
        self._count = math.prod(map(len, axes))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return itertools.product(*self._axes)

    def __getitem__(self, index: Any) -> Any:
        return next(itertools.islice(iter(self), index, None))
