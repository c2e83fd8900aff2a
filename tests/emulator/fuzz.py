"""Random problems for every algorithm of the CUDA backend, its kernels under the sanitizers.

    python -m tests.emulator.fuzz --seconds 300 --seed 1 [--algorithm winograd] [--operation dgrad]

Each algorithm and operation is given random problems (testing.random_case) that it serves, and as
much time as the others. The result is compared with the float64 reference under testing.py's error
bound. The threads of a block take turns in another order each time, every second device has one
multiprocessor, so that blocks go through several tiles, and every eighth problem runs in watch mode
as well, which sees races and overruns of single bytes. At the end: a line for each algorithm and
operation, and for the first failure of each a command that repeats it.

What compiling costs is most of the time until the cache of kernels is warm; --dtypes bounds it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

import gpuconv
from gpuconv import cuda_backend, testing
from gpuconv.cuda_backend.device import override
from gpuconv.execute import channels_first
from gpuconv.plan import Plan, choose, consider, serving
from gpuconv.problem import PRECISIONS, ConvProblem, Operation
from gpuconv.testing import EXACT, FLOATING, Case, random_case
from tests.emulator import THREAD_ORDERS, EmulatedDevice
from tests.emulator.build import Mode
from tests.emulator.device import BlockOrder
from tests.test_grad import gradient

DTYPES = ("float32", "float16", "float64", "uint8", "complex64")
SIZES = ((6, 4), (12, 6), (24, 6), (9, 40), (30, 3))  # most pixels along an axis, most channels
LIMITS = (None, None, 0, 1000, 100_000)  # of the workspace
WATCHED = 8  # every so many problems
_TRIES = 30000  # random problems until one is served


@dataclass
class Row:
    """What became of one algorithm's problems."""

    algorithm: str
    operation: Operation
    next_seed: int
    problems: int = 0
    watched: int = 0
    seconds: float = 0.0
    failure: str = ""
    exhausted: bool = False

    def __str__(self) -> str:
        state = (
            "FAILED" if self.failure
            else "serves no more" if self.exhausted
            else "ok" if self.problems
            else "not reached"
        )  # fmt: skip
        return (
            f"{self.algorithm:18} {self.operation:6} {self.problems:6} sanitized "
            f"{self.watched:5} watched {self.seconds:7.1f} s  {state}"
        )


@dataclass(frozen=True)
class Drawn:
    """The random problem of a seed, and its arrays."""

    plan: Plan
    arrays: tuple[Any, ...]  # the operation's operands, and the bias where there is one


def rows(algorithms: Sequence[str], operations: Sequence[Operation], seed: int) -> list[Row]:
    """One for each algorithm that launches kernels of ours, and each of its operations."""
    without = {_name(a) for a in cuda_backend.algorithms() if not list(a.variants())}
    return [
        Row(_name(algorithm), operation, seed)
        for operation in operations
        for algorithm in serving("cuda", operation)
        if _name(algorithm) not in without and (not algorithms or _name(algorithm) in algorithms)
    ]


def _name(algorithm: Any) -> str:
    return str(algorithm.__name__.rpartition(".")[2])


def case_of(seed: int, dtypes: Sequence[str]) -> Case:
    """random_case's; every third with the filters, strides and pads of common networks."""
    rnd = random.Random(seed)
    largest, channels = rnd.choice(SIZES)
    case = random_case(
        seed, largest=largest, channels=channels, dtypes=tuple(dtypes), mixed_dtypes=seed % 4 == 0
    )
    options = {**case.kwargs, "workspace_limit": rnd.choice(LIMITS)}
    if case.x_dtype == case.w_dtype == "float32":
        options["precision"] = rnd.choice(PRECISIONS)
    if seed % 3 == 0:
        size, stride = rnd.choice((3, 3, 5, 7)), rnd.choice((1, 2))
        case = replace(case, w_shape=(*case.w_shape[:2], *(size,) * case.ndim))
        options |= {"stride": stride, "dilation": 1, "padding": size // 2, "padding_mode": "zeros"}
    return replace(case, options=tuple(options.items()))


def draw(row: Row, seed: int, device: Any, dtypes: Sequence[str]) -> Drawn | None:
    """The problem of `seed`; None where the row's algorithm does not serve it, or has no room."""
    case = case_of(seed, dtypes)
    if row.operation == "fprop":
        problem = case.problem()
    else:
        changes = {"flip": seed % 5 == 0, "conjugate": seed % 2 == 0}
        problem, *_ = gradient(case, row.operation, **changes)
    algorithm = next(a for a in serving("cuda", row.operation) if _name(a) == row.algorithm)
    if consider(algorithm, problem, device).cost is None:
        return None
    plan = choose("fuzz", problem, "cuda", device, row.algorithm)
    arrays: tuple[Any, ...] = case.arrays()
    if row.operation != "fprop":
        arrays = gradient(case, row.operation, **changes)[1:]
    if row.algorithm == "separable":
        arrays = (arrays[0], rank_one(plan.problem, arrays[1], seed), *arrays[2:])
    return Drawn(plan, arrays)


def rank_one(problem: ConvProblem, filters: Any, seed: int) -> Any:
    """Outer products of small integers in the shape, dtype and memory order of `filters`."""
    extents = problem.output if problem.roles[1] == "y" else problem.filter
    rng = np.random.default_rng(seed)
    product = np.ones((), np.int64)
    for n in extents:
        factor = rng.integers(0, 2, n, endpoint=True)
        factor[0] = 1
        product = np.multiply.outer(product, factor)
    product = product.astype(filters.dtype)
    result = filters.copy(order="K")
    last = problem.roles[1] == "y" and problem.layout.endswith("C")
    result[...] = product[..., None] if last else product
    return result


def check(drawn: Drawn) -> None:
    """AssertionError where the result is off, EmulatorError where a kernel went wrong."""
    plan, (first, second, *rest) = drawn.plan, drawn.arrays
    problem = plan.problem
    bias = rest[0] if rest else None
    y = plan(first, second, bias)
    constant = getattr(plan.implementation, "ERROR_CONSTANT", 1.0)
    if constant == 1.0:
        testing.assert_close(problem, y, first, second, bias)
        return
    if plan.implementation.only_by_name(problem):
        constant *= 4  # "auto" avoids it where its bound is larger than its constant
    # A transform rounds with all that its tile reads, which the largest sum stands for here.
    y_ref, magnitudes = testing.expected(problem, first, second, bias)
    if problem.roles[2] != "w":
        y = channels_first(y, problem.layout.endswith("C"), problem.batched)
    bound = testing.error_bound(
        problem, y_ref, np.full_like(magnitudes, magnitudes.max()), c=constant
    )
    wrong = ~(np.abs(y.astype(y_ref.dtype) - y_ref) <= bound)
    assert not wrong.any(), f"{problem}: {wrong.sum()} of {wrong.size} elements are off"


def devices(
    mode: Mode, arch: str, block_order: BlockOrder = "ascending"
) -> tuple[EmulatedDevice, EmulatedDevice]:
    """A large one, and one of a single multiprocessor, whose blocks go through several tiles."""
    large, small = (EmulatedDevice(mode, arch=arch, block_order=block_order) for _ in range(2))
    small.sm_count = 1
    return large, small


def run_next(
    row: Row,
    kinds: Sequence[tuple[EmulatedDevice, EmulatedDevice]],
    dtypes: Sequence[str],
    tries: int,
    end: float,
) -> int:
    """The row's next problem on one device of each kind; how many it was run on."""
    for seed in range(row.next_seed, row.next_seed + tries):
        if time.monotonic() >= end:
            return 0
        row.next_seed = seed + 1
        for count, sizes in enumerate(kinds):
            device = sizes[seed // 4 % 2]
            # The seed decides everything, so that --once repeats it.
            device.order, device.seed, device.launches = THREAD_ORDERS[seed % 4], seed, 0
            what = f"seed {seed}"
            try:
                with override(device), gpuconv.use_backend("cuda"):
                    drawn = draw(row, seed, device, dtypes)
                    if drawn is None:
                        break
                    what = str(drawn.plan.problem)
                    check(drawn)
            except Exception as error:  # of whatever kind: the other rows go on
                what += f"\n{type(error).__name__}: {error}"
                row.failure = f"{what}\n{_again(row, seed, device.arch, dtypes)}"
                return count + 1
        else:
            return len(kinds)
    row.exhausted = True
    return 0


def _again(row: Row, seed: int, arch: str, dtypes: Sequence[str]) -> str:
    return (
        f"python -m tests.emulator.fuzz --once --seed {seed} --algorithm {row.algorithm} "
        f"--operation {row.operation} --arch {arch} --dtypes {' '.join(dtypes)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m tests.emulator.fuzz``: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulator.fuzz",
        description="Random problems for every CUDA algorithm, its kernels under the sanitizers.",
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--algorithm", action="append", default=[], help="one of several")
    parser.add_argument("--operation", action="append", choices=get_args(Operation), default=[])
    parser.add_argument("--dtypes", nargs="+", choices=(*FLOATING, *EXACT), default=DTYPES)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--once", action="store_true", help="the problem of --seed alone, watched")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    found = rows(options.algorithm, options.operation or get_args(Operation), options.seed)
    if not found:
        parser.error("no algorithm of that name computes that operation")
    sanitized = devices("sanitize", options.arch)
    watching = devices("watch", options.arch, "shuffled")
    turns = len(found) if options.once else sys.maxsize
    while turns and time.monotonic() < end:
        turns -= 1
        waiting = [row for row in found if not row.failure and not row.exhausted]
        if not waiting:
            break
        row = min(waiting, key=lambda row: row.seconds)
        start = time.monotonic()
        kinds = [sanitized]
        if options.once or row.problems % WATCHED == 0:
            kinds.append(watching)
        ran = run_next(row, kinds, options.dtypes, 1 if options.once else _TRIES, end)
        row.problems += ran > 0
        row.watched += ran > 1
        row.seconds += time.monotonic() - start
    for row in found:
        print(row)
    for row in found:
        if row.failure:
            print(f"\n{row.algorithm} {row.operation}: {row.failure}")
    problems = sum(row.problems for row in found)
    print(f"{problems} problems")
    if any(row.failure for row in found):
        return 1
    return 2 if options.once and not problems else 0  # that seed is none of theirs


if __name__ == "__main__":
    sys.exit(main())
