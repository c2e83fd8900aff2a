"""Large filters through NumPy's FFT, tile by tile (overlap-save).

Along each axis a tile of n padded positions yields n - R + 1 outputs (every stride-th of them is
kept). A tile's spectrum times the conjugate of the filter's is the spectrum of their circular
correlation, whose first n - R + 1 elements do not wrap; channels are summed as spectra:

    Y[k] = sum over c of  F(x[c]) * conj(F(conj(w[k, c])))        y[k] = F^-1(Y[k])[: n-R+1]

Tiles are sized for the caches and for few wasted elements; the filters' spectra are computed once
per call, for as many output channels at a time as their share of the workspace holds.

Always in float64 or complex128. An FFT's error is relative to a tile's norm, not to each window's:

    |y - y_ref| <= E = 8 log2(n) eps(float64) * sum over c of |x[c] tile|_2 |w[c]|_2

A float32 result of magnitude |y| > E / (8 eps(float32)) is thereby within the direct sum's own
bound. The few others are not trusted: windows of zeros give zero, the rest are summed tap by tap.
So float32 and narrower results keep the direct sum's bound, element by element, whatever the data.
In float64 and complex128 nearly all results would be distrusted; there the bound is E, and "auto"
does not choose it. Sums of integers are rounded to integers where E < 1/4, else left to
``filter2d``. A tile with a NaN or Inf spoils its whole result, which is then summed tap by tap.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend import filter2d, planes, separable
from gpuconv.numpy_backend.device import WORKSPACE_CAP, Cpu
from gpuconv.numpy_backend.planes import Axis
from gpuconv.numpy_backend.workers import run_blocks
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

_CACHED = 5 << 20  # bytes of a worker's arrays beyond which transforms slow down
_CALL = 120e-6  # seconds that the calls of a block take
_MENDING = 1.2  # what looking for results too small to trust, and summing them again, adds
_BUFFERS = 64 << 10  # bytes that NumPy's own loops take in each worker
_PASS = 2.5e-9  # seconds per element of a real transform along one axis, there or back
_LONG = 3  # passes that one along the only axis is worth: it is longer
_MULTIPLY = 0.6e-9  # and of a product of spectra


@dataclass(frozen=True)
class Tiling:
    """Tiles of one class of outputs, and how many channels a block transforms together."""

    axes: tuple[Axis, Axis, Axis]
    tile: tuple[int, int, int]
    outs: int  # output channels per group whose filters' spectra are held at a time
    groups: int  # whose filters' spectra are held at a time
    together: int  # of those, how many a block has
    seconds: float  # of one image, on one thread
    setup: float  # seconds for the filters' spectra
    scratch: int  # bytes of one worker
    held: int  # bytes of the filters' spectra

    @property
    def valid(self) -> tuple[int, ...]:
        """Outputs of a tile."""
        return tuple(
            (n - axis.filter) // axis.stride + 1
            for n, axis in zip(self.tile, self.axes, strict=True)
        )


@lru_cache(maxsize=256)
def _sizes(limit: int) -> tuple[int, ...]:
    """The lengths up to `limit` that transform fast."""
    products = (
        a << shift for shift in range(limit.bit_length()) for a in (1, 3, 5, 9, 15) if shift > 1
    )
    return tuple(sorted(n for n in products if 16 <= n <= limit))


def tile_lengths(axis: Axis) -> list[int]:
    """Tile lengths worth considering along one axis."""
    whole = axis.reads(axis.outputs)
    if axis.filter == axis.outputs == 1:
        return [1]
    sizes = _sizes(max(64, 4 * whole))
    enough = next((n for n in sizes if n >= whole), whole)
    least = 1.15 * axis.filter
    return [n for n in sizes if least <= n < enough] + [enough]


@lru_cache(maxsize=1024)
def tilings(problem: ConvProblem, device: Cpu) -> tuple[Tiling, ...] | No:
    """One per class of the dilation; they do not depend on the batch."""
    limit = problem.workspace_within(WORKSPACE_CAP)
    limit -= device.threads * _BUFFERS + math.prod(problem.w_shape) * 16
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


def _tiling(
    problem: ConvProblem,
    device: Cpu,
    axes: tuple[Axis, Axis, Axis],
    tile: tuple[int, int, int],
    limit: int,
) -> Tiling | None:
    elements = math.prod(tile)
    spectrum = 16 * math.prod(tile[:2]) * _half(problem, tile[2])
    real = elements * (16 if problem.accumulator.is_complex else 8)
    ins, outs, groups = problem.group_in_channels, problem.group_out_channels, problem.groups
    # Filters' spectra may take half of the memory. Each worker has a tile, its spectrum, a product
    # and the sums of its output channels; and for a while a copy that a transform makes, or the
    # four arrays of results that are computed again.
    held_limit = limit // 2
    while outs > 1 and outs * ins * spectrum > held_limit:
        outs = -(-outs // 2)
    while outs > 1 and device.threads * (5 * real + (3 + outs) * spectrum) > limit // 2:
        outs = -(-outs // 2)
    one, each = outs * ins * spectrum, 5 * real + (3 + outs) * spectrum
    if one + device.threads * each > limit:
        return None
    held = min(groups, max(min(held_limit, limit - device.threads * each) // one, 1))
    room = (limit - held * one) // (device.threads * each)
    together = max(min(held, (_CACHED // 4) // each, room), 1)
    if groups >= device.threads:
        together = min(together, -(-held // device.threads))
    valid = [(n - a.filter) // a.stride + 1 for n, a in zip(tile, axes, strict=True)]
    tiles = math.prod(-(-a.outputs // v) for a, v in zip(axes, valid, strict=True))
    along = sum(n > 1 for n in tile)
    passes = (along if along > 1 else _LONG) * (1 + problem.accumulator.is_complex)
    slow = 1.5 if each * together > _CACHED else 1.0
    transform = elements * _PASS * slow * passes * max(math.log2(elements), 8) / 16
    shares = -(-problem.group_out_channels // outs)
    seconds = (
        tiles
        * groups
        * (
            shares * ins * transform
            + problem.group_out_channels * (transform + ins * elements * _MULTIPLY * slow)
            + shares * _CALL / together
        )
    )
    setup = problem.out_channels * ins * (transform + _CALL / together / 2)
    scratch = together * each
    return Tiling(axes, tile, outs, held, together, seconds, setup, scratch, held * one)


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
    if only_by_name(problem) is None:
        total *= _MENDING
    return total / device.threads + 100e-6


def _found(problem: ConvProblem, device: Cpu) -> tuple[Tiling, ...]:
    found = tilings(problem, device)
    assert not isinstance(found, No)
    return found


def workspace(problem: ConvProblem, device: Cpu) -> int:
    own = max(t.held + device.threads * t.scratch for t in _found(problem, device))
    own += math.prod(problem.w_shape) * 16 + device.threads * _BUFFERS
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
        self.spectrum = (*tiling.tile[:2], _half(problem, tiling.tile[2]))
        self.finite = self.exact or bool(np.isfinite(w).all())
        # The error E of a tile over its norm, and the smallest result that it leaves trustworthy.
        error = 8 * math.log2(max(math.prod(tiling.tile), 2)) * float(np.finfo(np.float64).eps)
        narrow = not self.exact and problem.accumulator.eps > np.finfo(np.float64).eps
        self.trust = error / (8 * problem.accumulator.eps) if narrow else None
        self.norms = np.sqrt(np.square(np.abs(w)).sum(axis=(3, 4, 5)))  # (groups, outs, ins)
        self.workers: dict[int, _Arrays] = {}

    def run(self) -> None:
        problem, t = self.problem, self.tiling
        images = self.x.shape[0]
        threads = self.threads if t.setup + images * t.seconds > 300e-6 else 1
        memory = np.empty(t.held // 16, np.complex128)
        tiles = list(
            itertools.product(
                *(range(0, axis.outputs, v) for axis, v in zip(t.axes, t.valid, strict=True))
            )
        )
        for groups, outs in itertools.product(
            planes.spans(problem.groups, t.groups), planes.spans(problem.group_out_channels, t.outs)
        ):
            shape = groups[1] - groups[0], outs[1] - outs[0], problem.group_in_channels
            held = memory[: math.prod((*shape, *self.spectrum))].reshape(*shape, *self.spectrum)
            parts = [
                (slice(groups[0] + a, groups[0] + b), slice(*outs), held[a:b])
                for a, b in planes.spans(shape[0], t.together)
            ]
            run_blocks(threads, parts, self._transform)
            blocks = [(n, part, at) for n in range(images) for part in parts for at in tiles]
            run_blocks(threads, blocks, self._tile)

    def _arrays(self, worker: int) -> _Arrays:
        if worker not in self.workers:
            self.workers[worker] = _Arrays(self.tiling, self.spectrum, self.w.dtype)
        return self.workers[worker]

    def _transform(self, part: _Part, worker: int) -> None:
        """The conjugate spectra of some filters."""
        groups, outs, held = part
        w = self.w[groups, outs]
        tile = self._arrays(worker).tile[: len(w)]
        for k, c in np.ndindex(*w.shape[1:3]):
            tile.fill(0)
            taps = w[:, k, c]
            tile[(slice(None), *map(slice, taps.shape[1:]))] = taps.conj()
            self._forward(tile, held[:, k, c])
            np.conjugate(held[:, k, c], out=held[:, k, c])

    def _forward(self, tile: HostArray, spectrum: HostArray) -> None:
        first = np.fft.fft if self.complex else np.fft.rfft
        first(tile, axis=3, out=spectrum)
        for axis in self.axes[-2::-1]:
            np.fft.fft(spectrum, axis=axis + 1, out=spectrum)

    def _inverse(self, spectrum: HostArray, tile: HostArray) -> None:
        for axis in self.axes[:-1]:
            np.fft.ifft(spectrum, axis=axis + 1, out=spectrum)
        if self.complex:
            np.fft.ifft(spectrum, axis=3, out=tile)
        else:
            np.fft.irfft(spectrum, self.tiling.tile[2], axis=3, out=tile)

    def _tile(self, block: tuple[int, _Part, tuple[int, ...]], worker: int) -> None:
        n, (groups, outs, held), at = block
        t, a = self.tiling, self._arrays(worker)
        x = self.x[n : n + 1, groups]
        starts = tuple(p * axis.stride for p, axis in zip(at, t.axes, strict=True))
        count = x.shape[1]
        tile, spectrum, total = a.tile[:count], a.spectrum[:count], a.total[:count]
        norms = np.zeros((count, held.shape[1]))
        for c in range(x.shape[2]):
            planes.read(tile[None], x[:, :, c], t.axes, starts)
            if self.trust is not None:
                flat = np.abs(tile).reshape(count, -1) if self.complex else tile.reshape(count, -1)
                norm = np.sqrt(np.einsum("gi,gi->g", flat, flat))
                norms += norm[:, None] * self.norms[groups, outs, c]
            self._forward(tile, spectrum)
            for k in range(held.shape[1]):
                if c == 0:
                    np.multiply(spectrum, held[:, k, c], out=total[:, k])
                else:
                    np.multiply(spectrum, held[:, k, c], out=a.product[:count])
                    total[:, k] += a.product[:count]
        stops = [min(p + v, axis.outputs) for p, v, axis in zip(at, t.valid, t.axes, strict=True)]
        here = tuple(axis.out(p, q) for axis, p, q in zip(t.axes, at, stops, strict=True))
        kept = tuple(
            slice(0, (q - p - 1) * axis.stride + 1, axis.stride)
            for p, q, axis in zip(at, stops, t.axes, strict=True)
        )
        for k in range(held.shape[1]):
            self._inverse(total[:, k], tile)
            sums = tile[(slice(None), *kept)]
            out_k = outs.start + k
            w = self.w[groups, out_k]
            least = 0.0 if self.exact else np.abs(sums).min()
            if not self.finite or np.isnan(least):
                sums = self._direct(x, w, starts, sums.shape[1:])
            elif self.trust is not None and least <= self.trust * norms[:, k].max():
                self._mend(x, w, starts, sums, self.trust * norms[:, k])
            if self.exact:
                np.rint(sums, out=sums)
            bias = None if self.bias is None else self.bias[groups, out_k]
            out = self.out[(slice(n, n + 1), groups, out_k, *here)]
            planes.store(out, sums[None, :, None], bias, self.exact)

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


_Part = tuple[slice, slice, HostArray]  # groups, output channels, their filters' spectra


class _Arrays:
    """One worker's scratch memory."""

    def __init__(self, tiling: Tiling, spectrum: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        count = tiling.together
        self.tile = np.empty((count, *tiling.tile), dtype)
        self.spectrum = np.empty((count, *spectrum), np.complex128)
        self.product = np.empty((count, *spectrum), np.complex128)
        self.total = np.empty((count, tiling.outs, *spectrum), np.complex128)
