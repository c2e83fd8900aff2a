"""Scratch memory that outlives a call: fresh pages cost more than what is computed in them.

On Linux a new megabyte is 256 page faults, a few hundred microseconds; a convolution of a batch of
small images takes no longer than that. So the buffer of the last call is kept for the next one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpuconv.arrays import HostArray
from gpuconv.numpy_backend.device import WORKSPACE_CAP

ALIGN = 64  # bytes: a cache line, and the widest vector

_kept: HostArray | None = None
_lock = threading.Lock()


def _renew_lock() -> None:
    """A fork may find it held by a thread that the child does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Arena:
    """One call's scratch memory, handed out piece by piece."""

    def __init__(self, buffer: HostArray) -> None:
        self._buffer = buffer
        # In a sixth of the time of ctypes.data.
        address: int = buffer.__array_interface__["data"][0]
        self._used = -address % ALIGN

    def take(self, elements: int, dtype: np.dtype[Any]) -> HostArray:
        """An uninitialised piece, aligned to a cache line."""
        start, size = self._used, elements * dtype.itemsize
        self._used += rounded(size)
        return self._buffer[start : start + size].view(dtype)


def rounded(size: int) -> int:
    """The bytes that a piece of `size` bytes takes."""
    return -(-size // ALIGN) * ALIGN


@contextmanager
def arena(size: int) -> Iterator[Arena]:
    """Scratch memory of `size` bytes: the ``rounded`` sizes of its pieces, and ``ALIGN``."""
    global _kept
    with _lock:
        buffer, _kept = _kept, None
    # A buffer much too large would keep its memory from the caller for ever.
    if buffer is None or not size <= buffer.size <= 8 * size + (4 << 20):
        buffer = None
        buffer = np.empty(size, np.uint8)
    try:
        yield Arena(buffer)
    finally:
        if buffer.size <= WORKSPACE_CAP:
            with _lock:
                _kept = buffer
