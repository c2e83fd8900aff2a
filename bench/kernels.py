"""``python -m bench.kernels --arch sm_90a --share 0/16 --record FILE``: compile every 16th kernel.

Several such processes fill the cache of compiled kernels on all cores: everything that comes after
on a GPU finds its kernels there. Each kernel is one JSON line, which says whether it compiled; the
exit status tells of the process alone. It needs no device.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuconv.cuda_backend import compiler
from gpuconv.cuda_backend.launch import Macros


def share(index: int, of: int, stems: Sequence[str] = ()) -> list[tuple[str, Macros]]:
    """Every `of`-th kernel, from the `index`-th; slow and quick ones are mixed."""
    kernels = list(compiler.all_variants(stems))
    random.Random(0).shuffle(kernels)
    return kernels[index::of]


def compile_one(stem: str, macros: Macros, arch: str) -> dict[str, Any]:
    """What became of one kernel."""
    start = time.perf_counter()
    written = " ".join(f"{name}={value}" for name, value in macros.items())
    result: dict[str, Any] = {"kernel": f"{stem} {written}", "outcome": "compiled"}
    try:
        report = compiler.compile_kernel(stem, macros, arch).report
        result |= {
            "registers": report.registers,
            "spilled": report.spill_stores + report.spill_loads,
        }
    except Exception as error:
        result |= {"outcome": "failed", "text": f"{type(error).__name__}: {error}"[-1500:]}
    return result | {"seconds": round(time.perf_counter() - start, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels")
    parser.add_argument("stems", nargs="*", help="kernels to compile (all)")
    parser.add_argument("--arch", required=True, help="sm_90a and the like")
    parser.add_argument("--share", default="0/1", help="I/N: every Nth kernel, from the Ith")
    parser.add_argument("--record", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    index, of = map(int, options.share.split("/"))
    with options.record.open("a") as lines:
        for stem, macros in share(index, of, options.stems):
            lines.write(json.dumps(compile_one(stem, macros, options.arch)) + "\n")
            lines.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
