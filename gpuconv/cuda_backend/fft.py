"""Large filters through CuPy's FFT, tile by tile (overlap-save): no kernel of our own.

The method, the dilation's classes, and the tile lengths are those of the NumPy backend
(gpuconv/numpy_backend/fft.py). Along each axis a tile of n padded positions yields n - R + 1
outputs; channels are summed as spectra:

    Y[k] = sum over c of  F(x[c]) * conj(F(conj(w[k, c])))        y[k] = F^-1(Y[k])[: n-R+1]

Tiles are as large as the workspace allows (256 MiB, or ``workspace_limit``), so that a GPU has few
and large transforms to do; images are transformed one by one, so that a batch changes no bits.

Always in float64 or complex128. An FFT's error is relative to a tile's norm, not to each window's:

    |y - y_ref| <= c log2(n) eps(float64) |x tile|_2 |w|_2        c = 8, n elements in a tile

which is far below the direct sum's own bound for float32 and narrower data, unless values within
one tile differ by more than 10^8. Sums of integers are rounded to integers where dtypes and shapes
show that the error is below 1/4, and refused elsewhere.

A NaN or infinity spoils a whole tile. Looking for one would have to wait for the device; so "auto"
does not choose this algorithm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gpuconv.cuda_backend import rates, tile
from gpuconv.cuda_backend.launch import Macros
from gpuconv.numpy_backend import planes
from gpuconv.numpy_backend.fft import tile_lengths
from gpuconv.numpy_backend.planes import Axis
from gpuconv.plan import No, Plan
from gpuconv.problem import ConvProblem

WORKSPACE_CAP = 256 << 20  # bytes
NORM_CONSTANT = 8.0  # c of the bound above

_EPS = 2.0**-52
_PASSES = 6  # over the data, of a transform in all its axes
_CALLS = 12  # launches that reading, transforming and storing a tile take


@dataclass(frozen=True)
class Tiling:
    """Tiles of one class of outputs, and how many channels are transformed together."""

    axes: tuple[Axis, Axis, Axis]
    tile: tuple[int, int, int]
    groups: int  # at a time,
    outs: int  # and of each the output channels whose filters' spectra are held at a time
    bytes: int
    seconds: float  # of one image
    setup: float  # for the filters' spectra

    @property
    def valid(self) -> tuple[int, ...]:
        """Outputs of a tile."""
        return tuple(
            (n - axis.filter) // axis.stride + 1
            for n, axis in zip(self.tile, self.axes, strict=True)
        )


@lru_cache(maxsize=1024)
def tilings(problem: ConvProblem, device: Any) -> tuple[Tiling, ...] | No:
    """One per class of the dilation; they do not depend on the batch."""
    limit = problem.workspace_within(WORKSPACE_CAP) - _filter_bytes(problem)
    result = []
    for axes in planes.classes(problem):
        options = (
            _tiling(problem, device, axes, lengths, limit)
            for lengths in itertools.product(*map(tile_lengths, axes))
        )
        fitting = [option for option in options if option is not None]
        if not fitting:
            return No("no tile's spectra fit in the workspace")
        result.append(min(fitting, key=lambda t: problem.batch * t.seconds + t.setup))
    return tuple(result)


def _filter_bytes(problem: ConvProblem) -> int:
    """Of the filter in the transforms' type."""
    return math.prod(problem.w_shape) * (16 if problem.accumulator.is_complex else 8)


def _tiling(
    problem: ConvProblem,
    device: Any,
    axes: tuple[Axis, Axis, Axis],
    lengths: tuple[int, ...],
    limit: int,
) -> Tiling | None:
    """The tiling of these lengths with as many channels at a time as `limit` allows, or None."""
    d, h, w = lengths
    is_complex = problem.accumulator.is_complex
    real = math.prod(lengths) * (16 if is_complex else 8)
    spectrum = 16 * d * h * (w if is_complex else w // 2 + 1)
    ins = problem.group_in_channels

    def needed(groups: int, outs: int) -> int:
        # A tile and its spectrum, sums and a product of spectra, the filters' spectra, and what a
        # transform works in: a copy of its input and of its output.
        forward = ins * (real + 3 * spectrum)
        backward = outs * (real + 4 * spectrum)
        return groups * (forward + backward + outs * ins * spectrum)

    groups, outs = problem.groups, problem.group_out_channels
    while outs > 1 and needed(1, outs) > limit:
        outs = -(-outs // 2)
    while groups > 1 and needed(groups, outs) > limit:
        groups = -(-groups // 2)
    if needed(groups, outs) > limit:
        return None
    valid = [(n - a.filter) // a.stride + 1 for n, a in zip(lengths, axes, strict=True)]
    tiles = math.prod(-(-a.outputs // v) for a, v in zip(axes, valid, strict=True))
    blocks = -(-problem.groups // groups) * -(-problem.group_out_channels // outs)
    transform = _PASSES * real / device.bandwidth
    product = 3 * spectrum / device.bandwidth
    once = blocks * (_CALLS + 2 * ins) * rates.LAUNCH_SECONDS
    once += -(-problem.group_out_channels // outs) * problem.in_channels * transform
    once += problem.out_channels * (transform + ins * product)
    setup = problem.out_channels * ins * transform
    setup += blocks * outs * _CALLS / 2 * rates.LAUNCH_SECONDS
    return Tiling(axes, (d, h, w), groups, outs, needed(groups, outs), tiles * once, setup)


def supports(problem: ConvProblem, device: Any) -> bool | No:
    if problem.operation != "fprop":
        return No(f"computes fprop only, not {problem.operation}")
    if 0 in problem.x_shape or 0 in problem.y_shape:
        return No("x or the result is empty")
    if reason := planes.scattered(problem):
        return No(reason)
    found = tilings(problem, device)
    if isinstance(found, No):
        return found
    if problem.accumulator.is_exact and _rounding(problem, found) >= 0.25:
        return No("the dtypes do not show that rounding gives the exact sums of integers")
    return True


def _rounding(problem: ConvProblem, found: tuple[Tiling, ...]) -> float:
    """The bound on the error of a sum of integers, from the largest values of their types."""
    elements = max(math.prod(t.tile) for t in found)
    x = tile.largest(problem.x_dtype) * math.sqrt(elements * problem.group_in_channels)
    w = tile.largest(problem.w_dtype) * math.sqrt(problem.reduction)
    return NORM_CONSTANT * math.log2(max(elements, 2)) * _EPS * x * w


def only_by_name(problem: ConvProblem) -> str | None:
    return "it spreads a NaN or infinity over a tile, and looking for one would wait for the device"


def cost(problem: ConvProblem, device: Any) -> float:
    """Transforms and products of spectra at the memory's rate, and the launches of every tile."""
    found = _found(problem, device)
    return sum(t.setup + problem.batch * t.seconds for t in found)


def _found(problem: ConvProblem, device: Any) -> tuple[Tiling, ...]:
    found = tilings(problem, device)
    assert not isinstance(found, No), "supports() has said that it fits"
    return found


def workspace(problem: ConvProblem, device: Any) -> int:
    return _filter_bytes(problem) + max(t.bytes for t in _found(problem, device))


def run(plan: Plan, x: Any, w: Any, bias: Any, out: Any) -> None:
    problem, xp = plan.problem, plan.device.xp
    if problem.flip:
        w = w[(..., *(slice(None, None, -1),) * problem.ndim)]
    w = planes.lift(w).astype(xp.complex128 if problem.accumulator.is_complex else xp.float64)
    w = w.reshape(problem.groups, problem.group_out_channels, *w.shape[1:])
    x, out = planes.lift(x), planes.lift(out)
    for tiling in _found(problem, plan.device):
        for groups in planes.spans(problem.groups, tiling.groups):
            for outs in planes.spans(problem.group_out_channels, tiling.outs):
                _Tiles(plan, tiling, w, groups, outs).run(x, bias, out)


class _Tiles:
    """The spectra of some filters, and the tiles under them."""

    def __init__(
        self, plan: Plan, tiling: Tiling, w: Any, groups: tuple[int, int], outs: tuple[int, int]
    ) -> None:
        self.problem, self.xp, self.tiling = plan.problem, plan.device.xp, tiling
        self.groups, self.outs = groups, outs
        self.is_complex = self.problem.accumulator.is_complex
        # Axes of one element need no transform; the last one decides whether a spectrum is half.
        self.axes = (*(a - 3 for a in (0, 1) if tiling.tile[a] > 1), -1)
        d, h, wide = tiling.tile
        count, ins = groups[1] - groups[0], self.problem.group_in_channels
        shape = (count, outs[1] - outs[0], ins, d, h, wide if self.is_complex else wide // 2 + 1)
        self.spectra = self.xp.empty(shape, self.xp.complex128)
        for k in range(shape[1]):
            taps = w[slice(*groups), outs[0] + k]
            padded = self.xp.zeros((count, ins, *tiling.tile), w.dtype)
            padded[(..., *(slice(n) for n in taps.shape[2:]))] = taps.conj()
            self.xp.conjugate(self._forward(padded), out=self.spectra[:, k])

    def _forward(self, block: Any) -> Any:
        fft = self.xp.fft
        return (
            fft.fftn(block, axes=self.axes) if self.is_complex else fft.rfftn(block, axes=self.axes)
        )

    def _inverse(self, spectrum: Any) -> Any:
        fft = self.xp.fft
        if self.is_complex:
            return fft.ifftn(spectrum, axes=self.axes)
        lengths = [self.tiling.tile[a] for a in self.axes]
        return fft.irfftn(spectrum, lengths, axes=self.axes)

    def run(self, x: Any, bias: Any, out: Any) -> None:
        t = self.tiling
        starts = [range(0, a.outputs, v) for a, v in zip(t.axes, t.valid, strict=True)]
        for n in range(x.shape[0]):
            for at in itertools.product(*starts):
                self._tile(x[n : n + 1], bias, out[n], at)

    def _tile(self, x: Any, bias: Any, out: Any, at: tuple[int, ...]) -> None:
        """One tile of the image x (1, C, D, H, W), outputs from `at` on, to out (K, Z, P, Q)."""
        problem, t, xp = self.problem, self.tiling, self.xp
        (g0, g1), (k0, k1) = self.groups, self.outs
        ins, all_outs = problem.group_in_channels, problem.group_out_channels
        block = xp.empty((1, (g1 - g0) * ins, *t.tile), _real(xp, self.is_complex))
        starts = tuple(a * axis.stride for a, axis in zip(at, t.axes, strict=True))
        planes.read(block, x[:, g0 * ins : g1 * ins], t.axes, starts)
        spectrum = self._forward(block.reshape(g1 - g0, ins, *t.tile))
        del block
        total = spectrum[:, None, 0] * self.spectra[:, :, 0]
        for c in range(1, ins):
            total += spectrum[:, None, c] * self.spectra[:, :, c]
        del spectrum
        sums = self._inverse(total)
        del total
        stops = [min(a + v, axis.outputs) for a, v, axis in zip(at, t.valid, t.axes, strict=True)]
        spans = list(zip(at, stops, t.axes, strict=True))
        sums = sums[(..., *(slice(0, (b - a - 1) * s.stride + 1, s.stride) for a, b, s in spans))]
        places = tuple(axis.out(a, b) for a, b, axis in spans)
        for g in range(g0, g1):
            here = slice(g * all_outs + k0, g * all_outs + k1)
            result = sums[g - g0]
            if problem.accumulator.is_exact:
                result = xp.rint(result).astype(problem.accumulator.numpy)
            if bias is not None:
                result = result + bias[here].astype(result.dtype)[:, None, None, None]
            out[(here, *places)] = result


def _real(xp: Any, is_complex: bool) -> Any:
    return xp.complex128 if is_complex else xp.float64


def variants() -> Iterator[tuple[str, Macros]]:
    """None: the transforms are CuPy's."""
    return iter(())
