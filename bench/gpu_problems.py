"""Random small problems on the GPU, every algorithm of every operation, against the reference.

``python -m bench.gpu_problems --seconds 30 --record FILE`` is what ``bench.on_gpu`` runs, by itself
and under compute-sanitizer; it needs neither pytest nor hypothesis. Every result is one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import gpuconv
from gpuconv import backends, testing
from gpuconv.execute import as_layout_shape
from gpuconv.plan import choose
from gpuconv.problem import ROLES, ConvProblem, Operation, describe
from gpuconv.testing import Case

Result = dict[str, Any]


def _case(x: tuple[int, ...], w: tuple[int, ...], dtype: str = "float32", **options: Any) -> Case:
    return Case(
        ndim=len(w) - 2, x_shape=x, w_shape=w, x_dtype=dtype, w_dtype=dtype,
        options=tuple(options.items()), bias=False, memory="contiguous",
        seed=0, integers=False,
    )  # fmt: skip


# One of each kind first, so that a run cut short has seen them all: dense, 1x1, strided, grouped,
# depthwise, one picture, a large filter, 16 bits, 64 bits, 1-D and 3-D.
FIXED = (
    _case((2, 8, 14, 14), (16, 8, 3, 3), padding=1),
    _case((2, 8, 9, 11), (16, 8, 3, 3), "float16", padding=1),
    _case((1, 16, 12, 12), (24, 16, 1, 1)),
    _case((1, 3, 23, 23), (8, 3, 7, 7), stride=2, padding=3),
    _case((2, 8, 13, 13), (8, 2, 3, 3), padding=1, groups=4),
    _case((2, 8, 17, 19), (8, 1, 3, 3), padding=1, groups=8),
    _case((1, 4, 21, 21), (4, 1, 7, 7), padding=3, groups=4),
    _case((1, 1, 67, 70), (1, 1, 5, 5), padding=2, padding_mode="reflect"),
    _case((1, 1, 80, 80), (1, 1, 31, 31), padding=15),
    _case((1, 8, 10, 10), (8, 8, 3, 3), "float64", padding=1),
    _case((2, 12, 12, 8), (16, 8, 3, 3), padding=1, layout="NHWC"),
    _case((1, 4, 15, 15), (4, 4, 3, 3), padding=4, dilation=4),
    _case((1, 4, 40), (6, 4, 5), padding=2),
    _case((1, 2, 5, 6, 7), (3, 2, 3, 3, 3), padding=1),
)


def cases() -> Iterator[tuple[Case, Operation]]:
    """The fixed ones, forward and then backward; then random ones without end."""
    for operation in ROLES:
        for case in FIXED:
            yield case, operation
    for seed in itertools.count():
        yield testing.random_case(seed), tuple(ROLES)[seed % len(ROLES)]


def _call(
    case: Case, operation: Operation
) -> tuple[ConvProblem, tuple[Any, ...], Callable[..., Any]]:
    """The problem, its arrays (two, and a bias), and the public function, of the options left."""
    x, w, bias = case.arrays()
    if operation == "fprop":
        forward = getattr(gpuconv, case.function)
        return case.problem(), (x, w, bias), partial(forward, x, w, bias, **case.kwargs)
    options = {k: v for k, v in case.kwargs.items() if k != "dtype"}
    y = case.problem()
    dtype = case.w_dtype if operation == "dgrad" else case.x_dtype
    shape = as_layout_shape(y.y_shape, y.layout.endswith("C"), y.batched)
    rng = np.random.default_rng(case.seed + 1)
    dy = testing.random_array(rng, shape, dtype, case.integers)
    dy = testing.in_memory_order(dy, case.memory, -1 if y.layout.endswith("C") else -case.ndim - 1)
    first, second = (dy, w) if operation == "dgrad" else (x, dy)
    problem = describe(
        "gpu_problems", case.ndim, case.x_shape, case.w_shape, first.dtype, second.dtype,
        operation=operation, **options,
    )  # fmt: skip
    if operation == "dgrad":
        gradient = getattr(gpuconv.grad, f"{case.function}_input")
        return problem, (dy, w, None), partial(gradient, case.x_shape, w, dy, **options)
    gradient = getattr(gpuconv.grad, f"{case.function}_weight")
    return problem, (x, dy, None), partial(gradient, x, case.w_shape, dy, **options)


def check(case: Case, backend: str, operation: Operation = "fprop") -> Iterator[Result]:
    """Compute `case` with every algorithm that can serve, on `backend`; one result each."""
    try:
        problem, arrays, function = _call(case, operation)
    except (ImportError, TypeError) as error:  # bfloat16 where ml_dtypes is not installed
        yield {"problem": str(case), "outcome": "skipped", "text": str(error)}
        return
    device = backends.backend(backend).device()
    candidates = choose("gpu_problems", problem, backend, device).candidates
    for candidate in candidates:
        if candidate.cost is None:
            continue
        result = {"problem": str(problem), "algorithm": candidate.algorithm, "outcome": "passed"}
        plan = choose("gpu_problems", problem, backend, device, candidate.algorithm)
        c = getattr(plan.implementation, "ERROR_CONSTANT", 1.0)
        try:
            with gpuconv.use_backend(backend):
                y = function(algorithm=candidate.algorithm)
            testing.assert_close(problem, y, *arrays, c=c if case.integers else 4 * c)
        except ValueError as error:  # an algorithm that looks at w may still refuse it
            result |= {"outcome": "skipped", "text": str(error)[:300]}
        except Exception as error:
            result |= {"outcome": "failed", "text": f"{type(error).__name__}: {error}"[:1000]}
        yield result


def run(
    backend: str, seconds: float, most: int, record: Callable[[Result], None]
) -> dict[str, int]:
    """Check cases until the time is up; how many passed, failed and were skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    end = time.monotonic() + seconds
    for done, (case, operation) in enumerate(cases()):
        if done >= most or time.monotonic() > end:
            break
        try:
            results = list(check(case, backend, operation))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:1000]
            results = [{"problem": f"{operation}: {case}", "outcome": "failed", "text": text}]
        for result in results:
            counts[result["outcome"]] += 1
            record(result)
        if counts["failed"] >= 50:  # enough to know; or the device is lost
            break
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_problems")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--most", type=int, default=100_000, metavar="N", help="cases at most")
    parser.add_argument("--backend", choices=("numpy", "cuda"), default="cuda")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument(
        "--no-pool", action="store_true", help="every array an allocation of its own, for memcheck"
    )
    options = parser.parse_args(argv)
    if options.no_pool:
        # In CuPy's pool a neighbour's memory is as good as one's own: memcheck would see nothing.
        with suppress(ImportError):
            import_module("cupy").cuda.set_allocator(None)
    lines = options.record.open("a") if options.record else None

    def record(result: Result) -> None:
        if lines:
            lines.write(json.dumps(result) + "\n")
            lines.flush()
        if result["outcome"] == "failed":
            print(json.dumps(result))

    counts = run(options.backend, options.seconds, options.most, record)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
