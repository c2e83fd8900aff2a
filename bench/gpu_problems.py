"""Random small problems on the GPU, every algorithm, against the float64 reference.

``python -m bench.gpu_problems --seconds 30 --record FILE`` is what ``bench.on_gpu`` runs, by itself
and under compute-sanitizer; it needs neither pytest nor hypothesis. Every result is one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import gpuconv
from gpuconv import testing
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


def cases() -> Iterator[Case]:
    """The fixed ones, then random ones without end."""
    yield from FIXED
    seed = 0
    while True:
        yield testing.random_case(seed)
        seed += 1


def check(case: Case, backend: str) -> Iterator[Result]:
    """Compute `case` with every algorithm that can serve, on `backend`; one result each."""
    problem = case.problem()
    try:
        x, w, bias = case.arrays()
    except (ImportError, TypeError) as error:  # bfloat16 where ml_dtypes is not installed
        yield {"problem": str(problem), "outcome": "skipped", "text": str(error)}
        return
    function = getattr(gpuconv, case.function)
    plan = getattr(gpuconv, f"plan_{case.function}")
    dtype: tuple[Any, ...] = (case.x_dtype, case.w_dtype)
    options = dict(case.kwargs)
    if "dtype" in options:
        dtype = (*dtype, options["dtype"])
    planned = {k: v for k, v in options.items() if k != "dtype"}
    candidates = plan(
        case.x_shape, case.w_shape, dtype=dtype, bias=case.bias, backend=backend, **planned
    ).candidates
    for candidate in candidates:
        if candidate.cost is None:
            continue
        result = {"problem": str(problem), "algorithm": candidate.algorithm, "outcome": "passed"}
        module = import_module(f"gpuconv.{backend}_backend.{candidate.algorithm}")
        try:
            with gpuconv.use_backend(backend):
                y = function(x, w, bias, algorithm=candidate.algorithm, **options)
            testing.assert_close(
                problem, y, x, w, bias,
                c=getattr(module, "ERROR_CONSTANT", 1.0) * (1 if case.integers else 4),
            )  # fmt: skip
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
    for done, case in enumerate(cases()):
        if done >= most or time.monotonic() > end:
            break
        try:
            results = list(check(case, backend))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:1000]
            results = [{"problem": str(case), "outcome": "failed", "text": text}]
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
