"""What a call costs the host beyond its arithmetic, layer by layer, in microseconds.

    python -m bench.host_cost [--json FILE]

No GPU is needed. The NumPy backend's algorithm is replaced by one that does nothing. The CUDA
backend runs on the device at hand or, where there is none, on one whose driver does nothing
(``null_device``, which needs CuPy): then the driver's own time, 2 µs and more, is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gpuconv
from bench.null_device import null_device
from gpuconv import backends, calls, conv
from gpuconv import plan as planning
from gpuconv.execute import Operands

X_SHAPE, W_SHAPE = (1, 8, 16, 16), (8, 8, 3, 3)
OPTIONS: dict[str, Any] = {
    "stride": 1, "padding": 1, "dilation": 1, "groups": 1, "padding_mode": "zeros",
    "layout": "NCHW", "dtype": None, "precision": "ieee", "workspace_limit": None,
}  # fmt: skip
_CALLS, _ROUNDS = 200, 60  # a device's queue holds more launches than a round has


@dataclass
class Costs:
    """Microseconds of whole calls, and of the layers that they are made of."""

    backend: str
    algorithm: str
    calls: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)  # of a call like one before it
    first: dict[str, float] = field(default_factory=dict)  # of the first call of its kind


def best(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """The least microseconds of a call, over many rounds: what disturbs only adds."""
    call()
    timer, least = timeit.Timer(call), float("inf")
    for _ in range(_ROUNDS):
        least = min(least, timer.timeit(_CALLS))
        wait()
    return least / _CALLS * 1e6


def measure(backend: str, device: Any, x: Any, w: Any, out: Any) -> Costs:
    """The costs of a convolution of x with w, which are arrays of the backend's own."""
    plan = gpuconv.plan_conv2d(x.shape, w.shape, padding=1, backend=backend)
    costs, wait = Costs(backend, plan.algorithm), getattr(device, "synchronize", _nothing)

    def timed(call: Callable[[], Any]) -> float:
        return best(call, wait)

    def first_conv2d() -> None:
        conv._calls.clear()
        gpuconv.conv2d(x, w, padding=1)

    costs.calls["conv2d(x, w)"] = timed(lambda: gpuconv.conv2d(x, w, padding=1))
    costs.calls["plan(x, w)"] = timed(lambda: plan(x, w))
    costs.calls["plan(x, w, out=out)"] = timed(lambda: plan(x, w, out=out))
    costs.calls["conv2d(x, w), not seen before"] = timed(first_conv2d)

    module = backends.backend(backend)
    key = calls.signature(x, w, None, None)
    dtype = plan.problem.result_dtype
    costs.layers["signature of the arrays"] = timed(lambda: calls.signature(x, w, None, None))
    costs.layers["look-up of the call"] = timed(lambda: plan._calls.get(key))
    costs.layers["allocation"] = timed(lambda: module.empty(plan.problem.y_shape, dtype, device))
    y = module.empty(plan.problem.y_shape, dtype, device)
    bound = module.bind(plan, x, w, None, y)
    if bound is None:
        costs.layers["errstate"] = timed(_without_warnings)
    else:
        costs.layers["launch"] = timed(lambda: bound(x, w, None, y))
    total = costs.calls["plan(x, w)"]
    costs.layers["the rest of plan(x, w)"] = total - sum(costs.layers.values())

    operands = Operands("conv2d", x=x, w=w)

    def problem() -> Any:
        taken, weights = operands.x, operands.w
        return conv.described(
            "conv2d", 2, taken.shape, weights.shape, taken.dtype, weights.dtype, bias=None,
            channels_last=operands.memory_order(2, "NCHW"), **OPTIONS,
        )  # fmt: skip

    described = problem()
    costs.first["take in"] = timed(lambda: Operands("conv2d", x=x, w=w))
    costs.first["problem look-up"] = timed(problem)
    costs.first["plan look-up"] = timed(
        lambda: planning.choose("conv2d", described, operands.backend, operands.device)
    )
    costs.first["check"] = timed(lambda: operands._check(plan))
    costs.first["prepare look-up and run"] = timed(
        lambda: plan.implementation.run(plan, x, w, None, y)
    )
    costs.first["give"] = timed(lambda: operands.give(y))
    return costs


def _nothing(*arguments: Any) -> None:
    """In place of what is not to be measured."""


def _without_warnings() -> None:
    with np.errstate(all="ignore"):
        pass


def numpy_costs() -> Costs:
    """Those of the NumPy backend around an algorithm that does nothing."""
    x, w = np.ones(X_SHAPE, np.float32), np.ones(W_SHAPE, np.float32)
    plan = gpuconv.plan_conv2d(x.shape, w.shape, padding=1, backend="numpy")
    with mock.patch.object(plan.implementation, "run", _nothing):
        return measure("numpy", plan.device, x, w, np.empty(X_SHAPE, np.float32))


def cuda_costs() -> Costs:
    """Those of the CUDA backend, on a real device where there is one."""
    with _device() as device:
        x, w, out = (device.xp.empty(s, np.float32) for s in (X_SHAPE, W_SHAPE, X_SHAPE))
        return measure("cuda", device, x, w, out)


@contextmanager
def _device() -> Iterator[Any]:
    if backends.why_no_cuda() is None:
        yield backends.backend("cuda").device()
    else:
        with null_device() as device:
            yield device


def table(costs: Costs, where: str) -> str:
    """For people."""
    lines = [f"{costs.backend} backend ({where}), {costs.algorithm}, µs"]
    for title, rows in (
        ("calls", costs.calls),
        ("layers of plan(x, w)", costs.layers),
        ("layers of a call not seen before", costs.first),
    ):
        lines.append(f"  {title}")
        lines += [f"    {name:32}{value:8.2f}" for name, value in rows.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_cost", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args(arguments)
    found = [numpy_costs()]
    print(table(found[0], "its algorithm does nothing"))
    try:
        with _device() as device:
            where = str(device)
        found.append(cuda_costs())
    except ImportError as error:
        print(f"no costs of the CUDA backend: {error}", file=sys.stderr)
    else:
        print(table(found[1], where))
    if options.json:
        options.json.write_text(json.dumps([vars(costs) for costs in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
