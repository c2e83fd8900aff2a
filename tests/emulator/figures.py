"""How every kernel uses memory: bank conflicts and sectors, as watch mode counts them.

    python -m tests.emulator.figures [--lines] [ALGORITHM ...]

One line for each of PROBLEMS and kernel: wavefronts of shared memory and sectors of global memory,
loads and stores apart, times as few as the same bytes of each request could take; and sectors per
request of global loads. With --lines, each source line that is above 1. Plans are those of a device
of one multiprocessor, which small problems fill.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import gpuconv
from gpuconv.cuda_backend.device import override
from gpuconv.plan import choose
from gpuconv.problem import describe
from gpuconv.testing import random_array
from tests.emulator import EmulatedDevice, Site

Shape = tuple[int, ...]
# algorithm, operation, x (N, C, H, W), w (K, C/G, R, S), dtype, options
PROBLEMS: tuple[tuple[str, str, Shape, Shape, str, dict[str, Any]], ...] = (
    *(
        ("filter2d", "fprop", (1, 1, 99, 256), (1, 1, size, size), dtype, {"padding": size // 2})
        for dtype in ("float32", "float16", "float64", "uint8")
        for size in (3, 9)
    ),
    *(
        (
            "filter2d", "fprop", (1, 1, 99, 256), (1, 1, 3, 5), dtype,
            {"padding": 2, "stride": stride, "dilation": dilation},
        )
        for dtype in ("float32", "float16", "float64", "uint8")
        for stride, dilation in ((2, 1), (3, 1), (4, 1), (1, 2), (1, 3))
    ),
    *(
        (
            "filter2d_mma", "fprop", (1, 1, 99, 256), (1, 1, size, size), dtype,
            {"padding": size // 2},
        )
        for dtype in ("float16", "float32")
        for size in (3, 9, 31)
    ),
    *(
        ("separable", "fprop", (1, 1, 99, 384), (1, 1, 9, 6), dtype, {"padding": "same"})
        for dtype in ("float32", "float16", "float64", "uint8")
    ),
    *(
        (
            "depthwise", "fprop", (1, 64, 28, 28), (64, 1, size, size), dtype,
            {"padding": size // 2, "groups": 64, "stride": stride, "layout": layout},
        )
        for layout in ("NCHW", "NHWC")
        for dtype in ("float32", "float16")
        for size, stride in ((3, 1), (3, 2), (7, 1), (13, 1))
    ),
    *(
        (
            f"{operation}_depthwise", operation, (1, 64, 28, 28), (64, 1, 3, 3), dtype,
            {"padding": 1, "groups": 64, "stride": stride, "layout": layout},
        )
        for operation in ("dgrad", "wgrad")
        for layout in ("NCHW", "NHWC")
        for dtype in ("float32", "float16")
        for stride in ((2,) if operation == "dgrad" else (1, 2))
    ),
    *(
        (
            "winograd", "fprop", (2, c, 16, 16), (64, c, 3, 3), dtype,
            {"padding": 1, "layout": layout},
        )
        for layout in ("NCHW", "NHWC")
        for dtype in ("float32", "float16")
        for c in (16, 144)
    ),
    *(
        (
            algorithm, "fprop", (2, 32, 16, 16), (64, 32, 3, 3), dtype,
            {"padding": 1, "layout": layout},
        )
        for algorithm in ("implicit_gemm", "implicit_gemm_mma")
        for layout in ("NCHW", "NHWC")
        for dtype in ("float32", "float16")
    ),
    ("implicit_gemm_mma", "fprop", (2, 32, 16, 16), (64, 32, 1, 1), "float16", {}),
)  # fmt: skip


def sites(
    algorithm: str, operation: Any, x_shape: Shape, w_shape: Shape, dtype: str,
    options: dict[str, Any],
) -> list[Site]:  # fmt: skip
    """What every source line did in one call."""
    device = EmulatedDevice("watch")
    device.sm_count = 1
    rng = np.random.default_rng(0)
    if options.get("layout") == "NHWC":
        x_shape = (x_shape[0], *x_shape[2:], x_shape[1])
    if algorithm.endswith("_mma") and dtype == "float32":
        options = {**options, "precision": "tf32"}
    forward = describe("figures", 2, x_shape, w_shape, dtype, dtype, **options)
    problem = describe("figures", 2, x_shape, w_shape, dtype, dtype, operation=operation, **options)
    y_shape = forward.y_shape
    if options.get("layout") == "NHWC":
        y_shape = (y_shape[0], *y_shape[2:], y_shape[1])
    shapes = {"x": x_shape, "w": w_shape, "y": y_shape}
    arrays = []
    for role in problem.roles[:2]:
        array = device.empty(shapes[role], dtype)  # aligned as a real device's
        array[...] = random_array(rng, shapes[role], dtype)
        arrays.append(array)
    if algorithm == "separable":
        arrays[1][...] = 1
    with override(device), gpuconv.use_backend("cuda"):
        choose("figures", problem, "cuda", device, algorithm)(*arrays)
    return device.report.sites


def ratio(chosen: Sequence[Site]) -> str:
    ideal = sum(site.ideal for site in chosen)
    return f"{sum(site.cost for site in chosen) / ideal:5.2f}" if ideal else "    -"


def lines(found: Sequence[Site]) -> Iterator[str]:
    """One line of figures for each kernel."""
    for kernel in dict.fromkeys(site.kernel for site in found):
        chosen = {
            (space, operation): [
                s for s in found if (s.kernel, s.space, s.operation) == (kernel, space, operation)
            ]
            for space in ("shared", "global")
            for operation in ("load", "store")
        }
        loads = chosen["global", "load"]
        requests = sum(s.requests for s in loads)
        each = f"{sum(s.sectors for s in loads) / requests:5.1f}" if requests else "    -"
        yield (
            f"{kernel:24} {ratio(chosen['shared', 'load'])} {ratio(chosen['shared', 'store'])}  "
            f"{ratio(loads)} {ratio(chosen['global', 'store'])} {each}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m tests.emulator.figures``: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulator.figures",
        description="Bank conflicts and sectors of every kernel, times the least there could be.",
    )
    parser.add_argument("algorithms", nargs="*", help="whose problems (all)")
    parser.add_argument("--lines", action="store_true", help="also each source line above 1")
    options = parser.parse_args(arguments)
    if unknown := set(options.algorithms) - {problem[0] for problem in PROBLEMS}:
        parser.error(f"no problem of {', '.join(sorted(unknown))}")
    print(f"{'':24} shared       global")
    print(f"{'kernel':24}  load store   load store per request")
    for algorithm, operation, x_shape, w_shape, dtype, others in PROBLEMS:
        if options.algorithms and algorithm not in options.algorithms:
            continue
        found = sites(algorithm, operation, x_shape, w_shape, dtype, others)
        text = " ".join(f"{name}={value}" for name, value in others.items())
        for line in lines(found):
            print(f"{line}   {dtype} {x_shape} {w_shape} {text}", flush=True)
        for site in sorted(found, key=lambda s: s.ideal - s.cost) if options.lines else ():
            if site.cost > site.ideal:
                print(
                    f"    {site.line}: {site.space} {site.operation} {site.bytes} B, "
                    f"{site.requests} requests, {site.cost} of {site.ideal}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
