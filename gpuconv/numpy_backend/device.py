"""The CPU as the cost models see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

WORKSPACE_CAP = 64 << 20  # bytes of scratch memory per call, unless the caller's limit is lower


@dataclass(frozen=True)
class Cpu:
    """What the cost models need to know of the machine.

    The rates are those of one thread of a current server core through NumPy; only their ratios
    decide between algorithms.
    """

    threads: int
    gemm_flops: float = 90e9  # float32, a large matrix product
    copy_bytes: float = 8e9  # a strided copy within the caches, bytes read
    call_seconds: float = 1.5e-6  # one NumPy call on little data

    def __str__(self) -> str:
        return f"CPU, {self.threads} thread{'s' * (self.threads != 1)}"


@lru_cache(maxsize=1)
def cpu() -> Cpu:
    """This machine, with as many threads as the process may use."""
    if hasattr(os, "sched_getaffinity"):
        threads = len(os.sched_getaffinity(0))
    else:
        threads = os.cpu_count() or 1
    return Cpu(threads=threads)
