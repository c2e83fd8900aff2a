"""Large filters through NumPy's FFT, tile by tile (overlap-save).

Along each axis a tile of n padded positions yields n - R + 1 outputs (every stride-th of them is
kept). A tile's spectrum times the conjugate of the filter's is the spectrum of their circular
correlation, whose first n - R + 1 elements do not wrap; channels are summed as spectra:

    Y[k] = sum over c of  F(x[c]) * conj(F(conj(w[k, c])))        y[k] = F^-1(Y[k])[: n-R+1]

Tiles are sized for the caches and for few wasted elements; the filters' spectra are computed once
per call, for as many output channels at a time as their share of the workspace holds.

An FFT's error is relative to a tile's norms, not to each window's sum S of |x||w|. In float64 or
complex128 the results y of a tile keep

    |y - y_ref| <= E = 8 log2(n) eps(float64) * sum over c of |x[c] tile|_2 |w[c]|_2

A float32 result of magnitude |y| > E / (8 eps(float32)) is thereby within the direct sum's own
bound. The few others are not trusted: windows of zeros give zero, the rest are summed tap by tap.
In float64 and complex128 nearly all results would be distrusted; there the bound is E, and "auto"
does not choose it. Sums of integers are rounded to integers where E < 1/4, else left to
``filter2d``. A tile with a NaN or Inf spoils its whole result, which is then summed tap by tap.

Planes of float32 and narrower are first transformed in float32, in half the time. With the root
mean squares X and Y of a tile's elements and results, and u = eps(float32) / 2, errors are under

    24 u (|w|_2 X + Y) + 3 u |w|_1 X

which is 1.5 times the largest that random, smooth, oscillating, and uneven data were seen to have.
Where ``magnitudes`` shows it to be within ERROR_CONSTANT times the direct sum's bound in every
window, the results stand. What is left (windows nearly of zeros, or much darker than their tile;
NaN, Inf) is transformed in float64. So float32 and narrower results keep that bound element by
element, not by a tile's norm.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import filter2d, magnitudes, planes, separable
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis, Scratch
from gpuconv.numpy_backend.scratch import ALIGN, arena, rounded
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

ERROR_CONSTANT = 16.0  # its error bound over that of the direct sum (c in gpuconv.testing)

_SPREAD, _GATHERED = 24.0, 3.0  # of the error of transforms in float32
_SOUND = 1e-15, 1e15  # norms between which they neither overflow nor lose bits to underflow
_FEW = 120  # elements of x that a corner's windows need for it, or it is left to float64
_CACHED = 5 << 20  # bytes of a worker's arrays beyond which transforms slow down
_LINE = 1 << 17  # elements of neighbouring tiles of one axis that are transformed together
_CALL = 120e-6  # seconds that the calls of a block take
_MENDING = 1.2  # what looking for results too small to trust, and summing them again, adds
_BUFFERS = 64 << 10  # bytes that NumPy's own loops take in each worker
_PASS = {4: 1.2e-9, 8: 1.8e-9}  # seconds per float of a transform along one axis, there or back
_DOUBLING = 0.12  # how much longer that takes with each doubling of a length
_SHORT = 1024  # beyond this one
_VECTOR = 4  # lines that are transformed side by side in one vector,
_ALONE = 2.0  # and how much longer fewer take
_MULTIPLY = 0.6e-9  # seconds per element of a product of spectra
_MOVE = 2.2e-9  # seconds per element to read, judge, and store it
_SHARED = 1.4  # how much longer planes take on all threads than a share of one thread's time,
_PLANES = 900e-6  # and seconds of a call until all of them work
_SIGNAL = 2.2  # how much longer it takes by tiles of one axis, which overlap as they are read


@dataclass(frozen=True)
class Tiling:
    """Tiles of one class of outputs, and how many of them a block transforms together."""

    axes: tuple[Axis, Axis, Axis]
    tile: tuple[int, int, int]
    count: int  # neighbours along the only axis in a block
    outs: int  # output channels per group whose filters' spectra are held at a time
    groups: int  # whose filters' spectra are held at a time
    together: int  # of those, how many a block has
    seconds: float  # of one image, on one thread
    setup: float  # seconds for the filters' spectra
    kept: int  # bytes of one worker's arrays
    scratch: int  # and with what its calls allocate
    held: int  # bytes of the filters' spectra

    @property
    def valid(self) -> tuple[int, ...]:
        """Outputs of a tile."""
        return tuple(
            (n - axis.filter) // axis.stride + 1
            for n, axis in zip(self.tile, self.axes, strict=True)
        )

    @property
    def step(self) -> tuple[int, ...]:
        """Outputs from one block to the next."""
        depth, rows, columns = self.valid
        return depth, rows, columns * self.count


@lru_cache(maxsize=32)
def _smooth(limit: int) -> tuple[int, ...]:
    """The lengths up to `limit` without prime factors beyond 5."""
    powers = [2**a * 3**b * 5**c for a in range(2, 31) for b in range(20) for c in range(14)]
    return tuple(sorted(n for n in powers if n <= limit))


def tile_lengths(axis: Axis) -> list[int]:
    """Tile lengths worth considering: the shortest for each number of tiles."""
    if axis.filter == axis.outputs == 1:
        return [1]
    result = []
    pieces = 1
    while pieces <= axis.outputs:
        reads = axis.reads(-(-axis.outputs // pieces))
        if pieces > 1 and reads < 1.15 * axis.filter:
            break
        sizes = _smooth(1 << max(reads.bit_length() + 1, 10))
        result.append(sizes[bisect_left(sizes, reads)])
        pieces += max(pieces // 4, 1)
    return sorted(set(result))


@lru_cache(maxsize=1024)
def tilings(problem: ConvProblem, device: Cpu) -> tuple[Tiling, ...] | No:
    """One per class of the dilation; they do not depend on the batch."""
    limit = problem.workspace_within(WORKSPACE_CAP)
    limit -= device.threads * _BUFFERS + _filter_bytes(problem)
    result = []
    for axes in planes.classes(problem):
        best: Tiling | None = None
        for depth, rows, columns in itertools.product(*map(tile_lengths, axes)):
            tile = depth, rows, columns
            if math.prod(tile) > 1 << 20:
                continue
            option = _tiling(problem, device, axes, tile, limit)
            if option is not None and (best is None or _total(option) < _total(best)):
                best = option
        if best is None:
            return No("no tile's spectra fit in the workspace")
        result.append(best)
    return tuple(result)


def _total(tiling: Tiling) -> float:
    return tiling.seconds + tiling.setup


def _filter_bytes(problem: ConvProblem) -> int:
    """Of the filters in the transforms' type, and of what is known of their magnitudes."""
    return math.prod(problem.w_shape) * 40 + ALIGN


def _narrow(problem: ConvProblem) -> bool:
    """Whether transforms in float32 are tried first."""
    kind = problem.accumulator
    return problem.group_in_channels == 1 and not kind.is_exact and kind.eps > 2.0**-52


def _tiling(
    problem: ConvProblem,
    device: Cpu,
    axes: tuple[Axis, Axis, Axis],
    tile: tuple[int, int, int],
    limit: int,
) -> Tiling | None:
    elements = math.prod(tile)
    parts = 2 if problem.accumulator.is_complex else 1
    spectrum = 16 * math.prod(tile[:2]) * _half(problem, tile[2])
    real = elements * 8 * parts
    ins, outs, groups = problem.group_in_channels, problem.group_out_channels, problem.groups
    valid = [(n - a.filter) // a.stride + 1 for n, a in zip(tile, axes, strict=True)]
    tiles = [-(-a.outputs // v) for a, v in zip(axes, valid, strict=True)]
    marks = math.prod(magnitudes.marks_shape(tile, tuple(a.filter for a in axes)))
    # Filters' spectra may take half of the memory. Each worker has a tile, its spectrum, a product
    # and the sums of its output channels; and for a while a copy that a transform makes, or the
    # four arrays of results that are computed again.
    held_limit = limit // 2
    while outs > 1 and outs * ins * spectrum > held_limit:
        outs = -(-outs // 2)

    def kept(count: int) -> int:
        totals = outs if ins > 1 else 0
        return count * (real + marks + (2 + totals) * spectrum) + 8 * ALIGN

    def scratch(count: int) -> int:
        return kept(count) + count * (4 * real + spectrum)

    while outs > 1 and device.threads * scratch(1) > limit // 2:
        outs = -(-outs // 2)
    one = outs * ins * spectrum
    if one + device.threads * scratch(1) > limit:
        return None
    count = 1
    if tile[0] == tile[1] == 1:
        room = (limit - one) // (device.threads * scratch(1))
        count = max(min(_LINE // tile[2], tiles[2] // device.threads, room), 1)
        blocks = -(-tiles[2] // count)
        if count > 1:  # as many for every thread
            blocks = -(-blocks // device.threads) * device.threads
        count = -(-tiles[2] // blocks)
    each = scratch(count)
    held = min(groups, max(min(held_limit, limit - device.threads * each) // one, 1))
    room = (limit - held * one) // (device.threads * each)
    together = max(min(held, (_CACHED // 4) // each, room), 1)
    if groups >= device.threads:
        together = min(together, -(-held // device.threads))
    width = 4 if _narrow(problem) else 8
    used = together * count * (real + 2 * spectrum) * width // 8
    slow = 1.2 if used > _CACHED else 1.0
    transform = sum(
        _pass(width, n, together * count * elements // n) for n in tile if n > 1
    ) * (elements * parts * slow)  # fmt: skip
    shares = -(-problem.group_out_channels // outs)
    blocks = math.prod(tiles[:2]) * -(-tiles[2] // count)
    one_block = count * (
        shares * ins * transform
        + problem.group_out_channels
        * (transform + elements * (_MOVE + ins * _MULTIPLY * slow * width / 8) * parts)
    )
    one_block += shares * _CALL / together
    if width == 4:  # windows with few elements of x are left to float64
        one_block *= 1 + 2 * _corners(axes, tiles) / math.prod(tiles)
    queue = blocks * -(-groups // together)  # an image's last blocks leave threads idle
    idle = -(-queue // device.threads) * device.threads / queue
    seconds = blocks * groups * one_block * idle
    if tile[0] == tile[1] == 1:
        seconds *= _SIGNAL
    setup = problem.out_channels * ins * (0.7 * transform + _CALL / together / 2)
    setup *= device.threads / min(device.threads, -(-held // together))
    return Tiling(
        axes, tile, count, outs, held, together, seconds, setup,
        together * kept(count), together * each, held * one,
    )  # fmt: skip


def _pass(width: int, length: int, lines: int) -> float:
    """Seconds per float of a transform along one axis, of so many lines together."""
    longer = 1 + _DOUBLING * max(math.log2(length / _SHORT), 0)
    return _PASS[width] * (longer + (_ALONE if lines < _VECTOR else 0))


def _corners(axes: tuple[Axis, Axis, Axis], tiles: list[int]) -> int:
    """How many tiles have windows that see too little of x to be transformed in float32."""
    seen, corners = 1, 1
    for axis, count in zip(axes, tiles, strict=True):
        first, end = axis.inside
        least = axis.filter - first
        last = end - (axis.outputs - 1) * axis.stride
        seen *= max(min(least, last, axis.filter), 1)
        edges = (least < axis.filter) + (last < axis.filter)
        corners *= min(count, edges) if edges else count
    return corners if seen < _FEW else 0


def _half(problem: ConvProblem, length: int) -> int:
    """The length of a spectrum's last axis."""
    return length if problem.accumulator.is_complex else length // 2 + 1


def supports(problem: ConvProblem, device: Cpu) -> bool | No:
    if problem.operation != "fprop":
        return No(f"{problem.operation} is not what it computes")
    if math.prod(problem.filter) < 25:
        return No("the filter is small: its tiles would be mostly overlap")
    if reason := planes.scattered(problem):
        return No(reason)
    if problem.accumulator.is_exact and not problem.depthwise:
        return No("sums of integers over several channels are not shown to be exact")
    if problem.accumulator.is_exact and not _has_other(problem, device):
        return No("integers that rounding does not make exact would need filter2d's strips")
    found = tilings(problem, device)
    return found if isinstance(found, No) else True


def only_by_name(problem: ConvProblem) -> str | None:
    if problem.accumulator.name in ("float64", "complex128"):
        return f"in {problem.accumulator} its error follows a tile's norm, not each window's"
    return None


def cost(problem: ConvProblem, device: Cpu) -> float:
    """Transforms of all tiles and filters at the measured time per element."""
    found = _found(problem, device)
    setup = sum(t.setup for t in found)
    total = setup + problem.batch * sum(t.seconds for t in found)
    if only_by_name(problem) is None and not _narrow(problem):
        total *= _MENDING
    if problem.ndim > 1:
        return _SHARED * total / device.threads + _PLANES
    return total / device.threads + 100e-6


def _found(problem: ConvProblem, device: Cpu) -> tuple[Tiling, ...]:
    found = tilings(problem, device)
    assert not isinstance(found, No)
    return found


def workspace(problem: ConvProblem, device: Cpu) -> int:
    own = max(t.held + device.threads * t.scratch for t in _found(problem, device))
    own += _filter_bytes(problem) + device.threads * _BUFFERS
    return max(own, filter2d.workspace(problem, device)) if _has_other(problem, device) else own


def _has_other(problem: ConvProblem, device: Cpu) -> bool:
    """Whether filter2d can take over: filters of rank 1, integers that would not round right."""
    return problem.depthwise and filter2d.fits(problem, device)


def run(plan: Plan, x: HostArray, w: HostArray, bias: HostArray | None, out: HostArray) -> None:
    problem = plan.problem
    if _has_other(problem, plan.device):
        factors = separable.factors(problem, w)
        if factors is not None:
            filter2d.apply(plan, x, w, bias, out, factors)
            return
    found = _found(problem, plan.device)
    if problem.accumulator.is_exact and not _rounds_right(found, x, w, problem):
        filter2d.run(plan, x, w, bias, out)
        return
    if problem.flip:
        w = np.flip(w, tuple(range(2, w.ndim)))
    wide = np.complex128 if problem.accumulator.is_complex else np.float64
    w = planes.lift(w).astype(wide)
    w = w.reshape(problem.groups, problem.group_out_channels, *w.shape[1:])
    for tiling in found:
        _Tiles(plan, tiling, planes.lift(x), w, bias, planes.lift(out)).run()


def _rounds_right(
    found: tuple[Tiling, ...], x: HostArray, w: HostArray, problem: ConvProblem
) -> bool:
    """Whether the error bound shows that rounding gives the exact sums."""
    largest = max(math.prod(t.tile) for t in found)
    norm = math.sqrt(float(np.square(w.astype(np.float64)).sum(axis=tuple(range(1, w.ndim))).max()))
    bound = 8 * math.log2(largest) * 2.0**-52 * planes.largest(x, problem.x_dtype) * norm
    return bound * math.sqrt(largest) < 0.25


class _Tiles:
    """One class of outputs: the filters' spectra, and the tiles under them."""

    def __init__(
        self,
        plan: Plan,
        tiling: Tiling,
        x: HostArray,
        w: HostArray,
        bias: HostArray | None,
        out: HostArray,
    ) -> None:
        problem = plan.problem
        self.problem, self.tiling, self.threads = problem, tiling, plan.device.threads
        ins, outs, groups = problem.group_in_channels, problem.group_out_channels, problem.groups
        self.x = x.reshape(x.shape[0], groups, ins, *x.shape[2:])
        self.out = out.reshape(out.shape[0], groups, outs, *out.shape[2:])
        self.w, self.bias = w, None if bias is None else bias.reshape(groups, outs)
        self.complex = problem.accumulator.is_complex
        self.exact = problem.accumulator.is_exact
        self.axes = [a for a in (0, 1) if tiling.tile[a] > 1] + [2]
        self.finite = self.exact or bool(np.isfinite(w).all())
        # The error E of a tile over its norm, and the smallest result that it leaves trustworthy.
        error = 8 * math.log2(max(math.prod(tiling.tile), 2)) * float(np.finfo(np.float64).eps)
        narrow = not self.exact and problem.accumulator.eps > np.finfo(np.float64).eps
        self.trust = error / (8 * problem.accumulator.eps) if narrow else None
        self.norms = np.sqrt(np.square(np.abs(w)).sum(axis=(3, 4, 5)))  # (groups, outs, ins)
        self.filters: dict[tuple[int, int], magnitudes.Filters] = {}
        self.left: list[_Block] = []  # what float32 does not serve
        self.held: HostArray
        self.workers: list[Scratch] = []

    def run(self) -> None:
        problem, t = self.problem, self.tiling
        images = self.x.shape[0]
        threads = self.threads if t.setup + images * t.seconds > 300e-6 else 1
        grid = itertools.product(
            *(range(0, axis.outputs, n) for axis, n in zip(t.axes, t.step, strict=True))
        )
        tiles = list(grid)
        narrow, wide = (np.complex64, np.complex128) if self.complex else (np.float32, np.float64)
        byte = np.dtype(np.uint8)
        with arena(rounded(t.held) + threads * rounded(t.kept) + ALIGN) as memory:
            self.held = memory.take(t.held, byte)
            self.workers = [Scratch(memory.take(t.kept, byte)) for _ in range(threads)]
            for groups, outs in itertools.product(
                planes.spans(problem.groups, t.groups),
                planes.spans(problem.group_out_channels, t.outs),
            ):
                parts = planes.spans(groups[1] - groups[0], t.together)
                blocks = [(n, part, at) for n in range(images) for part in parts for at in tiles]
                if _narrow(problem):
                    self._sweep(np.dtype(narrow), groups[0], slice(*outs), parts, blocks)
                    blocks, self.left = self.left, []
                if blocks:
                    self._sweep(np.dtype(wide), groups[0], slice(*outs), parts, blocks)

    def _sweep(
        self,
        dtype: np.dtype[Any],
        first: int,
        outs: slice,
        parts: list[tuple[int, int]],
        blocks: list[_Block],
    ) -> None:
        """Transform the filters of groups from `first` on, then the blocks, in `dtype`."""
        t, threads = self.tiling, len(self.workers)
        shape = (parts[-1][1], outs.stop - outs.start, self.problem.group_in_channels)
        half = _half(self.problem, t.tile[2])
        complex_type = np.result_type(dtype, np.complex64)
        held: HostArray = np.ndarray((*shape, *t.tile[:2], 1, half), complex_type, self.held)
        sweep = _Sweep(dtype, complex_type, first, outs, held)
        run_blocks(threads, parts, partial(self._transform, sweep))
        run_blocks(threads, blocks, partial(self._block, sweep))

    def _transform(self, sweep: _Sweep, part: tuple[int, int], worker: int) -> None:
        """The conjugate spectra of some filters, times the elements of a tile."""
        t = self.tiling
        w = self.w[sweep.groups(part), sweep.outs]
        if sweep.narrow:
            filters = magnitudes.Filters(np.abs(w[:, :, 0]))
            self.filters[part] = filters
            # Filled in before several threads ask for them.
            _ = filters.sums, filters.norms, filters.largest
        scale = float(math.prod(t.tile) ** 2)  # both operands' spectra are divided
        depth, rows, columns = w.shape[3:]
        # NumPy pads what it transforms too, but then takes line by line.
        taps = np.zeros((len(w), depth, rows, t.tile[2]), sweep.dtype)
        for k, c in np.ndindex(*w.shape[1:3]):
            held = sweep.held[slice(*part), k, c, :, :, 0]
            np.multiply(w[:, k, c], scale, out=taps[..., :columns], casting="same_kind")
            held.fill(0)
            spectra = held[:, :depth, :rows]
            if self.complex:  # inverse transforms have the conjugate's sign
                np.fft.ifft(taps, axis=3, out=spectra)
            else:
                np.fft.rfft(taps, axis=3, norm="forward", out=spectra)
                np.conjugate(spectra, out=spectra)
            for axis in self.axes[-2::-1]:
                np.fft.ifft(held, axis=axis + 1, out=held)

    # Forward transforms divide by the number of elements too: NumPy's do so in float32, but take
    # a factor of 1, an integer, for a reason to compute in float64.
    def _forward(self, tiles: HostArray, spectrum: HostArray) -> None:
        first = np.fft.fft if self.complex else np.fft.rfft
        first(tiles, axis=4, norm="forward", out=spectrum)
        for axis in self.axes[-2::-1]:
            np.fft.fft(spectrum, axis=axis + 1, norm="forward", out=spectrum)

    def _inverse(self, spectrum: HostArray, tiles: HostArray) -> None:
        """The first elements of the tiles, as many along depth and rows as `tiles` has."""
        for axis in self.axes[:-1]:
            np.fft.ifft(spectrum, axis=axis + 1, out=spectrum)
        spectrum = spectrum[:, : tiles.shape[1], : tiles.shape[2]]
        if self.complex:
            np.fft.ifft(spectrum, axis=4, out=tiles)
        else:
            np.fft.irfft(spectrum, self.tiling.tile[2], axis=4, out=tiles)

    def _block(self, sweep: _Sweep, block: _Block, worker: int) -> None:
        n, part, at = block
        t, scratch = self.tiling, self.workers[worker]
        groups, outs = sweep.groups(part), sweep.outs
        x = self.x[n : n + 1, groups]
        stops = tuple(
            min(p + step, axis.outputs) for p, step, axis in zip(at, t.step, t.axes, strict=True)
        )
        outputs = tuple(q - p for p, q in zip(at, stops, strict=True))
        starts = tuple(p * axis.stride for p, axis in zip(at, t.axes, strict=True))
        count = -(-outputs[2] // t.valid[2])
        shape = (part[1] - part[0], *t.tile[:2], count)
        scratch.free()
        tiles = scratch.take((*shape, t.tile[2]), sweep.dtype)
        line, windows = self._line(tiles)
        size = (*shape, sweep.held.shape[-1])
        spectrum, product = (scratch.take(size, sweep.complex_type) for _ in range(2))
        held = sweep.held[slice(*part)]
        total = scratch.take((held.shape[1], *size), product.dtype) if x.shape[2] > 1 else None
        norms = np.zeros((shape[0], held.shape[1]))
        for c in range(x.shape[2]):
            planes.read(line[None], x[:, :, c], t.axes, starts)
            if sweep.narrow:
                margin = self._margin(line, windows, spectrum, part, starts, outputs, scratch)
                if not (margin >= 0).all():
                    self.left.append(block)
                    return
            elif self.trust is not None:
                flat = (np.abs(line) if self.complex else line).reshape(shape[0], -1)
                norm = np.sqrt(np.einsum("gi,gi->g", flat, flat))
                norms += norm[:, None] * self.norms[groups, outs, c]
            self._forward(windows, spectrum)
            if total is not None:
                for k in range(held.shape[1]):
                    if c == 0:
                        np.multiply(spectrum, held[:, k, c], out=total[k])
                    else:
                        np.multiply(spectrum, held[:, k, c], out=product)
                        total[k] += product
        here = tuple(axis.out(p, q) for axis, p, q in zip(t.axes, at, stops, strict=True))
        for k in range(held.shape[1]):
            if total is not None:
                product = total[k]
            else:
                np.multiply(spectrum, held[:, k, 0], out=product)
            if sweep.narrow and not (margin[:, k] >= self._spread(product)).all():
                self.left.append(block)
                return
            sums = self._sums(product, tiles, outputs)
            out_k = outs.start + k
            if not sweep.narrow:
                sums = self._checked(sums, x, self.w[groups, out_k], starts, norms[:, k])
            bias = None if self.bias is None else self.bias[groups, out_k]
            out = self.out[(slice(n, n + 1), groups, out_k, *here)]
            planes.store(out, sums[None, :, None], bias, self.exact)

    def _line(self, tiles: HostArray) -> tuple[HostArray, HostArray]:
        """What neighbouring tiles read, (groups, depth, rows, columns), and the tiles in it."""
        groups, depth, rows, count, n = tiles.shape
        step = self.tiling.valid[2] * self.tiling.axes[2].stride
        length = (count - 1) * step + n
        line = tiles.reshape(-1)[: groups * depth * rows * length]
        line = line.reshape(groups, depth, rows, length)
        strides = (*line.strides[:3], step * line.itemsize, line.itemsize)
        return line, as_strided(line, tiles.shape, strides)

    def _margin(
        self,
        line: HostArray,
        windows: HostArray,
        spectrum: HostArray,
        part: tuple[int, int],
        starts: tuple[int, ...],
        outputs: tuple[int, ...],
        scratch: Scratch,
    ) -> HostArray:
        """What the bound leaves to the errors that grow with the results, (groups, outs).

        Negative or NaN: nothing. `spectrum` is overwritten.
        """
        t, kind = self.tiling, self.problem.accumulator
        filters = self.filters[part]
        shape = windows.shape if t.count > 1 else (len(line), 1, 1, 1, line[0].size)
        flat = windows if t.count > 1 else line.reshape(shape)
        norm = np.sqrt(np.vecdot(flat, flat).real.max(axis=(1, 2, 3)) / math.prod(t.tile))
        least, most = _SOUND
        sound = (norm > least) & (norm < most)
        if not sound.all() and line[~sound].any():  # but zeros are sound
            return np.full(filters.sums.shape, -1.0)
        real = np.empty(0, line.dtype).real.dtype
        magnitude = spectrum.reshape(-1).view(real)[: line.size].reshape(line.shape)
        np.abs(line, out=magnitude)
        marks = scratch.take(
            (len(line), *magnitudes.marks_shape(line.shape[1:], filters.magnitudes.shape[2:])),
            np.dtype(bool),
        )
        inside = tuple(
            (min(max(axis.inside[0] - start, 0), length), min(axis.inside[1] - start, length))
            for axis, start, length in zip(t.axes, starts, line.shape[1:], strict=True)
        )
        last = tuple((n - 1) * axis.stride for n, axis in zip(outputs, t.axes, strict=True))
        sums = magnitudes.least_sums(magnitude, filters, inside, last, marks)
        growth = max(math.sqrt(self.problem.reduction + 1), 4.0)
        allowed = ERROR_CONSTANT * (4 if self.complex else 2) * kind.eps * growth * sums
        suited = (filters.norms > least) & (filters.norms < most) | (filters.norms == 0)
        weight = _SPREAD * filters.norms + _GATHERED * filters.sums
        error = kind.eps / 2 * norm[:, None] * np.where(suited, weight, np.inf)
        return np.asarray(allowed - error)

    def _spread(self, product: HostArray) -> HostArray:
        """The part of the error that grows with the results whose spectra these are, (groups,)."""
        groups, count = len(product), product.shape[3]
        flat = product.reshape(groups, count, -1)  # several tiles have no rows
        squares = np.vecdot(flat, flat).real.max(axis=1) * (1 if self.complex else 2)
        norm = np.sqrt(squares) / math.prod(self.tiling.tile)
        return np.asarray(_SPREAD * self.problem.accumulator.eps / 2 * norm)

    def _sums(self, product: HostArray, tiles: HostArray, outputs: tuple[int, ...]) -> HostArray:
        """Transform back, and pick the outputs: (groups, Z, P, Q)."""
        axes, valid = self.tiling.axes, self.tiling.valid[2]
        depth, rows = (
            (n - 1) * axis.stride + 1 for n, axis in zip(outputs, axes[:2], strict=False)
        )
        tiles = tiles[:, :depth, :rows]
        self._inverse(product, tiles)
        d, h, w = (axis.stride for axis in axes)
        picked = tiles[:, ::d, ::h, :, : (valid - 1) * w + 1 : w]
        if picked.shape[3] == 1:
            return picked[:, :, :, 0, : outputs[2]]
        # What was transformed is not needed again.
        sums = product.reshape(-1).view(tiles.dtype)[: picked.size].reshape(picked.shape)
        np.copyto(sums, picked)
        return sums.reshape(*picked.shape[:3], -1)[..., : outputs[2]]

    def _checked(
        self,
        sums: HostArray,
        x: HostArray,
        w: HostArray,
        starts: tuple[int, ...],
        norms: HostArray,
    ) -> HostArray:
        """The sums, recomputed where the transform's error would show."""
        least = 0.0 if self.exact else np.abs(sums).min()
        if not self.finite or np.isnan(least):
            return self._direct(x, w, starts, sums.shape[1:])
        if self.trust is not None and least <= self.trust * norms.max():
            self._mend(x, w, starts, sums, self.trust * norms)
        if self.exact:
            np.rint(sums, out=sums)
        return sums

    def _mend(
        self,
        x: HostArray,
        w: HostArray,
        starts: tuple[int, ...],
        sums: HostArray,
        trusted: HostArray,
    ) -> None:
        """Recompute the results that are too small for the transform's error."""
        doubtful = np.abs(sums) <= trusted[:, None, None, None]
        axes = self.tiling.axes
        reads = [axis.reads(count) for axis, count in zip(axes, sums.shape[1:], strict=True)]
        seen: HostArray = np.zeros((1, x.shape[1], *reads), np.int32)
        for c in range(x.shape[2]):
            part = np.empty(seen.shape, x.dtype)
            planes.read(part, x[:, :, c], axes, starts)
            np.logical_or(seen, part, out=seen)
        for dim, axis in enumerate(axes, start=2):  # the number of nonzero elements in each window
            seen = np.cumsum(seen, axis=dim, dtype=np.int32).swapaxes(dim, -1)
            counts = seen[..., axis.filter - 1 :: axis.stride].copy()
            counts[..., 1:] -= seen[..., axis.stride - 1 : -axis.filter : axis.stride]
            seen = counts.swapaxes(dim, -1)
        doubtful &= seen[0] > 0
        sums[seen[0] == 0] = 0
        places = np.argwhere(doubtful)
        if len(places) > 256:
            sums[...] = self._direct(x, w, starts, sums.shape[1:])
            return
        for g, *place in places:
            corner = tuple(
                s + p * axis.stride for s, p, axis in zip(starts, place, axes, strict=True)
            )
            one = self._direct(x[:, g : g + 1], w[g : g + 1], corner, (1, 1, 1))
            sums[(g, *place)] = one[0, 0, 0, 0]

    def _direct(
        self, x: HostArray, w: HostArray, starts: tuple[int, ...], shape: tuple[int, ...]
    ) -> HostArray:
        """The same outputs, tap by tap: NaN and Inf stay in the windows that hold them."""
        axes = self.tiling.axes
        total = np.zeros((1, len(w), 1, *shape), self.w.dtype)
        sums, product = np.empty_like(total), np.empty_like(total)
        reads = [axis.reads(count) for axis, count in zip(axes, shape, strict=True)]
        block = np.empty((1, len(w), *reads), self.w.dtype)
        for c in range(x.shape[2]):
            planes.read(block, x[:, :, c], axes, starts)
            if sums.size == len(w):  # one output each: its window is the whole block
                sums[:, :, 0, 0, 0, 0] = np.einsum("ngdhw,gdhw->ng", block, w[:, c])
            else:
                planes.direct_sum(sums, block, w[:, None, c], axes, product)
            total += sums
        return total[0, :, 0]


# An image, a span of groups among those held, and the first output of the block.
_Block = tuple[int, tuple[int, int], tuple[int, ...]]


@dataclass(frozen=True)
class _Sweep:
    """All blocks once, in one type."""

    dtype: np.dtype[Any]
    complex_type: np.dtype[Any]
    first: int  # group whose filters are held
    outs: slice
    held: HostArray  # (groups, outs, ins, D, H, 1, W // 2 + 1)

    @property
    def narrow(self) -> bool:
        return self.complex_type.itemsize == 8

    def groups(self, part: tuple[int, int]) -> slice:
        """The groups of a part, among all."""
        return slice(self.first + part[0], self.first + part[1])
