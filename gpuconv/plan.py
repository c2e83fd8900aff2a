"""The plan of a problem: every algorithm is asked what it would cost, and one is chosen.

A plan is made from shapes, dtypes and options alone; it holds no arrays. Plans are cached, so the
second call with the same shapes costs a dictionary look-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from gpuconv.calls import Calls, signature
from gpuconv.errors import BackendError
from gpuconv.problem import ConvProblem, Operation


class No:
    """The false answer of an algorithm's ``supports``, with the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"No({self.reason!r})"


class Algorithm(Protocol):
    """What every algorithm's module offers. Its name is the module's own.

    It computes fprop, or the operations that it names in ``OPERATIONS``. Below, x and w are the
    first and the second array that the operation reads, and out is its result (``problem.ROLES``):
    dy, w and dx of dgrad, x, dy and dw of wgrad.

    Two more it may have: ``only_by_name(problem)``, the reason why "auto" must not choose it, or
    None; and ``ERROR_CONSTANT``, its c in the error bound of ``testing``, where that is not 1.
    """

    __name__: str

    def supports(self, problem: ConvProblem, device: Any, /) -> bool | No:
        """True, or why not."""

    def cost(self, problem: ConvProblem, device: Any, /) -> float:
        """Predicted seconds, from the model that the module states."""

    def workspace(self, problem: ConvProblem, device: Any, /) -> int:
        """Bytes of scratch memory, within ``problem.workspace_limit`` where it can adapt."""

    def run(self, plan: Plan, x: Any, w: Any, bias: Any, out: Any, /) -> None:
        """Write the whole of `out`. Images are (N, C, spatial...) views of any strides, none empty.

        The batch may differ from ``plan.problem.batch``: each image is computed as it would be
        alone, so nothing that decides the order of sums may depend on it.
        """


@dataclass(frozen=True)
class Candidate:
    """One algorithm that was considered for a problem."""

    algorithm: str
    cost: float | None = None  # predicted seconds
    workspace_bytes: int | None = None
    rejected: str | None = None  # the reason, where it cannot serve

    def __str__(self) -> str:
        if self.rejected:
            return f"{self.algorithm}: rejected: {self.rejected}"
        return f"{self.algorithm}: {_seconds(self.cost or 0)}, {_bytes(self.workspace_bytes or 0)}"


@dataclass(frozen=True)
class Plan:
    """How one problem is computed. Call it: ``plan(x, w, bias=None, out=None)``.

    Attributes
    ----------
    problem : ConvProblem
    backend : str
        "numpy" or "cuda".
    algorithm : str
        The chosen algorithm's name.
    candidates : tuple of Candidate
        Every algorithm considered, cheapest first: its predicted cost, or why it was rejected.
    workspace_bytes : int
        Scratch memory of one call, beyond the operands and the result (and beyond fixed
        temporaries of at most 64 KiB).
    flops, bytes_moved : int
        Of the direct sum, and of each operand read and the result written once.
    """

    problem: ConvProblem
    backend: str
    device: Any
    algorithm: str
    candidates: tuple[Candidate, ...]
    implementation: Any
    _calls: Calls = field(default_factory=lambda: Calls(64), init=False, repr=False, compare=False)

    @property
    def workspace_bytes(self) -> int:
        return self._chosen.workspace_bytes or 0

    @property
    def cost(self) -> float:
        """Predicted seconds."""
        return self._chosen.cost or 0.0

    @property
    def flops(self) -> int:
        return self.problem.flops

    @property
    def bytes_moved(self) -> int:
        return self.problem.bytes_moved

    @property
    def _chosen(self) -> Candidate:
        return next(c for c in self.candidates if c.algorithm == self.algorithm)

    def __call__(self, x: Any, w: Any, /, bias: Any = None, out: Any = None) -> Any:
        """Compute. x and w have the shapes and dtypes that were planned; x's batch may differ.

        A plan of dgrad is called with the gradient of the result and w, one of wgrad with x and
        that gradient. A batch's images are computed as each would be alone, to the bit.
        """
        key = signature(x, w, bias, out)
        call = self._calls.get(key)
        if call is not None:
            return call(x, w, bias, out)
        from gpuconv.execute import Operands

        words = {"x": "x", "w": "w", "y": "grad_output"}
        first, second, _ = self.problem.roles
        names = (words[first], words[second], "out")
        operands = Operands("plan", x=x, w=w, bias=bias, out=out, backend=self.backend, names=names)
        return operands.run(self, self._calls, key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.problem, self.backend, self.algorithm)

    def __str__(self) -> str:
        rows = [
            (
                ("-> " if c.algorithm == self.algorithm else "   ") + c.algorithm,
                "" if c.cost is None else _seconds(c.cost),
                "" if c.workspace_bytes is None else _bytes(c.workspace_bytes),
                c.rejected or "",
            )
            for c in self.candidates
        ]
        rows.insert(0, ("   algorithm", "predicted", "workspace", "rejected because"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
            for row in rows
        ]
        return "\n".join(
            [
                str(self.problem),
                f"{_si(self.flops)}FLOP, {_bytes(self.bytes_moved)} to move, "
                f"on {self.backend} ({self.device})",
                *lines,
            ]
        )


@lru_cache(maxsize=4096)
def choose(
    function: str,
    problem: ConvProblem,
    backend: str,
    device: Any,
    algorithm: str = "auto",
    tuned: int | None = None,
) -> Plan:
    """The plan of `problem` on `device`: the cheapest algorithm that serves, or the one named.

    Where `tuned` is not None (``tuning.state``), a measured winner goes before the cheapest.

    Raises ValueError where `algorithm` is no algorithm of the backend, or cannot serve (with the
    reason), and BackendError where none can.
    """
    algorithms = serving(backend, problem.operation)
    by_name = {_name(a): a for a in algorithms}
    if algorithm != "auto" and algorithm not in by_name:
        raise ValueError(
            f"{function}: algorithm is 'auto' or, on the backend {backend!r}, one of "
            f"{', '.join(by_name)}; got {algorithm!r}"
        )
    candidates = sorted(
        (consider(a, problem, device) for a in algorithms),
        key=lambda c: math.inf if c.cost is None else c.cost,
    )
    if algorithm == "auto":
        chosen = next((c for c in candidates if c.rejected is None), None)
        if chosen is None:
            reasons = "; ".join(f"{c.algorithm}: {c.rejected}" for c in candidates)
            raise BackendError(f"{function}: no algorithm serves {problem}: {reasons}")
        if tuned is not None:
            from gpuconv.tuning import winner

            fastest = winner(problem, backend, device)
            free = (c for c in candidates if c.algorithm == fastest and c.rejected is None)
            chosen = next(free, chosen)
    else:
        chosen = next(c for c in candidates if c.algorithm == algorithm)
        # What only "auto" must not choose may be asked for by name.
        if chosen.rejected and chosen.cost is None:
            raise ValueError(
                f"{function}: algorithm={algorithm!r} cannot serve {problem}: {chosen.rejected}"
            )
    return Plan(
        problem, backend, device, chosen.algorithm, tuple(candidates), by_name[chosen.algorithm]
    )


def _restored(problem: ConvProblem, backend: str, algorithm: str) -> Plan:
    """A plan that was copied or came from another process, for this one's device."""
    from gpuconv import backends

    backends.check_backend("plan", backend)
    return choose("plan", problem, backend, backends.backend(backend).device(), algorithm)


def check_algorithm(function: str, algorithm: Any) -> None:
    """ValueError where `algorithm` is no name; ``choose`` says whether it is the name of one."""
    if not isinstance(algorithm, str):
        raise ValueError(f"{function}: algorithm is 'auto' or the name of one; got {algorithm!r}")


@lru_cache(maxsize=16)
def serving(backend: str, operation: Operation) -> tuple[Algorithm, ...]:
    """The algorithms of `backend` that compute `operation`, whatever the problem."""
    from gpuconv.backends import backend as load
    from gpuconv.exchanged import for_wgrad
    from gpuconv.transposed import for_dgrad

    registered: Sequence[Algorithm] = load(backend).algorithms()
    own = [a for a in registered if operation in getattr(a, "OPERATIONS", ("fprop",))]
    if operation == "dgrad":
        own += for_dgrad(backend, registered)
    elif operation == "wgrad" and backend == "cuda":  # NumPy's are products with windows anyway
        own += for_wgrad(backend, registered)
    return tuple(own)


def consider(algorithm: Algorithm, problem: ConvProblem, device: Any) -> Candidate:
    name = _name(algorithm)
    if problem.empty:  # answered before any algorithm is reached, so none need know the case
        return Candidate(name, cost=0.0, workspace_bytes=0)
    verdict = algorithm.supports(problem, device)
    if not verdict:
        assert isinstance(verdict, No)
        return Candidate(name, rejected=verdict.reason)
    workspace, limit = algorithm.workspace(problem, device), problem.workspace_limit
    if limit is not None and workspace > limit:
        return Candidate(
            name,
            workspace_bytes=workspace,
            rejected=f"needs {_bytes(workspace)} of workspace, over workspace_limit={limit}",
        )
    only_by_name = getattr(algorithm, "only_by_name", None)
    return Candidate(
        name,
        cost=algorithm.cost(problem, device),
        workspace_bytes=workspace,
        rejected=only_by_name(problem) if only_by_name else None,
    )


def _name(algorithm: Algorithm) -> str:
    return algorithm.__name__.rpartition(".")[2]


def _seconds(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.2g} µs"


def _bytes(count: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >> shift:
            return f"{count / (1 << shift):.3g} {unit}"
    return f"{count} B"


def _si(count: int) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} "
