"""wgrad by the algorithms of fprop: x convolved with y's gradient, images and channels exchanged.

    dw[k, c, r] = sum over n, p of  dy[n, k, p] x[n, c, stride*p + dilation*r - pad]

is a convolution of C images of N channels, x with its first two axes exchanged, under K filters of
N channels and the extents of y: tap p and position r change places, and so do stride and dilation.
The result is (C, K, taps), dw exchanged. Boundary modes are those of x's reads, as in fprop. The
sums are as long as the batch has pixels; an algorithm that splits long sums has one way to do so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gpuconv.plan import Algorithm, No, Plan, choose, consider
from gpuconv.problem import ConvProblem

_MOST_GROUPS = 16  # each is a convolution of its own


@dataclass(frozen=True)
class _Work:
    plan: Plan  # of one group
    crop: tuple[slice, ...]  # of x: what no window reads


class Exchanged:
    """An algorithm of fprop at work on wgrad, under its own name."""

    OPERATIONS = ("wgrad",)

    def __init__(self, backend: str, algorithm: Algorithm) -> None:
        self.__name__ = algorithm.__name__.rpartition(".")[2]
        self._backend, self._forward = backend, algorithm
        self._work = lru_cache(maxsize=1024)(self._make_work)
        self.ERROR_CONSTANT = getattr(algorithm, "ERROR_CONSTANT", 1.0)

    def supports(self, problem: ConvProblem, device: Any) -> bool | No:
        work = self._work(problem, device)
        return work if isinstance(work, No) else True

    def cost(self, problem: ConvProblem, device: Any) -> float:
        """That of the convolution, once for each group."""
        return self._found(problem, device).plan.cost * problem.groups

    def workspace(self, problem: ConvProblem, device: Any) -> int:
        return self._found(problem, device).plan.workspace_bytes

    def only_by_name(self, problem: ConvProblem) -> str | None:
        asked = getattr(self._forward, "only_by_name", None)
        return None if asked is None else asked(_exchange(problem)[0])

    def run(self, plan: Plan, x: Any, grad: Any, bias: None, out: Any) -> None:
        problem = plan.problem
        if len(x) != problem.batch:  # the batch is a length of the sums here
            other = choose("plan", replace(problem, batch=len(x)), plan.backend, plan.device)
            other.implementation.run(other, x, grad, None, out)
            return
        work = self._found(problem, plan.device)
        ins, outs = problem.group_in_channels, problem.group_out_channels
        if problem.flip:
            out = out[(slice(None), slice(None), *(slice(None, None, -1),) * problem.ndim)]
        for g in range(problem.groups):
            chosen = slice(g * outs, (g + 1) * outs)
            self._forward.run(
                work.plan,
                x[(slice(None), slice(g * ins, (g + 1) * ins), *work.crop)].swapaxes(0, 1),
                grad[:, chosen].swapaxes(0, 1),
                None,
                out[chosen].swapaxes(0, 1),
            )

    def prepare(self, problem: ConvProblem, device: Any, layout: Any) -> None:
        """Compile what the convolution needs (``warmup``)."""
        from gpuconv.cuda_backend.launch import contiguous

        plan = self._found(problem, device).plan
        prepare = getattr(self._forward, "prepare", None)
        if prepare is not None:
            prepare(plan.problem, device, contiguous(plan.problem))

    def _found(self, problem: ConvProblem, device: Any) -> _Work:
        work = self._work(problem, device)
        assert isinstance(work, _Work)
        return work

    def _make_work(self, problem: ConvProblem, device: Any) -> _Work | No:
        if problem.operation != "wgrad":
            return No(f"computes wgrad, not {problem.operation}")
        if problem.conjugate and problem.accumulator.is_complex:
            return No("it does not conjugate")
        if problem.groups > _MOST_GROUPS:
            return No(f"{problem.groups} groups would be as many convolutions")
        forward, crop = _exchange(problem)
        cropped = any(c.stop is not None for c in crop)
        if cropped and problem.padding_mode != "zeros" and any(problem.pad_lo):
            return No("the windows leave out the end of x, which the other edge reads")
        if min(forward.input) < 1:
            return No("the windows read the first pad alone")
        candidate = consider(self._forward, forward, device)
        if candidate.cost is None:
            return No(candidate.rejected or "it cannot serve")
        name = candidate.algorithm
        plan = Plan(forward, self._backend, device, name, (candidate,), self._forward)
        return _Work(plan, crop)


def _exchange(problem: ConvProblem) -> tuple[ConvProblem, tuple[slice, ...]]:
    """One group's convolution, and the part of x that it reads."""
    inputs, pads, crop = [], [], []
    for n, lo, hi, s, d, f, p in zip(
        problem.input, problem.pad_lo, problem.pad_hi, problem.stride, problem.dilation,
        problem.filter, problem.output, strict=True,
    ):  # fmt: skip
        unread = n + lo + hi - (p - 1) * s - d * (f - 1) - 1  # at the end, less than a stride
        beyond = max(unread - hi, 0)
        inputs.append(n - beyond)
        pads.append(max(hi - unread, 0))
        crop.append(slice(None, n - beyond) if beyond else slice(None))
    forward = replace(
        problem,
        operation="fprop",
        flip=False,
        conjugate=False,
        input=tuple(inputs),
        filter=problem.output,
        batch=problem.group_in_channels,
        in_channels=problem.batch,
        out_channels=problem.group_out_channels,
        groups=1,
        stride=problem.dilation,
        dilation=problem.stride,
        pad_hi=tuple(pads),
        w_dtype=problem.y_dtype,
        y_dtype=problem.w_dtype,
        channels_last=False,
        batched=True,
    )
    return forward, tuple(crop)


def for_wgrad(backend: str, algorithms: Sequence[Algorithm]) -> list[Algorithm]:
    """Every algorithm of fprop as one of wgrad."""
    found: list[Any] = [
        Exchanged(backend, algorithm)
        for algorithm in algorithms
        if getattr(algorithm, "OPERATIONS", ("fprop",)) == ("fprop",)
    ]
    return found
