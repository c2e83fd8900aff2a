"""dgrad by the algorithms of fprop: the gradient of x as dense convolutions of y's gradient.

    dx[n, c, i] = sum over k, r, p with stride*p + dilation*r - pad = i of  dy[n, k, p] w[k, c, r]

Along one axis the positions i fall into `stride` classes by (i + pad) mod stride. Those of a class
are reached by every (stride/g)-th tap alone, g = gcd(stride, dilation), and dy is read one step
further per position and dilation/g steps further per such tap: a dense convolution of stride 1 with
those taps flipped, whose result lies at every stride-th position of dx. With stride 1 there is one
class: fprop with w flipped and transposed between its channels. No zeros are multiplied.

    stride 2, filter 3, pad 1:    i   0    1    2    3    4       even i: w[1]
                                  p   0   0 1   1   1 2   2       odd i:  w[2], w[0]

Where another padding mode than "zeros" reads x beyond its edge, the gradient of the padded x is
computed like that, some images and channels at a time, and its margin is then added to the elements
that it was read from, one position after another: always in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gpuconv.numpy_backend.boundary import source_index
from gpuconv.plan import Algorithm, No, Plan, choose, consider
from gpuconv.problem import ConvProblem

_PADDED_BYTES = 16 << 20  # of padded gradient at a time, where an image and channel take no more
_FOLD_RATE = 4e9  # bytes a second, of adding the margin and copying the rest
_MOST_BYTES = 48 << 20
_GATHER_SECONDS = 2.5e-9  # of a weight, where NumPy copies a piece's taps out of all of them

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """One dense convolution, or positions of dx that nothing reaches (no problem)."""

    problem: ConvProblem | None
    result: Slices  # the positions of dx
    grad: Slices  # the part of dy that is read, which the problem's pads surround
    taps: Slices  # those of the flipped filter


@dataclass(frozen=True)
class _Class:
    """A piece along one axis: taps 0 means that nothing reaches it."""

    result: slice
    count: int
    grad: slice
    extent: int
    taps: slice
    filter: int
    dilation: int
    pad_lo: int
    pad_hi: int


def pieces(problem: ConvProblem) -> list[Piece]:
    """The dense convolutions of a dgrad problem whose padding mode is "zeros"."""
    axes = [_classes(problem, axis) for axis in range(problem.ndim)]
    found = []
    for parts in itertools.product(*axes):
        dense = None
        if all(part.filter and part.extent for part in parts):
            dense = replace(
                problem,
                operation="fprop",
                flip=False,
                conjugate=False,
                input=tuple(p.extent for p in parts),
                filter=tuple(p.filter for p in parts),
                in_channels=problem.out_channels,
                out_channels=problem.in_channels,
                stride=(1,) * problem.ndim,
                dilation=tuple(p.dilation for p in parts),
                pad_lo=tuple(p.pad_lo for p in parts),
                pad_hi=tuple(p.pad_hi for p in parts),
                x_dtype=problem.y_dtype,
                y_dtype=problem.x_dtype,
                batched=True,
            )
        found.append(
            Piece(
                dense,
                tuple(p.result for p in parts),
                tuple(p.grad for p in parts),
                tuple(p.taps for p in parts),
            )
        )
    return found


def _classes(problem: ConvProblem, axis: int) -> list[_Class]:
    extent, filter, output = problem.input[axis], problem.filter[axis], problem.output[axis]
    stride, dilation, lo = problem.stride[axis], problem.dilation[axis], problem.pad_lo[axis]
    common = math.gcd(stride, dilation)
    step, spread = stride // common, dilation // common
    found = []
    for start in range(min(stride, extent)):
        count = -(-(extent - start) // stride)
        result = slice(start, None, stride)
        first = next((r for r in range(step) if (start + lo - dilation * r) % stride == 0), filter)
        taps = -(-(filter - first) // step) if first < filter else 0
        if not taps:
            nothing = slice(0, 0)
            found.append(_Class(result, count, nothing, 0, nothing, 0, 1, 0, 0))
            continue
        base = (start + lo - dilation * first) // stride  # the p that the first tap meets
        span = spread * (taps - 1)
        pad_lo, pad_hi = span - base, count - output + base
        # A pad below zero leaves out the end of dy: nothing of this class reaches it.
        grad = slice(max(-pad_lo, 0), max(output - max(-pad_hi, 0), 0))
        # In the flipped filter the last of these taps comes first.
        begin = filter - 1 - (first + step * (taps - 1))
        found.append(
            _Class(
                result=result,
                count=count,
                grad=grad,
                extent=max(grad.stop - grad.start, 0),
                taps=slice(begin, None, step),
                filter=taps,
                dilation=spread,
                pad_lo=max(pad_lo, 0),
                pad_hi=max(pad_hi, 0),
            )
        )
    return found


@dataclass(frozen=True)
class _Part:
    """Some channels of dx, and how they are computed; without a buffer, straight into dx."""

    channels: slice
    problem: ConvProblem  # "zeros": of the padded extents where there is a buffer
    pieces: tuple[tuple[Piece, Plan | None], ...]


@dataclass(frozen=True)
class _Work:
    parts: tuple[_Part, ...]
    padded: tuple[int, ...] | None  # the extents of the buffer
    images: int  # that share it
    workspace: int
    seconds: float


Pick = Callable[[ConvProblem, Any], "Plan | No"]


class Transposed:
    """An algorithm of fprop at work on dgrad, under its own name.

    `pick` gives the plan of a dense problem, or the reason why there is none; `weight_seconds` is
    what reading a weight takes where a piece's taps are not those of w.
    """

    OPERATIONS = ("dgrad",)

    def __init__(self, name: str, pick: Pick, weight_seconds: float, forward: Any = None) -> None:
        self.__name__ = name
        self._pick = pick
        self._weight_seconds = weight_seconds
        self._forward = forward
        self.ERROR_CONSTANT = getattr(forward, "ERROR_CONSTANT", 1.0)
        self._work = lru_cache(maxsize=1024)(self._make_work)

    def supports(self, problem: ConvProblem, device: Any) -> bool | No:
        work = self._work(problem, device)
        return work if isinstance(work, No) else True

    def cost(self, problem: ConvProblem, device: Any) -> float:
        """The sum of the dense convolutions', and of the margin's way home."""
        return self._found(problem, device).seconds

    def workspace(self, problem: ConvProblem, device: Any) -> int:
        return self._found(problem, device).workspace

    def only_by_name(self, problem: ConvProblem) -> str | None:
        asked = getattr(self._forward, "only_by_name", None)
        if asked is None:
            return None
        # The reasons lie in the dtypes and the precision, which every piece shares.
        whole = next((p.problem for p in pieces(problem) if p.problem is not None), None)
        return None if whole is None else asked(whole)

    def run(self, plan: Plan, grad: Any, w: Any, bias: Any, out: Any) -> None:
        problem, work = plan.problem, self._found(plan.problem, plan.device)
        filters = _filters(problem, w)
        if work.padded is None:
            _run_part(work.parts[0], grad, filters, bias, out)
            return
        for part in work.parts:
            chosen = filters[part.channels]
            inputs = _inputs(problem, part.channels)
            for n in range(0, len(grad), work.images):
                target = out[n : n + work.images, part.channels]
                buffer = _buffer(plan, part, (*target.shape[:2], *work.padded))
                _run_part(part, grad[n : n + work.images, inputs], chosen, None, buffer)
                folded = _fold(problem, buffer)
                if bias is not None:
                    folded += bias[part.channels].reshape(-1, *[1] * problem.ndim)
                target[...] = folded

    def prepare(self, problem: ConvProblem, device: Any, layout: Any) -> None:
        """Compile what the dense convolutions need, on a backend that compiles (``warmup``)."""
        from gpuconv.cuda_backend.launch import contiguous

        for part in self._found(problem, device).parts:
            for _, plan in part.pieces:
                prepare = getattr(plan and plan.implementation, "prepare", None)
                if plan is not None and prepare is not None:
                    prepare(plan.problem, device, contiguous(plan.problem))

    def _found(self, problem: ConvProblem, device: Any) -> _Work:
        work = self._work(problem, device)
        assert isinstance(work, _Work)
        return work

    def _make_work(self, problem: ConvProblem, device: Any) -> _Work | No:
        if problem.operation != "dgrad":
            return No(f"computes dgrad, not {problem.operation}")
        copied = _copied(problem)
        limit = _MOST_BYTES
        if problem.workspace_limit is not None:
            limit = min(limit, problem.workspace_limit - copied)
            problem = replace(problem, workspace_limit=max(limit, 0))
        if problem.padding_mode == "zeros" or not problem.padded:
            part = self._part(replace(problem, padding_mode="zeros"), slice(None), device)
            if isinstance(part, No):
                return part
            seconds = self._seconds(part)
            return _Work((part,), None, 0, copied + _workspace(part), seconds)
        extents = tuple(
            n + lo + hi
            for n, lo, hi in zip(problem.input, problem.pad_lo, problem.pad_hi, strict=True)
        )
        unit = problem.in_channels // problem.groups if problem.groups > 1 else 1
        channel = math.prod(extents) * problem.accumulator.itemsize
        room = min(_PADDED_BYTES, limit // 2)
        channels = min(max(room // (channel * unit), 0) * unit, problem.in_channels)
        if not channels:
            return No(f"the padded gradient of {unit} channel(s) takes {unit * channel} bytes")
        images = max(min(room // (channels * channel), problem.batch), 1)
        buffered = images * channels * channel
        parts = []
        for start in range(0, problem.in_channels, channels):
            some = slice(start, min(start + channels, problem.in_channels))
            part = self._part(_padded(problem, some, extents, images, buffered), some, device)
            if isinstance(part, No):
                return part
            parts.append(part)
        seconds = sum(map(self._seconds, parts)) * problem.batch / images
        seconds += problem.batch * problem.in_channels * channel / _FOLD_RATE
        workspace = copied + buffered + max(map(_workspace, parts))
        return _Work(tuple(parts), extents, images, workspace, seconds)

    def _part(self, problem: ConvProblem, channels: slice, device: Any) -> _Part | No:
        planned: list[tuple[Piece, Plan | None]] = []
        for piece in pieces(problem):
            plan = None if piece.problem is None else self._pick(piece.problem, device)
            if isinstance(plan, No):
                return plan
            planned.append((piece, plan))
        if self._forward is None and sum(plan is not None for _, plan in planned) < 2:
            return No("one dense convolution, which each algorithm computes under its own name")
        return _Part(channels, problem, tuple(planned))

    def _seconds(self, part: _Part) -> float:
        gathered = math.prod(part.problem.w_shape) if len(part.pieces) > 1 else 0
        return sum(plan.cost for _, plan in part.pieces if plan) + gathered * self._weight_seconds


def _padded(
    problem: ConvProblem, channels: slice, extents: tuple[int, ...], images: int, buffered: int
) -> ConvProblem:
    """The gradient of some channels of the padded x, in the type that sums are made in."""
    count = channels.stop - channels.start
    share = count if problem.groups == 1 else count // problem.group_in_channels
    limit = problem.workspace_limit
    return replace(
        problem,
        input=extents,
        pad_lo=(0,) * problem.ndim,
        pad_hi=(0,) * problem.ndim,
        padding_mode="zeros",
        batch=images,
        in_channels=count,
        out_channels=(
            problem.out_channels if problem.groups == 1 else share * problem.group_out_channels
        ),
        groups=1 if problem.groups == 1 else share,
        x_dtype=problem.accumulator,
        bias=None,
        workspace_limit=None if limit is None else max(limit - buffered, 0),
    )


def _inputs(problem: ConvProblem, channels: slice) -> slice:
    """The channels of dy that `channels` of dx, whole groups of them, are computed from."""
    if problem.groups == 1:
        return slice(None)
    first, last = (at // problem.group_in_channels for at in (channels.start, channels.stop))
    return slice(first * problem.group_out_channels, last * problem.group_out_channels)


def _buffer(plan: Plan, part: _Part, shape: tuple[int, ...]) -> Any:
    from gpuconv.backends import backend

    dtype = part.problem.x_dtype
    if not plan.problem.channels_last:
        return backend(plan.backend).empty(shape, dtype, plan.device)
    last = backend(plan.backend).empty((shape[0], *shape[2:], shape[1]), dtype, plan.device)
    return last.transpose(0, last.ndim - 1, *range(1, last.ndim - 1))


def _run_part(part: _Part, grad: Any, filters: Any, bias: Any, out: Any) -> None:
    for piece, plan in part.pieces:
        target = out[(slice(None), slice(None), *piece.result)]
        if plan is None:
            target[...] = 0 if bias is None else bias.reshape(-1, *[1] * (out.ndim - 2))
            continue
        plan.implementation.run(
            plan,
            grad[(slice(None), slice(None), *piece.grad)],
            filters[(slice(None), slice(None), *piece.taps)],
            bias,
            target,
        )


def _fold(problem: ConvProblem, padded: Any) -> Any:
    """Add what lies beyond the edges to the elements that were read there: a view of `padded`."""
    for axis in range(problem.ndim):
        extent, lo = problem.input[axis], problem.pad_lo[axis]
        index = source_index(extent, lo, problem.pad_hi[axis], problem.padding_mode)
        before: tuple[slice, ...] = (slice(None),) * (axis + 2)
        for position in (*range(lo), *range(lo + extent, len(index))):
            home = int(index[position]) + lo
            padded[(*before, home)] += padded[(*before, position)]
        padded = padded[(*before, slice(lo, lo + extent))]
    return padded


def _filters(problem: ConvProblem, w: Any) -> Any:
    """w (K, C/G, taps...) as the dense convolutions' (C, K/G, taps...), flipped."""
    if problem.conjugate and problem.accumulator.is_complex:
        w = w.conj()
    taps = w.shape[2:]
    w = w.reshape(problem.groups, problem.group_out_channels, problem.group_in_channels, *taps)
    w = w.swapaxes(1, 2).reshape(problem.in_channels, problem.group_out_channels, *taps)
    if not problem.flip:
        w = w[(slice(None), slice(None), *(slice(None, None, -1),) * len(taps))]
    return w


def _copied(problem: ConvProblem) -> int:
    """Bytes of w that ``_filters`` copies."""
    copies = (problem.conjugate and problem.w_dtype.is_complex) + (
        problem.groups > 1 and problem.group_in_channels > 1 and problem.group_out_channels > 1
    )
    return copies * math.prod(problem.w_shape) * problem.w_dtype.itemsize


def _workspace(part: _Part) -> int:
    return max((plan.workspace_bytes for _, plan in part.pieces if plan), default=0)


def for_dgrad(backend: str, algorithms: Sequence[Algorithm]) -> list[Algorithm]:
    """Every algorithm of fprop as one of dgrad; and "mixed", the best for each piece."""
    weight_seconds = _GATHER_SECONDS if backend == "numpy" else 0.0
    found: list[Any] = [
        Transposed(_name(algorithm), _picker(backend, algorithm), weight_seconds, algorithm)
        for algorithm in algorithms
        if "dgrad" not in getattr(algorithm, "OPERATIONS", ("fprop",))
        and "fprop" in getattr(algorithm, "OPERATIONS", ("fprop",))
    ]
    found.append(Transposed("mixed", _mixer(backend), weight_seconds))
    return found


def _name(algorithm: Algorithm) -> str:
    return algorithm.__name__.rpartition(".")[2]


def _picker(backend: str, algorithm: Algorithm) -> Pick:
    def pick(problem: ConvProblem, device: Any) -> Plan | No:
        candidate = consider(algorithm, problem, device)
        if candidate.cost is None:  # one that "auto" must not choose has a cost, too
            return No(candidate.rejected or "it cannot serve")
        return Plan(problem, backend, device, candidate.algorithm, (candidate,), algorithm)

    return pick


def _mixer(backend: str) -> Pick:
    def pick(problem: ConvProblem, device: Any) -> Plan | No:
        return choose("mixed", problem, backend, device)

    return pick
