"""A CUDA device that computes nothing: what a call costs the host shows without a GPU.

Arrays are CuPy's own, over memory of the host, and a launch goes as far as the driver's function,
in whose place stands one that returns at once. Results are whatever lay in the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpuconv.cuda_backend.device import CudaDevice, override

_MEMORY = 64 << 20  # bytes


class _Function:
    ptr = 1

    def __call__(self, *arguments: Any) -> None:
        """In place of CuPy's function object."""


class NullDevice(CudaDevice):
    """An H200 to the planner; ``launched`` counts what reached the driver."""

    def __init__(self) -> None:
        cupy = import_module("cupy")
        self.ordinal = 0
        self.name, self.arch = "null device", "sm_90a"
        self.sm_count, self.max_shared_bytes = 132, 227 << 10
        self.l2_bytes, self.bandwidth, self.clock_hz = 50 << 20, 4.8e12, 1.785e9
        self.launched = 0
        stream = SimpleNamespace(ptr=0)
        self._runtime = SimpleNamespace(getDevice=lambda: 0, memGetInfo=lambda: (0, 0))
        self._driver = SimpleNamespace(
            launchKernel=self._launched,
            funcSetAttribute=lambda *arguments: None,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        )
        cuda = SimpleNamespace(runtime=self._runtime, get_current_stream=lambda ordinal: stream)
        cupy_in_part: Any = SimpleNamespace(ndarray=cupy.ndarray, empty=cupy.empty, cuda=cuda)
        self.xp = self._cupy = cupy_in_part
        self._kernels = {}
        self._threads = threading.local()
        self._limits = threading.Lock()

    def _launched(self, *arguments: Any) -> None:
        self.launched += 1

    def load(self, source: str, macros: Mapping[str, str | int], kernel: str | None = None) -> Any:
        return SimpleNamespace(function=_Function(), shared_limit=0)

    def synchronize(self) -> None:
        """There is nothing to wait for."""


@contextmanager
def null_device() -> Iterator[NullDevice]:
    """The CUDA backend runs on a `NullDevice` inside, and CuPy allocates memory of the host.

    That holds for the thread that enters it. Arrays follow one another in a ring of memory.
    """
    cuda = import_module("cupy").cuda
    memory = np.zeros(_MEMORY + 512, np.uint8)
    owned = cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, device_id=0)
    first = -memory.ctypes.data % 512
    place = 0

    def allocate(size: int) -> Any:
        nonlocal place
        if place + size > _MEMORY:
            place = 0
        found = cuda.MemoryPointer(owned, first + place)
        place += -(-size // 512) * 512
        return found

    with cuda.using_allocator(allocate), override(NullDevice()) as device:
        yield device
