"""What a multiprocessor does in a cycle, by compute capability: the constants of the cost models.

Arithmetic of the plain cores: CUDA C++ Programming Guide, "Throughput of Native Arithmetic
Instructions". Tensor cores: NVIDIA's architecture whitepapers (Turing TU102, A100, GA102, AD102,
H100, Blackwell), the dense rate of the data sheet divided by multiprocessors and boost clock.
Shared memory: the Programming Guide's 32 banks of 4 bytes. Counts of multiprocessors, clocks and
the memory's bandwidth are the device's own (``device.Device``).

These are peaks. The share of them that a kernel is expected to reach is the kernel's, and stands in
its algorithm's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from gpuconv.cuda_backend.device import capability
from gpuconv.dtypes import DType

_Rate = TypeVar("_Rate", int, float)

LAUNCH_SECONDS = 3e-6  # from one kernel to the next on a stream; an estimate, of no one device
SHARED_BYTES = 128  # of shared memory, that a multiprocessor reads or writes in a cycle

# Fused multiply-adds of a multiprocessor per cycle. A capability that is not listed has the rate of
# the next lower one that is.
MULTIPLY_ADDS = {
    "float32": {75: 64, 80: 64, 86: 128},
    "float64": {75: 2, 80: 32, 86: 2, 90: 64, 120: 2},
    "int32": {75: 64},
    "int64": {75: 16},  # the table has none: a product is made of four 32-bit ones
}

# The same of its tensor cores, for dense operands and sums in float32 (float64 for float64).
# Consumer cards of 86, 89 and 120 have half of the rates that are listed for "half" and "tf32".
TENSOR_MULTIPLY_ADDS = {
    "half": {75: 512, 80: 1024, 86: 512, 90: 2048, 100: 4096, 120: 512},
    "tf32": {80: 512, 86: 256, 90: 1024, 100: 2048, 120: 256},
    "float64": {80: 64, 86: 2, 90: 128, 100: 64, 120: 2},
}

# The share of its "half" and "tf32" rates that mma.sync reaches; the rest takes wgmma on 9.0 (62%:
# measured by many, NVIDIA names no figure) and tcgen05 on 10.0 (an estimate).
MMA_SYNC_SHARE = {75: 1.0, 90: 0.62, 100: 0.25, 120: 1.0}


def multiply_adds(device: Any, dtype: DType | str) -> float:
    """Fused multiply-adds of the plain cores per second, on the whole device.

    Of a complex type: of its real parts, of which a complex product takes four.
    """
    return float(per_cycle(device, dtype) * device.sm_count * device.clock_hz)


def per_cycle(device: Any, dtype: DType | str) -> int:
    """The same of one multiprocessor in a cycle."""
    return _of(MULTIPLY_ADDS[_REAL.get(str(dtype), str(dtype))], device)


def tensor_per_cycle(device: Any, kind: str) -> int:
    """Those of its tensor cores, for "half", "tf32" or "float64"; 0 where they have none."""
    return _of(TENSOR_MULTIPLY_ADDS[kind], device)


def mma_sync_per_cycle(device: Any, kind: str) -> float:
    """The same, as far as mma.sync reaches them."""
    share = 1.0 if kind == "float64" else _of(MMA_SYNC_SHARE, device)
    return share * tensor_per_cycle(device, kind)


_REAL = {"complex64": "float32", "complex128": "float64", "uint32": "int32", "uint64": "int64"}


def _of(rates: Mapping[int, _Rate], device: Any) -> _Rate | int:
    known = [number for number in rates if number <= capability(device)]
    return rates[max(known)] if known else 0
