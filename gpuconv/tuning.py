"""Which algorithm is fastest here, by the clock: ``tune`` measures, ``use_tuned`` believes it.

``winners`` keeps what it finds, in files that are not read outside of ``use_tuned``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import numpy as np

from gpuconv import arrays, backends, dtypes
from gpuconv.arrays import HostArray
from gpuconv.dtypes import DType
from gpuconv.execute import allocation
from gpuconv.plan import Plan, choose
from gpuconv.problem import ConvProblem

_HOPELESS = 50  # times the least predicted cost: such candidates are not tried,
_SHORT = 0.1  # but for those of so few seconds that it does not matter
_ROUND_SECONDS = 2e-3  # that calls of one candidate last before the next one's turn

_wanted: ContextVar[bool] = ContextVar("gpuconv_tuned", default=False)
_winners: dict[str, str | None] = {}  # by the name of their file; None where there is none
_generation = 0  # of winners: plans are cached by it


@contextmanager
def use_tuned() -> Iterator[None]:
    """Let ``algorithm="auto"`` choose what ``tune`` has found fastest on this machine.

    It holds inside the ``with`` block (or in the function that it decorates) for the current thread
    or task, for ``conv*``, ``conv_transpose*``, ``plan_conv*`` and ``grad.*``, and for problems
    that this process or an earlier one has tuned; all others are planned as ever. Results may
    differ by rounding from those of the algorithm that would have been chosen otherwise.

    Examples
    --------
    >>> import gpuconv
    >>> with gpuconv.use_tuned():
    ...     plan = gpuconv.plan_conv2d((1, 3, 32, 32), (8, 3, 3, 3))
    """
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def tune(plan: Plan, /, *, repeats: int = 5) -> Plan:
    """Time the candidates of `plan` on its device, and remember the fastest for ``use_tuned``.

    Parameters
    ----------
    plan : gpuconv.Plan
        Its algorithm does not matter, its candidates do: those that "auto" may choose, without any
        that are predicted to take over 0.1 s and fifty times as long as the cheapest.
    repeats : int
        How many times each has its turn. The median counts.

    Returns
    -------
    gpuconv.Plan
        That of the fastest candidate.

    Raises
    ------
    RuntimeError
        Two candidates disagree by more than rounding explains: a fault of gpuconv.

    Notes
    -----
    The data are random, in contiguous memory of the planned order, and stay in the caches between
    calls. The device should be idle. Without a folder to write in, the winner is known to this
    process alone (and a RuntimeWarning says so).

    Examples
    --------
    >>> import gpuconv
    >>> plan = gpuconv.plan_conv2d((1, 3, 32, 32), (8, 3, 3, 3), backend="numpy")
    >>> tuned = gpuconv.tune(plan, repeats=1)
    >>> with gpuconv.use_tuned():
    ...     again = gpuconv.plan_conv2d((1, 3, 32, 32), (8, 3, 3, 3), backend="numpy")
    >>> again.algorithm == tuned.algorithm
    True
    """
    if repeats < 1:
        raise ValueError(f"tune: repeats is at least 1, got {repeats}")
    problem = plan.problem
    if 0 in (*problem.x_shape, *problem.w_shape, *problem.y_shape):
        return plan
    competitors = _competitors(plan)
    with backends.use_backend(plan.backend):
        _check_agreement(competitors)
        operands, out = _operands(plan), _result(plan)
        seconds: dict[str, list[float]] = {p.algorithm: [] for p in competitors}
        for _ in range(repeats):
            for competitor in competitors:
                seconds[competitor.algorithm].append(_seconds(competitor, operands, out))
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    _remember(plan, min(medians, key=medians.__getitem__), medians)
    return choose("tune", problem, plan.backend, plan.device, "auto", _generation)


def state() -> int | None:
    """What cached plans depend on: None outside of ``use_tuned``, else the winners' generation."""
    return _generation if _wanted.get() else None


def winner(problem: ConvProblem, backend: str, device: Any) -> str | None:
    """The algorithm that was fastest for `problem`, if that is known."""
    files = _files()
    name = files.file_name(problem, backend, device)
    if name not in _winners:
        _winners[name] = files.read(name)
    return _winners[name]


# ---- measuring -------------------------------------------------------------------------------


def _competitors(plan: Plan) -> list[Plan]:
    """The plans of the candidates that are worth a try."""
    free = [c for c in plan.candidates if c.rejected is None]
    most = max(_HOPELESS * min(c.cost or 0.0 for c in free), _SHORT)
    names = [c.algorithm for c in free if (c.cost or 0.0) <= most]
    return [choose("tune", plan.problem, plan.backend, plan.device, name) for name in names]


def _operands(plan: Plan, *, magnitudes: bool = False) -> tuple[Any, Any, Any]:
    """Random x, w and bias of a call, or their magnitudes: the same data every time."""
    problem, rng = plan.problem, np.random.default_rng(0)

    def taken(shape: tuple[int, ...], dtype: DType) -> Any:
        # Small integers: their magnitudes are of their own type, too.
        values = _testing().random_array(rng, shape, dtype, integers=dtype.is_exact)
        if magnitudes and dtype is not dtypes.BOOL:
            values = np.abs(values).astype(values.dtype)
        return backends.backend(plan.backend).take(values, arrays.NUMPY, plan.device)

    found = []
    for role in problem.roles[:2]:
        memory, order = allocation(problem, role, problem.shape_of(role))
        array = taken(memory, problem.dtype_of(role))
        found.append(array if order is None else array.transpose(order))
    bias = None if problem.bias is None else taken((problem.bias_channels,), problem.bias)
    return found[0], found[1], bias


def _result(plan: Plan) -> Any:
    """An array for a call to write to."""
    role = plan.problem.roles[2]
    memory, order = allocation(plan.problem, role, plan.problem.shape_of(role))
    dtype = plan.problem.dtype_of(role)
    out = backends.backend(plan.backend).empty(memory, dtype, plan.device)
    return out if order is None else out.transpose(order)


def _seconds(plan: Plan, operands: tuple[Any, Any, Any], out: Any) -> float:
    """How long a call takes, over as many in a row as make a time that can be measured."""
    wait = getattr(plan.device, "synchronize", lambda: None)
    calls = 1
    while True:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            plan(*operands, out=out)
        wait()
        taken = time.perf_counter() - start
        if taken >= _ROUND_SECONDS:
            return taken / calls
        calls *= 2


def _check_agreement(plans: list[Plan]) -> None:
    """RuntimeError where two plans' results differ by more than their two error bounds."""
    first, *others = plans
    problem, operands = first.problem, _operands(first)
    y, exact = _on_host(first(*operands)), problem.result_dtype.is_exact
    wide = np.complex128 if problem.accumulator.is_complex else np.float64
    if not exact:
        magnitudes = _on_host(first(*_operands(first, magnitudes=True))).astype(wide).real
    for plan in others:
        z = _on_host(plan(*operands))
        if exact:
            agree = np.array_equal(y, z)
        else:
            bounds = (
                _testing().error_bound(problem, y.astype(wide), magnitudes, c=_error_constant(p))
                for p in (first, plan)
            )
            # Sums of magnitudes may overflow a narrow type where no sum does: then anything goes.
            agree = bool(np.all(np.abs(y.astype(wide) - z.astype(wide)) <= sum(bounds)))
        if not agree:
            raise RuntimeError(
                f"tune: {first.algorithm!r} and {plan.algorithm!r} disagree on {problem}"
            )


def _on_host(array: Any) -> HostArray:
    host: HostArray = array if isinstance(array, np.ndarray) else array.get()
    return host


def _testing() -> Any:
    """Not imported with gpuconv: few programs tune."""
    return import_module("gpuconv.testing")


def _error_constant(plan: Plan) -> float:
    return float(getattr(plan.implementation, "ERROR_CONSTANT", 1.0))


# ---- remembering -----------------------------------------------------------------------------


def _remember(plan: Plan, algorithm: str, seconds: dict[str, float]) -> None:
    global _generation
    files = _files()
    name = files.file_name(plan.problem, plan.backend, plan.device)
    _winners[name] = algorithm
    _generation += 1
    try:
        files.write(name, plan, algorithm, seconds)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"gpuconv cannot keep what tune has found ({error}): this process alone knows it; set "
            f"CUPY_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )


def _files() -> Any:
    """Not imported with gpuconv, either."""
    return import_module("gpuconv.winners")
