"""The CPU as the cost models see it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

WORKSPACE_CAP = 64 << 20  # bytes of scratch memory per call, unless the caller's limit is lower
VECTOR = 64  # bytes of the widest vectors
UNPACKED = 1_000_000  # products that OpenBLAS multiplies without packing


@dataclass(frozen=True)
class Cpu:
    """What the cost models need to know of the machine.

    The rates are those of one thread of a current server core through NumPy; only their ratios
    decide between algorithms.
    """

    threads: int
    gemm_flops: float = 90e9  # float32, a large matrix product
    copy_bytes: float = 8e9  # a strided copy within the caches, bytes read
    memory_bytes: float = 14e9  # a copy through memory, by all threads together
    start_seconds: float = 25e-6  # a call's way to its first block
    wake_seconds: float = 100e-6  # waking the other threads, and waiting for the last
    call_seconds: float = 1.5e-6  # one NumPy call on little data

    def start(self, threads: int) -> float:
        """Seconds of a call that no work accounts for."""
        return self.start_seconds + (self.wake_seconds if threads > 1 else 0)

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


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name."""
    with suppress(OSError):  # Linux alone has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
